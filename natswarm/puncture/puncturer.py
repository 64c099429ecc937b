"""The machine that carries out a plan: sends probes, takes answers, ends with one path or a reason.

    we                                   the peer
    | -- PROBE 7 ----------------------> |   dropped by its NAT, but our NAT is open now
    | <---------------------- PROBE 3 -- |   gets in
    | -- ACK 3, "from 5.6.7.8:9" ------> |   back to where it came from, from where it came in
    | -- PROBE 8 ----------------------> |   to the same place: does it work in our direction, too?
    | <------------------------- ACK 8 --|   both ways: the path is valid
    | -- NOMINATE 9 -------------------> |   the controlling side picks its first valid path
    | <------------------- NOMINATED 9 --|   and both have the same one

A path is a port of ours and an endpoint of theirs. It is valid for us once an ACK came back from
exactly where its probe went to, to exactly the port it left from (RFC 8445 section 7.2.5.2.1).

What can be wrong with a datagram changes nothing but counters: other keys, another attempt, our own
probe thrown back (keys have a direction), a recorded probe played back from elsewhere (each
sequence number belongs to one source). Nothing is sent to anybody but in the plan or in answer to
an authentic probe, one for one and of the same size.

A plan may name another that follows if it finds nothing (`Plan.fallback`): one puncture, one name.
The orders of ports come from the two peers' secret, so that nobody else can tell them.

Sans-IO: feed it `receive_datagram` and `handle_timer`; after either, and at the start, take
`probes_to_send`, `next_event` and `next_timer`. Source: RFC 8445 for checks and nomination, cut
down to what one pair of peers with one datagram format needs. Knows no sockets, clock or NAT types.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from dataclasses import dataclass, replace

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.identity import ProbeKeys
from natswarm.puncture.schedule import BurstRun, OpenerRun
from natswarm.puncture.strategy import Plan
from natswarm.wire import (
    TFTP_READ_REQUEST,
    Probe,
    ProbeKind,
    decode_probe_untrusted,
    encode_probe,
)

__all__ = [
    "PathFound",
    "ProbeToSend",
    "PunctureEvent",
    "PunctureExhausted",
    "PunctureStatistics",
    "Puncturer",
]

# A check is sent at 0, 0.1, 0.3, 0.7, 1.5, 2.5, ... s where a retry takes 0.1 s: quick while both
# sides start together, then once a second for one that starts late. DCUtR's three tries in 0.4 s
# leave 2 % to chance at 10 % loss; five in 1.5 s leave 0.02 %.
CHECK_INTERVAL_MAX_S = 1.0

# Sources that were not in the plan and that an authentic probe came from. More than a few mean that
# the peer's NAT draws a port for every datagram; then none of them will last.
REFLEXIVE_CHECKS_MAX = 64

# NOMINATE is repeated like a check but faster, as the peer is known to be there; after so long
# without an answer the path is dead, which both sides must learn before users lose patience.
NOMINATE_INTERVAL_S = 0.1
NOMINATE_PATIENCE_S = 5.0

# After a probe came from exactly where we sent one, the burst waits for the answers: an RTT and a
# retry. After our own path is valid it waits for the controlling side to choose.
MATCH_PAUSE_S = 0.7
NOMINATION_WAIT_S = 2.5

# Sequence numbers of the peer that we remember, with their source, against replays. Few probes get
# in before a path is found; whoever has this many through needs no more of them answered.
SEQUENCES_MAX = 4096


@dataclass(frozen=True, slots=True)
class ProbeToSend:
    """One datagram to send now.

    Attributes:
        port_index: From the node's main port (0) or one of the extra ports (1..).
        data: 49 bytes.
        destination: Where to.
        ttl: Hop limit; None: the system's.
    """

    port_index: int
    data: bytes
    destination: Endpoint
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class PathFound:
    """Both sides have agreed on a path. The last event; the machine goes on answering the peer.

    Attributes:
        port_index: Our end: 0 for the main port, else an extra port.
        endpoint: The peer's end as we see it.
        probe_count: Probes we had sent by then.
        elapsed_s: Since the start.
        observed: Our end as the peer sees it; None where no ACK said so yet.
    """

    port_index: int
    endpoint: Endpoint
    probe_count: int
    elapsed_s: float
    observed: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class PunctureExhausted:
    """The plan was carried out and found no path. The last event.

    Attributes:
        reason: What was seen, for the user.
        probe_count: Probes we sent.
        elapsed_s: Since the start.
    """

    reason: str
    probe_count: int
    elapsed_s: float


PunctureEvent = PathFound | PunctureExhausted


@dataclass(slots=True)
class PunctureStatistics:
    """Counters; they only grow."""

    sent_count: int = 0
    """PROBEs of ours, checks, openers and bursts, and TFTP requests."""
    answered_count: int = 0
    """ACK and NOMINATED that we sent, one for each authentic datagram that asks for one."""
    received_count: int = 0
    """Authentic datagrams of this attempt."""
    forged_count: int = 0
    """Dropped: not a probe, or not made with the peer's key. Our own probes thrown back, too."""
    stale_count: int = 0
    """Dropped: authentic, but of another attempt."""
    replayed_count: int = 0
    """Dropped: a sequence number that came from elsewhere before, or one too many."""
    stray_count: int = 0
    """Dropped: an answer to nothing we sent from there to there, or out of turn."""


