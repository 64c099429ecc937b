"""A model on fake nodes: whole for comparison, and in stages."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from llmload.engine.session import StageEngine
from llmload.model_folder import load_model
from llmload.swarm import client as client_module
from llmload.swarm import stage as stage_module
from llmload.swarm.client import SwarmClient, SwarmTimeouts
from llmload.swarm.route import StageOffer
from llmload.swarm.stage import StageLimits, StageServer

sys.path.append(str(Path(__file__).parents[1]))
from fake_mesh import FakeMesh

# Nothing here takes a second: who waits longer hangs.
IMPATIENT = SwarmTimeouts(open_s=10, step_s=10)
SPLITS = {2: (range(1), range(1, 3)), 3: (range(1), range(1, 2), range(2, 3))}


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch):
    """Who waits for a better reason waits in vain in many of these tests."""
    monkeypatch.setattr(client_module, "REASON_GRACE_S", 0.05)
    monkeypatch.setattr(stage_module, "REASON_GRACE_S", 0.05)


@pytest.fixture
def model(model_folder):
    """The model of all these tests, without an end token: random weights may well choose it."""
    loaded = load_model(model_folder)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, eos_token_id=None))


@pytest.fixture(scope="session")
def engines(config, weights):
    """Engines by their blocks; one serves any number of tests."""
    without_eos = dataclasses.replace(config, eos_token_id=None)
    ranges = {blocks for split in SPLITS.values() for blocks in split} | {config.blocks}
    return {blocks: StageEngine(without_eos, weights, blocks) for blocks in ranges}


@dataclasses.dataclass
class Pipeline:
    mesh: FakeMesh
    client: SwarmClient
    stages: list[StageServer]

    @property
    def route(self) -> list[StageOffer]:
        return [stage.offer for stage in self.stages]

    async def tokens(self, prompt, **options) -> list[int]:
        async with self.client.generate(prompt, **options) as answer:
            return [token.token_id async for token in answer]

    async def check_nothing_is_left(self) -> None:
        await self.mesh.wait_quiet()
        assert [stage.session_count for stage in self.stages] == [0] * len(self.stages)
        assert [stage.cache_bytes for stage in self.stages] == [0] * len(self.stages)
        assert not self.client._inboxes


@pytest.fixture
def pipeline(engines, model, nursery):
    """A function that makes a mesh with a client and the stages of a split."""

    def make(
        stage_count: int = 2,
        *,
        limits: StageLimits | None = None,
        timeouts: SwarmTimeouts | None = None,
    ) -> Pipeline:
        mesh = FakeMesh(nursery)
        stages = []
        for index, blocks in enumerate(SPLITS[stage_count]):
            node = mesh.node(f"stage {index}")
            stage = StageServer(node, engines[blocks], model.content_hash, limits=limits)
            stage.start()
            node.services = (stage.service,)
            stages.append(stage)
        client = SwarmClient(mesh.node("client"), model, timeouts=timeouts or IMPATIENT)
        return Pipeline(mesh, client, stages)

    return make
