"""Notice that we are somewhere else: another network, a NAT that forgot us, waking from sleep.

    seen                                           so
    our addresses changed                          ask all paths at once; what we knew of our NAT is
                                                   void: look again when the neighbours are back
    a peer sees us elsewhere than a moment ago     the NAT has started anew: look again, too
    the machine slept                              ask all paths at once

Addresses are looked at every 2 s, and at once when a connection has lost its last path. Peers are
told nothing here: those that we can still reach hear from our probes where we are.

Source: RFC 8445 section 2.1 for what an address is good for; the rest follows from `path_keeper`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import trio

from natswarm.errors import NatswarmError
from natswarm.net.peer import Peer
from natswarm.net.port import Network

__all__ = ["Home", "Roamer"]

logger = logging.getLogger("natswarm.node")

POLL_S = 2.0
# Clocks drift and stutter; whoever sleeps, sleeps for longer.
SLEEP_MIN_S = 1.0
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
        """What our NAT does is not known any more."""
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
    """

    def __init__(
        self,
        home: Home,
        network: Network,
        *,
        check: Callable[[Peer], None],
        slept_s: Callable[[], float] | None = None,
    ) -> None:
        self._home = home
        self._network = network
        self._check = check
        self._slept_s = slept_s or _slept_s
        self._hint = trio.Event()
        self._is_rebound = False
        self._looked_at = float("-inf")
        self._settled = trio.Event()
        self._settled.set()

    async def wait_settled(self) -> None:
        """Wait until it is known where we are, after a move."""
        await self._settled.wait()

    def look(self) -> None:
        """Look at our addresses now: a connection has lost its last path."""
        self._hint.set()

    def note_rebound(self) -> None:
        """Take note that a peer sees a port of ours elsewhere than before."""
        self._is_rebound = True
        self._hint.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        addresses, slept_s = self._network.local_addresses(), self._slept_s()
        while True:
            with trio.move_on_after(POLL_S):
                await self._hint.wait()
            self._hint = trio.Event()
            before, addresses = addresses, self._network.local_addresses()
            slept_before_s, slept_s = slept_s, self._slept_s()
            is_rebound, self._is_rebound = self._is_rebound, False
            if set(addresses) != set(before):
                logger.info("our addresses are %s now", ", ".join(addresses) or "none")
                self._home.forget_profile()
                await self._settle(has_moved=True)
            elif slept_s - slept_before_s > SLEEP_MIN_S:
                self._ask_all(has_moved=True)
            elif is_rebound and trio.current_time() >= self._looked_at + LOOK_AGAIN_S:
                await self._settle(has_moved=False)

    def _ask_all(self, *, has_moved: bool) -> None:
        for peer in self._home.peers():
            peer.paths.recheck(has_moved=has_moved)
            self._check(peer)

    async def _settle(self, *, has_moved: bool) -> None:
        """Find out which neighbours are still there, then what our NAT does now."""
        moved_at = self._looked_at = trio.current_time()
        self._settled = trio.Event()
        try:
            self._ask_all(has_moved=has_moved)
            with trio.move_on_after(SETTLE_MAX_S):
                for peer in self._home.peers():
                    await peer.paths.wait_certain(moved_at)
            await self._home.look_again()
        except NatswarmError as error:
            logger.info("did not find out where we are: %s", error)
        finally:
            self._settled.set()


def _slept_s() -> float:
    """Return how long the machine has slept since it was started; 0 where nobody counts it.

    Trio's clock stands still meanwhile on Linux. Elsewhere timers fire on waking, which is as good.
    """
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
