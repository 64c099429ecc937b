"""Batches from our own text and from records: who gave much may not drown the rest.

Each window of a batch is of one source: our own text, our own records, or those of one giver; drawn
by the length of its text, times its weight, and no source counts for more than our own text is
long. Records of one source follow each other as one text, an end-of-text token between them.

This file does not know where records come from, or how weights are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmload.data.record import TextRecord
from llmload.data.store import StoredRecord
from llmload.learn.trainer import batches
from natswarm import PeerId

__all__ = ["TextPool"]


class TextPool(Iterator[tuple[NDArray[Any], NDArray[Any]]]):
    """An endless iterator over batches: tokens and targets, int64 (batch, time) each.

    While there are no records, the batches are those of `trainer.batches`, bit for bit.

    Args:
        own: Our text, integers (length,).
        encode: Text to token ids.
        end: The token between two records; None for none.
        batch: Windows at once.
        time: Tokens of a window.
        rng: Draws everything.
        weight: Of the records of a giver, 0..1.

    Raises:
        ValueError: Our text is not longer than a window.
    """

    def __init__(
        self,
        own: NDArray[Any],
        encode: Callable[[str], list[int]],
        *,
        end: int | None,
        batch: int,
        time: int,
        rng: np.random.Generator,
        weight: Callable[[PeerId], float],
    ) -> None:
        self._own = own
        self._own_batches = batches(own, batch=batch, time=time, rng=rng)
        self._encode = encode
        self._end = [] if end is None else [end]
        self._batch, self._time = batch, time
        self._rng = rng
        self._weight = weight
        # None: records of this device.
        self._texts: dict[PeerId | None, NDArray[np.uint32]] = {}

    def add(self, records: Iterable[StoredRecord]) -> None:
        """Take more records in; what is no text is left out."""
        tokens: dict[PeerId | None, list[int]] = {}
        for each in records:
            record = each.signed.record
            if isinstance(record, TextRecord):
                tokens.setdefault(each.giver, []).extend(self._encode(record.text) + self._end)
        for giver, new in tokens.items():
            before = self._texts.get(giver, np.empty(0, dtype=np.uint32))
            self._texts[giver] = np.concatenate([before, np.array(new, dtype=np.uint32)])

    @property
    def givers(self) -> list[PeerId]:
        """Whose texts are long enough to draw from."""
        return [
            giver
            for giver, text in self._texts.items()
            if giver is not None and len(text) > self._time
        ]

    def sample(
        self, giver: PeerId, count: int, rng: np.random.Generator
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Draw windows from the records of one of `givers`, int64 (count, time) each."""
        return next(batches(self._texts[giver], batch=count, time=self._time, rng=rng))

    def __next__(self) -> tuple[NDArray[Any], NDArray[Any]]:
        sources = [self._own]
        shares = [float(len(self._own))]
        for giver, text in self._texts.items():
            weight = 1.0 if giver is None else self._weight(giver)
            if len(text) > self._time and weight > 0:
                sources.append(text)
                shares.append(weight * min(len(text), len(self._own)))
        if len(sources) == 1:
            return next(self._own_batches)
        chosen = self._rng.choice(len(sources), size=self._batch, p=np.array(shares) / sum(shares))
        windows = [
            next(batches(sources[source], batch=1, time=self._time, rng=self._rng))
            for source in chosen
        ]
        tokens, targets = (np.concatenate(part) for part in zip(*windows, strict=True))
        return tokens, targets
