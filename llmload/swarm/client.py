"""Generate text with a model whose blocks are spread over peers.

    client = SwarmClient(node, model)
    async with client.generate("def main(") as answer:
        async for token in answer:
            print(token.text, end="")

The prompt goes through the stages in parts that they work on side by side, then one step a token,
or one for several where the text lets the client guess well. Each step travels from stage to stage,
and the last one sends the tokens straight back. They are the same as those of
`engine.generate_tokens` with the whole model on one device, whichever stages fail on the way.

Nothing here is private: the first stage sees the prompt, every stage sees hidden states from which
most of a short prompt can be computed back, and the last one chooses the tokens.

This file does not know how a stage computes, nor how a failure is survived: `living_sequence.py`.
"""

from __future__ import annotations

import random
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import trio

from llmload.engine.sampler import SamplingParameters
from llmload.errors import PromptTooLong
from llmload.model_folder import Model
from llmload.swarm.beside import open_quiet_nursery
from llmload.swarm.codec import Codec
from llmload.swarm.directory import StageDirectory
from llmload.swarm.draft import Drafter, DraftModel
from llmload.swarm.living_sequence import LivingSequence, SwarmTimeouts
from llmload.swarm.route import StageOffer
from llmload.swarm.route_session import SequenceTerms, TokenDesk
from llmload.swarm.speculate import GuessCount, PromptLookup, accepted_count
from llmload.swarm.spot_check import SpotChecker
from llmload.tokenizer import TextStream
from natswarm import Node

__all__ = [
    "GeneratedToken",
    "Generation",
    "GenerationStatistics",
    "SwarmClient",
    "SwarmTimeouts",
    "prompt_token_ids",
]

GREEDY = SamplingParameters(temperature=0)
# Of all steps; each costs a prompt on other peers.
CHECK_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of an answer.

    Attributes:
        token_id: Which.
        position: Where it stands in the sequence; the prompt begins at 0.
        text: The text that is certain with it; "" while a character is still open, or what may
            be the beginning of a stop string.
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
        trip_count: Trips over the mesh that brought them.
        guess_count: Tokens guessed, to save trips.
        accepted_count: Guesses that were right.
        failover_count: How often another route took over.
        check_count: Steps that were repeated over other peers, and compared.
        open_s: Until all stages were ready.
        first_token_s: From sending the prompt to the first token; 0 before it.
        decode_s: All trips after the first, together.
        lost_s: Of that, what changes of route cost.
        stage_s: Mean seconds that each stage of the present route held a step, waiting included;
            without the first trip of a route.
        network_s: Mean seconds such a step was under way between the devices.
    """

    prompt_count: int
    token_count: int
    trip_count: int
    guess_count: int
    accepted_count: int
    failover_count: int
    check_count: int
    open_s: float
    first_token_s: float
    decode_s: float
    lost_s: float
    stage_s: tuple[float, ...]
    network_s: float

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 before there are two."""
        return (self.token_count - 1) / self.decode_s if self.decode_s > 0 else 0.0


