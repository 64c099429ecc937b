"""IPv4 as bytes: what goes in comes out, scapy agrees, and what is damaged is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers import inet
from scapy.layers.inet import IP, IPerror, TCPerror, UDPerror
from scapy.packet import Raw

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.lab.fragments import Reassembly, is_fragment, split_packet
from natswarm.lab.ipv4 import checksum, decode_packet_untrusted, encode_packet
from natswarm.sim.packet import ICMP, PORT_UNREACHABLE, TCP, TIME_EXCEEDED, Packet

A, B = Endpoint("192.168.1.2", 4000), Endpoint("198.51.100.7", 53)
SEGMENT = bytes(range(8)) + b"\x50\x18\x01\x00" + b"\0\0\0\0" + b"data"

ips = st.ip_addresses(v=4).map(str)
endpoints = st.builds(Endpoint, ips, st.integers(0, 65_535))
hops = st.integers(1, 255)


datagrams = st.builds(
    lambda source, destination, data: Packet(source, destination, data),
    endpoints,
    endpoints,
    st.binary(max_size=300),
)
segments = st.builds(
    # A header of 20 bytes: scapy writes options its own way.
    lambda source, destination, data: Packet(
        source, destination, data[:8] + b"\x50" + data[9:], TCP
    ),
    endpoints,
    endpoints,
    st.binary(min_size=16, max_size=300),
)


def query(asker: Endpoint, ip: str, is_reply: bool, rest: bytes) -> Packet:
    other, data = Endpoint(ip, 0), bytes([0 if is_reply else 8, 0]) + rest
    ends = (other, asker) if is_reply else (asker, other)
    return Packet(*ends, data, ICMP)


queries = st.builds(query, endpoints, ips, st.booleans(), st.binary(min_size=2, max_size=300))
packets = st.one_of(datagrams, segments, queries)


@given(packets, hops)
def test_round_trip(packet: Packet, ttl: int):
    read, read_ttl = decode_packet_untrusted(encode_packet(packet, ttl))
    assert read_ttl == ttl
    if packet.protocol == TCP:  # the checksum is worked out anew
        assert read.data[:12] + read.data[14:] == packet.data[:12] + packet.data[14:]
        packet = packet._replace(data=read.data)
    assert read == packet


@given(packets, st.sampled_from([TIME_EXCEEDED, b"\x03\x04"]))
def test_round_trip_of_an_error(about: Packet, kind: bytes):
    router = Endpoint("203.0.113.9", 0)
    error = Packet(router, about.source, kind + b"\0\0\x05\x78", ICMP, about)
    read, _ = decode_packet_untrusted(encode_packet(error, 64))
    assert read.about is not None
    assert read[:4] == error[:4]
    assert read.about[:2] == about[:2]
    assert read.about.protocol == about.protocol


@given(packets, hops)
def test_scapy_reads_the_same_and_agrees_with_the_checksums(packet: Packet, ttl: int):
    data = encode_packet(packet, ttl)
    theirs = IP(data)
    assert (theirs.src, theirs.dst, theirs.ttl) == (packet.source.ip, packet.destination.ip, ttl)
    assert theirs.proto == packet.protocol
    sums = [layer.chksum for layer in (theirs, theirs.payload)]
    del theirs.chksum, theirs.payload.chksum
    again = IP(bytes(theirs))
    # 0 and 0xFFFF are the same number in one's complement, and UDP reserves 0.
    theirs_again = [layer.chksum or 0xFFFF for layer in (again, again.payload)]
    assert theirs_again == sums


def test_an_error_quotes_the_packet_it_is_about():
    about = Packet(A, B, b"question")
    error = Packet(Endpoint("203.0.113.9", 0), A, PORT_UNREACHABLE, ICMP, about)
    theirs = IP(encode_packet(error, 60))
    assert (theirs[inet.ICMP].type, theirs[inet.ICMP].code) == (3, 3)
    assert (theirs[IPerror].src, theirs[IPerror].dst) == (A.ip, B.ip)
    assert (theirs[UDPerror].sport, theirs[UDPerror].dport) == (A.port, B.port)
    del theirs[inet.ICMP].chksum
    assert bytes(theirs) == encode_packet(error, 60)


@pytest.mark.parametrize("quoted_bytes", [8, 20, 60])
def test_what_a_kernel_quotes_is_read(quoted_bytes: int):
    inner = IP(src=A.ip, dst=B.ip) / inet.TCP(sport=A.port, dport=B.port, seq=7) / Raw(b"x" * 60)
    quoted = bytes(inner)[: 20 + quoted_bytes]
    outer = IP(src="203.0.113.9", dst=A.ip) / inet.ICMP(type=11) / Raw(quoted)
    packet, _ = decode_packet_untrusted(bytes(outer))
    assert packet.about is not None
    assert packet.about[:2] == (A, B)
    assert packet.destination == A
    again = IP(encode_packet(packet, 64))
    assert again[TCPerror].seq == 7


def test_options_and_trailing_bytes_are_left_out():
    data = bytes(IP(src=A.ip, dst=B.ip, options=b"\x01" * 4) / inet.UDP(sport=1, dport=2) / b"hi")
    packet, _ = decode_packet_untrusted(data + b"padding")
    assert packet.data == b"hi"


def test_udp_without_a_checksum_is_taken():
    data = bytes(IP(src=A.ip, dst=B.ip) / inet.UDP(sport=1, dport=2, chksum=0) / b"hi")
    assert decode_packet_untrusted(data)[0].data == b"hi"


@pytest.mark.parametrize(
    ("packet", "error"),
    [
        (Packet(A, B, b"payload"), "checksum"),
        (Packet(A, B, SEGMENT, TCP), "checksum"),
        (Packet(A, Endpoint(B.ip, 0), b"\x08\0\0\1ping", ICMP), "checksum"),
    ],
)
def test_a_flipped_bit_is_refused(packet: Packet, error: str):
    data = bytearray(encode_packet(packet, 64))
    data[-1] ^= 1
    with pytest.raises(DecodeError, match=error):
        decode_packet_untrusted(bytes(data))


@given(st.binary(max_size=100))
def test_rubbish_is_refused(data: bytes):
    with pytest.raises(DecodeError):
        decode_packet_untrusted(data)


@given(packets, st.data())
def test_what_is_damaged_is_read_or_refused_but_no_more(packet: Packet, data: st.DataObject):
    whole = encode_packet(packet, 64)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for damaged in (cut, bytes(flipped)):
        try:
            decode_packet_untrusted(damaged)
        except DecodeError:
            pass
        else:
            assert damaged in (whole, bytes(flipped))


@pytest.mark.parametrize("protocol", [2, 41, 47, 132])
def test_other_protocols_are_refused(protocol: int):
    with pytest.raises(DecodeError, match="neither"):
        decode_packet_untrusted(bytes(IP(src=A.ip, dst=B.ip, proto=protocol) / Raw(b"x" * 20)))


def test_the_checksum_is_the_one_of_rfc_1071():
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2
    assert checksum(b"") == 0xFFFF
    assert checksum(b"\x01") == checksum(b"\x01\x00")


@settings(max_examples=25)
@given(st.binary(min_size=1500, max_size=6000), st.randoms(use_true_random=False))
def test_fragments_come_together_in_any_order(data: bytes, rng: random.Random):
    whole = encode_packet(Packet(A, B, data), 64)
    pieces = split_packet(whole, 1500, 77)
    assert all(len(piece) <= 1500 and is_fragment(piece) for piece in pieces)
    rng.shuffle(pieces)
    reassembly = Reassembly()
    results = [reassembly.add_untrusted(piece, 0.0) for piece in pieces]
    assert results[:-1] == [None] * (len(pieces) - 1)
    assert results[-1] is not None
    assert decode_packet_untrusted(results[-1])[0].data == data


def test_fragments_are_forgotten_in_time_and_in_number():
    whole = encode_packet(Packet(A, B, bytes(2000)), 64)
    reassembly = Reassembly()
    first, second = split_packet(whole, 1500, 1)
    assert reassembly.add_untrusted(first, 0.0) is None
    assert reassembly.add_untrusted(second, 31.0) is None
    assert reassembly.add_untrusted(first, 32.0) is not None
    assert reassembly.add_untrusted(first, 40.0) is None
    for other in range(2, 66):
        assert reassembly.add_untrusted(split_packet(whole, 1500, other)[0], 40.0) is None
    assert reassembly.add_untrusted(second, 40.0) is None


def test_fragments_that_are_too_long_together_are_refused():
    whole = encode_packet(Packet(A, B, bytes(65_000)), 64)
    *_, before_last, last = split_packet(whole, 1500, 1)
    far = bytearray(before_last)
    far[6:8] = (0x2000 | 0x1FFF).to_bytes(2, "big")
    with pytest.raises(DecodeError, match="longer"):
        Reassembly().add_untrusted(bytes(far), 0.0)
    reassembly = Reassembly()
    reassembly.add_untrusted(split_packet(whole, 700, 1)[1], 0.0)
    with pytest.raises(DecodeError, match="contradict"):
        reassembly.add_untrusted(last[:30], 0.0)


def test_a_packet_that_ipv4_cannot_hold_is_an_error():
    with pytest.raises(ValueError, match="at most 65535"):
        encode_packet(Packet(A, B, bytes(65_510)), 64)
    with pytest.raises(ValueError, match="not an IPv4"):
        encode_packet(Packet(Endpoint("3fff::1", 1), B, b""), 64)
