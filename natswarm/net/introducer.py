"""The common neighbour: ask for introductions, make them, and accept them.

Each of the small protocols here is one question and one answer on a stream of its own:

    natswarm/record/1      ShareRecord -> ShareRecord
    natswarm/peers/1       FindPeers -> PeersFound
    natswarm/introduce/1   Introduce -> Introduced                (to the common neighbour)
    natswarm/rendezvous/1  Rendezvous -> RendezvousAccepted       (from it to the peer; or from a
                                                                  peer for itself: the next path)
    natswarm/ask/1         AskNeighbour -> Asked                  (to a neighbour)
    natswarm/echo/1        EchoTo -> Asked                        (from it to one of its neighbours)
    natswarm/invite/1      Redeem -> Redeemed                     (to whom a one-time invite is of)

What it is all for stands in `discovery/introduction.py`. Knows no sockets; it asks the node, behind
the `Home` protocol, for whom it is connected to and to start a puncture.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import zip_longest
from typing import Protocol

from natswarm.address import Endpoint
from natswarm.discovery.introduction import (
    Asked,
    AskNeighbour,
    EchoTo,
    FindPeers,
    Introduce,
    Introduced,
    NodeRecord,
    PeersFound,
    Redeem,
    Redeemed,
    Rendezvous,
    RendezvousAccepted,
    ShareRecord,
    decode_attempt_untrusted,
    decode_endpoint_untrusted,
    decode_record_untrusted,
)
from natswarm.errors import (
    CallFailed,
    ConnectFailed,
    ConnectionLost,
    DecodeError,
    PeerNotFound,
    RequestRefused,
)
from natswarm.identity import PeerId
from natswarm.net.call import Method, ReplyT, RequestT
from natswarm.net.peer import Peer
from natswarm.wire import TRANSACTION_BYTES

__all__ = ["FIND_PEERS", "Home", "Introducer", "Neighbour"]

# A neighbour that is alive answers in a round trip or two; for a rendezvous it may have to look at
# its own NAT first, which takes 5 s where nobody answers. Who passes a question on waits for longer
# than whom it asks, or else the reason of a refusal would come too late.
REPLY_TIMEOUT_S = 10.0
RELAYED_TIMEOUT_S = 15.0
# Paths of neighbours come back within seconds, and many questions here are about paths; later, and
# somebody else may know the peer, too.
PATIENCE_S = 3.0

IP_CHARACTERS_MAX = 45

# FindPeers answers with a sample: enough for the swarms of today, one bounded message for larger.
PEERS_FOUND_MAX = 64
PEERS_FOUND_BYTES_MAX = 48 * 1024  # within a message's header; usual records take 500 bytes

RECORD = Method("natswarm/record/1", (ShareRecord,), (ShareRecord,))
FIND_PEERS = Method("natswarm/peers/1", (FindPeers,), (PeersFound,))
INTRODUCE = Method("natswarm/introduce/1", (Introduce,), (Introduced,))
RENDEZVOUS = Method("natswarm/rendezvous/1", (Rendezvous,), (RendezvousAccepted,))
ASK_NEIGHBOUR = Method("natswarm/ask/1", (AskNeighbour,), (Asked,))
ECHO_TO = Method("natswarm/echo/1", (EchoTo,), (Asked,))
REDEEM = Method("natswarm/invite/1", (Redeem,), (Redeemed,))


class Neighbour(Protocol):
    """A peer we are connected to, as far as the introducer cares."""

    @property
    def peer_id(self) -> PeerId:
        """Who it is."""
        ...

    @property
    def seen_at(self) -> Endpoint:
        """Where its datagrams come from."""
        ...

    def where_seen(self, ip: str) -> Endpoint | None:
        """Where it is at one of its addresses; None: not there."""
        ...

    @property
    def sealed_record(self) -> bytes | None:
        """Its signed record, once it has shared it."""
        ...

    async def call(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float,
        patience_s: float,
    ) -> ReplyT:
        """Ask it a question, as `Peer.call`."""
        ...


class Home(Protocol):
    """What the introducer needs of its node."""

    def answer(
        self,
        method: Method[RequestT, ReplyT],
        answer: Callable[[RequestT, Peer], Awaitable[ReplyT]],
    ) -> None:
        """Answer calls, as `Node.answer`."""
        ...

    def sealed_record(self) -> bytes:
        """Our own record as of now, signed."""
        ...

    def neighbours(self) -> list[Neighbour]:
        """Whom we are connected to, oldest first."""
        ...

    async def start_rendezvous(
        self, record: NodeRecord, seen_at: Endpoint, attempt: bytes, introducer: PeerId
    ) -> bytes:
        """Start our side of a puncture with the peer of `record`.

        Returns:
            Our signed record for the peer, when our side has started.

        Raises:
            ConnectFailed: There is no plan for this pair, or we are not willing.
        """
        ...

    def learn_record(self, record: NodeRecord, sealed: bytes) -> None:
        """Note the record of a peer we are connected to, and its signed form."""
        ...

    def send_unsolicited_echo(self, transaction: bytes, observed: Endpoint) -> None:
        """Send one echo reply from our main port."""
        ...

    async def take_ticket(self, ticket: bytes, peer_id: PeerId) -> None:
        """Take the ticket of a one-time invite.

        Raises:
            InviteError: It is used up, or none of ours.
        """
        ...


class Introducer:
    """Both ends of the protocols above, for one node."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def start(self) -> None:
        """Answer from now on."""
        answer = self._home.answer
        answer(RECORD, self._answer_record)
        answer(FIND_PEERS, self._answer_peers)
        answer(INTRODUCE, self._answer_introduce)
        answer(RENDEZVOUS, self._answer_rendezvous)
        answer(ASK_NEIGHBOUR, self._answer_ask)
        answer(ECHO_TO, self._answer_echo)
        answer(REDEEM, self._answer_redeem)

    async def share_record(self, neighbour: Neighbour) -> None:
        """Give `neighbour` our record and note its own.

        Raises:
            NatswarmError: It did not answer, or not with its own valid record.
        """
        reply = await self._ask(neighbour, RECORD, ShareRecord(self._home.sealed_record()))
        self._learn(neighbour, reply.record)

    async def find_peers(self, neighbour: Neighbour) -> list[tuple[NodeRecord, Endpoint | None]]:
        """Ask `neighbour` whom it is connected to.

        Returns:
            Records, each with where the neighbour sees the peer; None if it does not say.

        Raises:
            NatswarmError: It did not answer.
        """
        reply = await self._ask(neighbour, FIND_PEERS, FindPeers())
        found: list[tuple[NodeRecord, Endpoint | None]] = []
        for sealed, seen_at in zip_longest(
            reply.records[:PEERS_FOUND_MAX], reply.seen_at[:PEERS_FOUND_MAX]
        ):
            if sealed is None:
                break
            try:
                record = decode_record_untrusted(sealed)
                found.append(
                    (record, None if seen_at is None else decode_endpoint_untrusted(seen_at))
                )
            except DecodeError:
                continue  # a neighbour's bad memory is no reason to lose the good ones
        return found

    async def introduce(
        self,
        neighbour: Neighbour,
        target: PeerId,
        attempt: bytes,
        sealed_record: bytes | None = None,
        *,
        at: str = "",
    ) -> tuple[NodeRecord, Endpoint]:
        """Ask `neighbour` to introduce us to `target`; its side has started when this returns.

        Args:
            neighbour: Who is connected to both.
            target: Whom to meet.
            attempt: Names the puncture.
            sealed_record: What to say of ourselves; by default our record.
            at: Of our addresses that the neighbour sees, the one to name; by default the latest.

        Returns:
            The target's record, and where the neighbour sees it.

        Raises:
            RequestRefused: The neighbour does not know the target, or the target is not willing.
            NatswarmError: No valid answer.
        """
        request = Introduce(target.key, attempt, sealed_record or self._home.sealed_record(), at)
        reply = await self._ask(neighbour, INTRODUCE, request, timeout_s=RELAYED_TIMEOUT_S)
        record = decode_record_untrusted(reply.record)
        if record.peer_id != target:
            raise DecodeError(f"asked for {target.short}, introduced to {record.peer_id.short}")
        return record, decode_endpoint_untrusted(reply.seen_at)

    async def meet_again(
        self, neighbour: Neighbour, attempt: bytes, sealed_record: bytes
    ) -> NodeRecord:
        """Ask a neighbour for another path between it and us; its side has started then.

        Raises:
            RequestRefused: It is not willing.
            NatswarmError: No valid answer.
        """
        request = Rendezvous(attempt, sealed_record, "")
        reply = await self._ask(neighbour, RENDEZVOUS, request)
        record = decode_record_untrusted(reply.record)
        if record.peer_id != neighbour.peer_id:
            raise DecodeError(f"{neighbour.peer_id.short} sent the record of another node")
        return record

    async def ask_neighbour_to_echo(
        self, neighbour: Neighbour, transaction: bytes, observed: Endpoint
    ) -> None:
        """Ask `neighbour` that one of its other neighbours sends an echo reply to `observed`.

        Raises:
            RequestRefused: It has no other neighbour, or `observed` is not where it sees us.
            NatswarmError: No valid answer.
        """
        request = AskNeighbour(transaction, str(observed))
        await self._ask(neighbour, ASK_NEIGHBOUR, request, timeout_s=RELAYED_TIMEOUT_S)

    async def redeem(self, neighbour: Neighbour, ticket: bytes) -> None:
        """Hand in the ticket of a neighbour's one-time invite.

        Raises:
            RequestRefused: It is used up, or is not known there.
            NatswarmError: No valid answer.
        """
        await self._ask(neighbour, REDEEM, Redeem(ticket))

    async def _ask(
        self,
        neighbour: Neighbour,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float = REPLY_TIMEOUT_S,
    ) -> ReplyT:
        try:
            return await neighbour.call(method, request, timeout_s=timeout_s, patience_s=PATIENCE_S)
        except (CallFailed, ConnectionLost) as error:
            raise ConnectFailed(f"no answer from {neighbour.peer_id.short}: {error}") from error

    async def _answer_record(self, request: ShareRecord, neighbour: Neighbour) -> ShareRecord:
        self._learn(neighbour, request.record)
        return ShareRecord(self._home.sealed_record())

    async def _answer_peers(self, _request: FindPeers, neighbour: Neighbour) -> PeersFound:
        records: list[bytes] = []
        seen_at: list[str] = []
        room = PEERS_FOUND_BYTES_MAX
        # The latest: of a crowd, those that came last are the likeliest to be still there.
        for other in reversed(self._home.neighbours()):
            if other.peer_id == neighbour.peer_id or other.sealed_record is None:
                continue
            room -= len(other.sealed_record)
            if room < 0 or len(records) == PEERS_FOUND_MAX:
                break
            records.append(other.sealed_record)
            seen_at.append(str(other.seen_at))
        return PeersFound(tuple(records), tuple(seen_at))

    async def _answer_introduce(self, request: Introduce, neighbour: Neighbour) -> Introduced:
        target_id = PeerId.decode_untrusted(request.target)
        attempt = decode_attempt_untrusted(request.attempt)
        record = decode_record_untrusted(request.record)
        if record.peer_id != neighbour.peer_id:
            raise RequestRefused("a node may introduce only itself")
        target = self._neighbour(target_id)
        if target is None:
            raise PeerNotFound(f"I am not connected to {target_id.short}")
        seen_at = neighbour.where_seen(request.at) if request.at else neighbour.seen_at
        if seen_at is None:
            raise RequestRefused(f"I do not see you at {request.at[:IP_CHARACTERS_MAX]}")
        rendezvous = Rendezvous(attempt, request.record, str(seen_at))
        accepted = await self._ask(target, RENDEZVOUS, rendezvous)
        return Introduced(accepted.record, str(target.seen_at))

    async def _answer_rendezvous(
        self, request: Rendezvous, neighbour: Neighbour
    ) -> RendezvousAccepted:
        attempt = decode_attempt_untrusted(request.attempt)
        record = decode_record_untrusted(request.record)
        # Of a neighbour that asks for itself we know better than anybody where it is.
        is_for_itself = record.peer_id == neighbour.peer_id
        seen_at = neighbour.seen_at if is_for_itself else decode_endpoint_untrusted(request.seen_at)
        return RendezvousAccepted(
            await self._home.start_rendezvous(record, seen_at, attempt, neighbour.peer_id)
        )

    async def _answer_ask(self, request: AskNeighbour, neighbour: Neighbour) -> Asked:
        observed = decode_endpoint_untrusted(request.observed)
        # Return routability: we see the asker at this address ourselves, on a living connection,
        # so nobody can point our neighbours at a third party.
        if observed.ip != neighbour.seen_at.ip:
            raise RequestRefused(f"I see you at {neighbour.seen_at.ip}, not at {observed.ip}")
        for other in reversed(self._home.neighbours()):
            # A neighbour of the same address would not be a stranger to the asker's NAT.
            if other.peer_id != neighbour.peer_id and other.seen_at.ip != observed.ip:
                await self._ask(other, ECHO_TO, EchoTo(request.transaction, str(observed)))
                return Asked()
        raise RequestRefused("I have no other neighbour who could send you a datagram")

    async def _answer_echo(self, request: EchoTo, _neighbour: Neighbour) -> Asked:
        if len(request.transaction) != TRANSACTION_BYTES:
            raise DecodeError(f"a transaction has {TRANSACTION_BYTES} bytes")
        self._home.send_unsolicited_echo(
            request.transaction, decode_endpoint_untrusted(request.observed)
        )
        return Asked()

    async def _answer_redeem(self, request: Redeem, neighbour: Neighbour) -> Redeemed:
        await self._home.take_ticket(request.ticket, neighbour.peer_id)
        return Redeemed()

    def _learn(self, neighbour: Neighbour, sealed: bytes) -> None:
        record = decode_record_untrusted(sealed)
        if record.peer_id != neighbour.peer_id:
            raise DecodeError(f"{neighbour.peer_id.short} sent the record of another node")
        self._home.learn_record(record, sealed)

    def _neighbour(self, peer_id: PeerId) -> Neighbour | None:
        for neighbour in self._home.neighbours():
            if neighbour.peer_id == peer_id:
                return neighbour
        return None
