"""Every core and driver of natswarm connected: the whole graph, which `__init__.py` draws."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial

import trio

from natswarm.address import AddressKind, Endpoint
from natswarm.discovery.introduction import (
    NodeRecord,
    decode_record_untrusted,
    profile_as_seen,
)
from natswarm.discovery.invite import INVITE_LIFETIME_S, Invite
from natswarm.errors import (
    ConfigurationError,
    ConnectFailed,
    DecodeError,
    InviteError,
    NatswarmError,
    PeerNotFound,
    RequestRefused,
    is_expected,
)
from natswarm.identity import PeerId
from natswarm.nat.findings import Findings, NatTest
from natswarm.nat.inspection import QUICK
from natswarm.nat.measurement import Observer
from natswarm.nat.profile import NatProfile
from natswarm.net.attempt import PunctureReport
from natswarm.net.call import (
    CALLS_PER_PEER_MAX,
    Call,
    CallHandler,
    Method,
    ReplyT,
    RequestT,
    answering,
)
from natswarm.net.connector import Connector
from natswarm.net.dialler import Dialler
from natswarm.net.echo import EchoService
from natswarm.net.foundations import lifetimes_of
from natswarm.net.introducer import Introducer, Neighbour
from natswarm.net.lan import LanService
from natswarm.net.mailbox import MailboxService
from natswarm.net.mainline import MainlineService
from natswarm.net.mainline_contact import connect_by_mainline
from natswarm.net.nursery import open_private_nursery
from natswarm.net.overlay import OverlayService
from natswarm.net.path_keeper import Lifetimes, PathSwitched
from natswarm.net.path_set import PathSet
from natswarm.net.peer import Peer
from natswarm.net.port import DatagramPort
from natswarm.net.pump import PortPump
from natswarm.net.rejoin import Rejoiner
from natswarm.net.renewer import Renewer
from natswarm.net.roaming import Roamer
from natswarm.net.second_way import SecondWay
from natswarm.net.stream import Stream
from natswarm.net.tracing import Tracer
from natswarm.node.config import PEERS_MAX, NodeConfig, check_presentable
from natswarm.node.events import NodeEvent, PathChanged, PeerConnected, PeerLost, ProfileLearned
from natswarm.node.own_nat import OwnNat
from natswarm.routing.record import Record, RecordKind, service_key
from natswarm.swarm_key import SwarmKey
from natswarm.wire import DatagramType

__all__ = ["Node", "StreamHandler", "open_node"]

logger = logging.getLogger("natswarm.node")

# Leaving takes no longer than this; a peer that missed our goodbye notices the silence.
GOODBYE_S = 1.0
# Neighbours answer in a round trip or two, also where a datagram is lost.
ASK_AROUND_S = 3.0

# By the clock: five appointments.
MEET_AGAIN_S = 600.0

StreamHandler = Callable[[Stream, Peer], Awaitable[None]]


@asynccontextmanager
async def open_node(config: NodeConfig) -> AsyncIterator[Node]:
    """Run a node while the body runs.

    Raises:
        ConfigurationError: The address or port cannot be bound, peers would refuse our record, or
            the files of `tracing` cannot be written.
    """
    config.check()
    with (
        closing(Tracer(config.tracing)) as tracer,
        closing(config.network.bind(Endpoint(config.bind_ip, config.port))) as main_port,
        closing(config.network.bind(Endpoint(config.bind_ip, 0))) as alternate_port,
    ):
        async with open_private_nursery() as nursery:
            node = Node(config, main_port, alternate_port, nursery, tracer)
            node.start()
            try:
                yield node
            finally:
                # Shielded: peers are told goodbye also when the body was cancelled or failed.
                with trio.move_on_after(GOODBYE_S, shield=True):
                    await node.aclose()


class Node:
    """A running node; made by `open_node`.

    Attributes:
        rejected_count: Datagrams that were not authentic; they only cost time.
        mainline: Our node in BitTorrent's DHT; None: it was not asked for.
    """

    def __init__(
        self,
        config: NodeConfig,
        main_port: DatagramPort,
        alternate_port: DatagramPort,
        nursery: trio.Nursery,
        tracer: Tracer,
    ) -> None:
        self._config = config
        self._identity = config.identity
        self._nursery = nursery
        self._rng = random.Random(config.seed)
        self._services = config.services
        self._main = PortPump(main_port, self._on_main_datagram)
        self._alternate = PortPump(alternate_port, self._on_alternate_datagram)
        self._dialler = Dialler(
            identity=config.identity,
            network=config.network,
            bind_ip=config.bind_ip,
            main=self._main,
            nursery=nursery,
            on_event=self._emit,
            swarm=config.swarm,
            tracer=tracer,
        )
        self._introducer = Introducer(self)
        self._overlay: OverlayService | None = None
        if config.links_max:
            self._overlay = OverlayService(
                self,
                identity=config.identity,
                nursery=nursery,
                rng=random.Random(self._rng.random()),
                links_max=config.links_max,
            )
        self._connector = Connector(
            self,
            identity=config.identity,
            dialler=self._dialler,
            introducer=self._introducer,
            nursery=nursery,
            limits=config.limits,
            recipes=config.notes.recipes,
            rng=self._rng,
            routes=self._overlay,
            swarm=config.swarm,
        )
        self._renewer = Renewer(
            self,
            identity=config.identity,
            dialler=self._dialler,
            introducer=self._introducer,
            network=config.network,
            bind_ip=config.bind_ip,
            nursery=nursery,
            limits=config.limits,
            rng=self._rng,
            outage_s=config.outage_s,
            swarm=config.swarm,
        )
        self._roamer = Roamer(
            self, config.network, check=self._renewer.check, second=config.second_network
        )
        self._rejoiner = None if config.cache is None else Rejoiner(self, config.cache, nursery)
        self._echo = EchoService(
            self._identity,
            config.network,
            config.bind_ip,
            self._main.port,
            self._alternate.port,
            config.swarm,
        )
        self.mainline: MainlineService | None = None
        self._mailbox: MailboxService | None = None
        if config.mainline is not None:
            self.mainline = MainlineService(
                self,
                port=self._main.port,
                identity=config.identity,
                config=config.mainline,
                swarm=config.swarm,
                known=config.notes.mainline,
                rng=self._rng,
                clock_s=config.utc,
            )
            self._main.on_krpc = self.mainline.receive_untrusted
            self._mailbox = MailboxService(self, self.mainline, self._connector, config.utc)
        self._handlers: dict[str, StreamHandler] = {}
        self._introducer.start()
        if self._overlay is not None:
            self._handlers.update(self._overlay.handlers())
        self._peers: dict[PeerId, Peer] = {}
        self._nat = OwnNat(
            self,
            config=config,
            echo=self._echo,
            introducer=self._introducer,
            mainline=self.mainline,
            wait_settled=self._roamer.wait_settled,
            rng=self._rng,
        )
        self._second_way: SecondWay | None = None
        if config.second_network is not None:
            self._second_way = SecondWay(
                self,
                config.second_network,
                identity=config.identity,
                dialler=self._dialler,
                introducer=self._introducer,
                nursery=nursery,
                limits=config.limits,
                rng=self._rng,
                swarm=config.swarm,
                attempt_for=self._renewer.attempt_for,
                ask_neighbour=self._nat.ask_neighbour_to_echo,
            )
        self._is_closed = False
        self.rejected_count = 0

    def start(self) -> None:
        """Start receiving."""
        self._nursery.start_soon(self._main.run)
        self._nursery.start_soon(self._alternate.run)
        if self._overlay is not None:
            self._nursery.start_soon(self._overlay.run)
        self._nursery.start_soon(self._roamer.run)
        if self._second_way is not None:
            self._nursery.start_soon(self._second_way.run)
        if self._nat.forwarder is not None:
            self._nursery.start_soon(self._nat.forwarder.run)
        self._nursery.start_soon(self._config.notes.run)
        if self._rejoiner is not None:
            self._nursery.start_soon(self._rejoiner.run)
        if self.mainline is not None:
            self._nursery.start_soon(self.mainline.run)
        if self._mailbox is not None:
            self._nursery.start_soon(self._mailbox.run)
        if self._config.lan is not None:
            lan = LanService(
                self,
                identity=self._identity,
                local=self.local_endpoint,
                config=self._config.lan,
                rng=self._rng,
                swarm=self._config.swarm,
            )
            self._nursery.start_soon(lan.run)

    async def aclose(self) -> None:
        """Give up what is under way and say goodbye to every peer."""
        self._is_closed = True
        self._dialler.close()
        if self._rejoiner is not None:
            for peer in self.peers():
                if not peer.introduced.is_set():  # else it has been noted
                    self._rejoiner.note_connected(peer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._config.notes.save)
            if self._rejoiner is not None:
                nursery.start_soon(self._rejoiner.aclose)
            for peer in list(self._peers.values()):
                nursery.start_soon(peer.aclose)

    # What users ask for ---------------------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self._identity.peer_id

    @property
    def swarm(self) -> SwarmKey:
        """Which swarm we are in."""
        return self._config.swarm

    @property
    def is_closed(self) -> bool:
        """Whether this node was closed."""
        return self._is_closed

    @property
    def local_endpoint(self) -> Endpoint:
        """Where the main port p is bound."""
        return self._main.port.local_endpoint

    @property
    def profile(self) -> NatProfile | None:
        """What our NAT does, once `inspect` has found out."""
        return self._nat.profile

    def peers(self) -> list[Peer]:
        """Whom we are connected to, oldest first."""
        return [peer for peer in self._peers.values() if not peer.is_lost]

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Answer streams of `protocol`: `handler` runs in a task of its own and owns the stream.

        What it raises stays with its stream, which is reset; what is not an error of the network or
        of natswarm is logged with its traceback.
        """
        self._handlers[protocol] = handler

    def answer(
        self,
        method: Method[RequestT, ReplyT],
        answer: Callable[[RequestT, Peer], Awaitable[ReplyT]],
        *,
        calls_per_peer_max: int = CALLS_PER_PEER_MAX,
    ) -> None:
        """Answer `peer.call(method, ...)`: `answer` makes of a request the reply.

        It may raise any NatswarmError: the caller gets its text and code as `RequestRefused`. It
        is cancelled when the caller's time is over, when the caller leaves, and with the
        connection.

        Args:
            method: What is asked.
            answer: Gets the request and who asks.
            calls_per_peer_max: More at once from one peer are refused with the code "busy".
        """
        self.serve_calls(method, answering(answer), calls_per_peer_max=calls_per_peer_max)

    def serve_calls(
        self,
        method: Method[RequestT, ReplyT],
        serve: Callable[[Call[ReplyT, RequestT]], Awaitable[None]],
        *,
        calls_per_peer_max: int = CALLS_PER_PEER_MAX,
    ) -> None:
        """Answer `peer.start_call(method, ...)`: `serve` receives and sends; see `answer`."""
        handler = CallHandler(method, serve, calls_per_peer_max=calls_per_peer_max)
        self.serve(method.name, handler.handle)

    async def announce(self, services: Iterable[str]) -> None:
        """Tell every neighbour, now and later, which services we offer.

        Raises:
            ConfigurationError: More than 16, or not at most 128 printable characters each.
        """
        services = tuple(services)
        check_presentable(self._config.name, services)
        self._services = services
        await self._share_record_with_all()

    async def invite(
        self, *, lifetime_s: float = INVITE_LIFETIME_S, is_one_time: bool = False
    ) -> Invite:
        """Return an invite to this node, as it is reachable now.

        Args:
            lifetime_s: How long it holds.
            is_one_time: Whether only the first node that connects by it may do so.

        Raises:
            InviteError: It would not hold for a second, or for ever.
        """
        if not 1 <= lifetime_s < 2**32:
            raise InviteError(f"an invite holds for a second to a century, not {lifetime_s:g} s")
        await self.known_profile()
        if self._mailbox is not None:
            self._mailbox.note_invited()
        now_s, book, swarm = self._config.utc(), self._config.notes.invites, self.swarm
        return Invite.of(
            self.record(),
            self._identity,
            lifetime_s=lifetime_s,
            meeting=book.add(now_s, lifetime_s, os.urandom),
            ticket=book.add_ticket(now_s, lifetime_s, os.urandom) if is_one_time else b"",
            swarm_key=b"" if swarm.is_open else swarm.secret,
        )

    def record(self) -> NodeRecord:
        """Return what we say of ourselves."""
        profile = self._nat.known_or_unknown()
        alternate = None
        if profile.is_translated is False and profile.main_endpoint is not None:
            alternate = Endpoint(profile.main_endpoint.ip, self._alternate.port.local_endpoint.port)
        return NodeRecord(
            peer_id=self.peer_id,
            issued_at_s=self._config.utc(),
            name=self._config.name,
            profile=profile,
            alternate_endpoint=alternate,
            services=self._services,
        )

    @property
    def inspection(self) -> Findings | None:
        """What the newest `inspect` has found, with intervals and reasons; it grows meanwhile."""
        return self._nat.findings

    async def inspect(self, tests: Iterable[NatTest] = QUICK) -> NatProfile:
        """Find out what our NAT does by asking the peers we can reach, and mainline nodes.

        Without any it is what the interfaces tell: a global address of our own, or nothing known.
        A test that cannot be carried out leaves unknowns, whose reasons are in `inspection`.

        Args:
            tests: What to find out; by default what takes seconds. The quick part is always done.

        Raises:
            ConnectFailed: This node was closed meanwhile.
        """
        profile = await self._nat.inspect(tests)
        await self._share_record_with_all()
        return profile

    async def look_again(self) -> NatProfile:
        """Find out the quick part; neighbours hear of it while the caller goes on."""
        profile = await self._nat.inspect(QUICK)
        self._nursery.start_soon(self._share_record_with_all)
        return profile

    def adopt_profile(self, profile: NatProfile) -> None:
        """Go by a profile from now on, such as one that more was found out for; neighbours hear."""
        self._nat.learn(profile)
        if not self._is_closed:
            self._nursery.start_soon(self._share_record_with_all)

    def note_profile(self, before: NatProfile, profile: NatProfile) -> None:
        """Have all that depends on what our NAT does go by a new profile."""
        self._renewer.note_profile(before, profile)
        for peer in self.peers():
            peer.paths.lifetimes = lifetimes_of(profile).or_else(peer.paths.lifetimes)
        if self._rejoiner is not None and profile.is_translated is not None:
            self._rejoiner.note_own_record(self.peer_id, self.sealed_record())
        self._emit(ProfileLearned(profile))

    def forget_profile(self) -> None:
        """Know nothing of our NAT: we are somewhere else."""
        self._nat.forget()
        for peer in self.peers():
            peer.paths.lifetimes = Lifetimes()
        self._renewer.begin_anew()

    def is_seen_elsewhere(self) -> bool:
        """Whether neighbours agree that we have another public address than we know of."""
        return self._nat.is_seen_elsewhere()

    def glimpse(self) -> None:
        """Go by what neighbours have told of our NAT since we moved, until more is known."""
        self._nat.glimpse()

    async def observers(self) -> list[Observer]:
        """Return who can tell us what they see of us."""
        return await self._nat.observers()

    async def find_peers(self) -> list[NodeRecord]:
        """Ask every neighbour for its neighbours; return all records, the newest of each peer.

        Who has not answered after three seconds is left out.
        """
        found = await self.ask_around()
        return [found[peer_id][0] for peer_id in sorted(found)]

    async def connect(self, target: PeerId | Invite) -> Peer:
        """Return the connection to a peer, making it first if there is none.

        A PeerId is looked for in the whole swarm if we take part in routing (`links_max`), and
        among our neighbours' neighbours otherwise; then in the mainline DHT, if we take part in
        that (`mainline`). An Invite is dialled where the
        invited node takes strangers; otherwise both sides puncture, which needs the other side to
        connect with our invite at the same time, or both to take part in the mainline DHT.

        Cancelled, it leaves nothing behind; a connection that was ready by then stays.

        Raises:
            InviteError: The invite has expired, is of another swarm, or was for one guest and is
                used up.
            PeerNotFound: Nobody knows the peer.
            PunctureFailed: The NATs stayed closed, or cannot be opened within the limits.
            HandshakeFailed: There was a path, but not the peer at its end.
            ConnectFailed: Anything else that kept us from it.
            ConfigurationError: The system gives fewer ports than the puncture needs.
        """
        ticket = b""
        if isinstance(target, Invite):
            target.check(self._config.utc())
            target.check_swarm(self.swarm)
            ticket = b"" if self.is_connected(target.record.peer_id) else target.ticket
        peer = await self._connect(target)
        if ticket:
            await self._hand_in(ticket, peer)
        if self._overlay is not None:
            self._overlay.keep(peer.peer_id)
        await peer.wait_introduced()
        return peer

    async def _connect(self, target: PeerId | Invite) -> Peer:
        if self.mainline is None or self._mailbox is None:
            return await self._connector.connect(target)
        if isinstance(target, Invite):
            if target.dialled_endpoints or self.is_connected(target.record.peer_id):
                return await self._connector.connect(target)
            return await self._mailbox.connect(target)
        try:
            return await self._connector.connect(target)
        except PeerNotFound:
            return await connect_by_mainline(self.mainline, self._connector, target)

    # Routing --------------------------------------------------------------------------------------

    @property
    def overlay(self) -> OverlayService:
        """Our part in the swarm's routing: neighbours by bucket, the swarm's size, counters.

        Raises:
            ConfigurationError: This node takes no part.
        """
        if self._overlay is None:
            raise ConfigurationError("this node takes no part in routing; open it with links_max")
        return self._overlay

    async def find(self, peer_id: PeerId) -> Peer:
        """Return the connection to a peer anywhere in the swarm, making it first; see `connect`.

        Raises:
            ConfigurationError: This node takes no part in routing.
            ConnectFailed: As `connect`.
        """
        _ = self.overlay
        return await self.connect(peer_id)

    async def lookup(self, key: bytes) -> list[Record]:
        """Return what is published under a key, `own_key(...)` or `service_key(...)`.

        Every record is genuine, has not expired and is the latest of its publisher that anybody
        asked knew. Empty if there is none.
        """
        return await self.overlay.lookup(key)

    async def publish(self, topic: str, value: bytes = b"", *, is_service: bool = False) -> int:
        """Publish a record, and again every 20 minutes while this node runs.

        Args:
            topic: What it is about; publishing under it again replaces it. Of a service, its name.
            value: At most 1,000 bytes.
            is_service: Whether it is found by its topic alone, beside those of all who serve the
                same, and not by whose it is.

        Returns:
            How many nodes have it now.

        Raises:
            ValueError: The topic has more than 128 printable characters, or the value is too long.
            PeerNotFound: Nobody is there to keep it; it is tried again.
            RequestRefused: Nobody keeps it, and why; it is tried again.
        """
        kind = RecordKind.SERVICE if is_service else RecordKind.OWN
        return await self.overlay.publish(kind, topic, value)

    def withdraw(self, topic: str, *, is_service: bool = False) -> None:
        """Publish a record no more; it is gone within an hour."""
        self.overlay.withdraw(RecordKind.SERVICE if is_service else RecordKind.OWN, topic)

    async def find_service(self, name: str) -> list[PeerId]:
        """Return who published the service `name`: a sample, if there are more than some 15."""
        return [record.publisher for record in await self.lookup(service_key(name))]

    async def sample_peer(self) -> PeerId:
        """Return a node of the swarm, drawn by a random walk: each as likely as any other.

        Raises:
            PeerNotFound: The walks got lost.
        """
        return await self.overlay.sample()

    def is_connecting(self, peer_id: PeerId) -> bool:
        """Whether our user is connecting to a peer; used by the overlay."""
        return self._connector.is_connecting(peer_id)

    async def connect_for_link(self, peer_id: PeerId, last_known: NodeRecord | None) -> Peer:
        """Connect to a peer for routing alone; used by the overlay."""
        try:
            return await self._connector.connect_for_link(peer_id)
        except PeerNotFound:
            if last_known is None:
                raise
            return await self._connector.connect(Invite(last_known, ""))

    async def connect_at(self, peer_id: PeerId, endpoints: tuple[Endpoint, ...]) -> Peer:
        """Return the connection to a peer that takes strangers at `endpoints`, made if need be.

        Raises:
            PunctureFailed: It does not answer there.
            HandshakeFailed: There was a path, but not the peer at its end.
            ConnectFailed: Anything else that kept us from it.
        """
        peer = await self._connector.connect_at(peer_id, endpoints)
        await peer.wait_introduced()
        return peer

    async def meet_again(self, peer_id: PeerId, *, patience_s: float = MEET_AGAIN_S) -> Peer:
        """Return the connection to a peer that we met before, made by the clock if there is none.

        Nobody stands in between: both sides ask for it within the patience of the other, wait for
        the next slot of two minutes UTC, and puncture by what the peer cache knows of both NATs.

        Args:
            peer_id: Whom; both nodes have a cache, and were connected while they had one, or both
                take part in the mainline DHT and published their records there.
            patience_s: How long to come to appointments.

        Raises:
            PeerNotFound: The cache does not know the peer, or our own NAT.
            PunctureFailed: These NATs can't be opened by what was known of them, or nobody came.
            ConnectFailed: Anything else that kept us from it.
        """
        if (peer := self.living_peer(peer_id)) is None:
            theirs = await self._remembered_profile(peer_id)
            mine = await self.known_profile()
            if mine.is_translated is None:  # nobody is there to tell
                mine = await self._remembered_profile(self.peer_id)
            peer = await self._connector.meet_again(
                peer_id,
                mine,
                theirs,
                network=self._config.network,
                bind_ip=self._config.bind_ip,
                utc=self._config.utc,
                patience_s=patience_s,
            )
        await peer.wait_introduced()
        return peer

    async def _remembered_profile(self, peer_id: PeerId) -> NatProfile:
        cached = None
        if self._rejoiner is not None:
            cached = await self._rejoiner.remembered(peer_id)
        if cached is None or cached.sealed_record is None:
            if self.mainline is not None and peer_id != self.peer_id:
                return (await self.mainline.find_meeting(peer_id)).record.profile
            whose = "our own NAT" if peer_id == self.peer_id else peer_id.short
            raise PeerNotFound(
                f"the peer cache knows nothing of {whose}; to meet by the clock, two nodes must "
                "have been connected before, each with its cache"
            )
        try:
            profile = decode_record_untrusted(cached.sealed_record).profile
        except DecodeError as error:
            raise PeerNotFound(f"what the peer cache holds is of no use: {error}") from error
        # Where we saw it ourselves counts for more than what it says.
        seen_at = [s.endpoint for s in cached.sightings if s.endpoint.kind is AddressKind.GLOBAL]
        return profile_as_seen(profile, seen_at[0]) if seen_at else profile

    async def rejoin(self) -> None:
        """Connect to peers of the cache; return when one is there, or none of them is.

        More are dialled in the background. Without a cache it returns at once.
        """
        if self._rejoiner is not None:
            await self._rejoiner.rejoin()

    def local_addresses(self) -> list[str]:
        """Return the addresses we can be reached at by our network."""
        return [endpoint.ip for endpoint in self._nat.own_endpoints()]

    @property
    def accepts_strangers(self) -> bool:
        """Whether a stranger's datagram reaches our main port, as far as is known."""
        return self.profile is not None and self.profile.accepts_strangers

    def is_connected(self, peer_id: PeerId) -> bool:
        """Whether there is a connection to a peer."""
        return self.living_peer(peer_id) is not None

    async def _hand_in(self, ticket: bytes, peer: Peer) -> None:
        try:
            await self._introducer.redeem(peer, ticket)
        except BaseException as error:
            await trio.aclose_forcefully(peer)
            if isinstance(error, RequestRefused):
                raise InviteError(str(error)) from error
            raise

    # What the connector asks for ------------------------------------------------------------------

    def meetings(self) -> list[bytes]:
        """Return where holders of our invites may wait for us, the newest first."""
        return self._config.notes.invites.meetings(self._config.utc())

    def living_peer(self, peer_id: PeerId) -> Peer | None:
        """Return the connection to a peer, if there is one."""
        peer = self._peers.get(peer_id)
        return None if peer is None or peer.is_lost else peer

    @property
    def is_full(self) -> bool:
        """Whether there is no room for one more peer."""
        return len(self._peers) >= PEERS_MAX

    async def known_profile(self, *, max_age_s: float = math.inf) -> NatProfile:
        """Return our profile; look first if nobody has told us what they see, or long ago."""
        return await self._nat.known_profile(max_age_s)

    async def current_profile(
        self, *, max_age_s: float = math.inf, in_full: bool = False
    ) -> NatProfile:
        """Return our profile as punctures need it: a counter's is never older than 2 s."""
        return await self._nat.current_profile(max_age_s, in_full=in_full)

    def adopt(self, paths: PathSet, report: PunctureReport) -> Peer:
        """Make a peer of a new connection.

        Raises:
            ConnectFailed: There is no room.
        """
        peer = Peer(paths, report)
        # A peer that punctures anew has lost its end of the old path (restart, new network).
        previous = self._peers.pop(peer.peer_id, None)
        if previous is not None:
            self._nursery.start_soon(trio.aclose_forcefully, previous)
        elif self.is_full:
            self._nursery.start_soon(trio.aclose_forcefully, peer)
            raise ConnectFailed(f"this node keeps at most {PEERS_MAX} peers; close one first")
        self._peers[peer.peer_id] = peer
        if self.profile is not None:
            paths.lifetimes = lifetimes_of(self.profile)
        paths.on_switch = partial(self._on_switch, peer)
        paths.on_doubt = self._roamer.note_doubt
        paths.on_rebound = self._roamer.note_rebound
        self._emit(PeerConnected(peer))
        self._nursery.start_soon(self._introduce_ourselves, peer)
        self._nursery.start_soon(self._accept_streams, peer)
        if self._overlay is not None:
            self._overlay.peer_connected(peer)
        self._nursery.start_soon(self._renewer.keep, peer)
        return peer

    def _on_switch(self, peer: Peer, switch: PathSwitched) -> None:
        if switch.new is None:
            peer.calls.note_unreachable()
        else:
            peer.calls.note_reachable()
            if switch.old is None:  # it was out of reach, and may have missed our latest record
                self._nursery.start_soon(self._share_record, peer)
        self._emit(PathChanged(peer, switch.old, switch.new, switch.reason))

    async def _introduce_ourselves(self, peer: Peer) -> None:
        try:
            await self._share_record(peer)
        finally:
            peer.introduced.set()
            if self._rejoiner is not None:
                self._rejoiner.note_connected(peer)

    # Streams --------------------------------------------------------------------------------------

    async def _accept_streams(self, peer: Peer) -> None:
        try:
            while True:
                stream = await peer.accept_stream()
                self._nursery.start_soon(self._handle_stream, stream, peer)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        if self._peers.get(peer.peer_id) is peer:
            del self._peers[peer.peer_id]
        self._emit(PeerLost(peer))

    async def _handle_stream(self, stream: Stream, peer: Peer) -> None:
        handler = self._handlers.get(stream.protocol)
        if handler is None:
            logger.info("%s asked for unknown protocol %s", peer.peer_id.short, stream.protocol)
            stream.refuse()
            return
        try:
            await handler(stream, peer)
        except Exception as error:
            what = f"{stream.protocol} with {peer.peer_id.short}"
            if is_expected(error):
                logger.info("%s ended: %s", what, error)
            else:
                logger.exception("the handler of %s failed", what)
            # Reset, or else the peer would take what it got for the whole.
            await trio.aclose_forcefully(stream)
        else:
            await stream.aclose()

    async def _share_record_with_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for peer in self.peers():
                if peer.is_reachable:
                    nursery.start_soon(self._share_record, peer)

    async def _share_record(self, peer: Peer) -> None:
        try:
            await self._introducer.share_record(peer)
        except NatswarmError as error:
            logger.info("%s did not share its record: %s", peer.peer_id.short, error)

    def _emit(self, event: NodeEvent) -> None:
        try:
            self._config.on_event(event)
        except Exception:
            logger.exception("on_event failed with %s", type(event).__name__)

    def introducers(self) -> list[tuple[PeerId, Endpoint]]:
        """Return neighbours that strangers can ask to introduce us, each with where; oldest first.

        None if strangers can reach ourselves.
        """
        found = []
        for peer in () if self.accepts_strangers else self.peers():
            if peer.record is not None and peer.record.profile.accepts_strangers:
                endpoint = profile_as_seen(peer.record.profile, peer.seen_at).main_endpoint
                if endpoint is not None:
                    found.append((peer.peer_id, endpoint))
        return found

    # What the introducer asks for -----------------------------------------------------------------

    def sealed_record(self, order: tuple[str, ...] = ()) -> bytes:
        """Return our signed record as of now, with the order in which we try strategies."""
        return replace(self.record(), order=order).seal(self._identity)

    def neighbours(self) -> list[Neighbour]:
        """Return whom we are connected to."""
        return list(self.peers())

    def learn_record(self, record: NodeRecord, sealed: bytes) -> None:
        """Note the record of a peer."""
        if (peer := self._peers.get(record.peer_id)) is not None:
            peer.record, peer.sealed_record = record, sealed

    async def start_rendezvous(
        self, record: NodeRecord, seen_at: Endpoint, attempt: bytes, introducer: PeerId
    ) -> bytes:
        """Start our side of a puncture that a peer asked for; return our signed record."""
        peer = self._renewer.renewed_peer(record.peer_id, attempt)
        if peer is not None:
            return await self._renewer.answer(peer, record, seen_at, attempt, introducer)
        return await self._connector.start_rendezvous(record, seen_at, attempt, introducer)

    async def take_ticket(self, ticket: bytes, peer_id: PeerId) -> None:
        """Take the ticket of a one-time invite, and write down that it is used up."""
        self._config.notes.invites.redeem(ticket, peer_id, self._config.utc())
        await self._config.notes.save()

    def send_unsolicited_echo(self, transaction: bytes, observed: Endpoint) -> None:
        """Send one echo reply for somebody our neighbour vouches for."""
        self._echo.answer_for_neighbour(transaction, observed)

    async def ask_around(self) -> dict[PeerId, tuple[NodeRecord, Endpoint | None]]:
        """Return the newest record of everybody our neighbours know, and where they are seen."""
        newest: dict[PeerId, tuple[NodeRecord, Endpoint | None]] = {}

        def note(record: NodeRecord, seen_at: Endpoint | None) -> None:
            known = newest.get(record.peer_id)
            if record.peer_id != self.peer_id and (
                known is None or known[0].issued_at_s < record.issued_at_s
            ):
                newest[record.peer_id] = record, seen_at

        async def ask(peer: Peer) -> None:
            try:
                for record, seen_at in await self._introducer.find_peers(peer):
                    note(record, seen_at)
            except NatswarmError as error:
                logger.info("no peers from %s: %s", peer.peer_id.short, error)

        # One that has just vanished, which takes some seconds to notice, holds up nobody.
        with trio.move_on_after(ASK_AROUND_S):
            async with trio.open_nursery() as nursery:
                for peer in self.peers():
                    if peer.is_reachable and peer.paths.is_certain:
                        nursery.start_soon(ask, peer)
        for peer in self.peers():
            if peer.record is not None:
                note(peer.record, peer.seen_at)
        return newest

    # Datagrams ------------------------------------------------------------------------------------

    def _on_main_datagram(self, data: bytes, source: Endpoint) -> None:
        try:
            data = self.swarm.open_untrusted(data)
            match data[0]:
                case DatagramType.PROBE:
                    self._dialler.receive_untrusted(data, source)
                case DatagramType.ECHO_REQUEST:
                    self._echo.answer_untrusted(data, source)
                case DatagramType.ECHO_REPLY:
                    self._echo.receive_reply_untrusted(data, source)
                case DatagramType.HELLO:
                    self._connector.receive_hello_untrusted(data, source)
        except DecodeError:
            self.rejected_count += 1

    def _on_alternate_datagram(self, data: bytes, source: Endpoint) -> None:
        try:
            data = self.swarm.open_untrusted(data)
            if data[0] == DatagramType.ECHO_REQUEST:
                self._echo.answer_untrusted(data, source, arrived_at_alternate=True)
        except DecodeError:
            self.rejected_count += 1
