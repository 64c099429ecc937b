"""How many mappings may we have at once, how fast may we make them, and do they share ports?

Fresh ports send one echo each, 200 in a second at most, spread over the observers and both ports of
each. What is not answered is asked three times; what is not answered then was lost, or refused:

    some ports get theirs a second later, again and again     a rate of new mappings (token bucket)
    the same ports get nothing for eight seconds              a quota of live ones
    the main port, whose mapping lives, gets no answer either the way, or the observer: says nothing

The opening stops when `SIGN` ports were refused, so a quota is met and not besieged, and at 300
mappings. They live on until they expire, usually for one to two minutes: where there is a quota,
other programs of the user may not get new ones meanwhile, and where there is none up to 300, few
carriers will mind (RFC 6888 REQ-4; blocks of 256 ports are common, Richter et al., IMC 2016).
A quiet counter may be one inside a block, whose end shows only by crossing it: there it goes on to
900 ports, as far as 1,024 open sockets allow, which crosses a block of 512 always and one of 1,024
in seven of eight cases. To be sure of one of 2,048 would take 2,304: not worth their sockets.

The rate is counted while the bucket is empty, that is while many more ports ask than are granted.
The burst is the smallest bucket that could have granted what was granted. A quota counts mappings
that earlier tests left behind and that may have expired: hence its interval.

Two ports that share an external port at the same time show overloading; the absence of any pair is
evidence where pairs would have been likely.

Source: RFC 6888 REQ-4; RFC 4787 section 4.2.1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from natswarm.address import Endpoint
from natswarm.nat.asking import Answer, AskingTest, Question, Script
from natswarm.nat.behaviour import AllocationLaw, Mapping
from natswarm.nat.findings import Findings, Interval
from natswarm.nat.measurement import Observer
from natswarm.nat.overloading import overloading_of
from natswarm.nat.token_bucket import since_empty, smallest_burst

__all__ = ["QuotaTest"]

MAPPINGS_MAX = 300
# Kept back for measuring a rate, which takes ports that have no mapping yet.
RESERVED = 80
BLOCK_MAPPINGS_MAX = 900
# A counter that others move faster than this serves others, too, so it is no block of ours.
QUIET_OTHERS_PER_S = 1.0

# Half of what an observer answers in a second, and the most that is asked of all.
ECHOES_PER_OBSERVER_S = 100.0
ECHOES_PER_S = 200.0
OPEN_WAITS_S = (0.6, 0.6, 0.8)

# Ports that three tries did not open: at 10 % loss each way two of 300 are expected, eight come
# together once in 700 times, and what follows finds that they open after all.
SIGN = 8
# Refusals come in a row. At 10 % loss each way 12 of any 20 first tries fail once in 70 tests.
RUN, RUN_MISSES = 20, 12

CYCLES = 4
CYCLE_S = 2.0
CYCLE_PORTS = 6
CYCLE_SPACING_S = 0.02
SWEEP_WAITS_S = (0.3, 0.8)
# A rate grants something in each cycle; old mappings that expire make room in one.
RATE_CYCLES = 3
FAST_SHARE = 0.3
# Fewer ports than this may all have been lost.
QUOTA_REFUSED_MIN = 4

# Ports that ask for a mapping all the time: 160 tries a second find the tokens of a fast rate, 40
# those of one that does not even grant 2. Each asks at times of its own, evenly in between.
WORKERS_FAST, WORKERS_SLOW = 32, 8
WORKER_RETRY_S = 0.2
RATE_TRIES = 100  # for 20 s
RATE_GRANTS = 40
RATE_GRANTS_MIN = 3
RATE_DURATION_MIN_S = 0.8
# Where a quota cuts the count short, one that had been granted before would weigh too much.
RATE_GRANTS_MIN_QUOTA = 15
COUNT_EVERY_S = 0.25
RATE_DURATION_S = 12.0
# By how much the way out varies; a try may also come as late after a token as the one before.
JITTER_S = 0.02
NORMAL_90 = 1.645
LOSS_MIN = 0.01
STANDSTILL_S = 3.0

CONTROL_EVERY_S = 0.05
CONTROL_WAIT_S = (1.2,)

# Mappings of cellular networks live for 10 s at least, of most for 30 s (Richter et al.).
ALIVE_FOR_S = 10.0


class _Grant(NamedTuple):
    """A mapping that we got.

    Attributes:
        answer: What the observer saw.
        destination: Whom the port sent to.
        first_sent_at: When it was asked for first.
        try_count: How many tries it took.
    """

    answer: Answer
    destination: Endpoint
    first_sent_at: float
    try_count: int

    @property
    def granted_at(self) -> float:
        return self.answer.sent_at


class QuotaTest(AskingTest):
    """The test `NatTest.QUOTA`; arguments as of every `AskingTest`.

    Attributes:
        granted_count: Mappings that were made.
    """

    duration_s = 30.0

    @staticmethod
    def port_count(findings: Findings) -> int:
        """Return how many fresh ports it wants."""
        if _reason(findings) is not None:
            return 0
        return BLOCK_MAPPINGS_MAX if _may_be_a_block(findings) else MAPPINGS_MAX

    @staticmethod
    def packets(findings: Findings) -> int:
        """Return how many packets it sends at most, which it does where a rate is counted."""
        ports = QuotaTest.port_count(findings)
        if ports == 0:
            return 0
        pace = _pace(findings)
        opening_s = ports / pace + sum(OPEN_WAITS_S)
        counting_s = 2 * CYCLES * CYCLE_S + WORKER_RETRY_S * RATE_TRIES + 2 * STANDSTILL_S
        return math.ceil(
            ports * len(OPEN_WAITS_S)
            + 2 * CYCLES * CYCLE_PORTS
            + ports * len(SWEEP_WAITS_S)
            + pace * WORKER_RETRY_S * RATE_TRIES
            + (opening_s + counting_s) / CONTROL_EVERY_S
            + 4 * len(findings.observers)
        )

    def __init__(self, findings: Findings, ports: range, rng: random.Random, now: float) -> None:
        super().__init__(findings, ports, rng, now)
        self._started_at = now
        self._reason = _reason(findings)
        self._targets = [
            (observer, is_alternate)
            for is_alternate in (False, True)
            for observer in findings.observers
            if not is_alternate or observer.alternate is not None
        ]
        self._answered: list[Observer] = []
        self._old_local_ports = {each.local_port for each in findings.observations}
        self._unopened = list(ports)
        # In the order of opening: was the first try answered, or any?
        self._first_tries: list[bool] = []
        self._came_back: list[bool] = []
        self._refused: list[int] = []
        self._grants: list[_Grant] = []
        self._under_way = 0
        self._control_count = self._control_lost = 0
        self._is_counting = False
        self._questions: list[Question] = []  # of the counting
        self._quota_met = False
        self._rate: Interval | None = None  # infinite: none was met
        self._rate_per_s: float | None = None
        if self._reason is None:
            self.start(self._look())

    @property
    def granted_count(self) -> int:
        """Mappings that were made."""
        return len(self._grants)

    # What runs ------------------------------------------------------------------------------------

    def _look(self) -> Script[None]:
        answered = []
        for observer in self.findings.observers:
            if (yield self.echo(0, observer)) is not None:
                answered.append(observer)
        if not answered:
            self._reason = "no observer answers"
            return
        self._answered = answered
        self._targets = [target for target in self._targets if target[0] in answered]
        self.spacing_s = 1 / min(ECHOES_PER_S, ECHOES_PER_OBSERVER_S * len(answered))
        self.start(self._control(answered))
        bound = min(MAPPINGS_MAX, len(self.ports))
        yield from self._open_until(bound - RESERVED)
        if not self._is_suspicious():
            yield from self._open_until(bound)
        while not self._is_suspicious() and self._unopened and not self._has_jumped():
            yield from self._open_until(len(self._first_tries) + 100)
        yield from self._judge()
        self.stop()

    def _control(self, observers: Sequence[Observer]) -> Script[None]:
        """Ask from the main port all the while: what it loses is not the fault of mappings."""
        for index in range(1_000_000):
            self.start(self._control_once(observers[index % len(observers)]))
            yield self.now + CONTROL_EVERY_S

    def _control_once(self, observer: Observer) -> Script[None]:
        answer = yield self.echo(0, observer, retry_after_s=CONTROL_WAIT_S)
        self._control_count += 1
        self._control_lost += answer is None

    def _open_until(self, count: int) -> Script[None]:
        """Open ports until there are so many mappings, or a sign of a limit."""
        while self._unopened and len(self._first_tries) < count and len(self._refused) < SIGN:
            self._first_tries.append(False)
            self._came_back.append(False)
            self._under_way += 1
            self.start(self._open(self._unopened.pop(0), len(self._first_tries) - 1))
            yield self.now + self.spacing_s
        while self._under_way:
            yield self.now + CONTROL_EVERY_S

    def _open(self, port: int, index: int) -> Script[None]:
        asked, destination = self._question(port, OPEN_WAITS_S)
        answer = yield asked
        self._under_way -= 1
        if answer is None:
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
        if answer.reply.local_port in self._old_local_ports:
            return  # an earlier port had this number, and its mapping may still be there
        times = asked.sent_times
        tries = times.index(answer.sent_at) + 1
        self._grants.append(_Grant(answer, destination, times[0], tries))
        self.findings.observations.append(self.observation(answer, destination))

    # Quota or rate? -------------------------------------------------------------------------------

    def _is_suspicious(self) -> bool:
        return len(self._refused) >= SIGN or self._was_refused()

    def _was_refused(self) -> bool:
        """Whether first tries failed in a row, or more often than the main port's."""
        return self._boundary() is not None or self._is_more_than_loss(self._first_tries)

    def _is_more_than_loss(self, first_tries: Sequence[bool]) -> bool:
        loss = (self._control_lost + 3) / (self._control_count + 5)
        expected = len(first_tries) * loss
        return first_tries.count(False) > expected + 3 * math.sqrt(expected) + 2

    def _boundary(self) -> int | None:
        """Return the first of many first tries in a row that mostly got no answer."""
        missed = [not each for each in self._first_tries]
        for start in range(len(missed) - RUN + 1):
            if missed[start] and sum(missed[start : start + RUN]) >= RUN_MISSES:
                return start
        return None

    def _judge(self) -> Script[None]:
        productive = cycle = 0
        cycle_max = CYCLES
        granted_before = self.granted_count
        while cycle < cycle_max and self._refused:
            before = self.granted_count
            yield from self._cycle()
            cycle += 1
            productive += self.granted_count > before
            if cycle == CYCLES and 0 < productive < RATE_CYCLES:
                cycle_max = 2 * CYCLES
        if not self._refused and not self._was_refused():
            self._rate_per_s = math.inf  # what did not come back had been lost
        elif self._control_lost > 0.5 * self._control_count:
            self._reason = "the observers stopped answering"
        elif productive >= RATE_CYCLES or not self._refused:
            granted = self.granted_count - granted_before
            is_fast = granted >= FAST_SHARE * cycle * CYCLE_PORTS
            workers = min(WORKERS_FAST, int(0.8 * WORKER_RETRY_S / self.spacing_s))
            yield from self._count_rate(workers if is_fast else WORKERS_SLOW)
        elif productive <= 1 and len(self._refused) >= QUOTA_REFUSED_MIN:
            self._quota_met = True
            if self._boundary_is_sharp():
                self._rate_per_s = math.inf
            else:
                self._reason = "the quota was met before the rate showed"
        else:
            self._reason = "new mappings trickle: a slow rate, or old ones that expire"

    def _boundary_is_sharp(self) -> bool:
        """Whether all was granted up to the first refusal, and next to nothing after it."""
        boundary = self._boundary()
        if boundary is None:
            return not self._was_refused()
        if self._is_more_than_loss(self._first_tries[:boundary]):
            return False
        return sum(self._came_back[boundary + 1 :]) <= 2 + 0.05 * boundary

    def _cycle(self) -> Script[None]:
        """Try some refused ports once more."""
        tried, self._refused = self._refused[:CYCLE_PORTS], self._refused[CYCLE_PORTS:]
        started_at = self.now
        self._under_way = len(tried)
        for port in tried:
            self.start(self._try_again(port, (CYCLE_S / 2,)))
            yield self.now + CYCLE_SPACING_S
        while self._under_way or self.now < started_at + CYCLE_S:
            yield self.now + CONTROL_EVERY_S

    def _try_again(self, port: int, waits_s: tuple[float, ...]) -> Script[None]:
        asked, destination = self._question(port, waits_s)
        answer = yield asked
        if answer is None:
            self._refused.insert(0, port)
        else:
            self._add(asked, answer, destination)
        self._under_way -= 1

    def _count_rate(self, workers: int) -> Script[None]:
        """Ask with many ports at once, all the time, and count how many are granted."""
        # Refused ports may have mappings by now whose answers were lost: those must not count.
        tried, self._refused = self._refused, []
        self._under_way = len(tried)
        for port in tried:
            self.start(self._try_again(port, SWEEP_WAITS_S))
            yield self.now + self.spacing_s
        while self._under_way:
            yield self.now + CONTROL_EVERY_S
        self._unopened += self._refused
        self._refused = []
        first, started_at = self.granted_count, self.now
        self._is_counting = True
        for _ in range(workers):
            self.start(self._work(self.now))
            yield self.now + WORKER_RETRY_S / workers
        while self._unopened and self.granted_count < MAPPINGS_MAX:
            yield self.now + COUNT_EVERY_S
            grants = self._grants[first:]
            counted = self._counted(grants)
            if self._is_standstill(grants, started_at):
                self._quota_met = True
                break
            if self.now > started_at + RATE_DURATION_S and len(counted) > RATE_GRANTS_MIN:
                break
            if len(counted) > RATE_GRANTS or self.now > started_at + WORKER_RETRY_S * RATE_TRIES:
                break
        ended_at = self.now
        self._is_counting = False
        yield self.now + CONTROL_WAIT_S[0]
        # With the last ports under way, fewer ask than would be granted.
        grants = [each for each in self._grants[first:] if each.granted_at <= ended_at]
        self._estimate(self._counted(grants), WORKER_RETRY_S / workers)

    def _counted(self, grants: Sequence[_Grant]) -> list[float]:
        tries = sorted(time for asked in self._questions for time in asked.sent_times)
        return since_empty([each.granted_at for each in grants], tries)

    def _is_standstill(self, grants: Sequence[_Grant], started_at: float) -> bool:
        """Whether no mapping was granted for so long that the rate cannot be the reason."""
        times = sorted(each.granted_at for each in grants)
        if not times:
            return self.now > started_at + 2 * STANDSTILL_S
        gap_s = (times[-1] - started_at) / len(times)
        return self.now - times[-1] > STANDSTILL_S + 6 * gap_s

    def _work(self, started_at: float) -> Script[None]:
        while self._is_counting and self._unopened and self.granted_count < MAPPINGS_MAX:
            asked, destination = self._question(
                self._unopened.pop(0), (WORKER_RETRY_S,) * RATE_TRIES
            )
            self._questions.append(asked)
            answer = yield asked
            if answer is not None:
                self._add(asked, answer, destination)
            turn = math.ceil((self.now - started_at) / WORKER_RETRY_S)
            yield started_at + turn * WORKER_RETRY_S

    def _estimate(self, counted: Sequence[float], gap_s: float) -> None:
        count = len(counted) - 1
        duration_s = counted[-1] - counted[0] if counted else 0.0
        fewest = RATE_GRANTS_MIN_QUOTA if self._quota_met else RATE_GRANTS_MIN
        if count < fewest or duration_s < RATE_DURATION_MIN_S:
            self._reason = "a rate of new mappings was met, but could not be counted"
            return
        self._rate_per_s = rate = count / duration_s
        # A lost answer shows a mapping one retry late, at both ends of the count.
        late = rate * WORKER_RETRY_S * self._loss / 2
        error = min(rate * (gap_s + JITTER_S) + NORMAL_90 * math.sqrt(2 * late), count / 2)
        self._rate = Interval((count - error) / duration_s, (count + error) / duration_s)

    @property
    def _loss(self) -> float:
        """Share of round trips that failed through no fault of the NAT."""
        return self._control_lost / max(self._control_count, 1)

    def _has_jumped(self) -> bool:
        """Whether a counter has left its block: then there is no need to go on."""
        allocation = self.findings.profile.allocation
        step = 1 if allocation is None or allocation.step is None else abs(allocation.step)
        ports = [each.answer.observed.port for each in self._grants]
        return any(abs(after - before) > 64 * step for before, after in pairwise(sorted(ports)))

    # What follows ---------------------------------------------------------------------------------

    def conclude(self) -> None:
        """Write what was found into the findings."""
        findings = self.findings
        profile = findings.profile
        names = ("max_mappings", "mapping_rate_per_s", "mapping_burst")
        for name in names:
            findings.unknown.pop(name, None)
            findings.intervals.pop(name, None)
        earlier = self._earlier_count()
        seen = self._most_at_once()
        quota = None
        if self._quota_met:
            quota = len(self._grants) + int(earlier.high)
            # Mappings that were granted, and all answers lost; where a rate grants them one by
            # one, the last answer is enough.
            unseen = len(self._first_tries) * self._loss ** len(OPEN_WAITS_S)
            if self._rate_per_s != math.inf:
                unseen = self._came_back.count(False) * max(self._loss, LOSS_MIN) / 2
            margin = math.ceil(unseen + 2 * math.sqrt(unseen))
            findings.intervals["max_mappings"] = Interval(
                len(self._grants) + earlier.low, quota + margin
            )
        burst = None
        if self._rate_per_s is not None and self._rate is not None:
            burst = self._burst(self._rate_per_s)
            findings.intervals["mapping_rate_per_s"] = self._rate
        if self._rate_per_s is None:
            why = self._reason or self.unfinished
            findings.unknown["mapping_rate_per_s"] = why
            if quota is None:
                findings.unknown["max_mappings"] = why
        findings.profile = replace(
            profile,
            mappings_seen=max(profile.mappings_seen, seen),
            max_mappings=quota,
            mapping_rate_per_s=self._rate_per_s,
            mapping_burst=burst,
            remotes_seen=max(profile.remotes_seen, self._most_remotes()),
        )
        allocation = profile.allocation
        if allocation is not None and allocation.is_overloading is None:
            is_overloading = overloading_of(self._shared(), allocation, profile.filtering)
            findings.profile = replace(
                findings.profile, allocation=replace(allocation, is_overloading=is_overloading)
            )

    def _earlier_count(self) -> Interval:
        """Return how many mappings of the inspection may have lived beside ours."""
        mapping = self.findings.profile.mapping
        now = {each.endpoint for each in self._answered}
        ever = {each.destination for each in self.findings.observations if each.port_index == 0}
        ever |= now
        if mapping is Mapping.EIM:
            return Interval(1, self.ports.start)
        if mapping is Mapping.ADM:
            return Interval(
                len({each.ip for each in now}),
                len({each.ip for each in ever}) + self.ports.start - 1,
            )
        return Interval(len(now), len(ever) + self.ports.start - 1)

    def _most_at_once(self) -> int:
        times = sorted(each.granted_at for each in self._grants)
        start = most = 0
        for index, time in enumerate(times):
            while times[start] < time - ALIVE_FOR_S:
                start += 1
            most = max(most, index - start + 1)
        return most

    def _most_remotes(self) -> int:
        remotes: dict[int, set[Endpoint]] = {}
        for each in self.findings.observations:
            remotes.setdefault(each.port_index, set()).add(each.destination)
        return max((len(each) for each in remotes.values()), default=0)

    def _burst(self, rate_per_s: float) -> int:
        """Return the smallest bucket that could have granted all that was granted at first."""
        # Before the first refusal a mapping was made by the first try, though its answer was lost;
        # later the bucket was empty, and says nothing more.
        boundary = self._boundary()
        opened = sorted(each.first_sent_at for each in self._grants)
        times = opened[: len(self._first_tries) if boundary is None else boundary]
        made: dict[tuple[int, Endpoint], float] = {}
        for each in self.findings.observations:
            if each.sent_at < self._started_at:
                made.setdefault((each.port_index, each.observed), each.sent_at)
        return smallest_burst([*made.values(), *times], rate_per_s)

    def _shared(self) -> list[tuple[Endpoint, Endpoint]]:
        return [(each.answer.observed, each.destination) for each in self._grants]


def _pace(findings: Findings) -> float:
    return min(ECHOES_PER_S, ECHOES_PER_OBSERVER_S * len(findings.observers))


def _may_be_a_block(findings: Findings) -> bool:
    allocation = findings.profile.allocation
    return (
        allocation is not None
        and allocation.law is AllocationLaw.SEQUENTIAL
        and (allocation.others_per_s or 0.0) < QUIET_OTHERS_PER_S
    )


def _reason(findings: Findings) -> str | None:
    """Return why it cannot be tested; None where it can."""
    if not findings.observers:
        return "nobody can tell us which mappings we have"
    if findings.profile.is_translated is not True:
        return "there is no NAT that is known of"
    return None
