"""Generate text with a model whose blocks are spread over peers.

    client = SwarmClient(node, model)
    async with client.generate("def main(") as answer:
        async for token in answer:
            print(token.text, end="")

The prompt goes through the stages in one step, then one token a step. Each step travels from stage
to stage, and the last one sends the token straight back; the client only waits. The tokens are the
same as those of `engine.generate_tokens` with the whole model on one device.

The client keeps every token of the sequence (`Generation.token_ids`), which is all that is needed
to go on elsewhere; today a failed stage ends the generation with `StageFailed`.

Nothing here is private: the first stage sees the prompt, every stage sees hidden states from which
most of a short prompt can be computed back, and the last one chooses the tokens.

This file does not know how a stage computes.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import msgspec
import numpy as np
import trio

from llmload.engine.sampler import SamplingParameters
from llmload.errors import PromptTooLong, StageFailed
from llmload.model_folder import Model
from llmload.swarm.beside import beside
from llmload.swarm.protocol import (
    BUDGET_S_MAX,
    SESSION_ID_BYTES,
    SESSION_PROTOCOL,
    TOKENS_PROTOCOL,
    OpenSession,
    SessionFailed,
    SessionOpened,
    Step,
    Token,
    TokensOf,
    WireSampling,
    pack_token_ids,
    printable_reason,
)
from llmload.swarm.route import StageOffer, choose_route, stage_offers
from natswarm import (
    MessageStream,
    NatswarmError,
    Node,
    Peer,
    PeerId,
    RequestRefused,
    Stream,
)

__all__ = [
    "GeneratedToken",
    "Generation",
    "GenerationStatistics",
    "SwarmClient",
    "SwarmTimeouts",
    "prompt_token_ids",
]

# The stream of tokens ends when any stage fails, and often before the stage that knows why has got
# its word through the chain.
REASON_GRACE_S = 2.0
# A stage answers each step with one token; more than that unasked is kept out by back-pressure.
EVENT_COUNT_MAX = 4
FIRST_MESSAGE_TIMEOUT_S = 15.0

GREEDY = SamplingParameters(temperature=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmTimeouts:
    """How long a client waits.

    Attributes:
        open_s: For all stages of a route to be connected and ready, at most 120.
        step_s: For one token. The first one includes computing the prompt in every stage.
    """

    open_s: float = 60.0
    step_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.open_s <= BUDGET_S_MAX or not 0 < self.step_s < math.inf:
            raise ValueError(f"timeouts are positive, and open_s is at most {BUDGET_S_MAX:g}")


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of an answer.

    Attributes:
        token_id: Which.
        position: Where it stands in the sequence; the prompt begins at 0.
        text: The text that is complete with it; "" while a character is still open.
    """

    token_id: int
    position: int
    text: str


