"""How many mappings may we have at once, how fast may we make them, and do they share ports?

Fresh ports send one echo each, 200 in a second at most, spread over the observers and both ports of
each. What is not answered is asked three times; what is not answered then was lost, or refused:

    ports get theirs later, evenly, while more ask            a rate of new mappings (token bucket)
    the same ports get nothing for eight seconds              a quota of live ones
    the main port, whose mapping lives, gets no answer either the way, or the observer: says nothing

The opening stops when nothing was granted for most of a second, so a quota is met and not besieged,
and at 300 mappings. They live on until they expire, usually for one to two minutes: where there is
a quota, other programs of the user may not get new ones meanwhile, and where there is none up to
300, few carriers will mind (RFC 6888 REQ-4; blocks of 256 ports are common, Richter et al., IMC
2016).
A quiet counter may be one inside a block, whose end shows only by crossing it: there it goes on to
900 ports, as far as 1,024 open sockets allow, which crosses a block of 512 always and one of 1,024
in seven of eight cases. To be sure of one of 2,048 would take 2,304: not worth their sockets.

The rate is counted while the bucket is empty, that is while many more ports ask than are granted:
in the opening, or, where that showed too little of a slow rate, with the ports that were refused. A
rate near the pace of asking, or after a burst that takes most of the ports, cannot be counted. The
burst is the smallest bucket that could have granted what was granted. A quota counts the mappings
that earlier tests left behind, too; where these were many that nobody saw, only bounds are known.

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

from natswarm.address import Endpoint
from natswarm.nat.asking import Script
from natswarm.nat.behaviour import AllocationLaw, Mapping
from natswarm.nat.findings import Findings, Interval
from natswarm.nat.grants import Grant, boundary_of, most_at_once
from natswarm.nat.overloading import overloading_of
from natswarm.nat.rush import CONTROL_EVERY_S, CONTROL_WAIT_S, OPEN_WAITS_S, Rush, pace_of
from natswarm.nat.token_bucket import BucketRate, count_rate, smallest_burst

__all__ = ["QuotaTest"]

MAPPINGS_MAX = 300
BLOCK_MAPPINGS_MAX = 900
# A counter that others move faster than this serves others, too, so it is no block of ours.
QUIET_OTHERS_PER_S = 1.0

# Ports that three tries did not open: at 10 % loss each way two of 300 are expected, eight come
# together once in 700 times, and what follows finds that they open after all.
SIGN = 8

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
# Fewer mappings than this would have been granted by any rate.
SHARP_MIN = 20

# Ports that ask for a mapping all the time: 160 tries a second find the tokens of a fast rate, 40
# those of one that does not even grant 2. Each asks at times of its own, evenly in between.
WORKERS_FAST, WORKERS_SLOW = 32, 8
WORKER_RETRY_S = 0.2
RATE_TRIES = 100  # for 20 s
RATE_GRANTS = 40
RATE_GRANTS_MIN = 3
# Where a quota cuts the count short, or late answers of the rush may look like a rate.
RATE_GRANTS_MIN_RUSH = 15
# A slow rate that loss has blurred more than this is counted once more, for longer.
RUSH_ERROR_MAX = 0.1
COUNT_EVERY_S = 0.25
RATE_DURATION_S = 12.0
LOSS_MIN = 0.01
STANDSTILL_S = 3.0
# Ports still ask for so many times the usual gap, and so much less than usual is granted: a quota
# beside the rate.
STALL_GAPS, STALL_MIN_S, STALL_SHARE = 10.0, 0.5, 0.25

# Mappings of cellular networks live for 10 s at least, of most for 30 s (Richter et al.).
ALIVE_FOR_S = 10.0
# Where more of a quota than this may be ports of earlier tests that nobody saw, it is not known.
UNSEEN_SHARE_MAX = 0.3


class QuotaTest(Rush):
    """The test `NatTest.QUOTA`; arguments as of every `AskingTest`."""

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
        pace = pace_of(findings.observers)
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
        self._is_counting = False
        self._quota_met = False
        self._met_at_count = 0  # how many mappings there were then
        self._rate: Interval | None = None
        self._rate_per_s: float | None = None  # infinite: none was met
        if self._reason is None:
            self.start(self._look())

    # What runs ------------------------------------------------------------------------------------

    def _look(self) -> Script[None]:
        if not (yield from self._find_observers()):
            self._reason = "no observer answers"
            return
        bound = min(MAPPINGS_MAX, len(self.ports))
        yield from self._open_until(bound)
        while not self._is_suspicious() and self._unopened and not self._has_jumped():
            yield from self._open_until(len(self._first_tries) + 100)
        yield from self._judge()
        self._note_unseen()
        self.stop()

    # Quota or rate? -------------------------------------------------------------------------------

    def _is_suspicious(self) -> bool:
        return len(self._refused) >= SIGN or self._was_refused()

    def _judge(self) -> Script[None]:
        if not self._refused and not self._was_refused():
            self._rate_per_s = math.inf  # what did not come back had been lost
            return
        self._met_at_count = self.granted_count
        rate = self._count(self._grants, OPEN_WAITS_S[0], RATE_GRANTS_MIN_RUSH)
        if rate is not None and not self._is_stalled(rate):
            self._note(rate)
            if rate.interval.high <= (1 + RUSH_ERROR_MAX) * rate.per_s:
                return
        productive = yield from self._cycles()
        if not self._refused and not self._was_refused():
            self._rate_per_s = math.inf
        elif self._control_lost > 0.5 * self._control_count:
            self._reason = "the observers stopped answering"
        elif productive >= RATE_CYCLES or not self._refused:
            is_fast = self.granted_count - self._met_at_count >= FAST_SHARE * CYCLES * CYCLE_PORTS
            workers = min(WORKERS_FAST, int(0.8 * WORKER_RETRY_S / self.spacing_s))
            yield from self._count_rate(workers if is_fast else WORKERS_SLOW)
        elif productive <= 1 and len(self._refused) >= QUOTA_REFUSED_MIN:
            self._quota_met = True
            if rate is not None:
                self._note(rate)
            elif self._boundary_is_sharp():
                self._rate_per_s = math.inf
            else:
                self._reason = "the quota was met before the rate showed"
        else:
            self._reason = "new mappings trickle: a slow rate, or old ones that expire"

    def _cycles(self) -> Script[int]:
        """Try refused ports again and again; return in how many cycles some got a mapping."""
        productive = cycle = 0
        cycle_max = CYCLES
        while cycle < cycle_max and self._refused:
            before = self.granted_count
            yield from self._cycle()
            cycle += 1
            productive += self.granted_count > before
            if cycle == CYCLES and 0 < productive < RATE_CYCLES:
                cycle_max = 2 * CYCLES
        return productive

    def _is_stalled(self, rate: BucketRate) -> bool:
        """Whether ports went on asking after the count, and were granted next to nothing."""
        asked = [
            time - rate.ended_at
            for question in self._questions
            for time in question.sent_times
            if time > rate.ended_at
        ]
        if not asked or max(asked) < max(STALL_GAPS / rate.per_s, STALL_MIN_S):
            return False
        granted = sum(each.granted_at > rate.ended_at for each in self._grants)
        return granted < STALL_SHARE * min(len(asked), rate.per_s * max(asked))

    def _boundary_is_sharp(self) -> bool:
        """Whether all was granted up to the first refusal, and next to nothing after it."""
        boundary = boundary_of(self._first_tries)
        if boundary is None:
            return not self._was_refused()
        if boundary < SHARP_MIN:
            return False
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
        self._questions = []
        self._is_counting = True
        for _ in range(workers):
            self.start(self._work(self.now))
            yield self.now + WORKER_RETRY_S / workers
        while self._unopened and self.granted_count < MAPPINGS_MAX:
            yield self.now + COUNT_EVERY_S
            grants = self._grants[first:]
            if self._is_standstill(grants, started_at):
                self._quota_met = True
                break
            if self.now > started_at + WORKER_RETRY_S * RATE_TRIES:
                break
            long_enough = self.now > started_at + RATE_DURATION_S
            if self._count(grants, WORKER_RETRY_S, RATE_GRANTS_MIN if long_enough else RATE_GRANTS):
                break
        self._is_counting = False
        yield self.now + CONTROL_WAIT_S[0]
        fewest = RATE_GRANTS_MIN_RUSH if self._quota_met else RATE_GRANTS_MIN
        rate = self._count(self._grants[first:], WORKER_RETRY_S, fewest)
        if rate is not None:
            self._note(rate)
            self._met_at_count = self.granted_count
        elif self._was_exhausted():
            self._reason = (
                f"a rate of new mappings was met, but {MAPPINGS_MAX} were granted before it could "
                "be counted"
            )
        else:
            self._reason = "a rate of new mappings was met, but could not be counted"

    def _was_exhausted(self) -> bool:
        """Whether all mappings that are tried were granted in the end."""
        has_all = self.granted_count > 0 and not (self._unopened or self._refused)
        return has_all or self.granted_count >= MAPPINGS_MAX

    def _count(self, grants: Sequence[Grant], retry_s: float, fewest: int) -> BucketRate | None:
        return count_rate(
            [each.granted_at for each in grants],
            sorted(time for asked in self._questions for time in asked.sent_times),
            loss=max(self._loss, LOSS_MIN),
            retry_s=retry_s,
            fewest=fewest,
        )

    def _note(self, rate: BucketRate) -> None:
        self._rate_per_s, self._rate = rate.per_s, rate.interval

    def _is_standstill(self, grants: Sequence[Grant], started_at: float) -> bool:
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
            if answer is None:
                self._unanswered.append(asked)
            else:
                self._add(asked, answer, destination)
            turn = math.ceil((self.now - started_at) / WORKER_RETRY_S)
            yield started_at + turn * WORKER_RETRY_S

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
        quota = None
        if self._quota_met:
            quota = self._quota()
        burst = None
        if self._rate_per_s is not None and self._rate is not None:
            burst = self._burst(self._rate_per_s)
            findings.intervals["mapping_rate_per_s"] = self._rate
        if self._rate_per_s is None:
            why = self._reason or self.unfinished
            findings.unknown["mapping_rate_per_s"] = why
            if not self._quota_met and not self._was_exhausted():
                findings.unknown["max_mappings"] = why
        findings.profile = replace(
            profile,
            mappings_seen=max(
                profile.mappings_seen,
                most_at_once([each.granted_at for each in self._grants], ALIVE_FOR_S),
            ),
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

    def _quota(self) -> int | None:
        """Return the quota and note its interval; None, and why, where it is too wide."""
        findings = self.findings
        mapping = findings.profile.mapping
        now = [each.endpoint for each in self._answered]
        seen = {_key(mapping, each.port_index, each.destination) for each in self._seen_before}
        seen |= {_key(mapping, 0, endpoint) for endpoint in now}
        # Those of the main port live; of the fresh ones of other tests nobody saw the mappings.
        low = len({_key(mapping, 0, endpoint) for endpoint in now})
        unseen_ports = self.ports.start - len({key[0] for key in seen})
        # Mappings that were granted, and all answers lost; where a rate grants them one by one,
        # the last answer is enough.
        lost = len(self._first_tries) * self._loss ** len(OPEN_WAITS_S)
        if self._rate_per_s != math.inf:
            lost = self._came_back.count(False) * max(self._loss, LOSS_MIN) / 2
        margin = math.ceil(lost + 2 * math.sqrt(lost))
        count = self._met_at_count
        quota = count + len(seen) + unseen_ports
        # What was granted since either took room that had become free, or came by a slow rate.
        later = self.granted_count - count
        findings.intervals["max_mappings"] = Interval(count + low, quota + later + margin)
        if unseen_ports > UNSEEN_SHARE_MAX * quota:
            findings.unknown["max_mappings"] = (
                f"a quota was met, but of the tests before up to {len(seen) + unseen_ports} "
                "mappings may be alive: measure it alone, some minutes later"
            )
            return None
        return quota

    def _most_remotes(self) -> int:
        remotes: dict[int, set[Endpoint]] = {}
        for each in self.findings.observations:
            remotes.setdefault(each.port_index, set()).add(each.destination)
        return max((len(each) for each in remotes.values()), default=0)

    def _burst(self, rate_per_s: float) -> int:
        """Return the smallest bucket that could have granted all that was granted at first."""
        # Before the first refusal a mapping was made by the first try, though its answer was lost;
        # later the bucket was empty, and says nothing more.
        boundary = boundary_of(self._first_tries)
        if boundary is None:  # a fast rate, which grants most of all tries
            times = [each.granted_at for each in self._grants]
        else:
            times = sorted(each.first_sent_at for each in self._grants)[:boundary]
        made: dict[tuple[int, Endpoint], float] = {}
        for each in self.findings.observations:
            if each.sent_at < self._started_at:
                made.setdefault((each.port_index, each.observed), each.sent_at)
        return smallest_burst([*made.values(), *times], rate_per_s)

    def _shared(self) -> list[tuple[Endpoint, Endpoint]]:
        return [(each.answer.observed, each.destination) for each in self._grants]


def _key(mapping: Mapping | None, port_index: int, destination: Endpoint) -> tuple[object, ...]:
    """Return what a mapping is told by: the port, and as much of the remote as makes a new one."""
    if mapping is Mapping.EIM:
        return (port_index,)
    return (port_index, destination.ip if mapping is Mapping.ADM else destination)


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
