"""Numbers as few bytes: how the values of a shard travel.

    fp32      count x float32
    fp16      count x float16
    int8x64   blocks x float16 scale | count x int8; value = int8 * scale of its block
    int8x256  the same with blocks of 256 values (the last block may be shorter)
    int4x64   blocks of 64 x float16 scale | ceil(count / 2) bytes, two values each, the first in
              the lower half; value = (half - 8) * scale, half in 1..15
    topk3     kept uint32 | which, deflated: how many values are left out before each, in octets to
              be summed up to the first that is not 255 | for each 128 of the kept values two
              magnitudes float16, the lower and the higher | 2 bits a kept value, four in a byte
              from the lowest on: 1 if it is negative, 2 if its magnitude is the higher

All but fp32 are for values whose largest is near 2^14: `shards.py` multiplies by a power of two on
the way and back. All numbers are little-endian.

`topk3` keeps the values of largest magnitude; the others are zero for the receiver, and whoever
sends has to keep them, and what rounding took, for the next time (error feedback), or they are
lost. Naming one of 5.5 % takes 5.3 bits in the updates of `tools/bench/learning.py`, below the 5.6
of random ones, since some matrices have more of them than others: so a kept value costs 7.6 bits in
all, and 5.5 % of a vector 0.4 bits a value in place of 32.

Blocks, because one scale for a whole row is ruined by its largest number: a few channels of GPT-2
are two orders of magnitude above the rest.

Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization"; SparseLoCo
(2508.15706) for 2 bits; Lloyd 1982, "Least squares quantization in PCM", for the magnitudes;
RFC 1951 for deflate.

This file does not know shards, models or peers.
"""

from __future__ import annotations

import math
import zlib
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from natswarm import DecodeError

__all__ = ["Codec", "decode_values_untrusted", "encode_values"]

INT8_MAX = 127
INT4_MAX = 7
KEPT_BYTES = 4
# An octet of a gap that goes on in the next one.
GAP_GOES_ON = 255
# A deflate stream without zlib's header.
DEFLATE_BITS = -15
# No encoder needs more than this; a stream of empty blocks could be of any length.
DEFLATE_GROWTH_MAX, DEFLATE_EXTRA_BYTES = 2, 64
# Kept values that share two magnitudes.
LEVELS_BLOCK_SIZE = 128
LEVELS_ROUNDS = 3


