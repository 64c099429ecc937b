"""A part of a model in training: parameters, the sum of gradients and AdamW, of some blocks alone.

    blocks before the last     forward: hidden -> hidden;  backward: gradient -> gradient
    the last blocks            the same, to the losses; with the embeddings in front of the first

Of a micro-batch in flight a part holds the input of each block; what is inside of a block is
computed once more on the way back. The embeddings and the output layer, often one matrix, are in
one part: so nobody has to be told of its gradient, and text and losses stay where they are.

What is kept of a part, it is kept by units: one for each block and one for both ends, so that
blocks may go to other devices. One file of `checkpoint.py` is one unit at one step.

All calls block, and are made one at a time. This file does not know peers, nor files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmload.config import GPT2Config, parameter_shapes
from llmload.learn.checkpoint import Checkpoint
from llmload.learn.gradients import LossGraphs
from llmload.learn.optimizer import AdamW, AdamWSettings
from llmload.learn.shards import ParameterSpace, Vector

__all__ = [
    "BYTES_PER_PARAMETER",
    "ENDS",
    "STATE_VECTORS",
    "ModelPart",
    "Unit",
    "parameter_count",
    "unit_shapes",
    "units_of",
]

# Parameters, the sum of gradients, and the two means of AdamW; those of the gradient of one
# micro-batch are of one block at a time.
BYTES_PER_PARAMETER = 16
# What the state of a unit is made of.
STATE_VECTORS = ("parameters", "mean", "mean_square")
# The unit of the embeddings, the final norm and the output layer; others are indexes of blocks.
ENDS = -1
Unit: TypeAlias = int


def units_of(config: GPT2Config, blocks: range) -> list[Unit]:
    """Return the units of the part with these blocks."""
    return [*blocks, *([ENDS] if blocks.stop == config.n_layer else [])]


def unit_shapes(config: GPT2Config, unit: Unit) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the parameters of a unit."""
    every = parameter_shapes(config, config.blocks)
    if unit == ENDS:
        return {name: shape for name, shape in every.items() if not name.startswith("h.")}
    return {name: shape for name, shape in every.items() if name.startswith(f"h.{unit}.")}


def parameter_count(config: GPT2Config, unit: Unit) -> int:
    """Return how many numbers the parameters of a unit are."""
    return sum(map(math.prod, unit_shapes(config, unit).values()))


