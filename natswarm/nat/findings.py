"""What an inspection has found so far: each test reads what was found before, and adds its own.

Every test is a `Measurement` that is made with the findings, the fresh ports it may use, randomness
and the time, and told to `conclude` when it is over: it then replaces `profile`, and says for every
field that it could not fill why not.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Protocol

from natswarm.identity import PeerId
from natswarm.nat.behaviour import AllocationLaw
from natswarm.nat.classify import FilterTrial, Observation, classify, port_intervals
from natswarm.nat.interval import Interval
from natswarm.nat.measurement import Measurement, Observer
from natswarm.nat.profile import NatProfile

__all__ = ["Findings", "Interval", "NatTest", "TestRun"]


# The fields of a profile that `classify` fills.
CLASSIFIED = (
    "mapping",
    "filtering",
    "allocation",
    "public_ips",
    "main_endpoint",
    "is_translated",
    "echo_count",
    "observer_count",
    "pooling",
)


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


@dataclass(slots=True)
class Findings:
    """What the tests share.

    Attributes:
        observers: Who can be asked.
        profile: What is known by now.
        observations: Every echo so far that came back from where it was asked for, in order.
        filter_trials: Every try to get in from where nothing was sent to.
        tokens: The newest token of each observer.
        intervals: Names of estimated figures -> where they lie: `idle_lifetime_s`, or with a dot
            `allocation.high`.
        unknown: Names of the profile's fields that are not known -> why.
        packet_counts: What each test has sent, over the network or by a neighbour.
    """

    observers: tuple[Observer, ...]
    profile: NatProfile
    observations: list[Observation] = field(default_factory=list)
    filter_trials: list[FilterTrial] = field(default_factory=list)
    tokens: dict[PeerId, bytes] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    packet_counts: dict[NatTest, int] = field(default_factory=dict)

    def refit(self) -> None:
        """Work out anew what follows from all observations and filter trials.

        A test that adds observations need not call it: the inspection does, before `conclude`.
        """
        fitted = classify(
            self.observations,
            local_endpoints=self.profile.local_endpoints,
            filter_trials=self.filter_trials,
        )
        inferred = [name for name in self.profile.inferred if name not in CLASSIFIED]
        self.profile = replace(
            self.profile,
            **{name: getattr(fitted, name) for name in CLASSIFIED},
            inferred=(*fitted.inferred, *inferred),
        )
        for name in [name for name in self.intervals if name.startswith("allocation.")]:
            del self.intervals[name]
        self.intervals.update(port_intervals(self.observations, self.profile))
        self.unknown.pop("allocation.block_size", None)
        allocation = self.profile.allocation
        if (
            allocation is not None
            and allocation.law is AllocationLaw.SEQUENTIAL
            and allocation.block_size is None
        ):
            self.unknown["allocation.block_size"] = (
                f"{allocation.sample_count} ports in a row do not show where a block ends, if it "
                "is one"
            )


class TestRun(Measurement, Protocol):
    """One test under way."""

    def conclude(self) -> None:
        """Write what was found into the findings; after `next_timer` returned None, or to give up.

        After giving up, what is not known by then is unknown.
        """
        ...
