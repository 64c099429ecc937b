"""One side of one attempt: a node with new ports, tied to its interface, and watched.

Every attempt opens a new node, so that no mapping of an earlier one helps it. While it lives, the
counters of its ports and of its interface are compared four times a second, and its helpers are
asked a small question twice a second: their answers are authentic (they come over QUIC), and show
at once when the carrier stops passing our datagrams, of which most that a birthday puncture sends
are never answered.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from natswarm.discovery.introduction import FindPeers
from natswarm.discovery.invite import Invite
from natswarm.errors import NatswarmError
from natswarm.field_test.carrier import CarrierLabel
from natswarm.field_test.link import LinkCounters
from natswarm.field_test.privacy import shorten_text
from natswarm.field_test.records import PORTS_MAX, Begin, NatSeen, PunctureSeen, Side, SideSeen
from natswarm.field_test.stall import Notice, Sample, StallWatch
from natswarm.field_test.traffic import CountingNetwork
from natswarm.identity import Identity, PeerId
from natswarm.nat.findings import NatTest
from natswarm.nat.inspection import QUICK
from natswarm.net.attempt import PunctureReport
from natswarm.net.introducer import FIND_PEERS
from natswarm.net.nursery import open_private_nursery
from natswarm.net.port import Network
from natswarm.node import (
    Node,
    NodeConfig,
    NodeEvent,
    Peer,
    PeerConnected,
    PunctureEnded,
    PunctureStarted,
    open_node,
)
from natswarm.puncture.strategy import Limits

__all__ = ["BenchFailed", "OpenSide", "SideConfig", "SideStatus", "WatchedLink", "open_side"]

SAMPLE_INTERVAL_S = 0.25
QUESTION_INTERVAL_S = 0.5
ANSWER_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 20.0


class BenchFailed(NatswarmError):
    """The attempt could not be made, for a reason that says nothing of the NATs."""


class WatchedLink(Protocol):
    """What is asked of an interface; `link.Link`."""

    def outage(self) -> str:
        """What is wrong with it; empty: nothing."""
        ...

    def counters(self) -> LinkCounters | None:
        """What it has carried; None: not known."""
        ...


@dataclass(slots=True)
class SideStatus:
    """What a display shows of a side; the engine writes it."""

    carrier: str
    interface: str
    phase: str = ""
    nat: str = ""
    handed_count: int = 0
    refused_count: int = 0
    interface_sent_count: int | None = None
    troubles: tuple[str, ...] = ()


@dataclass(slots=True)
class SideConfig:
    """A side for the whole test.

    Attributes:
        name: `left` or `right`.
        carrier: Its label.
        make_network: Returns the network of a new node.
        helpers: Who observes and introduces.
        interface: Name of its interface; empty: none in particular.
        interface_kind: What that probably is.
        link: The interface, for its counters; None: not known.
        full_addresses: Whether whole addresses are written down.
        status: For a display.
    """

    name: str
    carrier: CarrierLabel
    make_network: Callable[[], Network]
    helpers: tuple[Invite, ...] = ()
    interface: str = ""
    interface_kind: str = ""
    link: WatchedLink | None = None
    full_addresses: bool = False
    status: SideStatus = field(init=False)

    def __post_init__(self) -> None:
        self.status = SideStatus(self.carrier.text, self.interface)

    def record(self) -> Side:
        """Return it as written down."""
        return Side(
            name=self.name,
            carrier=self.label,
            carrier_source=self.carrier.source,
            interface=self.words(self.interface),
            interface_kind=self.interface_kind,
        )

    def keep_to(self, begin: Begin) -> None:
        """Take over what a field test began with, so that a resumed one goes on with the same.

        A report tells carriers apart by their labels: one that the user does not give again stays.
        """
        self.full_addresses = begin.full_addresses
        for side in begin.sides:
            if side.name == self.name and self.carrier.source != "user":
                self.carrier = CarrierLabel(side.carrier, side.carrier_source)
                self.status.carrier = self.label

    @property
    def label(self) -> str:
        """The carrier's label as it may be written down."""
        return self.words(self.carrier.text)

    def words(self, text: str) -> str:
        """Return a sentence as it may be written down."""
        return text if self.full_addresses else shorten_text(text)

    def outage(self) -> str:
        """Return what is wrong with the interface; empty: nothing."""
        return "" if self.link is None else self.link.outage()


