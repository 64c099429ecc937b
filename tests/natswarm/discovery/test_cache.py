from __future__ import annotations

from dataclasses import replace

import pytest

from natswarm.address import Endpoint
from natswarm.discovery.cache import (
    NETWORKS_MAX,
    PEERS_MAX,
    CachedPeer,
    network_label,
    rejoin_order,
    score,
    surplus,
    with_answer,
    with_presence,
    with_silence,
)
from natswarm.identity import Identity

DAY_S = 86_400.0
NOW_S = 1_800_000_000.0
HOME, CAFE = network_label(["192.168.1.2"]), network_label(["10.3.0.9"])
PUBLIC = Endpoint("203.0.113.7", 4000)
AT_HOME = Endpoint("192.168.1.7", 4000)


def peer(number: int = 0, *, is_open: bool = True) -> CachedPeer:
    return CachedPeer(Identity(number.to_bytes(32, "big")).peer_id, None, is_open)


def test_who_answered_lately_comes_first():
    fresh = with_answer(peer(1), HOME, PUBLIC, NOW_S - 60)
    old = with_answer(peer(2), HOME, PUBLIC, NOW_S - 10 * DAY_S)
    failing = with_silence(with_silence(fresh, HOME, NOW_S), HOME, NOW_S)
    failing = replace(failing, peer_id=peer(3).peer_id)
    closed = replace(fresh, peer_id=peer(4).peer_id, is_open=False)
    elsewhere = with_answer(peer(5), CAFE, PUBLIC, NOW_S - 60)
    assert rejoin_order([old, closed, failing, elsewhere, fresh], HOME, NOW_S) == [
        fresh,
        failing,
        elsewhere,
        closed,
        old,
    ]


def test_private_endpoints_are_for_their_network():
    one = with_answer(peer(), HOME, AT_HOME, NOW_S)
    assert one.endpoints(HOME) == (AT_HOME,)
    assert one.endpoints(CAFE) == ()
    assert rejoin_order([one], CAFE, NOW_S) == []
    both = with_answer(one, CAFE, PUBLIC, NOW_S)
    assert both.endpoints(HOME) == (AT_HOME, PUBLIC)
    assert both.endpoints(CAFE) == (PUBLIC,)


def test_a_peer_that_moved_is_dialled_where_it_is_now():
    moved = with_answer(with_answer(peer(), HOME, AT_HOME, NOW_S), HOME, PUBLIC, NOW_S + 1)
    assert moved.endpoints(HOME) == (PUBLIC,)


def test_counts_fade_and_old_failures_are_forgiven():
    failed = with_answer(peer(), HOME, PUBLIC, NOW_S)
    for _ in range(6):
        failed = with_silence(failed, HOME, NOW_S)
    later = with_answer(failed, HOME, PUBLIC, NOW_S + 56 * DAY_S)
    seen = later.seen_from(HOME)
    assert seen is not None
    assert seen.answered_count == pytest.approx(1 + 1 / 16)
    assert seen.silent_count == pytest.approx(6 / 16)


def test_staying_connected_is_fresh_and_not_many_answers():
    one = with_answer(peer(), HOME, PUBLIC, NOW_S)
    for minute in range(100):
        one = with_presence(one, HOME, PUBLIC, NOW_S + 60 * minute)
    seen = one.seen_from(HOME)
    assert seen is not None
    assert seen.answered_count == pytest.approx(1, abs=0.01)
    assert seen.answered_at_s == NOW_S + 60 * 99


def test_a_clock_that_was_set_back_breaks_nothing():
    future = with_answer(peer(), HOME, PUBLIC, NOW_S + 1000 * DAY_S)
    assert score(future, HOME, NOW_S) == score(future, HOME, NOW_S + 1000 * DAY_S)
    assert with_answer(future, HOME, PUBLIC, NOW_S).answered_at_s == NOW_S


def test_silence_of_one_never_seen_is_no_news():
    assert with_silence(peer(), HOME, NOW_S) == peer()


def test_everything_is_bounded():
    one = peer()
    for number in range(3 * NETWORKS_MAX):
        one = with_answer(one, network_label([f"10.{number}.0.1"]), PUBLIC, NOW_S + number)
    assert len(one.sightings) == NETWORKS_MAX
    assert len(one.endpoints(HOME)) <= 4
    crowd = [with_answer(peer(n), HOME, PUBLIC, NOW_S - n) for n in range(PEERS_MAX + 5)]
    worst = {each.peer_id for each in surplus(reversed(crowd), HOME, NOW_S)}
    assert worst == {each.peer_id for each in crowd[PEERS_MAX:]}


def test_labels_of_networks():
    assert network_label(["192.168.1.2", "2001:db8::1"]) == network_label(["192.168.1.99"])
    assert network_label(["2001:db8::1"]) == network_label(["2001:db8::2%eth0"])
    assert network_label(["2001:db8::1"]) != network_label(["2001:db8:0:1::1"])
    assert network_label(["10.0.0.1", "10.0.1.1"]) == network_label(["10.0.1.1", "10.0.0.1"])
    assert network_label([]) != HOME
