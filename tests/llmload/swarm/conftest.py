"""A model on fake nodes: whole for comparison, and in stages."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from llmload.engine.session import StageEngine
from llmload.model_folder import load_model
from llmload.swarm.blocks import BlockStack
from llmload.swarm.client import SwarmClient, SwarmTimeouts
from llmload.swarm.route import StageOffer
from llmload.swarm.stage import StageLimits, StageServer

sys.path.append(str(Path(__file__).parents[1]))
from fake_mesh import FakeMesh, compute_here

# Whoever finds nobody gives up at once.
IMPATIENT = SwarmTimeouts(open_s=10, step_s=10, replica_s=0)
SPLITS = {2: (range(1), range(1, 3)), 3: (range(1), range(1, 2), range(2, 3))}


@pytest.fixture
def model(model_folder):
    """The model of all these tests, without an end token: random weights may well choose it."""
    loaded = load_model(model_folder)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, eos_token_id=None))


@pytest.fixture(scope="session")
def engines(config, weights):
    """Engines by their blocks; one serves any number of tests."""
    without_eos = dataclasses.replace(config, eos_token_id=None)
    ranges = [range(index, index + 1) for index in config.blocks]
    return {
        blocks: StageEngine(without_eos, weights, blocks) for blocks in [*ranges, config.blocks]
    }


@pytest.fixture(scope="session")
def stack(engines):
    """A function that makes the stack of some blocks."""
    return lambda blocks: BlockStack([engines[range(index, index + 1)] for index in blocks])


@dataclasses.dataclass
class Pipeline:
    mesh: FakeMesh
    client: SwarmClient
    stages: list[StageServer]

    @property
    def route(self) -> list[StageOffer]:
        return [stage.offer for stage in self.stages]

    async def tokens(self, prompt, **options) -> list[int]:
        # Without guesses the number of steps is known.
        options.setdefault("speculate", False)
        options.setdefault("check_share", 0)
        async with self.client.generate(prompt, **options) as answer:
            return [token.token_id async for token in answer]

    async def check_nothing_is_left(self) -> None:
        await self.mesh.wait_quiet()
        assert [stage.session_count for stage in self.stages] == [0] * len(self.stages)
        assert [stage.cache_bytes for stage in self.stages] == [0] * len(self.stages)
        assert self.client.session_count == 0


@pytest.fixture
def pipeline(stack, model, nursery):
    """A function that makes a mesh with a client and the stages of a split.

    Its tests take `autojump_clock`: nothing here needs real time.
    """

    def make(
        stage_count: int = 2,
        *,
        limits: StageLimits | None = None,
        timeouts: SwarmTimeouts | None = None,
        replicas: int = 1,
    ) -> Pipeline:
        mesh = FakeMesh(nursery)
        stages = []
        for index, blocks in enumerate(SPLITS[stage_count] * replicas):
            node = mesh.node(f"stage {index}")
            stage = StageServer(
                node, stack(blocks), model.content_hash, limits=limits, compute=compute_here
            )
            stage.start()
            node.services = (stage.service,)
            stages.append(stage)
        client = SwarmClient(mesh.node("client"), model, timeouts=timeouts or IMPATIENT)
        return Pipeline(mesh, client, stages)

    return make
