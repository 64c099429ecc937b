"""AdamW over flat vectors, in place: the same bits on every machine.

It is made of IEEE operations on single elements, and sums in a fixed order. So peers that start
equal and apply equal gradients stay equal.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (AdamW); which
parameters decay, and the norm of 1, as in nanoGPT.

This file does not know where gradients come from, nor schedules of the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmload.errors import LearningFailed
from llmload.learn.shards import ParameterSpace, Vector

__all__ = ["AdamW", "AdamWSettings"]

# Three vectors of 128 KiB stay in the second-level cache. For 124 million parameters a step takes
# 0.4 s so, and 5 s if each operation runs over the whole vector.
CHUNK_VALUE_COUNT = 32 * 1024


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """The hyperparameters of AdamW; defaults are those of nanoGPT's small models.

    Attributes:
        learning_rate: Step size, if `apply` is given no other.
        beta1: Decay of the mean of gradients, 0..1.
        beta2: Decay of the mean of their squares, 0..1.
        epsilon: Added to the root of the mean square.
        weight_decay: Share of itself that a matrix loses a step, times the learning rate. Biases
            and norms do not decay: they are few, and pulling a norm to zero switches it off.
        gradient_norm_max: Longer gradients are scaled down to this length; infinity for never.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_norm_max: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 and beta2 must be in [0, 1): {self.beta1}, {self.beta2}")
        for name in ("learning_rate", "epsilon", "gradient_norm_max"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive: {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative: {self.weight_decay}")


class AdamW:
    """The optimiser and its state, over flat vectors.

    Args:
        space: Order and shapes of the parameters.
        settings: Hyperparameters.
    """

    def __init__(self, space: ParameterSpace, settings: AdamWSettings) -> None:
        self._settings = settings
        self._mean = np.zeros(space.size, dtype=np.float32)
        self._mean_square = np.zeros(space.size, dtype=np.float32)
        # Running products instead of powers: `pow` may differ between machines in the last bit.
        self._beta1_power = 1.0
        self._beta2_power = 1.0
        self._chunks = list(_chunks(space))
        self._scratch = np.empty((2, CHUNK_VALUE_COUNT), dtype=np.float32)

    def vectors(self) -> dict[str, Vector]:
        """Return the state, float32 (size,) each; not copies: writing to them changes it."""
        return {"mean": self._mean, "mean_square": self._mean_square}

    @property
    def powers(self) -> tuple[float, float]:
        """The betas to the power of the steps made: the rest of the state."""
        return self._beta1_power, self._beta2_power

    @powers.setter
    def powers(self, powers: tuple[float, float]) -> None:
        self._beta1_power, self._beta2_power = powers

    def update(
        self,
        parameters: Vector,
        gradient: Vector,
        *,
        learning_rate: float | None = None,
        norm: float | None = None,
    ) -> float:
        """Do one step, in place.

        Args:
            parameters: float32 (size,); changed.
            gradient: float32 (size,); unchanged.
            learning_rate: For this step; None for that of the settings.
            norm: The length of the gradient that this one is a part of, by which it is clipped;
                None where it is the whole.

        Returns:
            The length of the gradient before it was clipped.

        Raises:
            LearningFailed: The gradient holds NaN or infinity. Nothing was changed.
        """
        settings = self._settings
        rate = settings.learning_rate if learning_rate is None else learning_rate
        norm = math.sqrt(self.squared_norm(gradient)) if norm is None else norm
        if not math.isfinite(norm):
            raise LearningFailed(
                "The gradient holds NaN or infinity; the step was skipped. "
                "If it happens again, lower the learning rate."
            )
        clip = min(1.0, settings.gradient_norm_max / max(norm, 1e-30))
        self._beta1_power *= settings.beta1
        self._beta2_power *= settings.beta2
        # Both means start at zero; this is by how much they are too small.
        step = rate / (1 - self._beta1_power)
        root_correction = 1 / math.sqrt(1 - self._beta2_power)
        for bounds, decays in self._chunks:
            g, work = self._scratch[:, : bounds.stop - bounds.start]
            theta = parameters[bounds]
            mean, mean_square = self._mean[bounds], self._mean_square[bounds]
            np.multiply(gradient[bounds], clip, out=g)
            # mean = beta1 mean + (1 - beta1) g
            mean *= settings.beta1
            mean += np.multiply(g, 1 - settings.beta1, out=work)
            # mean_square = beta2 mean_square + (1 - beta2) g^2
            mean_square *= settings.beta2
            np.multiply(g, g, out=work)
            work *= 1 - settings.beta2
            mean_square += work
            # theta = (1 - rate decay) theta - step mean / (root(mean_square) + epsilon)
            np.sqrt(mean_square, out=work)
            work *= root_correction
            work += settings.epsilon
            np.divide(mean, work, out=work)
            work *= step
            if decays:
                theta *= 1 - rate * settings.weight_decay
            theta -= work
        return norm

    def squared_norm(self, gradient: Vector) -> float:
        """Return the squared length of a vector, the same on every machine.

        Not a BLAS product: its order of additions depends on the processor. NumPy's pairwise sum
        does not; and the square of a float32 is exact as float64.
        """
        total = 0.0
        for bounds, _ in self._chunks:
            total += float(np.square(gradient[bounds], dtype=np.float64).sum())
        return total


def _chunks(space: ParameterSpace) -> Iterator[tuple[slice, bool]]:
    """Yield pieces of the flat vector, and whether the parameter that each is part of decays."""
    for name, shape in space.shapes:
        bounds = space.bounds[name]
        for start in range(bounds.start, bounds.stop, CHUNK_VALUE_COUNT):
            yield slice(start, min(start + CHUNK_VALUE_COUNT, bounds.stop)), len(shape) >= 2
