"""What a field test does: a plan file, and the slots it makes.

    repeats = 5                                        # of every combination
    directions = ["left-to-right", "right-to-left"]    # who asks for the puncture
    strategies = ["auto", "two-sided-birthday"]        # auto: what the planner finds best
    times = ["now", "08:30", "20:30"]                  # a round each, local time
    pause_s = 60.0                                     # between attempts

A slot is one attempt to be made. Its key names it for ever, so that a test that was interrupted
goes on where it stopped: `1/auto/left-to-right/3` is the third repetition in the second round.
Within a round the strategies and directions take turns, so that they meet the same hours.

Pure: knows no clock and no files. Every key has a default; an unknown one is an error, since a
misspelled limit would be no limit.
"""

from __future__ import annotations

import datetime
import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec

from natswarm.errors import ConfigurationError
from natswarm.puncture.strategy import Limits, Strategy

__all__ = ["AUTO", "Direction", "FieldTestPlan", "LimitsPlan", "MeasurePlan", "Slot", "read_plan"]

AUTO = "auto"
NOW = "now"
SLOTS_MAX = 100_000
DEFAULTS = Limits()

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Direction(enum.Enum):
    """Who asks for the puncture."""

    LEFT_TO_RIGHT = "left-to-right"
    RIGHT_TO_LEFT = "right-to-left"


class LimitsPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of one puncture; the defaults are those of `natswarm.puncture.strategy.Limits`.

    What another device's link may ask of ours is bounded, too: at most what the hungriest known
    test did (250,000 packets at 7,500 a second), with some room.
    """

    probes_per_s: Annotated[float, msgspec.Meta(gt=0, le=10_000)] = DEFAULTS.probes_per_s
    probe_count: Annotated[int, msgspec.Meta(ge=1, le=300_000)] = DEFAULTS.probe_count
    socket_count: Annotated[int, msgspec.Meta(ge=1, le=4096)] = DEFAULTS.socket_count
    mapping_count: Annotated[int, msgspec.Meta(ge=1, le=300_000)] = DEFAULTS.mapping_count
    duration_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = DEFAULTS.duration_s
    opener_ttl: Annotated[int, msgspec.Meta(ge=1, le=255)] | None = None


class MeasurePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is measured over a new path.

    Attributes:
        ping_count: Questions, one after another.
        ping_interval_s: From one to the next.
        bulk_s: How long each direction sends as fast as it can; 0 leaves it out.
        bulk_bytes: At most so much in each direction, for the sake of the data plan.
        stay_s: How long the path is then kept with one ping a second, to see it die.
    """

    ping_count: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 20
    ping_interval_s: Positive = 0.1
    bulk_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 3.0
    bulk_bytes: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] = 4_000_000
    stay_s: NotNegative = 0.0


class FieldTestPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole field test.

    Attributes:
        repeats: Of every combination of strategy and direction, in each round.
        directions: Who asks for the puncture.
        strategies: `auto`, or names of strategies that alone may be used.
        times: When each round begins: `now`, or `HH:MM` of this device's local time.
        pause_s: From the end of an attempt to the next. Every attempt has new ports; the mappings
            of the last one count against the subscriber's quota until they have expired.
        lifetimes: Whether each round begins with the long tests of both NATs: lifetimes, quota,
            remotes at once. Up to ten minutes.
        seed: Of what the nodes draw; each attempt has its own from it. Keys never depend on it.
        limits: Bounds of one puncture.
        measure: What is measured over a new path.
    """

    repeats: Annotated[int, msgspec.Meta(ge=1)] = 3
    directions: tuple[Direction, ...] = tuple(Direction)
    strategies: tuple[str, ...] = (AUTO,)
    times: tuple[str, ...] = (NOW,)
    pause_s: NotNegative = 20.0
    lifetimes: bool = False
    seed: Count = 1
    limits: LimitsPlan = LimitsPlan()
    measure: MeasurePlan = MeasurePlan()

    def __post_init__(self) -> None:
        for name in ("directions", "strategies", "times"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} needs at least one value, and none twice")
        known = [AUTO, *(strategy.value for strategy in Strategy)]
        for strategy in self.strategies:
            if strategy not in known:
                raise ValueError(f"no strategy {strategy!r}; there are {', '.join(known)}")
        for time in self.times:
            if time != NOW and re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", time) is None:
                raise ValueError(f"{time!r} is no time: write 'now' or such as '08:30'")
        if self.slot_count > SLOTS_MAX:
            raise ValueError(f"{self.slot_count} attempts are over the bound of {SLOTS_MAX}")

    @property
    def slot_count(self) -> int:
        """Attempts in all."""
        return self.repeats * len(self.directions) * len(self.strategies) * len(self.times)

    def slots(self) -> Iterator[Slot]:
        """Yield every attempt, in the order they are made."""
        for round_index in range(len(self.times)):
            for repeat in range(1, self.repeats + 1):
                for strategy in self.strategies:
                    for direction in self.directions:
                        yield Slot(round_index, strategy, direction, repeat)

    def round_starts(self, begun: datetime.datetime) -> list[datetime.datetime]:
        """Return when each round begins; never before the one before it.

        Args:
            begun: When the test was first started, in the time zone that `times` mean.
        """
        starts: list[datetime.datetime] = []
        earliest = begun
        for time in self.times:
            if time != NOW:
                hour, minute = map(int, time.split(":"))
                at = earliest.replace(hour=hour, minute=minute, second=0, microsecond=0)
                earliest = at if at >= earliest else at + datetime.timedelta(days=1)
            starts.append(earliest)
        return starts


@dataclass(frozen=True, slots=True)
class Slot:
    """One attempt to be made.

    Attributes:
        round_index: From 0.
        strategy: The only one that may be used, or `auto`.
        direction: Who asks.
        repeat: From 1.
    """

    round_index: int
    strategy: str
    direction: Direction
    repeat: int

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.round_index}/{self.strategy}/{self.direction.value}/{self.repeat}"


def read_plan(text: str) -> FieldTestPlan:
    """Read a plan file.

    Raises:
        ConfigurationError: Not TOML, or with a key or value that a plan cannot have.
    """
    try:
        return msgspec.toml.decode(text, type=FieldTestPlan)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the plan cannot be: {error}; field-tests/README.md lists the keys"
        ) from error
