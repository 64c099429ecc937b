"""A model cut into shards: the pieces in which parameters and their updates travel.

    parameters by name --ParameterSpace--> one flat vector --ShardLayout--> shards --Codec--> bytes

A shard is a message: `ShardHeader`, then a payload as `codecs.py` lays it out, times 2^exponent.

Updates are small: many of their numbers lie below 6e-8, which float16 rounds to zero. So each shard
carries a power of two that lifts its largest number to the upper end of float16. Multiplying by a
power of two is exact, so all peers decode the same bits, whatever their processor.

This file does not know codecs from the inside, peers, or who sends what to whom.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, TypeAlias

import numpy as np
from msgspec import UNSET, Meta, UnsetType

from llmload.learn.codecs import Codec, decode_values_untrusted, encode_values
from llmload.learn.space import ParameterSpace, Vector
from natswarm import DecodeError, Message

__all__ = [
    "EncodedShard",
    "LayoutHash",
    "ParameterSpace",
    "ShardHeader",
    "ShardLayout",
    "Vector",
    "Version",
    "decode_shard_untrusted",
    "encode_shard",
]

# 64 Ki values are 66 KB as int8: about 50 packets, so losing a connection costs little, while the
# header of 90 bytes and the work in Python for each shard do not count. GPT-2 124M has 1,899.
SHARD_VALUE_COUNT = 64 * 1024
# 16 MiB as float32, which is also the bound of a message's payload.
SHARD_VALUE_COUNT_MAX = 4 * 1024 * 1024

# No gradient of a model that still learns is near; with it, a sum of 2^30 contributions is finite.
# Rounding may carry a number beyond what was sent: decoders allow twice as much.
MAGNITUDE_MAX = 2.0**96

LAYOUT_HASH_BYTES = 16
# The largest number of a shard is lifted to [2^14, 2^15): below float16's largest, 65,504, with a
# factor of two to spare for rounding.
LIFTED_EXPONENT = 15
# What those bounds, and float32's smallest number 2^-149, leave of `ShardHeader.exponent`.
EXPONENT_MIN = -148 - LIFTED_EXPONENT
EXPONENT_MAX = 97 - LIFTED_EXPONENT

# Fields of messages, checked when they are decoded.
Version: TypeAlias = Annotated[int, Meta(ge=0, lt=2**62)]
LayoutHash: TypeAlias = Annotated[
    bytes, Meta(min_length=LAYOUT_HASH_BYTES, max_length=LAYOUT_HASH_BYTES)
]


@dataclass(frozen=True)
class ShardLayout:
    """How the flat vector of a model is cut into shards.

    Attributes:
        space: The flat vector.
        shard_value_count: Values in each shard but the last, which holds the rest.
    """

    space: ParameterSpace
    shard_value_count: int = SHARD_VALUE_COUNT

    def __post_init__(self) -> None:
        if not 1 <= self.shard_value_count <= SHARD_VALUE_COUNT_MAX:
            raise ValueError(f"shard_value_count must be in 1..{SHARD_VALUE_COUNT_MAX}")

    @cached_property
    def shard_count(self) -> int:
        """Shards of the model."""
        return math.ceil(self.space.size / self.shard_value_count)

    @cached_property
    def hash(self) -> bytes:
        """16 bytes that are equal if and only if model shape and layout are.

        Peers compare it on every shard: gradients of another model would decode without an error.
        """
        description = json.dumps(["llmload shards 1", self.shard_value_count, self.space.shapes])
        return hashlib.blake2b(description.encode(), digest_size=LAYOUT_HASH_BYTES).digest()

    def bounds(self, shard: int) -> slice:
        """Return where a shard lies in the flat vector.

        Raises:
            ValueError: There is no such shard.
        """
        if not 0 <= shard < self.shard_count:
            raise ValueError(f"shard {shard} is not in 0..{self.shard_count - 1}")
        start = shard * self.shard_value_count
        return slice(start, min(start + self.shard_value_count, self.space.size))

    def value_count(self, shard: int) -> int:
        """Return the number of values in a shard; raises as `bounds`."""
        bounds = self.bounds(shard)
        return int(bounds.stop - bounds.start)


class ShardHeader(Message, frozen=True):
    """What stands before the numbers of one shard.

    Attributes:
        version: Of the sender's shard: rises with each that it sends; tells old from new.
        shard: Index of the shard in the layout.
        codec: A `Codec`; a name unknown to us is an error of this shard, not of the message.
        layout: `ShardLayout.hash`.
        count: Values in the payload.
        exponent: The numbers of the payload are to be multiplied by 2^exponent.
        seen: The receiver's latest version that the sender had taken; 0 for none.
        origin: The public key of whose it is, if the sender only passes it on.
    """

    version: Version
    shard: Annotated[int, Meta(ge=0, lt=2**31)]
    codec: Annotated[str, Meta(max_length=16)]
    layout: LayoutHash
    count: Annotated[int, Meta(ge=1, le=SHARD_VALUE_COUNT_MAX)]
    exponent: Annotated[int, Meta(ge=EXPONENT_MIN, le=EXPONENT_MAX)] = 0
    seen: Version = 0
    origin: Annotated[bytes, Meta(min_length=32, max_length=32)] | UnsetType = UNSET


@dataclass(frozen=True)
class EncodedShard:
    """A shard as it travels: header and payload of one message."""

    header: ShardHeader
    payload: bytes


def encode_shard(
    layout: ShardLayout,
    shard: int,
    values: Vector,
    *,
    codec: Codec,
    version: int,
    density: float = 1.0,
) -> EncodedShard:
    """Encode one shard.

    The decoded value differs from the true one by at most, with `largest` of the shard and `peak`
    of the value's block: nothing (fp32); |value| * 2^-11 + largest * 2^-39 (fp16);
    peak * 0.501 / 127 + largest * 2^-39 (int8, that is 0.4 % of the peak); peak * 0.501 / 7 +
    largest * 2^-39 (int4). Of topk3 the values that are kept get one of two magnitudes of their
    block, with an error below the block's largest; the others become zero.

    Args:
        layout: The layout of the whole vector.
        shard: Index of the shard.
        values: The values of this shard, float32 (count,).
        codec: How to encode them.
        version: Goes into the header.
        density: Share of the values that `topk3` keeps.

    Raises:
        ValueError: A value is NaN, infinite or beyond 2^96, or there is no such shard.
    """
    if values.shape != (layout.value_count(shard),):
        raise ValueError(f"shard {shard} has {layout.value_count(shard)} values: {values.shape}")
    largest = float(np.abs(values).max())
    # Written so that NaN, which is not greater than anything, is refused too.
    if not largest <= MAGNITUDE_MAX:
        raise ValueError(f"shard {shard} holds NaN, infinity or values beyond {MAGNITUDE_MAX:g}")
    exponent = 0
    if codec is Codec.FP32:
        payload = encode_values(values, codec)
    else:
        if largest > 0:
            exponent = math.frexp(largest)[1] - LIFTED_EXPONENT
        payload = encode_values(np.ldexp(values, -exponent), codec, density=density)
    header = ShardHeader(
        version=version,
        shard=shard,
        codec=codec.value,
        layout=layout.hash,
        count=values.size,
        exponent=exponent,
    )
    return EncodedShard(header, payload)


def decode_shard_untrusted(layout: ShardLayout, header: ShardHeader, payload: bytes) -> Vector:
    """Decode one shard from a stranger into float32 (count,).

    Equal bytes give equal bits on every machine: each value is the result of exact operations and
    at most one rounded multiplication.

    Raises:
        DecodeError: Layout, index, count, codec or size do not fit, or a value is NaN, infinite or
            beyond 2^97.
    """
    if header.layout != layout.hash:
        raise DecodeError("a shard of another model or another layout")
    if not 0 <= header.shard < layout.shard_count:
        raise DecodeError(f"shard {header.shard} is not in 0..{layout.shard_count - 1}")
    count = layout.value_count(header.shard)
    if header.count != count:
        raise DecodeError(f"shard {header.shard} has {count} values, not {header.count}")
    try:
        codec = Codec(header.codec)
    except ValueError as error:
        raise DecodeError(f"unknown codec {header.codec!r}") from error
    if not EXPONENT_MIN <= header.exponent <= EXPONENT_MAX:
        raise DecodeError(f"exponent {header.exponent} is out of range")
    # Overflow and NaN are what the check after it is for.
    with np.errstate(over="ignore", invalid="ignore"):
        values = decode_values_untrusted(payload, codec, count)
        if codec is not Codec.FP32:
            values = np.ldexp(values, header.exponent)
        largest = np.abs(values).max()
    if not largest <= 2 * MAGNITUDE_MAX:
        raise DecodeError(f"shard {header.shard} holds NaN, infinity or values beyond the bound")
    return values
