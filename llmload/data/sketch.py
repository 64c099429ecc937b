"""Sketches: a few kilobytes by which a peer finds out which of its records we lack.

A Bloom filter over the ids of our records, 10 bits each: of those that we have it knows all, of
those that we lack it takes 0.8 % for known. The salt is new each time, so these are others next
time. Where we have more records than fit, a sketch is of one slice of them, those whose ids begin
with certain bits, and the next one is of another slice: so its size has a bound, whatever we have.

Source: Bloom 1970; Broder and Mitzenmacher 2004 for the sizes.

This file does not know records, or who is asked.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from natswarm import DecodeError, Message

__all__ = ["SKETCH_BYTES_MAX", "Sketch", "make_sketch", "missing_untrusted"]

SKETCH_BYTES_MAX = 8 * 1024
SKETCH_BYTES_MIN = 8
BITS_PER_ID = 10
HASH_COUNT = 7  # the best for 10 bits: 10 ln 2
SLICE_BITS_MAX = 16


class Sketch(Message, frozen=True):
    """What the bits that follow as payload are of.

    Attributes:
        slice_bits: How many first bits of an id tell its slice; 0: there is one slice.
        slice: Which.
        salt: Of the hash functions.
    """

    slice_bits: Annotated[int, Meta(ge=0, le=SLICE_BITS_MAX)]
    slice: Annotated[int, Meta(ge=0, lt=2**SLICE_BITS_MAX)]
    salt: Annotated[bytes, Meta(min_length=8, max_length=8)]


def make_sketch(record_ids: Iterable[bytes], rng: random.Random) -> tuple[Sketch, bytes]:
    """Return the sketch of a slice of ids, and its bits.

    Args:
        record_ids: Of 32 bytes, as uniform as hashes are.
        rng: Draws slice and salt.
    """
    ids = list(record_ids)
    slice_bits = 0
    while len(ids) * BITS_PER_ID >> slice_bits > 8 * SKETCH_BYTES_MAX:
        slice_bits += 1
    sketch = Sketch(slice_bits, rng.randrange(1 << slice_bits), rng.randbytes(8))
    ids = [each for each in ids if _slice(each, slice_bits) == sketch.slice]
    # Slices differ a little in size; the bound is the bound.
    byte_count = min(max(len(ids) * BITS_PER_ID // 8, SKETCH_BYTES_MIN), SKETCH_BYTES_MAX)
    bits = np.zeros(8 * byte_count, dtype=bool)
    for record_id in ids:
        bits[_places(record_id, sketch.salt, bits.size)] = True
    return sketch, np.packbits(bits).tobytes()


def missing_untrusted(sketch: Sketch, data: bytes, record_ids: Iterable[bytes]) -> list[bytes]:
    """Return those ids of the slice that a peer's sketch does not know.

    Raises:
        DecodeError: The sketch is empty or too long.
    """
    if not SKETCH_BYTES_MIN <= len(data) <= SKETCH_BYTES_MAX:
        raise DecodeError(f"a sketch of {len(data)} bytes")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).astype(bool)
    return [
        each
        for each in record_ids
        if _slice(each, sketch.slice_bits) == sketch.slice
        and not bits[_places(each, sketch.salt, bits.size)].all()
    ]


def _slice(record_id: bytes, bits: int) -> int:
    return int.from_bytes(record_id[:2], "big") >> (SLICE_BITS_MAX - bits)


def _places(record_id: bytes, salt: bytes, bit_count: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(record_id, salt=salt, digest_size=8 * HASH_COUNT).digest()
    return np.frombuffer(digest, dtype="<u8") % np.uint64(bit_count)
