"""What it costs to spread a model over processes: GPT-2 124M over one to four stages here.

    python -m tools.bench.hops [--seed N] [--tokens N] [--quick] [--json]

Random weights; every stage is a `llmload up` of its own on loopback, so all that a real stage does
is in it: QUIC, checksums, receipts, threads. Only one stage computes at a time, so a token costs
the same processor time however the blocks are cut, and what a further stage adds is the hop. Each
number of stages has its turn in every round, and counts with the median of its tokens; beside them
the blocks are computed in this process, without a mesh.

The target is 3 ms for a hop and token at no delay; a busy machine makes it more. --quick takes four
layers of the same width and one round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import trio

from llmload import (
    EngineSettings,
    GPT2Config,
    Model,
    SwarmClient,
    load_model,
    open_stage,
)
from llmload.graph.stage import default_attention
from llmload.model_folder import save_config
from llmload.tokenizer import TOKENIZER_FILE_NAME, byte_tokenizer
from llmload.weights import random_weights, save_weights
from natswarm import Identity, Invite, NodeConfig, open_node

STAGES = (1, 2, 3, 4)
PROMPT_COUNT = 64
ROUNDS = 3
HOP_MS_MAX = 3.0
START_TIMEOUT_S = 120.0
LLMLOAD = [sys.executable, "-c", "from llmload.cli import main; main()"]


def make_model(folder: Path, seed: int, *, n_layer: int) -> Model:
    """Write GPT-2 124M, or its first layers, with random weights."""
    config = GPT2Config(vocab_size=50257, n_ctx=1024, n_embd=768, n_layer=n_layer, n_head=12)
    folder.mkdir()
    save_config(folder, config)
    save_weights(folder, random_weights(config, seed))
    (folder / TOKENIZER_FILE_NAME).write_text(byte_tokenizer().to_json(), encoding="utf-8")
    return load_model(folder)


def cut(n_layer: int, stage_count: int) -> list[range]:
    """Return the blocks of each stage, as equal as it goes."""
    ends = [round(n_layer * index / stage_count) for index in range(stage_count + 1)]
    return [range(*each) for each in itertools.pairwise(ends)]


def decode_here(model: Model, prompt: list[int], token_count: int) -> float:
    """Return the median seconds of a token on the blocks in this process, as a stage has them."""
    settings = EngineSettings(attention=default_attention(model.config), threads=1)
    engines = [
        open_stage(model.folder, range(block, block + 1), settings=settings)
        for block in model.config.blocks
    ]
    caches = [engine.new_cache() for engine in engines]
    new_ids, times = prompt, []
    for _ in range(token_count):
        started_at = time.perf_counter()
        x: Any = np.array([new_ids], dtype=np.int64)  # (1, time)
        for engine, cache in zip(engines, caches, strict=True):
            x = engine.run(x, cache)
        new_ids = [int(x[0, -1].argmax())]
        times.append(time.perf_counter() - started_at)
    return statistics.median(times[1:])


@contextmanager
def stage_process(model: Model, blocks: range, invite: str, state: Path) -> Iterator[str]:
    """Run `llmload up` for some blocks; yield its invite."""
    options = ["--model", str(model.folder), "--blocks", f"{blocks.start}-{blocks.stop - 1}"]
    options += ["--state", str(state), "--bind", "127.0.0.1", "--no-lan", "--no-gateway", "--json"]
    if invite:
        options += ["--join", invite]
    process = subprocess.Popen(
        [*LLMLOAD, "up", *options], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if (said := json.loads(line))["event"] == "serving":
                yield said["invite"]
                break
        else:
            raise RuntimeError(f"the stage of {blocks} ended; it says above why")
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def open_client(invites: list[Invite], model: Model) -> AsyncIterator[SwarmClient]:
    """Open a node that is connected to all stages."""
    config = NodeConfig(identity=Identity.generate(), bind_ip="127.0.0.1")
    async with open_node(config) as node:
        for invite in invites:
            await node.connect(invite)
        yield SwarmClient(node, model)


async def decode_on(
    invites: list[Invite], model: Model, prompt: list[int], token_count: int, stage_count: int
) -> float:
    """Return the median seconds of a token over the stages."""
    times: list[float] = []
    with trio.fail_after(START_TIMEOUT_S):
        async with open_client(invites, model) as client:
            route = await client.find_route()
            assert len(route) == stage_count, f"the route is {route}"
            generation = client.generate(
                prompt, max_new_tokens=token_count, speculate=False, check_share=0
            )
            async with generation as answer:
                last_at = time.perf_counter()
                async for _ in answer:
                    now = time.perf_counter()
                    times.append(now - last_at)
                    last_at = now
    return statistics.median(times[1:])


def measure(model: Model, prompt: list[int], token_count: int, rounds: int) -> dict[int, float]:
    """Return the seconds of a token for each number of stages, 0 for none: in this process."""
    found: dict[int, float] = dict.fromkeys((0, *STAGES), math.inf)
    counts = [count for count in STAGES if count <= model.config.n_layer]
    with tempfile.TemporaryDirectory() as states:
        for _ in range(rounds):
            found[0] = min(found[0], decode_here(model, prompt, token_count))
            for count in counts:
                step_s = _measure_stages(model, prompt, token_count, count, Path(states))
                found[count] = min(found[count], step_s)
    return {count: step_s for count, step_s in found.items() if step_s < math.inf}


def _measure_stages(
    model: Model, prompt: list[int], token_count: int, count: int, states: Path
) -> float:
    with ExitStack() as stack:
        invites: list[str] = []
        for index, blocks in enumerate(cut(model.config.n_layer, count)):
            first = invites[0] if invites else ""
            state = states / f"{count}-{index}"
            invites.append(stack.enter_context(stage_process(model, blocks, first, state)))
        parsed = [Invite.parse(invite) for invite in invites]
        return trio.run(partial(decode_on, parsed, model, prompt, token_count, count))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of weights and prompt")
    parser.add_argument("--tokens", type=int, default=64, help="in one run")
    parser.add_argument("--quick", action="store_true", help="four layers, one round")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    prompt = rng.integers(0, 50257, PROMPT_COUNT).tolist()
    with tempfile.TemporaryDirectory() as folder:
        # The prepared graphs, too, go when this ends.
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        n_layer = 4 if arguments.quick else 12
        model = make_model(Path(folder) / "gpt2", arguments.seed, n_layer=n_layer)
        rounds = 1 if arguments.quick else ROUNDS
        token_count = min(arguments.tokens, 24) if arguments.quick else arguments.tokens
        found = measure(model, prompt, token_count, rounds)
    most = max(found)
    hop_ms = 1000 * (found[most] - found[1]) / (most - 1)
    mesh_ms = 1000 * (found[1] - found[0])
    targets = {
        "hop_ms": {"value": round(hop_ms, 2), "target": HOP_MS_MAX, "ok": hop_ms <= HOP_MS_MAX}
    }
    figures = {
        "benchmark": "hops",
        "layers": n_layer,
        "token_ms": {str(count): round(1000 * step_s, 2) for count, step_s in found.items()},
        "first_stage_ms": round(mesh_ms, 2),
    }
    if arguments.json:
        print(json.dumps({**figures, "targets": targets}))
        return
    for count, step_s in found.items():
        where = f"{count} stages" if count else "this process"
        print(f"{where:14} {1000 * step_s:7.2f} ms a token")
    verdict = "met" if targets["hop_ms"]["ok"] else "MISSED"
    print(f"the mesh, with one stage: {mesh_ms:.2f} ms a token")
    print(f"each further hop: {hop_ms:.2f} ms a token, target {HOP_MS_MAX:g}: {verdict}")


if __name__ == "__main__":
    main()
