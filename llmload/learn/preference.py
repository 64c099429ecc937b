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

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmload.learn.optimizer import AdamW, AdamWSettings
from llmload.learn.scorer import Passage, Scorer
from llmload.learn.shards import Vector
from llmload.learn.trainer import Trainer
from natswarm import PeerId

__all__ = ["MarkedAnswer", "PreferenceTrainer", "kto"]

# How far the model may move for a mark; the paper's best for most sizes of models.
BETA = 0.1
BATCH = 8
# Of one source; the oldest go.
ANSWERS_MAX = 256


@dataclass(frozen=True, slots=True)
class MarkedAnswer:
    """An answer and what somebody thinks of it.

    Attributes:
        passage: Prompt and answer as token ids; the answer is not empty.
        mark: 1 or -1.
        source: Who gave it to us; None: it is our own.
    """

    passage: Passage
    mark: int
    source: PeerId | None = None


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
        weight: Of the marks of a source, 0..1; ours count 1.
        on_gradient: Gets the gradient of each step at length 1, that of one step on text.
    """

    def __init__(
        self,
        trainer: Trainer,
        reference: Vector,
        *,
        time: int,
        learning_rate: float,
        rng: np.random.Generator,
        weight: Callable[[PeerId], float],
        on_gradient: Callable[[Vector], None] | None = None,
    ) -> None:
        self._trainer = trainer
        self._on_gradient = on_gradient
        self._reference = reference
        self._scorer = Scorer(trainer, batch=BATCH, time=time)
        # The trainer's own steps decay the weights.
        settings = AdamWSettings(learning_rate=learning_rate, weight_decay=0.0)
        self._optimizer = AdamW(trainer.space, settings)
        self._rng = rng
        self._weight = weight
        self._answers: dict[PeerId | None, deque[MarkedAnswer]] = {}

    def add(self, answers: Sequence[MarkedAnswer]) -> None:
        """Take more answers in."""
        for answer in answers:
            kept = self._answers.setdefault(answer.source, deque(maxlen=ANSWERS_MAX))
            kept.append(answer)

    def step(self) -> float | None:
        """Make one step on a random batch.

        Returns:
            Its loss before the step, 0..1; None if there are no answers that count.

        Raises:
            LearningFailed: The gradient is not finite; nothing was changed.
        """
        answers, shares = self._shares()
        if not answers:
            return None
        chosen = self._rng.choice(
            len(answers), size=min(BATCH, len(answers)), replace=False, p=shares / shares.sum()
        )
        loss, gradient = self.gradient([answers[index] for index in chosen])
        length = self._optimizer.update(self._trainer.parameters, gradient)
        if self._on_gradient is not None and length > 0:
            gradient *= np.float32(1 / length)
            self._on_gradient(gradient)
        return loss

    def _shares(self) -> tuple[list[MarkedAnswer], NDArray[np.float64]]:
        """Return the answers that count, and how likely each is to be drawn.

        By what its source counts; and no source counts for more answers than we have marked, or
        than make a batch.
        """
        most = max(BATCH, len(self._answers.get(None, ())))
        answers: list[MarkedAnswer] = []
        shares: list[float] = []
        for source, some in self._answers.items():
            weight = 1.0 if source is None else self._weight(source)
            if weight > 0:
                answers += some
                shares += [weight * min(1.0, most / len(some))] * len(some)
        return answers, np.array(shares)

    def gradient(self, answers: Sequence[MarkedAnswer]) -> tuple[float, Vector]:
        """Return the loss on at most `BATCH` answers and its gradient, float32 (space.size,)."""
        passages = [answer.passage for answer in answers]
        # Each answer with the prompt of the one before: what the model says whatever it is asked.
        others = [
            (passages[index - 1][0], passages[index][1])
            for index in range(len(passages) if len(passages) > 1 else 0)
        ]
        ours = self._scorer.log_probabilities([*passages, *others])
        ratios = ours - self._reference_log_probabilities([*passages, *others])
        marks = np.array([float(answer.mark) for answer in answers])
        balance = self._balance()
        weights = np.array([balance[answer.mark] for answer in answers])
        count = len(passages)
        loss, upstream = kto(ratios[:count], ratios[count:], marks, weights)
        return loss, self._scorer.gradient(passages, upstream)

    def _balance(self) -> Mapping[int, float]:
        """Return the weight of good and of bad answers: the rarer kind counts in full."""
        answers, shares = self._shares()
        marks = np.array([answer.mark for answer in answers])
        sums = {mark: float(shares[marks == mark].sum()) for mark in (1, -1)}
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
