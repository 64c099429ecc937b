"""UPnP's words and HTTP's: read within bounds, and only from the gateway itself."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.net.gateway import http, igd
from natswarm.net.gateway.http import HttpResponse, HttpResponseReader
from natswarm.net.gateway.igd import (
    ConnectionService,
    HttpTarget,
    decode_action_untrusted,
    decode_description_untrusted,
    decode_fault_untrusted,
    decode_ip_untrusted,
    decode_number_untrusted,
    decode_search_answer_untrusted,
    encode_action,
    encode_get,
    encode_search,
    parse_gateway_url_untrusted,
)

GATEWAY = "192.168.1.1"
LOCATION = HttpTarget(Endpoint(GATEWAY, 5000), "/rootDesc.xml")

# Shortened from what miniupnpd 2.3.1 sends.
SEARCH_ANSWER = (
    b"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\n"
    b"ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
    b"USN: uuid:00000000-0000-4000-8000-000000000001::urn:...\r\nEXT:\r\n"
    b"SERVER: Debian UPnP/1.1 MiniUPnPd/2.3.1\r\nLOCATION: http://192.168.1.1:5000/rootDesc.xml\r\n"
    b'OPT: "http://schemas.upnp.org/upnp/1/0/"; ns=01\r\n\r\n'
)
DESCRIPTION = b"""\
<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0" configId="1337"><device>
<deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:2</deviceType>
<friendlyName>R\xe9seau</friendlyName><serviceList><service>
<serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType>
<controlURL>/ctl/L3F</controlURL></service></serviceList>
<deviceList><device><deviceList><device><serviceList><service>
<serviceType>urn:schemas-upnp-org:service:WANPPPConnection:1</serviceType>
<controlURL>/ctl/PPP</controlURL></service><service>
<serviceType> urn:schemas-upnp-org:service:WANIPConnection:1 </serviceType>
<controlURL>ctl/IPConn?a=1&amp;b=2</controlURL></service>
</serviceList></device></deviceList></device></deviceList></device></root>\0"""
ADDED = b"""\
<?xml version="1.0"?>
<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>
<u:AddAnyPortMappingResponse xmlns:u="urn:schemas-upnp-org:service:WANIPConnection:2">
<NewReservedPort>40123</NewReservedPort></u:AddAnyPortMappingResponse></s:Body></s:Envelope>"""
FAULT = b"""\
<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><s:Fault>
<faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>
<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>718</errorCode>
<errorDescription>ConflictInMappingEntry</errorDescription></UPnPError></detail></s:Fault></s:Body>
</s:Envelope>"""
BILLION_LAUGHS = b"""\
<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]><root>&c;</root>"""
EXTERNAL_ENTITY = b"""\
<!DOCTYPE root [<!ENTITY x SYSTEM "file:///etc/passwd">]><root>&x;</root>"""


def test_search():
    host = Endpoint("239.255.255.250", 1900)
    assert encode_search(host, igd.SEARCH_TARGETS[1]) == (
        b"M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\n"
        b'MAN: "ssdp:discover"\r\nMX: 1\r\n'
        b"ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\r\n"
    )
    assert decode_search_answer_untrusted(SEARCH_ANSWER, GATEWAY) == LOCATION


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "no status line"),
        (b"NOTIFY * HTTP/1.1\r\n\r\n", "no status line"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
        (SEARCH_ANSWER.replace(b"Gateway", b"Media"), "about 'urn:.*InternetMedia"),
        (SEARCH_ANSWER.replace(b"//192.168.1.1", b"//192.168.1.66"), "another host"),
        (SEARCH_ANSWER.replace(b"LOCATION", b"WHEREABOUTS"), "no plain http URL"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100, "more than 64 fields"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 9000, "more than 8192 bytes"),
    ],
)
def test_search_answers_that_are_none(answer, why):
    with pytest.raises(DecodeError, match=why):
        decode_search_answer_untrusted(answer, GATEWAY)


@pytest.mark.parametrize(
    ("url", "port", "path"),
    [
        ("http://192.168.1.1/", 80, "/"),
        ("http://192.168.1.1", 80, "/"),
        ("HTTP://192.168.1.1:49152/a/b?c=d#e", 49_152, "/a/b?c=d"),
    ],
)
def test_urls_on_the_gateway(url, port, path):
    assert parse_gateway_url_untrusted(url, GATEWAY) == HttpTarget(Endpoint(GATEWAY, port), path)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/desc.xml",
        "https://192.168.1.1/",
        "file:///etc/passwd",
        "http://192.168.1.1.example.com/",
        "http://example.com/",
        "http://127.0.0.1/",
        "http://192.168.1.1@example.com/",
        "http://user@192.168.1.1/",
        "http://192.168.1.1:0/",
        "http://192.168.1.1:99999/",
        "http://192.168.1.1:x/",
        "http://[192.168.1.1/",
        "http://192.168.1.1/a b",
        "http://192.168.1.1/a\r\nX: y",
        "http://192.168.1.1/\u00e9",
        "http://3232235777/",
        "http://0300.0250.1.1/",
        "http://192.168.1.1//example.com/",
        "http://192.168.1.1/" + "a" * 600,
    ],
)
def test_urls_anywhere_else(url):
    with pytest.raises(DecodeError):
        parse_gateway_url_untrusted(url, GATEWAY)


def test_description_names_the_best_service_first():
    services = decode_description_untrusted(DESCRIPTION, LOCATION, GATEWAY)
    assert [service.short_name for service in services] == [
        "WANIPConnection:1",
        "WANPPPConnection:1",
    ]
    assert services[0].control == HttpTarget(Endpoint(GATEWAY, 5000), "/ctl/IPConn?a=1&b=2")
    assert not services[0].is_version_2


def test_description_with_a_base():
    based = DESCRIPTION.replace(
        b"<device>", b"<URLBase>http://192.168.1.1:80/x/</URLBase><device>", 1
    )
    [best, _] = decode_description_untrusted(based, LOCATION, GATEWAY)
    assert best.control == HttpTarget(Endpoint(GATEWAY, 80), "/x/ctl/IPConn?a=1&b=2")


@pytest.mark.parametrize(
    ("description", "why"),
    [
        (b"", "not well-formed"),
        (b"<html><body>Please log in</body>", "not well-formed"),
        (b"<html><body>Please log in</body></html>", "no service that maps ports"),
        (DESCRIPTION[:-40], "not well-formed"),
        (
            DESCRIPTION.replace(b"<device>", b"<URLBase>http://evil.test/</URLBase><device>", 1),
            "another host",
        ),
        (BILLION_LAUGHS, "document type"),
        (EXTERNAL_ENTITY, "document type"),
        (b"<a>" * 40 + b"</a>" * 40, "more than 32 levels"),
        (b"<a>&unknown;</a>", "not well-formed"),
        (DESCRIPTION.decode("latin-1").encode("utf-16"), "not well-formed"),
    ],
)
def test_descriptions_of_no_use(description, why):
    with pytest.raises(DecodeError, match=why):
        decode_description_untrusted(description, LOCATION, GATEWAY)


def test_many_services_are_bounded():
    service = (
        b"<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:2</serviceType>"
        b"<controlURL>/c</controlURL></service>"
    )
    found = decode_description_untrusted(b"<r>" + service * 100 + b"</r>", LOCATION, GATEWAY)
    assert len(found) == 4


def test_actions():
    service = ConnectionService(igd.SERVICE_TYPES[1], HttpTarget(Endpoint(GATEWAY, 5000), "/c"))
    head, _, body = encode_action(service, "Act", {"A": "1", "B": "<&>"}).partition(b"\r\n\r\n")
    assert head == (
        b"POST /c HTTP/1.1\r\nHost: 192.168.1.1:5000\r\n"
        b'Content-Type: text/xml; charset="utf-8"\r\n'
        b'SOAPAction: "urn:schemas-upnp-org:service:WANIPConnection:1#Act"\r\n'
        b"Connection: close\r\nContent-Length: 279"
    )
    assert len(body) == 279
    assert b"<A>1</A><B>&lt;&amp;&gt;</B></u:Act></s:Body></s:Envelope>" in body
    assert encode_get(LOCATION) == (
        b"GET /rootDesc.xml HTTP/1.1\r\nHost: 192.168.1.1:5000\r\nConnection: close\r\n\r\n"
    )


def test_results_and_faults():
    results = decode_action_untrusted(ADDED, "AddAnyPortMapping")
    assert results == {"NewReservedPort": "40123"}
    assert decode_number_untrusted(results, "NewReservedPort", maximum=65_535) == 40_123
    with pytest.raises(DecodeError, match="not the answer"):
        decode_action_untrusted(ADDED, "AddPortMapping")
    fault = decode_fault_untrusted(FAULT)
    assert fault.code == 718
    assert str(fault) == "the external port is taken (error 718)"
    unknown = decode_fault_untrusted(FAULT.replace(b"718", b"899"))
    assert str(unknown) == "error 899: 'ConflictInMappingEntry'"
    for code in (b"", b"-1", b"12345", b"\xd9\xa1"):
        with pytest.raises(DecodeError, match="without its code"):
            decode_fault_untrusted(FAULT.replace(b"718", code))


@pytest.mark.parametrize("text", ["", "-1", "65536", "1e3", "9" * 5000, "\u0661"])
def test_numbers_that_are_none(text):
    with pytest.raises(DecodeError):
        decode_number_untrusted({"N": text}, "N", maximum=65_535)


@pytest.mark.parametrize("text", ["", "example.com", "::1", "1.2.3", "1.2.3.4:5", "1.2.3.256"])
def test_addresses_that_are_none(text):
    with pytest.raises(DecodeError):
        decode_ip_untrusted({"A": text}, "A")
    assert decode_ip_untrusted({"A": "203.0.113.9"}, "A") == "203.0.113.9"


@given(
    document=st.sampled_from([DESCRIPTION, ADDED, FAULT, SEARCH_ANSWER]),
    cuts=st.lists(st.tuples(st.integers(0, 1000), st.binary(max_size=6)), max_size=5),
)
def test_whatever_comes_nothing_but_decode_errors(document, cuts):
    data = bytearray(document)
    for position, replacement in cuts:
        data[position % len(data) : position % len(data) + len(replacement)] = replacement
    for decode in (
        lambda: decode_description_untrusted(bytes(data), LOCATION, GATEWAY),
        lambda: decode_action_untrusted(bytes(data), "AddAnyPortMapping"),
        lambda: decode_fault_untrusted(bytes(data)),
        lambda: decode_search_answer_untrusted(bytes(data), GATEWAY),
    ):
        with contextlib.suppress(DecodeError):
            decode()


# HTTP ---------------------------------------------------------------------------------------------


def read(data: bytes, *, step: int = 1 << 20, ends: bool = True) -> HttpResponse | None:
    """Feed a response in pieces; None if it is not complete."""
    reader = HttpResponseReader()
    for start in range(0, len(data), step):
        reader.receive_untrusted(data[start : start + step])
        if reader.is_complete:
            return reader.response()
    if ends:
        reader.receive_untrusted(b"")
    return reader.response() if reader.is_complete else None


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: a\r\nx: b\r\ngarbage\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b"3;x=y\r\nhel\r\n02\r\nlo\r\n0\r\nTrailer: t\r\n\r\n"
)
UNTIL_END = b"HTTP/1.0 200 OK\r\n\r\nhello"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_http_bodies(step):
    plain = read(PLAIN, step=step, ends=False)
    assert plain == HttpResponse(200, {"content-length": "5", "x": "b"}, b"hello")
    chunked = read(CHUNKED, step=step, ends=False)
    assert chunked is not None
    assert (chunked.status, chunked.body) == (500, b"hello")
    assert read(UNTIL_END, step=step, ends=False) is None
    assert read(UNTIL_END, step=step) == HttpResponse(200, {}, b"hello")


def test_http_length_zero():
    empty = read(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", ends=False)
    assert empty == HttpResponse(200, {"content-length": "0"}, b"")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "before the HTTP response began"),
        (b"SSH-2.0-dropbear\r\n\r\n", "no status line"),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", "no status line"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 3000, "head of more than"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100 + b"\r\n", "more than 64 fields"),
        (PLAIN[:-1], "cut off"),
        (CHUNKED[:-18], "cut off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "no length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "is a lot"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(http.MAX_BODY_BYTES + 1), "body of more than"),
        (CHUNKED.replace(b"02", b"xy"), "no size"),
        (CHUNKED.replace(b"02", b"-2"), "no size"),
        (CHUNKED.replace(b"hel\r\n", b"help!"), "does not end where it says"),
        (CHUNKED.replace(b"3;x=y\r\n", b"3;" + b"x" * 200), "without a size"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            + (b"ffff\r\n" + bytes(0xFFFF) + b"\r\n") * 3,
            "body of more than",
        ),
    ],
)
def test_http_beyond_bounds(data, why):
    with pytest.raises(DecodeError, match=why):
        read(data)


@given(
    document=st.sampled_from([PLAIN, CHUNKED, UNTIL_END]),
    cuts=st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=5)), max_size=4),
    step=st.integers(1, 50),
)
def test_http_of_any_kind_ends_or_is_refused(document, cuts, step):
    data = bytearray(document)
    for position, replacement in cuts:
        data[position % len(data) : position % len(data) + len(replacement)] = replacement
    with contextlib.suppress(DecodeError):
        response = read(bytes(data), step=step)
        assert response is not None
        assert len(response.body) <= http.MAX_BODY_BYTES
