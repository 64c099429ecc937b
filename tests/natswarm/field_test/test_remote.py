"""Two devices that agree through their helpers: each writes its half, the report joins them."""

from __future__ import annotations

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from natswarm.errors import InviteError
from natswarm.field_test.board import Board, Note
from natswarm.field_test.plan import FieldTestPlan, MeasurePlan
from natswarm.field_test.records import AttemptRecord, Begin, End, Result
from natswarm.field_test.remote import FieldTestLink, RemoteBench
from natswarm.field_test.schedule import FieldTest
from natswarm.field_test.tally import load_tally
from natswarm.identity import Identity, PeerId

PLAN = FieldTestPlan(
    repeats=1, pause_s=5.0, measure=MeasurePlan(ping_count=3, bulk_s=0.5, bulk_bytes=50_000)
)


def identity(name: str) -> Identity:
    return Identity(name.encode().ljust(32, b"."))


class Device:
    """One of the two, with its journal in memory."""

    def __init__(self, bed, index: int, plan: FieldTestPlan) -> None:
        self.records = []
        self.plan = plan
        self._bed = bed
        self._side = bed.sides[index]
        self._identity = identity(self._side.name)
        self._other = identity("left").peer_id if index == 1 else None

    async def run(self) -> None:
        bench = RemoteBench(
            "0123456789abcdef",
            self.plan,
            self._side,
            self._identity,
            self._other,
            self.records.append,
            clock=self._bed.clock,
        )
        test = FieldTest(
            self.plan,
            list(self.records),
            bench,
            self.records.append,
            begun_at_s=self._bed.clock(),
            clock=self._bed.clock,
        )
        await test.run()

    @property
    def attempts(self) -> list[AttemptRecord]:
        return [each for each in self.records if isinstance(each, AttemptRecord)]

    def write(self, folder) -> None:
        begin = Begin(
            at="2026-01-01T00:00:00.000Z",
            session="0123456789abcdef",
            mode="host",
            plan=self.plan,
            sides=(self._side.record(),),
            versions={},
            helper_count=2,
        )
        folder.mkdir()
        lines = [msgspec.json.encode(record) for record in (begin, *self.records)]
        (folder / "journal.jsonl").write_bytes(b"\n".join(lines) + b"\n")


async def test_two_devices_go_through_one_plan(autojump_clock, open_swarm, make_bed, tmp_path):
    async with open_swarm(seed=21) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "kpn-nl")
        devices = [Device(bed, index, PLAN) for index in range(2)]
        with trio.fail_after(600):
            async with trio.open_nursery() as nursery:
                for device in devices:
                    nursery.start_soon(device.run)
    for device in devices:
        assert [each.key for each in device.attempts] == [
            "0/auto/left-to-right/1",
            "0/auto/right-to-left/1",
        ]
        for attempt in device.attempts:
            assert attempt.result is Result.OK, attempt
            # Compared over the path: each has both halves.
            assert attempt.left.nat.mapping == "EIM"
            assert attempt.right.nat.mapping == "APDM"
            assert len(attempt.quality.rtts_ms) == 3
            assert attempt.hole_s > 0
        assert isinstance(device.records[-1], End)
    for index, device in enumerate(devices):
        device.write(tmp_path / str(index))
    tally = load_tally([tmp_path / "0", tmp_path / "1"])
    assert len(tally.meetings) == 2
    assert sorted(tally.cells()) == [("XX left", "XX right"), ("XX right", "XX left")]


async def test_a_failure_is_known_on_both_devices(autojump_clock, open_swarm, make_bed, tmp_path):
    plan = msgspec.structs.replace(PLAN, strategies=("two-sided-birthday",))
    async with open_swarm(seed=22) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("orange-bg", "orange-bg")
        devices = [Device(bed, index, plan) for index in range(2)]
        for device in devices:
            limits = msgspec.structs.replace(plan.limits, probe_count=200, duration_s=5.0)
            device.plan = msgspec.structs.replace(plan, limits=limits, strategies=("auto",))
        with trio.fail_after(600):
            async with trio.open_nursery() as nursery:
                for device in devices:
                    nursery.start_soon(device.run)
    for device in devices:
        assert [each.result for each in device.attempts] == [Result.FAILED] * 2
        assert all(each.reason for each in device.attempts)


async def test_a_device_that_lost_its_result_goes_on_with_the_other(
    autojump_clock, open_swarm, make_bed
):
    async with open_swarm(seed=23) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "linux-home")
        left, right = (Device(bed, index, PLAN) for index in range(2))

        async def crash_once() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(right.run)
                await bed.wait(lambda: bool(left.attempts and right.attempts))
                nursery.cancel_scope.cancel()
            # Its first result never reached the disk.
            right.records = [each for each in right.records if not isinstance(each, AttemptRecord)]
            await right.run()

        with trio.fail_after(2000):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(left.run)
                nursery.start_soon(crash_once)
    assert [each.result for each in left.attempts if each.result is not Result.VOID] == [
        Result.OK,
        Result.OK,
    ]
    assert [each.result for each in right.attempts if each.result is not Result.VOID] == [
        Result.SKIPPED,
        Result.OK,
    ]
    assert "the other one has the result" in right.attempts[0].reason


LINK = FieldTestLink(
    session="s", host=bytes(range(32)), plan=PLAN, helpers=("natswarm:x",), carrier="NL KPN"
)


@given(st.data())
def test_a_changed_link_is_refused_or_another_link(data):
    text = str(LINK)
    index = data.draw(st.integers(0, len(text) - 1))
    changed = text[:index] + data.draw(st.characters()) + text[index + 1 :]
    try:
        link = FieldTestLink.parse(changed)
        link.invites()
    except InviteError:
        return
    assert isinstance(link.host_id, PeerId)


@pytest.mark.parametrize(
    "service",
    [
        "field-test/s/right/3/abcd",
        "field-test/s/right/-3/abcd/ready",
        "field-test/s/right/²/abcd/ready",
        "field-test/s/right/99999999/abcd/ready",
        "field-test/other/right/3/abcd/ready",
        "field-test/s/left/3/abcd/ready",
        "llmload/stage/0-2",
        "",
    ],
)
def test_notes_of_others_are_not_taken_for_the_other_side(service: str):
    board = Board(None, "s", "left", None)
    assert board._parse_untrusted(service) is None
    assert board._parse_untrusted("field-test/s/right/3/abcd/ready") == Note(3, "abcd", "ready")


def test_a_link_is_read_back_and_damage_is_told():
    link = LINK
    assert FieldTestLink.parse(f" {link}\n") == link
    for damaged in (str(link)[:-9], str(link).replace("field", "yield"), "natswarm:abc"):
        with pytest.raises(InviteError):
            FieldTestLink.parse(damaged)
