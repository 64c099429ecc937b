"""How much of what a peer sends is believed: by what it sends, never by what it says of itself.

Four tests, from the cheapest on:

    NaN, infinity   never get here: a shard that holds one is not decoded
    length          updates are cut to 1.5 times the median length of the latest from everybody
                    (CenteredClip around zero): who scales its updates up gains nothing
    direction       how far an update points where those of the others in the same step point, each
                    as far as it is believed, over many: honest peers agree, random numbers do not,
                    flipped signs disagree
    hook            what anybody else knows of the peer, a factor in 0..1

The weight is the product. Single directions say little, since much of each update is noise: so a
peer is judged by the mean of many, against its own spread, by a sequential test of whether it
agrees a quarter as clearly as most do, or not at all, or less. Who is new counts in full, because
its length is cut already and doubt would hold back every newcomer, and first of all those whose
text is unusual; who does not agree fades out, flipped signs after some five shards, random numbers
after dozens, and comes back if later ones agree. But text may differ so much that honest peers
disagree: so nobody is doubted unless most of the others clearly agree. Between two or three peers,
and where liars are the majority, there is no such test.

Source: Karimireddy, He and Jaggi 2021, "Learning from History for Byzantine Robust Optimization"
(CenteredClip); Wald 1945, "Sequential Tests of Statistical Hypotheses".

This file does not know shards, models or the network.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from llmload.learn.space import Vector
from natswarm import PeerId

__all__ = ["Judge", "Reputation", "cosine", "length_of"]

# What is known of a peer from elsewhere: a factor in 0..1.
Reputation: TypeAlias = Callable[[PeerId], float]

LENGTHS_KEPT = 32
# An update of twice the median length is rare among honest peers; there is no need to shorten it.
LENGTH_FACTOR = 1.5
# Weight of the newest agreement in its mean: the memory of about 100 shards. Honest updates agree
# little late in training, and with 30 random numbers passed too often.
MEMORY = 1 / 100
PROBATION_COUNT = 4
# Who disagrees may have other text. It is suspect only where most of at least so many others agree.
JURY_MIN = 3
# Standard errors above zero at which agreement is clear.
CLEAR = 2.0
# Who agrees at least so clearly, of what is usual, is honest for all we know.
HONEST_SHARE = 0.25
# Logarithm of the odds against that at which nothing is believed any more, 1 in 20.
DOUBT_MAX = 3.0
# More than anybody exchanges with in the time that a standing lasts.
PEERS_MAX = 1024


@dataclass(slots=True)
class _Standing:
    """What a peer's updates were like: running mean and variance of their agreement."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, agreement: float) -> None:
        self.count += 1
        share = max(MEMORY, 1 / self.count)
        difference = agreement - self.mean
        self.mean += share * difference
        self.variance += share * (difference * difference - self.variance)

    @property
    def remembered(self) -> float:
        """How many shards the mean is of."""
        return min(self.count, 1 / MEMORY)

    @property
    def contrast(self) -> float:
        """The mean agreement in standard deviations of a single one."""
        return self.mean / (math.sqrt(self.variance) + 1e-12)

    @property
    def clarity(self) -> float:
        """How many standard errors the mean agreement is above zero."""
        return self.contrast * math.sqrt(self.remembered)


class Judge:
    """Weighs what all peers send, shard by shard.

    Args:
        reputation: A factor in 0..1 for each peer, from outside; None for 1.
    """

    def __init__(self, reputation: Reputation | None = None) -> None:
        self._reputation = reputation
        self._lengths: dict[int, deque[float]] = {}
        self._standings: dict[PeerId, _Standing] = {}

    def agreement(self, peer: PeerId) -> float:
        """Return the mean cosine of a peer's updates with the others'; 0 if nothing came."""
        standing = self._standings.get(peer)
        return 0.0 if standing is None else standing.mean

    def cut(self, shard: int, lengths: Sequence[float]) -> list[float]:
        """Return the factors that bring updates to the usual length of a shard, 0..1.

        Args:
            shard: Which; each has a usual length of its own.
            lengths: Euclidean, of all that came for one step; they are remembered as they were cut.
        """
        known = self._lengths.setdefault(shard, deque(maxlen=LENGTHS_KEPT))
        # The lower one: of ours and a liar's, ours.
        longest = LENGTH_FACTOR * statistics.median_low([*known, *lengths])
        factors = [min(1.0, longest / length) if length > 0 else 1.0 for length in lengths]
        known.extend(length * factor for length, factor in zip(lengths, factors, strict=True))
        return factors

    def note(self, peer: PeerId, agreement: float) -> None:
        """Remember how far a shard of a peer's points where those of the others do, -1..1."""
        if peer not in self._standings and len(self._standings) >= PEERS_MAX:
            # The one heard of first; a liar gains nothing by it that a new identity would not give.
            del self._standings[next(iter(self._standings))]
        self._standings.setdefault(peer, _Standing()).add(agreement)

    def belief(self, peer: PeerId) -> float:
        """Return the factor by which to take what a peer sends, 0..1."""
        standing = self._standings.get(peer)
        trust = 1.0 if standing is None else self._trust(peer, standing)
        reputation = 1.0 if self._reputation is None else self._reputation(peer)
        return trust * min(1.0, max(0.0, reputation))

    def _trust(self, peer: PeerId, standing: _Standing) -> float:
        """Return 1 where nothing speaks against a peer, 0 where it alone surely does not agree."""
        jury = [
            other
            for other_id, other in self._standings.items()
            if other_id != peer and other.count >= PROBATION_COUNT
        ]
        if (
            standing.count < PROBATION_COUNT
            or len(jury) < JURY_MIN
            or statistics.median(other.clarity for other in jury) < CLEAR
        ):
            return 1.0
        honest = HONEST_SHARE * statistics.median(other.contrast for other in jury)
        seen = standing.contrast
        lying = min(0.0, seen)
        # The logarithm of the odds that normal agreements of the one contrast were drawn, not of
        # the other.
        odds = standing.remembered * ((seen - lying) ** 2 - (seen - honest) ** 2) / 2
        return min(1.0, max(0.0, 1 + odds / DOUBT_MAX))


def length_of(values: Vector) -> float:
    """Return the Euclidean length of what somebody sent, whose squares may not fit float32.

    Not by BLAS: its sums depend on the processor, on which all must agree, and on a busy machine
    its threads take thirty times as long for a shard.
    """
    return math.sqrt(float(np.square(values, dtype=np.float64).sum()))


def cosine(values: Vector, others: Vector) -> float:
    """Return the cosine between an update and the others', where the update is not zero."""
    both = length_of(values) * length_of(others[values != 0])
    product = float(np.multiply(values, others, dtype=np.float64).sum())
    return product / both if both > 0 else 0.0
