"""Turns at computing, first for the peer that has used least: nobody waits behind a busy neighbour.

Each peer has a clock that counts the seconds computed for it; the one whose clock is furthest
behind is next. A peer that was away starts level with those who are there: it has no claim to what
it did not use. One peer with thirty sessions so gets no more than another with one.

Source: start-time fair queueing (Goyal et al. 1996); SWARM (arXiv 2301.11913) schedules so as well.
This file does not know what is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import trio

__all__ = ["FairTurns"]

Owner = TypeVar("Owner", bound=Hashable)


class FairTurns(Generic[Owner]):
    """Lets so many compute at once, and picks who is next.

    Args:
        at_once: Turns at the same time.
    """

    def __init__(self, at_once: int = 1) -> None:
        self._free = at_once
        self._waiting: dict[Owner, deque[trio.Event]] = {}
        # Of those who wait or compute; others are forgotten, so strangers cannot fill it.
        self._used_s: dict[Owner, float] = {}
        self._active: dict[Owner, int] = {}
        self._now_s = 0.0  # clock of the latest turn: where newcomers start

    @property
    def waiting_count(self) -> int:
        """Turns that somebody waits for."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def turn(self, owner: Owner) -> AsyncIterator[None]:
        """Wait for a turn, and have it for the time of the block."""
        self._active[owner] = self._active.get(owner, 0) + 1
        self._used_s[owner] = max(self._used_s.get(owner, 0.0), self._now_s)
        try:
            await self._wait(owner)
            started_at = trio.current_time()
            self._now_s = max(self._now_s, self._used_s[owner])
            try:
                yield
            finally:
                self._used_s[owner] += trio.current_time() - started_at
                self._pass_on()
        finally:
            self._active[owner] -= 1
            if not self._active[owner]:
                del self._active[owner], self._used_s[owner]

    async def _wait(self, owner: Owner) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._free:
            self._free -= 1
            return
        granted = trio.Event()
        self._waiting.setdefault(owner, deque()).append(granted)
        try:
            await granted.wait()
        except trio.Cancelled:
            if granted.is_set():
                self._pass_on()
            else:
                self._remove(owner, granted)
            raise

    def _pass_on(self) -> None:
        """Give a turn to who is next; nobody's, it is free."""
        if not self._waiting:
            self._free += 1
            return
        owner = min(self._waiting, key=lambda one: self._used_s[one])
        granted = self._waiting[owner][0]
        self._remove(owner, granted)
        granted.set()

    def _remove(self, owner: Owner, granted: trio.Event) -> None:
        self._waiting[owner].remove(granted)
        if not self._waiting[owner]:
            del self._waiting[owner]
