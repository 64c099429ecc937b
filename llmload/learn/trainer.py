"""Train GPT-2 on this device: loss, gradients and AdamW, without a deep learning framework.

ONNX Runtime computes the gradients; NumPy applies them. Parameters lie in one flat float32 vector,
so do gradients, and the runtime is bound to views of both: nothing is copied, the whole update is a
loop over a vector, and what is exchanged with peers is a slice of it.

    trainer = Trainer(config, weights)
    for tokens, targets in batches(text, batch=4, time=128, rng=np.random.default_rng(seed)):
        loss = trainer.step([(tokens, targets)])

A step may be of several batches, of any shapes: its gradient is that of all their tokens at once.

Everything is deterministic: equal calls give equal bits on one machine. `apply` alone does so on
every machine (`optimizer.py`).

All calls block. In a Trio program run them in `trio.to_thread.run_sync`, one at a time.

This file does not know peers, schedules of the learning rate, or where text comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmload.adapter import Adapter, adapter_shapes
from llmload.config import GPT2Config, parameter_shapes
from llmload.graph.quantize import Precision, stored_tensors
from llmload.learn.gradients import LossGraphs
from llmload.learn.optimizer import AdamW, AdamWSettings
from llmload.learn.space import ParameterSpace, Vector
from llmload.weights import Weights

__all__ = ["Batch", "Trainer", "batches"]

# Tokens and targets, integers (batch, time) each; a target is the token that follows.
Batch: TypeAlias = tuple[NDArray[Any], NDArray[Any]]


class Trainer:
    """A model in training on this device, or an adapter beside a model that stays as it is.

    Args:
        config: The shape of the model.
        weights: All its parameters, float32 by name; copied, unless there is an adapter.
        adapter: What to train in their place, from these values on; None to train the model.
        precision: Of the matrices of a model that stays as it is. They become float32 block by
            block while they are used, so `recompute` is 1 unless said otherwise.
        optimizer: Hyperparameters of AdamW.
        recompute: Hold the activations of no more than so many blocks at once and compute others
            again when they are needed: less memory for more time. None to hold all.
        thread_count: Threads of the runtime and of the update. On cores shared with others 1 is
            often faster than 2.

    Attributes:
        space: Order and shapes of what is trained.
        optimizer: AdamW and its state.

    Raises:
        ValueError: `weights` are not those of `config`, `recompute` is not positive, or a model is
            to be trained at less than float32.
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: Weights,
        *,
        adapter: Adapter | None = None,
        precision: Precision = "float32",
        optimizer: AdamWSettings | None = None,
        recompute: int | None = None,
        thread_count: int = 1,
    ) -> None:
        if recompute is not None and recompute < 1:
            raise ValueError(f"recompute must be positive: {recompute}")
        if adapter is None and precision != "float32":
            raise ValueError(f"a model can't be trained at {precision}; an adapter beside it can")
        if recompute is None and precision != "float32":
            recompute = 1
        self.config = config
        model_space = ParameterSpace.of(parameter_shapes(config, config.blocks))
        self._settings = None if adapter is None else adapter.settings
        if adapter is None:
            self.space = model_space
            self._parameters = self.space.flatten(weights)
            frozen: dict[str, NDArray[Any]] = {}
        else:
            model_space.check(weights)
            self.space = ParameterSpace.of(adapter_shapes(config, adapter.settings))
            self._parameters = self.space.flatten(adapter.tensors)
            stored = stored_tensors(config, config.blocks, precision, weights.__getitem__)
            # As the runtime takes them in place: without gaps.
            frozen = {name: np.ascontiguousarray(values) for name, values in stored}
        self.optimizer = AdamW(self.space, optimizer or AdamWSettings(), thread_count=thread_count)
        self._graphs = LossGraphs(
            config,
            {**frozen, **self.space.views(self._parameters)},
            adapter=self._settings,
            precision=precision,
            recompute=recompute,
            thread_count=thread_count,
        )
        # Of `step`, kept: fresh memory for 124 million numbers costs a tenth of a second.
        self._gradient: Vector | None = None

    def loss(self, tokens: NDArray[Any], targets: NDArray[Any]) -> float:
        """Return the loss alone, for about a third of the work.

        Args:
            tokens: Integers (batch, time); time is at most n_ctx.
            targets: Integers (batch, time), the token that follows each of `tokens`.

        Returns:
            Mean cross-entropy in nats a token.

        Raises:
            ValueError: The arrays do not fit the model, or each other.
        """
        return float(self.losses(tokens, targets).mean(dtype=np.float64))

    def losses(self, tokens: NDArray[Any], targets: NDArray[Any]) -> Vector:
        """Return the loss of each target, float32 (batch, time).

        Args, raises: as `loss`.
        """
        self._check(tokens, targets)
        return self._graphs.run(tokens, targets)

    def gradients(self, *parts: Batch, out: Vector | None = None) -> tuple[float, Vector]:
        """Return the loss over all tokens of some batches, and its gradient.

        Batches may differ in shape. They are computed one after the other, so a batch that memory
        does not hold can be given in parts; with more than one, another gradient is held besides.

        Args:
            parts: Tokens and targets of each, as `loss` takes them.
            out: Where to put the gradient, float32 (space.size,); None for a new vector.

        Returns:
            Mean cross-entropy in nats a token, and float32 (space.size,), which is the caller's.
            `space.views` gives it by names.

        Raises:
            ValueError: There is no batch, or as `loss`.
        """
        if not parts:
            raise ValueError("no batch was given")
        for tokens, targets in parts:
            self._check(tokens, targets)
        gradient = np.empty(self.space.size, dtype=np.float32) if out is None else out
        token_count = sum(tokens.size for tokens, _ in parts)
        loss = 0.0
        part_gradient = gradient
        for index, (tokens, targets) in enumerate(parts):
            if index == 1:
                part_gradient = np.empty_like(gradient)
            share = np.full(tokens.shape, 1 / token_count, dtype=np.float32)
            losses = self._graphs.run(
                tokens, targets, upstream=share, gradients=self.space.views(part_gradient)
            )
            loss += float(losses.sum(dtype=np.float64)) / token_count
            if index:
                gradient += part_gradient
        return loss, gradient

    def gradient_of(
        self, tokens: NDArray[Any], targets: NDArray[Any], upstream: NDArray[Any]
    ) -> Vector:
        """Return the gradient of any loss over the losses of single tokens.

        Args:
            tokens: As `loss` takes them.
            targets: The same.
            upstream: Numbers (batch, time), the derivative of that loss by each of `losses`.

        Returns:
            float32 (space.size,), the caller's.

        Raises:
            ValueError: As `loss`.
        """
        self._check(tokens, targets)
        gradient = np.empty(self.space.size, dtype=np.float32)
        self._graphs.run(
            tokens,
            targets,
            upstream=np.ascontiguousarray(upstream, dtype=np.float32),
            gradients=self.space.views(gradient),
        )
        return gradient

    def step(self, parts: Sequence[Batch], *, learning_rate: float | None = None) -> float:
        """Do one step of AdamW along the gradient of some batches together; return their loss.

        Raises:
            LearningFailed: The gradient holds NaN, or is too long for float32. Nothing was changed.
            ValueError: As `gradients`.
        """
        loss, self._gradient = self.gradients(*parts, out=self._gradient)
        self.apply(self._gradient, learning_rate=learning_rate)
        return loss

    def apply(self, gradient: Vector, *, learning_rate: float | None = None) -> float:
        """Do one step of AdamW along a gradient: our own, or an average over peers.

        Args:
            gradient: float32 (space.size,); unchanged.
            learning_rate: For this step; None for that of the settings.

        Returns:
            The length of the gradient before it was clipped.

        Raises:
            LearningFailed: The gradient holds NaN, or is too long for float32. Nothing was changed.
            ValueError: The gradient is of another size.
        """
        if gradient.shape != (self.space.size,):
            raise ValueError(f"gradient of shape {gradient.shape}, expected ({self.space.size},)")
        return self.optimizer.update(self._parameters, gradient, learning_rate=learning_rate)

    def weights(self) -> dict[str, Vector]:
        """Return a copy of all parameters by name: those of the adapter, if that is trained."""
        return self.space.views(self._parameters.copy())

    @property
    def adapter(self) -> Adapter | None:
        """A copy of the adapter that is trained; None if it is the model."""
        return None if self._settings is None else Adapter(self._settings, self.weights())

    def reference(self, weights: Weights) -> Vector:
        """Return the parameters with which this is the model of `weights`, float32 (space.size,).

        Args:
            weights: Of an adapter's own base, or of any model of this shape where that is trained.
        """
        if self._settings is None:
            return self.space.flatten(weights)
        return np.zeros(self.space.size, dtype=np.float32)

    @property
    def parameters(self) -> Vector:
        """All parameters, float32 (space.size,), as they are used: writing here moves the model.

        For what works on the vector as a whole, such as outer steps over peers. The state of the
        optimiser stays as it is.
        """
        return self._parameters

    def _check(self, tokens: NDArray[Any], targets: NDArray[Any]) -> None:
        for name, ids in (("tokens", tokens), ("targets", targets)):
            if ids.ndim != 2 or ids.shape != tokens.shape or ids.dtype.kind not in "iu":
                raise ValueError(f"{name} {ids.dtype} {ids.shape}: expected integers (batch, time)")
            # Negative ids would count from the end.
            if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
                raise ValueError(f"{name} holds ids outside of 0..{self.config.vocab_size - 1}")
        batch, time = tokens.shape
        if batch < 1 or not 1 <= time <= self.config.n_ctx:
            raise ValueError(f"batch {batch} < 1, or time {time} not in 1..{self.config.n_ctx}")


def batches(
    tokens: NDArray[Any], *, batch: int, time: int, rng: np.random.Generator
) -> Iterator[Batch]:
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
