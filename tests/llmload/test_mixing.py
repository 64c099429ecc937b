"""Groups: fair, agreed on without a message, and as fast as the theory says."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from llmload.learn.mixing import (
    group_of,
    groups,
    reducer,
    variance_left_by_groups,
)
from natswarm import PeerId

# Each round moves this many independent numbers at once: the mean of a round's variance is exact to
# about 1 % by the rounds alone.
DIMENSIONS = 64
ROUNDS = 100
WITHIN = 0.02


def members(count):
    return [PeerId(hashlib.sha256(bytes([index])).digest()) for index in range(count)]


def variance_left(count, one_round):
    """Return the mean share of variance that a round leaves; values drawn anew for each."""
    rng = np.random.default_rng(3)
    shares = []
    for index in range(ROUNDS):
        values = rng.standard_normal((count, DIMENSIONS))
        values -= values.mean(axis=0)
        after = one_round(values, index)
        shares.append(np.square(after).sum() / np.square(values).sum())
    return np.mean(shares)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_groups_mix_as_the_closed_form_says(size):
    peers = members(96)
    row_of = {peer: row for row, peer in enumerate(peers)}

    def one_round(values, index):
        after = values.copy()
        for group in groups(peers, round_number=index, size=size):
            rows = [row_of[member] for member in group]
            after[rows] = values[rows].mean(axis=0)
        return after

    assert variance_left(96, one_round) == pytest.approx(
        variance_left_by_groups(96, size), rel=WITHIN
    )


def test_the_closed_form_is_that_of_the_paper():
    assert [round(variance_left_by_groups(96, m), 3) for m in (2, 4, 8, 16)] == [
        0.495, 0.242, 0.116, 0.053
    ]  # fmt: skip


def test_everybody_finds_the_same_pairs_in_whatever_order_it_knows_the_others():
    peers = members(9)
    shuffled = random.Random(1).sample(peers, 9)
    for round_number in range(20):
        pairs = groups(peers, round_number=round_number)
        assert pairs == groups(shuffled, round_number=round_number)
        assert sorted(peer for pair in pairs for peer in pair) == sorted(peers)
        for me in peers:
            found = group_of(me, shuffled, round_number=round_number, size=4)
            assert me in found in groups(peers, round_number=round_number, size=4)


def test_all_others_are_met_about_as_often():
    peers = members(8)
    found = [group_of(peers[0], peers, round_number=index, size=2) for index in range(700)]
    met = [member for pair in found for member in pair]
    assert all(70 <= met.count(other) <= 130 for other in peers[1:])


def test_parts_are_spread_and_one_member_more_or_less_changes_only_its_own():
    peers = members(8)
    drawn = [reducer(peers, part=part, round_number=3) for part in range(800)]
    assert all(70 <= drawn.count(peer) <= 130 for peer in peers)
    for part, chosen in enumerate(drawn):
        without = reducer(peers[1:], part=part, round_number=3)
        assert without == chosen or chosen == peers[0]
    assert drawn != [reducer(peers, part=part, round_number=4) for part in range(800)]


def test_pairs_are_pinned():
    """Peers of different versions must agree on them."""
    peers = members(4)
    drawn = [
        [peers.index(member) for pair in groups(peers, round_number=index) for member in pair]
        for index in range(3)
    ]
    assert drawn == [[3, 1, 0, 2], [2, 3, 1, 0], [0, 3, 2, 1]]


def test_small_and_wrong_sizes():
    peers = members(3)
    assert group_of(peers[0], peers[:1], round_number=0, size=8) == (peers[0],)
    with pytest.raises(ValueError, match="groups of 0"):
        groups(peers, round_number=0, size=0)
