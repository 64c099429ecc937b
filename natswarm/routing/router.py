"""One node's part in carrying requests: to whom next, and whom instead if there is no answer.

    upstream ── Forward ──▶ we ── Forward ──▶ the nearest to the target of our links
             ◀─ Accepted ──    ◀─ Accepted ──  within some round trips, or else the next nearest
                                 ...
             ◀─ Answered ──    ◀─ Answered ──  within the patience we gave it, or else the next

A request is *ours to see through* once accepted: a neighbour that is silent, declines, goes away or
lets the time run out is followed by another, until one answers or our own time is over. Each hop
keeps back a part of the time it was given, so the hop next to the trouble notices first and mends
it; those before it go on waiting.

Three ways to go (`Mode`). CLOSEST goes strictly nearer to the target and ends where nobody nearer
is left. A node carries one path of a lookup only, so several paths of one lookup are disjoint by
themselves, and end at different nodes around the target. EXACT is the same, but ends at its target
or fails; it may step back where the nearest node has no link to the target. Both may first take
some steps at random (`stray_steps`): all paths that go straight come through the same neighbourhood
in the end, and of a swarm that was cut in two and is whole again, the wrong one may be the only one
that our neighbours know. WALK goes on at random
for so many steps; a step from a node with d links to one with e is taken with a chance of
min(1, d / e) (Metropolis and Hastings), which makes all nodes equally likely in the end.

Source: recursive Kademlia (Heep, "R/Kademlia", 2010); disjoint paths as in S/Kademlia, 4.2.
Knows no signatures and no records: requests and answers are bytes.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

from natswarm.errors import DecodeError
from natswarm.routing.distance import as_int
from natswarm.routing.kbucket import Link
from natswarm.routing.protocol import (
    BODY_BYTES_MAX,
    DETOURS_MAX,
    HOPS_MAX,
    PATIENCE_MAX_S,
    Accepted,
    Answered,
    Declined,
    Forward,
    LinkMessage,
    Mode,
    Reason,
    check_forward_untrusted,
)
from natswarm.routing.table import RoutingTable

__all__ = ["Arrived", "PathAnswered", "PathFailed", "Router", "RouterStatistics"]

# The part of its time that a hop gives to one neighbour. With 0.7, the sixth hop still has 0.8 s of
# 7 s, which is many round trips, and each has the time for a second and third try.
SHARE = 0.7
# A walk has many steps and does not matter: it starts anew instead of going another way.
WALK_SHARE = 0.97
PATIENCE_MIN_S = 0.1
# Tries of one hop: who failed with five neighbours will fail with the sixth.
TRIES_MAX = 5
# Neighbours that a node asks for a target which it should know and does not.
DETOUR_TRIES_MAX = 3
# Steps of a walk that end at a neighbour which declined them don't count as tries, but are bounded.
BOUNCES_MAX = 64

# A living neighbour accepts within a round trip. As with TCP's timer, four times the usual one, and
# not less than a phone's radio takes to wake.
ACCEPT_FACTOR = 4.0
ACCEPT_MIN_S = 0.5
ACCEPT_MAX_S = 2.0
SMOOTHING = 0.25  # of round trips; RFC 6298 takes 0.125, but has more of them

# Requests under way at one node: 20 a second from each of 30 neighbours, for a second or two each.
PASSAGES_MAX = 1024
# Lookups remembered as taken: the same for 10 s each.
SEEN_MAX = 4096


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request ends here: answer it with `Router.answer(label, ...)`, or `decline` it.

    Attributes:
        label: Names it.
        forward: What came.
        neighbour: Who brought it; None for our own.
    """

    label: int
    forward: Forward
    neighbour: bytes | None


@dataclass(frozen=True, slots=True)
class PathAnswered:
    """A path that we started has an answer; nobody has looked at it yet."""

    label: int
    answer: bytes


@dataclass(frozen=True, slots=True)
class PathFailed:
    """A path that we started came to nothing."""

    label: int


RouterEvent = Arrived | PathAnswered | PathFailed


@dataclass(slots=True)
class RouterStatistics:
    """Counters; they only grow."""

    carried_count: int = 0
    """Requests of others that we passed on."""
    retried_count: int = 0
    """Tries of another neighbour."""
    silent_count: int = 0
    """Neighbours that did not even accept."""
    declined_count: int = 0
    """Requests that we did not carry."""
    malformed_count: int = 0
    """Messages that nobody honest sends."""


