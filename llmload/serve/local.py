"""Answer many at once with the model in this process.

Each answer is a sequence of its own; those that wait for a step take it together, because reading
the weights is most of what a token costs. Prompts are computed in parts, so that nobody waits for
all of a long one.

This file does not know HTTP, nor other devices.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import trio
from numpy.typing import NDArray

from llmload.engine.kv_cache import KVCache
from llmload.engine.sampler import SamplingParameters, sample
from llmload.engine.session import BatchStep, StageEngine
from llmload.errors import StageFailed
from llmload.model_folder import Model
from llmload.swarm.turns import BatchTurns
from llmload.tokenizer import TextStream

__all__ = ["LocalAnswer", "LocalSource"]

# Rows computed together, and so the part of a prompt that others wait for.
BATCH_ROWS = 128

Turns = BatchTurns[object, BatchStep, NDArray[np.float32]]


class LocalSource:
    """Generates on this device, for any number of askers.

    Args:
        model: Which; its tokenizer and configuration are used.
        engine: All of its blocks.
        slot_count: Answers that find room at once.
    """

    def __init__(self, model: Model, engine: StageEngine, *, slot_count: int) -> None:
        self.model = model
        self._engine = engine
        self._arena = engine.new_arena(slot_count)
        self._turns: Turns = BatchTurns(self._compute, rows_max=BATCH_ROWS)

    @asynccontextmanager
    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingParameters,
        max_new_tokens: int | None,
        stop: Sequence[str],
    ) -> AsyncIterator[LocalAnswer]:
        """Begin an answer; see `Source.generate`. The prompt leaves room for a token.

        Raises:
            CacheFull: Too many are under way.
            StageFailed: While iterating: the runtime could not compute.
        """
        room = self.model.config.n_ctx - len(prompt_ids)
        yield LocalAnswer(
            self._turns,
            self._arena.new_cache(),
            prompt_ids,
            sampling,
            self.model.tokenizer.stream(stop),
            token_count_max=room if max_new_tokens is None else min(room, max_new_tokens),
            eos_token_id=self.model.config.eos_token_id,
        )

    def view(self) -> dict[str, Any]:
        """Return that all of it is computed here."""
        return {"route": [], "peers": [], "news": ""}

    async def _compute(
        self, steps: Sequence[BatchStep]
    ) -> Sequence[NDArray[np.float32] | Exception]:
        try:
            return await trio.to_thread.run_sync(self._engine.run_batch, steps)
        except StageFailed as error:
            return [error] * len(steps)


@dataclass(frozen=True, slots=True)
class LocalToken:
    """A token: `text` is what is certain with it."""

    text: str


@dataclass(frozen=True, slots=True)
class LocalStatistics:
    """How an answer went: see `source.Statistics`."""

    prompt_count: int
    token_count: int
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 before there are two."""
        return (self.token_count - 1) / self.decode_s if self.decode_s > 0 else 0.0


class LocalAnswer:
    """An answer under way: an asynchronous iterator over its tokens; see `Generation`."""

    def __init__(
        self,
        turns: Turns,
        cache: KVCache,
        prompt_ids: Sequence[int],
        sampling: SamplingParameters,
        text: TextStream,
        *,
        token_count_max: int,
        eos_token_id: int | None,
    ) -> None:
        self._turns = turns
        self._cache = cache
        self._new_ids = list(prompt_ids)
        self._prompt_count = self._position = len(prompt_ids)
        self._sampling = sampling
        self._text = text
        self._token_count_max = token_count_max
        self._eos_token_id = eos_token_id
        self._token_count = 0
        self._is_ended = False
        self._first_at = self._last_at = 0.0

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """Why it ended; None as long as it has not."""
        if self._is_ended or self._text.is_stopped:
            return "stop"
        return "length" if self._token_count >= self._token_count_max else None

    def finish(self) -> str:
        """Return what was held back, once no more tokens come."""
        return self._text.finish()

    def statistics(self) -> LocalStatistics:
        """How it went so far."""
        decode_s = self._last_at - self._first_at
        return LocalStatistics(self._prompt_count, self._token_count, decode_s)

    def __aiter__(self) -> LocalAnswer:
        return self

    async def __anext__(self) -> LocalToken:
        if self.finish_reason is not None:
            raise StopAsyncIteration
        for part in _parts(self._new_ids):
            rows = np.array(part, dtype=np.int64)
            logits = await self._turns.run(self, BatchStep(rows, self._cache), len(part))
        token_id = sample(logits[-1], self._sampling, self._position)
        self._last_at = trio.current_time()
        if not self._token_count:
            self._first_at = self._last_at
        self._token_count += 1
        if token_id == self._eos_token_id:
            self._is_ended = True
            raise StopAsyncIteration
        self._new_ids = [token_id]
        self._position += 1
        return LocalToken(self._text.push(token_id))


def _parts(token_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(token_ids), BATCH_ROWS):
        yield token_ids[start : start + BATCH_ROWS]
