"""One exchange round: every participant ends with the same average of all gradients.

Everybody sends every shard of its gradient to everybody else. The average is taken over what a
receiver sees, decode(encode(gradient)), of ALL participants, our own included, and it is summed in
the order of peer ids. So each participant computes the same bits; if they started from equal
weights, they end with equal weights, as if one process had averaged.

Shards may be lost with a connection, come twice, late, damaged, or from somebody who should not
send any: that changes counters, nothing else. Who hears nothing of a peer for a while sends it a
`ShardReceipt`, which says what is here; the peer sends what is missing again. What has not come by
the deadline is left out, and the result says so for every shard.

No protocol can make sure that two peers leave out the same (the two generals' problem), but it can
be known: a receipt also says whether its sender has averaged everything from everyone. After a
round in which all have said so, all weights are equal; after any other round they may differ, and
whoever drives the round has to compare them before the next.

    ours --encode--> next_message(peer) ...> receive(sender) --decode--> sum in order --> average

Source: all-reduce by direct exchange, as hivemind's group averaging without its reducer; result
that tells how much was really averaged: llmload's answer to hivemind's silent failures.

This file does not know streams, clocks (time is an argument), or what an average is used for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from llmload.learn.shards import (
    Codec,
    EncodedShard,
    LayoutHash,
    RoundNumber,
    ShardHeader,
    ShardLayout,
    Vector,
    decode_shard_untrusted,
    encode_shard,
)
from natswarm import DecodeError, Message, PeerId

__all__ = [
    "GossipEvent",
    "GossipRound",
    "GossipStatistics",
    "RoundFinished",
    "RoundResult",
    "RoundSettled",
    "ShardReceipt",
    "mean_in_order",
]

# Traffic grows with the square of it: larger swarms average in groups of this size or less.
PARTICIPANT_COUNT_MAX = 64
# Silence after which missing shards are asked for. A path over a carrier NAT may stall for some
# seconds without a loss; asking then would send the rest of a gradient twice.
ASK_AFTER_S = 5.0
# How often one shard is sent to one peer. Asking is cheap and shards are large, so it is bounded.
SEND_COUNT_MAX = 8
# Bits of `ShardReceipt.held`: a model of 2^21 shards of 64 Ki values would be GPT-2 1,000 times.
HELD_BYTES_MAX = 2**18 // 8


class ShardReceipt(Message, frozen=True):
    """What its sender holds of its receiver's gradient, and whether it is done.

    Attributes:
        round: Number of the exchange round.
        layout: `ShardLayout.hash`.
        held: One bit a shard, lowest bit first. Set: it is, or will be, part of my average. Not
            set: send it again.
        is_complete: I have averaged every shard of every participant.
        knows_complete: I know that you are complete. If you are and I don't, tell me again.
    """

    round: RoundNumber
    layout: LayoutHash
    held: Annotated[bytes, Meta(max_length=HELD_BYTES_MAX)]
    is_complete: bool
    knows_complete: bool


@dataclass(frozen=True, eq=False)
class RoundResult:
    """What was really averaged.

    Attributes:
        average: float32 (size of the parameter space,), the mean over those who contributed.
        contribution_counts: int64 (shard_count,), how many gradients each shard is the mean of.
        missing_shard_counts: Of which peer how many shards were left out; empty if nothing was.
    """

    average: Vector
    contribution_counts: NDArray[np.int64]
    missing_shard_counts: dict[PeerId, int]

    @property
    def is_complete(self) -> bool:
        """Whether every shard is the mean over all participants."""
        return not self.missing_shard_counts


@dataclass(frozen=True)
class RoundFinished:
    """Our average is final: everything came, or the deadline has passed."""

    result: RoundResult


@dataclass(frozen=True)
class RoundSettled:
    """The round is over, nothing more will be sent unasked.

    Attributes:
        is_unanimous: All participants say that they have averaged everything: unless one of them
            lies, their averages are equal to the last bit. If False they may be equal or not.
        unconfirmed: Peers that did not say that they are complete.
    """

    is_unanimous: bool
    unconfirmed: tuple[PeerId, ...]


GossipEvent: TypeAlias = RoundFinished | RoundSettled


@dataclass
class GossipStatistics:
    """Messages that changed nothing, by reason.

    Attributes:
        duplicate: The shard was here already.
        damaged: The shard could not be decoded.
        foreign: The sender is no participant, or the layout is of another model.
        other_round: The message belongs to another round.
        late: The shard came after our average was final.
        refused: A peer asked for a shard too often.
    """

    duplicate: int = 0
    damaged: int = 0
    foreign: int = 0
    other_round: int = 0
    late: int = 0
    refused: int = 0


def mean_in_order(contributions: Sequence[Vector]) -> Vector:
    """Return the mean of vectors, float32, summed from the first to the last.

    The order is part of the result: floating-point addition is not associative. Sum and quotient
    are IEEE operations on each element, equal on every processor.
    """
    total = contributions[0].copy()
    for contribution in contributions[1:]:
        total += contribution
    total /= np.float32(len(contributions))
    return total


@dataclass
class _Partner:
    """What we know of another participant."""

    outbox: deque[int]  # shards to send
    queued: set[int]  # the same, to look up
    send_counts: list[int]  # how often each shard was queued
    missing: set[int]  # shards not yet received
    quiet_since_s: float  # when its last shard came, or we last asked
    is_receipt_due: bool = False
    is_complete: bool = False  # has said so

    @property
    def is_awaited(self) -> bool:
        """Whether it owes us shards, or word that it is complete."""
        return bool(self.missing) or not self.is_complete


class GossipRound:
    """The part of one participant in one round.

    Drive it: give it messages (`receive`) and the time (`handle_timer` at `next_timer`); after each
    input send what `next_message` has for each peer, and read `next_event`. It stays useful after
    its events: it answers peers that still miss something. Drop it when the next round has ended.

    Args:
        layout: How gradients are cut; equal at all participants.
        round_number: Of this round; equal at all participants.
        me: Our id.
        participants: Ids of all participants, in any order; ours may be among them.
        gradient: Ours, float32 (size of the parameter space,). It is encoded at once, not kept.
        codec: How we send. Others may use another codec.
        now: The time.
        deadline_s: Time at which the round ends with what is there.
        ask_after_s: Silence after which missing shards are asked for.

    Raises:
        ValueError: The gradient holds NaN, infinity or huge values; or there are no, or too many,
            other participants; or the model has too many shards.
    """

    def __init__(
        self,
        layout: ShardLayout,
        *,
        round_number: int,
        me: PeerId,
        participants: Sequence[PeerId],
        gradient: Vector,
        codec: Codec = Codec.INT8X256,
        now: float,
        deadline_s: float,
        ask_after_s: float = ASK_AFTER_S,
    ) -> None:
        # Sorted, not a set: the order of the sum, and of everything that is sent.
        self._order = sorted({me, *participants})
        if not 2 <= len(self._order) <= PARTICIPANT_COUNT_MAX:
            raise ValueError(f"{len(self._order)} participants, not 2..{PARTICIPANT_COUNT_MAX}")
        if layout.shard_count > 8 * HELD_BYTES_MAX:
            raise ValueError(f"{layout.shard_count} shards are too many: make them larger")
        self._layout = layout
        self._round_number = round_number
        self._me = me
        self._deadline_s = deadline_s
        self._ask_after_s = ask_after_s
        self._own = [
            encode_shard(
                layout,
                shard,
                gradient[layout.bounds(shard)],
                codec=codec,
                round_number=round_number,
            )
            for shard in range(layout.shard_count)
        ]
        shards = range(layout.shard_count)
        self._partners = {
            peer: _Partner(deque(shards), set(shards), [1] * len(shards), set(shards), now)
            for peer in self._order
            if peer != me
        }
        # Decoded shards that wait for the same shard of others: at most one gradient a partner.
        self._waiting: list[dict[PeerId, Vector]] = [{} for _ in shards]
        self._average = np.zeros(layout.space.size, dtype=np.float32)
        self._contribution_counts = np.zeros(len(shards), dtype=np.int64)
        self._result: RoundResult | None = None
        self._is_settled = False
        self._events: deque[GossipEvent] = deque()
        self.statistics = GossipStatistics()

    # --- Inputs ---

    def receive(self, sender: PeerId, header: Message, payload: bytes, now: float) -> None:
        """Take a message. Whatever is wrong with it is counted, never raised.

        Args:
            sender: Who sent it, as the connection has authenticated it.
            header: A `ShardHeader` or a `ShardReceipt`.
            payload: The numbers of a shard; empty for a receipt.
            now: The time.
        """
        partner = self._partners.get(sender)
        if partner is None or not isinstance(header, ShardHeader | ShardReceipt):
            self.statistics.foreign += 1
        elif header.round != self._round_number:
            self.statistics.other_round += 1
        elif header.layout != self._layout.hash:
            self.statistics.foreign += 1
        elif isinstance(header, ShardReceipt):
            self._receive_receipt(partner, header)
        else:
            self._receive_shard(sender, partner, header, payload, now)

    def handle_timer(self, now: float) -> None:
        """Do what is due: ask silent peers, or end the round."""
        if now >= self._deadline_s:
            self._finish()
            self._settle()
        if self._is_settled:
            return
        for partner in self._partners.values():
            if partner.is_awaited and now >= partner.quiet_since_s + self._ask_after_s:
                partner.is_receipt_due = True
                partner.quiet_since_s = now

    # --- Outputs ---

    def next_message(self, peer: PeerId) -> tuple[Message, bytes] | None:
        """Return the next message for a peer, header and payload, or None.

        One queue a peer: a slow one holds nobody. Receipts are made when they are taken, so they
        tell what is here now.

        Raises:
            KeyError: The peer takes no part.
        """
        partner = self._partners[peer]
        if partner.is_receipt_due:
            # Before the shards: it is small, and the peer may wait for it.
            partner.is_receipt_due = False
            return self._receipt_for(partner), b""
        if not partner.outbox:
            return None
        shard = partner.outbox.popleft()
        partner.queued.remove(shard)
        return self._own[shard].header, self._own[shard].payload

    def next_timer(self) -> float | None:
        """Return when `handle_timer` is due; None when nothing is."""
        if self._is_settled:
            return None
        questions = [
            partner.quiet_since_s + self._ask_after_s
            for partner in self._partners.values()
            if partner.is_awaited
        ]
        return min([self._deadline_s, *questions])

    def next_event(self) -> GossipEvent | None:
        """Return what has happened since the last call, one event at a time, or None."""
        return self._events.popleft() if self._events else None

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The other participants, in the order of their ids."""
        return tuple(self._partners)

    # --- Shards ---

    def _receive_shard(
        self, sender: PeerId, partner: _Partner, header: ShardHeader, payload: bytes, now: float
    ) -> None:
        if header.shard not in partner.missing and header.shard < self._layout.shard_count:
            self.statistics.duplicate += 1
            return
        if self._result is not None:
            self.statistics.late += 1
            return
        try:
            values = decode_shard_untrusted(self._layout, header, payload)
        except DecodeError:
            self.statistics.damaged += 1
            return
        partner.missing.remove(header.shard)
        partner.quiet_since_s = now
        self._waiting[header.shard][sender] = values
        if len(self._waiting[header.shard]) == len(self._partners):
            self._average_shard(header.shard)
        if not partner.missing:
            partner.is_receipt_due = True
        if not any(other.missing for other in self._partners.values()):
            self._finish()
            self._settle_if_unanimous()

    def _average_shard(self, shard: int) -> None:
        contributions = self._waiting[shard]
        # Our own as the others see it: with the rounding of its codec.
        own: EncodedShard = self._own[shard]
        contributions[self._me] = decode_shard_untrusted(self._layout, own.header, own.payload)
        in_order = [contributions[peer] for peer in self._order if peer in contributions]
        self._average[self._layout.bounds(shard)] = mean_in_order(in_order)
        self._contribution_counts[shard] = len(in_order)
        self._waiting[shard] = {}

    def _finish(self) -> None:
        """Average what has not been averaged yet, and publish the result."""
        if self._result is not None:
            return
        for shard in np.flatnonzero(self._contribution_counts == 0).tolist():
            self._average_shard(shard)
        missing_counts = {
            peer: len(partner.missing)
            for peer, partner in self._partners.items()
            if partner.missing
        }
        self._result = RoundResult(self._average, self._contribution_counts, missing_counts)
        self._events.append(RoundFinished(self._result))
        for partner in self._partners.values():
            # After the deadline a question would be answered with shards that come too late.
            partner.is_receipt_due = self._result.is_complete

    # --- Receipts ---

    def _receive_receipt(self, partner: _Partner, receipt: ShardReceipt) -> None:
        if len(receipt.held) != (self._layout.shard_count + 7) // 8:
            self.statistics.damaged += 1
            return
        for shard in self._unpack_gaps(receipt.held):
            if shard in partner.queued:
                continue
            if partner.send_counts[shard] == SEND_COUNT_MAX:
                self.statistics.refused += 1
                continue
            partner.send_counts[shard] += 1
            partner.outbox.append(shard)
            partner.queued.add(shard)
        partner.is_complete |= receipt.is_complete
        if self._is_complete and not receipt.knows_complete:
            partner.is_receipt_due = True
        self._settle_if_unanimous()

    @property
    def _is_complete(self) -> bool:
        return self._result is not None and self._result.is_complete

    def _receipt_for(self, partner: _Partner) -> ShardReceipt:
        return ShardReceipt(
            round=self._round_number,
            layout=self._layout.hash,
            held=self._pack(partner.missing),
            is_complete=self._is_complete,
            knows_complete=partner.is_complete,
        )

    def _pack(self, missing: set[int]) -> bytes:
        held = np.ones(self._layout.shard_count, dtype=np.uint8)
        held[sorted(missing)] = 0
        return np.packbits(held, bitorder="little").tobytes()

    def _unpack_gaps(self, held: bytes) -> list[int]:
        bits = np.unpackbits(
            np.frombuffer(held, dtype=np.uint8), count=self._layout.shard_count, bitorder="little"
        )
        gaps: list[int] = np.flatnonzero(bits == 0).tolist()
        return gaps

    # --- The end ---

    def _settle_if_unanimous(self) -> None:
        if self._is_complete and all(partner.is_complete for partner in self._partners.values()):
            self._settle()

    def _settle(self) -> None:
        if self._is_settled:
            return
        self._is_settled = True
        unconfirmed = tuple(
            peer for peer, partner in self._partners.items() if not partner.is_complete
        )
        is_unanimous = self._is_complete and not unconfirmed
        self._events.append(RoundSettled(is_unanimous, unconfirmed))
