"""Echoes: answered from the right port, in size no more than asked, within a budget."""

from __future__ import annotations

import random

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError, DecodeError
from natswarm.identity import Identity
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.findings import NatTest
from natswarm.nat.measurement import Observer
from natswarm.net.budget import KEYS_MAX, KeyedBudget
from natswarm.net.echo import (
    ECHOES_PER_ADDRESS_PER_S,
    ECHOES_PER_PREFIX_PER_S,
    ECHOES_PER_S,
    UNSOLICITED_ECHOES_PER_PREFIX_PER_S,
    UNSOLICITED_ECHOES_PER_S,
    EchoService,
)
from natswarm.net.virtual import VirtualNetwork, VirtualPort, VirtualPortGroup, run_world
from natswarm.sim.topology import Host, Internet
from natswarm.sim.world import World
from natswarm.wire import NO_TOKEN, EchoReply, EchoRequest, decode_echo_reply_untrusted

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
        reply = decode_echo_reply_untrusted(arrival.data)
        assert reply.token != NO_TOKEN
        assert reply == EchoReply(
            TRANSACTION,
            SERVER.peer_id,
            Endpoint(internet.hosts["client"].ip, client.local_endpoint.port),
            reply.token,
            from_alternate_port=is_alternate,
        )
        nursery.cancel_scope.cancel()


class Asker:
    """Ports of one public host, that ask a server and hear what comes."""

    def __init__(self, internet: Internet, server: Site, name: str = "client") -> None:
        self.server = server
        self.host = internet.add_host(name)
        self.ports = [VirtualNetwork(self.host).bind(ANY) for _ in range(2)]

    def endpoint(self, index: int) -> Endpoint:
        return Endpoint(self.host.ip, self.ports[index].local_endpoint.port)

    def ask(self, index: int = 0, **fields) -> None:
        data = EchoRequest(TRANSACTION, CLIENT.peer_id, **fields).encode(CLIENT)
        self.ports[index].send(data, self.server.endpoint(self.server.main))

    async def hear(self, index: int = 0) -> list[tuple[EchoReply, Endpoint]]:
        with trio.move_on_after(1.0):
            return [
                (decode_echo_reply_untrusted(data), source)
                for data, source in await self.ports[index].receive_batch()
            ]
        return []


async def test_with_a_token_the_answer_goes_to_any_port_of_the_address(autojump_clock):
    internet = Internet(World(seed=1))
    async with run_world(internet.world), trio.open_nursery() as nursery:
        server = Site(internet, "server", "public", SERVER)
        nursery.start_soon(server.run)
        asker, other = Asker(internet, server), Asker(internet, server, "other")
        asker.ask()
        ((reply, _),) = await asker.hear()
        asker.ask(deliver_to=asker.endpoint(1), token=reply.token, from_alternate_port=True)
        ((delivered, source),) = await asker.hear(1)
        assert source == server.endpoint(server.alternate)
        assert delivered.observed == asker.endpoint(0), "where the request came from"
        assert delivered.token != NO_TOKEN
        # Not without one, not with one that was changed, not to another address, not for another.
        changed = bytes([reply.token[0], *reply.token[1:-1], reply.token[-1] ^ 1])
        for token in (NO_TOKEN, changed):
            asker.ask(deliver_to=asker.endpoint(1), token=token)
        asker.ask(deliver_to=other.endpoint(0), token=reply.token)
        stolen = EchoRequest(
            TRANSACTION, THIRD.peer_id, deliver_to=asker.endpoint(1), token=reply.token
        )
        asker.ports[0].send(stolen.encode(THIRD), server.endpoint(server.main))
        assert await asker.hear(1) == await other.hear() == []
        assert server.service.refused_count == 4
        # From elsewhere, with the token: it arrives, and gives the bearer nothing new.
        other.ask(deliver_to=asker.endpoint(1), token=reply.token)
        ((delivered, _),) = await asker.hear(1)
        assert delivered.observed == other.endpoint(0)
        assert delivered.token == NO_TOKEN
        await trio.sleep(601)
        asker.ask(deliver_to=asker.endpoint(1), token=reply.token)
        assert await asker.hear(1) == [], "a token lives for ten minutes"
        nursery.cancel_scope.cancel()


async def test_never_more_bytes_out_than_in(autojump_clock):
    internet = Internet(World(seed=1))
    async with run_world(internet.world):
        server = Site(internet, "server", "public", SERVER)
        service, source = server.service, Endpoint("198.51.100.99", 1)
        service.answer_untrusted(request(), source)
        service.answer_untrusted(request() + bytes(100), source)
        with pytest.raises(DecodeError):
            service.answer_untrusted(request()[:-1], source)
        assert server.main.statistics.sent_count == 2


def flood(server: Site, sources: list[Endpoint], count: int) -> int:
    """Send `count` requests from each source; return how many are answered."""
    before = server.main.statistics.sent_count
    for _ in range(count):
        for source in sources:
            server.service.answer_untrusted(request(), source)
    return server.main.statistics.sent_count - before


