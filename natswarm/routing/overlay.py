"""The overlay: all of routing as one synchronous machine.

    link_up, link_down ──▶  RoutingTable ◀── Upkeep      which links, what to look for
    receive ─────────────▶  Router ─────── Arrived ──▶ the five questions, answered here
    find, publish, ... ──▶  Lookup ◀────── PathAnswered
                            Keeper, RecordStore          records

Inputs are pushed in (`link_up`, `link_down`, `receive`, `handle_timer`), commands given (`ask`,
`tell`, `fetch`, `publish`, `sample`), and outputs pulled out after each: `messages_to_send`,
`events`, `next_timer`. One `now` serves timers and dates: seconds since 1970 of a clock that never
goes back.

Knows no connections: that a link is wanted or not is an event, and somebody else's work.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from natswarm.errors import DecodeError, RequestRefused
from natswarm.identity import Identity, PeerId
from natswarm.routing.distance import as_int
from natswarm.routing.kbucket import K, Link
from natswarm.routing.keeper import Keeper
from natswarm.routing.lookup import (
    ALPHA,
    PATHS_MAX,
    STAGGER_S,
    GivenAnswer,
    Lookup,
    LookupPlan,
)
from natswarm.routing.protocol import (
    PATIENCE_MAX_S,
    STRAY_STEPS_MAX,
    Answer,
    Ask,
    Closest,
    Fetch,
    Fetched,
    FindClosest,
    Forward,
    Goodbye,
    LinkMessage,
    Mode,
    Neighbours,
    Replicate,
    Request,
    Sample,
    Sampled,
    Store,
    Stored,
    Told,
    check_ids_untrusted,
    digest_of,
    open_request_untrusted,
    seal_answer,
    seal_request,
)
from natswarm.routing.record import Record, RecordKind
from natswarm.routing.router import Arrived, PathAnswered, Router
from natswarm.routing.store import RecordStore
from natswarm.routing.table import LINKS_MAX, RoutingTable
from natswarm.routing.upkeep import Upkeep

__all__ = ["Asked", "LinkUnwanted", "LinkWanted", "LookupEnded", "Overlay", "OverlayEvent"]

# Requests in a row that a neighbour may leave without a reaction before the link is given up: its
# connection would notice, too, but within half a minute.
STRIKES_MAX = 3

# Steps of a walk until where it began is forgotten; measured in docs/routing.md.
WALK_STEPS = 20

# Meetings under way or just answered: each may come once on each path.
ASKED_MAX = 256


@dataclass(frozen=True, slots=True)
class LinkWanted:
    """A link to a peer would be good; say `link_up` or `link_failed` in the end."""

    peer_id: PeerId


@dataclass(frozen=True, slots=True)
class LinkUnwanted:
    """A link is given up, by us or by the peer; it is gone from the table already."""

    peer_id: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A peer asks us something; answer with `tell`.

    Attributes:
        lookup: Names the question.
        origin: Who asks; proved.
        body: What.
        neighbour: Who brought it.
    """

    lookup: bytes
    origin: PeerId
    body: bytes
    neighbour: PeerId


@dataclass(frozen=True, slots=True)
class LookupEnded:
    """A lookup of ours is over.

    Attributes:
        lookup: Which.
        answers: Genuine answers, in the order they came; none if it failed.
    """

    lookup: bytes
    answers: tuple[GivenAnswer, ...]


OverlayEvent = LinkWanted | LinkUnwanted | Asked | LookupEnded


