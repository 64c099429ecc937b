"""Plans that take more than classes of NATs: candidates, gateways, helpers, quotas, prices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from test_plan import BLOCK, CLASSES, COUNTER, HIGH, LOW, PUBLIC, UNIFORM, at_peer, both_plans, nat

from natswarm.address import Endpoint
from natswarm.errors import PunctureFailed
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Poison, Pooling
from natswarm.nat.profile import NatProfile
from natswarm.puncture.bounds import (
    live_s,
    mapping_budget,
    mapping_pace,
    opener_refresh_s,
    opener_ttl,
)
from natswarm.puncture.plan import Limits, Plan, Strategy, plan_alternatives, plan_puncture

HOME = CLASSES["EIM/APDF"]
DRAWN = CLASSES["APDM/APDF uniform"]
BLOCK_NAT = CLASSES["APDM/APDF block"]
HELPED = replace(DRAWN, tftp_helper=True)


def strategies(plan: Plan) -> list[Strategy]:
    return [step.strategy for step in plan.steps]


# Near each other ----------------------------------------------------------------------------------


def with_ipv6(profile: NatProfile, ip: str) -> NatProfile:
    return replace(profile, local_endpoints=(*profile.local_endpoints, Endpoint(ip, 40_000)))


def test_ipv6_goes_first_and_the_nats_follow() -> None:
    plans = both_plans(
        with_ipv6(BLOCK_NAT, "2001:db8:1::7"), with_ipv6(at_peer(BLOCK_NAT), "2001:db8:2::7")
    )
    # 2001:db8::/32 is for documentation: nobody routes it.
    assert strategies(plans[0]) == [Strategy.TWO_SIDED_BIRTHDAY]
    plans = both_plans(
        with_ipv6(BLOCK_NAT, "2a02:1:1::7"), with_ipv6(at_peer(BLOCK_NAT), "2a02:1:2::7")
    )
    for plan, ip in zip(plans, ("2a02:1:2::7", "2a02:1:1::7"), strict=True):
        assert strategies(plan) == [Strategy.IPV6, Strategy.TWO_SIDED_BIRTHDAY]
        assert Endpoint(ip, 40_000) in plan.checks
        assert plan.burst is None
        assert plan.duration_s == 1.0
    assert plans[0].total_duration_s > plans[0].duration_s
    assert plans[0].extra_port_count == 3, "sockets for what follows"


def test_one_sides_ipv6_is_no_way() -> None:
    plan, _ = both_plans(with_ipv6(HOME, "2a02:1:1::7"), at_peer(HOME))
    assert strategies(plan) == [Strategy.SIMULTANEOUS_OPEN]


def test_behind_one_nat_that_turns_packets_round_the_public_endpoint_is_tried_too() -> None:
    other = replace(HOME, local_endpoints=(Endpoint("100.64.7.7", 40_000),))
    plan, _ = both_plans(HOME, other)
    assert strategies(plan) == [Strategy.SAME_NETWORK, Strategy.SIMULTANEOUS_OPEN]
    assert other.main_endpoint not in plan.checks
    plan, _ = both_plans(replace(HOME, hairpinning=True), other)
    assert other.main_endpoint in plan.checks


def test_a_forwarded_port_is_dialled_first() -> None:
    forwarded = Endpoint("198.51.100.1", 40_000)
    mapped = replace(BLOCK_NAT, local_endpoints=(*BLOCK_NAT.local_endpoints, forwarded))
    ours, theirs = both_plans(mapped, at_peer(BLOCK_NAT))
    assert mapped.forwarded_endpoints == (forwarded,)
    for plan in (ours, theirs):
        assert strategies(plan) == [Strategy.GATEWAY_MAPPING, Strategy.TWO_SIDED_BIRTHDAY]
    assert forwarded in theirs.checks


def test_a_port_forwarded_below_another_nat_or_our_own_address_is_none() -> None:
    elsewhere = Endpoint("203.0.113.200", 40_000)
    above = replace(BLOCK_NAT, local_endpoints=(*BLOCK_NAT.local_endpoints, elsewhere))
    assert above.forwarded_endpoints == ()
    assert PUBLIC.forwarded_endpoints == ()


# TFTP helpers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("i_am_first", [True, False])
def test_a_tftp_helper_turns_two_dimensions_into_one(i_am_first: bool) -> None:
    opener, prober = both_plans(HELPED, at_peer(DRAWN), i_am_first=i_am_first)
    assert strategies(opener) == strategies(prober) == [Strategy.TFTP_HELPER]
    assert opener.openers is not None
    assert opener.openers.is_tftp
    assert opener.openers.destinations == (Endpoint("203.0.113.1", 69),)
    assert opener.openers.ttl is None, "the request itself must be believed by our own NAT alone"
    assert prober.burst is not None
    assert prober.burst.port_indices == (1,)
    assert round(prober.expected_probe_count) == 254


def test_of_two_helpers_the_one_with_fewer_ports_opens() -> None:
    few = replace(BLOCK_NAT, tftp_helper=True)
    first, second = both_plans(HELPED, at_peer(few))
    assert first.burst is not None
    assert second.openers is not None
    assert second.openers.port_count == 15
    # Two dimensions are in the budget here, and follow.
    assert strategies(first) == [Strategy.TFTP_HELPER, Strategy.TWO_SIDED_BIRTHDAY]


def test_a_known_endpoint_with_a_helper_is_simply_dialled() -> None:
    opened, dials = both_plans(replace(HOME, tftp_helper=True), at_peer(DRAWN))
    assert strategies(opened) == strategies(dials) == [Strategy.TFTP_HELPER]
    assert opened.tftp_targets == (Endpoint("203.0.113.1", 69),)
    assert HOME.main_endpoint in dials.checks
    assert opened.extra_port_count == dials.extra_port_count == 0


def test_two_known_endpoints_need_no_helper() -> None:
    plan, _ = both_plans(replace(HOME, tftp_helper=True), at_peer(HOME))
    assert strategies(plan) == [Strategy.SIMULTANEOUS_OPEN]


# Two counters -------------------------------------------------------------------------------------


def counting(others_per_s: float) -> NatProfile:
    return nat(Mapping.APDM, Filtering.APDF, replace(COUNTER, others_per_s=others_per_s))


@pytest.mark.parametrize(("mine", "theirs"), [(0.0, 0.0), (35.0, 35.0), (0.0, 35.0)])
def test_runs_of_two_counters_are_aimed_at_where_the_other_ends(mine: float, theirs: float) -> None:
    plans = both_plans(counting(mine), at_peer(counting(theirs)))
    bursts = [plan.burst for plan in plans]
    for burst, rate, other in zip(bursts, (mine, theirs), bursts[::-1], strict=True):
        assert burst is not None
        assert other is not None
        assert len(burst.runs) == len(other.runs)
        reached = aimed = 0.0
        for (count, _), (_, steps) in zip(burst.runs, other.runs, strict=True):
            aimed += steps
            start, reached = reached, reached + count * (1 + rate / burst.probes_per_s)
            assert start <= aimed <= reached + 1e-6, "our run passes the port they aim at"


def test_counters_that_others_move_fast_are_scanned() -> None:
    plan, other = both_plans(counting(200.0), at_peer(counting(200.0)))
    assert plan.burst is not None
    assert other.burst is not None
    assert (plan.burst.runs, other.burst.runs) == ((), ())
    assert (plan.burst.scan_stride, other.burst.scan_stride) == (1, 2)


def test_two_counters_may_fall_back_on_two_dimensions() -> None:
    plan, _ = both_plans(counting(0.0), at_peer(counting(0.0)))
    assert strategies(plan) == [Strategy.SEQUENTIAL_PREDICTION, Strategy.TWO_SIDED_BIRTHDAY]


# Quotas, rates, lifetimes -------------------------------------------------------------------------


def test_a_quota_leaves_something_to_other_applications() -> None:
    assert mapping_budget(DRAWN, Limits()) == 16_384
    assert mapping_budget(replace(DRAWN, max_mappings=64), Limits()) == 56
    assert mapping_budget(replace(DRAWN, max_mappings=4), Limits()) == 1
    opener = both_plans(replace(DRAWN, max_mappings=64), at_peer(HOME))[0]
    assert opener.openers is not None
    assert opener.openers.port_count == 56


def test_a_quota_is_kept_alive_while_the_other_side_looks() -> None:
    block = replace(BLOCK_NAT, allocation=replace(BLOCK, is_overloading=True))
    few, many = both_plans(replace(block, max_mappings=64), at_peer(block))
    assert few.burst is not None
    assert many.burst is not None
    assert few.burst.probe_count == 56
    assert few.burst.is_kept
    assert not many.burst.is_kept
    assert many.expected_probe_count == pytest.approx(256**2 / 56)


def test_two_quotas_too_small_to_meet_are_refused() -> None:
    wide = nat(Mapping.APDM, Filtering.APDF, replace(BLOCK, block_size=2048, blocks=(40_960,)))
    wide = replace(wide, max_mappings=64)
    with pytest.raises(PunctureFailed, match="probes expected, budget"):
        both_plans(wide, at_peer(wide))


def test_new_mappings_keep_to_the_measured_rate() -> None:
    limited = replace(BLOCK_NAT, mapping_rate_per_s=20.0, mapping_burst=10)
    assert mapping_pace(BLOCK_NAT, 100, 1000.0) == 1000.0
    assert mapping_pace(replace(limited, mapping_rate_per_s=math.inf), 100, 1000.0) == 1000.0
    assert mapping_pace(limited, 9, 1000.0) == 1000.0, "within the burst"
    for count in (12, 15, 100, 1000):
        pace = mapping_pace(limited, count, 1000.0)
        tokens = [10 + 20 * sent / pace - sent for sent in range(count)]
        assert min(tokens) >= 0, f"{count} new mappings at {pace:.1f} a second"
    opener, prober = both_plans(limited, at_peer(HOME))
    assert opener.openers is not None
    assert prober.burst is not None
    assert opener.openers.probes_per_s < 1000
    last_at = opener.openers.port_count / opener.openers.probes_per_s
    assert prober.burst.start_s == pytest.approx(last_at - 0.1), "when the last mapping stands"


def test_lifetimes_say_when_to_refresh() -> None:
    assert opener_refresh_s(DRAWN) == 7.0
    assert opener_refresh_s(replace(DRAWN, idle_unreplied_s=30.0)) == pytest.approx(21.0)
    assert opener_refresh_s(replace(DRAWN, idle_unreplied_s=math.inf)) == 60.0
    assert live_s(DRAWN) == 65.0
    assert live_s(replace(DRAWN, idle_lifetime_s=120.0)) == 120.0
    assert live_s(replace(DRAWN, idle_unreplied_s=30.0, absolute_lifetime_s=10.0)) == 10.0


def test_paired_pooling_is_one_address() -> None:
    both = replace(BLOCK_NAT, public_ips=("198.51.100.1", "198.51.100.2"))
    for pooling, count in ((None, 2), (Pooling.ARBITRARY, 2), (Pooling.PAIRED, 1)):
        prober, _ = both_plans(at_peer(HOME), replace(both, pooling=pooling))
        assert prober.burst is not None
        assert prober.burst.ips == both.public_ips[:count]


# Low hop limits -----------------------------------------------------------------------------------


def test_openers_die_early_unless_the_peers_nat_is_known_not_to_mind() -> None:
    ours = replace(DRAWN, opener_ttl=4)
    for poison, ttl in ((None, 4), (Poison.NONE, None), (Poison.TAKES_PORT, 4)):
        theirs = replace(at_peer(HOME), poison=poison)
        opener, _ = both_plans(ours, theirs)
        assert opener.openers is not None
        assert opener.openers.ttl == opener_ttl(ours, theirs, Limits()) == ttl
    assert opener_ttl(ours, at_peer(HOME), Limits(opener_ttl=6)) == 6
    assert opener_ttl(ours, at_peer(PUBLIC), Limits()) is None


def test_checks_start_low_for_long_only_where_poison_is_known() -> None:
    ours = replace(HOME, opener_ttl=4)
    for poison, seconds in ((None, 0.1), (Poison.TAKES_PORT, 1.5)):
        plan, _ = both_plans(ours, replace(at_peer(HOME), poison=poison))
        assert (plan.checks_ttl, plan.checks_ttl_s) == (4, seconds)
    plan, _ = both_plans(ours, replace(at_peer(HOME), poison=Poison.NONE))
    assert plan.checks_ttl is None


# Pace and price -----------------------------------------------------------------------------------


def plan_at(round_trip_s: float, limits: Limits | None = None) -> Plan:
    return plan_puncture(
        HOME, at_peer(DRAWN), my_id=LOW, their_id=HIGH, limits=limits, round_trip_s=round_trip_s
    )


def test_the_pace_keeps_what_is_under_way_to_a_share_of_what_is_expected() -> None:
    for round_trip_s in (0.1, 0.3):
        burst = plan_at(round_trip_s).burst
        assert burst is not None
        assert burst.probes_per_s * round_trip_s == pytest.approx(0.05 * 507, rel=0.01)
        assert burst.hurry_per_s == pytest.approx(2 * burst.probes_per_s)
        assert burst.hurry_count == math.ceil(1.5 * 64_513 / 254)
    fast = plan_at(0.3, Limits(overshoot=0.5))
    assert fast.burst is not None
    assert fast.burst.probes_per_s == pytest.approx(0.5 * 507 / 0.3, rel=0.01)
    assert fast.expected_s < plan_at(0.3).expected_s


def test_a_round_trip_of_nothing_is_one_of_a_coarse_clock() -> None:
    burst = plan_at(0.0).burst
    assert burst is not None
    assert burst.probes_per_s == Limits().probes_per_s


def test_a_law_that_is_not_flat_takes_fewer_mappings_and_probes() -> None:
    flat = PortAllocation(AllocationLaw.UNIFORM, low=4631, high=18_568)
    beta = replace(flat, shape=(2.242, 5.008))
    plans = [
        both_plans(at_peer(HOME), nat(Mapping.APDM, Filtering.APDF, law))[0] for law in (flat, beta)
    ]
    assert plans[1].expected_probe_count < 0.75 * plans[0].expected_probe_count


def test_alternatives_show_their_price_or_why_not() -> None:
    shown = plan_alternatives(HELPED, at_peer(DRAWN), my_id=LOW, their_id=HIGH)
    assert [each.strategy for each in shown] == [
        Strategy.TFTP_HELPER,
        Strategy.TWO_SIDED_BIRTHDAY,
    ]
    assert str(shown[0]) == "tftp-helper: 253 probes, 2.5 s, 99.9%"
    assert "57,172 probes expected, budget 16,384" in str(shown[1])
    assert shown[1].plan is None


def test_both_sides_put_the_ways_in_one_order() -> None:
    profiles = [
        HELPED,
        counting(10.0),
        replace(counting(35.0), tftp_helper=True),
        replace(BLOCK_NAT, tftp_helper=True),
        nat(Mapping.APDM, Filtering.ADF, BLOCK),
        nat(Mapping.ADM, Filtering.APDF, UNIFORM),
    ]
    for mine in profiles:
        for theirs in map(at_peer, profiles):
            orders = []
            for one, other, limits in (
                (mine, theirs, Limits()),
                (theirs, mine, Limits(probes_per_s=10.0, socket_count=8)),
            ):
                ids = (LOW, HIGH) if one is mine else (HIGH, LOW)
                shown = plan_alternatives(
                    one,
                    replace(other, public_ips=other.public_ips[:1]),
                    my_id=ids[0],
                    their_id=ids[1],
                    limits=limits,
                    round_trip_s=0.05 if one is mine else 0.4,
                )
                orders.append([each.strategy for each in shown])
            assert orders[0] == orders[1]
