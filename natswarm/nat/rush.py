"""Ask for many mappings at once, and keep account of which are granted.

Fresh ports send one echo each, paced, spread over the observers and both ports of each; the main
port, whose mapping lives, asks all the while: what it loses is not the fault of new mappings. What
follows is the business of the test (`quota.py`).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

from natswarm.address import Endpoint
from natswarm.nat.asking import Answer, AskingTest, Question, Script
from natswarm.nat.findings import Findings
from natswarm.nat.grants import Grant, boundary_of, is_more_than_loss
from natswarm.nat.measurement import Observer

__all__ = ["CONTROL_EVERY_S", "CONTROL_WAIT_S", "ECHOES_PER_S", "OPEN_WAITS_S", "Rush", "pace_of"]

# Half of what an observer answers in a second, and the most that is asked of all.
ECHOES_PER_OBSERVER_S = 100.0
ECHOES_PER_S = 200.0
OPEN_WAITS_S = (0.6, 0.6, 0.8)
# Answers take 0.3 s, and one of many always comes: silence for longer is a quota, or a slow rate.
OPEN_STOPS_AFTER_S = 0.8

CONTROL_EVERY_S = 0.05
CONTROL_WAIT_S = (1.2,)


class Rush(AskingTest):
    """A test that opens many ports; arguments as of every `AskingTest`.

    Attributes:
        granted_count: Mappings that were made.
    """

    def __init__(self, findings: Findings, ports: range, rng: random.Random, now: float) -> None:
        super().__init__(findings, ports, rng, now)
        self._targets = [
            (observer, is_alternate)
            for is_alternate in (False, True)
            for observer in findings.observers
            if not is_alternate or observer.alternate is not None
        ]
        self._answered: list[Observer] = []
        self._seen_before = list(findings.observations)
        self._unopened = list(ports)
        # In the order of opening: was the first try answered, or any?
        self._first_tries: list[bool] = []
        self._came_back: list[bool] = []
        self._refused: list[int] = []
        self._grants: list[Grant] = []
        self._under_way = 0
        self._control_count = self._control_lost = 0
        self._questions: list[Question] = []  # those whose pace is looked at
        self._unanswered: list[Question] = []

    @property
    def granted_count(self) -> int:
        """Mappings that were made."""
        return len(self._grants)

    def _find_observers(self) -> Script[bool]:
        """Ask with the main port, now and from now on; return whether anybody answers."""
        for observer in self.findings.observers:
            if (yield self.echo(0, observer)) is not None:
                self._answered.append(observer)
        if not self._answered:
            return False
        self._targets = [target for target in self._targets if target[0] in self._answered]
        self.spacing_s = 1 / pace_of(self._answered)
        self.start(self._control(self._answered))
        return True

    def _control(self, observers: Sequence[Observer]) -> Script[None]:
        """Ask from the main port all the while: what it loses is not the fault of mappings."""
        for observer in cycle(observers):
            self.start(self._control_once(observer))
            yield self.now + CONTROL_EVERY_S

    def _control_once(self, observer: Observer) -> Script[None]:
        answer = yield self.echo(0, observer, retry_after_s=CONTROL_WAIT_S)
        self._control_count += 1
        self._control_lost += answer is None

    def _open_until(self, count: int) -> Script[None]:
        """Ask with so many ports, unless nothing is granted any more."""
        granted_at = self.now
        while self._unopened and len(self._first_tries) < count:
            if self._grants:
                granted_at = max(granted_at, self._grants[-1].granted_at)
            if self.now > granted_at + OPEN_STOPS_AFTER_S:
                break
            self._first_tries.append(False)
            self._came_back.append(False)
            self._under_way += 1
            self.start(self._open(self._unopened.pop(0), len(self._first_tries) - 1))
            yield self.now + self.spacing_s
        while self._under_way:
            yield self.now + CONTROL_EVERY_S

    def _open(self, port: int, index: int) -> Script[None]:
        asked, destination = self._question(port, OPEN_WAITS_S)
        self._questions.append(asked)
        answer = yield asked
        self._under_way -= 1
        if answer is None:
            self._unanswered.append(asked)
            self._refused.append(port)
        else:
            self._add(asked, answer, destination)
            self._came_back[index] = True
            self._first_tries[index] = answer.sent_at == asked.sent_times[0]

    def _question(self, port: int, waits_s: tuple[float, ...]) -> tuple[Question, Endpoint]:
        observer, is_alternate = self._targets[port % len(self._targets)]
        asked = self.echo(port, observer, to_alternate=is_alternate, retry_after_s=waits_s)
        destination = observer.alternate if is_alternate else observer.endpoint
        assert destination is not None
        return asked, destination

    def _add(self, asked: Question, answer: Answer, destination: Endpoint) -> None:
        self._grants.append(Grant(answer, destination, asked.sent_times[0]))
        self.findings.observations.append(self.observation(answer, destination))

    def _try_again(self, port: int, waits_s: tuple[float, ...]) -> Script[None]:
        asked, destination = self._question(port, waits_s)
        answer = yield asked
        if answer is None:
            self._unanswered.append(asked)
            self._refused.insert(0, port)
        else:
            self._add(asked, answer, destination)
        self._under_way -= 1

    def _note_unseen(self) -> None:
        """Say which observations may follow a mapping of ours whose answers were all lost.

        So may the first one, which follows other tests.
        """
        observations = self.findings.observations
        start = len(self._seen_before)
        ours = sorted(observations[start:], key=lambda each: each.sent_at)
        asked = sorted(time for each in self._unanswered for time in each.sent_times)
        before = -math.inf
        for index, each in enumerate(ours):
            unseen = bisect_left(asked, each.sent_at) - bisect_left(asked, before)
            before = each.sent_at
            ours[index] = replace(each, is_contiguous=unseen == 0 and index > 0)
        observations[start:] = ours

    def _was_refused(self) -> bool:
        """Whether first tries failed in a row, or more often than the main port's."""
        return boundary_of(self._first_tries) is not None or self._is_more_than_loss(
            self._first_tries
        )

    def _is_more_than_loss(self, first_tries: Sequence[bool]) -> bool:
        return is_more_than_loss(first_tries, lost=self._control_lost, asked=self._control_count)

    @property
    def _loss(self) -> float:
        """Share of round trips that failed through no fault of the NAT."""
        return self._control_lost / max(self._control_count, 1)


def pace_of(observers: Sequence[Observer]) -> float:
    """Return how many echoes `observers` are asked for in a second, together."""
    return min(ECHOES_PER_S, ECHOES_PER_OBSERVER_S * len(observers))
