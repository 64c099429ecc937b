"""Profiles that are wrong cost time, not the path; those that are right cost nothing more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from simulated_puncture import simulate, two_identities

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.puncture.doubt import DOUBT_AFTER_S, plan_in_doubt
from natswarm.puncture.plan import Limits, Strategy

if TYPE_CHECKING:
    from simulated_puncture import Lie

    from natswarm.nat.profile import NatProfile


def truth(profile: NatProfile) -> NatProfile:
    return profile


def takes_strangers(profile: NatProfile) -> NatProfile:
    """As after an answer that came through the session of an earlier run."""
    return replace(
        profile, filtering=Filtering.EIF, main_endpoint=Endpoint(profile.public_ips[0], 40_000)
    )


def takes_address(profile: NatProfile) -> NatProfile:
    return replace(profile, filtering=Filtering.ADF)


def has_helper(profile: NatProfile) -> NatProfile:
    return replace(profile, tftp_helper=True)


def keeps_its_endpoint(profile: NatProfile) -> NatProfile:
    return replace(
        profile, mapping=Mapping.EIM, main_endpoint=Endpoint(profile.public_ips[0], 40_000)
    )


def was_seen_by_one(profile: NatProfile) -> NatProfile:
    return replace(keeps_its_endpoint(profile), mapping=None)


CASES: list[tuple[tuple[str, str], tuple[Lie, Lie]]] = [
    (("linux-home", "orange-bg"), (truth, takes_strangers)),
    (("orange-bg", "linux-home"), (takes_strangers, truth)),
    (("linux-home", "orange-bg"), (takes_address, truth)),
    (("linux-home", "orange-bg"), (has_helper, truth)),
    (("linux-home", "orange-bg"), (truth, keeps_its_endpoint)),
    (("orange-bg", "linux-home"), (keeps_its_endpoint, truth)),
    (("orange-bg", "linux-home"), (was_seen_by_one, truth)),
    (("linux-home", "kpn-nl"), (truth, takes_strangers)),
    (("kpn-nl", "kpn-nl"), (takes_strangers, takes_strangers)),
]


@pytest.mark.parametrize(
    ("kinds", "lies"),
    CASES,
    ids=lambda each: " ".join(x if isinstance(x, str) else x.__name__ for x in each),
)
def test_a_wrong_profile_costs_time_not_the_path(
    kinds: tuple[str, str], lies: tuple[Lie, Lie]
) -> None:
    for seed in range(3):
        outcome = simulate(kinds, seed, lies=lies)
        assert outcome.is_found, f"seed {seed}"
        assert outcome.elapsed_s < 60.0, f"seed {seed}"
        assert not outcome.plans[0].guesses, "it asked first"


@pytest.mark.parametrize("kinds", [("linux-home", "linux-home"), ("lyca-nl", "orange-bg")])
def test_a_right_profile_costs_nothing_more(kinds: tuple[str, str]) -> None:
    outcome = simulate(kinds, 1, lies=(truth, truth))
    assert outcome.is_found
    assert outcome.elapsed_s < DOUBT_AFTER_S
    assert max(outcome.probe_counts) <= 5
    assert outcome.sides[0].machine.step_port_count == 0, "no ports were needed"


def test_who_guesses_anyway_or_has_no_time_or_leave_is_not_in_doubt() -> None:
    asks = simulate(("linux-home", "linux-home"), 1).profiles
    guesses = simulate(("linux-home", "orange-bg"), 1).profiles

    def steps(profiles: tuple[NatProfile, NatProfile], limits: Limits) -> list[Strategy]:
        mine, theirs = (identity.peer_id for identity in two_identities())
        plan = plan_in_doubt(*profiles, my_id=mine, their_id=theirs, limits=limits)
        assert plan.total_duration_s <= limits.duration_s
        return [step.strategy for step in plan.steps]

    birthday, asking = Strategy.ONE_SIDED_BIRTHDAY, Strategy.SIMULTANEOUS_OPEN
    assert steps(guesses, Limits()) == [birthday]
    assert steps(asks, Limits()) == [asking, birthday, birthday]
    assert steps(asks, Limits(duration_s=20.0)) == [asking, birthday]
    assert steps(asks, Limits(duration_s=10.0)) == [asking]
    assert steps(asks, Limits(strategies=(asking,))) == [asking]
