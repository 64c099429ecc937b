"""Lifetimes over the emulator's knobs: right within their intervals, unknown, but never wrong.

Run with `-s` to see how good the intervals are.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from laboratory import Laboratory

from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.lifetime import LifetimeTest, plan_lifetimes
from natswarm.nat.profile import NatProfile
from natswarm.nat.survival import Survival, geometric_grid
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.ports import Blocks, Preserving, Uniform

LAWS = (Preserving(), Uniform(), Blocks(size=1024))


def measure(behaviour: NatBehaviour, seed: int, loss: float = 0.0, **profile: object) -> Laboratory:
    laboratory = Laboratory(behaviour, seed, loss=loss)
    findings = laboratory.findings
    findings.profile = replace(findings.profile, **profile)
    bound = LifetimeTest.packets(findings)
    test = laboratory.run(LifetimeTest, LifetimeTest.port_count(findings))
    assert test.packet_count <= bound, f"{test.packet_count} packets, at most {bound} were stated"
    assert laboratory.world.now <= LifetimeTest.duration_s + 10
    return laboratory


def random_behaviour(rng: random.Random) -> NatBehaviour:
    unreplied, replied = sorted(math.exp(rng.uniform(math.log(8), math.log(200))) for _ in "ab")
    return NatBehaviour(
        mapping=rng.choice(list(Mapping)),
        filtering=rng.choice(list(Filtering)),
        allocation=rng.choice(LAWS),
        unreplied_lifetime_s=unreplied,
        replied_lifetime_s=replied,
        refreshed_by_inbound=rng.random() < 0.5,
        absolute_lifetime_s=rng.choice([None, None, (48.0, 75.0), (30.0, 30.0)]),
    )


def judge(profile: NatProfile, behaviour: NatBehaviour) -> dict[str, str]:
    """Say of each field whether it is right, unknown or wrong."""
    age = behaviour.absolute_lifetime_s
    expected: dict[str, tuple[float, float]] = {
        "idle_unreplied_s": (behaviour.unreplied_lifetime_s,) * 2,
        "idle_lifetime_s": (behaviour.replied_lifetime_s,) * 2,
        "absolute_lifetime_s": (math.inf, math.inf) if age is None else age,
    }
    verdicts = {}
    for name, (low, high) in expected.items():
        found = getattr(profile, name)
        if found is None:
            verdicts[name] = "unknown"
        else:
            verdicts[name] = "right" if low / 1.13 <= found <= high * 1.13 else "wrong"
    refreshes = profile.inbound_refreshes
    verdicts["inbound_refreshes"] = (
        "unknown"
        if refreshes is None
        else "right"
        if refreshes is behaviour.refreshed_by_inbound
        else "wrong"
    )
    return verdicts


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.1])
def test_random_lifetimes_are_found_out(loss: float) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    held = estimated = packets = 0
    seconds = []
    for seed in range(40):
        behaviour = random_behaviour(random.Random(f"lifetime/{seed}"))
        laboratory = measure(behaviour, seed, loss)
        findings = laboratory.findings
        verdicts = judge(findings.profile, behaviour)
        counts.update(verdicts.items())
        if "wrong" in verdicts.values():
            print(f"seed {seed}: {verdicts}, {findings.intervals} of {behaviour}")
        for name in findings.unknown:
            assert getattr(findings.profile, name) is None
        for name, truth in (
            ("idle_unreplied_s", behaviour.unreplied_lifetime_s),
            ("idle_lifetime_s", behaviour.replied_lifetime_s),
        ):
            if name in findings.intervals:
                estimated += 1
                held += findings.intervals[name].low <= truth <= findings.intervals[name].high
        packets += laboratory.test.packet_count
        seconds.append(laboratory.world.now)
    for name in sorted({name for name, _ in counts}):
        print(f"loss {loss:.0%} {name}: { {v: c for (n, v), c in counts.items() if n == name} }")
    print(
        f"loss {loss:.0%}: {held} of {estimated} intervals hold; {packets / 40:.0f} packets, "
        f"{sum(seconds) / 40:.0f} s on average, {max(seconds):.0f} s at most"
    )
    assert not [key for key in counts if key[1] == "wrong"]
    assert counts["idle_lifetime_s", "right"] >= 15
    assert counts["absolute_lifetime_s", "right"] >= 34
    # 90 % of some 60: fewer than 46 happen once in 1,000 times.
    assert held >= 0.76 * estimated


def test_it_takes_little_more_than_the_lifetime() -> None:
    for lifetime_s in (100.0, 180.0):
        behaviour = NatBehaviour(
            mapping=Mapping.EIM, filtering=Filtering.APDF, replied_lifetime_s=lifetime_s
        )
        laboratory = measure(behaviour, 1)
        assert laboratory.world.now <= 1.4 * lifetime_s
        assert laboratory.findings.profile.inbound_refreshes is True


def test_what_outlives_the_test_is_infinite() -> None:
    behaviour = NatBehaviour(
        mapping=Mapping.APDM, filtering=Filtering.APDF, replied_lifetime_s=350.0
    )
    findings = measure(behaviour, 1, 0.01).findings
    assert findings.profile.idle_lifetime_s == math.inf
    assert findings.profile.inbound_refreshes is None
    assert findings.intervals["idle_lifetime_s"].low >= 299


@pytest.mark.parametrize("quota", [48, 64, 128])
@pytest.mark.parametrize("mapping", Mapping)
def test_it_makes_do_with_a_quota(quota: int, mapping: Mapping) -> None:
    behaviour = NatBehaviour(
        mapping=mapping,
        filtering=Filtering.APDF,
        allocation=Uniform(),
        unreplied_lifetime_s=20.0,
        replied_lifetime_s=65.0,
        max_mappings=quota,
    )
    for seed, loss in itertools.product(range(2), (0.0, 0.01)):
        laboratory = Laboratory(behaviour, seed, loss=loss)
        findings = laboratory.findings
        laboratory.survey(40)  # whose mappings are still there
        findings.profile = replace(findings.profile, max_mappings=quota)
        laboratory.run(LifetimeTest, LifetimeTest.port_count(findings))
        profile, intervals = findings.profile, findings.intervals
        assert profile.idle_lifetime_s is not None, findings.unknown
        assert profile.idle_unreplied_s is not None, findings.unknown
        assert profile.idle_lifetime_s == pytest.approx(65, rel=0.3)
        assert profile.idle_unreplied_s == pytest.approx(20, rel=0.3)
        assert intervals["idle_lifetime_s"].low < 67
        assert profile.inbound_refreshes is True


def test_a_quota_too_small_is_a_reason() -> None:
    behaviour = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF, max_mappings=16)
    laboratory = Laboratory(behaviour, 1)
    findings = laboratory.findings
    findings.profile = replace(findings.profile, max_mappings=16)
    assert plan_lifetimes(findings) is None
    laboratory.run(LifetimeTest, 0)
    assert "too few mappings" in findings.unknown["idle_lifetime_s"]
    assert not laboratory.sent


def test_nobody_to_ask_is_a_reason() -> None:
    behaviour = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF)
    laboratory = Laboratory(behaviour, 1, observer_count=0)
    laboratory.run(LifetimeTest, 0)
    assert "nobody" in laboratory.findings.unknown["absolute_lifetime_s"]


def test_a_loss_below_the_oldest_that_lived_says_nothing() -> None:
    survival = Survival(300.0)
    survival.add_dead([10.0, 10.5, 11.0, 12.0])
    for age in geometric_grid(11, 60, 18):
        survival.add_alive(age)
    survival.add_dead([66.0, 66.5, 67.0, 68.0])
    assert survival.dead_count == 1
    middle, interval = survival.posterior(0.02)
    assert 59.9 < interval.low < middle < interval.high < 66.5


def test_one_that_lived_too_long_is_a_mistake() -> None:
    survival = Survival(300.0)
    for age in (20.0, 22.0, 24.0, 26.0, 100.0):
        survival.add_alive(age)
    for age in (29.0, 32.0, 35.0, 38.0):
        survival.add_dead([age, age + 0.5, age + 1.1, age + 1.9])
    _, interval = survival.posterior(0.02)
    assert 26 <= interval.low < interval.high <= 29


def test_one_silence_alone_leaves_doubt() -> None:
    survival = Survival(300.0)
    survival.add_alive(60.0)
    survival.add_dead([66.0])
    assert survival.posterior(0.2)[1].high > 100


def test_the_intervals_of_a_grid_are_calibrated() -> None:
    rng = random.Random(5)
    held = 0
    for _ in range(4000):
        truth = math.exp(rng.uniform(math.log(6), math.log(250)))
        survival = Survival(300.0)
        for duration in geometric_grid(5, 300, 44):
            tries = [duration + later for later in (0.0, 0.5, 1.1, 1.9)]
            heard = [each for each in tries if each < truth and rng.random() > 0.02]
            if heard:
                survival.add_alive(heard[0])
            else:
                survival.add_dead(tries)
        _, interval = survival.posterior(0.02)
        held += interval.low <= truth <= interval.high
    print(f"{held / 40:.1f} % of the intervals hold the truth")
    assert 0.88 <= held / 4000 <= 0.92
