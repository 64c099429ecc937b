"""Which paths to a peer are alive, and which of them carries the connection: the machine.

    a path = a port of ours + an endpoint of the peer's

Every path is asked again and again with PROBEs that carry the connection's own name; only an ACK
from exactly where the PROBE went to, to exactly the port it left from, says that it is alive. So
nobody who does not hold the pair's keys can keep a path, open one, or make us switch, and what
QUIC receives has no say. Paths come from punctures (`add`), from endpoints worth a try (`check`),
and from authentic PROBEs out of unexpected places: a peer whose NAT forgot it, or who roams. Those
are answered one for one, and are paths once they have answered us.

    when                                           asked
    QUIC sends by it                               once a second
    nothing was sent for the keepalive interval    then
    the last question is not answered              every 0.3 s (1.5 round trips), from 2 s on less

A path that is silent for 2 s (or 4 round trips) after a question is dead: under traffic that is
noticed 3 s after the break, at rest a keepalive interval and 2 s. When we have moved, all are asked
at once, three times, and 0.6 s (2.5 round trips) are enough: most have died. What is dead goes on
being asked, ever less often, and lives again if it answers. The best of the living carries QUIC:

    answers          before    its question has waited for 0.5 s (2 round trips), or 0.1 s (1.5)
                               where the peer has turned up elsewhere since
    in use           before    spare: over a second interface of either side, and kept ready
    later puncture   before    earlier: it was made because the other will end
    quicker          before    slower, by a fifth and 5 ms: no flapping

The keepalive interval is 0.7 of what our NAT's idle lifetime is known to be. The peer does the same
for its own NAT, so the shorter interval of both holds. What is not known is assumed and corrected:
a path that died of silence halves the interval, and two paths that died in use at a like age tell
an absolute lifetime.

Sans-IO as `puncture/puncturer.py`: feed it `receive_datagram`, after everything take
`probes_to_send`, `next_event`, `next_timer`. Source: RFC 8445 section 11 and RFC 7675 (keepalives,
consent), RFC 9000 section 9 (what must not move a connection); lifetimes: Richter et al., IMC 2016.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.identity import ProbeKeys
from natswarm.puncture.puncturer import ProbeToSend
from natswarm.wire import Probe, ProbeKind, decode_probe_untrusted, encode_probe

__all__ = ["Lifetimes", "Path", "PathKeeper", "PathSwitched"]

# Of a lifetime, in the middle of which nobody knows where we are (reference section 4, point 7).
REFRESH_AT = 0.7
# Unknown: short of the 30 s that Linux gives one-way traffic; the median of fixed networks is 35 s,
# of cellular ones 65 s, and the few that forget sooner teach us.
KEEPALIVE_ASSUMED_S = 20.0
KEEPALIVE_MIN_S = 4.0
# More than this saves a phone nothing, and a dead path would be noticed late.
KEEPALIVE_MAX_S = 60.0

TRAFFIC_INTERVAL_S = 1.0
RETRY_MIN_S, RETRY_ROUND_TRIPS = 0.3, 1.5
DOUBT_MIN_S, DOUBT_ROUND_TRIPS = 0.5, 2.0
# Where the peer has turned up elsewhere, which costs nothing to believe: that path has answered.
LEFT_MIN_S, LEFT_ROUND_TRIPS = 0.1, 1.5
# Seven questions. At 10 % loss each way all fail by chance once in 100,000 times, and then
# the next answer mends it.
DEATH_MIN_S, DEATH_ROUND_TRIPS = 2.0, 4.0
# After a move: three questions, the last of which has a round trip for its answer.
MOVED_RETRY_MIN_S, MOVED_RETRY_ROUND_TRIPS = 0.2, 0.75
MOVED_DEATH_MIN_S, MOVED_DEATH_ROUND_TRIPS = 0.6, 2.5
# A dead path is asked 1, 2, 3, 4, 4, ... s apart: the cable may be plugged in again.
DEAD_RETRY_S, DEAD_RETRY_MAX_S = 1.0, 4.0
# A dead path beside a living one is forgotten after this; it was worth waiting for its return.
DEAD_KEPT_S = 10.0

# Endpoints that never answered: tried at 0, 0.45, 0.9, ... s.
CHECKS_PER_CANDIDATE = 5
CANDIDATES_MAX = 16
# The active path, one that is ready, and one on its way out.
PATHS_MAX = 3

QUICKER_FACTOR, QUICKER_S = 0.8, 0.005
ROUND_TRIP_ASSUMED_S = 0.3

# PROBEs under way whose ACK we would still take, and the peer's PROBEs whose way we remember.
SENT_MAX = 256
SEEN_MAX = 256


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long our NAT keeps a mapping; seconds, None where not known.

    Attributes:
        idle_s: Without traffic.
        absolute_s: Whatever the traffic; infinity: longer than was tried.
    """

    idle_s: float | None = None
    absolute_s: float | None = None

    def or_else(self, other: Lifetimes) -> Lifetimes:
        """Return this, with what is not known taken from `other`."""
        return Lifetimes(
            other.idle_s if self.idle_s is None else self.idle_s,
            other.absolute_s if self.absolute_s is None else self.absolute_s,
        )

    @property
    def keepalive_s(self) -> float:
        """After which silence to send something."""
        if self.idle_s is None:
            return KEEPALIVE_ASSUMED_S
        return min(max(REFRESH_AT * self.idle_s, KEEPALIVE_MIN_S), KEEPALIVE_MAX_S)

    @property
    def renewal_s(self) -> float:
        """At which age of a mapping to open the next one."""
        return math.inf if self.absolute_s is None else REFRESH_AT * self.absolute_s


