"""Guess the next tokens with a small model on this device, so that trips over the mesh are saved.

Prompt lookup (`speculate.py`) guesses only what stood there before; a small model with the same
tokenizer guesses prose as well. It draws with the random numbers of the real draw, which follow
from seed and position alone: where both models find much the same likely, they mostly draw the same
token, sampled too. What it guesses is verified like every guess, so the answer is that of plain
decoding, and a bad draft only costs time.

Source: Leviathan et al. 2023 (arXiv 2211.17192); drawing with common random numbers instead of
their rejection step keeps the answer one that seed and position alone decide.
This file does not know how many guesses pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio

from llmload.engine.prepared import open_stage
from llmload.engine.sampler import SamplingParameters, sample
from llmload.engine.session import StageEngine
from llmload.errors import ModelFolderError, StageFailed
from llmload.model_folder import Model, load_model
from llmload.swarm.speculate import shared_count
from llmload.swarm.stage_session import Compute, in_thread

__all__ = ["DraftModel", "Drafter", "open_draft"]


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A small model that guesses for a larger one with the same tokens.

    Attributes:
        engine: All of its blocks.
        compute: Where to run it.
    """

    engine: StageEngine
    compute: Compute = in_thread


def open_draft(folder: Path, model: Model) -> DraftModel:
    """Open a model folder to guess for `model`; blocking.

    Raises:
        ModelFolderError: It is damaged, or its tokens are not those of `model`.
        StageFailed: The runtime does not take it.
    """
    draft = load_model(folder)
    if (
        draft.config.vocab_size != model.config.vocab_size
        or draft.tokenizer.to_json() != model.tokenizer.to_json()
    ):
        raise ModelFolderError(
            folder,
            f"has other tokens than {model.folder.name}",
            "A draft must have been trained with the tokenizer of the model that it guesses for.",
        )
    return DraftModel(open_stage(folder))


class Drafter:
    """Guesses for one sequence.

    Args:
        draft: The model.
        sampling: How the tokens of the sequence are drawn.
    """

    def __init__(self, draft: DraftModel, sampling: SamplingParameters) -> None:
        self._draft = draft
        self._sampling = sampling
        self._cache = draft.engine.new_cache()
        self._held_ids: list[int] = []  # what the cache holds
        self._lock = trio.Lock()

    async def read(self, token_ids: Sequence[int]) -> None:
        """Compute a sequence, so that the first guess after it costs no more than others."""
        await self.guess(token_ids, 1)

    async def guess(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return up to `count` tokens that may come next; fewer at the end of its context.

        Args:
            token_ids: The whole sequence so far.
            count: 0 or more.
        """
        count = min(count, self._draft.engine.config.n_ctx - len(token_ids) + 1)
        if count <= 0:
            return []
        async with self._lock:
            return await self._draft.compute(self._guess, list(token_ids), count)

    def _guess(self, token_ids: list[int], count: int) -> list[int]:
        shared = shared_count(token_ids, self._held_ids)
        self._held_ids = []  # until all went well
        self._cache.truncate(shared)
        guesses: list[int] = []
        rows = token_ids[shared:]
        try:
            while len(guesses) < count:
                # (1, 1, vocab_size)
                logits = self._draft.engine.run(np.array([rows], dtype=np.int64), self._cache)
                position = len(token_ids) + len(guesses)
                guesses.append(sample(logits[0, -1], self._sampling, position))
                rows = guesses[-1:]
        except StageFailed:
            return []  # the answer does not depend on it
        self._held_ids = [*token_ids, *guesses[:-1]]
        return guesses
