"""Texts for texts: we ask partners for what we lack, and give them what we may.

    now and then   we send one partner a sketch of the shared records that we have; it offers what
                   we lack, we take what is newest to our model, as much as it allows
    at any time    others ask us the same

Only what is marked as shared is ever offered, and only what was offered is given. What comes is
taken if it is what was offered, and signed; who sends anything else three times is left alone. What
we got we offer to others in turn, unless whoever gave it proved useless: so texts spread, and
poison does not.

This file does not know models, or how the worth of a source is measured.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from llmload.data.barter import BarterLimits, Ledger, choose
from llmload.data.protocol import (
    OFFERS_MAX,
    TEXTS,
    GivenText,
    Offer,
    Offers,
    WantTexts,
    offer_of,
    open_given_untrusted,
    pack,
)
from llmload.data.record import SignedRecord
from llmload.data.sketch import Sketch, make_sketch, missing_untrusted
from llmload.data.store import Added, RecordStore
from llmload.errors import StoreFailed
from natswarm import Call, DecodeError, NatswarmError, Node, Peer, PeerId, RequestRefused

__all__ = ["Novelty", "TextExchange", "TextReport", "Worth"]

# Of each sample, how new it is to our model: nats a byte.
Novelty = Callable[[Sequence[str]], Awaitable[Sequence[float]]]
# How useful the texts of a peer proved, 0..1.
Worth = Callable[[PeerId], float]

ASK_EVERY_S = 30.0
ASK_TIMEOUT_S = 60.0
# A partner that failed, or has nothing for us, is left alone for so many turns of asking.
REST_TURNS = 4
# Of one peer; each costs us a look through our records.
ANSWER_EVERY_S = 5.0
REPORTS_MAX = 1024
# A source that proved useless is still asked now and then: it may have bettered itself.
WORTH_MIN = 0.05

logger = logging.getLogger("llmload.data")


@dataclass(slots=True)
class TextReport:
    """What we had to do with one partner.

    Attributes:
        sent_bytes: Of records, as they travelled.
        received_bytes: The same.
        taken: Records that we kept.
        repeated: Records that were, nearly, there already.
        refused: Records that were not what was offered, or no records.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    taken: int = 0
    repeated: int = 0
    refused: int = 0


