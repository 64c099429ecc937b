"""What `tools/bench/pipeline.py` measures, a function for each part."""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import trio
from numpy.typing import NDArray

from llmload import AdamWSettings, GPT2Config, Trainer, bundled_model_path, load_model
from llmload.config import parameter_shapes
from llmload.learn.pipeline.leader import PipelineSettings, PipelineTrainer, StepReport
from llmload.learn.pipeline.part import ModelPart
from llmload.learn.pipeline.protocol import (
    Backward,
    Forward,
    pack_rows,
    unpack_backward_untrusted,
    unpack_forward_untrusted,
)
from llmload.learn.pipeline.schedule import cut_blocks
from llmload.learn.pipeline.stage import TrainingStage
from llmload.learn.shards import Vector
from llmload.learn.trainer import Batch, batches
from llmload.swarm.codec import CODECS, Codec
from llmload.swarm.stage_session import Compute
from llmload.weights import random_weights
from natswarm import Node
from natswarm.sim.link import LinkConditions
from tools.bench.simulated_learning import read_text
from tools.bench.virtual_swarm import (
    CARRIERS,
    VirtualSwarm,
    open_virtual_swarm,
    run_in_virtual_time,
)

__all__ = [
    "measure_bubble",
    "measure_codecs",
    "measure_kills",
    "measure_memory",
    "measure_role",
    "measure_steps",
]

T = TypeVar("T")

TINY = GPT2Config(vocab_size=64, n_ctx=16, n_embd=16, n_layer=4, n_head=2)
SMALL = GPT2Config.from_folder(bundled_model_path())
GPT2_124M = GPT2Config(vocab_size=50257, n_ctx=1024, n_embd=768, n_layer=12, n_head=12)
OPTIMIZER = AdamWSettings()
RATE = 3e-4
MODEL_HASH = "0123456789abcdef" * 4
MICRO_BATCHES = 8

# Modelled computing of one micro-batch in a stage; back includes forward once more. The leader's
# own block and the loss are as much as a stage.
FORWARD_S, BACKWARD_S = 0.1, 0.3
DELAYS_S = (0.0, 0.02, 0.1)


async def in_modelled_time(work: Callable[..., T], /, *arguments: Any) -> T:
    """Compute, and let virtual time go by as the model has it."""
    name = getattr(work, "__name__", "")
    seconds = {"forward": FORWARD_S, "backward": BACKWARD_S, "losses": FORWARD_S + BACKWARD_S}
    await trio.sleep(seconds.get(name, 0.0))
    return work(*arguments)


@dataclass(kw_only=True)
class Course:
    """One training over a virtual swarm.

    Attributes:
        config: The shape of the model.
        weights: It begins with.
        folder: For states.
        batches_at: What it learns from.
        compute: Of all devices.
        reports: Of its steps, and when each was made.
    """

    config: GPT2Config
    weights: Mapping[str, NDArray[np.float32]]
    folder: Path
    batches_at: Callable[[int], Sequence[Batch]]
    compute: Compute
    reports: list[tuple[float, StepReport]] = field(default_factory=list)

    def open_part(self, blocks: range, optimizer: AdamWSettings) -> ModelPart:
        """Read some blocks."""
        return ModelPart(self.config, blocks, self.weights.__getitem__, optimizer=optimizer)

    async def lend(self, node: Node, name: str) -> None:
        """Let a node offer room for everything."""
        stage = TrainingStage(
            node,
            self.config,
            MODEL_HASH,
            open_part=self.open_part,
            folder=self.folder / name,
            room=self.config.n_layer - 1,
            compute=self.compute,
        )
        stage.start()
        await node.announce([stage.service])

    def leader(self, node: Node, stage_count: int, **settings: Any) -> PipelineTrainer:
        """Return what leads it."""
        return PipelineTrainer(
            node,
            self.config,
            MODEL_HASH,
            open_part=self.open_part,
            folder=self.folder / "out",
            batches_at=self.batches_at,
            optimizer=OPTIMIZER,
            rate_at=lambda _step: RATE,
            settings=PipelineSettings(stage_count=stage_count, **settings),
            compute=self.compute,
            after_step=lambda made: self.reports.append((trio.current_time(), made)),
        )


def drawn(config: GPT2Config, count: int, batch: int, time: int) -> Callable[[int], list[Batch]]:
    """Return micro-batches of random tokens, as a function of the step."""

    def batches_at(step: int) -> list[Batch]:
        rng = np.random.default_rng(step)
        windows = rng.integers(config.vocab_size, size=(count, batch, time + 1))
        return [(rows[:, :-1], rows[:, 1:]) for rows in windows]

    return batches_at


# --- Steps ---------------------------------------------------------------------------------------


