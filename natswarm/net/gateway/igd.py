"""The words of UPnP-IGD: searching for a gateway, its description, and the actions it carries out.

Pure functions. Everything a gateway says is XML or text in HTTP heads, from a device on our link
that may be anything. So: no document types (hence no entities), bounded depth and size, and no URL
but `http` on the very address of the gateway.

Source: UPnP Device Architecture 1.1 (SSDP, description, control); WANIPConnection:1 and :2,
WANPPPConnection:1. Knows no sockets; HTTP is http.py's.
"""

from __future__ import annotations

import ipaddress
import urllib.parse
import xml.parsers.expat
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree.ElementTree import Element, TreeBuilder
from xml.sax.saxutils import escape

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.net.gateway.http import decode_head_untrusted

__all__ = [
    "SEARCH_TARGETS",
    "ConnectionService",
    "HttpTarget",
    "SoapFault",
    "decode_action_untrusted",
    "decode_description_untrusted",
    "decode_fault_untrusted",
    "decode_ip_untrusted",
    "decode_number_untrusted",
    "decode_search_answer_untrusted",
    "encode_action",
    "encode_get",
    "encode_search",
    "parse_gateway_url_untrusted",
]

SSDP_GROUP_IP = "239.255.255.250"
SEARCH_TARGETS = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
)
# What can map ports, the best first.
SERVICE_TYPES = (
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
# Of real gateways, the deepest description has 10 levels; 4 connections are a dual-WAN router.
MAX_DEPTH = 32
MAX_SERVICES = 4
MAX_URL_CHARACTERS = 512

# UPnP errors we answer with another try (WANIPConnection:2, 2.5.16 and 2.5.21).
FAULTS_NO_SUCH_ACTION = (401, 602)
FAULT_NO_SUCH_ENTRY = 714
FAULTS_PORT_IS_TAKEN = (718, 729)
FAULT_SAME_PORT_REQUIRED = 724
FAULT_ONLY_PERMANENT_LEASES = 725

_FAULTS = {
    401: "it does not know the action",
    402: "it found fault with our arguments",
    501: "the action failed",
    602: "it does not know the action",
    605: "an argument was too long",
    606: "its settings do not allow it",
    714: "there is no such mapping",
    715: "it wants a remote address named",
    716: "it wants an external port named",
    718: "the external port is taken",
    724: "it wants the external port to be the internal one",
    725: "it knows only leases without end",
    726: "it wants no remote address named",
    727: "it wants no external port named",
    728: "it has no port left",
    729: "the external port is taken by other means",
    732: "it takes no wildcard as internal port",
}


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """A URL on the gateway: where to connect and what to ask for there."""

    endpoint: Endpoint
    path: str


@dataclass(frozen=True, slots=True)
class ConnectionService:
    """A service of the gateway that can map ports.

    Attributes:
        service_type: One of `SERVICE_TYPES`.
        control: Where its actions go.
    """

    service_type: str
    control: HttpTarget

    @property
    def is_version_2(self) -> bool:
        """Whether it can choose a free port itself."""
        return self.service_type == SERVICE_TYPES[0]

    @property
    def short_name(self) -> str:
        """Such as `WANIPConnection:1`."""
        return self.service_type.removeprefix("urn:schemas-upnp-org:service:")


class SoapFault(Exception):
    """The gateway refused an action.

    Args:
        code: UPnP error code; 0 where the gateway named none.
        text: Its own words, bounded.
    """

    def __init__(self, code: int, text: str) -> None:
        meaning = _FAULTS.get(code)
        super().__init__(f"{meaning} (error {code})" if meaning else f"error {code}: {text!r}")
        self.code = code


# Searching ----------------------------------------------------------------------------------------


def encode_search(host: Endpoint, target: str) -> bytes:
    """Return an M-SEARCH for a kind of device, to the group or to one host."""
    return (
        "M-SEARCH * HTTP/1.1\r\n"
        f"HOST: {host}\r\n"
        'MAN: "ssdp:discover"\r\n'
        "MX: 1\r\n"
        f"ST: {target}\r\n"
        "\r\n"
    ).encode("ascii")


def decode_search_answer_untrusted(data: bytes, gateway_ip: str) -> HttpTarget:
    """Read where the gateway's description is.

    Raises:
        DecodeError: Not an answer to our search, or it leads elsewhere.
    """
    status, fields = decode_head_untrusted(data.partition(b"\r\n\r\n")[0])
    if status != 200:
        raise DecodeError(f"an SSDP answer with status {status}")
    if fields.get("st") not in SEARCH_TARGETS:
        raise DecodeError(f"an SSDP answer about {fields.get('st', 'nothing')[:80]!r}")
    return parse_gateway_url_untrusted(fields.get("location", ""), gateway_ip)


def parse_gateway_url_untrusted(url: str, gateway_ip: str) -> HttpTarget:
    """Read a URL that must lie on the gateway itself.

    Raises:
        DecodeError: Not an `http` URL, or of another host: whoever answers for the gateway must not
            send us, with our address inside the network, to somebody else.
    """
    if len(url) > MAX_URL_CHARACTERS or not url.isascii() or not url.isprintable() or " " in url:
        raise DecodeError(f"{url[:80]!r} is no URL")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise DecodeError(f"{url[:80]!r} is no URL: {error}") from error
    if parts.scheme != "http" or "@" in parts.netloc:
        raise DecodeError(f"{url[:80]!r} is no plain http URL")
    if host != gateway_ip:
        raise DecodeError(f"{url[:80]!r} leads to another host than the gateway {gateway_ip}")
    if port == 0:
        raise DecodeError(f"{url[:80]!r} has no port")
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    if not path.startswith("/") or path.startswith("//"):
        raise DecodeError(f"{url[:80]!r} has an odd path")
    return HttpTarget(Endpoint(gateway_ip, port or 80), path)


# HTTP requests ------------------------------------------------------------------------------------


def encode_get(target: HttpTarget) -> bytes:
    """Return a request for a page."""
    return (
        f"GET {target.path} HTTP/1.1\r\nHost: {target.endpoint}\r\nConnection: close\r\n\r\n"
    ).encode("ascii")


def encode_action(service: ConnectionService, action: str, arguments: Mapping[str, str]) -> bytes:
    """Return a request to carry out an action, with its arguments in the order of the standard."""
    inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in arguments.items())
    body = (
        '<?xml version="1.0"?>\r\n'
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service.service_type}">{inner}</u:{action}>'
        "</s:Body></s:Envelope>\r\n"
    ).encode()
    head = (
        f"POST {service.control.path} HTTP/1.1\r\n"
        f"Host: {service.control.endpoint}\r\n"
        'Content-Type: text/xml; charset="utf-8"\r\n'
        f'SOAPAction: "{service.service_type}#{action}"\r\n'
        "Connection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode("ascii")
    return head + body


# XML ----------------------------------------------------------------------------------------------


def decode_description_untrusted(
    data: bytes, location: HttpTarget, gateway_ip: str
) -> list[ConnectionService]:
    """Return what can map ports in a device description, the best first, at most four.

    Raises:
        DecodeError: Not a description, nothing in it can map ports, or its URLs lead elsewhere.
    """
    root = _parse_xml_untrusted(data)
    base = f"http://{location.endpoint}{location.path}"
    if url_base := _text(root, "URLBase"):
        base = url_base
    found = []
    complaint = "the gateway's description names no service that maps ports"
    for element in root.iter("service"):
        service_type = _text(element, "serviceType")
        if service_type not in SERVICE_TYPES:
            continue
        try:
            url = urllib.parse.urljoin(base, _text(element, "controlURL"))
            control = parse_gateway_url_untrusted(url, gateway_ip)
        except (DecodeError, ValueError) as error:
            complaint = f"the gateway's description is unusable: {error}"
            continue
        found.append(ConnectionService(service_type, control))
    if not found:
        raise DecodeError(complaint)
    found.sort(key=lambda service: SERVICE_TYPES.index(service.service_type))
    return found[:MAX_SERVICES]


def decode_action_untrusted(data: bytes, action: str) -> dict[str, str]:
    """Return the results of an action, by name.

    Raises:
        DecodeError: Not the answer to it.
    """
    for element in _parse_xml_untrusted(data).iter(f"{action}Response"):
        return {child.tag: (child.text or "").strip() for child in element}
    raise DecodeError(f"not the answer to {action}")


def decode_fault_untrusted(data: bytes) -> SoapFault:
    """Return why the gateway refused an action.

    Raises:
        DecodeError: It does not say.
    """
    root = _parse_xml_untrusted(data)
    code = next((element.text or "" for element in root.iter("errorCode")), "").strip()
    text = next((element.text or "" for element in root.iter("errorDescription")), "").strip()
    if not code.isascii() or not code.isdigit() or len(code) > 4:
        raise DecodeError("an error without its code")
    return SoapFault(int(code), text[:80])


def decode_number_untrusted(results: Mapping[str, str], name: str, *, maximum: int) -> int:
    """Return a result that must be a number.

    Raises:
        DecodeError: It is none, or above `maximum`.
    """
    text = results.get(name, "")
    if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= maximum:
        return int(text)
    raise DecodeError(f"{name} is {text[:20]!r}, not a number up to {maximum}")


def decode_ip_untrusted(results: Mapping[str, str], name: str) -> str:
    """Return a result that must be an IPv4 address.

    Raises:
        DecodeError: It is none.
    """
    text = results.get(name, "")
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError as error:
        raise DecodeError(f"{name} is {text[:20]!r}, not an IPv4 address") from error


def _text(element: Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _parse_xml_untrusted(data: bytes) -> Element:
    """Parse a document into elements with local names, without attributes.

    Not ElementTree's own parser: expat expands internal entities up to 8 MiB before its protection
    (2.4.1 on) steps in, and leaves external ones to whoever asks. Neither has a place in UPnP, so a
    document type ends the parse. Given as text, a document cannot choose an exotic codec, either.

    Raises:
        DecodeError: Not well-formed, too deep, or with a document type.
    """
    builder = TreeBuilder()
    depth = 0

    def start(name: str, _: object) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise DecodeError(f"XML of more than {MAX_DEPTH} levels")
        builder.start(name.rpartition(" ")[2], {})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name.rpartition(" ")[2])

    def refuse(*_: object) -> None:
        raise DecodeError("XML with a document type, which UPnP has no use for")

    parser = xml.parsers.expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        # Some gateways end their documents with zero bytes, as C programs do.
        parser.Parse(data.rstrip(b"\0").decode("utf-8", "replace"), True)
        return builder.close()
    except xml.parsers.expat.ExpatError as error:
        raise DecodeError(f"not well-formed XML: {error}") from error