class Codec(StrEnum):
    """How values become bytes; the value is the name on the wire."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8X64 = "int8x64"
    INT8X256 = "int8x256"
    INT4X64 = "int4x64"
    TOPK = "topk3"

    @property
    def block_size(self) -> int:
        """Values that share one scale; 0 for codecs without scales."""
        return {Codec.FP32: 0, Codec.FP16: 0, Codec.INT8X256: 256}.get(self, 64)

    def payload_bytes(self, count: int) -> int:
        """Return the size of `count` values; that of `topk3` depends on the values (ValueError)."""
        match self:
            case Codec.FP32:
                return 4 * count
            case Codec.FP16:
                return 2 * count
            case Codec.INT8X64 | Codec.INT8X256:
                return 2 * math.ceil(count / self.block_size) + count
            case Codec.INT4X64:
                return 2 * math.ceil(count / self.block_size) + (count + 1) // 2
        raise ValueError(f"how long {self} is depends on the values")


def encode_values(values: NDArray[np.float32], codec: Codec, *, density: float = 1.0) -> bytes:
    """Return values as bytes.

    Args:
        values: float32 (count,), finite, below 2^15 unless the codec is fp32.
        codec: How.
        density: Share of the values that `topk3` keeps, at least one; others keep all.
    """
    match codec:
        case Codec.FP32:
            return values.astype("<f4").tobytes()
        case Codec.FP16:
            return values.astype("<f2").tobytes()
        case Codec.TOPK:
            return _topk(values, density)
    largest = INT4_MAX if codec is Codec.INT4X64 else INT8_MAX
    blocks = _in_blocks(values, codec.block_size)  # (blocks, block_size)
    peaks = np.abs(blocks).max(axis=1)  # (blocks,)
    exact = peaks / np.float32(largest)
    scales: NDArray[np.float16] = exact.astype("<f2")
    # Rounded up: with a scale that is too small, the peak would be a step too far from zero.
    too_small = scales.astype(np.float32) < exact
    scales[too_small] = np.nextafter(scales[too_small], np.float16(np.inf))
    divisors = scales.astype(np.float32)
    divisors[divisors == 0] = 1  # a block of zeros
    steps = np.rint(blocks / divisors[:, None]).astype(np.int8)  # (blocks, block_size)
    steps = steps.reshape(-1)[: values.size]
    if codec is not Codec.INT4X64:
        return b"".join((scales.tobytes(), steps.tobytes()))
    halves = np.zeros(values.size + values.size % 2, dtype=np.uint8)
    halves[: values.size] = steps + 8
    pairs = halves[::2] | halves[1::2] << 4  # (ceil(count / 2),)
    return b"".join((scales.tobytes(), pairs.tobytes()))


def decode_values_untrusted(payload: bytes, codec: Codec, count: int) -> NDArray[np.float32]:
    """Return what a stranger encoded as float32 (count,); may hold NaN or infinity.

    Equal bytes give equal bits on every machine: each value is the result of exact operations and
    at most one rounded multiplication.

    Raises:
        DecodeError: The size is wrong, or the indices are no increasing numbers below `count`.
    """
    if codec is Codec.TOPK:
        return _from_topk_untrusted(payload, count)
    if len(payload) != codec.payload_bytes(count):
        raise DecodeError(
            f"{count} values as {codec} take {codec.payload_bytes(count)} bytes, not {len(payload)}"
        )
    match codec:
        case Codec.FP32:
            return np.frombuffer(payload, dtype="<f4").astype(np.float32)
        case Codec.FP16:
            return np.frombuffer(payload, dtype="<f2").astype(np.float32)
    block_count = math.ceil(count / codec.block_size)
    scales = np.frombuffer(payload, dtype="<f2", count=block_count).astype(np.float32)
    if codec is Codec.INT4X64:
        pairs = np.frombuffer(payload, dtype=np.uint8, offset=2 * block_count)
        halves = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:count]
        steps = halves.astype(np.float32) - 8
    else:
        steps = np.frombuffer(payload, dtype=np.int8, offset=2 * block_count).astype(np.float32)
    blocks = _in_blocks(steps, codec.block_size)  # (blocks, block_size)
    values: NDArray[np.float32] = (blocks * scales[:, None]).reshape(-1)[:count]
    return values


def _in_blocks(values: NDArray[np.float32], block_size: int) -> NDArray[np.float32]:
    """Return (blocks, block_size); the last block is filled up with zeros."""
    padding = -values.size % block_size
    if padding:
        values = np.concatenate([values, np.zeros(padding, dtype=np.float32)])
    return values.reshape(-1, block_size)


# --- The largest values, and which they are ----------------------------------------------------


def _topk(values: NDArray[np.float32], density: float) -> bytes:
    kept = max(1, min(values.size, round(values.size * density)))
    # Of equal magnitudes, any: which are kept is part of what is sent.
    indices = np.sort(np.argpartition(np.abs(values), -kept)[-kept:])
    return b"".join(
        (
            np.array(kept, dtype="<u4").tobytes(),
            _deflated(_as_gaps(indices)),
            _as_levels(values[indices]),
        )
    )


def _from_topk_untrusted(payload: bytes, count: int) -> NDArray[np.float32]:
    kept = int.from_bytes(payload[:KEPT_BYTES], "little")
    levels_at = len(payload) - _levels_bytes(kept)
    # Before anything of that size is made.
    if not 1 <= kept <= count or levels_at < KEPT_BYTES:
        raise DecodeError(f"{len(payload)} bytes are not {kept} of {count} values as topk3")
    octets_max = kept + (count - kept) // GAP_GOES_ON
    if levels_at > DEFLATE_GROWTH_MAX * octets_max + DEFLATE_EXTRA_BYTES:
        raise DecodeError(f"{len(payload)} bytes are too many for {kept} values as topk3")
    octets = _inflated_untrusted(payload[KEPT_BYTES:levels_at], octets_max)
    values = np.zeros(count, dtype=np.float32)
    values[_from_gaps_untrusted(octets, count, kept)] = _from_levels(payload[levels_at:], kept)
    return values


def _as_gaps(indices: NDArray[np.intp]) -> bytes:
    gaps = np.diff(indices, prepend=-1) - 1  # (kept,)
    longer = gaps // GAP_GOES_ON
    octets = np.full(gaps.size + longer.sum(), GAP_GOES_ON, dtype=np.uint8)
    octets[np.cumsum(longer + 1) - 1] = gaps % GAP_GOES_ON
    return octets.tobytes()


def _from_gaps_untrusted(octets: bytes, count: int, kept: int) -> NDArray[np.intp]:
    gaps = np.frombuffer(octets, dtype=np.uint8)
    ends = np.flatnonzero(gaps != GAP_GOES_ON)
    indices = np.cumsum(gaps, dtype=np.intp)[ends] + np.arange(ends.size)
    if ends.size != kept or ends[-1] != gaps.size - 1 or indices[-1] >= count:
        raise DecodeError(f"{gaps.size} octets do not name {kept} of {count} values")
    return indices


def _deflated(octets: bytes) -> bytes:
    # Without a search for repetitions: gaps have none, and those found by chance would cost bits.
    deflate = zlib.compressobj(wbits=DEFLATE_BITS, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(octets) + deflate.flush()


def _inflated_untrusted(code: bytes, octets_max: int) -> bytes:
    inflate = zlib.decompressobj(wbits=DEFLATE_BITS)
    try:
        octets = inflate.decompress(code, octets_max + 1)
    except zlib.error as error:
        raise DecodeError(f"bytes that name values can't be inflated: {error}") from error
    if len(octets) > octets_max or not inflate.eof or inflate.unused_data:
        raise DecodeError(f"bytes that name values are not a whole stream of {octets_max} octets")
    return octets


def _levels_bytes(count: int) -> int:
    return 4 * math.ceil(count / LEVELS_BLOCK_SIZE) + math.ceil(count / 4)


def _as_levels(values: NDArray[np.float32]) -> bytes:
    """Round magnitudes to two for each block, which are the means of those below and above."""
    magnitudes = np.abs(_in_blocks(values, LEVELS_BLOCK_SIZE))  # (blocks, block_size)
    is_there = np.arange(magnitudes.size).reshape(magnitudes.shape) < values.size
    middle = magnitudes.sum(axis=1, keepdims=True) / is_there.sum(axis=1, keepdims=True)
    for _ in range(LEVELS_ROUNDS):
        is_high = magnitudes > middle
        lows, highs = (
            np.where(which, magnitudes, 0).sum(axis=1) / np.maximum(which.sum(axis=1), 1)
            for which in (is_there & ~is_high, is_high)
        )
        middle = (lows + highs)[:, None] / 2
    levels = np.stack([lows, highs], axis=1).astype("<f2")  # (blocks, 2)
    codes = np.zeros(values.size + -values.size % 4, dtype=np.uint8)
    codes[: values.size] = (values < 0) | is_high.reshape(-1)[: values.size] << 1
    fours = codes.reshape(-1, 4) << np.arange(0, 8, 2, dtype=np.uint8)  # (ceil(count / 4), 4)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(fours, axis=1)
    return levels.tobytes() + packed.tobytes()


def _from_levels(code: bytes, count: int) -> NDArray[np.float32]:
    block_count = math.ceil(count / LEVELS_BLOCK_SIZE)
    levels = np.frombuffer(code, dtype="<f2", count=2 * block_count).astype(np.float32)
    fours = np.frombuffer(code, dtype=np.uint8, offset=4 * block_count)
    codes = (fours[:, None] >> np.arange(0, 8, 2, dtype=np.uint8)).reshape(-1)[:count] & 3
    magnitudes = levels[np.arange(count) // LEVELS_BLOCK_SIZE * 2 + (codes >> 1)]
    return np.where(codes & 1, -magnitudes, magnitudes)
