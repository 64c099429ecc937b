"""Carry out a plan: rounds at their times, slots in order, each until it has a result.

    round ── survey? ── slot ── attempt ── record ── pause ── next slot
                         ▲                   │ void: the bench failed
                         └── wait for the interfaces, try again

An attempt that says nothing of the NATs (a cable was pulled, no helper answered) is written down as
`void` and made again once the interfaces are back. What keeps failing ends the test with the
reason; `--resume` goes on from there. How an attempt is made is the bench's affair.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from natswarm.errors import ConfigurationError
from natswarm.field_test.plan import FieldTestPlan, Slot
from natswarm.field_test.records import (
    AttemptRecord,
    End,
    Record,
    Result,
    Start,
    Survey,
    utc_text,
)
from natswarm.field_test.side import SideConfig

__all__ = ["Bench", "FieldTest", "Status"]

# In a row, for one slot, with every interface up: then it will not get better by itself.
VOIDS_MAX = 3
VOID_PAUSE_S = 5.0
LOOK_INTERVAL_S = 1.0
# The clock is looked at again after so long: a laptop that slept has missed its timers.
NAP_S = 20.0


@dataclass(slots=True)
class Status:
    """What a display shows of the test; the engine writes it.

    Attributes:
        slot_count: Attempts in all.
        done_count: Slots that have their result.
        key: The slot under way; empty: none is.
        waiting: For what the test waits; empty: for nothing.
        counts: Attempts by result, `void` ones included.
    """

    slot_count: int
    done_count: int = 0
    key: str = ""
    waiting: str = ""
    counts: dict[Result, int] = field(default_factory=lambda: dict.fromkeys(Result, 0))


class Bench(Protocol):
    """Makes attempts."""

    @property
    def sides(self) -> Sequence[SideConfig]:
        """The sides that are on this device."""
        ...

    async def attempt(self, slot: Slot, try_index: int) -> AttemptRecord:
        """Make one attempt; whatever goes wrong is in the record.

        Args:
            slot: Which.
            try_index: How often it has been begun before.
        """
        ...

    async def survey(self, round_index: int) -> list[Survey]:
        """Carry out the long tests of the NATs on this device's sides."""
        ...


class FieldTest:
    """A field test under way.

    Args:
        plan: What to do.
        earlier: What the journal holds already.
        bench: Makes the attempts.
        append: Writes a record; it is safe when this returns.
        begun_at_s: When the test was first begun, seconds since 1970.
        patience_s: How long to wait for an interface that is gone.
        clock: Seconds since 1970.

    Attributes:
        status: For a display.
    """

    def __init__(
        self,
        plan: FieldTestPlan,
        earlier: Sequence[Record],
        bench: Bench,
        append: Callable[[Record], None],
        *,
        begun_at_s: float,
        patience_s: float = 600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan = plan
        self._bench = bench
        self._append = append
        self._patience_s = patience_s
        self._clock = clock
        self._begun_at_s = begun_at_s
        self._done: set[str] = set()
        self._tries: dict[str, int] = {}
        self._surveyed: set[int] = set()
        self._is_ended = False
        self.status = Status(plan.slot_count)
        for record in earlier:
            self._count(record)

    async def run(self) -> None:
        """Return when every slot has its result; a cancelled one goes on from the journal.

        Raises:
            ConfigurationError: It cannot go on; says why.
        """
        begun = datetime.datetime.fromtimestamp(self._begun_at_s).astimezone()
        starts = [each.timestamp() for each in self._plan.round_starts(begun)]
        is_first = True
        for slot in self._plan.slots():
            if slot.key in self._done:
                continue
            if not is_first:
                await self._pause(self._plan.pause_s, "so that mappings expire")
            is_first = False
            await self._wait_round(slot.round_index, starts[slot.round_index])
            if self._plan.lifetimes and slot.round_index not in self._surveyed:
                await self._survey(slot.round_index)
            await self._fill(slot)
        if not self._is_ended:
            self._write(End(at=self._now()))

    async def _fill(self, slot: Slot) -> None:
        """Make attempts until the slot has a result."""
        void_count = 0
        while True:
            await self._wait_links()
            self.status.key = slot.key
            try_index = self._tries.get(slot.key, 0)
            self._write(Start(at=self._now(), key=slot.key))
            record = await self._bench.attempt(slot, try_index)
            self._write(record)
            self.status.key = ""
            if record.result is not Result.VOID:
                return
            if not self._outages():
                void_count += 1
            if void_count == VOIDS_MAX:
                raise ConfigurationError(
                    f"the field test cannot go on: {record.reason}. All results are safe; when "
                    "that is mended, go on with --resume"
                )
            await self._pause(VOID_PAUSE_S, f"trying again: {record.reason}")

    async def _survey(self, round_index: int) -> None:
        await self._wait_links()
        self.status.waiting = "measuring lifetimes and quotas, up to ten minutes"
        for survey in await self._bench.survey(round_index):
            self._write(survey)
        self._surveyed.add(round_index)
        self.status.waiting = ""

    async def _wait_round(self, round_index: int, at: float) -> None:
        while (left_s := at - self._clock()) > 0:
            text = utc_text(at)
            await self._pause(min(left_s, NAP_S), f"round {round_index + 1} begins at {text}")

    async def _wait_links(self) -> None:
        """Wait until every interface is there.

        Raises:
            ConfigurationError: One is not, for too long.
        """
        until = trio.current_time() + self._patience_s
        while outages := self._outages():
            text = "; ".join(outages)
            if trio.current_time() >= until:
                raise ConfigurationError(
                    f"{text}, for {self._patience_s:.0f} s: mend it, then go on with --resume"
                )
            await self._pause(LOOK_INTERVAL_S, f"{text}: plug it in again")

    def _outages(self) -> list[str]:
        return [outage for side in self._bench.sides if (outage := side.outage())]

    async def _pause(self, seconds: float, why: str) -> None:
        self.status.waiting = why
        await trio.sleep(seconds)
        self.status.waiting = ""

    def _write(self, record: Record) -> None:
        self._append(record)
        self._count(record)

    def _count(self, record: Record) -> None:
        match record:
            case Start(key=key):
                self._tries[key] = self._tries.get(key, 0) + 1
            case AttemptRecord():
                self.status.counts[record.result] += 1
                if record.result is not Result.VOID:
                    self._done.add(record.key)
                    self.status.done_count = len(self._done)
            case Survey():
                self._surveyed.add(record.round_index)
            case End():
                self._is_ended = True
            case _:
                pass

    def _now(self) -> str:
        return utc_text(self._clock())
