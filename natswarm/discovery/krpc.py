"""KRPC, the messages of mainline nodes: one bencoded dictionary in each datagram.

    query     {t: transaction, y: "q", q: name, a: {id, ...}, ro: 1 if read-only}
    response  {t: transaction, y: "r", r: {id, nodes, ...}, ip: where the query came from}
    error     {t: transaction, y: "e", e: [code, text]}

Nodes are written as 20 bytes of id, 4 or 16 of address and 2 of port. The dictionaries `a` and `r`
stay as they are: each method picks what it needs, by the helpers here that check type and size.

Source: BEP 5; BEP 32 for IPv6; BEP 42 for `ip`; BEP 43 for `ro`. Knows neither routing nor sockets.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from natswarm.address import Endpoint
from natswarm.discovery.krpc_bencode import Value, bdecode_untrusted, bencode
from natswarm.errors import DecodeError

__all__ = [
    "ID_BYTES",
    "Contact",
    "Error",
    "Fields",
    "Message",
    "Query",
    "Response",
    "bytes_in",
    "decode_contacts_untrusted",
    "decode_endpoint_untrusted",
    "decode_krpc_untrusted",
    "encode_contacts",
    "encode_endpoint",
    "id_in",
]

ID_BYTES = 20
# Ours have 4; others' may be anything, and are sent back.
TRANSACTION_BYTES_MAX = 32
# A value of 1,000 bytes (BEP 44), its keys, eight nodes; more does not fit one datagram.
MESSAGE_BYTES_MAX = 1500
CONTACTS_MAX = 64

Fields = dict[bytes, Value]


class Contact(NamedTuple):
    """A mainline node.

    Attributes:
        id: 20 bytes; anybody may claim any.
        endpoint: Where it is.
    """

    id: bytes
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class Query:
    """Somebody asks.

    Attributes:
        transaction: The answer repeats it.
        method: `ping`, `find_node`, `get_peers`, `announce_peer`, `get`, `put`, or another.
        arguments: `id` of the sender and what the method needs.
        is_read_only: Whether the sender answers no queries: nobody should remember it.
    """

    transaction: bytes
    method: bytes
    arguments: Fields
    is_read_only: bool = False

    def encode(self) -> bytes:
        """Return the datagram."""
        message: Fields = {
            b"t": self.transaction,
            b"y": b"q",
            b"q": self.method,
            b"a": self.arguments,
        }
        if self.is_read_only:
            message[b"ro"] = 1
        return bencode(message)


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to a query.

    Attributes:
        transaction: From the query.
        values: `id` of the sender and what was asked for.
        observed: Where the query came from, as the sender saw it; None: it does not say.
    """

    transaction: bytes
    values: Fields
    observed: Endpoint | None = None

    def encode(self) -> bytes:
        """Return the datagram."""
        message: Fields = {b"t": self.transaction, b"y": b"r", b"r": self.values}
        if self.observed is not None:
            message[b"ip"] = encode_endpoint(self.observed)
        return bencode(message)


@dataclass(frozen=True, slots=True)
class Error:
    """The query was not answered.

    Attributes:
        transaction: From the query.
        code: 201 generic, 203 protocol (a bad token too), 204 unknown method, 205 too big, 206
            bad signature, 302 sequence number too low.
        text: In the sender's words.
    """

    transaction: bytes
    code: int
    text: bytes = field(default=b"")

    def encode(self) -> bytes:
        """Return the datagram."""
        return bencode({b"t": self.transaction, b"y": b"e", b"e": [self.code, self.text]})


Message = Query | Response | Error


def decode_krpc_untrusted(data: bytes) -> Message:
    """Read a datagram.

    Raises:
        DecodeError: Not KRPC, or over the bounds.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise DecodeError(f"a message has at most {MESSAGE_BYTES_MAX} bytes, not {len(data)}")
    message = bdecode_untrusted(data, is_order_free=True)
    if not isinstance(message, dict):
        raise DecodeError("a message is a dictionary")
    transaction = bytes_in(message, b"t", at_most=TRANSACTION_BYTES_MAX)
    match message.get(b"y"):
        case b"q":
            return Query(
                transaction,
                bytes_in(message, b"q", at_most=32),
                _fields_in(message, b"a"),
                is_read_only=message.get(b"ro") == 1,
            )
        case b"r":
            observed = message.get(b"ip")
            return Response(
                transaction,
                _fields_in(message, b"r"),
                decode_endpoint_untrusted(observed) if isinstance(observed, bytes) else None,
            )
        case b"e":
            match message.get(b"e"):
                case [int(code), bytes(text), *_]:
                    return Error(transaction, code, text)
    raise DecodeError("a message is a query, a response or an error")


def _fields_in(message: Fields, key: bytes) -> Fields:
    fields = message.get(key)
    if not isinstance(fields, dict):
        raise DecodeError(f"{key!r} is not a dictionary")
    return fields


def bytes_in(fields: Fields, key: bytes, *, at_most: int, at_least: int = 0) -> bytes:
    """Return a string of a message.

    Raises:
        DecodeError: It is missing, no string, or of a wrong size.
    """
    value = fields.get(key)
    if not isinstance(value, bytes) or not at_least <= len(value) <= at_most:
        raise DecodeError(f"{key!r} is not a string of {at_least}..{at_most} bytes")
    return value


def id_in(fields: Fields, key: bytes = b"id") -> bytes:
    """Return the 20 bytes of an id.

    Raises:
        DecodeError: It is missing or of a wrong size.
    """
    return bytes_in(fields, key, at_least=ID_BYTES, at_most=ID_BYTES)


def encode_endpoint(endpoint: Endpoint) -> bytes:
    """Return 6 or 18 bytes: address and port."""
    address = ipaddress.ip_address(endpoint.ip.partition("%")[0])
    return address.packed + endpoint.port.to_bytes(2, "big")


def decode_endpoint_untrusted(data: bytes) -> Endpoint:
    """Read 6 or 18 bytes.

    Raises:
        DecodeError: Another number of bytes.
    """
    if len(data) not in (6, 18):
        raise DecodeError(f"an endpoint has 6 or 18 bytes, not {len(data)}")
    return Endpoint(str(ipaddress.ip_address(data[:-2])), int.from_bytes(data[-2:], "big"))


def encode_contacts(contacts: Iterable[Contact]) -> bytes:
    """Return the compact form of contacts of one address family."""
    return b"".join(contact.id + encode_endpoint(contact.endpoint) for contact in contacts)


def decode_contacts_untrusted(fields: Fields, *, is_ipv6: bool) -> list[Contact]:
    """Return the contacts of an answer, at most 64; empty where it has none.

    Raises:
        DecodeError: Their length is no multiple of that of one.
    """
    data = fields.get(b"nodes6" if is_ipv6 else b"nodes", b"")
    size = ID_BYTES + (18 if is_ipv6 else 6)
    if not isinstance(data, bytes) or len(data) % size:
        raise DecodeError("a list of nodes is cut off")
    return [
        Contact(
            data[start : start + ID_BYTES],
            decode_endpoint_untrusted(data[start + ID_BYTES : start + size]),
        )
        for start in range(0, min(len(data), size * CONTACTS_MAX), size)
    ]
