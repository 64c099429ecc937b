"""A node that is wrong about its own NAT connects all the same, later."""

from __future__ import annotations

from dataclasses import replace

import pytest

from natswarm import PunctureStarted
from natswarm.nat.behaviour import Filtering


def is_elsewhere(profile):
    """As after the carrier has given it another block."""
    law = profile.allocation
    base = 2048 if law.blocks[0] != 2048 else 4096
    wrong = replace(law, low=base, high=base + law.block_size - 1, blocks=(base,))
    return replace(profile, allocation=wrong)


def tries(swarm, name: str, target: str) -> int:
    peer_id = swarm.identity(target).peer_id
    return sum(
        isinstance(event, PunctureStarted) and event.peer_id == peer_id
        for event in swarm.events[name]
    )


@pytest.mark.parametrize("asks", ["a", "b"])
async def test_strangers_do_not_get_in_after_all(open_swarm, autojump_clock, asks):
    async with open_swarm(seed=3) as swarm:
        await swarm.add_observers()
        await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "orange-bg")
        seen_at = swarm.peer("obs0", "b").seen_at
        b.adopt_profile(replace(b.profile, filtering=Filtering.EIF, main_endpoint=seen_at))
        other = "b" if asks == "a" else "a"
        await swarm.nodes[asks].connect(swarm.identity(other).peer_id)
        await swarm.check_talk("a", "b")
        assert tries(swarm, asks, other) == 1, "the guesses came in the same puncture"


@pytest.mark.parametrize("asks", ["a", "b"])
async def test_the_second_try_goes_by_a_new_look(open_swarm, autojump_clock, asks):
    async with open_swarm(seed=3) as swarm:
        await swarm.add_observers()
        await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "kpn-nl")
        right = b.profile.allocation.blocks
        b.adopt_profile(is_elsewhere(b.profile))
        other = "b" if asks == "a" else "a"
        await swarm.nodes[asks].connect(swarm.identity(other).peer_id)
        await swarm.check_talk("a", "b")
        assert tries(swarm, asks, other) == 2
        assert b.profile.allocation.blocks == right
