"""A peer as users see it: a connection, where it leads, and how it came about."""

from __future__ import annotations

import math
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, TypeVar

import trio

from natswarm.address import Endpoint
from natswarm.message import Message
from natswarm.net.caller import Caller
from natswarm.net.message_stream import MessageStream
from natswarm.net.stream import Stream

if TYPE_CHECKING:
    from natswarm.discovery.introduction import NodeRecord
    from natswarm.net.attempt import PunctureReport
    from natswarm.net.call import Call, Method
    from natswarm.net.path_set import PathSet
    from natswarm.net.quic import ConnectionStatistics

__all__ = ["Peer"]

# A peer that is alive and asked for nothing slow: two round trips over a bad radio link are 2 s.
CALL_TIMEOUT_S = 10.0

RequestT = TypeVar("RequestT", bound=Message)
ReplyT = TypeVar("ReplyT", bound=Message)


class Peer(trio.abc.AsyncResource):
    """A peer we are connected to, over an encrypted path that nobody stands in between of.

    Attributes:
        peer_id: Who it is; proved in the handshake.
        paths: The ways to it. They come and go; the connection stays.
        puncture: How the first path was made.
        record: What the peer says of itself, once it has; it does so right after connecting.
        sealed_record: The same, signed by it, to show to others.
        connected_at: When the connection was ready, by Trio's clock.
        calls: Ours to it that are under way.
    """

    def __init__(self, paths: PathSet, puncture: PunctureReport | None) -> None:
        self._connection = paths.connection
        self.peer_id = paths.connection.peer_id
        self.paths = paths
        self.puncture = puncture
        self.record: NodeRecord | None = None
        self.sealed_record: bytes | None = None
        self.connected_at = trio.current_time()
        self.calls = Caller(self)
        # Set once it has told its record, or failed to.
        self.introduced = trio.Event()

    def __repr__(self) -> str:
        return f"Peer({self.peer_id.short} at {self.seen_at})"

    @property
    def seen_at(self) -> Endpoint:
        """Where its datagrams come from."""
        return self.paths.seen_at

    def where_seen(self, ip: str) -> Endpoint | None:
        """Return where it is at one of its addresses; None: no living path leads there."""
        return self.paths.where_seen(ip)

    @property
    def is_reachable(self) -> bool:
        """Whether a path leads to it now; while none does, streams wait for the next one."""
        return self.paths.is_alive

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        return self._connection.close_reason is not None

    async def open_stream(self, protocol: str) -> Stream:
        """Start a stream that the peer hands to its handler of `protocol`.

        Raises:
            ConnectionLost: The connection ended.
            trio.ClosedResourceError: We closed it.
        """
        return await self._connection.open_stream(protocol)

    async def accept_stream(self) -> Stream:
        """Wait for a stream that the peer started; the node does, and hands it to its handler."""
        return await self._connection.accept_stream()

    async def call(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        patience_s: float = 0.0,
    ) -> ReplyT:
        """Ask one question and return the answer.

        Where it fails, the peer may have done all the same what it was asked, or not.

        Args:
            method: What is asked; the peer's node answers it (`Node.answer`).
            request: The question.
            timeout_s: How long to wait for the answer. The peer is told, and gives up by then; so
                is an earlier deadline of the caller's own.
            patience_s: How long to wait for a path where none leads to the peer; with 0 the call
                fails as soon as the last one is known to be dead.

        Raises:
            RequestRefused: The peer said no; its `code` is for programs.
            CallTimedOut: The time is over.
            PeerUnreachable: No path leads to the peer.
            ProtocolUnknown: The peer's node does not answer this method.
            CallFailed: The peer gave up without a word.
            ConnectionLost: The connection ended.
            DecodeError: The answer is not what the method has.
        """
        return await self.calls.call(method, request, timeout_s=timeout_s, patience_s=patience_s)

    def start_call(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        payload: bytes | memoryview = b"",
        *,
        timeout_s: float = math.inf,
        patience_s: float = 0.0,
    ) -> AbstractAsyncContextManager[Call[RequestT, ReplyT]]:
        """Begin a call of any number of messages each way.

            async with peer.start_call(TOKENS, Prompt("..."), timeout_s=60) as call:
                async for token, _ in call: ...

        Leaving the block ends the call: what the peer still does for it is cancelled. So does any
        error, and cancelling.

        Args:
            method: What is called; the peer's node serves it (`Node.serve_calls`).
            request: The first message.
            payload: Raw bytes that belong to it.
            timeout_s: How long the whole block may take; the peer is told.
            patience_s: As in `call`.

        Raises:
            NatswarmError: As `call`, from anywhere in the block.
        """
        return self.calls.start(
            method, request, payload, timeout_s=timeout_s, patience_s=patience_s
        )

    async def open_messages(self, protocol: str) -> MessageStream:
        """Start a stream of messages; see `open_stream`."""
        return MessageStream(await self.open_stream(protocol))

    async def wait_introduced(self) -> None:
        """Wait until `record` is there, or will not come."""
        await self.introduced.wait()

    async def wait_lost(self) -> None:
        """Wait until the connection has ended."""
        await self._connection.wait_closed()

    def statistics(self) -> ConnectionStatistics:
        """Counters of the connection."""
        return self._connection.statistics()

    async def aclose(self) -> None:
        """End the connection, after the peer has what streams have sent, or in 5 s."""
        await self._connection.aclose()
