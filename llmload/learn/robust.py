"""How much of what a peer sends is believed: by what it sends, never by what it says of itself.

Four tests, from the cheapest on:

    NaN, infinity   never get here: a shard that holds one is not decoded
    length          updates are cut to 1.5 times the median length of the latest from everybody
                    (CenteredClip around zero): who scales its updates up gains no more than that
    direction       how far an update points where those of the others in the same step point, each
                    as far as it is believed, over many: honest peers agree, random numbers do not,
                    flipped signs disagree
    hook            what anybody else knows of the peer, a factor in 0..1

The weight is the product. Single directions say little, since much of each update is noise: so a
peer is judged by many, in a sequential test of whether it agrees a tenth as much as most of those
do who sent something for the same step, or not at all. Text may be so unusual that honest peers
agree that little; it may take a hundred shards to tell them from random numbers, and a dozen to
find flipped signs. Who is new counts in full, because its length is cut already and doubt would
hold back every newcomer; who is doubted comes back if later shards agree. Nobody is doubted unless
most of at least three others clearly agree: between two or three peers, and where liars are half of
all, there is no such test.

Source: Karimireddy, He and Jaggi 2021, "Learning from History for Byzantine Robust Optimization"
(CenteredClip); Wald 1945, "Sequential Tests of Statistical Hypotheses".

This file does not know shards, models or the network.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
# little late in training.
MEMORY = 1 / 100
# Whose spread is known well enough.
PROBATION_COUNT = 4
# Who disagrees may have other text. It is suspect only where most of at least so many others agree.
JURY_MIN = 3
# Standard errors above zero at which agreement is clear.
CLEAR = 2.0
# Who agrees so much, of what is usual, is honest for all we know: a peer whose text is of its own
# kind among seven of Python agrees a tenth to a fifth as much as they do.
HONEST_SHARE = 0.1
# Evidence is the logarithm of the odds that a peer is honest, and even at first. A single shard
# says only so much, for its spread is an estimate; odds of 1 to 20 are full doubt. Evidence ends
# where some dozens of shards that say the opposite can turn it, and for who was honest for long
# some more: when little is left to learn, gradients of unlike texts point away from each other.
EVIDENCE_OF_ONE_MAX = 1.0
DOUBT_MAX = 3.0
EVIDENCE_MIN, EVIDENCE_MAX = -6.0, 10.0
# More than anybody exchanges with in the time that a standing lasts.
PEERS_MAX = 1024


@dataclass(slots=True)
class _Standing:
    """What a peer's updates were like: running mean and variance of their agreement.

    Attributes:
        evidence: That it is honest, the logarithm of the odds.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    evidence: float = 0.0

    def add(self, agreement: float) -> None:
        self.count += 1
        share = max(MEMORY, 1 / self.count)
        difference = agreement - self.mean
        self.mean += share * difference
        self.variance += share * (difference * difference - self.variance)

    def weigh(self, agreement: float, usual: float) -> None:
        """Add the evidence of one agreement, where most others' is about `usual`.

        It is that of a normal distribution around a share of the usual, against one around zero.
        """
        honest = HONEST_SHARE * usual
        odds = honest * (agreement - honest / 2) / (self.variance + 1e-12)
        odds = max(-EVIDENCE_OF_ONE_MAX, min(EVIDENCE_OF_ONE_MAX, odds))
        self.evidence = max(EVIDENCE_MIN, min(EVIDENCE_MAX, self.evidence + odds))

    @property
    def clarity(self) -> float:
        """How many standard errors the mean agreement is above zero."""
        error = math.sqrt(self.variance * max(MEMORY, 1 / self.count))
        return self.mean / (error + 1e-12)

    @property
    def trust(self) -> float:
        """1 where nothing speaks against the peer, 0 where all but surely it lies."""
        return min(1.0, max(0.0, 1 + self.evidence / DOUBT_MAX))


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

    def note(self, agreements: Mapping[PeerId, float]) -> None:
        """Remember what came for a shard in one step.

        Args:
            agreements: How far what a peer sent points where that of the others does, -1..1.
        """
        for peer, agreement in agreements.items():
            standing = self._standings.pop(peer, None) or _Standing()
            standing.add(agreement)
            self._standings[peer] = standing  # the last, so those first who were not heard for long
        while len(self._standings) > PEERS_MAX:
            # A liar gains nothing by it that a new identity would not give.
            del self._standings[next(iter(self._standings))]
        known = [
            (standing, agreement)
            for peer, agreement in agreements.items()
            if (standing := self._standings[peer]).count >= PROBATION_COUNT
        ]
        if len(known) <= JURY_MIN:
            return
        clarities = sorted(standing.clarity for standing, _ in known)
        means = sorted(standing.mean for standing, _ in known)
        for standing, agreement in known:
            if _middle_without(clarities, standing.clarity) >= CLEAR:
                standing.weigh(agreement, _middle_without(means, standing.mean))

    def belief(self, peer: PeerId) -> float:
        """Return the factor by which to take what a peer sends, 0..1."""
        standing = self._standings.get(peer)
        trust = 1.0 if standing is None else standing.trust
        reputation = 1.0 if self._reputation is None else self._reputation(peer)
        return trust * min(1.0, max(0.0, reputation))


def _middle_without(ordered: Sequence[float], one: float) -> float:
    """Return the median of rising numbers without one of them.

    The lower of two in the middle: half of the others are not most of them.
    """
    middle = (len(ordered) - 2) // 2
    return ordered[middle + (one <= ordered[middle])]


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
