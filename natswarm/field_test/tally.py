"""From journals to numbers: who met whom, how often, how fast, and why not.

Two journals of one session, from two devices, are halves of the same attempts and are joined by
their keys. Of a slot with several attempts those that are `void` are only counted.

Intervals are Wilson's, which stay honest for the few and lopsided counts that field tests have:
3 of 3 is not 100 %, but 44 to 100 %. Source: Wilson, J. Am. Stat. Assoc. 22 (1927); Brown, Cai and
DasGupta, Stat. Sci. 16 (2001) on why not the usual one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from natswarm.errors import ConfigurationError
from natswarm.field_test.journal import JOURNAL_NAME, JournalContents, read_journal
from natswarm.field_test.plan import Direction
from natswarm.field_test.records import (
    Alarm,
    AttemptRecord,
    Begin,
    NatSeen,
    Result,
    SideSeen,
    Survey,
)

__all__ = ["Cell", "Meeting", "Tally", "load_tally", "median", "wilson"]

# The normal quantile of 97.5 %: intervals that hold 95 times in 100.
Z = 1.959964


class Interval(NamedTuple):
    """Where a share lies."""

    low: float
    high: float


def wilson(ok_count: int, count: int) -> Interval:
    """Return the 95 % interval of a share of which `ok_count` of `count` were seen."""
    if not count:
        return Interval(0.0, 1.0)
    share = ok_count / count
    middle = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    low = 0.0 if ok_count == 0 else (middle - spread) / scale
    high = 1.0 if ok_count == count else (middle + spread) / scale
    return Interval(low, high)


def median(values: Iterable[float]) -> float | None:
    """Return the middle value; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass(frozen=True, slots=True)
class Meeting:
    """One attempt, by who asked and who was asked.

    Attributes:
        session: Of which test.
        attempt: The record.
        asker_carrier: Label of the side that asked.
        asked_carrier: Label of the other.
    """

    session: str
    attempt: AttemptRecord
    asker_carrier: str
    asked_carrier: str

    @property
    def pair(self) -> tuple[str, str]:
        """Both carriers, who asked first."""
        return self.asker_carrier, self.asked_carrier

    @property
    def sides(self) -> tuple[tuple[str, SideSeen | None], ...]:
        """Each side's carrier and part of the record, who asked first."""
        sides = (self.attempt.left, self.attempt.right)
        if self.attempt.direction == Direction.RIGHT_TO_LEFT.value:
            sides = sides[::-1]
        return (self.asker_carrier, sides[0]), (self.asked_carrier, sides[1])


@dataclass(slots=True)
class Cell:
    """What became of some attempts; `skipped` and `void` ones do not count.

    Attributes:
        ok: Those that found a path.
        failed: Those that did not.
    """

    ok: list[Meeting] = field(default_factory=list)
    failed: list[Meeting] = field(default_factory=list)

    @property
    def count(self) -> int:
        """All of them."""
        return len(self.ok) + len(self.failed)

    @property
    def interval(self) -> Interval:
        """Where the chance of success lies."""
        return wilson(len(self.ok), self.count)

    @property
    def hole_s(self) -> list[float]:
        """Times to the path."""
        return [each.attempt.hole_s for each in self.ok if each.attempt.hole_s is not None]

    @property
    def probe_counts(self) -> list[int]:
        """Probes of both sides."""
        return [each.attempt.probe_count for each in self.ok]


@dataclass(slots=True)
class Tally:
    """What several journals say together.

    Attributes:
        begins: What was tested, one for each session and device.
        meetings: All attempts, in order of time, `void` ones included.
        surveys: Long tests: the carrier, and what was found.
        alarms: All of them, by order of time.
        notes: What is wrong with the journals, in words.
    """

    begins: list[Begin] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    surveys: list[tuple[str, Survey]] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def counted(self) -> list[Meeting]:
        """Attempts that say something of the NATs."""
        return [each for each in self.meetings if each.attempt.result in (Result.OK, Result.FAILED)]

    @property
    def result_counts(self) -> Counter[Result]:
        """Attempts by result."""
        return Counter(each.attempt.result for each in self.meetings)

    @property
    def carriers(self) -> list[str]:
        """All labels, sorted."""
        return sorted({carrier for each in self.meetings for carrier in each.pair})

    def cells(self, key: str = "pair") -> dict[tuple[str, ...], Cell]:
        """Return what became of the attempts, by `pair` or by `strategy`."""
        cells: dict[tuple[str, ...], Cell] = {}
        for meeting in self.counted:
            name = meeting.pair if key == "pair" else (meeting.attempt.strategy or "none begun",)
            cell = cells.setdefault(name, Cell())
            is_ok = meeting.attempt.result is Result.OK
            (cell.ok if is_ok else cell.failed).append(meeting)
        return dict(sorted(cells.items()))

    def ports(self) -> dict[str, list[int]]:
        """Return the external ports that were seen, by carrier."""
        ports: dict[str, list[int]] = {}
        for meeting in self.meetings:
            for carrier, side in meeting.sides:
                if side is not None and side.ports_seen:
                    ports.setdefault(carrier, []).extend(side.ports_seen)
        return dict(sorted(ports.items()))

    def nats(self) -> dict[str, Counter[str]]:
        """Return how each carrier's NAT looked, and how often."""
        nats: dict[str, Counter[str]] = {}
        for meeting in self.meetings:
            for carrier, side in meeting.sides:
                if side is not None and side.nat is not None:
                    nats.setdefault(carrier, Counter())[_kind(side.nat)] += 1
        return dict(sorted(nats.items()))


