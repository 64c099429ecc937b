"""Plans: which strategy for which pair of NATs, that both halves fit, and that limits hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.errors import PunctureFailed
from natswarm.identity import PeerId
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.puncture.plan import Limits, Plan, Strategy, plan_direct, plan_puncture

LOW, HIGH = PeerId(b"\x01" * 32), PeerId(b"\x02" * 32)

UNIFORM = PortAllocation(AllocationLaw.UNIFORM)
BLOCK = PortAllocation(
    AllocationLaw.BLOCK, low=41216, high=41471, block_size=256, blocks=(41216,), sample_count=16
)
COUNTER = PortAllocation(AllocationLaw.SEQUENTIAL, step=1, last_port=5000, others_per_s=0.0)


def nat(
    mapping: Mapping | None,
    filtering: Filtering | None,
    allocation: PortAllocation | None = None,
    *,
    ip: str = "198.51.100.1",
    local_ip: str = "100.64.0.2",
) -> NatProfile:
    is_known = mapping in (Mapping.EIM, None) or filtering is Filtering.EIF
    return NatProfile(
        mapping=mapping,
        filtering=filtering,
        allocation=allocation,
        public_ips=(ip,),
        main_endpoint=Endpoint(ip, 41_300) if is_known else None,
        local_endpoints=(Endpoint(local_ip, 40_000),),
        is_translated=True,
        echo_count=20,
        observer_count=3,
    )


def at_peer(profile: NatProfile) -> NatProfile:
    """The same NAT at another address."""
    main = profile.main_endpoint
    return replace(
        profile,
        public_ips=tuple(ip.replace("198.51.100", "203.0.113") for ip in profile.public_ips),
        main_endpoint=None if main is None else Endpoint("203.0.113.1", main.port),
        local_endpoints=tuple(
            Endpoint(e.ip.replace("100.64.0", "100.64.9"), e.port) for e in profile.local_endpoints
        ),
    )


PUBLIC = replace(
    nat(Mapping.EIM, Filtering.EIF),
    is_translated=False,
    local_endpoints=(Endpoint("198.51.100.1", 41_300),),
)
CLASSES = {
    "public": PUBLIC,
    "EIM/EIF": nat(Mapping.EIM, Filtering.EIF, UNIFORM),
    "EIM/ADF": nat(Mapping.EIM, Filtering.ADF, UNIFORM),
    "EIM/APDF": nat(Mapping.EIM, Filtering.APDF, UNIFORM),
    "EIM/?": nat(Mapping.EIM, None, UNIFORM),
    "?/?": nat(None, None, UNIFORM),
    "ADM/ADF": nat(Mapping.ADM, Filtering.ADF, BLOCK),
    "ADM/APDF": nat(Mapping.ADM, Filtering.APDF, BLOCK),
    "APDM/EIF": nat(Mapping.APDM, Filtering.EIF, BLOCK),
    "APDM/ADF": nat(Mapping.APDM, Filtering.ADF, BLOCK),
    "APDM/APDF block": nat(Mapping.APDM, Filtering.APDF, BLOCK),
    "APDM/APDF counter": nat(Mapping.APDM, Filtering.APDF, COUNTER),
    "APDM/APDF uniform": nat(Mapping.APDM, Filtering.APDF, UNIFORM),
    "not known": NatProfile.unknown([Endpoint("100.64.0.2", 40_000)]),
}

# The table of docs/puncturing.md. D direct, S simultaneous-open, 1 one-sided, 2 two-sided birthday,
# Q sequential prediction, x refused; two that nobody has seen try their host candidates (the D of
# the last cell). Rows and columns are in the order of CLASSES; the table is symmetric.
TABLE = """
D D D D D D D D D D D D D D
D D D D D D D D D D D D D D
D D S S S S D D D D D D D D
D D S S S S 1 1 D 1 1 1 1 1
D D S S S S 1 1 D 1 1 1 1 1
D D S S S S 1 1 D 1 1 1 1 1
D D D 1 1 1 1 1 D 1 1 1 1 1
D D D 1 1 1 1 2 D 1 2 2 2 2
D D D D D D D D D D D D D D
D D D 1 1 1 1 1 D 1 1 1 1 1
D D D 1 1 1 1 2 D 1 2 2 2 2
D D D 1 1 1 1 2 D 1 2 Q x x
D D D 1 1 1 1 2 D 1 2 x x x
D D D 1 1 1 1 2 D 1 2 x x D
"""
LETTERS = {
    Strategy.DIRECT: "D",
    Strategy.SIMULTANEOUS_OPEN: "S",
    Strategy.ONE_SIDED_BIRTHDAY: "1",
    Strategy.SEQUENTIAL_PREDICTION: "Q",
    Strategy.TWO_SIDED_BIRTHDAY: "2",
}
CELLS = [line.split() for line in TABLE.split("\n") if line]
NAMES = list(CLASSES)
PAIRS = [
    pytest.param(CLASSES[a], at_peer(CLASSES[b]), CELLS[i][j], id=f"{a} x {b}")
    for i, a in enumerate(NAMES)
    for j, b in enumerate(NAMES)
]


def both_plans(
    mine: NatProfile,
    theirs: NatProfile,
    limits: Limits | None = None,
    *,
    i_am_first: bool = True,
) -> tuple[Plan, Plan]:
    ids = (LOW, HIGH) if i_am_first else (HIGH, LOW)
    # Where nobody has told a node its own address, the introducer still sees it.
    seen = [
        profile if profile.public_ips else replace(profile, public_ips=(f"203.0.113.{40 + index}",))
        for index, profile in enumerate((mine, theirs))
    ]
    return (
        plan_puncture(mine, seen[1], my_id=ids[0], their_id=ids[1], limits=limits),
        plan_puncture(theirs, seen[0], my_id=ids[1], their_id=ids[0], limits=limits),
    )


def check_complement(mine: NatProfile, theirs: NatProfile, plans: tuple[Plan, Plan]) -> None:
    """Assert that the two halves of a puncture fit together."""
    assert plans[0].strategy is plans[1].strategy
    strategy = plans[0].strategy
    sides = ((mine, theirs, *plans), (theirs, mine, *plans[::-1]))
    for me, other, plan, other_plan in sides:
        assert plan.duration_s <= 120
        assert 0 < plan.success_probability <= 1
        for part in (plan.openers, plan.burst):
            if part is not None and isinstance(part, type(plan.burst)):
                assert part.duration_s + part.start_s < plan.duration_s
                assert part.probes_per_s <= plan.probes_per_s
        assert (plan.extra_port_count > 0) == bool(
            plan.openers or (plan.burst and plan.burst.port_indices != (0,))
        )
        if plan.burst is not None and other.public_ips:
            assert set(plan.burst.ips) == set(other.public_ips)
            if other.allocation is not None:
                assert plan.burst.allocation == other.allocation
        if strategy is Strategy.ONE_SIDED_BIRTHDAY:
            assert (plan.openers is None) is (plan.burst is not None)
            assert (plan.openers is None) is (other_plan.openers is not None)
            if plan.openers is not None:
                # Who opens has a port to be guessed; towards what the other side sends from.
                assert not me.is_predictable
                assert other_plan.burst is not None
                assert plan.openers.port_count == other_plan.burst.run_length
                if other.is_predictable:
                    assert plan.openers.destinations == (other.main_endpoint,)
                    assert other_plan.burst.port_indices == (0,)
                else:
                    assert me.accepts_address
                    assert other_plan.burst.port_indices == (1,)
        elif strategy in (Strategy.TWO_SIDED_BIRTHDAY, Strategy.SEQUENTIAL_PREDICTION):
            assert plan.openers is None
            assert plan.burst is not None
            assert 0 not in plan.burst.port_indices
        else:
            assert plan.openers is None
            assert plan.burst is None
    if strategy is Strategy.SIMULTANEOUS_OPEN:
        for _, other, plan, _ in sides:
            assert other.main_endpoint in plan.checks
    if strategy is Strategy.DIRECT and "one network" not in plans[0].reason:
        dialled = [
            other
            for me, other, plan, other_plan in sides
            if other.main_endpoint in plan.checks
            and (
                other.accepts_strangers
                or (
                    other.accepts_address
                    and any(
                        target.ip in me.public_ips or not me.public_ips
                        for target in other_plan.checks
                    )
                )
            )
        ]
        assert dialled, "somebody dials, and the other's NAT lets them in"


@pytest.mark.parametrize("i_am_first", [True, False])
@pytest.mark.parametrize(("mine", "theirs", "cell"), PAIRS)
def test_every_pair_of_classes(
    mine: NatProfile, theirs: NatProfile, cell: str, i_am_first: bool
) -> None:
    if cell == "x":
        for order in (True, False):
            with pytest.raises(PunctureFailed, match="probes expected, budget"):
                both_plans(mine, theirs, i_am_first=order)
        return
    plans = both_plans(mine, theirs, i_am_first=i_am_first)
    assert LETTERS[plans[0].strategy] == cell
    check_complement(mine, theirs, plans)
    # The same again: plans are a function of the profiles.
    assert both_plans(mine, theirs, i_am_first=i_am_first) == plans


def test_uniform_against_uniform_is_refused_with_numbers_and_advice() -> None:
    with pytest.raises(PunctureFailed) as caught:
        both_plans(CLASSES["APDM/APDF uniform"], at_peer(CLASSES["APDM/APDF uniform"]))
    assert str(caught.value) == (
        "both NATs draw from 64,512 ports and drop strangers: 57,172 probes expected, budget "
        "16,384; try home Wi-Fi, another SIM or IPv6 on one side, or more echoes, which may show "
        "blocks of ports"
    )


def test_whoever_allows_more_gets_a_plan_for_uniform_against_uniform() -> None:
    uniform = CLASSES["APDM/APDF uniform"]
    limits = Limits(probe_count=300_000, mapping_count=300_000, probes_per_s=5000)
    plans = both_plans(uniform, at_peer(uniform), limits)
    burst = plans[0].burst
    assert burst is not None
    assert burst.probe_count == pytest.approx(2.628 * 64_512 / 0.9, rel=0.01)
    assert plans[0].success_probability == 0.999


def test_a_burst_that_outlives_its_mappings_promises_less() -> None:
    wide = nat(Mapping.APDM, Filtering.APDF, PortAllocation(AllocationLaw.UNIFORM, 20_000, 30_000))
    long_lived = both_plans(wide, at_peer(wide))[0]
    short = replace(wide, idle_lifetime_s=5.0)
    short_lived = both_plans(short, at_peer(short))[0]
    assert long_lived.success_probability > 0.9
    assert short_lived.success_probability < long_lived.success_probability - 0.15


def test_strict_blocks_get_rounds_a_lifetime_apart_and_overloading_ones_do_not() -> None:
    strict = replace(CLASSES["APDM/APDF block"], idle_lifetime_s=30.0)
    burst = both_plans(strict, at_peer(strict))[0].burst
    assert burst is not None
    assert (burst.round_count, burst.round_interval_s) == (4, 31.0)
    assert both_plans(strict, at_peer(strict))[0].success_probability == pytest.approx(
        1 - 0.368**4, abs=0.002
    )
    overloading = replace(strict, allocation=replace(BLOCK, is_overloading=True))
    plan = both_plans(overloading, at_peer(overloading))[0]
    assert plan.burst is not None
    assert plan.burst.round_count == 1
    assert plan.success_probability == 0.999


@pytest.mark.parametrize(
    ("allocation", "opened", "expected"),
    [
        (UNIFORM, 253, 254),
        (BLOCK, 15, 16),
        (replace(BLOCK, block_size=64, blocks=(41_216,)), 7, 8),
        (COUNTER, 4, 1),
        (replace(COUNTER, others_per_s=100.0), 10, 11),
        (None, 128, 500),
    ],
)
def test_one_sided_sizes_follow_the_formulas(
    allocation: PortAllocation | None, opened: int, expected: int
) -> None:
    drawn = nat(Mapping.APDM, Filtering.APDF, allocation)
    prober, opener = both_plans(at_peer(CLASSES["EIM/APDF"]), drawn)
    assert opener.openers is not None
    assert opener.openers.port_count == opened
    assert round(prober.expected_probe_count) == expected
    assert prober.p99_probe_count > expected
    assert prober.burst is not None
    assert prober.burst.probe_count >= 2 * prober.p99_probe_count


def test_limits_bound_plans_and_say_so() -> None:
    known, drawn = CLASSES["EIM/APDF"], at_peer(CLASSES["APDM/APDF uniform"])
    plan = both_plans(known, drawn, Limits(probe_count=500, socket_count=200))[0]
    assert plan.burst is not None
    assert plan.burst.probe_count == 500
    assert plan.burst.run_length == 200
    assert plan.success_probability == pytest.approx(0.79, abs=0.01)
    with pytest.raises(PunctureFailed, match="expected, budget 200; allow more probes or time"):
        both_plans(known, drawn, Limits(probe_count=200))
    with pytest.raises(PunctureFailed, match="budget"):
        both_plans(known, drawn, Limits(duration_s=2.0))


def test_the_opener_ttl_goes_to_what_shall_not_arrive() -> None:
    limits = Limits(opener_ttl=4)
    known, drawn = CLASSES["EIM/APDF"], at_peer(CLASSES["APDM/APDF uniform"])
    prober, opener = both_plans(known, drawn, limits)
    assert opener.openers is not None
    assert opener.openers.ttl == 4
    assert prober.checks_ttl is None
    assert both_plans(known, at_peer(known), limits)[0].checks_ttl == 4
    assert both_plans(known, at_peer(CLASSES["public"]), limits)[0].checks_ttl is None


def test_several_public_addresses_are_all_probed() -> None:
    drawn = replace(CLASSES["APDM/APDF block"], public_ips=("198.51.100.1", "198.51.100.2"))
    prober, _ = both_plans(at_peer(CLASSES["EIM/APDF"]), drawn)
    assert prober.burst is not None
    assert prober.burst.ips == drawn.public_ips
    assert round(prober.expected_probe_count) == 22, "as one NAT with twice the ports"


# Host candidates ----------------------------------------------------------------------------------


def test_in_one_house_host_candidates_come_first_and_the_burst_waits_for_them() -> None:
    home = nat(Mapping.APDM, Filtering.APDF, BLOCK, local_ip="192.168.1.7")
    other = replace(home, local_endpoints=(Endpoint("192.168.1.8", 40_000),))
    plan, _ = both_plans(home, other)
    assert plan.strategy is Strategy.SAME_NETWORK
    assert plan.checks == other.local_endpoints
    assert plan.burst is None
    assert plan.duration_s == 2.0, "the same public address: likely the same house"
    assert plan.fallback is not None
    assert plan.fallback.strategy is Strategy.TWO_SIDED_BIRTHDAY
    far, _ = both_plans(home, at_peer(other))
    assert far.strategy is Strategy.TWO_SIDED_BIRTHDAY
    assert far.checks == other.local_endpoints, "by the way: carriers have several addresses"
    assert far.burst is not None
    assert far.burst.start_s == 0.0
    without, _ = both_plans(home, replace(other, local_endpoints=()))
    assert without.strategy is Strategy.TWO_SIDED_BIRTHDAY


def test_in_one_house_candidates_are_tried_where_nothing_else_would_do() -> None:
    uniform = replace(
        CLASSES["APDM/APDF uniform"], local_endpoints=(Endpoint("192.168.1.7", 40_000),)
    )
    other = replace(uniform, local_endpoints=(Endpoint("192.168.1.8", 40_000),))
    plans = both_plans(uniform, other)
    assert [plan.strategy for plan in plans] == [Strategy.SAME_NETWORK] * 2
    assert plans[0].checks == (Endpoint("192.168.1.8", 40_000),)
    assert plans[0].fallback is None


def test_candidates_that_cannot_be_the_peer_are_left_out() -> None:
    def candidates(mine: NatProfile, endpoint: Endpoint) -> tuple[Endpoint, ...]:
        theirs = replace(at_peer(CLASSES["APDM/APDF block"]), local_endpoints=(endpoint,))
        return plan_puncture(mine, theirs, my_id=LOW, their_id=HIGH).checks

    mine = CLASSES["EIM/APDF"]
    assert candidates(mine, Endpoint("10.0.0.9", 5)) == (Endpoint("10.0.0.9", 5),)
    assert candidates(mine, Endpoint("100.64.0.2", 5)) == (), "our own address, elsewhere"
    assert candidates(mine, Endpoint("127.0.0.1", 5)) == ()
    assert candidates(mine, Endpoint("2001:db8::9", 5)) == (), "we have no IPv6"
    dual = replace(mine, local_endpoints=(*mine.local_endpoints, Endpoint("2001:db8::1", 40_000)))
    assert candidates(dual, Endpoint("2001:db8::9", 5)) == (Endpoint("2001:db8::9", 5),)


def test_a_peer_nobody_has_seen_is_refused_with_what_to_do() -> None:
    seen_by_nobody = replace(at_peer(CLASSES["APDM/APDF block"]), public_ips=())
    with pytest.raises(PunctureFailed, match="connect it to one more peer"):
        plan_puncture(
            replace(CLASSES["EIM/APDF"], local_endpoints=()),
            seen_by_nobody,
            my_id=LOW,
            their_id=HIGH,
        )


def test_a_direct_plan_checks_what_it_is_given() -> None:
    endpoints = [Endpoint("198.51.100.1", 1), Endpoint("198.51.100.2", 2)]
    plan = plan_direct(endpoints)
    assert plan.checks == plan.targets == tuple(endpoints)
    assert plan.extra_port_count == 0
    assert str(plan) == "direct: the peer's endpoint is known"


allocations = st.sampled_from(
    [
        None,
        UNIFORM,
        BLOCK,
        COUNTER,
        replace(UNIFORM, low=9000, high=21_000, seen_low=10_000, seen_high=20_000),
        replace(BLOCK, block_size=64, blocks=(41_216, 2048)),
        replace(COUNTER, step=-2, others_per_s=50.0),
        PortAllocation(AllocationLaw.PRESERVING),
    ]
)


@st.composite
def any_profile(draw: st.DrawFn, ip: str, local_ip: str) -> NatProfile:
    profile = nat(
        draw(st.sampled_from([None, *Mapping])),
        draw(st.sampled_from([None, *Filtering])),
        draw(allocations),
        ip=ip,
        local_ip=local_ip,
    )
    if draw(st.booleans()):
        profile = replace(profile, main_endpoint=None)
    if draw(st.booleans()):
        profile = replace(profile, is_translated=draw(st.sampled_from([None, True])))
    return replace(profile, idle_lifetime_s=draw(st.sampled_from([None, 10.0, 65.0, 350.0])))


@given(
    any_profile("198.51.100.1", "100.64.0.2"),
    any_profile("203.0.113.1", "10.0.0.2"),
    st.booleans(),
    st.sampled_from([Limits(), Limits(probe_count=2000, socket_count=16), Limits(duration_s=20.0)]),
)
def test_any_two_profiles_get_halves_that_fit_or_two_refusals(
    mine: NatProfile, theirs: NatProfile, i_am_first: bool, limits: Limits
) -> None:
    refusal = ""
    try:
        plans = both_plans(mine, theirs, limits, i_am_first=i_am_first)
    except PunctureFailed as error:
        refusal = str(error)
    if refusal:
        assert "; " in refusal, "what to do is said after why"
        return
    check_complement(mine, theirs, plans)
    for plan in plans:
        if plan.burst is not None:
            total = plan.burst.probe_count * plan.burst.round_count
            assert total <= plan.probe_count_max
            assert len(plan.burst.port_indices) <= limits.socket_count
        if plan.openers is not None:
            assert plan.openers.port_count <= limits.socket_count
        assert plan.duration_s <= limits.duration_s + 1e-6
