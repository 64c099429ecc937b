"""A learner on the mesh: trains here, and exchanges with whoever else learns the same model.

    every `local_steps` steps   an update goes to all partners, each in a call of its own; the reply
                                says how much of it was taken
    soon after                  the model makes a step along the mean of what came in
    every `AVERAGE_EVERY_S`     groups that the clock has drawn average some parts of their models
    in the beginning            who joins takes over the model of those who learn already
                                (`joining.py`); so does who comes back after it was away

Updates of a partner that another one can't reach are passed on to it (`forwarding.py`).

Nobody waits for anybody. A partner that is slow gets the latest update when it has read the one
before; one that is silent, lies or is lost costs a call that fails. So does one of another model:
every shard names its layout.

What is exchanged is not private: from updates much of the text can be computed back that they were
learned from. Whoever learns with strangers should take text that strangers may read.

This file does not know how updates are made, weighed or encoded (`outer.py`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeAlias

import trio
from msgspec import UNSET, structs

from llmload.errors import LearningFailed
from llmload.learn.averaging import Averaged, Averaging
from llmload.learn.forwarding import Acquaintances
from llmload.learn.joining import StateFetch, StateServer
from llmload.learn.mailbox import Mailbox, Parcel
from llmload.learn.mixing import group_of
from llmload.learn.outer import OuterLoop, OuterSettings
from llmload.learn.protocol import (
    PARTNERS_MAX,
    UPDATE,
    UpdateTaken,
    learner_service,
)
from llmload.learn.robust import Reputation
from llmload.learn.shards import (
    EncodedShard,
    ShardHeader,
    ShardLayout,
    Vector,
)
from llmload.learn.trainer import Batch, Trainer
from llmload.swarm.beside import beside
from natswarm import Call, NatswarmError, Node, Peer, PeerId, RequestRefused

__all__ = ["Batches", "Learner", "PartnerReport"]

# A phone on a bad link carries an update of GPT-2 124M, some 3 MB, in a minute.
UPDATE_TIMEOUT_S = 120.0
# Whoever was passed on to us within so many updates of ours is heard.
PASSED_ON_VERSIONS = 3
REPORTS_MAX = 1024
LOOK_EVERY_S = 10.0
AVERAGE_EVERY_S = 60.0
# A round leaves 1/8 of the variance between peers (`mixing.py`); each sends twice these parts.
GROUP_SIZE = 8
PARTS_PER_ROUND = 8
# A partner makes one at a time; of one that it gave up we may not know yet.
CALLS_PER_PEER_MAX = 4
# Who was away fetches a model, and then none for a minute, and for four times as long as that took:
# on a link on which it is outdated once it is there, most of the time is for learning.
CATCH_UP_REST_S = 60.0
CATCH_UP_REST_FACTOR = 4
# Who was away may have learned its own text by heart, and the others may have forgotten it: their
# model may be worse than ours, and this much worse than ours was when we began.
AWAY_FACTOR = 1.25
# At the end of a run it is waited for so long until partners have our last update.
LAST_UPDATE_S = 30.0

# Tokens and targets, integers (batch, time) each; `trainer.batches` makes them.
Batches: TypeAlias = Iterator[Batch]

logger = logging.getLogger("llmload.learn")


@dataclass(slots=True)
class PartnerReport:
    """What we had to do with one partner.

    Attributes:
        sent_bytes: Payloads of updates that it has confirmed, and of parts averaged.
        received_bytes: Payloads that came.
        confirmed: Updates of ours that it has answered.
        taken_weight: Mean weight that it took our latest with, 0..1.
        given_weight: Mean weight that we took its latest with, 0..1.
        failures: Calls to it that failed.
        averaged: Parts that it averaged for us or we for it.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    confirmed: int = 0
    taken_weight: float = 0.0
    given_weight: float = 0.0
    failures: int = 0
    averaged: int = 0


