"""The lines of a journal: one JSON object each, `kind` names it.

    begin     the first line: plan, versions, sides                  one a file
    resume    the test goes on after an interruption
    survey    what the long tests found of one side's NAT
    start     an attempt begins
    alarm     something stopped sending, at the moment it was noticed, or goes on
    attempt   an attempt ended: the result with its reason, and all that was measured
    end       every slot of the plan has its result

Results: `ok`, a path was found; `failed`, the NATs, the carrier or the system kept it shut;
`skipped`, the wanted strategy does not apply to this pair; `void`, the bench failed (a cable, a
helper), which says nothing of the NATs: the slot is tried again.

Keys are only ever added, with defaults; one that changes its meaning raises `SCHEMA_VERSION`.
Unknown keys are ignored, so that old readers read new files. Times are UTC. JSON has no infinity:
beyond what was tried is the string "inf".
"""

from __future__ import annotations

import datetime
import enum
import math
from typing import TYPE_CHECKING

import msgspec

from natswarm.field_test.plan import FieldTestPlan
from natswarm.field_test.privacy import shorten_ip, shorten_text

if TYPE_CHECKING:
    from natswarm.nat.profile import NatProfile
    from natswarm.net.attempt import PunctureReport

__all__ = [
    "SCHEMA_VERSION",
    "Alarm",
    "AttemptRecord",
    "Begin",
    "End",
    "NatSeen",
    "PathQuality",
    "PunctureSeen",
    "Record",
    "Result",
    "Resume",
    "Side",
    "SideSeen",
    "Start",
    "Survey",
    "utc_text",
]

SCHEMA_VERSION = 1
# A NAT that draws a port for everything shows hundreds in an inspection; more tell no more.
PORTS_MAX = 1024


class Result(enum.Enum):
    """What became of an attempt."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"
    VOID = "void"


class NatSeen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a side's NAT; names as in `natswarm.nat.profile.NatProfile`."""

    text: str
    is_translated: bool | None = None
    mapping: str | None = None
    filtering: str | None = None
    allocation: str | None = None
    pooling: str | None = None
    public_ips: tuple[str, ...] = ()
    idle_unreplied_s: float | str | None = None
    idle_lifetime_s: float | str | None = None
    absolute_lifetime_s: float | str | None = None
    mappings_seen: int = 0
    max_mappings: int | None = None
    remotes_seen: int = 0
    """How many remotes one port talked to at once."""
    nat_count: int | None = None
    echo_count: int = 0
    observer_count: int = 0

    @classmethod
    def of(cls, profile: NatProfile, *, full_addresses: bool = False) -> NatSeen:
        """Return what is written down of a profile."""
        ips = profile.public_ips
        return cls(
            text=str(profile) if full_addresses else shorten_text(str(profile)),
            is_translated=profile.is_translated,
            mapping=None if profile.mapping is None else profile.mapping.value,
            filtering=None if profile.filtering is None else profile.filtering.value,
            allocation=None if profile.allocation is None else str(profile.allocation),
            pooling=None if profile.pooling is None else profile.pooling.value,
            public_ips=tuple(ips if full_addresses else dict.fromkeys(map(shorten_ip, ips))),
            idle_unreplied_s=_number(profile.idle_unreplied_s),
            idle_lifetime_s=_number(profile.idle_lifetime_s),
            absolute_lifetime_s=_number(profile.absolute_lifetime_s),
            mappings_seen=profile.mappings_seen,
            max_mappings=profile.max_mappings,
            remotes_seen=profile.remotes_seen,
            nat_count=profile.nat_count,
            echo_count=profile.echo_count,
            observer_count=profile.observer_count,
        )


class PunctureSeen(msgspec.Struct, frozen=True, kw_only=True):
    """One puncture of one side, as `natswarm.net.attempt.PunctureReport`."""

    strategy: str
    is_ok: bool
    probe_count: int
    received_count: int
    seconds: float
    reason: str = ""

    @classmethod
    def of(cls, report: PunctureReport, *, full_addresses: bool = False) -> PunctureSeen:
        """Return what is written down of a report."""
        return cls(
            strategy=report.strategy,
            is_ok=report.is_ok,
            probe_count=report.probe_count,
            received_count=report.received_count,
            seconds=round(report.seconds, 4),
            reason=report.reason if full_addresses else shorten_text(report.reason),
        )


