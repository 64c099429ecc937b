"""Several external addresses: paired and arbitrary."""

from __future__ import annotations

import random

import pytest

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering, Mapping, Pooling
from natswarm.sim.nat import Nat, NatBehaviour
from natswarm.sim.packet import Packet
from natswarm.sim.ports import Allocation, Blocks, Preserving, Sequential, Uniform
from natswarm.sim.topology import Internet
from natswarm.sim.world import World

IPS = ["198.51.100.1", "198.51.100.2", "198.51.100.3", "198.51.100.4"]
REMOTE_IP = "203.0.113.9"


def make(pooling: Pooling, seed: int = 1, **more: object) -> Nat:
    usual: dict[str, object] = {"mapping": Mapping.APDM, "filtering": Filtering.APDF}
    behaviour = NatBehaviour(
        **(usual | {"address_count": 4, "pooling": pooling} | more)  # type: ignore[arg-type]
    )
    return Nat(behaviour, IPS, random.Random(seed))


def opened(nat: Nat, subscriber: int, count: int, now: float = 0.0) -> list[Endpoint]:
    seen = []
    for port in range(1, count + 1):
        source = Endpoint(f"10.0.0.{subscriber}", 5000)
        packet = nat.outbound(Packet(source, Endpoint(REMOTE_IP, port), b""), now)
        if packet is not None:
            seen.append(packet.source)
    nat.check()
    return seen


@pytest.mark.parametrize(
    "law",
    [Preserving(), Uniform(), Sequential(), Blocks(size=64, max_blocks=2)],
    ids=lambda law: type(law).__name__,
)
def test_a_pair_stays_and_an_arbitrary_pool_wanders(law: Allocation):
    paired = make(Pooling.PAIRED, allocation=law)
    arbitrary = make(Pooling.ARBITRARY, allocation=law)
    used = [{seen.ip for seen in opened(paired, host, 12)} for host in range(1, 41)]
    assert all(len(ips) == 1 for ips in used)
    assert set().union(*used) == set(IPS)
    assert {seen.ip for seen in opened(arbitrary, 1, 60)} == set(IPS)


def test_endpoint_independence_holds_over_a_pool():
    nat = make(Pooling.ARBITRARY, mapping=Mapping.EIM, allocation=Uniform())
    assert len(set(opened(nat, 1, 20))) == 1


def test_a_pair_ends_with_its_last_mapping():
    nat = make(Pooling.PAIRED, allocation=Uniform())
    seen = {opened(nat, 1, 2, now=100.0 * round_)[0].ip for round_ in range(30)}
    assert seen == set(IPS)


def test_a_pair_without_ports_gets_none_and_an_arbitrary_pool_takes_them_all():
    few = {"allocation": Uniform(2000, 2001), "overloading": False}
    assert len(opened(make(Pooling.PAIRED, **few), 1, 10)) == 2
    nat = make(Pooling.ARBITRARY, **few)
    assert len(set(opened(nat, 1, 10))) == 8
    assert nat.counters.dropped_no_port == 2
    assert nat.ports_in_use(0.0) == [2000] * 4 + [2001] * 4


def test_one_port_on_two_addresses_is_two_endpoints():
    nat = make(Pooling.ARBITRARY, mapping=Mapping.EIM, allocation=Preserving(), overloading=False)
    a = opened(nat, 1, 1)[0]
    others = [opened(nat, host, 1)[0] for host in range(2, 5)]
    assert len({endpoint.port for endpoint in [a, *others]}) <= 4
    for host, external in enumerate([a, *others], 1):
        packet = nat.inbound(Packet(Endpoint(REMOTE_IP, 1), external, b""), 0.0)
        assert packet is not None
        assert packet.destination.ip == f"10.0.0.{host}"


def test_answers_find_every_address_of_a_pool_in_a_topology():
    internet = Internet(World(4))
    behaviour = NatBehaviour(
        mapping=Mapping.APDM,
        filtering=Filtering.APDF,
        allocation=Uniform(),
        address_count=3,
        pooling=Pooling.ARBITRARY,
        hairpinning=True,
    )
    nat = internet.add_nat("nat", behaviour)
    host, peer = internet.add_host("host", behind=nat), internet.add_host("peer", behind=nat)
    server = internet.add_host("server")
    assert nat.nat.external_ips == ("198.51.100.1", "198.51.100.2", "198.51.100.3")
    assert server.ip == "198.51.100.4"
    sources, answers = set(), []
    asking = host.open_port()
    asking.on_datagram = lambda data, source: answers.append(source)
    for number in range(1, 31):
        port = server.open_port(number)

        def answer(data: bytes, source: Endpoint, port=port) -> None:
            sources.add(source.ip)
            port.send(data, source)

        port.on_datagram = answer
        asking.send(b"", port.endpoint)
    internet.world.run()
    assert sources == set(nat.nat.external_ips)
    assert len(answers) == 30
    before = nat.nat.counters.inbound_count  # hairpins know all the addresses, too
    for ip in nat.nat.external_ips:
        peer.open_port().send(b"", Endpoint(ip, 9))
    internet.world.run()
    assert nat.nat.counters.inbound_count == before
    assert nat.nat.counters.dropped_unmapped == 3
