"""IPv6 in the virtual internet: dual stack past firewalls, NAT64 with and without a CLAT."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.firewall6 import FirewallBehaviour
from natswarm.sim.link import LinkConditions
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.nat64 import CLAT_IP, embed, extract, is_embedded
from natswarm.sim.presets import PRESETS, Ipv6, Preset, Transition
from natswarm.sim.presets6 import PRESETS6
from natswarm.sim.topology import Host, Internet
from natswarm.sim.world import World

DUAL = PRESETS6["linux-home-dual"]
XLAT = replace(PRESETS6["xlat464-4g"], access=LinkConditions(0.03))  # loss is another test
NAT64 = replace(XLAT, ipv6=Ipv6(transition=Transition.NAT64))


class Probe:
    """A port that remembers who sent to it."""

    def __init__(self, host: Host, port: int = 0, ip: str | None = None) -> None:
        self.port = host.open_port(port, ip)
        self.port.on_datagram = lambda data, source: self.seen.append(source)
        self.seen: list[Endpoint] = []
        self.world = host.internet.world

    def reaches(self, other: Probe, destination: Endpoint | None = None, ttl: int = 64) -> bool:
        before = len(other.seen)
        self.port.send(b"probe", destination or other.port.endpoint, ttl)
        self.world.run_for(1.0)
        return len(other.seen) > before


def test_dual_stack_hosts_have_global_addresses_and_nobody_translates_them():
    internet = Internet(World(1))
    home = internet.add_nat("home", DUAL)
    one, two = (internet.add_host(name, behind=home) for name in ("one", "two"))
    server = internet.add_host("server", "public-dual")
    assert one.ip == "192.168.1.2"
    assert one.addresses == ["192.168.1.2", "3fff:0:0:1::2"]
    assert (two.ip6, server.ip6) == ("3fff:0:0:1::3", "3fff:0:0:2::1")
    a, b = Probe(one, 4000, one.ip6), Probe(two, 4000, two.ip6)
    there = Probe(server, 80, server.ip6)
    assert a.reaches(b)
    assert a.reaches(there)
    assert there.seen == [a.port.endpoint]
    assert there.reaches(a, there.seen[0])
    # The same number is another port for IPv4, with a NAT on the way.
    old, old_there = Probe(one, 4000), Probe(server, 80)
    assert old.reaches(old_there)
    assert old_there.seen == [Endpoint(home.external_ip, 4000)]
    assert len(there.seen) == 1


def test_ipv4_worlds_have_no_ipv6():
    internet = Internet(World(1))
    host = internet.add_host("a", "linux-home")
    assert (host.ip6, host.addresses) == (None, [host.ip])
    with pytest.raises(ConfigurationError, match="not an address of a"):
        host.open_port(1, "3fff::1")


def test_two_firewalls_are_punctured_by_one_packet_from_each_side():
    internet = Internet(World(1))
    a = internet.add_host("a", DUAL)
    b = internet.add_host("b", DUAL)
    left, right = Probe(a, 1, a.ip6), Probe(b, 2, b.ip6)
    assert not left.reaches(right)
    assert right.reaches(left)
    assert left.reaches(right)
    stranger_host = internet.add_host("s", "public-dual")
    stranger = Probe(stranger_host, 3, stranger_host.ip6)
    assert not stranger.reaches(left)
    assert internet.counters.dropped_firewall == 2
    for nat in (a.nat, b.nat):
        assert nat is not None
        assert nat.firewall is not None
        nat.firewall.check()
        assert nat.nat.counters.outbound_count == 0


def test_a_low_hop_limit_opens_our_firewall_and_dies_before_theirs():
    internet = Internet(World(1))
    a, b = internet.add_host("a", DUAL), internet.add_host("b", DUAL)
    left, right = Probe(a, 1, a.ip6), Probe(b, 2, b.ip6)
    assert not left.reaches(right, ttl=5)
    assert internet.counters.dropped_ttl == 1
    assert right.reaches(left)


def test_ipv6_passes_a_firewall_at_each_level():
    """Three levels of NAT for IPv4, three firewalls for IPv6."""
    internet = Internet(World(1))
    cgn = internet.add_nat("cgn", replace(XLAT, ipv6=Ipv6(FirewallBehaviour())))
    building = internet.add_nat("building", DUAL, behind=cgn)
    flat = internet.add_nat("flat", DUAL, behind=building)
    host = internet.add_host("host", behind=flat)
    server = internet.add_host("server", "public-dual")
    a, there = Probe(host, 1, host.ip6), Probe(server, 2, server.ip6)
    assert not there.reaches(a)
    assert a.reaches(there)
    assert there.seen == [a.port.endpoint]
    assert there.reaches(a)
    old, old_there = Probe(host, 1), Probe(server, 2)
    assert old.reaches(old_there)
    assert old_there.seen[0].ip == cgn.external_ip
    assert old_there.reaches(old, old_there.seen[0])
    for nat in (cgn, building, flat):
        assert nat.firewall is not None
        assert nat.firewall.counters.outbound_count == 1
        assert nat.nat.counters.outbound_count == 1
    assert building.external_ip.startswith("100.64.")
    assert flat.external_ip.startswith("192.168.")


def test_families_do_not_mix():
    internet = Internet(World(1))
    host, server = internet.add_host("h", DUAL), internet.add_host("s", "public-dual")
    old, new = Probe(host, 1), Probe(host, 1, host.ip6)
    old_there, new_there = Probe(server, 2), Probe(server, 2, server.ip6)
    assert not new.reaches(old_there)
    assert not old.reaches(new_there)
    assert not old_there.reaches(new_there)
    assert internet.counters.dropped_no_route == 3


@pytest.mark.parametrize("ip", ["198.51.100.1", "0.0.0.0", "255.255.255.255"])
def test_ipv4_addresses_fit_into_ipv6_ones(ip: str):
    assert is_embedded(embed(ip))
    assert extract(embed(ip)) == ip


def test_the_form_of_an_embedded_address():
    """RFC 6052 section 2.4."""
    assert embed("192.0.2.33") == "64:ff9b::c000:221"
    for ip in ("64:ff9b:1::1", "64:ff9b::1:0:0", "3fff::1", "198.51.100.1"):
        assert not is_embedded(ip)
    for ip in ("3fff::1", "64:ff9b::1:0:0"):
        with pytest.raises(ValueError, match="not an IPv4 address behind"):
            extract(ip)


def test_a_host_of_ipv6_alone_reaches_ipv4_through_a_nat64():
    internet = Internet(World(1))
    phone, server = internet.add_host("phone", NAT64), internet.add_host("server")
    assert phone.addresses == [phone.ip6]
    assert phone.nat is not None
    a, there = Probe(phone, 4000), Probe(server, 80)
    assert a.reaches(there, Endpoint(embed(server.ip), 80))
    [seen] = there.seen
    assert seen.ip == phone.nat.external_ip
    assert there.reaches(a, seen)
    assert a.seen == [Endpoint(embed(server.ip), 80)]
    stranger = Probe(internet.add_host("stranger"), 80)
    assert not stranger.reaches(a, seen)  # ADF
    assert Probe(server, 81).reaches(a, seen)
    assert not a.reaches(there, there.port.endpoint)  # an IPv4 literal: no route, no CLAT
    phone.nat.nat.check()


def test_a_clat_takes_ipv4_literals_to_the_nat64():
    internet = Internet(World(1))
    phone, server = internet.add_host("phone", XLAT), internet.add_host("server", "public-dual")
    assert phone.addresses == [CLAT_IP, phone.ip6]
    assert phone.nat is not None
    literal, native = Probe(phone, 4000), Probe(phone, 4000, phone.ip6)
    there, there6 = Probe(server, 80), Probe(server, 80, server.ip6)
    assert literal.reaches(there)
    assert there.seen[0].ip == phone.nat.external_ip
    assert there.reaches(literal, there.seen[0])
    assert literal.seen == [there.port.endpoint]
    assert native.reaches(there6)
    assert there6.seen == [native.port.endpoint]
    assert native.reaches(there, Endpoint(embed(server.ip), 80))
    assert there.seen[1] != there.seen[0]  # two addresses of the phone, two mappings
    # Another phone that sends to the CLAT's own address is nobody behind the NAT64.
    clat_address = next(ip for ip in phone.nat.realm if ip != phone.ip6)
    other = internet.add_host("other", behind=phone.nat)
    assert not Probe(other, 1, other.ip6).reaches(literal, Endpoint(clat_address, 4000))


def test_each_translator_is_a_hop():
    internet = Internet(World(1))
    phone, server = internet.add_host("phone", XLAT), internet.add_host("server")
    literal, native = Probe(phone, 1), Probe(phone, 2, phone.ip6)
    there = Probe(server, 80)
    needs = {
        probe: next(ttl for ttl in range(1, 64) if probe.reaches(there, target, ttl))
        for probe, target in (
            (literal, there.port.endpoint),
            (native, Endpoint(embed(server.ip), 80)),
        )
    }
    # 2 routers on the access link, the NAT64, 8 in the core; the CLAT besides.
    assert (needs[native], needs[literal]) == (12, 13)


def test_phones_behind_one_nat64_meet_by_hairpin():
    internet = Internet(World(1))
    carrier = internet.add_nat("carrier", XLAT)
    a, b = (Probe(internet.add_host(name, behind=carrier), 4000) for name in "ab")
    server = Probe(internet.add_host("server"), 80)
    for probe in (a, b):
        assert probe.reaches(server)
    [seen_a, seen_b] = server.seen
    assert not a.reaches(b, seen_b)  # ADF: b has not sent there
    assert b.reaches(a, seen_a)
    assert a.seen == [seen_b]
    assert a.reaches(b, seen_b)


def test_a_home_behind_464xlat_translates_before_the_clat():
    internet = Internet(World(1))
    carrier = internet.add_nat("carrier", XLAT)
    home = internet.add_nat("home", DUAL, behind=carrier)
    laptop, server = internet.add_host("laptop", behind=home), internet.add_host("s", "public-dual")
    assert home.external_ip == CLAT_IP
    old, new = Probe(laptop, 1), Probe(laptop, 1, laptop.ip6)
    there, there6 = Probe(server, 80), Probe(server, 80, server.ip6)
    assert old.reaches(there)
    assert there.reaches(old, there.seen[0])
    assert new.reaches(there6)
    assert there6.reaches(new, there6.seen[0])
    via_nat64 = Endpoint(embed(server.ip), 80)
    assert new.reaches(there, via_nat64)
    assert there.seen[1].ip == carrier.external_ip
    assert there.reaches(new, there.seen[1])
    assert new.seen[-1] == via_nat64


def test_contradictions_are_refused():
    internet = Internet(World(1))
    for ipv6 in (Ipv6(FirewallBehaviour()), Ipv6(transition=Transition.NAT64)):
        with pytest.raises(ValueError, match="stand in a router"):
            replace(PRESETS["public"], ipv6=ipv6)
    old, nat64 = internet.add_nat("old", "kpn-nl"), internet.add_nat("nat64", NAT64)
    xlat = internet.add_nat("xlat", XLAT)
    with pytest.raises(ConfigurationError, match="old above it has none"):
        internet.add_nat("home", DUAL, behind=old)
    with pytest.raises(ConfigurationError, match="give that 464XLAT"):
        internet.add_host("host", "linux-home", behind=nat64)
    pool = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.EIF, address_count=2)
    with pytest.raises(ConfigurationError, match="464XLAT gives one"):
        internet.add_nat("pool", pool, behind=xlat)
    with pytest.raises(ConfigurationError, match="no IPv4 addresses"):
        nat64.next_address()
    assert list(internet.nats) == ["old", "nat64", "xlat"]
    with pytest.raises(ConfigurationError, match="xlat464-4g"):
        internet.add_host("x", "no-such-preset")
    assert not internet.hosts


def test_a_carrier_gives_each_device_a_prefix_and_a_home_shares_one():
    internet = Internet(World(1))
    carrier, home = internet.add_nat("carrier", XLAT), internet.add_nat("home", DUAL)
    phones = [internet.add_host(f"p{index}", behind=carrier) for index in range(3)]
    laptops = [internet.add_host(f"l{index}", behind=home) for index in range(3)]

    def prefixes(hosts: list[Host]) -> int:
        return len({str(host.ip6).partition("::")[0] for host in hosts})

    assert (prefixes(phones), prefixes(laptops)) == (3, 1)


def test_links_are_shared_by_both_families():
    internet = Internet(World(1))
    slow = Preset(
        DUAL.behaviour,
        DUAL.site,
        LinkConditions(rate_bytes_per_s=10_000.0, queue_bytes=400),
        0,
        "test",
        ipv6=DUAL.ipv6,
    )
    host, server = internet.add_host("h", slow), internet.add_host("s", "public-dual")
    old, new = host.open_port(1), host.open_port(1, host.ip6)
    targets = [server.open_port(2), server.open_port(2, server.ip6)]
    for _ in range(4):
        for port, target in zip((old, new), targets, strict=True):
            port.send(bytes(72), target.endpoint)
    internet.world.run()
    assert host.nat is not None
    assert host.nat.uplink.upload.overflow_count == 4
    assert internet.counters.delivered_count == 4
    assert internet.world.next_time() == math.inf
