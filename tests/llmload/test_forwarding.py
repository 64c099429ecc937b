"""Passing updates on: each hears each once, if somebody has both, and nobody decides it."""

from __future__ import annotations

import hashlib
import random
from itertools import combinations, permutations

import pytest

from llmload.learn.forwarding import Acquaintances
from natswarm import PeerId


def members(count):
    return [PeerId(hashlib.sha256(bytes([index])).digest()) for index in range(count)]


def acquaint(peers, cut):
    """Return what each knows once all have told, where some pairs never reach each other."""

    def partners(peer):
        return [other for other in peers if other != peer and {peer, other} not in cut]

    known = {peer: Acquaintances(peer) for peer in peers}
    for peer, acquaintances in known.items():
        for partner in partners(peer):
            acquaintances.tell(partner, [other.key for other in partners(partner)])
    return known, partners


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cut_count", [0, 1, 3, 8])
def test_each_pair_that_is_cut_has_one_who_passes_on(seed, cut_count):
    peers = members(8)
    pairs = [set(pair) for pair in combinations(peers, 2)]
    cut = random.Random(seed).sample(pairs, cut_count)
    known, partners = acquaint(peers, cut)
    passed = [
        (origin, target, peer)
        for peer in peers
        for origin in partners(peer)
        for target in known[peer].targets(origin)
    ]
    for a, b in permutations(peers, 2):
        through = {peer for origin, target, peer in passed if (origin, target) == (a, b)}
        both = set(partners(a)) & set(partners(b))
        assert len(through) == ({a, b} in cut and bool(both))
        assert through <= both
        if through:
            assert through == {peer for o, t, peer in passed if (o, t) == (b, a)}


def test_the_one_in_the_middle_of_three_passes_on():
    a, b, c = members(3)
    known, _ = acquaint([a, b, c], [{a, c}])
    assert known[b].targets(a) == [c]
    assert known[b].targets(c) == [a]
    assert known[a].targets(b) == known[c].targets(b) == []
    known[b].forget(c)
    assert known[b].targets(a) == []


def test_who_is_not_heard_is_told_by_several():
    me, *partners, far, made_up = members(8)
    acquaintances = Acquaintances(me)
    for partner in partners:
        acquaintances.tell(partner, [me.key, far.key])
    assert acquaintances.unheard_count(partners) == 1
    assert acquaintances.unheard_count([*partners, far]) == 0
    acquaintances.tell(partners[0], [far.key, made_up.key])
    assert acquaintances.unheard_count(partners) == 1, "one of five may make it up"
    acquaintances.tell(partners[1], [far.key, made_up.key])
    assert acquaintances.unheard_count(partners) == 2
    assert Acquaintances(me).unheard_count([]) == 0
