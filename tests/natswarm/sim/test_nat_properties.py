"""Random traffic through every kind of NAT, against a model that knows only who spoke to whom."""

from __future__ import annotations

import random
from dataclasses import asdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering, Mapping, Poison, Pooling
from natswarm.sim.load import BackgroundLoad
from natswarm.sim.nat import Nat, NatBehaviour
from natswarm.sim.packet import ICMP, TIME_EXCEEDED, Packet
from natswarm.sim.ports import Blocks, Preserving, ScaledBeta, Sequential, Uniform
from natswarm.sim.rate import RateLimit

EXTERNAL_IPS = ("198.51.100.1", "198.51.100.2")
# Few of everything, so that keys collide and ports run out.
INTERNALS = [Endpoint(f"10.0.0.{host}", port) for host in (1, 2) for port in (2000, 2001, 2002)]
REMOTES = [Endpoint(f"203.0.113.{host}", port) for host in (1, 2) for port in (2000, 69, 70)]
LAWS = [
    Preserving(2000, 2007),
    Uniform(2000, 2007),
    ScaledBeta(2000, 7, 2, 3),
    Sequential(2000, 2007, step=3),
    Sequential(2000, 2007, step=3, cross_traffic_per_s=0.5),
    Blocks(2000, 2007, size=4, max_blocks=1),
    Blocks(2000, 2007, size=2, max_blocks=2, is_sequential=True, keeps_newest=True),
]
LIFETIME_S = 60.0


@st.composite
def behaviours(draw: st.DrawFn) -> NatBehaviour:
    overloading = draw(st.booleans())
    filtering = draw(st.sampled_from(Filtering))
    unreplied = draw(st.sampled_from([20.0, LIFETIME_S]))
    mapping = draw(st.sampled_from(Mapping))
    poisons = [Poison.NONE]
    if filtering is not Filtering.EIF:
        poisons.append(Poison.BURNS_MAPPING)
        if mapping is not Mapping.APDM:
            poisons.append(Poison.RETIRES_MAPPING)
        if overloading and filtering is Filtering.APDF:
            poisons.append(Poison.TAKES_PORT)
    address_count = draw(st.sampled_from([1, 2]))
    allocation = draw(st.sampled_from(LAWS))
    has_load = draw(st.booleans()) and not getattr(allocation, "cross_traffic_per_s", 0.0)
    return NatBehaviour(
        mapping=mapping,
        filtering=filtering,
        allocation=allocation,
        overloading=overloading,
        unreplied_lifetime_s=unreplied,
        replied_lifetime_s=LIFETIME_S,
        refreshed_by_inbound=draw(st.booleans()),
        absolute_lifetime_s=draw(st.sampled_from([None, (30.0, 90.0)])),
        preserves_parity=draw(st.booleans()),
        address_count=address_count,
        pooling=draw(st.sampled_from(Pooling)) if address_count > 1 else Pooling.PAIRED,
        max_mappings=draw(st.sampled_from([None, 3])),
        subscriber_rate=draw(st.sampled_from([None, RateLimit(0.1, 2)])),
        nat_rate=draw(st.sampled_from([None, RateLimit(0.5, 3)])),
        tftp_helper=draw(st.booleans()),
        poison=draw(st.sampled_from(poisons)),
        load=BackgroundLoad(2, 0.1, 20.0) if has_load else None,
    )


def assert_rate_holds(limit: RateLimit | None, times: list[float]) -> None:
    """In no stretch of time more than a burst and what the rate adds to it."""
    if limit is not None:
        for first, start in enumerate(times):
            for last, end in enumerate(times[first:], first):
                made = last - first + 1
                assert made <= limit.burst + limit.per_s * (end - start) + 1e-6, times


def state_of(nat: Nat) -> object:
    """All that an ICMP error must leave as it was."""
    sessions = [
        (
            *(session.internal, session.external, session.remote, session.expires),
            *(session.is_open, session.is_replied, session.mapping.expires),
            *(sorted(session.mapping.permitted), len(nat._due)),
        )
        for session in nat._outgoing.values()
    ]
    return (sessions, asdict(nat.counters), asdict(nat.load_counters), nat._rng.getstate())


