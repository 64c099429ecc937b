"""Two peers learn from each other's text without showing it: rounds of averaged gradients.

    initiator                           partner
      | -- ProposeLearning -------------> |     one stream, `llmload/learn/1`
      | <------------- AcceptLearning --- |
      |                                   |     each round: a gradient of our own text
      | <===== shards and receipts =====> |     both ways at once, as fast as the slower
      |                                   |     average, step
      | <========== RoundDone ==========> |     the hash of the new weights
      :                                   :

Both start from equal weights and apply the same bits, so both end with equal weights; and that is
not assumed but compared after every round. Whatever keeps a round from being averaged whole, a lost
connection, a silent or a lying peer, ends the exchange with `LearningFailed` before the step.

What is exchanged is not private: from the gradient of a small batch much of its text can be
computed back. Nor is it robust: a partner that keeps to the protocol may send any gradient. Learn
with peers that you trust; `AdamWSettings.gradient_norm_max` bounds what one step can do.

This file does not know how gradients are computed, encoded or averaged.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
import trio
from msgspec import Meta
from numpy.typing import NDArray

from llmload.errors import LearningFailed
from llmload.learn.gossip import (
    GossipRound,
    RoundFinished,
    RoundResult,
    RoundSettled,
    ShardReceipt,
)
from llmload.learn.shards import LAYOUT_HASH_BYTES, Codec, ShardHeader, ShardLayout
from llmload.learn.trainer import Trainer
from natswarm import (
    Message,
    MessageStream,
    NatswarmError,
    Node,
    Peer,
    PeerId,
    Refusal,
    RequestRefused,
    Stream,
)

__all__ = [
    "LEARN_PROTOCOL",
    "Batches",
    "LearningPartner",
    "LearningResult",
    "RoundReport",
    "learn_with",
]

LEARN_PROTOCOL = "llmload/learn/1"

# A phone computes the gradient of a batch in seconds, and an int8 gradient of GPT-2 124M, 126 MB,
# takes 100 s at 10 Mbit/s.
ROUND_TIMEOUT_S = 300.0
# Partners decide themselves; an hour of rounds of a few seconds is what a stranger may ask for.
ROUND_COUNT_MAX = 1000
HELLO_TIMEOUT_S = 15.0
REPORT_TIMEOUT_S = 5.0
OUTCOMES_KEPT = 16
HASH_BYTES = 32
REASON_CHARACTERS_MAX = 500

# Tokens and targets, integers (batch, time) each; `trainer.batches` makes them.
Batches: TypeAlias = Iterator[tuple[NDArray[Any], NDArray[Any]]]

WeightsHash: TypeAlias = Annotated[bytes, Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]

logger = logging.getLogger("llmload.learn")


class ProposeLearning(Message, frozen=True):
    """Let us learn together: the first message on a learning stream.

    Attributes:
        layout: `ShardLayout.hash`: the shape of the model.
        weights: SHA-256 of all parameters. Different weights could not be kept equal.
        round_count: How many rounds.
    """

    layout: Annotated[bytes, Meta(min_length=LAYOUT_HASH_BYTES, max_length=LAYOUT_HASH_BYTES)]
    weights: WeightsHash
    round_count: Annotated[int, Meta(ge=1, le=2**31)]


class AcceptLearning(Message, frozen=True):
    """I have the same weights, and begin with round 0."""


class RoundDone(Message, frozen=True):
    """I have made the step of a round.

    Attributes:
        round: Which, from 0.
        weights: SHA-256 of all parameters after it.
        loss: Mean cross-entropy in nats a token of our own batch, before it.
    """

    round: Annotated[int, Meta(ge=0, lt=2**31)]
    weights: WeightsHash
    loss: Annotated[float, Meta(ge=0, le=1e6)]


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round that was averaged whole and compared.

    Attributes:
        index: From 0.
        loss: Of our own batch before the step, nats a token.
        peer_loss: What the peer says of its batch.
        gradient_norm: Length of the averaged gradient, before it was clipped.
        shard_count: Shards of the model.
        averaged_shard_count: How many of them are the mean of both gradients.
        sent_bytes: Encoded gradients that we sent; headers (about 90 bytes a shard) not counted.
        received_bytes: Encoded gradients that came.
        seconds: From the start of computing to the comparison.
    """

    index: int
    loss: float
    peer_loss: float
    gradient_norm: float
    shard_count: int
    averaged_shard_count: int
    sent_bytes: int
    received_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LearningResult:
    """An exchange that came to its end.

    Attributes:
        peer_id: With whom.
        rounds: What happened, one by one.
        loss_before: Of our first batch, with the weights we started from; nats a token.
        loss_after: Of the same batch, with the weights we ended with.
        weights_equal: Whether both sides have the same weights, by their hashes, after every round.
            True in every result: if they ever differ, the exchange ends with an error.
        weights_hash: SHA-256 of them.
    """

    peer_id: PeerId
    rounds: tuple[RoundReport, ...]
    loss_before: float
    loss_after: float
    weights_equal: bool
    weights_hash: bytes

    @property
    def sent_bytes(self) -> int:
        """Encoded gradients that we sent in all rounds."""
        return sum(report.sent_bytes for report in self.rounds)

    @property
    def received_bytes(self) -> int:
        """Encoded gradients that came in all rounds."""
        return sum(report.received_bytes for report in self.rounds)


