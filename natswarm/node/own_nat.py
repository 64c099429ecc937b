"""What a node knows of its own NAT: looked at when somebody wants to know, forgotten elsewhere.

A look asks all observers there are: neighbours, public nodes that they know, and mainline nodes. It
traces the path outward meanwhile, and gives the gateway a moment to forward our port. One look goes
on at a time, and who waits for another's look needs none of its own.

Knows nothing of streams, punctures or invites.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import trio

from natswarm.address import AddressKind, Endpoint
from natswarm.discovery.introduction import NodeRecord, record_as_seen
from natswarm.errors import ConnectFailed
from natswarm.identity import PeerId
from natswarm.nat.behaviour import AllocationLaw
from natswarm.nat.classify import Observation, classify
from natswarm.nat.findings import Findings, NatTest
from natswarm.nat.inspection import QUICK
from natswarm.nat.measurement import Observer
from natswarm.nat.path import PathReport
from natswarm.nat.profile import LOCAL_ENDPOINTS_MAX, NatProfile
from natswarm.net.echo import EchoService
from natswarm.net.forwarder import Forwarder
from natswarm.net.foundations import with_lifetimes_of
from natswarm.net.introducer import Introducer
from natswarm.net.mainline import MainlineService
from natswarm.net.nursery import open_private_nursery
from natswarm.net.path import trace_path
from natswarm.net.peer import Peer
from natswarm.node.config import NodeConfig

__all__ = ["OwnNat"]

# A counter moves on with every port that others take: plans hold for some seconds after a look.
COUNTER_AGE_S = 2.0


class Home(Protocol):
    """What this needs of its node."""

    @property
    def is_closed(self) -> bool:
        """Whether the node was closed."""
        ...

    @property
    def local_endpoint(self) -> Endpoint:
        """Where the main port is bound."""
        ...

    def peers(self) -> list[Peer]:
        """Whom we are connected to, oldest first."""
        ...

    def living_peer(self, peer_id: PeerId) -> Peer | None:
        """The connection to a peer, if there is one."""
        ...

    async def ask_around(self) -> dict[PeerId, tuple[NodeRecord, Endpoint | None]]:
        """The newest record of everybody our neighbours know, and where they are seen."""
        ...

    async def look_again(self) -> NatProfile:
        """Inspect what takes seconds, and have neighbours hear of it."""
        ...

    def note_profile(self, before: NatProfile, profile: NatProfile) -> None:
        """Go by a profile that was just found out, and not by the one before any more."""
        ...

    def adopt_profile(self, profile: NatProfile) -> None:
        """Go by a profile from now on, and have neighbours hear of it."""
        ...


class OwnNat:
    """What our NAT does, as far as is known.

    Args:
        home: The node.
        config: How it was opened.
        echo: Carries out an inspection.
        introducer: Asks neighbours.
        mainline: Our node in BitTorrent's DHT, whose neighbours are observers, too.
        wait_settled: Waits while we move from one network to another.
        rng: Draws what an inspection draws.

    Attributes:
        profile: What was found; None: nobody has looked here.
        forwarder: Has our port forwarded by the gateway; None: that is not wished for.
    """

    def __init__(
        self,
        home: Home,
        *,
        config: NodeConfig,
        echo: EchoService,
        introducer: Introducer,
        mainline: MainlineService | None,
        wait_settled: Callable[[], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        self.profile: NatProfile | None = None
        self._home = home
        self._config = config
        self._echo = echo
        self._introducer = introducer
        self._mainline = mainline
        self._wait_settled = wait_settled
        self._rng = rng
        self._inspecting = trio.Lock()
        self._inspection = trio.CancelScope()
        self._knowing = trio.Lock()
        self._looked_at = -math.inf
        self._has_glimpsed = False  # and not looked since
        self.forwarder: Forwarder | None = None
        if config.gateway is not None:
            port = home.local_endpoint.port
            self.forwarder = Forwarder(config.gateway, port, self._on_forwarded)

    @property
    def findings(self) -> Findings | None:
        """What the newest inspection has found, with intervals and reasons; it grows meanwhile."""
        return self._echo.findings

    def host_candidates(self) -> tuple[Endpoint, ...]:
        """Return where peers may find us whatever our NAT does; the gateway's port first."""
        forwarded = None if self.forwarder is None else self.forwarder.endpoint
        own = self.own_endpoints()
        return (own if forwarded is None else (forwarded, *own))[:LOCAL_ENDPOINTS_MAX]

    def own_endpoints(self) -> tuple[Endpoint, ...]:
        """Return our main port at every address we have in our own networks."""
        bind_ip = self._config.bind_ip
        is_any = bind_ip in ("0.0.0.0", "::")
        ips = self._config.network.local_addresses() if is_any else [bind_ip]
        return tuple(Endpoint(ip, self._home.local_endpoint.port) for ip in ips)

    def known_or_unknown(self) -> NatProfile:
        """Return our profile; where nothing is known, our own addresses alone."""
        return self.profile or NatProfile.unknown(self.host_candidates())

    async def known_profile(self, max_age_s: float, *, in_full: bool = False) -> NatProfile:
        """Return our profile; look first if nobody has told us what they see, or long ago."""
        await self._wait_settled()
        if (profile := self._fresh(max_age_s, in_full)) is None:
            async with self._knowing:
                async with self._inspecting:  # a look that is under way tells as much
                    profile = self._fresh(max_age_s, in_full)
                profile = profile or await self._home.look_again()
        return profile

    async def current_profile(self, max_age_s: float, *, in_full: bool = False) -> NatProfile:
        """Return our profile to puncture by: that of a counter is new, whatever the age allowed."""
        profile = await self.known_profile(max_age_s, in_full=in_full)
        return await self.known_profile(COUNTER_AGE_S) if profile.is_counter else profile

    def _fresh(self, max_age_s: float, in_full: bool) -> NatProfile | None:
        profile = self.profile
        if in_full and self._has_glimpsed:
            return None
        has_anybody = bool(self._home.peers()) or self._mainline is not None
        if profile is None or (profile.is_translated is None and has_anybody):
            return None
        return profile if trio.current_time() <= self._looked_at + max_age_s else None

    async def inspect(self, tests: Iterable[NatTest] = QUICK) -> NatProfile:
        """Look; see `Node.inspect`.

        Raises:
            ConnectFailed: The node was closed, or moved to another network, meanwhile.
        """
        way_out: list[PathReport] = []
        findings: Findings | None = None
        async with self._inspecting:
            with trio.CancelScope() as scope:
                self._inspection = scope
                observers = await self.observers()
                witnessed = await self._witnessed()
                # The outer one takes off the groups that the inner one wraps around errors.
                async with open_private_nursery(), trio.open_nursery() as nursery:
                    nursery.start_soon(self._trace_path, observers, way_out)
                    if self.forwarder is not None:
                        nursery.start_soon(self.forwarder.wait_tried)
                    findings = await self._echo.inspect(
                        observers,
                        tests=tests,
                        host_candidates=self.own_endpoints(),
                        witnessed=witnessed,
                        rng=self._rng,
                        ask_neighbour=self.ask_neighbour_to_echo,
                    )
            if self._home.is_closed:
                raise ConnectFailed("this node was closed")
            if scope.cancelled_caught or findings is None:
                raise ConnectFailed("we moved to another network while our NAT was looked at")
        # Not before: whoever is seen at an endpoint of its own has no NAT.
        profile = replace(findings.profile, local_endpoints=self.host_candidates())
        for report in way_out:
            profile = replace(
                profile, nat_count=report.nat_count_at_least, opener_ttl=report.opener_ttl
            )
        self._looked_at, self._has_glimpsed = trio.current_time(), False
        if self.profile is not None:  # a look at the rest does not make us forget lifetimes
            profile = with_lifetimes_of(profile, self.profile)
        self.learn(profile)
        return profile

    def learn(self, profile: NatProfile) -> None:
        """Go by a profile from now on."""
        before, self.profile = self.known_or_unknown(), profile
        self._home.note_profile(before, profile)

    def is_seen_elsewhere(self) -> bool:
        """Whether neighbours agree that we have another public address than we know of."""
        if self.profile is None:
            return False
        seen = self._glimpsed().public_ips
        return bool(seen) and not set(seen) & set(self.profile.public_ips)

    def glimpse(self) -> None:
        """Go by what neighbours have told since we moved, until there was time to inspect.

        The answers to our probes say where the main port is seen: enough for the mapping, and where
        that is endpoint-independent, to puncture by.
        """
        profile = self._glimpsed()
        if profile.is_translated is None:
            return
        law = None if profile.allocation is None else profile.allocation.law
        if law is not AllocationLaw.PRESERVING:
            profile = replace(profile, allocation=None)  # a handful of ports shows no other law
        self._looked_at, self._has_glimpsed = trio.current_time(), True
        self.learn(profile)

    def _glimpsed(self) -> NatProfile:
        local_port = self._home.local_endpoint.port
        observations = [
            Observation(
                port_index=0,
                local_port=local_port,
                observer=peer.peer_id,
                destination=remote,
                observed=observed,
                sent_at=trio.current_time(),
                is_contiguous=False,
            )
            for peer in self._home.peers()
            for remote, observed in peer.paths.sightings
        ]
        return classify(observations, local_endpoints=self.host_candidates())

    def forget(self) -> None:
        """Know nothing: we are somewhere else."""
        self.profile = None
        self._inspection.cancel()
        if self._mainline is not None:
            self._mainline.forget_sightings()
        if self.forwarder is not None:
            self.forwarder.move()

    def _on_forwarded(self) -> None:
        if self.profile is not None:
            self._home.adopt_profile(replace(self.profile, local_endpoints=self.host_candidates()))

    async def observers(self) -> list[Observer]:
        """Return who can tell us what they see: neighbours, and their neighbours who are public."""
        peers = self._home.peers()
        found = await self._home.ask_around()
        observers = []
        for peer in peers:
            found.pop(peer.peer_id, None)
            if not (peer.is_reachable and peer.paths.is_certain):
                continue
            alternate = None
            if peer.record is not None and peer.record.alternate_endpoint is not None:
                # Its second port, at the address we see it at ourselves.
                alternate = Endpoint(peer.seen_at.ip, peer.record.alternate_endpoint.port)
            observers.append(Observer(peer.peer_id, peer.seen_at, alternate, is_neighbour=True))
        for record, seen_at in found.values():
            if seen_at is None or not record.profile.accepts_strangers:
                continue
            # Its own word for its address could aim our requests at somebody else.
            record = record_as_seen(record, seen_at)
            if (endpoint := record.profile.main_endpoint) is not None:
                observers.append(
                    Observer(
                        record.peer_id, endpoint, record.alternate_endpoint, is_neighbour=False
                    )
                )
        return observers

    async def _witnessed(self) -> list[Observation]:
        """Return what mainline nodes see of us, where we know some."""
        if self._mainline is None:
            return []
        return [
            Observation(
                port_index=0,
                local_port=self._home.local_endpoint.port,
                observer=None,
                destination=sighting.voter,
                observed=sighting.observed,
                sent_at=sighting.at,
                is_contiguous=False,
            )
            for sighting in await self._mainline.witness()
        ]

    async def _trace_path(self, observers: Sequence[Observer], found: list[PathReport]) -> None:
        """Look at the way out while observers are asked; it takes no longer than they do."""
        far_end = next(
            (each.endpoint for each in observers if each.endpoint.kind is AddressKind.GLOBAL), None
        )
        if self._config.paths is not None and far_end is not None:
            found.append(await trace_path(self._config.paths, far_end))

    async def ask_neighbour_to_echo(
        self, peer_id: PeerId, transaction: bytes, observed: Endpoint
    ) -> None:
        """Ask a neighbour that a third peer send an echo reply to an endpoint of ours."""
        if (peer := self._home.living_peer(peer_id)) is not None:
            await self._introducer.ask_neighbour_to_echo(peer, transaction, observed)
