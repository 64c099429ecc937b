"""A mesh of nodes in one task tree: what `natswarm.Node` and `Peer` promise, over memory streams.

Streams can be cut at any send, in the middle of it too; then both ends raise BrokenResourceError,
as the streams of a lost connection do.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import trio
import trio.testing

from natswarm import ConfigurationError, ConnectFailed, ConnectionLost, NatswarmError, PeerId
from natswarm.net.call import CallHandler, answering
from natswarm.net.caller import Caller

QUIET_TIMEOUT_S = 10
# What connections say; a memory stream takes no time.
RTT_S = 0.05
STEP_S = 0.01


class FakeMesh:
    """All nodes know and reach each other.

    Attributes:
        send_count: How often any stream has been sent on.
        cut_at_send: Number of the send at which its stream is cut; None for never.
        cut_in_send_over: The same for any send of more bytes than this.
        cut_bytes: How much of the data of that send still gets through.
        published: Who offers which service by routing; None: nobody takes part in routing, and all
            are neighbours instead.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.nodes: dict[PeerId, FakeNode] = {}
        self.wires: list[FakeWire] = []
        self.send_count = 0
        self.cut_at_send: int | None = None
        self.cut_in_send_over: int | None = None
        self.cut_bytes = 0
        self.published: dict[str, list[PeerId]] | None = None
        self.contained: list[Exception] = []
        self._running = 0
        self._changed = trio.lowlevel.ParkingLot()

    def node(self, name: str) -> FakeNode:
        node = FakeNode(self, name)
        self.nodes[node.peer_id] = node
        return node

    async def handle(self, handler, stream, peer) -> None:
        """What a node does with an incoming stream."""
        self._running += 1
        try:
            await handler(stream, peer)
        except (NatswarmError, trio.BrokenResourceError) as error:
            self.contained.append(error)
        finally:
            self._running -= 1
            self._changed.unpark_all()

    async def wait_quiet(self) -> None:
        """Wait until no handler runs any more: nothing of a session is left anywhere."""
        with trio.fail_after(QUIET_TIMEOUT_S):
            while self._running:
                await self._changed.park()

    def kill(self, node: FakeNode) -> None:
        """Let a node vanish: its connections are lost, and nobody reaches it."""
        del self.nodes[node.peer_id]
        for wire in self.wires:
            if node.peer_id in wire.peer_ids:
                wire.cut()


async def compute_here(work, *arguments):
    """Compute on the loop: a mock clock would not wait for a thread."""
    await trio.sleep(STEP_S)
    return work(*arguments)


@dataclass
class FakeRecord:
    peer_id: PeerId
    name: str
    services: tuple[str, ...]


class FakeNode:
    """One node; `services` are what it has announced."""

    def __init__(self, mesh: FakeMesh, name: str) -> None:
        self.mesh = mesh
        self.name = name
        self.peer_id = PeerId(hashlib.sha256(name.encode()).digest())
        self.services: tuple[str, ...] = ()
        self.handlers = {}
        self.connected: list[PeerId] = []

    def serve(self, protocol, handler) -> None:
        self.handlers[protocol] = handler

    def answer(self, method, answer) -> None:
        self.serve_calls(method, answering(answer))

    def serve_calls(self, method, serve, **bounds) -> None:
        self.serve(method.name, CallHandler(method, serve, **bounds).handle)

    async def announce(self, services) -> None:
        self.services = tuple(services)

    async def connect(self, peer_id: PeerId) -> FakePeer:
        await trio.lowlevel.checkpoint()
        if peer_id not in self.mesh.nodes or peer_id == self.peer_id:
            raise ConnectFailed("nobody knows the peer")
        self.connected.append(peer_id)
        return FakePeer(self, self.mesh.nodes[peer_id])

    def peers(self) -> list[FakePeer]:
        """Whom we have connected to, as long as they live."""
        alive = dict.fromkeys(peer_id for peer_id in self.connected if peer_id in self.mesh.nodes)
        return [FakePeer(self, self.mesh.nodes[peer_id]) for peer_id in alive]

    async def lookup(self, key):
        raise ConfigurationError("this node takes no part in routing")

    async def publish(self, topic, value=b"", *, is_service=False):
        self._routed().setdefault(topic, []).append(self.peer_id)

    async def find_service(self, name):
        return list(self._routed().get(name, ()))

    def _routed(self):
        if self.mesh.published is None:
            raise ConfigurationError("this node takes no part in routing")
        return self.mesh.published

    async def find_peers(self) -> list[FakeRecord]:
        await trio.lowlevel.checkpoint()
        if self.mesh.published is not None:
            return []
        return [
            FakeRecord(node.peer_id, node.name, node.services)
            for node in self.mesh.nodes.values()
            if node is not self
        ]