class Learner:
    """Trains a model on our text, together with everybody who does the same with it.

    `start` answers others from then on; `run` trains. Nobody else may use the trainer meanwhile.

    Args:
        node: We.
        trainer: Our model.
        batches: Our text.
        model_hash: Content hash of the model that all started from, in hexadecimal.
        settings: How often and how much is published.
        rate_at: Learning rate of a step, counted from 0; None for that of the trainer.
        parts: Batches that make one step together, computed one after the other.
        reputation: What is known of a peer from elsewhere, 0..1; None for 1.
        between_steps: Called after each step, while nobody else touches the model: the place to
            evaluate, to save, and to stop by cancelling. What it raises ends `run`.
        utc: The wall clock, seconds; groups are drawn by it.

    Attributes:
        outer: The state of the exchange, and its counters.
        reports: What we had to do with each partner so far.
        step_count: Steps made.
        loss: Mean over the latest batches, nats a token; None before the first.
        caught_up_count: How often we took over others' model because we had been away.
    """

    def __init__(
        self,
        node: Node,
        trainer: Trainer,
        batches: Batches,
        model_hash: str,
        *,
        settings: OuterSettings | None = None,
        rate_at: Callable[[int], float] | None = None,
        parts: int = 1,
        reputation: Reputation | None = None,
        between_steps: Callable[[], Awaitable[None]] | None = None,
        utc: Callable[[], float] = time.time,
    ) -> None:
        self.service = learner_service(model_hash)
        self.outer = OuterLoop(
            ShardLayout(trainer.space),
            trainer.parameters,
            node.peer_id,
            settings,
            optimizer=trainer.optimizer.settings,
            reputation=reputation,
            # Milliseconds: more than any earlier run of this peer has published.
            version=int(1000 * utc()),
        )
        self.reports: dict[PeerId, PartnerReport] = {}
        self.step_count = 0
        self.loss: float | None = None
        self.caught_up_count = 0
        self._node = node
        self._trainer = trainer
        self._batches = batches
        self._rate_at = rate_at
        self._parts = parts
        self._between_steps = between_steps
        self._utc = utc
        self._state = StateServer(self.outer.layout, lambda: (self.outer.anchor, self.step_count))
        # Kept: fresh memory for 124 million numbers costs a tenth of a second.
        self._gradient: Vector | None = None
        self._partners: dict[PeerId, Mailbox] = {}
        self._acquaintances = Acquaintances(node.peer_id)
        self._next_catch_up_at = -math.inf
        self._first_loss = -math.inf
        self._passed_on: dict[PeerId, int] = {}  # at which version of ours the latest came
        self._nursery: trio.Nursery | None = None  # while training
        # Threads work on the same arrays: one lock for the parameters, one for what comes in. What
        # is done with one shard takes 2 ms, less than on a busy machine the way to a thread.
        self._model_lock = trio.Lock()
        self._incoming_lock = trio.Lock()
        self._averaging = Averaging(
            node, self.outer, self._model_lock, lambda: self.round_number, self._note_traffic
        )

    @property
    def partners(self) -> list[PeerId]:
        """With whom we exchange now."""
        return [peer_id for peer_id, found in self._partners.items() if not found.peer.is_lost]

    @property
    def round_number(self) -> int:
        """That of averaging, by the clock."""
        return int(self._utc() // AVERAGE_EVERY_S)

    @property
    def part_count(self) -> int:
        """Parts of our model that can be averaged."""
        return self._averaging.layout.shard_count

    @asynccontextmanager
    async def pausing(self) -> AsyncIterator[None]:
        """Keep training and merging away from the model meanwhile: to look at it between steps."""
        async with self._model_lock:
            yield

    def start(self) -> None:
        """Answer others from now on, in tasks of the node."""
        self._node.serve_calls(UPDATE, self._serve_update, calls_per_peer_max=CALLS_PER_PEER_MAX)
        self._averaging.start()
        self._state.start(self._node)

    # --- Training ----------------------------------------------------------------------------

    async def run(self, step_count: int | None = None) -> None:
        """Train and exchange until cancelled, or for some steps and until partners have the last.

        Raises:
            LearningFailed: Training itself failed: NaN, or no more text.
        """
        async with beside(self._exchange):
            await self._train(step_count)
            with trio.move_on_after(LAST_UPDATE_S):
                for found in list(self._partners.values()):
                    await found.has_all.wait()

    async def settle(self) -> None:
        """Take what came in after the last step of `run` into our model."""
        async with self._model_lock, self._incoming_lock:
            await trio.to_thread.run_sync(self.outer.settle)

    async def _exchange(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for found in self._partners.values():
                    nursery.start_soon(self._push_to, found)
                nursery.start_soon(self._average_now_and_then)
                await self._look_for_partners()
            finally:
                self._nursery = None

    async def _train(self, step_count: int | None) -> None:
        made_count = 0
        while step_count is None or made_count < step_count:
            if self.outer.is_behind:
                await self._catch_up()
            parts = list(islice(self._batches, self._parts))
            if len(parts) < self._parts:
                raise LearningFailed("our own text has ended")
            async with self._model_lock:
                await trio.to_thread.run_sync(self._step, parts)
                async with self._incoming_lock:
                    if self.step_count % self.outer.settings.local_steps == 0:
                        await self._publish()
                    await trio.to_thread.run_sync(self.outer.merge)
                    if self._between_steps is not None:
                        await self._between_steps()
            self._state.let_go()
            made_count += 1

    def _step(self, parts: Sequence[Batch]) -> None:
        trainer = self._trainer
        if self._rate_at is None:
            rate = trainer.optimizer.settings.learning_rate
        else:
            rate = self._rate_at(self.step_count)
        loss, self._gradient = trainer.gradients(*parts, out=self._gradient)
        self.outer.note_step(
            self._gradient, trainer.apply(self._gradient, learning_rate=rate), rate
        )
        self.step_count += 1
        if self.loss is None:
            self.loss = self._first_loss = loss
        self.loss = 0.9 * self.loss + 0.1 * loss

    async def _publish(self) -> None:
        partners = self.partners
        if not partners:
            await trio.to_thread.run_sync(self.outer.go_alone)
            return
        try:
            update = await trio.to_thread.run_sync(
                partial(self.outer.publish, partners, unheard=self._count_unheard())
            )
        except ValueError as error:
            raise LearningFailed(
                f"our own update can't be sent ({error}); lower the learning rate"
            ) from error
        for found in self._partners.values():
            found.post(Parcel(update.shards))

    def _count_unheard(self) -> int:
        """Return how many learn the same, and neither reach us nor are passed on to us."""
        oldest = self.outer.version - PASSED_ON_VERSIONS
        self._passed_on = {
            origin: version for origin, version in self._passed_on.items() if version > oldest
        }
        return self._acquaintances.unheard_count({*self._partners, *self._passed_on})

    # --- Ours to others ----------------------------------------------------------------------

    async def _look_for_partners(self) -> None:
        with suppress(NatswarmError):  # nobody to keep it yet: the node tries again
            await self._node.publish(self.service, is_service=True)
        while True:
            for peer_id in await self._others():
                if peer_id not in self._partners and len(self._partners) < PARTNERS_MAX:
                    try:
                        self.meet(await self._node.connect(peer_id))
                    except NatswarmError as error:
                        logger.info("can't reach %s, who learns too: %s", peer_id.short, error)
            await trio.sleep(LOOK_EVERY_S)

    async def _others(self) -> list[PeerId]:
        """Return who else learns this model: of our neighbourhood, and by routing.

        The nearest by XOR come first: so where there are too many, groups form that stay.
        """
        found = {
            record.peer_id
            for record in await self._node.find_peers()
            if self.service in record.services
        }
        with suppress(NatswarmError):  # this node takes no part in routing, or nobody answers
            found.update(await self._node.find_service(self.service))
        me = int.from_bytes(self._node.peer_id.key)
        return sorted(
            found - {self._node.peer_id}, key=lambda other: int.from_bytes(other.key) ^ me
        )

    def meet(self, peer: Peer) -> None:
        """Exchange with a peer from now on, if there is room; who is found needs no introduction.

        Args:
            peer: Connected, and learning the same model.
        """
        if peer.peer_id in self._partners or len(self._partners) >= PARTNERS_MAX:
            return
        self._partners[peer.peer_id] = found = Mailbox(peer)
        if self._nursery is not None:
            self._nursery.start_soon(self._push_to, found)

    async def _push_to(self, found: Mailbox) -> None:
        """Send one partner what we have for it, until it is lost."""
        peer_id = found.peer.peer_id
        report = self._report(peer_id)
        try:
            while not found.peer.is_lost:
                parcel = await found.next_parcel()
                try:
                    taken = await self._push(found.peer, parcel)
                except (NatswarmError, trio.EndOfChannel) as error:
                    report.failures += 1
                    logger.info("an update for %s failed: %s", peer_id.short, error)
                    await found.rest()
                else:
                    report.confirmed += 1
                    report.sent_bytes += parcel.payload_bytes
                    report.taken_weight = taken.weight
                    found.is_steady = True
                    self._acquaintances.tell(peer_id, taken.partners)
        finally:
            found.has_all.set()
            self._acquaintances.forget(peer_id)
            del self._partners[peer_id]

    async def _push(self, peer: Peer, parcel: Parcel) -> UpdateTaken:
        # Whose update we pass on has taken about what we have.
        seen = self.outer.seen(peer.peer_id)
        origin = UNSET if parcel.origin is None else parcel.origin.key
        first, *others = [
            EncodedShard(structs.replace(shard.header, seen=seen, origin=origin), shard.payload)
            for shard in parcel.shards
        ]
        async with peer.start_call(
            UPDATE, first.header, first.payload, timeout_s=UPDATE_TIMEOUT_S
        ) as call:
            for shard in others:
                await call.send(shard.header, shard.payload)
            await call.end()
            taken, _ = await call.receive()
            return taken

    # --- Others' to us -----------------------------------------------------------------------

    async def _serve_update(self, call: Call[UpdateTaken, ShardHeader]) -> None:
        self.meet(call.peer)  # it may know of us before we look
        if call.peer.peer_id not in self._partners:
            raise RequestRefused(f"we learn with {PARTNERS_MAX} others already")
        if self._passed_on.pop(call.peer.peer_id, None) is not None:
            async with self._incoming_lock:
                # What others have sent in its name need not have been its own.
                self.outer.forget(call.peer.peer_id)
        report = self._report(call.peer.peer_id)
        weights: list[float] = []
        shards: list[EncodedShard] = []
        origin: PeerId | None = call.peer.peer_id
        async for header, payload in call:
            self._check_shard(header.layout, header.shard)
            origin = self._origin(call.peer.peer_id, header)
            report.received_bytes += len(payload)
            shards.append(EncodedShard(header, payload))
            async with self._incoming_lock:
                taken = origin is not None and self.outer.receive(origin, header, payload)
            weights.append(float(taken))
            if len(weights) > self.outer.layout.shard_count:
                raise RequestRefused("an update has each shard once")
        if not shards:
            raise RequestRefused("an update has shards")
        mean = sum(weights) / len(weights)
        report.given_weight = mean
        keys = tuple(peer_id.key for peer_id in self._partners)
        await call.send(UpdateTaken(sum(weight > 0 for weight in weights), mean, keys))
        if origin == call.peer.peer_id:
            for target in self._acquaintances.targets(origin):
                self._partners[target].post(Parcel(shards, origin))

    def _origin(self, sender: PeerId, header: ShardHeader) -> PeerId | None:
        """Return whose update a shard is of; None for one that is passed on to us in vain.

        That is no error: who passes it on may not know yet that we have met its learner.
        """
        if header.origin is UNSET:
            return sender
        origin = PeerId(header.origin)
        is_full = origin not in self._passed_on and len(self._passed_on) >= PARTNERS_MAX
        if origin in self._partners or origin == self._node.peer_id or is_full:
            return None
        self._passed_on[origin] = self.outer.version
        return origin

    # --- Averaging ---------------------------------------------------------------------------

    async def _average_now_and_then(self) -> None:
        """Average with the group that the clock has drawn of those whose links are good."""
        me = self._node.peer_id
        while True:
            await trio.sleep(AVERAGE_EVERY_S - self._utc() % AVERAGE_EVERY_S)
            steady = [
                peer_id
                for peer_id, found in self._partners.items()
                if found.is_steady and not found.is_resting
            ]
            number = self.round_number
            group = group_of(me, [me, *steady], round_number=number, size=GROUP_SIZE)
            peers = [self._partners[each].peer for each in group if each != me]
            if peers:
                await self.average(peers, number)

    async def average(
        self, peers: Sequence[Peer], round_number: int, parts: Sequence[int] | None = None
    ) -> Averaged:
        """Average parts of our model with peers who do the same with us in this round.

        If nobody trains meanwhile, all have the same bits of them afterwards, unless they were so
        far apart that one did not trust the others.

        Args:
            peers: The rest of the group.
            round_number: See the property; others' may be one off.
            parts: Which, of `part_count`; None for those of the round.
        """
        if parts is None:
            first = round_number * PARTS_PER_ROUND
            parts = sorted({(first + i) % self.part_count for i in range(PARTS_PER_ROUND)})
        averaged = await self._averaging.average(peers, parts, round_number)
        for peer_id, error in averaged.failures.items():
            self._report(peer_id).failures += 1
            logger.info("averaging with %s failed: %s", peer_id.short, error)
            if peer_id in self._partners:
                self._partners[peer_id].is_steady = False
        return averaged

    def _note_traffic(self, peer_id: PeerId, sent_bytes: int, received_bytes: int) -> None:
        report = self._report(peer_id)
        report.sent_bytes += sent_bytes
        report.received_bytes += received_bytes
        report.averaged += 1

    # --- Joining -----------------------------------------------------------------------------

    async def join(self) -> int:
        """Take over the model of those who learn already, if it is better on our own text.

        Call before `run`.

        Returns:
            Shards that were taken over: all or none.
        """
        return await self._fetch_model()

    async def _catch_up(self) -> None:
        """Take over the model of those who went on while we were away."""
        begun_at = trio.current_time()
        if begun_at < self._next_catch_up_at:
            return
        shard_count = await self._fetch_model(AWAY_FACTOR * self._first_loss)
        self.caught_up_count += shard_count > 0
        ended_at = trio.current_time()
        rest_s = max(CATCH_UP_REST_S, CATCH_UP_REST_FACTOR * (ended_at - begun_at))
        self._next_catch_up_at = ended_at + rest_s
        logger.info("we were away; took over %d shards of others' model", shard_count)

    async def _fetch_model(self, good_loss: float = -math.inf) -> int:
        """Take over a model that on our text is no worse than ours, or than a loss."""
        fetch = StateFetch(self._node, self.outer.layout, await self._others())
        batch: Batch | None = None
        while (found := await fetch.next_model()) is not None:
            batch = batch or next(self._batches, None)
            if batch is None:
                raise LearningFailed("our own text has ended")
            if await self._take_over(found, batch, good_loss):
                await self._state.renew()  # for others who come now
                return self.outer.layout.shard_count
        return 0

    async def _take_over(self, found: Vector, batch: Batch, good_loss: float) -> bool:
        async with self._model_lock:
            before = await trio.to_thread.run_sync(self._trainer.loss, *batch)
            kept = self._trainer.parameters.copy()
            self._trainer.parameters[:] = found
            after = await trio.to_thread.run_sync(self._trainer.loss, *batch)
            if not after <= max(before, good_loss):
                self._trainer.parameters[:] = kept
                return False
            self.outer.restart()
        return True

    # --- Shared ------------------------------------------------------------------------------

    def _check_shard(self, layout: bytes, shard: int) -> None:
        if layout != self.outer.layout.hash:
            raise RequestRefused("its model has another shape")
        if shard >= self.outer.layout.shard_count:
            raise RequestRefused(f"its model has {self.outer.layout.shard_count} shards")

    def _report(self, peer_id: PeerId) -> PartnerReport:
        if peer_id not in self.reports and len(self.reports) >= REPORTS_MAX:
            del self.reports[next(iter(self.reports))]
        return self.reports.setdefault(peer_id, PartnerReport())
