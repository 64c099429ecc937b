"""The learning rate of each step: a warm-up, then a constant or half a cosine down to a floor.

    0 .. warmup_steps             in a straight line to the peak
    warmup_steps .. decay_steps   half a cosine down to the floor; without, it stays at the peak
    from then on                  the floor

The first steps of AdamW divide by means of squares that few gradients made, and are too bold at
full length. The rate follows from the number of the step alone, so a run that was resumed goes on
as if it had not been interrupted.

Source: Loshchilov and Hutter 2017, "SGDR"; the floor at a tenth as in Hoffmann et al. 2022.

This file does not know what is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LearningRateSchedule"]


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """A function of the step, for `Learner(rate_at=schedule.rate_at)`.

    Attributes:
        peak: The highest rate.
        warmup_steps: Steps on the way to it, in a straight line; 0 for none.
        decay_steps: Step at which the floor is reached, after the warm-up; None for a constant.
        floor: Share of the peak that is left then, 0..1.
    """

    peak: float
    warmup_steps: int = 0
    decay_steps: int | None = None
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not self.peak > 0 or not 0 <= self.floor <= 1 or self.warmup_steps < 0:
            raise ValueError(f"peak must be > 0, floor in 0..1, warmup_steps >= 0: {self}")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps ({self.decay_steps}) must be more than warmup_steps "
                f"({self.warmup_steps})"
            )

    def rate_at(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.decay_steps is None:
            return self.peak
        progress = (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.peak * (self.floor + (1 - self.floor) * cosine)
