"""A request seen from its origin: how many paths, when the next one starts, when it is enough.

One path may die in a hole, or end at a liar who says "I am nearest, and there is nothing". So a
lookup has several paths, which no two nodes but the origin share (router.py sees to it), and which
end at different replicas. Where the answer proves itself (an introduction) they start one after the
other, as hedges; where the best of several answers counts, `ALPHA` start at once.

Two things let an answer count for little, so that another path starts, too. A node that is too far
from where the path was to end can't be the nearest there: it lied, or the path went astray. And
"there is no record" proves nothing, as a record does. Since ids near a key can be ground by whoever
has the time, only the first path goes to the key itself; the others go to random points among its
replicas (`is_spread`), where a cluster of ground ids around the key is nobody's nearest.

Source: Kademlia's alpha; disjoint paths from S/Kademlia; the test whether an answer can come from
the nearest node at all from Castro et al., "Secure routing for structured overlays" (2002).
Knows neither links nor records; the overlay starts the paths it asks for.
"""

from __future__ import annotations

import math
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
# Paths in all, where some come to nothing.
PATHS_MAX = 12

# A hedge starts when the first path has had time for a slow answer.
STAGGER_S = 2.0
# A lookup ends after this many times the patience of one path.
DEADLINE_ROUNDS = 1.5
# Once a record is there, the other paths get so long to bring a later one.
GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class LookupPlan:
    """How to look.

    Attributes:
        mode: How paths go.
        path_count: Paths, at most.
        at_once: Paths that start at once; others as those come to nothing.
        stagger_s: If above 0, another one starts each time this passes.
        enough: So many good answers end it.
        is_spread: Whether paths but the first go to random points near the target.
        stray_steps: Steps at random that a path takes before, if it is the last of several that
            start at once, or starts after these; they cost as much as the rest of it.
        patience_s: For each path.
        steps: Of a walk.
    """

    mode: Mode
    path_count: int = ALPHA
    at_once: int = ALPHA
    stagger_s: float = 0.0
    enough: int = ALPHA
    is_spread: bool = False
    stray_steps: int = 0
    patience_s: float = 7.0
    steps: int = 32


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
        self.started_count = 0
        self._open_count = 0
        self._due_count = plan.at_once
        self._next_start = now + plan.stagger_s if plan.stagger_s else math.inf
        # Time for a second round where the first came to nothing.
        self._deadline = now + DEADLINE_ROUNDS * plan.patience_s

    def take_start(self, now: float) -> bool:
        """Return whether one more path is to start now; the caller then starts it."""
        if self.started_count >= self.plan.path_count:
            return False
        if now >= self._next_start:
            self._due_count += 1
            self._next_start = now + self.plan.stagger_s
        if not self._due_count:
            return False
        self._due_count -= 1
        self.started_count += 1
        self._open_count += 1
        return True

    def stray_steps(self) -> int:
        """Return how many steps at random the path that was taken last is to begin with."""
        return self.plan.stray_steps if self.started_count >= max(2, self.plan.at_once) else 0

    def receive_untrusted(
        self,
        answer: bytes,
        target: bytes,
        *,
        is_plausible: Callable[[bytes, bytes], bool],
        now: float,
    ) -> None:
        """Take the answer of a path.

        Args:
            answer: As it came.
            target: Where the path was to end.
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
            self._due_count += 1
            return
        self.answers.append(GivenAnswer(signer, opened))
        if isinstance(opened, Fetched) and opened.records:
            # It proves itself, wherever it comes from.
            self._deadline = min(self._deadline, now + GRACE_S)
        elif isinstance(opened, Fetched) or (
            self.plan.mode is Mode.CLOSEST and not is_plausible(signer.key, target)
        ):
            self._due_count += 1  # it may be true; but somebody else is asked, too
            return
        self._good_count += 1

    def path_failed(self) -> None:
        """A path came to nothing: another one takes its place."""
        self._open_count -= 1
        self._due_count += 1

    def is_over(self, now: float) -> bool:
        """Whether there is nothing more to wait for."""
        if now >= self._deadline or self._good_count >= self.plan.enough:
            return True
        return not self._open_count and self.started_count >= self.plan.path_count

    def next_timer(self) -> float:
        """Return when something is due by itself: a start or the end."""
        if self.started_count >= self.plan.path_count:
            return self._deadline
        return min(self._next_start, self._deadline)
