"""Whole punctures on the virtual internet: success rates of pairs of NATs, and what they cost.

Each puncture is inspected, planned by both sides for themselves, and carried out. Run with `-s` to
see the table that docs/puncturing.md quotes.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from simulated_puncture import Kind, Outcome, simulate, simulate_behind_one_nat, wilson

from natswarm.errors import PunctureFailed
from natswarm.nat.behaviour import Filtering, Mapping, Poison
from natswarm.puncture.plan import Limits, Strategy
from natswarm.puncture.puncturer import PathFound, PunctureExhausted
from natswarm.sim.link import LinkConditions
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.ports import Allocation, Blocks, Preserving, Sequential, Uniform
from natswarm.sim.presets import PRESETS, Preset, Site
from natswarm.sim.rate import RateLimit

D, S = Strategy.DIRECT, Strategy.SIMULTANEOUS_OPEN
ONE, TWO = Strategy.ONE_SIDED_BIRTHDAY, Strategy.TWO_SIDED_BIRTHDAY
SEQUENTIAL = Strategy.SEQUENTIAL_PREDICTION


def carrier(allocation: Allocation, **changes: object) -> Preset:
    """An APDM/APDF carrier with the access link of 4G."""
    behaviour = NatBehaviour(mapping=Mapping.APDM, filtering=Filtering.APDF, allocation=allocation)
    return Preset(
        # Names of fields, which mypy can't match with their types.
        replace(behaviour, **changes),  # type: ignore[arg-type]
        Site.CARRIER,
        LinkConditions(delay_s=0.025, jitter_s=0.020),
        2,
        "a test",
    )


def run_many(kinds: tuple[Kind, Kind], seeds: int, **conditions: float) -> list[Outcome]:
    # As above.
    return [simulate(kinds, seed, **conditions) for seed in range(seeds)]  # type: ignore[arg-type]


def report(name: str, outcomes: list[Outcome]) -> tuple[float, float]:
    """Print a line of the table; return the confidence interval of success."""
    found = [outcome for outcome in outcomes if outcome.is_found]
    low, high = wilson(len(found), len(outcomes))
    plans = outcomes[0].plans
    line = (
        f"{name:32} {plans[0].strategy.value:18} {len(found)}/{len(outcomes)} "
        f"[{low:.3f}, {high:.3f}]"
    )
    if found:
        sent = [statistics.mean(outcome.probe_counts[side] for outcome in found) for side in (0, 1)]
        planned = [
            statistics.mean(outcome.plans[side].expected_probe_count for outcome in found)
            for side in (0, 1)
        ]
        times = sorted(outcome.elapsed_s for outcome in found)
        line += (
            f" probes {sent[0]:.0f} + {sent[1]:.0f} (to the hit, by formula: "
            f"{planned[0]:.0f} + {planned[1]:.0f}), "
            f"{statistics.median(times):.2f} s, longest {times[-1]:.1f} s"
        )
    print(f"{line}; seeds 0..{len(outcomes) - 1}")
    return low, high


# Pairs of presets: (one, other, strategy, seeds). `python -m tools.bench.puncture` runs hundreds.
PAIRS = [
    ("public", "public", D, 30),
    ("public", "linux-home", D, 30),
    ("public", "orange-bg", D, 30),
    ("lyca-nl", "mycall-no", D, 30),
    ("lyca-nl", "vodafone-nl", D, 30),
    ("lyca-nl", "linux-home", D, 30),
    ("lyca-nl", "kpn-nl", D, 30),
    ("lyca-nl", "orange-bg", D, 30),
    ("vodafone-nl", "lebara-nl", S, 30),
    ("vodafone-nl", "linux-home", S, 30),
    ("vodafone-nl", "kpn-nl", D, 30),
    ("vodafone-nl", "orange-bg", D, 30),
    ("telia-no", "juniper-pba", D, 30),
    ("linux-home", "linux-home", S, 30),
    ("linux-home", "sky-uk-dsl", S, 30),
    ("linux-home", "kpn-nl", ONE, 30),
    ("linux-home", "juniper-pba", ONE, 30),
    ("linux-home", "o2-uk-4g", ONE, 20),
    ("linux-home", "orange-bg", ONE, 20),
    ("sky-uk-dsl", "linux-random", ONE, 20),
    ("sky-uk-dsl", "tmobile-us", ONE, 20),
    ("sky-uk-dsl", "cloud-natgw", ONE, 20),
    ("kpn-nl", "kpn-nl", TWO, 30),
    ("kpn-nl", "juniper-pba", TWO, 20),
    ("juniper-pba", "juniper-pba", SEQUENTIAL, 30),
    ("kpn-nl", "orange-bg", TWO, 6),
]


@pytest.mark.parametrize(("one", "other", "strategy", "seeds"), PAIRS)
def test_pairs_of_presets(one: str, other: str, strategy: Strategy, seeds: int) -> None:
    outcomes = run_many((one, other), seeds)
    assert {plan.strategy for outcome in outcomes for plan in outcome.plans} == {strategy}
    low, _ = report(f"{one} x {other}", outcomes)
    # The lower bound that one failure still reaches.
    assert low >= wilson(seeds - 1, seeds)[0]
    assert statistics.median(outcome.elapsed_s for outcome in outcomes) < 10


@pytest.mark.parametrize(
    ("one", "other", "seeds"),
    [
        ("lyca-nl", "orange-bg", 25),
        ("vodafone-nl", "orange-bg", 25),
        ("linux-home", "linux-home", 25),
        ("linux-home", "kpn-nl", 25),
        ("linux-home", "orange-bg", 15),
        ("kpn-nl", "kpn-nl", 25),
        ("juniper-pba", "juniper-pba", 30),  # the lines of a scan cross but once
    ],
)
def test_ten_percent_loss_and_a_side_that_starts_two_seconds_late(
    one: str, other: str, seeds: int
) -> None:
    outcomes = [
        simulate((one, other), seed, loss=0.1, skew_s=2.0, late=seed % 2) for seed in range(seeds)
    ]
    low, _ = report(f"{one} x {other}, bad", outcomes)
    allowed = 5 if one == "juniper-pba" else 2
    assert low >= wilson(seeds - allowed, seeds)[0]


COUNTER_RATES = [(0, 0), (35, 35), (100, 35), (200, 200)]


@pytest.mark.parametrize("rates", COUNTER_RATES)
def test_two_counters_shared_with_others_meet(rates: tuple[int, int]) -> None:
    # Klinec & Matyas: about 100 % up to 35 new flows a second.
    kinds = tuple(carrier(Sequential(cross_traffic_per_s=rate)) for rate in rates)
    outcomes = run_many((kinds[0], kinds[1]), 8)
    low, _ = report(f"counters at {rates[0]} x {rates[1]} flows/s", outcomes)
    assert low >= wilson(7, 8)[0]


@pytest.mark.parametrize(
    "allocation",
    [Sequential(cross_traffic_per_s=35), Sequential(step=-2), Blocks(size=512)],
    ids=["counter at 35/s", "counter by -2", "block 512"],
)
@pytest.mark.parametrize("filtering", Filtering)
@pytest.mark.parametrize("mapping", Mapping)
def test_every_behaviour_meets_every_known_and_unknown_side(
    mapping: Mapping, filtering: Filtering, allocation: Allocation
) -> None:
    kind = carrier(allocation, mapping=mapping, filtering=filtering)
    others: list[Kind] = [
        carrier(Preserving(), mapping=Mapping.EIM),
        carrier(Uniform(), mapping=Mapping.EIM, filtering=Filtering.ADF),
        carrier(Blocks(size=128), mapping=Mapping.ADM),
        carrier(Blocks(size=128), filtering=Filtering.ADF),
        carrier(Blocks(size=128)),
    ]
    for seed, other in enumerate(others):
        for kinds in ((kind, other), (other, kind)):
            outcome = simulate(kinds, seed)
            assert outcome.is_found, f"seed {seed}: {[str(plan) for plan in outcome.plans]}"


def test_one_dimension_costs_what_the_formula_says() -> None:
    # Probes until the hit: those sent, less what is under way until the answer is back.
    seeds = 120
    ratios = []
    for seed in range(seeds):
        outcome = simulate(("linux-home", carrier(Blocks(size=2048, low=8192, high=10_239))), seed)
        prober = outcome.sides[0]
        assert isinstance(prober.event, PathFound)
        burst = prober.plan.burst
        assert burst is not None
        hit_port = prober.event.endpoint
        sent_to = [endpoint for _, endpoint in prober.machine._sent]
        ratios.append(sent_to.index(hit_port) / prober.plan.expected_probe_count)
    mean = statistics.mean(ratios)
    print(f"one dimension: {mean:.3f} of the formula, seeds 0..{seeds - 1}")
    # The number of probes is nearly geometric: its standard deviation is its mean.
    assert mean == pytest.approx(1.0, abs=3 / math.sqrt(seeds))


def test_two_dimensions_cost_what_the_formula_says() -> None:
    seeds = 50
    ratios = []
    for seed in range(seeds):
        outcome = simulate(("kpn-nl", "kpn-nl"), seed)
        assert outcome.is_found
        # The later of the two probes decides; each side had sent about as many by then.
        last = max(
            side.machine._sent.index((side.event.port_index, side.event.endpoint))
            for side in outcome.sides
            if isinstance(side.event, PathFound)
        )
        ratios.append(last / outcome.plans[0].expected_probe_count)
    mean = statistics.mean(ratios)
    print(f"two dimensions: {mean:.3f} of the formula, seeds 0..{seeds - 1}")
    assert mean == pytest.approx(1.0, abs=3 * 0.53 / math.sqrt(seeds) + 0.05)


def test_a_strict_block_opens_in_rounds() -> None:
    kind = carrier(Blocks(size=128), overloading=False)
    outcomes = run_many((kind, kind), 50)
    first_round = sum(outcome.is_found and outcome.elapsed_s < 12 for outcome in outcomes)
    report("strict 128 x strict 128", outcomes)
    # The ports that the inspection took are still in use.
    shares = [
        math.prod(
            1 - allocation.sample_count / 128
            for profile in outcome.profiles
            if (allocation := profile.allocation) is not None
        )
        for outcome in outcomes
    ]
    expected = statistics.mean(1 - math.exp(-share) for share in shares)
    low, high = wilson(first_round, 50, z=2.6)
    assert low < expected < high, f"{first_round} of 50 in the first round"
    found = sum(outcome.is_found for outcome in outcomes)
    assert found > first_round, "mappings expire, and the next round draws new ports"


@pytest.mark.parametrize(
    ("one", "other", "seeds"),
    [("o2-uk-4g", "orange-bg", 15), ("o2-uk-4g", "kpn-nl", 20), ("sky-uk-dsl", "orange-bg", 30)],
)
def test_a_tftp_helper_opens_what_would_be_out_of_reach(one: str, other: str, seeds: int) -> None:
    outcomes = [
        simulate((one, other), seed, known={"tftp_helper": (True, False)}) for seed in range(seeds)
    ]
    report(f"{one} (TFTP) x {other}", outcomes)
    assert {plan.strategy for outcome in outcomes for plan in outcome.plans} == {
        Strategy.TFTP_HELPER
    }
    assert sum(outcome.is_found for outcome in outcomes) >= seeds - 1
    if one == "sky-uk-dsl":
        assert max(sum(outcome.probe_counts) for outcome in outcomes) < 20, "simply dialled"


def test_a_measured_quota_is_kept_to() -> None:
    # Unmeasured, half the openers are dropped, and whatever else the subscriber does with them.
    limited = carrier(Blocks(size=512), max_mappings=64, unreplied_lifetime_s=30.0)
    outcomes = [
        simulate(("linux-home", limited), seed, age_s=31.0, known={"max_mappings": (None, 64)})
        for seed in range(20)
    ]
    report("linux-home x block 512, 64 mappings", outcomes)
    assert all(outcome.is_found for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.probe_counts[1] <= 64


def test_what_is_wrong_with_a_helper_is_followed_by_what_needs_none() -> None:
    # Its profile says so, but its NAT has no such helper.
    outcome = simulate(("kpn-nl", "kpn-nl"), 3, known={"tftp_helper": (True, False)})
    assert outcome.is_found
    assert outcome.plans[0].fallback is not None
    event = outcome.sides[0].event
    assert isinstance(event, PathFound)
    assert event.elapsed_s > outcome.plans[0].duration_s
    assert outcome.sides[0].machine.strategy == "two-sided-birthday"


def test_uniform_against_uniform_is_refused() -> None:
    for one, other in (("orange-bg", "orange-bg"), ("o2-uk-4g", "cloud-natgw")):
        with pytest.raises(PunctureFailed, match="probes expected, budget") as refusal:
            simulate((one, other), 1)
        print(refusal.value)


def test_poisoned_routers_open_with_low_ttl_alone() -> None:
    # A Linux router whose own firewall accepts strangers: an early datagram takes the port.
    poisoned = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF, poison=Poison.TAKES_PORT)
    for seed in range(10):
        assert not simulate((poisoned, poisoned), seed, skew_s=1.0).is_found
        low = simulate((poisoned, poisoned), seed, skew_s=1.0, limits=Limits().gentler())
        assert low.is_found


def test_a_nat_that_limits_new_mappings_opens_to_a_gentler_second_try() -> None:
    kind = carrier(Blocks(size=256), subscriber_rate=RateLimit(per_s=100, burst=50))
    found = 0
    for seed in range(10):
        outcome = simulate((kind, kind), seed, limits=Limits().gentler())
        found += outcome.is_found
        assert outcome.elapsed_s < 20
    assert found >= 9, "seeds 0..9"


def test_two_phones_in_one_house_meet_inside() -> None:
    # Both behind one router: whatever its NAT, the host candidates are nearer.
    for kind in ("linux-home", "linux-random", "kpn-nl"):
        outcome = simulate_behind_one_nat(kind, seed=3)
        assert outcome.is_found
        for side in outcome.sides:
            assert side.path is not None
            assert side.path[1].kind.value in ("private", "shared")
        assert max(outcome.probe_counts) < 10, "no burst was needed"


def test_a_wrong_profile_fails_in_bounded_time_and_says_what_was_seen() -> None:
    # The block moved on between inspection and puncture: the ports probed are somebody else's.
    moving = carrier(
        Blocks(size=64, max_blocks=1), unreplied_lifetime_s=5.0, replied_lifetime_s=5.0
    )
    outcome = simulate(("linux-home", moving), seed=2, age_s=30.0)
    assert not outcome.is_found
    for side in outcome.sides:
        assert isinstance(side.event, PunctureExhausted)
        assert side.event.elapsed_s <= side.plan.duration_s + 0.1
        assert "nothing from the peer" in side.event.reason


def test_every_preset_is_in_some_pair() -> None:
    assert {name for pair in PAIRS for name in pair[:2]} >= set(PRESETS) - {"lyca-bg"}
