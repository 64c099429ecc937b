"""The same on whole nodes: QUIC streams over punctured paths of a virtual internet, in real time.

What the fake mesh can't show: that streams of natswarm behave as the code here expects.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import numpy as np
import pytest
import trio
from fake_mesh import FakeMesh

from llmload.engine.generate import generate_tokens
from llmload.errors import StageFailed
from llmload.learn.exchange import Learner
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.outer import OuterSettings
from llmload.learn.trainer import Trainer, batches
from llmload.swarm.client import SwarmClient, SwarmTimeouts
from llmload.swarm.protocol import SESSION_PROTOCOL
from llmload.swarm.stage import StageServer
from natswarm import Identity, Internet, NodeConfig, VirtualNetwork, World, open_node, run_world

PROMPT = [5, 17, 3, 250, 17]
TIMEOUT_S = 30


@asynccontextmanager
async def open_mesh():
    """Two public nodes that know each other, and one behind a home router."""
    with trio.fail_after(TIMEOUT_S):
        internet = Internet(World(seed=5))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(run_world(internet.world))
            nodes = []
            for name, kind in (("first", "public"), ("second", "public"), ("home", "linux-home")):
                config = NodeConfig(
                    identity=Identity(name.encode().ljust(32, b".")),
                    network=VirtualNetwork(internet.add_host(name, kind)),
                    name=name,
                    seed=len(nodes),
                )
                nodes.append(await stack.enter_async_context(open_node(config)))
            first, second, home = nodes
            await second.connect(await first.invite())
            await home.connect(await first.invite())
            yield first, second, home


async def start_stages(stack, model, running, *nodes) -> list[StageServer]:
    stages = []
    for node, blocks in zip(nodes, (range(1), range(1, 3)), strict=True):
        stage = StageServer(node, stack(blocks), model.content_hash)
        node.serve(SESSION_PROTOCOL, partial(running.handle, stage.handle))
        await node.announce([stage.service])
        stages.append(stage)
    return stages


async def test_stages_on_real_streams(engines, stack, model, config, nursery):
    expected = list(generate_tokens([engines[config.blocks]], PROMPT, max_new_tokens=40))
    running = FakeMesh(nursery)  # only to wait for the handlers
    async with open_mesh() as (first, second, home):
        stages = await start_stages(stack, model, running, first, second)
        client = SwarmClient(home, model, timeouts=SwarmTimeouts(open_s=10, step_s=10, replica_s=0))

        async with client.generate(PROMPT, max_new_tokens=40) as answer:
            assert [offer.peer_id for offer in answer.route] == [first.peer_id, second.peer_id]
            assert [token.token_id async for token in answer] == expected
        await running.wait_quiet()
        assert [stage.statistics.failed_session_count for stage in stages] == [0, 0]

        with trio.CancelScope() as scope:
            async with client.generate(PROMPT) as answer:
                await anext(answer)
                scope.cancel()
                await anext(answer)
        await running.wait_quiet()
        assert [stage.cache_bytes for stage in stages] == [0, 0]

        async with client.generate(PROMPT) as answer:
            await anext(answer)
            await second.aclose()
            with pytest.raises(StageFailed, match=r"blocks 1-2\)"):
                async for _ in answer:
                    pass
        await running.wait_quiet()
        assert [stage.cache_bytes for stage in stages] == [0, 0]


async def test_learners_on_real_streams(config, weights):
    tokens = np.tile(np.arange(20), 30)
    async with open_mesh() as (first, _, home):
        learners = []
        for seed, node in enumerate((first, home)):
            trainer = Trainer(config, weights, optimizer=AdamWSettings(learning_rate=3e-3))
            text = batches(tokens, batch=2, time=16, rng=np.random.default_rng(seed))
            learner = Learner(node, trainer, text, "ab" * 32, settings=OuterSettings(local_steps=2))
            learner.start()
            await node.announce([learner.service])
            learners.append(learner)
        async with trio.open_nursery() as nursery:
            for learner in learners:
                nursery.start_soon(learner.run, 30)
        ours, theirs = learners
        assert ours.reports[home.peer_id].confirmed > 0
        assert theirs.reports[first.peer_id].confirmed > 0
        peers = await first.connect(home.peer_id), await home.connect(first.peer_id)
        round_number, parts = ours.round_number, range(ours.part_count)
        async with trio.open_nursery() as nursery:
            for learner, peer in zip(learners, peers, strict=True):
                nursery.start_soon(learner.average, [peer], round_number, parts)
        assert ours.outer.anchor.tobytes() == theirs.outer.anchor.tobytes()
