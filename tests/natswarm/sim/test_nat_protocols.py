"""TCP and ICMP queries through NATs: tables of their own, and lifetimes of their own."""

from __future__ import annotations

import random

import pytest

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.nat import Nat, NatBehaviour
from natswarm.sim.nat_protocols import make_table
from natswarm.sim.packet import ICMP, PORT_UNREACHABLE, TCP, TIME_EXCEEDED, UDP, Packet
from natswarm.sim.ports import Preserving, Uniform
from natswarm.sim.topology import Host, Internet
from natswarm.sim.world import World

FIN, SYN, RST, ACK = 1, 2, 4, 16
EXTERNAL_IP = "198.51.100.1"
INSIDE, REMOTE = Endpoint("192.168.1.2", 5000), Endpoint("203.0.113.9", 80)
STRICT = NatBehaviour(mapping=Mapping.APDM, filtering=Filtering.APDF)


def segment(flags: int) -> bytes:
    return bytes(8) + bytes([0x50, flags]) + bytes(6)


def tcp_table(behaviour: NatBehaviour = STRICT, seed: int = 1) -> Nat:
    nat = make_table(TCP, behaviour, (EXTERNAL_IP,), random.Random(seed))
    assert nat is not None
    return nat


class Connection:
    """Segments of one connection through a table."""

    def __init__(self, nat: Nat) -> None:
        self.nat = nat
        self.now = 0.0

    def out(self, flags: int, source: Endpoint = INSIDE) -> bool:
        packet = self.nat.outbound(Packet(source, REMOTE, segment(flags), TCP), self.now)
        self.nat.check()
        assert packet is None or packet.protocol == TCP
        return packet is not None

    def come_in(self, flags: int) -> bool:
        packet = Packet(REMOTE, Endpoint(EXTERNAL_IP, INSIDE.port), segment(flags), TCP)
        translated = self.nat.inbound(packet, self.now)
        self.nat.check()
        return translated is not None

    def lives(self, seconds: float) -> bool:
        """Whether the session is there after a silence of `seconds`; looks, and changes nothing."""
        return self.nat.external_endpoint(INSIDE, REMOTE, self.now + seconds) is not None

    def establish(self) -> None:
        assert self.out(SYN)
        assert self.come_in(SYN | ACK)
        assert self.out(ACK)


def test_a_connection_lives_long_and_its_beginning_and_end_do_not():
    tcp = Connection(tcp_table())
    tcp.out(SYN)
    assert tcp.lives(239.9)
    assert not tcp.lives(240.1)
    tcp.come_in(SYN | ACK)
    assert not tcp.lives(240.1)  # half-open
    tcp.out(ACK)
    assert tcp.lives(7439.9)
    assert not tcp.lives(7440.1)
    tcp.now = 5000.0
    assert tcp.come_in(ACK)
    assert tcp.lives(7439.9)
    tcp.out(FIN | ACK)
    assert tcp.lives(7439.9)  # half-closed: the other may send for long
    tcp.come_in(FIN | ACK)
    assert tcp.lives(239.9)
    assert not tcp.lives(240.1)
    tcp.out(ACK)
    assert not tcp.lives(240.1)
    tcp.now += 241.0
    assert not tcp.come_in(ACK)
    assert tcp.nat.mapping_count(tcp.now) == 0


@pytest.mark.parametrize("is_inbound", [False, True])
def test_a_reset_ends_a_connection_and_its_ports_can_be_used_again(is_inbound: bool):
    tcp = Connection(tcp_table())
    tcp.establish()
    assert tcp.come_in(RST) if is_inbound else tcp.out(RST)
    assert tcp.lives(239.9)
    assert not tcp.lives(240.1)
    tcp.now = 10.0
    tcp.establish()
    assert tcp.lives(7439.9)


def test_what_is_over_gives_its_port_back_in_time():
    nat = tcp_table(
        NatBehaviour(
            mapping=Mapping.EIM, filtering=Filtering.EIF, allocation=Preserving(5000, 5000)
        )
    )
    tcp, other = Connection(nat), Endpoint("192.168.1.3", 5000)
    tcp.establish()
    tcp.now = 100.0
    assert not tcp.out(SYN, other)
    tcp.out(RST)
    tcp.now = 339.0
    assert not tcp.out(SYN, other)
    tcp.now = 341.0
    assert tcp.out(SYN, other)


