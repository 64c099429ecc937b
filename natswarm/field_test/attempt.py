"""One attempt, from its start to its record: what both benches share.

What went wrong decides the result. A puncture that ended without a path is `failed`. Whatever kept
it from being made at all is `void`: no helper, no port, an interface that went down before there
was a path. A strategy that does not apply to this pair of NATs within the limits is `skipped`.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
import trio

from natswarm.errors import NatswarmError, PunctureFailed
from natswarm.field_test.plan import AUTO, LimitsPlan, Slot
from natswarm.field_test.records import (
    Alarm,
    AttemptRecord,
    PathQuality,
    Record,
    Result,
    SideSeen,
    utc_text,
)
from natswarm.field_test.side import BenchFailed, OpenSide, SideConfig
from natswarm.field_test.stall import Notice, Trouble
from natswarm.identity import PeerId
from natswarm.net.peer import Peer
from natswarm.puncture.strategy import Limits, Strategy

__all__ = ["AttemptRun", "alarm_of", "limits_of", "puncture_limit_s", "seed_of"]

# connect() makes three tries of up to the plan's duration, each introduced anew.
TRIES = 3
INTRODUCTION_S = 30.0

Connect = Callable[[], Awaitable[Peer]]


def limits_of(plan: LimitsPlan, strategy: str) -> Limits:
    """Return the bounds of a slot's punctures."""
    return Limits(
        probes_per_s=plan.probes_per_s,
        probe_count=plan.probe_count,
        socket_count=plan.socket_count,
        mapping_count=plan.mapping_count,
        duration_s=plan.duration_s,
        opener_ttl=plan.opener_ttl,
        strategies=() if strategy == AUTO else (Strategy(strategy),),
    )


def puncture_limit_s(limits: Limits) -> float:
    """Return after which time a puncture, all its tries together, has hung."""
    return TRIES * (limits.duration_s + INTRODUCTION_S)


def seed_of(plan_seed: int, key: str, try_index: int) -> int:
    """Return the seed of one attempt: its own, and the same for whoever reads the journal."""
    return random.Random(f"{plan_seed}/{key}/{try_index}").getrandbits(32)


def alarm_of(config: SideConfig, notice: Notice, *, key: str, at: str) -> Alarm:
    """Return a notice as written down."""
    return Alarm(
        at=at,
        key=key,
        side=config.name,
        what=notice.trouble.value,
        is_over=notice.is_over,
        text=config.words(notice.text),
    )


@dataclass(slots=True)
class AttemptRun:
    """An attempt under way.

    Attributes:
        slot: Which.
        seed: Of what its nodes draw.
        append: Writes a record.
        clock: Seconds since 1970.
        scope: Cancelled when an interface goes down.
        began_at: As a journal writes it.
    """

    slot: Slot
    seed: int
    append: Callable[[Record], None]
    clock: Callable[[], float]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    began_at: str = field(init=False)
    _result: Result | None = None
    _reason: str = ""
    _outage: str = ""
    _alarms: list[str] = field(default_factory=list)
    _hole_s: float | None = None
    _connect_s: float | None = None
    _strategy: str = ""
    _quality: PathQuality | None = None

    def __post_init__(self) -> None:
        self.began_at = utc_text(self.clock())

    @property
    def is_over(self) -> bool:
        """Whether its result is known."""
        return self._result is not None

    @property
    def is_void(self) -> bool:
        """Whether the slot is tried again."""
        return self._result is Result.VOID

    def take_notice(self, config: SideConfig, notice: Notice) -> None:
        """Write down at once that something stopped, and end what cannot go on."""
        alarm = alarm_of(config, notice, key=self.slot.key, at=utc_text(self.clock()))
        self.append(alarm)
        if notice.is_over:
            return
        self._alarms.append(f"{config.name}: {alarm.text}")
        if notice.trouble is Trouble.DOWN:
            self._outage = alarm.text
            self.scope.cancel()

    async def puncture(self, side: OpenSide, target: PeerId, connect: Connect) -> Peer | None:
        """Have one side connect; return the peer, or None after noting why there is none.

        Args:
            side: Who asks.
            target: For whom.
            connect: Does it.
        """
        side.config.status.phase = "puncturing"
        began_at = trio.current_time()
        try:
            with trio.fail_after(puncture_limit_s(side.limits)):
                peer = await connect()
        except trio.TooSlowError:
            self.note_failure(side, target, "the puncture did not end in its time")
            return None
        except (NatswarmError, trio.BrokenResourceError) as error:
            self.note_failure(
                side, target, str(error), is_refused=isinstance(error, PunctureFailed)
            )
            return None
        self._connect_s = trio.current_time() - began_at
        self.note_success(side, target)
        return peer

    def note_success(self, side: OpenSide, peer_id: PeerId) -> None:
        """Take note of the path."""
        side.config.status.phase = "measuring"
        reports = [each for each in side.punctures_with(peer_id) if each.is_ok]
        self._result, self._reason = Result.OK, ""
        if reports:
            report = reports[-1]
            self._strategy, self._hole_s = report.strategy, report.seconds
            self._reason = f"{report.strategy} found a path"

    def note_failure(
        self, side: OpenSide, peer_id: PeerId, reason: str, *, is_refused: bool = False
    ) -> None:
        """Take note that there is no path, and why.

        Args:
            side: Who asked.
            peer_id: For whom.
            reason: Why.
            is_refused: Whether a puncture was tried in vain, or is not worth a try.
        """
        reports = side.punctures_with(peer_id)
        if side.has_begun(peer_id):
            self._result = Result.FAILED
        elif is_refused:
            self._result = Result.FAILED if self.slot.strategy == AUTO else Result.SKIPPED
        else:
            self._result = Result.VOID
        if reports:
            self._strategy = reports[-1].strategy
        self._reason = side.config.words(reason)

    def note_quality(self, side: OpenSide, quality: PathQuality | None) -> None:
        """Take note of what was measured over the path."""
        if quality is not None:
            trouble = side.config.words(quality.trouble)
            self._quality = msgspec.structs.replace(quality, trouble=trouble)

    def note_skipped(self, reason: str) -> None:
        """Take note that nothing is to be tried here."""
        self._result, self._reason = Result.SKIPPED, reason

    def note_bench_failure(self, error: BenchFailed | ExceptionGroup[BenchFailed]) -> None:
        """Take note of what kept the attempt from being made."""
        errors = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
        self._result = Result.VOID
        self._reason = "; ".join(str(each) for each in errors)

    def record(self, left: SideSeen | None, right: SideSeen | None) -> AttemptRecord:
        """Return the attempt as written down."""
        result, reason = self._result or Result.VOID, self._reason
        if self._outage and result is not Result.OK:
            result, reason = Result.VOID, self._outage
        elif self._outage and self._quality is None:
            self._quality = PathQuality(trouble=self._outage)
        elif result is Result.FAILED and self._alarms:
            reason += f"; meanwhile {'; '.join(self._alarms)}"
        return AttemptRecord(
            at=utc_text(self.clock()),
            key=self.slot.key,
            round_index=self.slot.round_index,
            wanted_strategy=self.slot.strategy,
            direction=self.slot.direction.value,
            repeat=self.slot.repeat,
            seed=self.seed,
            began_at=self.began_at,
            result=result,
            reason=reason,
            strategy=self._strategy,
            hole_s=None if self._hole_s is None else round(self._hole_s, 4),
            connect_s=None if self._connect_s is None else round(self._connect_s, 4),
            left=left,
            right=right,
            quality=self._quality,
        )
