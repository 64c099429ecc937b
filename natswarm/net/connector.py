"""Connect to a peer: find out how, agree with it on whose wish is carried out, dial.

    Invite of a node that takes strangers    HELLO, then probes, to the endpoint it names, or to
                                             the one that its gateway forwards
    Invite of a node that has met nobody     HELLO, then probes, to its own addresses and what its
                                             gateway forwards: whoever is given that invite is on
                                             its network, or may be anywhere
    Invite of any other                      both sides dial, with a name of the attempt that both
                                             derive from the meeting that the lower PeerId's invite
                                             names: needs the other's invite on both sides
    PeerId                                   a neighbour introduces: introduction.py
    PeerId of a peer that we met before      both sides wait for the same second: rendezvous.py

Of a pair, one side's wish is carried out at a time. Who asks the other for a path, through a
neighbour or with a HELLO, and has the lower PeerId, declines the other's wish meanwhile; the other
takes it, and waits. So both may call `connect` at once, and both get the one path.

Knows no sockets and no streams; the node, behind the `Home` protocol, keeps the peers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import trio

from natswarm.address import Endpoint
from natswarm.discovery.introduction import NodeRecord, profile_as_seen
from natswarm.discovery.invite import Invite
from natswarm.discovery.rendezvous import SLOT_S, MeetingClock
from natswarm.errors import (
    AlreadyConnecting,
    ConnectFailed,
    DecodeError,
    HandshakeFailed,
    NatswarmError,
    PeerNotFound,
    PunctureFailed,
    RequestRefused,
)
from natswarm.identity import Identity, PeerId
from natswarm.nat.profile import NatProfile
from natswarm.nat.votes import prefix_of
from natswarm.net.attempt import PunctureReport
from natswarm.net.budget import Budget, KeyedBudget
from natswarm.net.clocked import ClockedMeeting
from natswarm.net.dialler import Dial, Dialler, Origin
from natswarm.net.introducer import Introducer
from natswarm.net.path_set import PathSet
from natswarm.net.peer import Peer
from natswarm.net.port import Network
from natswarm.puncture.doubt import plan_in_doubt
from natswarm.puncture.plan import (
    Limits,
    Plan,
    Strategy,
    plan_alternatives,
    plan_direct,
    plan_puncture,
)
from natswarm.puncture.recipes import Recipes, pair_label
from natswarm.swarm_key import OPEN_SWARM, SwarmKey
from natswarm.wire import (
    ATTEMPT_BYTES,
    Hello,
    decode_hello_untrusted,
    hello_target_untrusted,
)

__all__ = ["Connector", "Home"]

logger = logging.getLogger("natswarm.node")

# Tries of one connect(): each draws new ports, so each is a new chance. Plans are sized for 99.9 %;
# what a second or third try mends is a path lost during the handshake, or a neighbour that lied.
# The second is gentle, for NATs that limit new mappings or that an early probe poisons.
TRIES = 3

# An introduction goes to the peer and back by way of the neighbour, so it takes at least about what
# a probe does; much more where the peer had to look at its NAT first, which says nothing.
ROUND_TRIP_MAX_S = 0.3

# A peer that declines because it is connecting to us itself starts its side within a few seconds:
# its introduction, and perhaps a look at its NAT. (Once it has, we wait for the end of it.)
THEIR_SIDE_TIMEOUT_S = 15.0

# A puncture that failed may have gone by what our NAT did before: the next goes by a newer look,
# unless the last is so new.
LOOK_AGAIN_S = 10.0

# Of a slot of the clock, what an attempt may take.
CLOCKED_SHARE = 0.8

# Punctures by others' wish at once. An introduced one may be a burst of 1,000 probes a second from
# 256 sockets; one for a stranger only answers. Knocks cost an Ed25519 verification, 0.1 ms: at most
# 4 % of a core. A newcomer knocks seven times in 10 s.
INTRODUCED_DIALS_MAX = 16
STRANGER_DIALS_MAX = 64
HELLOS_PER_S = 400
HELLOS_PER_ADDRESS_PER_S = 10
HELLOS_PER_PREFIX_PER_S = 100


class Home(Protocol):
    """What the connector needs of its node."""

    def peers(self) -> list[Peer]:
        """Whom we are connected to, oldest first."""
        ...

    def sealed_record(self, order: tuple[str, ...] = ()) -> bytes:
        """Our record as of now, signed, with the order in which we try strategies."""
        ...

    def meetings(self) -> list[bytes]:
        """Where holders of our invites may wait, the newest first."""
        ...

    def living_peer(self, peer_id: PeerId) -> Peer | None:
        """The connection to a peer, if there is one."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether there is no room for one more peer."""
        ...

    async def current_profile(self, *, max_age_s: float = math.inf) -> NatProfile:
        """What our NAT does, to puncture by; looks first where what is known is too old."""
        ...

    def adopt(self, paths: PathSet, report: PunctureReport) -> Peer:
        """Take a new connection.

        Raises:
            ConnectFailed: There is no room.
        """
        ...


