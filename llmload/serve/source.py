"""Where answers come from: the model in this process, or the peers that serve it.

This file does not know HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal, Protocol

from llmload.engine.sampler import SamplingParameters
from llmload.model_folder import Model
from llmload.swarm.client import Generation, SwarmClient
from llmload.swarm.codec import Codec
from llmload.swarm.draft import DraftModel
from llmload.swarm.route import format_blocks, parse_offer
from llmload.swarm.route_view import route_as_json
from natswarm import Node, Peer, peer_as_json

__all__ = ["Answer", "Source", "SwarmSource"]


class Token(Protocol):
    """A token of an answer."""

    @property
    def text(self) -> str:
        """What is certain with it; may be empty."""


class Statistics(Protocol):
    """How an answer went, so far."""

    @property
    def prompt_count(self) -> int:
        """Tokens of the prompt."""

    @property
    def token_count(self) -> int:
        """Tokens that came, that which ends the text included."""

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 before there are two."""


class Answer(Protocol):
    """An answer under way; see `swarm.client.Generation`."""

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """Why it ended; None as long as it has not."""

    def finish(self) -> str:
        """Return what was held back, once no more tokens come."""

    def statistics(self) -> Statistics:
        """How it went so far."""

    def __aiter__(self) -> Answer:
        """Return itself."""

    async def __anext__(self) -> Token:
        """Return the next token."""


class Source(Protocol):
    """Generates answers of one model."""

    @property
    def model(self) -> Model:
        """Which."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingParameters,
        max_new_tokens: int | None,
        stop: Sequence[str],
    ) -> AbstractAsyncContextManager[Answer]:
        """Begin an answer; leaving the block ends it. See `SwarmClient.generate`."""

    def view(self) -> dict[str, Any]:
        """Return where the latest answer came from.

        Keys: route (`route_as_json`; empty for this device), peers, news (the latest of the mesh).
        """


class SwarmSource:
    """Asks the peers that serve the model.

    Args:
        node: Ours; it must have no other `SwarmClient`.
        model: Which.
        codec: The least exact form in which hidden states may travel.
        draft: Guesses tokens, to save trips; see `SwarmClient`.
    """

    def __init__(
        self, node: Node, model: Model, *, codec: Codec, draft: DraftModel | None = None
    ) -> None:
        self.model = model
        self._node = node
        self._client = SwarmClient(node, model, draft=draft)
        self._codec: Codec = codec
        self._latest: Generation | None = None
        self._news = ""

    @asynccontextmanager
    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingParameters,
        max_new_tokens: int | None,
        stop: Sequence[str],
    ) -> AsyncIterator[Answer]:
        """Begin an answer; see `SwarmClient.generate`."""
        async with self._client.generate(
            prompt_ids,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop=stop,
            codec=self._codec,
            tell=self._tell,
        ) as generation:
            self._latest = generation
            yield generation

    def view(self) -> dict[str, Any]:
        """Return the route of the latest answer, and all peers with the blocks they serve."""
        route = () if self._latest is None else self._latest.route
        return {
            "route": route_as_json(self._node, route),
            "peers": [self._peer_as_json(peer) for peer in self._node.peers()],
            "news": self._news,
        }

    def _tell(self, news: str) -> None:
        self._news = news

    def _peer_as_json(self, peer: Peer) -> dict[str, Any]:
        facts = peer_as_json(peer)
        offers = [
            offer
            for service in facts["services"]
            if (offer := parse_offer(service, peer.peer_id, self.model.content_hash)) is not None
        ]
        shown = ("peer_id", "name", "network", "nat", "reachable", "rtt_ms")
        return {
            **{name: facts[name] for name in shown},
            "blocks": ", ".join(format_blocks(offer.blocks) for offer in offers),
        }