@dataclass(slots=True, eq=False)
class Path:
    """A port of ours and an endpoint of the peer's; times are those of the machine's clock.

    Attributes:
        port_index: Our end.
        endpoint: The peer's end.
        generation: Punctures of this connection so far, when the path was found.
        opened_at: Our NAT's mapping is not older; minus infinity where that is not known.
        found_at: When it was added.
        rtt_s: Smoothed round trip; None before the first answer.
        heard_at: When the last authentic datagram came by it.
        active_since: Since when QUIC goes by it, or went when it last did.
        is_dead: Whether it was silent for too long.
        sent_datagram_count: Of QUIC; these four are counted by the driver.
        sent_bytes: In them.
        received_datagram_count: Of QUIC.
        received_bytes: In them.
    """

    port_index: int
    endpoint: Endpoint
    generation: int
    opened_at: float
    found_at: float
    rtt_s: float | None = None
    heard_at: float = -math.inf
    active_since: float = math.inf
    is_dead: bool = False
    is_spare: bool = False
    """Whether we keep it ready over another interface, and the peer should use others."""
    is_their_spare: bool = False
    """Whether the peer does so."""
    is_proven: bool = False
    sent_datagram_count: int = 0
    sent_bytes: int = 0
    received_datagram_count: int = 0
    received_bytes: int = 0
    """Whether it has ever answered by the connection's name."""
    sent_at: float = -math.inf
    """When anything was sent by it, QUIC included."""
    traffic_at: float = -math.inf
    """When QUIC sent by it."""
    asked_at: float = -math.inf
    """When the last PROBE was sent by it."""
    doubted_since: float | None = None
    """When the first PROBE was sent since the last answer; None: all is answered."""
    died_at: float = math.inf
    moved_at: float = -math.inf
    """When we last moved to another network, or since when the peer can't reach us."""
    observed: Endpoint | None = None
    """Where the peer saw our last question come from; None: not asked since we moved."""
    asked_count: int = 0
    """PROBEs since the last answer."""

    @property
    def way(self) -> tuple[int, Endpoint]:
        """What tells it from others."""
        return self.port_index, self.endpoint

    @property
    def is_kept_ready(self) -> bool:
        """Whether it is for when no other answers."""
        return self.is_spare or self.is_their_spare

    @property
    def is_in_question_by_move(self) -> bool:
        """Whether it has not answered since we moved."""
        return self.doubted_since is not None and self.doubted_since == self.moved_at

    def after(self, minimum_s: float, round_trips: float) -> float:
        """Return a time-out of so many round trips."""
        rtt_s = ROUND_TRIP_ASSUMED_S if self.rtt_s is None else self.rtt_s
        return max(minimum_s, round_trips * rtt_s)


