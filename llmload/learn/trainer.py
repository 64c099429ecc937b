"""Train GPT-2 on this device: loss, gradients and AdamW, without a deep learning framework.

ONNX Runtime computes the gradients; NumPy applies them. Parameters lie in one flat float32 vector,
so do gradients, and the runtime is bound to views of both: nothing is copied, the whole update is a
loop over a vector, and what is exchanged with peers is a slice of it.

    trainer = Trainer(config, weights)
    for tokens, targets in batches(text, batch=4, time=128, rng=np.random.default_rng(seed)):
        loss, gradient = trainer.gradients(tokens, targets)
        trainer.apply(gradient)

Everything is deterministic: equal calls give equal bits on one machine. `apply` alone does so on
every machine: it is made of IEEE operations on single elements, and sums in a fixed order. So peers
that start equal and apply equal gradients stay equal.

All calls block. In a Trio program run them in `trio.to_thread.run_sync`, one at a time.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (AdamW); which
parameters decay, and the norm of 1, as in nanoGPT.

This file does not know peers, schedules of the learning rate, or where text comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from llmload.config import GPT2Config, parameter_shapes
from llmload.errors import LearningFailed
from llmload.graph.training import build_forward_graph, build_gradient_graph, gradient_name
from llmload.learn.shards import ParameterSpace, Vector
from llmload.weights import Weights

__all__ = ["AdamW", "AdamWSettings", "Trainer", "batches"]

# Three vectors of 128 KiB stay in the second-level cache. For 124 million parameters a step takes
# 0.4 s so, and 5 s if each operation runs over the whole vector.
CHUNK_VALUE_COUNT = 32 * 1024

# A trainer uses one or two shapes (training, validation). Each open graph holds its activations.
OPEN_GRAPH_COUNT_MAX = 4


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
        self, parameters: Vector, gradient: Vector, *, learning_rate: float | None = None
    ) -> float:
        """Do one step, in place.

        Args:
            parameters: float32 (size,); changed.
            gradient: float32 (size,); unchanged.
            learning_rate: For this step; None for that of the settings.

        Returns:
            The length of the gradient before it was clipped.

        Raises:
            LearningFailed: The gradient holds NaN or infinity. Nothing was changed.
        """
        settings = self._settings
        rate = settings.learning_rate if learning_rate is None else learning_rate
        norm = self._norm(gradient)
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

    def _norm(self, gradient: Vector) -> float:
        """Return the length of a vector, the same on every machine.

        Not a BLAS product: its order of additions depends on the processor. NumPy's pairwise sum
        does not; and the square of a float32 is exact as float64.
        """
        total = 0.0
        for bounds, _ in self._chunks:
            total += float(np.square(gradient[bounds], dtype=np.float64).sum())
        return math.sqrt(total)


def _chunks(space: ParameterSpace) -> Iterator[tuple[slice, bool]]:
    """Yield pieces of the flat vector, and whether the parameter that each is part of decays."""
    for name, shape in space.shapes:
        bounds = space.bounds[name]
        for start in range(bounds.start, bounds.stop, CHUNK_VALUE_COUNT):
            yield slice(start, min(start + CHUNK_VALUE_COUNT, bounds.stop)), len(shape) >= 2


class Trainer:
    """A model in training on this device.

    Args:
        config: The shape of the model.
        weights: All its parameters, float32 by name; copied.
        optimizer: Hyperparameters of AdamW.
        thread_count: Threads of the runtime. On cores shared with others 1 is often faster than 2.

    Attributes:
        optimizer: AdamW and its state.

    Raises:
        ValueError: `weights` are not those of `config`.
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: Weights,
        *,
        optimizer: AdamWSettings | None = None,
        thread_count: int = 1,
    ) -> None:
        self.config = config
        self.space = ParameterSpace.of(parameter_shapes(config, config.blocks))
        self._parameters = self.space.flatten(weights)
        self.optimizer = AdamW(self.space, optimizer or AdamWSettings())
        self._thread_count = thread_count
        self._graphs: dict[tuple[bool, int, int], _OpenGraph] = {}

    def gradients(self, tokens: NDArray[Any], targets: NDArray[Any]) -> tuple[float, Vector]:
        """Return the loss and its gradient.

        Args:
            tokens: Integers (batch, time); time is at most n_ctx.
            targets: Integers (batch, time), the token that follows each of `tokens`.

        Returns:
            Mean cross-entropy in nats a token, and float32 (space.size,), which is the caller's.
            `space.views` gives it by names.

        Raises:
            ValueError: The arrays do not fit the model, or each other.
        """
        gradient = np.empty(self.space.size, dtype=np.float32)
        outputs = {gradient_name(name): view for name, view in self.space.views(gradient).items()}
        return self._run(tokens, targets, outputs), gradient

    def loss(self, tokens: NDArray[Any], targets: NDArray[Any]) -> float:
        """Return the loss alone, for about a third of the work.

        Args, raises: as `gradients`.
        """
        return self._run(tokens, targets, {})

    def apply(self, gradient: Vector, *, learning_rate: float | None = None) -> float:
        """Do one step of AdamW along a gradient: our own, or an average over peers.

        Args:
            gradient: float32 (space.size,); unchanged.
            learning_rate: For this step; None for that of the settings.

        Returns:
            The length of the gradient before it was clipped.

        Raises:
            LearningFailed: The gradient holds NaN or infinity. Nothing was changed.
            ValueError: The gradient is of another size.
        """
        if gradient.shape != (self.space.size,):
            raise ValueError(f"gradient of shape {gradient.shape}, expected ({self.space.size},)")
        return self.optimizer.update(self._parameters, gradient, learning_rate=learning_rate)

    def weights(self) -> dict[str, Vector]:
        """Return a copy of all parameters by name."""
        return self.space.views(self._parameters.copy())

    @property
    def parameters(self) -> Vector:
        """All parameters, float32 (space.size,), as they are used: writing here moves the model.

        For what works on the vector as a whole, such as outer steps over peers. The state of the
        optimiser stays as it is.
        """
        return self._parameters

    def _run(
        self, tokens: NDArray[Any], targets: NDArray[Any], outputs: Mapping[str, Vector]
    ) -> float:
        for name, ids in (("tokens", tokens), ("targets", targets)):
            if ids.ndim != 2 or ids.shape != tokens.shape or ids.dtype.kind not in "iu":
                raise ValueError(f"{name} {ids.dtype} {ids.shape}: expected integers (batch, time)")
            # Negative ids would count from the end.
            if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
                raise ValueError(f"{name} holds ids outside of 0..{self.config.vocab_size - 1}")
        batch, time = tokens.shape
        key = (bool(outputs), batch, time)
        graph = self._graphs.pop(key, None)
        if graph is None:
            build = build_gradient_graph if outputs else build_forward_graph
            model = build(self.config, batch=batch, time=time)
            graph = _OpenGraph(model, self.space.views(self._parameters), self._thread_count)
        # The order of a dict is that of insertion: the first is the one unused for the longest.
        self._graphs[key] = graph
        if len(self._graphs) > OPEN_GRAPH_COUNT_MAX:
            del self._graphs[next(iter(self._graphs))]

        inputs = {"token_ids": tokens, "targets": targets}
        loss = np.zeros((), dtype=np.float32)
        graph.run(
            {name: np.ascontiguousarray(ids, dtype=np.int64) for name, ids in inputs.items()},
            {"loss": loss, **outputs},
        )
        return float(loss)