def _kind(nat: NatSeen) -> str:
    if nat.is_translated is None:
        return "not known"
    if not nat.is_translated:
        return f"no NAT, {nat.filtering or 'firewall not known'}"
    # Without the figures of the law, which differ from one inspection to the next.
    law = "" if nat.allocation is None else f", {nat.allocation.split()[0]}"
    return f"{nat.mapping or 'EIM or ADM'}/{nat.filtering or '?'}{law}"


def load_tally(folders: Sequence[Path]) -> Tally:
    """Read the journals of field tests.

    Args:
        folders: Of field tests, or journals themselves.

    Raises:
        ConfigurationError: One cannot be read.
        DecodeError: One is no journal, or of a later version.
    """
    tally = Tally()
    halves: dict[tuple[str, str, int], AttemptRecord] = {}
    labels: dict[str, dict[str, str]] = {}
    for folder in folders:
        path = folder / JOURNAL_NAME if folder.is_dir() else folder
        contents = read_journal(path)
        begin = contents.begin
        tally.begins.append(begin)
        tally.notes += _notes(path, contents)
        names = labels.setdefault(begin.session, {})
        for side in begin.sides:
            if side.carrier_source or side.name not in names:
                names[side.name] = side.carrier
        _take(contents, begin, tally, halves, names)
    if not any(tally.begins):
        raise ConfigurationError("name the folder of at least one field test")
    for (session, _, _), attempt in halves.items():
        tally.meetings.append(_meeting(session, attempt, labels[session]))
    tally.meetings.sort(key=lambda each: each.attempt.began_at)
    tally.alarms.sort(key=lambda each: each.at)
    return tally


def _notes(path: Path, contents: JournalContents) -> list[str]:
    # Reports are shared: they do not tell where on somebody's disk a journal was.
    name = f"{path.parent.name}/{path.name}"
    notes = []
    broken = list(contents.broken_lines)
    if contents.is_torn:
        broken.pop()
        notes.append(f"{name}: the last line was torn by a crash, and left out")
    if broken:
        lines = ", ".join(map(str, broken))
        notes.append(f"{name}: no records, and left out: lines {lines}")
    return notes


def _take(
    contents: JournalContents,
    begin: Begin,
    tally: Tally,
    halves: dict[tuple[str, str, int], AttemptRecord],
    names: dict[str, str],
) -> None:
    tries: Counter[str] = Counter()
    for record in contents.records:
        match record:
            case AttemptRecord():
                # Results join across devices; voids are each device's own trouble.
                number = 0
                if record.result is Result.VOID:
                    tries[record.key] += 1
                    number = tries[record.key] + 1000 * len(tally.begins)
                key = (begin.session, record.key, number)
                halves[key] = _join(halves.get(key), record)
            case Survey():
                tally.surveys.append((names.get(record.side, record.side), record))
            case Alarm():
                tally.alarms.append(record)
            case _:
                pass


def _join(known: AttemptRecord | None, record: AttemptRecord) -> AttemptRecord:
    """Return one attempt of what two devices wrote of it; who asked knows more.

    A device that lost its half in a crash has `skipped` it.
    """
    if known is None or known.result is Result.SKIPPED:
        return record
    if record.result is Result.SKIPPED:
        return known
    is_first = known.connect_s is not None or record.connect_s is None
    first, second = (known, record) if is_first else (record, known)
    return msgspec.structs.replace(
        first,
        left=first.left or second.left,
        right=first.right or second.right,
        hole_s=first.hole_s if first.hole_s is not None else second.hole_s,
        quality=first.quality or second.quality,
    )


def _meeting(session: str, attempt: AttemptRecord, names: dict[str, str]) -> Meeting:
    left = attempt.left.carrier if attempt.left is not None else names.get("left", "left")
    right = attempt.right.carrier if attempt.right is not None else names.get("right", "right")
    if attempt.direction == Direction.RIGHT_TO_LEFT.value:
        left, right = right, left
    return Meeting(session, attempt, left, right)
