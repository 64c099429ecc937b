"""Keep a path ready over a second interface, for when the first one dies: make before break.

A phone has Wi-Fi and a SIM, a laptop two tethered phones. Whoever is told of the second network
keeps, for each connection in use, one more path that begins there: from a port of its own, behind
another NAT. Both sides go on by the first network while it answers (`path_keeper.py`), and the
connection moves to the spare path within the time it takes to notice, instead of that of a move.

    a peer that takes strangers    is asked from the new port; its answer is the path
    any other                      a puncture as ever, introduced by a peer of the first kind, which
                                   sees us at both places and names the second one

What the second NAT does is looked at once, and again when the interface has another address. It
costs a probe for each connection in use in 20 s, and for each puncture what that costs.

Knows no streams; which path is used is the affair of `path_keeper.py`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import trio

from natswarm.address import Endpoint
from natswarm.discovery.introduction import NodeRecord, profile_as_seen
from natswarm.errors import ConfigurationError, DecodeError, NatswarmError, PeerNotFound
from natswarm.identity import Identity
from natswarm.nat.measurement import Observer
from natswarm.nat.profile import NatProfile
from natswarm.net.dialler import Dialler
from natswarm.net.echo import EchoService
from natswarm.net.fresh_port import external_endpoint
from natswarm.net.inspection import AskNeighbour
from natswarm.net.introducer import Introducer
from natswarm.net.peer import Peer
from natswarm.net.port import ANY_ADDRESS, Network
from natswarm.net.pump import PortPump
from natswarm.puncture.plan import Limits, plan_puncture
from natswarm.swarm_key import SwarmKey
from natswarm.wire import DatagramType

__all__ = ["Home", "SecondWay"]

logger = logging.getLogger("natswarm.node")

LOOK_S = 1.0
# A connection is in use so long after it was last sent by: QUIC alone sends every 300 s.
IN_USE_FOR_S = 60.0
# Peers that take strangers, which can introduce us from the second place.
VOUCHERS = 2
# After a try, well or not: a path that was found may still turn out to be none.
RETRY_S = 10.0
TRY_S = 15.0
# How long what is known of a second NAT holds; a counter is looked at before each puncture.
PROFILE_AGE_S = 300.0


class Home(Protocol):
    """What this needs of its node."""

    def peers(self) -> list[Peer]:
        """Whom we are connected to, oldest first."""
        ...

    def record(self) -> NodeRecord:
        """What we say of ourselves."""
        ...

    async def observers(self) -> Sequence[Observer]:
        """Who can tell us what they see of us."""
        ...


class SecondWay:
    """The second network of one node.

    Args:
        home: The node.
        network: The second network, such as that of one interface alone.
        identity: Signs echoes.
        dialler: Carries out punctures.
        introducer: Asks neighbours.
        nursery: Where ports are received from, and punctures run.
        limits: Bounds of a puncture.
        rng: Draws transactions.
        swarm: Whose key seals echoes.
        attempt_for: Names a puncture for a connection.
        ask_neighbour: Asks a neighbour that a third peer send an echo.
    """

    def __init__(
        self,
        home: Home,
        network: Network,
        *,
        identity: Identity,
        dialler: Dialler,
        introducer: Introducer,
        nursery: trio.Nursery,
        limits: Limits,
        rng: random.Random,
        swarm: SwarmKey,
        attempt_for: Callable[[Peer], bytes],
        ask_neighbour: AskNeighbour,
    ) -> None:
        self._home = home
        self._network = network
        self._identity = identity
        self._dialler = dialler
        self._introducer = introducer
        self._nursery = nursery
        self._limits = limits
        self._rng = rng
        self._swarm = swarm
        self._attempt_for = attempt_for
        self._ask_neighbour = ask_neighbour
        self._tried_at: dict[Peer, float] = {}
        self._looking = trio.Lock()
        self._profile: NatProfile | None = None
        self._looked_at = 0.0

    async def run(self) -> None:
        """Keep paths ready until cancelled."""
        addresses: list[str] = []
        while True:
            before, addresses = addresses, self._network.local_addresses()
            if addresses != before:
                self._profile = None
                self._tried_at.clear()
            peers = self._home.peers()
            self._tried_at = {peer: at for peer, at in self._tried_at.items() if peer in peers}
            wanted = _wanted(peers) if addresses else []
            for peer in peers:
                if peer.paths.has_spare:
                    if peer not in wanted:
                        peer.paths.drop_spares()
                elif peer in wanted and self._may_try(peer):
                    self._tried_at[peer] = trio.current_time()
                    self._nursery.start_soon(self._try, peer)
            await trio.sleep(LOOK_S)

    def _may_try(self, peer: Peer) -> bool:
        is_due = trio.current_time() >= self._tried_at.get(peer, -RETRY_S) + RETRY_S
        return is_due and peer.is_reachable and peer.paths.name is not None

    async def _try(self, peer: Peer) -> None:
        reason: object = f"not in {TRY_S:g} s"
        with trio.move_on_after(TRY_S):
            try:
                if _takes_strangers(peer):
                    port = self._network.bind(Endpoint(ANY_ADDRESS, 0))
                    peer.paths.check_spare(self._dialler.open_home(port), [peer.paths.remote])
                else:
                    await self._puncture(peer)
                return
            except NatswarmError as error:
                reason = error
        logger.info("no spare path to %s: %s", peer.peer_id.short, reason)
        self._profile = None  # the interface may have another NAT than before

    async def _puncture(self, peer: Peer) -> None:
        """Open a path from the second network.

        Raises:
            NatswarmError: It did not come about.
        """
        profile = await self._known_profile()
        port = self._network.bind(Endpoint(ANY_ADDRESS, 0))
        try:
            external = await external_endpoint(
                port,
                profile,
                self._home.peers(),
                identity=self._identity,
                swarm=self._swarm,
                rng=self._rng,
            )
            mine = replace(profile, main_endpoint=external, local_endpoints=())
            record, seen_at, attempt = await self._introduction(peer, mine)
            plan = plan_puncture(
                mine,
                profile_as_seen(record.profile, seen_at),
                my_id=self._identity.peer_id,
                their_id=peer.peer_id,
                limits=self._limits,
            )
            dial = self._dialler.prepare(
                peer.peer_id,
                plan,
                attempt,
                renews=peer.paths,
                home=self._dialler.open_home(port),
                spare_network=self._network,
            )
        except BaseException:
            port.close()
            raise
        await dial.run()

    async def _introduction(
        self, peer: Peer, mine: NatProfile
    ) -> tuple[NodeRecord, Endpoint, bytes]:
        """Have somebody who sees us at the second place tell the peer."""
        failure: NatswarmError = PeerNotFound("no neighbour sees us by the second interface yet")
        sealed = replace(self._home.record(), profile=mine).seal(self._identity)
        at = mine.public_ips[0] if mine.public_ips else ""
        for neighbour in self._home.peers():
            if neighbour is peer or not at or not neighbour.paths.has_spare:
                continue
            attempt = self._attempt_for(peer)
            try:
                record, seen_at = await self._introducer.introduce(
                    neighbour, peer.peer_id, attempt, sealed, at=at
                )
                return record, seen_at, attempt
            except NatswarmError as error:
                failure = error
        raise failure

    async def _known_profile(self) -> NatProfile:
        """Return what the second NAT does; look first where that is not known, or may be stale."""
        async with self._looking:
            age_s = trio.current_time() - self._looked_at
            profile = self._profile
            if profile is None or profile.is_counter or age_s > PROFILE_AGE_S:
                profile = self._profile = await self._look()
                self._looked_at = trio.current_time()
            return profile

    async def _look(self) -> NatProfile:
        """Inspect the second NAT from a port of its own.

        Raises:
            ConfigurationError: The interface has gone.
        """
        port = self._network.bind(Endpoint(ANY_ADDRESS, 0))
        echo = EchoService(self._identity, self._network, ANY_ADDRESS, port, port, self._swarm)

        def receive(data: bytes, source: Endpoint) -> None:
            with suppress(DecodeError):
                data = self._swarm.open_untrusted(data)
                if data[0] == DatagramType.ECHO_REPLY:
                    echo.receive_reply_untrusted(data, source)

        self._nursery.start_soon(PortPump(port, receive).run)
        number = port.local_endpoint.port
        try:
            findings = await echo.inspect(
                await self._home.observers(),
                host_candidates=[Endpoint(ip, number) for ip in self._network.local_addresses()],
                rng=self._rng,
                ask_neighbour=self._ask_neighbour,
            )
        finally:
            port.close()
        if findings.profile.is_translated is None:
            raise ConfigurationError("nobody answered by the second interface")
        return findings.profile


def _wanted(peers: list[Peer]) -> list[Peer]:
    """Return who shall have a spare path: whom we use, and who then can introduce us there."""
    since = trio.current_time() - IN_USE_FOR_S
    in_use = [peer for peer in peers if peer.paths.busy_at >= since]
    if all(_takes_strangers(peer) for peer in in_use):
        return in_use
    return in_use + [peer for peer in peers if _takes_strangers(peer)][:VOUCHERS]


def _takes_strangers(peer: Peer) -> bool:
    return peer.record is not None and peer.record.profile.accepts_strangers