@dataclass(frozen=True, slots=True)
class GenerationStatistics:
    """How a generation went, so far.

    Attributes:
        prompt_count: Tokens of the prompt.
        token_count: Tokens that came, that which ends the text included.
        open_s: Until all stages were ready.
        first_token_s: From sending the prompt to the first token; 0 before it.
        decode_s: All tokens after the first, together.
        stage_s: Mean seconds that each stage held a step after the first, waiting included.
        network_s: Mean seconds such a step was under way between the devices.
    """

    prompt_count: int
    token_count: int
    open_s: float
    first_token_s: float
    decode_s: float
    stage_s: tuple[float, ...]
    network_s: float

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 before there are two."""
        return (self.token_count - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _TokensLost:
    """The stream of tokens ended; the chain of stages may know why."""

    reason: str


_Event = Token | SessionFailed | _TokensLost


@dataclass(slots=True, eq=False)
class _Inbox:
    """What comes in for one session, from the last stage and up the chain."""

    last_stage: PeerId
    events_in: trio.MemorySendChannel[_Event]
    # Ends the task of the token stream with the generation, even if the stage would not close it.
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    is_taken: bool = False


class SwarmClient:
    """Generates on peers, from one node.

    A node has one client: a second one would take over the tokens of the first. It may run any
    number of generations at once.

    Args:
        node: Where stages are found and tokens arrive.
        model: Which model; its configuration, tokenizer and hash are used, not its weights.
        timeouts: How long to wait.
    """

    def __init__(self, node: Node, model: Model, *, timeouts: SwarmTimeouts | None = None) -> None:
        self._node = node
        self._model = model
        self._timeouts = timeouts or SwarmTimeouts()
        self._inboxes: dict[bytes, _Inbox] = {}
        node.serve(TOKENS_PROTOCOL, self._receive_tokens)

    async def find_route(self) -> tuple[StageOffer, ...]:
        """Ask the neighbours who serves the model and return the shortest route through it.

        Raises:
            NoRoute: Some blocks are served by nobody we know of.
        """
        records = await self._node.find_peers()
        layer_count = self._model.config.n_layer
        offers = stage_offers(records, model_hash=self._model.content_hash, layer_count=layer_count)
        return choose_route(
            (offer for offer in offers if offer.peer_id != self._node.peer_id),
            layer_count=layer_count,
        )

    @asynccontextmanager
    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingParameters = GREEDY,
        max_new_tokens: int | None = None,
        route: Sequence[StageOffer] | None = None,
    ) -> AsyncIterator[Generation]:
        """Open a session through all stages; iterate over what it gives.

        Leaving the block, by an error or cancellation too, closes the session: the stages free
        their memory as the news travels down the chain.

        Args:
            prompt: Text, or token ids. An empty one starts from `bos_token_id`.
            sampling: How the last stage chooses; greedy if nothing is said.
            max_new_tokens: Bound on the answer; None for as much as the context holds.
            route: The stages to use, in order; None to find them.

        Raises:
            PromptTooLong: Nothing was sent to anybody.
            NoRoute: There is no way through the model.
            StageFailed: A stage could not be reached or refused; while iterating, one failed.
            ValueError: The prompt is empty or has ids that the model does not know.
        """
        token_ids = prompt_token_ids(self._model, prompt)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
        room = self._model.config.n_ctx - len(token_ids)
        token_count_max = room if max_new_tokens is None else min(room, max_new_tokens)
        stages = await self.find_route() if route is None else tuple(route)
        if not stages:
            raise ValueError("the route is empty")

        started_at = trio.current_time()
        session = secrets.token_bytes(SESSION_ID_BYTES)
        events_in, events = trio.open_memory_channel[_Event](EVENT_COUNT_MAX)
        inbox = _Inbox(stages[-1].peer_id, events_in)
        request = OpenSession(
            session=session,
            model_hash=self._model.content_hash,
            route=tuple(offer.hop for offer in stages),
            client=self._node.peer_id.key,
            position_count=len(token_ids) + token_count_max,
            sampling=WireSampling(
                sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed
            ),
            budget_s=self._timeouts.open_s,
        )
        self._inboxes[session] = inbox
        try:
            async with (
                await self._open(request, stages) as chain,
                beside(_watch_chain, chain, stages[0], events_in),
            ):
                yield Generation(
                    self._model,
                    stages,
                    chain,
                    events,
                    token_ids,
                    token_count_max=token_count_max,
                    step_timeout_s=self._timeouts.step_s,
                    open_s=trio.current_time() - started_at,
                )
        finally:
            del self._inboxes[session]
            inbox.scope.cancel()
            events.close()

    async def _open(self, request: OpenSession, stages: Sequence[StageOffer]) -> MessageStream:
        """Connect the first stage and let it open the rest of the chain.

        Raises:
            StageFailed: A stage could not be reached, or refused.
        """
        first, open_s = stages[0], self._timeouts.open_s
        try:
            with trio.fail_after(open_s):
                deadline = trio.current_effective_deadline()
                peer = await self._node.connect(first.peer_id)
                stream = await peer.open_stream(SESSION_PROTOCOL)
                async with AsyncExitStack() as stack:
                    chain = await stack.enter_async_context(MessageStream(stream))
                    left_s = max(deadline - trio.current_time(), 1e-3)
                    await chain.call(
                        msgspec.structs.replace(request, budget_s=left_s), SessionOpened
                    )
                    stack.pop_all()  # it stays open
                return chain
        except trio.TooSlowError:
            raise StageFailed(f"{first} did not open a session in {open_s:g} s") from None
        except RequestRefused as refusal:
            raise StageFailed(f"a stage refused: {printable_reason(str(refusal))}") from refusal
        except (NatswarmError, trio.BrokenResourceError) as error:
            raise StageFailed(f"can't reach {first}: {error}") from error

    async def _receive_tokens(self, stream: Stream, peer: Peer) -> None:
        """Take the stream that a last stage has opened; ends with the generation."""
        async with MessageStream(stream, payload_bytes_max=0) as tokens:
            try:
                with trio.fail_after(FIRST_MESSAGE_TIMEOUT_S):
                    header, _ = await tokens.receive(TokensOf)
            except (trio.TooSlowError, trio.EndOfChannel):
                return
            inbox = self._inboxes.get(header.session)
            # Session ids are not guessed, but other stages of the route know them.
            if inbox is None or inbox.is_taken or inbox.last_stage != peer.peer_id:
                return
            inbox.is_taken = True
            with inbox.scope:
                try:
                    while True:
                        event, _ = await tokens.receive(Token, SessionFailed)
                        await inbox.events_in.send(cast("Token | SessionFailed", event))
                except trio.EndOfChannel:
                    reason = "closed the stream of tokens"
                except trio.BrokenResourceError as error:
                    reason = f"the stream of tokens was lost ({error})"
                except NatswarmError as error:
                    reason = f"sent something else than a token: {error}"
                await inbox.events_in.send(_TokensLost(reason))


def prompt_token_ids(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """Return the tokens to begin with: those of the prompt, or `bos_token_id` for an empty one.

    Raises:
        PromptTooLong: They leave no room for an answer.
        ValueError: There are none, or some that the model does not have.
    """
    config = model.config
    token_ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not token_ids and config.bos_token_id is not None:
        token_ids = [config.bos_token_id]
    if not token_ids:
        raise ValueError("the prompt is empty, and this model has no token to begin with")
    if len(token_ids) >= config.n_ctx:
        raise PromptTooLong(prompt_count=len(token_ids), n_ctx=config.n_ctx)
    if not 0 <= min(token_ids) <= max(token_ids) < config.vocab_size:
        raise ValueError(f"token ids are in 0..{config.vocab_size - 1}")
    return token_ids


class Generation:
    """An answer under way: an asynchronous iterator over its tokens.

    It ends after the tokens asked for, at the end of the context, or when the model ends the
    document; its `eos_token_id` is not given out. A character whose last byte never comes is left
    out. One task at a time may iterate.

    Each step raises `StageFailed` if a stage failed, was lost, or took too long; nothing comes
    after that. A cancelled step can't be repeated: leave the block of `generate`.
    """

    def __init__(
        self,
        model: Model,
        route: tuple[StageOffer, ...],
        chain: MessageStream,
        events: trio.MemoryReceiveChannel[_Event],
        prompt_ids: Sequence[int],
        *,
        token_count_max: int,
        step_timeout_s: float,
        open_s: float,
    ) -> None:
        self.route = route
        self.prompt_ids = tuple(prompt_ids)
        self._model = model
        self._chain = chain
        self._events = events
        self._token_count_max = token_count_max
        self._step_timeout_s = step_timeout_s
        self._answer_ids: list[int] = []
        self._text = model.tokenizer.stream()
        self._is_over = False
        self._step = 0
        # Rows that the stages have not seen yet: the prompt, then the newest token.
        self._new_ids: list[int] = list(prompt_ids)
        self._position = 0  # of the first of them
        self._open_s = open_s
        self._first_token_s = 0.0
        self._decode_s = 0.0
        self._stage_s = [0.0] * len(route)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The whole sequence, prompt and answer: what another route would need to go on."""
        return (*self.prompt_ids, *self._answer_ids)

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._model.tokenizer.decode(self._answer_ids)

    def statistics(self) -> GenerationStatistics:
        """How it went so far."""
        decoded_count = self._step - 1
        stage_s = (
            tuple(total / decoded_count for total in self._stage_s) if decoded_count > 0 else ()
        )
        network_s = self._decode_s / decoded_count - sum(stage_s) if stage_s else 0.0
        return GenerationStatistics(
            prompt_count=len(self.prompt_ids),
            token_count=self._step,
            open_s=self._open_s,
            first_token_s=self._first_token_s,
            decode_s=self._decode_s,
            stage_s=stage_s,
            network_s=network_s,
        )

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> GeneratedToken:
        if self._is_over or len(self._answer_ids) >= self._token_count_max:
            raise StopAsyncIteration
        # Over, unless the step succeeds: also when it is cancelled, and half of it may be sent.
        self._is_over = True
        sent_at = trio.current_time()
        try:
            with trio.fail_after(self._step_timeout_s):
                token = await self._exchange()
        except trio.TooSlowError:
            names = " -> ".join(map(str, self.route))
            raise StageFailed(
                f"no token came in {self._step_timeout_s:g} s from {names}; try again, or with "
                f"other stages"
            ) from None
        self._count(token, trio.current_time() - sent_at)
        if token.token_id == self._model.config.eos_token_id:
            raise StopAsyncIteration
        self._is_over = False
        self._answer_ids.append(token.token_id)
        self._new_ids, self._position = [token.token_id], token.position
        return GeneratedToken(token.token_id, token.position, self._text.push(token.token_id))

    async def _exchange(self) -> Token:
        """Send the new rows into the first stage and return the token that the last one answers.

        Raises:
            StageFailed: Some stage failed, or answered what it can't have computed.
        """
        step = Step(
            step=self._step,
            position=self._position,
            row_count=len(self._new_ids),
            codec="int32",
        )
        try:
            await self._chain.send(step, pack_token_ids(np.array(self._new_ids)))
        except trio.BrokenResourceError as error:
            reason = f"the connection was lost ({error})"
            raise await self._failure(SessionFailed(self.route[0].hop, reason)) from error
        event = await self._events.receive()
        if isinstance(event, _TokensLost):
            event = SessionFailed(self.route[-1].hop, event.reason)
            raise await self._failure(event)
        if isinstance(event, SessionFailed):
            raise _stage_failed(event)
        self._check(event)
        return event

    def _check(self, token: Token) -> None:
        due = (self._step, self._position + len(self._new_ids))
        if (token.step, token.position) != due:
            problem = f"answered step {token.step}, position {token.position} instead of {due}"
        elif token.token_id >= self._model.config.vocab_size:
            problem = f"chose token {token.token_id}, which the model does not have"
        elif len(token.stage_s) != len(self.route):
            problem = f"reports {len(token.stage_s)} stages instead of {len(self.route)}"
        else:
            return
        raise StageFailed(f"{self.route[-1]}: {problem}")

    async def _failure(self, known: SessionFailed) -> StageFailed:
        """Return the error for a stream that was lost; the chain may know more in a moment."""
        with trio.move_on_after(REASON_GRACE_S):
            while True:
                event = await self._events.receive()
                if isinstance(event, SessionFailed):
                    return _stage_failed(event)
        return _stage_failed(known)

    def _count(self, token: Token, elapsed_s: float) -> None:
        if self._step == 0:
            self._first_token_s = elapsed_s
        else:
            self._decode_s += elapsed_s
            self._stage_s = [
                total + seconds for total, seconds in zip(self._stage_s, token.stage_s, strict=True)
            ]
        self._step += 1


def _stage_failed(failure: SessionFailed) -> StageFailed:
    return StageFailed(f"{StageOffer.of_hop(failure.hop)}: {printable_reason(failure.reason)}")


async def _watch_chain(
    chain: MessageStream, first: StageOffer, events_in: trio.MemorySendChannel[_Event]
) -> None:
    """Pass on why the chain of stages has failed; it carries nothing else upwards."""
    try:
        failure, _ = await chain.receive(SessionFailed)
    except trio.EndOfChannel:
        failure = SessionFailed(first.hop, "closed the session without a reason")
    except trio.BrokenResourceError as error:
        failure = SessionFailed(first.hop, f"the connection was lost ({error})")
    except NatswarmError as error:
        failure = SessionFailed(first.hop, f"sent something that was damaged: {error}")
    await events_in.send(failure)
