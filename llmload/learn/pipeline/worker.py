"""What a stage does while a pipeline is open: micro-batches forward and back, in the order of 1F1B.

    above --Forward--> [ blocks ] --Forward--> below
    above <-Backward-- [ blocks ] <-Backward-- below
    above ----Apply--> [ AdamW  ] ----Apply--> below

Of each micro-batch in flight the inputs of our blocks are held. Those of a validation, which comes
after an Apply or not at all, are passed on and forgotten.

This file does not know how a pipeline is opened: see `stage.py`.
"""

from __future__ import annotations

from llmload.config import GPT2Config
from llmload.learn.pipeline.link import Link
from llmload.learn.pipeline.part import ModelPart
from llmload.learn.pipeline.protocol import (
    Apply,
    Backward,
    Forward,
    OpenPipeline,
    pack_rows,
    unpack_backward_untrusted,
    unpack_forward_untrusted,
)
from llmload.learn.pipeline.schedule import Progress, operations
from llmload.learn.shards import Vector
from llmload.swarm.route import HopFailed, StageOffer
from llmload.swarm.stage_session import Compute
from natswarm import DecodeError, Message

__all__ = ["StageWorker"]


class StageWorker:
    """Computes until cancelled, or something fails.

    Args:
        part: The blocks.
        config: The shape of the model.
        request: What was opened.
        above: Where micro-batches come from.
        below: Where they go.
        compute: Where to compute.

    Attributes:
        progress: Of the step under way.
        validated_count: Micro-batches of the validation before it that are done.
    """

    def __init__(
        self,
        part: ModelPart,
        config: GPT2Config,
        request: OpenPipeline,
        above: Link,
        below: Link,
        compute: Compute,
    ) -> None:
        self.progress = Progress(0, 0)
        self.validated_count = 0
        self._part, self._config, self._request = part, config, request
        self._above, self._below = above, below
        self._compute = compute
        self._own, self._next = map(StageOffer.of_hop, request.route[:2])
        self._held: dict[int, list[Vector]] = {}  # by micro-batch

    @property
    def step_count(self) -> int:
        """Steps made."""
        return self._part.step

    async def run(self) -> None:
        """Do step after step.

        Raises:
            HopFailed: We or somebody behind us can't go on.
        """
        stage, count = self._request.stage, self._request.micro_batch_count
        order = operations(stage, stage + len(self._request.route), count)
        while True:
            for kind, index in order:
                if kind == "forward":
                    await self._forward(index)
                    self.progress = self.progress._replace(forward=index + 1)
                else:
                    await self._backward(index, is_last=index == count - 1)
                    self.progress = self.progress._replace(backward=index + 1)

    async def _forward(self, index: int) -> None:
        receive = self._receive_first if index == 0 else self._above.receive
        hidden = self._unpack(*await receive(), index)
        *kept, result = await self._compute(self._part.forward, hidden)
        self._held[index] = kept
        await self._pass_on(result, index)

    async def _receive_first(self) -> tuple[Message, bytes]:
        """Return the first message of a step, and do what comes before it."""
        while True:
            message, payload = await self._above.receive()
            if isinstance(message, Apply):
                await self._apply(message)
            elif isinstance(message, Forward) and message.is_validation:
                await self._validate(message, payload)
            else:
                return message, payload

    async def _validate(self, message: Forward, payload: bytes) -> None:
        index = self.validated_count
        hidden = self._unpack(message, payload, index, is_validation=True)
        result = await self._compute(self._part.infer, hidden)
        self.validated_count += 1
        await self._pass_on(result, index, is_validation=True)

    def _unpack(
        self, message: Message, payload: bytes, index: int, *, is_validation: bool = False
    ) -> Vector:
        try:
            return unpack_forward_untrusted(
                message,
                payload,
                self._config,
                step=self._part.step,
                micro_batch=index,
                is_validation=is_validation,
            )
        except DecodeError as error:
            raise HopFailed(self._own, str(error), is_input=True) from error

    async def _pass_on(self, hidden: Vector, index: int, *, is_validation: bool = False) -> None:
        codec, _, packed = pack_rows(hidden, self._request.codec)
        batch, time, _ = hidden.shape
        message = Forward(self._part.step, index, batch, time, codec, is_validation)
        await self._below.send(message, packed)

    async def _backward(self, index: int, *, is_last: bool) -> None:
        kept = self._held.pop(index)
        message, payload = await self._below.receive()
        try:
            received, upstream = unpack_backward_untrusted(
                message, payload, kept[0].shape, step=self._part.step, micro_batch=index
            )
        except DecodeError as error:
            raise HopFailed(self._next, str(error)) from error
        passed = await self._compute(self._part.backward, kept, upstream)
        squared_norm = received.squared_norm
        if is_last:
            squared_norm += await self._compute(self._part.squared_norm)
        codec, exponent, packed = pack_rows(passed, self._request.codec, lift=True)
        await self._above.send(
            Backward(self._part.step, index, codec, exponent, squared_norm), packed
        )

    async def _apply(self, message: Apply) -> None:
        if message.step != self._part.step:
            reason = f"step {message.step} was to be applied, it is at {self._part.step}"
            raise HopFailed(self._own, reason, is_input=True)
        await self._compute(self._part.apply, message.norm, message.learning_rate)
        self.progress = Progress(0, 0)
        self.validated_count = 0
        await self._below.send(message)