@asynccontextmanager
async def open_side(
    config: SideConfig,
    *,
    identity: Identity,
    limits: Limits,
    seed: int,
    on_notice: Callable[[SideConfig, Notice], None],
) -> AsyncIterator[OpenSide]:
    """Open a node for one attempt and watch it.

    Args:
        config: The side.
        identity: Whose node it is.
        limits: Bounds of its punctures.
        seed: Of what the node draws.
        on_notice: Told when something stops sending, and when it goes on.

    Raises:
        BenchFailed: No port can be had.
    """
    network = CountingNetwork(config.make_network())
    events = _Events()
    node_config = NodeConfig(
        identity=identity, network=network, limits=limits, seed=seed, on_event=events.take
    )
    async with AsyncExitStack() as stack:
        try:
            node = await stack.enter_async_context(open_node(node_config))
        except NatswarmError as error:
            raise BenchFailed(f"{config.name}: {config.words(str(error))}") from error
        nursery = await stack.enter_async_context(open_private_nursery())
        side = OpenSide(config, node, network, limits, events, on_notice)
        nursery.start_soon(side.watch)
        nursery.start_soon(side.ask_helpers)
        yield side


class _Events:
    """What a node has told so far."""

    def __init__(self) -> None:
        self.all: list[NodeEvent] = []
        self._next = trio.Event()

    def take(self, event: NodeEvent) -> None:
        self.all.append(event)
        self._next.set()
        self._next = trio.Event()

    async def wait_next(self) -> None:
        await self._next.wait()


