"""The API over peers: whole nodes on a virtual internet, and what it says of where they are."""

from __future__ import annotations

import json
import urllib.request
from contextlib import AsyncExitStack
from functools import partial

import trio

from llmload.engine.generate import generate_tokens
from llmload.engine.session import StageEngine
from llmload.serve.source import SwarmSource
from llmload.swarm.blocks import BlockStack
from llmload.swarm.stage import StageServer
from natswarm import Identity, Internet, NodeConfig, VirtualNetwork, World, open_node, run_world


async def test_answers_come_from_peers_that_can_be_seen(serving, model, engine):
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
            engines = [
                StageEngine(model.config, model.weights, range(block, block + 1))
                for block in blocks
            ]
            stage = StageServer(node, BlockStack(engines), model.content_hash)
            stage.start()
            await node.announce([stage.service])

        source = SwarmSource(home, model, codec="float32")
        async with serving(source) as server:
            answer = await server.ask(
                lambda client: client.completions.create(
                    model="model", prompt="the mesh", max_tokens=8, temperature=0
                )
            )
            seen = await trio.to_thread.run_sync(partial(get_json, f"{server.url}/swarm"))

        ids = model.tokenizer.encode("the mesh")
        expected = model.tokenizer.decode(list(generate_tokens([engine], ids, max_new_tokens=8)))
        assert answer.choices[0].text == expected
        assert [stage["blocks"] for stage in seen["route"]] == ["0", "1-2"]
        assert seen["route"][0]["name"] == "kim"
        assert seen["tokens_per_s"] > 0
        assert (seen["answering"], seen["waiting"], seen["n_ctx"]) == (0, 0, 96)
        peers = {peer["name"]: peer for peer in seen["peers"]}
        assert peers["kim"]["peer_id"] == str(kim.peer_id)
        assert peers["kim"]["network"] == seen["route"][0]["network"]
        assert peers["kim"]["network"].endswith("/24")
        assert peers["kim"]["blocks"] == "0"


def get_json(url):
    with urllib.request.urlopen(url, timeout=20) as response:
        return json.load(response)
