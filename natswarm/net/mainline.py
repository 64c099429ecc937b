"""Runs the mainline machine on the node's main port, and puts the meeting records of peers there.

    PortPump ── "d1:..." ── budgets ── Mainline (pure) ── LookupEnded ── wakes who waits
    main port ◀── queries and answers

On the main port, since where nodes see it is then a vote about the very mapping that peers use, and
since the `ip` they answer with costs nothing extra. We answer queries only where strangers can
reach us (BEP 43), one address at most 4 times a second.

Nodes to start from are those that the user has: named, from files of BitTorrent clients
(`discovery/mainline_files.py`), or from the last run. There is no list in the code.
"""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import trio

from natswarm.address import Endpoint
from natswarm.discovery.introduction import NodeRecord
from natswarm.discovery.krpc import Contact
from natswarm.discovery.mainline import LookupEnded, Mainline, MainlineStatistics, Sighting
from natswarm.discovery.mainline_files import (
    FILE_BYTES_MAX,
    KnownNodes,
    nodes_in_file_untrusted,
)
from natswarm.discovery.mainline_item import MutableItem
from natswarm.discovery.mainline_meeting import (
    Meeting,
    meeting_place,
    open_meeting_untrusted,
    seal_meeting,
)
from natswarm.errors import ConfigurationError, ConnectFailed, DecodeError, PeerNotFound
from natswarm.identity import Identity, PeerId
from natswarm.net.budget import Budget, KeyedBudget
from natswarm.net.port import DatagramPort
from natswarm.swarm_key import SwarmKey

__all__ = ["Home", "MainlineConfig", "MainlineService", "read_mainline_nodes"]

logger = logging.getLogger("natswarm.mainline")

# A message is decoded in 20 us, an item checked in 0.1 ms: at the worst 1 % of a core. Answers may
# be ten times as long as questions, so whoever forges a source brings it 4 a second from us.
MESSAGES_PER_S = 200.0
QUERIES_PER_ADDRESS_PER_S = 4.0
QUERY_MARK = b"1:y1:q"  # in every query, and what has it by chance may count as one

LOOKUP_TIMEOUT_S = 60.0
PUBLISH_S = 30 * 60.0  # nodes keep items for two hours (BEP 44)
# What is to be published changes while a node joins, and when it moves.
PUBLISH_FIRST_S = 5.0
PUBLISH_CHANGED_S = 60.0
LOOK_S = 5.0
REMEMBER_S = 300.0
NONCE_BYTES = 12

# As many as the peers that an inspection asks. What is older than some seconds may be about a
# mapping that the NAT has forgotten since.
WITNESSES_MAX = 8
WITNESSES_ENOUGH = 5
WITNESS_TIMEOUT_S = 2.0
WITNESS_FRESH_S = 10.0


@dataclass(frozen=True, slots=True)
class MainlineConfig:
    """How to take part in the mainline DHT.

    Attributes:
        nodes: Where to start; of the address family of the main port, others are left out.
        publishes: Whether to put our meeting record there, anew each half hour and when it has
            changed: whoever knows our PeerId, and in a private swarm its key, then finds out where
            we are.
        answers: Whether to answer other nodes; None: if strangers can reach us.
    """

    nodes: tuple[Endpoint, ...]
    publishes: bool = False
    answers: bool | None = None


class Home(Protocol):
    """What the mainline service needs of its node."""

    @property
    def accepts_strangers(self) -> bool:
        """Whether a stranger's datagram reaches our main port."""
        ...

    def record(self) -> NodeRecord:
        """Our own record as of now."""
        ...

    def introducers(self) -> list[tuple[PeerId, Endpoint]]:
        """Neighbours of ours that take strangers, each with where."""
        ...


