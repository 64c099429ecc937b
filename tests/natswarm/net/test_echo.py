"""Echoes: answered from the right port, in size no more than asked, within a budget."""

from __future__ import annotations

import random

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.identity import Identity
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.classify import Observer
from natswarm.net.echo import ECHOES_PER_S, UNSOLICITED_ECHOES_PER_S, EchoService
from natswarm.net.virtual import VirtualNetwork, VirtualPort, run_world
from natswarm.sim.topology import Internet
from natswarm.sim.world import World
from natswarm.wire import EchoReply, EchoRequest, decode_echo_reply_untrusted

SERVER, CLIENT, THIRD = (Identity(letter * 32) for letter in (b"s", b"c", b"t"))
ANY = Endpoint("0.0.0.0", 0)
TRANSACTION = b"8 bytes."


class Site:
    """A host with an echo service on two ports, which answers on its own."""

    def __init__(self, internet: Internet, name: str, kind: str, identity: Identity) -> None:
        self.host = internet.add_host(name, kind)
        self.identity = identity
        self.network = VirtualNetwork(self.host)
        self.main, self.alternate = self.network.bind(ANY), self.network.bind(ANY)
        self.service = EchoService(identity, self.network, "0.0.0.0", self.main, self.alternate)

    def endpoint(self, port: VirtualPort) -> Endpoint:
        return Endpoint(self.host.ip, port.local_endpoint.port)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve, self.main)
            nursery.start_soon(self._serve, self.alternate)

    async def _serve(self, port: VirtualPort) -> None:
        while True:
            for data, source in await port.receive_batch():
                if data[0] == 4:
                    self.service.answer_untrusted(
                        data, source, arrived_at_alternate=port is self.alternate
                    )
                else:
                    self.service.receive_reply_untrusted(data, source)


def request(*, from_alternate_port: bool = False) -> bytes:
    return EchoRequest(TRANSACTION, CLIENT.peer_id, from_alternate_port=from_alternate_port).encode(
        CLIENT
    )


@pytest.mark.parametrize("asked_at", ["main", "alternate"])
@pytest.mark.parametrize("from_alternate", [False, True])
async def test_the_answer_comes_from_where_it_was_asked_for(
    autojump_clock, asked_at, from_alternate
):
    internet = Internet(World(seed=1))
    async with run_world(internet.world), trio.open_nursery() as nursery:
        server = Site(internet, "server", "public", SERVER)
        nursery.start_soon(server.run)
        client = VirtualNetwork(internet.add_host("client")).bind(ANY)
        asked = request(from_alternate_port=from_alternate)
        client.send(asked, server.endpoint(getattr(server, asked_at)))
        (arrival,) = await client.receive_batch()
        is_alternate = from_alternate or asked_at == "alternate"
        port = server.alternate if is_alternate else server.main
        assert arrival.source == server.endpoint(port)
        assert len(arrival.data) == len(asked)
        assert decode_echo_reply_untrusted(arrival.data) == EchoReply(
            TRANSACTION,
            SERVER.peer_id,
            Endpoint(internet.hosts["client"].ip, client.local_endpoint.port),
            from_alternate_port=is_alternate,
        )
        nursery.cancel_scope.cancel()


async def test_answers_are_within_a_budget(autojump_clock):
    internet = Internet(World(seed=1))
    async with run_world(internet.world):
        server = Site(internet, "server", "public", SERVER)
        for _ in range(1000):
            server.service.answer_untrusted(request(), Endpoint("198.51.100.99", 1))
        assert server.main.statistics.sent_count == ECHOES_PER_S
        for _ in range(1000):
            server.service.answer_for_neighbour(TRANSACTION, Endpoint("198.51.100.99", 1))
        assert server.main.statistics.sent_count == ECHOES_PER_S + UNSOLICITED_ECHOES_PER_S
        await trio.sleep(0.1)
        server.service.answer_untrusted(request(), Endpoint("198.51.100.99", 1))
        assert server.main.statistics.sent_count == ECHOES_PER_S + UNSOLICITED_ECHOES_PER_S + 1


async def test_a_forged_request_is_not_answered(autojump_clock):
    internet = Internet(World(seed=1))
    async with run_world(internet.world):
        server = Site(internet, "server", "public", SERVER)
        damaged = bytearray(request())
        damaged[-1] ^= 1
        with pytest.raises(DecodeError):
            server.service.answer_untrusted(bytes(damaged), Endpoint("198.51.100.99", 1))
        assert server.main.statistics.sent_count == 0


async def test_inspection_among_noise_and_neighbours_that_fail(autojump_clock):
    """Forged, foreign and repeated replies do not count; who cannot be asked proves nothing."""
    internet = Internet(World(seed=2))
    async with run_world(internet.world), trio.open_nursery() as nursery:
        servers = [
            Site(internet, f"server{index}", "public", identity)
            for index, identity in enumerate((SERVER, THIRD))
        ]
        client = Site(internet, "client", "linux-home", CLIENT)
        for site in (*servers, client):
            nursery.start_soon(site.run)

        async def cannot_ask(*_: object) -> None:
            raise trio.BrokenResourceError("the neighbour is gone")

        def shower(data: bytes) -> None:
            for _ in range(3):
                client.service.receive_reply_untrusted(data, Endpoint("198.51.100.66", 1))

        lie = Endpoint("198.51.100.66", 666)
        shower(EchoReply(TRANSACTION, THIRD.peer_id, lie).encode(THIRD))
        ports_before = len(client.host.ports)

        async def inspect() -> None:
            profile = await client.service.inspect(
                [
                    Observer(
                        site.identity.peer_id,
                        site.endpoint(site.main),
                        site.endpoint(site.alternate),
                        is_neighbour=True,
                    )
                    for site in servers
                ],
                host_candidates=[],
                rng=random.Random(3),
                ask_neighbour=cannot_ask,
            )
            assert (profile.mapping, profile.filtering) == (Mapping.EIM, Filtering.APDF)
            assert profile.public_ips == (client.host.nat.external_ip,)
            assert len(client.host.ports) == ports_before
            nursery.cancel_scope.cancel()

        nursery.start_soon(inspect)
        for _ in range(20):
            await trio.sleep(0.05)
            shower(EchoReply(TRANSACTION, THIRD.peer_id, lie).encode(THIRD))
            with pytest.raises(DecodeError):
                shower(b"\x05" + bytes(200))


async def test_cancelled_inspection_closes_its_ports(autojump_clock):
    internet = Internet(World(seed=2))
    async with run_world(internet.world):
        client = Site(internet, "client", "linux-home", CLIENT)
        nobody = Observer(SERVER.peer_id, Endpoint("198.51.100.250", 5000))

        async def never_asked(*_: object) -> None:
            raise AssertionError

        with trio.move_on_after(0.3) as scope:
            await client.service.inspect(
                [nobody], host_candidates=[], rng=random.Random(0), ask_neighbour=never_asked
            )
        assert scope.cancelled_caught
        assert len(client.host.ports) == 2
        profile = await client.service.inspect(
            [nobody], host_candidates=[], rng=random.Random(0), ask_neighbour=never_asked
        )
        assert profile.is_translated is None
