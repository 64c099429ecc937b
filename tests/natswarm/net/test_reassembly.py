"""Pieces come in any order and go out in theirs; lies cost no memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.net.frames import ProtocolViolation
from natswarm.net.reassembly import MAX_PIECES, Reassembly


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bytes(sizes, rng):
    data = rng.randbytes(sum(sizes))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    pieces = list(zip(starts, sizes, strict=True))
    rng.shuffle(pieces)
    reassembly = Reassembly()
    received = bytearray()
    for start, size in pieces:
        reassembly.add(start, memoryview(data)[start : start + size])
        while (piece := reassembly.take(len(received))) is not None:
            received += piece
        assert len(reassembly) + len(received) <= len(data)
    assert received == data
    assert len(reassembly) == 0


def test_small_neighbours_are_one_piece():
    reassembly = Reassembly()
    for position in range(1, 3 * MAX_PIECES):
        reassembly.add(position, memoryview(b"x"))
    assert reassembly.take(1) == b"x" * (3 * MAX_PIECES - 1)


def test_too_many_holes_and_what_comes_twice_are_violations():
    reassembly = Reassembly()
    for index in range(MAX_PIECES):
        reassembly.add(10 + 2 * index, memoryview(b"x"))
    with pytest.raises(ProtocolViolation, match="holes"):
        reassembly.add(5, memoryview(b"x"))
    reassembly.clear()
    reassembly.add(10, memoryview(b"abc"))
    with pytest.raises(ProtocolViolation, match="twice"):
        reassembly.add(10, memoryview(b"a"))
    reassembly.add(12, memoryview(b"z"))  # overlaps, and is never taken
    assert reassembly.take(10) == b"abc"