class Overlay:
    """Routing at one node.

    Args:
        identity: Who we are; signs requests, answers and records.
        rng: Draws names of lookups, targets, jitter and the steps of walks.
        links_max: Links to keep.
        alpha: Disjoint paths of a lookup; 1 saves two thirds of the messages and trusts everybody.

    Attributes:
        events: What happened; the caller takes them out.
        rejected_count: Messages and requests that were not genuine or over the bounds.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        rng: random.Random,
        links_max: int = LINKS_MAX,
        alpha: int = ALPHA,
    ) -> None:
        self._identity = identity
        self._rng = rng
        self._alpha = alpha
        self._outbox: deque[tuple[bytes, LinkMessage]] = deque()
        self.table = RoutingTable(identity.peer_id.key, links_max=links_max)
        self.store = RecordStore(identity.peer_id.key, rng)
        self.router = Router(self.table, rng, self._outbox)
        self._upkeep = Upkeep(self.table, rng)
        self._keeper = Keeper(identity, self.table, self.store, rng)
        self._lookups: dict[bytes, Lookup] = {}
        self._paths: dict[int, tuple[Lookup, bytes]] = {}
        self._publishing: dict[bytes, Record] = {}
        self._upkeep_lookups: set[bytes] = set()  # only asked for membership
        self._asked: dict[bytes, _Question] = {}
        self.events: deque[OverlayEvent] = deque()
        self.rejected_count = 0

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self._identity.peer_id

    # Commands -------------------------------------------------------------------------------------

    def find_closest(self, target: bytes, now: float) -> bytes:
        """Look for the node nearest to an id; ends in Closest answers."""
        plan = LookupPlan(
            Mode.CLOSEST, min(2, self._alpha), at_once=1, stagger_s=STAGGER_S, enough=1
        )
        if target == self.table.own_id:
            plan = LookupPlan(
                Mode.CLOSEST,
                self._alpha,
                self._alpha,
                enough=self._alpha,
                stray_steps=STRAY_STEPS_MAX,
                patience_s=PATIENCE_MAX_S,
            )
        return self._look(plan, FindClosest(self._new_name(), target), Closest, now)

    def ask(self, peer_id: PeerId, body: bytes, now: float, *, is_for_link: bool = False) -> bytes:
        """Ask a peer something; ends in one Told answer or none.

        Args:
            peer_id: Whom.
            body: What; at most some 4,900 bytes.
            now: The time.
            is_for_link: Whether it hardly matters that this very peer is reached: two paths, not
                `alpha`, are tried.

        Raises:
            ValueError: That is ourselves.
        """
        if peer_id == self.peer_id:
            raise ValueError("a node does not ask itself")
        plan = LookupPlan(
            Mode.EXACT,
            min(2, self._alpha) if is_for_link else self._alpha,
            at_once=1,
            stagger_s=STAGGER_S,
            enough=1,
            stray_steps=STRAY_STEPS_MAX,
            patience_s=PATIENCE_MAX_S,
        )
        return self._look(plan, Ask(self._new_name(), peer_id.key, body), Told, now)

    def tell(self, lookup: bytes, body: bytes) -> None:
        """Answer a question that `Asked` brought; nothing happens if it is too late."""
        question = self._asked.get(lookup)
        if question is None:
            return
        question.answer = seal_answer(self._identity, Told(question.digest, body))
        for label in question.labels:
            self.router.answer(label, question.answer)
        question.labels.clear()

    def fetch(self, key: bytes, now: float) -> bytes:
        """Look for the records of a key; ends in Fetched answers."""
        return self._look(self._spread_plan(), Fetch(self._new_name(), key), Fetched, now)

    def publish(self, kind: RecordKind, topic: str, value: bytes, now: float) -> bytes:
        """Publish a record, now and again until `withdraw`; ends in Stored answers.

        Raises:
            ValueError: Nobody would keep it.
        """
        return self._publish(self._keeper.publish(kind, topic, value, now), now)

    def withdraw(self, kind: RecordKind, topic: str) -> None:
        """Publish a record no more; it is gone when it expires."""
        self._keeper.withdraw(kind, topic)

    def sample(self, now: float) -> bytes:
        """Look for a node drawn uniformly from all, ourselves included; ends in one Sampled."""
        plan = LookupPlan(
            Mode.WALK,
            ALPHA,
            at_once=1,
            stagger_s=4.0,
            enough=1,
            patience_s=PATIENCE_MAX_S,
            steps=WALK_STEPS,
        )
        return self._look(plan, Sample(self._new_name(), bytes(32)), Sampled, now)

    def accepts_link(self, peer_id: PeerId, now: float) -> bool:
        """Whether a link to a peer would be kept."""
        return self.table.has_room_for(peer_id.key, now)

    # Inputs ---------------------------------------------------------------------------------------

    def link_up(self, peer_id: PeerId, now: float, *, prefix: str = "") -> None:
        """A neighbour speaks our protocol.

        Args:
            peer_id: Who.
            now: The time.
            prefix: What of its address costs money to have, such as the first 24 bits of an IPv4
                address; empty for addresses that say nothing.
        """
        self.table.add_link(Link(peer_id.key, now, prefix))
        self._upkeep.try_over(peer_id.key)
        self._upkeep.note_change(now, is_near=self._is_near(peer_id.key))
        self._tell_neighbours(peer_id.key)

    def link_down(self, peer_id: PeerId, now: float) -> None:
        """A neighbour is gone."""
        if self.table.link(peer_id.key) is not None:
            is_near = self._is_near(peer_id.key)
            self.table.remove_link(peer_id.key)
            self.router.link_down(peer_id.key, now)
            self._upkeep.note_change(now, is_near=is_near)
            self._after(now)

    def link_failed(self, peer_id: PeerId, now: float) -> None:
        """A wanted link could not be made."""
        self.table.note_failure(peer_id.key, now)
        self._upkeep.try_over(peer_id.key)
        self._upkeep.note_change(now, is_near=False)

    def receive_untrusted(self, message: LinkMessage, peer_id: PeerId, now: float) -> None:
        """Take a message from a neighbour; what is wrong with it is counted."""
        link = self.table.link(peer_id.key)
        if link is None:
            return
        try:
            if isinstance(message, (Neighbours, Goodbye)):
                self._receive_ids(message, link, now)
            elif isinstance(message, Replicate):
                if link.take(now):
                    self._outbox.extend(self._keeper.receive_untrusted(message, link.node_id, now))
            else:
                self.router.receive(message, link, now)
        except DecodeError:
            self.rejected_count += 1
        self._after(now)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        self.router.handle_timer(now)
        for link in self.table.links():
            if link.strikes >= STRIKES_MAX:
                self._drop(link.node_id, "it does not react to requests", now)
                self.table.note_failure(link.node_id, now)
        chores = self._upkeep.due(now)
        if chores.give_up is not None:
            self._say_goodbye(chores.give_up, now)
        for node_id in chores.link_to:
            self.events.append(LinkWanted(PeerId(node_id)))
        for target in chores.look_for:
            self._upkeep_lookups.add(self.find_closest(target, now))
        if chores.tell_neighbours:
            for link in self.table.nearest(self.table.own_number)[:K]:
                self._tell_neighbours(link.node_id)
        for record in self._keeper.due_publications(now):
            self._publish(record, now)
        self._outbox.extend(self._keeper.due_handovers(now))
        self._after(now)

    # Outputs --------------------------------------------------------------------------------------

    def messages_to_send(self) -> list[tuple[PeerId, LinkMessage]]:
        """Take out the messages for neighbours, in order."""
        messages = [(PeerId(node_id), message) for node_id, message in self._outbox]
        self._outbox.clear()
        return messages

    def next_timer(self) -> float:
        """Return when `handle_timer` is due."""
        lookups = min((each.next_timer() for each in self._lookups.values()), default=float("inf"))
        return min(
            lookups,
            self.router.next_timer(),
            self._upkeep.next_timer(),
            self._keeper.next_timer(),
        )

    # Lookups of ours ------------------------------------------------------------------------------

    def _look(
        self, plan: LookupPlan, request: Request, answer_type: type[Answer], now: float
    ) -> bytes:
        sealed = seal_request(self._identity, request)
        name = request.lookup
        self._lookups[name] = Lookup(name, plan, request.target, sealed, answer_type, now)
        self._after(now)
        return name

    def _publish(self, record: Record, now: float) -> bytes:
        request = Store(self._new_name(), record.key, record.seal(self._identity))
        self._publishing[request.lookup] = record
        # A liar's "I keep it" can't be told from the truth, so two more than alpha have to say so.
        return self._look(self._spread_plan(more=2), request, Stored, now)

    def _spread_plan(self, more: int = 0) -> LookupPlan:
        if self._alpha == 1:
            return LookupPlan(Mode.CLOSEST, 1, 1, enough=1)
        count = self._alpha + more
        return LookupPlan(Mode.CLOSEST, PATHS_MAX, count, enough=count, is_spread=True)

    def _after(self, now: float) -> None:
        """Go on until nothing follows from what has happened."""
        while True:
            while self.router.events:
                event = self.router.events.popleft()
                if isinstance(event, Arrived):
                    self._answer(event, now)
                    continue
                if event.label not in self._paths:
                    continue  # over before
                lookup, target = self._paths.pop(event.label)
                if isinstance(event, PathAnswered):
                    lookup.receive_untrusted(
                        event.answer, target, is_plausible=self.table.is_plausible, now=now
                    )
                else:
                    lookup.path_failed()
            for lookup in list(self._lookups.values()):
                self._advance(lookup, now)
            if not self.router.events:
                return

    def _advance(self, lookup: Lookup, now: float) -> None:
        while not lookup.is_over(now) and lookup.take_start(now):
            plan = lookup.plan
            target = lookup.target
            if plan.is_spread and lookup.started_count > 1:
                target = self.table.point_near(target, self._rng)
            label = self.router.start(
                plan.mode,
                lookup.name,
                target,
                lookup.request,
                patience_s=plan.patience_s,
                steps=plan.steps,
                tried=tuple(lookup.first_hops) if plan.mode is not Mode.WALK else (),
                stray_steps=lookup.stray_steps(),
                must_leave=lookup.started_count > 1,
                now=now,
            )
            self._paths[label] = lookup, target
            if (first_hop := self.router.first_hop(label)) is not None:
                lookup.first_hops.append(first_hop)
        if lookup.is_over(now):
            self._end(lookup, now)

    def _end(self, lookup: Lookup, now: float) -> None:
        del self._lookups[lookup.name]
        self._paths = {label: path for label, path in self._paths.items() if path[0] is not lookup}
        self.rejected_count += lookup.rejected_count
        is_news = False
        for given in lookup.answers:
            is_news |= self.table.add_candidate(given.signer.key)
            if isinstance(given.answer, Closest):
                for node_id in given.answer.ids:
                    is_news |= self.table.add_candidate(node_id)
        if is_news:
            self._upkeep.note_change(now, is_near=False)
        record = self._publishing.pop(lookup.name, None)
        if record is not None and not any(
            isinstance(given.answer, Stored)
            and not given.answer.complaint
            and (given.signer != self.peer_id or given.answer.replica_count)
            for given in lookup.answers
        ):
            self._keeper.note_unpublished(record, now)
        if lookup.name in self._upkeep_lookups:
            self._upkeep_lookups.discard(lookup.name)
        else:
            self.events.append(LookupEnded(lookup.name, tuple(lookup.answers)))

    # Requests of others ---------------------------------------------------------------------------

    def _answer(self, arrived: Arrived, now: float) -> None:
        try:
            origin, request = open_request_untrusted(arrived.forward)
        except DecodeError:
            self.rejected_count += 1
            self.router.decline(arrived.label)
            return
        digest = digest_of(arrived.forward.request)
        answer: Answer
        match request:
            case FindClosest(target=target):
                answer = Closest(digest, self._ids_near(as_int(target), origin.key))
            case Store(record=record):
                answer = self._take_in(digest, record, arrived.forward, now)
            case Fetch(target=target):
                ids = self._ids_near(as_int(target), origin.key)
                answer = Fetched(digest, self.store.get(target, now), ids)
            case Sample():
                answer = Sampled(digest)
            case Ask():
                self._ask_owner(arrived, origin, request, digest)
                return
        self.router.answer(arrived.label, seal_answer(self._identity, answer))

    def _take_in(self, digest: bytes, sealed: bytes, forward: Forward, now: float) -> Stored:
        try:
            messages = self._keeper.take_in(sealed, forward.target, now)
        except RequestRefused as error:
            return Stored(digest, 0, str(error))
        self._outbox.extend(messages)
        return Stored(digest, len(messages))

    def _ask_owner(self, arrived: Arrived, origin: PeerId, request: Ask, digest: bytes) -> None:
        question = self._asked.get(request.lookup)
        if question is None and arrived.neighbour is not None and origin != self.peer_id:
            if len(self._asked) >= ASKED_MAX:
                del self._asked[next(iter(self._asked))]
            question = self._asked[request.lookup] = _Question(digest)
            neighbour = PeerId(arrived.neighbour)
            self.events.append(Asked(request.lookup, origin, request.body, neighbour))
        if question is None or question.digest != digest:
            self.router.decline(arrived.label)
        elif question.answer is not None:
            self.router.answer(arrived.label, question.answer)
        else:
            question.labels.append(arrived.label)

    # Neighbours -----------------------------------------------------------------------------------

    def _receive_ids(self, message: Neighbours | Goodbye, link: Link, now: float) -> None:
        if not link.take(now):
            return
        if link.strikes:
            link.strikes -= 1  # it gossips, every few minutes: a second chance
        is_news = False
        for node_id in check_ids_untrusted(message.ids):
            is_news |= self.table.add_candidate(node_id)
        if isinstance(message, Goodbye):
            self._drop(link.node_id, "the peer has too many links", now)
            self.table.note_failure(link.node_id, now)
        if is_news:
            self._upkeep.note_change(now, is_near=False)

    def _say_goodbye(self, node_id: bytes, now: float) -> None:
        index = self.table.bucket_index(node_id)
        others = [
            link.node_id
            for link in self.table.links_by_bucket().get(index, [])
            if link.node_id != node_id
        ]
        self._outbox.append((node_id, Goodbye(tuple(others[:K]))))
        self._drop(node_id, "we have too many links", now)
        self.table.note_failure(node_id, now)

    def _drop(self, node_id: bytes, reason: str, now: float) -> None:
        is_near = self._is_near(node_id)
        self.table.remove_link(node_id)
        self.router.link_down(node_id, now)
        self._upkeep.note_change(now, is_near=is_near)
        self.events.append(LinkUnwanted(PeerId(node_id), reason))

    def _tell_neighbours(self, node_id: bytes) -> None:
        if ids := self._ids_near(as_int(node_id), node_id):
            self._outbox.append((node_id, Neighbours(ids)))

    def _ids_near(self, number: int, but: bytes) -> tuple[bytes, ...]:
        return tuple(
            link.node_id for link in self.table.nearest(number)[: K + 1] if link.node_id != but
        )[:K]

    def _is_near(self, node_id: bytes) -> bool:
        near = self.table.nearest(self.table.own_number)[:K]
        return any(link.node_id == node_id for link in near)

    def _new_name(self) -> bytes:
        return self._rng.randbytes(16)


@dataclass(slots=True, eq=False)
class _Question:
    """A question to the user of this overlay, which may come on several paths."""

    digest: bytes
    labels: list[int]
    answer: bytes | None

    def __init__(self, digest: bytes) -> None:
        self.digest, self.labels, self.answer = digest, [], None
