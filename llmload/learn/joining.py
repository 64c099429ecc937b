"""Take over a model from those who learn it already: verified shard by shard, from several.

Models of two learners are hardly ever equal, so there is no one truth to verify against. What can
be verified is that all shards are of ONE model as one learner had it at one moment:

    manifest/1   whoever is asked takes a snapshot of its model and names the digest of each shard
    state/2      shards come from everybody whose snapshot has a shard of just this digest

A shard with another digest than was named is a lie, and who sent it is asked nothing more. A source
that goes away costs what it had not sent yet: shards count by their digests, not by who sent them.
Equal snapshots are those of learners that have not begun yet and of newcomers, who each serve what
they have just taken over: so a crowd that comes at once fetches from one another. Otherwise all is
from the learner whose manifest was chosen.

Whether that model is any good, digests do not tell: the caller tries it on text of its own, and
asks for the next. First comes what most shards can be had of from several sources, then what has
learned for longest. A few tries bound what liars cost; where they are the majority, nothing is
taken over.

This file does not know what is done with a model, nor how it is trained.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import trio
from numpy.typing import NDArray

from llmload.learn.codecs import Codec
from llmload.learn.protocol import (
    DIGEST_BYTES,
    MANIFEST,
    SHARDS_PER_FETCH,
    STATE,
    FetchManifest,
    FetchShards,
    Manifest,
)
from llmload.learn.shards import (
    EncodedShard,
    ShardHeader,
    ShardLayout,
    Vector,
    decode_shard_untrusted,
    encode_shard,
)
from natswarm import Call, DecodeError, NatswarmError, Node, PeerId, RequestRefused

__all__ = ["StateFetch", "StateServer"]

# Of the snapshot, whose numbers are as good as those that learners average.
SNAPSHOT_CODEC = Codec.FP16
# A snapshot older than this is taken anew for who asks next, unless somebody still fetches it.
SNAPSHOT_FRESH_S = 60.0
SNAPSHOT_IDLE_S = 60.0
SNAPSHOT_AGE_MAX_S = 600.0

SOURCES_MAX = 16
# Models that are fetched and tried at most.
TRIES_MAX = 4
MANIFEST_TIMEOUT_S = 30.0
# For `SHARDS_PER_FETCH` shards, 2 MB.
SHARDS_TIMEOUT_S = 60.0

# One element is one digest.
Digests = NDArray[np.void]

logger = logging.getLogger("llmload.learn")


def shard_digest(shard: EncodedShard) -> bytes:
    """Return the SHA-256 of all that the values of a shard follow from."""
    header = shard.header
    return hashlib.sha256(f"{header.codec} {header.exponent} ".encode() + shard.payload).digest()


@dataclass(slots=True)
class _Snapshot:
    """A model at one moment, as it is served."""

    shards: list[EncodedShard]
    digests: bytes
    version: int
    made_at: float
    used_at: float


class StateServer:
    """Serves our model to newcomers, from snapshots that are held while they are asked for.

    A snapshot takes two bytes for each parameter.

    Args:
        layout: Of the model.
        read: Gives its values now, float32 (size,), not copied, and the steps that it has learned.
    """

    def __init__(self, layout: ShardLayout, read: Callable[[], tuple[Vector, int]]) -> None:
        self._layout = layout
        self._read = read
        self._snapshot: _Snapshot | None = None
        self._lock = trio.Lock()

    def start(self, node: Node) -> None:
        """Answer from now on, in tasks of the node."""
        node.serve_calls(MANIFEST, self._serve_manifest)
        node.serve_calls(STATE, self._serve_shards)

    async def renew(self) -> None:
        """Take a snapshot of the model as it is now."""
        values, version = self._read()
        shards, digests = await trio.to_thread.run_sync(self._encode, values, version)
        now = trio.current_time()
        self._snapshot = _Snapshot(shards, digests, version, made_at=now, used_at=now)

    def let_go(self) -> None:
        """Forget a snapshot that nobody asks for any more; to be called now and then."""
        kept = self._snapshot
        if kept is not None and trio.current_time() - kept.used_at > SNAPSHOT_IDLE_S:
            self._snapshot = None

    def _encode(self, values: Vector, version: int) -> tuple[list[EncodedShard], bytes]:
        # Training may go on meanwhile: every number is one that we had.
        layout = self._layout
        shards = [
            encode_shard(
                layout,
                shard,
                values[layout.bounds(shard)].copy(),
                codec=SNAPSHOT_CODEC,
                version=version,
            )
            for shard in range(layout.shard_count)
        ]
        return shards, b"".join(map(shard_digest, shards))

    async def _serve_manifest(self, call: Call[Manifest, FetchManifest]) -> None:
        request, _ = await call.receive()
        self._check(request.layout)
        async with self._lock:  # who asks meanwhile is given the same
            if self._is_outdated():
                await self.renew()
            kept = self._snapshot
        assert kept is not None, "taken above"
        kept.used_at = trio.current_time()
        await call.send(Manifest(kept.version), kept.digests)

    def _is_outdated(self) -> bool:
        kept, now = self._snapshot, trio.current_time()
        if kept is None or now - kept.made_at > SNAPSHOT_AGE_MAX_S:
            return True
        return now - kept.made_at > SNAPSHOT_FRESH_S and now - kept.used_at > SNAPSHOT_IDLE_S

    async def _serve_shards(self, call: Call[ShardHeader, FetchShards]) -> None:
        request, _ = await call.receive()
        self._check(request.layout)
        for shard, digest in request.wanted:
            kept = self._snapshot
            start = shard * DIGEST_BYTES
            if kept is None or kept.digests[start : start + DIGEST_BYTES] != digest:
                raise RequestRefused("it no longer holds that state")
            kept.used_at = trio.current_time()
            await call.send(kept.shards[shard].header, kept.shards[shard].payload)

    def _check(self, layout: bytes) -> None:
        if layout != self._layout.hash:
            raise RequestRefused("its model has another shape")


class StateFetch:
    """Fetches models, the most promising first, until the caller has what it wants.

    Args:
        node: We.
        layout: Of the model.
        sources: Who learns it.
    """

    def __init__(self, node: Node, layout: ShardLayout, sources: Sequence[PeerId]) -> None:
        self._node = node
        self._layout = layout
        self._sources = sources[:SOURCES_MAX]
        self._manifests: dict[PeerId, Digests] | None = None
        self._versions: dict[PeerId, int] = {}
        self._tried: set[bytes] = set()
        self._values = np.empty(layout.space.size, dtype=np.float32)
        self._held = np.zeros(layout.shard_count, dtype=f"V{DIGEST_BYTES}")  # of `_values`

    async def next_model(self) -> Vector | None:
        """Return a model that was not returned before, verified; None if there is no more.

        Returns:
            float32 (size,), overwritten by the next call.
        """
        if self._manifests is None:
            self._manifests = {}
            async with trio.open_nursery() as nursery:
                for source in self._sources:
                    nursery.start_soon(self._ask_manifest, source)
        while len(self._tried) < TRIES_MAX:
            owners = [
                source
                for source, digests in self._manifests.items()
                if digests.tobytes() not in self._tried
            ]
            if not owners:
                return None
            chosen = self._manifests[max(owners, key=self._promise)]
            self._tried.add(chosen.tobytes())
            if await self._complete(chosen):
                return self._values
        return None

    def _promise(self, owner: PeerId) -> tuple[int, int]:
        """Return by what manifests are compared: shards at all sources, and steps learned."""
        assert self._manifests is not None, "asked for before"
        own = self._manifests[owner]
        holders = sum(int((own == other).sum()) for other in self._manifests.values())
        return holders, self._versions[owner]

    async def _ask_manifest(self, source: PeerId) -> None:
        assert self._manifests is not None, "made before"
        request = FetchManifest(self._layout.hash)
        try:
            peer = await self._node.connect(source)
            async with peer.start_call(MANIFEST, request, timeout_s=MANIFEST_TIMEOUT_S) as call:
                manifest, payload = await call.receive()
            if len(payload) != DIGEST_BYTES * self._layout.shard_count:
                raise DecodeError(f"a manifest of {len(payload)} bytes")
        except (NatswarmError, trio.EndOfChannel) as error:
            logger.info("no manifest from %s: %s", source.short, error)
            return
        self._manifests[source] = np.frombuffer(payload, dtype=self._held.dtype)
        self._versions[source] = manifest.version

    async def _complete(self, chosen: Digests) -> bool:
        """Fetch what we lack of one manifest; return whether all of it came."""
        assert self._manifests is not None, "asked for before"
        missing = np.flatnonzero(self._held != chosen).tolist()
        while missing:
            missing_count = len(missing)
            async with trio.open_nursery() as nursery:
                for source, digests in list(self._manifests.items()):
                    has = digests == chosen
                    nursery.start_soon(self._fetch_from, source, has, chosen, missing)
            if len(missing) == missing_count:
                return False
        return True

    async def _fetch_from(
        self, source: PeerId, has: NDArray[np.bool_], chosen: Digests, missing: list[int]
    ) -> None:
        """Take shards off the list and fetch them, until one source has no more of them."""
        assert self._manifests is not None, "asked for before"
        while wanted := [shard for shard in missing if has[shard]][:SHARDS_PER_FETCH]:
            for shard in wanted:
                missing.remove(shard)
            try:
                await self._fetch(source, wanted, chosen)
            except DecodeError as error:
                logger.warning("%s serves wrong shards: %s", source.short, error)
                self._manifests.pop(source, None)
                return
            except (NatswarmError, trio.EndOfChannel) as error:
                logger.info("could not fetch from %s: %s", source.short, error)
                return
            finally:
                missing += wanted

    async def _fetch(self, source: PeerId, wanted: list[int], chosen: Digests) -> None:
        """Fetch some shards, and take those that came off the list."""
        peer = await self._node.connect(source)
        request = FetchShards(
            self._layout.hash, tuple((shard, chosen[shard].tobytes()) for shard in wanted)
        )
        async with peer.start_call(STATE, request, timeout_s=SHARDS_TIMEOUT_S) as call:
            for shard in list(wanted):
                header, payload = await call.receive()
                if header.shard != shard:
                    raise DecodeError(f"shard {header.shard} in place of {shard}")
                if shard_digest(EncodedShard(header, payload)) != chosen[shard].tobytes():
                    raise DecodeError(f"shard {shard} is not what the manifest names")
                values = decode_shard_untrusted(self._layout, header, payload)
                self._values[self._layout.bounds(shard)] = values
                self._held[shard] = chosen[shard]
                wanted.remove(shard)
