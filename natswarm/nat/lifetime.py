"""How long mappings live: idle, with and without a reply, of old age, and what keeps them alive.

A binary search would wait for its steps one after another. Here they run at once, each on a port of
its own: for every duration of a geometric grid a fresh port opens a mapping and falls silent. When
its time is over, the main port has the observer send to the mapping's external endpoint, from the
very port that the mapping was opened towards, so that every filter lets it in: what arrives proves
life, silence to four tries death. With 44 durations from 5 to 300 s the bracket is 10 % wide, and
two dead ones above the oldest that lived end the search: after 1.25 lifetimes and a few seconds.

    unreplied   the answer to what opens the mapping is delivered to the main port: nothing ever
                comes in
    replied     two exchanges more than 2 s apart: Linux takes a flow for a stream only then
    absolute    five ports that send every 3 s: when does another port appear, or, where ports are
                kept and a rebirth does not show, when does what is delivered right before they
                send no longer come in?
    refresh     three ports that only receive, every 4 s: do they outlive the idle lifetime?

A kept port that is reborn at its next packet matters less than a port that changes, but it does
matter: for up to one refresh interval what peers send is lost, and with it goes the filter's memory
of every other remote.

Every silence is believed only if the observer delivers to the main port right then. Where mappings
die of old age before they could die of idleness, the idle lifetime is unknown. A subscriber quota
or a slow rate of new mappings makes the grid coarser, and mappings of earlier tests are waited for.

Costs about 700 packets at a lifetime of 120 s, at most two a second in the long run, and about 100
mappings at a time.

Source: RFC 4787 section 4.3 (REQ-5, REQ-6); n0-computer/iroh#4424 for absolute lifetimes;
`nf_conntrack_proto_udp.c` for streams.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from natswarm.address import Endpoint
from natswarm.identity import PeerId
from natswarm.nat.asking import RETRY_AFTER_S, Answer, AskingTest, Question, Script
from natswarm.nat.behaviour import Filtering
from natswarm.nat.findings import Findings, Interval
from natswarm.nat.measurement import Observer, Reply, Request, SendEcho
from natswarm.nat.survival import Survival, geometric_grid

__all__ = ["LifetimePlan", "LifetimeTest", "plan_lifetimes"]

POINTS = 44  # 5 to 300 s in steps of 10 %
POINTS_MIN = 5
ABSOLUTE_PORTS = 5
INBOUND_PORTS = 3

# Mappings that the main port and other programs of the user may need beside ours.
SPARE_MAPPINGS = 8
# Ports open one after another, at half the rate of new mappings, so that this takes no longer than:
OPENING_S = 20.0
OPENING_SPACING_S = 0.02

STREAM_S = 2.2
ABSOLUTE_REFRESH_S = 3.0
INBOUND_REFRESH_S = 4.0
KEEPALIVE_S = 5.0

# Of eight tries at 10 % loss each way all are lost once in 600,000. Ports are looked at dozens of
# times, so four are not enough where one death decides.
CERTAIN_WAITS_S = (0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 1.0)

# Two dead ones, so that not even a burst of losses ends the search early.
DEAD_POINTS = 2
# An absolute lifetime may be drawn for each mapping, and those of the grid draw, too.
AGE_SPREAD = 0.7
OPEN_AGAIN_S = 4.0


class LifetimePlan(NamedTuple):
    """How many ports each part gets."""

    unreplied_count: int
    replied_count: int
    spacing_s: float

    @property
    def port_count(self) -> int:
        """Fresh ports in all."""
        return self.unreplied_count + self.replied_count + ABSOLUTE_PORTS + INBOUND_PORTS


def plan_lifetimes(findings: Findings) -> LifetimePlan | None:
    """Return what the NAT's quota and rate of new mappings allow; None if that is too little."""
    profile = findings.profile
    points = 2 * POINTS
    spacing_s = OPENING_SPACING_S
    others = ABSOLUTE_PORTS + INBOUND_PORTS
    if profile.max_mappings is not None:
        # The main port has a mapping for each observer, and each one's port where it is APDM.
        own = SPARE_MAPPINGS + 2 * len(findings.observers)
        points = min(points, profile.max_mappings - own - others)
    if profile.mapping_rate_per_s is not None:
        spacing_s = max(spacing_s, 2 / profile.mapping_rate_per_s)
        points = min(points, max(int(OPENING_S / spacing_s), POINTS_MIN * 2) - others)
    if points < 2 * POINTS_MIN:
        return None
    return LifetimePlan(points - points // 2, points // 2, spacing_s)


@dataclass(frozen=True, slots=True)
class _Death:
    """An age at which a mapping was last seen alive, and one at which it was gone."""

    alive_s: float
    dead_s: float


class LifetimeTest(AskingTest):
    """The test `NatTest.LIFETIMES`.

    Args:
        findings: What is known; quota and rate count.
        ports: `port_count` fresh ones.
        rng: Draws transactions.
        now: Seconds.
        shortest_s: The shortest idle duration to try.
        longest_s: The longest one; the test takes at most a minute more.
        absolute_s: How long ports are refreshed and watched at least.
    """

    duration_s = 360.0

    @staticmethod
    def port_count(findings: Findings) -> int:
        """Return how many fresh ports it wants."""
        plan = plan_lifetimes(findings)
        return 0 if plan is None or _reason(findings) else plan.port_count

    @staticmethod
    def packets(findings: Findings) -> int:
        """Return how many packets it sends at most, when all mappings outlive the test."""
        plan = plan_lifetimes(findings)
        if plan is None or _reason(findings):
            return 0
        seconds = LifetimeTest.duration_s
        opening = 3 * plan.port_count * 2
        waking = (plan.unreplied_count + plan.replied_count) * 3
        watching = 2 * ABSOLUTE_PORTS / ABSOLUTE_REFRESH_S + INBOUND_PORTS / INBOUND_REFRESH_S
        keeping = len(findings.observers) / KEEPALIVE_S
        return opening + waking + math.ceil(1.3 * seconds * (watching + keeping))

    def __init__(
        self,
        findings: Findings,
        ports: range,
        rng: random.Random,
        now: float,
        *,
        shortest_s: float = 5.0,
        longest_s: float = 300.0,
        absolute_s: float = 100.0,
    ) -> None:
        super().__init__(findings, ports, rng, now)
        self._absolute_s = absolute_s
        self._unreplied, self._replied = Survival(longest_s), Survival(longest_s)
        self._points_left = {self._unreplied: 0, self._replied: 0}
        self._deaths: list[_Death] = []
        self._watched_s: list[float] = [0.0] * ABSOLUTE_PORTS
        self._lived_s: list[float] = [0.0] * INBOUND_PORTS
        self._inbound_deaths: list[_Death | None] = [None] * INBOUND_PORTS
        self._main: dict[PeerId, Endpoint] = {}
        self._rtt_s = math.inf
        self._kept_count = self._lost_count = 0
        self._started_at = now
        self._deadline = now + longest_s + 60.0
        self._reason = _reason(findings)
        plan = plan_lifetimes(findings)
        if plan is None or len(ports) < plan.port_count:
            self._reason = self._reason or "the NAT grants too few mappings, or too slowly"
        if self._reason is None and plan is not None:
            self.start(self._look(plan, shortest_s, longest_s))

    # What runs ------------------------------------------------------------------------------------

    def _look(self, plan: LifetimePlan, shortest_s: float, longest_s: float) -> Script[None]:
        """Find observers that deliver, start everything, and watch until enough is known."""
        observers = []
        for observer in self.findings.observers:
            kept = yield self.echo(0, observer)
            if kept is not None and (yield from self.control(observer)):
                self._note_kept(kept)
                observers.append(observer)
                self.start(self._keep(observer))
        if not observers:
            self._reason = "no observer delivers to our main port"
            self.stop()
            return
        ports = iter(self.ports)
        scripts: list[Script[None]] = []

        def turn() -> tuple[int, Observer]:
            return next(ports), observers[len(scripts) % len(observers)]

        scripts += [self._watch_age(index, *turn()) for index in range(ABSOLUTE_PORTS)]
        scripts += [self._watch_inbound(index, *turn()) for index in range(INBOUND_PORTS)]
        for survival, count in (
            (self._unreplied, plan.unreplied_count),
            (self._replied, plan.replied_count),
        ):
            self._points_left[survival] = count
            for duration in geometric_grid(shortest_s, longest_s, count):
                scripts.append(self._point(survival, duration, *turn()))
        for script in scripts:
            self.start(script)
            yield self.now + plan.spacing_s
        while not self._is_enough() and self.now < self._deadline:
            yield self.now + 1.0
        self.stop()

    def _keep(self, observer: Observer) -> Script[None]:
        """Keep the main port's mapping alive, and its endpoint known."""
        while True:
            kept = yield self.echo(0, observer)
            if kept is None:
                self._lost_count += len(RETRY_AFTER_S)
            else:
                self._note_kept(kept)
            yield self.now + KEEPALIVE_S

    def _note_kept(self, kept: Answer) -> None:
        self._kept_count += 1
        self._lost_count += kept.try_count - 1
        self._main[kept.reply.sender] = kept.observed
        self._rtt_s = min(self._rtt_s, kept.received_at - kept.sent_at)

    def _point(
        self, survival: Survival, duration_s: float, port: int, observer: Observer
    ) -> Script[None]:
        """Look once whether a mapping lives after so many seconds of silence."""
        is_replied = survival is self._replied
        opened = yield from self._open(port, observer, is_replied=is_replied)
        if opened is not None:
            # Up, the mapping is made a quarter of a round trip after we send, as a guess; the last
            # packet in passes it as long before we have it as the next one will.
            since = opened.received_at if is_replied else opened.last_sent_at
            lead_s = self._rtt_s if is_replied else self._rtt_s / 2
            yield since + duration_s - lead_s
            asked = self.delivery(port, opened.observed, observer)
            if (yield asked) is not None:
                survival.add_alive(asked.sent_times[-1] + lead_s - since)
            elif (yield from self.control(observer)):
                survival.add_dead([time + lead_s - since for time in asked.sent_times])
        self._points_left[survival] -= 1

    def _open(self, port: int, observer: Observer, *, is_replied: bool) -> Script[Answer | None]:
        """Open a mapping; where the NAT refuses, old ones may first have to expire."""
        while self.now < self._deadline - self._replied.tried_s / 2:
            asked = self.echo(port, observer) if is_replied else self._opener(port, observer)
            opened = yield asked
            if opened is None:
                yield self.now + OPEN_AGAIN_S
            elif not is_replied:
                return opened
            else:
                yield opened.sent_at + STREAM_S
                again = yield self.echo(port, observer)
                if again is not None:
                    return again
        return None

    def _opener(self, port: int, observer: Observer) -> Question:
        """Return the question that opens a mapping whose answer comes in at the main port."""

        def build(transaction: bytes) -> Request:
            main = self._main[observer.peer_id]
            return SendEcho(
                port,
                observer.endpoint,
                observer.peer_id,
                transaction,
                deliver_to=main,
                token=self.token(observer, main.ip),
            )

        def is_expected(reply: Reply) -> bool:
            return (
                reply.port_index == 0
                and reply.sender == observer.peer_id
                and reply.source == observer.endpoint
            )

        return Question(build, is_expected)

    def _watch_age(self, index: int, port: int, observer: Observer) -> Script[None]:
        """Refresh a mapping by sending, for as long as the test takes, and note when it dies."""
        born: Answer | None = None
        alive_at = 0.0
        while True:
            seen = yield self.echo(port, observer)
            if seen is not None and born is None:
                born = seen
            elif seen is not None and born is not None:
                if seen.observed != born.observed:
                    self._add_death(born, alive_at, seen.sent_at)
                    born = seen
                else:
                    self._watched_s[index] = seen.sent_at - born.sent_at
            if seen is None or born is None:
                yield self.now + OPEN_AGAIN_S
                continue
            alive_at = seen.sent_at
            yield seen.sent_at + ABSOLUTE_REFRESH_S
            if born.observed.port == born.reply.local_port:
                asked = self.delivery(port, born.observed, observer, retry_after_s=CERTAIN_WAITS_S)
                if (yield asked) is not None:
                    alive_at = asked.sent_times[-1]
                elif (yield from self.control(observer)):
                    self._add_death(born, alive_at, asked.sent_times[0])
                    born = None

    def _add_death(self, born: Answer, alive_at: float, dead_at: float) -> None:
        self._deaths.append(_Death(alive_at - born.sent_at, dead_at - born.sent_at))

    def _watch_inbound(self, index: int, port: int, observer: Observer) -> Script[None]:
        """Have a mapping receive and never send, and note when it no longer does."""
        opened = yield from self._open(port, observer, is_replied=True)
        if opened is None:
            return
        since = opened.received_at
        while True:
            yield self.now + INBOUND_REFRESH_S
            asked = self.delivery(port, opened.observed, observer, retry_after_s=CERTAIN_WAITS_S)
            if (yield asked) is not None:
                self._lived_s[index] = asked.sent_times[-1] - since
            elif (yield from self.control(observer)):
                self._inbound_deaths[index] = _Death(
                    self._lived_s[index], asked.sent_times[0] + self._rtt_s - since
                )
                return

    # What follows ---------------------------------------------------------------------------------

    @property
    def _loss(self) -> float:
        """Share of tries that get no answer though all is well, with a pinch of doubt."""
        return (self._lost_count + 1) / (self._lost_count + self._kept_count + 30)

    def _is_decided(self, survival: Survival) -> bool:
        return survival.dead_count >= DEAD_POINTS or self._points_left[survival] == 0

    def _is_enough(self) -> bool:
        if not (self._is_decided(self._unreplied) and self._is_decided(self._replied)):
            return False
        if len(self._deaths) < ABSOLUTE_PORTS and min(self._watched_s) < self._absolute_s:
            return False
        _, idle = self._replied.posterior(self._loss)
        return (
            not math.isfinite(idle.high)
            or self._refreshes(idle) is not None
            or all(death is not None for death in self._inbound_deaths)
        )

    def _refreshes(self, idle: Interval) -> bool | None:
        """Return whether inbound packets kept ports alive; None: they disagree, or not yet."""
        if all(lived > 1.15 * idle.high + 1 for lived in self._lived_s):
            return True
        deaths = [death for death in self._inbound_deaths if death is not None]
        if len(deaths) == INBOUND_PORTS and all(
            death.dead_s > 0.9 * idle.low and death.alive_s < 1.1 * idle.high for death in deaths
        ):
            return False
        return None

    def conclude(self) -> None:
        """Write what was found into the findings."""
        found: dict[str, Any] = {}  # fields of a profile -> their values
        unknown: dict[str, str] = {}
        intervals: dict[str, Interval] = {}
        age, age_interval = self._age()
        found["absolute_lifetime_s"] = age
        if age_interval is None:
            unknown["absolute_lifetime_s"] = "too few ports showed it"
        else:
            intervals["absolute_lifetime_s"] = age_interval
        # What dies of age cannot be told from what dies of idleness.
        idle_max = math.inf
        if self._deaths:
            idle_max = AGE_SPREAD * min(death.dead_s for death in self._deaths)
        for name, survival in (
            ("idle_unreplied_s", self._unreplied),
            ("idle_lifetime_s", self._replied),
        ):
            middle, interval = survival.posterior(self._loss)
            is_long = middle == math.inf and survival.alive_s >= 0.9 * survival.tried_s
            if interval.high <= idle_max and (is_long or math.isfinite(interval.high)):
                found[name], intervals[name] = middle, interval
                continue
            found[name] = None
            unknown[name] = (
                f"mappings die of age before it shows; some lived {survival.alive_s:.0f} s idle"
                if self._deaths
                else "too few mappings lived or died to tell"
            )
        found["inbound_refreshes"] = None
        idle = intervals.get("idle_lifetime_s")
        if idle is not None and math.isfinite(idle.high):
            found["inbound_refreshes"] = self._refreshes(idle)
        if found["inbound_refreshes"] is None:
            unknown["inbound_refreshes"] = "it takes an idle lifetime that is known, to be outlived"
        if self._reason is not None or self.was_hindered:
            unknown = dict.fromkeys(unknown, self._reason or self.unfinished)
        findings = self.findings
        findings.profile = replace(findings.profile, **found)
        for name in found:
            findings.unknown.pop(name, None)
            findings.intervals.pop(name, None)
        findings.unknown.update(unknown)
        findings.intervals.update(intervals)

    def _age(self) -> tuple[float | None, Interval | None]:
        """Return the shortest absolute lifetime seen, and where it lies."""
        if len(self._deaths) >= 2:
            first = min(self._deaths, key=lambda death: death.dead_s)
            doubt_s = 0.05 * (first.dead_s - first.alive_s)
            interval = Interval(first.alive_s + doubt_s, first.dead_s - doubt_s)
            return (first.alive_s + first.dead_s) / 2, interval
        watched_s = min(self._watched_s)
        if not self._deaths and watched_s >= min(self._absolute_s, self._replied.tried_s):
            return math.inf, Interval(watched_s, math.inf)
        return None, None


def _reason(findings: Findings) -> str | None:
    """Return why it cannot be tested; None where it can."""
    profile = findings.profile
    if not findings.observers:
        return "nobody can wake our mappings"
    if profile.is_translated is None:
        return "it is not known if we have a NAT"
    if not profile.is_translated and profile.filtering in (Filtering.EIF, None):
        return "there is no NAT, and no firewall that is known of"
    return None