class SideSeen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One side of one attempt.

    Attributes:
        carrier: Its label.
        nat: What its inspection right before the puncture found.
        is_controlling: Whether it has the lower PeerId, which picks the path.
        punctures: In order; the last one decided.
        ports_seen: External ports that observers saw in the inspection, in order, distinct.
        handed_count: Datagrams that the system took.
        refused_count: Datagrams that it did not take.
        interface_sent_count: By how much the interface's own counter moved; None: not known.
        interface_received_count: The same for what came in.
        loop_lag_s: The longest that this program itself was late.
    """

    carrier: str
    nat: NatSeen | None = None
    is_controlling: bool = False
    punctures: tuple[PunctureSeen, ...] = ()
    ports_seen: tuple[int, ...] = ()
    handed_count: int = 0
    refused_count: int = 0
    interface_sent_count: int | None = None
    interface_received_count: int | None = None
    loop_lag_s: float = 0.0


class PathQuality(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was measured over the new path; "out" is from who asked for it.

    Attributes:
        rtts_ms: Of the pings that were answered, in order.
        unanswered_count: Pings without an answer in 5 s.
        out_bytes_per_s: As the receiver counted them; None: not measured.
        back_bytes_per_s: The same for the other direction.
        out_loss: Share of QUIC packets lost in that direction, everything counted; None: not known.
        back_loss: The same for the other direction.
        stayed_s: How long the path was kept after that.
        longest_gap_s: The longest silence meanwhile.
        trouble: Why something of it is missing; empty: nothing is.
    """

    rtts_ms: tuple[float, ...] = ()
    unanswered_count: int = 0
    out_bytes_per_s: float | None = None
    back_bytes_per_s: float | None = None
    out_loss: float | None = None
    back_loss: float | None = None
    stayed_s: float | None = None
    longest_gap_s: float | None = None
    trouble: str = ""


class Side(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A side for the whole test.

    Attributes:
        name: `left` or `right`.
        carrier: Label such as "NL KPN".
        carrier_source: Who said so: `user`, `modem`, `network` or `interface`; empty: the other
            device knows.
        interface: Its name; empty where no one interface was asked for.
        interface_kind: What that probably is.
    """

    name: str
    carrier: str
    carrier_source: str = ""
    interface: str = ""
    interface_kind: str = ""


class _Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of every line; `at` is the time of writing."""

    at: str


class Begin(_Line, frozen=True, kw_only=True, tag="begin"):
    """The first line."""

    schema: int = SCHEMA_VERSION
    session: str
    mode: str
    plan: FieldTestPlan
    sides: tuple[Side, ...]
    versions: dict[str, str]
    helper_count: int
    full_addresses: bool = False


class Resume(_Line, frozen=True, kw_only=True, tag="resume"):
    """The test goes on."""

    versions: dict[str, str]
    sides: tuple[Side, ...] = ()
    torn_line_count: int = 0
    done_count: int = 0


class Survey(_Line, frozen=True, kw_only=True, tag="survey"):
    """What the long tests found of one side's NAT, and why they did not find the rest."""

    round_index: int
    side: str
    nat: NatSeen | None
    unknown: dict[str, str] = {}


class Start(_Line, frozen=True, kw_only=True, tag="start"):
    """An attempt begins."""

    key: str


class Alarm(_Line, frozen=True, kw_only=True, tag="alarm"):
    """Something stopped sending, or goes on again."""

    key: str
    side: str
    what: str
    is_over: bool
    text: str


class AttemptRecord(_Line, frozen=True, kw_only=True, tag="attempt"):
    """An attempt ended.

    Attributes:
        key: Of its slot.
        seed: Of what the nodes drew.
        began_at: When it began.
        result: What became of it.
        reason: Why; how it was found for `ok`.
        strategy: What found the path, or was tried last; empty: nothing was.
        hole_s: From the start of the puncture to its path, as who asked saw it.
        connect_s: From the wish to the connection, introduction and all tries included.
        left: One side; None: the other device's journal has it.
        right: The other side.
        quality: What was measured over the path.
    """

    key: str
    round_index: int
    wanted_strategy: str
    direction: str
    repeat: int
    seed: int
    began_at: str
    result: Result
    reason: str
    strategy: str = ""
    hole_s: float | None = None
    connect_s: float | None = None
    left: SideSeen | None = None
    right: SideSeen | None = None
    quality: PathQuality | None = None

    @property
    def probe_count(self) -> int:
        """Probes of both sides in all punctures."""
        sides = [side for side in (self.left, self.right) if side is not None]
        return sum(puncture.probe_count for side in sides for puncture in side.punctures)


class End(_Line, frozen=True, kw_only=True, tag="end"):
    """Every slot has its result."""


Record = Begin | Resume | Survey | Start | Alarm | AttemptRecord | End


def utc_text(seconds: float) -> str:
    """Return a time, seconds since 1970, as a journal writes it."""
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _number(value: float | None) -> float | str | None:
    if value is None:
        return None
    return round(value, 2) if math.isfinite(value) else "inf"
