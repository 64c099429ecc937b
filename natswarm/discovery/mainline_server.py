"""The answering half of a mainline node: query in, response or error out.

Announcing and putting takes a token that only the owner of the source address got (BEP 5). Items
are checked before they are kept: size, signature, sequence number, and `cas` (BEP 44). Immutable
items are not kept.

Source: BEP 5, BEP 44. Pure; who is answered at all, and how often, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

from natswarm.address import Endpoint
from natswarm.discovery.krpc import (
    Error,
    Fields,
    Query,
    Response,
    bytes_in,
    encode_contacts,
    encode_endpoint,
    id_in,
)
from natswarm.discovery.mainline_item import item_fields, item_in_untrusted
from natswarm.discovery.mainline_store import MainlineStore, Tokens
from natswarm.discovery.mainline_table import MainlineTable
from natswarm.errors import DecodeError

__all__ = ["MainlineServer"]

TOKEN_BYTES_MAX = 64

PROTOCOL_ERROR, UNKNOWN_METHOD, BAD_SIGNATURE = 203, 204, 206
CAS_MISMATCH, SEQUENCE_TOO_LOW = 301, 302


class MainlineServer:
    """Answers for one node.

    Args:
        entropy: For the secrets of tokens.
        is_ipv6: The family of the nodes we name.
    """

    def __init__(self, entropy: Callable[[int], bytes], *, is_ipv6: bool) -> None:
        self._is_ipv6 = is_ipv6
        self._store = MainlineStore()
        self._tokens = Tokens(entropy)

    def answer_untrusted(
        self, query: Query, source: Endpoint, table: MainlineTable, now: float
    ) -> bytes:
        """Return the datagram that answers a query from `source`."""
        try:
            values = self._values_for(query.method, query.arguments, source, table, now)
        except _Refused as refused:
            return Error(query.transaction, refused.code, str(refused).encode()).encode()
        except DecodeError as error:
            return Error(query.transaction, PROTOCOL_ERROR, str(error).encode()).encode()
        values[b"id"] = table.own_id
        return Response(query.transaction, values, source).encode()

    def _values_for(
        self,
        method: bytes,
        arguments: Fields,
        source: Endpoint,
        table: MainlineTable,
        now: float,
    ) -> Fields:
        match method:
            case b"ping":
                return {}
            case b"find_node":
                return self._nodes_near(id_in(arguments, b"target"), table)
            case b"get_peers":
                info_hash = id_in(arguments, b"info_hash")
                values = self._nodes_near(info_hash, table)
                values[b"token"] = self._tokens.issue(source.ip, now)
                if peers := self._store.peers(info_hash, now):
                    values[b"values"] = [encode_endpoint(peer) for peer in peers]
                return values
            case b"announce_peer":
                self._check_token(arguments, source)
                port = source.port if arguments.get(b"implied_port") else arguments.get(b"port")
                if not isinstance(port, int) or not 1 <= port <= 65_535:
                    raise DecodeError("a port is a number from 1 to 65535")
                self._store.announce(id_in(arguments, b"info_hash"), Endpoint(source.ip, port), now)
                return {}
            case b"get":
                target = id_in(arguments, b"target")
                values = self._nodes_near(target, table)
                values[b"token"] = self._tokens.issue(source.ip, now)
                if (item := self._store.item(target, now)) is not None:
                    values |= item_fields(item)
                return values
            case b"put":
                self._check_token(arguments, source)
                self._put(arguments, now)
                return {}
        raise _Refused(UNKNOWN_METHOD, "unknown method")

    def _nodes_near(self, target: bytes, table: MainlineTable) -> Fields:
        key = b"nodes6" if self._is_ipv6 else b"nodes"
        return {key: encode_contacts(table.closest(target))}

    def _check_token(self, arguments: Fields, source: Endpoint) -> None:
        token = bytes_in(arguments, b"token", at_most=TOKEN_BYTES_MAX)
        if not self._tokens.is_valid(token, source.ip):
            raise DecodeError("bad token")

    def _put(self, arguments: Fields, now: float) -> None:
        salt = bytes_in(arguments, b"salt", at_most=64) if b"salt" in arguments else b""
        item = item_in_untrusted(arguments, salt)
        try:
            item.verify_untrusted()
        except DecodeError as error:
            raise _Refused(BAD_SIGNATURE, str(error)) from error
        known = self._store.item(item.target, now)
        cas = arguments.get(b"cas")
        if known is not None and cas is not None and cas != known.sequence:
            raise _Refused(CAS_MISMATCH, "the sequence number is another by now")
        if not self._store.put(item, now):
            raise _Refused(SEQUENCE_TOO_LOW, "there is a newer one")


class _Refused(Exception):
    """A query that was understood is not carried out."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
