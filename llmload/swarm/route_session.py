"""One sequence open at all stages of one route, as the client sees it.

    desk = TokenDesk(node)
    session = await desk.open(nursery, route, sequence, open_s=10)
    drawn = await session.advance(token_ids, guesses)

A session knows which positions its stages hold, and sends what is missing: all of the sequence to a
new one, in parts that the stages work on at the same time, each on another; then what is new. What
it holds beyond the sequence is forgotten by the next step.

This file does not know what to do when a session fails, nor which route is best.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import cast

import msgspec
import numpy as np
import trio

from llmload.engine.sampler import SamplingParameters
from llmload.swarm.codec import Codec
from llmload.swarm.protocol import (
    SESSION_ID_BYTES,
    SESSION_PROTOCOL,
    TOKENS_PROTOCOL,
    OpenSession,
    SessionFailed,
    Step,
    Tokens,
    TokensOf,
    WireSampling,
    checksum,
    pack_token_ids,
)
from llmload.swarm.route import HopFailed, StageOffer
from llmload.swarm.speculate import shared_count
from llmload.swarm.stage import receive_opened
from natswarm import MessageStream, NatswarmError, Node, Peer, Stream

__all__ = ["Drawn", "RouteSession", "SequenceTerms", "TokenDesk"]

# The stream of tokens ends when any stage fails, and often before the stage that knows why has got
# its word through the chain.
REASON_GRACE_S = 0.25
FIRST_MESSAGE_TIMEOUT_S = 15.0
# Closing tells the stages that they may forget; they also find out by themselves.
CLOSE_S = 1.0

# Each part of a prompt is one step; several are under way, each at another stage. Shorter parts
# fill the pipeline sooner, longer ones compute with less overhead.
PART_ROWS = 64
# Answers that wait for the client: of all parts of a prompt, and one more for the reason of an end.
PARTS_MAX = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTerms:
    """What is the same wherever a sequence is computed.

    Attributes:
        model_hash: `Model.content_hash`.
        vocab_size: Tokens that the model has.
        position_count: Room wanted, prompt and answer together.
        sampling: How the last stage chooses.
        codec: The least exact form in which hidden states may travel.
        receipt_seed: Which values of a step are noted.
    """

    model_hash: str
    vocab_size: int
    position_count: int
    sampling: SamplingParameters
    codec: Codec = "float32"
    receipt_seed: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a trip over the mesh has brought.

    Attributes:
        token_ids: The token after the sequence, then those after each guess.
        position: Of the last row sent, to which the receipts belong.
        stage_s: Seconds that each stage held the last step.
        receipts: What each stage gave; see `receipt.py`.
    """

    token_ids: tuple[int, ...]
    position: int
    stage_s: tuple[float, ...]
    receipts: tuple[bytes, ...]


@dataclass(slots=True, eq=False)
class _Inbox:
    """What comes in for one session, from the last stage and up the chain."""

    route: tuple[StageOffer, ...]
    events_in: trio.MemorySendChannel[Tokens | HopFailed]
    # End the two tasks of the session, even if the stages would not close their streams.
    chain_scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    tokens_scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    is_taken: bool = False


