"""How likely a model in training finds texts: to see what is new to it, and to learn from marks.

A passage is a prompt and what follows it, as token ids; only what follows counts. What is longer
than the graph loses the beginning of its prompt, then the end of what follows.

All calls block, and must not run during a step. This file does not know why somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

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
    """

    def __init__(self, trainer: Trainer, *, batch: int, time: int) -> None:
        self._trainer = trainer
        self._batch, self._time = batch, time

    def log_probabilities(self, passages: Sequence[Passage]) -> NDArray[np.float64]:
        """Return log p(what follows | prompt) of each passage in nats, float64 (count,).

        0 for a passage of which nothing can be predicted: a single token without a prompt.
        """
        found = np.zeros(len(passages))
        for start in range(0, len(passages), self._batch):
            some = passages[start : start + self._batch]
            tokens, targets, counted = self._arrays(some)
            values = -(self._trainer.losses(tokens, targets) * counted).sum(axis=1)
            found[start : start + len(some)] = values[: len(some)]
        return found

    def gradient(self, passages: Sequence[Passage], upstream: NDArray[np.float64]) -> Vector:
        """Return the gradient of a loss over log-probabilities, float32 (space.size,).

        Args:
            passages: At most a batch of them.
            upstream: float64 (count,), the derivative of the loss by each log-probability.
        """
        tokens, targets, counted = self._arrays(passages)
        counted[: len(passages)] *= -upstream[:, None]  # a loss is minus a log-probability
        return self._trainer.gradient_of(tokens, targets, counted)

    def _arrays(
        self, passages: Sequence[Passage]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Return tokens, targets, and which targets count: (batch, time) each, 0 where empty."""
        shape = (self._batch, self._time)
        tokens, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        counted = np.zeros(shape)
        for row, (prompt, follows) in enumerate(passages):
            follows = follows[: self._time]
            room = self._time + 1 - len(follows)
            prompt = prompt[max(0, len(prompt) - room) :]
            ids = np.array([*prompt, *follows], dtype=np.int64)
            count = max(0, len(ids) - 1)
            tokens[row, :count], targets[row, :count] = ids[:-1], ids[1:]
            counted[row, max(0, len(prompt) - 1) : count] = 1
        return tokens, targets, counted
