"""The end of a call that asks: opens it, minds its deadline, and learns at once of a lost path.

A connection outlives its paths, so a stream to a peer that is gone would wait for a minute before
it breaks. A call need not: it fails once no path has led to the peer for as long as the caller has
patience, which is none unless said otherwise. Paths are known to be dead within 3 s while anything
is sent (`path_keeper.py`), so a call to another peer can take over soon.

Knows paths only as there or not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from natswarm.errors import CallFailed, CallTimedOut, ConnectionLost, PeerUnreachable
from natswarm.net.call import BUDGET_S_MAX, Call, CallBegin, Method, ReplyT, RequestT
from natswarm.net.message_stream import MessageStream

if TYPE_CHECKING:
    from natswarm.net.peer import Peer

__all__ = ["Caller"]


@dataclass(slots=True, eq=False)
class _Wait:
    """How long one call may go on."""

    scope: trio.CancelScope
    deadline: float
    patience_s: float

    def note_unreachable(self) -> None:
        self.scope.deadline = min(self.deadline, trio.current_time() + self.patience_s)

    def note_reachable(self) -> None:
        self.scope.deadline = self.deadline


class Caller:
    """All our calls to one peer.

    Args:
        peer: Whom.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._waits: dict[_Wait, None] = {}

    @property
    def call_count(self) -> int:
        """Calls under way."""
        return len(self._waits)

    def note_unreachable(self) -> None:
        """No path leads to the peer any more."""
        for wait in self._waits:
            wait.note_unreachable()

    def note_reachable(self) -> None:
        """One does again."""
        for wait in self._waits:
            wait.note_reachable()

    async def call(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float,
        patience_s: float,
    ) -> ReplyT:
        """Ask once and return the one reply; see `Peer.call`."""
        async with self.start(method, request, timeout_s=timeout_s, patience_s=patience_s) as call:
            try:
                reply, _ = await call.receive()
            except trio.EndOfChannel:
                short = self._peer.peer_id.short
                raise CallFailed(f"{short} ended {method.name} without an answer") from None
            return reply

    @asynccontextmanager
    async def start(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        payload: bytes | memoryview = b"",
        *,
        timeout_s: float,
        patience_s: float,
    ) -> AsyncIterator[Call[RequestT, ReplyT]]:
        """Begin a call and give it up, or end it, with the block; see `Peer.start_call`."""
        peer, own_deadline = self._peer, trio.current_time() + timeout_s
        if not peer.is_reachable and patience_s <= 0:
            raise self._unreachable()
        deadline = min(own_deadline, trio.current_effective_deadline())
        wait = _Wait(trio.CancelScope(deadline=own_deadline), own_deadline, patience_s)
        if not peer.is_reachable:
            wait.note_unreachable()
        self._waits[wait] = None
        try:
            with wait.scope:
                try:
                    stream = await peer.open_stream(method.name)
                except trio.ClosedResourceError as error:
                    raise ConnectionLost(str(error)) from error
                is_done = False
                messages = MessageStream(stream, payload_bytes_max=method.payload_bytes_max)
                try:
                    call: Call[RequestT, ReplyT] = Call(messages, method.replies, peer, deadline)
                    await call.send(request, payload, begin=_begin(call.deadline))
                    yield call
                    is_done = True
                finally:
                    # Not clean where it was cut short: half of a question is none.
                    if is_done:
                        await messages.aclose()
                    else:
                        await trio.aclose_forcefully(stream)
        finally:
            del self._waits[wait]
        if wait.scope.cancelled_caught:
            if trio.current_time() < own_deadline:
                raise self._unreachable()
            raise CallTimedOut(
                f"{peer.peer_id.short} took longer than {timeout_s:g} s for {method.name}"
            )

    def _unreachable(self) -> PeerUnreachable:
        return PeerUnreachable(
            f"no path leads to {self._peer.peer_id.short} now; try another peer, or this one later"
        )


def _begin(deadline: float) -> CallBegin:
    left_s = deadline - trio.current_time()
    return CallBegin(max(left_s, 0.001) if left_s <= BUDGET_S_MAX else None)
