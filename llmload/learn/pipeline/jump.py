"""Notice that the loss on text that is not learned from has jumped.

Numbers that are wrong but finite come through every check; what they do to the loss shows. Between
two validations it falls by what was learned and wavers by a little; a jump is to rise above the
largest of the latest by more than twice the largest change between two of them.

So gross errors are seen (another sign, zeros, much noise), and small ones are not; nor who made
them. A jump may also be the training's own, of a learning rate that is too high.

Pure: numbers.
"""

from __future__ import annotations

import itertools

__all__ = ["JumpWatch"]

# Over fewer, changes are not known; over more, those of the first steps, in which the loss falls
# fast, would hide all others.
LATEST_MIN = 4
LATEST_MAX = 8
MARGIN = 2.0


class JumpWatch:
    """Remembers the latest losses of one training."""

    def __init__(self) -> None:
        self._latest: list[tuple[int, float]] = []  # step, loss

    def is_jump(self, step: int, loss: float) -> bool:
        """Note a loss, and return whether it has jumped.

        Args:
            step: Steps made. What was noted of this and later ones is forgotten: the training went
                back.
            loss: Nats a token.
        """
        before = [noted for noted in self._latest if noted[0] < step][-LATEST_MAX:]
        self._latest = [*before, (step, loss)]
        losses = [each for _, each in before]
        if len(losses) < LATEST_MIN:
            return False
        change = max(abs(later - earlier) for earlier, later in itertools.pairwise(losses))
        return not loss <= max(losses) + MARGIN * change  # so NaN is one
