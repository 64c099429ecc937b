"""Reach one peer: carry out a plan, then secure the path it found with QUIC.

    plan ── Attempt ── a path: our port, their endpoint ── Connection ── both sides proved
              │                    │
            probes         QUIC is listened for in the very turn the path is found

A dial for a peer that we are connected to ends with the path, which joins those of the connection.

Several dials may be under way at once, some by our own wish and some by that of others; each is
known by the 8 bytes of its attempt, which every probe carries. So are the connections' own probes,
which go to their `PathSet`. What to dial, and what a connected peer is good for, is the node's
affair; this knows neither streams nor records.
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import trio

from natswarm.address import Endpoint
from natswarm.errors import ConnectFailed, DecodeError, PunctureFailed
from natswarm.identity import Identity, PeerId, ProbeKeys
from natswarm.net.attempt import Attempt, PunctureReport
from natswarm.net.nursery import open_private_nursery
from natswarm.net.path_set import PathSet
from natswarm.net.port import ANY_ADDRESS, DatagramPort, Network
from natswarm.net.pump import PortPump
from natswarm.net.quic import Connection
from natswarm.net.tracing import Tracer
from natswarm.puncture.plan import Plan
from natswarm.puncture.puncturer import PathFound, Puncturer
from natswarm.swarm_key import OPEN_SWARM, SwarmKey
from natswarm.wire import probe_attempt_untrusted

__all__ = ["Dial", "Dialler", "Origin", "PunctureEnded", "PunctureStarted"]

# How long a successful dial goes on answering on the main port: the peer's last question may be on
# the way, or our last answer lost, and it asks for up to 5 s.
LINGER_S = 5.0

# Paths are kept by `PathSet`, so QUIC needs no keepalives, and gives up only after longer than any
# outage that `renewer.py` waits for. A PING now and then tells it that the peer is still there.
QUIC_IDLE_TIMEOUT_S = 900.0
QUIC_KEEPALIVE_S = 300.0


class Origin(enum.Enum):
    """Whose wish a dial is."""

    OURS = "ours"
    INTRODUCED = "introduced"
    """A peer's, brought by a common neighbour."""
    STRANGER = "stranger"
    """A peer's who knocked with a HELLO."""


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