OnRound: TypeAlias = Callable[[RoundReport], None]


async def learn_with(
    node: Node,
    peer: Peer,
    trainer: Trainer,
    batches: Batches,
    rounds: int,
    *,
    codec: Codec = Codec.INT8X256,
    round_timeout_s: float = ROUND_TIMEOUT_S,
    on_round: OnRound | None = None,
) -> LearningResult:
    """Learn together with a peer that serves `LearningPartner`.

    Both trainers must have the same history: equal weights, equal settings, equal steps so far.
    Nobody else may use the trainer meanwhile. Cancelled, the weights are those after the last whole
    round, unless the step was being made: a computation in its thread is finished first.

    Args:
        node: We.
        peer: The partner, connected.
        trainer: Our model.
        batches: Our text.
        rounds: How many steps to make together.
        codec: How our gradient travels; the peer chooses for its own.
        round_timeout_s: How long one round may take, from our own gradient on.
        on_round: Called after each round; must return quickly.

    Raises:
        LearningFailed: The peer refused, was lost, stalled or lied. The step of the round that
            failed was not made, unless the message says otherwise; earlier ones were.
        ValueError: `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be positive, got {rounds}")
    layout = ShardLayout(trainer.space)
    proposal = ProposeLearning(layout.hash, await _weights_hash(trainer), rounds)
    try:
        with trio.fail_after(HELLO_TIMEOUT_S):
            stream = await peer.open_stream(LEARN_PROTOCOL)
    except (trio.TooSlowError, trio.BrokenResourceError) as error:
        raise LearningFailed(f"can't reach {peer.peer_id.short}: {error}") from error
    async with MessageStream(stream, payload_bytes_max=_payload_bytes_max(layout)) as messages:
        await _propose(messages, peer, proposal)
        exchange = _Exchange(
            messages,
            me=node.peer_id,
            peer_id=peer.peer_id,
            trainer=trainer,
            layout=layout,
            batches=batches,
            codec=codec,
            round_timeout_s=round_timeout_s,
            on_round=on_round,
        )
        return await exchange.run(rounds)


async def _propose(messages: MessageStream, peer: Peer, proposal: ProposeLearning) -> None:
    name = peer.peer_id.short
    try:
        with trio.fail_after(HELLO_TIMEOUT_S):
            await messages.call(proposal, AcceptLearning)
    except trio.TooSlowError:
        raise LearningFailed(
            f"{name} did not answer in {HELLO_TIMEOUT_S:g} s whether it learns with us"
        ) from None
    except RequestRefused as refusal:
        raise LearningFailed(f"{name} does not learn with us: {_shown(refusal)}") from refusal
    except (NatswarmError, trio.BrokenResourceError) as error:
        raise LearningFailed(
            f"{name} did not answer whether it learns with us: {_shown(error)}"
        ) from error


class LearningPartner:
    """Learns with whoever asks, one at a time: the answering side of `learn_with`.

    Args:
        node: We.
        trainer: Our model; used only while an exchange runs.
        batches: Our text.
        codec: How our gradient travels.
        round_count_max: Longer exchanges are refused.
        round_timeout_s: How long one round may take.
        on_round: Called after each round; must return quickly.

    Attributes:
        outcomes: Results and failures of the latest exchanges, oldest first.
    """

    def __init__(
        self,
        node: Node,
        trainer: Trainer,
        batches: Batches,
        *,
        codec: Codec = Codec.INT8X256,
        round_count_max: int = ROUND_COUNT_MAX,
        round_timeout_s: float = ROUND_TIMEOUT_S,
        on_round: OnRound | None = None,
    ) -> None:
        self._node = node
        self._trainer = trainer
        self._layout = ShardLayout(trainer.space)
        self._batches = batches
        self._codec = codec
        self._round_count_max = round_count_max
        self._round_timeout_s = round_timeout_s
        self._on_round = on_round
        self._turn = trio.Lock()
        self._learning_with: PeerId | None = None
        self.outcomes: deque[LearningResult | LearningFailed] = deque(maxlen=OUTCOMES_KEPT)

    def start(self) -> None:
        """Answer learning streams from now on, in tasks of the node."""
        self._node.serve(LEARN_PROTOCOL, self.handle)

    async def handle(self, stream: Stream, peer: Peer) -> None:
        """Learn with one peer, to the end or the first failure; owns the stream.

        What goes wrong is logged and put into `outcomes`, not raised.

        Raises:
            NatswarmError: The first message was no proposal.
            trio.BrokenResourceError: The peer was lost before it had our answer.
        """
        async with MessageStream(
            stream, payload_bytes_max=_payload_bytes_max(self._layout)
        ) as messages:
            try:
                with trio.fail_after(HELLO_TIMEOUT_S):
                    proposal, _ = await messages.receive(ProposeLearning)
            except (trio.TooSlowError, trio.EndOfChannel):
                return  # nothing was asked
            if self._learning_with not in (None, peer.peer_id):
                # Not who: whom we learn with is nobody's business.
                await messages.send(Refusal("it is learning with somebody else; try again later"))
                return
            # The peer may be back before we are done with the exchange that it has just left.
            with trio.move_on_after(HELLO_TIMEOUT_S) as waiting:
                await self._turn.acquire()
            if waiting.cancelled_caught:
                return
            self._learning_with = peer.peer_id
            try:
                await self._answer(messages, peer, proposal)
            except RequestRefused as refusal:
                await messages.send(Refusal(str(refusal)))
            except LearningFailed as failure:
                logger.warning("learning with %s: %s", peer.peer_id.short, failure)
                self.outcomes.append(failure)
            finally:
                self._learning_with = None
                self._turn.release()

    async def _answer(self, messages: MessageStream, peer: Peer, proposal: ProposeLearning) -> None:
        if proposal.layout != self._layout.hash:
            raise RequestRefused("its model has another shape")
        if proposal.round_count > self._round_count_max:
            raise RequestRefused(f"it learns at most {self._round_count_max} rounds at a time")
        if proposal.weights != await _weights_hash(self._trainer):
            raise RequestRefused(
                "its weights are not ours. Start both from the same model folder, and let both "
                "make the same steps"
            )
        await messages.send(AcceptLearning())
        exchange = _Exchange(
            messages,
            me=self._node.peer_id,
            peer_id=peer.peer_id,
            trainer=self._trainer,
            layout=self._layout,
            batches=self._batches,
            codec=self._codec,
            round_timeout_s=self._round_timeout_s,
            on_round=self._on_round,
        )
        self.outcomes.append(await exchange.run(proposal.round_count))


class _Exchange:
    """The rounds, after both have agreed; the two sides do the same."""

    def __init__(
        self,
        messages: MessageStream,
        *,
        me: PeerId,
        peer_id: PeerId,
        trainer: Trainer,
        layout: ShardLayout,
        batches: Batches,
        codec: Codec,
        round_timeout_s: float,
        on_round: OnRound | None,
    ) -> None:
        self._messages = messages
        self._me = me
        self._peer_id = peer_id
        self._trainer = trainer
        self._layout = layout
        self._batches = batches
        self._codec = codec
        self._round_timeout_s = round_timeout_s
        self._on_round = on_round

    async def run(self, round_count: int) -> LearningResult:
        """Make all rounds.

        Raises:
            LearningFailed: See `learn_with`; the peer has been told, if it still listens.
        """
        reports = []
        first_batch: tuple[NDArray[Any], NDArray[Any]] | None = None
        digest = b""
        try:
            for index in range(round_count):
                batch = next(self._batches, None)
                if batch is None:
                    raise LearningFailed(f"our own text ended before round {index}")
                first_batch = first_batch or batch
                report, digest = await self._round(index, *batch)
                reports.append(report)
                if self._on_round is not None:
                    self._on_round(report)
        except LearningFailed as failure:
            await self._tell(str(failure))
            raise
        assert first_batch is not None, "there is at least one round"
        loss_after = await trio.to_thread.run_sync(self._trainer.loss, *first_batch)
        return LearningResult(
            peer_id=self._peer_id,
            rounds=tuple(reports),
            loss_before=reports[0].loss,
            loss_after=loss_after,
            weights_equal=True,
            weights_hash=digest,
        )

    async def _round(
        self, index: int, tokens: NDArray[Any], targets: NDArray[Any]
    ) -> tuple[RoundReport, bytes]:
        started_at = trio.current_time()
        loss, gradient = await trio.to_thread.run_sync(self._trainer.gradients, tokens, targets)
        deadline = trio.current_time() + self._round_timeout_s

        def encode() -> GossipRound:
            return GossipRound(
                self._layout,
                round_number=index,
                me=self._me,
                participants=(self._me, self._peer_id),
                gradient=gradient,
                codec=self._codec,
                now=started_at,
                deadline_s=deadline,
                # A stream loses nothing, so there is nothing to ask for again.
                ask_after_s=self._round_timeout_s * 2,
            )

        try:
            gossip = await trio.to_thread.run_sync(encode)
        except ValueError as error:
            raise LearningFailed(
                f"round {index}: our own gradient can't be sent ({error}); the step was not made"
            ) from error
        traffic = _RoundTraffic(self._messages, self._peer_id, gossip)
        with trio.CancelScope(deadline=deadline) as until_deadline:
            average = await traffic.average()
        if until_deadline.cancelled_caught:
            raise LearningFailed(self._missing(index, gossip, deadline))
        norm = await trio.to_thread.run_sync(self._trainer.apply, average.average)
        digest = await _weights_hash(self._trainer)
        with trio.CancelScope(deadline=deadline) as until_deadline:
            done = await traffic.compare(RoundDone(index, digest, loss))
        if until_deadline.cancelled_caught:
            raise LearningFailed(
                f"round {index}: {self._peer_id.short} did not say that it has made the step, as "
                f"we have; compare the weights before learning on"
            )
        if (done.round, done.weights) != (index, digest):
            raise LearningFailed(
                f"round {index}: the weights of {self._peer_id.short} are not ours, after a step "
                f"that was made on both sides. Trainers of different settings or history, or a "
                f"peer that lies; start both from the same model folder"
            )
        report = RoundReport(
            index=index,
            loss=loss,
            peer_loss=done.loss,
            gradient_norm=norm,
            shard_count=self._layout.shard_count,
            averaged_shard_count=int(np.count_nonzero(average.contribution_counts == 2)),
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
            seconds=trio.current_time() - started_at,
        )
        return report, digest

    def _missing(self, index: int, gossip: GossipRound, deadline: float) -> str:
        """Say what was not there in time."""
        gossip.handle_timer(deadline)
        missing_count = 0
        while (event := gossip.next_event()) is not None:
            if isinstance(event, RoundFinished):
                missing_count = event.result.missing_shard_counts.get(self._peer_id, 0)
        what = f"{missing_count} of {self._layout.shard_count} shards of {self._peer_id.short}"
        if missing_count == 0:
            what = f"the confirmation of {self._peer_id.short}"
        damaged = f" ({gossip.statistics.damaged} were damaged)" * bool(gossip.statistics.damaged)
        return (
            f"round {index}: {what} did not come in {self._round_timeout_s:g} s{damaged}; the step "
            f"was not made"
        )

    async def _tell(self, reason: str) -> None:
        """Let the peer know why we stop."""
        with (
            trio.move_on_after(REPORT_TIMEOUT_S),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError),
        ):
            await self._messages.send(Refusal(reason[:REASON_CHARACTERS_MAX]))


class _RoundTraffic:
    """The messages of one round, both ways at once."""

    def __init__(self, messages: MessageStream, peer_id: PeerId, gossip: GossipRound) -> None:
        self._messages = messages
        self._peer_id = peer_id
        self._gossip = gossip
        self._result: RoundResult | None = None
        self._is_unanimous: bool | None = None  # None: not settled yet
        self._received_something = trio.Event()
        self.sent_bytes = 0
        self.received_bytes = 0

    async def average(self) -> RoundResult:
        """Exchange all shards, until both know that both have all.

        Raises:
            LearningFailed: The peer stopped, was lost, or sent something else.
        """
        failures: list[LearningFailed] = []
        async with trio.open_nursery() as nursery:

            async def until_failure(part: Callable[[], Awaitable[None]]) -> None:
                try:
                    await part()
                except LearningFailed as failure:
                    failures.append(failure)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(until_failure, self._send_until_settled)
            nursery.start_soon(until_failure, self._receive_until_settled)
        if failures:
            raise failures[0]
        if self._result is None or not self._is_unanimous:
            raise LearningFailed(f"{self._peer_id.short} did not average the whole gradient")
        return self._result

    async def compare(self, ours: RoundDone) -> RoundDone:
        """Tell what our weights are now, and return what the peer says of its own.

        Raises:
            LearningFailed: The peer was lost or sent something else.
        """
        with suppress(trio.BrokenResourceError):  # the reason is read below
            await self._messages.send(ours)
        while True:
            header, payload = await self._receive(ShardHeader, ShardReceipt, RoundDone)
            if isinstance(header, RoundDone):
                return header
            # The last receipts may cross; ours may be what the peer still waits for.
            self._gossip.receive(self._peer_id, header, payload, trio.current_time())
            await self._send_what_is_due()

    async def _send_until_settled(self) -> None:
        while True:
            await self._send_what_is_due()
            if self._is_unanimous is not None:
                return
            await self._received_something.wait()
            self._received_something = trio.Event()

    async def _send_what_is_due(self) -> None:
        while (message := self._gossip.next_message(self._peer_id)) is not None:
            header, payload = message
            try:
                await self._messages.send(header, payload)
            except trio.BrokenResourceError:
                # Why the peer closed is about to be read, or that it is lost.
                return
            self.sent_bytes += len(payload)

    async def _receive_until_settled(self) -> None:
        while self._is_unanimous is None:
            header, payload = await self._receive(ShardHeader, ShardReceipt)
            self.received_bytes += len(payload)
            self._gossip.receive(self._peer_id, header, payload, trio.current_time())
            while (event := self._gossip.next_event()) is not None:
                match event:
                    case RoundFinished(result):
                        self._result = result
                    case RoundSettled(is_unanimous):
                        self._is_unanimous = is_unanimous
            self._received_something.set()

    async def _receive(self, *types: type[Message]) -> tuple[Message, bytes]:
        name = self._peer_id.short
        try:
            return await self._messages.receive(*types)
        except RequestRefused as refusal:
            raise LearningFailed(f"{name} stopped learning: {_shown(refusal)}") from refusal
        except trio.EndOfChannel as error:
            raise LearningFailed(f"{name} ended the exchange without a reason") from error
        except (trio.BrokenResourceError, NatswarmError) as error:
            raise LearningFailed(f"lost {name} while learning: {_shown(error)}") from error


async def _weights_hash(trainer: Trainer) -> bytes:
    """Return the SHA-256 of all parameters, little-endian as on the wire."""

    def digest() -> bytes:
        values = np.ascontiguousarray(trainer.parameters, dtype="<f4")
        return hashlib.sha256(values.data).digest()

    return await trio.to_thread.run_sync(digest)


def _payload_bytes_max(layout: ShardLayout) -> int:
    return Codec.FP32.payload_bytes(layout.shard_value_count)


def _shown(error: Exception) -> str:
    """Return what a peer may have written, fit for a terminal."""
    text = "".join(character if character.isprintable() else " " for character in str(error))
    return text[:REASON_CHARACTERS_MAX]
