"""Names of stages, and the way through a model."""

from __future__ import annotations

import hashlib
import itertools
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmload.swarm.route import (
    NoRoute,
    RouteCosts,
    StageOffer,
    choose_route,
    format_blocks,
    parse_blocks,
    stage_offers,
    stage_service,
)
from natswarm import PeerId

HASH = "0123456789abcdef" * 4


def peer(name: str) -> PeerId:
    return PeerId(hashlib.sha256(name.encode()).digest())


def offer(first: int, last: int, name: str = "a") -> StageOffer:
    return StageOffer(first, last, peer(name))


def test_service_name_is_pinned():
    assert stage_service(HASH, range(3, 7)) == "llmload/stage/0123456789abcdef/3-6"


@given(st.integers(0, 11), st.integers(0, 11))
def test_announced_stage_is_found(a: int, b: int):
    blocks = range(min(a, b), max(a, b) + 1)
    record = SimpleNamespace(peer_id=peer("a"), services=("other/1", stage_service(HASH, blocks)))
    (found,) = stage_offers([record], model_hash=HASH, layer_count=12)
    assert (found.blocks, found.peer_id) == (blocks, peer("a"))


@pytest.mark.parametrize(
    "service",
    [
        "llmload/stage/fedcba9876543210/0-3",  # another model
        "llmload/stage/0123456789abcdef/3-2",
        "llmload/stage/0123456789abcdef/0-12",  # beyond the model
        "llmload/stage/0123456789abcdef/0-99999999999999999999",
        "llmload/stage/0123456789abcdef/-1-3",
        "llmload/stage/0123456789abcdef/٠-٣",  # digits, but not ASCII
        "llmload/stage/0123456789abcdef/0-3 ",
        "llmload/stage/0123456789abcdef/0",
        "llmload/learn/1",
        "",
    ],
)
def test_other_services_are_ignored(service: str):
    record = SimpleNamespace(peer_id=peer("a"), services=(service,))
    assert stage_offers([record], model_hash=HASH, layer_count=12) == []


def test_fewest_stages_win():
    thirds = [offer(0, 3, "a"), offer(4, 7, "b"), offer(8, 11, "c")]
    halves = [offer(0, 5, "d"), offer(6, 11, "e")]
    assert choose_route([*thirds, *halves], layer_count=12) == tuple(halves)
    assert choose_route(thirds, layer_count=12) == tuple(thirds)


def test_equal_routes_do_not_depend_on_the_order_of_offers():
    offers = [offer(first, first + 5, name) for first in (0, 6) for name in "abc"]
    routes = {choose_route(order, layer_count=12) for order in itertools.permutations(offers)}
    assert len(routes) == 1


def test_missing_blocks_are_named():
    with pytest.raises(NoRoute, match=r"serves block 0-1, 4, 9-11 of this model's 0-11") as caught:
        choose_route([offer(2, 3), offer(5, 8)], layer_count=12)
    assert caught.value.missing == (range(2), range(4, 5), range(9, 12))
    with pytest.raises(NoRoute, match="--blocks 0-11"):
        choose_route([], layer_count=12)


def test_a_stage_is_used_in_part_where_ranges_overlap():
    assert choose_route([offer(0, 6, "a"), offer(5, 11, "b")], layer_count=12) in (
        (offer(0, 6, "a"), offer(7, 11, "b")),
        (offer(0, 5, "a"), offer(6, 11, "b")),
        (offer(0, 4, "a"), offer(5, 11, "b")),
    )


def test_distance_speed_and_doubt_decide():
    offers = [offer(0, 5, "near"), offer(0, 5, "far"), offer(0, 5, "fast")]
    rtt_s = {(peer("us"), peer("near")): 0.01, (peer("us"), peer("far")): 0.2}
    rtt_s[peer("fast"), peer("us")] = 0.06  # either order will do
    costs = RouteCosts(client=peer("us"), rtt_s=rtt_s, default_block_s=0.01)
    assert choose_route(offers, layer_count=6, costs=costs) == (offer(0, 5, "near"),)
    costs.block_s[peer("fast")] = 0.001
    assert choose_route(offers, layer_count=6, costs=costs) == (offer(0, 5, "fast"),)
    costs.enter_s[peer("fast")] = 0.5
    assert choose_route(offers, layer_count=6, costs=costs) == (offer(0, 5, "near"),)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4),
    st.randoms(use_true_random=False),
)
def test_route_is_the_quickest_of_all(pairs: list[tuple[int, int]], rng: random.Random):
    names = "abcd"[: len(pairs)]
    offers = [offer(min(pair), max(pair), name) for pair, name in zip(pairs, names, strict=True)]
    peers = [peer(name) for name in names]
    ends = [*peers, peer("us")]
    costs = RouteCosts(
        client=peer("us"),
        block_s={one: rng.random() for one in peers},
        enter_s={one: rng.random() for one in peers},
        rtt_s={pair: rng.random() for pair in itertools.combinations(ends, 2)},
    )

    def seconds(holders: tuple[StageOffer, ...]) -> float:
        total, at = 0.0, peer("us")
        for one in holders:
            if one.peer_id != at:
                total += costs.hop_s(at, one.peer_id) + costs.enter_s[one.peer_id]
            total += costs.block_s[one.peer_id]
            at = one.peer_id
        return total + costs.hop_s(at, peer("us"))

    # Every way to say who computes each of the four blocks.
    serving = [[one for one in offers if block in one.blocks] for block in range(4)]
    ways = [seconds(holders) for holders in itertools.product(*serving)]
    try:
        route = choose_route(offers, layer_count=4, costs=costs)
    except NoRoute:
        assert not ways
    else:
        assert [block for one in route for block in one.blocks] == list(range(4))
        by_peer = {one.peer_id: one for one in offers}
        assert all(set(one.blocks) <= set(by_peer[one.peer_id].blocks) for one in route)
        chosen = tuple(by_peer[one.peer_id] for one in route for _ in one.blocks)
        assert seconds(chosen) == pytest.approx(min(ways))


@given(st.integers(0, 99), st.integers(0, 99))
def test_blocks_as_users_write_them(a: int, b: int):
    blocks = range(min(a, b), max(a, b) + 1)
    assert parse_blocks(format_blocks(blocks)) == blocks


@pytest.mark.parametrize("text", ["", "-", "3-", "-3", "5-2", "a-b", "1-2-3", "1:3", "1.5"])
def test_anything_else_is_no_range_of_blocks(text: str):
    with pytest.raises(ValueError, match="FIRST-LAST"):
        parse_blocks(text)
