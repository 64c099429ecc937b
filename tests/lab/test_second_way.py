"""A phone with two interfaces on the kernel's NATs: whole nodes, real sockets, real routes.

All nodes run in this process; their sockets are those of their namespaces.
"""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from natswarm import Identity, NodeConfig, open_node
from natswarm.lab.namespace import Namespace
from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.topology import Lab
from natswarm.net.udp import UdpNetwork

pytestmark = pytest.mark.lab

CHUNK = b"x" * 500


class NetworkOf:
    """The network of a namespace."""

    def __init__(self, namespace: Namespace, interface: str | None = None) -> None:
        self._namespace = namespace
        self._network = UdpNetwork(interface=interface)

    def bind(self, local):
        with self._namespace.entered():
            return self._network.bind(local)

    def bind_group(self, ip, count):
        with self._namespace.entered():
            return self._network.bind_group(ip, count)

    def local_addresses(self):
        with self._namespace.entered():
            return self._network.local_addresses()


@asynccontextmanager
async def node_at(name: str, namespace: Namespace, second: str | None = None):
    config = NodeConfig(
        identity=Identity(name.encode().ljust(32, b".")),
        name=name,
        network=NetworkOf(namespace),
        second_network=None if second is None else NetworkOf(namespace, second),
    )
    async with open_node(config) as node:
        yield node


async def wait_until(holds) -> None:
    while not holds():  # noqa: ASYNC110 - looks as users do
        await trio.sleep(0.05)


async def test_a_stream_goes_on_by_the_second_interface(lab: Lab):
    home = KernelNat(NatKind.PRESERVING)
    phone = lab.add_client("phone", home)
    second = lab.add_second_way(phone, "wwan0", home)
    other = lab.add_client("other", home)
    observers = [lab.add_public(f"observer{index}") for index in range(2)]
    async with (
        node_at("o0", observers[0].namespace) as o0,
        node_at("o1", observers[1].namespace) as o1,
        node_at("a", phone.namespace, "wwan0") as a,
        node_at("b", other.namespace) as b,
    ):
        for node in (a, b):
            for observer in (o0, o1):
                await node.connect(await observer.invite())
            await node.inspect()
        peer = await a.connect(b.peer_id)
        back = next(each for each in b.peers() if each.peer_id == a.peer_id)
        received_bytes = 0

        async def receive(stream, _peer):
            nonlocal received_bytes
            async for data in stream:
                received_bytes += len(data)

        b.serve("test", receive)
        sent_bytes = 0

        async def send():
            nonlocal sent_bytes
            stream = await peer.open_stream("test")
            while True:
                await stream.send_all(CHUNK)
                sent_bytes += len(CHUNK)
                await trio.sleep(0.05)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await wait_until(lambda: peer.paths.has_spare)
                # It is only kept ready; the peer hears of that a moment after it has the path.
                await wait_until(lambda: back.paths.remote.ip == phone.public_ip)
                phone.router.ip("link set dev wan down")  # silence: the phone sees its Wi-Fi yet
                await wait_until(lambda: back.paths.remote.ip == second.public_ip)
                await wait_until(lambda: peer.paths.uses_spare)
                before = sent_bytes
                await wait_until(lambda: received_bytes > before)
                nursery.cancel_scope.cancel()
