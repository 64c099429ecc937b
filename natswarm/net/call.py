"""Calls: a peer is asked by name and answers, once or in as many messages as both like.

    caller                                        who answers
    Peer.start_call ── stream of its own ───────▶ CallHandler ── what the node has registered
        CallBegin(budget) | request  ───────────▶ first messages, sent in one
        further requests ───────────────────────▶ ◀─────── replies, in any order and number
        END: no more requests                               END: that was all,
                                                            or Refusal(reason, code), then END
        leaving early, however: STOP ───────────▶ what answers is cancelled

A call costs a stream of the connection and nothing else: back-pressure, fairness and giving up are
the stream's. 2,048 calls go on at once to one peer; more wait for a place, within their deadline.

The deadline travels as the time that is left, so clocks need not agree. Versions are part of the
name ("llmload/stage/2"): who can speak several serves several, and a caller that meets
`ProtocolUnknown` tries an older one. Within a version, messages may grow fields (`message.py`).

Source: gRPC, for deadlines that travel and errors with codes. This file knows what both ends share
and the end that answers; `caller.py` is the other one.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Generic, TypeVar

import trio
from msgspec import Meta

from natswarm.errors import CallFailed, ConnectionLost, NatswarmError, RequestRefused, is_expected
from natswarm.identity import PeerId
from natswarm.message import Message, Refusal, printable_untrusted
from natswarm.net.message_stream import MessageStream
from natswarm.net.stream import Stream

if TYPE_CHECKING:
    from natswarm.net.peer import Peer

__all__ = ["BUDGET_S_MAX", "Call", "CallBegin", "CallHandler", "Method", "answering"]

logger = logging.getLogger("natswarm.call")

# Deadlines further away are none.
BUDGET_S_MAX = 86_400.0
# Who opens a stream for a call sends the first message with it.
FIRST_MESSAGE_TIMEOUT_S = 15.0

# Each may hold one message of the size its method allows, and a task.
CALLS_MAX = 4096
CALLS_PER_PEER_MAX = 1024

RequestT = TypeVar("RequestT", bound=Message)
ReplyT = TypeVar("ReplyT", bound=Message)
SentT = TypeVar("SentT", bound=Message)
ReceivedT = TypeVar("ReceivedT", bound=Message)


class CallBegin(Message, frozen=True):
    """The first message of a call.

    Attributes:
        budget_s: How long the caller will wait for all of it; None: it has not said.
    """

    budget_s: Annotated[float, Meta(gt=0, le=BUDGET_S_MAX)] | None = None


@dataclass(frozen=True, slots=True)
class Method(Generic[RequestT, ReplyT]):
    """What can be called: the contract that both ends import.

    Attributes:
        name: With a version at its end, such as "llmload/stage/2"; 64 characters.
        requests: Messages that the caller sends.
        replies: Messages that come back.
        payload_bytes_max: Of what follows a message raw, either way; messages themselves have at
            most 64 KiB.
    """

    name: str
    requests: tuple[type[RequestT], ...]
    replies: tuple[type[ReplyT], ...]
    payload_bytes_max: int = 0


class Call(Generic[SentT, ReceivedT]):
    """One end of a call under way; iterating over it gives what is received until the end.

    One task may send while another receives. After an error nothing more comes.

    Attributes:
        peer: The other end.
        deadline: When the call is over, by Trio's clock; infinity where nobody has said.
    """

    def __init__(
        self,
        messages: MessageStream,
        received_types: tuple[type[ReceivedT], ...],
        peer: Peer,
        deadline: float,
    ) -> None:
        self._messages = messages
        self._received_types = received_types
        self._failure: NatswarmError | None = None
        self.peer = peer
        self.deadline = deadline

    async def send(
        self,
        message: SentT,
        payload: bytes | memoryview = b"",
        *,
        begin: CallBegin | None = None,
    ) -> None:
        """Send one message; waits while the other end is behind with reading.

        Args:
            message: What.
            payload: Raw bytes that belong to it.
            begin: For `caller.py`: what opens the call.

        Raises:
            RequestRefused: The peer had said no, which sending met before `receive` did.
            CallFailed: The peer gave the call up.
            ConnectionLost: The connection ended.
            ValueError: The message is over the bounds; nothing was sent.
        """
        try:
            await self._messages.send(message, payload, preceded_by=begin)
        except NatswarmError:
            raise
        except trio.ClosedResourceError as error:
            raise self._closed(error) from error
        except trio.BrokenResourceError as error:
            await self._find_failure(error)

    async def end(self) -> None:
        """Say that this end sends no more; receiving goes on."""
        with suppress(trio.BrokenResourceError):  # who does not listen needs no end
            await self._messages.send_eof()

    async def receive(self) -> tuple[ReceivedT, bytes]:
        """Wait for the next message and its payload. Cancelled, nothing is lost.

        Raises:
            RequestRefused: The peer said no; its `code` is for programs.
            trio.EndOfChannel: The other end sends no more.
            CallFailed: The peer gave the call up.
            ConnectionLost: The connection ended.
            DecodeError: What came is not what the method has.
        """
        if self._failure is not None:
            raise self._failure
        try:
            return await self._messages.receive(*self._received_types)
        except NatswarmError as error:
            self._failure = error
            raise
        except trio.ClosedResourceError as error:
            raise self._closed(error) from error
        except trio.BrokenResourceError as error:
            self._failure = self._given_up()
            raise self._failure from error

    def __aiter__(self) -> Call[SentT, ReceivedT]:
        return self

    async def __anext__(self) -> tuple[ReceivedT, bytes]:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def _closed(self, error: trio.ClosedResourceError) -> Exception:
        """Return what to raise: it is the caller's mistake only where the connection lives."""
        return ConnectionLost(str(error)) if self.peer.is_lost else error

    def _given_up(self) -> CallFailed:
        return CallFailed(f"{self.peer.peer_id.short} gave the call up")

    async def _find_failure(self, error: trio.BrokenResourceError) -> None:
        """Raise why nobody reads any more: it has come before, perhaps behind unread messages."""
        try:
            while True:
                await self.receive()
        except trio.EndOfChannel:
            self._failure = self._given_up()
            raise self._failure from error
        except trio.BusyResourceError:  # another task receives, and is told
            raise self._given_up() from error


