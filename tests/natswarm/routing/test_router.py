"""One hop, by script: whom it asks, whom next, and when it gives up."""

from __future__ import annotations

import random
from collections import deque

import pytest

from natswarm.routing.distance import as_int
from natswarm.routing.kbucket import REQUESTS_BURST, Link
from natswarm.routing.protocol import (
    BODY_BYTES_MAX,
    Accepted,
    Answered,
    Declined,
    Forward,
    Mode,
    Reason,
)
from natswarm.routing.router import (
    ACCEPT_FACTOR,
    SHARE,
    TRIES_MAX,
    Arrived,
    PathAnswered,
    PathFailed,
    Router,
)
from natswarm.routing.table import RoutingTable

OWN = b"\x80" + bytes(31)
TARGET = bytes(32)
# Nearest to the target first; all but the last two are nearer to it than we are.
NEAR = [bytes([first]) + bytes(31) for first in (1, 2, 4, 8, 16, 32)]
FAR = [bytes([first]) + bytes(31) for first in (0xC0, 0xE0)]
UPSTREAM = bytes([0xFF]) + bytes(31)
LOOKUP = b"l" * 16


class Hop:
    """A router with links, and what it sends."""

    def __init__(self, *neighbours: bytes) -> None:
        self.table = RoutingTable(OWN)
        for node_id in (*neighbours, UPSTREAM):
            self.table.add_link(Link(node_id, 0.0))
        self.outbox: deque = deque()
        self.router = Router(self.table, random.Random(1), self.outbox)

    def sent(self):
        messages = list(self.outbox)
        self.outbox.clear()
        return messages

    def bring(self, now: float = 0.0, **change):
        fields = {
            "label": 77,
            "mode": Mode.CLOSEST,
            "lookup": LOOKUP,
            "target": TARGET,
            "request": b"request",
            "hops_left": 20,
            "detours_left": 1,
            "patience_ms": 7000,
            **change,
        }
        self.router.receive(Forward(**fields), self.table.link(UPSTREAM), now)
        return self.sent()

    def say(self, message, node_id: bytes, now: float = 0.0):
        self.router.receive(message, self.table.link(node_id), now)
        return self.sent()

    def wait(self, now: float):
        self.router.handle_timer(now)
        return self.sent()


def receivers(messages) -> list[bytes]:
    return [node_id for node_id, message in messages if isinstance(message, Forward)]


def test_a_request_goes_to_the_nearest_and_its_answer_back():
    hop = Hop(*NEAR)
    (to, forward), (back, accepted) = hop.bring()
    assert (to, back, accepted) == (NEAR[0], UPSTREAM, Accepted(77))
    assert (forward.target, forward.request, forward.hops_left) == (TARGET, b"request", 19)
    assert forward.patience_ms < 7000 * SHARE
    assert hop.say(Accepted(forward.label), NEAR[0]) == []
    assert hop.say(Answered(forward.label, b"answer"), NEAR[0]) == [
        (UPSTREAM, Answered(77, b"answer"))
    ]
    assert len(hop.router) == 0


def test_silence_moves_on_to_the_next_nearest_within_some_round_trips():
    hop = Hop(*NEAR)
    hop.bring()
    assert hop.router.next_timer() == pytest.approx(ACCEPT_FACTOR * 0.2)
    assert receivers(hop.wait(1.0)) == [NEAR[1]]
    assert hop.table.link(NEAR[0]).is_suspect
    # Who was silent is asked last by the next request, too.
    assert receivers(hop.bring(1.0, lookup=b"m" * 16)) == [NEAR[1]]


def test_a_hole_that_accepts_and_never_answers_costs_its_share_of_the_time():
    hop = Hop(*NEAR)
    forward = hop.bring()[0][1]
    hop.say(Accepted(forward.label), NEAR[0], 0.1)
    assert hop.router.next_timer() <= SHARE * 7.0
    assert receivers(hop.wait(SHARE * 7.0)) == [NEAR[1]]
    # Its late answer is still good: the signature inside decides.
    assert hop.say(Answered(forward.label, b"late"), NEAR[0], 5.5) == [
        (UPSTREAM, Answered(77, b"late"))
    ]