class OpenSide:
    """A node under test; made by `open_side`.

    Attributes:
        config: The side.
        node: Its node.
        limits: Bounds of its punctures.
    """

    def __init__(
        self,
        config: SideConfig,
        node: Node,
        network: CountingNetwork,
        limits: Limits,
        events: _Events,
        on_notice: Callable[[SideConfig, Notice], None],
    ) -> None:
        self.config = config
        self.node = node
        self.limits = limits
        self._network = network
        self._events = events
        self._on_notice = on_notice
        self._helper_ids = {invite.record.peer_id for invite in config.helpers}
        config.status = SideStatus(config.label, config.interface)
        self._is_joined = False
        self._waiting_since: float | None = None
        self._counters_before = None if config.link is None else config.link.counters()
        self._loop_lag_s = 0.0

    # Before the puncture --------------------------------------------------------------------------

    async def prepare(self, tests: Iterable[NatTest] = QUICK) -> None:
        """Join the helpers and have the own NAT looked at.

        Raises:
            BenchFailed: No helper could be reached.
        """
        self.config.status.phase = "joining"
        failures: list[str] = []
        async with trio.open_nursery() as nursery:
            for invite in self.config.helpers:
                nursery.start_soon(self._join, invite, failures)
        if self.config.helpers and len(failures) == len(self.config.helpers):
            raise BenchFailed(
                f"{self.config.name} reaches no helper: {self.config.words('; '.join(failures))}"
            )
        self._is_joined = bool(self.config.helpers)
        self.config.status.phase = "inspecting"
        try:
            await self.node.inspect(tests)
        except NatswarmError as error:
            raise BenchFailed(f"{self.config.name}: {self.config.words(str(error))}") from error
        self.config.status.nat = self.config.words(str(self.node.profile))
        self.config.status.phase = "ready"

    async def _join(self, invite: Invite, failures: list[str]) -> None:
        name = invite.record.name or invite.record.peer_id.short
        try:
            with trio.fail_after(JOIN_TIMEOUT_S):
                await self.node.connect(invite)
        except trio.TooSlowError:
            failures.append(f"{name}: no connection within {JOIN_TIMEOUT_S:g} s")
        except (NatswarmError, trio.BrokenResourceError) as error:
            failures.append(f"{name}: {error}")

    # The puncture ---------------------------------------------------------------------------------

    async def wait_peer(self, peer_id: PeerId) -> Peer:
        """Wait until a peer has connected to us."""
        while True:
            for event in self._events.all:
                if isinstance(event, PeerConnected) and event.peer.peer_id == peer_id:
                    return event.peer
            await self._events.wait_next()

    def punctures_with(self, peer_id: PeerId) -> list[PunctureReport]:
        """Return how the punctures with a peer went, in order."""
        return [
            event.report
            for event in self._events.all
            if isinstance(event, PunctureEnded) and event.peer_id == peer_id
        ]

    def has_begun(self, peer_id: PeerId) -> bool:
        """Whether a puncture with a peer was begun."""
        return any(
            isinstance(event, PunctureStarted) and event.peer_id == peer_id
            for event in self._events.all
        )

    # The record -----------------------------------------------------------------------------------

    def seen(self, peer_id: PeerId) -> SideSeen:
        """Return this side's part of the record of an attempt with a peer."""
        full = self.config.full_addresses
        profile, findings = self.node.profile, self.node.inspection
        ports = [] if findings is None else [each.observed.port for each in findings.observations]
        sent = received = None
        after = None if self.config.link is None else self.config.link.counters()
        if after is not None and self._counters_before is not None:
            sent = after.sent_packets - self._counters_before.sent_packets
            received = after.received_packets - self._counters_before.received_packets
        return SideSeen(
            carrier=self.config.label,
            nat=None if profile is None else NatSeen.of(profile, full_addresses=full),
            is_controlling=self.node.peer_id < peer_id,
            punctures=tuple(
                PunctureSeen.of(report, full_addresses=full)
                for report in self.punctures_with(peer_id)
            ),
            ports_seen=tuple(dict.fromkeys(ports))[:PORTS_MAX],
            handed_count=self._network.handed_count,
            refused_count=self._network.refused_count,
            interface_sent_count=sent,
            interface_received_count=received,
            loop_lag_s=round(self._loop_lag_s, 3),
        )

    # Watching -------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Compare the counters until cancelled."""
        watch = StallWatch(self.config.interface or self.config.name)
        status = self.config.status
        due_at = trio.current_time()
        while True:
            now = trio.current_time()
            self._loop_lag_s = max(self._loop_lag_s, now - due_at)
            sample = self._sample(now)
            for notice in watch.observe(sample):
                status.troubles = tuple(trouble.value for trouble in watch.troubles)
                self._on_notice(self.config, notice)
            status.handed_count = sample.handed_count
            status.refused_count = sample.refused_count
            due_at = now + SAMPLE_INTERVAL_S
            await trio.sleep_until(due_at)

    def _sample(self, now: float) -> Sample:
        link = self.config.link
        counters = None if link is None else link.counters()
        before = self._counters_before
        if counters is not None and before is not None:
            self.config.status.interface_sent_count = counters.sent_packets - before.sent_packets
        return Sample(
            at=now,
            handed_count=self._network.handed_count,
            refused_count=self._network.refused_count,
            refusal=self._network.refusal,
            interface_bytes=None if counters is None else counters.sent_bytes,
            outage=self.config.outage(),
            waiting_since=self._waiting_since,
        )

    async def ask_helpers(self) -> None:
        """Ask whether we are still heard, until cancelled."""
        while True:
            await trio.sleep(QUESTION_INTERVAL_S)
            if not self._is_joined:
                continue
            if self._waiting_since is None:
                self._waiting_since = trio.current_time()
            helpers = [peer for peer in self.node.peers() if peer.peer_id in self._helper_ids]
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                async with trio.open_nursery() as nursery:
                    for helper in helpers:
                        nursery.start_soon(self._ask, helper, nursery.cancel_scope)

    async def _ask(self, helper: Peer, first: trio.CancelScope) -> None:
        try:
            await helper.call(FIND_PEERS, FindPeers())
        except NatswarmError:
            return
        self._waiting_since = None
        first.cancel()