@dataclass
class FakePeer:
    """How `us` sees `them`."""

    us: FakeNode
    them: FakeNode
    is_lost: bool = False

    def __post_init__(self) -> None:
        self.calls = Caller(self)

    async def call(self, method, request, *, timeout_s=10.0, patience_s=0.0):
        return await self.calls.call(method, request, timeout_s=timeout_s, patience_s=patience_s)

    def start_call(self, method, request, payload=b"", *, timeout_s=math.inf, patience_s=0.0):
        return self.calls.start(
            method, request, payload, timeout_s=timeout_s, patience_s=patience_s
        )

    @property
    def peer_id(self) -> PeerId:
        return self.them.peer_id

    @property
    def is_reachable(self) -> bool:
        return self.us.mesh.nodes.get(self.them.peer_id) is self.them

    def statistics(self):
        return SimpleNamespace(rtt_s=RTT_S)

    async def open_stream(self, protocol: str) -> FakeStream:
        await trio.lowlevel.checkpoint()
        mesh = self.us.mesh
        if self.them.peer_id not in mesh.nodes:
            raise ConnectionLost("the connection is lost")
        wire = FakeWire(mesh, frozenset({self.us.peer_id, self.them.peer_id}))
        mesh.wires.append(wire)
        ours, theirs = (FakeStream(wire, end, protocol) for end in wire.ends)
        handler = self.them.handlers.get(protocol)
        if handler is None:
            await theirs.aclose()
        else:
            mesh.nursery.start_soon(mesh.handle, handler, theirs, FakePeer(self.them, self.us))
        return ours


@dataclass
class FakeWire:
    """What two ends of a stream share."""

    mesh: FakeMesh
    peer_ids: frozenset[PeerId]
    is_cut: bool = False
    ends: tuple[trio.StapledStream, ...] = field(default_factory=trio.testing.memory_stream_pair)
    streams: list[FakeStream] = field(default_factory=list)

    def cut(self) -> None:
        self.is_cut = True
        for stream in self.streams:
            stream.tell_reader_gone()
        for end in self.ends:
            end.send_stream.close()
            end.receive_stream.close()


class FakeStream(trio.abc.HalfCloseableStream):
    """One end; closing it while cancelled resets it, as streams of natswarm do."""

    def __init__(self, wire: FakeWire, inner: trio.StapledStream, protocol: str) -> None:
        self.wire = wire
        self.inner = inner
        self.protocol = protocol
        self.is_closed = False
        self._on_reader_gone = None
        wire.streams.append(self)

    def when_reader_gone(self, callback) -> None:
        self._on_reader_gone = callback
        if self.wire.is_cut or any(each.is_closed for each in self.wire.streams):
            self.tell_reader_gone()

    def tell_reader_gone(self) -> None:
        callback, self._on_reader_gone = self._on_reader_gone, None
        if callback is not None:
            callback()

    async def send_all(self, data) -> None:
        mesh = self.wire.mesh
        send = mesh.send_count
        mesh.send_count += 1
        is_large = mesh.cut_in_send_over is not None and len(data) > mesh.cut_in_send_over
        if send == mesh.cut_at_send or is_large:
            if mesh.cut_bytes:
                await self.inner.send_all(bytes(data)[: mesh.cut_bytes])
            await trio.testing.wait_all_tasks_blocked()  # who reads has read what there was
            self.wire.cut()
        await self._on_inner(self.inner.send_all, data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._on_inner(self.inner.wait_send_all_might_not_block)

    async def send_eof(self) -> None:
        await self._on_inner(self.inner.send_eof)

    async def receive_some(self, max_bytes=None) -> bytes:
        return await self._on_inner(self.inner.receive_some, max_bytes)

    async def _on_inner(self, call, *arguments):
        try:
            result = await call(*arguments)
        except trio.ClosedResourceError:
            if self.wire.is_cut and not self.is_closed:
                raise trio.BrokenResourceError("the connection is lost") from None
            raise
        if self.wire.is_cut and not self.is_closed:
            raise trio.BrokenResourceError("the connection is lost")
        return result

    async def aclose(self) -> None:
        self.is_closed = True
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.wire.cut()
            raise
        self.inner.send_stream.close()
        self.inner.receive_stream.close()
        for other in self.wire.streams:
            if other is not self:
                other.tell_reader_gone()