class NatMachine(RuleBasedStateMachine):
    """What must hold whatever comes.

    The model keeps when each internal endpoint last sent to each remote and by which port, and
    when a packet last passed inwards. A packet may come in only to an endpoint that sent out by
    that port, and only where the filter's word allows it.
    """

    @initialize(behaviour=behaviours(), seed=st.integers(0, 1000))
    def start(self, behaviour: NatBehaviour, seed: int) -> None:
        self.behaviour = behaviour
        ips = EXTERNAL_IPS[: behaviour.address_count]
        self.nat = Nat(behaviour, ips, random.Random(seed))
        self.now = 0.0
        self.sent: dict[tuple[Endpoint, Endpoint, Endpoint], float] = {}
        self.sent_ever: list[tuple[Endpoint, Endpoint, Endpoint]] = []
        self.passed_in: dict[tuple[Endpoint, Endpoint, Endpoint], float] = {}
        self.requests: set[tuple[Endpoint, Endpoint, str]] = set()
        self.made: list[tuple[float, str]] = []

    @rule(
        internal=st.sampled_from(INTERNALS),
        remote=st.sampled_from(REMOTES),
        data=st.sampled_from([b"", b"\0\1x"]),
    )
    def send_out(self, internal: Endpoint, remote: Endpoint, data: bytes) -> None:
        before = self.nat.external_endpoint(internal, remote, self.now)
        made_count = self.nat.counters.mapping_count
        packet = self.nat.outbound(Packet(internal, remote, data), self.now)
        if self.nat.counters.mapping_count > made_count:
            self.made.append((self.now, internal.ip))
        if packet is None:
            assert before is None, "a live session was refused"
            return
        assert packet.destination == remote
        assert packet.source.ip in self.nat.external_ips
        assert 2000 <= packet.source.port <= 2007
        assert before in (None, packet.source), "the port changed in the middle of a session"
        assert self.nat.external_endpoint(internal, remote, self.now) == packet.source
        self.sent[internal, packet.source, remote] = self.now
        self.sent_ever.append((internal, packet.source, remote))
        if data:
            self.requests.add((internal, packet.source, remote.ip))

    @rule(
        remote=st.sampled_from(REMOTES),
        index=st.integers(0, 1),
        port=st.integers(2000, 2007),
    )
    def send_in(self, remote: Endpoint, index: int, port: int) -> None:
        self._send_in(remote, Endpoint(EXTERNAL_IPS[index % self.behaviour.address_count], port))

    @rule(choice=st.integers(0, 1000), stranger=st.sampled_from([None, *REMOTES]))
    def send_in_where_it_matters(self, choice: int, stranger: Endpoint | None) -> None:
        """To an endpoint that was in use: from who was sent to, or from a stranger."""
        if self.sent_ever:
            _, external, remote = self.sent_ever[choice % len(self.sent_ever)]
            self._send_in(remote if stranger is None else stranger, external)

    def _send_in(self, remote: Endpoint, external: Endpoint) -> None:
        packet = self.nat.inbound(Packet(remote, external, b""), self.now)
        if packet is None:
            if self.behaviour.poison is Poison.BURNS_MAPPING:
                self._forget(external)
            return
        internal = packet.destination
        assert packet.source == remote
        if internal not in INTERNALS:
            assert self.behaviour.load is not None
            assert self.behaviour.filtering is Filtering.EIF, "nobody else knows their remotes"
            return
        kinds = {
            Filtering.EIF: lambda other: True,
            Filtering.ADF: lambda other: other.ip == remote.ip,
            Filtering.APDF: lambda other: other == remote,
        }
        lets_in = kinds[self.behaviour.filtering]
        traffic = dict(self.sent)
        if self.behaviour.refreshed_by_inbound:
            for key, time in self.passed_in.items():
                traffic[key] = max(time, traffic.get(key, 0.0))
        was_sent = any(
            (who, by) == (internal, external) and lets_in(other) and self.now - time < LIFETIME_S
            for (who, by, other), time in traffic.items()
        )
        was_asked = self.behaviour.tftp_helper and (internal, external, remote.ip) in self.requests
        assert was_sent or was_asked, "a packet passed a filter that nobody had opened"
        self.passed_in[internal, external, remote] = self.now
        # Where the two speak through another port already, that is the session it refreshes.
        speaking = self.nat.external_endpoint(internal, remote, self.now)
        if speaking is not None:
            self.passed_in[internal, speaking, remote] = self.now

    @rule(
        internal=st.sampled_from(INTERNALS),
        remote=st.sampled_from(REMOTES),
        index=st.integers(0, 1),
        port=st.integers(2000, 2007),
        choice=st.none() | st.integers(0, 1000),
    )
    def send_error(
        self, internal: Endpoint, remote: Endpoint, index: int, port: int, choice: int | None
    ) -> None:
        """About any packet, or about one that was sent: to its sender alone, changing nothing."""
        external = Endpoint(EXTERNAL_IPS[index % self.behaviour.address_count], port)
        if choice is not None and self.sent_ever:
            internal, external, remote = self.sent_ever[choice % len(self.sent_ever)]
        before = state_of(self.nat)
        router, own = (
            Endpoint("192.0.2.1", 0),
            self.nat.external_endpoint(internal, remote, self.now),
        )
        about = Packet(external, remote, b"x")
        error = Packet(router, external, TIME_EXCEEDED, ICMP, about)
        came_in = self.nat.error_inbound(error, self.now)
        if came_in is not None and came_in.destination in INTERNALS:
            sender = came_in.destination
            assert self.nat.external_endpoint(sender, remote, self.now) == external
            assert (sender, external, remote) in {*self.sent_ever, *self.passed_in}
            assert came_in.about == Packet(sender, remote, b"x")
        else:
            assert own != external or (internal, external, remote) not in self.sent
        about = Packet(remote, internal, b"x")
        error = Packet(router, remote, TIME_EXCEEDED, ICMP, about)
        went_out = self.nat.error_outbound(error, self.now)
        if went_out is not None:
            assert went_out.destination == remote
            assert went_out.about == Packet(remote, own, b"x")
            assert went_out.source == Endpoint(own.ip, 0)
        assert state_of(self.nat) == before

    def _forget(self, external: Endpoint) -> None:
        """A stranger burned whatever was there."""
        for kept in (self.sent, self.passed_in):
            for key in [key for key in kept if key[1] == external]:
                del kept[key]
        self.requests = {key for key in self.requests if key[1] != external}

    @rule(seconds=st.sampled_from([0.0, 0.5, 10.0, 25.0, 59.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def look_around(self) -> None:
        count = self.nat.mapping_count(self.now)
        ports = self.nat.ports_in_use(self.now)
        assert len(ports) <= count
        if self.behaviour.exclusive_ports:
            assert len(ports) == count

    @rule()
    def count_new_mappings(self) -> None:
        behaviour = self.behaviour
        assert_rate_holds(behaviour.nat_rate, [time for time, _ in self.made])
        for ip in {internal.ip for internal in INTERNALS}:
            assert_rate_holds(
                behaviour.subscriber_rate, [time for time, who in self.made if who == ip]
            )

    @invariant()
    def table_is_sound(self) -> None:
        if hasattr(self, "nat"):
            self.nat.check()

    def teardown(self) -> None:
        if hasattr(self, "nat"):
            later = self.now + 10 * LIFETIME_S
            count = self.nat.mapping_count(later)
            if self.behaviour.load is None:
                assert count == 0, "something is never forgotten"
                assert self.nat.ports_in_use(later) == []
            for session in self.nat._outgoing.values():
                assert session.internal not in INTERNALS, "a session is never forgotten"
            self.nat.check()
            self.count_new_mappings()


TestNat = NatMachine.TestCase
TestNat.settings = settings(max_examples=150, stateful_step_count=40)
