"""llmload's trainer as a side of `tools.bench.training`."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from llmload import AdapterSettings, GPT2Config, Trainer, fresh_adapter
from llmload.learn.space import Vector

__all__ = ["OwnSide"]

RECOMPUTE = 1
RANK = 8


class OwnSide:
    """The trainer, with the gradient of the latest batch.

    Args:
        shape: The fields of a `GPT2Config`.
        weights: Of the model.
        threads: Threads of the trainer.
        name: Which of our ways to train.
    """

    def __init__(
        self, shape: SimpleNamespace, weights: Mapping[str, Vector], threads: int, name: str
    ) -> None:
        config = GPT2Config(**vars(shape))
        settings = AdapterSettings(rank=RANK)
        self._trainer = Trainer(
            config,
            weights,
            adapter=fresh_adapter(config, settings) if name.startswith("adapter") else None,
            precision="int4" if name == "adapter-int4" else "float32",
            recompute=RECOMPUTE if name == "ours-recompute" else None,
            thread_count=threads,
        )
        self._gradient: Vector = np.empty(self._trainer.space.size, dtype=np.float32)

    def gradients(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        """Compute the loss and all gradients, and return the loss."""
        return self._trainer.gradients((tokens, targets), out=self._gradient)[0]

    def apply(self) -> None:
        """Do a step of AdamW along the latest gradient."""
        self._trainer.apply(self._gradient)

    def gradient(self) -> dict[str, Vector]:
        """Return the latest gradient by name."""
        return self._trainer.space.views(self._gradient)
