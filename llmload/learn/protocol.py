"""What learners ask of each other: the messages of four calls, and the name of the service.

    update/5    shards of one update, each a `ShardHeader` and its payload  ->  UpdateTaken
    reduce/1    parts of a model  ->  `Mean`, each of one part, in the same order
    manifest/1  FetchManifest  ->  Manifest and the digests of all shards of a snapshot
    state/2     FetchShards  ->  shards of that snapshot

A shard with its header is of `shards.py`. This file does not know who calls, or when.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

from llmload.learn.codecs import Codec
from llmload.learn.shards import (
    SHARD_VALUE_COUNT,
    SHARD_VALUE_COUNT_MAX,
    LayoutHash,
    ShardHeader,
    Version,
)
from natswarm import Message, Method

__all__ = [
    "DIGEST_BYTES",
    "MANIFEST",
    "PARTNERS_MAX",
    "REDUCE",
    "SHARDS_PER_FETCH",
    "STATE",
    "UPDATE",
    "FetchManifest",
    "FetchShards",
    "Manifest",
    "Mean",
    "UpdateTaken",
    "learner_service",
]

# With whom a learner exchanges at a time.
PARTNERS_MAX = 64
# Ed25519.
KEY_BYTES = 32
# Shards in one call for the model: progress is kept when a call fails.
SHARDS_PER_FETCH = 16
# SHA-256.
DIGEST_BYTES = 32
Digest: TypeAlias = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
# 64 bits tell all models apart that ever meet by accident; each shard names its layout besides.
MODEL_PREFIX_CHARACTERS = 16


class UpdateTaken(Message, frozen=True):
    """What became of an update.

    Attributes:
        shard_count: How many of its shards were made part of the model.
        weight: The mean factor over all shards that were sent, 0..1.
        partners: Public keys of those who the receiver exchanges updates with.
    """

    shard_count: Annotated[int, Meta(ge=0, lt=2**31)]
    weight: Annotated[float, Meta(ge=0, le=1)]
    partners: Annotated[
        tuple[Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)], ...],
        Meta(max_length=PARTNERS_MAX),
    ] = ()


class Mean(Message, frozen=True):
    """The mean of a part of several models, whose numbers are the payload.

    Attributes:
        shard: What the payload is.
        count: How many models it is the mean of.
    """

    shard: ShardHeader
    count: Annotated[int, Meta(ge=1, lt=2**31)]


class FetchManifest(Message, frozen=True):
    """Tell me what your model is made of.

    Attributes:
        layout: `ShardLayout.hash`.
    """

    layout: LayoutHash


class Manifest(Message, frozen=True):
    """A model as it was when it was asked for; the payload is the digest of each shard, in order.

    Attributes:
        version: Steps that it has learned.
    """

    version: Version


class FetchShards(Message, frozen=True):
    """Send me some shards that you have named in a manifest.

    Attributes:
        layout: `ShardLayout.hash`.
        wanted: Index and digest of each.
    """

    layout: LayoutHash
    wanted: Annotated[
        tuple[tuple[Annotated[int, Meta(ge=0, lt=2**31)], Digest], ...],
        Meta(max_length=SHARDS_PER_FETCH),
    ]


_PAYLOAD_BYTES_MAX = Codec.FP32.payload_bytes(SHARD_VALUE_COUNT_MAX)
# Of what anybody may send us: no update is longer, nor any part. Updates that wait are held.
_GIVEN_BYTES_MAX = Codec.INT8X256.payload_bytes(SHARD_VALUE_COUNT)

UPDATE = Method(
    "llmload/update/5", (ShardHeader,), (UpdateTaken,), payload_bytes_max=_GIVEN_BYTES_MAX
)
REDUCE = Method("llmload/reduce/1", (ShardHeader,), (Mean,), payload_bytes_max=_GIVEN_BYTES_MAX)
MANIFEST = Method(
    "llmload/manifest/1", (FetchManifest,), (Manifest,), payload_bytes_max=_PAYLOAD_BYTES_MAX
)
STATE = Method(
    "llmload/state/2", (FetchShards,), (ShardHeader,), payload_bytes_max=_PAYLOAD_BYTES_MAX
)


def learner_service(model_hash: str) -> str:
    """Return the name under which learners of a model announce themselves."""
    return f"llmload/learn/{model_hash[:MODEL_PREFIX_CHARACTERS]}"
