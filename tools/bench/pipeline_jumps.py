"""How wrong a stage may compute before the validation tells; a part of `tools/bench/pipeline.py`.

The shipped model learns in two parts, without a mesh between them. At every fourth validation it is
also asked whether the loss had jumped, if what leaves the first part were wrong from now on.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmload import AdamWSettings, bundled_model_path, load_model
from llmload.learn.pipeline.jump import LATEST_MAX, JumpWatch
from llmload.learn.pipeline.part import ModelPart
from llmload.learn.shards import Vector
from llmload.learn.trainer import Batch, batches
from tools.bench.simulated_learning import read_text

__all__ = ["measure_jumps"]

RATES = (3e-4, 3e-3)  # as `llmload learn` has it, and so high that the loss wavers
CUT = 4
STEPS_BETWEEN = 4
WINDOW = 64
ASKED_EVERY = 4


def measure_jumps(seed: int, is_quick: bool, _folder: Path) -> list[dict[str, Any]]:
    """Return for each learning rate how many validations jump, right and wrong ones."""
    rng = np.random.default_rng
    if is_quick:
        return [_watch(RATES[0], LATEST_MAX + 1, 1, rng(seed))]
    return [_watch(rate, 100, STEPS_BETWEEN, rng(seed)) for rate in RATES]


def _watch(
    rate: float, validation_count: int, steps_between: int, rng: np.random.Generator
) -> dict[str, Any]:
    model = load_model(bundled_model_path())
    text = read_text("asyncio").tobytes().decode("utf-8", "replace")
    tokens = np.array(model.tokenizer.encode(text), dtype=np.int64)
    cut = int(0.95 * len(tokens))
    drawing = batches(tokens[:cut], batch=2, time=WINDOW, rng=rng)
    held_out = next(batches(tokens[cut:], batch=16, time=WINDOW, rng=rng))
    blocks = model.config.blocks
    stage, last = (
        ModelPart(
            model.config,
            part,
            model.weights.__getitem__,
            optimizer=AdamWSettings(learning_rate=rate),
        )
        for part in (blocks[:CUT], blocks[CUT:])
    )
    watch, false_alarms = JumpWatch(), 0
    errors = _errors(rng)
    seen: dict[str, list[bool]] = {name: [] for name in errors}
    rises: dict[str, list[float]] = {name: [] for name in errors}
    for index in range(validation_count):
        for _ in range(steps_between):
            _step(stage, last, next(drawing), rate)
        loss = _loss(stage, last, held_out)
        if index >= LATEST_MAX and index % ASKED_EVERY == 0:
            for name, error in errors.items():
                wrong = _loss(stage, last, held_out, error)
                seen[name].append(copy.deepcopy(watch).is_jump(index, wrong))
                rises[name].append(wrong - loss)
        false_alarms += watch.is_jump(index, loss)
    return {
        "learning_rate": rate,
        "validations": validation_count,
        "false_alarms": false_alarms,
        "seen": {name: round(statistics.mean(found), 2) for name, found in seen.items()},
        "rise": {name: round(statistics.median(found), 3) for name, found in rises.items()},
    }


def _errors(rng: np.random.Generator) -> dict[str, Callable[[Vector], Vector]]:
    """Return what hidden states, float32 (batch, time, n_embd), may become by name."""

    def with_noise(share: float) -> Callable[[Vector], Vector]:
        def add(hidden: Vector) -> Vector:
            noise = rng.standard_normal(hidden.shape, dtype=np.float32)
            return hidden + np.float32(share * hidden.std()) * noise

        return add

    return {
        "other sign": lambda hidden: -hidden,
        "zeros": np.zeros_like,
        "other rows": lambda hidden: np.roll(hidden, 1, axis=1),
        "twice": lambda hidden: 2 * hidden,
        "noise as large": with_noise(1.0),
        "a tenth of noise": with_noise(0.1),
    }


def _step(stage: ModelPart, last: ModelPart, batch: Batch, rate: float) -> None:
    tokens, targets = batch
    *kept, hidden = stage.forward(last.embed(tokens))
    _, passed = last.losses(hidden, targets, tokens.size)
    last.embed_backward(tokens, stage.backward(kept, passed))
    norm = (stage.squared_norm() + last.squared_norm()) ** 0.5
    stage.apply(norm, rate)
    last.apply(norm, rate)


def _loss(
    stage: ModelPart,
    last: ModelPart,
    batch: Batch,
    error: Callable[[Vector], Vector] = lambda hidden: hidden,
) -> float:
    tokens, targets = batch
    return last.loss(error(stage.infer(last.embed(tokens))), targets, tokens.size)