class _OpenGraph:
    """A graph in ONNX Runtime, bound to arrays that stay where they are."""

    def __init__(self, model: ModelProto, parameters: Weights, thread_count: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = thread_count
        options.inter_op_num_threads = 1
        # The plan reserves one block for all activations at once, a third more than they need when
        # they come and go; the time of a step is the same (6 layers of 256: 498 against 322 MB).
        options.enable_mem_pattern = False
        # Threads that wait sleep. By default they spin, which on cores shared with others made a
        # step with two threads take twice as long.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        self._parameters = self._bind(self._binding.bind_ortvalue_input, parameters)

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """Compute all outputs into the arrays given for them."""
        inputs_held = self._bind(self._binding.bind_ortvalue_input, inputs)
        outputs_held = self._bind(self._binding.bind_ortvalue_output, outputs)
        self._session.run_with_iobinding(self._binding)
        del inputs_held, outputs_held

    def _bind(self, bind: Any, arrays: Mapping[str, NDArray[Any]]) -> list[Any]:
        """Bind names to arrays without a copy; the values returned keep the arrays alive."""
        values = []
        for name, array in arrays.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            bind(name, value)
            values.append(value)
        return values


def batches(
    tokens: NDArray[Any], *, batch: int, time: int, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield training batches for ever: windows that start anywhere in a text.

    Args:
        tokens: Integers (length,), the text.
        batch: Windows at once.
        time: Tokens of a window.
        rng: Draws the starts; a seed repeats the batches.

    Yields:
        Tokens and targets, int64 (batch, time) each; a target is the token that follows.

    Raises:
        ValueError: The text is not longer than a window.
    """
    start_count = len(tokens) - time
    if start_count < 1:
        raise ValueError(f"a text of {len(tokens)} tokens has no window of {time} and a target")
    window = np.arange(time + 1)
    while True:
        starts = rng.integers(start_count, size=batch)
        chosen = tokens[starts[:, None] + window].astype(np.int64)  # (batch, time + 1)
        yield chosen[:, :-1], chosen[:, 1:]