class SwarmClient:
    """Generates on peers, from one node.

    A node has one client: a second one would take over the tokens of the first. It may run any
    number of generations at once.

    Args:
        node: Where stages are found and tokens arrive.
        model: Which model; its configuration, tokenizer and hash are used, not its weights.
        timeouts: How long to wait.
        draft: Guesses the next tokens, instead of what stood in the text before.
    """

    def __init__(
        self,
        node: Node,
        model: Model,
        *,
        timeouts: SwarmTimeouts | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        self._model = model
        self._draft = draft
        self._timeouts = timeouts or SwarmTimeouts()
        self._desk = TokenDesk(node)
        self._directory = StageDirectory(node, model.content_hash, model.config.n_layer)

    @property
    def session_count(self) -> int:
        """Sessions with stages that are open or being opened."""
        return self._desk.open_count

    async def find_route(self) -> tuple[StageOffer, ...]:
        """Ask who serves the model and return the quickest route through it.

        Raises:
            NoRoute: Some blocks are served by nobody we know of.
        """
        await self._directory.refresh()
        return self._directory.route()

    @asynccontextmanager
    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingParameters = GREEDY,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        route: Sequence[StageOffer] | None = None,
        codec: Codec = "float32",
        speculate: bool = True,
        check_share: float = CHECK_SHARE,
        tell: Callable[[str], None] = lambda _text: None,
    ) -> AsyncIterator[Generation]:
        """Open a session through all stages; iterate over what it gives.

        Leaving the block, by an error or cancellation too, closes the session: the stages free
        their memory as the news travels down the chain.

        Args:
            prompt: Text, or token ids. An empty one starts from `bos_token_id`.
            sampling: How the last stage chooses; greedy if nothing is said.
            max_new_tokens: Bound on the answer; None for as much as the context holds.
            stop: Strings before which the text ends, wherever they stand in the tokens.
            route: The stages to begin with, in order; None to find them.
            codec: The least exact form in which hidden states may travel over long links. Only
                float32 promises the tokens of a single device.
            speculate: Guess tokens, to save trips; the answer is the same.
            check_share: Of the steps that are repeated over other peers, to find stages that give
                wrong numbers; 0..1.
            tell: Told what is going on, in words for the user.

        Raises:
            PromptTooLong: Nothing was sent to anybody.
            NoRoute: There is no way through the model.
            StageFailed: A stage could not be reached or refused, and no other came for `replica_s`;
                the same while iterating.
            ValueError: The prompt is empty or has ids that the model does not know, or a stop
                string is empty.
        """
        text = self._model.tokenizer.stream(stop)
        token_ids = prompt_token_ids(self._model, prompt)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
        if route is not None and not route:
            raise ValueError("the route is empty")
        room = self._model.config.n_ctx - len(token_ids)
        token_count_max = room if max_new_tokens is None else min(room, max_new_tokens)
        terms = SequenceTerms(
            model_hash=self._model.content_hash,
            vocab_size=self._model.config.vocab_size,
            position_count=len(token_ids) + token_count_max,
            sampling=sampling,
            codec=codec,
            receipt_seed=secrets.randbits(63),
        )
        async with open_quiet_nursery() as nursery:
            started_at = trio.current_time()
            sequence = LivingSequence(
                nursery, self._desk, self._directory, terms, self._timeouts, tell
            )
            checker = SpotChecker(
                nursery,
                self._desk,
                self._directory,
                terms,
                share=check_share,
                tell=tell,
                rng=random.SystemRandom(),  # whoever can foretell it lies between two checks
            )
            drafter = None
            if speculate and self._draft is not None:
                drafter = Drafter(self._draft, sampling)
                nursery.start_soon(drafter.read, token_ids)
            try:
                await sequence.open(route)
                yield Generation(
                    self._model,
                    sequence,
                    checker,
                    token_ids,
                    text,
                    token_count_max=token_count_max,
                    lookup=PromptLookup(token_ids) if speculate and drafter is None else None,
                    drafter=drafter,
                    open_s=trio.current_time() - started_at,
                )
            finally:
                await sequence.aclose()


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

    It ends after the tokens asked for, at the end of the context, at a stop string, or when the
    model ends the document; its `eos_token_id` is not given out. The texts of the tokens, and what
    `finish` returns after the last of them, are the answer. One task at a time may iterate.

    A step raises `StageFailed` or `NoRoute` if the model could not be computed anywhere for too
    long; nothing comes after that. A cancelled step can't be repeated: leave the block of
    `generate`.

    Attributes:
        prompt_ids: Tokens of the prompt.
        text: The answer as far as it was given out.
    """

    def __init__(
        self,
        model: Model,
        sequence: LivingSequence,
        checker: SpotChecker,
        prompt_ids: Sequence[int],
        text: TextStream,
        *,
        token_count_max: int,
        lookup: PromptLookup | None,
        drafter: Drafter | None,
        open_s: float,
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.text = ""
        self._model = model
        self._sequence = sequence
        self._checker = checker
        self._token_count_max = token_count_max
        self._answer_ids: list[int] = []
        self._drawn: deque[int] = deque()  # drawn, and not given out yet
        self._stream = text
        self._is_over = self._is_ended = False
        self._lookup = lookup
        self._drafter = drafter
        self._guesses = GuessCount()
        self._token_count = 0
        self._trip_count = 0
        self._open_s = open_s
        self._first_token_s = 0.0
        self._decode_s = 0.0
        # Of the trips on the present route, but for its first.
        self._route = sequence.route
        self._route_trip_count = 0
        self._route_s = 0.0
        self._stage_s = [0.0] * len(self._route)

    @property
    def route(self) -> tuple[StageOffer, ...]:
        """The stages that give the answer at present."""
        return self._sequence.route

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The whole sequence, prompt and answer."""
        return (*self.prompt_ids, *self._answer_ids)

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """Why it ended: the text did, or the room for tokens; None as long as it has not."""
        if self._is_ended or self._stream.is_stopped:
            return "stop"
        return "length" if len(self._answer_ids) >= self._token_count_max else None

    def finish(self) -> str:
        """Return what was held back, once no more tokens come; U+FFFD for half a character."""
        rest = self._stream.finish()
        self.text += rest
        return rest

    def statistics(self) -> GenerationStatistics:
        """How it went so far."""
        trips = self._route_trip_count
        stage_s = tuple(total / trips for total in self._stage_s) if trips else ()
        return GenerationStatistics(
            prompt_count=len(self.prompt_ids),
            token_count=self._token_count,
            trip_count=self._trip_count,
            guess_count=self._guesses.guess_count,
            accepted_count=self._guesses.accepted_count,
            failover_count=self._sequence.failover_count,
            check_count=self._checker.check_count,
            open_s=self._open_s,
            first_token_s=self._first_token_s,
            decode_s=self._decode_s,
            lost_s=self._sequence.lost_s,
            stage_s=stage_s,
            network_s=self._route_s / trips - sum(stage_s) if trips else 0.0,
        )

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> GeneratedToken:
        if self._is_over or len(self._answer_ids) >= self._token_count_max:
            raise StopAsyncIteration
        if not self._drawn:
            # Over, unless the trip succeeds: also when it is cancelled, and half of it may be sent.
            self._is_over = True
            await self._travel()
            self._is_over = False
        token_id = self._drawn.popleft()
        self._token_count += 1
        if token_id == self._model.config.eos_token_id:
            self._is_over = self._is_ended = True
            raise StopAsyncIteration
        position = len(self.prompt_ids) + len(self._answer_ids)
        self._answer_ids.append(token_id)
        piece = self._stream.push(token_id)
        self.text += piece
        self._is_over = self._stream.is_stopped
        return GeneratedToken(token_id, position, piece)

    async def _travel(self) -> None:
        """Have the next tokens drawn: one, and as many more as were guessed right."""
        began_at = trio.current_time()
        guesses = await self._guess()
        sent_at = trio.current_time()
        drawn = await self._sequence.advance(self.token_ids, guesses)
        trip_s = trio.current_time() - sent_at
        elapsed_s = trio.current_time() - began_at
        self._checker.maybe_check(self.route, (*self.token_ids, *guesses), drawn)
        accepted = accepted_count(guesses, drawn.token_ids)
        new_ids = drawn.token_ids[: accepted + 1]
        self._drawn.extend(new_ids)
        if self._lookup is not None:
            self._lookup.extend(new_ids)
        self._trip_count += 1
        if self._trip_count == 1:
            self._first_token_s = elapsed_s
            return
        self._decode_s += elapsed_s
        if self._sequence.route != self._route:
            self._route = self._sequence.route
            self._route_trip_count, self._route_s = 0, 0.0
            self._stage_s = [0.0] * len(self._route)
            return
        self._route_trip_count += 1
        self._route_s += trip_s
        self._stage_s = [
            total + seconds for total, seconds in zip(self._stage_s, drawn.stage_s, strict=True)
        ]
        self._guesses.learn(
            guesses=len(guesses),
            accepted=accepted,
            elapsed_s=elapsed_s,
            compute_s=sum(drawn.stage_s),
        )

    async def _guess(self) -> list[int]:
        """Return what may come next, as much of it as pays."""
        room = self._token_count_max - len(self._answer_ids) - 1
        if self._lookup is not None:
            return self._lookup.guess(min(self._guesses.best(), room))
        if self._drafter is not None:
            return await self._drafter.guess(self.token_ids, min(self._guesses.best(), room))
        return []