class CallHandler(Generic[RequestT, ReplyT]):
    """Answers the calls of one method; `handle` is what a node serves it with.

    What `serve` raises goes to the caller: a NatswarmError as `RequestRefused` with its text and
    code, anything else as code "internal", without a word of it, and with a traceback in our log.

    Args:
        method: Which.
        serve: Answers one call. It is cancelled at the call's deadline, when the caller leaves, and
            when the connection is lost.
        calls_max: At once; more are refused with the code "busy".
        calls_per_peer_max: The same for each peer, so that one can't shut out the others.
    """

    def __init__(
        self,
        method: Method[RequestT, ReplyT],
        serve: Callable[[Call[ReplyT, RequestT]], Awaitable[None]],
        *,
        calls_max: int = CALLS_MAX,
        calls_per_peer_max: int = CALLS_PER_PEER_MAX,
    ) -> None:
        self._method = method
        self._serve = serve
        self._calls_max = calls_max
        self._calls_per_peer_max = calls_per_peer_max
        self._counts: Counter[PeerId] = Counter()

    @property
    def call_count(self) -> int:
        """Calls under way."""
        return self._counts.total()

    async def handle(self, stream: Stream, peer: Peer) -> None:
        """Answer the call on one stream; owns the stream."""
        messages = MessageStream(stream, payload_bytes_max=self._method.payload_bytes_max)
        is_answered = False
        try:
            with trio.CancelScope() as scope:
                stream.when_reader_gone(scope.cancel)
                try:
                    await self._answer(messages, peer, scope)
                except Exception as error:
                    with suppress(trio.BrokenResourceError):
                        await messages.send(self._refusal(error, peer))
                is_answered = True
        finally:
            if is_answered:
                await messages.aclose()
            else:
                await trio.aclose_forcefully(stream)

    async def _answer(self, messages: MessageStream, peer: Peer, scope: trio.CancelScope) -> None:
        scope.deadline = trio.current_time() + FIRST_MESSAGE_TIMEOUT_S
        begin, _ = await messages.receive(CallBegin)
        scope.deadline = math.inf
        if begin.budget_s is not None:
            scope.deadline = trio.current_time() + begin.budget_s
        with self._place(peer.peer_id):
            await self._serve(Call(messages, self._method.requests, peer, scope.deadline))

    @contextmanager
    def _place(self, peer_id: PeerId) -> Iterator[None]:
        if self.call_count >= self._calls_max or self._counts[peer_id] >= self._calls_per_peer_max:
            raise RequestRefused(f"has no room for one more {self._method.name}", "busy")
        self._counts[peer_id] += 1
        try:
            yield
        finally:
            self._counts[peer_id] -= 1
            if not self._counts[peer_id]:
                del self._counts[peer_id]

    def _refusal(self, error: Exception, peer: Peer) -> Refusal:
        if not is_expected(error):
            logger.exception("answering %s for %s failed", self._method.name, peer.peer_id.short)
            return Refusal("failed inside; its log says how", "internal")
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        reason = printable_untrusted(str(first)) or type(first).__name__
        return Refusal(reason, first.code if isinstance(first, NatswarmError) else "")


def answering(
    answer: Callable[[RequestT, Peer], Awaitable[ReplyT]],
) -> Callable[[Call[ReplyT, RequestT]], Awaitable[None]]:
    """Make of a function from request to reply what `CallHandler` serves."""

    async def serve(call: Call[ReplyT, RequestT]) -> None:
        request, _ = await call.receive()
        await call.send(await answer(request, call.peer))

    return serve
