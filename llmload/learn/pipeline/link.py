"""One neighbour in the pipeline: what is for it goes out meanwhile, what it sends waits here.

Computing goes on while a micro-batch is on its way. And two neighbours that send at once would wait
for each other for ever, if either only read when it has nothing to send.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from llmload.swarm.beside import open_quiet_nursery
from llmload.swarm.protocol import SessionFailed
from llmload.swarm.route import HopFailed, StageOffer
from natswarm import Call, Message, NatswarmError

__all__ = ["Guard", "Link", "Traffic"]

# When a send fails, the reason may already be on its way towards us.
REASON_GRACE_S = 2.0


@dataclass(slots=True)
class Traffic:
    """Payloads that a device has sent and received: hidden states, gradients, states."""

    sent_bytes: int = 0
    received_bytes: int = 0


class Link:
    """A call whose messages are sent and received by tasks of their own.

    Args:
        call: The call.
        offer: Who is at its other end.
        room: Messages that wait, each way; 1F1B sends no more before something comes back.
        traffic: What goes over it is added to this.
    """

    def __init__(
        self,
        call: Call[Message, Message],
        offer: StageOffer,
        room: int,
        traffic: Traffic | None = None,
    ) -> None:
        self._call = call
        self._traffic = traffic or Traffic()
        self._offer = offer
        self._sending, self._to_send = trio.open_memory_channel[tuple[Message, bytes | memoryview]](
            room
        )
        self._came, self._received = trio.open_memory_channel[tuple[Message, bytes]](room)

    async def send(self, message: Message, payload: bytes | memoryview = b"") -> None:
        """Leave a message to be sent."""
        await self._sending.send((message, payload))

    async def receive(self) -> tuple[Message, bytes]:
        """Wait for the next message."""
        return await self._received.receive()

    async def run(self, fail: Callable[[HopFailed], None]) -> None:
        """Send and receive until cancelled; `fail` is told if the neighbour can't go on."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, fail)
            nursery.start_soon(self._receive, fail)

    async def _send(self, fail: Callable[[HopFailed], None]) -> None:
        try:
            async for message, payload in self._to_send:
                await self._call.send(message, payload)
                self._traffic.sent_bytes += memoryview(payload).nbytes
        except NatswarmError as error:
            await trio.sleep(REASON_GRACE_S)
            fail(HopFailed(self._offer, str(error)))

    async def _receive(self, fail: Callable[[HopFailed], None]) -> None:
        try:
            while True:
                message, payload = await self._call.receive()
                self._traffic.received_bytes += len(payload)
                if isinstance(message, SessionFailed):
                    fail(HopFailed.of_message(message))
                    return
                await self._came.send((message, payload))
        except trio.EndOfChannel:
            fail(HopFailed(self._offer, "has left"))
        except NatswarmError as error:
            fail(HopFailed(self._offer, str(error)))


class Guard:
    """Runs work until it ends, or somebody says that it can't go on."""

    def __init__(self) -> None:
        self._scope = trio.CancelScope()
        self._failure: HopFailed | None = None

    def fail(self, failure: HopFailed) -> None:
        """End the work; what is said first counts."""
        self._failure = self._failure or failure
        self._scope.cancel()

    async def run(
        self,
        work: Callable[[], Awaitable[None]],
        *beside: Callable[[Callable[[HopFailed], None]], Awaitable[None]],
    ) -> None:
        """Run work; call once.

        Args:
            work: What ends by itself.
            beside: What runs meanwhile, and is given `fail`.

        Raises:
            HopFailed: What `fail` was told.
        """
        with self._scope:
            async with open_quiet_nursery() as nursery:
                for task in beside:
                    nursery.start_soon(task, self.fail)
                await work()
        if self._scope.cancelled_caught and self._failure is not None:
            raise self._failure