class Dialler:
    """All dials of one node.

    Args:
        identity: Who we are.
        network: Where the ports of a birthday puncture come from.
        bind_ip: The address they are bound to.
        main: The pump of the node's main port.
        nursery: Where connections run; theirs to be cancelled in.
        on_event: Told of each puncture; must not raise.
        swarm: Whose nodes alone we answer.
        tracer: Writes down what of connections was asked for.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        network: Network,
        bind_ip: str,
        main: PortPump,
        nursery: trio.Nursery,
        on_event: Callable[[PunctureStarted | PunctureEnded], None],
        swarm: SwarmKey = OPEN_SWARM,
        tracer: Tracer,
    ) -> None:
        self._identity = identity
        self._network = network
        self._bind_ip = bind_ip
        self._main = main
        self._nursery = nursery
        self._on_event = on_event
        self._swarm = swarm
        self._tracer = tracer
        self._dials: dict[bytes, Dial] = {}
        self._path_sets: dict[bytes, PathSet] = {}
        self._begun = trio.Event()
        self._is_closed = False

    def under_way(
        self,
        *,
        peer_id: PeerId | None = None,
        origin: Origin | None = None,
        by_others: bool = False,
    ) -> list[Dial]:
        """Return the dials that go on, oldest first: all, or those that match."""
        return [
            dial
            for dial in self._dials.values()
            if dial.goes_on
            and peer_id in (None, dial.peer_id)
            and origin in (None, dial.origin)
            and not (by_others and dial.origin is Origin.OURS)
        ]

    def is_taken(self, attempt_id: bytes) -> bool:
        """Whether an attempt of this name is under way."""
        return attempt_id in self._dials and self._dials[attempt_id].goes_on

    async def wait_begun(self) -> None:
        """Wait until a dial begins."""
        await self._begun.wait()

    def make_room(self, strangers_max: int) -> bool:
        """Return whether one more stranger may be served, at most `strangers_max` at once.

        The oldest that knocked and then sent no probe has to go: whoever floods us with knocks
        drives out its own first.
        """
        strangers = self.under_way(origin=Origin.STRANGER)
        if len(strangers) < strangers_max:
            return True
        for dial in strangers:
            if not dial.attempt.is_answered:
                dial.cancel("others knocked")
                return True
        return False

    def prepare(
        self,
        peer_id: PeerId,
        plan: Plan,
        attempt_id: bytes,
        *,
        origin: Origin = Origin.OURS,
        hello: bytes = b"",
        introducer: PeerId | None = None,
        renews: PathSet | None = None,
        home: PortPump | None = None,
        spare_network: Network | None = None,
    ) -> Dial:
        """Return a dial that takes the peer's probes from now on; the caller must `run` it.

        Args:
            peer_id: Whom to reach.
            plan: How.
            attempt_id: 8 bytes that both sides know.
            origin: Whose wish it is.
            hello: A signed HELLO for the plan's targets, where the peer does not expect us.
            introducer: Who brought the peer's wish.
            renews: The paths of the connection that there is already; the new one joins them.
            home: The pump of the port that stands for the main port in the plan, from `open_home`;
                by default that of the main port itself. The dial closes it if nothing comes of it.
            spare_network: Where `home` is, and further ports come from, for a path that is only to
                be kept ready; None: ours.

        Raises:
            ConnectFailed: The node is closed, the attempt is under way, or the id is nobody's.
        """
        if self._is_closed:
            raise ConnectFailed("this node was closed")
        if self.is_taken(attempt_id):
            raise ConnectFailed("this attempt is under way already")
        try:
            dial = Dial(
                self,
                peer_id,
                plan,
                attempt_id,
                origin=origin,
                hello=hello,
                introducer=introducer,
                renews=renews,
                home=home or self._main,
                spare_network=spare_network,
            )
        except DecodeError as error:
            raise ConnectFailed(str(error)) from error
        self._dials[attempt_id] = dial
        self._begun.set()
        self._begun = trio.Event()
        return dial

    def receive_untrusted(
        self, data: bytes, source: Endpoint, pump: PortPump | None = None
    ) -> None:
        """Take a probe that came in on the main port, or on that of `pump`.

        Raises:
            DecodeError: Not a probe.
        """
        name = probe_attempt_untrusted(data)
        if (dial := self._dials.get(name)) is not None:
            dial.receive(data, source, pump or self._main)
        elif (paths := self._path_sets.get(name)) is not None:
            paths.receive_untrusted(data, source, pump or self._main)

    def open_home(self, port: DatagramPort) -> PortPump:
        """Receive from a port for dials and connections; ends when the port is closed."""

        def receive(data: bytes, source: Endpoint) -> None:
            with contextlib.suppress(DecodeError):
                self.receive_untrusted(data, source, pump)

        pump = PortPump(port, receive)
        self._nursery.start_soon(pump.run)
        return pump

    def close(self) -> None:
        """Give up all dials and take no more."""
        self._is_closed = True
        for dial in self.under_way():
            dial.cancel("this node was closed")

    def _probe_keys(self, peer_id: PeerId) -> ProbeKeys:
        swarm_secret = b"" if self._swarm.is_open else self._swarm.derive(b"probe")
        return self._identity.probe_keys(peer_id, swarm_secret)

    async def _forget_later(self, dial: Dial, connection: Connection) -> None:
        # Not longer than the connection: two that met by invites use the attempt's name again, and
        # an answer from its last life would lead the peer to a path on which nobody listens.
        with trio.move_on_after(LINGER_S):
            await connection.wait_closed()
        self._forget(dial)

    def _forget(self, dial: Dial) -> None:
        if self._dials.get(dial.attempt_id) is dial:
            del self._dials[dial.attempt_id]

    async def _run_connection(
        self, paths: PathSet, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            async with open_private_nursery() as nursery:
                nursery.start_soon(self._keep, paths)
                await paths.connection.run(task_status=task_status)
        finally:
            paths.close()

    async def _keep(self, paths: PathSet) -> None:
        name = await paths.connection.wait_proved()
        self._path_sets[name] = paths
        try:
            await paths.run(name)
        finally:
            del self._path_sets[name]


class Dial:
    """One try to reach one peer.

    Attributes:
        peer_id: Whom.
        attempt_id: The 8 bytes that name it.
        origin: Whose wish it is.
        introducer: Who brought that wish; None where nobody did.
        is_renewal: Whether it is for a connection that there is already.
        attempt: The puncture.
    """

    def __init__(
        self,
        dialler: Dialler,
        peer_id: PeerId,
        plan: Plan,
        attempt_id: bytes,
        *,
        origin: Origin,
        hello: bytes,
        introducer: PeerId | None,
        renews: PathSet | None,
        home: PortPump,
        spare_network: Network | None,
    ) -> None:
        self.peer_id = peer_id
        self.attempt_id = attempt_id
        self.origin = origin
        self.introducer = introducer
        self._dialler = dialler
        self._plan = plan
        self._is_controlling = dialler._identity.peer_id < peer_id
        self.is_renewal = renews is not None
        self._paths = renews
        self._home = home
        self._is_spare = spare_network is not None
        self._path_pump: PortPump | None = None
        self._path_index = 0
        self._started_at = trio.current_time()
        self._scope = trio.CancelScope()
        self._cancel_reason = ""
        self._over = trio.Event()
        self.attempt = Attempt(
            Puncturer(
                plan,
                dialler._probe_keys(peer_id),
                attempt_id,
                controlling=self._is_controlling,
                now=trio.current_time(),
            ),
            main_port=home.port,
            network=spare_network or dialler._network,
            bind_ip=ANY_ADDRESS if spare_network else dialler._bind_ip,
            on_path=self._open_path,
            hello=hello,
            hello_targets=plan.targets if hello else (),
        )

    @property
    def plan(self) -> Plan:
        """How."""
        return self._plan

    @property
    def goes_on(self) -> bool:
        """Whether it has neither ended, well or not, nor been given up."""
        return not (self._over.is_set() or self._scope.cancel_called)

    @property
    def has_path(self) -> bool:
        """Whether the puncture has found one."""
        return self._path_pump is not None

    async def wait_over(self) -> None:
        """Wait until it has ended, well or not."""
        await self._over.wait()

    def cancel(self, reason: str) -> None:
        """Give up; `run` raises ConnectFailed with the reason."""
        self._cancel_reason = reason
        self._scope.cancel()

    def receive(self, data: bytes, source: Endpoint, pump: PortPump) -> None:
        """Take a probe of the attempt that came in on a port of ours."""
        if pump is self._home:
            self.attempt.receive(data, source)
        elif pump is self._path_pump:
            self.attempt.receive(data, source, port_index=self._path_index)

    async def run(self) -> tuple[PathSet, PunctureReport]:
        """Puncture and shake hands; return the connection's paths, and how they came about.

        The connection runs on in the node's nursery. Cancelled, nothing is left: no port, no task.

        Raises:
            PunctureFailed: The NATs stayed closed.
            HandshakeFailed: There was a path, but not the peer at its end.
            ConnectFailed: It was given up.
            ConfigurationError: The system gives fewer ports than the plan needs.
        """
        dialler = self._dialler
        secured: PathSet | None = None
        try:
            with self._scope:
                report = await self._puncture()
                paths = self._paths
                assert paths is not None, "a report that is ok has opened a path"
                if not self.is_renewal:
                    await dialler._nursery.start(dialler._run_connection, paths)
                secured = paths
                return paths, report
            raise ConnectFailed(self._cancel_reason)
        finally:
            self._over.set()
            if self._home not in (dialler._main, self._path_pump):
                self._home.port.close()
            if secured is not None:
                dialler._nursery.start_soon(dialler._forget_later, self, secured.connection)
            else:
                dialler._forget(self)
                if self._paths is not None and not self.is_renewal:
                    self._paths.close()

    async def _puncture(self) -> PunctureReport:
        emit = self._dialler._on_event
        emit(PunctureStarted(self.peer_id, self._plan))
        try:
            report = await self.attempt.run()
        except BaseException as error:
            # Whoever watches is told of an end for every start.
            is_given_up = isinstance(error, trio.Cancelled) or (
                isinstance(error, BaseExceptionGroup) and error.split(trio.Cancelled)[1] is None
            )
            reason = (self._cancel_reason or "given up") if is_given_up else str(error)
            emit(PunctureEnded(self.peer_id, self.attempt.report(reason)))
            raise
        emit(PunctureEnded(self.peer_id, report))
        if not report.is_ok:
            raise PunctureFailed(report.reason)
        return report

    def _open_path(self, found: PathFound, port: DatagramPort) -> None:
        """Listen for QUIC on a path in the very turn it was found."""
        dialler = self._dialler
        pump = self._home if port is self._home.port else dialler.open_home(port)
        self._path_pump, self._path_index = pump, found.port_index
        if self._paths is None:
            connection = Connection(
                dialler._identity,
                self.peer_id,
                is_client=self._is_controlling,
                send=lambda _: None,
                keepalive_s=QUIC_KEEPALIVE_S,
                idle_timeout_s=QUIC_IDLE_TIMEOUT_S,
                swarm=dialler._swarm,
                key_log=dialler._tracer.key_log,
            )
            keys = dialler._probe_keys(self.peer_id)
            log = dialler._tracer.log_of(connection, is_client=self._is_controlling)
            self._paths = PathSet(connection, keys, main=dialler._main, log=log)
        # What others use as well may be older than we know.
        opened_at = -math.inf if pump is dialler._main else self._started_at
        self._paths.add(pump, found.endpoint, opened_at=opened_at, is_spare=self._is_spare)
