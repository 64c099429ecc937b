"""The API over peers: whole nodes on a virtual internet, and what it says of where they are."""

from __future__ import annotations

import json
import urllib.request

import trio

from llmload.engine.generate import generate_tokens


async def test_answers_come_from_peers_that_can_be_seen(serving, mesh_source, model, engine):
    def look():
        with urllib.request.urlopen(f"{server.url}/swarm", timeout=20) as response:
            return json.load(response)

    async with mesh_source() as source, serving(source) as server:
        answer = await server.ask(
            lambda client: client.completions.create(
                model="model", prompt="the mesh", max_tokens=8, temperature=0
            )
        )
        seen = await trio.to_thread.run_sync(look)
    ids = model.tokenizer.encode("the mesh")
    expected = model.tokenizer.decode(list(generate_tokens([engine], ids, max_new_tokens=8)))
    assert answer.choices[0].text == expected
    assert [stage["blocks"] for stage in seen["route"]] == ["0", "1-2"]
    assert seen["route"][0]["name"] == "kim"
    assert seen["tokens_per_s"] > 0
    assert (seen["answering"], seen["waiting"], seen["n_ctx"]) == (0, 0, 96)
    kim = next(peer for peer in seen["peers"] if peer["name"] == "kim")
    assert kim["peer_id"] == seen["route"][0]["peer_id"]
    assert kim["network"] == seen["route"][0]["network"]
    assert kim["network"].endswith("/24")
    assert kim["blocks"] == "0"
