"""A server on loopback in the test's own task tree, and real clients in threads."""

from __future__ import annotations

import dataclasses
from contextlib import AsyncExitStack, asynccontextmanager

import openai
import pytest
import trio

from llmload.engine.session import StageEngine
from llmload.model_folder import load_model
from llmload.serve.app import make_app
from llmload.serve.local import LocalSource
from llmload.serve.server import listen, serve_app
from llmload.serve.source import SwarmSource
from llmload.swarm.blocks import BlockStack
from llmload.swarm.stage import StageServer
from natswarm import Identity, Internet, NodeConfig, VirtualNetwork, World, open_node, run_world

TIMEOUT_S = 60


@pytest.fixture
def model(model_folder):
    """Without an end token: random weights may well choose it."""
    loaded = load_model(model_folder)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, eos_token_id=None))


@pytest.fixture(scope="session")
def engine(config, weights):
    return StageEngine(dataclasses.replace(config, eos_token_id=None), weights)


@pytest.fixture
def local_source(model, engine):
    return LocalSource(model, engine, slot_count=16)


@dataclasses.dataclass
class Server:
    """Where it is, and how to ask it from a thread."""

    url: str

    async def ask(self, work):
        """Return what `work(client)` returns, run in a thread with OpenAI's client."""

        def run():
            with openai.OpenAI(
                base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=TIMEOUT_S
            ) as client:
                return work(client)

        return await trio.to_thread.run_sync(run)


@pytest.fixture
def serving(monkeypatch):
    """A function that serves a source while its block runs."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    @asynccontextmanager
    async def serve(source, *, answers_max=4, waiting_max=16):
        app = make_app(source, answers_max=answers_max, waiting_max=waiting_max)
        with trio.fail_after(TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                (url,) = await nursery.start(serve_app, app, listen("127.0.0.1", 0))
                yield Server(url)
                nursery.cancel_scope.cancel()

    return serve


@pytest.fixture
def mesh_source(model):
    """A function that opens a mesh: kim and otto serve the model, home asks them."""

    @asynccontextmanager
    async def open_mesh():
        internet = Internet(World(seed=5))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(run_world(internet.world))
            nodes = []
            for name, kind in (("kim", "public"), ("otto", "public"), ("home", "linux-home")):
                config = NodeConfig(
                    identity=Identity(name.encode().ljust(32, b".")),
                    network=VirtualNetwork(internet.add_host(name, kind)),
                    name=name,
                    seed=len(nodes),
                )
                nodes.append(await stack.enter_async_context(open_node(config)))
            kim, otto, home = nodes
            for node in (otto, home):
                await node.connect(await kim.invite())
            for node, blocks in ((kim, range(1)), (otto, range(1, 3))):
                stage = StageServer(
                    node, BlockStack.open(model.config, model.weights, blocks), model.content_hash
                )
                stage.start()
                await node.announce([stage.service])
            yield SwarmSource(home, model, codec="float32")

    return open_mesh
