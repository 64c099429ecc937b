"""A field test on the virtual internet: results, reasons, measurements, a pulled cable."""

from __future__ import annotations

import msgspec
import pytest
import trio

from natswarm.errors import ConfigurationError
from natswarm.field_test.plan import Direction, FieldTestPlan, LimitsPlan, MeasurePlan
from natswarm.field_test.records import Alarm, AttemptRecord, End, Record, Result, Start, Survey

MEASURE = MeasurePlan(ping_count=5, bulk_s=1.0, bulk_bytes=200_000)


def plan(**values) -> FieldTestPlan:
    values = {"repeats": 1, "pause_s": 5.0, "measure": MEASURE, **values}
    return FieldTestPlan(**values)


async def test_every_slot_gets_one_result_with_all_that_was_measured(
    autojump_clock, open_swarm, make_bed
):
    async with open_swarm(seed=3) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "kpn-nl")
        await bed.field_test(plan(repeats=2)).run()
    attempts = bed.of(AttemptRecord)
    assert [each.key for each in attempts] == [
        "0/auto/left-to-right/1",
        "0/auto/right-to-left/1",
        "0/auto/left-to-right/2",
        "0/auto/right-to-left/2",
    ]
    for attempt in attempts:
        assert attempt.result is Result.OK, attempt
        assert attempt.reason == f"{attempt.strategy} found a path"
        assert attempt.hole_s > 0
        assert attempt.connect_s >= attempt.hole_s
        assert attempt.left.nat.mapping == "EIM"
        assert attempt.right.nat.mapping == "APDM"
        assert attempt.right.ports_seen
        assert attempt.left.handed_count > attempt.probe_count / 4
        assert attempt.left.is_controlling is not attempt.right.is_controlling
        quality = attempt.quality
        assert len(quality.rtts_ms) == 5
        assert min(quality.rtts_ms) > 1
        assert quality.out_bytes_per_s > 10_000
        assert quality.back_bytes_per_s > 10_000
        assert max(quality.out_loss, quality.back_loss) < 0.05
        assert not quality.trouble
    assert len({each.seed for each in attempts}) == 4
    assert isinstance(bed.records[-1], End)
    # What is written down can be read again.
    for record in bed.records:
        assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record


async def test_a_failure_says_why(autojump_clock, open_swarm, make_bed):
    async with open_swarm(seed=4) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("orange-bg", "orange-bg")
        limits = LimitsPlan(probe_count=300, duration_s=10.0)
        await bed.field_test(plan(limits=limits, directions=(Direction.LEFT_TO_RIGHT,))).run()
    [attempt] = bed.of(AttemptRecord)
    assert attempt.result in (Result.FAILED, Result.VOID)
    assert attempt.reason
    print(attempt.reason)


async def test_a_pulled_cable_voids_the_attempt_and_the_slot_is_made_again(
    autojump_clock, open_swarm, make_bed
):
    async with open_swarm(seed=5) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "linux-home")
        test = bed.field_test(plan(repeats=2))

        async def pull() -> None:
            await bed.wait(lambda: len(bed.of(Start)) == 2)
            await trio.sleep(1)
            mend = swarm.cut("left")
            bed.sides[0].link.is_unplugged = True
            await trio.sleep(30)
            assert "plug it in again" in test.status.waiting
            mend()
            bed.sides[0].link.is_unplugged = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull)
            await test.run()
    attempts = bed.of(AttemptRecord)
    assert [each.result.value for each in attempts] == ["ok", "void", "ok", "ok", "ok"]
    assert attempts[1].reason.startswith("the interface usb0 is gone")
    assert attempts[1].key == attempts[2].key
    assert attempts[1].seed != attempts[2].seed
    assert [(each.what, each.is_over) for each in bed.of(Alarm)][:1] == [("down", False)]
    assert test.status.done_count == 4


async def test_a_cable_pulled_after_the_hole_leaves_the_result(
    autojump_clock, open_swarm, make_bed
):
    async with open_swarm(seed=13) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "linux-home")
        stay = MeasurePlan(ping_count=1, bulk_s=0, stay_s=40)
        test = bed.field_test(plan(measure=stay, directions=(Direction.LEFT_TO_RIGHT,)))

        async def pull() -> None:
            await bed.wait(lambda: bed.sides[0].status.phase == "measuring")
            bed.sides[0].link.is_unplugged = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull)
            await test.run()
    [attempt] = bed.of(AttemptRecord)
    assert attempt.result is Result.OK
    assert "is gone" in attempt.quality.trouble


