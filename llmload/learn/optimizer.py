"""AdamW over flat vectors, in place: the same bits on every machine.

It is made of IEEE operations on single elements, and sums in a fixed order, whatever the number of
threads. So peers that start equal and apply equal gradients stay equal. That is also why it is
NumPy: fused kernels would read each vector once in place of a few times, half the time or less, but
multiply and add in one rounding where the processor has that, and in two where not.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (AdamW); which
parameters decay, and the norm of 1, as in nanoGPT.

This file does not know where gradients come from, nor schedules of the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmload.errors import LearningFailed
from llmload.learn.space import ParameterSpace, Vector

__all__ = ["AdamW", "AdamWSettings"]

# Five pieces of 256 KiB stay in the caches. For 124 million parameters a step takes 0.3 s so, 0.35
# with a quarter of that at once, and 5 s if each operation runs over the whole vector.
CHUNK_VALUE_COUNT = 64 * 1024


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
        thread_count: Threads that share an update; NumPy lets go of the GIL in each operation.
    """

    def __init__(
        self, space: ParameterSpace, settings: AdamWSettings, *, thread_count: int = 1
    ) -> None:
        self.settings = settings
        self._mean = np.zeros(space.size, dtype=np.float32)
        self._mean_square = np.zeros(space.size, dtype=np.float32)
        # Running products instead of powers: `pow` may differ between machines in the last bit.
        self._beta1_power = 1.0
        self._beta2_power = 1.0
        self._chunks = list(_chunks(space))
        # A row for each thread.
        self._scratch = np.empty((thread_count, CHUNK_VALUE_COUNT), dtype=np.float32)

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
            LearningFailed: The gradient holds NaN, or is too long for float32. Nothing was changed.
        """
        settings = self.settings
        rate = settings.learning_rate if learning_rate is None else learning_rate
        norm = math.sqrt(self.squared_norm(gradient)) if norm is None else norm
        if not math.isfinite(norm):
            raise LearningFailed(
                "The gradient holds NaN or infinity, or is nearly as long; the step was not made. "
                "Lower the learning rate; if the loss had risen before, begin anew (another --out)"
            )
        clip = min(1.0, settings.gradient_norm_max / max(norm, 1e-30))
        self._beta1_power *= settings.beta1
        self._beta2_power *= settings.beta2
        # Both means start at zero; this is by how much they are too small.
        root_correction = math.sqrt(1 - self._beta2_power)
        step = rate / (1 - self._beta1_power) * root_correction
        epsilon = settings.epsilon * root_correction
        gain = 1 - settings.beta1
        square_gain = (1 - settings.beta2) / gain**2

        def update_chunk(index: int, work: Vector) -> None:
            # Each line is a pass over the chunk, and they are what takes the time: so constants
            # are gathered where a pass multiplies anyway.
            bounds, decays = self._chunks[index]
            theta = parameters[bounds]
            mean, mean_square = self._mean[bounds], self._mean_square[bounds]
            # mean = beta1 mean + (1 - beta1) g, with g clipped
            np.multiply(gradient[bounds], gain * clip, out=work)
            mean *= settings.beta1
            mean += work
            # mean_square = beta2 mean_square + (1 - beta2) g^2
            work *= work
            work *= square_gain
            mean_square *= settings.beta2
            mean_square += work
            # theta = (1 - rate decay) theta - step mean / (root(mean_square) + epsilon)
            np.sqrt(mean_square, out=work)
            work += epsilon
            np.divide(mean, work, out=work)
            work *= step
            if decays:
                theta *= 1 - rate * settings.weight_decay
            theta -= work

        self._for_each_chunk(update_chunk)
        return norm

    def squared_norm(self, gradient: Vector) -> float:
        """Return the squared length of a vector, the same on every machine; infinite if too long.

        Not a BLAS product: its order of additions depends on the processor. NumPy's pairwise sum
        does not.
        """
        totals: NDArray[np.float64] = np.empty(len(self._chunks))

        def add_up(index: int, work: Vector) -> None:
            bounds, _ = self._chunks[index]
            with np.errstate(over="ignore"):
                totals[index] = np.square(gradient[bounds], out=work).sum()

        self._for_each_chunk(add_up)
        return float(totals.sum())

    def _for_each_chunk(self, action: Callable[[int, Vector], None]) -> None:
        """Call `action` for each chunk, with its index and scratch of its size; in any order."""
        thread_count = len(self._scratch)

        def do_share(thread: int) -> None:
            for index in range(thread, len(self._chunks), thread_count):
                bounds, _ = self._chunks[index]
                action(index, self._scratch[thread, : bounds.stop - bounds.start])

        if thread_count == 1:
            do_share(0)
            return
        with ThreadPoolExecutor(thread_count) as pool:
            list(pool.map(do_share, range(thread_count)))


def _chunks(space: ParameterSpace) -> Iterator[tuple[slice, bool]]:
    """Yield pieces of the flat vector, and whether the parameter that each is part of decays."""
    for name, shape in space.shapes:
        bounds = space.bounds[name]
        for start in range(bounds.start, bounds.stop, CHUNK_VALUE_COUNT):
            yield slice(start, min(start + CHUNK_VALUE_COUNT, bounds.stop)), len(shape) >= 2
