"""Turns at computing: several steps at once, first those of the peers that have used least.

Reading the weights is most of what a token costs, and a batch reads them once: whoever has a turn
takes along the steps that wait with it (continuous batching; nobody waits for a batch to fill).

Each peer has a clock that counts the rows computed for it; those whose clocks are furthest behind
are next. A peer that was away starts level with those who are there: it has no claim to what it did
not use. One peer with thirty sessions so gets no more than another with one.

Source: start-time fair queueing (Goyal et al. 1996); continuous batching: Orca (OSDI 2022).
This file does not know what is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

__all__ = ["BatchTurns"]

Owner = TypeVar("Owner", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Ticket(Generic[Owner, Item, Result]):
    """One step that waits, or is being computed."""

    owner: Owner
    item: Item
    rows: int
    woken: trio.Event = field(default_factory=trio.Event)
    outcome: Result | Exception | None = None


class BatchTurns(Generic[Owner, Item, Result]):
    """Computes items in batches, one batch at a time.

    Args:
        compute: Returns the result of each item, or the exception that is its caller's.
        rows_max: Rows in one batch; a larger item goes alone.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        rows_max: int,
    ) -> None:
        self._compute = compute
        self._rows_max = rows_max
        self._is_busy = False
        self._waiting: dict[Owner, deque[_Ticket[Owner, Item, Result]]] = {}
        # Of those who wait or compute; others are forgotten, so strangers cannot fill it.
        self._used: dict[Owner, int] = {}
        self._active: dict[Owner, int] = {}
        self._now = 0  # clock of the latest turn: where newcomers start

    @property
    def waiting_count(self) -> int:
        """Items that wait for a turn."""
        return sum(map(len, self._waiting.values()))

    async def run(self, owner: Owner, item: Item, rows: int) -> Result:
        """Return the result of an item, computed in its turn, maybe together with others.

        Cancelled before its turn, the item is not computed; after that its result is lost.

        Args:
            owner: On whose account.
            item: What to compute.
            rows: How much it is.
        """
        ticket: _Ticket[Owner, Item, Result] = _Ticket(owner, item, rows)
        self._active[owner] = self._active.get(owner, 0) + 1
        self._used[owner] = max(self._used.get(owner, 0), self._now)
        self._waiting.setdefault(owner, deque()).append(ticket)
        try:
            if self._is_busy:
                await self._wait(ticket)
            if ticket.outcome is None:
                await self._lead(ticket)
            assert ticket.outcome is not None, "who leads computes its own item, too"
            if isinstance(ticket.outcome, Exception):
                raise ticket.outcome
            return ticket.outcome
        finally:
            self._active[owner] -= 1
            if not self._active[owner]:
                del self._active[owner], self._used[owner]

    async def _wait(self, ticket: _Ticket[Owner, Item, Result]) -> None:
        """Wait until the item was computed, or it is our turn to compute a batch."""
        try:
            await ticket.woken.wait()
        except trio.Cancelled:
            if ticket in self._waiting.get(ticket.owner, ()):
                self._remove(ticket)
                if ticket.woken.is_set():
                    self._pass_on()  # it was our turn
            raise

    async def _lead(self, first: _Ticket[Owner, Item, Result]) -> None:
        """Compute an item, and what else is next in turn and fits in."""
        self._is_busy = True
        batch, rows = [first], first.rows
        self._take(first)
        while self._waiting and rows + (ticket := self._next()).rows <= self._rows_max:
            self._take(ticket)
            batch.append(ticket)
            rows += ticket.rows
        outcomes: Sequence[Result | Exception] = [trio.BrokenResourceError("given up")] * len(batch)
        try:
            # Others' steps are in the batch: it is not ours to cancel.
            with trio.CancelScope(shield=True):
                outcomes = await self._compute([ticket.item for ticket in batch])
        finally:
            for ticket, outcome in zip(batch, outcomes, strict=True):
                ticket.outcome = outcome
                ticket.woken.set()
            self._pass_on()

    def _take(self, ticket: _Ticket[Owner, Item, Result]) -> None:
        self._remove(ticket)
        self._now = max(self._now, self._used[ticket.owner])
        self._used[ticket.owner] += ticket.rows

    def _next(self) -> _Ticket[Owner, Item, Result]:
        owner = min(self._waiting, key=lambda one: self._used[one])
        return self._waiting[owner][0]

    def _pass_on(self) -> None:
        """Let the next in turn compute a batch."""
        self._is_busy = bool(self._waiting)
        if self._waiting:
            self._next().woken.set()

    def _remove(self, ticket: _Ticket[Owner, Item, Result]) -> None:
        self._waiting[ticket.owner].remove(ticket)
        if not self._waiting[ticket.owner]:
            del self._waiting[ticket.owner]
