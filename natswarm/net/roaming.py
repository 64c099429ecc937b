"""Notice that we are somewhere else: another network, a NAT that forgot us, waking from sleep.

    seen                                           so
    our addresses changed                          what we knew of our NAT is void; ask all paths at
                                                   once: the answers of two neighbours tell enough
                                                   to puncture by; then look at the NAT in full
    a peer does not answer in time                 look at our addresses, and ask some other peers;
                                                   again, ever less often, while no path leads to it
    neighbours see us at another address           as if our addresses had changed
    a peer sees us elsewhere than a moment ago     the NAT has started anew: look at it again
    the machine slept                              ask all paths at once

Addresses are looked at four times a second while a connection is busy or has no path, else every
2 s. Peers are told nothing here: those that we can still reach hear from our probes where we are.
Whoever moves on before it is known where we are is looked for anew.

Source: RFC 8445 section 2.1 for what an address is good for; the rest follows from `path_keeper`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import trio

from natswarm.errors import NatswarmError
from natswarm.net.nursery import open_private_nursery
from natswarm.net.peer import Peer
from natswarm.net.port import Network

__all__ = ["Home", "Roamer"]

logger = logging.getLogger("natswarm.node")

# A look takes 0.6 ms of a processor.
POLL_S = 2.0
POLL_BUSY_S = 0.25
BUSY_FOR_S = 3.0
# Clocks drift and stutter; whoever sleeps, sleeps for longer.
SLEEP_MIN_S = 1.0
# So many addresses that see us tell an EIM NAT from others.
VOTERS_ENOUGH = 2
# Whom to ask when one is silent: among four are two that are there.
ASKED_IN_DOUBT = 4
# While no path leads to it they are asked again: of what changes now nobody else may tell us. Every
# second at first, then after an eighth of the time that it has taken so far.
DOUBT_AGAIN_S, DOUBT_AGAIN_SHARE = 1.0, 1 / 8
# Until every path has answered or is known to be dead.
SETTLE_MAX_S = 3.0
# A NAT that ends mappings early is seen elsewhere all the time, and stays what it is.
LOOK_AGAIN_S = 30.0


class Home(Protocol):
    """What the roamer needs of its node."""

    def peers(self) -> list[Peer]:
        """Whom we are connected to, oldest first."""
        ...

    def forget_profile(self) -> None:
        """We are somewhere else: what our NAT does is not known any more."""
        ...

    def is_seen_elsewhere(self) -> bool:
        """Whether neighbours agree that we have another public address than we know of."""
        ...

    def glimpse(self) -> None:
        """Go by what neighbours have told of our NAT since we moved, until more is known."""
        ...

    async def look_again(self) -> object:
        """Find out what our NAT does, and have the neighbours told."""
        ...


class Roamer:
    """Watches where one node is.

    Args:
        home: The node.
        network: Whose addresses to watch.
        check: Asks the endpoints that a peer is known at.
        slept_s: Returns how long the machine has been asleep since it was started.
        second: A network beside it, whose addresses come and go without our moving.
    """

    def __init__(
        self,
        home: Home,
        network: Network,
        *,
        check: Callable[[Peer], None],
        slept_s: Callable[[], float] | None = None,
        second: Network | None = None,
    ) -> None:
        self._home = home
        self._network = network
        self._second = second
        self._check = check
        self._slept_s = slept_s or _slept_s
        self._hint = trio.Event()
        self._is_in_doubt = False
        self._is_rebound = False
        self._doubted_at = self._looked_at = float("-inf")
        self._settling = trio.CancelScope()
        self._settled = trio.Event()
        self._settled.set()

    async def wait_settled(self) -> None:
        """Wait until it is known where we are, after a move: what our NAT does, in short."""
        await self._settled.wait()

    def note_doubt(self) -> None:
        """Take note that a peer does not answer in time."""
        self._is_in_doubt = True
        self._hint.set()

    def note_rebound(self) -> None:
        """Take note that a peer sees a port of ours elsewhere than before."""
        self._is_rebound = True
        self._hint.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        addresses, slept_s = self._addresses(), self._slept_s()
        async with open_private_nursery() as nursery:
            while True:
                with trio.move_on_after(POLL_BUSY_S if self._is_busy else POLL_S):
                    await self._hint.wait()
                self._hint = trio.Event()
                before, addresses = addresses, self._addresses()
                slept_before_s, slept_s = slept_s, self._slept_s()
                is_in_doubt, self._is_in_doubt = self._is_in_doubt or self._is_stranded, False
                is_rebound, self._is_rebound = self._is_rebound, False
                if set(addresses) != set(before):
                    logger.info("our addresses are %s now", ", ".join(addresses) or "none")
                    self._move(nursery)
                elif slept_s - slept_before_s > SLEEP_MIN_S:
                    self._ask_all(has_moved=False, has_slept=True)
                elif is_rebound and self._home.is_seen_elsewhere():
                    logger.info("we are seen at another address")
                    self._move(nursery)
                elif is_rebound and trio.current_time() >= self._looked_at + LOOK_AGAIN_S:
                    nursery.start_soon(self._look_closer)
                elif is_in_doubt:
                    # Behind another NAT we may have the address that we had behind the last one.
                    self._doubted_at = trio.current_time()
                    there = [peer for peer in self._home.peers() if peer.is_reachable]
                    for peer in there[:ASKED_IN_DOUBT]:
                        peer.paths.recheck(has_moved=False)

    def _addresses(self) -> list[str]:
        second = [] if self._second is None else self._second.local_addresses()
        return [each for each in self._network.local_addresses() if each not in second]

    @property
    def _is_busy(self) -> bool:
        since = trio.current_time() - BUSY_FOR_S
        return any(
            peer.paths.busy_at >= since or not peer.is_reachable for peer in self._home.peers()
        )

    @property
    def _is_stranded(self) -> bool:
        """Whether a connection has no path, and it is time to ask others."""
        now = trio.current_time()
        for peer in self._home.peers():
            if (since := peer.paths.stranded_since) is not None:
                asked_at = max(self._doubted_at, since)
                if now >= asked_at + max(DOUBT_AGAIN_S, DOUBT_AGAIN_SHARE * (asked_at - since)):
                    return True
        return False

    def _ask_all(self, *, has_moved: bool, has_slept: bool = False) -> None:
        for peer in self._home.peers():
            peer.paths.recheck(has_moved=has_moved, has_slept=has_slept)
            self._check(peer)

    def _move(self, nursery: trio.Nursery) -> None:
        self._settling.cancel()
        self._settling = trio.CancelScope()
        if self._settled.is_set():
            self._settled = trio.Event()
        self._home.forget_profile()
        self._ask_all(has_moved=True)
        nursery.start_soon(self._settle, self._settling)

    async def _settle(self, scope: trio.CancelScope) -> None:
        """Find out where we are, which neighbours are still there, and what our NAT does now."""
        moved_at = self._looked_at = trio.current_time()
        with scope:
            await self._wait_answers(moved_at, VOTERS_ENOUGH)
            self._home.glimpse()
            self._settled.set()
            await self._look()

    async def _look_closer(self) -> None:
        looked_at = self._looked_at = trio.current_time()
        self._ask_all(has_moved=False)
        await self._wait_answers(looked_at)
        await self._look()

    async def _look(self) -> None:
        try:
            await self._home.look_again()
        except NatswarmError as error:
            logger.info("did not find out where we are: %s", error)

    async def _wait_answers(self, since: float, enough: float = float("inf")) -> None:
        """Wait until all paths have answered or are dead, or `enough` voters have."""
        peers = self._home.peers()

        async def wait(peer: Peer, nursery: trio.Nursery) -> None:
            await peer.paths.wait_certain(since)
            voters = {remote.ip for each in peers for remote, _ in each.paths.sightings}
            if len(voters) >= enough:
                nursery.cancel_scope.cancel()

        with trio.move_on_after(SETTLE_MAX_S):
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(wait, peer, nursery)


def _slept_s() -> float:
    """Return how long the machine has slept since it was started; 0 where nobody counts it.

    Trio's clock stands still meanwhile on Linux. Elsewhere timers fire on waking, which is as good.
    """
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
