"""Receipts: a few numbers by which two computations of the same step can be compared.

Each hop notes eight values of what it was given, at channels drawn from a seed and the position,
and the last one those of what it returns. They travel with the step to the client. Whoever repeats
the step over other peers gets the same numbers up to rounding, or knows which stage differs: all
stages before the first difference agree.

A stage cannot tell the repetition from any other session, and cannot know the numbers without
computing: the channels are not known before the step comes.

Pure: arrays and numbers. Who is asked to repeat what is `client.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmload.swarm.codec import Codec

__all__ = ["RECEIPT_BYTES", "TOLERANCES", "first_difference", "take_receipt"]

RECEIPT_VALUES = 8
RECEIPT_BYTES = 4 * RECEIPT_VALUES

# Relative to the length of the vector of values. Devices differ by 1e-5; each rounding for the wire
# adds its own, and later blocks amplify it. Wrong weights or no computation give about 1.
TOLERANCES: dict[Codec, float] = {"float32": 0.01, "float16": 0.05, "int8": 0.5}


def take_receipt(row: NDArray[np.float32], seed: int, position: int) -> bytes:
    """Return eight values of a row, float32 (n,), as bytes.

    Args:
        row: Hidden states or logits of one position.
        seed: Of the session, 0..2**64 - 1.
        position: Where the row stands.
    """
    bits = np.random.Philox(key=seed, counter=position << 64).random_raw(RECEIPT_VALUES)
    return row[bits % row.size].astype("<f4").tobytes()


def first_difference(
    ours: Sequence[bytes], theirs: Sequence[bytes], tolerance: float
) -> int | None:
    """Return the index of the first stage whose results differ, or None if all agree.

    Where only one receipt differs and later ones agree again, the result was right and its note
    wrong: then it is the next stage, which took the note, that is named.

    Args:
        ours: What each stage of one route gave, in order.
        theirs: The same of another route that is cut at the same blocks.
        tolerance: Of `TOLERANCES`.
    """
    differ = [not _agree(one, other, tolerance) for one, other in zip(ours, theirs, strict=True)]
    if not any(differ):
        return None
    first = differ.index(True)
    return first if all(differ[first:]) else first + 1


def _agree(one: bytes, other: bytes, tolerance: float) -> bool:
    a, b = np.frombuffer(one, "<f4"), np.frombuffer(other, "<f4")
    with np.errstate(over="ignore", invalid="ignore"):
        length = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)), 1e-6)
        return float(np.linalg.norm(a - b)) <= tolerance * length
