"""What an inspection has found so far: each test reads what was found before, and adds its own.

Every test is a `Measurement` that is made with the findings, the fresh ports it may use, randomness
and the time, and told to `conclude` when it is over: it then replaces `profile`, and says for every
field that it could not fill why not.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from natswarm.identity import PeerId
from natswarm.nat.classify import FilterTrial, Observation
from natswarm.nat.measurement import Measurement, Observer
from natswarm.nat.profile import NatProfile

__all__ = ["Findings", "Interval", "NatTest", "TestRun"]


class NatTest(enum.Enum):
    """What can be asked of a NAT, in the order it is asked."""

    BEHAVIOUR = "behaviour"
    """Mapping, filtering, law of ports, public addresses, pooling: the quick part."""
    HAIRPINNING = "hairpinning"
    POISON = "poison"
    TFTP_HELPER = "tftp-helper"
    QUOTA = "quota"
    """Live mappings, rate of new ones, block sizes, overloading."""
    LIFETIMES = "lifetimes"
    """Idle and absolute, and what refreshes; minutes, so only on request."""


class Interval(NamedTuple):
    """Where a figure lies with 90 %, both ends included."""

    low: float
    high: float


@dataclass(slots=True)
class Findings:
    """What the tests share.

    Attributes:
        observers: Who can be asked.
        profile: What is known by now.
        observations: Every echo so far that came back from where it was asked for, in order.
        filter_trials: Every try to get in from where nothing was sent to.
        tokens: The newest token of each observer.
        intervals: Names of estimated figures -> where they lie.
        unknown: Names of the profile's fields that are not known -> why.
    """

    observers: tuple[Observer, ...]
    profile: NatProfile
    observations: list[Observation] = field(default_factory=list)
    filter_trials: list[FilterTrial] = field(default_factory=list)
    tokens: dict[PeerId, bytes] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


class TestRun(Measurement, Protocol):
    """One test under way."""

    def conclude(self) -> None:
        """Write what was found into the findings; after `next_timer` returned None, or to give up.

        After giving up, what is not known by then is unknown.
        """
        ...
