"""Keep the peers we have: open the next path in time, and another one when none is left.

    our NAT ends mappings by their age    at 0.7 of it both sides puncture anew, over the living
                                          connection, from ports whose mappings are new; the
                                          connection moves, then the old path ends
    only the spare path answers           as below, until one of the first interface does
    no path answers                       ask where the peer was known to be; have a neighbour of
                                          both introduce us again; until one is found, or so long
                                          that the connection is given up

A puncture for a connection bears its name: the first half of the attempt's is the first half of the
connection's. So the peer knows that the path joins a connection both have, where a node that has
lost it (a restart) makes a new one. Of two wishes for the same pair that of the lower PeerId is
carried out, as in `connector.py`; but once its puncture is under way, whoever asks anew has moved
since or knows its NAT better, and comes first.

Where nobody is predictable, a fresh port's endpoint is unknown, too, and the plan guesses as ever.
Behind an EIM NAT the fresh port asks neighbours who take strangers what they see.

Knows no streams and no QUIC. Source: reference section 4, points 2 and 7.
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from natswarm.address import AddressKind, Endpoint
from natswarm.discovery.introduction import NodeRecord, profile_as_seen
from natswarm.errors import (
    AlreadyConnecting,
    ConnectFailed,
    DecodeError,
    NatswarmError,
    PeerNotFound,
    RequestRefused,
)
from natswarm.identity import Identity, PeerId
from natswarm.nat.profile import NatProfile
from natswarm.net.dialler import Dial, Dialler, Origin
from natswarm.net.foundations import foundations_of, is_search_void
from natswarm.net.fresh_port import external_endpoint
from natswarm.net.introducer import Introducer
from natswarm.net.nursery import open_private_nursery
from natswarm.net.path_set import PathSet
from natswarm.net.peer import Peer
from natswarm.net.port import Network
from natswarm.net.pump import PortPump
from natswarm.puncture.plan import Limits, Plan, plan_puncture
from natswarm.swarm_key import SwarmKey
from natswarm.wire import ATTEMPT_BYTES

__all__ = ["Home", "Renewer"]

logger = logging.getLogger("natswarm.node")

NAME_PART_BYTES = ATTEMPT_BYTES // 2

# After a failure: the next try costs a puncture, and the old path has 0.3 of its life left.
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 15.0
# A puncture that finds a path does so within a few times what is expected; one that takes longer
# had better begin anew, with what both NATs do by now.
TRY_MIN_S, TRY_EXPECTED, TRY_S = 5.0, 5.0, 15.0
# With all paths the block of ports may be gone that our profile tells of; of a NAT that is
# predictable nothing of that kind can be. We try the old one at once, since our other paths may
# have kept it, while we look again.
STALE_S = 15.0
# Of the probes expected, what may be under way when the path opens, where a connection has none:
# half as many again, for a puncture that takes tenths of seconds where it would take seconds.
URGENT_OVERSHOOT = 0.5
# A side that was declined waits so long for the other's wish to begin.
THEIR_SIDE_TIMEOUT_S = 5.0


class Home(Protocol):
    """What the renewer needs of its node."""

    def peers(self) -> list[Peer]:
        """Whom we are connected to, oldest first."""
        ...

    async def current_profile(
        self, *, max_age_s: float = math.inf, in_full: bool = False
    ) -> NatProfile:
        """What our NAT does, to puncture by; looks first where what is known is too old.

        Args:
            max_age_s: How old it may be.
            in_full: Whether a glimpse, which tells no law of ports, is not enough.
        """
        ...

    def record(self) -> NodeRecord:
        """What we say of ourselves."""
        ...


@dataclass(slots=True)
class _Wish:
    """A puncture for a connection that we wish for.

    Attributes:
        has_profile: Whether it goes by what our NAT does; before, we look at that.
        agreed: The record of the peer, once it has agreed.
    """

    has_profile: bool = False
    agreed: NodeRecord | None = None


class Renewer:
    """Keeps the connections of one node on living paths.

    Args:
        home: The node.
        identity: Who we are.
        dialler: Carries out the punctures.
        introducer: Asks peers and neighbours.
        network: Where fresh ports come from.
        bind_ip: The address they are bound to.
        nursery: Where punctures by others' wish run.
        limits: Bounds of a puncture.
        rng: Draws the names of attempts.
        outage_s: How long a connection outlives its last path.
        swarm: Whose key seals echoes.
    """

    def __init__(
        self,
        home: Home,
        *,
        identity: Identity,
        dialler: Dialler,
        introducer: Introducer,
        network: Network,
        bind_ip: str,
        nursery: trio.Nursery,
        limits: Limits,
        rng: random.Random,
        outage_s: float,
        swarm: SwarmKey,
    ) -> None:
        self._home = home
        self._identity = identity
        self._peer_id = identity.peer_id
        self._dialler = dialler
        self._introducer = introducer
        self._network = network
        self._bind_ip = bind_ip
        self._nursery = nursery
        self._limits = limits
        self._rng = rng
        self._outage_s = outage_s
        self._swarm = swarm
        self._wishes: dict[PeerId, _Wish] = {}
        self._steps: dict[Peer, trio.CancelScope] = {}

    async def keep(self, peer: Peer) -> None:
        """Renew the paths to a peer until the connection ends."""
        paths, pause_s, not_before = peer.paths, RETRY_FIRST_S, -math.inf
        while not peer.is_lost:
            now = trio.current_time()
            since = paths.stranded_since
            give_up_at = math.inf if since is None else since + self._outage_s
            if now >= give_up_at:
                paths.connection.abandon(
                    f"no path to it for {self._outage_s:g} s, nor anybody who could make one"
                )
                return
            is_wanted = since is not None or paths.uses_spare
            due_at = max(not_before, now if is_wanted else paths.renewal_at)
            is_due = now >= due_at
            step = trio.CancelScope(deadline=give_up_at if is_due else min(due_at, give_up_at))
            self._steps[peer] = step
            with step:
                if is_due:
                    is_found = await self._try_renew(peer)
                    pause_s = RETRY_FIRST_S if is_found else min(2 * pause_s, RETRY_MAX_S)
                    not_before = trio.current_time() + pause_s
                else:
                    await paths.wait_changed()
            del self._steps[peer]
            if step.cancelled_caught or (paths.stranded_since is None) is not (since is None):
                pause_s, not_before = RETRY_FIRST_S, -math.inf

    def begin_anew(self) -> None:
        """Give up all punctures for connections: we are somewhere else, and our mappings void."""
        for dial in self._dialler.under_way():
            if dial.is_renewal:
                dial.cancel("we have moved to another network")
        for step in self._steps.values():
            step.cancel()

    def note_profile(self, before: NatProfile, profile: NatProfile) -> None:
        """Take note of what our NAT does: searches that went by something else begin anew."""
        if foundations_of(before) == foundations_of(profile):
            return
        is_void = is_search_void(before, profile)
        for peer, step in self._steps.items():
            if peer.is_reachable:
                continue
            if is_void:
                for dial in self._dialler.under_way(peer_id=peer.peer_id):
                    if dial.is_renewal:
                        dial.cancel("we know more of our NAT")
            # A step that is just looking at our NAT itself goes by what it finds.
            wish = self._wishes.get(peer.peer_id)
            if wish is None or (is_void and wish.has_profile):
                step.cancel()

    def check(self, peer: Peer) -> None:
        """Ask a peer's known endpoints whether it is there."""
        paths = peer.paths
        endpoints = [path.endpoint for path in paths.paths]
        if peer.record is not None:
            profile = profile_as_seen(peer.record.profile, paths.remote)
            if profile.is_predictable and profile.main_endpoint is not None:
                endpoints.append(profile.main_endpoint)
            endpoints += profile.local_endpoints
        paths.check([e for e in dict.fromkeys(endpoints) if e.kind is not AddressKind.LOOPBACK])

    # Our own wish ---------------------------------------------------------------------------------

    async def _try_renew(self, peer: Peer) -> bool:
        try:
            await self._renew(peer)
        except NatswarmError as error:
            logger.info("no new path to %s yet: %s", peer.peer_id.short, error)
            return False
        return True

    async def _renew(self, peer: Peer) -> None:
        """Open one more path.

        Raises:
            NatswarmError: It did not come about.
        """
        peer_id = peer.peer_id
        if not peer.is_reachable or peer.paths.uses_spare:
            self.check(peer)
        if under_way := self._dialler.under_way(peer_id=peer_id, by_others=True):
            await under_way[0].wait_over()
            return
        wish = self._wishes[peer_id] = _Wish()
        try:
            await self._run(await self._agree(peer, wish), peer.paths)
        except AlreadyConnecting:
            await self._wait_their_side(peer_id)
        finally:
            del self._wishes[peer_id]

    async def _agree(self, peer: Peer, wish: _Wish) -> Dial:
        """Have the peer start its side of a puncture, and return ours.

        Raises:
            NatswarmError: Nobody could tell it, or it did not agree.
        """
        home, profile = await self._open_side(peer)
        wish.has_profile = True
        is_taken = False
        try:
            if self._dialler.under_way(peer_id=peer.peer_id, by_others=True):
                raise AlreadyConnecting(f"{peer.peer_id.short} has asked us meanwhile")
            sealed = replace(self._home.record(), profile=profile).seal(self._identity)
            if peer.is_reachable and not peer.paths.uses_spare:
                attempt = self.attempt_for(peer)
                record = await self._introducer.meet_again(peer, attempt, sealed)
                seen_at = peer.seen_at
            else:
                # By the spare path the peer sees us elsewhere than where the next one begins.
                at = profile.public_ips[0] if peer.is_reachable and profile.public_ips else ""
                record, seen_at, attempt = await self._introduction(peer, sealed, at)
            theirs = profile_as_seen(record.profile, seen_at)
            plan = self._plan(profile, theirs, peer.peer_id, is_urgent=not peer.is_reachable)
            dial = self._dialler.prepare(peer.peer_id, plan, attempt, renews=peer.paths, home=home)
            is_taken = True
            wish.agreed = record
            return dial
        finally:
            if home is not None and not is_taken:
                home.port.close()

    async def _introduction(
        self, target_peer: Peer, sealed: bytes, at: str
    ) -> tuple[NodeRecord, Endpoint, bytes]:
        """Have a neighbour tell the peer; return its record, where it is, and the attempt."""
        target = target_peer.peer_id
        failure: NatswarmError = PeerNotFound(f"no neighbour is left who knows {target.short}")
        neighbours = [peer for peer in self._home.peers() if peer.is_reachable]
        self._rng.shuffle(neighbours)
        neighbours.sort(key=lambda peer: not peer.paths.is_certain)  # last, who has not answered
        for neighbour in neighbours:
            attempt = self.attempt_for(target_peer)
            try:
                record, seen_at = await self._introducer.introduce(
                    neighbour, target, attempt, sealed, at=at
                )
                return record, seen_at, attempt
            except RequestRefused as error:
                if error.code == AlreadyConnecting.code:
                    raise AlreadyConnecting(str(error)) from error
                if error.code != PeerNotFound.code:
                    failure = error
            except (ConnectFailed, DecodeError) as error:
                failure = error
        raise failure

    async def _wait_their_side(self, peer_id: PeerId) -> None:
        under_way = self._dialler.under_way(peer_id=peer_id)
        with trio.move_on_after(THEIR_SIDE_TIMEOUT_S):
            while not under_way:
                await self._dialler.wait_begun()
                under_way = self._dialler.under_way(peer_id=peer_id)
        for dial in under_way:
            await dial.wait_over()

    # Others' wishes -------------------------------------------------------------------------------

    def renewed_peer(self, peer_id: PeerId, attempt: bytes) -> Peer | None:
        """Return the peer whose connection an attempt is for; None: it is for a new one."""
        for peer in self._home.peers():
            name = peer.paths.name
            if peer.peer_id == peer_id and name is not None:
                return peer if attempt[:NAME_PART_BYTES] == name[:NAME_PART_BYTES] else None
        return None

    async def answer(
        self,
        peer: Peer,
        record: NodeRecord,
        seen_at: Endpoint,
        attempt: bytes,
        introducer: PeerId,
    ) -> bytes:
        """Start our side of a puncture for a connection that we have; return our signed record.

        Raises:
            AlreadyConnecting: We are asking the same of the peer.
            ConnectFailed: There is no plan for this pair of NATs, or no port.
        """
        peer_id = peer.peer_id
        self._check_wish(record)
        if introducer != peer_id:  # it can't reach us itself
            peer.paths.hurry()
        home, profile = await self._open_side(peer)
        try:
            self._check_wish(record)
            theirs = profile_as_seen(record.profile, seen_at)
            plan = self._plan(profile, theirs, peer_id, is_urgent=introducer != peer_id)
            for dial in self._dialler.under_way(peer_id=peer_id):
                if dial.introducer == introducer or dial.origin is Origin.OURS:
                    dial.cancel("the peer began anew")
            dial = self._dialler.prepare(
                peer_id,
                plan,
                attempt,
                origin=Origin.INTRODUCED,
                introducer=introducer,
                renews=peer.paths,
                home=home,
            )
        except NatswarmError:
            if home is not None:
                home.port.close()
            raise
        self._nursery.start_soon(self._run_for_peer, dial, peer.paths)
        return replace(self._home.record(), profile=profile).seal(self._identity)

    def _check_wish(self, theirs: NodeRecord) -> None:
        """Decline a peer's wish where our own comes first."""
        wish = self._wishes.get(theirs.peer_id)
        if wish is None or not wish.has_profile:
            return
        if wish.agreed is None:
            has_right_of_way = self._peer_id < theirs.peer_id
        else:  # Nobody can make us drop it with a record that the peer signed earlier.
            has_right_of_way = theirs.issued_at_s <= wish.agreed.issued_at_s
        if has_right_of_way:
            raise AlreadyConnecting(f"{self._peer_id.short} is asking you for a path already")

    async def _run_for_peer(self, dial: Dial, paths: PathSet) -> None:
        try:
            await self._run(dial, paths)
        except NatswarmError as error:
            logger.info("the path %s asked for did not come about: %s", dial.peer_id.short, error)

    # Both -----------------------------------------------------------------------------------------

    async def _run(self, dial: Dial, paths: PathSet) -> None:
        *earlier, last = dial.plan.steps
        try_s = sum(step.duration_s for step in earlier)
        try_s = min(try_s + max(TRY_MIN_S, TRY_EXPECTED * last.expected_s), TRY_S)
        try:
            with trio.fail_after(try_s):
                async with open_private_nursery() as nursery:
                    nursery.start_soon(_cancel_when_settled, dial, paths)
                    await dial.run()
        except trio.TooSlowError:
            raise ConnectFailed(f"no path was found in {try_s:.0f} s") from None

    def attempt_for(self, peer: Peer) -> bytes:
        """Return a new name for a puncture that renews the connection with a peer."""
        name = peer.paths.name
        assert name is not None, "peers are proved"
        return name[:NAME_PART_BYTES] + self._rng.randbytes(ATTEMPT_BYTES - NAME_PART_BYTES)

    def _plan(
        self, ours: NatProfile, theirs: NatProfile, peer_id: PeerId, *, is_urgent: bool
    ) -> Plan:
        limits = self._limits
        if is_urgent:
            limits = replace(limits, overshoot=max(limits.overshoot, URGENT_OVERSHOOT))
        return plan_puncture(ours, theirs, my_id=self._peer_id, their_id=peer_id, limits=limits)

    async def _open_side(self, peer: Peer) -> tuple[PortPump | None, NatProfile]:
        """Return the port to puncture from, None for the main port, and what our NAT does with it.

        A NAT that ends mappings by their age needs a new one, so a fresh port.

        Raises:
            ConfigurationError: The system gives no port.
        """
        profile = await self._home.current_profile()
        if not peer.is_reachable and not profile.is_predictable:
            if peer.record is None or not peer.record.profile.is_predictable:
                # Where both sides guess, the law saves more than the look takes; and what is
                # probed meanwhile would use up ports, and disturb the look.
                profile = await self._home.current_profile(in_full=True)
            self._nursery.start_soon(self._look_if_stale)
        if not math.isfinite(peer.paths.lifetimes.renewal_s):
            return None, profile
        port = self._network.bind(Endpoint(self._bind_ip, 0))
        try:
            external = await external_endpoint(
                port,
                profile,
                self._home.peers(),
                identity=self._identity,
                swarm=self._swarm,
                rng=self._rng,
            )
        except BaseException:
            port.close()
            raise
        number = port.local_endpoint.port
        local = tuple(Endpoint(each.ip, number) for each in profile.local_endpoints)
        profile = replace(profile, main_endpoint=external, local_endpoints=local)
        return self._dialler.open_home(port), profile

    async def _look_if_stale(self) -> None:
        """See whether our NAT draws ports as it did; if not, searches begin anew."""
        try:
            await self._home.current_profile(max_age_s=STALE_S)
        except NatswarmError as error:
            logger.info("did not find out what our NAT does now: %s", error)


async def _cancel_when_settled(dial: Dial, paths: PathSet) -> None:
    """Give a search up when the connection has ended, or a path answers where none did."""
    was_stranded = not paths.is_alive
    while not paths.is_closed and not (was_stranded and paths.is_alive):
        await paths.wait_changed()
    if not dial.has_path:
        dial.cancel("the connection has ended" if paths.is_closed else "an old path answers again")
