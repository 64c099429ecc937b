"""The virtual internet: addresses, hops, delays, loss, NAT behind NAT, and runs that replay."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from natswarm.address import AddressKind, Endpoint
from natswarm.errors import ConfigurationError
from natswarm.nat.behaviour import Filtering, Mapping, Poison, Pooling
from natswarm.sim.link import BurstLoss, LinkConditions
from natswarm.sim.load import BackgroundLoad
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.ports import Sequential, Uniform
from natswarm.sim.presets import PRESETS, Preset, Site
from natswarm.sim.presets6 import PRESETS6
from natswarm.sim.rate import RateLimit
from natswarm.sim.topology import Host, Internet, SimPort
from natswarm.sim.trace import TraceDigest
from natswarm.sim.world import World

ROOT = Path(__file__).parents[3]
FULL_CONE = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.EIF, overloading=False)


class Probe:
    """A port that remembers."""

    def __init__(self, host: Host, port: int = 0) -> None:
        self.port: SimPort = host.open_port(port)
        self.port.on_datagram = lambda data, source: self.seen.append((data, source))
        self.seen: list[tuple[bytes, Endpoint]] = []
        self.world = host.internet.world

    def reaches(self, other: Probe, destination: Endpoint, ttl: int = 64) -> bool:
        before = len(other.seen)
        self.port.send(b"probe", destination, ttl)
        self.world.run_for(1.0)
        return len(other.seen) > before


def test_addresses_are_global_outside_and_of_the_right_kind_inside():
    internet = Internet(World(1))
    hosts = [internet.add_host(f"host{index}") for index in range(600)]
    assert all(Endpoint(host.ip, 1).kind is AddressKind.GLOBAL for host in hosts)
    assert len({host.ip for host in hosts}) == 600
    assert {host.ip.rsplit(".", 2)[0] for host in hosts} == {"198.51", "203.0", "198.18"}
    home, phone = internet.add_host("home", "linux-home"), internet.add_host("phone", "kpn-nl")
    assert Endpoint(home.ip, 1).kind is AddressKind.PRIVATE
    assert Endpoint(phone.ip, 1).kind is AddressKind.SHARED
    assert home.nat is not None
    assert Endpoint(home.nat.external_ip, 1).kind is AddressKind.GLOBAL
    assert list(internet.nats) == ["home-nat", "phone-nat"]


def test_inner_addresses_may_repeat_and_stay_apart():
    internet = Internet(World(1))
    homes = [internet.add_nat(name, FULL_CONE, inside="192.168.1.0/24") for name in ("x", "y")]
    one, two = (internet.add_host(nat.name, behind=nat) for nat in homes)
    assert one.ip == two.ip == "192.168.1.2"
    left, right = Probe(one, 5000), Probe(two, 5000)
    assert not left.reaches(right, right.port.endpoint)
    assert left.seen == [(b"probe", left.port.endpoint)]  # it found itself


def test_names_and_kinds_are_checked():
    internet = Internet(World(1))
    internet.add_host("a", "linux-home")
    with pytest.raises(ValueError, match="host 'a' already"):
        internet.add_host("a")
    with pytest.raises(ValueError, match="NAT 'a-nat' already"):
        internet.add_nat("a-nat", "linux-home")
    with pytest.raises(ValueError, match="no NAT"):
        internet.add_nat("b", "public")
    with pytest.raises(ConfigurationError, match="kpn-nl"):
        internet.add_host("c", "no-such-carrier")


def test_ports_are_opened_once_and_drawn_from_the_ephemeral_range(monkeypatch):
    host = Internet(World(1)).add_host("a")
    port = host.open_port(4000)
    with pytest.raises(ConfigurationError, match="4000"):
        host.open_port(4000)
    port.close()
    again = host.open_port(4000)
    port.close()  # the old one, once more: must not close the new one
    assert host.ports[4000] is again
    with pytest.raises(ConfigurationError, match="not a UDP port"):
        host.open_port(70_000)
    drawn = [host.open_port().endpoint.port for _ in range(1000)]
    assert len(set(drawn)) == 1000
    assert min(drawn) >= 32_768
    assert max(drawn) <= 60_999
    assert max(drawn) - min(drawn) > 25_000
    monkeypatch.setattr("natswarm.sim.host.EPHEMERAL_PORTS", (50_000, 50_003))
    host = Internet(World(1)).add_host("b")
    assert sorted(host.open_port().endpoint.port for _ in range(4)) == [*range(50_000, 50_004)]
    with pytest.raises(ConfigurationError, match="all ephemeral"):
        host.open_port()


@pytest.mark.parametrize(
    ("left", "right", "delay_s"),
    [
        ("public", "public", 0.002 + 0.010 + 0.002),
        ("linux-home", "public", 0.008 + 0.010 + 0.002),
    ],
)
def test_delays_add_up(left: str, right: str, delay_s: float):
    internet = Internet(World(1))
    a, b = internet.add_host("a", left), internet.add_host("b", right)
    arrivals = []
    port = b.open_port(1)
    port.on_datagram = lambda data, source: arrivals.append(internet.world.now)
    a.open_port().send(b"", port.endpoint)
    internet.world.run()
    assert arrivals == [pytest.approx(delay_s)]


def test_a_4g_link_jitters_and_keeps_order():
    internet = Internet(World(5))
    phone, server = internet.add_host("phone", "kpn-nl"), internet.add_host("server")
    port, seen = server.open_port(1), []
    port.on_datagram = lambda data, source: seen.append((int(data), internet.world.now))
    sending = phone.open_port()
    for index in range(500):
        internet.world.at(index / 500, sending.send, str(index).encode(), port.endpoint)
    internet.world.run()
    assert [index for index, _ in seen] == sorted(index for index, _ in seen)
    delays = [time - index / 500 for index, time in seen]
    assert min(delays) >= 0.037
    assert max(delays) <= 0.057 + 1e-9


def test_a_ttl_dies_where_its_hops_end():
    """Home NAT, 8 routers, home NAT: 10 hops."""
    internet = Internet(World(1))
    a, b = (
        Probe(internet.add_host("a", FULL_CONE), 4001),
        Probe(internet.add_host("b", FULL_CONE), 4002),
    )
    left, right = internet.nats["a-nat"], internet.nats["b-nat"]
    assert (
        b.reaches(b, Endpoint(right.external_ip, 4002), ttl=64) is False
    )  # opens nothing: hairpin
    b.port.send(b"open", Endpoint(left.external_ip, 4009))
    internet.world.run()
    target = Endpoint(right.external_ip, 4002)
    now = internet.world.now
    reached = [ttl for ttl in range(1, 13) if a.reaches(b, target, ttl)]
    assert reached == [11, 12]
    assert internet.counters.dropped_ttl == 10
    # TTL 1 died at our NAT before it made a mapping; TTL 2 made one and died after it.
    assert left.nat.counters.outbound_count == 11
    assert right.nat.counters.inbound_count == 2
    assert internet.world.now > now


def test_a_low_ttl_opens_our_nat_without_touching_theirs():
    internet = Internet(World(1))
    strict = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF, poison=Poison.TAKES_PORT)
    a, b = Probe(internet.add_host("a", strict), 4001), Probe(internet.add_host("b", strict), 4002)
    left, right = (Endpoint(nat.external_ip, 0) for nat in internet.nats.values())
    left, right = replace(left, port=4001), replace(right, port=4002)
    assert not a.reaches(b, right, ttl=5)
    assert internet.nats["b-nat"].nat.counters.dropped_unmapped == 0
    assert b.reaches(a, left)
    assert a.reaches(b, right)
    # With a full TTL the early packet poisons the other NAT, and b's port moves.
    c, d = Probe(internet.add_host("c", strict), 4001), Probe(internet.add_host("d", strict), 4002)
    left = Endpoint(internet.nats["c-nat"].external_ip, 4001)
    right = Endpoint(internet.nats["d-nat"].external_ip, 4002)
    assert not c.reaches(d, right)
    assert not d.reaches(c, left)


def test_double_nat_translates_twice_and_back():
    internet = Internet(World(1))
    cgn = internet.add_nat("cgn", "lyca-nl")
    home = internet.add_nat("home", "linux-home", behind=cgn)
    laptop = Probe(internet.add_host("laptop", behind=home), 7000)
    server = Probe(internet.add_host("server"), 80)
    assert home.external_ip.startswith("100.64.")
    assert laptop.reaches(server, server.port.endpoint)
    [(_, seen)] = server.seen
    assert seen.ip == cgn.external_ip
    assert 2048 <= seen.port <= 65_535
    assert server.reaches(laptop, seen)
    stranger = Probe(internet.add_host("stranger"), 80)
    assert not stranger.reaches(laptop, seen)  # the carrier lets it in, the home does not
    assert cgn.nat.counters.inbound_count == 2
    assert home.nat.counters.dropped_filtered == 1


def test_triple_nat_translates_three_times_and_back():
    """A flat in a house that is itself behind a carrier; three tables, three filters."""
    internet = Internet(World(1))
    cgn = internet.add_nat("cgn", "lyca-nl")
    house = internet.add_nat("house", FULL_CONE, behind=cgn)
    flat = internet.add_nat("flat", "linux-home", behind=house)
    laptop = Probe(internet.add_host("laptop", behind=flat), 7000)
    neighbour = Probe(internet.add_host("neighbour", behind=house), 7000)
    server = Probe(internet.add_host("server"), 80)
    assert laptop.reaches(server, server.port.endpoint)
    assert neighbour.reaches(server, server.port.endpoint)
    [(_, seen), (_, other)] = server.seen
    assert seen.ip == other.ip == cgn.external_ip
    assert seen.port != other.port
    assert server.reaches(laptop, seen)
    assert server.reaches(neighbour, other)
    stranger = Probe(internet.add_host("stranger"), 80)
    assert stranger.reaches(neighbour, other)  # two open doors
    assert not stranger.reaches(laptop, seen)  # the third is shut
    assert flat.nat.counters.dropped_filtered == 1
    # 2 hops of the carrier's access, three NATs, 8 in the core.
    needed = next(ttl for ttl in range(1, 64) if laptop.reaches(server, server.port.endpoint, ttl))
    assert needed == 2 + 3 + 8 + 1


def test_a_host_can_bring_its_nat_behind_another():
    internet = Internet(World(1))
    cgn = internet.add_nat("cgn", "kpn-nl")
    laptop = internet.add_host("laptop", "linux-home", behind=cgn)
    assert laptop.nat is internet.nats["laptop-nat"]
    assert laptop.nat.uplink.parent is cgn


def test_subscribers_of_one_carrier_reach_each_other_inside():
    internet = Internet(World(1))
    cgn = internet.add_nat("cgn", "kpn-nl")
    a, b = (Probe(internet.add_host(name, behind=cgn), 5000) for name in ("a", "b"))
    assert a.reaches(b, b.port.endpoint)
    assert b.seen == [(b"probe", a.port.endpoint)]
    assert cgn.nat.counters.outbound_count == 0


@pytest.mark.parametrize("hairpinning", [False, True])
def test_hairpinning(hairpinning: bool):
    internet = Internet(World(1))
    nat = internet.add_nat("nat", replace(FULL_CONE, hairpinning=hairpinning))
    a, b = (Probe(internet.add_host(name, behind=nat), port) for name, port in (("a", 1), ("b", 2)))
    server = Probe(internet.add_host("server"), 80)
    assert b.reaches(server, server.port.endpoint)
    _, outside_of_b = server.seen[0]
    assert a.reaches(b, outside_of_b) == hairpinning
    assert nat.nat.counters.dropped_hairpin == (not hairpinning)
    if hairpinning:
        _, source = b.seen[0]
        assert source.ip == nat.external_ip  # RFC 4787 REQ-9 (a)


def test_undeliverable_datagrams_are_counted_by_reason():
    internet = Internet(World(1))
    a, b = Probe(internet.add_host("a"), 1), Probe(internet.add_host("b"), 2)
    for destination in (
        Endpoint("203.0.113.99", 1),
        Endpoint("192.168.1.2", 1),
        Endpoint(b.port.endpoint.ip, 3),
    ):
        assert not a.reaches(b, destination)
    assert a.reaches(b, b.port.endpoint)
    b.port.close()
    assert not a.reaches(b, b.port.endpoint)
    counters = internet.counters
    assert (counters.dropped_no_route, counters.dropped_closed) == (2, 2)
    assert (counters.sent_count, counters.delivered_count) == (5, 1)


def test_loss_on_the_way_is_what_the_links_say():
    seed, count, loss = 6, 20_000, 0.05
    print(f"seed {seed}")
    internet = Internet(World(seed))
    a, b = internet.add_host("a"), internet.add_host("b")
    a.uplink.upload.conditions = LinkConditions(loss=loss)
    b.uplink.download.conditions = LinkConditions(loss=loss, jitter_s=0.005)
    port, target = a.open_port(), b.open_port(1)
    for index in range(count):
        internet.world.at(index / 1000, port.send, b"", target.endpoint)
    internet.world.run()
    expected = count * (1 - (1 - loss) ** 2)
    deviation = math.sqrt(expected * (1 - loss) ** 2)
    assert abs(internet.counters.lost_count - expected) < 4 * deviation
    assert internet.counters.lost_count + internet.counters.delivered_count == count


ROUGH = LinkConditions(
    delay_s=0.02,
    jitter_s=0.01,
    loss=0.05,
    burst=BurstLoss(1.0, 0.1),
    duplication=0.1,
    reordering=0.1,
    reordering_delay_s=0.05,
    rate_bytes_per_s=40_000.0,
    queue_bytes=2000,
)


def test_every_datagram_is_accounted_for_on_the_roughest_of_links():
    internet = Internet(World(11))
    kind = Preset(FULL_CONE, Site.HOME, ROUGH, 0, "test", access_up=replace(ROUGH, delay_s=0.03))
    cgn = internet.add_nat("cgn", FULL_CONE)
    hosts = [internet.add_host("x", kind), internet.add_host("y", kind, behind=cgn)]
    server = internet.add_host("server", replace(PRESETS["public"], access=ROUGH))
    echo, senders = server.open_port(7), [host.open_port(4000) for host in hosts]
    echo.on_datagram = echo.send
    assert hosts[0].nat is not None
    assert hosts[0].nat.uplink.upload.conditions.delay_s == 0.03
    assert hosts[0].nat.uplink.download.conditions.delay_s == 0.02
    for index in range(2000):
        internet.world.at(index * 0.0015, senders[index % 2].send, bytes(60), echo.endpoint)
    internet.world.run()
    counters = internet.counters
    dropped = counters.dropped_ttl + counters.dropped_nat + counters.dropped_no_route
    gone = counters.delivered_count + counters.lost_count + dropped + counters.dropped_closed
    assert counters.sent_count + counters.duplicated_count == gone
    assert counters.duplicated_count > 100
    assert counters.delivered_count > 1000
    assert server.uplink.download.overflow_count > 0


def test_two_that_answer_at_once_on_ideal_links_do_not_recurse():
    internet = Internet(World(1), core_delay_s=0.0)
    a, b = internet.add_host("a", FULL_CONE), internet.add_host("b", FULL_CONE)
    left, right = a.open_port(4001), b.open_port(4002)
    answers = []

    def answer(port: SimPort, data: bytes, source: Endpoint) -> None:
        answers.append(source)
        if len(answers) < 5000:
            port.send(data, source)

    left.on_datagram = lambda data, source: answer(left, data, source)
    right.on_datagram = lambda data, source: answer(right, data, source)
    right.send(b"open", Endpoint(internet.nats["a-nat"].external_ip, 4001))
    internet.world.run()
    left.send(b"x", Endpoint(internet.nats["b-nat"].external_ip, 4002))
    internet.world.run()
    assert len(answers) == 5000
    assert internet.world.now == 0.0


def scenario(seed: int) -> str:
    """Every kind of thing that draws random numbers, and the digest of what came of it."""
    digest = TraceDigest()
    world = World(seed, trace=digest)
    internet = Internet(world)
    cgn = internet.add_nat("cgn", "juniper-pba")
    kinds = ("kpn-nl", "vodafone-nl", "linux-random", "tmobile-us", "lyca-nl", "public")
    hosts = [internet.add_host(kind, kind) for kind in kinds]
    hosts += [internet.add_host(f"sub{index}", behind=cgn) for index in range(3)]
    ports = [host.open_port() for host in hosts for _ in range(3)]
    outside = [Endpoint(nat.external_ip, 4000) for nat in internet.nats.values()]

    def answer(port: SimPort, data: bytes, source: Endpoint) -> None:
        if len(data) < 12:
            port.send(data + b".", source)

    for port in ports:
        port.on_datagram = lambda data, source, port=port: answer(port, data, source)
        for index in range(20):
            targets = [other.endpoint for other in ports[15:18]] + outside
            target = targets[world.rng.randrange(len(targets))]
            world.after(world.rng.uniform(0, 100), port.send, b"%d" % index, target)
    world.run()
    for router in internet.nats.values():
        router.nat.check()
    assert digest.step_count > 2000
    return digest.hexdigest()


def every_knob(seed: int) -> str:
    """As `scenario`, with what that leaves out."""
    digest = TraceDigest()
    world = World(seed, trace=digest)
    internet = Internet(world)
    behaviour = NatBehaviour(
        mapping=Mapping.EIM,
        filtering=Filtering.APDF,
        allocation=Sequential(),
        preserves_parity=True,
        address_count=3,
        pooling=Pooling.ARBITRARY,
        subscriber_rate=RateLimit(2.0, 5),
        poison=Poison.BURNS_MAPPING,
        load=BackgroundLoad(10, 5.0, 10.0),
    )
    kind = Preset(behaviour, Site.CARRIER, ROUGH, 1, "test", ipv6=PRESETS6["xlat464-4g"].ipv6)
    cgn = internet.add_nat("cgn", kind)
    hosts = [internet.add_host(f"sub{index}", behind=cgn) for index in range(3)]
    hosts += [internet.add_host("home", "linux-home-dual", behind=cgn)]
    server = internet.add_host("server", "public-dual")
    ports = [host.open_port(0, ip) for host in hosts for ip in host.addresses]
    there = [server.open_port(4000 + index, ip) for index in range(3) for ip in server.addresses]
    for port in there:
        port.on_datagram = port.send
    for port in ports:  # an echo that meets another never rests
        for _ in range(40):
            target = there[world.rng.randrange(len(there))].endpoint
            if world.rng.random() < 0.2:
                target = Endpoint(cgn.nat.external_ips[1], world.rng.randrange(1024, 65_536))
            world.after(world.rng.uniform(0, 60), port.send, b"x", target)
    world.run()
    for router in internet.nats.values():
        router.nat.check()
        assert router.firewall is not None
        router.firewall.check()
    counters = cgn.nat.counters
    assert counters.outbound_count > 50
    assert counters.inbound_count > 20
    assert cgn.nat.load_counters.mapping_count > 100
    return digest.hexdigest()


@pytest.mark.parametrize("run", [scenario, every_knob])
def test_a_seed_replays_a_run_and_another_does_not(run: Callable[[int], str]):
    assert run(7) == run(7)
    assert run(7) != run(8)


def test_the_run_does_not_depend_on_the_hash_seed():
    digests = set()
    script = (
        "import runpy, sys; made = runpy.run_path(sys.argv[1]); "
        "print(made['scenario'](7), made['every_knob'](7))"
    )
    for hash_seed in ("0", "4242"):
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                script,
                __file__,
            ],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(result.stdout.strip())
    assert digests == {f"{scenario(7)} {every_knob(7)}"}


def test_one_more_host_does_not_change_what_others_draw():
    def ports_of(internet: Internet) -> list[int]:
        host, server = internet.add_host("a", "kpn-nl"), internet.add_host("server")
        port, target = host.open_port(), server.open_port(1)
        seen: list[int] = []
        target.on_datagram = lambda data, source: seen.append(source.port)
        port.send(b"", target.endpoint)
        internet.world.run()
        return seen

    plain, crowded = Internet(World(9)), Internet(World(9))
    crowded.add_host("b", "kpn-nl").open_port()
    assert ports_of(plain) == ports_of(crowded)


def test_uniform_ports_are_seen_by_the_server():
    behaviour = NatBehaviour(
        mapping=Mapping.APDM, filtering=Filtering.APDF, allocation=Uniform(15_340, 44_360)
    )
    internet = Internet(World(2))
    phone, server = Probe(internet.add_host("phone", behaviour)), internet.add_host("server")
    for index in range(50):
        phone.reaches(Probe(server, 100 + index), Endpoint(server.ip, 100 + index))
    ports = internet.nats["phone-nat"].nat.ports_in_use(internet.world.now)
    assert len(ports) > 20
    assert all(15_340 <= port <= 44_360 for port in ports)


def test_a_host_that_moves_keeps_its_ports_and_leaves_its_address():
    internet = Internet(World(3))
    phone, server = internet.add_host("phone", "lyca-nl"), internet.add_host("server")
    here, there = Probe(phone), Probe(server, 4000)
    assert here.reaches(there, Endpoint(server.ip, 4000))
    old = there.seen[-1][1]
    assert there.reaches(here, old)
    home = internet.add_nat("home", "linux-home")
    there.port.send(b"on the way", old)
    phone.move(home)
    assert phone.ip.startswith("192.168.")
    assert here.port.endpoint.ip == phone.ip
    internet.world.run_for(1)
    assert [data for data, _ in here.seen] == [b"probe"], "what was on the way is lost"
    assert not there.reaches(here, old)
    assert here.reaches(there, Endpoint(server.ip, 4000))
    assert there.seen[-1][1].ip == home.external_ip
    assert there.reaches(here, there.seen[-1][1])
    phone.move(None)
    assert here.reaches(there, Endpoint(server.ip, 4000))
    assert there.seen[-1][1] == Endpoint(phone.ip, here.port.endpoint.port)


def test_a_host_with_ipv6_does_not_move():
    internet = Internet(World(3))
    host = internet.add_host("dual", "linux-home-dual")
    with pytest.raises(ConfigurationError, match="IPv6"):
        host.move(None)


def test_a_router_that_reboots_forgets_every_mapping():
    internet = Internet(World(3))
    phone, server = internet.add_host("phone", "vodafone-nl"), internet.add_host("server")
    here, there = Probe(phone), Probe(server, 4000)
    assert here.reaches(there, Endpoint(server.ip, 4000))
    old = there.seen[-1][1]
    phone.nat.reboot()
    assert phone.nat.nat.mapping_count(internet.world.now) == 0
    assert not there.reaches(here, old)
    assert here.reaches(there, Endpoint(server.ip, 4000))
    assert there.seen[-1][1] != old
    assert there.reaches(here, there.seen[-1][1])
