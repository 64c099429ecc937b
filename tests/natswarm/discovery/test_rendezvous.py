"""The appointments of two sides fit together, whatever is wrong with their clocks."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from natswarm.address import Endpoint
from natswarm.discovery.rendezvous import EPOCH_S, PHASE_S, SLOT_S, MeetingClock, profiles_at
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Mapping
from natswarm.nat.profile import NatProfile

SECRET = bytes(range(32))
SEEK_S = 20.0
# A moment that is far from the edges of an epoch.
NOON_S = 1_000_000 * EPOCH_S + 600.0


def appointments(*, is_first: bool, skew_s: float, begun_s: float, span_s: float):
    """Return (true start, appointment) of one side whose clock is fast by `skew_s`."""
    clock = MeetingClock(SECRET, is_first=is_first)
    now_s, found = begun_s, []
    while now_s < begun_s + span_s:
        each = clock.next(now_s + skew_s, seek_s=SEEK_S)
        now_s = each.starts_at_s - skew_s
        found.append((now_s, each))
        now_s += SEEK_S
    return found


@pytest.mark.parametrize("seed", range(50))
def test_two_sides_start_together_whatever_their_clocks(seed):
    print(f"seed {seed}")
    rng = random.Random(seed)
    skews = rng.uniform(-60, 60), rng.uniform(-60, 60)
    begun_s = NOON_S + rng.uniform(0, 120)
    first, second = (
        appointments(is_first=is_first, skew_s=skew_s, begun_s=begun_s, span_s=900)
        for is_first, skew_s in zip((True, False), skews, strict=True)
    )
    met = [
        (a, b) for started, a in first for begun, b in second if abs(started - begun) <= PHASE_S / 2
    ]
    assert met, skews
    for a, b in met:
        assert a.attempt == b.attempt
        assert (a.my_port, a.their_port) == (b.their_port, b.my_port)
        assert a.my_port != a.their_port


def test_right_clocks_meet_at_the_first_slot():
    first = MeetingClock(SECRET, is_first=True).next(NOON_S + 1)
    second = MeetingClock(SECRET, is_first=False).next(NOON_S + 119, seek_s=SEEK_S)
    assert first.starts_at_s == second.starts_at_s == NOON_S + SLOT_S
    assert first.attempt == second.attempt


def test_names_and_ports_change_with_the_epoch_and_the_pair():
    one = MeetingClock(SECRET, is_first=True)
    other = MeetingClock(SECRET[::-1], is_first=True)
    found = [
        each
        for clock in (one, other)
        for each in (clock.next(NOON_S), clock.next(NOON_S + EPOCH_S))
    ]
    assert len({each.attempt for each in found}) == 4
    assert len({each.my_port for each in found}) == 4
    assert one.next(NOON_S).attempt == found[0].attempt


def test_the_second_side_seeks_only_in_the_time_between():
    found = [each for _, each in appointments(
        is_first=False, skew_s=0, begun_s=NOON_S, span_s=600
    )]  # fmt: skip
    assert [each.starts_at_s for each in found[:2]] == [NOON_S, NOON_S + 24]
    for one, after in pairwise(found):
        assert after.starts_at_s >= one.starts_at_s + SEEK_S
    # It is there at the start of most slots.
    starts = {each.starts_at_s for each in found}
    assert len({NOON_S + index * SLOT_S for index in range(5)} & starts) >= 3
    phases = {each.starts_at_s % SLOT_S for each in found}
    assert len(phases) >= 10


def test_what_a_profile_says_of_a_fresh_socket():
    home = NatProfile(
        mapping=Mapping.APDM,
        allocation=PortAllocation(AllocationLaw.PRESERVING),
        public_ips=("203.0.113.1",),
        main_endpoint=Endpoint("203.0.113.1", 4000),
        local_endpoints=(Endpoint("192.168.1.2", 4000), Endpoint("203.0.113.1", 9999)),
        is_translated=True,
    )
    fresh, _ = profiles_at(home, NatProfile(), 21_000, 22_000)
    assert fresh.is_predictable
    assert fresh.main_endpoint == Endpoint("203.0.113.1", 21_000)
    assert fresh.local_endpoints == (Endpoint("192.168.1.2", 21_000),)


def test_what_draws_ports_is_known_nowhere():
    drawing = NatProfile(
        mapping=Mapping.EIM,
        allocation=PortAllocation(
            AllocationLaw.SEQUENTIAL, 1024, 5000, step=1, last_port=2000, others_per_s=3.0
        ),
        public_ips=("203.0.113.1",),
        main_endpoint=Endpoint("203.0.113.1", 4000),
        is_translated=True,
    )
    fresh, _ = profiles_at(drawing, NatProfile(), 21_000, 22_000)
    assert not fresh.is_predictable
    assert fresh.allocation == PortAllocation(AllocationLaw.UNIFORM, 1024, 5000)


PUBLIC = NatProfile(is_translated=False, main_endpoint=Endpoint("203.0.113.9", 4000))
BLOCK = NatProfile(
    mapping=Mapping.APDM,
    allocation=PortAllocation(AllocationLaw.BLOCK, 9472, 9727, block_size=256, blocks=(9472,)),
    public_ips=("203.0.113.2",),
    is_translated=True,
)


def test_an_old_block_is_tried_first_where_there_is_room_for_more():
    public, block = profiles_at(PUBLIC, BLOCK, 21_000, 22_000)
    assert public.main_endpoint == Endpoint("203.0.113.9", 21_000)
    assert block.allocation.ranges[0] == (9472, 9727)
    assert block.allocation.port_count == 64_512
    assert profiles_at(BLOCK, PUBLIC, 22_000, 21_000) == (block, public)
    assert profiles_at(BLOCK, BLOCK, 22_000, 21_000)[0].allocation == BLOCK.allocation