class Stopwatch:
    """Computes at once, in virtual time, and adds up the processor time of it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def compute(self, work: Callable[..., T], /, *arguments: Any) -> T:
        """Compute on the loop."""
        started_at = time.process_time()
        try:
            return work(*arguments)
        finally:
            self.seconds += time.process_time() - started_at
            await trio.lowlevel.checkpoint()


def measure_steps(seed: int, is_quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Return the processor time of a step, on one device and over stages, and time on the way."""
    count = 1 if is_quick else 8
    batches_at = drawn(SMALL, MICRO_BATCHES, 1, 128)
    weights = random_weights(SMALL, seed)
    rows = []
    for recompute in (None, 1):
        trainer = Trainer(SMALL, weights, optimizer=OPTIMIZER, recompute=recompute)
        steps = []
        for step in range(count + 1):
            started_at = time.process_time()
            trainer.step(batches_at(step), learning_rate=RATE)
            steps.append((time.process_time() - started_at,) * 2 + (0.0,))
        rows.append(_step_row("whole" if recompute is None else "whole, recompute 1", steps[1:]))
    for stage_count in (1, 3) if is_quick else (1, 2, 3):
        course = Course(
            config=SMALL,
            weights=weights,
            folder=folder / str(stage_count),
            batches_at=batches_at,
            compute=(watch := Stopwatch()).compute,
        )
        steps = run_in_virtual_time(_time_stages, course, watch, stage_count, count, seed)
        rows.append(_step_row(f"{stage_count} stages", steps))
    for row in rows:
        row["cpu_of_whole"] = round(row["cpu_s"] / rows[0]["cpu_s"], 2)
    return rows


async def _time_stages(
    course: Course, watch: Stopwatch, stage_count: int, count: int, seed: int
) -> list[tuple[float, ...]]:
    """Return of each step processor time, that of computing, and virtual time."""
    marks = []
    async with open_virtual_swarm(load_model(bundled_model_path()), {}, seed) as swarm:
        for index in range(stage_count):
            name = f"stage {index}"
            await course.lend(await swarm.add(name, "public"), name)

        def mark(_made: StepReport) -> None:
            marks.append((time.process_time(), watch.seconds, trio.current_time()))

        leader = course.leader(await swarm.add("leader", "public"), stage_count, keep_every=1000)
        leader._after_step = mark
        await leader.run(count + 1)
    # Without the first step, which makes the graphs.
    return [
        tuple(end - start for start, end in zip(before, after, strict=True))
        for before, after in itertools.pairwise(marks)
    ]