@pytest.mark.parametrize(
    ("filtering", "gets_in"),
    [(Filtering.EIF, True), (Filtering.ADF, True), (Filtering.APDF, False)],
)
def test_an_inbound_syn_follows_the_filter(filtering: Filtering, gets_in: bool):
    nat = tcp_table(NatBehaviour(mapping=Mapping.EIM, filtering=filtering))
    tcp = Connection(nat)
    tcp.establish()
    stranger = Endpoint(REMOTE.ip, 81)
    packet = Packet(stranger, Endpoint(EXTERNAL_IP, INSIDE.port), segment(SYN), TCP)
    assert (nat.inbound(packet, 1.0) is not None) == gets_in
    nat.check()
    # And lives no longer than one half-open, beside the long life of the other.
    assert nat.external_endpoint(INSIDE, stranger, 241.1) is None
    assert nat.mapping_count(242.0) == 1


def test_segments_without_a_beginning_live_short():
    tcp = Connection(tcp_table())
    tcp.out(ACK)
    tcp.come_in(ACK)
    tcp.out(ACK)
    assert not tcp.lives(240.1)
    nat = tcp_table()
    assert nat.outbound(Packet(INSIDE, REMOTE, b"short", TCP), 0.0) is not None


@pytest.mark.parametrize("seed", range(20))
def test_random_segments_keep_the_table_sound(seed: int):
    rng = random.Random(seed)
    print(f"seed {seed}")
    behaviour = NatBehaviour(
        mapping=rng.choice(list(Mapping)),
        filtering=rng.choice(list(Filtering)),
        allocation=Uniform(2000, 2007),
    )
    nat, now = tcp_table(behaviour, seed), 0.0
    for _ in range(400):
        now += rng.choice([0.0, 1.0, 100.0, 241.0])
        inside = Endpoint("10.0.0.1", rng.choice([2000, 2001]))
        remote = Endpoint("203.0.113.1", rng.choice([80, 81]))
        data = segment(rng.choice([SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST]))
        if rng.random() < 0.5:
            nat.outbound(Packet(inside, remote, data, TCP), now)
        else:
            there = Endpoint(EXTERNAL_IP, rng.randrange(2000, 2008))
            nat.inbound(Packet(remote, there, data, TCP), now)
        nat.check()
        for due, sequence, session in nat._due:
            assert session.sequence != sequence or due <= session.expires, "looked at too late"
    assert nat.mapping_count(now + 7441.0) == 0


