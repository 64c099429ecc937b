"""Votes: one for each address, one for each prefix, and what lies can do."""

from __future__ import annotations

import pytest

from natswarm.nat.votes import elect, elected_among, prefix_of


@pytest.mark.parametrize(
    ("ip", "prefix"),
    [
        ("198.51.100.7", "198.51.100.0/24"),
        ("2001:db8:1:2::3", "2001:db8:1::/48"),
    ],
)
def test_prefixes(ip: str, prefix: str) -> None:
    assert prefix_of(ip) == prefix


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ({}, None),
        ({"10.0.0.1": "a"}, "a"),
        # winner * 2/3 > runner-up
        ({"10.0.0.1": "a", "10.0.1.1": "b"}, None),
        ({"10.0.0.1": "a", "10.0.1.1": "b", "10.0.2.1": "a"}, "a"),
        (
            {"10.0.0.1": "a", "10.0.1.1": "b", "10.0.2.1": "a", "10.0.3.1": "b", "10.0.4.1": "a"},
            None,
        ),
        # a prefix full of liars has one vote
        ({**{f"10.0.0.{i}": "lie" for i in range(1, 50)}, "10.0.1.1": "a", "10.0.2.1": "a"}, "a"),
        # all in one prefix: the majority of addresses
        ({"10.0.0.1": "a", "10.0.0.2": "lie", "10.0.0.3": "a"}, "a"),
        # a prefix at odds with itself abstains
        ({"10.0.0.1": "a", "10.0.0.2": "b", "10.0.1.1": "b"}, "b"),
    ],
)
def test_elections(votes: dict[str, str], winner: str | None) -> None:
    assert elect(votes) == winner


def test_several_may_be_elected_by_voters_enough() -> None:
    approvals = {
        "10.0.0.1": ["a", "a", "b"],
        "10.0.1.1": ["a", "b"],
        "10.0.2.1": ["lie", "a", "lie"],
    }
    assert elected_among(approvals) == ["a", "b"]
    assert elected_among({"10.0.0.1": ["a"], "10.0.1.1": ["lie"]}) == []
    assert elected_among({"10.0.0.1": ["a", "c"]}) == ["a", "c"], "the only one is believed"
    assert elected_among({}) == []
