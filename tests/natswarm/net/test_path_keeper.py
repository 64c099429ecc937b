"""The machine that keeps paths: two of them on a wire that a test can cut, delay and listen to."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest

from natswarm.address import Endpoint
from natswarm.identity import Identity
from natswarm.net.path_keeper import (
    CANDIDATES_MAX,
    CHECKS_PER_CANDIDATE,
    KEEPALIVE_ASSUMED_S,
    MOVED_DEATH_MIN_S,
    PATHS_MAX,
    Lifetimes,
    PathKeeper,
)
from natswarm.wire import Probe, ProbeKind, encode_probe

NAME = b"one name"
US, PEER = Identity(b"u" * 32), Identity(b"p" * 32)
WE = Endpoint("192.0.2.1", 1000)
SIDES = {"us": (US, PEER), "peer": (PEER, US)}


@dataclass
class Wire:
    """Two keepers, ports by endpoint, and what lies between.

    A port has one external endpoint, whoever it sends to. `cut` holds pairs of endpoints between
    which nothing passes.
    """

    now: float = 0.0
    delay_s: float = 0.05
    keepers: dict = field(default_factory=dict)
    ports: dict = field(default_factory=dict)
    cut: set = field(default_factory=set)
    flying: list = field(default_factory=list)
    events: dict = field(default_factory=lambda: {"us": [], "peer": []})
    sent: list = field(default_factory=list)
    loss: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def add_side(self, side, *endpoints, lifetimes=None):
        own, other = SIDES[side]
        self.keepers[side] = PathKeeper(
            own.probe_keys(other.peer_id), NAME, lifetimes or Lifetimes()
        )
        self.ports[side] = list(endpoints)

    def step(self):
        """Let everything that is due now happen; return when the next thing is."""
        due = [each for each in self.flying if each[0] <= self.now]
        self.flying = [each for each in self.flying if each[0] > self.now]
        for _, source, destination, data in due:
            for side, endpoints in self.ports.items():
                if destination in endpoints and (source, destination) not in self.cut:
                    index = endpoints.index(destination)
                    self.keepers[side].receive_datagram(index, data, source, self.now)
        for side, keeper in self.keepers.items():
            for probe in keeper.probes_to_send(self.now):
                source = self.ports[side][probe.port_index]
                self.sent.append((self.now, side, source, probe.destination, probe.data))
                if self.rng.random() >= self.loss:
                    self.flying.append(
                        (self.now + self.delay_s, source, probe.destination, probe.data)
                    )
            while (event := keeper.next_event()) is not None:
                self.events[side].append((round(self.now, 2), event))
        times = [each[0] for each in self.flying]
        times += [keeper.next_timer() for keeper in self.keepers.values()]
        return max(min(times), self.now)

    def run(self, seconds, *, traffic=()):
        """Run for a while; sides in `traffic` send by QUIC ten times a second."""
        end, next_traffic = self.now + seconds, self.now
        while self.now < end:
            if traffic and self.now >= next_traffic:
                next_traffic += 0.1
                for side in traffic:
                    self.keepers[side].note_traffic(self.now)
            wake = self.step()
            self.now = min(wake, end, *([next_traffic] if traffic else []))

    def cut_between(self, *ends):
        self.cut |= {(a, b) for a in ends for b in ends if a != b}

    def switches(self, side):
        return [(event.new, event.reason) for _, event in self.events[side]]


THEY = Endpoint("198.51.100.1", 2000)


def make_wire(**lifetimes):
    wire = Wire()
    wire.add_side("us", WE, lifetimes=Lifetimes(**lifetimes))
    wire.add_side("peer", THEY, lifetimes=Lifetimes(**lifetimes))
    wire.keepers["us"].add(0, THEY, 0.0)
    wire.keepers["peer"].add(0, WE, 0.0)
    return wire


@pytest.mark.parametrize(
    ("idle_s", "interval_s"), [(None, KEEPALIVE_ASSUMED_S), (30, 21), (3, 4), (1e9, 60)]
)
def test_at_rest_one_exchange_an_interval(idle_s, interval_s):
    wire = make_wire(idle_s=idle_s)
    wire.run(10 * interval_s + 1)
    asked = [at for at, side, *_ in wire.sent]
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert max(gaps) <= interval_s + 0.11
    # Whoever asks first spares the other its question: never more than two exchanges of two each.
    assert len(wire.sent) <= 4 * 10
    assert [reason for _, reason in wire.switches("us")] == ["the first path"]


def test_the_shorter_lifetime_of_both_sides_decides():
    wire = make_wire(idle_s=100)
    wire.keepers["peer"].lifetimes = Lifetimes(idle_s=10)
    wire.run(100)
    from_us = [at for at, side, *_ in wire.sent if side == "us"]
    assert max(b - a for a, b in itertools.pairwise(from_us)) <= 7.2


def test_death_under_traffic_is_noticed_in_three_seconds():
    worst = 0.0
    for tenth in range(20):
        wire = make_wire()
        wire.run(10 + tenth / 20, traffic=["us", "peer"])
        wire.cut_between(WE, THEY)
        cut_at = wire.now
        wire.run(6, traffic=["us", "peer"])
        for side in ("us", "peer"):
            at, event = wire.events[side][-1]
            assert event.new is None
            worst = max(worst, at - cut_at)
            assert wire.keepers[side].stranded_since is not None
    print(f"noticed after {worst:.2f} s at the latest")
    assert worst <= 3.2


def test_death_at_rest_is_noticed_after_an_interval_and_two_seconds():
    wire = make_wire(idle_s=30)
    wire.run(50)
    wire.cut_between(WE, THEY)
    cut_at = wire.now
    wire.run(30)
    for side in ("us", "peer"):
        at, event = wire.events[side][-1]
        assert event.new is None
        assert at - cut_at <= 21 + 2.2


def test_a_path_that_answers_again_is_taken_again():
    wire = make_wire()
    wire.run(5, traffic=["us"])
    wire.cut_between(WE, THEY)
    wire.run(60, traffic=["us"])
    wire.cut.clear()
    wire.run(5, traffic=["us"])
    for side in ("us", "peer"):
        assert wire.switches(side)[-1] == (wire.keepers[side].active.endpoint, "it answers again")
        assert wire.keepers[side].stranded_since is None
    assert wire.keepers["us"].lifetimes == Lifetimes(), "an outage is no lifetime"


def test_a_later_puncture_is_moved_to_once_it_answers_by_name():
    wire = make_wire()
    wire.run(5)
    new = Endpoint("192.0.2.1", 1001)
    wire.ports["us"].append(new)
    wire.keepers["us"].add(1, THEY, wire.now)
    assert wire.keepers["us"].active.port_index == 0
    wire.step()
    wire.keepers["peer"].add(0, new, wire.now)
    wire.run(1)
    assert wire.keepers["us"].active.port_index == 1
    assert wire.keepers["peer"].active.endpoint == new
    assert wire.switches("peer")[-1] == (new, "the old path will end")
    assert all(event.new is not None for _, event in wire.events["us"])


def test_a_peer_that_turns_up_elsewhere_is_followed_within_a_second():
    """Its NAT was rebooted, or it roams: we see a new endpoint, and the old one is silent."""
    wire = make_wire()
    wire.run(5, traffic=["peer"])
    moved = Endpoint("203.0.113.9", 4000)
    wire.ports["us"] = [moved]
    wire.keepers["us"].recheck(wire.now, has_moved=True)
    wire.run(1.0, traffic=["peer"])
    assert wire.keepers["peer"].active.endpoint == moved
    assert wire.keepers["peer"].stranded_since is None


def test_who_has_left_is_followed_in_a_few_round_trips():
    """So that whom a mover asks can answer it, and tell others where it is."""
    wire = make_wire()
    wire.run(20, traffic=["us", "peer"])
    moved = Endpoint("203.0.113.9", 4000)
    wire.ports["us"] = [moved]
    wire.keepers["us"].recheck(wire.now, has_moved=True)
    wire.run(0.35)
    assert wire.keepers["peer"].active.endpoint == moved


def test_the_quicker_path_is_used_and_the_other_kept_ready():
    wire = make_wire()
    near = Endpoint("10.0.0.1", 1000)
    wire.ports["us"].append(near)
    wire.run(2)
    keeper = wire.keepers["us"]
    keeper.check(1, (THEY,), wire.now)
    wire.run(0.5)
    # Both look alike: nothing moves.
    assert keeper.active.port_index == 0
    assert len(keeper.paths) == 2
    keeper.active.rtt_s = 0.2
    wire.run(60)
    assert keeper.active.port_index == 1
    wire.cut_between(near, THEY)
    cut_at = wire.now
    wire.run(3, traffic=["us"])
    assert keeper.active.port_index == 0
    at, event = wire.events["us"][-1]
    assert event.new == THEY
    assert at - cut_at <= 1.7, "a path that was ready is taken at once"
    assert all(event.new is not None for _, event in wire.events["us"])


SIM = Endpoint("198.51.100.9", 7)


def make_wire_with_spare():
    """We have a second interface, and keep a path ready there."""
    wire = make_wire()
    wire.ports["us"].append(SIM)
    wire.run(3, traffic=["us", "peer"])
    wire.keepers["us"].check(len(wire.ports["us"]) - 1, (THEY,), wire.now, is_spare=True)
    wire.run(3, traffic=["us", "peer"])
    return wire


def at_sim(wire):
    """Whether each side goes by the second interface."""
    return wire.keepers["us"].active.is_spare, wire.keepers["peer"].active.endpoint == SIM


def test_a_spare_path_is_used_by_neither_side_while_the_other_answers():
    wire = make_wire_with_spare()
    assert any(path.is_spare for path in wire.keepers["us"].paths)
    assert any(path.is_their_spare for path in wire.keepers["peer"].paths)
    wire.run(60, traffic=["us", "peer"])
    assert at_sim(wire) == (False, False)
    spare = [at for at, side, source, *_ in wire.sent if side == "us" and source == SIM]
    assert len(spare) <= 2 + 66 / KEEPALIVE_ASSUMED_S


def test_a_spare_path_is_used_soon_and_left_when_it_is_not_needed_any_more():
    wire = make_wire_with_spare()
    wire.cut_between(WE, THEY)
    wire.run(2, traffic=["us", "peer"])
    assert at_sim(wire) == (True, True)
    assert all(new is not None for new, _ in wire.switches("us"))
    wire.run(6, traffic=["us", "peer"])
    wire.cut.clear()
    wire.run(5, traffic=["us", "peer"])
    assert at_sim(wire) == (False, False)


def test_after_a_move_the_spare_path_is_used_at_once():
    wire = make_wire_with_spare()
    wire.cut_between(WE, THEY)
    wire.keepers["us"].recheck(wire.now, has_moved=True)
    wire.run(0.25, traffic=["us"])
    assert at_sim(wire)[0]


def test_who_drops_its_spare_path_stays_where_it_is():
    wire = make_wire_with_spare()
    wire.keepers["us"].drop_spares()
    wire.run(60, traffic=["us", "peer"])
    assert at_sim(wire) == (False, False)
    assert not any(path.is_kept_ready for path in wire.keepers["peer"].paths)


def test_paths_are_bounded():
    wire = make_wire()
    wire.ports["us"] += [Endpoint("192.0.2.1", 1001 + i) for i in range(10)]
    for index in range(1, 11):
        wire.keepers["us"].add(index, THEY, wire.now)
        wire.keepers["peer"].add(0, wire.ports["us"][index], wire.now)
        wire.run(5)
    for keeper in wire.keepers.values():
        assert len(keeper.paths) <= PATHS_MAX
        assert keeper.active.generation == 11


# Strangers ----------------------------------------------------------------------------------------


def test_forged_probes_change_nothing():
    wire = make_wire()
    wire.run(5, traffic=["us", "peer"])
    keeper, rng = wire.keepers["peer"], random.Random(1)
    before = (keeper.active, list(keeper.paths))
    stranger = Identity(b"x" * 32)
    keys = stranger.probe_keys(PEER.peer_id)
    elsewhere = Endpoint("203.0.113.66", 66)
    recorded = [data for _, side, *_, data in wire.sent if side == "us"]
    own = [data for _, side, *_, data in wire.sent if side == "peer"]
    for kind in ProbeKind:
        for source in (elsewhere, WE):
            keeper.receive_datagram(
                0, encode_probe(Probe(kind, NAME, 3, source), keys.send), source, wire.now
            )
    other_name = PathKeeper(US.probe_keys(PEER.peer_id), b"old name")
    other_name.add(0, THEY, wire.now)
    other_name.check(0, (THEY, elsewhere), wire.now)
    forged = [probe.data for probe in other_name.probes_to_send(wire.now)]
    for data in [*recorded, *own, *forged, rng.randbytes(49), b"", recorded[0][:-1]]:
        keeper.receive_datagram(0, data, elsewhere, wire.now)
    assert not [p for p in keeper.probes_to_send(wire.now) if p.destination == elsewhere]
    wire.run(5, traffic=["us", "peer"])
    assert (keeper.active, keeper.paths) == before
    assert keeper.statistics.forged_count >= 8 + len(own) + 1
    assert keeper.statistics.replayed_count > 0
    assert wire.switches("peer") == [(WE, "the first path")]


def test_an_answer_from_elsewhere_proves_nothing():
    wire = make_wire()
    wire.run(5, traffic=["us"])
    wire.cut_between(WE, THEY)
    keeper = wire.keepers["us"]
    keys = PEER.probe_keys(US.peer_id)
    for _ in range(100):
        wire.run(0.1, traffic=["us"])
        # Somebody on the way has the peer's true answers, and sends them from another place.
        for sequence in range(200):
            ack = encode_probe(Probe(ProbeKind.ACK, NAME, sequence, WE), keys.send)
            keeper.receive_datagram(0, ack, Endpoint("203.0.113.66", 66), wire.now)
    assert keeper.stranded_since is not None
    assert keeper.statistics.stray_count == 100 * 200


def test_nobody_is_asked_more_than_a_few_times():
    wire = make_wire()
    keeper = wire.keepers["us"]
    crowd = tuple(Endpoint("203.0.113.7", port) for port in range(1, 100))
    keeper.check(0, crowd, 0.0)
    wire.run(30)
    asked = [to for _, side, _, to, _ in wire.sent if side == "us" and to in crowd]
    assert len(asked) == CANDIDATES_MAX * CHECKS_PER_CANDIDATE
    assert len(keeper.paths) == 1


# What is learned ----------------------------------------------------------------------------------


def renew(wire, number):
    """Both sides puncture to a new port of ours."""
    new = Endpoint(WE.ip, 1000 + number)
    wire.ports["us"].append(new)
    wire.keepers["us"].add(number, THEY, wire.now)
    wire.keepers["peer"].add(0, new, wire.now)
    return new


def test_a_path_that_died_of_silence_shortens_the_interval():
    wire = make_wire()
    wire.run(50)
    wire.cut_between(WE, THEY)
    wire.run(KEEPALIVE_ASSUMED_S + 4)
    renew(wire, 1)
    wire.run(1)
    for side in ("us", "peer"):
        assert wire.keepers[side].lifetimes.keepalive_s == pytest.approx(10, abs=0.2)


def test_two_paths_that_died_in_use_at_a_like_age_tell_the_age():
    wire = make_wire()
    ends = WE
    for number in (1, 2):
        wire.run(30 - 2, traffic=["us", "peer"])
        wire.cut_between(ends, THEY)
        wire.run(4, traffic=["us", "peer"])
        assert wire.keepers["us"].lifetimes.absolute_s is None
        ends = renew(wire, number)
        wire.run(1, traffic=["us", "peer"])
    lifetimes = wire.keepers["us"].lifetimes
    assert lifetimes.absolute_s == pytest.approx(30, abs=3)
    assert wire.keepers["us"].renewal_at - wire.now == pytest.approx(0.7 * 30, abs=4)


def test_after_a_move_silence_is_death_in_little_more_than_half_a_second():
    wire = make_wire()
    wire.run(10, traffic=["us", "peer"])
    wire.cut_between(*wire.ports["us"], THEY)
    moved_at = wire.now
    wire.keepers["us"].recheck(moved_at, has_moved=True)
    wire.run(1, traffic=["us", "peer"])
    assert wire.switches("us")[-1] == (None, "it fell silent")
    since = wire.keepers["us"].stranded_since
    assert since - moved_at == pytest.approx(MOVED_DEATH_MIN_S, abs=0.11)
    asked = [at for at, side, *_ in wire.sent if side == "us" and moved_at <= at <= since]
    assert len(asked) >= 3


def test_whom_the_peer_cannot_reach_gives_up_soon_and_learns_all_the_same():
    wire = make_wire()
    wire.run(50)
    wire.cut_between(WE, THEY)
    wire.run(KEEPALIVE_ASSUMED_S - 10 + 0.1)  # asked, and not long ago
    wire.keepers["us"].hurry(wire.now)
    wire.run(1)
    assert wire.keepers["us"].stranded_since is not None
    renew(wire, 1)
    wire.run(1)
    assert wire.keepers["us"].lifetimes.keepalive_s < KEEPALIVE_ASSUMED_S


def test_a_move_that_leaves_the_path_alone_is_none():
    wire = make_wire()
    wire.run(10, traffic=["us", "peer"])
    wire.keepers["us"].recheck(wire.now, has_moved=True)
    wire.run(10, traffic=["us", "peer"])
    assert [reason for _, reason in wire.switches("us")] == ["the first path"]


def test_what_dies_when_we_move_teaches_nothing():
    wire = make_wire()
    for number in (1, 2, 3):
        wire.run(28, traffic=["us", "peer"])
        wire.cut_between(*wire.ports["us"], THEY)
        wire.keepers["us"].recheck(wire.now, has_moved=True)
        wire.run(4, traffic=["us", "peer"])
        renew(wire, number)
        wire.run(1, traffic=["us", "peer"])
    assert wire.keepers["us"].lifetimes == Lifetimes()


@pytest.mark.parametrize("seed", range(5))
def test_ten_percent_loss_strands_nobody_for_long(seed):
    print(f"seed {seed}")
    wire = make_wire()
    wire.rng, wire.loss = random.Random(seed), 0.1
    wire.run(1800, traffic=["us", "peer"])
    for side in ("us", "peer"):
        assert len([new for new, _ in wire.switches(side) if new is None]) <= 1
        assert wire.keepers[side].lifetimes == Lifetimes()
