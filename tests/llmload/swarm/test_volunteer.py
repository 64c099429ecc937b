"""Volunteers together serve a whole model, and fill the gaps that others leave."""

from __future__ import annotations

import random

import pytest
import trio
from fake_mesh import FakeMesh, compute_here

from llmload.engine.generate import generate_tokens
from llmload.swarm.blocks import BlockStack
from llmload.swarm.client import SwarmClient
from llmload.swarm.placement import windows
from llmload.swarm.stage import StageLimits
from llmload.swarm.volunteer import Volunteer, block_bytes

PROMPT = [5, 17, 3, 250, 17]


class Volunteers:
    def __init__(self, nursery, engines, model):
        self.mesh = FakeMesh(nursery)
        self.engines = engines
        self.model = model
        self.nursery = nursery
        self.volunteers: dict[str, Volunteer] = {}
        self.changes: list[tuple[str, range, str]] = []
        self._scopes: dict[str, trio.CancelScope] = {}

    async def join(self, name: str, block_count: int) -> None:
        sizes = [1] * self.model.config.n_layer
        volunteer = self.volunteers[name] = Volunteer(
            self.mesh.node(name),
            self.model.config,
            self.model.content_hash,
            open_block=lambda block: self.engines[range(block, block + 1)],
            candidates=windows(sizes, block_count),
            limits=StageLimits(),
            on_change=lambda blocks, reason: self.changes.append((name, blocks, reason)),
            compute=compute_here,
            rng=random.Random(name),
        )
        self._scopes[name] = trio.CancelScope()

        async def run(task_status):
            with self._scopes[name]:
                await volunteer.run(task_status)

        await self.nursery.start(run)

    def leave(self, name: str) -> None:
        self._scopes[name].cancel()
        self.mesh.kill(self.mesh.nodes[self.volunteers.pop(name)._node.peer_id])

    def served(self) -> set[int]:
        return {block for one in self.volunteers.values() for block in one.server.offer.blocks}


@pytest.fixture
def volunteers(nursery, engines, model, monkeypatch):
    # All are equally quick, whatever else runs on this machine.
    monkeypatch.setattr(BlockStack, "measure_block_s", lambda _stack: 0.005)
    return Volunteers(nursery, engines, model)


async def test_three_with_room_for_one_block_make_a_model(
    autojump_clock, volunteers, engines, config, model
):
    for name in "abc":
        await volunteers.join(name, 1)
    assert volunteers.served() == {0, 1, 2}
    client = SwarmClient(volunteers.mesh.node("client"), model)
    async with client.generate(PROMPT, max_new_tokens=8) as answer:
        got = [token.token_id async for token in answer]
    assert got == list(generate_tokens([engines[config.blocks]], PROMPT, max_new_tokens=8))
    assert all(reason == "1 of them were missing" for _, _, reason in volunteers.changes)


async def test_a_gap_is_filled_by_who_is_needed_least(autojump_clock, volunteers):
    for name in "abcd":
        await volunteers.join(name, 1)
    (alone,) = [
        name
        for name, one in volunteers.volunteers.items()
        if sum(other.server.offer.blocks == one.server.offer.blocks
               for other in volunteers.volunteers.values()) == 1
    ][:1]  # fmt: skip
    volunteers.leave(alone)
    assert len(volunteers.served()) == 2
    await trio.sleep(120)
    assert volunteers.served() == {0, 1, 2}
    assert volunteers.changes[-1][2] == "the swarm needs these more"


async def test_nobody_moves_without_need(autojump_clock, volunteers):
    for name in "abcdef":
        await volunteers.join(name, 1)
    count = len(volunteers.changes)
    await trio.sleep(600)
    assert len(volunteers.changes) == count == 6


def test_size_of_blocks(config, weights):
    sizes = block_bytes(config)
    assert len(sizes) == config.n_layer
    tied = weights["wte.weight"].nbytes  # in the first and in the last engine
    assert sum(sizes) == sum(values.nbytes for values in weights.values()) + tied
    assert sizes[0] > sizes[1] < sizes[2]
    assert sum(block_bytes(config, 1)) * 4 == sum(sizes)
