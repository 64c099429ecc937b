"""What the device that leads does in a step: both ends of the model, and the step of all.

    texts --embed--> first stage ... last stage --> own blocks, loss
          <-------------------------------------------'

It puts as many micro-batches on the way as there are stages, itself included, and the next one
whenever one is back: so it is stage 0 and the last stage of 1F1B at once.

This file does not know how the way was opened, nor what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import trio
from numpy.typing import NDArray

from llmload.config import GPT2Config
from llmload.errors import LearningFailed
from llmload.learn.pipeline.link import Guard, Link
from llmload.learn.pipeline.part import ModelPart
from llmload.learn.pipeline.protocol import (
    Apply,
    Backward,
    Forward,
    pack_rows,
    unpack_backward_untrusted,
    unpack_forward_untrusted,
)
from llmload.learn.shards import Vector
from llmload.learn.trainer import Batch
from llmload.swarm.beside import open_quiet_nursery
from llmload.swarm.codec import Codec
from llmload.swarm.route import HopFailed, StageOffer
from llmload.swarm.stage_session import Compute
from natswarm import DecodeError

__all__ = ["EndsWorker"]


class EndsWorker:
    """Makes steps over one way through the stages.

    Args:
        part: Both ends of the model.
        config: The shape of the model.
        route: The stages.
        first: The link to the first of them.
        ring: The link to the last.
        guard: Told what fails.
        codec: How hidden states and gradients travel.
        compute: Where to compute.

    Attributes:
        done_count: Micro-batches of this step that our own blocks have done.
        moved_at: When something came last; infinity while nothing is waited for.
    """

    def __init__(
        self,
        part: ModelPart,
        config: GPT2Config,
        route: Sequence[StageOffer],
        *,
        first: Link,
        ring: Link,
        guard: Guard,
        codec: Codec,
        compute: Compute,
    ) -> None:
        self.done_count = 0
        self.moved_at = math.inf
        self._part = part
        self._config = config
        self._route = route
        self._first, self._ring, self._guard = first, ring, guard
        self._codec = codec
        self._compute = compute

    @property
    def step_count(self) -> int:
        """Steps made."""
        return self._part.step

    async def make_step(
        self, batches: Sequence[Batch], learning_rate: float
    ) -> tuple[float, float]:
        """Do one step.

        Args:
            batches: Its micro-batches.
            learning_rate: For this step.

        Returns:
            Mean loss before it, nats a token, and the length of its gradient.

        Raises:
            HopFailed: A stage sent something else than was its turn.
            LearningFailed: The gradient is not finite. Nothing was changed.
        """
        part = self._part
        losses: list[float] = []
        in_flight = trio.Semaphore(len(self._route) + 1)
        self.done_count, self.moved_at = 0, trio.current_time()
        async with open_quiet_nursery() as nursery:
            nursery.start_soon(self._send_forward, batches, in_flight)
            nursery.start_soon(self._turn_back, batches, losses)
            gradients, squared_norm = await self._receive_back(batches, in_flight)
        self.moved_at = math.inf
        # In the order of micro-batches, whenever they came: sums have the same bits each time.
        for (tokens, _), gradient in zip(batches, gradients, strict=True):
            await self._compute(part.embed_backward, tokens, gradient)
        squared_norm += await self._compute(part.squared_norm)
        if not math.isfinite(squared_norm):
            raise LearningFailed(
                "The gradient holds NaN or infinity; the step was not made. Lower the learning "
                "rate: training goes on from the state that was kept last."
            )
        norm = math.sqrt(squared_norm)
        step = part.step
        await self._compute(part.apply, norm, learning_rate)
        await self._first.send(Apply(step, norm, learning_rate))
        return sum(losses), norm

    async def wait_applied(self) -> None:
        """Wait until all stages have made the step, too.

        Raises:
            HopFailed: They did something else.
        """
        self.moved_at = trio.current_time()
        message, _ = await self._ring.receive()
        self.moved_at = math.inf
        if not isinstance(message, Apply) or message.step != self._part.step - 1:
            raise HopFailed(self._route[-1], "something else came than that the step is made")

    async def _send_forward(self, batches: Sequence[Batch], in_flight: trio.Semaphore) -> None:
        for index, (tokens, _) in enumerate(batches):
            await in_flight.acquire()
            hidden = await self._compute(self._part.embed, tokens)
            codec, _, packed = pack_rows(hidden, self._codec)
            batch, time = tokens.shape
            await self._first.send(Forward(self._part.step, index, batch, time, codec), packed)

    async def _turn_back(self, batches: Sequence[Batch], losses: list[float]) -> None:
        """Take micro-batches from the last stage to their losses, and back."""
        token_count = sum(tokens.size for tokens, _ in batches)
        for index, (_, targets) in enumerate(batches):
            message, payload = await self._ring.receive()
            if index == 0 and isinstance(message, Apply):  # the stages have made the step before
                message, payload = await self._ring.receive()
            self.moved_at = trio.current_time()
            try:
                hidden = self._unpack(message, payload, index, targets)
            except DecodeError as error:
                self._guard.fail(HopFailed(self._route[-1], str(error)))
                return
            loss, gradient = await self._compute(self._part.losses, hidden, targets, token_count)
            losses.append(loss)
            self.done_count += 1
            codec, exponent, packed = pack_rows(gradient, self._codec, lift=True)
            back = Backward(self._part.step, index, codec, exponent, 0.0)
            await self._ring.send(back, packed)

    def _unpack(self, message: Any, payload: bytes, index: int, targets: NDArray[Any]) -> Vector:
        hidden = unpack_forward_untrusted(
            message, payload, self._config, step=self._part.step, micro_batch=index
        )
        if hidden.shape[:2] != targets.shape:
            raise DecodeError(f"a micro-batch of {hidden.shape} came back for {targets.shape}")
        return hidden

    async def _receive_back(
        self, batches: Sequence[Batch], in_flight: trio.Semaphore
    ) -> tuple[list[Vector], float]:
        """Return the gradients of what was sent, and the stages' squared length of theirs."""
        gradients, squared_norm = [], 0.0
        for index, (tokens, _) in enumerate(batches):
            message, payload = await self._first.receive()
            self.moved_at = trio.current_time()
            shape = (*tokens.shape, self._config.n_embd)
            try:
                received, gradient = unpack_backward_untrusted(
                    message, payload, shape, step=self._part.step, micro_batch=index
                )
            except DecodeError as error:
                raise HopFailed(self._route[0], str(error)) from error
            gradients.append(gradient)
            squared_norm = received.squared_norm
            in_flight.release()
        return gradients, squared_norm
