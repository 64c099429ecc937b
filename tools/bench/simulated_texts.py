"""Eight peers that give each other texts, updates or both: what `tools/bench/texts.py` measures.

The peers, their texts, links and time are those of `simulated_learning.py`. Sketches, offers,
choice, ledger, records and their packing are those of `llmload.data`; what a peer keeps in SQLite
is a dict here, and everybody is honest. A peer asks one other whenever it has saved up for some
records.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmload.data.barter import BarterLimits, Ledger, choose
from llmload.data.protocol import OFFERS_MAX, Offer, Offers, WantTexts, offer_of, pack
from llmload.data.record import SignedRecord, TextRecord, cut_text, sign_record
from llmload.data.sketch import make_sketch, missing_untrusted
from llmload.learn.outer import OuterSettings
from llmload.learn.scorer import Scorer
from natswarm import Identity, encode_message
from tools.bench.simulated_learning import (
    PEER_COUNT,
    STEP_S,
    TIME,
    Classroom,
    Curve,
    Ours,
    Setting,
)

__all__ = ["TextsAndUpdates"]

ASK_EVERY_S = 1.0
# Offers have some 5 kB, whatever is taken of them.
ASK_BYTES_MIN = 16_000
# Of the steps, in which the budget for texts is spent: what comes in the last ones teaches nobody.
SPENT_BY = 0.5


class TextsAndUpdates(Ours):
    """Ours, with texts.

    Args:
        room: The model and the texts.
        density: Share of the values in an update; 0 for no updates.
        text_bytes: That each peer takes in all: sketches, offers and texts; 0 for none.
        by_novelty: Whether texts are chosen by the loss on their beginnings, or at random.
    """

    def __init__(
        self, room: Classroom, *, density: float, text_bytes: int, by_novelty: bool = True
    ) -> None:
        super().__init__(room, Setting(outer=OuterSettings(density=density) if density else None))
        self._by_novelty = by_novelty
        self._text_bytes = text_bytes
        self._taken_bytes = [0] * PEER_COUNT
        self._scorer = Scorer(room.trainer, batch=OFFERS_MAX, time=TIME)
        self._ledgers = [Ledger(BarterLimits(), 0.0) for _ in range(PEER_COUNT)]
        # What each peer gave to each other one, as its ledger counts it.
        self._given = np.zeros((PEER_COUNT, PEER_COUNT), dtype=int)
        self._records = [_records_of(index, text) for index, text in enumerate(room.texts)]

    def run(self) -> Curve:
        """Run until all have made all their steps."""
        if self._text_bytes:
            for index in self.present:
                self.world.after(self.rng.random() * ASK_EVERY_S, self._ask, index)
        return super().run()

    def _ask(self, index: int) -> None:
        """Do in one moment what takes some round trips; what is given travels."""
        self.world.after(ASK_EVERY_S, self._ask, index)
        spending_s = SPENT_BY * self.room.size.steps * STEP_S
        due = self._text_bytes * min(1.0, self.world.now / spending_s) - self._taken_bytes[index]
        if due < ASK_BYTES_MIN:
            return
        giver = self.rng.choice([each for each in self.present if each != index])
        ours, theirs = self._records[index], self._records[giver]
        sketch, bits = make_sketch(ours, self.rng)
        missing = missing_untrusted(sketch, bits, theirs)
        drawn = self.rng.sample(missing, min(OFFERS_MAX, len(missing)))
        offers = [offer_of(theirs[record_id]) for record_id in drawn]
        allowance = self._ledgers[giver].allowance(
            self.students[index].peer_id, int(self._given[index, giver]), 1.0, self.world.now
        )
        offered = len(encode_message(Offers(tuple(offers), allowance)))
        asked = len(bits) + len(encode_message(sketch))
        chosen = choose(
            self._novelty(index, offers),
            [offer.byte_count for offer in offers],
            min(int(due) - asked - offered, allowance),
        )
        asked += len(encode_message(WantTexts(tuple(offers[each].record_id for each in chosen))))
        self._arrival(index, asked)
        self._arrival(giver, offered)
        self._taken_bytes[index] += asked + offered
        for each in chosen:
            self._give(giver, index, theirs[offers[each].record_id])

    def _give(self, giver: int, index: int, signed: SignedRecord) -> None:
        size = len(pack(signed))
        self._ledgers[giver].note_given(self.students[index].peer_id, size, self.world.now)
        self._given[giver, index] += size
        self._taken_bytes[index] += size
        self._records[index][signed.record_id] = signed
        self.world.at(self._arrival(giver, size + 50), self._take, index, signed)

    def _take(self, index: int, signed: SignedRecord) -> None:
        texts = self.students[index].texts
        texts[1:] = [np.concatenate([*texts[1:], np.array(_tokens(signed))])]

    def _novelty(self, index: int, offers: Sequence[Offer]) -> list[float]:
        if not self._by_novelty:
            return [self.rng.random() for _ in offers]
        self.room.trainer.parameters[:] = self.students[index].parameters
        passages = [((), list(offer.sample.encode())) for offer in offers]
        found = self._scorer.log_probabilities(passages)
        return [
            -value / max(1, len(follows))
            for value, (_, follows) in zip(found, passages, strict=True)
        ]


def _records_of(index: int, text: NDArray[np.int64]) -> dict[bytes, SignedRecord]:
    """Return the text of a peer as records, in order."""
    author = Identity(bytes([index]) * 32)
    words = text.astype(np.uint8).tobytes().decode(errors="replace")
    signed = [sign_record(author, TextRecord(piece, "PSF-2.0")) for piece in cut_text(words)]
    return {each.record_id: each for each in signed}


def _tokens(signed: SignedRecord) -> list[int]:
    assert isinstance(signed.record, TextRecord)
    return list(signed.record.text.encode())
