"""Remember peers while a node runs, and come back by them when it is alone.

    connected peers ── every 5 s ── CachedPeer ── changed ones ── PeerStore
    rejoin: the best first, one each quarter of a second, 16 at once, 5 s each, until 8 are there

A node that has lost every peer tries again, after half a minute first and ten minutes at last. Who
answers a dial is authenticated before it counts; who does not costs it a knock and a dozen probes
of 49 bytes. Only peers that take strangers where they were seen can answer. One is enough: it
introduces the others.

Which peer is how good is `discovery/cache.py`'s affair.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

import trio

from natswarm.address import Endpoint
from natswarm.discovery.cache import (
    CachedPeer,
    network_label,
    rejoin_order,
    surplus,
    with_answer,
    with_presence,
    with_silence,
)
from natswarm.errors import NatswarmError
from natswarm.identity import PeerId
from natswarm.net.peer import Peer
from natswarm.net.peer_cache import PeerStore

__all__ = ["Home", "Rejoiner"]

logger = logging.getLogger("natswarm.cache")

LOOK_S = 5.0
# What is written of a peer that stays connected: a crash makes it look at most so much staler.
REFRESH_S = 60.0

WANTED_PEERS = 8
DIALS_MAX = 16
DIAL_PACE_S = 0.25
# A phone's modem wakes up in 2 s; whoever is there has answered by then.
DIAL_TIMEOUT_S = 5.0

ALONE_FIRST_S = 30.0
ALONE_MAX_S = 600.0


class Home(Protocol):
    """What the rejoiner needs of its node."""

    def peers(self) -> list[Peer]:
        """Whom we are connected to, oldest first."""
        ...

    def is_connected(self, peer_id: PeerId) -> bool:
        """Whether there is a connection to a peer."""
        ...

    def local_addresses(self) -> Sequence[str]:
        """Our own addresses."""
        ...

    async def connect_at(self, peer_id: PeerId, endpoints: tuple[Endpoint, ...]) -> object:
        """Connect to a peer that takes strangers at these endpoints.

        Raises:
            NatswarmError: It is not there.
        """
        ...


class Rejoiner:
    """The peer cache of one running node.

    Args:
        home: The node.
        store: Where it is kept.
        nursery: Where dials run.
    """

    def __init__(self, home: Home, store: PeerStore, nursery: trio.Nursery) -> None:
        self._home = home
        self._store = store
        self._nursery = nursery
        self._cached: dict[PeerId, CachedPeer] = {}
        self._changed: dict[PeerId, None] = {}
        self._noted_at: dict[Peer, float] = {}
        self._loaded = trio.Event()
        self._rejoining = trio.Lock()
        self._has_complained = False

    @property
    def cached(self) -> list[CachedPeer]:
        """What is remembered, in no order."""
        return list(self._cached.values())

    async def remembered(self, peer_id: PeerId) -> CachedPeer | None:
        """Return what is remembered of a peer, or of ourselves: `note_own_record`."""
        await self._loaded.wait()
        return self._cached.get(peer_id)

    def note_own_record(self, peer_id: PeerId, sealed_record: bytes) -> None:
        """Remember what we last said of ourselves: what peers that we met know of our NAT."""
        if self._loaded.is_set():
            self._put(CachedPeer(peer_id, sealed_record, is_open=False))

    async def run(self) -> None:
        """Remember, and rejoin when alone, until cancelled."""
        await self._load()
        self._nursery.start_soon(self._rejoin_when_alone)
        while True:
            await trio.sleep(LOOK_S)
            self._look()
            await self._save()

    def note_connected(self, peer: Peer) -> None:
        """Remember a peer that has connected and told its record, or failed to."""
        if self._loaded.is_set():
            self._note(peer)

    async def aclose(self) -> None:
        """Write down what was noted."""
        await self._save()

    async def rejoin(self) -> None:
        """Connect to remembered peers; return when one is there, or none of them is.

        More are dialled in the background, until 8 are connected.
        """
        await self._loaded.wait()
        outcome = trio.Event()
        self._nursery.start_soon(self._dial_best, outcome)
        await outcome.wait()

    # Remembering ----------------------------------------------------------------------------------

    async def _load(self) -> None:
        try:
            self._cached = {peer.peer_id: peer for peer in await self._store.load()}
        except NatswarmError as error:
            self._complain(error)
        self._loaded.set()

    def _look(self) -> None:
        """Note who is still connected."""
        peers = self._home.peers()
        for peer in peers:
            noted_at = self._noted_at.get(peer)
            is_due = noted_at is None or trio.current_time() >= noted_at + REFRESH_S
            if peer.is_reachable and peer.introduced.is_set() and is_due:
                self._note(peer)
        self._noted_at = {peer: at for peer, at in self._noted_at.items() if peer in peers}

    def _note(self, peer: Peer) -> None:
        is_open = peer.record is not None and peer.record.profile.accepts_strangers
        known = self._cached.get(peer.peer_id)
        before = CachedPeer(
            peer.peer_id, peer.sealed_record, is_open, () if known is None else known.sightings
        )
        change = with_presence if peer in self._noted_at else with_answer
        self._noted_at[peer] = trio.current_time()
        self._put(change(before, self._network(), peer.seen_at, time.time()))

    def _put(self, peer: CachedPeer) -> None:
        self._cached[peer.peer_id] = peer
        self._changed[peer.peer_id] = None

    async def _save(self) -> None:
        if not self._changed:
            return
        forgotten = [
            peer.peer_id for peer in surplus(self._cached.values(), self._network(), time.time())
        ]
        for peer_id in forgotten:
            del self._cached[peer_id]
        changed = [self._cached[each] for each in self._changed if each in self._cached]
        self._changed.clear()
        try:
            await self._store.save(changed, forgotten)
        except NatswarmError as error:
            self._complain(error)

    def _complain(self, error: NatswarmError) -> None:
        """Say once what is wrong with the store; what is remembered stays in memory."""
        if not self._has_complained:
            self._has_complained = True
            logger.warning("%s", error)

    def _network(self) -> str:
        return network_label(self._home.local_addresses())

    # Rejoining ------------------------------------------------------------------------------------

    async def _rejoin_when_alone(self) -> None:
        pause_s = ALONE_FIRST_S
        while True:
            await trio.sleep(pause_s)
            if self._home.peers():
                pause_s = ALONE_FIRST_S
            else:
                await self.rejoin()
                pause_s = min(2 * pause_s, ALONE_MAX_S)

    async def _dial_best(self, outcome: trio.Event) -> None:
        """Dial; `outcome` is set with the first peer that answers, or at the end."""
        async with self._rejoining:
            limiter = trio.CapacityLimiter(DIALS_MAX)
            network = self._network()
            async with trio.open_nursery() as nursery:
                for peer in rejoin_order(self._cached.values(), network, time.time()):
                    if len(self._home.peers()) >= WANTED_PEERS:
                        break
                    if self._home.is_connected(peer.peer_id):
                        continue
                    async with limiter:  # wait for room before the next one is chosen
                        pass
                    nursery.start_soon(self._dial, peer, network, limiter, outcome)
                    await trio.sleep(DIAL_PACE_S)
        outcome.set()

    async def _dial(
        self, peer: CachedPeer, network: str, limiter: trio.CapacityLimiter, outcome: trio.Event
    ) -> None:
        reason = f"no answer in {DIAL_TIMEOUT_S:.0f} s"
        async with limiter:
            with trio.move_on_after(DIAL_TIMEOUT_S):
                try:
                    await self._home.connect_at(peer.peer_id, peer.endpoints(network))
                except NatswarmError as error:
                    reason = str(error)
                else:
                    outcome.set()
                    return
        logger.info("%s of the cache is not there: %s", peer.peer_id.short, reason)
        known = self._cached.get(peer.peer_id, peer)
        self._put(with_silence(known, network, time.time()))