@dataclass(slots=True)
class _Check:
    port_index: int
    endpoint: Endpoint
    due_at: float
    interval_s: float
    sent_at: float = -math.inf


@dataclass(slots=True)
class _Nomination:
    port_index: int
    endpoint: Endpoint
    observed: Endpoint | None
    sequence: int
    started_at: float
    due_at: float


class Puncturer:
    """One side of one puncture.

    Args:
        plan: What to do.
        keys: MAC keys between us and the peer, one for each direction.
        attempt: 8 bytes that name the attempt on both sides; never used before with these keys.
        controlling: Whether we pick the path: the side with the lower PeerId.
        now: Seconds, the start of the plan; the clock of all later calls, which never goes back.
    """

    def __init__(
        self,
        plan: Plan,
        keys: ProbeKeys,
        attempt: bytes,
        controlling: bool,
        now: float,
    ) -> None:
        self._plan = plan
        self._extra_port_count = plan.extra_port_count
        self._keys = keys
        self._attempt = attempt
        self._is_controlling = controlling
        self._started_at = now
        self._now = now
        self._rng = random.Random(hashlib.blake2s(attempt, key=keys.send).digest())
        self._statistics = PunctureStatistics()
        self._outbox: deque[ProbeToSend] = deque()
        self._event: PunctureEvent | None = None
        self._is_event_taken = False
        # Where each probe of ours went, by sequence number, and the same ways for looking up.
        self._sent: list[tuple[int, Endpoint]] = []
        self._tried: dict[tuple[int, Endpoint], float] = {}  # way -> when last
        self._seen: dict[int, tuple[int, Endpoint]] = {}  # the peer's sequence -> in at, from
        self._checks: list[_Check] = []
        self._paused_until = now
        self._begin(plan, now)
        self._is_answered = False  # an ACK came back by some path
        self._nomination: _Nomination | None = None

    def _begin(self, plan: Plan, now: float) -> None:
        """Start a step of the plan; what the last one learned of the peer stays."""
        self._plan = plan
        self._step_at = now
        self._deadline = now + plan.duration_s
        known = [(check.port_index, check.endpoint) for check in self._checks]
        self._checks += [
            _Check(0, endpoint, now, plan.retry_s)
            for endpoint in plan.checks
            if (0, endpoint) not in known
        ]
        self._openers = None if plan.openers is None else OpenerRun(plan.openers, now)
        self._burst = None if plan.burst is None else BurstRun(plan.burst, self._rng, now)
        self._tftp_at = now if plan.tftp_targets else math.inf

    @property
    def strategy(self) -> str:
        """The strategy of the step that goes on, such as `one-sided-birthday`."""
        return self._plan.strategy.value

    @property
    def extra_port_count(self) -> int:
        """How many ports the machine wants beside the main port, as indices 1..count."""
        return self._extra_port_count

    @property
    def step_port_count(self) -> int:
        """How many of them the step that goes on wants."""
        return self._plan.step_port_count

    @property
    def is_answered(self) -> bool:
        """Whether an ACK came back: some path works both ways, agreed on or not."""
        return self._is_answered

    def statistics(self) -> PunctureStatistics:
        """Return a copy of the counters."""
        return replace(self._statistics)

    # Inputs ---------------------------------------------------------------------------------------

    def receive_datagram(self, port_index: int, data: bytes, source: Endpoint, now: float) -> None:
        """Take a datagram that came in on port `port_index` from `source`."""
        self._now = now
        try:
            probe = decode_probe_untrusted(data, self._keys.receive)
        except DecodeError:
            self._statistics.forged_count += 1
            return
        if probe.attempt != self._attempt:
            self._statistics.stale_count += 1
            return
        match probe.kind:
            case ProbeKind.PROBE:
                if self._is_first_from(probe, port_index, source):
                    self._on_probe(probe, port_index, source, now)
            case ProbeKind.ACK:
                self._on_ack(probe, port_index, source, now)
            case ProbeKind.NOMINATE:
                if self._is_first_from(probe, port_index, source):
                    self._on_nominate(probe, port_index, source, now)
            case ProbeKind.NOMINATED:
                self._on_nominated(probe, port_index, source, now)

    def handle_timer(self, now: float) -> None:
        """Take note of the time."""
        self._now = now
        if self._event is not None:
            return
        nomination = self._nomination
        if nomination is not None:
            if now >= nomination.started_at + NOMINATE_PATIENCE_S:
                self._give_up(
                    f"a path over {nomination.endpoint} was found, then the peer fell silent", now
                )
        elif now >= max(self._deadline, self._paused_until):
            if self._plan.fallback is not None:
                self._begin(self._plan.fallback, now)
            else:
                self._give_up(self._why_nothing(now), now)

    # Outputs --------------------------------------------------------------------------------------

    def probes_to_send(self, now: float) -> list[ProbeToSend]:
        """Return what is due, in the order to send it."""
        self.handle_timer(now)
        probes = list(self._outbox)
        self._outbox.clear()
        if self._event is not None:
            return probes
        nomination = self._nomination
        if nomination is not None:
            if now >= nomination.due_at:
                nomination.due_at = now + NOMINATE_INTERVAL_S
                probes.append(
                    self._datagram(
                        Probe(ProbeKind.NOMINATE, self._attempt, nomination.sequence),
                        nomination.port_index,
                        nomination.endpoint,
                    )
                )
            return probes
        if now >= self._tftp_at and self._has_budget:
            self._tftp_at = now + CHECK_INTERVAL_MAX_S
            probes += [self._tftp_request(0, endpoint) for endpoint in self._plan.tftp_targets]
        is_quiet = now < self._step_at + self._plan.checks_ttl_s
        check_ttl = self._plan.checks_ttl if is_quiet else None
        for check in () if self._is_answered and now < self._paused_until else self._checks:
            if now >= check.due_at and self._has_budget:
                check.sent_at = now
                check.due_at = now + check.interval_s
                check.interval_s = min(2 * check.interval_s, CHECK_INTERVAL_MAX_S)
                probes.append(self._probe(check.port_index, check.endpoint, check_ttl))
        if now >= self._paused_until:
            if self._openers is not None:
                openers = self._openers.openers
                for port_index, endpoint in self._openers.due(now):
                    if not self._has_budget:
                        continue
                    if openers.is_tftp:
                        probes.append(self._tftp_request(port_index, endpoint))
                    else:
                        probes.append(self._probe(port_index, endpoint, openers.ttl))
            if self._burst is not None:
                for port_index, endpoint in self._burst.due(now):
                    if self._has_budget:
                        probes.append(self._probe(port_index, endpoint))
        return probes

    def next_timer(self) -> float | None:
        """Return when to call `handle_timer` and `probes_to_send`; None: only on a datagram."""
        if self._outbox:
            return self._now
        if self._event is not None:
            return None
        if (nomination := self._nomination) is not None:
            return min(nomination.due_at, nomination.started_at + NOMINATE_PATIENCE_S)
        times = [max(self._deadline, self._paused_until)]
        if self._has_budget:
            rest_until = self._paused_until if self._is_answered else self._started_at
            times += [max(check.due_at, rest_until) for check in self._checks]
            times.append(self._tftp_at)
            for run in (self._openers, self._burst):
                if run is not None and run.next_at is not None:
                    times.append(max(run.next_at, self._paused_until))
        return min(times)

    def next_event(self) -> PunctureEvent | None:
        """Return the one event that ends the puncture, once; None before and after."""
        if self._event is None or self._is_event_taken:
            return None
        self._is_event_taken = True
        return self._event

    # What datagrams do ----------------------------------------------------------------------------

    def _on_probe(self, probe: Probe, port_index: int, source: Endpoint, now: float) -> None:
        self._answer(ProbeKind.ACK, probe, port_index, source)
        if self._event is not None or self._nomination is not None:
            return
        if (port_index, source) in self._tried:
            # It came back along a way that we opened: very likely this is the path.
            self._pause(now + MATCH_PAUSE_S)
        self._check_reflexive(port_index, source, now)

    def _on_ack(self, probe: Probe, port_index: int, source: Endpoint, now: float) -> None:
        if probe.sequence >= len(self._sent) or self._sent[probe.sequence][0] != port_index:
            self._statistics.stray_count += 1
            return
        self._statistics.received_count += 1
        if self._event is not None or self._nomination is not None:
            return
        if self._sent[probe.sequence][1] != source:
            # Answered from elsewhere: not the path we probed, but perhaps one.
            self._check_reflexive(port_index, source, now)
            return
        self._is_answered = True
        if self._is_controlling:
            self._nomination = _Nomination(
                port_index, source, probe.observed, len(self._sent), now, now
            )
            self._sent.append((port_index, source))
        else:
            self._pause(now + NOMINATION_WAIT_S)

    def _on_nominate(self, probe: Probe, port_index: int, source: Endpoint, now: float) -> None:
        event = self._event
        if self._is_controlling or isinstance(event, PunctureExhausted):
            self._statistics.stray_count += 1
            return
        if event is None:
            event = self._event = PathFound(
                port_index,
                source,
                self._statistics.sent_count,
                now - self._started_at,
            )
        if (event.port_index, event.endpoint) == (port_index, source):
            self._answer(ProbeKind.NOMINATED, probe, port_index, source)
        else:
            self._statistics.stray_count += 1

    def _on_nominated(self, probe: Probe, port_index: int, source: Endpoint, now: float) -> None:
        nomination = self._nomination
        if nomination is None or (probe.sequence, port_index, source) != (
            nomination.sequence,
            nomination.port_index,
            nomination.endpoint,
        ):
            self._statistics.stray_count += 1
            return
        self._statistics.received_count += 1
        if self._event is None:
            self._event = PathFound(
                port_index,
                source,
                self._statistics.sent_count,
                now - self._started_at,
                nomination.observed,
            )

    def _is_first_from(self, probe: Probe, port_index: int, source: Endpoint) -> bool:
        """Whether a request is new, or the same again by the same way; else count a replay."""
        way = (port_index, source)
        known = self._seen.get(probe.sequence)
        if known is None and len(self._seen) < SEQUENCES_MAX:
            self._seen[probe.sequence] = known = way
        if known != way:
            self._statistics.replayed_count += 1
            return False
        self._statistics.received_count += 1
        return True

    def _check_reflexive(self, port_index: int, source: Endpoint, now: float) -> None:
        """Check a path that the peer has shown us (RFC 8445 section 7.3.1.4, triggered check)."""
        for check in self._checks:
            # The others wait until it is clear what becomes of this one.
            check.due_at = max(check.due_at, now + self._plan.retry_s)
        for check in self._checks:
            if (check.port_index, check.endpoint) == (port_index, source):
                # Its probe shows that its NAT is open. If ours is under way it will be answered.
                check.due_at = max(now, check.sent_at + self._plan.retry_s)
                return
        if len(self._checks) < len(self._plan.checks) + REFLEXIVE_CHECKS_MAX:
            # A burst's probe of ours may be on its way there; see above. And the side that chooses
            # has an ACK of ours under way, so the other asks only if that got lost.
            sent_at = self._tried.get((port_index, source), -math.inf)
            wait_s = 0.0 if self._is_controlling else self._plan.retry_s
            due_at = max(now + wait_s, sent_at + self._plan.retry_s)
            self._checks.append(_Check(port_index, source, due_at, self._plan.retry_s))

    def _pause(self, until: float) -> None:
        # Never far beyond the deadline: a peer that keeps probing cannot keep us here for ever.
        latest = self._deadline + NOMINATION_WAIT_S
        self._paused_until = max(self._paused_until, min(until, latest))

    def _answer(self, kind: ProbeKind, probe: Probe, port_index: int, source: Endpoint) -> None:
        self._statistics.answered_count += 1
        answer = Probe(kind, self._attempt, probe.sequence, source)
        self._outbox.append(self._datagram(answer, port_index, source))

    def _probe(self, port_index: int, destination: Endpoint, ttl: int | None = None) -> ProbeToSend:
        self._statistics.sent_count += 1
        probe = Probe(ProbeKind.PROBE, self._attempt, len(self._sent))
        self._sent.append((port_index, destination))
        self._tried[port_index, destination] = self._now
        return self._datagram(probe, port_index, destination, ttl)

    def _tftp_request(self, port_index: int, destination: Endpoint) -> ProbeToSend:
        self._statistics.sent_count += 1
        return ProbeToSend(port_index, TFTP_READ_REQUEST, destination)

    def _datagram(
        self, probe: Probe, port_index: int, destination: Endpoint, ttl: int | None = None
    ) -> ProbeToSend:
        return ProbeToSend(port_index, encode_probe(probe, self._keys.send), destination, ttl)

    @property
    def _has_budget(self) -> bool:
        return self._statistics.sent_count < self._plan.probe_count_max

    def _give_up(self, reason: str, now: float) -> None:
        self._event = PunctureExhausted(reason, self._statistics.sent_count, now - self._started_at)

    def _why_nothing(self, now: float) -> str:
        counts = self._statistics
        sent = f"{counts.sent_count:,} probes in {now - self._started_at:.1f} s"
        if self._is_answered:
            return f"{sent}: a path was found, but the peer, whose choice it is, chose none"
        if counts.received_count:
            return (
                f"{sent}: the peer's probes arrive, but our answers do not come back the same way; "
                "one of the NATs does something else than its profile says: inspect both again"
            )
        return (
            f"{sent}, nothing from the peer: it did not take part, or the odds were against us; "
            "try again"
        )
