"""Whole nodes on the virtual internet, under Trio's autojumping clock.

After each swarm every port of every host must be closed: what leaks, fails its test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from natswarm import (
    Identity,
    Internet,
    Node,
    NodeConfig,
    NodeEvent,
    Peer,
    VirtualNetwork,
    World,
    open_node,
    run_world,
)
from natswarm.net.nursery import open_private_nursery
from natswarm.sim.link import LinkConditions
from natswarm.sim.topology import Host

CUT = LinkConditions(loss=1.0)


class Swarm:
    """Nodes by name, each on a host of its own."""

    def __init__(self, seed: int, nursery: trio.Nursery) -> None:
        self.seed = seed
        self.internet = Internet(World(seed=seed))
        self.nodes: dict[str, Node] = {}
        self.hosts: dict[str, Host] = {}
        self.events: dict[str, list[NodeEvent]] = {}
        self._nursery = nursery
        self._scopes: dict[str, tuple[trio.CancelScope, trio.Event]] = {}

    def identity(self, name: str) -> Identity:
        """The key of a name: which of two PeerIds is lower differs from seed to seed."""
        return Identity(f"{self.seed}/{name}".encode().ljust(32, b".")[:32])

    async def add(self, name: str, kind: Any = "public", **config: Any) -> Node:
        """Start a node, on a new host or, for a name that was stopped, on its old one."""
        if name not in self.hosts:
            self.hosts[name] = self.internet.add_host(name, kind)
        self.events[name] = []
        config.setdefault("network", VirtualNetwork(self.hosts[name]))
        config.setdefault("on_event", self.events[name].append)
        await self._nursery.start(
            self._run,
            name,
            NodeConfig(
                identity=self.identity(name),
                name=name,
                seed=self.seed * 1000 + len(self.hosts),
                **config,
            ),
        )
        return self.nodes[name]

    async def _run(self, name: str, config: NodeConfig, task_status: Any) -> None:
        stopped = trio.Event()
        with trio.CancelScope() as scope:
            async with open_node(config) as node:
                self.nodes[name] = node
                self._scopes[name] = scope, stopped
                task_status.started()
                await trio.sleep_forever()
        stopped.set()

    async def stop(self, name: str) -> None:
        """Leave the node's body, as a user does, and wait until it is closed."""
        scope, stopped = self._scopes.pop(name)
        del self.nodes[name]
        scope.cancel()
        await stopped.wait()

    async def crash(self, name: str) -> None:
        """Stop a node whose goodbye nobody hears; its host is on the net again afterwards."""
        mend = self.cut(name)
        await self.stop(name)
        await trio.sleep(1)  # let what is on the cut link be lost
        mend()

    def cut(self, name: str) -> Callable[[], None]:
        """Cut the cable of a host; return what mends it."""
        uplink = self.hosts[name].uplink
        before = uplink.upload.conditions, uplink.download.conditions
        uplink.upload.conditions = uplink.download.conditions = CUT

        def mend() -> None:
            uplink.upload.conditions, uplink.download.conditions = before

        return mend

    def worsen(self, loss: float) -> None:
        """Lose so many datagrams on every host's link, in each direction."""
        for host in self.hosts.values():
            for link in (host.uplink.upload, host.uplink.download):
                now = link.conditions
                link.conditions = LinkConditions(now.delay_s, now.jitter_s, loss)

    def port_count(self, name: str) -> int:
        return len(self.hosts[name].ports)

    async def add_observers(self, count: int = 2) -> list[Node]:
        """Start public nodes `obs0`, `obs1`, ..., all connected with each other."""
        observers = [await self.add(f"obs{index}") for index in range(count)]
        for index, observer in enumerate(observers):
            for other in observers[:index]:
                await observer.connect(await other.invite())
        return observers

    async def add_inspected(self, name: str, kind: Any = "public", **config: Any) -> Node:
        """Start a node that knows the observers and its own NAT."""
        node = await self.add(name, kind, **config)
        for observer in self.observers():
            await node.connect(await observer.invite())
        await node.inspect()
        return node

    def observers(self) -> list[Node]:
        return [node for name, node in self.nodes.items() if name.startswith("obs")]

    def peer(self, of: str, to: str) -> Peer:
        """The one connection of a node to another."""
        found = [p for p in self.nodes[of].peers() if p.peer_id == self.identity(to).peer_id]
        assert len(found) == 1, f"{of} has {len(found)} connections to {to}"
        return found[0]

    async def check_talk(self, of: str, to: str) -> None:
        """Assert that two nodes have one connection, the same, and that streams work on it."""

        async def echo(stream: trio.abc.HalfCloseableStream, _peer: Peer) -> None:
            async for chunk in stream:
                await stream.send_all(chunk)
            await stream.send_eof()

        for one, other in ((of, to), (to, of)):
            self.nodes[other].serve("test/echo", echo)
            with trio.fail_after(10):
                stream = await self.peer(one, other).open_stream("test/echo")
                await stream.send_all(one.encode() * 1000)
                await stream.send_eof()
                assert b"".join([chunk async for chunk in stream]) == one.encode() * 1000
                await stream.aclose()


@asynccontextmanager
async def _open_swarm(seed: int = 1) -> AsyncIterator[Swarm]:
    print(f"swarm seed {seed}")  # pytest shows it with a failure
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock), "tests of nodes do not wait in real time"
    async with open_private_nursery() as nursery:
        swarm = Swarm(seed, nursery)
        async with run_world(swarm.internet.world):
            yield swarm
            for name in reversed(list(swarm.nodes)):
                await swarm.stop(name)
    leaked = {name: list(host.ports) for name, host in swarm.hosts.items() if host.ports}
    assert not leaked, f"ports left open: {leaked}"


@pytest.fixture
def open_swarm() -> Callable[..., AbstractAsyncContextManager[Swarm]]:
    """`async with open_swarm(seed=1) as swarm:`; the test must ask for `autojump_clock` itself."""
    return _open_swarm