class Tap:
    """A host whose packets all come here, as a device's would."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.seen: list[tuple[Packet, int]] = []
        host.on_packet = lambda packet, ttl: self.seen.append((packet, ttl))
        self.world = host.internet.world

    def send(self, packet: Packet, ttl: int = 64) -> None:
        self.host.send_packet(packet, ttl)
        self.world.run_for(1.0)


def double_nat() -> tuple[Internet, Tap, Tap]:
    internet = Internet(World(1))
    cgn = internet.add_nat(
        "cgn", NatBehaviour(mapping=Mapping.APDM, filtering=Filtering.APDF, allocation=Uniform())
    )
    laptop = internet.add_host("laptop", "linux-home", behind=cgn)
    return internet, Tap(laptop), Tap(internet.add_host("server"))


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_host_that_takes_packets_gets_all_of_them(protocol: int):
    internet, laptop, server = double_nat()
    here, there = Endpoint(laptop.host.ip, 6000), Endpoint(server.host.ip, 80)
    laptop.send(Packet(here, there, segment(SYN), protocol))
    [(packet, ttl)] = server.seen
    assert (packet.source.ip, packet.data, packet.protocol) == (
        internet.nats["cgn"].external_ip,
        segment(SYN),
        protocol,
    )
    assert ttl == 64 - 10
    server.send(Packet(there, packet.source, segment(SYN | ACK), protocol))
    assert laptop.seen == [(Packet(there, here, segment(SYN | ACK), protocol), 64 - 10)]
    assert internet.counters.delivered_count == 2
    laptop.host.open_port(6000).on_datagram = lambda data, source: pytest.fail("both got it")
    server.send(Packet(there, packet.source, b"", protocol))
    assert len(laptop.seen) == 2


def test_a_ping_goes_out_and_its_answer_comes_back():
    internet, laptop, server = double_nat()
    asks = Packet(Endpoint(laptop.host.ip, 77), Endpoint(server.host.ip, 0), b"\x08\0\0\1hi", ICMP)
    laptop.send(asks)
    [(packet, _)] = server.seen
    assert packet.source.ip == internet.nats["cgn"].external_ip
    assert packet.source.port != 77
    server.send(Packet(packet.destination, packet.source, b"\0\0\0\1hi", ICMP))
    [(answer, _)] = laptop.seen
    assert answer == Packet(asks.destination, asks.source, b"\0\0\0\1hi", ICMP)
    internet.world.run_for(61.0)
    server.send(Packet(packet.destination, packet.source, b"\0\0\0\2hi", ICMP))
    assert len(laptop.seen) == 1
    # Nobody inside asked: a ping of the NAT itself.
    server.send(Packet(Endpoint(server.host.ip, 9), Endpoint(packet.source.ip, 0), b"\x08\0", ICMP))
    assert len(laptop.seen) == 1


@pytest.mark.parametrize("protocol", [TCP, ICMP])
def test_errors_find_their_way_by_the_table_of_the_protocol(protocol: int):
    internet, laptop, server = double_nat()
    there = Endpoint(server.host.ip, 0 if protocol == ICMP else 80)
    probe = Packet(Endpoint(laptop.host.ip, 77), there, b"\x08\0\0\1" + bytes(8), protocol)
    for ttl in (1, 2, 3):
        laptop.send(probe, ttl)
    assert [packet.source.ip for packet, _ in laptop.seen] == [
        internet.nats["laptop-nat"].inside_ip,
        internet.nats["cgn"].inside_ip,
        "198.19.255.254",
    ]
    for packet, _ in laptop.seen:
        assert (packet.data, packet.about) == (TIME_EXCEEDED, probe)


def test_protocols_have_tables_of_their_own():
    internet, laptop, server = double_nat()
    home = internet.nats["laptop-nat"]
    here, there = Endpoint(laptop.host.ip, 6000), Endpoint(server.host.ip, 80)
    laptop.send(Packet(here, there, b"", UDP))
    assert home.nat.mapping_count(1.0) == 1
    server.send(Packet(there, server.seen[0][0].source, segment(SYN), TCP))
    assert laptop.seen == []  # that door is UDP's
    laptop.send(Packet(here, there, segment(SYN), TCP))
    assert home.nat.counters.mapping_count == 1
    tcp = home.table(TCP)
    assert tcp is not None
    assert tcp is not home.nat
    assert tcp.counters.mapping_count == 1


def test_a_protocol_without_ports_passes_no_nat():
    internet, laptop, server = double_nat()
    laptop.send(Packet(Endpoint(laptop.host.ip, 0), Endpoint(server.host.ip, 0), b"GRE", 47))
    assert server.seen == []
    assert internet.counters.dropped_nat == 1


def test_a_host_with_ports_alone_refuses_tcp_and_overlooks_pings():
    internet, laptop, _ = double_nat()
    plain = internet.add_host("plain")
    plain.open_port(80).on_datagram = lambda data, source: pytest.fail("that was no UDP")
    here = Endpoint(laptop.host.ip, 6000)
    laptop.send(Packet(here, Endpoint(plain.ip, 80), segment(SYN), TCP))
    [(error, _)] = laptop.seen
    assert (error.data, error.source.ip) == (PORT_UNREACHABLE, plain.ip)
    laptop.send(Packet(here, Endpoint(plain.ip, 0), b"\x08\0", ICMP))
    assert len(laptop.seen) == 1
    assert internet.counters.dropped_closed == 2


def test_a_host_sends_from_its_own_addresses_only():
    internet, laptop, server = double_nat()
    with pytest.raises(ConfigurationError, match="laptop cannot send from"):
        laptop.send(Packet(Endpoint("192.168.9.9", 1), Endpoint(server.host.ip, 1), b""))
    laptop.send(Packet(Endpoint(laptop.host.ip, 1), Endpoint("3fff::1", 1), b""))
    assert internet.counters.dropped_no_route == 1


def test_udp_draws_the_same_numbers_whatever_other_protocols_do():
    def ports(*, with_tcp: bool) -> list[int]:
        _, laptop, server = double_nat()
        for index in range(10):
            here, there = Endpoint(laptop.host.ip, 6000), Endpoint(server.host.ip, 80 + index)
            if with_tcp:
                laptop.send(Packet(here, there, segment(SYN), TCP))
            laptop.send(Packet(here, there, b"", UDP))
        return [packet.source.port for packet, _ in server.seen if packet.protocol == UDP]

    assert ports(with_tcp=True) == ports(with_tcp=False)
