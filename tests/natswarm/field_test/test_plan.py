"""Plan files: what they mean, and what they cannot be."""

from __future__ import annotations

import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from natswarm.errors import ConfigurationError
from natswarm.field_test.attempt import limits_of, seed_of
from natswarm.field_test.plan import (
    Direction,
    FieldTestPlan,
    LimitsPlan,
    MeasurePlan,
    read_plan,
)
from natswarm.puncture.strategy import Limits, Strategy

PLANS = Path(__file__).parents[3] / "field-tests" / "plans"

PLAN = """
repeats = 2
directions = ["right-to-left"]
strategies = ["auto", "two-sided-birthday"]
times = ["now", "08:30", "20:30"]
[limits]
probes_per_s = 250
[measure]
bulk_s = 0
"""


def test_a_plan_makes_every_combination_once():
    plan = read_plan(PLAN)
    keys = [slot.key for slot in plan.slots()]
    assert len(keys) == len(set(keys)) == plan.slot_count == 12
    assert keys[:3] == [
        "0/auto/right-to-left/1",
        "0/two-sided-birthday/right-to-left/1",
        "0/auto/right-to-left/2",
    ]
    assert plan.directions == (Direction.RIGHT_TO_LEFT,)
    assert plan.limits.probes_per_s == 250
    assert read_plan("") == FieldTestPlan()


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.name)
def test_the_plans_that_are_shipped_can_be(path: Path):
    assert read_plan(path.read_text()).slot_count


def test_the_readme_names_every_key():
    readme = (PLANS.parent / "README.md").read_text()
    for kind in (FieldTestPlan, LimitsPlan, MeasurePlan):
        for name in kind.__struct_fields__:
            assert f"`{name}`" in readme or f"[{name}]" in readme, name


def test_without_a_word_on_limits_the_planner_has_its_own():
    assert limits_of(FieldTestPlan().limits, "auto") == Limits()
    forced = limits_of(FieldTestPlan().limits, "two-sided-birthday")
    assert forced.strategies == (Strategy.TWO_SIDED_BIRTHDAY,)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("repeat = 2", "unknown field `repeat`"),
        ("repeats = 0", "repeats"),
        ("strategies = []", "at least one"),
        ('strategies = ["auto", "auto"]', "none twice"),
        ('strategies = ["magic"]', "no strategy 'magic'; there are auto, "),
        ('times = ["25:00"]', "'25:00' is no time"),
        ("repeats = 100000", "over the bound"),
        ("[limits]\nprobes_per_s = 1e6", "probes_per_s"),
        ("[measure]\nping_count = -1", "ping_count"),
        ("repeats =", "plan cannot be"),
    ],
)
def test_what_cannot_be_is_told(text: str, complaint: str):
    with pytest.raises(ConfigurationError, match=complaint):
        read_plan(text)


def test_rounds_begin_at_their_times_and_in_order():
    plan = read_plan('times = ["now", "08:30", "20:30", "08:00"]')
    begun = datetime.datetime(2026, 3, 1, 9, 0, tzinfo=datetime.UTC)
    starts = plan.round_starts(begun)
    assert [start.isoformat()[:16] for start in starts] == [
        "2026-03-01T09:00",
        "2026-03-02T08:30",
        "2026-03-02T20:30",
        "2026-03-03T08:00",
    ]
    assert all(first <= second for first, second in pairwise(starts))


def test_each_try_has_a_seed_of_its_own_that_anybody_can_work_out():
    seeds = {seed_of(1, f"0/auto/left-to-right/{n}", tries) for n in range(50) for tries in (0, 1)}
    assert len(seeds) == 100
    assert seed_of(1, "0/auto/left-to-right/1", 0) == 3514078588
