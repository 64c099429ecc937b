"""Receipts tell which of two computations differs, and where."""

from __future__ import annotations

import numpy as np
import pytest

from llmload.swarm.receipt import RECEIPT_BYTES, first_difference, take_receipt


def row(seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(768) * scale).astype(np.float32)


def notes(*rows: np.ndarray) -> list[bytes]:
    return [take_receipt(one, 7, 42) for one in rows]


def test_receipt_is_pinned():
    assert len(notes(row(0))[0]) == RECEIPT_BYTES
    counting = np.arange(768, dtype=np.float32)
    drawn = np.frombuffer(take_receipt(counting, 7, 42), "<f4")
    assert drawn.tolist() == [float(value) for value in drawn]
    assert not np.array_equal(drawn, np.frombuffer(take_receipt(counting, 7, 43), "<f4"))
    assert not np.array_equal(drawn, np.frombuffer(take_receipt(counting, 8, 42), "<f4"))


def test_rounding_is_no_difference():
    ours = notes(row(1), row(2, 50))
    theirs = notes(row(1) * np.float32(1.0001), row(2, 50) + np.float32(1e-3))
    assert first_difference(ours, theirs, 0.01) is None


@pytest.mark.parametrize("liar", [0, 1, 2])
def test_the_first_that_differs_is_named(liar):
    ours = notes(row(1), row(2), row(3))
    theirs = notes(*(row(index + (10 if index > liar else 1)) for index in range(3)))
    theirs[liar] = notes(row(20))[0]
    assert first_difference(ours, theirs, 0.01) == liar


def test_a_wrong_note_names_who_took_it():
    """What stage 0 gave was right, since all behind agrees: stage 1 noted something else."""
    ours = notes(row(1), row(2), row(3))
    theirs = [notes(row(9))[0], *ours[1:]]
    assert first_difference(ours, theirs, 0.01) == 1


def test_nonsense_is_a_difference():
    nonsense = np.array([np.nan, np.inf] * 4, dtype="<f4").tobytes()
    assert first_difference(notes(row(1)), [nonsense], 0.5) == 0
