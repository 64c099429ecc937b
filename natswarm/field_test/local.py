"""Both sides on one laptop: two SIMs, two interfaces, two nodes in one process.

One process, because what it could cost does not bind and what it gives does. A side sends at most
some thousand small datagrams a second, of which one core carries tens of thousands; both sides
have one clock and one journal, and no channel between them can fail. The sides share nothing else:
each attempt gives each its own node, identity and ports, tied to its own interface. Should the
process die, the journal has everything but the attempt under way. How late the process ever was is
recorded with each attempt (`loop_lag_s`).

Without helpers nobody tells the sides their public addresses or introduces them: they get each
other's invites, which do where one has no NAT, or both are on one network.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial

import trio

from natswarm.errors import NatswarmError
from natswarm.field_test.attempt import AttemptRun, alarm_of, limits_of, seed_of
from natswarm.field_test.plan import AUTO, Direction, FieldTestPlan, Slot
from natswarm.field_test.quality import PROTOCOL, answer_measurement, measure_path
from natswarm.field_test.records import AttemptRecord, NatSeen, Record, Survey, utc_text
from natswarm.field_test.side import BenchFailed, OpenSide, SideConfig, open_side
from natswarm.field_test.stall import Notice
from natswarm.identity import Identity
from natswarm.nat.findings import NatTest
from natswarm.nat.inspection import QUICK
from natswarm.net.message_stream import MessageStream
from natswarm.net.peer import Peer
from natswarm.net.stream import Stream

__all__ = ["LONG_TESTS", "LocalBench", "survey_side"]

LONG_TESTS = QUICK | {NatTest.QUOTA, NatTest.LIFETIMES}
# After the connection stands on one side, the other needs one way of the path.
OTHER_SIDE_S = 10.0


class LocalBench:
    """Makes attempts between two sides of this device; a `schedule.Bench`.

    Args:
        plan: Bounds, and what is measured.
        left: One side.
        right: The other.
        append: Writes a record.
        clock: Seconds since 1970.
        make_identity: Returns who a node is: somebody new each time, so that nothing links the
            sessions of one device, and that either side is the controlling one at times.
    """

    def __init__(
        self,
        plan: FieldTestPlan,
        left: SideConfig,
        right: SideConfig,
        append: Callable[[Record], None],
        *,
        clock: Callable[[], float] = time.time,
        make_identity: Callable[[], Identity] = Identity.generate,
    ) -> None:
        self._plan = plan
        self._left = left
        self._right = right
        self._append = append
        self._clock = clock
        self._make_identity = make_identity

    @property
    def sides(self) -> tuple[SideConfig, SideConfig]:
        """Both."""
        return self._left, self._right

    async def attempt(self, slot: Slot, try_index: int) -> AttemptRecord:
        """See `schedule.Bench.attempt`."""
        seed = seed_of(self._plan.seed, slot.key, try_index)
        run = AttemptRun(slot, seed, self._append, self._clock)
        open_one = partial(
            open_side,
            limits=limits_of(self._plan.limits, slot.strategy),
            on_notice=run.take_notice,
        )
        try:
            async with (
                open_one(self._left, identity=self._make_identity(), seed=seed) as left,
                open_one(self._right, identity=self._make_identity(), seed=seed + 1) as right,
            ):
                with run.scope:
                    await self._carry_out(run, left, right)
                return run.record(left.seen(right.node.peer_id), right.seen(left.node.peer_id))
        except BenchFailed as error:
            run.note_bench_failure(error)
            return run.record(None, None)
        finally:
            for side in self.sides:
                side.status.phase = ""

    async def _carry_out(self, run: AttemptRun, left: OpenSide, right: OpenSide) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(left.prepare)
                nursery.start_soon(right.prepare)
        except* BenchFailed as errors:
            run.note_bench_failure(errors)
        if run.is_over:
            return
        asker, asked = left, right
        if run.slot.direction is Direction.RIGHT_TO_LEFT:
            asker, asked = right, left
        serve_measurement(asked, asker)
        connect = partial(asker.node.connect, asked.node.peer_id)
        if not (left.config.helpers and right.config.helpers):
            connect = partial(_connect_by_invites, asker, asked)
        peer = await run.puncture(asker, asked.node.peer_id, connect)
        if peer is None:
            return
        with trio.move_on_after(OTHER_SIDE_S):
            await asked.wait_peer(asker.node.peer_id)
        mine = asker.seen(asked.node.peer_id)
        quality, _ = await measure_path(peer, self._plan.measure, mine)
        run.note_quality(asker, quality)

    async def survey(self, round_index: int) -> list[Survey]:
        """See `schedule.Bench.survey`."""
        surveys: list[Survey] = []

        async def one(side: SideConfig) -> None:
            identity = self._make_identity()
            surveys.append(
                await survey_side(
                    side, identity, self._plan, round_index, self._append, clock=self._clock
                )
            )

        async with trio.open_nursery() as nursery:
            for side in self.sides:
                nursery.start_soon(one, side)
        return sorted(surveys, key=lambda each: each.side)


def serve_measurement(asked: OpenSide, asker: OpenSide) -> None:
    """Have one side answer the other's measurement."""

    async def answer(stream: Stream, peer: Peer) -> None:
        if peer.peer_id != asker.node.peer_id:
            raise NatswarmError("only the peer of the field test is answered")
        with contextlib.suppress(trio.EndOfChannel, trio.TooSlowError):
            await answer_measurement(MessageStream(stream), peer, asked.seen(peer.peer_id))

    asked.node.serve(PROTOCOL, answer)


async def _connect_by_invites(asker: OpenSide, asked: OpenSide) -> Peer:
    """Dial the other side, or else be dialled: all that can be done without a helper.

    Not both at once: of two that dial, one declines the other's wish, and it may be the wrong one.
    """
    try:
        return await asker.node.connect(await asked.node.invite())
    except NatswarmError as error:
        with contextlib.suppress(NatswarmError):
            await asked.node.connect(await asker.node.invite())
            return await asker.wait_peer(asked.node.peer_id)
        raise error from None


async def survey_side(
    side: SideConfig,
    identity: Identity,
    plan: FieldTestPlan,
    round_index: int,
    append: Callable[[Record], None],
    *,
    clock: Callable[[], float] = time.time,
) -> Survey:
    """Carry out the long tests of one side's NAT; what is not found has its reason."""
    nat: NatSeen | None = None
    unknown: dict[str, str] = {}

    def take_notice(config: SideConfig, notice: Notice) -> None:
        append(alarm_of(config, notice, key=f"survey/{round_index}", at=utc_text(clock())))

    try:
        async with open_side(
            side,
            identity=identity,
            limits=limits_of(plan.limits, AUTO),
            seed=plan.seed,
            on_notice=take_notice,
        ) as opened:
            await opened.prepare(LONG_TESTS)
            findings = opened.node.inspection
            if findings is not None:
                unknown = {name: side.words(why) for name, why in findings.unknown.items()}
            if opened.node.profile is not None:
                nat = NatSeen.of(opened.node.profile, full_addresses=side.full_addresses)
    except BenchFailed as error:
        unknown = {"everything": str(error)}
    return Survey(
        at=utc_text(clock()), round_index=round_index, side=side.name, nat=nat, unknown=unknown
    )
