"""How likely a model in training finds texts: to see what is new to it, and to learn from marks.

A passage is a prompt and what follows it, as token ids; only what follows counts. What is longer
than the graph loses the beginning of its prompt, then the end of what follows.

All calls block, and must not run during a step. This file does not know why somebody asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from llmload.graph.log_probability import build_log_probability_graph
from llmload.graph.training import gradient_name
from llmload.learn.shards import Vector
from llmload.learn.trainer import Trainer

__all__ = ["Passage", "Scorer"]

# Prompt, and what follows.
Passage: TypeAlias = tuple[Sequence[int], Sequence[int]]


class Scorer:
    """Looks at the parameters of a trainer as they are now.

    Args:
        trainer: The model.
        batch: Passages at once.
        time: Tokens of one, 2..n_ctx.
        thread_count: Threads of the runtime.
    """

    def __init__(self, trainer: Trainer, *, batch: int, time: int, thread_count: int = 1) -> None:
        self._trainer = trainer
        self._batch, self._time = batch, time
        self._thread_count = thread_count

    def log_probabilities(self, passages: Sequence[Passage]) -> NDArray[np.float64]:
        """Return log p(what follows | prompt) of each passage in nats, float64 (count,).

        0 for a passage of which nothing can be predicted: a single token without a prompt.
        """
        found = np.zeros(len(passages))
        for start in range(0, len(passages), self._batch):
            some = passages[start : start + self._batch]
            (values,) = self._forward.run(["log_probability"], self._feeds(some))
            found[start : start + len(some)] = values[: len(some)]
        return found

    def gradient(self, passages: Sequence[Passage], upstream: NDArray[np.float64]) -> Vector:
        """Return the gradient of a loss over log-probabilities, float32 (space.size,).

        Args:
            passages: At most a batch of them.
            upstream: float64 (count,), the derivative of the loss by each log-probability.
        """
        padded = np.zeros(self._batch, dtype=np.float32)
        padded[: len(passages)] = upstream
        feeds = {**self._feeds(passages), gradient_name("log_probability"): padded}
        space = self._trainer.space
        names = [name for name, _ in space.shapes]
        values = self._backward.run([gradient_name(name) for name in names], feeds)
        return space.flatten(dict(zip(names, values, strict=True)))

    @cached_property
    def _forward(self) -> Any:
        return self._open(with_gradients=False)

    @cached_property
    def _backward(self) -> Any:
        return self._open(with_gradients=True)

    def _open(self, *, with_gradients: bool) -> Any:
        model = build_log_probability_graph(
            self._trainer.config,
            batch=self._batch,
            time=self._time,
            with_gradients=with_gradients,
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._thread_count
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _feeds(self, passages: Sequence[Passage]) -> Mapping[str, NDArray[Any]]:
        shape = (self._batch, self._time)
        tokens, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        counted = np.zeros(shape, dtype=np.float32)
        for row, (prompt, follows) in enumerate(passages):
            follows = follows[: self._time]
            room = self._time + 1 - len(follows)
            prompt = prompt[max(0, len(prompt) - room) :]
            ids = np.array([*prompt, *follows], dtype=np.int64)
            count = max(0, len(ids) - 1)
            tokens[row, :count], targets[row, :count] = ids[:-1], ids[1:]
            counted[row, max(0, len(prompt) - 1) : count] = 1
        views = self._trainer.space.views(self._trainer.parameters)
        return {"token_ids": tokens, "targets": targets, "counted": counted, **views}
