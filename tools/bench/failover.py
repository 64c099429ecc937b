"""What it costs that a stage dies: whole nodes behind carriers on the virtual internet.

    python -m tools.bench.failover [--seed N] [--kills N] [--quick] [--json]

For each seed six devices behind carrier NATs serve the shipped model, each pair of them the same
third of its blocks, and a client generates. At a random token a random stage of its route dies:
every second one vanishes without a word, the others say goodbye. The text has to be that of one
device alone. Time lost: how much longer the step took in which another route took over.

Links, NATs, punctures, QUIC and the model are real, computing is 2 ms a block; the time is virtual,
so a busy machine changes nothing. 200 kills take some ten minutes of one core, --quick half a one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from dataclasses import asdict, dataclass

import trio

from llmload import Model, SamplingParameters, StageEngine, SwarmClient, generate_tokens
from tools.bench.virtual_swarm import (
    CARRIERS,
    VirtualSwarm,
    load_small_model,
    open_virtual_swarm,
    run_in_virtual_time,
)

PROMPT = "It was a cold morning, and Mr. Holmes"
TOKENS = 40
THIRDS = (range(2), range(2, 4), range(4, 6))
REPLICAS = 2
# The swarm has been there for a while: stages know each other.
LINKED_AFTER_S = 30.0
# Who reads along notices a pause of a second or two, and gives up after ten.
LOST_MEDIAN_S_MAX = 2.0
LOST_P99_S_MAX = 10.0


@dataclass(frozen=True, slots=True)
class Kill:
    """What became of one generation.

    Attributes:
        seed: Of the internet, the carriers, the victim and the token.
        is_crash: Whether the stage vanished without a word.
        stage: Which of the route died, 0 is the entry.
        token: Before which token.
        is_same: Whether the text is that of one device.
        failovers: How often another route took over.
        lost_s: How much longer steps with a change of route took; virtual.
        step_s: Median of the other steps; virtual.
    """

    seed: int
    is_crash: bool
    stage: int
    token: int
    is_same: bool
    failovers: int
    lost_s: float
    step_s: float


async def kill_one(model: Model, engines: dict[int, StageEngine], seed: int) -> Kill:
    """Generate while a stage dies."""
    rng = random.Random(seed)
    token, stage, is_crash = rng.randrange(1, TOKENS), rng.randrange(len(THIRDS)), seed % 2 == 1
    sampling = SamplingParameters(temperature=0.8, top_k=40, seed=seed)
    prompt = model.tokenizer.encode(PROMPT)
    async with open_virtual_swarm(model, engines, seed) as swarm:
        asker = await swarm.add("asker", rng.choice(CARRIERS))
        async with trio.open_nursery() as nursery:
            for index, blocks in enumerate(THIRDS * REPLICAS):
                nursery.start_soon(_join, swarm, f"stage {index}", rng.choice(CARRIERS), blocks)
        await trio.sleep(LINKED_AFTER_S)
        client = SwarmClient(asker, model)
        got: list[int] = []
        times: list[float] = []
        generation = client.generate(
            prompt, sampling=sampling, max_new_tokens=TOKENS, speculate=False
        )
        async with generation as answer:
            while True:
                if len(got) == token:
                    victim = swarm.name_of(answer.route[stage % len(answer.route)].peer_id)
                    await (swarm.crash(victim) if is_crash else swarm.leave(victim))
                started_at = trio.current_time()
                try:
                    got.append((await anext(answer)).token_id)
                except StopAsyncIteration:
                    break
                times.append(trio.current_time() - started_at)
            done = answer.statistics()
    whole = [engines[index] for index in model.config.blocks]
    expected = list(generate_tokens(whole, prompt, sampling=sampling, max_new_tokens=TOKENS))
    return Kill(
        seed=seed,
        is_crash=is_crash,
        stage=stage,
        token=token,
        is_same=got == expected,
        failovers=done.failover_count,
        lost_s=done.lost_s,
        step_s=statistics.median(times),
    )


async def _join(swarm: VirtualSwarm, name: str, kind: str, blocks: range) -> None:
    await swarm.add(name, kind)
    await swarm.serve(name, blocks)


def summarize(kills: list[Kill]) -> dict[str, float]:
    """Return the figures of all kills."""
    lost_s = sorted(kill.lost_s for kill in kills)
    crashed_s = [kill.lost_s for kill in kills if kill.is_crash]
    left_s = [kill.lost_s for kill in kills if not kill.is_crash]
    return {
        "kills": len(kills),
        "same_text": sum(kill.is_same for kill in kills),
        "lost_median_s": round(statistics.median(lost_s), 3),
        "lost_p99_s": round(lost_s[min(int(0.99 * len(lost_s)), len(lost_s) - 1)], 3),
        "lost_max_s": round(lost_s[-1], 3),
        "lost_median_crash_s": round(statistics.median(crashed_s or [0.0]), 3),
        "lost_median_leave_s": round(statistics.median(left_s or [0.0]), 3),
        "step_median_s": round(statistics.median(kill.step_s for kill in kills), 3),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="the first of the seeds")
    parser.add_argument("--kills", type=int, default=200, help="how many seeds")
    parser.add_argument("--quick", action="store_true", help="five seeds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    count = 5 if arguments.quick else arguments.kills
    model, engines = load_small_model()
    kills = []
    for seed in range(arguments.seed, arguments.seed + count):
        kills.append(run_in_virtual_time(kill_one, model, engines, seed))
        if not arguments.json:
            print(f"\r{len(kills)} of {count}", end="", file=sys.stderr, flush=True)
    figures = summarize(kills)
    targets = {
        "same_text": {
            "value": figures["same_text"],
            "target": count,
            "ok": figures["same_text"] == count,
        },
        "lost_median_s": {
            "value": figures["lost_median_s"],
            "target": LOST_MEDIAN_S_MAX,
            "ok": figures["lost_median_s"] <= LOST_MEDIAN_S_MAX,
        },
        "lost_p99_s": {
            "value": figures["lost_p99_s"],
            "target": LOST_P99_S_MAX,
            "ok": figures["lost_p99_s"] <= LOST_P99_S_MAX,
        },
    }
    if arguments.json:
        every = [asdict(kill) for kill in kills]
        print(json.dumps({"benchmark": "failover", **figures, "every": every, "targets": targets}))
        return
    print(file=sys.stderr)
    for name, value in figures.items():
        verdict = ""
        if name in targets:
            verdict = f"   target {targets[name]['target']:g}: "
            verdict += "met" if targets[name]["ok"] else "MISSED"
        print(f"{name:22} {value:8,.3f}{verdict}")
    for kill in kills:
        if not kill.is_same or kill.lost_s > LOST_P99_S_MAX:
            print(f"  {kill}")


if __name__ == "__main__":
    main()
