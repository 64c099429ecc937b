"""Who learns with whom, and who passes updates on between two that can't reach each other.

Learners tell their partners whom else they exchange with. Where two partners of ours do not have
each other, one of those that have both passes their updates on: drawn by a hash of the pair, so all
of them draw the same without a word. So everybody hears everybody, as long as somebody has both.

Whose updates nobody passes on is told, too: what a learner misses changes what its own updates
count (`OuterLoop.publish`).

This file does not know updates, or how they travel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import chain

from llmload.learn.mixing import reducer
from natswarm import PeerId

__all__ = ["Acquaintances"]

# What the share of our partners must be that learn with somebody whom we don't hear.
TOLD_BY_SHARE = 0.25


class Acquaintances:
    """What partners have told of their partners.

    Args:
        me: Our own PeerId.
    """

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self._partners_of: dict[PeerId, frozenset[PeerId]] = {}

    def tell(self, peer: PeerId, keys: Iterable[bytes]) -> None:
        """Take note of whom a partner exchanges with, by public key."""
        self._partners_of[peer] = frozenset(map(PeerId, keys))

    def forget(self, peer: PeerId) -> None:
        """Forget what a partner has told, which is none any more."""
        self._partners_of.pop(peer, None)

    def targets(self, origin: PeerId) -> list[PeerId]:
        """Return to whom we are to pass the updates of a partner."""
        theirs = self._partners_of.get(origin)
        if theirs is None:
            return []
        return [
            peer
            for peer, partners in self._partners_of.items()
            if peer != origin
            and peer not in theirs
            and origin not in partners
            and self._is_drawn(origin, peer, theirs & partners)
        ]

    def _is_drawn(self, a: PeerId, b: PeerId, common: frozenset[PeerId]) -> bool:
        pair = int.from_bytes(a.key[:8]) ^ int.from_bytes(b.key[:8])
        return self._me in common and reducer(list(common), part=pair, round_number=0) == self._me

    def unheard_count(self, heard: Collection[PeerId]) -> int:
        """Return how many learn with our partners, and are not among those whom we hear.

        Some partners have to say so: one among many may make them up.
        """
        told = Counter(chain.from_iterable(self._partners_of.values()))
        enough = math.ceil(TOLD_BY_SHARE * len(self._partners_of))
        return sum(
            count >= enough
            for peer, count in told.items()
            if peer != self._me and peer not in heard
        )
