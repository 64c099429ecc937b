"""A lookup at its origin: which answers count, when the next path starts, when it is over."""

from __future__ import annotations

import pytest

from natswarm.identity import Identity
from natswarm.routing.lookup import GRACE_S, STAGGER_S, GivenAnswer, Lookup, LookupPlan
from natswarm.routing.protocol import (
    Ask,
    Closest,
    Fetch,
    Fetched,
    Mode,
    Told,
    digest_of,
    seal_answer,
    seal_request,
)

ALICE, BOB, CAROL = (Identity(letter * 32) for letter in (b"a", b"b", b"c"))
NAME = b"n" * 16
KEY = b"k" * 32
SPREAD = LookupPlan(Mode.CLOSEST, 12, 3, enough=3)
HEDGED = LookupPlan(Mode.EXACT, 3, 1, stagger_s=STAGGER_S, enough=1)


def fetch() -> tuple[Lookup, bytes]:
    request = seal_request(ALICE, Fetch(NAME, KEY))
    return Lookup(NAME, SPREAD, KEY, request, Fetched, 0.0), digest_of(request)


def meet() -> tuple[Lookup, bytes]:
    request = seal_request(ALICE, Ask(NAME, BOB.peer_id.key, b"hello"))
    return Lookup(NAME, HEDGED, BOB.peer_id.key, request, Told, 0.0), digest_of(request)


def starts(lookup: Lookup, now: float = 0.0) -> int:
    count = 0
    while lookup.take_start(now):
        count += 1
    return count


def give(lookup: Lookup, sealed: bytes, now: float = 0.0, *, is_plausible: bool = True) -> None:
    lookup.receive_untrusted(sealed, KEY, is_plausible=lambda *_: is_plausible, now=now)


def test_paths_start_at_once_and_others_as_these_come_to_nothing():
    lookup, digest = fetch()
    assert starts(lookup) == 3
    lookup.path_failed()
    assert starts(lookup) == 1
    give(lookup, seal_answer(BOB, Fetched(digest, ())))
    assert starts(lookup) == 1, "that there is nothing proves nothing"
    for _ in range(20):
        lookup.path_failed()
        starts(lookup)
    assert lookup.started_count == SPREAD.path_count


def test_a_record_ends_a_lookup_after_a_grace():
    lookup, digest = fetch()
    starts(lookup)
    give(lookup, seal_answer(BOB, Fetched(digest, (b"record",))), 1.0)
    assert not lookup.is_over(1.0)
    assert lookup.next_timer() == 1.0 + GRACE_S
    assert lookup.is_over(1.0 + GRACE_S)


def test_three_records_end_it_at_once():
    lookup, digest = fetch()
    starts(lookup)
    for identity in (BOB, CAROL, ALICE):
        assert not lookup.is_over(1.0)
        give(lookup, seal_answer(identity, Fetched(digest, (b"record",))), 1.0)
    assert lookup.is_over(1.0)


def test_hedges_start_when_the_time_has_come_or_a_path_failed():
    lookup, digest = meet()
    assert starts(lookup) == 1
    assert lookup.next_timer() == STAGGER_S
    assert starts(lookup, STAGGER_S) == 1
    lookup.path_failed()
    assert starts(lookup, STAGGER_S) == 1
    give(lookup, seal_answer(BOB, Told(digest, b"hello yourself")))
    assert lookup.is_over(STAGGER_S)
    assert lookup.answers == [GivenAnswer(BOB.peer_id, Told(digest, b"hello yourself"))]


def test_only_the_last_of_several_paths_and_those_after_it_go_astray():
    request = seal_request(ALICE, Fetch(NAME, KEY))
    for at_once, expected in ((1, [0, 3, 3]), (3, [0, 0, 3])):
        plan = LookupPlan(Mode.CLOSEST, 4, at_once, stray_steps=3)
        lookup = Lookup(NAME, plan, KEY, request, Fetched, 0.0)
        taken = []
        while len(taken) < 3:
            if not lookup.take_start(0.0):
                lookup.path_failed()
                continue
            taken.append(lookup.stray_steps())
        assert taken == expected


def test_who_is_too_far_to_be_nearest_is_not_the_last_word():
    request = seal_request(ALICE, Fetch(NAME, KEY))
    lookup = Lookup(NAME, LookupPlan(Mode.CLOSEST, 3, 1, enough=1), KEY, request, Closest, 0.0)
    assert starts(lookup) == 1
    give(lookup, seal_answer(BOB, Closest(digest_of(request), ())), is_plausible=False)
    assert not lookup.is_over(0.0)
    assert starts(lookup) == 1
    give(lookup, seal_answer(CAROL, Closest(digest_of(request), ())))
    assert lookup.is_over(0.0)


@pytest.mark.parametrize("lie", ["forged", "by another", "another request", "wrong kind", "empty"])
def test_lies_are_counted_and_another_path_starts(lie):
    lookup, digest = meet()
    starts(lookup)
    sealed = {
        "forged": BOB.peer_id.key + seal_answer(CAROL, Told(digest, b""))[32:],
        "by another": seal_answer(CAROL, Told(digest, b"")),
        "another request": seal_answer(BOB, Told(b"another digest..", b"")),
        "wrong kind": seal_answer(BOB, Closest(digest, ())),
        "empty": b"",
    }[lie]
    give(lookup, sealed)
    assert lookup.rejected_count == 1
    assert lookup.answers == []
    assert starts(lookup) == 1


def test_it_ends_when_all_paths_have_failed_and_in_time():
    lookup, _ = meet()
    for _ in range(3):
        assert starts(lookup) == 1
        assert not lookup.is_over(0.0)
        lookup.path_failed()
    assert starts(lookup) == 0
    assert lookup.is_over(0.0)
    lookup, _ = fetch()
    starts(lookup)
    assert lookup.is_over(60.0)