def _step_row(name: str, steps: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """Return the least of each: what else the machine does makes a time longer, never shorter."""
    cpu_s, computing_s, way_s = (round(min(each), 3) for each in zip(*steps, strict=True))
    return {"name": name, "cpu_s": cpu_s, "computing_s": computing_s, "on_the_way_s": way_s}


# --- The bubble ----------------------------------------------------------------------------------


def measure_bubble(seed: int, is_quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Return the time of a step over three stages, by the delay of the links."""
    rows = []
    for delay_s in DELAYS_S[::2] if is_quick else DELAYS_S:
        together, alone = (
            run_in_virtual_time(_time_order, folder / f"{delay_s}-{count}", count, delay_s, seed)
            for count in (MICRO_BATCHES, 1)
        )
        ideal_s = MICRO_BATCHES * (FORWARD_S + BACKWARD_S)
        rows.append(
            {
                "delay_ms": round(1000 * delay_s),
                "1f1b_s": round(together, 3),
                "one_at_a_time_s": round(MICRO_BATCHES * alone, 3),
                "speedup": round(MICRO_BATCHES * alone / together, 2),
                "bubble": round(1 - ideal_s / together, 3),
                "bubble_one_at_a_time": round(1 - ideal_s / (MICRO_BATCHES * alone), 3),
            }
        )
    return rows


async def _time_order(folder: Path, count: int, delay_s: float, seed: int) -> float:
    course = Course(
        config=TINY,
        weights=random_weights(TINY, seed),
        folder=folder,
        batches_at=drawn(TINY, count, 1, 8),
        compute=in_modelled_time,
    )
    link = LinkConditions(delay_s=delay_s / 2)  # up and down again
    async with open_virtual_swarm(load_model(bundled_model_path()), {}, seed) as swarm:
        for index in range(3):
            name = f"stage {index}"
            await course.lend(await swarm.add(name, "public"), name)
        leader = course.leader(await swarm.add("leader", "public"), 3, keep_every=1000)
        for running in swarm.running.values():
            uplink = running.host.uplink
            uplink.upload.conditions = uplink.download.conditions = link
        await leader.run(3)
    return statistics.median(made.seconds for _, made in course.reports[1:])


# --- Memory --------------------------------------------------------------------------------------


class LazyWeights(Mapping[str, NDArray[np.float32]]):
    """Random parameters, one in memory at a time."""

    def __init__(self, config: GPT2Config) -> None:
        self._shapes = parameter_shapes(config, config.blocks)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        rng = np.random.default_rng(len(name))
        return rng.standard_normal(self._shapes[name], dtype=np.float32) * np.float32(0.02)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def measure_memory(_seed: int, is_quick: bool, _folder: Path) -> dict[str, dict[str, Any]]:
    """Return the peaks of processes that train a part of the model: a step of 2 of 1 x 128."""
    model = "small" if is_quick else "124M"
    figures: dict[str, dict[str, Any]] = {}
    for role in ("nothing", "whole", "stage of 2", "stage of 3", "leader"):
        command = [sys.executable, "-m", "tools.bench.pipeline", "--role", model, role]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures[role] = {"model": model, **json.loads(output)}
    for facts in figures.values():
        facts["of_whole"] = round(facts["peak_mb"] / figures["whole"]["peak_mb"], 3)
    return figures


def measure_role(model: str, role: str) -> dict[str, Any]:
    """Train as one device would, and return the most memory that it had resident."""
    config = GPT2_124M if model == "124M" else SMALL
    weights = LazyWeights(config)
    made = drawn(config, 2, 1, 128)
    if role == "whole":
        trainer = Trainer(config, weights, recompute=1)
        trainer.step(made(0), learning_rate=RATE)
    elif role != "nothing":
        before_last = range(config.n_layer - 1)
        if role == "leader":
            blocks = range(config.n_layer - 1, config.n_layer)
        else:
            stage_count = int(role.rpartition(" ")[2])
            parts = cut_blocks(before_last, [config.n_layer] * stage_count)
            assert parts is not None, "there is room"
            blocks = parts[0]
        part = ModelPart(config, blocks, weights.__getitem__, optimizer=OPTIMIZER)
        _train_alone(part, config, made(0), is_leader=role == "leader")
    status = Path("/proc/self/status").read_text()  # Linux; `getrusage` would add the parent's
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return {"peak_mb": round(int(peak_kib) / 1024)}


def _train_alone(
    part: ModelPart, config: GPT2Config, parts: Sequence[Batch], *, is_leader: bool
) -> None:
    """Do what a step asks of one device, with all micro-batches in flight at once."""
    hidden = np.zeros((1, 128, config.n_embd), dtype=np.float32)
    if is_leader:
        for tokens, targets in parts:
            _, passed = part.losses(part.embed(tokens), targets, 2 * tokens.size)
            part.embed_backward(tokens, passed)
    else:
        kept = [part.forward(hidden + index) for index, _ in enumerate(parts)]
        for *inputs, result in kept:
            part.backward(inputs, result)
    part.apply(part.squared_norm() ** 0.5, RATE)


# --- Codecs --------------------------------------------------------------------------------------


def measure_codecs(seed: int, is_quick: bool, _folder: Path) -> dict[str, dict[str, Any]]:
    """Return the loss over two cuts by codec, and bytes of a token over one of them and back."""
    model = load_model(bundled_model_path())
    text = read_text("asyncio").tobytes().decode("utf-8", "replace")
    tokens = np.array(model.tokenizer.encode(text[:200_000]), dtype=np.int64)
    steps = 3 if is_quick else 20
    figures: dict[str, dict[str, Any]] = {}
    for codec in CODECS:
        losses, byte_count, token_count = _learn_rounded(
            model.config, model.weights, tokens, codec, steps, seed
        )
        figures[codec] = {
            "steps": steps,
            "loss": round(statistics.mean(losses[-5:]), 4),
            "bytes_per_token_and_hop": round(byte_count / token_count / 2, 1),
        }
    return figures


def _learn_rounded(
    config: GPT2Config,
    weights: Mapping[str, NDArray[np.float32]],
    text: NDArray[np.int64],
    codec: Codec,
    steps: int,
    seed: int,
) -> tuple[list[float], int, int]:
    """Return the loss of each step, bytes over both cuts, both ways, and tokens."""
    parts = [
        ModelPart(config, blocks, weights.__getitem__, optimizer=OPTIMIZER)
        for blocks in (range(2), range(2, 4), range(4, 6))
    ]
    *stages, last = parts
    drawing = batches(text, batch=2, time=64, rng=np.random.default_rng(seed))
    losses, byte_count, token_count = [], 0, 0

    def forward(rows: Vector) -> Vector:
        nonlocal byte_count
        taken, _, payload = pack_rows(rows, codec)
        byte_count += len(payload)
        batch, time, _ = rows.shape
        message = Forward(0, 0, batch, time, taken, is_validation=False)
        return unpack_forward_untrusted(message, bytes(payload), config, step=0, micro_batch=0)

    def back(rows: Vector) -> Vector:
        nonlocal byte_count
        taken, exponent, payload = pack_rows(rows, codec, lift=True)
        byte_count += len(payload)
        message = Backward(0, 0, taken, exponent, 0.0)
        _, found = unpack_backward_untrusted(
            message, bytes(payload), rows.shape, step=0, micro_batch=0
        )
        return found

    for _ in range(steps):
        micro_batches = [next(drawing) for _ in range(4)]
        size, loss = sum(tokens.size for tokens, _ in micro_batches), 0.0
        for tokens, targets in micro_batches:
            hidden, kept = last.embed(tokens), []
            for stage in stages:
                *inputs, result = stage.forward(hidden)
                kept.append(inputs)
                hidden = forward(result)
            share, passed = last.losses(hidden, targets, size)
            loss += share
            for stage in reversed(stages):
                passed = stage.backward(kept.pop(), back(passed))
            last.embed_backward(tokens, passed)
        norm = sum(part.squared_norm() for part in parts) ** 0.5
        for part in parts:
            part.apply(norm, RATE)
        losses.append(loss)
        token_count += size
    return losses, byte_count, token_count


# --- Kills ---------------------------------------------------------------------------------------

KILL_STEPS = 12
KEEP_EVERY = 3


def measure_kills(seed: int, is_quick: bool, folder: Path) -> dict[str, Any]:
    """Return what became of trainings of which a stage died, one for each seed."""
    count = 1 if is_quick else 20
    seeds = range(seed, seed + count)
    expected, duration_s, _ = run_in_virtual_time(_kill_one, folder / "undisturbed", seed, None)
    found = [run_in_virtual_time(_kill_one, folder / str(each), each, duration_s) for each in seeds]
    pauses = [pause_s for _, _, (_, _, pause_s) in found]
    return {
        "kills": count,
        "same_weights": sum(digest == expected for digest, _, _ in found),
        "met_a_stage": sum(failovers > 0 for _, _, (failovers, _, _) in found),
        "keep_every": KEEP_EVERY,
        "redone_max": max(redone for _, _, (_, redone, _) in found),
        "redone_mean": round(statistics.mean(redone for _, _, (_, redone, _) in found), 2),
        "pause_median_s": round(statistics.median(pauses), 2),
        "pause_max_s": round(max(pauses), 2),
    }


async def _kill_one(
    folder: Path, seed: int, duration_s: float | None
) -> tuple[bytes, float, tuple[int, int, float]]:
    """Train, and let a stage die before `duration_s`; return the weights and how it went."""
    rng = random.Random(seed)
    course = Course(
        config=TINY,
        weights=random_weights(TINY, 1),
        folder=folder,
        batches_at=drawn(TINY, MICRO_BATCHES, 1, 8),
        compute=in_modelled_time,
    )
    async with open_virtual_swarm(load_model(bundled_model_path()), {}, seed) as swarm:
        async with trio.open_nursery() as joining:
            for index in range(4):
                joining.start_soon(_join, swarm, course, f"stage {index}", rng.choice(CARRIERS))
        node = await swarm.add("leader", rng.choice(CARRIERS))
        leader = course.leader(node, 2, keep_every=KEEP_EVERY, codec="float32")
        started_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            if duration_s is not None:
                nursery.start_soon(
                    _kill, swarm, leader, rng, rng.uniform(0, 0.9 * duration_s), seed
                )
            await leader.run(KILL_STEPS)
            nursery.cancel_scope.cancel()
        duration_s = trio.current_time() - started_at
    first: dict[int, float] = {}  # when each step was made for the first time
    for at, made in course.reports:
        first.setdefault(made.step, at)
    times = [started_at, *first.values()]
    pause_s = max(after - before for before, after in itertools.pairwise(times))
    leader.snapshots.export(KILL_STEPS, folder / "model")
    files = sorted((folder / "model").glob("*.safetensors"))
    weights = b"".join(file.read_bytes() for file in files)
    return weights, duration_s, (leader.failover_count, leader.redone_count, pause_s)


async def _join(swarm: VirtualSwarm, course: Course, name: str, kind: str) -> None:
    await course.lend(await swarm.add(name, kind), name)


async def _kill(
    swarm: VirtualSwarm, leader: PipelineTrainer, rng: random.Random, after_s: float, seed: int
) -> None:
    await trio.sleep(after_s)
    while not leader.route:  # noqa: ASYNC110 (nothing tells of it)
        await trio.sleep(0.1)
    victim = swarm.name_of(rng.choice(leader.route).peer_id)
    await (swarm.crash(victim) if seed % 2 else swarm.leave(victim))
