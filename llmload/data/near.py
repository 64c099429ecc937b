"""Texts that are nearly the same: MinHash signatures, and bands of them to look up by.

A text is taken as the set of all its runs of 12 bytes (shingles), white space and case put aside.
Of two texts, the share of 64 hash functions whose smallest value is the same estimates the share of
shingles that they have in common (Jaccard), with a standard error of 0.05 at 0.8. Cut into 16 bands
of 4, two texts that share 0.8 have a band in common with probability 0.9998, two that share 0.2
with 0.03: so candidates are found by equal bands, and then compared.

Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", chapter 3.

This file does not know records, or where signatures are kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEAR", "band_keys", "normalise", "resemblance", "signature"]

SHINGLE_BYTES = 12
HASH_COUNT = 64
BAND_COUNT = 16
# From here on two texts are the same to learn from, as in the sets that models are trained on.
NEAR = 0.8

# Constants of the format: signatures of one store are compared over years.
_rng = np.random.Generator(np.random.PCG64(20))
_FACTORS = _rng.integers(2**63, size=(HASH_COUNT, 1), dtype=np.uint64) * 2 + 1
_OFFSETS = _rng.integers(2**63, size=(HASH_COUNT, 1), dtype=np.uint64)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)


def normalise(text: str) -> bytes:
    """Return a text without case and with single spaces: what makes two texts equal."""
    return " ".join(text.casefold().split()).encode()


def signature(text: str) -> NDArray[np.uint32]:
    """Return the smallest value of each hash function over all shingles, uint32 (64,).

    2 ms for a text of 8 KiB.
    """
    data = np.frombuffer(normalise(text).ljust(SHINGLE_BYTES, b"\0"), dtype=np.uint8)
    count = len(data) - SHINGLE_BYTES + 1
    shingles = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE_BYTES):
        shingles *= _BASE
        shingles += data[offset : offset + count]
    shingles ^= shingles >> _SHIFT
    values = (shingles * _FACTORS + _OFFSETS) >> _SHIFT  # (64, count), modulo 2^64
    smallest: NDArray[np.uint32] = values.min(axis=1).astype(np.uint32)
    return smallest


def resemblance(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """Estimate the share of shingles that two texts have in common, 0..1, by their signatures."""
    return float(np.mean(one == other))


def band_keys(smallest: NDArray[np.uint32]) -> list[int]:
    """Return 16 numbers, of 63 bits each; texts that are nearly the same share one."""
    keys = np.arange(BAND_COUNT, dtype=np.uint64)
    for column in smallest.reshape(BAND_COUNT, -1).T:
        keys = (keys ^ column) * _BASE
        keys ^= keys >> _SHIFT
    return [int(key) for key in keys >> np.uint64(1)]
