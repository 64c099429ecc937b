"""One side of a field test whose other side is another device.

Both devices go through the same plan, which came with the link, each with its own journal. They
begin an attempt together by their notes at the helpers (`board.py`), and compare over the path once
there is one; of a failure each writes down its own half, which the report joins. A device that lost
its result in a crash goes on with the other one: that has the result.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import time
from collections.abc import Callable
from functools import partial

import msgspec
import trio

from natswarm.discovery.invite import Invite
from natswarm.errors import InviteError, NatswarmError
from natswarm.field_test.attempt import AttemptRun, limits_of, puncture_limit_s, seed_of
from natswarm.field_test.board import LOOK_INTERVAL_S, Board, Seen
from natswarm.field_test.local import survey_side
from natswarm.field_test.plan import Direction, FieldTestPlan, Slot
from natswarm.field_test.quality import PROTOCOL, Comparison, answer_measurement, measure_path
from natswarm.field_test.records import AttemptRecord, Record, SideSeen, Survey
from natswarm.field_test.side import BenchFailed, OpenSide, SideConfig, open_side
from natswarm.identity import Identity, PeerId
from natswarm.net.message_stream import MessageStream
from natswarm.net.nursery import open_private_nursery
from natswarm.net.peer import Peer
from natswarm.net.stream import Stream

__all__ = ["FieldTestLink", "RemoteBench"]

SCHEME = "natswarm-field-test:"
LINK_BYTES_MAX = 32_768

# How long one device waits for the other to be at the same slot.
MEET_TIMEOUT_S = 900.0
# After the other side has connected, its measurement comes at once; then silence ends it.
MEASURE_SPARE_S = 60.0


class FieldTestLink(msgspec.Struct, frozen=True, kw_only=True):
    """All that the second device needs.

    Attributes:
        session: Name of the test.
        host: Key of the device that made the link.
        plan: What to do.
        helpers: Invites.
        carrier: Label of the host's carrier.
    """

    session: str
    host: bytes
    plan: FieldTestPlan
    helpers: tuple[str, ...]
    carrier: str

    def __str__(self) -> str:
        """As text to hand over."""
        return SCHEME + base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")

    @property
    def host_id(self) -> PeerId:
        """Who made it."""
        return PeerId(self.host)

    @classmethod
    def parse(cls, text: str) -> FieldTestLink:
        """Read a link that a user pasted.

        Raises:
            InviteError: Not a link, or damaged.
        """
        stripped = "".join(text.split())
        if not stripped.startswith(SCHEME):
            raise InviteError(f"a link starts with {SCHEME!r}; this starts with {stripped[:20]!r}")
        encoded = stripped.removeprefix(SCHEME)
        try:
            data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
            if len(data) > LINK_BYTES_MAX:
                raise ValueError("too long")
            link = msgspec.msgpack.decode(data, type=cls)
            link.host_id  # noqa: B018 - checks its length
        except (msgspec.MsgspecError, binascii.Error, ValueError, RecursionError) as error:
            raise InviteError(
                f"the link is damaged ({error}); ask for it again and paste all of it"
            ) from error
        return link

    def invites(self) -> tuple[Invite, ...]:
        """Return the helpers.

        Raises:
            InviteError: One is damaged.
        """
        return tuple(Invite.parse(text) for text in self.helpers)


class RemoteBench:
    """Makes one side's part of attempts with another device; a `schedule.Bench`.

    Args:
        session: Name of the test.
        plan: What both do.
        side: Ours; the host is `left`.
        identity: Ours, the same for the whole test.
        other: Who the other device is; None: whoever knows the session.
        append: Writes a record.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        session: str,
        plan: FieldTestPlan,
        side: SideConfig,
        identity: Identity,
        other: PeerId | None,
        append: Callable[[Record], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._session = session
        self._plan = plan
        self._side = side
        self._identity = identity
        self._other = other
        self._append = append
        self._clock = clock
        self._indices = {slot: index for index, slot in enumerate(plan.slots())}

    @property
    def sides(self) -> tuple[SideConfig]:
        """Ours alone."""
        return (self._side,)

    async def attempt(self, slot: Slot, try_index: int) -> AttemptRecord:
        """See `schedule.Bench.attempt`."""
        seed = seed_of(self._plan.seed, f"{self._side.name}/{slot.key}", try_index)
        run = AttemptRun(slot, seed, self._append, self._clock)
        try:
            async with open_side(
                self._side,
                identity=self._identity,
                limits=limits_of(self._plan.limits, slot.strategy),
                seed=seed,
                on_notice=run.take_notice,
            ) as side:
                part = _Part(self, run, side)
                with run.scope:
                    await part.carry_out()
                return part.record()
        except BenchFailed as error:
            run.note_bench_failure(error)
            return run.record(None, None)
        finally:
            self._side.status.phase = ""

    async def survey(self, round_index: int) -> list[Survey]:
        """See `schedule.Bench.survey`."""
        survey = await survey_side(
            self._side, self._identity, self._plan, round_index, self._append, clock=self._clock
        )
        return [survey]


class _Part:
    """Our part of one attempt."""

    def __init__(self, bench: RemoteBench, run: AttemptRun, side: OpenSide) -> None:
        self._plan = bench._plan
        self._index = bench._indices[run.slot]
        self._run = run
        self._side = side
        self._board = Board(side.node, bench._session, side.config.name, bench._other)
        self._peer_id: PeerId | None = None
        self._comparison = Comparison()
        self._compared = trio.Event()
        side.node.serve(PROTOCOL, self._answer)

    @property
    def _is_asker(self) -> bool:
        is_left = self._side.config.name == "left"
        return is_left is (self._run.slot.direction is Direction.LEFT_TO_RIGHT)

    async def carry_out(self) -> None:
        await self._side.prepare()
        other = await self._meet()
        if other is None:
            return
        self._peer_id = other.peer_id
        if self._is_asker:
            await self._ask(other.peer_id)
        else:
            await self._be_asked(other)

    def record(self) -> AttemptRecord:
        """Return what we know of the attempt."""
        if self._peer_id is None:
            return self._run.record(None, None)
        mine, theirs = self._side.seen(self._peer_id), self._comparison.side
        if self._side.config.name == "left":
            return self._run.record(mine, theirs)
        return self._run.record(theirs, mine)

    async def _meet(self) -> Seen | None:
        """Wait until the other device is at this slot; None if it is past it."""
        self._side.config.status.phase = "waiting for the other device"
        await self._board.tell(self._index, "ready")
        with trio.move_on_after(MEET_TIMEOUT_S):
            while True:
                other = await self._board.wait()
                if other.note.slot_index > self._index:
                    self._run.note_skipped(
                        "this device was interrupted in it; the other one has the result"
                    )
                    return None
                if other.note.slot_index == self._index and other.note.state == "ready":
                    return other
                await trio.sleep(LOOK_INTERVAL_S)
        raise BenchFailed(f"the other device did not come within {MEET_TIMEOUT_S / 60:.0f} minutes")

    async def _ask(self, peer_id: PeerId) -> None:
        run, side = self._run, self._side
        # The other one must have seen that we are ready, or it would not answer for this slot.
        await trio.sleep(2 * LOOK_INTERVAL_S)
        peer = await run.puncture(side, peer_id, partial(side.node.connect, peer_id))
        if peer is None:
            if run.is_void:  # it is made again
                return
            await self._board.tell(self._index, "failed")
            # Until it was seen; the node is closed after this.
            await trio.sleep(4 * LOOK_INTERVAL_S)
            return
        quality, self._comparison = await measure_path(peer, self._plan.measure, side.seen(peer_id))
        run.note_quality(side, quality)

    async def _be_asked(self, other: Seen) -> None:
        """Wait until the other device has connected, or says that it could not."""
        self._side.config.status.phase = "waiting to be asked"
        with trio.move_on_after(puncture_limit_s(self._side.limits) + MEASURE_SPARE_S) as limit:
            async with open_private_nursery() as nursery:
                nursery.start_soon(self._watch_failure, other, nursery.cancel_scope)
                await self._side.wait_peer(other.peer_id)
        if limit.cancelled_caught:
            raise BenchFailed("the other device fell silent before there was a path")
        if self._run.is_over:
            return
        self._run.note_success(self._side, other.peer_id)
        measure = self._plan.measure
        pings_s = measure.ping_count * measure.ping_interval_s
        limit_s = MEASURE_SPARE_S + pings_s + 2 * measure.bulk_s + measure.stay_s
        with trio.move_on_after(limit_s):
            await self._compared.wait()
        self._run.note_quality(self._side, self._comparison.quality)

    async def _watch_failure(self, other: Seen, scope: trio.CancelScope) -> None:
        """Note when the other device says that it could not connect; then cancel."""
        while True:
            seen = await self._board.wait()
            if seen.note.word != other.note.word or seen.note.slot_index != self._index:
                self._run.note_bench_failure(BenchFailed("the other device began anew"))
                break
            if seen.note.state == "failed":
                reports = self._side.punctures_with(other.peer_id)
                reason = (reports[-1].reason if reports else "") or "the other device gave up"
                is_refused = not self._side.has_begun(other.peer_id)
                self._run.note_failure(self._side, other.peer_id, reason, is_refused=is_refused)
                break
            await trio.sleep(LOOK_INTERVAL_S)
        scope.cancel()

    async def _answer(self, stream: Stream, peer: Peer) -> None:
        if peer.peer_id != self._peer_id:
            raise NatswarmError("only the peer of the field test is answered")
        try:
            with contextlib.suppress(trio.EndOfChannel, trio.TooSlowError):
                mine: SideSeen = self._side.seen(peer.peer_id)
                self._comparison = await answer_measurement(MessageStream(stream), peer, mine)
        finally:
            self._compared.set()
