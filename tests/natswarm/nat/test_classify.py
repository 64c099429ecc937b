"""Classification by tables of what observers saw, liars among them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.classify import FilterTrial, Observation, classify
from natswarm.nat.profile import NatProfile
from tools.bench.simulated_inspection import peer_id

LOCAL = Endpoint("192.168.1.7", 40_000)
P1_P, P1_Q = Endpoint("198.51.100.1", 4000), Endpoint("198.51.100.1", 4001)
P2_P, P2_Q = Endpoint("198.51.100.2", 4000), Endpoint("198.51.100.2", 4001)
P3_P = Endpoint("198.51.100.3", 4000)
WAN = "203.0.113.5"


def seen(
    destination: Endpoint, port: int, *, ip: str = WAN, port_index: int = 0, at: float = 0.0
) -> Observation:
    return Observation(
        port_index=port_index,
        local_port=LOCAL.port + port_index,
        observer=peer_id(destination.ip),
        destination=destination,
        observed=Endpoint(ip, port),
        sent_at=at + port_index,
    )


def classified(*observations: Observation, trials: list[FilterTrial] | None = None) -> NatProfile:
    return classify(observations, local_endpoints=[LOCAL], filter_trials=trials or [])


@pytest.mark.parametrize(
    ("observations", "mapping", "port"),
    [
        # P1:p, P1:q, P2:p see equal, equal | equal, different | different
        ([seen(P1_P, 1), seen(P1_Q, 1), seen(P2_P, 1)], Mapping.EIM, 1),
        ([seen(P1_P, 1), seen(P1_Q, 1), seen(P2_P, 2)], Mapping.ADM, None),
        ([seen(P1_P, 1), seen(P1_Q, 2), seen(P2_P, 3)], Mapping.APDM, None),
        # without a second port at one address: EIM shows, the others cannot be told apart
        ([seen(P1_P, 1), seen(P2_P, 1)], Mapping.EIM, 1),
        ([seen(P1_P, 1), seen(P2_P, 2), seen(P3_P, 3)], Mapping.APDM, None),
        # with a single address: not EIM shows, EIM and ADM cannot be told apart
        ([seen(P1_P, 1), seen(P1_Q, 2)], Mapping.APDM, None),
        ([seen(P1_P, 1), seen(P1_Q, 1)], None, 1),
        ([seen(P1_P, 1)], None, 1),
        # one liar among three, in all three places
        ([seen(P1_P, 9), seen(P2_P, 1), seen(P3_P, 1)], Mapping.EIM, 1),
        ([seen(P1_P, 1), seen(P2_P, 9), seen(P3_P, 1)], Mapping.EIM, 1),
        ([seen(P1_P, 1), seen(P1_Q, 8), seen(P2_P, 1), seen(P3_P, 1)], Mapping.EIM, 1),
        # of six that see a small block, two see the same port by chance
        (
            [
                seen(Endpoint(f"198.51.100.{n}", 1), port)
                for n, port in enumerate([5, 6, 7, 8, 9, 5])
            ],
            Mapping.APDM,
            None,
        ),
        # a liar with two ports cannot vote twice
        ([seen(P1_P, 9), seen(P1_Q, 9), seen(P2_P, 1), seen(P3_P, 1)], Mapping.EIM, 1),
    ],
)
def test_mapping(observations: list[Observation], mapping: Mapping | None, port: int) -> None:
    profile = classified(*observations)
    assert profile.mapping is mapping
    assert profile.main_endpoint == (None if port is None else Endpoint(WAN, port))
    assert profile.is_translated is True
    assert profile.public_ips == (WAN,)


def trials(alternate: str, third: str = "") -> list[FilterTrial]:
    return [
        FilterTrial(by_stranger, mark == "+")
        for by_stranger, marks in ((False, alternate), (True, third))
        for mark in marks
    ]


@pytest.mark.parametrize(
    ("tried", "filtering"),
    [
        (trials(""), None),
        (trials("--"), None),  # too few to tell a filter from loss
        (trials("---", "---"), Filtering.APDF),
        (trials("----"), Filtering.APDF),
        (trials("-+--", "----"), Filtering.ADF),
        (trials("+"), Filtering.ADF),
        (trials("----", "--++"), Filtering.EIF),
        (trials("+", "+"), Filtering.EIF),
        # One alone came through a session that an earlier run has left in the NAT.
        (trials("----", "--+-"), Filtering.APDF),
        (trials("++++", "--+-"), Filtering.ADF),
        (trials("", "--+-"), None),
    ],
)
def test_filtering(tried: list[FilterTrial], filtering: Filtering | None) -> None:
    assert classified(seen(P1_P, 1), seen(P2_P, 1), trials=tried).filtering is filtering


def test_a_host_without_a_nat_is_open_as_soon_as_one_stranger_got_in() -> None:
    own = Endpoint(WAN, LOCAL.port)
    for marks, filtering in (("---+", Filtering.EIF), ("----", Filtering.APDF)):
        seen_here = [seen(P1_P, own.port), seen(P2_P, own.port)]
        profile = classify(
            seen_here, local_endpoints=[own], filter_trials=trials("----", third=marks)
        )
        assert (profile.is_translated, profile.filtering) == (False, filtering)


def test_one_liar_does_not_overwrite_our_address() -> None:
    lie = seen(P1_P, 1, ip="203.0.113.66")
    profile = classified(lie, seen(P2_P, 1), seen(P3_P, 1))
    assert profile.public_ips == (WAN,)
    assert profile.main_endpoint == Endpoint(WAN, 1)
    assert profile.observer_count == 2
    # ... however often and from however many ports it says so: its address has one vote.
    many = [seen(P1_P, 1, ip="203.0.113.66", port_index=index) for index in range(1, 16)]
    assert classified(lie, *many, seen(P2_P, 1), seen(P3_P, 1)).public_ips == (WAN,)


def test_two_who_contradict_each_other_leave_it_open() -> None:
    profile = classified(seen(P1_P, 1, ip="203.0.113.66"), seen(P2_P, 1))
    assert profile == NatProfile.unknown([LOCAL])


def test_a_pool_that_gives_each_port_another_address_shows_all_that_two_saw() -> None:
    other = "203.0.113.6"
    profile = classified(
        *(seen(place, 1) for place in (P1_P, P2_P, P3_P)),
        seen(P1_P, 5, ip=other, port_index=1),
        seen(P2_P, 6, ip=other, port_index=2),
        seen(P3_P, 7, ip="203.0.113.7", port_index=3),  # seen once: may be a lie
    )
    assert profile.public_ips == (WAN, other)


def test_an_observer_that_sees_our_own_address_means_no_nat() -> None:
    own = Endpoint(WAN, 40_000)
    profile = classify(
        [seen(P1_P, 40_000), seen(P2_P, 40_000)],
        local_endpoints=[own],
        filter_trials=trials("----", "----"),
    )
    assert profile.is_translated is False
    assert profile.main_endpoint == own
    assert profile.allocation is None
    assert profile.filtering is Filtering.APDF, "a firewall shows like a filter"
    assert not profile.accepts_strangers


def test_neighbours_in_one_house_say_nothing_of_the_nat() -> None:
    inside = seen(Endpoint("192.168.1.9", 4000), 40_000, ip="192.168.1.7")
    assert classified(inside) == NatProfile.unknown([LOCAL])
    assert classified(inside, seen(P1_P, 5), seen(P2_P, 5)).main_endpoint == Endpoint(WAN, 5)


def test_ipv6_observers_say_nothing_of_the_nat() -> None:
    over_ipv6 = seen(Endpoint("2001:db8::1", 4000), 40_000, ip="2606:4700::1")
    assert classified(over_ipv6) == NatProfile.unknown([LOCAL])


def test_without_echoes_a_global_address_of_our_own_is_taken_for_no_nat() -> None:
    own = Endpoint("8.8.4.4", 40_000)
    profile = classify([], local_endpoints=[LOCAL, own])
    assert profile.main_endpoint == own
    assert profile.is_translated is False
    assert profile.accepts_strangers
    assert classify([], local_endpoints=[LOCAL]) == NatProfile.unknown([LOCAL])


def test_a_preserved_port_is_known_beforehand_whatever_the_mapping() -> None:
    # APDM by number, and yet every peer sees the local port: only after a collision it moved.
    fresh = [seen(P1_P, LOCAL.port + index, port_index=index) for index in range(1, 9)]
    moved = seen(P1_Q, 55_555)
    profile = classified(seen(P1_P, LOCAL.port), moved, seen(P2_P, LOCAL.port, at=1.0), *fresh)
    assert profile.allocation is not None
    assert profile.allocation.law is AllocationLaw.PRESERVING
    assert profile.main_endpoint == Endpoint(WAN, LOCAL.port)
    assert profile.is_predictable


def test_behind_an_open_filter_any_seen_endpoint_can_be_dialled() -> None:
    profile = classified(
        seen(P1_P, 1), seen(P1_Q, 2, at=0.5), seen(P2_P, 3, at=0.7), trials=trials("+", "+")
    )
    assert profile.mapping is Mapping.APDM
    assert profile.accepts_strangers
    assert profile.main_endpoint == Endpoint(WAN, 3), "the newest lives longest"
    assert not profile.is_predictable


echo = st.builds(
    seen,
    st.sampled_from([P1_P, P1_Q, P2_P, P2_Q, P3_P]),
    st.integers(1, 65_535),
    ip=st.sampled_from([WAN, "203.0.113.66", "10.0.0.1", "2001:db8::1"]),
    port_index=st.integers(0, 5),
    at=st.floats(0, 10),
)


@given(st.lists(echo, max_size=12), st.randoms(use_true_random=False))
def test_any_echoes_in_any_order_make_one_valid_profile(
    echoes: list[Observation], rng: random.Random
) -> None:
    profile = classified(*echoes)
    assert profile.encode()
    times = [each.sent_at for each in echoes]
    if len(set(times)) == len(times):
        shuffled = list(echoes)
        rng.shuffle(shuffled)
        again = classified(*shuffled)
        assert (again.mapping, again.main_endpoint) == (profile.mapping, profile.main_endpoint)
        assert again.public_ips[:1] == profile.public_ips[:1]
