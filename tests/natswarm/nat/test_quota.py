"""Quotas and rates of new mappings over the emulator's knobs: right, or unknown, but never wrong.

Run with `-s` to see how good the estimates are.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from laboratory import Laboratory

from natswarm.address import Endpoint
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.overloading import overloading_of
from natswarm.nat.quota import MAPPINGS_MAX, QuotaTest
from natswarm.nat.token_bucket import smallest_burst, while_empty
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.ports import Allocation, Blocks, Preserving, Sequential, Uniform
from natswarm.sim.rate import RateLimit

LAWS: tuple[Allocation, ...] = (Preserving(), Uniform(), Blocks(size=512, max_blocks=2))


def count(behaviour: NatBehaviour, seed: int, loss: float = 0.0, **options: int) -> Laboratory:
    laboratory = Laboratory(behaviour, seed, loss=loss, **options)
    laboratory.survey()
    findings = laboratory.findings
    bound = QuotaTest.packets(findings)
    started_at = laboratory.world.now
    test = laboratory.run(QuotaTest, QuotaTest.port_count(findings))
    assert test.packet_count <= bound, f"{test.packet_count} packets, at most {bound} were stated"
    assert laboratory.world.now - started_at <= 1.5 * QuotaTest.duration_s
    return laboratory


def random_behaviour(rng: random.Random) -> NatBehaviour:
    limit = rng.choice(["none", "quota", "rate", "both"])
    rate = RateLimit(round(math.exp(rng.uniform(0, math.log(100))), 1), rng.choice([10, 30, 100]))
    return NatBehaviour(
        mapping=rng.choice(list(Mapping)),
        filtering=rng.choice(list(Filtering)),
        allocation=rng.choice(LAWS),
        overloading=rng.random() < 0.5,
        max_mappings=rng.randint(40, 250) if limit in ("quota", "both") else None,
        subscriber_rate=rate if limit in ("rate", "both") else None,
    )


def judge(laboratory: Laboratory, behaviour: NatBehaviour) -> dict[str, str]:
    findings = laboratory.findings
    profile, limit = findings.profile, behaviour.subscriber_rate
    verdicts = {}
    found_quota = profile.max_mappings
    if "max_mappings" in findings.unknown:
        verdicts["quota"] = "unknown"
    elif found_quota is None:
        is_right = behaviour.max_mappings is None or limit is not None
        verdicts["quota"] = "right" if is_right else "wrong"
    else:
        low, high = findings.intervals["max_mappings"]
        is_right = behaviour.max_mappings is not None and low <= behaviour.max_mappings <= high
        verdicts["quota"] = "right" if is_right else "wrong"
    rate = profile.mapping_rate_per_s
    if rate is None:
        assert findings.unknown["mapping_rate_per_s"]
        verdicts["rate"] = verdicts["burst"] = "unknown"
    elif limit is None:
        verdicts["rate"] = "right" if rate == math.inf else "wrong"
    elif rate == math.inf:
        # A bucket that 200 mappings a second do not empty before there are enough.
        bound = (behaviour.max_mappings or MAPPINGS_MAX) - 20
        is_large = bound <= limit.burst + limit.per_s * bound / 200 + 20
        verdicts["rate"] = "right" if is_large else "wrong"
    else:
        low, high = findings.intervals["mapping_rate_per_s"]
        # Or it says itself that it is rough, as at 10 % loss.
        is_rough = low <= limit.per_s <= high and high <= 1.3 * rate
        is_right = abs(rate / limit.per_s - 1) <= 0.1 or is_rough
        verdicts["rate"] = "right" if is_right else "wrong"
        verdicts["interval"] = "right" if low <= limit.per_s <= high else "outside"
        burst = profile.mapping_burst
        assert burst is not None
        near = abs(burst - limit.burst) <= max(3, 0.15 * limit.burst)
        verdicts["burst"] = "right" if near else "off"
    made = behaviour.allocation
    overloading = profile.allocation.is_overloading if profile.allocation else None
    if overloading is None or isinstance(made, Preserving):
        verdicts["overloading"] = "unknown"
    else:
        is_right = overloading is not behaviour.exclusive_ports
        verdicts["overloading"] = "right" if is_right else "wrong"
    return verdicts


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.1])
def test_random_limits_are_found_out(loss: float) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    packets = 0
    for seed in range(60):
        behaviour = random_behaviour(random.Random(f"quota/{seed}"))
        laboratory = count(behaviour, seed, loss)
        verdicts = judge(laboratory, behaviour)
        counts.update(verdicts.items())
        packets += laboratory.test.packet_count
        if {"wrong", "off", "unknown"} & {
            verdicts.get(each) for each in ("quota", "rate", "burst")
        }:
            profile = laboratory.findings.profile
            print(
                f"seed {seed}: {verdicts} quota {profile.max_mappings} rate "
                f"{profile.mapping_rate_per_s} burst {profile.mapping_burst} "
                f"{laboratory.findings.unknown} of {behaviour.max_mappings} "
                f"{behaviour.subscriber_rate} {behaviour.mapping}"
            )
    for name in sorted({name for name, _ in counts}):
        print(f"loss {loss:.0%} {name}: { {v: c for (n, v), c in counts.items() if n == name} }")
    print(f"loss {loss:.0%}: {packets / 60:.0f} packets on average")
    # At 10 % loss each way a rate may be a bit off: answers that are lost blur the count.
    assert counts["rate", "wrong"] <= (3 if loss > 0.05 else 0)
    assert not counts["quota", "wrong"]
    assert not counts["overloading", "wrong"]
    assert counts["quota", "right"] >= 45
    assert counts["rate", "right"] >= 40


def test_a_quota_is_met_and_not_besieged() -> None:
    behaviour = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF, max_mappings=64)
    laboratory = count(behaviour, 1)
    profile, intervals = laboratory.findings.profile, laboratory.findings.intervals
    assert profile.max_mappings == 64
    assert intervals["max_mappings"].high == 64
    assert profile.mappings_seen == 64 - 16 - 1
    assert profile.mapping_rate_per_s == math.inf


def test_without_a_limit_it_ends_at_its_bound() -> None:
    behaviour = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF)
    laboratory = count(behaviour, 1, 0.01)
    profile = laboratory.findings.profile
    assert profile.max_mappings is None
    assert "max_mappings" not in laboratory.findings.unknown
    assert profile.mapping_rate_per_s == math.inf
    assert MAPPINGS_MAX - 5 <= profile.mappings_seen <= MAPPINGS_MAX
    assert laboratory.test.packet_count <= 500
    assert len(laboratory.findings.observations) >= MAPPINGS_MAX


def test_a_block_that_counts_is_followed_to_its_end() -> None:
    behaviour = NatBehaviour(
        mapping=Mapping.EIM,
        filtering=Filtering.APDF,
        allocation=Blocks(size=512, max_blocks=4, is_sequential=True),
        overloading=False,
    )
    laboratory = count(behaviour, 3)
    ports = [each.observed.port for each in laboratory.findings.observations]
    assert len({port // 512 for port in ports}) >= 2
    assert len(ports) < 700
    counter = NatBehaviour(
        mapping=Mapping.EIM,
        filtering=Filtering.APDF,
        allocation=Sequential(cross_traffic_per_s=50),
    )
    assert len(count(counter, 3).findings.observations) < MAPPINGS_MAX + 20


def test_observers_that_fall_silent_are_no_quota() -> None:
    behaviour = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF)
    laboratory = Laboratory(behaviour, 1)
    laboratory.world.after(0.6, lambda: [each.main.close() for each in laboratory.observers])
    laboratory.world.after(0.6, lambda: [each.alternate.close() for each in laboratory.observers])
    laboratory.run(QuotaTest, 300)
    assert laboratory.findings.profile.max_mappings is None
    assert laboratory.findings.profile.mapping_rate_per_s is None
    assert "stopped answering" in laboratory.findings.unknown["max_mappings"]


@pytest.mark.parametrize("observer_count", [1, 2, 8])
def test_a_rate_and_its_burst_are_counted(observer_count: int) -> None:
    behaviour = NatBehaviour(
        mapping=Mapping.EIM, filtering=Filtering.APDF, subscriber_rate=RateLimit(20.0, 50)
    )
    laboratory = Laboratory(behaviour, 2, observer_count=observer_count)
    laboratory.run(QuotaTest, QuotaTest.port_count(laboratory.findings))
    profile, intervals = laboratory.findings.profile, laboratory.findings.intervals
    assert profile.mapping_rate_per_s == pytest.approx(20, rel=0.05)
    assert intervals["mapping_rate_per_s"].low < 20 < intervals["mapping_rate_per_s"].high
    assert profile.mapping_burst == pytest.approx(50, abs=3)


def test_nobody_to_ask_is_a_reason() -> None:
    laboratory = Laboratory(
        NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF), 1, observer_count=0
    )
    laboratory.run(QuotaTest, 0)
    assert "nobody" in laboratory.findings.unknown["max_mappings"]


def test_no_shared_port_is_evidence_where_some_were_likely() -> None:
    block = PortAllocation(AllocationLaw.BLOCK, block_size=512, blocks=(1024,))
    everything = PortAllocation(AllocationLaw.UNIFORM)
    remotes = [Endpoint(f"198.51.100.{index % 4}", 4000 + index % 2) for index in range(300)]
    distinct = [
        (Endpoint("203.0.113.1", 1024 + index), remote) for index, remote in enumerate(remotes)
    ]
    assert overloading_of(distinct, block, Filtering.APDF) is False
    assert overloading_of(distinct, everything, Filtering.APDF) is None
    assert overloading_of(distinct[:30], block, Filtering.APDF) is None
    assert overloading_of([distinct[0], distinct[0]], everything, None) is True
    same_remote = [(external, remotes[0]) for external, _ in distinct]
    assert overloading_of(same_remote, block, Filtering.APDF) is None


def test_earlier_findings_stay() -> None:
    laboratory = Laboratory(NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF), 1)
    findings = laboratory.findings
    findings.profile = replace(findings.profile, mappings_seen=900, remotes_seen=7)
    laboratory.run(QuotaTest, 300)
    assert findings.profile.mappings_seen == 900
    assert findings.profile.remotes_seen == 7


def test_a_bucket_is_read_from_its_times() -> None:
    rush = [index * 0.005 for index in range(30)]
    drops = [0.2 + index * 0.1 for index in range(40)]
    tries = [index * 0.005 for index in range(900)]
    counted = while_empty(rush + drops, tries, 0.0)
    assert 25 <= len(counted) < 40
    assert counted == drops[-len(counted) :]
    assert smallest_burst(rush + drops, 10.0) == pytest.approx(29, abs=1)
    assert while_empty(rush, rush, 0.0) == []
    assert smallest_burst([], 10.0) == 1