@dataclass(frozen=True, slots=True)
class PathSwitched:
    """The connection moved, or has nowhere to be.

    Attributes:
        old: Where it was; None: nowhere.
        new: Where it is; None: no path is alive.
        reason: Why, in words.
    """

    old: Endpoint | None
    new: Endpoint | None
    reason: str


@dataclass(slots=True)
class _Sent:
    sequence: int
    way: tuple[int, Endpoint]
    at: float


@dataclass(slots=True)
class KeeperStatistics:
    """Counters; they only grow."""

    sent_count: int = 0
    """PROBEs of ours."""
    answered_count: int = 0
    """ACKs of ours, one for each authentic PROBE that is new."""
    forged_count: int = 0
    """Dropped: not made with the peer's key for this connection."""
    replayed_count: int = 0
    """Dropped: a PROBE that came before from elsewhere, or is too old to tell."""
    rebound_count: int = 0
    """Answers that saw us elsewhere than the one before them by the same path."""
    doubted_count: int = 0
    """Times that the active path did not answer in time."""
    stray_count: int = 0
    """Dropped: an ACK that answers nothing we sent from there to there."""


@dataclass(slots=True)
class PathKeeper:
    """The paths of one connection.

    Args:
        keys: MAC keys between us and the peer.
        name: 8 bytes that name this connection on both sides, never used before with these keys.
        lifetimes: What our NAT is known to do.

    Attributes:
        paths: Those that have answered, oldest first.
        active: The one QUIC uses; stays the last one where none is alive.
    """

    keys: ProbeKeys
    name: bytes
    lifetimes: Lifetimes = field(default_factory=Lifetimes)
    paths: list[Path] = field(default_factory=list)
    active: Path | None = None
    statistics: KeeperStatistics = field(default_factory=KeeperStatistics)
    _candidates: list[Path] = field(default_factory=list)
    _events: deque[PathSwitched] = field(default_factory=deque)
    _outbox: list[ProbeToSend] = field(default_factory=list)
    _sent: deque[_Sent] = field(default_factory=lambda: deque(maxlen=SENT_MAX))
    _seen: dict[int, tuple[int, Endpoint]] = field(default_factory=dict)
    _sequence: int = 0
    _generation: int = 0
    _stranded_since: float | None = None
    _mourned: Path | None = None
    """The path that died when no other was left."""
    _learns_from: float = -math.inf
    _looked_at: float = -math.inf
    _ages_at_death: deque[float] = field(default_factory=lambda: deque(maxlen=2))

    # What the driver asks -------------------------------------------------------------------------

    @property
    def stranded_since(self) -> float | None:
        """Since when no path is alive; None while one is."""
        return self._stranded_since

    @property
    def port_indices(self) -> set[int]:
        """The ports that a path leads through, or may."""
        return {path.port_index for path in (*self.paths, *self._candidates)}

    @property
    def renewal_at(self) -> float:
        """When the next path should be opened, before our NAT ends that of the newest one."""
        living = [path for path in self.paths if not path.is_dead and not path.is_spare]
        if not living or math.isinf(self.lifetimes.renewal_s):
            return math.inf
        newest = max(living, key=lambda path: path.generation)
        return newest.opened_at + self.lifetimes.renewal_s

    def next_event(self) -> PathSwitched | None:
        """Return the next event, if there is one."""
        return self._events.popleft() if self._events else None

    def next_timer(self) -> float:
        """Return when to call `probes_to_send`; infinity: only after something has happened."""
        if self._outbox:
            return -math.inf
        times = [self._due_at(path) for path in (*self.paths, *self._candidates)]
        times += [self._death_at(path) for path in self.paths if not path.is_dead]
        if self.active is not None and self._doubt_at(self.active) > self._looked_at:
            times.append(self._doubt_at(self.active))
        return min(times, default=math.inf)

    # What the driver tells ------------------------------------------------------------------------

    def add(
        self,
        port_index: int,
        endpoint: Endpoint,
        now: float,
        *,
        opened_at: float | None = None,
        is_spare: bool = False,
    ) -> None:
        """Take a path that a puncture has just proved.

        QUIC goes by it from now on, or if it has a living one, once this one answers by the
        connection's name, too: the peer may be a moment behind us.

        Args:
            port_index: Our end.
            endpoint: The peer's end.
            now: The time.
            opened_at: Since when our NAT's mapping may be there; by default since `now`.
            is_spare: Whether it leads over another interface, and is to be kept ready.
        """
        self._generation += 1
        path = self._find(self.paths, port_index, endpoint)
        if path is None:
            path = Path(port_index, endpoint, self._generation, now, now)
            self.paths.append(path)
        if (candidate := self._find(self._candidates, port_index, endpoint)) is not None:
            self._candidates.remove(candidate)
            path.is_their_spare = candidate.is_their_spare
        path.generation, path.is_spare = self._generation, is_spare
        path.opened_at = now if opened_at is None else opened_at
        path.heard_at = path.sent_at = now
        path.doubted_since, path.died_at = None, math.inf
        path.is_dead, path.asked_count = False, 0
        if self.active is not None:
            self._ask(path, now)
        self._choose(now)

    def check(
        self,
        port_index: int,
        endpoints: tuple[Endpoint, ...],
        now: float,
        *,
        is_spare: bool = False,
    ) -> None:
        """Ask endpoints where the peer might be, each a few times."""
        for endpoint in endpoints:
            path = self._find(self.paths, port_index, endpoint)
            if path is None:
                self._add_candidate(port_index, endpoint, now, is_spare=is_spare)

    def drop_spares(self) -> None:
        """Keep no path ready any more, unless QUIC goes by it."""
        self.paths = [path for path in self.paths if not path.is_spare or path is self.active]
        self._candidates = [path for path in self._candidates if not path.is_spare]

    def recheck(self, now: float, *, has_moved: bool, has_slept: bool = False) -> None:
        """Ask every path at once: something has changed on our side.

        Args:
            now: The time.
            has_moved: Whether we are in another network. What dies now tells nothing of a NAT, and
                few paths live on.
            has_slept: Whether time has passed unnoticed: what dies now tells nothing, either.
        """
        if has_moved or has_slept:
            self._learns_from = now
        for path in self.paths:
            if has_moved:
                path.moved_at, path.doubted_since, path.observed = now, now, None
            self._ask(path, now)

    def hurry(self, now: float) -> None:
        """Ask every path at once, and not for long: the peer says that none leads to us."""
        for path in self.paths:
            if path.doubted_since is None:
                path.doubted_since = now
            path.moved_at = path.doubted_since
            self._ask(path, now)

    def forget_port(self, port_index: int) -> None:
        """Drop what leads through a port that was closed."""
        self.paths = [path for path in self.paths if path.port_index != port_index]
        self._candidates = [path for path in self._candidates if path.port_index != port_index]

    def note_traffic(self, now: float) -> bool:
        """Take note that QUIC has sent by the active path; return whether the timer is sooner."""
        active = self.active
        if active is None:
            return False
        is_first = active.traffic_at <= active.asked_at
        active.sent_at = active.traffic_at = now
        return is_first and active.doubted_since is None

    def receive_datagram(self, port_index: int, data: bytes, source: Endpoint, now: float) -> None:
        """Take a datagram of this connection's name that came in on a port."""
        try:
            probe = decode_probe_untrusted(data, self.keys.receive)
        except DecodeError:
            self.statistics.forged_count += 1
            return
        if probe.attempt != self.name:
            self.statistics.forged_count += 1
        elif probe.kind in (ProbeKind.PROBE, ProbeKind.SPARE):
            self._on_probe(probe, port_index, source, now)
        elif probe.kind is ProbeKind.ACK:
            self._on_ack(probe, port_index, source, now)
        else:
            self.statistics.stray_count += 1

    def probes_to_send(self, now: float) -> list[ProbeToSend]:
        """Return what is due."""
        if self.active is not None and self._looked_at < self._doubt_at(self.active) <= now:
            self.statistics.doubted_count += 1
        self._looked_at = now
        for path in self.paths:
            self._mourn(path, now)
        self._choose(now)
        active = self.active
        if active is not None and self._is_doubtful(active, now):
            for path in self.paths:  # which of them lives?
                if not path.is_dead and path.asked_at < (active.doubted_since or now):
                    self._ask(path, now)
        self._candidates = [
            each
            for each in self._candidates
            if each.asked_count < CHECKS_PER_CANDIDATE or now < self._due_at(each)
        ]
        for path in (*self.paths, *self._candidates):
            if now >= self._due_at(path):
                self._ask(path, now)
        probes, self._outbox = self._outbox, []
        return probes

    # Datagrams ------------------------------------------------------------------------------------

    def _on_probe(self, probe: Probe, port_index: int, source: Endpoint, now: float) -> None:
        way = (port_index, source)
        path = self._find([*self.paths, *self._candidates], port_index, source)
        newest = max(self._seen, default=-1)
        # From where the peer never was before, only its latest counts: whoever plays an old one
        # that never reached us gets no answer.
        oldest = newest - SEEN_MAX if path is not None else newest
        if self._seen.get(probe.sequence, way) != way or probe.sequence <= oldest:
            self.statistics.replayed_count += 1
            return
        self._seen[probe.sequence] = way
        if len(self._seen) > SEEN_MAX:
            del self._seen[min(self._seen)]
        self.statistics.answered_count += 1
        self._send(Probe(ProbeKind.ACK, self.name, probe.sequence, source), port_index, source)
        if path is None:
            path = self._add_candidate(port_index, source, now)
            if path is not None:
                path.is_their_spare = probe.kind is ProbeKind.SPARE
            return
        path.is_their_spare = probe.kind is ProbeKind.SPARE
        path.heard_at = path.sent_at = now
        if path.is_dead and now >= path.asked_at + RETRY_MIN_S:
            self._ask(path, now)  # perhaps it is alive again

    def _on_ack(self, probe: Probe, port_index: int, source: Endpoint, now: float) -> None:
        way = (port_index, source)
        for sent in self._sent:
            if sent.sequence == probe.sequence and sent.way == way:
                break
        else:
            self.statistics.stray_count += 1
            return
        path = self._find(self.paths, *way)
        if path is None:
            path = self._find(self._candidates, *way)
            if path is None:
                self.statistics.stray_count += 1
                return
            self._candidates.remove(path)
            self.paths.append(path)
            path.generation = self._generation
            # The peer may have moved here from the path that we use.
            if self.active is not None and now >= self.active.asked_at + RETRY_MIN_S:
                self._ask(self.active, now)
        if path.observed not in (None, probe.observed):
            self.statistics.rebound_count += 1
        path.observed = probe.observed
        sample_s = now - sent.at
        path.rtt_s = sample_s if path.rtt_s is None else 0.875 * path.rtt_s + 0.125 * sample_s
        path.heard_at, path.is_proven = now, True
        path.doubted_since, path.died_at = None, math.inf
        path.is_dead, path.asked_count = False, 0
        self._choose(now)

    def _ask(self, path: Path, now: float) -> None:
        kind = ProbeKind.SPARE if path.is_spare else ProbeKind.PROBE
        probe = Probe(kind, self.name, self._sequence)
        self._sent.append(_Sent(self._sequence, path.way, now))
        self._sequence = (self._sequence + 1) % 2**32
        self.statistics.sent_count += 1
        path.asked_at = path.sent_at = now
        path.asked_count += 1
        if path.doubted_since is None:
            path.doubted_since = now
        self._send(probe, *path.way)

    def _send(self, probe: Probe, port_index: int, destination: Endpoint) -> None:
        data = encode_probe(probe, self.keys.send)
        self._outbox.append(ProbeToSend(port_index, data, destination))

    # Life and death -------------------------------------------------------------------------------

    def _due_at(self, path: Path) -> float:
        """Return when to ask a path next."""
        if path.is_dead:
            over = path.asked_at - path.died_at
            return path.asked_at + min(max(DEAD_RETRY_S, over / 3), DEAD_RETRY_MAX_S)
        if path.doubted_since is not None:
            if path in self._candidates and path.asked_count >= CHECKS_PER_CANDIDATE:
                # Not asked again, but forgotten.
                return path.asked_at + path.after(DEATH_MIN_S, DEATH_ROUND_TRIPS)
            if path.is_in_question_by_move:
                return path.asked_at + path.after(MOVED_RETRY_MIN_S, MOVED_RETRY_ROUND_TRIPS)
            return path.asked_at + path.after(RETRY_MIN_S, RETRY_ROUND_TRIPS)
        if path.traffic_at > path.asked_at:
            return max(path.asked_at + TRAFFIC_INTERVAL_S, path.traffic_at)
        keepalive_s = self.lifetimes.keepalive_s
        if path.is_spare:  # another NAT's, of which nothing is known
            keepalive_s = min(keepalive_s, KEEPALIVE_ASSUMED_S)
        return path.sent_at + keepalive_s

    def _death_at(self, path: Path) -> float:
        """Return when a path that goes on being silent is dead."""
        if path.doubted_since is None:
            return math.inf
        if path.is_in_question_by_move:
            return path.doubted_since + path.after(MOVED_DEATH_MIN_S, MOVED_DEATH_ROUND_TRIPS)
        return path.doubted_since + path.after(DEATH_MIN_S, DEATH_ROUND_TRIPS)

    def _mourn(self, path: Path, now: float) -> None:
        """Take note of a path that has been silent for too long."""
        if not path.is_dead and now >= self._death_at(path):
            path.is_dead, path.died_at = True, now

    def _learn(self, dead: Path, found: Path) -> None:
        """Take the lesson of a path that died, once another leads to the same place.

        One that answered again was not a mapping's end, and neither was a move of either side.
        """
        since = dead.doubted_since
        if since is None or not dead.is_dead or dead.endpoint.ip != found.endpoint.ip:
            return
        if dead.is_kept_ready or found.is_kept_ready:
            return  # another NAT's
        if since < self._learns_from + self.lifetimes.keepalive_s:
            return
        silence_s = since - dead.heard_at
        if silence_s >= self.lifetimes.keepalive_s / 2:
            if dead.active_since > dead.heard_at:
                return  # it was silent as one that was only kept ready
            self.lifetimes = replace(self.lifetimes, idle_s=silence_s / 2 / REFRESH_AT)
            return
        self._ages_at_death.append(since - dead.found_at)
        shorter, longer = min(self._ages_at_death), max(self._ages_at_death)
        if len(self._ages_at_death) == 2 and longer <= 2 * shorter:
            known = self.lifetimes.absolute_s
            absolute_s = shorter if known is None else min(shorter, known)
            self.lifetimes = replace(self.lifetimes, absolute_s=absolute_s)

    def _choose(self, now: float) -> None:
        """Switch to a better path, and forget those that are of no more use."""
        before, why = self.active, ""
        for path in self.paths:
            if (reason := self._why_better(path, now)) is not None:
                self.active, why = path, reason
        active = self.active
        if active is None:
            return
        if active is not before:
            active.active_since = now
        if self._mourned is not None:
            # Only by the connection's name: a peer that has lost its end of the connection, and
            # makes a new one, takes part in punctures, too.
            if active.is_proven and not active.is_dead:
                self._end_outage(self._mourned, active)
        elif active.is_dead:
            self._mourned, self._stranded_since = active, now
            self._events.append(PathSwitched(active.endpoint, None, "it fell silent"))
        elif active is not before:
            if before is not None:
                self._learn(before, active)
            old = None if before is None else before.endpoint
            self._events.append(PathSwitched(old, active.endpoint, why))
        self._forget_useless(now)

    def _end_outage(self, lost: Path, found: Path) -> None:
        self._mourned = self._stranded_since = None
        if found is lost:
            why = "it answers again"
        else:
            why = "another path was found"
            self._learn(lost, found)
        self._events.append(PathSwitched(None, found.endpoint, why))

    def _why_better(self, path: Path, now: float) -> str | None:
        """Return why to leave the active path for this one; None: no reason."""
        active = self.active
        if active is None:
            return "the first path"
        if path is active or path.is_dead or self._is_doubtful(path, now):
            return None
        if active.is_dead or self._is_doubtful(active, now):
            # Only what was heard from meanwhile is known to be any better.
            if path.heard_at < (active.doubted_since or now):
                return None
            return "the old path fell silent"
        if not path.is_proven:
            return None
        if path.is_kept_ready is not active.is_kept_ready:
            return "the spare path is not needed any more" if active.is_kept_ready else None
        if path.generation != active.generation:
            return "the old path will end" if path.generation > active.generation else None
        if path.rtt_s is None or active.rtt_s is None:
            return None
        limit_s = min(QUICKER_FACTOR * active.rtt_s, active.rtt_s - QUICKER_S)
        return "it is quicker" if path.rtt_s < limit_s else None

    def _is_doubtful(self, path: Path, now: float) -> bool:
        return now >= self._doubt_at(path)

    def _doubt_at(self, path: Path) -> float:
        """Return when a path that goes on being silent is no better than others that answer."""
        if path.doubted_since is None:
            return math.inf
        for other in self.paths:
            if not other.is_proven or other.is_dead:
                continue
            # The peer has turned up there since it was last heard from here.
            it_left = not other.is_kept_ready and other.found_at > path.heard_at
            we_left = other.is_spare and path.is_in_question_by_move
            if it_left or (we_left and other.heard_at > path.moved_at):
                return path.doubted_since + other.after(LEFT_MIN_S, LEFT_ROUND_TRIPS)
        return path.doubted_since + path.after(DOUBT_MIN_S, DOUBT_ROUND_TRIPS)

    def _forget_useless(self, now: float) -> None:
        if self._stranded_since is not None:
            return  # any of them may come back
        useless = [p for p in self.paths if p.is_dead and now >= p.died_at + DEAD_KEPT_S]
        living = [p for p in self.paths if p is not self.active and p not in useless]
        living.sort(
            key=lambda p: (not p.is_dead, p.is_kept_ready, p.generation, -(p.rtt_s or math.inf))
        )
        useless += living[: max(0, len(living) + 1 - PATHS_MAX)]
        self.paths = [path for path in self.paths if path not in useless]

    def _add_candidate(
        self, port_index: int, endpoint: Endpoint, now: float, *, is_spare: bool = False
    ) -> Path | None:
        if self._find(self._candidates, port_index, endpoint) is not None:
            return None
        if len(self._candidates) >= CANDIDATES_MAX:
            return None
        candidate = Path(port_index, endpoint, self._generation, now, now, is_spare=is_spare)
        self._candidates.append(candidate)
        self._ask(candidate, now)
        return candidate

    @staticmethod
    def _find(paths: list[Path], port_index: int, endpoint: Endpoint) -> Path | None:
        for path in paths:
            if path.endpoint == endpoint and path.port_index == port_index:
                return path
        return None
