"""A swarm that never stands still: twelve devices serve, four ask, one leaves every 20 seconds.

    python -m tools.bench.churn [--seed N] [--minutes M] [--picture FILE] [--quick] [--json]

Devices behind carrier NATs each have room for a third of the shipped model and choose their blocks
themselves. Every 20 s one of them leaves, every second one without a word, and a new one comes.
Four clients generate one text after the other. None may fail, and each text has to be that of one
device alone. What users notice is the longest wait for one token, too.

Links, NATs, punctures, QUIC and the model are real, computing is 2 ms a block; the time is virtual,
so a busy machine changes nothing. Ten minutes take some fifteen of one core, --quick a minute and a
half of virtual time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from llmload import (
    LlmloadError,
    Model,
    SamplingParameters,
    StageEngine,
    SwarmClient,
    generate_tokens,
)
from natswarm import NatswarmError
from tools.bench.virtual_swarm import (
    CARRIERS,
    VirtualSwarm,
    load_small_model,
    open_virtual_swarm,
    run_in_virtual_time,
)

DEVICES = 12
CLIENTS = 4
ROOM_BLOCKS = 2
CHANGE_EVERY_S = 20.0
# The swarm has been there for a while: all serve, stages know each other.
SETTLED_AFTER_S = 90.0
TOKENS = 48
PROMPTS = (
    "It was a cold morning, and Mr. Holmes",
    "The whale rose out of the sea and",
    "My dear Emma, you must not",
    "Fellow citizens of the Senate and",
)
BIN_S = 10.0


@dataclass(slots=True)
class Course:
    """What happened; times are virtual seconds since the first client began.

    Attributes:
        token_times: When each token came, of all clients.
        waits_s: How long each was waited for, the first of each text aside.
        changes: When a device left.
        texts: Texts that came to their end.
        wrong: Of those, texts that differ from one device's.
        failures: Why generations failed.
        failovers: How often another route took over.
    """

    token_times: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    texts: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    failovers: int = 0


async def run_swarm(
    model: Model, engines: dict[int, StageEngine], seed: int, duration_s: float
) -> Course:
    """Let the swarm run; return what happened."""
    rng = random.Random(seed)
    course = Course()
    async with open_virtual_swarm(model, engines, seed) as swarm:
        clients = [f"client {index}" for index in range(CLIENTS)]
        devices = [f"device {index}" for index in range(DEVICES)]
        async with trio.open_nursery() as nursery:
            for name in clients:
                nursery.start_soon(swarm.add, name, rng.choice(CARRIERS))
            for name in devices:
                nursery.start_soon(_join, swarm, name, rng.choice(CARRIERS))
        await trio.sleep(SETTLED_AFTER_S)
        began_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            for index, name in enumerate(clients):
                nursery.start_soon(
                    partial(_ask, swarm, name, index, course, began_at, duration_s, seed)
                )
            nursery.start_soon(_change, swarm, devices, course, began_at, duration_s, rng)
    return course


async def _join(swarm: VirtualSwarm, name: str, kind: str) -> None:
    await swarm.add(name, kind)
    await swarm.volunteer(name, ROOM_BLOCKS)


async def _change(
    swarm: VirtualSwarm,
    devices: list[str],
    course: Course,
    began_at: float,
    duration_s: float,
    rng: random.Random,
) -> None:
    """One leaves and one comes, again and again."""
    count = 0
    async with trio.open_nursery() as nursery:
        while trio.current_time() + CHANGE_EVERY_S < began_at + duration_s:
            await trio.sleep(CHANGE_EVERY_S)
            leaving = devices.pop(rng.randrange(len(devices)))
            course.changes.append(trio.current_time() - began_at)
            await (swarm.crash(leaving) if count % 2 else swarm.leave(leaving))
            devices.append(f"device {DEVICES + count}")
            nursery.start_soon(_join, swarm, devices[-1], rng.choice(CARRIERS))
            count += 1


async def _ask(
    swarm: VirtualSwarm,
    name: str,
    index: int,
    course: Course,
    began_at: float,
    duration_s: float,
    seed: int,
) -> None:
    """Generate one text after the other."""
    client = SwarmClient(swarm.node(name), swarm.model)
    prompt = swarm.model.tokenizer.encode(PROMPTS[index % len(PROMPTS)])
    while trio.current_time() < began_at + duration_s:
        sampling = SamplingParameters(
            temperature=0.8, top_k=40, seed=1000 * seed + CLIENTS * course.texts + index
        )
        got: list[int] = []
        last_at = None
        try:
            async with client.generate(prompt, sampling=sampling, max_new_tokens=TOKENS) as answer:
                async for token in answer:
                    now = trio.current_time()
                    got.append(token.token_id)
                    course.token_times.append(now - began_at)
                    if last_at is not None:
                        course.waits_s.append(now - last_at)
                    last_at = now
                course.failovers += answer.statistics().failover_count
        except (NatswarmError, LlmloadError) as error:
            course.failures.append(f"{name} after {len(got)} tokens: {error}")
            await trio.sleep(1.0)
            continue
        course.texts += 1
        alone = generate_tokens(swarm.whole, prompt, sampling=sampling, max_new_tokens=TOKENS)
        course.wrong += got != list(alone)


def rates(course: Course, duration_s: float) -> list[float]:
    """Return tokens/s of all clients in each `BIN_S`."""
    counts = [0] * int(duration_s / BIN_S)
    for at in course.token_times:
        if int(at / BIN_S) < len(counts):
            counts[int(at / BIN_S)] += 1
    return [count / BIN_S for count in counts]


def draw(course: Course, duration_s: float, path: Path) -> None:
    """Draw tokens/s over time, with a line wherever a device left."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.6), layout="constrained")
    for at in course.changes:
        axes.axvline(at, color="0.85", linewidth=1)
    values = rates(course, duration_s)
    axes.stairs(values, [BIN_S * index for index in range(len(values) + 1)], linewidth=1.5)
    axes.set(
        xlim=(0, duration_s),
        ylim=(0, None),
        xlabel="seconds; a grey line: one device leaves, another comes",
        ylabel="tokens/s, four clients",
    )
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of everything")
    parser.add_argument("--minutes", type=float, default=10.0, help="virtual")
    parser.add_argument("--picture", type=Path, help="draw tokens/s over time into this SVG file")
    parser.add_argument("--quick", action="store_true", help="a minute and a half")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    duration_s = 90.0 if arguments.quick else 60.0 * arguments.minutes
    model, engines = load_small_model()
    course = run_in_virtual_time(run_swarm, model, engines, arguments.seed, duration_s)
    if arguments.picture is not None:
        draw(course, duration_s, arguments.picture)
    waits = sorted(course.waits_s)
    figures: dict[str, Any] = {
        "texts": course.texts,
        "tokens": len(course.token_times),
        "tokens_per_s": round(len(course.token_times) / duration_s, 2),
        "lowest_tokens_per_s": min(rates(course, duration_s)),
        "changes": len(course.changes),
        "failovers": course.failovers,
        "wait_median_s": round(statistics.median(waits), 3),
        "wait_p99_s": round(waits[int(0.99 * len(waits))], 3),
        "wait_max_s": round(waits[-1], 3),
    }
    targets = {
        "failed": {"value": len(course.failures), "target": 0, "ok": not course.failures},
        "wrong_texts": {"value": course.wrong, "target": 0, "ok": not course.wrong},
    }
    if arguments.json:
        rest = {"failures": course.failures, "tokens_per_s_of": rates(course, duration_s)}
        print(json.dumps({"benchmark": "churn", **figures, **rest, "targets": targets}))
        return
    for name, value in figures.items():
        print(f"{name:22} {value:10,}")
    for name, target in targets.items():
        verdict = "met" if target["ok"] else "MISSED"
        print(f"{name:22} {target['value']:10}   target {target['target']}: {verdict}")
    for failure in course.failures:
        print(f"  {failure}", file=sys.stderr)


if __name__ == "__main__":
    main()
