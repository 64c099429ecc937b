"""Find out which form of attention and how many threads are the fastest on this device.

Both depend on the processor, on what else it does, and on the version of the runtime; no table
would be right for long. So two blocks of the model's shape are timed with each choice (what a block
costs does not depend on the values of its weights), which takes a second or two, and the winner is
remembered with the model.

This file does not know the model's weights.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import onnxruntime

from llmload.config import GPT2Config, parameter_shapes
from llmload.engine.session import StageEngine
from llmload.errors import StageFailed
from llmload.graph.quantize import Precision
from llmload.graph.stage import ATTENTION_FORMS, AttentionForm, default_attention
from llmload.model_cache import ModelCache
from llmload.weights import Weights

__all__ = ["EngineSettings", "best_settings", "measure_forms", "measure_threads"]

Choice = TypeVar("Choice", bound=Hashable)

# More threads than this gain nothing on one decoded token of a model of this class.
_THREADS_MAX = 4
# Without embeddings and output layer: what differs is the same in all blocks.
_TRIAL_BLOCKS = range(1, 3)
_PROMPT_LENGTH = 64
_ROUNDS = 12
# The default form is the one that batches, and one thread leaves the others to other stages: they
# must be beaten by more than the noise of a measurement.
_GAIN_MIN = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a stage computes; the results are the same.

    Attributes:
        attention: Form of attention, see `graph.stage`.
        threads: Threads that work on one operator.
    """

    attention: AttentionForm
    threads: int = 1


def best_settings(config: GPT2Config, precision: Precision, cache: ModelCache) -> EngineSettings:
    """Return the fastest settings for a model on this device, from memory if they are there."""
    key = f"settings {precision} ort{onnxruntime.__version__} {platform.machine()} {_cpu_count()}"
    known = cache.recall(key)
    if _is_valid(known):
        return EngineSettings(**known)
    forms = measure_forms(config, precision)
    attention = _clearly_fastest(forms, default_attention(config))
    threads = measure_threads(config, precision, attention)
    best = EngineSettings(attention=attention, threads=_clearly_fastest(threads, 1))
    cache.remember(key, asdict(best))
    return best


def measure_forms(config: GPT2Config, precision: Precision) -> dict[AttentionForm, float]:
    """Return the seconds of processor time that a decoded token takes in two blocks, by form.

    On one thread, whose time the system counts without what it gives to others meanwhile. Forms
    that this runtime does not have for this shape are left out.
    """
    weights = _random_weights(config)
    trials: dict[AttentionForm, _Trial] = {}
    for attention in ATTENTION_FORMS:
        # The runtime lacks the operator, or has it for other shapes only.
        with suppress(StageFailed):
            trials[attention] = _Trial(config, weights, precision, attention, 1)
    return _fastest_times(trials, time.thread_time)


def measure_threads(
    config: GPT2Config, precision: Precision, attention: AttentionForm
) -> dict[int, float]:
    """Return the seconds on the clock that a decoded token takes in two blocks, by threads."""
    counts = {count for count in (1, 2, _THREADS_MAX) if count <= _cpu_count()}
    weights = _random_weights(config)
    trials = {
        count: _Trial(config, weights, precision, attention, count) for count in sorted(counts)
    }
    return _fastest_times(trials, time.perf_counter)


def _random_weights(config: GPT2Config) -> Weights:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        for name, shape in parameter_shapes(_trial_config(config), _TRIAL_BLOCKS).items()
    }


def _trial_config(config: GPT2Config) -> GPT2Config:
    """Return the shape with as many layers as leave the trial blocks inner ones."""
    return replace(config, n_layer=_TRIAL_BLOCKS.stop + 1)


class _Trial:
    """Two blocks of a model's shape, behind a short prompt."""

    def __init__(
        self,
        config: GPT2Config,
        weights: Weights,
        precision: Precision,
        attention: AttentionForm,
        threads: int,
    ) -> None:
        self._stage = StageEngine(
            _trial_config(config),
            weights,
            _TRIAL_BLOCKS,
            intra_op_threads=threads,
            precision=precision,
            attention=attention,
        )
        self._cache = self._stage.new_cache()
        rng = np.random.default_rng(0)
        length = min(_PROMPT_LENGTH, config.n_ctx - 1)
        self._x = rng.standard_normal((1, length, config.n_embd), dtype=np.float32)
        self._stage.run(self._x, self._cache)

    def decode(self) -> None:
        """Compute one token behind the prompt."""
        position = self._cache.position
        self._stage.run(self._x[:, :1], self._cache)
        self._cache.truncate(position)


def _fastest_times(
    trials: Mapping[Choice, _Trial], clock: Callable[[], float]
) -> dict[Choice, float]:
    """Return the shortest time of each, over rounds in which they take turns.

    What else the device does lengthens a time, and never shortens it.
    """
    seconds = dict.fromkeys(trials, float("inf"))
    for _ in range(_ROUNDS):
        for choice, trial in trials.items():
            started_at = clock()
            trial.decode()
            seconds[choice] = min(seconds[choice], clock() - started_at)
    return seconds


def _clearly_fastest(seconds: Mapping[Choice, float], default: Choice) -> Choice:
    best = min(seconds, key=seconds.__getitem__)
    is_clear = default not in seconds or seconds[best] < (1 - _GAIN_MIN) * seconds[default]
    return best if is_clear else default


def _cpu_count() -> int:
    # Not `os.cpu_count`: a container or `taskset` may have left us fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_valid(known: Any) -> bool:
    return (
        isinstance(known, Mapping)
        and known.keys() == {"attention", "threads"}
        and known["attention"] in ATTENTION_FORMS
        and type(known["threads"]) is int
        and 1 <= known["threads"] <= _THREADS_MAX
    )
