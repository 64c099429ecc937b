"""A peer as users see it: a connection, where it leads, and how it came about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from natswarm.address import Endpoint
from natswarm.net.message_stream import MessageStream
from natswarm.net.stream import Stream

if TYPE_CHECKING:
    from natswarm.discovery.introduction import NodeRecord
    from natswarm.net.attempt import PunctureReport
    from natswarm.net.path_set import PathSet
    from natswarm.net.quic import ConnectionStatistics

__all__ = ["Peer"]


class Peer(trio.abc.AsyncResource):
    """A peer we are connected to, over an encrypted path that nobody stands in between of.

    Attributes:
        peer_id: Who it is; proved in the handshake.
        paths: The ways to it. They come and go; the connection stays.
        puncture: How the first path was made.
        record: What the peer says of itself, once it has; it does so right after connecting.
        sealed_record: The same, signed by it, to show to others.
        connected_at: When the connection was ready, by Trio's clock.
    """

    def __init__(self, paths: PathSet, puncture: PunctureReport | None) -> None:
        self._connection = paths.connection
        self.peer_id = paths.connection.peer_id
        self.paths = paths
        self.puncture = puncture
        self.record: NodeRecord | None = None
        self.sealed_record: bytes | None = None
        self.connected_at = trio.current_time()
        # Set once it has told its record, or failed to.
        self.introduced = trio.Event()

    def __repr__(self) -> str:
        return f"Peer({self.peer_id.short} at {self.seen_at})"

    @property
    def seen_at(self) -> Endpoint:
        """Where its datagrams come from."""
        return self.paths.remote

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
