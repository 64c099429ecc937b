"""Runs the overlay over peers: one stream of small messages for each neighbour.

    Peer ── natswarm/route/1 ── bounded queue ──▶ Overlay ──▶ LinkWanted: introduce, puncture, link
                                                  (pure)  ──▶ Asked: a peer wants to meet
    lookup, publish, sample, introduce ──────────▶        ──▶ LookupEnded: wake who waits

Of a new connection the side with the lower PeerId opens the stream; a link is up once the other
side has spoken. A link that is given up ends its stream; the connection behind it ends only if it
was made for nothing else. Signalling only: what travels here is bounded by protocol.py to a few
KB, twenty requests a second for each neighbour, and nothing of it is users' data.

Knows no geometry and no rules of retrying; those are the core's.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

import trio

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.discovery.introduction import (
    NodeRecord,
    decode_attempt_untrusted,
    decode_record_untrusted,
    record_as_seen,
)
from natswarm.errors import ConnectFailed, DecodeError, NatswarmError, PeerNotFound, RequestRefused
from natswarm.identity import Identity, PeerId
from natswarm.message import decode_message_untrusted, encode_message, printable_untrusted
from natswarm.net.message_stream import MessageStream
from natswarm.net.stream import Stream
from natswarm.routing.lookup import GivenAnswer
from natswarm.routing.meeting import (
    SIGHTING_LIFETIME_S,
    SIGHTINGS_MAX,
    Kept,
    Meet,
    Met,
    NotMet,
    Sighted,
    Sighting,
    decode_sighting_untrusted,
    seen_ip_untrusted,
)
from natswarm.routing.overlay import Asked, LinkUnwanted, LinkWanted, LookupEnded, Overlay
from natswarm.routing.protocol import (
    Accepted,
    Answered,
    Declined,
    Fetched,
    Forward,
    Goodbye,
    LinkMessage,
    Neighbours,
    Replicate,
    Stored,
    Told,
)
from natswarm.routing.record import Record, RecordKind, decode_published_untrusted
from natswarm.routing.router import RouterStatistics

__all__ = ["ROUTE_PROTOCOL", "Home", "Neighbour", "OverlayService"]

logger = logging.getLogger("natswarm.overlay")

ROUTE_PROTOCOL = "natswarm/route/1"

# Messages that wait for one neighbour, of at most some 10 KB each. A neighbour that far behind is
# as good as silent, and requests find another way.
QUEUE_MAX = 256

# Meetings at once that others ask us for; each may be a burst of probes.
MEETINGS_MAX = 16

# A stream that nobody speaks on, or that does not take our goodbye.
FIRST_WORD_TIMEOUT_S = 10.0
GOODBYE_S = 2.0

# Neighbours, former ones included, whose sighting of us we keep: twice what a node may link to.
WITNESSES_MAX = 256

# Former neighbours that take strangers: dialled where they were when routing finds them no more,
# which is how two halves of a swarm that was cut in two find each other again.
REMEMBERED_MAX = 64


class Neighbour(Protocol):
    """A peer we are connected to, as far as routing cares."""

    @property
    def peer_id(self) -> PeerId:
        """Who it is."""
        ...

    @property
    def seen_at(self) -> Endpoint:
        """Where its datagrams come from."""
        ...

    @property
    def record(self) -> NodeRecord | None:
        """What it says of itself."""
        ...

    async def open_stream(self, protocol: str) -> Stream:
        """Start a stream to it."""
        ...

    async def aclose(self) -> None:
        """End the connection."""
        ...


class Home(Protocol):
    """What routing needs of its node."""

    def sealed_record(self) -> bytes:
        """Our own record as of now, signed."""
        ...

    def living_peer(self, peer_id: PeerId) -> Neighbour | None:
        """The connection to a peer, if there is one."""
        ...

    def is_connecting(self, peer_id: PeerId) -> bool:
        """Whether our user is connecting to a peer."""
        ...

    async def connect_for_link(self, peer_id: PeerId, last_known: NodeRecord | None) -> Neighbour:
        """Connect to a peer for routing alone.

        Args:
            peer_id: Whom.
            last_known: How it could be dialled once, if it took strangers then.

        Raises:
            NatswarmError: It is not possible.
        """
        ...

    async def start_rendezvous(
        self, record: NodeRecord, seen_at: Endpoint, attempt: bytes, introducer: PeerId
    ) -> object:
        """Start our side of a puncture with the peer of `record`; returns when it has started.

        Raises:
            ConnectFailed: There is no plan for this pair, or we are not willing.
        """
        ...


@dataclass(slots=True, eq=False)
class _Link:
    """The stream to one neighbour."""

    peer: Neighbour
    is_ours: bool
    queue: trio.MemorySendChannel[LinkMessage | Sighted | Kept]
    scope: trio.CancelScope
    is_up: bool = False


@dataclass(slots=True, eq=False)
class _Waiter:
    is_over: trio.Event = field(default_factory=trio.Event)
    answers: tuple[GivenAnswer, ...] = ()


class OverlayService:
    """Routing of one node.

    Args:
        home: The node.
        identity: Who we are.
        nursery: Where links and meetings run.
        rng: Of the overlay.
        links_max: Links to keep, at least 16.

    Attributes:
        dropped_count: Messages to neighbours that were too far behind.
    """

    def __init__(
        self,
        home: Home,
        *,
        identity: Identity,
        nursery: trio.Nursery,
        rng: random.Random,
        links_max: int,
    ) -> None:
        self._home = home
        self._identity = identity
        self._nursery = nursery
        self._overlay = Overlay(identity, rng=rng, links_max=links_max)
        self._links: dict[PeerId, _Link] = {}
        self._made_for_link: set[PeerId] = set()
        self._kept: set[PeerId] = set()  # by our user; forgotten with the connection
        self._remembered: OrderedDict[PeerId, NodeRecord] = OrderedDict()
        self._sightings: OrderedDict[PeerId, tuple[Sighting, bytes]] = OrderedDict()
        self._waiters: dict[bytes, _Waiter] = {}
        self._meeting_count = 0
        self._timer_moved = trio.Event()
        self._epoch_s = time.time() - trio.current_time()
        self.dropped_count = 0

    def handlers(self) -> dict[str, Callable[[Stream, Neighbour], Awaitable[None]]]:
        """The protocols we answer, by name."""
        return {ROUTE_PROTOCOL: self._serve}

    def now(self) -> float:
        """Return seconds since 1970, which never go back.

        Trio's clock stands still while a machine sleeps; when the system's is ahead of it, that is
        made up for.
        """
        self._epoch_s = max(self._epoch_s, time.time() - trio.current_time())
        return self._epoch_s + trio.current_time()

    def neighbours_by_bucket(self) -> dict[int, list[PeerId]]:
        """Return our links by how many leading bits their ids share with ours."""
        return {
            index: [PeerId(link.node_id) for link in links]
            for index, links in self._overlay.table.links_by_bucket().items()
        }

    def size_estimate(self) -> float:
        """Return how many nodes the swarm seems to have."""
        return self._overlay.table.size_estimate()

    def statistics(self) -> RouterStatistics:
        """Counters of requests that came by."""
        return self._overlay.router.statistics

    # What the node asks for -----------------------------------------------------------------------

    async def lookup(self, key: bytes) -> list[Record]:
        """Return the records of a key: of each publisher the latest, oldest publication first.

        Cancelled, the lookup goes on and its answers are dropped; so with all of these.
        """
        now = self.now()
        newest: dict[PeerId, Record] = {}
        for given in await self._wait(self._overlay.fetch(key, now)):
            if not isinstance(given.answer, Fetched):
                continue
            for sealed in given.answer.records:
                try:
                    record = decode_published_untrusted(sealed)
                except DecodeError:
                    continue  # one forged record does not spoil the others
                known = newest.get(record.publisher)
                if (
                    record.key == key
                    and record.complaint_at(now) is None
                    and (known is None or known.version < record.version)
                ):
                    newest[record.publisher] = record
        return sorted(newest.values(), key=lambda record: (record.version, record.publisher))

    async def publish(self, kind: RecordKind, topic: str, value: bytes) -> int:
        """Publish a record, now and again until `withdraw`; return how many nodes took it at once.

        Raises:
            ValueError: Nobody would keep such a record.
            RequestRefused: Those who should keep it do not; says why. It is tried again.
            PeerNotFound: Nobody answered. It is tried again.
        """
        answers = await self._wait(self._overlay.publish(kind, topic, value, self.now()))
        stored = [
            each.answer
            for each in answers
            if isinstance(each.answer, Stored)
            and (each.signer != self._identity.peer_id or each.answer.replica_count)
        ]
        if not stored:
            raise PeerNotFound("nobody is there to keep the record; it will be tried again")
        taken = [each.replica_count + 1 for each in stored if not each.complaint]
        if not taken:
            raise RequestRefused(printable_untrusted(stored[0].complaint))
        return max(taken)

    def withdraw(self, kind: RecordKind, topic: str) -> None:
        """Publish a record no more."""
        self._overlay.withdraw(kind, topic)

    async def sample(self) -> PeerId:
        """Return a node drawn uniformly from the swarm; it may be ourselves.

        Raises:
            PeerNotFound: The walks got lost.
        """
        answers = await self._wait(self._overlay.sample(self.now()))
        if not answers:
            raise PeerNotFound("no random walk came back; are there neighbours at all?")
        return answers[0].signer

    async def introduce(
        self, target: PeerId, attempt: bytes, *, is_for_link: bool = False
    ) -> tuple[NodeRecord, Endpoint]:
        """Have the swarm introduce us to a peer; its side has started when this returns.

        Returns:
            The peer's record, and where its neighbours see it.

        Raises:
            PeerNotFound: The request did not reach it.
            RequestRefused: The peer is not willing.
            NatswarmError: No valid answer.
        """
        meet = Meet(attempt, self._home.sealed_record(), self._own_sightings(), is_for_link)
        name = self._overlay.ask(target, encode_message(meet), self.now(), is_for_link=is_for_link)
        for given in await self._wait(name):
            assert isinstance(given.answer, Told)
            reply = decode_message_untrusted(given.answer.body, Met, NotMet)
            if isinstance(reply, NotMet):
                raise RequestRefused(
                    printable_untrusted(reply.reason), printable_untrusted(reply.code)
                )
            assert isinstance(reply, Met)
            return self._checked(reply, target)
        raise PeerNotFound(f"nobody on the way to {target.short} knows it; is it in this swarm?")

    def keep(self, peer_id: PeerId) -> None:
        """The user wants this connection, too: it stays when its link goes, at either end."""
        self._made_for_link.discard(peer_id)
        self._kept = {each for each in self._kept if self._home.living_peer(each) is not None}
        self._kept.add(peer_id)
        if (link := self._links.get(peer_id)) is not None:
            self._queue(link, Kept())

    # Links ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the overlay's timers, for ever."""
        next_sighting = trio.current_time() + SIGHTING_LIFETIME_S / 4
        while True:
            if trio.current_time() >= next_sighting:
                next_sighting += SIGHTING_LIFETIME_S / 4
                for link in self._links.values():
                    self._queue(link, self._sighting_of(link.peer))
            self._timer_moved = trio.Event()
            due = min(self._overlay.next_timer() - self._epoch_s, next_sighting)
            with trio.move_on_at(due):
                await self._timer_moved.wait()
                continue
            self._overlay.handle_timer(self.now())
            self._carry_out()

    def peer_connected(self, peer: Neighbour) -> None:
        """A new connection is there: link to it, if that is for us to begin."""
        if self._identity.peer_id < peer.peer_id:
            self._nursery.start_soon(self._open_link, peer)

    async def _open_link(self, peer: Neighbour) -> None:
        if peer.peer_id in self._links:
            return
        try:
            await self._run_link(peer, await peer.open_stream(ROUTE_PROTOCOL), is_ours=True)
        except (NatswarmError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._note_failed(peer.peer_id, error)

    async def _serve(self, stream: Stream, peer: Neighbour) -> None:
        existing = self._links.get(peer.peer_id)
        if existing is not None:
            # Both sides opened one: that of the lower PeerId stays.
            if not existing.is_ours or self._identity.peer_id < peer.peer_id:
                raise RequestRefused("there is a link already")
            existing.scope.cancel()
            self._link_over(existing)
        await self._run_link(peer, stream, is_ours=False)

    async def _run_link(self, peer: Neighbour, stream: Stream, *, is_ours: bool) -> None:
        """Be linked to a peer until either side has enough of it."""
        send, receive = trio.open_memory_channel[LinkMessage | Sighted | Kept](QUEUE_MAX)
        with trio.CancelScope() as scope:
            link = self._links[peer.peer_id] = _Link(peer, is_ours, send, scope)
            try:
                async with MessageStream(stream, payload_bytes_max=0) as messages:
                    self._queue(link, self._sighting_of(peer))
                    if peer.peer_id in self._kept:
                        self._queue(link, Kept())
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._send_all, messages, receive, nursery)
                        await self._receive_all(messages, link)
                        nursery.cancel_scope.cancel()
            except* (
                NatswarmError,
                trio.BrokenResourceError,
                trio.ClosedResourceError,
                trio.EndOfChannel,
                trio.TooSlowError,
            ):
                pass  # the peer is gone, never spoke or broke the rules: the link ends
            finally:
                self._link_over(link)
        if peer.peer_id in self._made_for_link:
            self._made_for_link.discard(peer.peer_id)
            await peer.aclose()

    async def _send_all(
        self,
        messages: MessageStream,
        queue: trio.MemoryReceiveChannel[LinkMessage | Sighted | Kept],
        nursery: trio.Nursery,
    ) -> None:
        async for message in queue:
            await messages.send(message)
        # The link was given up: the peer still gets our goodbye.
        with trio.move_on_after(GOODBYE_S):
            await messages.send_eof()
        nursery.cancel_scope.cancel()

    async def _receive_all(self, messages: MessageStream, link: _Link) -> None:
        words = (Forward, Accepted, Answered, Declined, Neighbours, Replicate, Goodbye)
        while True:
            with trio.fail_after(FIRST_WORD_TIMEOUT_S if not link.is_up else float("inf")):
                message, _ = await messages.receive(*words, Sighted, Kept)
            if not link.is_up and self._links.get(link.peer.peer_id) is link:
                link.is_up = True
                self._overlay.link_up(
                    link.peer.peer_id, self.now(), prefix=_prefix(link.peer.seen_at.ip)
                )
            if isinstance(message, Sighted):
                self._note_sighting(message, link.peer.peer_id)
            elif isinstance(message, Kept):
                self._made_for_link.discard(link.peer.peer_id)
            else:
                self._overlay.receive_untrusted(
                    cast("LinkMessage", message), link.peer.peer_id, self.now()
                )
            self._carry_out()

    def _link_over(self, link: _Link) -> None:
        peer_id = link.peer.peer_id
        if self._links.get(peer_id) is not link:
            return
        del self._links[peer_id]
        record = link.peer.record
        if link.is_up and record is not None and record.profile.accepts_strangers:
            self._remembered[peer_id] = record_as_seen(record, link.peer.seen_at)
            self._remembered.move_to_end(peer_id)
            if len(self._remembered) > REMEMBERED_MAX:
                self._remembered.popitem(last=False)
        if link.is_up:
            self._overlay.link_down(peer_id, self.now())
        else:
            self._overlay.link_failed(peer_id, self.now())
        self._carry_out()

    def _queue(self, link: _Link, message: LinkMessage | Sighted | Kept) -> None:
        try:
            link.queue.send_nowait(message)
        except trio.WouldBlock:
            self.dropped_count += 1
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass  # it is being given up

    # What the overlay wants -----------------------------------------------------------------------

    def _carry_out(self) -> None:
        """Carry out what the overlay wants, after each input."""
        for peer_id, message in self._overlay.messages_to_send():
            if (link := self._links.get(peer_id)) is not None:
                self._queue(link, message)
        events = self._overlay.events
        while events:
            event = events.popleft()
            match event:
                case LinkWanted(peer_id):
                    self._nursery.start_soon(self._make_link, peer_id)
                case LinkUnwanted(peer_id, reason):
                    logger.info("link to %s given up: %s", peer_id.short, reason)
                    if (link := self._links.get(peer_id)) is not None:
                        link.queue.close()
                case Asked():
                    self._nursery.start_soon(self._answer_meeting, event)
                case LookupEnded(lookup, answers):
                    if (waiter := self._waiters.pop(lookup, None)) is not None:
                        waiter.answers = answers
                        waiter.is_over.set()
        self._timer_moved.set()

    async def _wait(self, lookup: bytes) -> tuple[GivenAnswer, ...]:
        waiter = self._waiters[lookup] = _Waiter()
        self._carry_out()
        try:
            await waiter.is_over.wait()
        finally:
            self._waiters.pop(lookup, None)
        return waiter.answers

    async def _make_link(self, peer_id: PeerId) -> None:
        peer = self._home.living_peer(peer_id)
        try:
            if peer is None:
                self._made_for_link.add(peer_id)
                peer = await self._home.connect_for_link(peer_id, self._remembered.get(peer_id))
                self.peer_connected(peer)
            else:
                self._nursery.start_soon(self._open_link, peer)
        except NatswarmError as error:
            self._made_for_link.discard(peer_id)
            self._note_failed(peer_id, error)

    def _note_failed(self, peer_id: PeerId, error: Exception) -> None:
        logger.info("no link to %s: %s", peer_id.short, error)
        self._overlay.link_failed(peer_id, self.now())
        self._carry_out()

    # Meetings -------------------------------------------------------------------------------------

    async def _answer_meeting(self, asked: Asked) -> None:
        reply: Met | NotMet
        self._meeting_count += 1
        try:
            reply = await self._meet(asked)
        except NatswarmError as error:
            reply = NotMet(str(error), error.code)
        finally:
            self._meeting_count -= 1
        self._overlay.tell(asked.lookup, encode_message(reply))
        self._carry_out()

    async def _meet(self, asked: Asked) -> Met:
        meet = decode_message_untrusted(asked.body, Meet)
        attempt = decode_attempt_untrusted(meet.attempt)
        record, seen_at = self._checked(meet, asked.origin)
        if self._meeting_count > MEETINGS_MAX:
            raise ConnectFailed("busy with other peers; try again in a minute")
        is_welcome = not meet.is_for_link or self._overlay.accepts_link(asked.origin, self.now())
        # Whom our user wants must not be declined: its wish may go before ours, and we wait for it.
        if not is_welcome and not self._home.is_connecting(asked.origin):
            raise ConnectFailed("I have as many links as I keep")
        await self._home.start_rendezvous(record, seen_at, attempt, asked.neighbour)
        return Met(self._home.sealed_record(), self._own_sightings())

    def _checked(self, message: Meet | Met, peer_id: PeerId) -> tuple[NodeRecord, Endpoint]:
        """Return a peer's record, and where others see the peer.

        Raises:
            DecodeError: Not the peer's record, or nobody vouches for an address of it.
        """
        record = decode_record_untrusted(message.record)
        if record.peer_id != peer_id:
            raise DecodeError(f"{peer_id.short} sent the record of {record.peer_id.short}")
        ip = seen_ip_untrusted(message.sightings, peer_id, self.now())
        main = record.profile.main_endpoint
        return record, Endpoint(ip, 1 if main is None else main.port)

    def _sighting_of(self, peer: Neighbour) -> Sighted:
        sighting = Sighting(self._identity.peer_id, peer.peer_id, peer.seen_at.ip, self.now())
        return Sighted(sighting.seal(self._identity))

    def _note_sighting(self, message: Sighted, neighbour: PeerId) -> None:
        sighting = decode_sighting_untrusted(message.sighting)
        if sighting.observer != neighbour or sighting.subject != self._identity.peer_id:
            raise DecodeError("a neighbour passed on somebody else's sighting")
        self._sightings[neighbour] = sighting, message.sighting
        self._sightings.move_to_end(neighbour)
        if len(self._sightings) > WITNESSES_MAX:
            self._sightings.popitem(last=False)

    def _own_sightings(self) -> tuple[bytes, ...]:
        """Return the latest sightings of us that agree, at an address of the internet if any."""
        latest_at = self.now() - SIGHTING_LIFETIME_S / 2
        by_ip: dict[str, list[bytes]] = {}
        for sighting, sealed in reversed(self._sightings.values()):
            if sighting.seen_at_s >= latest_at:
                by_ip.setdefault(sighting.ip, []).append(sealed)
        if not by_ip:
            return ()
        best = max(by_ip, key=lambda ip: (address_kind(ip) is AddressKind.GLOBAL, len(by_ip[ip])))
        return tuple(by_ip[best][:SIGHTINGS_MAX])


def _prefix(ip: str) -> str:
    """Return what of an address costs money to have: /24 of IPv4, /48 of IPv6; "" for private."""
    if address_kind(ip) is not AddressKind.GLOBAL:
        return ""
    bits = 48 if ":" in ip else 24
    return str(ipaddress.ip_network((ip, bits), strict=False))
