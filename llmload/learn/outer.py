"""Learning together without waiting: every peer publishes what it learned, and takes what comes.

    anchor     what all of this peer's model is made of that it shares: everybody's published
               updates, and its own
    movement   parameters - anchor, after `local_steps` steps on our own text: the pseudo-gradient
    residual   movement that was not published yet

Every `local_steps` steps a peer adds its movement to the residual, publishes the largest values of
it, keeps the rest (error feedback), and goes on from anchor + rate * published. What others publish
is added to anchor and parameters, times the same rate, between any two steps (`merge`). There is no
round and no barrier: what comes late is taken late, what never comes is not waited for. But delay
costs: until an update is there, everybody learns the same thing again. So updates leave after
several steps, and take much less time than those.
An update is weighed by its staleness, which is how many of our own updates its sender had not taken
(1 / sqrt(staleness / 8) beyond 8), and by `robust.Judge`; its sender never chooses its weight.

The rate is min(2, sqrt(crowd)) / crowd, where the crowd is the number of updates, ours among them,
that come in for each one of ours: a mean, and more. Steps of AdamW are as long as their noise, so
their mean over n peers is up to sqrt(n) times too short; more than 2 was unstable. Alone the crowd
is 1: then the whole movement is kept, and the loop is plain training.

Updates add up in any order to the same model, but for what was lost, and for weights that differ
between receivers. So peers drift apart slowly, and pairs average one shard of their anchors now and
then (`average_shard`), cut to the usual distance (ClippedGossip).

Source: DiLoCo (arXiv 2311.08105) for pseudo-gradients; SparseLoCo (2508.15706) for the largest
values with error feedback; FedBuff (2106.06639) for weights by staleness; He, Karimireddy and Jaggi
2022 (2202.01545) for ClippedGossip.

This file does not know clocks, streams, or how the local steps are made.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmload.learn.codecs import Codec
from llmload.learn.robust import Judge, Reputation
from llmload.learn.shards import (
    EncodedShard,
    ShardHeader,
    ShardLayout,
    Vector,
    decode_shard_untrusted,
    encode_shard,
)
from natswarm import DecodeError, PeerId

__all__ = ["AVERAGE_CODEC", "OuterLoop", "OuterSettings", "OuterStatistics", "Update"]

# Of models that are averaged and fetched: 0.05 % of each weight is much less than a step.
AVERAGE_CODEC = Codec.FP16
# Updates cross on the way; up to here that is no staleness. If each weighed those of the others
# less than its own, models would drift apart by what they weigh differently.
STALENESS_FREE = 8
# How much of the mean crowd the newest count is.
CROWD_MEMORY = 0.1
# Bound of sqrt(crowd) in the rate.
GAIN_MAX = 2.0
# How much of our direction each movement leaves of what it was: the memory of some ten updates.
DIRECTION_MEMORY = 0.9
# Updates of one peer for each of ours: the fastest phone is not ten times ours, and a flood of
# updates must not drown everybody else's.
UPDATES_PER_OURS_MAX = 8
# Distances between anchors that are remembered to know what is usual, and from when on they are.
DISTANCES_KEPT = 64
DISTANCES_MIN = 8
# Anchors that lie further apart than this many usual distances are pulled no harder.
DISTANCE_FACTOR = 2.0
PARTNER_COUNT_MAX = 1024


@dataclass(frozen=True, kw_only=True)
class OuterSettings:
    """How often and how much a peer publishes.

    Attributes:
        local_steps: Steps between two updates.
        density: Share of the values that one update holds; 1 for all, as int8.
        staleness_max: Updates whose sender had not taken so many of ours are too old.
    """

    local_steps: int = 4
    density: float = 0.025
    staleness_max: int = 64

    def __post_init__(self) -> None:
        if self.local_steps < 1 or not 0 < self.density <= 1 or self.staleness_max < 0:
            raise ValueError(f"these are no settings to learn with: {self}")


@dataclass(frozen=True, slots=True)
class Update:
    """What a peer publishes; everybody gets the same.

    Attributes:
        version: Rising by 1.
        shards: Encoded, in the order of the layout. What they hold of `seen` is for nobody yet.
        payload_bytes: Of all shards; headers (about 90 bytes each) not counted.
    """

    version: int
    shards: tuple[EncodedShard, ...]
    payload_bytes: int


@dataclass(slots=True)
class OuterStatistics:
    """Shards that came in, and what became of them.

    Attributes:
        taken: Made part of our model, with some weight.
        weight: The sum of those weights.
        stale: Too old.
        doubted: Weighed nothing: by their direction or their sender's reputation.
        repeated: Came before, or too many from one peer.
        damaged: Could not be decoded, or were for another model.
        averaged: Of others' anchors.
    """

    taken: int = 0
    weight: float = 0.0
    stale: int = 0
    doubted: int = 0
    repeated: int = 0
    damaged: int = 0
    averaged: int = 0


@dataclass(slots=True)
class _Partner:
    """A peer that sent us something.

    Attributes:
        versions: int64 (shard_count,), the latest that we took of each shard.
        counts: int64 (shard_count,), how many came since we published last.
        met_at: Our version when it sent its first: it could not have seen earlier ones.
    """

    versions: NDArray[np.int64]
    counts: NDArray[np.int64]
    met_at: int


class OuterLoop:
    """The part of one peer: movement in, updates out; others' updates in, movement out.

    Holds four vectors of the size of the model: anchor, residual, direction, and what came in.

    Args:
        layout: How the model is cut.
        parameters: float32 (size,), the trainer's own array. `publish`, `merge` and `average` write
            to it, so they must not run during a step.
        settings: How often and how much.
        reputation: A factor in 0..1 for each peer, from elsewhere; None for 1.
        version: To count updates from. Who begins anew must not begin below what it published
            before: its partners would take that for repetitions.
    """

    def __init__(
        self,
        layout: ShardLayout,
        parameters: Vector,
        settings: OuterSettings | None = None,
        *,
        reputation: Reputation | None = None,
        version: int = 0,
    ) -> None:
        self.layout = layout
        self.settings = settings or OuterSettings()
        self.version = version
        self.statistics = OuterStatistics()
        self._parameters = parameters
        self._judge = Judge(reputation)
        self._anchor = parameters.copy()
        self._residual = np.zeros_like(parameters)
        self._direction = np.zeros_like(parameters)
        self._incoming = np.zeros_like(parameters)
        self._has_incoming = False
        self._incoming_count = 0.0
        self._crowd = 1.0
        self._partners: dict[PeerId, _Partner] = {}
        self._distances: deque[float] = deque(maxlen=DISTANCES_KEPT)

    def vectors(self) -> dict[str, Vector]:
        """Return what a checkpoint needs, float32 (size,) each; not copies."""
        return {
            "anchor": self._anchor,
            "residual": self._residual,
            "direction": self._direction,
            "incoming": self._incoming,
        }

    def go_on_from(self, *, version: int, crowd: float) -> None:
        """Take the rest of a checkpoint, whose vectors are in place."""
        self.version, self._crowd = max(self.version, version), crowd
        self._has_incoming = bool(self._incoming.any())

    def restart(self) -> None:
        """Go on from parameters that somebody else has written."""
        self._anchor[:] = self._parameters
        for vector in (self._residual, self._direction, self._incoming):
            vector[:] = 0

    @property
    def crowd(self) -> float:
        """Updates that come in for each one of ours, ours among them; 1 while we are alone."""
        return self._crowd

    @property
    def anchor(self) -> Vector:
        """The part of our model that is shared, float32 (size,); only to be read."""
        return self._anchor

    def seen(self, peer: PeerId) -> int:
        """Return the latest version of a peer that we took; 0 for none."""
        partner = self._partners.get(peer)
        return 0 if partner is None else int(partner.versions.max())

    def agreement(self, peer: PeerId) -> float:
        """Return how far a peer's updates point where our own text points, -1..1."""
        return self._judge.agreement(peer)

    # --- Ours --------------------------------------------------------------------------------

    def publish(self) -> Update:
        """End a stretch of local steps: take what came in, and return what others get.

        Raises:
            ValueError: The movement holds NaN or infinity: training has failed.
        """
        movement = self._end_stretch()
        self._residual += movement
        shards = []
        published = movement  # its memory: the values are in the residual now
        for shard in range(self.layout.shard_count):
            bounds = self.layout.bounds(shard)
            encoded = encode_shard(
                self.layout,
                shard,
                self._residual[bounds],
                codec=Codec.INT8X256 if self.settings.density == 1 else Codec.TOPK,
                version=self.version,
                density=self.settings.density,
            )
            shards.append(encoded)
            # As the others see it, with the rounding of the codec. The rest stays for next time.
            values = decode_shard_untrusted(self.layout, encoded.header, encoded.payload)
            published[bounds] = values
            self._judge.note_own(shard, float(np.linalg.norm(values)))
        self._residual -= published
        self._go_on(published)
        return Update(self.version, tuple(shards), sum(len(each.payload) for each in shards))

    def go_alone(self) -> None:
        """End a stretch of local steps when nobody is there to publish to: keep all of it."""
        movement = self._end_stretch()
        movement += self._residual
        self._residual[:] = 0
        self._anchor += movement
        movement[:] = 0
        self._go_on(movement)

    def _end_stretch(self) -> Vector:
        self.version += 1
        self._crowd += CROWD_MEMORY * (1 + self._incoming_count - self._crowd)
        self._incoming_count = 0.0
        movement: Vector = self._parameters - self._anchor
        self._direction *= np.float32(DIRECTION_MEMORY)
        self._direction += movement
        return movement

    def _go_on(self, own: Vector) -> None:
        own *= self._rate
        self._anchor += own
        for partner in self._partners.values():
            partner.counts[:] = 0
        self._parameters[:] = self._anchor
        self.merge()

    def merge(self) -> None:
        """Take what came in; the sooner, the less of it is learned again. Between any two steps."""
        if not self._has_incoming:
            return
        self._has_incoming = False
        self._incoming *= self._rate
        # Both, so that it is no movement of ours.
        self._anchor += self._incoming
        self._parameters += self._incoming
        self._incoming[:] = 0

    @property
    def _rate(self) -> np.float32:
        return np.float32(min(GAIN_MAX, math.sqrt(self._crowd)) / self._crowd)

    # --- Others' -----------------------------------------------------------------------------

    def receive(self, peer: PeerId, header: ShardHeader, payload: bytes) -> float:
        """Take one shard of somebody's update; may run during a local step.

        Whatever is wrong with it is counted in `statistics`, never raised.

        Returns:
            The weight it was taken with, 0..1; 0 if it was not.
        """
        try:
            values = decode_shard_untrusted(self.layout, header, payload)
        except DecodeError:
            self.statistics.damaged += 1
            return 0.0
        partner = self._partner(peer)
        if (
            header.version <= partner.versions[header.shard]
            or partner.counts[header.shard] >= UPDATES_PER_OURS_MAX
        ):
            self.statistics.repeated += 1
            return 0.0
        partner.versions[header.shard] = header.version
        partner.counts[header.shard] += 1
        # Who claims to have seen more of ours than there is has seen all: it can't gain by it.
        staleness = max(0, self.version - max(header.seen, partner.met_at))
        if staleness > self.settings.staleness_max:
            self.statistics.stale += 1
            return 0.0
        bounds = self.layout.bounds(header.shard)
        length = float(np.linalg.norm(values))
        weight = self._judge.weigh(
            peer, header.shard, length, _cosine(values, self._direction[bounds], length)
        )
        if weight == 0:
            self.statistics.doubted += 1
            return 0.0
        weight *= math.sqrt(STALENESS_FREE / max(staleness, STALENESS_FREE))
        self._incoming[bounds] += np.float32(weight) * values
        self._has_incoming = True
        self._incoming_count += 1 / self.layout.shard_count
        self.statistics.taken += 1
        self.statistics.weight += weight
        return weight

    def average(self, header: ShardHeader, payload: bytes) -> float:
        """Move one shard half of the way to a partner's anchor, which does the same.

        Where neither is further away than is usual, both end with the same bits: each takes both as
        they travelled, and a sum of two does not depend on their order.

        Returns:
            The share of the half way that was gone: 1, or less where the partner is further away
            than is usual; 0 if the shard was not decoded.
        """
        try:
            values = decode_shard_untrusted(self.layout, header, payload)
        except DecodeError:
            self.statistics.damaged += 1
            return 0.0
        bounds = self.layout.bounds(header.shard)
        anchor = self._anchor[bounds]
        distance = float(np.linalg.norm(values - anchor)) / math.sqrt(values.size)
        if len(self._distances) >= DISTANCES_MIN:
            usual = statistics.median(self._distances)
        else:
            usual = float(np.linalg.norm(self._direction)) / math.sqrt(self._direction.size)
        clip = min(1.0, DISTANCE_FACTOR * usual / distance) if distance > 0 else 1.0
        self._distances.append(distance * clip)
        sent = encode_shard(
            self.layout, header.shard, anchor, codec=AVERAGE_CODEC, version=header.version
        )
        middle = decode_shard_untrusted(self.layout, sent.header, sent.payload)
        middle += values
        middle *= np.float32(0.5)
        if clip < 1:
            middle = anchor + (middle - anchor) * np.float32(clip)
        # Our movement since the anchor stays what it was.
        movement = self._parameters[bounds] - anchor
        self._anchor[bounds] = middle
        self._parameters[bounds] = middle + movement
        self.statistics.averaged += 1
        return clip

    def _partner(self, peer: PeerId) -> _Partner:
        if peer not in self._partners:
            if len(self._partners) >= PARTNER_COUNT_MAX:
                del self._partners[next(iter(self._partners))]  # the one met first
            shape = self.layout.shard_count
            self._partners[peer] = _Partner(
                np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64), self.version
            )
        return self._partners[peer]


def _cosine(values: Vector, direction: Vector, length: float) -> float:
    """Return the cosine between an update and our direction, where the update is not zero."""
    ours = direction[values != 0]
    both = length * float(np.linalg.norm(ours))
    return float(values @ direction) / both if both > 0 else 0.0