@pytest.mark.parametrize("reason", [Reason.TAKEN, Reason.BUSY, Reason.NO_ROUTE])
def test_who_declines_is_followed_by_another_and_then_the_hop_declines(reason):
    hop = Hop(*NEAR)
    forward = hop.bring(mode=Mode.EXACT)[0][1]
    tried = [NEAR[0]]
    while receivers(sent := hop.say(Declined(forward.label, reason), tried[-1])):
        tried += receivers(sent)
    assert tried == NEAR[:TRIES_MAX]
    expected = Reason.ABSENT if reason is Reason.TAKEN else Reason.NO_ROUTE
    assert sent == [(UPSTREAM, Declined(77, expected))]


def test_absent_is_believed_since_searching_on_costs_hundreds_of_messages():
    hop = Hop(*NEAR)
    forward = hop.bring(mode=Mode.EXACT)[0][1]
    assert hop.say(Declined(forward.label, Reason.ABSENT), NEAR[0]) == [
        (UPSTREAM, Declined(77, Reason.ABSENT))
    ]


def test_a_neighbour_that_goes_away_is_followed_by_another():
    hop = Hop(*NEAR)
    hop.bring()
    hop.table.remove_link(NEAR[0])
    hop.router.link_down(NEAR[0], 0.5)
    assert receivers(hop.sent()) == [NEAR[1]]


def test_where_nobody_is_nearer_a_closest_request_has_arrived():
    hop = Hop(*FAR)
    assert hop.bring() == []
    arrived = hop.router.events.popleft()
    assert isinstance(arrived, Arrived)
    assert arrived.forward.request == b"request"
    hop.router.answer(arrived.label, b"mine")
    assert hop.sent() == [(UPSTREAM, Answered(77, b"mine"))]
    hop.router.answer(arrived.label, b"again")
    assert hop.sent() == []


def test_an_exact_request_steps_aside_once_and_then_fails():
    hop = Hop(*FAR)
    sent = hop.bring(mode=Mode.EXACT)
    assert receivers(sent) == [FAR[0]]
    assert sent[0][1].detours_left == 0
    assert receivers(hop.say(Declined(sent[0][1].label, Reason.ABSENT), FAR[0])) == [FAR[1]]
    assert hop.say(Declined(sent[0][1].label, Reason.ABSENT), FAR[1]) == [
        (UPSTREAM, Declined(77, Reason.ABSENT))
    ]
    assert Hop(*FAR).bring(mode=Mode.EXACT, detours_left=0) == [
        (UPSTREAM, Declined(77, Reason.ABSENT))
    ]


def test_an_exact_request_for_us_arrives_each_time():
    hop = Hop(*NEAR)
    for _ in range(2):
        assert hop.bring(mode=Mode.EXACT, target=OWN) == [(UPSTREAM, Accepted(77))]
        assert isinstance(hop.router.events.popleft(), Arrived)


def test_loops_and_second_paths_of_a_lookup_are_declined():
    hop = Hop(*NEAR)
    hop.bring()
    assert hop.bring(label=78) == [(UPSTREAM, Declined(78, Reason.TAKEN))]
    own = hop.router.start(Mode.CLOSEST, b"o" * 16, TARGET, b"mine", patience_s=5.0, now=0.0)
    assert hop.router.first_hop(own) == NEAR[0]
    hop.sent()
    assert hop.bring(label=79, lookup=b"o" * 16) == [(UPSTREAM, Declined(79, Reason.TAKEN))]


def test_hops_and_time_run_out():
    assert Hop(*NEAR).bring(mode=Mode.EXACT, hops_left=0)[0][1].label == 77
    late = Hop(*NEAR)
    assert late.bring(patience_ms=50) == [(UPSTREAM, Declined(77, Reason.ABSENT))]


def test_a_flood_is_declined_and_bounded():
    hop = Hop(*NEAR)
    answers = [hop.bring(label=n, lookup=n.to_bytes(16, "big")) for n in range(500)]
    busy = [sent for sent in answers if isinstance(sent[0][1], Declined)]
    assert len(busy) == 500 - REQUESTS_BURST
    assert all(sent[0][1].reason == Reason.BUSY for sent in busy)
    assert len(hop.router) == REQUESTS_BURST
    for second in range(20):
        hop.wait(float(second))
    assert len(hop.router) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"lookup": b"short"},
        {"target": b"short"},
        {"request": bytes(BODY_BYTES_MAX + 1)},
        {"mode": 9},
        {"hops_left": 33},
        {"hops_left": -1},
        {"detours_left": 5},
        {"patience_ms": 10**9},
        {"label": -1},
        {"degree": 1 << 20},
        {"stray_steps": 4},
        {"stray_steps": -1},
    ],
)
def test_what_is_over_the_bounds_is_counted_and_dropped(change):
    hop = Hop(*NEAR)
    assert hop.bring(**change) == []
    assert hop.router.statistics.malformed_count == 1
    assert len(hop.router) == 0