class TextExchange:
    """Gives and takes records.

    Args:
        node: We.
        store: Our records.
        partners: With whom to exchange now.
        novelty: Our model's loss on samples.
        worth: How useful the texts of a peer proved.
        limits: How much is given and taken.
        rng: Draws partners, and what is offered.

    Attributes:
        reports: What we had to do with each partner so far.
    """

    def __init__(
        self,
        node: Node,
        store: RecordStore,
        partners: Callable[[], Iterable[PeerId]],
        novelty: Novelty,
        worth: Worth,
        *,
        limits: BarterLimits | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.reports: dict[PeerId, TextReport] = {}
        self._node = node
        self._store = store
        self._partners = partners
        self._novelty = novelty
        self._worth = worth
        self._limits = limits or BarterLimits()
        self._rng = rng or random.Random()
        self._ledger = Ledger(self._limits, trio.current_time())
        self._resting: dict[PeerId, int] = {}
        self._answered_at: dict[PeerId, float] = {}

    def start(self) -> None:
        """Answer others from now on, in tasks of the node."""
        self._node.serve_calls(TEXTS, self._serve)

    async def run(self) -> None:
        """Ask a partner now and then, until cancelled."""
        while True:
            await trio.sleep(self._rng.uniform(0.5, 1.5) * ASK_EVERY_S)
            self._resting = {peer: left - 1 for peer, left in self._resting.items() if left > 1}
            awake = [each for each in self._partners() if each not in self._resting]
            if not awake:
                continue
            peer_id = self._rng.choice(awake)
            try:
                taken = await self.ask(await self._node.connect(peer_id))
            except (NatswarmError, StoreFailed) as error:
                logger.info("no texts from %s: %s", peer_id.short, error)
                taken = 0
            if taken == 0:
                self._resting[peer_id] = REST_TURNS

    # --- Asking ------------------------------------------------------------------------------

    async def ask(self, peer: Peer) -> int:
        """Take what a peer has for us; returns how many records we kept.

        Raises:
            NatswarmError: The peer was lost, refused, or lied too often.
            StoreFailed: Our records can't be read or written.
        """
        if self._ledger.is_liar(peer.peer_id):
            raise RequestRefused(f"{peer.peer_id.short} has sent us what are no records", "liar")
        sketch, bits = make_sketch(await trio.to_thread.run_sync(self._store.told_ids), self._rng)
        async with peer.start_call(TEXTS, sketch, bits, timeout_s=ASK_TIMEOUT_S) as call:
            offers, _ = await call.receive()
            if not isinstance(offers, Offers):
                raise DecodeError("records in place of offers")
            chosen = await self._choose(peer.peer_id, offers)
            await call.send(WantTexts(tuple(offer.record_id for offer in chosen)))
            await call.end()
            signed = await self._take(call, {offer.record_id: offer for offer in chosen})
        added = await trio.to_thread.run_sync(
            lambda: self._store.add(signed, giver=peer.peer_id, is_shared=True)
        )
        report = self._report(peer.peer_id)
        taken = added.count(Added.TAKEN)
        report.taken += taken
        report.repeated += len(added) - taken
        return taken

    async def _choose(self, peer_id: PeerId, offers: Offers) -> list[Offer]:
        """Return what we want: all feedback, then the texts that are newest to us."""
        worth = max(WORTH_MIN, self._worth(peer_id))
        bytes_max = min(offers.allowance_bytes, int(worth * self._limits.taken_bytes_max))
        texts = [offer for offer in offers.offers if offer.kind == "text"]
        novelty = dict(
            zip(texts, await self._novelty([each.sample for each in texts]), strict=True)
        )
        chosen = choose(
            [novelty.get(offer, float("inf")) for offer in offers.offers],
            [offer.byte_count for offer in offers.offers],
            bytes_max,
        )
        return [offers.offers[index] for index in chosen]

    async def _take(
        self, call: Call[Sketch | WantTexts, Offers | GivenText], wanted: dict[bytes, Offer]
    ) -> list[SignedRecord]:
        """Receive what was wanted; return what of it is right, also if the rest does not come."""
        peer_id, found = call.peer.peer_id, []
        report = self._report(peer_id)
        try:
            async for given, packed in call:
                report.received_bytes += len(packed)
                try:
                    if not isinstance(given, GivenText) or given.record_id not in wanted:
                        raise DecodeError("it was not asked for, or came already")
                    found.append(open_given_untrusted(wanted.pop(given.record_id), packed))
                except DecodeError as error:
                    report.refused += 1
                    self._ledger.note_lie(peer_id, trio.current_time())
                    logger.warning("a record from %s is refused: %s", peer_id.short, error)
                    if self._ledger.is_liar(peer_id):
                        break
        except NatswarmError as error:
            if not found:
                raise
            logger.info("%s gave a part: %s", peer_id.short, error)
        return found

    # --- Answering ---------------------------------------------------------------------------

    async def _serve(self, call: Call[Offers | GivenText, Sketch | WantTexts]) -> None:
        peer_id = call.peer.peer_id
        now = trio.current_time()
        self._answered_at = {
            peer: at for peer, at in self._answered_at.items() if now - at < ANSWER_EVERY_S
        }
        if peer_id in self._answered_at:
            raise RequestRefused(f"one such call in {ANSWER_EVERY_S:.0f} s", "busy")
        self._answered_at[peer_id] = now
        try:
            # Who never chooses must not keep the offers in our memory.
            with trio.move_on_after(ASK_TIMEOUT_S):
                await self._answer(call)
        except StoreFailed as error:  # the path of our file is nobody else's affair
            logger.warning("can't answer %s: %s", peer_id.short, error)
            raise RequestRefused("has no texts to give now", "unavailable") from error

    async def _answer(self, call: Call[Offers | GivenText, Sketch | WantTexts]) -> None:
        peer_id = call.peer.peer_id
        sketch, bits = await call.receive()
        if not isinstance(sketch, Sketch):
            raise DecodeError("a choice before there were offers")
        records = await trio.to_thread.run_sync(self._find, peer_id, sketch, bits)
        allowance = await self._allowance(peer_id)
        await call.send(Offers(tuple(offer_of(signed) for signed in records.values()), allowance))
        wanted, _ = await call.receive()
        if not isinstance(wanted, WantTexts):
            raise DecodeError("a sketch in place of a choice")
        for record_id in wanted.record_ids:
            signed = records.pop(record_id, None)  # each once, and nothing but what was offered
            if signed is None:
                raise RequestRefused("was not offered that")
            packed = pack(signed)
            if len(packed) > await self._allowance(peer_id):
                break
            self._ledger.note_given(peer_id, len(packed), trio.current_time())
            self._report(peer_id).sent_bytes += len(packed)
            await call.send(GivenText(record_id), packed)

    def _find(self, peer_id: PeerId, sketch: Sketch, bits: bytes) -> dict[bytes, SignedRecord]:
        """Return what a peer lacks, as much as fits one offer, drawn at random."""
        ids = self._store.shared_ids(lambda giver: giver != peer_id and self._worth(giver) > 0)
        missing = missing_untrusted(sketch, bits, ids)
        drawn = self._rng.sample(missing, min(OFFERS_MAX, len(missing)))
        return {signed.record_id: signed for signed in self._store.shared(drawn)}

    async def _allowance(self, peer_id: PeerId) -> int:
        received = await trio.to_thread.run_sync(self._store.received_bytes, peer_id)
        return self._ledger.allowance(peer_id, received, self._worth(peer_id), trio.current_time())

    def _report(self, peer_id: PeerId) -> TextReport:
        if peer_id not in self.reports and len(self.reports) >= REPORTS_MAX:
            del self.reports[next(iter(self.reports))]
        return self.reports.setdefault(peer_id, TextReport())
