"""Guess the next tokens from the text itself, so that one trip over the mesh answers several.

A step of one token and a step of six take the mesh almost the same time: the trips count, not the
rows. So the client appends its guesses to the step, and the last stage draws a token after each
row. As long as the token drawn is the one guessed, the row after it was right as well. The draw
depends on seed and position alone (`engine.sampler`), so the text is that of plain decoding, to the
token, sampled too; a wrong guess costs the time of its row and nothing else.

Guesses are what followed the last time that the same few tokens stood there (prompt lookup). How
many to send is weighed anew each time: with a share `a` of guesses that are right, k of them give
(1 - a^(k+1)) / (1 - a) tokens a trip, and each costs the computing of one row.

Source: Leviathan et al. 2023 (arXiv 2211.17192) for the formula; prompt lookup: A. Saxena 2023.
Pure: token ids and seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["GuessCount", "PromptLookup", "accepted_count", "shared_count"]

# The longest run that stood there before decides; single tokens repeat by chance.
RUN_LENGTHS = (4, 3, 2)

GUESSES_MAX = 16
# What is not known yet: half of the guesses are right. One trip changes it by an eighth.
ACCEPTED_SHARE = 0.5
TRUST = 0.125
# Until it was measured: what a further row takes of a step's computing. The weights are read once.
ROW_SHARE = 0.2
# When guessing does not pay, it is tried again with one guess in so many trips.
RETRY_TRIPS = 16


class PromptLookup:
    """Finds where the newest tokens stood before.

    Args:
        token_ids: The sequence so far.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        # Where the latest occurrence of a run ends, for runs that are not the end of the sequence.
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in what came."""
        for token_id in token_ids:
            end = len(self._ids)
            for length in RUN_LENGTHS:
                if length <= end:
                    self._ends[tuple(self._ids[end - length :])] = end
            self._ids.append(token_id)

    def guess(self, count: int) -> list[int]:
        """Return up to `count` tokens that may come next; none if nothing like it was there."""
        for length in RUN_LENGTHS:
            end = self._ends.get(tuple(self._ids[-length:]))
            if end is not None and len(self._ids) >= length:
                # Where the text goes round in a circle, the guess goes on with itself.
                period = len(self._ids) - end
                return [self._ids[end + index % period] for index in range(count)]
        return []


class GuessCount:
    """How many guesses the next trip should carry."""

    def __init__(self) -> None:
        self.guess_count = 0
        self.accepted_count = 0
        self._accepted_share = ACCEPTED_SHARE
        self._trip_s = 0.0  # without guesses
        self._row_s = 0.0  # what each guess adds
        self._without = 0

    def best(self) -> int:
        """Return the number that gives the most tokens a second, 0..16."""
        share, trip_s, row_s = self._accepted_share, self._trip_s, self._row_s
        if not trip_s:
            return 0  # until the first trip was measured
        rates = []
        expected = chance = 1.0
        for count in range(GUESSES_MAX + 1):
            rates.append(expected / (trip_s + count * row_s))
            chance *= share
            expected += chance
        best = rates.index(max(rates))
        if best == 0:
            self._without += 1
            return self._without % RETRY_TRIPS == 0
        return best

    def learn(self, *, guesses: int, accepted: int, elapsed_s: float, compute_s: float) -> None:
        """Take in how a trip went.

        Args:
            guesses: That it carried.
            accepted: The first so many were right.
            elapsed_s: From sending to the answer.
            compute_s: What the stages took of it.

        The first one carries no guesses: `best` sees to that.
        """
        if guesses:
            row_s = max(elapsed_s - self._trip_s, 0.0) / guesses
            self._row_s += TRUST * (row_s - self._row_s)
        elif not self._trip_s:
            self._trip_s, self._row_s = elapsed_s, ROW_SHARE * compute_s
        else:
            self._trip_s += TRUST * (elapsed_s - self._trip_s)
        self.guess_count += guesses
        self.accepted_count += accepted
        # Guesses after the first wrong one were not tried.
        for index in range(min(accepted + 1, guesses)):
            self._accepted_share += TRUST * ((index < accepted) - self._accepted_share)


def accepted_count(guesses: Sequence[int], drawn: Sequence[int]) -> int:
    """Return how many guesses at the beginning are what was drawn."""
    for index, (guess, token_id) in enumerate(zip(guesses, drawn, strict=False)):
        if guess != token_id:
            return index
    return min(len(guesses), len(drawn))


def shared_count(token_ids: Sequence[int], held_ids: Sequence[int]) -> int:
    """Return how many positions of a sequence need not be computed, because they are held.

    The last one is computed in any case, for what comes after it.
    """
    for index, (ours, held) in enumerate(zip(token_ids[:-1], held_ids, strict=False)):
        if ours != held:
            return index
    return min(len(token_ids) - 1, len(held_ids))
