"""A request seen from its origin: how many paths, when the next one starts, when it is enough.

One path may die in a hole, or end at a liar who says "I am nearest, and there is nothing". So a
lookup has up to `ALPHA` paths, which no two nodes but the origin share (router.py sees to it), and
which end at different replicas. Where the answer proves itself (an introduction) the paths start
one after the other, as hedges; where the best of several answers counts, they start at once.

Source: Kademlia's alpha; disjoint paths from S/Kademlia; the test whether an answer can come from
the nearest node at all from Castro et al., "Secure routing for structured overlays" (2002).
Knows neither links nor records; the overlay starts the paths it asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from natswarm.errors import DecodeError
from natswarm.identity import PeerId
from natswarm.routing.protocol import (
    Answer,
    Fetched,
    Mode,
    digest_of,
    open_answer_untrusted,
)

__all__ = ["ALPHA", "GivenAnswer", "Lookup", "LookupPlan"]

# Kademlia's alpha. With a quarter of all nodes holes, a path of 6 hops lives with a chance of 0.18
# without retries; with them and three paths, docs/routing.md has what was measured.
ALPHA = 3

# A hedge starts when the first path has had time for a slow answer.
STAGGER_S = 2.0
# Once a record is there, the other paths get so long to bring a later one.
GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class LookupPlan:
    """How to look.

    Attributes:
        mode: How paths go.
        path_count: Paths, at most.
        stagger_s: Between their starts; 0 starts all at once.
        enough: So many good answers end it.
        patience_s: For each path.
        steps: Of a walk.
        has_grace: Whether after a first record the others have only `GRACE_S` more.
    """

    mode: Mode
    path_count: int = ALPHA
    stagger_s: float = 0.0
    enough: int = ALPHA
    patience_s: float = 7.0
    steps: int = 32
    has_grace: bool = False


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """An answer whose signature holds.

    Attributes:
        signer: Who gave it.
        answer: What it says.
    """

    signer: PeerId
    answer: Answer


class Lookup:
    """One lookup.

    Args:
        name: 16 bytes.
        plan: How to look.
        target: What for.
        request: Signed.
        answer_type: What kind of answer there is to it.
        now: When it starts.

    Attributes:
        answers: What genuine answers there are.
        first_hops: At whom its paths began.
        rejected_count: Answers that were forged, of the wrong kind or from the wrong node.
    """

    def __init__(
        self,
        name: bytes,
        plan: LookupPlan,
        target: bytes,
        request: bytes,
        answer_type: type[Answer],
        now: float,
    ) -> None:
        self.name = name
        self.plan = plan
        self.target = target
        self.request = request
        self.answers: list[GivenAnswer] = []
        self.first_hops: list[bytes] = []
        self.rejected_count = 0
        self._answer_type = answer_type
        self._digest = digest_of(request)
        self._good_count = 0
        self._to_start_count = plan.path_count
        self._open_count = 0
        self._next_start = now
        self._deadline = now + plan.patience_s + plan.stagger_s * (plan.path_count - 1)

    def take_start(self, now: float) -> bool:
        """Return whether one more path is to start now; the caller then starts it."""
        if not self._to_start_count or now < self._next_start:
            return False
        self._to_start_count -= 1
        self._open_count += 1
        self._next_start = now + self.plan.stagger_s
        return True

    def receive_untrusted(
        self, answer: bytes, *, is_plausible: Callable[[bytes, bytes], bool], now: float
    ) -> None:
        """Take the answer of a path.

        Args:
            answer: As it came.
            is_plausible: Whether a node (first) may be the nearest to a target (second) at all.
            now: The time.
        """
        self._open_count -= 1
        try:
            signer, opened = open_answer_untrusted(answer, self._digest)
        except DecodeError:
            signer, opened = None, None
        if (
            signer is None
            or not isinstance(opened, self._answer_type)
            or (self.plan.mode is Mode.EXACT and signer.key != self.target)
        ):
            self.rejected_count += 1
            self._next_start = now
            return
        self.answers.append(GivenAnswer(signer, opened))
        if self.plan.mode is Mode.CLOSEST and not is_plausible(signer.key, self.target):
            self._next_start = now  # kept, since it may be true; but somebody else is asked, too
            return
        self._good_count += 1
        if self.plan.has_grace and isinstance(opened, Fetched) and opened.records:
            self._deadline = min(self._deadline, now + GRACE_S)

    def path_failed(self, now: float) -> None:
        """A path came to nothing: the next one need not wait."""
        self._open_count -= 1
        self._next_start = now

    def is_over(self, now: float) -> bool:
        """Whether there is nothing more to wait for."""
        if now >= self._deadline or self._good_count >= self.plan.enough:
            return True
        return not self._open_count and not self._to_start_count

    def next_timer(self) -> float:
        """Return when something is due by itself: a start or the end."""
        return min(self._next_start, self._deadline) if self._to_start_count else self._deadline
