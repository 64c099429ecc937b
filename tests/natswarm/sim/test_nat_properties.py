"""Random traffic through every kind of NAT, against a model that knows only who spoke to whom."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.nat import Nat, NatBehaviour
from natswarm.sim.packet import Packet
from natswarm.sim.ports import Blocks, Preserving, ScaledBeta, Sequential, Uniform

EXTERNAL_IP = "198.51.100.1"
# Few of everything, so that keys collide and ports run out.
INTERNALS = [Endpoint(f"10.0.0.{host}", port) for host in (1, 2) for port in (2000, 2001, 2002)]
REMOTES = [Endpoint(f"203.0.113.{host}", port) for host in (1, 2) for port in (2000, 69, 70)]
LAWS = [
    Preserving(2000, 2007),
    Uniform(2000, 2007),
    ScaledBeta(2000, 7, 2, 3),
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
    return NatBehaviour(
        mapping=draw(st.sampled_from(Mapping)),
        filtering=filtering,
        allocation=draw(st.sampled_from(LAWS)),
        overloading=overloading,
        unreplied_lifetime_s=unreplied,
        replied_lifetime_s=LIFETIME_S,
        refreshed_by_inbound=draw(st.booleans()),
        absolute_lifetime_s=draw(st.sampled_from([None, (30.0, 90.0)])),
        max_mappings=draw(st.sampled_from([None, 3])),
        tftp_helper=draw(st.booleans()),
        accepts_strangers=overloading and filtering is Filtering.APDF and draw(st.booleans()),
    )


class NatMachine(RuleBasedStateMachine):
    """What must hold whatever comes.

    The model keeps when each internal endpoint last sent to each remote and by which port, and
    when a packet last passed inwards. A packet may come in only to an endpoint that sent out by
    that port, and only where the filter's word allows it.
    """

    @initialize(behaviour=behaviours(), seed=st.integers(0, 1000))
    def start(self, behaviour: NatBehaviour, seed: int) -> None:
        self.behaviour = behaviour
        self.nat = Nat(behaviour, EXTERNAL_IP, random.Random(seed))
        self.now = 0.0
        self.sent: dict[tuple[Endpoint, int, Endpoint], float] = {}
        self.passed_in: dict[tuple[Endpoint, int, Endpoint], float] = {}
        self.requests: dict[tuple[Endpoint, int, str], float] = {}

    @rule(
        internal=st.sampled_from(INTERNALS),
        remote=st.sampled_from(REMOTES),
        data=st.sampled_from([b"", b"\0\1x"]),
    )
    def send_out(self, internal: Endpoint, remote: Endpoint, data: bytes) -> None:
        before = self.nat.external_endpoint(internal, remote, self.now)
        packet = self.nat.outbound(Packet(internal, remote, data), self.now)
        if packet is None:
            assert before is None, "a live session was refused"
            return
        assert packet.destination == remote
        assert packet.source.ip == EXTERNAL_IP
        assert 2000 <= packet.source.port <= 2007
        assert before in (None, packet.source), "the port changed in the middle of a session"
        assert self.nat.external_endpoint(internal, remote, self.now) == packet.source
        key = (internal, packet.source.port, remote)
        self.sent[key] = self.now
        if data:
            self.requests[internal, packet.source.port, remote.ip] = self.now

    @rule(remote=st.sampled_from(REMOTES), port=st.integers(2000, 2007))
    def send_in(self, remote: Endpoint, port: int) -> None:
        packet = self.nat.inbound(Packet(remote, Endpoint(EXTERNAL_IP, port), b""), self.now)
        if packet is None:
            return
        internal = packet.destination
        assert internal in INTERNALS
        assert packet.source == remote
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
            (who, by) == (internal, port) and lets_in(other) and self.now - time < LIFETIME_S
            for (who, by, other), time in traffic.items()
        )
        was_asked = self.behaviour.tftp_helper and (internal, port, remote.ip) in self.requests
        assert was_sent or was_asked, "a packet passed a filter that nobody had opened"
        self.passed_in[internal, port, remote] = self.now

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

    @invariant()
    def table_is_sound(self) -> None:
        if hasattr(self, "nat"):
            self.nat.check()

    def teardown(self) -> None:
        if hasattr(self, "nat"):
            later = self.now + 10 * LIFETIME_S
            assert self.nat.mapping_count(later) == 0, "something is never forgotten"
            assert self.nat.ports_in_use(later) == []
            self.nat.check()


TestNat = NatMachine.TestCase
TestNat.settings = settings(max_examples=150, stateful_step_count=40)
