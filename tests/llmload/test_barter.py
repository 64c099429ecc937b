"""Sketches find what is missing; the ledger pays text with text; choices go by novelty."""

from __future__ import annotations

import hashlib
import random

import pytest

from llmload.data.barter import LIES_MAX, BarterLimits, Ledger, choose
from llmload.data.sketch import SKETCH_BYTES_MAX, Sketch, make_sketch, missing_untrusted
from natswarm import DecodeError, PeerId

A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)


def ids(count, salt=""):
    return [hashlib.sha256(f"{salt}{number}".encode()).digest() for number in range(count)]


# --- Sketches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 100, 6000])
def test_what_is_there_is_known_and_what_is_missing_is_mostly_found(count):
    ours, others = ids(count), ids(2000, "other")
    sketch, bits = make_sketch(ours, random.Random(1))
    assert sketch.slice_bits == 0
    found = missing_untrusted(sketch, bits, [*ours, *others])
    assert set(found) <= set(others)
    assert len(found) > 0.98 * len(others)


def test_a_missed_one_is_found_with_another_salt():
    rng, ours, others = random.Random(1), ids(500), ids(2000, "other")
    found = set()
    for _ in range(3):
        found |= set(missing_untrusted(*make_sketch(ours, rng), others))
    assert found == set(others)


def test_the_size_has_a_bound_and_slices_cover_all():
    rng, ours, others = random.Random(1), ids(30_000), ids(200, "other")
    found, slices = set(), set()
    for _ in range(60):
        sketch, bits = make_sketch(ours, rng)
        assert len(bits) <= SKETCH_BYTES_MAX
        slices.add(sketch.slice)
        found |= set(missing_untrusted(sketch, bits, [*ours[:1000], *others]))
    assert len(slices) == 8
    assert found == set(others)


def test_a_sketch_of_a_wrong_size_is_refused():
    sketch = Sketch(0, 0, bytes(8))
    for size in (0, 7, SKETCH_BYTES_MAX + 1):
        with pytest.raises(DecodeError):
            missing_untrusted(sketch, bytes(size), ids(1))
    # All ones: it lacks nothing; no slice so: it gets nothing.
    assert missing_untrusted(sketch, b"\xff" * 8, ids(9)) == []
    assert missing_untrusted(Sketch(1, 9, bytes(8)), bytes(8), ids(9)) == []


# --- Tit for tat ---------------------------------------------------------------------------------

LIMITS = BarterLimits(
    gift_bytes=1000, gift_bytes_per_s=1, ratio=2, sent_bytes_per_s=100, sent_bytes_burst=5000
)


def test_a_newcomer_gets_a_present_and_then_what_it_pays_for():
    ledger = Ledger(LIMITS, 0.0)
    assert ledger.allowance(A, 0, 0.5, 0) == 1000
    ledger.note_given(A, 900, 0)
    assert ledger.allowance(A, 0, 0.5, 0) == 100
    assert ledger.allowance(B, 0, 0.5, 0) == 1000
    # It gave 300 bytes: useful ones are paid twice, useless ones not at all.
    assert ledger.allowance(A, 300, 1.0, 0) == 700
    assert ledger.allowance(A, 300, 0.0, 0) == 100


def test_the_present_grows_again_up_to_its_size():
    ledger = Ledger(LIMITS, 0.0)
    ledger.note_given(A, 1000, 0)
    assert ledger.allowance(A, 0, 0, 100) == 100
    assert ledger.allowance(A, 0, 0, 10_000) == 1000


def test_all_together_get_no_more_than_the_uplink_is_to_carry():
    ledger = Ledger(LIMITS, 0.0)
    given = 0
    for number in range(100):  # identities are free
        peer = PeerId(bytes([number]) * 32)
        size = ledger.allowance(peer, 0, 0.5, 0)
        ledger.note_given(peer, size, 0)
        given += size
    assert given == LIMITS.sent_bytes_burst
    assert ledger.allowance(B, 0, 0.5, 4) == 400


def test_liars_get_nothing():
    ledger = Ledger(LIMITS, 0.0)
    for _ in range(LIES_MAX):
        assert not ledger.is_liar(A)
        ledger.note_lie(A, 0)
    assert ledger.is_liar(A)
    assert ledger.allowance(A, 10_000, 1.0, 0) == 0
    # Not even after thousands of new names have pushed others out of the book.
    for number in range(3000):
        ledger.note_given(PeerId(number.to_bytes(32, "big")), 1, 0)
    assert ledger.is_liar(A)


# --- Choosing ------------------------------------------------------------------------------------


def test_the_newest_come_first_as_far_as_they_fit():
    assert choose([1.0, 3.0, 2.0], [10, 10, 10], 20) == [1, 2]
    assert choose([1.0, 3.0, 2.0], [10, 30, 10], 20) == [2, 0]
    assert choose([1.0], [10], 9) == []
    assert choose([], [], 100) == []
