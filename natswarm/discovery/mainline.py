"""A node of the mainline DHT: BitTorrent's millions of nodes as ordinary neighbourhood.

    query in       answered from the table and the store, unless we are read-only (BEP 43)
    response in    wakes its lookup; where it says that it saw us at (`ip`, BEP 42) is a vote
    lookup         find_node, get_peers and announce_peer, get and put (BEP 44)
    timers         silent nodes, a refresh each 15 minutes, pings of stale nodes

One machine is of one address family (BEP 32 runs one DHT for each). Nodes come from the caller
alone, as endpoints whose ids nobody need know: there is no host in here. Our id fits the address
that the voters elect, so it changes with it.

Manners: 10 queries a second with a burst of 20, no question twice, and no node remembered that has
not answered us. Answers may be some times as long as questions, as everywhere in this protocol; so
the driver limits how many one address gets. Whoever forges a response must hit 4 random bytes and
the endpoint.

Source: BEP 5, 32, 42, 43, 44. Pure: time, randomness and entropy are arguments.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from natswarm.address import AddressKind, Endpoint
from natswarm.discovery.krpc import (
    ID_BYTES,
    Contact,
    Error,
    Fields,
    Query,
    Response,
    decode_contacts_untrusted,
    decode_endpoint_untrusted,
    decode_krpc_untrusted,
    id_in,
)
from natswarm.discovery.mainline_id import is_secure_id, secure_id
from natswarm.discovery.mainline_item import (
    MutableItem,
    item_fields,
    item_in_untrusted,
    item_target,
)
from natswarm.discovery.mainline_lookup import Lookup, Purpose
from natswarm.discovery.mainline_server import MainlineServer
from natswarm.discovery.mainline_table import MainlineTable
from natswarm.errors import DecodeError
from natswarm.identity import PeerId
from natswarm.nat.votes import elect, prefix_of

__all__ = ["LookupEnded", "Mainline", "MainlineStatistics", "Sighting"]

QUERY_TIMEOUT_S = 2.0
QUERIES_PER_S = 10.0
QUERY_BURST = 20.0
QUEUE_MAX = 256

REFRESH_S = 15 * 60.0  # BEP 5
MAINTENANCE_S = 30.0
STALE_PINGS = 2
# Newcomers that ask us something are asked back; a flood of them is not.
BUSY_QUEUE = 8
ASKED_BACK_MAX = 1024

TRANSACTION_BYTES = 4
TOKEN_BYTES_MAX = 64
VOTERS_MAX = 64
LOOKUPS_MAX = 16


@dataclass(frozen=True, slots=True)
class LookupEnded:
    """A lookup is over.

    Attributes:
        handle: What the command returned.
        answered_count: Nodes that answered, at most 8: the closest ones.
        peers: Of the info-hash.
        item: The newest one with a good signature; None: nobody has it.
        stored_count: Nodes that took the announcement or item.
    """

    handle: int
    answered_count: int
    peers: tuple[Endpoint, ...]
    item: MutableItem | None
    stored_count: int


@dataclass(frozen=True, slots=True)
class Sighting:
    """A node said where it sees us.

    Attributes:
        voter: Where the node is.
        observed: Where it sees our port.
        at: When it said so.
    """

    voter: Endpoint
    observed: Endpoint
    at: float


@dataclass(slots=True)
class MainlineStatistics:
    """Counters; they only grow."""

    sent_query_count: int = 0
    answered_query_count: int = 0
    """Queries of others that we answered."""
    response_count: int = 0
    rejected_count: int = 0
    """Datagrams that were not KRPC, answered nothing, or broke a rule."""


@dataclass(slots=True)
class _Question:
    """A query of ours."""

    endpoint: Endpoint
    method: bytes
    arguments: Fields
    handle: int | None
    deadline: float = 0.0


class Mainline:
    """The machine.

    Args:
        is_ipv6: The family of every address in here.
        rng: For targets of refreshes.
        entropy: A number of bytes -> that many that nobody can guess.
        now: Seconds.
        is_read_only: Whether we answer nobody, as those should whom strangers cannot reach.
    """

    def __init__(
        self,
        *,
        is_ipv6: bool,
        rng: random.Random,
        entropy: Callable[[int], bytes],
        now: float,
        is_read_only: bool = True,
    ) -> None:
        self.is_read_only = is_read_only
        self._is_ipv6 = is_ipv6
        self._rng = rng
        self._entropy = entropy
        self._table = MainlineTable(entropy(ID_BYTES))
        self._server = MainlineServer(entropy, is_ipv6=is_ipv6)
        self._sightings: OrderedDict[str, Sighting] = OrderedDict()
        self._asked_back: OrderedDict[Endpoint, float] = OrderedDict()
        self._queue: deque[_Question] = deque()
        self._pending: OrderedDict[bytes, _Question] = OrderedDict()
        self._replies: list[tuple[bytes, Endpoint]] = []
        self._events: deque[LookupEnded] = deque()
        self._lookups: dict[int, Lookup] = {}
        self._next_handle = 0
        self._seeds: tuple[Endpoint, ...] = ()
        self._budget, self._budget_at = QUERY_BURST, now
        self._refresh_at = self._maintain_at = float("inf")
        self._statistics = MainlineStatistics()

    # Getters --------------------------------------------------------------------------------------

    @property
    def own_id(self) -> bytes:
        """Our 20 bytes; they fit our public address once it is known."""
        return self._table.own_id

    def statistics(self) -> MainlineStatistics:
        """Return the counters so far."""
        return self._statistics

    def contacts(self) -> list[Contact]:
        """Return the nodes we know: worth keeping for the next start."""
        return self._table.contacts()

    def votes(self) -> dict[str, Endpoint]:
        """Return who says that we are where: address of the voter -> our endpoint it sees."""
        return {voter: sighting.observed for voter, sighting in self._sightings.items()}

    def sightings(self, since: float) -> list[Sighting]:
        """Return who said since then where it sees us, of each address the latest word."""
        return [each for each in self._sightings.values() if each.at >= since]

    @property
    def public_ip(self) -> str | None:
        """Our address as the voters elect it; None: not known."""
        return elect({voter: endpoint.ip for voter, endpoint in self.votes().items()})

    # Commands -------------------------------------------------------------------------------------

    def bootstrap(self, endpoints: Sequence[Endpoint], now: float) -> int:
        """Begin to know the neighbourhood from nodes that the user has; returns a handle."""
        self._seeds = tuple(each for each in endpoints if (":" in each.ip) == self._is_ipv6)
        self._refresh_at = now + REFRESH_S
        self._maintain_at = now + MAINTENANCE_S
        return self._start(Purpose(b"find_node", self.own_id))

    def get_peers(self, info_hash: bytes) -> int:
        """Look for peers of an info-hash; returns a handle."""
        return self._start(Purpose(b"get_peers", info_hash))

    def announce(self, info_hash: bytes, port: int) -> int:
        """Let others find us under an info-hash; returns a handle."""
        return self._start(Purpose(b"get_peers", info_hash, announced_port=port))

    def get(self, owner: PeerId, salt: bytes) -> int:
        """Look for a mutable item; returns a handle."""
        target = item_target(owner, salt)
        return self._start(Purpose(b"get", target, owner_key=owner.key, salt=salt))

    def put(self, item: MutableItem) -> int:
        """Have the closest nodes keep an item of ours; returns a handle."""
        purpose = Purpose(b"get", item.target, put=item, owner_key=item.owner.key, salt=item.salt)
        return self._start(purpose)

    def ask_where(self, count: int) -> None:
        """Ask at most so many nodes, of different networks, where they see us."""
        chosen = {prefix_of(each.endpoint.ip): each.endpoint for each in self._table.contacts()}
        for endpoint in self._rng.sample(list(chosen.values()), min(count, len(chosen))):
            self._ask(endpoint, b"ping", {}, None)

    def forget_sightings(self) -> None:
        """Forget who saw us where: we are somewhere else."""
        self._sightings.clear()

    def cancel(self, handle: int) -> None:
        """Give a lookup up; idempotent. What is under way is not waited for."""
        self._lookups.pop(handle, None)

    def _start(self, purpose: Purpose) -> int:
        self._next_handle += 1
        lookup = Lookup(purpose)
        if len(self._lookups) >= LOOKUPS_MAX:  # the oldest gives way
            self._end(next(iter(self._lookups)))
        self._lookups[self._next_handle] = lookup
        lookup.offer(self._table.closest(purpose.target, 16))
        if len(self._table) < len(self._seeds):
            # Their ids are not known: they count as the farthest, and are asked when none is left.
            farthest = bytes(255 - byte for byte in purpose.target)
            lookup.offer(Contact(farthest, endpoint) for endpoint in self._seeds)
        self._advance(self._next_handle)
        return self._next_handle

    # Timers and datagrams -------------------------------------------------------------------------

    def next_timer(self) -> float | None:
        """When to call `handle_timer` and `datagrams_to_send` next; None: nothing is due."""
        times = [self._refresh_at, self._maintain_at]
        if self._pending:
            times.append(next(iter(self._pending.values())).deadline)
        if self._queue:
            times.append(self._budget_at + max(0.0, 1 - self._budget) / QUERIES_PER_S)
        if self._replies or self._events:
            times.append(self._budget_at)
        earliest = min(times)
        return None if earliest == float("inf") else earliest

    def handle_timer(self, now: float) -> None:
        """Give up on who is silent; keep the table fresh."""
        while self._pending:
            transaction, question = next(iter(self._pending.items()))
            if now < question.deadline:
                break
            del self._pending[transaction]
            self._table.note_failure(question.endpoint)
            self._note_failure(question)
        if now >= self._maintain_at:
            self._maintain_at = now + MAINTENANCE_S
            for contact in self._table.questionable(now, STALE_PINGS):
                self._ask(contact.endpoint, b"ping", {}, None)
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH_S
            self._start(Purpose(b"find_node", self._rng.randbytes(ID_BYTES)))
            self._start(Purpose(b"find_node", self.own_id))

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        """Return what is to be sent now."""
        sent, self._replies = self._replies, []
        elapsed, self._budget_at = max(0.0, now - self._budget_at), now
        self._budget = min(QUERY_BURST, self._budget + elapsed * QUERIES_PER_S)
        while self._queue and self._budget >= 1 - 1e-6:
            self._budget -= 1
            question = self._queue.popleft()
            question.deadline = now + QUERY_TIMEOUT_S
            transaction = self._entropy(TRANSACTION_BYTES)
            self._pending[transaction] = question
            arguments = {**question.arguments, b"id": self.own_id}
            query = Query(transaction, question.method, arguments, self.is_read_only)
            sent.append((query.encode(), question.endpoint))
            self._statistics.sent_query_count += 1
        return sent

    def next_event(self) -> LookupEnded | None:
        """Return what happened; None: nothing more."""
        return self._events.popleft() if self._events else None

    def receive_untrusted(self, data: bytes, source: Endpoint, now: float) -> None:
        """Take a datagram that begins as KRPC does; a bad one is counted and dropped."""
        try:
            match decode_krpc_untrusted(data):
                case Query() as query:
                    if not self.is_read_only:
                        self._answer(query, source, now)
                case Response() as response:
                    self._take_response(response, source, now)
                case Error() as error:
                    question = self._take_question(error.transaction, source)
                    self._note_failure(question)
        except DecodeError:
            self._statistics.rejected_count += 1

    # Responses ------------------------------------------------------------------------------------

    def _take_question(self, transaction: bytes, source: Endpoint) -> _Question:
        question = self._pending.get(transaction)
        if question is None or question.endpoint != source:
            raise DecodeError("the answer to nothing")
        del self._pending[transaction]
        return question

    def _take_response(self, response: Response, source: Endpoint, now: float) -> None:
        question = self._take_question(response.transaction, source)
        try:
            contact = Contact(id_in(response.values), source)
            found = decode_contacts_untrusted(response.values, is_ipv6=self._is_ipv6)
        except DecodeError:
            self._note_failure(question)
            raise
        self._statistics.response_count += 1
        self._table.note_answer(contact, now)
        if response.observed is not None:
            self._note_vote(source, response.observed, now)
        lookup = None if question.handle is None else self._lookups.get(question.handle)
        if question.handle is None or lookup is None:
            return
        if question.method in (b"announce_peer", b"put"):
            lookup.storing -= 1
            lookup.stored_count += 1
        else:
            token = response.values.get(b"token")
            if not isinstance(token, bytes) or len(token) > TOKEN_BYTES_MAX:
                token = b""
            lookup.note_answer(contact, source, token)
            lookup.offer(each for each in found if self._is_usable(each))
            self._take_findings(lookup, response.values)
        self._advance(question.handle)

    def _take_findings(self, lookup: Lookup, values: Fields) -> None:
        purpose = lookup.purpose
        peers = values.get(b"values")
        if purpose.method == b"get_peers" and isinstance(peers, list):
            for each in peers:
                if isinstance(each, bytes):
                    lookup.add_peers([decode_endpoint_untrusted(each)])
        if purpose.method == b"get" and b"v" in values:
            item = item_in_untrusted(values, purpose.salt)
            item.verify_untrusted()
            if item.owner.key != purpose.owner_key:
                raise DecodeError("the item of somebody else")
            if lookup.item is None or lookup.item.sequence < item.sequence:
                lookup.item = item

    def _is_usable(self, contact: Contact) -> bool:
        endpoint = contact.endpoint
        is_ours = contact.id == self.own_id
        return not is_ours and endpoint.port > 0 and endpoint.kind is not AddressKind.UNUSABLE

    def _note_vote(self, voter: Endpoint, observed: Endpoint, now: float) -> None:
        if (":" in observed.ip) != self._is_ipv6:
            return
        self._sightings[voter.ip] = Sighting(voter, observed, now)
        self._sightings.move_to_end(voter.ip)
        if len(self._sightings) > VOTERS_MAX:
            self._sightings.popitem(last=False)
        ip = self.public_ip
        if ip is not None and not is_secure_id(self.own_id, ip):
            self._table = self._table.rebuilt(secure_id(ip, self._entropy(ID_BYTES)), now)

    def _note_failure(self, question: _Question) -> None:
        lookup = None if question.handle is None else self._lookups.get(question.handle)
        if question.handle is None or lookup is None:
            return
        if question.method in (b"announce_peer", b"put"):
            lookup.storing -= 1
        else:
            lookup.note_failure(question.endpoint)
        self._advance(question.handle)

    # Lookups --------------------------------------------------------------------------------------

    def _ask(
        self, endpoint: Endpoint, method: bytes, arguments: Fields, handle: int | None
    ) -> None:
        if len(self._queue) < QUEUE_MAX:
            self._queue.append(_Question(endpoint, method, arguments, handle))

    def _advance(self, handle: int) -> None:
        """Ask who is next; at the end store, then report."""
        lookup = self._lookups[handle]
        purpose = lookup.purpose
        key = b"info_hash" if purpose.method == b"get_peers" else b"target"
        for contact in lookup.next_questions():
            self._ask(contact.endpoint, purpose.method, {key: purpose.target}, handle)
        if not lookup.is_over or lookup.storing:
            return
        storage = self._storage(lookup) if not lookup.has_stored else []
        lookup.has_stored = True
        lookup.storing = len(storage)
        for endpoint, method, arguments in storage:
            self._ask(endpoint, method, arguments, handle)
        if not storage:
            self._end(handle)

    def _storage(self, lookup: Lookup) -> list[tuple[Endpoint, bytes, Fields]]:
        purpose = lookup.purpose
        arguments: Fields
        if purpose.put is not None:
            method, arguments = b"put", item_fields(purpose.put)
            if purpose.put.salt:
                arguments[b"salt"] = purpose.put.salt
        elif purpose.announced_port is not None:
            method = b"announce_peer"
            # The NAT's port, not ours, is where we can be reached: that of the datagram.
            arguments = {
                b"info_hash": purpose.target,
                b"port": purpose.announced_port,
                b"implied_port": 1,
            }
        else:
            return []
        return [
            (contact.endpoint, method, {**arguments, b"token": token})
            for contact, token in lookup.closest_answered()
            if token
        ]

    def _end(self, handle: int) -> None:
        lookup = self._lookups.pop(handle)
        self._events.append(
            LookupEnded(
                handle,
                len(lookup.closest_answered()),
                tuple(lookup.peers),
                lookup.item,
                lookup.stored_count,
            )
        )

    # Queries of others ----------------------------------------------------------------------------

    def _answer(self, query: Query, source: Endpoint, now: float) -> None:
        contact = Contact(id_in(query.arguments), source)
        reply = self._server.answer_untrusted(query, source, self._table, now)
        self._replies.append((reply, source))
        self._statistics.answered_query_count += 1
        is_wanted = not query.is_read_only and self._table.has_room_for(contact)
        if is_wanted and len(self._queue) < BUSY_QUEUE:
            # It comes into the table when it answers us, not because it asks. Once in a while, and
            # only where there is room: else two nodes would ping each other for ever.
            asked_at = self._asked_back.get(source, float("-inf"))
            if now >= asked_at + REFRESH_S:
                self._asked_back[source] = now
                self._asked_back.move_to_end(source)
                if len(self._asked_back) > ASKED_BACK_MAX:
                    self._asked_back.popitem(last=False)
                self._ask(source, b"ping", {}, None)
