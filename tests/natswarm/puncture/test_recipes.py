"""The bandit learns what fails between two networks, at a bounded price; a seed replays it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.errors import DecodeError
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.puncture.recipes import PAIRS_MAX, Recipes, Score, pair_label
from natswarm.puncture.strategy import Strategy

TFTP, TWO = Strategy.TFTP_HELPER, Strategy.TWO_SIDED_BIRTHDAY
WAYS = [(TFTP, 2.5), (TWO, 3.3)]


def punctures(chances: dict[Strategy, float], seed: int, count: int) -> tuple[list[Strategy], int]:
    """Carry out `count` punctures; return what was tried first in each, and how often in vain."""
    rng, recipes = random.Random(seed), Recipes()
    firsts, wasted = [], 0
    for _ in range(count):
        order = recipes.order("pair", WAYS, rng)
        assert sorted(order, key=list(Strategy).index) == [TFTP, TWO]  # nothing is left out
        opened_by = None
        for strategy in order:
            if rng.random() < chances[strategy]:
                opened_by = strategy
                break
        wasted += opened_by is not order[0]
        firsts.append(order[0])
        recipes.note("pair", order, opened_by)
    return firsts, wasted


@pytest.mark.parametrize("seed", range(30))
def test_what_always_fails_goes_last(seed):
    print(f"seed {seed}")
    firsts, wasted = punctures({TFTP: 0.0, TWO: 0.99}, seed, 200)
    assert firsts[0] is TFTP  # the planner's order, before anything is known
    assert wasted <= 20
    assert firsts[100:].count(TWO) >= 90


def test_the_regret_in_all():
    wasted = [punctures({TFTP: 0.0, TWO: 1.0}, seed, 200)[1] for seed in range(100)]
    assert sum(wasted) / 100 < 10, wasted  # 8.5 of 200


def test_what_works_as_the_planner_says_stays_first():
    firsts = [punctures({TFTP: 0.95, TWO: 0.95}, seed, 200)[0].count(TFTP) for seed in range(30)]
    assert sum(firsts) / 30 > 150, firsts


def test_a_network_that_was_rebuilt_is_learned_anew():
    rng, recipes = random.Random(1), Recipes()
    for _ in range(100):
        recipes.note("pair", [TFTP], None)
        recipes.note("pair", [TWO], TWO)
    for _ in range(150):
        recipes.note("pair", [TWO, TFTP], TFTP)
    orders = [recipes.order("pair", WAYS, rng) for _ in range(100)]
    assert sum(order[0] is TFTP for order in orders) > 90


def test_the_same_seed_learns_the_same():
    assert punctures({TFTP: 0.4, TWO: 0.6}, 7, 100) == punctures({TFTP: 0.4, TWO: 0.6}, 7, 100)


def test_only_what_was_tried_counts():
    recipes = Recipes()
    recipes.note("pair", [TFTP, TWO], TFTP)
    assert recipes.scores() == {"pair": {TFTP: Score(1.0, 0.0)}}
    recipes.note("other", [TFTP, TWO], None)
    assert recipes.scores()["other"] == {TFTP: Score(0.0, 1.0), TWO: Score(0.0, 1.0)}


def test_bounds_and_the_stored_form():
    recipes = Recipes()
    for index in range(PAIRS_MAX + 10):
        recipes.note(str(index), [TWO], TWO)
    assert len(recipes.scores()) == PAIRS_MAX
    assert "9" not in recipes.scores()
    again = Recipes.decode_untrusted(recipes.encode())
    assert list(again.scores().items()) == list(recipes.scores().items())
    again.clear()
    assert again.scores() == {}
    assert again.is_changed


@given(st.binary())
def test_damaged_recipes_are_a_decode_error(data):
    with pytest.raises(DecodeError):
        Recipes.decode_untrusted(data)


@pytest.mark.parametrize("value", ["-1", "1e9", "NaN", '"x"', "null"])
def test_scores_that_nobody_wrote_are_refused(value):
    form = b'{"pairs":{"p":{"direct":{"opened":%s,"failed":0}}}}' % value.encode()
    with pytest.raises(DecodeError):
        Recipes.decode_untrusted(form)


def test_a_pair_has_one_name_from_both_sides():
    carrier = NatProfile(
        mapping=Mapping.APDM,
        filtering=Filtering.APDF,
        allocation=PortAllocation(AllocationLaw.BLOCK, block_size=256, blocks=(1024,)),
        public_ips=("198.51.100.3",),
        is_translated=True,
    )
    public = NatProfile(public_ips=("2001:db8:1:2::3",), is_translated=False)
    name = "198.51.0.0/16 APDM/APDF block x 2001:db8::/32 no NAT"
    assert pair_label(carrier, public) == pair_label(public, carrier) == name