async def test_answers_are_within_budgets_of_address_prefix_and_all(autojump_clock):
    internet = Internet(World(seed=1))
    async with run_world(internet.world):
        server = Site(internet, "server", "public", SERVER)
        assert flood(server, [Endpoint("198.51.100.99", 1)], 500) == ECHOES_PER_ADDRESS_PER_S
        one_prefix = [Endpoint(f"198.51.100.{host}", 1) for host in range(1, 255)]
        left = ECHOES_PER_PREFIX_PER_S - ECHOES_PER_ADDRESS_PER_S
        assert flood(server, one_prefix, 4) == left
        # Whoever is elsewhere has not suffered.
        assert flood(server, [Endpoint("203.0.113.5", 1)], 60) == 60
        one_prefix6 = [Endpoint(f"2001:db8:1:{net:x}::1", 1) for net in range(300)]
        server.service._main_port = server.main
        assert flood(server, one_prefix6, 1) == 0, "an IPv4 port sends nothing to IPv6"
        await trio.sleep(1.0)
        everywhere = [Endpoint(f"198.18.{net}.1", 1) for net in range(256)]
        assert flood(server, everywhere, 4) == ECHOES_PER_S
        await trio.sleep(0.1)
        assert flood(server, one_prefix[:1], 1) == 1


async def test_answers_on_a_neighbours_word_are_within_budgets(autojump_clock):
    internet = Internet(World(seed=1))
    async with run_world(internet.world):
        server = Site(internet, "server", "public", SERVER)
        for prefix in ("198.51.100", "203.0.113", "198.18.7"):
            for host in range(1, 100):
                server.service.answer_for_neighbour(TRANSACTION, Endpoint(f"{prefix}.{host}", 1))
            assert server.main.statistics.sent_count <= UNSOLICITED_ECHOES_PER_S
            if prefix == "198.51.100":
                sent = server.main.statistics.sent_count
                assert sent == UNSOLICITED_ECHOES_PER_PREFIX_PER_S
        assert server.main.statistics.sent_count == UNSOLICITED_ECHOES_PER_S


def test_budgets_of_many_keys_take_bounded_memory():
    budget = KeyedBudget(per_s=2)
    assert [budget.take("a", 0.0) for _ in range(3)] == [True, True, False]
    assert budget.take("a", 0.6)
    for key in range(10 * KEYS_MAX):
        assert budget.take(str(key), 1.0)
    assert len(budget) == KEYS_MAX


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
            findings = await client.service.inspect(
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
            profile = findings.profile
            assert (profile.mapping, profile.filtering) == (Mapping.EIM, Filtering.APDF)
            assert profile.public_ips == (client.host.nat.external_ip,)
            assert 0 < findings.packet_counts[NatTest.BEHAVIOUR] <= 60
            assert set(findings.tokens) == {SERVER.peer_id, THIRD.peer_id}
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
        findings = await client.service.inspect(
            [nobody], host_candidates=[], rng=random.Random(0), ask_neighbour=never_asked
        )
        assert findings.profile.is_translated is None
        assert findings is client.service.findings
        assert "none of the peers" in findings.unknown["mapping"]


class Breakable(VirtualNetwork):
    """A network that stops to give ports, or to send from them."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.groups: list[VirtualPortGroup] = []
        self.gives_ports = True

    def bind_group(self, ip: str, count: int) -> VirtualPortGroup:
        if not self.gives_ports:
            raise ConfigurationError(f"{count} ports asked for, 0 were free")
        self.groups.append(super().bind_group(ip, count))
        return self.groups[-1]

    def break_ports(self, *ports: VirtualPort) -> None:
        for port in [*ports, *self.groups[-1]._ports]:
            port._can_send = lambda _data, _destination: False


@pytest.mark.parametrize(
    ("breakage", "reason"),
    [
        ("no ports", "ports asked for, 0 were free"),
        ("interface", "the system refuses to send (not a destination for this port)"),
        ("main port", "the system refuses to send (the main port was closed)"),
    ],
)
async def test_what_breaks_ends_the_test_with_its_reason(autojump_clock, breakage, reason):
    internet = Internet(World(seed=2))
    async with run_world(internet.world), trio.open_nursery() as nursery:
        server = Site(internet, "server", "public", SERVER)
        client = Site(internet, "client", "linux-home", CLIENT)
        network = client.service._network = Breakable(client.host)
        network.gives_ports = breakage != "no ports"
        nursery.start_soon(server.run)

        async def breaks() -> None:
            await trio.sleep(0.1)
            if breakage == "interface":
                network.break_ports(client.main)
            elif breakage == "main port":
                client.main.close()

        async def never_asked(*_: object) -> None:
            raise AssertionError

        nursery.start_soon(breaks)
        # Both ports of 12 observers that are one: enough to ask from the main port for a while.
        observers = [
            Observer(
                SERVER.peer_id, server.endpoint(server.main), server.endpoint(server.alternate)
            )
        ] * 12
        findings = await client.service.inspect(
            observers, host_candidates=[], rng=random.Random(3), ask_neighbour=never_asked
        )
        assert reason in findings.unknown["filtering"]
        assert findings.profile.is_translated is None
        assert len(client.host.ports) == (1 if breakage == "main port" else 2)
        nursery.cancel_scope.cancel()