@dataclass(slots=True, eq=False)
class _Passage:
    """A request on its way through this node."""

    label: int
    forward: Forward
    number: int  # the target
    upstream: bytes | None
    deadline: float
    tried: list[bytes] = field(default_factory=list)
    tried_before: int = 0  # of these, by other paths
    is_at_origin: bool = False
    has_arrived: bool = False
    neighbour: bytes | None = None
    is_accepted: bool = False
    sent_at: float = 0.0
    due: float = math.inf
    steps_left: int = 0
    bounce_count: int = 0
    detour_count: int = 0
    is_uncertain: bool = False  # somebody was silent or busy


class Router:
    """Carries requests.

    Args:
        table: Whom we are linked to; the caller keeps it.
        rng: Draws the steps of walks.
        outbox: Where messages to neighbours are put.
    """

    def __init__(
        self,
        table: RoutingTable,
        rng: random.Random,
        outbox: deque[tuple[bytes, LinkMessage]],
    ) -> None:
        self._table = table
        self._rng = rng
        self._outbox = outbox
        self._passages: dict[int, _Passage] = {}
        self._seen: dict[bytes, float] = {}
        self._timers: list[tuple[float, int]] = []
        self._next_label = 0
        self.events: deque[RouterEvent] = deque()
        self.statistics = RouterStatistics()

    def __len__(self) -> int:
        return len(self._passages)

    # Commands -------------------------------------------------------------------------------------

    def start(
        self,
        mode: Mode,
        lookup: bytes,
        target: bytes,
        request: bytes,
        *,
        patience_s: float,
        steps: int = HOPS_MAX,
        tried: tuple[bytes, ...] = (),
        stray_steps: int = 0,
        must_leave: bool = False,
        now: float,
    ) -> int:
        """Start one path of a lookup; return its label.

        Args:
            mode: How to go.
            lookup: 16 bytes; the paths of one lookup share them.
            target: Where to.
            request: What to bring.
            patience_s: When to give up.
            steps: Of a walk, how many.
            tried: Neighbours at which other paths of the lookup begin.
            stray_steps: Steps at random before it heads for the target.
            must_leave: Whether it goes to somebody else even if we are the nearest ourselves.
            now: The time.
        """
        detours = DETOURS_MAX if mode is Mode.EXACT else 0
        forward = Forward(
            0, mode, lookup, target, request, steps, detours, 0, stray_steps=stray_steps
        )
        self._note_seen(lookup, now)
        passage = self._new_passage(forward, None, now + min(patience_s, PATIENCE_MAX_S))
        passage.tried.extend(tried)
        passage.tried_before = len(tried)
        # Our own id is nearest to us: whoever looks for it means its neighbourhood.
        passage.is_at_origin = must_leave or target == self._table.own_id
        self._pass_on(passage, now)
        return passage.label

    def first_hop(self, label: int) -> bytes | None:
        """Return to whom a path of ours was given, last."""
        passage = self._passages.get(label)
        return None if passage is None else passage.neighbour

    def answer(self, label: int, answer: bytes) -> None:
        """Answer a request that arrived; too late is too late."""
        if (passage := self._passages.pop(label, None)) is not None:
            self._deliver(passage, answer)

    def decline(self, label: int) -> None:
        """Do not answer a request that arrived."""
        if (passage := self._passages.get(label)) is not None:
            self._fail(passage)

    # Inputs ---------------------------------------------------------------------------------------

    def receive(
        self, message: Forward | Accepted | Answered | Declined, link: Link, now: float
    ) -> None:
        """Take a message from a neighbour."""
        if isinstance(message, Forward):
            self._receive_forward(message, link, now)
            return
        link.strikes = 0
        passage = self._passages.get(message.label)
        if passage is None or passage.has_arrived:
            return
        if isinstance(message, Answered):
            # From anybody asked for this path: who was slow may be first in the end. Who carries
            # another path of the lookup only guessed the label, and would answer for all of them.
            asked = passage.tried[passage.tried_before :]
            if link.node_id in asked and len(message.answer) <= BODY_BYTES_MAX:
                link.answered_count += 1
                del self._passages[passage.label]
                self._deliver(passage, message.answer)
        elif passage.neighbour == link.node_id:
            if isinstance(message, Accepted):
                self._note_accepted(passage, link, now)
            else:
                self._note_declined(passage, message.reason, now)

    def link_down(self, node_id: bytes, now: float) -> None:
        """A neighbour is gone: what it carried for us goes another way."""
        for passage in list(self._passages.values()):
            if passage.neighbour == node_id and not passage.has_arrived:
                self._pass_on(passage, now)
            elif passage.upstream == node_id:
                self._passages.pop(passage.label, None)

    def handle_timer(self, now: float) -> None:
        """Go on where neighbours let the time run out."""
        timers = self._timers
        while timers and timers[0][0] <= now:
            due, label = heappop(timers)
            passage = self._passages.get(label)
            if passage is None or passage.due != due:
                continue
            if passage.has_arrived:
                del self._passages[label]  # nobody waits for it any more
                continue
            passage.is_uncertain = True
            link = None if passage.neighbour is None else self._table.link(passage.neighbour)
            if link is not None:
                if passage.is_accepted:
                    link.lost_count += 1
                else:
                    self.statistics.silent_count += 1
                    link.strikes += 1
            self._pass_on(passage, now)

    def next_timer(self) -> float:
        """Return when `handle_timer` is due; infinity if never."""
        timers = self._timers
        while timers:
            due, label = timers[0]
            passage = self._passages.get(label)
            if passage is not None and passage.due == due:
                return due
            heappop(timers)  # most requests are answered long before
        return math.inf

    # One request ----------------------------------------------------------------------------------

    def _receive_forward(self, forward: Forward, link: Link, now: float) -> None:
        try:
            check_forward_untrusted(forward)
        except DecodeError:
            self.statistics.malformed_count += 1
            return
        if not link.take(now) or len(self._passages) >= PASSAGES_MAX:
            self._decline(link.node_id, forward.label, Reason.BUSY)
            return
        if forward.mode == Mode.WALK:
            if self._rng.random() * max(len(self._table), 1) > forward.degree:
                self._decline(link.node_id, forward.label, Reason.BOUNCED)
                return
        elif forward.target != self._table.own_id or forward.mode == Mode.CLOSEST:
            if self._seen.get(forward.lookup, -math.inf) > now:
                self._decline(link.node_id, forward.label, Reason.TAKEN)
                return
            self._note_seen(forward.lookup, now)
        passage = self._new_passage(forward, link.node_id, now + forward.patience_ms / 1000)
        if self._pass_on(passage, now) and not passage.has_arrived:
            self.statistics.carried_count += 1
            self._outbox.append((link.node_id, Accepted(forward.label)))
        elif passage.has_arrived and forward.mode == Mode.EXACT:
            # The others are answered at once; this one may take its time.
            self._outbox.append((link.node_id, Accepted(forward.label)))

    def _pass_on(self, passage: _Passage, now: float) -> bool:
        """Give a request to the next neighbour, or end it here; return whether it lives on."""
        forward = passage.forward
        remaining_s = passage.deadline - now
        if passage.neighbour is not None:
            self.statistics.retried_count += 1
            passage.neighbour = None
        is_final = forward.target == self._table.own_id and not passage.is_at_origin
        if is_final and forward.mode == Mode.EXACT:
            return self._arrive(passage)
        if remaining_s < PATIENCE_MIN_S:
            return self._fail(passage)
        if forward.mode == Mode.WALK:
            if passage.steps_left <= 0 or passage.bounce_count > BOUNCES_MAX:
                return self._arrive(passage)
            link, is_detour = self._random_link(), False
        elif forward.stray_steps and len(passage.tried) - passage.tried_before < TRIES_MAX:
            link, is_detour = self._random_link(passage), False
        else:
            link, is_detour = self._next_link(passage)
        if link is None:
            # A request that found nobody nearer has arrived; one that may not end here has failed.
            if forward.mode == Mode.CLOSEST and not passage.is_at_origin:
                return self._arrive(passage)
            return self._fail(passage)
        share = WALK_SHARE if forward.mode == Mode.WALK else SHARE
        patience_s = share * remaining_s  # less a round trip, so that its "no" comes in time
        accept_s = min(max(ACCEPT_FACTOR * link.round_trip_s, ACCEPT_MIN_S), ACCEPT_MAX_S)
        passage.neighbour, passage.is_accepted, passage.sent_at = link.node_id, False, now
        passage.tried.append(link.node_id)
        passage.detour_count += is_detour
        self._arm(passage, now + min(patience_s, accept_s))
        self._outbox.append(
            (
                link.node_id,
                Forward(
                    label=passage.label,
                    mode=forward.mode,
                    lookup=forward.lookup,
                    target=forward.target,
                    request=forward.request,
                    hops_left=passage.steps_left - 1,
                    detours_left=forward.detours_left - is_detour,
                    patience_ms=max(int((patience_s - link.round_trip_s) * 1000), 0),
                    degree=len(self._table) if forward.mode == Mode.WALK else 0,
                    stray_steps=max(forward.stray_steps - 1, 0),
                ),
            )
        )
        return True

    def _next_link(self, passage: _Passage) -> tuple[Link | None, bool]:
        """Return the best neighbour not tried yet, and whether it leads away from the target."""
        if len(passage.tried) - passage.tried_before >= TRIES_MAX:
            return None, False
        if passage.steps_left <= 0:
            return None, False
        own = self._table.own_number ^ passage.number
        suspect: Link | None = None
        farther: Link | None = None
        for link in self._table.nearest(passage.number):
            if link.node_id == passage.upstream or link.node_id in passage.tried:
                continue
            if link.number ^ passage.number > own:
                farther = link
                break
            if not link.is_suspect:
                return link, False
            suspect = suspect or link
        if suspect is not None:
            return suspect, False
        if farther is not None and passage.is_at_origin:
            return farther, False
        forward = passage.forward
        can_detour = forward.detours_left > 0 and passage.detour_count < DETOUR_TRIES_MAX
        if forward.mode == Mode.EXACT and can_detour:
            return farther, True
        return None, False

    def _random_link(self, but: _Passage | None = None) -> Link | None:
        """Return any neighbour that reacts, except those that a passage came from or went to."""
        links = [link for link in self._table.links() if link.strikes == 0]
        if but is not None:
            gone = (but.upstream, *but.tried)
            links = [link for link in links if link.node_id not in gone]
        return self._rng.choice(links) if links else None

    def _note_accepted(self, passage: _Passage, link: Link, now: float) -> None:
        if passage.is_accepted:
            return
        passage.is_accepted = True
        link.round_trip_s += SMOOTHING * (now - passage.sent_at - link.round_trip_s)
        share = WALK_SHARE if passage.forward.mode == Mode.WALK else SHARE
        self._arm(passage, passage.sent_at + share * (passage.deadline - passage.sent_at))

    def _note_declined(self, passage: _Passage, reason: int, now: float) -> None:
        if passage.forward.mode == Mode.WALK and reason == Reason.BOUNCED:
            passage.steps_left -= 1
            passage.bounce_count += 1
        elif reason == Reason.ABSENT and not passage.detour_count:
            # Whoever is nearest says so; the origin does not rely on one such word, but we do.
            self._fail(passage)
            return
        passage.is_uncertain |= reason in (Reason.BUSY, Reason.NO_ROUTE)
        self._pass_on(passage, now)

    def _arrive(self, passage: _Passage) -> bool:
        passage.has_arrived = True
        self._arm(passage, passage.deadline)
        self.events.append(Arrived(passage.label, passage.forward, passage.upstream))
        return True

    def _fail(self, passage: _Passage) -> bool:
        del self._passages[passage.label]
        if passage.upstream is None:
            self.events.append(PathFailed(passage.label))
        else:
            # Where all say "taken", other paths are at it: trying on here would search them again.
            reason = Reason.NO_ROUTE if passage.is_uncertain else Reason.ABSENT
            self._decline(passage.upstream, passage.forward.label, reason)
        return False

    def _deliver(self, passage: _Passage, answer: bytes) -> None:
        if passage.upstream is None:
            self.events.append(PathAnswered(passage.label, answer))
        else:
            self._outbox.append((passage.upstream, Answered(passage.forward.label, answer)))

    def _decline(self, node_id: bytes, label: int, reason: Reason) -> None:
        self.statistics.declined_count += 1
        self._outbox.append((node_id, Declined(label, reason)))

    def _new_passage(self, forward: Forward, upstream: bytes | None, deadline: float) -> _Passage:
        self._next_label += 1
        passage = _Passage(
            self._next_label,
            forward,
            as_int(forward.target),
            upstream,
            deadline,
            steps_left=forward.hops_left,
        )
        self._passages[passage.label] = passage
        return passage

    def _arm(self, passage: _Passage, due: float) -> None:
        passage.due = due
        heappush(self._timers, (due, passage.label))

    def _note_seen(self, lookup: bytes, now: float) -> None:
        if len(self._seen) >= SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        self._seen[lookup] = now + PATIENCE_MAX_S
