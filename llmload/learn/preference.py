"""Learning from marks on answers, no two of which need belong together: KTO.

    r_i = log p(answer_i | prompt_i) - log p_0(answer_i | prompt_i)     p_0: the reference model
    z   = max(0, mean of r over answers that were given to other prompts)   no gradient flows
    v_i = sigmoid(beta (r_i - z)) for a good answer, sigmoid(beta (z - r_i)) for a bad one
    L   = mean over i of lambda_i (1 - v_i)

Good and bad answers weigh the same in sum, whatever there is more of. The loss saturates where the
model has moved far from the reference on an answer: so a few marks do not take the model over.

Source: Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.1, whose lambda_D n_D / (lambda_U n_U)
is 1 here, at the lower end of what they found good.

This file does not know whose marks these are, or when they are learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmload.errors import LearningFailed
from llmload.learn.optimizer import AdamW, AdamWSettings
from llmload.learn.scorer import Passage, Scorer
from llmload.learn.shards import Vector
from llmload.learn.trainer import Trainer

__all__ = ["MarkedAnswer", "PreferenceTrainer", "kto"]

# How far the model may move for a mark; the paper's best for most sizes of models.
BETA = 0.1
BATCH = 8
# Of both kinds there is no use for more; the oldest go.
ANSWERS_MAX = 1024


@dataclass(frozen=True, slots=True)
class MarkedAnswer:
    """An answer and what somebody thinks of it.

    Attributes:
        passage: Prompt and answer as token ids; the answer is not empty.
        mark: 1 or -1.
        weight: What marks from there count now, 0..1; None for 1.
    """

    passage: Passage
    mark: int
    weight: Callable[[], float] | None = None


def kto(
    ratios: NDArray[np.float64],
    mismatched: NDArray[np.float64],
    marks: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64]]:
    """Return the loss, and its derivative by each of the ratios.

    Args:
        ratios: r_i, float64 (count,), nats.
        mismatched: The same for answers to other prompts, float64 (any,).
        marks: 1 or -1, float64 (count,).
        weights: lambda_i, float64 (count,).
    """
    z = max(0.0, float(np.mean(mismatched))) if mismatched.size else 0.0
    value = 1 / (1 + np.exp(-BETA * marks * (ratios - z)))
    loss = float(np.mean(weights * (1 - value)))
    return loss, -weights * BETA * marks * value * (1 - value) / len(ratios)


class PreferenceTrainer:
    """Steps on marked answers, beside those on text.

    Has an AdamW of its own: beside the gradients of text those of marks would vanish in the mean.
    Calls block, and must not run during a step of the trainer.

    Args:
        trainer: The model.
        reference: float32 (space.size,), the parameters of the reference model; not copied.
        time: Tokens of prompt and answer that are looked at.
        learning_rate: Of a step.
        rng: Draws the batches.
    """

    def __init__(
        self,
        trainer: Trainer,
        reference: Vector,
        *,
        time: int,
        learning_rate: float,
        rng: np.random.Generator,
    ) -> None:
        self._trainer = trainer
        self._reference = reference
        self._scorer = Scorer(trainer, batch=BATCH, time=time)
        # The trainer's own steps decay the weights.
        settings = AdamWSettings(learning_rate=learning_rate, weight_decay=0.0)
        self._optimizer = AdamW(trainer.space, settings)
        self._rng = rng
        self._answers: list[MarkedAnswer] = []

    def add(self, answers: Sequence[MarkedAnswer]) -> None:
        """Take more answers in."""
        self._answers = [*self._answers, *answers][-ANSWERS_MAX:]

    @property
    def answer_count(self) -> int:
        """Answers there are to learn from."""
        return len(self._answers)

    def step(self) -> float:
        """Make one step on a random batch; returns its loss before the step, 0..1.

        Raises:
            LearningFailed: There is nothing to learn from, or the gradient is not finite; nothing
                was changed.
        """
        if not self._answers:
            raise LearningFailed("there are no marked answers to learn from")
        count = min(BATCH, len(self._answers))
        chosen = self._rng.choice(len(self._answers), size=count, replace=False)
        answers = [self._answers[index] for index in chosen]
        loss, gradient = self.gradient(answers)
        self._optimizer.update(self._trainer.parameters, gradient)
        return loss

    def gradient(self, answers: Sequence[MarkedAnswer]) -> tuple[float, Vector]:
        """Return the loss on at most `BATCH` answers and its gradient, float32 (space.size,)."""
        passages = [answer.passage for answer in answers]
        # Each answer with the prompt of the next one: what the model says whatever it is asked.
        others = [
            (passages[index - 1][0], passages[index][1])
            for index in range(len(passages) if len(passages) > 1 else 0)
        ]
        ours = self._scorer.log_probabilities([*passages, *others])
        ratios = ours - self._reference_log_probabilities([*passages, *others])
        marks = np.array([float(answer.mark) for answer in answers])
        balance = self._balance()
        weights = np.array([_weight(answer) * balance[answer.mark] for answer in answers])
        count = len(passages)
        loss, upstream = kto(ratios[:count], ratios[count:], marks, weights)
        return loss, self._scorer.gradient(passages, upstream)

    def _balance(self) -> Mapping[int, float]:
        """Return the weight of good and of bad answers: the rarer kind counts in full."""
        sums = {
            mark: sum(_weight(answer) for answer in self._answers if answer.mark == mark)
            for mark in (1, -1)
        }
        return {
            mark: min(1.0, sums[-mark] / sums[mark]) if sums[mark] and sums[-mark] else 1.0
            for mark in sums
        }

    def _reference_log_probabilities(self, passages: Sequence[Passage]) -> NDArray[np.float64]:
        parameters = self._trainer.parameters
        kept = parameters.copy()
        parameters[:] = self._reference
        try:
            return self._scorer.log_probabilities(passages)
        finally:
            parameters[:] = kept


def _weight(answer: MarkedAnswer) -> float:
    return 1.0 if answer.weight is None else answer.weight()
