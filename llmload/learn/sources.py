"""How useful the texts of each peer are, by what they do to a private validation set.

A measurement: one step of plain gradient descent on a few windows of a source, short enough that it
should lower the loss on those windows by two thousandths of it; then look what it did to the loss
on text of our own that nobody else sees and that is not learned from; then the step is taken back.

    effect = fall of the validation loss / two thousandths of it

1 is text as good as our own to a model that knows neither. Even random tokens have an effect, up to
0.15: they make a model less sure of itself, and that helps one that has learned its text by heart.
So they are measured, too, as a control, and a source must be better than they are. Single effects
say little: what counts is the mean of the latest, against its spread. A source counts in full where
that is clearly above the control's, a half where it is hard to say, and nothing where it clearly is
not; and old measurements are forgotten: who betters itself comes back, and who begins with good
text to go on with poison is found out. Nothing is learned from a source before it was measured
`PROBATION_COUNT` times.

Honest text that does nothing for ours, another language perhaps, is discounted like noise: it is
useless to us. That a text teaches its own like was tried as a second criterion, and is none: random
tokens do that best, being unlike all that a model knows.

Source: the idea of TracIn (Pruthi et al. 2020): what an example does to a test loss.

This file does not know records or peers' calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmload.learn.trainer import Trainer
from natswarm import PeerId

__all__ = ["Sources", "Windows"]

# Of its own loss, what a step on a source should take away. With 0.01 the effects of good text were
# a quarter: so long a step is mostly unlearned again where the loss bends.
STEP_SHARE = 0.002
# Text that is known by heart has hardly a gradient; a longer step than this, of the length of all
# parameters, would be no test of it.
STEP_LENGTH_MAX = 0.001
PROBATION_COUNT = 6
# Weight of the newest effect in the mean: the memory of about 20.
MEMORY = 1 / 20
# Standard errors from the control at which it is clear.
CLEAR = 2.0
# Every so many measurements one of the control.
CONTROL_EVERY = 4
# What a source that was not measured often enough is worth in barter.
WORTH_UNKNOWN = 0.5
# By so much a source must be better: of nothing it would else never be clear that it is nothing.
EFFECT_MIN = 0.02
SOURCES_MAX = 1024

# Tokens and targets, integers (windows, time) each.
Windows = tuple[NDArray[Any], NDArray[Any]]


@dataclass(slots=True)
class _Standing:
    """Running mean and variance of a source's effects, and when it was measured last."""

    measured_at: int = 0
    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, effect: float) -> None:
        self.count += 1
        share = max(MEMORY, 1 / self.count)
        difference = effect - self.mean
        self.mean += share * difference
        self.variance += share * ((1 - share) * difference * difference - self.variance)

    @property
    def squared_error(self) -> float:
        """Of the mean."""
        return self.variance * max(MEMORY, 1 / max(self.count, 1))


class Sources:
    """Measures sources in turn, and remembers what came of it.

    Args:
        trainer: The model; nobody else may use it during `measure`.
        validation: Windows of private text that is not learned from.
        rng: Draws the control.
    """

    def __init__(self, trainer: Trainer, validation: Windows, rng: np.random.Generator) -> None:
        self._trainer = trainer
        self._validation = validation
        self._standings: dict[PeerId, _Standing] = {}
        self._control = _Standing()
        self._rng = rng
        self._measurement = 0

    def weight(self, source: PeerId) -> float:
        """Return what a source counts in training, 0..1; 0 before it is measured."""
        standing = self._standings.get(source)
        if standing is None or standing.count < PROBATION_COUNT:
            return 0.0
        error = math.sqrt(standing.squared_error + self._control.squared_error)
        clarity = (standing.mean - self._control.mean - EFFECT_MIN) / (error + 1e-9)
        return min(1.0, max(0.0, (1 + clarity / CLEAR) / 2))

    def worth(self, source: PeerId) -> float:
        """Return what a source is worth in barter, 0..1; a half before it is measured."""
        standing = self._standings.get(source)
        known = standing is not None and standing.count >= PROBATION_COUNT
        return self.weight(source) if known else WORTH_UNKNOWN

    def effect(self, source: PeerId) -> float:
        """Return by how much a source's mean effect is above the control's; 0 if not measured."""
        standing = self._standings.get(source)
        return 0.0 if standing is None else standing.mean - self._control.mean

    def measure_next(
        self, givers: Sequence[PeerId], sample: Callable[[PeerId], Windows]
    ) -> PeerId | None:
        """Measure a source: one on probation, else the one whose measurement is oldest.

        Args:
            givers: All sources there are texts of.
            sample: Draws windows of a source.

        Returns:
            Which; None if there is none.
        """
        if not givers:
            return None
        if self._measurement % CONTROL_EVERY == 0:
            tokens, _ = self._validation
            drawn = self._rng.integers(self._trainer.config.vocab_size, size=(2, *tokens.shape))
            self._control.add(self._effect_of((drawn[0], drawn[1])))
        source = min(givers, key=self._order)
        self._measurement += 1
        standing = self._standings.setdefault(source, _Standing())
        standing.measured_at = self._measurement
        standing.add(self._effect_of(sample(source)))
        if len(self._standings) > SOURCES_MAX:
            del self._standings[min(self._standings, key=self._order)]
        return source

    def _order(self, source: PeerId) -> tuple[bool, int]:
        standing = self._standings.get(source, _Standing())
        return standing.count >= PROBATION_COUNT, standing.measured_at

    def _effect_of(self, windows: Windows) -> float:
        trainer = self._trainer
        before = trainer.loss(*self._validation)
        loss, gradient = trainer.gradients(windows)
        length = float(np.linalg.norm(gradient))
        if not 0 < length < math.inf:
            return 0.0
        parameters = trainer.parameters
        longest = STEP_LENGTH_MAX * float(np.linalg.norm(parameters))
        gradient *= np.float32(min(STEP_SHARE * loss / length, longest) / length)
        kept = parameters.copy()
        parameters -= gradient
        after = trainer.loss(*self._validation)
        parameters[:] = kept
        return (before - after) / (STEP_SHARE * before)
