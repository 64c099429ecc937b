"""Repeat a step over other peers now and then, and leave those alone whose numbers are wrong.

A stage that computes nonsense, by a fault or on purpose, gives text that may well look fine. So a
share of all steps is computed again: over a route that is cut at the same blocks, with other peers
wherever there are any. The notes that come with both (`receipt.py`) tell which stage differs first.
That two differ does not tell which of them is right: a third decides, if there is one; otherwise
both come last from then on.

For the stages a repetition is a session like any other. What was drawn before the check is done is
given out: this finds bad stages, it does not take back their words. Two that agree to lie, and are
asked as two of three, get through.

This file does not know how sessions are opened, nor text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import trio

from llmload.swarm.directory import StageDirectory
from llmload.swarm.receipt import TOLERANCES, first_difference
from llmload.swarm.route import HopFailed, StageOffer
from llmload.swarm.route_session import Drawn, SequenceTerms, TokenDesk

__all__ = ["SpotChecker"]

# A check may take its time; the answer does not wait for it.
CHECK_S = 60.0


class SpotChecker:
    """Checks the steps of one sequence, one at a time.

    Args:
        nursery: Runs the checks.
        desk: Opens their sessions.
        directory: Knows other peers, and is told of bad ones.
        terms: What is computed.
        share: Of the steps that are repeated, 0..1.
        tell: Told of stages that were found wrong.
        rng: Decides which steps.

    Attributes:
        check_count: Steps that were repeated and compared.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        desk: TokenDesk,
        directory: StageDirectory,
        terms: SequenceTerms,
        *,
        share: float,
        tell: Callable[[str], None],
        rng: random.Random,
    ) -> None:
        self.check_count = 0
        self._nursery = nursery
        self._desk = desk
        self._directory = directory
        self._terms = terms
        self._share = share
        self._tell = tell
        self._rng = rng
        self._is_busy = False

    def maybe_check(
        self, route: tuple[StageOffer, ...], token_ids: Sequence[int], drawn: Drawn
    ) -> None:
        """Repeat a step in the background, if chance wills.

        Args:
            route: Who computed it.
            token_ids: The sequence up to its last row, guesses included.
            drawn: What came back.
        """
        if not self._is_busy and self._rng.random() < self._share:
            self._is_busy = True
            self._nursery.start_soon(self._check, route, tuple(token_ids), drawn)

    async def _check(
        self, route: tuple[StageOffer, ...], token_ids: tuple[int, ...], drawn: Drawn
    ) -> None:
        try:
            other = tuple(self._directory.replica(offer, ()) or offer for offer in route)
            if other == route:
                return
            theirs = await self._repeat(other, token_ids)
            if theirs is None:
                return
            self.check_count += 1
            index = first_difference(drawn.receipts, theirs, TOLERANCES[self._terms.codec])
            if index is not None:
                await self._judge(index, (route, drawn.receipts), (other, theirs), token_ids)
        finally:
            self._is_busy = False

    async def _judge(
        self,
        index: int,
        one: tuple[tuple[StageOffer, ...], tuple[bytes, ...]],
        other: tuple[tuple[StageOffer, ...], tuple[bytes, ...]],
        token_ids: tuple[int, ...],
    ) -> None:
        """Find out which of two stages is wrong, and leave it alone."""
        suspects = [one[0][index], other[0][index]]
        third = self._directory.replica(suspects[0], [suspect.peer_id for suspect in suspects])
        third_receipts = None
        if third is not None:
            route = (*other[0][:index], third, *other[0][index + 1 :])
            third_receipts = await self._repeat(route, token_ids)
        if third_receipts is not None:
            upto, tolerance = index + 1, TOLERANCES[self._terms.codec]
            wrong = [
                suspect
                for suspect, (_, receipts) in zip(suspects, (one, other), strict=True)
                if first_difference(receipts[:upto], third_receipts[:upto], tolerance) is not None
            ]
            if len(wrong) == 1:
                self._directory.distrust(wrong[0])
                self._tell(f"{wrong[0]} gave wrong numbers and is left alone")
                return
        for suspect in suspects:
            self._directory.blame(suspect.peer_id)
        self._tell(f"{suspects[0]} and {suspects[1]} give different numbers; others come first")

    async def _repeat(
        self, route: tuple[StageOffer, ...], token_ids: tuple[int, ...]
    ) -> tuple[bytes, ...] | None:
        """Return what other stages make of the same tokens; None if they fail."""
        try:
            session = await self._desk.open(self._nursery, route, self._terms, open_s=CHECK_S)
        except HopFailed:
            return None
        try:
            return (await session.advance(token_ids, timeout_s=CHECK_S)).receipts
        except HopFailed:
            return None
        finally:
            await session.aclose()
