"""What the device that leads does in a step: both ends of the model, and the step of all.

    texts --embed--> first stage ... last stage --> own blocks, loss
          <-------------------------------------------'

It puts as many micro-batches on the way as there are stages, itself included, and the next one
whenever one is back: so it is stage 0 and the last stage of 1F1B at once. Those of a validation go
the same way to their losses, and no further.

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
        is_validating: What is under way, or was last, is a validation and no step.
        micro_batch_count: Of it.
        done_count: How many of them our own blocks have done.
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
        self.is_validating = False
        self.micro_batch_count = self.done_count = 0
        self.moved_at = math.inf
        self._is_apply_due = False  # the stages have been told to make a step, and may not have
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
        in_flight = self._begin(batches, is_validating=False)
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
        self._is_apply_due = True
        return sum(losses), norm

    async def validate(self, batches: Sequence[Batch]) -> float:
        """Return the mean loss of text that is not learned from, nats a token; changes nothing.

        Args:
            batches: Its micro-batches.

        Raises:
            HopFailed: A stage sent something else than was its turn.
        """
        token_count = sum(tokens.size for tokens, _ in batches)
        loss = 0.0
        in_flight = self._begin(batches, is_validating=True)
        async with open_quiet_nursery() as nursery:
            nursery.start_soon(self._send_forward, batches, in_flight)
            for index, (_, targets) in enumerate(batches):
                hidden = await self._receive_hidden(index, targets)
                loss += await self._compute(self._part.loss, hidden, targets, token_count)
                self.done_count += 1
                in_flight.release()
        self.moved_at = math.inf
        return loss

    async def wait_applied(self) -> None:
        """Wait until all stages have made the step, too.

        Raises:
            HopFailed: They did something else.
        """
        self.moved_at = trio.current_time()
        await self._receive_applied()
        self.moved_at = math.inf

    def _begin(self, batches: Sequence[Batch], *, is_validating: bool) -> trio.Semaphore:
        """Begin with a step or a validation; returns the bound of what is on the way at once."""
        self.is_validating, self.micro_batch_count = is_validating, len(batches)
        self.done_count, self.moved_at = 0, trio.current_time()
        return trio.Semaphore(len(self._route) + 1)

    async def _send_forward(self, batches: Sequence[Batch], in_flight: trio.Semaphore) -> None:
        for index, (tokens, _) in enumerate(batches):
            await in_flight.acquire()
            hidden = await self._compute(self._part.embed, tokens)
            codec, _, packed = pack_rows(hidden, self._codec)
            batch, time = tokens.shape
            message = Forward(self._part.step, index, batch, time, codec, self.is_validating)
            await self._first.send(message, packed)

    async def _turn_back(self, batches: Sequence[Batch], losses: list[float]) -> None:
        """Take micro-batches from the last stage to their losses, and back."""
        token_count = sum(tokens.size for tokens, _ in batches)
        for index, (_, targets) in enumerate(batches):
            try:
                hidden = await self._receive_hidden(index, targets)
            except HopFailed as failure:
                self._guard.fail(failure)
                return
            loss, gradient = await self._compute(self._part.losses, hidden, targets, token_count)
            losses.append(loss)
            self.done_count += 1
            codec, exponent, packed = pack_rows(gradient, self._codec, lift=True)
            back = Backward(self._part.step, index, codec, exponent, 0.0)
            await self._ring.send(back, packed)

    async def _receive_hidden(self, index: int, targets: NDArray[Any]) -> Vector:
        """Return what the last stage has made of a micro-batch, float32 (batch, time, n_embd).

        Raises:
            HopFailed: It sent something else.
        """
        await self._receive_applied()
        message, payload = await self._ring.receive()
        self.moved_at = trio.current_time()
        try:
            hidden = unpack_forward_untrusted(
                message,
                payload,
                self._config,
                step=self._part.step,
                micro_batch=index,
                is_validation=self.is_validating,
            )
        except DecodeError as error:
            raise HopFailed(self._route[-1], str(error)) from error
        if hidden.shape[:2] != targets.shape:
            reason = f"a micro-batch of {hidden.shape} came back for {targets.shape}"
            raise HopFailed(self._route[-1], reason)
        return hidden

    async def _receive_applied(self) -> None:
        """Take what the last stage says once all have made the step, unless it was taken."""
        if not self._is_apply_due:
            return
        message, _ = await self._ring.receive()
        self.moved_at = trio.current_time()
        if not isinstance(message, Apply) or message.step != self._part.step - 1:
            raise HopFailed(self._route[-1], "something else came than that the step is made")
        self._is_apply_due = False

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
