"""How hidden states travel: exactly, halved, or in 8 bits with their outliers apart.

    float32   4 bytes a value       to the bit: a split model gives the tokens of the whole one
    float16   2 bytes a value       11 bits of mantissa
    int8      about 1.07 bytes      blocks of 64 with a scale each; the 8 largest values apart

GPT-2 has a few channels that are a hundred times larger than the rest. One scale for a whole row
would round everything else to zero, so each block of 64 has its own, and the 8 largest values of a
row travel beside it in float16. A row of 768 takes 824 bytes instead of 3,072.

    row of int8:  values n_embd x int8 | scales ceil(n_embd / 64) x float16
                  | outlier channels 8 x uint16 | outlier values 8 x float16        little-endian

What rounding does to logits and text: docs/inference.md, `tools/bench/codecs.py`.
Source: LLM.int8() (arXiv 2208.07339) for the outliers; blockwise scales as in bitsandbytes.
Pure: arrays and bytes. Knows neither steps nor streams.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from natswarm import DecodeError

__all__ = ["CODECS", "Codec", "choose_codec", "decode_hidden_untrusted", "encode_hidden"]

Codec: TypeAlias = Literal["float32", "float16", "int8"]

# From the most exact to the smallest.
CODECS: tuple[Codec, ...] = ("float32", "float16", "int8")

BLOCK_VALUES = 64
OUTLIERS = 8
FLOAT16_MAX = 65_504.0

# On one device or in one house the bytes cost less than the rounding; paths between carriers have
# ten times this round trip.
NEAR_RTT_S = 0.005


def choose_codec(allowed: Codec, rtt_s: float | None) -> Codec:
    """Return how to send over a link: exactly over a short one, else as the client allows.

    Args:
        allowed: The least exact form that the client takes.
        rtt_s: Round trip of the link; None if it is not known.
    """
    return "float32" if rtt_s is not None and rtt_s < NEAR_RTT_S else allowed


def encode_hidden(rows: NDArray[np.float32], codec: Codec) -> tuple[Codec, bytes | memoryview]:
    """Return hidden states in a form, and which: values beyond float16 travel as float32.

    Args:
        rows: Finite float32 (time, n_embd).
        codec: The form wanted.
    """
    if codec != "float32" and np.abs(rows).max() > FLOAT16_MAX:
        codec = "float32"
    if codec == "float32":
        # On little-endian machines this is the array itself, not a copy.
        return codec, np.ascontiguousarray(rows, dtype="<f4").data.cast("B")
    if codec == "float16":
        return codec, rows.astype("<f2").tobytes()
    return codec, _encode_int8(rows).tobytes()


def decode_hidden_untrusted(
    payload: bytes, codec: Codec, row_count: int, n_embd: int
) -> NDArray[np.float32]:
    """Return hidden states float32 (row_count, n_embd).

    Raises:
        DecodeError: Another size, or a value that is not finite, or a channel that is not there.
    """
    row_bytes = (
        _row_dtype(n_embd).itemsize if codec == "int8" else n_embd * np.dtype(codec).itemsize
    )
    if len(payload) != row_count * row_bytes:
        raise DecodeError(
            f"{row_count} rows of {codec} have {row_count * row_bytes} bytes, not {len(payload)}"
        )
    if codec == "int8":
        rows = _decode_int8_untrusted(np.frombuffer(payload, _row_dtype(n_embd)), n_embd)
    else:
        sent = np.frombuffer(payload, np.dtype(codec).newbyteorder("<"))
        rows = sent.reshape(row_count, n_embd).astype(np.float32, copy=False)
    # One NaN would spread over the whole sequence, and its cache would have to go.
    if not np.isfinite(rows).all():
        raise DecodeError("a step has hidden states that are NaN or infinite")
    return rows


def _row_dtype(n_embd: int) -> np.dtype[np.void]:
    outliers = min(OUTLIERS, n_embd)
    return np.dtype(
        [
            ("values", "i1", (n_embd,)),
            ("scales", "<f2", (math.ceil(n_embd / BLOCK_VALUES),)),
            ("channels", "<u2", (outliers,)),
            ("outliers", "<f2", (outliers,)),
        ]
    )


def _encode_int8(rows: NDArray[np.float32]) -> NDArray[np.void]:
    time, n_embd = rows.shape
    encoded = np.zeros(time, dtype=_row_dtype(n_embd))
    outliers = min(OUTLIERS, n_embd)
    channels = np.argpartition(np.abs(rows), n_embd - outliers, axis=1)[:, -outliers:]
    encoded["channels"] = channels
    encoded["outliers"] = np.take_along_axis(rows, channels, axis=1)
    blocks = _in_blocks(rows)
    np.put_along_axis(blocks.reshape(time, -1), channels, 0, axis=1)
    # In float16 first, so that both ends divide and multiply by the same number.
    scales = (np.abs(blocks).max(axis=2) / 127).astype(np.float16)  # (time, blocks)
    encoded["scales"] = scales
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)[..., np.newaxis]
    values = np.clip(np.rint(blocks / divisors), -127, 127)
    encoded["values"] = values.reshape(time, -1)[:, :n_embd]
    return encoded


def _decode_int8_untrusted(encoded: NDArray[np.void], n_embd: int) -> NDArray[np.float32]:
    channels = encoded["channels"].astype(np.int64)
    if channels.size and channels.max() >= n_embd:
        raise DecodeError(f"a step has an outlier in a channel beyond {n_embd}")
    blocks = _in_blocks(encoded["values"].astype(np.float32))
    # Whatever a stranger's scale is, infinity is found by the caller.
    with np.errstate(over="ignore", invalid="ignore"):
        blocks *= encoded["scales"].astype(np.float32)[..., np.newaxis]
    rows = np.ascontiguousarray(blocks.reshape(len(encoded), -1)[:, :n_embd])
    np.put_along_axis(rows, channels, encoded["outliers"].astype(np.float32), axis=1)
    return rows


def _in_blocks(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a copy in blocks, the last one filled up with zeros: (time, blocks, 64)."""
    time, n_embd = rows.shape
    blocks = np.zeros((time, math.ceil(n_embd / BLOCK_VALUES), BLOCK_VALUES), dtype=np.float32)
    blocks.reshape(time, -1)[:, :n_embd] = rows
    return blocks
