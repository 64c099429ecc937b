"""Updates that wait for the next step of the anchor, and who was heard when.

They are kept as they came, encoded: that is a tenth of their size. One peer can fill no more than a
few updates' room; one whose version is not new is a repetition.

This file does not know models, weights or time: steps are the caller's count.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmload.learn.shards import (
    EncodedShard,
    ShardHeader,
    ShardLayout,
    Vector,
    decode_shard_untrusted,
)
from natswarm import PeerId

__all__ = ["WAITING_MAX", "Contribution", "Inbox", "Partner", "usual_waiting"]

# Updates of one peer that wait for a step: more are a flood, or its device is too fast for ours.
WAITING_MAX = 4
PARTNER_COUNT_MAX = 1024
# Who misses more updates in a row than a bad link costs was away. Versions that rise by thousands
# are of a peer that began anew (`OuterLoop`).
MISSED_MIN, MISSED_MAX = 16, 100_000


@dataclass(slots=True)
class Partner:
    """A peer that sends us updates, or is to.

    Attributes:
        versions: int64 (shard_count,), the latest that we took of each shard.
        waiting: int64 (shard_count,), updates of each shard for the next step.
        met_at: Our version when we met: it could not have seen earlier ones.
        heard_at: Our step when its latest was whole, or what counts as that for one just met.
        seen: The latest version of it that is part of our anchor.
        missed_at: Our step when one came after many that did not; None for never.
    """

    versions: NDArray[np.int64]
    waiting: NDArray[np.int64]
    met_at: int
    heard_at: int
    seen: int = 0
    missed_at: int | None = None


@dataclass(frozen=True, slots=True)
class Contribution:
    """A shard of somebody's update, and its weight by age."""

    peer: PeerId
    shard: EncodedShard
    weight: float

    def decode(self, layout: ShardLayout) -> Vector:
        """Return its values, float32; it was decoded before, to see that it can be."""
        return decode_shard_untrusted(layout, self.shard.header, self.shard.payload)


class Inbox:
    """What came in for the next step.

    Args:
        shard_count: Of the model.
    """

    def __init__(self, shard_count: int) -> None:
        self._partners: dict[PeerId, Partner] = {}
        self._waiting: list[list[Contribution]] = [[] for _ in range(shard_count)]

    def seen(self, peer: PeerId) -> int:
        """Return the latest version of a peer that was taken for a step; 0 for none."""
        partner = self._partners.get(peer)
        return 0 if partner is None else partner.seen

    def meet(self, peer: PeerId, *, version: int, step: int) -> Partner:
        """Return what is known of a peer; of a new one, that we met at our `version` and `step`."""
        if peer not in self._partners:
            if len(self._partners) >= PARTNER_COUNT_MAX:
                del self._partners[next(iter(self._partners))]  # the one met first
            versions, waiting = np.zeros((2, len(self._waiting)), dtype=np.int64)
            self._partners[peer] = Partner(versions, waiting, version, step)
        return self._partners[peer]

    def forget(self, peer: PeerId) -> None:
        """Forget a peer, and what waits of it."""
        if self._partners.pop(peer, None) is not None:
            for shard, waiting in enumerate(self._waiting):
                self._waiting[shard] = [each for each in waiting if each.peer != peer]

    def heard_since(self, step: float) -> list[Partner]:
        """Return those whose latest update came after a step of ours."""
        return [partner for partner in self._partners.values() if partner.heard_at > step]

    def note(self, partner: Partner, header: ShardHeader, step: int) -> bool:
        """Take note that a shard came; False if it is a repetition, or there is no room for it."""
        shard = header.shard
        if header.version <= partner.versions[shard] or partner.waiting[shard] >= WAITING_MAX:
            return False
        latest = int(partner.versions[shard])
        if latest and MISSED_MIN < header.version - latest < MISSED_MAX:
            partner.missed_at = step
        partner.versions[shard] = header.version
        if partner.versions.min() == header.version:
            partner.heard_at = step
        return True

    def put(self, contribution: Contribution, partner: Partner | None = None) -> None:
        """Keep a shard for the next step; ours has no partner."""
        shard = contribution.shard.header.shard
        self._waiting[shard].append(contribution)
        if partner is not None:
            partner.waiting[shard] += 1

    def clear(self) -> None:
        """Drop what waits."""
        for waiting in self._waiting:
            waiting.clear()
        for partner in self._partners.values():
            partner.waiting[:] = 0
            partner.missed_at = None

    def take(self, most: int = WAITING_MAX) -> list[list[Contribution]]:
        """Take out the earliest updates of everybody, at most so many of each, by shard."""
        taken: list[list[Contribution]] = []
        for shard, waiting in enumerate(self._waiting):
            counts: Counter[PeerId] = Counter()
            now: list[Contribution] = []
            later: list[Contribution] = []
            for each in waiting:
                counts[each.peer] += 1
                (now if counts[each.peer] <= most else later).append(each)
            for each in now:
                if (partner := self._partners.get(each.peer)) is not None:
                    partner.waiting[shard] -= 1
                    partner.seen = max(partner.seen, each.shard.header.version)
            self._waiting[shard] = later
            taken.append(now)
        return taken


def usual_waiting(partners: Sequence[Partner]) -> float:
    """Return how many whole updates of a peer wait, in the median; 0 without any."""
    return statistics.median(each.waiting.min() for each in partners) if partners else 0.0