class Routes(Protocol):
    """Introductions over several hops; `net/overlay.py`."""

    async def introduce(
        self, target: PeerId, attempt: bytes, *, is_for_link: bool
    ) -> tuple[NodeRecord, Endpoint]:
        """Have the swarm introduce us to `target`; its side has started when this returns.

        Raises:
            PeerNotFound: The request did not reach it.
            NatswarmError: It is not willing, or there is no valid answer.
        """
        ...


@dataclass(slots=True)
class _Wish:
    """A connect() under way.

    Attributes:
        asks_peer: Whether the peer hears of our wish, so that it can give way to it, or we to it.
    """

    asks_peer: bool
    is_over: trio.Event = field(default_factory=trio.Event)


_Introduce = Callable[[PeerId, bytes], Awaitable[tuple[NodeRecord, Endpoint]]]


class Connector:
    """Makes the connections of one node, by its own wish and by that of others.

    Args:
        home: The node.
        identity: Who we are.
        dialler: Carries out the dials.
        introducer: Asks neighbours.
        nursery: Where dials by others' wish run.
        limits: Bounds of a puncture.
        recipes: What was learned of networks.
        rng: Draws the names of attempts, and what of similar strategies to try first.
        routes: Introduces us to peers that none of our neighbours knows; None: nobody does.
        swarm: Whose key seals our HELLOs; what comes in is opened by the caller.
    """

    def __init__(
        self,
        home: Home,
        *,
        identity: Identity,
        dialler: Dialler,
        introducer: Introducer,
        nursery: trio.Nursery,
        limits: Limits,
        recipes: Recipes,
        rng: random.Random,
        routes: Routes | None = None,
        swarm: SwarmKey = OPEN_SWARM,
    ) -> None:
        self._home = home
        self._routes = routes
        self._swarm = swarm
        self._for_links: set[PeerId] = set()
        self._identity = identity
        self._peer_id = identity.peer_id
        self._dialler = dialler
        self._introducer = introducer
        self._nursery = nursery
        self._limits = limits
        self._recipes = recipes
        self._rng = rng
        self._wishes: dict[PeerId, _Wish] = {}
        self._hello_budget = Budget(per_s=HELLOS_PER_S)
        self._hello_address_budgets = KeyedBudget(per_s=HELLOS_PER_ADDRESS_PER_S)
        self._hello_prefix_budgets = KeyedBudget(per_s=HELLOS_PER_PREFIX_PER_S)
        self._failed_at = -math.inf

    # Our own wish ---------------------------------------------------------------------------------

    async def connect(self, target: PeerId | Invite) -> Peer:
        """Return the connection to a peer, making it first if there is none; see `Node.connect`."""
        if isinstance(target, Invite):
            asks_peer = bool(target.dialled_endpoints)
            how = partial(self._connect_by_invite, target)
            return await self._connect(target.record.peer_id, how, asks_peer=asks_peer)
        return await self._connect(target, partial(self._connect_by_introduction, target))

    async def connect_at(self, peer_id: PeerId, endpoints: tuple[Endpoint, ...]) -> Peer:
        """Return the connection to a peer, dialling it where it takes strangers if there is none.

        Raises:
            ConnectFailed: It does not answer there, or there is no room.
        """
        return await self._connect(peer_id, partial(self._dial_at, peer_id, endpoints))

    async def meet_again(
        self,
        peer_id: PeerId,
        mine: NatProfile,
        theirs: NatProfile,
        *,
        network: Network,
        bind_ip: str,
        utc: Callable[[], float],
        patience_s: float,
    ) -> Peer:
        """Return the connection to a peer, made by the clock if need be; see `Node.meet_again`."""
        try:
            secret = self._identity.shared_secret(peer_id, purpose=b"clock")
        except DecodeError as error:
            raise ConnectFailed(str(error)) from error
        limits = replace(
            self._limits, duration_s=min(self._limits.duration_s, CLOCKED_SHARE * SLOT_S)
        )
        meeting = ClockedMeeting(
            peer_id=peer_id,
            clock=MeetingClock(secret, is_first=self._peer_id < peer_id),
            mine=mine,
            theirs=theirs,
            utc=utc,
            patience_s=patience_s,
        )
        keep = partial(
            meeting.keep,
            self._dialler,
            network,
            bind_ip,
            plan=partial(plan_puncture, my_id=self._peer_id, their_id=peer_id, limits=limits),
            run=self._run,
            living=partial(self._home.living_peer, peer_id),
        )
        return await self._connect(peer_id, keep, asks_peer=False)

    async def _connect(
        self, peer_id: PeerId, how: Callable[[], Awaitable[Peer]], *, asks_peer: bool = True
    ) -> Peer:
        if peer_id == self._peer_id:
            raise ConnectFailed(
                "that is this node itself; a second node on one machine needs an identity of its "
                "own (--state FOLDER)"
            )
        # The peer may be at it already: one path is enough. Waited for once, not for ever.
        for dial in self._dialler.under_way(peer_id=peer_id, by_others=True):
            await dial.wait_over()
        while True:
            if (peer := self._home.living_peer(peer_id)) is not None:
                return peer
            if (other := self._wishes.get(peer_id)) is None:
                break
            await other.is_over.wait()
        wish = self._wishes[peer_id] = _Wish(asks_peer)
        try:
            return await how()
        finally:
            del self._wishes[peer_id]
            wish.is_over.set()

    async def _connect_by_invite(self, invite: Invite) -> Peer:
        peer_id, profile = invite.record.peer_id, invite.record.profile
        if endpoints := invite.dialled_endpoints:
            return await self._dial_at(peer_id, endpoints)
        # Both hold the other's invite: the attempt has the one name that both can derive.
        try:
            secret = self._identity.shared_secret(peer_id, purpose=b"invite")
        except DecodeError as error:
            raise ConnectFailed(str(error)) from error
        # Nobody tells the peer when to start: it is waited for rather than guessed at.
        plan = plan_puncture(
            await self._home.current_profile(),
            profile,
            my_id=self._peer_id,
            their_id=peer_id,
            limits=self._limits,
        )
        # Of our own invites the peer may hold one of last week's.
        meetings = [invite.meeting]
        if self._peer_id < peer_id:
            meetings = self._home.meetings() or meetings
        failure: ConnectFailed | None = None
        for meeting in meetings:
            name = hashlib.blake2s(meeting, key=secret, digest_size=ATTEMPT_BYTES).digest()
            try:
                return await self._dial(peer_id, plan, name)
            except PunctureFailed as error:
                failure = error
        assert failure is not None
        raise failure

    async def _dial_at(self, peer_id: PeerId, endpoints: tuple[Endpoint, ...]) -> Peer:
        attempt = self._new_attempt_id()
        hello = self._swarm.seal(Hello(attempt, self._peer_id, peer_id).encode(self._identity))
        plan = plan_direct(endpoints, limits=self._limits)
        return await self._dial(peer_id, plan, attempt, hello=hello)

    async def _connect_by_introduction(self, target: PeerId) -> Peer:
        introducers: list[PeerId] = []
        failure: ConnectFailed | None = None
        for _ in range(TRIES):
            try:
                plan, attempt, pair = await self._introduction(target, introducers)
            except AlreadyConnecting as error:
                failure = error
                await self._wait_their_side(target)
            else:
                try:
                    return await self._dial(target, plan, attempt, pair=pair)
                except (PunctureFailed, HandshakeFailed) as error:
                    failure = error
            if (peer := self._home.living_peer(target)) is not None:
                return peer
        assert failure is not None
        raise failure

    async def _introduction(
        self, target: PeerId, introducers: list[PeerId]
    ) -> tuple[Plan, bytes, str]:
        """Have somebody introduce us; the peer's side has started when this returns.

        Returns the plan, the name of the attempt, and that of the pair of networks.

        The swarm's routing is asked first, since it finds whoever is linked to the peer; for a link
        nobody else is asked.

        Args:
            target: To whom.
            introducers: Who has done so before, in vain: others come first. Routing goes by our
                own name here.

        Raises:
            AlreadyConnecting: The peer is connecting to us itself.
            PunctureFailed: There is no plan for this pair of NATs.
            PeerNotFound: Nobody knows the peer.
            ConnectFailed: Whoever may know the peer did not introduce us.
        """
        profile = await self._profile()
        neighbours = [peer for peer in self._home.peers() if peer.is_reachable]
        failure: ConnectFailed = PeerNotFound(
            f"none of our {len(neighbours)} neighbours is connected to {target.short}; "
            "ask its user for an invite"
        )
        ways: list[tuple[PeerId, _Introduce]] = [
            (peer.peer_id, partial(self._introducer.introduce, peer)) for peer in neighbours
        ]
        if self._routes is not None:
            is_for_link = target in self._for_links
            routed = partial(self._routes.introduce, is_for_link=is_for_link)
            ways = [(self._peer_id, routed), *([] if is_for_link else ways)]
        for introducer, introduce in sorted(ways, key=lambda way: introducers.count(way[0])):
            name = "the swarm" if introducer == self._peer_id else introducer.short
            attempt = self._new_attempt_id()
            asked_at = trio.current_time()
            try:
                record, seen_at = await introduce(target, attempt)
            except PeerNotFound:
                continue
            except RequestRefused as error:
                if error.code == PeerNotFound.code:
                    continue
                if error.code == PunctureFailed.code:
                    raise PunctureFailed(f"{target.short} sees no way: {error}") from error
                if error.code == AlreadyConnecting.code:
                    introducers.append(introducer)
                    raise AlreadyConnecting(
                        f"{target.short} was said to be connecting to us, and did not"
                    ) from error
                failure = ConnectFailed(f"{name} could not introduce {target.short}: {error}")
            except DecodeError as error:
                failure = ConnectFailed(f"{name} lied: {error}")
            except ConnectFailed as error:
                failure = error
            else:
                introducers.append(introducer)
                theirs = profile_as_seen(record.profile, seen_at)
                plan = self._plan(
                    profile,
                    theirs,
                    target,
                    is_gentle=len(introducers) == 2,
                    round_trip_s=min(trio.current_time() - asked_at, ROUND_TRIP_MAX_S),
                    order=record.order,
                )
                return plan, attempt, pair_label(profile, theirs)
        raise failure

    async def _wait_their_side(self, peer_id: PeerId) -> None:
        """Wait for a peer that declined because it is connecting to us itself."""
        under_way = self._dialler.under_way(peer_id=peer_id)
        with trio.move_on_after(THEIR_SIDE_TIMEOUT_S):
            while not under_way and self._home.living_peer(peer_id) is None:
                await self._dialler.wait_begun()
                under_way = self._dialler.under_way(peer_id=peer_id)
        for dial in under_way:
            await dial.wait_over()

    async def _dial(
        self, peer_id: PeerId, plan: Plan, attempt: bytes, *, hello: bytes = b"", pair: str = ""
    ) -> Peer:
        """Carry out our own wish, unless the peer comes by another way meanwhile."""
        try:
            return await self._run(self._dialler.prepare(peer_id, plan, attempt, hello=hello), pair)
        except ConnectFailed:
            if (peer := self._home.living_peer(peer_id)) is not None:
                return peer
            raise

    async def connect_for_link(self, target: PeerId) -> Peer:
        """Connect to a peer only to route for each other; who has links enough may decline."""
        self._for_links.add(target)
        try:
            return await self.connect(target)
        finally:
            self._for_links.discard(target)

    def is_connecting(self, peer_id: PeerId) -> bool:
        """Whether our user's wish to connect to a peer is under way; one for a link is not."""
        return peer_id in self._wishes and peer_id not in self._for_links

    # Others' wishes -------------------------------------------------------------------------------

    async def start_rendezvous(
        self, record: NodeRecord, seen_at: Endpoint, attempt: bytes, introducer: PeerId
    ) -> bytes:
        """Start our side of a puncture that a peer asked for through a common neighbour.

        Returns our signed record for the peer.

        Raises:
            AlreadyConnecting: We are asking the same of the peer.
            PunctureFailed: There is no plan for this pair of NATs.
            ConnectFailed: We are busy.
        """
        peer_id = record.peer_id
        if peer_id == self._peer_id:
            raise ConnectFailed("a node does not puncture to itself")
        if self._dialler.under_way(peer_id=peer_id, by_others=True):
            self._failed_at = trio.current_time()  # or the peer would not ask again
        profile = await self._profile()
        if self._has_right_of_way(peer_id):
            raise AlreadyConnecting(f"{self._peer_id.short} is connecting to you already")
        theirs = profile_as_seen(record.profile, seen_at)
        pair = pair_label(profile, theirs)
        # We know both NATs, the peer does not yet: so the order is ours to say.
        order = self._order(pair, profile, theirs, peer_id)
        plan = self._plan(profile, theirs, peer_id, order=order)
        # One for each pair of a peer and an introducer, so that a liar can disturb only itself.
        for dial in self._dialler.under_way(peer_id=peer_id):
            if dial.introducer == introducer:
                dial.cancel("the peer began anew")
        introduced = self._dialler.under_way(origin=Origin.INTRODUCED)
        if self._home.is_full or len(introduced) >= INTRODUCED_DIALS_MAX:
            raise ConnectFailed("busy with other peers; try again in a minute")
        dial = self._dialler.prepare(
            peer_id, plan, attempt, origin=Origin.INTRODUCED, introducer=introducer
        )
        self._nursery.start_soon(self._run_for_peer, dial, pair)
        return self._home.sealed_record(order)

    def receive_hello_untrusted(self, data: bytes, source: Endpoint) -> None:
        """Make ready for a stranger's probes; nothing is sent before an authentic one came.

        Raises:
            DecodeError: Not an authentic HELLO.
        """
        if hello_target_untrusted(data) != self._peer_id.key:
            return
        now = trio.current_time()
        # The narrowest first, so that a flood uses up its own budget and not everybody's.
        if not (
            self._hello_address_budgets.take(source.ip, now)
            and self._hello_prefix_budgets.take(prefix_of(source.ip), now)
            and self._hello_budget.take(now)
        ):
            return
        hello = decode_hello_untrusted(data)
        if hello.sender == self._peer_id:
            return
        if self._dialler.is_taken(hello.attempt) or self._has_right_of_way(hello.sender):
            return
        if self._home.is_full or not self._dialler.make_room(STRANGER_DIALS_MAX):
            return
        plan = replace(plan_direct([], limits=self._limits), reason="the peer dials us")
        try:
            dial = self._dialler.prepare(hello.sender, plan, hello.attempt, origin=Origin.STRANGER)
        except ConnectFailed:
            return
        self._nursery.start_soon(self._run_for_peer, dial)

    def _has_right_of_way(self, peer_id: PeerId) -> bool:
        """Whether our own wish to connect to the peer comes before its wish."""
        wish = self._wishes.get(peer_id)
        return wish is not None and wish.asks_peer and self._peer_id < peer_id

    async def _run_for_peer(self, dial: Dial, pair: str = "") -> None:
        try:
            await self._run(dial, pair)
        except NatswarmError as error:
            logger.info("the path %s asked for did not come about: %s", dial.peer_id.short, error)

    # Both -----------------------------------------------------------------------------------------

    async def _run(self, dial: Dial, pair: str = "") -> Peer:
        """Carry out a dial; learn how it went between a pair of networks, if one is named."""
        tried = [step.strategy for step in dial.plan.steps]
        try:
            paths, report = await dial.run()
        except PunctureFailed:
            self._failed_at = trio.current_time()
            if pair:
                self._recipes.note(pair, tried, None)
            raise
        if pair:
            self._recipes.note(pair, tried, Strategy(report.strategy))
        peer = self._home.adopt(paths, report)
        for other in self._dialler.under_way(peer_id=dial.peer_id):
            other.cancel("another path to the peer was faster")
        return peer

    async def _profile(self) -> NatProfile:
        """Return our profile, looked at anew if a puncture has failed since."""
        max_age_s = max(trio.current_time() - self._failed_at, LOOK_AGAIN_S)
        return await self._home.current_profile(max_age_s=max_age_s)

    def _plan(
        self,
        ours: NatProfile,
        theirs: NatProfile,
        peer_id: PeerId,
        *,
        is_gentle: bool = False,
        round_trip_s: float | None = None,
        order: tuple[str, ...] = (),
    ) -> Plan:
        known = {strategy.value: strategy for strategy in Strategy}
        plan = partial(
            plan_in_doubt,
            ours,
            theirs,
            my_id=self._peer_id,
            their_id=peer_id,
            round_trip_s=round_trip_s,
            order=[known[name] for name in order if name in known],
        )
        if is_gentle:
            with contextlib.suppress(PunctureFailed):  # too slow for this pair
                return plan(limits=self._limits.gentler())
        return plan(limits=self._limits)

    def _order(
        self, pair: str, ours: NatProfile, theirs: NatProfile, peer_id: PeerId
    ) -> tuple[str, ...]:
        """Return which strategies to try first, by what was learned; empty where there is one."""
        ways = plan_alternatives(
            ours, theirs, my_id=self._peer_id, their_id=peer_id, limits=self._limits
        )
        timed = [(way.strategy, way.plan.expected_s) for way in ways if way.plan is not None]
        if len(timed) < 2:
            return ()
        return tuple(each.value for each in self._recipes.order(pair, timed, self._rng))

    def _new_attempt_id(self) -> bytes:
        return self._rng.randbytes(ATTEMPT_BYTES)
