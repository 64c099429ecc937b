from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.errors import AddressError, DecodeError

addresses = st.ip_addresses().filter(lambda ip: ip.version == 4 or ip.ipv4_mapped is None)
endpoints = st.builds(Endpoint, addresses.map(str), st.integers(1, 65_535))


@pytest.mark.parametrize(
    ("ip", "kind"),
    [
        ("10.0.0.1", AddressKind.PRIVATE),
        ("192.168.1.1", AddressKind.PRIVATE),
        ("fd00::1", AddressKind.PRIVATE),
        ("100.63.255.255", AddressKind.GLOBAL),
        ("100.64.0.0", AddressKind.SHARED),
        ("100.127.255.255", AddressKind.SHARED),
        ("100.128.0.0", AddressKind.GLOBAL),
        ("8.8.8.8", AddressKind.GLOBAL),
        ("198.51.100.7", AddressKind.GLOBAL),
        ("198.18.3.4", AddressKind.GLOBAL),
        ("127.0.0.1", AddressKind.LOOPBACK),
        ("::1", AddressKind.LOOPBACK),
        ("fe80::1", AddressKind.LINK_LOCAL),
        ("224.0.0.1", AddressKind.UNUSABLE),
        ("0.0.0.0", AddressKind.UNUSABLE),
        ("255.255.255.255", AddressKind.UNUSABLE),
        ("2a00::1", AddressKind.GLOBAL),
    ],
)
def test_kind(ip: str, kind: AddressKind):
    assert address_kind(ip) is kind


@given(endpoints)
def test_text_and_bytes_come_back(endpoint: Endpoint):
    assert Endpoint.parse(str(endpoint)) == endpoint
    assert len(endpoint.to_bytes()) == 18
    assert Endpoint.decode_untrusted(endpoint.to_bytes()) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "1.2.3.4", "1.2.3.4:", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:-1", "1.2.3.4:１",
     "host.example:80", "2001:db8::1:80", "[2001:db8::1]", "[1.2.3.4:5", "1.2.3.256:7", ":80"],
)  # fmt: skip
def test_bad_text_says_what_is_wrong(text: str):
    with pytest.raises(AddressError, match=r"endpoint|port|brackets|address"):
        Endpoint.parse(text)


@given(st.binary(max_size=40).filter(lambda data: len(data) != 18))
def test_wrong_size_is_a_decode_error(data: bytes):
    with pytest.raises(DecodeError):
        Endpoint.decode_untrusted(data)


@given(st.binary(min_size=18, max_size=18))
def test_any_18_bytes_are_an_endpoint(data: bytes):
    str(Endpoint.decode_untrusted(data))