class MainlineService:
    """The mainline node of one node of ours.

    Args:
        home: The node.
        port: The main port.
        identity: Signs our meeting record.
        config: Where to start.
        swarm: Who may find us.
        known: Told which nodes answer, for the next start.
        rng: For refreshes.
        clock_s: Returns the seconds since 1970, for sequence numbers.
    """

    def __init__(
        self,
        home: Home,
        *,
        port: DatagramPort,
        identity: Identity,
        config: MainlineConfig,
        swarm: SwarmKey,
        known: KnownNodes,
        rng: random.Random,
        clock_s: Callable[[], float],
    ) -> None:
        self._home = home
        self._port = port
        self._identity = identity
        self._config = config
        self._swarm = swarm
        self._known = known
        self._clock_s = clock_s
        self._machine = Mainline(
            is_ipv6=":" in port.local_endpoint.ip,
            rng=rng,
            entropy=os.urandom,
            now=trio.current_time(),
        )
        self._changed = trio.Event()
        self._heard = trio.Event()
        self._waiters: dict[int, tuple[trio.Event, list[LookupEnded]]] = {}
        self._bootstrapped = trio.Event()
        self._budget = Budget(per_s=MESSAGES_PER_S)
        self._address_budgets = KeyedBudget(per_s=QUERIES_PER_ADDRESS_PER_S)
        self.refused_count = 0
        """Datagrams that were over the budgets; they were not looked at."""

    async def run(self) -> None:
        """Take part until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drive)
            await self._wait(self._machine.bootstrap(self._config.nodes, trio.current_time()))
            logger.info("%d mainline nodes answered", len(self.contacts()))
            self._bootstrapped.set()
            if self._config.publishes:
                nursery.start_soon(self._keep_published)
            while True:
                self._known.note([contact.endpoint for contact in self.contacts()])
                await trio.sleep(REMEMBER_S)

    async def _keep_published(self) -> None:
        published: tuple[NodeRecord, list[tuple[PeerId, Endpoint]]] | None = None
        published_at = -math.inf
        await trio.sleep(PUBLISH_FIRST_S)
        while True:
            wanted = replace(self._home.record(), issued_at_s=0.0), self._home.introducers()
            pause_s = PUBLISH_S if wanted == published else PUBLISH_CHANGED_S
            if trio.current_time() >= published_at + pause_s:
                published, published_at = wanted, trio.current_time()
                try:
                    count = await self.publish(self._home.record(), self._home.introducers())
                    logger.info("%d mainline nodes keep our record", count)
                except (ConnectFailed, ConfigurationError) as error:
                    logger.warning("our record is not in the mainline: %s", error)
            await trio.sleep(LOOK_S)

    def receive_untrusted(self, data: bytes, source: Endpoint) -> None:
        """Take a datagram that looks like KRPC."""
        now = trio.current_time()
        is_over = QUERY_MARK in data and not self._address_budgets.take(source.ip, now)
        if is_over or not self._budget.take(now):
            self.refused_count += 1
            return
        self._machine.receive_untrusted(data, source, now)
        self._changed.set()
        self._heard.set()
        self._heard = trio.Event()

    # What is known --------------------------------------------------------------------------------

    def contacts(self) -> list[Contact]:
        """Return the nodes that answered lately; worth keeping for the next start."""
        return self._machine.contacts()

    def votes(self) -> dict[str, Endpoint]:
        """Return where nodes say that they see our main port: the voter's address -> endpoint.

        Votes for `natswarm.nat.votes.elect`; they are not signed, as those of our own peers are.
        """
        return self._machine.votes()

    async def witness(self) -> list[Sighting]:
        """Ask some nodes, unless enough have just told, where they see our main port.

        Takes a round trip, or 2 s where few answer. At most 8, the latest; nobody signs them.
        """
        since = trio.current_time() - WITNESS_FRESH_S
        if len(self._machine.sightings(since)) < WITNESSES_ENOUGH:
            self._machine.ask_where(WITNESSES_MAX)
            self._changed.set()
        with trio.move_on_after(WITNESS_TIMEOUT_S):
            while len(self._machine.sightings(since)) < WITNESSES_ENOUGH:
                await self._heard.wait()
        return self._machine.sightings(since)[-WITNESSES_MAX:]

    def forget_sightings(self) -> None:
        """Forget who saw us where: we are somewhere else."""
        self._machine.forget_sightings()

    def statistics(self) -> MainlineStatistics:
        """Return the counters so far."""
        return self._machine.statistics()

    # Looking and storing --------------------------------------------------------------------------

    async def wait_bootstrapped(self) -> None:
        """Wait until the nodes to start from have answered or will not."""
        await self._bootstrapped.wait()

    async def find_peers(self, info_hash: bytes) -> tuple[Endpoint, ...]:
        """Return who announced itself under 20 bytes; nobody vouches for them.

        Raises:
            ConnectFailed: No node answered.
        """
        await self.wait_bootstrapped()
        return self._answered(await self._wait(self._machine.get_peers(info_hash))).peers

    async def announce(self, info_hash: bytes) -> int:
        """Announce our main port under 20 bytes; return how many nodes took it.

        Raises:
            ConnectFailed: No node answered.
        """
        await self.wait_bootstrapped()
        handle = self._machine.announce(info_hash, self._port.local_endpoint.port)
        return self._answered(await self._wait(handle)).stored_count

    async def put_item(self, item: MutableItem) -> int:
        """Have nodes keep an item of ours for two hours; return how many do.

        Raises:
            ConnectFailed: No node answered.
        """
        await self.wait_bootstrapped()
        return self._answered(await self._wait(self._machine.put(item))).stored_count

    async def get_item(self, owner: PeerId, salt: bytes) -> MutableItem | None:
        """Return the newest item of a key; None: nobody has one.

        Raises:
            ConnectFailed: No node answered.
        """
        await self.wait_bootstrapped()
        return self._answered(await self._wait(self._machine.get(owner, salt))).item

    async def publish(
        self, record: NodeRecord, introducers: Sequence[tuple[PeerId, Endpoint]] = ()
    ) -> int:
        """Put our meeting record; return how many nodes keep it, for two hours.

        Args:
            record: What we say of ourselves.
            introducers: Neighbours of ours that take strangers, each with where.

        Raises:
            ConnectFailed: No node answered.
            ConfigurationError: The record is too large for the mainline.
        """
        item = seal_meeting(
            self._identity,
            self._swarm,
            int(self._clock_s()),
            record.seal(self._identity),
            introducers,
            os.urandom(NONCE_BYTES),
        )
        return await self.put_item(item)

    async def find_meeting(self, peer_id: PeerId) -> Meeting:
        """Return the meeting record of a peer.

        Raises:
            PeerNotFound: Nobody keeps one, or it is not of our swarm.
            ConnectFailed: No node answered.
        """
        item = await self.get_item(*meeting_place(self._swarm, peer_id))
        if item is None:
            raise PeerNotFound(f"the mainline DHT knows nothing of {peer_id.short}")
        try:
            return open_meeting_untrusted(item, self._swarm, peer_id)
        except DecodeError as error:
            raise PeerNotFound(
                f"what the mainline DHT holds of {peer_id.short} cannot be read: {error}"
            ) from error

    @staticmethod
    def _answered(ended: LookupEnded) -> LookupEnded:
        if not ended.answered_count:
            raise ConnectFailed(
                "no mainline node answered: name others with --dht-node or --dht-file"
            )
        return ended

    # The machine ----------------------------------------------------------------------------------

    async def _wait(self, handle: int) -> LookupEnded:
        """Wait for the end of a lookup; cancelled, it is given up."""
        self._waiters[handle] = waiter = (trio.Event(), list[LookupEnded]())
        self._changed.set()
        try:
            with trio.move_on_after(LOOKUP_TIMEOUT_S):
                await waiter[0].wait()
        finally:
            del self._waiters[handle]
            self._machine.cancel(handle)
        return waiter[1][0] if waiter[1] else LookupEnded(handle, 0, (), None, 0)

    async def _drive(self) -> None:
        while True:
            self._changed = trio.Event()
            now = trio.current_time()
            answers = self._config.answers
            self._machine.is_read_only = not (
                self._home.accepts_strangers if answers is None else answers
            )
            self._machine.handle_timer(now)
            for data, destination in self._machine.datagrams_to_send(now):
                self._port.send(data, destination)
            while (event := self._machine.next_event()) is not None:
                if (waiter := self._waiters.get(event.handle)) is not None:
                    waiter[1].append(event)
                    waiter[0].set()
            timer = self._machine.next_timer()
            with trio.move_on_at(float("inf") if timer is None else timer):
                await self._changed.wait()


def read_mainline_nodes(path: Path) -> list[Endpoint]:
    """Return the nodes in a file of a BitTorrent client.

    Raises:
        ConfigurationError: It cannot be read, or names no nodes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise DecodeError(f"it is larger than {FILE_BYTES_MAX // 1024**2} MiB")
        return nodes_in_file_untrusted(data)
    except (OSError, DecodeError) as error:
        raise ConfigurationError(f"no mainline nodes from {path}: {error}") from error