def test_answers_of_those_who_were_not_asked_are_ignored():
    hop = Hop(*NEAR)
    label = hop.bring()[0][1].label
    for message in (Answered(label, b"forged"), Declined(label, 0), Accepted(label)):
        assert hop.say(message, NEAR[3]) == []
    assert hop.say(Answered(label, bytes(BODY_BYTES_MAX + 1)), NEAR[0]) == []
    assert hop.say(Answered(label + 1, b"x"), NEAR[0]) == []
    assert len(hop.router) == 1


def test_our_own_paths_begin_at_different_neighbours_and_end_as_events():
    hop = Hop(*NEAR)
    first = hop.router.start(Mode.CLOSEST, LOOKUP, TARGET, b"q", patience_s=5.0, now=0.0)
    second = hop.router.start(
        Mode.CLOSEST,
        LOOKUP,
        TARGET,
        b"q",
        patience_s=5.0,
        tried=(NEAR[0],),
        must_leave=True,
        now=0.0,
    )
    assert receivers(hop.sent()) == [NEAR[0], NEAR[1]]
    # Labels can be guessed: who carries one path must not answer for the others.
    hop.say(Answered(second, b"of another path"), NEAR[0])
    assert not hop.router.events
    hop.say(Answered(first, b"answer"), NEAR[0])
    assert hop.router.events.popleft() == PathAnswered(first, b"answer")
    for _ in range(20):
        hop.wait(30.0)
    assert PathFailed(second) in hop.router.events


def test_a_path_may_go_astray_before_it_heads_for_its_target():
    hop = Hop(*NEAR, *FAR)
    first_hops = set()
    for number in range(40):
        forward = hop.bring(lookup=number.to_bytes(16, "big"), stray_steps=2)[0][1]
        assert forward.stray_steps == 1
        hop.router.start(
            Mode.EXACT, LOOKUP, TARGET, b"q", patience_s=5.0, stray_steps=3, tried=(NEAR[0],), now=0
        )
        ((to, forward),) = hop.sent()
        assert forward.stray_steps == 2
        first_hops.add(to)
    assert first_hops == {*NEAR[1:], *FAR, UPSTREAM}
    # Who has nobody else to go astray to does not end it: the straight way is still there.
    lonely = Hop(NEAR[0])
    (to, forward), _ = lonely.bring(stray_steps=3)
    assert lonely.say(Declined(forward.label, Reason.TAKEN), NEAR[0]) == []
    assert isinstance(lonely.router.events.popleft(), Arrived)
    # And whom it reaches by chance answers.
    assert Hop(*NEAR).bring(mode=Mode.EXACT, target=OWN, stray_steps=3) == [
        (UPSTREAM, Accepted(77))
    ]


def test_who_looks_for_his_own_id_asks_others():
    hop = Hop(*NEAR)
    hop.router.start(Mode.CLOSEST, LOOKUP, OWN, b"q", patience_s=5.0, now=0.0)
    nearest = min((*NEAR, UPSTREAM), key=lambda each: as_int(each) ^ as_int(OWN))
    assert receivers(hop.sent()) == [nearest]


def test_a_walk_ends_after_its_steps_and_bounces_off_the_crowded():
    hop = Hop(*NEAR)
    assert hop.bring(mode=Mode.WALK, hops_left=0, degree=100) == []
    assert isinstance(hop.router.events.popleft(), Arrived)
    crowded = [hop.bring(float(n), mode=Mode.WALK, degree=1, label=n)[0][1] for n in range(1, 400)]
    bounced = sum(isinstance(each, Declined) for each in crowded)
    assert bounced / len(crowded) == pytest.approx(1 - 1 / 7, abs=0.06)
