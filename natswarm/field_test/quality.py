"""Measure a new path: round trips, loss, bandwidth, and how long it stays.

One stream, asked by the side that asked for the puncture:

    Ping(i) / Pong(i)                  one round trip each, one after another
    Bulk, chunks, Done / Received      as fast as QUIC's congestion control lets us, out
    Send / chunks, Done                the same back
    Compare / Compare                  each side's own part of the record, and its packet loss

Streams repair loss, so it shows in QUIC's own count of packets that it declared lost, and in the
longest of the round trips. What the peer asks for is bounded here, whatever it says.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
import trio

from natswarm.errors import DecodeError, NatswarmError
from natswarm.field_test.plan import MeasurePlan
from natswarm.field_test.records import PathQuality, SideSeen
from natswarm.message import Message
from natswarm.net.message_stream import MessageStream
from natswarm.net.peer import Peer

__all__ = ["PROTOCOL", "Comparison", "answer_measurement", "measure_path"]

PROTOCOL = "natswarm/field-test/1"

PING_TIMEOUT_S = 5.0
CHUNK_BYTES = 16 * 1024
BULK_S_MAX = 60.0
BULK_BYTES_MAX = 1_000_000_000
# A bulk that stands still for so long has ended.
SILENCE_S = 5.0
STAY_INTERVAL_S = 1.0

CHUNK = bytes(CHUNK_BYTES)


class Ping(Message, frozen=True):
    """Answer at once."""

    index: int


class Pong(Message, frozen=True):
    """The answer."""

    index: int


class Bulk(Message, frozen=True):
    """Chunks follow."""


class Chunk(Message, frozen=True):
    """Carries a payload."""


class Done(Message, frozen=True):
    """No more chunks follow."""


class Received(Message, frozen=True):
    """What came in between `Bulk` and `Done`."""

    byte_count: int
    seconds: float


class Send(Message, frozen=True):
    """Send chunks for so long, at most so much."""

    seconds: Annotated[float, msgspec.Meta(ge=0, le=BULK_S_MAX)]
    byte_count: Annotated[int, msgspec.Meta(ge=0, le=BULK_BYTES_MAX)]


class Compare(Message, frozen=True):
    """One side's part of the record, as JSON, and the path's quality if it measured it."""

    side: bytes
    loss: float | None
    quality: bytes = b""


Question = Ping | Bulk | Send | Compare


class Comparison(msgspec.Struct, frozen=True):
    """What the other side said."""

    side: SideSeen | None = None
    quality: PathQuality | None = None


async def measure_path(
    peer: Peer, plan: MeasurePlan, mine: SideSeen
) -> tuple[PathQuality, Comparison]:
    """Measure the path to a peer that answers; whatever ends it early shows as `trouble`.

    Args:
        peer: Whom to ask.
        plan: How much.
        mine: Our part of the record, for the peer's.
    """
    run = _Run(peer, plan)
    try:
        async with MessageStream(await peer.open_stream(PROTOCOL)) as messages:
            await run.measure(messages)
            comparison = await run.compare(messages, mine)
    except trio.TooSlowError:
        run.note(trouble=f"the path fell silent for {PING_TIMEOUT_S:g} s")
    except (
        NatswarmError,
        trio.BrokenResourceError,
        trio.ClosedResourceError,
        trio.EndOfChannel,
    ) as error:
        run.note(trouble=str(error) or "the peer ended it")
    else:
        return run.quality(), comparison
    return run.quality(), Comparison()


class _Run:
    def __init__(self, peer: Peer, plan: MeasurePlan) -> None:
        self._peer = peer
        self._plan = plan
        self._quality = PathQuality()

    def quality(self) -> PathQuality:
        """Return what was found by now."""
        return self._quality

    def note(self, **found: float | str | tuple[float, ...] | None) -> None:
        """Take note of what was found."""
        self._quality = msgspec.structs.replace(self._quality, **found)

    async def measure(self, messages: MessageStream) -> None:
        """Ask everything that the plan wants."""
        plan = self._plan
        for index in range(plan.ping_count):
            began_at = trio.current_time()
            await self._ping(messages, index)
            await trio.sleep_until(began_at + plan.ping_interval_s)
        if plan.bulk_s and plan.bulk_bytes:
            self.note(out_bytes_per_s=await self._send_bulk(messages))
            self.note(back_bytes_per_s=await self._receive_bulk(messages))
        if plan.stay_s:
            await self._stay(messages)

    async def compare(self, messages: MessageStream, mine: SideSeen) -> Comparison:
        """Exchange what each side knows."""
        self.note(out_loss=_loss(self._peer))
        request = Compare(
            msgspec.json.encode(mine), None, quality=msgspec.json.encode(self.quality())
        )
        with trio.fail_after(PING_TIMEOUT_S):
            theirs = await messages.call(request, Compare)
        self.note(back_loss=theirs.loss)
        return Comparison(_side(theirs.side))

    async def _ping(self, messages: MessageStream, index: int) -> None:
        began_at = trio.current_time()
        try:
            with trio.fail_after(PING_TIMEOUT_S):
                pong = await messages.call(Ping(index), Pong)
        except trio.TooSlowError:
            self.note(unanswered_count=self._quality.unanswered_count + 1)
            raise
        if pong.index != index:
            raise DecodeError("the peer answered another ping")
        rtt_ms = round(1000 * (trio.current_time() - began_at), 2)
        self.note(rtts_ms=(*self._quality.rtts_ms, rtt_ms))

    async def _send_bulk(self, messages: MessageStream) -> float | None:
        await messages.send(Bulk())
        await _send_chunks(messages, self._plan.bulk_s, self._plan.bulk_bytes)
        with trio.fail_after(self._plan.bulk_s + SILENCE_S):
            received, _ = await messages.receive(Received)
        return _rate(received.byte_count, received.seconds)

    async def _receive_bulk(self, messages: MessageStream) -> float | None:
        await messages.send(Send(self._plan.bulk_s, self._plan.bulk_bytes))
        received = await _receive_chunks(messages)
        return _rate(received.byte_count, received.seconds)

    async def _stay(self, messages: MessageStream) -> None:
        """Keep the path in use, and note the longest silence."""
        began_at = heard_at = trio.current_time()
        gap_s = 0.0
        try:
            while (now := trio.current_time()) < began_at + self._plan.stay_s:
                with trio.fail_after(PING_TIMEOUT_S):
                    await messages.call(Ping(0), Pong)
                gap_s = max(gap_s, trio.current_time() - heard_at)
                heard_at = trio.current_time()
                await trio.sleep_until(now + STAY_INTERVAL_S)
        finally:
            self.note(stayed_s=round(heard_at - began_at, 2))
            self.note(longest_gap_s=round(gap_s, 3))


async def answer_measurement(messages: MessageStream, peer: Peer, mine: SideSeen) -> Comparison:
    """Answer a peer that measures, until it has compared.

    Args:
        messages: The stream that it opened.
        peer: Who it is.
        mine: Our part of the record.

    Raises:
        NatswarmError: The peer broke the rules.
        trio.BrokenResourceError: It is gone.
        trio.EndOfChannel: It left without comparing.
        trio.TooSlowError: It stopped in the middle of a bulk.
    """
    while True:
        question: Question
        question, _ = await messages.receive(Ping, Bulk, Send, Compare)
        match question:
            case Ping(index):
                await messages.send(Pong(index))
            case Bulk():
                await messages.send(await _receive_chunks(messages))
            case Send(seconds, byte_count):
                await _send_chunks(messages, seconds, byte_count)
            case Compare():
                await messages.send(Compare(msgspec.json.encode(mine), _loss(peer)))
                return Comparison(_side(question.side), _quality(question.quality, _loss(peer)))


async def _send_chunks(messages: MessageStream, seconds: float, byte_count: int) -> None:
    """Send until the time is over or enough was sent."""
    sent = 0
    with trio.move_on_after(SILENCE_S + seconds) as silence:
        began_at = trio.current_time()
        while sent < byte_count and trio.current_time() < began_at + seconds:
            await messages.send(Chunk(), CHUNK)
            sent += CHUNK_BYTES
        await messages.send(Done())
    if silence.cancelled_caught:
        raise trio.TooSlowError


async def _receive_chunks(messages: MessageStream) -> Received:
    """Take chunks until the sender is done.

    The clock starts with the first chunk and its bytes do not count: what came before is the way.
    """
    byte_count = 0
    first_at = last_at = math.inf
    while True:
        with trio.fail_after(SILENCE_S):
            message, payload = await messages.receive(Chunk, Done)
        if isinstance(message, Done):
            return Received(byte_count, max(0.0, last_at - first_at) if byte_count else 0.0)
        last_at = trio.current_time()
        if first_at is math.inf:
            first_at = last_at
        else:
            byte_count += len(payload)
        if byte_count > BULK_BYTES_MAX:
            raise DecodeError(f"a bulk has at most {BULK_BYTES_MAX:,} bytes")


def _rate(byte_count: int, seconds: float) -> float | None:
    return round(byte_count / seconds, 1) if seconds > 0 and math.isfinite(seconds) else None


def _loss(peer: Peer) -> float | None:
    counts = peer.statistics()
    if not counts.sent_datagram_count:
        return None
    return round(min(1.0, counts.lost_packet_count / counts.sent_datagram_count), 5)


def _side(data: bytes) -> SideSeen | None:
    try:
        return msgspec.json.decode(data, type=SideSeen)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"the peer's part of the record is none: {error}") from error


def _quality(data: bytes, back_loss: float | None) -> PathQuality | None:
    try:
        quality = msgspec.json.decode(data, type=PathQuality)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"the peer's measurement is none: {error}") from error
    return msgspec.structs.replace(quality, back_loss=back_loss)
