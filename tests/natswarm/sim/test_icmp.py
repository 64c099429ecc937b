"""ICMP errors: who says what to whom, through NATs, and that they change nothing on their way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.icmp import ErrorSource
from natswarm.sim.link import IDEAL, LinkConditions
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.packet import (
    HOST_UNREACHABLE,
    ICMP,
    PORT_UNREACHABLE,
    TIME_EXCEEDED,
    Packet,
)
from natswarm.sim.presets import PRESETS, Preset, Site
from natswarm.sim.topology import Host, Internet
from natswarm.sim.world import World

STRICT = NatBehaviour(mapping=Mapping.APDM, filtering=Filtering.APDF)
OPEN = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.EIF, hairpinning=True)
CARRIER = Preset(STRICT, Site.CARRIER, LinkConditions(delay_s=0.025), 2, "test")
CORE = [f"198.19.255.{255 - hop}" for hop in range(1, 9)]


class Tracer:
    """A port that keeps the errors about what it sent."""

    def __init__(self, host: Host, port: int = 0) -> None:
        self.port = host.open_port(port)
        self.port.on_error = lambda error: self.errors.append(error)
        self.errors: list[Packet] = []
        self.world = host.internet.world

    def send(self, destination: Endpoint, ttl: int = 64) -> Packet | None:
        """Send one datagram and return the error about it."""
        before = len(self.errors)
        self.port.send(b"probe", destination, ttl)
        self.world.run_for(2.0)  # of which each router lets two more errors pass
        assert len(self.errors) <= before + 1
        return self.errors[-1] if len(self.errors) > before else None

    def path(self, destination: Endpoint, ttl_max: int = 16) -> list[str | None]:
        """Return who says that the hop limit ran out, from the first hop to the last that does."""
        hops: list[str | None] = []
        for ttl in range(1, ttl_max + 1):
            error = self.send(destination, ttl)
            assert error is None or error.data == TIME_EXCEEDED
            hops.append(None if error is None else error.source.ip)
        while hops and hops[-1] is None:
            hops.pop()
        return hops


def check(internet: Internet) -> None:
    for router in internet.nats.values():
        for protocol in (1, 6, 17):
            table = router.table(protocol)
            assert table is not None
            table.check()


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([], CORE),
        ([STRICT], ["192.168.1.1", *CORE]),
        ([CARRIER], ["100.127.255.253", "100.127.255.254", "100.64.0.1", *CORE]),
        (
            [CARRIER, OPEN],
            ["192.168.1.1", "100.127.255.253", "100.127.255.254", "100.64.0.1", *CORE],
        ),
        (
            [CARRIER, OPEN, STRICT],
            [
                *("192.168.2.1", "192.168.1.1"),
                *("100.127.255.253", "100.127.255.254", "100.64.0.1"),
                *CORE,
            ],
        ),
    ],
    ids=["public", "home", "carrier", "double", "triple"],
)
def test_every_router_says_where_the_hop_limit_ran_out(
    kinds: list[NatBehaviour | Preset], expected: list[str]
):
    internet = Internet(World(1))
    nat = None
    for index, kind in enumerate(kinds):
        nat = internet.add_nat(f"nat{index}", kind, behind=nat)
    tracer, server = Tracer(internet.add_host("a", behind=nat)), internet.add_host("server")
    target = server.open_port(4000).endpoint
    assert tracer.path(target) == expected
    for error in tracer.errors:  # each NAT put back what it had replaced
        assert error.destination == tracer.port.endpoint
        assert error.about == Packet(tracer.port.endpoint, target, b"probe")
        assert error.protocol == ICMP
    check(internet)


def test_routers_on_a_home_line_have_global_addresses_of_their_own():
    internet = Internet(World(1))
    kind = Preset(STRICT, Site.HOME, IDEAL, 2, "test")
    server = internet.add_host("server")
    paths = [Tracer(internet.add_host(name, kind)).path(Endpoint(server.ip, 9), 4) for name in "ab"]
    assert paths == [
        ["192.168.1.1", "198.19.254.254", "198.19.254.253", CORE[0]],
        ["192.168.2.1", "198.19.254.252", "198.19.254.251", CORE[0]],
    ]


def test_what_dies_behind_the_core_is_answered_from_there_as_the_outside_sees_it():
    """The NAT that forwards to us says so by its outer address, a router behind it too."""
    internet = Internet(World(1))
    tracer = Tracer(internet.add_host("a"), 5000)
    other = internet.add_host("b", replace(CARRIER, behaviour=replace(OPEN, hairpinning=False)))
    port = other.open_port(4000)
    outer = other.nat.external_ip
    assert tracer.path(Endpoint(outer, 4000)) == CORE  # silent: it would not forward that
    port.send(b"opens", tracer.port.endpoint)
    internet.world.run()
    assert tracer.path(Endpoint(outer, 4000)) == [*CORE, outer, outer, outer]
    assert tracer.errors[-1].about == Packet(tracer.port.endpoint, Endpoint(outer, 4000), b"probe")
    assert internet.counters.delivered_count > 0
    check(internet)


@pytest.mark.parametrize("kind", ["public", STRICT, CARRIER])
def test_a_closed_port_and_an_address_without_host_are_told(kind: str | NatBehaviour | Preset):
    internet = Internet(World(1))
    tracer, server = Tracer(internet.add_host("a", kind)), internet.add_host("server")
    closed = tracer.send(Endpoint(server.ip, 9))
    assert closed is not None
    assert (closed.data, closed.source) == (PORT_UNREACHABLE, Endpoint(server.ip, 0))
    nowhere = tracer.send(Endpoint("203.0.113.99", 9))
    assert nowhere is not None
    assert (nowhere.data, nowhere.source.ip) == (HOST_UNREACHABLE, CORE[-1])
    assert internet.counters.error_count == 2
    check(internet)


def test_a_closed_port_behind_a_nat_is_told_by_the_nats_address():
    internet = Internet(World(1))
    tracer, home = Tracer(internet.add_host("a"), 5000), internet.add_host("b", STRICT)
    port = home.open_port(4000)
    port.send(b"opens", tracer.port.endpoint)
    internet.world.run()
    port.close()
    error = tracer.send(Endpoint(home.nat.external_ip, 4000))
    assert error is not None
    assert (error.data, error.source) == (PORT_UNREACHABLE, Endpoint(home.nat.external_ip, 0))
    assert error.about is not None
    assert error.about.destination == Endpoint(home.nat.external_ip, 4000)
    check(internet)


def test_what_a_nat_refuses_stays_silent():
    internet = Internet(World(1))
    tracer = Tracer(internet.add_host("a"))
    home = internet.add_host("b", STRICT)
    home.open_port(4000).send(b"opens", Endpoint(internet.add_host("c").ip, 1))
    internet.world.run()
    errors = internet.counters.error_count
    assert tracer.send(Endpoint(home.nat.external_ip, 4000)) is None
    assert tracer.send(Endpoint(home.nat.external_ip, 9)) is None
    assert internet.counters.error_count == errors
    assert internet.counters.dropped_nat == 2


def test_errors_turn_round_at_a_nat_that_hairpins():
    internet = Internet(World(1))
    nat = internet.add_nat("nat", OPEN)
    a, b = (internet.add_host(name, behind=nat) for name in "ab")
    tracer, port = Tracer(a, 5000), b.open_port(4000)
    port.send(b"opens", Endpoint("203.0.113.9", 9))
    internet.world.run()
    port.close()
    error = tracer.send(Endpoint(nat.external_ip, 4000))
    assert error is not None
    assert (error.data, error.source.ip) == (PORT_UNREACHABLE, nat.external_ip)
    target = Endpoint(nat.external_ip, 4000)
    assert error.about == Packet(tracer.port.endpoint, target, b"probe")
    check(internet)


def test_neighbours_inside_a_nat_hear_each_others_errors_untranslated():
    internet = Internet(World(1))
    cgn = internet.add_nat("cgn", CARRIER)
    a, b = (internet.add_host(name, behind=cgn) for name in "ab")
    tracer = Tracer(a)
    # Up two routers, switched, down the same two.
    expected = ["100.127.255.253", "100.127.255.254", "100.127.255.254", "100.127.255.253"]
    b.open_port(4000)
    assert tracer.path(Endpoint(b.ip, 4000), 5) == expected
    closed = tracer.send(Endpoint(b.ip, 9))
    assert closed is not None
    assert (closed.source.ip, closed.data) == (b.ip, PORT_UNREACHABLE)


def test_errors_take_the_time_of_the_way_to_where_the_packet_died_and_back():
    internet = Internet(World(1), core_delay_s=0.018)
    tracer, server = Tracer(internet.add_host("a", CARRIER)), internet.add_host("server")
    world, times = internet.world, []
    tracer.port.on_error = lambda error: times.append(world.now - start)
    target = server.open_port(1).endpoint
    for ttl in (1, 3, 4, 11):
        start = world.now
        tracer.port.send(b"", target, ttl)
        world.run_for(1.0)
    # 25 ms each way; the eighth router of the core stands at 8/9 of it.
    assert times == [pytest.approx(time) for time in (0.05, 0.05, 0.054, 0.082)]


def test_errors_get_lost_as_all_else():
    internet = Internet(World(1))
    tracer = Tracer(internet.add_host("a", CARRIER))
    tracer.port._host.uplink.download.conditions = LinkConditions(loss=1.0)
    assert tracer.send(Endpoint("203.0.113.9", 9), 5) is None
    assert (internet.counters.error_count, internet.counters.lost_count) == (1, 1)
    tracer.port._host.uplink.upload.conditions = LinkConditions(loss=1.0)
    assert tracer.send(Endpoint("203.0.113.9", 9), 1) is None  # never came to where it would die
    assert (internet.counters.error_count, internet.counters.lost_count) == (1, 2)


def test_nothing_is_sent_until_somebody_listens():
    internet = Internet(World(1))
    port = internet.add_host("a", STRICT).open_port()
    for ttl in (1, 2, 64):
        port.send(b"", Endpoint("203.0.113.9", 9), ttl)
    internet.world.run()
    assert internet.counters.error_count == 0
    assert internet.counters.dropped_ttl == 2
    port.on_error = lambda error: None
    port.send(b"", Endpoint("203.0.113.9", 9), 1)
    internet.world.run()
    assert internet.counters.error_count == 1
    counters = internet.counters
    assert counters.sent_count + counters.error_count == (
        counters.delivered_count + counters.dropped_ttl + counters.dropped_no_route
    )


def test_silent_routers_drop_as_the_others_do():
    internet = Internet(World(1), core_answers=False)
    server = internet.add_host("server")
    silent = Tracer(internet.add_host("a", replace(CARRIER, answers_ttl=False)))
    assert silent.path(Endpoint(server.ip, 9), 10) == []
    assert silent.send(Endpoint("203.0.113.99", 9)) is None
    assert silent.send(Endpoint(server.ip, 9)) is not None  # the host itself speaks
    loud = Tracer(internet.add_host("b", CARRIER))
    assert loud.path(Endpoint(server.ip, 9), 10) == [
        "100.127.255.253",
        "100.127.255.254",
        "100.64.0.1",
    ]
    silent_line = Preset(STRICT, Site.HOME, IDEAL, 2, "test", answers_ttl=False)
    assert Tracer(internet.add_host("c", silent_line)).path(Endpoint(server.ip, 9), 10) == []


def test_a_router_speaks_six_times_at_once_to_one_destination_and_then_once_a_second():
    source = ErrorSource("203.0.113.1")
    packets = [
        Packet(Endpoint(f"10.0.0.{index}", 1), Endpoint("1.1.1.1", 2), b"") for index in range(60)
    ]

    def said(packet: Packet, now: float) -> bool:
        return source.error(packet, TIME_EXCEEDED, now) is not None

    assert [said(packets[0], 0.0) for _ in range(8)] == [True] * 6 + [False] * 2
    assert [said(packets[0], now) for now in (0.5, 1.0, 1.5, 2.0)] == [False, True, False, True]
    # And fifty times to all together.
    assert sum(said(packet, 10.0) for packet in packets) == 50


def test_there_are_no_errors_about_errors():
    about = Packet(Endpoint("10.0.0.1", 1), Endpoint("203.0.113.9", 2), b"")
    error = ErrorSource("203.0.113.1").error(about, TIME_EXCEEDED, 0.0)
    assert error is not None
    assert ErrorSource("203.0.113.2").error(error, TIME_EXCEEDED, 0.0) is None


def test_an_error_that_nobody_asked_for_does_not_come_in_and_changes_nothing():
    internet = Internet(World(1))
    tracer = Tracer(internet.add_host("a", STRICT), 5000)
    server, forger = internet.add_host("server"), internet.add_host("forger")
    remote = server.open_port(4000).endpoint
    tracer.port.send(b"opens", remote)
    internet.world.run()
    outer = Endpoint(internet.nats["a-nat"].external_ip, 5000)
    for about in (
        Packet(outer, Endpoint(server.ip, 4001), b""),  # never sent there
        Packet(Endpoint(outer.ip, 5001), remote, b""),
        Packet(Endpoint(forger.ip, 5000), remote, b""),  # not ours at all
    ):
        error = Packet(Endpoint(forger.ip, 0), outer, TIME_EXCEEDED, ICMP, about)
        forger.send_packet(error)
        internet.world.run()
    assert tracer.errors == []
    assert internet.counters.dropped_nat == 3
    check(internet)


def test_an_error_keeps_no_mapping_alive():
    internet = Internet(World(1))
    tracer = Tracer(internet.add_host("a", STRICT), 5000)
    nat = internet.nats["a-nat"].nat
    remote = Endpoint("203.0.113.9", 9)
    tracer.port.send(b"", remote, 2)
    internet.world.run()
    assert len(tracer.errors) == 1
    assert nat.counters.inbound_count == 0
    assert nat.external_endpoint(tracer.port.endpoint, remote, 29.9) is not None
    assert nat.external_endpoint(tracer.port.endpoint, remote, 30.1) is None
    internet.world.run_until(31.0)
    about = Packet(Endpoint(nat.external_ip, 5000), remote, b"")
    error = Packet(Endpoint("203.0.113.1", 0), about.source, TIME_EXCEEDED, ICMP, about)
    assert nat.error_inbound(error, 31.0) is None


def test_a_network_too_small_for_its_routers_and_hosts_says_so():
    internet = Internet(World(1))
    cgn = internet.add_nat("cgn", CARRIER, inside="10.0.0.0/29")
    hosts = [internet.add_host(name, behind=cgn) for name in "abc"]
    assert [host.ip for host in hosts] == ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
    assert Tracer(hosts[0]).path(Endpoint("203.0.113.9", 9), 3) == [
        "10.0.0.5",
        "10.0.0.6",
        "10.0.0.1",
    ]
    with pytest.raises(ConfigurationError, match="no address is left inside cgn"):
        internet.add_host("d", behind=cgn)


def test_ipv6_and_translators_send_no_errors():
    internet = Internet(World(1))
    server = internet.add_host("server", "public-dual")
    phone = internet.add_host("phone", "xlat464-4g")
    for port, target in (
        (server.open_port(1, server.ip6), Endpoint("3fff::9", 9)),
        (phone.open_port(1), Endpoint(server.ip, 9)),
    ):
        errors: list[Packet] = []
        port.on_error = errors.append
        for ttl in (1, 3, 5, 64):
            port.send(b"", target, ttl)
        internet.world.run()
        assert errors == []


def test_what_dies_at_a_router_of_ipv6_dies_in_silence():
    internet = Internet(World(1))
    tracer = Tracer(internet.add_host("a"))  # somebody listens
    server, home = (
        internet.add_host(*each) for each in (("server", "public-dual"), ("b", "linux-home-dual"))
    )
    port = server.open_port(4000, server.ip6)
    for ttl in range(1, 12):
        port.send(b"", Endpoint(home.ip6, 9), ttl)
    internet.world.run()
    assert internet.counters.dropped_ttl == 9
    assert (internet.counters.error_count, tracer.errors) == (0, [])


def test_an_error_of_a_host_behind_a_clat_dies_at_its_nat64_and_changes_nothing():
    internet = Internet(World(1))
    tracer = Tracer(internet.add_host("a"), 5000)
    phone = internet.add_host("phone", "xlat464-4g")
    for link in (phone.uplink.upload, phone.uplink.download):
        link.conditions = IDEAL
    seen: list[Endpoint] = []
    tracer.port.on_datagram = lambda data, source: seen.append(source)
    port = phone.open_port(4000)
    port.send(b"opens", tracer.port.endpoint)
    internet.world.run()
    port.close()
    nat = internet.nats["phone-nat"]
    before = nat.nat.counters.outbound_count
    assert tracer.send(seen[0]) is None
    assert internet.counters.dropped_closed == 1
    assert (nat.nat.counters.outbound_count, nat.nat.counters.mapping_count) == (before, 1)
    icmp = nat.table(ICMP)
    assert icmp is not None
    assert icmp.counters.mapping_count == 0
    check(internet)


@pytest.mark.parametrize("kind", [k for k, p in PRESETS.items() if p.behaviour is not None])
def test_the_path_out_of_every_preset_shows_its_inside_and_the_core(kind: str):
    internet = Internet(World(3))
    tracer = Tracer(internet.add_host("a", kind))
    for link in (tracer.port._host.uplink, internet.nats["a-nat"].uplink):
        link.upload.conditions = link.download.conditions = IDEAL
    hops = PRESETS[kind].access_hops + 1 + 8
    path = tracer.path(Endpoint(internet.add_host("server").ip, 9), hops)
    assert len(path) == hops
    assert path[-8:] == CORE
