"""A node: every core and driver of natswarm connected, the whole graph in one place.

    main port p ──┐                              ┌── EchoService   what do others see of us?
    second port q ┴─ PortPump ─ first byte ──────┼── Attempt       punctures under way
                       │                         └── HELLO         strangers who knock
                       └─ QUIC by remote endpoint ── Connection ── streams ── handlers by protocol
                                                                       └── Introducer

`open_node` starts it and, on leaving, closes everything it opened. The node owns its peers: a lost
connection takes its Peer away and tells `on_event`; connecting again is the caller's decision.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from natswarm.address import Endpoint
from natswarm.discovery.introduction import NodeRecord, decode_record_untrusted, profile_as_seen
from natswarm.discovery.invite import Invite
from natswarm.errors import (
    AlreadyConnecting,
    ConfigurationError,
    ConnectFailed,
    DecodeError,
    HandshakeFailed,
    NatswarmError,
    PeerNotFound,
    PunctureFailed,
    RequestRefused,
)
from natswarm.identity import Identity, PeerId
from natswarm.nat.classify import Observer
from natswarm.nat.profile import NatProfile
from natswarm.net.attempt import Attempt, PunctureReport
from natswarm.net.budget import Budget
from natswarm.net.echo import EchoService
from natswarm.net.introducer import Introducer, Neighbour
from natswarm.net.message_stream import MessageStream
from natswarm.net.nursery import open_private_nursery
from natswarm.net.port import DatagramPort, Network
from natswarm.net.pump import PortPump
from natswarm.net.quic import Connection, ConnectionStatistics
from natswarm.net.stream import Stream
from natswarm.net.udp import UdpNetwork
from natswarm.puncture.plan import Limits, Plan, plan_direct, plan_puncture
from natswarm.puncture.puncturer import PathFound, Puncturer
from natswarm.wire import (
    ATTEMPT_BYTES,
    DatagramType,
    Hello,
    decode_hello_untrusted,
    probe_attempt_untrusted,
)

__all__ = [
    "Node",
    "NodeConfig",
    "NodeEvent",
    "Peer",
    "PeerConnected",
    "PeerLost",
    "ProfileLearned",
    "PunctureEnded",
    "PunctureStarted",
    "StreamHandler",
    "open_node",
]

logger = logging.getLogger("natswarm.node")

# Tries of one connect(): each draws new ports, so each is a new chance. Plans are sized for 99.9 %;
# what a second or third try mends is a peer that was busy, or a path lost during the handshake.
PUNCTURE_TRIES = 3

# A peer that is connecting to us needs its introduction and the puncture itself.
THEIR_SIDE_TIMEOUT_S = 30.0

# Leaving takes no longer than this; a peer that missed our goodbye notices the silence.
GOODBYE_S = 1.0

# How many punctures of all peers together may run at once, and how many knocks a second we look at:
# both bound what strangers can make us spend (a knock costs an Ed25519 verification, 0.1 ms).
ATTEMPTS_MAX = 64
HELLOS_PER_S = 50

# Peers a node keeps; reference section 4: a phone keeps about 30, a laptop has room for more.
PEERS_MAX = 256


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """How to open a node.

    Attributes:
        identity: Who we are.
        network: Where UDP ports come from; the real network by default.
        name: What the user calls this node, at most 64 characters; peers see it.
        bind_ip: Address to bind, such as that of one interface; `0.0.0.0` is any.
        port: UDP port of the main port p; 0 lets the system choose.
        services: Names of what we serve, for others to find.
        limits: Bounds of a puncture.
        seed: Seed of the node's random behaviour; None draws one. Keys never depend on it.
        on_event: Called with every NodeEvent, at once; must return quickly and not raise.
    """

    identity: Identity
    network: Network = field(default_factory=UdpNetwork)
    name: str = ""
    bind_ip: str = "0.0.0.0"
    port: int = 0
    services: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    seed: int | None = None
    on_event: Callable[[NodeEvent], None] = lambda _event: None


class Peer:
    """A peer we are connected to, over an encrypted path that nobody stands in between of.

    Attributes:
        peer_id: Who it is; proved in the handshake.
        seen_at: Where its datagrams come from.
        puncture: How the path was made.
        sealed_record: Its signed record, once it has shared it.
    """

    def __init__(
        self, connection: Connection, seen_at: Endpoint, puncture: PunctureReport | None
    ) -> None:
        self._connection = connection
        self.peer_id = connection.peer_id
        self.seen_at = seen_at
        self.puncture = puncture
        self.sealed_record: bytes | None = None

    def __repr__(self) -> str:
        return f"Peer({self.peer_id.short} at {self.seen_at})"

    @property
    def record(self) -> NodeRecord | None:
        """What the peer says of itself, once it has."""
        return None if self.sealed_record is None else decode_record_untrusted(self.sealed_record)

    async def open_stream(self, protocol: str) -> Stream:
        """Start a stream that the peer hands to its handler of `protocol`.

        Raises:
            ConnectionLost: The connection ended.
        """
        return await self._connection.open_stream(protocol)

    async def open_messages(self, protocol: str) -> MessageStream:
        """Start a stream of messages; see `open_stream`."""
        return MessageStream(await self.open_stream(protocol))

    async def wait_lost(self) -> None:
        """Wait until the connection has ended."""
        await self._connection.wait_closed()

    def statistics(self) -> ConnectionStatistics:
        """Counters of the connection."""
        return self._connection.statistics()

    async def aclose(self) -> None:
        """End the connection."""
        await self._connection.aclose()


@dataclass(frozen=True, slots=True)
class ProfileLearned:
    """The node found out what its NAT does."""

    profile: NatProfile


@dataclass(frozen=True, slots=True)
class PunctureStarted:
    """A puncture began."""

    peer_id: PeerId
    plan: Plan


@dataclass(frozen=True, slots=True)
class PunctureEnded:
    """A puncture found a path or gave up."""

    peer_id: PeerId
    report: PunctureReport


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A peer is authenticated and streams can flow."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A connection ended."""

    peer: Peer


