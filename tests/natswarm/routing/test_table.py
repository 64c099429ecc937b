"""Ids, buckets and the table: what is nearest, what is wanted, what may go."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.routing.distance import as_int, distance, id_in_bucket, key_of, shared_bits
from natswarm.routing.kbucket import RETRY_S, K, KBucket, Link
from natswarm.routing.table import NEAR_PER_PREFIX, PROBATION_S, RoutingTable

OWN = bytes(32)
IDS = st.binary(min_size=32, max_size=32)


def table_of(ids, *, links_max: int = 30, prefix=lambda _index: "") -> RoutingTable:
    table = RoutingTable(OWN, links_max=links_max)
    for index, node_id in enumerate(ids):
        if node_id != OWN:
            table.add_link(Link(node_id, float(index), prefix(index)))
    return table


def random_ids(count: int, seed: int = 1) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(32) for _ in range(count)]


@given(IDS, IDS, IDS)
def test_xor_is_a_metric_and_one_way(a, b, c):
    assert distance(a, b) == distance(b, a)
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)
    if b != c:
        assert distance(a, b) != distance(a, c)


@given(IDS, st.integers(0, 255), st.integers())
def test_an_id_drawn_for_a_bucket_is_in_it(own, index, seed):
    drawn = id_in_bucket(as_int(own), index, random.Random(seed))
    assert shared_bits(as_int(own), as_int(drawn)) == index


def test_keys_of_different_parts_differ():
    keys = [key_of(b"own", b"ab", b"c"), key_of(b"own", b"a", b"bc"), key_of(b"service", b"abc")]
    assert len(set(keys)) == 3


@given(st.lists(IDS, unique=True, max_size=60), IDS)
def test_nearest_are_sorted_and_buckets_hold_what_they_should(ids, target):
    table = table_of(ids)
    ranked = [link.node_id for link in table.nearest(as_int(target))]
    assert ranked == sorted(set(ids) - {OWN}, key=lambda each: distance(each, target))
    for index, links in table.links_by_bucket().items():
        assert all(shared_bits(0, link.number) == index for link in links)
    assert sum(map(len, table.links_by_bucket().values())) == len(table)


@given(st.lists(IDS, unique=True, max_size=50), st.lists(IDS, unique=True, max_size=50))
def test_what_is_wanted_is_known_and_not_linked(linked, mentioned):
    table = table_of(linked)
    for node_id in mentioned:
        table.add_candidate(node_id)
    wanted = table.wanted(0.0)
    assert len(wanted) == len(set(wanted))
    assert set(wanted) <= set(mentioned) - set(linked) - {OWN}


def test_who_comes_back_brings_hope_for_the_others():
    first, other = random_ids(2)
    table = RoutingTable(OWN)
    for node_id in (first, other):
        table.add_candidate(node_id)
        for _ in range(9):
            table.note_failure(node_id, 1000.0)
    assert table.wanted(1000.0 + RETRY_S) == []
    table.add_link(Link(first, 1000.0))
    assert table.wanted(1000.0 + RETRY_S) == [other]
    # Who comes for the first time says nothing of them.
    table.note_failure(other, 2000.0)
    table.add_link(Link(random_ids(3)[2], 2000.0))
    assert table.wanted(2000.0 + RETRY_S) == []


def test_the_nearest_are_wanted_first_and_empty_buckets_next():
    ids = random_ids(200)
    table = RoutingTable(OWN)
    for node_id in ids:
        table.add_candidate(node_id)
    nearest = sorted(ids, key=as_int)[:K]
    wanted = table.wanted(0.0)
    assert wanted[:K] == nearest
    depth = min(table.bucket_index(each) for each in nearest)
    assert {table.bucket_index(each) for each in wanted[K:]} == set(range(depth))


@given(st.integers(0, 1000), st.integers(9, 80))
def test_links_that_are_given_up_are_neither_near_nor_the_last_of_their_bucket(seed, count):
    table = table_of(random_ids(count, seed), links_max=16)
    near = {link.node_id for link in table.replicas(0, K)}
    while (spare := table.surplus(PROBATION_S + count)) is not None:
        index = table.bucket_index(spare.node_id)
        assert spare.node_id not in near
        table.remove_link(spare.node_id)
        if index < min(table.bucket_index(each) for each in near):
            assert table.links_by_bucket()[index]
    far = table.links_by_bucket()
    assert len(table) <= K + len(far)


def test_newcomers_get_their_time():
    table = table_of(random_ids(40), links_max=16)
    assert table.surplus(0.0) is None
    assert table.surplus(PROBATION_S + 40) is not None


def test_one_prefix_cannot_be_the_neighbourhood():
    ids = sorted(random_ids(60), key=as_int)
    table = table_of(ids, prefix=lambda index: "attacker" if index < 30 else f"home {index}")
    near = table.replicas(0, K)
    assert len(near) == K
    assert sum(link.prefix == "attacker" for link in near) == NEAR_PER_PREFIX
    # Where there is nobody else, it can.
    alone = table_of(ids[:30], prefix=lambda _index: "attacker")
    assert len(alone.replicas(0, K)) == K
    # And where links must go, theirs go first.
    assert table.surplus(1e6).prefix == "attacker"


def test_size_is_estimated_within_a_factor():
    rng = random.Random(5)
    for size in (100, 1000, 10_000):
        estimates = []
        for _ in range(30):
            nearest = sorted(rng.getrandbits(256) for _ in range(size))[:30]
            estimates.append(table_of(n.to_bytes(32, "big") for n in nearest).size_estimate())
        assert size / 1.5 < sorted(estimates)[15] < size * 1.5


def test_plausible_are_those_that_may_be_nearest():
    ids = sorted(random_ids(1000), key=as_int)
    table = table_of(ids[:30])
    rng = random.Random(2)
    targets = [rng.randbytes(32) for _ in range(200)]
    right = [min(ids, key=lambda each: distance(each, target)) for target in targets]
    assert sum(map(table.is_plausible, right, targets)) >= 190
    assert sum(map(table.is_plausible, rng.choices(ids, k=200), targets)) <= 10
    points = [table.point_near(targets[0], rng) for _ in range(50)]
    assert all(distance(point, targets[0]) < 2**256 // 1000 * K * 3 for point in points)


def test_a_table_too_small_to_be_found_is_refused():
    with pytest.raises(ValueError, match="at least 16 links, not 15"):
        RoutingTable(OWN, links_max=15)


def test_candidates_that_fail_wait_longer_each_time_and_go_first():
    bucket = KBucket()
    ids = random_ids(K + 1)
    for node_id in ids[:K]:
        assert bucket.add_candidate(node_id) is not None
    assert bucket.add_candidate(ids[0]) is None
    bucket.note_failure(ids[3], 0.0)
    assert ids[3] not in [each.node_id for each in bucket.candidates(RETRY_S - 1)]
    assert ids[3] in [each.node_id for each in bucket.candidates(RETRY_S)]
    bucket.note_failure(ids[3], RETRY_S)
    assert ids[3] not in [each.node_id for each in bucket.candidates(2 * RETRY_S)]
    bucket.add_candidate(ids[K])
    known = [each.node_id for each in bucket.candidates(1e9)]
    assert len(known) == K
    assert ids[3] not in known
    assert known[0] == ids[K]


def test_a_lost_link_stays_known():
    table = table_of(random_ids(3))
    lost = table.links()[0]
    table.remove_link(lost.node_id)
    assert table.link(lost.node_id) is None
    assert lost.node_id in table.wanted(0.0)
    table.add_link(Link(lost.node_id, 9.0))
    assert lost.node_id not in table.wanted(0.0)


def test_a_neighbour_may_ask_for_so_much_and_no_more():
    link = Link(random_ids(1)[0], 0.0)
    assert sum(link.take(1000.0) for _ in range(200)) == 60
    assert sum(link.take(1001.0) for _ in range(200)) == 20
    assert replace(link, strikes=1).is_suspect
    assert not link.is_suspect