async def test_an_interface_that_stays_away_ends_the_test_and_it_resumes(
    autojump_clock, open_swarm, make_bed
):
    async with open_swarm(seed=6) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "linux-home")
        test = bed.field_test(plan(), patience_s=60)
        bed.sides[1].link.is_unplugged = True
        with pytest.raises(ConfigurationError, match=r"usb0 is gone.*--resume"):
            await test.run()
        bed.sides[1].link.is_unplugged = False
        await bed.field_test(plan(), earlier=list(bed.records)).run()
        assert len(bed.of(AttemptRecord)) == 2
        await bed.field_test(plan(), earlier=list(bed.records)).run()
    assert len(bed.of(AttemptRecord)) == 2, "nothing is repeated"


async def test_a_system_that_swallows_datagrams_is_told_at_once(
    autojump_clock, open_swarm, make_bed
):
    async with open_swarm(seed=10) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "kpn-nl")
        bed.sides[1].link.is_stuck = True
        await bed.field_test(plan(directions=(Direction.LEFT_TO_RIGHT,))).run()
    [alarm] = [each for each in bed.of(Alarm) if not each.is_over]
    assert (alarm.side, alarm.what) == ("right", "swallowed")
    assert "stands still" in alarm.text


async def test_a_carrier_that_falls_silent_is_told_at_once(autojump_clock, open_swarm, make_bed):
    async with open_swarm(seed=11) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "linux-home")
        stay = MeasurePlan(ping_count=1, bulk_s=0, stay_s=40)
        test = bed.field_test(plan(measure=stay, directions=(Direction.LEFT_TO_RIGHT,)))
        cut_at = []

        async def fall_silent() -> None:
            await bed.wait(lambda: bed.sides[0].status.phase == "measuring")
            swarm.cut("right")
            cut_at.append(trio.current_time())
            await bed.wait(lambda: bed.of(Alarm))
            assert trio.current_time() - cut_at[0] < 3.0

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fall_silent)
            await test.run()
    alarms = [(each.side, each.what) for each in bed.of(Alarm)]
    assert alarms[0] == ("right", "unanswered")
    [attempt] = bed.of(AttemptRecord)
    assert attempt.result is Result.OK, "the hole was there"
    assert attempt.quality.trouble
    assert attempt.quality.stayed_s < 40


async def test_without_helpers_only_open_sides_meet(autojump_clock, open_swarm, make_bed):
    async with open_swarm(seed=7) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("public", "linux-home", with_helpers=False)
        await bed.field_test(plan()).run()
    for attempt in bed.of(AttemptRecord):
        assert attempt.result is Result.OK, attempt


async def test_a_strategy_that_does_not_apply_is_skipped(autojump_clock, open_swarm, make_bed):
    async with open_swarm(seed=8) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "linux-home")
        await bed.field_test(plan(strategies=("simultaneous-open", "two-sided-birthday"))).run()
    results = {each.key: each for each in bed.of(AttemptRecord)}
    for key, attempt in results.items():
        wanted = Result.OK if "simultaneous" in key else Result.SKIPPED
        assert attempt.result is wanted, attempt
    assert "not what these NATs call for" in results["0/two-sided-birthday/left-to-right/1"].reason


async def test_lifetimes_are_surveyed_once_a_round(autojump_clock, open_swarm, make_bed):
    async with open_swarm(seed=12) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "kpn-nl")
        long = plan(lifetimes=True, directions=(Direction.LEFT_TO_RIGHT,))
        await bed.field_test(long).run()
        await bed.field_test(long, earlier=list(bed.records)).run()
    surveys = bed.of(Survey)
    assert [each.side for each in surveys] == ["left", "right"]
    for survey in surveys:
        assert survey.nat.mapping
        found = {name for name in ("idle_lifetime_s", "remotes_seen") if getattr(survey.nat, name)}
        assert found | set(survey.unknown), "what is not known has its reason"


async def test_no_helper_voids_and_stops_after_three(autojump_clock, open_swarm, make_bed):
    async with open_swarm(seed=9) as swarm:
        bed = make_bed(swarm)
        await bed.add_sides("linux-home", "linux-home")
        for name in ("obs0", "obs1"):
            await swarm.crash(name)
        with pytest.raises(ConfigurationError, match="reaches no helper"):
            await bed.field_test(plan()).run()
    assert [each.result for each in bed.of(AttemptRecord)] == [Result.VOID] * 3