NodeEvent = ProfileLearned | PunctureStarted | PunctureEnded | PeerConnected | PeerLost

StreamHandler = Callable[[Stream, Peer], Awaitable[None]]


@asynccontextmanager
async def open_node(config: NodeConfig) -> AsyncIterator[Node]:
    """Run a node while the body runs.

    Raises:
        ConfigurationError: The address or port cannot be bound.
    """
    main_port = config.network.bind(Endpoint(config.bind_ip, config.port))
    try:
        alternate_port = config.network.bind(Endpoint(config.bind_ip, 0))
    except ConfigurationError:
        main_port.close()
        raise
    try:
        async with open_private_nursery() as nursery:
            node = Node(config, main_port, alternate_port, nursery)
            node.start()
            try:
                yield node
            finally:
                # Shielded: peers are told goodbye also when the body was cancelled or failed.
                with trio.move_on_after(GOODBYE_S, shield=True):
                    await node.aclose()
    finally:
        main_port.close()
        alternate_port.close()


class Node:
    """A running node; made by `open_node`.

    Attributes:
        rejected_count: Datagrams that were not authentic; they only cost time.
    """

    def __init__(
        self,
        config: NodeConfig,
        main_port: DatagramPort,
        alternate_port: DatagramPort,
        nursery: trio.Nursery,
    ) -> None:
        self._config = config
        self._identity = config.identity
        self._nursery = nursery
        self._rng = random.Random(config.seed)
        self._services = config.services
        self._main = PortPump(main_port, self._on_main_datagram)
        self._alternate = PortPump(alternate_port, self._on_alternate_datagram)
        self._introducer = Introducer(self)
        self._echo = EchoService(
            self._identity, config.network, config.bind_ip, self._main.port, self._alternate.port
        )
        self._handlers: dict[str, StreamHandler] = dict(self._introducer.handlers())
        self._peers: dict[PeerId, Peer] = {}
        self._attempts: dict[bytes, Attempt] = {}
        # Peers we are connecting to by our own wish; the event ends the wait of other callers.
        self._connecting: dict[PeerId, trio.Event] = {}
        self._peer_came = trio.Event()
        self._hello_budget = Budget(per_s=HELLOS_PER_S)
        self._profile: NatProfile | None = None
        self.rejected_count = 0
        self._inspecting = trio.Lock()

    def start(self) -> None:
        """Start receiving."""
        self._nursery.start_soon(self._main.run)
        self._nursery.start_soon(self._alternate.run)

    async def aclose(self) -> None:
        """Say goodbye to every peer."""
        async with trio.open_nursery() as nursery:
            for peer in list(self._peers.values()):
                nursery.start_soon(peer.aclose)

    # What users ask for ---------------------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self._identity.peer_id

    @property
    def local_endpoint(self) -> Endpoint:
        """Where the main port p is bound."""
        return self._main.port.local_endpoint

    @property
    def profile(self) -> NatProfile | None:
        """What our NAT does, once `inspect` has found out."""
        return self._profile

    def peers(self) -> list[Peer]:
        """Whom we are connected to, oldest first."""
        return list(self._peers.values())

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Answer streams of `protocol`: `handler` runs in a task of its own and owns the stream."""
        self._handlers[protocol] = handler

    async def announce(self, services: Iterable[str]) -> None:
        """Tell every neighbour, now and later, which services we offer."""
        self._services = tuple(services)
        for peer in self.peers():
            await self._share_record(peer)

    async def invite(self) -> Invite:
        """Return an invite to this node, as it is reachable now."""
        await self._known_profile()
        return Invite.of(self.record(), self._identity)

    def record(self) -> NodeRecord:
        """Return what we say of ourselves."""
        profile = self._profile or NatProfile.unknown(self._host_candidates())
        alternate = None
        if profile.is_translated is False and profile.main_endpoint is not None:
            alternate = Endpoint(profile.main_endpoint.ip, self._alternate.port.local_endpoint.port)
        return NodeRecord(
            peer_id=self.peer_id,
            issued_at_s=time.time(),
            name=self._config.name,
            profile=profile,
            alternate_endpoint=alternate,
            services=self._services,
        )

    async def inspect(self) -> NatProfile:
        """Find out what our NAT does by asking the peers we can reach.

        Without any it is what the interfaces tell: a global address of our own, or nothing known.
        """
        async with self._inspecting:
            observers = await self._observers()
            self._profile = await self._echo.inspect(
                observers,
                host_candidates=self._host_candidates(),
                rng=self._rng,
                ask_neighbour=self._ask_neighbour_to_echo,
            )
        self._config.on_event(ProfileLearned(self._profile))
        for peer in self.peers():
            await self._share_record(peer)
        return self._profile

    async def find_peers(self) -> list[NodeRecord]:
        """Ask every neighbour for its neighbours; return all records, the newest of each peer."""
        newest: dict[PeerId, NodeRecord] = {}
        for peer in self.peers():
            records = [peer.record] if peer.record is not None else []
            try:
                records += await self._introducer.find_peers(peer)
            except (NatswarmError, trio.BrokenResourceError) as error:
                logger.info("no peers from %s: %s", peer.peer_id.short, error)
            for record in records:
                known = newest.get(record.peer_id)
                if record.peer_id != self.peer_id and (
                    known is None or known.issued_at_s < record.issued_at_s
                ):
                    newest[record.peer_id] = record
        return sorted(newest.values(), key=lambda record: record.peer_id)

    async def connect(self, target: PeerId | Invite) -> Peer:
        """Return the connection to a peer, making it first if there is none.

        A PeerId is looked for among our neighbours' neighbours. An Invite is dialled where the
        invited node takes strangers; otherwise both sides puncture, which needs the other side to
        connect with our invite at the same time.

        Raises:
            PeerNotFound: No neighbour knows the peer.
            PunctureFailed: The NATs stayed closed, or cannot be opened within the limits.
            HandshakeFailed: There was a path, but not the peer at its end.
        """
        peer_id = target if isinstance(target, PeerId) else target.record.peer_id
        if peer_id == self.peer_id:
            raise ConnectFailed("that is this node itself")
        while True:
            if (peer := self._peers.get(peer_id)) is not None:
                return peer
            if (other := self._connecting.get(peer_id)) is None:
                break
            await other.wait()
        self._connecting[peer_id] = finished = trio.Event()
        try:
            if isinstance(target, Invite):
                return await self._connect_by_invite(target)
            return await self._connect_by_introduction(target)
        finally:
            del self._connecting[peer_id]
            finished.set()

    # Making connections ---------------------------------------------------------------------------

    async def _connect_by_invite(self, invite: Invite) -> Peer:
        record = invite.record
        endpoint = record.profile.main_endpoint
        if endpoint is not None and record.profile.accepts_strangers:
            attempt = self._new_attempt_id()
            hello = Hello(attempt, self.peer_id, record.peer_id).encode(self._identity)
            plan = plan_direct([endpoint], limits=self._config.limits)
            return await self._puncture(record.peer_id, plan, attempt, hello=hello)
        # Both hold the other's invite: the attempt has the one name that both can derive.
        attempt = self._identity.shared_secret(record.peer_id, purpose=b"invite")[:ATTEMPT_BYTES]
        plan = self._plan(await self._known_profile(), record.profile, record.peer_id)
        return await self._puncture(record.peer_id, plan, attempt)

    async def _connect_by_introduction(self, target: PeerId) -> Peer:
        failure: ConnectFailed = PeerNotFound(
            f"none of our {len(self._peers)} neighbours is connected to {target.short}; "
            "ask its user for an invite"
        )
        for _ in range(PUNCTURE_TRIES):
            for neighbour in self.peers():
                try:
                    return await self._connect_through(neighbour, target)
                except RequestRefused as error:
                    if error.code == AlreadyConnecting.code:
                        await self._wait_peer(target)
                    failure = ConnectFailed(
                        f"{neighbour.peer_id.short} could not introduce {target.short}: {error}"
                    )
                except DecodeError as error:
                    failure = ConnectFailed(f"{neighbour.peer_id.short} lied: {error}")
                except ConnectFailed as error:
                    failure = error
                if (peer := self._peers.get(target)) is not None:
                    return peer
            if not isinstance(failure, PunctureFailed):
                break  # fresh ports are a new chance, the same question is not
        raise failure

    async def _connect_through(self, neighbour: Peer, target: PeerId) -> Peer:
        profile = await self._known_profile()
        attempt = self._new_attempt_id()
        record, seen_at = await self._introducer.introduce(neighbour, target, attempt)
        plan = self._plan(profile, profile_as_seen(record.profile, seen_at), target)
        return await self._puncture(target, plan, attempt)

    async def _wait_peer(self, peer_id: PeerId) -> None:
        """Wait a while for a peer that declined because it is connecting to us itself."""
        with trio.move_on_after(THEIR_SIDE_TIMEOUT_S):
            while peer_id not in self._peers:
                await self._peer_came.wait()

    async def start_rendezvous(self, record: NodeRecord, seen_at: Endpoint, attempt: bytes) -> None:
        """Start our side of a puncture that a peer asked for through a common neighbour.

        Raises:
            ConnectFailed: We are busy, or there is no plan for this pair of NATs.
        """
        peer_id = record.peer_id
        if peer_id == self.peer_id:
            raise ConnectFailed("a node does not puncture to itself")
        if peer_id in self._connecting and self.peer_id < peer_id:
            # Both asked at once: the lower id's wish is carried out, the other's is dropped.
            raise AlreadyConnecting(f"{self.peer_id.short} is connecting to you already")
        if len(self._attempts) >= ATTEMPTS_MAX:
            raise ConnectFailed("busy with other punctures; try again in a minute")
        profile = await self._known_profile()
        plan = self._plan(profile, profile_as_seen(record.profile, seen_at), peer_id)
        self._nursery.start_soon(self._puncture_for_peer, peer_id, plan, attempt)

    async def _puncture_for_peer(self, peer_id: PeerId, plan: Plan, attempt_id: bytes) -> None:
        try:
            await self._puncture(peer_id, plan, attempt_id)
        except NatswarmError as error:
            logger.info("the path %s asked for did not come about: %s", peer_id.short, error)

    def _plan(self, ours: NatProfile, theirs: NatProfile, peer_id: PeerId) -> Plan:
        return plan_puncture(
            ours, theirs, my_id=self.peer_id, their_id=peer_id, limits=self._config.limits
        )

    async def _puncture(
        self, peer_id: PeerId, plan: Plan, attempt_id: bytes, *, hello: bytes = b""
    ) -> Peer:
        """Carry out `plan`, secure the path, and return the peer at its end."""
        if attempt_id in self._attempts:
            raise ConnectFailed("this attempt is under way already")
        puncturer = Puncturer(
            plan,
            self._identity.probe_keys(peer_id),
            attempt_id,
            controlling=self.peer_id < peer_id,
            rng=self._rng,
            now=trio.current_time(),
        )
        attempt = Attempt(
            puncturer,
            main_port=self._main.port,
            network=self._config.network,
            bind_ip=self._config.bind_ip,
            hello=hello,
            hello_targets=plan.targets if hello else (),
        )
        self._attempts[attempt_id] = attempt
        self._config.on_event(PunctureStarted(peer_id, plan))
        paths: list[_Path] = []
        try:
            report = await attempt.run(
                lambda found, port: paths.append(self._open_path(peer_id, found, port, attempt))
            )
            self._config.on_event(PunctureEnded(peer_id, report))
            if not report.is_ok:
                raise PunctureFailed(report.reason)
            self._nursery.start_soon(attempt.linger)
            return await self._secure(paths[0], report)
        except BaseException:
            for path in paths:
                path.close()
            raise
        finally:
            # Late probes of a finished attempt are counted and dropped like any stranger's.
            self._nursery.start_soon(self._forget_attempt, attempt_id)

    async def _forget_attempt(self, attempt_id: bytes) -> None:
        await trio.sleep(5)
        self._attempts.pop(attempt_id, None)

    def _open_path(
        self, peer_id: PeerId, found: PathFound, port: DatagramPort, attempt: Attempt
    ) -> _Path:
        """Listen for QUIC on a path in the very turn it was found."""
        pump = self._main
        if port is not self._main.port:
            pump = PortPump(port, partial(attempt.receive, port_index=found.port_index))
            self._nursery.start_soon(pump.run)
        connection = Connection(
            self._identity,
            peer_id,
            is_client=self.peer_id < peer_id,
            send=lambda datagrams: port.send_run(datagrams, found.endpoint),
        )
        # A peer that restarted comes back from where it was: the old connection is void.
        pump.detach(found.endpoint)
        pump.attach(found.endpoint, connection.receive_datagrams)
        return _Path(pump, found.endpoint, connection, is_own_port=pump is not self._main)

    async def _secure(self, path: _Path, report: PunctureReport) -> Peer:
        """Run QUIC on the path until both sides have proved who they are."""
        await self._nursery.start(self._run_connection, path)
        peer = Peer(path.connection, path.remote, report)
        previous = self._peers.pop(peer.peer_id, None)
        if previous is not None:
            # A peer that punctures anew has lost its end of the old path (restart, new network).
            self._nursery.start_soon(previous.aclose)
        if len(self._peers) >= PEERS_MAX:
            raise ConnectFailed(f"this node keeps at most {PEERS_MAX} peers; close one first")
        self._peers[peer.peer_id] = peer
        self._peer_came.set()
        self._peer_came = trio.Event()
        self._nursery.start_soon(self._accept_streams, peer, path)
        self._config.on_event(PeerConnected(peer))
        if peer.peer_id > self.peer_id:
            await self._share_record(peer)
        return peer

    async def _run_connection(
        self, path: _Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            await path.connection.run(task_status=task_status)
        except HandshakeFailed:
            raise
        finally:
            path.close()

    async def _accept_streams(self, peer: Peer, path: _Path) -> None:
        try:
            while True:
                stream = await path.connection.accept_stream()
                self._nursery.start_soon(self._handle_stream, stream, peer)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        if self._peers.get(peer.peer_id) is peer:
            del self._peers[peer.peer_id]
        self._config.on_event(PeerLost(peer))

    async def _handle_stream(self, stream: Stream, peer: Peer) -> None:
        handler = self._handlers.get(stream.protocol)
        if handler is None:
            logger.info("%s asked for unknown protocol %s", peer.peer_id.short, stream.protocol)
            await stream.aclose()
            return
        try:
            await handler(stream, peer)
        except (NatswarmError, trio.BrokenResourceError, trio.EndOfChannel) as error:
            logger.info("%s with %s ended: %s", stream.protocol, peer.peer_id.short, error)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def _share_record(self, peer: Peer) -> None:
        try:
            await self._introducer.share_record(peer)
        except (NatswarmError, trio.BrokenResourceError) as error:
            logger.info("%s did not share its record: %s", peer.peer_id.short, error)

    # What the introducer asks for -----------------------------------------------------------------

    def sealed_record(self) -> bytes:
        """Return our signed record as of now."""
        return self.record().seal(self._identity)

    def neighbours(self) -> list[Neighbour]:
        """Return whom we are connected to."""
        return list(self._peers.values())

    def learn_record(self, peer_id: PeerId, sealed: bytes) -> None:
        """Note the record of a peer."""
        if (peer := self._peers.get(peer_id)) is not None:
            peer.sealed_record = sealed

    def send_unsolicited_echo(self, transaction: bytes, observed: Endpoint) -> None:
        """Send one echo reply for somebody our neighbour vouches for."""
        self._echo.answer_for_neighbour(transaction, observed)

    # Knowing our NAT ------------------------------------------------------------------------------

    async def _known_profile(self) -> NatProfile:
        return self._profile if self._profile is not None else await self.inspect()

    def _host_candidates(self) -> tuple[Endpoint, ...]:
        local = self._main.port.local_endpoint
        ips = (
            self._config.network.local_addresses()
            if self._config.bind_ip in ("0.0.0.0", "::")
            else [self._config.bind_ip]
        )
        return tuple(Endpoint(ip, local.port) for ip in ips)

    async def _observers(self) -> list[Observer]:
        """Return who can tell us what they see: neighbours, and their neighbours who are public."""
        observers: dict[PeerId, Observer] = {}
        records = {record.peer_id: record for record in await self.find_peers()}
        for peer in self.peers():
            record = records.pop(peer.peer_id, None)
            alternate = None
            if record is not None and record.alternate_endpoint is not None:
                # Its second port, at the address we see it at ourselves.
                alternate = Endpoint(peer.seen_at.ip, record.alternate_endpoint.port)
            observers[peer.peer_id] = Observer(
                peer.peer_id, peer.seen_at, alternate, is_neighbour=True
            )
        for record in records.values():
            endpoint = record.profile.main_endpoint
            if endpoint is not None and record.profile.accepts_strangers:
                observers[record.peer_id] = Observer(
                    record.peer_id, endpoint, record.alternate_endpoint, is_neighbour=False
                )
        return list(observers.values())

    async def _ask_neighbour_to_echo(
        self, peer_id: PeerId, transaction: bytes, observed: Endpoint
    ) -> None:
        if (peer := self._peers.get(peer_id)) is not None:
            await self._introducer.ask_neighbour_to_echo(peer, transaction, observed)

    # Datagrams ------------------------------------------------------------------------------------

    def _on_main_datagram(self, data: bytes, source: Endpoint) -> None:
        try:
            match data[0]:
                case DatagramType.PROBE:
                    attempt = self._attempts.get(probe_attempt_untrusted(data))
                    if attempt is not None:
                        attempt.receive(data, source)
                case DatagramType.ECHO_REQUEST:
                    self._echo.answer_untrusted(data, source)
                case DatagramType.ECHO_REPLY:
                    self._echo.receive_reply_untrusted(data, source)
                case DatagramType.HELLO:
                    self._on_hello_untrusted(data, source)
        except DecodeError:
            self.rejected_count += 1

    def _on_alternate_datagram(self, data: bytes, source: Endpoint) -> None:
        try:
            if data[0] == DatagramType.ECHO_REQUEST:
                self._echo.answer_untrusted(data, source, arrived_at_alternate=True)
        except DecodeError:
            self.rejected_count += 1

    def _on_hello_untrusted(self, data: bytes, source: Endpoint) -> None:
        if len(self._attempts) >= ATTEMPTS_MAX or not self._hello_budget.take(trio.current_time()):
            return
        hello = decode_hello_untrusted(data)
        if hello.target != self.peer_id or hello.sender == self.peer_id:
            return
        if hello.attempt in self._attempts:
            return
        plan = plan_direct([source], limits=self._config.limits)
        self._nursery.start_soon(self._puncture_for_peer, hello.sender, plan, hello.attempt)

    def _new_attempt_id(self) -> bytes:
        return self._rng.randbytes(ATTEMPT_BYTES)


@dataclass(slots=True)
class _Path:
    """A port, the peer's endpoint on it, and the connection that runs there."""

    pump: PortPump
    remote: Endpoint
    connection: Connection
    is_own_port: bool

    def close(self) -> None:
        self.pump.detach(self.remote)
        if self.is_own_port:
            self.pump.port.close()