class ModelPart:
    """Some blocks in training; with the last of them, both ends of the model.

    Args:
        config: The shape of the whole model.
        blocks: Which blocks.
        read: Gives the values that a parameter has before the first step.
        optimizer: Hyperparameters of AdamW.
        thread_count: Threads of the runtime.

    Attributes:
        blocks: The same.
        step: Steps made.
    """

    def __init__(
        self,
        config: GPT2Config,
        blocks: range,
        read: Callable[[str], NDArray[np.float32]],
        *,
        optimizer: AdamWSettings,
        thread_count: int = 1,
    ) -> None:
        config.check_blocks(blocks)
        self.blocks = blocks
        self.step = 0
        self.units = units_of(config, blocks)
        shapes = {
            name: shape for unit in self.units for name, shape in unit_shapes(config, unit).items()
        }
        self._config = config
        self._space = ParameterSpace.of(shapes)
        self._parameters = np.empty(self._space.size, dtype=np.float32)
        views = self._space.views(self._parameters)
        for name, view in views.items():
            view[...] = read(name)
        self._optimizer = AdamW(self._space, optimizer, thread_count=thread_count)
        self._gradient = np.zeros(self._space.size, dtype=np.float32)
        self._sums = self._space.views(self._gradient)
        self._latest = _Latest(config, self.units)
        self._graphs = LossGraphs(
            config, views, blocks=blocks, recompute=1, thread_count=thread_count
        )

    def forward(self, hidden: Vector) -> list[Vector]:
        """Take hidden states through the blocks.

        Args:
            hidden: float32 (batch, time, n_embd).

        Returns:
            Of the same shape: the input of each block, and last the result.
        """
        return self._graphs.forward(hidden)

    def backward(self, kept: list[Vector], upstream: Vector) -> Vector:
        """Add to the gradient what one micro-batch gives; return that of its input.

        Args:
            kept: The inputs that `forward` returned; used up.
            upstream: The gradient of the result, float32 (batch, time, n_embd).
        """
        return self._graphs.backward(kept, upstream, self._latest.views, self._add_latest)

    def infer(self, hidden: Vector) -> Vector:
        """Return what `forward` returns last, and hold nothing for the way back."""
        (result,) = self._graphs.forward(hidden, keep=False)
        return result

    def embed(self, tokens: NDArray[Any]) -> Vector:
        """Return what the first block sees, float32 (batch, time, n_embd)."""
        return self._graphs.embed(tokens)

    def losses(
        self, hidden: Vector, targets: NDArray[Any], token_count: int
    ) -> tuple[float, Vector]:
        """Take hidden states to the loss, and add to the gradient what they give.

        Args:
            hidden: float32 (batch, time, n_embd), the input of the first block held here.
            targets: Integers (batch, time).
            token_count: Of the whole step.

        Returns:
            What the micro-batch adds to the mean loss, and the gradient of `hidden`.
        """
        share = np.full(targets.shape, 1 / token_count, dtype=np.float32)
        losses, passed = self._graphs.losses(
            hidden,
            targets,
            upstream=share,
            gradients=self._latest.views,
            after_piece=self._add_latest,
        )
        assert passed is not None, "given with gradients"
        return float(losses.sum(dtype=np.float64)) / token_count, passed

    def loss(self, hidden: Vector, targets: NDArray[Any], token_count: int) -> float:
        """Return what `losses` returns first, and leave the gradient as it is."""
        losses, _ = self._graphs.losses(hidden, targets)
        return float(losses.sum(dtype=np.float64)) / token_count

    def embed_backward(self, tokens: NDArray[Any], upstream: Vector) -> None:
        """Add to the gradient what comes back to the embeddings."""
        self._graphs.embed_backward(tokens, upstream, self._sums)

    def squared_norm(self) -> float:
        """Return the squared length of the gradient; NaN or infinity where it holds such."""
        return self._optimizer.squared_norm(self._gradient)

    def apply(self, norm: float, learning_rate: float) -> None:
        """Do one step of AdamW, and forget the gradient.

        Args:
            norm: The length of the gradient of the whole model.
            learning_rate: For this step.

        Raises:
            LearningFailed: The norm is not finite. Nothing was changed.
        """
        self._optimizer.update(
            self._parameters, self._gradient, learning_rate=learning_rate, norm=norm
        )
        self.step += 1
        self.forget_gradient()

    def forget_gradient(self) -> None:
        """Begin the step anew."""
        self._gradient[:] = 0

    def weights(self, unit: Unit) -> dict[str, Vector]:
        """Return the parameters of a unit by name; not copies."""
        views = self._space.views(self._parameters)
        return {name: views[name] for name in unit_shapes(self._config, unit)}

    def checkpoint(self, unit: Unit) -> Checkpoint:
        """Return the state of a unit; its vectors are not copies."""
        return Checkpoint(self.step, self._vectors(unit), {"powers": list(self._optimizer.powers)})

    def restore(self, states: Mapping[Unit, Checkpoint]) -> None:
        """Go back, or on, to the same step of all units.

        Raises:
            ValueError: They are not those of this part at one step.
        """
        steps = {state.step for state in states.values()}
        if sorted(states) != sorted(self.units) or len(steps) != 1:
            raise ValueError(f"units {sorted(states)} at steps {sorted(steps)}")
        for unit, state in states.items():
            for name, target in self._vectors(unit).items():
                target[:] = state.vectors[name]
            beta1_power, beta2_power = state.facts["powers"]
        self._optimizer.powers = (beta1_power, beta2_power)
        self.step = steps.pop()
        self.forget_gradient()

    def _add_latest(self, piece: range) -> None:
        for unit in units_of(self._config, piece):
            self._gradient[self._where(unit)] += self._latest.vectors[unit]

    def _vectors(self, unit: Unit) -> dict[str, Vector]:
        vectors = {"parameters": self._parameters, **self._optimizer.vectors()}
        return {name: vectors[name][self._where(unit)] for name in STATE_VECTORS}

    def _where(self, unit: Unit) -> slice:
        # In the order of names the parameters of a unit lie side by side.
        bounds = [self._space.bounds[name] for name in unit_shapes(self._config, unit)]
        return slice(min(each.start for each in bounds), max(each.stop for each in bounds))


class _Latest:
    """The gradient of one micro-batch: room for one block, which all share, and for the ends.

    Attributes:
        vectors: By unit.
        views: By name of the parameter.
    """

    def __init__(self, config: GPT2Config, units: Sequence[Unit]) -> None:
        block = np.zeros(parameter_count(config, 0), dtype=np.float32)
        self.vectors: dict[Unit, Vector] = dict.fromkeys(units, block)
        if ENDS in units:
            self.vectors[ENDS] = np.zeros(parameter_count(config, ENDS), dtype=np.float32)
        self.views: dict[str, Vector] = {}
        for unit, vector in self.vectors.items():
            self.views |= ParameterSpace.of(unit_shapes(config, unit)).views(vector)
