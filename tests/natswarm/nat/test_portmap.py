"""PCP and NAT-PMP byte for byte, their clocks, and whatever a gateway may answer."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.errors import DecodeError
from natswarm.nat import portmap
from natswarm.nat.portmap import (
    NatPmpAnswer,
    NatPmpEpoch,
    NatPmpResult,
    PcpAnswer,
    PcpEpoch,
    PcpMap,
    PcpResult,
    decode_nat_pmp_untrusted,
    decode_pcp_untrusted,
    encode_nat_pmp_address_request,
    encode_nat_pmp_map_request,
    encode_pcp_announce_request,
    encode_pcp_map_request,
    explain_result,
    nat_pmp_retransmission_delays,
    pcp_retransmission_delays,
    renewal_delay_s,
)

NONCE = bytes(range(0xA0, 0xAC))

# Written by hand from the figures of RFC 6887 and RFC 6886.
ANNOUNCE_REQUEST = "02 00 0000 00000000 00000000000000000000ffffc0a80107"
MAP_REQUEST = (
    "02 01 0000 000004b0 00000000000000000000ffffc0a80107"
    "a0a1a2a3a4a5a6a7a8a9aaab 11 000000 1f90 0000 00000000000000000000ffff00000000"
)
MAP_REQUEST_IPV6 = (
    "02 01 0000 00000000 20010db8000000000000000000000007"
    "a0a1a2a3a4a5a6a7a8a9aaab 11 000000 1f90 1f90 20010db8000000000000000000000007"
)
ANNOUNCE_RESPONSE = "02 80 00 00 00000000 00000e10 000000000000000000000000"
MAP_BODY = "a0a1a2a3a4a5a6a7a8a9aaab 11 000000 1f90 9c40 00000000000000000000ffffcb007109"
MAP_RESPONSE = "02 81 00 00 00000258 00000e10 000000000000000000000000" + MAP_BODY
REFUSED = "02 81 00 02 00000708 00000e10 000000000000000000000000"
MAP_REFUSED = REFUSED + MAP_BODY
OPTION = "01 00 0003 aabbcc00"


def test_pcp_requests():
    assert encode_pcp_announce_request("192.168.1.7") == bytes.fromhex(ANNOUNCE_REQUEST)
    asked = PcpMap(NONCE, 8080, 0, "0.0.0.0")
    assert encode_pcp_map_request("192.168.1.7", asked, 1200) == bytes.fromhex(MAP_REQUEST)
    asked = PcpMap(NONCE, 8080, 8080, "2001:db8::7")
    assert encode_pcp_map_request("2001:db8::7", asked, 0) == bytes.fromhex(MAP_REQUEST_IPV6)
    scoped = encode_pcp_announce_request("fe80::7%eth0")
    assert scoped == encode_pcp_announce_request("fe80::7")


def test_pcp_responses():
    assigned = PcpMap(NONCE, 8080, 40_000, "203.0.113.9")
    cases = {
        ANNOUNCE_RESPONSE: PcpAnswer(0, PcpResult.SUCCESS, 0, 3600),
        MAP_RESPONSE: PcpAnswer(1, PcpResult.SUCCESS, 600, 3600, assigned),
        MAP_RESPONSE + OPTION: PcpAnswer(1, PcpResult.SUCCESS, 600, 3600, assigned),
        MAP_REFUSED: PcpAnswer(1, PcpResult.NOT_AUTHORIZED, 1800, 3600, assigned),
        REFUSED: PcpAnswer(1, PcpResult.NOT_AUTHORIZED, 1800, 3600),
        # RFC 6886, 3.5 and RFC 6887, appendix A: a NAT-PMP gateway's answer to version 2.
        "00 80 0001 00000e10": PcpAnswer(0, PcpResult.UNSUPP_VERSION, 0, 0),
        "00 81 0001": PcpAnswer(1, PcpResult.UNSUPP_VERSION, 0, 0),
        "01 81 00 01 00000000 00000e10": PcpAnswer(1, PcpResult.UNSUPP_VERSION, 0, 0),
    }
    for text, expected in cases.items():
        assert decode_pcp_untrusted(bytes.fromhex(text)) == expected, text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a PCP response"),
        (MAP_REQUEST, "not a PCP response"),
        (MAP_RESPONSE[:-2], "59 bytes"),
        (MAP_RESPONSE + "00" * 1044, "1104 bytes"),
        ("02 81 00 00 00000258 00000e10 000000000000000000000000", "without its mapping"),
        (MAP_RESPONSE + "01 00 0005 aabbcc00", "longer than its message"),
        ("00 80 0000 00000e10 cb007109", "an answer in version 0"),
    ],
)
def test_what_is_no_pcp_response(text, why):
    with pytest.raises(DecodeError, match=why):
        decode_pcp_untrusted(bytes.fromhex(text))


def test_nat_pmp_requests():
    assert encode_nat_pmp_address_request() == bytes.fromhex("00 00")
    request = encode_nat_pmp_map_request(8080, 40_000, 1200)
    assert request == bytes.fromhex("00 01 0000 1f90 9c40 000004b0")


def test_nat_pmp_responses():
    mapped = NatPmpAnswer(1, 0, 3600, internal_port=8080, external_port=40_000, lifetime_s=600)
    cases = {
        "00 80 0000 00000e10 cb007109": NatPmpAnswer(0, 0, 3600, external_ip="203.0.113.9"),
        "00 81 0000 00000e10 1f90 9c40 00000258": mapped,
        "00 81 0002 00000e10 1f90 0000 00000000": NatPmpAnswer(
            1, NatPmpResult.NOT_AUTHORIZED, 3600
        ),
        "00 80 0003 00000e10": NatPmpAnswer(0, NatPmpResult.NETWORK_FAILURE, 3600),
        "00 80 0001": NatPmpAnswer(0, NatPmpResult.UNSUPP_VERSION, 0),
    }
    for text, expected in cases.items():
        assert decode_nat_pmp_untrusted(bytes.fromhex(text)) == expected, text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("00 80", "not a NAT-PMP response"),
        ("00 01 0000 1f90 9c40 000004b0", "not a NAT-PMP response"),
        (MAP_RESPONSE, "version 2"),
        ("00 80 0000 00000e10", "8 bytes"),
        ("00 81 0000 00000e10 1f90 9c40", "12 bytes"),
        ("00 82 0000 00000e10 1f90 9c40 00000258", "opcode 2"),
    ],
)
def test_what_is_no_nat_pmp_response(text, why):
    with pytest.raises(DecodeError, match=why):
        decode_nat_pmp_untrusted(bytes.fromhex(text))


@pytest.mark.parametrize("decode", [decode_pcp_untrusted, decode_nat_pmp_untrusted])
@given(data=st.data())
def test_decoders_raise_nothing_but_decode_errors(decode, data):
    seed = data.draw(
        st.sampled_from([MAP_RESPONSE + OPTION, MAP_REFUSED, "00 80 0000 00000e10 cb007109"])
    )
    message = bytearray(bytes.fromhex(seed))
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(message) - 1), st.integers(0, 255)), max_size=6)
    ):
        message[position] = value
    message = message[: data.draw(st.integers(0, len(message)))] + data.draw(st.binary(max_size=9))
    with contextlib.suppress(DecodeError):
        decode(bytes(message))


@given(
    nonce=st.binary(min_size=12, max_size=12),
    ports=st.tuples(st.integers(1, 65_535), st.integers(0, 65_535)),
    lifetime_s=st.integers(0, 2**32 - 1),
    ip=st.ip_addresses().map(str),
)
def test_pcp_mapping_comes_back_as_it_went(nonce, ports, lifetime_s, ip):
    # A server answers with the request's own body behind its own header.
    request = encode_pcp_map_request("10.0.0.7", PcpMap(nonce, *ports, ip), lifetime_s)
    header = bytes([2, 0x81, 0, 0]) + lifetime_s.to_bytes(4, "big") + bytes(16)
    answer = decode_pcp_untrusted(header + request[24:])
    assert answer.lifetime_s == lifetime_s
    assert answer.mapping is not None
    assert (answer.mapping.nonce, answer.mapping.internal_port) == (nonce, ports[0])
    assert encode_pcp_map_request("10.0.0.7", answer.mapping, lifetime_s) == request


@pytest.mark.parametrize(
    ("internal_port", "external_port", "lifetime_s"),
    [(0, 0, 0), (65_536, 0, 0), (1, -1, 0), (1, 65_536, 0), (1, 1, -1), (1, 1, 2**32)],
)
def test_requests_out_of_range(internal_port, external_port, lifetime_s):
    with pytest.raises(ValueError, match=r"port|lifetime"):
        encode_nat_pmp_map_request(internal_port, external_port, lifetime_s)
    mapping = PcpMap(NONCE, internal_port, external_port, "::")
    with pytest.raises(ValueError, match=r"port|lifetime"):
        encode_pcp_map_request("10.0.0.7", mapping, lifetime_s)
    with pytest.raises(ValueError, match="nonce"):
        encode_pcp_map_request("10.0.0.7", PcpMap(b"short", 1, 1, "::"), 0)


def test_every_result_is_explained():
    for kind in (PcpResult, NatPmpResult):
        for code in kind:
            text = explain_result(kind, code)
            assert code == 0 or (code.name in text and " " in text)
    assert "77" in explain_result(PcpResult, 77)


def test_retransmission():
    delays = list(itertools.islice(pcp_retransmission_delays(random.Random(1)), 20))
    assert 2.7 <= delays[0] <= 3.3
    for before, after in itertools.pairwise(delays):
        assert 0.9 * min(2 * before, 1024) <= after <= 1.1 * min(2 * before, 1024)
    assert list(nat_pmp_retransmission_delays()) == [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]


@given(lease_s=st.integers(1, 2**32 - 1), seed=st.integers(0, 100))
def test_renewal_from_half_time_on(lease_s, seed):
    delay = renewal_delay_s(lease_s, random.Random(seed))
    capped = min(lease_s, portmap.LEASE_CAP_S)
    assert max(4, capped / 2) <= delay <= max(4, capped * 5 / 8)


@pytest.mark.parametrize(
    ("first", "then", "is_loss"),
    [
        ((100, 0.0), (100, 0.0), False),
        ((100, 0.0), (99, 0.0), False),  # answers that changed places
        ((100, 0.0), (98, 0.0), True),
        ((100, 0.0), (0, 3600.0), True),
        ((100, 0.0), (3700, 3600.0), False),
        ((100, 0.0), (3500, 3600.0), False),  # a slow clock
        ((100, 0.0), (3300, 3600.0), True),
        ((100, 0.0), (3900, 3600.0), False),  # a fast clock
        ((100, 0.0), (4100, 3600.0), True),
        ((5000, 0.0), (100, 60.0), True),
    ],
)
def test_pcp_epoch(first, then, is_loss):
    epoch = PcpEpoch()
    assert not epoch.shows_loss(*first)
    assert epoch.shows_loss(*then) is is_loss
    assert not epoch.shows_loss(then[0] + 10, then[1] + 10)


@pytest.mark.parametrize(
    ("first", "then", "is_loss"),
    [
        ((100, 0.0), (99, 0.0), False),
        ((100, 0.0), (97, 0.0), True),
        ((100, 0.0), (3700, 3600.0), False),
        ((100, 0.0), (3260, 3600.0), False),
        ((100, 0.0), (3200, 3600.0), True),
        ((100, 0.0), (9000, 3600.0), False),
    ],
)
def test_nat_pmp_epoch(first, then, is_loss):
    epoch = NatPmpEpoch()
    assert not epoch.shows_loss(*first)
    assert epoch.shows_loss(*then) is is_loss
