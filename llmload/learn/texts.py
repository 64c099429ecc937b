"""What a learner does with the texts and marks of others: takes, weighs, and learns from them.

    batches         windows from our own text and from all records, by what their sources are worth
    between_steps   now and then: new records are taken in, a source is measured, a step is made on
                    marked answers
    exchange        asks partners of the learner for texts, and gives them ours

This file only connects; each part is described where it is.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import trio
from numpy.typing import NDArray

from llmload.data.exchange import TextExchange
from llmload.data.record import FeedbackRecord
from llmload.data.store import RecordStore
from llmload.errors import StoreFailed
from llmload.learn.exchange import Learner
from llmload.learn.pool import TextPool
from llmload.learn.preference import MarkedAnswer, PreferenceTrainer
from llmload.learn.scorer import Scorer
from llmload.learn.shards import Vector
from llmload.learn.sources import Sources, Windows
from llmload.learn.trainer import Trainer
from llmload.model_folder import Model
from natswarm import Node

__all__ = ["TextLearning"]

# Steps between two looks for new records, measurements of a source (as long as some 3 steps of 4
# windows), and steps on marked answers (as long as 4).
REFRESH_EVERY = 10
MEASURE_EVERY = 25
PREFER_EVERY = 25
# Of a source, in one measurement.
MEASURED_WINDOWS = 8
# A mark says less than a text, and often the same again.
PREFERENCE_RATE = 0.1
# Of a sample of 96 characters.
SAMPLE_TOKENS = 32
SAMPLES_AT_ONCE = 32

logger = logging.getLogger("llmload.learn")


class TextLearning:
    """The records of this device as a learner uses them.

    Args:
        model: Whose tokenizer is used, and whose weights are the reference for marked answers.
        trainer: The model in training; used in `between_steps` and for samples.
        store: Our records.
        own: Our text, integers (length,).
        validation: Windows of private text that is not learned from.
        batch: Windows in a step.
        time: Tokens of a window.
        learning_rate: Of steps on text.
        rng: Draws the batches; a seed repeats them.
        seed: Of everything else.

    Attributes:
        batches: For the learner.
        sources: What the texts of each peer are worth.
        exchange: Set by `start`.
        preference_loss: Of the latest step on marked answers, 0..1; None before the first.
        on_gradient: Gets the gradients of steps on marked answers, at length 1.
    """

    def __init__(
        self,
        model: Model,
        trainer: Trainer,
        store: RecordStore,
        own: NDArray[np.int64],
        validation: Windows,
        *,
        batch: int,
        time: int,
        learning_rate: float,
        rng: np.random.Generator,
        seed: int,
    ) -> None:
        self._model, self._trainer, self._store = model, trainer, store
        self._time = time
        self._learning_rate = learning_rate
        self._rng = np.random.default_rng([seed, 1])
        self._read_up_to = 0
        self._preference: PreferenceTrainer | None = None
        samples_time = min(SAMPLE_TOKENS, model.config.n_ctx)
        self._scorer = Scorer(trainer, batch=SAMPLES_AT_ONCE, time=samples_time)
        self.sources = Sources(trainer, validation, self._rng)
        self.batches = TextPool(
            own,
            model.tokenizer.encode,
            end=model.config.eos_token_id,
            batch=batch,
            time=time,
            rng=rng,
            weight=self.sources.weight,
        )
        self.exchange: TextExchange | None = None
        self.preference_loss: float | None = None
        self.on_gradient: Callable[[Vector], None] | None = None

    def start(self, node: Node, learner: Learner) -> TextExchange:
        """Answer the learner's partners from now on; returns what asks them while it runs."""
        self._learner = learner
        self.exchange = TextExchange(
            node,
            self._store,
            lambda: learner.partners,
            self._novelty,
            self.sources.worth,
            rng=random.Random(int(self._rng.integers(2**32))),
        )
        self.exchange.start()
        return self.exchange

    async def between_steps(self, step: int) -> None:
        """Do what is due after a step; nobody else may use the model meanwhile."""
        if step % REFRESH_EVERY == 0:
            try:
                await trio.to_thread.run_sync(self.refresh)
            except StoreFailed as error:  # learning goes on with what there is
                logger.warning("no new records: %s", error)
        if step % MEASURE_EVERY == 0:
            sample = partial(self.batches.sample, count=MEASURED_WINDOWS, rng=self._rng)
            await trio.to_thread.run_sync(self.sources.measure_next, self.batches.givers, sample)
        if step % PREFER_EVERY == 0 and self._preference is not None:
            self.preference_loss = await trio.to_thread.run_sync(self._preference.step)

    def refresh(self) -> None:
        """Take in the records that came since last time."""
        new = self._store.records(after=self._read_up_to)
        if not new:
            return
        self._read_up_to = new[-1].number
        self.batches.add(new)
        encode = self._model.tokenizer.encode
        answers = [
            MarkedAnswer(
                (encode(record.prompt), encode(record.answer)),
                record.mark,
                each.giver,
            )
            for each in new
            if isinstance(record := each.signed.record, FeedbackRecord)
        ]
        if answers:
            if self._preference is None:
                self._preference = self._open_preference()
            self._preference.add(answers)

    def _open_preference(self) -> PreferenceTrainer:
        return PreferenceTrainer(
            self._trainer,
            self._trainer.reference(self._model.weights),
            time=self._time,
            learning_rate=PREFERENCE_RATE * self._learning_rate,
            rng=self._rng,
            # Who gives marks alone is never measured: names are free, and so would be marks.
            weight=self.sources.weight,
            on_gradient=self.on_gradient,
        )

    async def _novelty(self, samples: Sequence[str]) -> list[float]:
        """Return our loss on samples, nats a byte."""
        passages = [((), self._model.tokenizer.encode(sample)) for sample in samples]
        async with self._learner.pausing():
            found = await trio.to_thread.run_sync(self._scorer.log_probabilities, passages)
        return [
            -value / max(1, len(sample.encode()))
            for value, sample in zip(found, samples, strict=True)
        ]