class TokenDesk:
    """Opens sessions from one node, and takes in their tokens.

    A node has one desk: a second one would take over the tokens of the first.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._inboxes: dict[bytes, _Inbox] = {}
        node.serve(TOKENS_PROTOCOL, self._receive_tokens)

    @property
    def open_count(self) -> int:
        """Sessions that are open or being opened."""
        return len(self._inboxes)

    async def open(
        self,
        nursery: trio.Nursery,
        route: Sequence[StageOffer],
        terms: SequenceTerms,
        *,
        open_s: float,
    ) -> RouteSession:
        """Open a sequence at all stages of a route; `nursery` runs it until `RouteSession.aclose`.

        Raises:
            HopFailed: A stage could not be reached, or refused.
        """
        sampling = terms.sampling
        request = OpenSession(
            session=secrets.token_bytes(SESSION_ID_BYTES),
            model_hash=terms.model_hash,
            route=tuple(offer.hop for offer in route),
            client=self._node.peer_id.key,
            position_count=terms.position_count,
            sampling=WireSampling(
                sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed
            ),
            budget_s=open_s,
            codec=terms.codec,
            receipt_seed=terms.receipt_seed,
        )
        events_in, events = trio.open_memory_channel[Tokens | HopFailed](PARTS_MAX + 1)
        inbox = _Inbox(tuple(route), events_in)
        self._inboxes[request.session] = inbox
        try:
            chain = await self._open_chain(request, route, open_s)
        except BaseException:
            self._forget(request.session)
            raise
        nursery.start_soon(_watch_chain, chain, inbox)

        def close() -> None:
            self._forget(request.session)

        return RouteSession(inbox.route, terms, chain, events, close)

    def _forget(self, session: bytes) -> None:
        if (inbox := self._inboxes.pop(session, None)) is not None:
            inbox.chain_scope.cancel()
            inbox.tokens_scope.cancel()

    async def _open_chain(
        self, request: OpenSession, route: Sequence[StageOffer], open_s: float
    ) -> MessageStream:
        """Connect the first stage and let it open the rest of the chain."""
        first = route[0]
        try:
            with trio.fail_after(open_s):
                deadline = trio.current_effective_deadline()
                peer = await self._node.connect(first.peer_id)
                stream = await peer.open_stream(SESSION_PROTOCOL)
                async with AsyncExitStack() as stack:
                    chain = await stack.enter_async_context(MessageStream(stream))
                    left_s = max(deadline - trio.current_time(), 1e-3)
                    await chain.send(msgspec.structs.replace(request, budget_s=left_s))
                    await receive_opened(chain, first)
                    stack.pop_all()  # it stays open
                return chain
        except HopFailed as failure:
            if failure.offer in route:
                raise
            raise HopFailed(first, f"blames {failure}, which has no part in this") from None
        except trio.TooSlowError:
            raise HopFailed(first, f"did not open a session in {open_s:g} s") from None
        except (NatswarmError, trio.BrokenResourceError) as error:
            raise HopFailed(first, f"can't be reached: {error}") from error

    async def _receive_tokens(self, stream: Stream, peer: Peer) -> None:
        """Take the stream that a last stage has opened; ends with the session."""
        async with MessageStream(stream, payload_bytes_max=0) as tokens:
            try:
                with trio.fail_after(FIRST_MESSAGE_TIMEOUT_S):
                    header, _ = await tokens.receive(TokensOf)
            except (trio.TooSlowError, trio.EndOfChannel):
                return
            inbox = self._inboxes.get(header.session)
            # Session ids are not guessed, but other stages of the route know them.
            if inbox is None or inbox.is_taken or inbox.route[-1].peer_id != peer.peer_id:
                return
            inbox.is_taken = True
            with inbox.tokens_scope:
                await inbox.events_in.send(await self._take_tokens(tokens, inbox))

    async def _take_tokens(self, tokens: MessageStream, inbox: _Inbox) -> HopFailed:
        """Pass on tokens until there are no more; return why."""
        last = inbox.route[-1]
        try:
            while True:
                event, _ = await tokens.receive(Tokens, SessionFailed)
                if isinstance(event, SessionFailed):
                    return _as_seen(event, inbox.route, last)
                await inbox.events_in.send(cast("Tokens", event))
        except trio.EndOfChannel:
            reason = "closed the stream of tokens"
        except trio.BrokenResourceError as error:
            reason = f"the stream of tokens was lost ({error})"
        except NatswarmError as error:
            return HopFailed(last, f"sent something else than tokens: {error}")
        # The chain may know which stage began it.
        await trio.sleep(REASON_GRACE_S)
        return HopFailed(last, reason)


class RouteSession:
    """A sequence at all stages of a route; made by `TokenDesk.open`.

    Attributes:
        route: The stages, in order.
    """

    def __init__(
        self,
        route: tuple[StageOffer, ...],
        terms: SequenceTerms,
        chain: MessageStream,
        events: trio.MemoryReceiveChannel[Tokens | HopFailed],
        forget: Callable[[], None],
    ) -> None:
        self.route = route
        self._terms = terms
        self._chain = chain
        self._events = events
        self._forget = forget
        self._sent_count = self._next_step = 0
        self._held_ids: list[int] = []  # what the stages hold, wrong guesses included

    def missing_count(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens the stages would have to compute, at least 1."""
        return len(token_ids) - shared_count(token_ids, self._held_ids)

    async def advance(
        self, token_ids: Sequence[int], guesses: Sequence[int] = (), *, timeout_s: float = math.inf
    ) -> Drawn:
        """Bring the stages to the end of a sequence, and have the next tokens drawn.

        After an error or cancellation the session is good for `aclose` alone.

        Args:
            token_ids: The whole sequence so far.
            guesses: What may come next; a token is drawn after each as well.
            timeout_s: For all of it.

        Raises:
            HopFailed: A stage failed, was lost, or answered what it can't have computed.
        """
        start = shared_count(token_ids, self._held_ids)
        rows = [*token_ids[start:], *guesses]
        self._held_ids[start:] = rows
        part_rows = max(PART_ROWS, math.ceil(len(rows) / PARTS_MAX))
        # Short at the front, so that all rows to draw after are in the last part.
        ends = list(range(len(rows), 0, -part_rows))[::-1]
        try:
            with trio.fail_after(timeout_s):
                begin = 0
                for end in ends:
                    draw_count = len(guesses) + 1 if end == len(rows) else 0
                    await self._send(start + begin, rows[begin:end], draw_count)
                    begin = end
                for end in ends:
                    draw_count = len(guesses) + 1 if end == len(rows) else 0
                    answer = await self._receive(self._next_step, draw_count)
                    self._next_step += 1
        except trio.TooSlowError:
            names = " -> ".join(map(str, self.route))
            raise HopFailed(
                self.route[0], f"no token came in {timeout_s:g} s by way of {names}"
            ) from None
        return Drawn(answer.token_ids, start + len(rows) - 1, answer.stage_s, answer.receipts)

    async def aclose(self) -> None:
        """Close the session; the stages free their memory as the news travels down the chain."""
        self._forget()
        self._events.close()
        with trio.move_on_after(CLOSE_S):
            await self._chain.aclose()

    async def _send(self, position: int, token_ids: Sequence[int], draw_count: int) -> None:
        payload = pack_token_ids(np.array(token_ids))
        step = Step(
            step=self._sent_count,
            position=position,
            row_count=len(token_ids),
            draw_count=draw_count,
            codec="int32",
            checksum=checksum(payload),
        )
        self._sent_count += 1
        try:
            await self._chain.send(step, payload)
        except trio.BrokenResourceError as error:
            with trio.move_on_after(REASON_GRACE_S):
                while True:
                    event = await self._events.receive()
                    if isinstance(event, HopFailed):
                        raise event from None
            reason = f"the connection was lost ({error})"
            raise HopFailed(self.route[0], reason) from error

    async def _receive(self, step: int, draw_count: int) -> Tokens:
        event = await self._events.receive()
        if isinstance(event, HopFailed):
            raise event
        if event.step != step:
            problem = f"answered step {event.step} instead of {step}"
        elif len(event.token_ids) != draw_count:
            problem = f"drew {len(event.token_ids)} tokens instead of {draw_count}"
        elif event.token_ids and max(event.token_ids) >= self._terms.vocab_size:
            problem = f"chose token {max(event.token_ids)}, which the model does not have"
        elif not len(event.stage_s) == len(event.receipts) == len(self.route):
            problem = f"reports {len(event.stage_s)} stages instead of {len(self.route)}"
        else:
            return event
        raise HopFailed(self.route[-1], problem)


async def _watch_chain(chain: MessageStream, inbox: _Inbox) -> None:
    """Pass on why the chain of stages has failed; it carries nothing else upwards."""
    first = inbox.route[0]
    with inbox.chain_scope:
        try:
            message, _ = await chain.receive(SessionFailed)
        except trio.EndOfChannel:
            failure = HopFailed(first, "closed the session without a reason")
        except trio.BrokenResourceError as error:
            failure = HopFailed(first, f"the connection was lost ({error})")
        except NatswarmError as error:
            failure = HopFailed(first, f"sent something that was damaged: {error}")
        else:
            failure = _as_seen(message, inbox.route, first)
        await inbox.events_in.send(failure)


def _as_seen(failure: SessionFailed, route: Sequence[StageOffer], told_by: StageOffer) -> HopFailed:
    """Return what a stage tells of a failure; it can blame a stage of this route alone."""
    blamed = HopFailed.of_message(failure)
    if blamed.offer in route:
        return blamed
    return HopFailed(told_by, f"blames {blamed}, which has no part in this")
