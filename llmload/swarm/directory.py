"""What a client knows of the stages of a model: who they are, how quick, and whom to leave alone.

Names come from the records of peers, and where the node takes part in routing from what is
published under the model's service. Speeds are asked for (`StageDescription`), and only of peers
that we are connected to; asking another may take a puncture of seconds, so that is done in the
background (`warm_up`), and a route to go on with is known before it is needed.

A stage that failed comes last for a while, longer each time; one that was merely slow is made to
look slower. What one peer says of another counts as much as what we saw ourselves: a liar among the
stages can make us prefer others, and no more than that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from llmload.swarm.protocol import DESCRIBE, DescribeStage, StageDescription
from llmload.swarm.route import (
    RouteCosts,
    StageOffer,
    choose_route,
    model_service,
    parse_offer,
    stage_offers,
)
from natswarm import NatswarmError, Node, Peer, PeerId, Record, service_key

__all__ = ["StageDirectory"]

# For so long after a failure a peer is taken only if nobody else is there; each further one in a
# row doubles it.
AVOID_S = 5.0
AVOID_S_MAX = 300.0
AVOID_COST_S = 30.0
# A peer that gave wrong numbers is not taken at all: it will not be right by itself.
DISTRUST_S = 3600.0
# What a stalled step makes each of its peers look slower by; halved by each answer.
DOUBT_S = 0.5
# Stages that have no room for a session may have some the next time; others come first.
FULL_S = 1.0
DESCRIBE_TIMEOUT_S = 3.0
# Round trip of a link that nobody has told of: it may have to be punctured first, so that one is
# preferred which is there, even to a distant peer.
UNKNOWN_RTT_S = 0.5
# Peers whose speed is asked for; each may cost a puncture.
DESCRIBED_MAX = 16


@dataclass(slots=True)
class _Known:
    """What is known of one peer."""

    description: StageDescription | None = None
    strikes: int = 0
    avoid_until: float = -math.inf
    distrust_until: float = -math.inf
    doubt_s: float = 0.0


class StageDirectory:
    """Finds routes through one model.

    Args:
        node: Whom to ask.
        model_hash: `Model.content_hash`.
        layer_count: Blocks of the model.

    Attributes:
        offers: Who serves what, as of the latest `refresh`.
    """

    def __init__(self, node: Node, model_hash: str, layer_count: int) -> None:
        self.offers: tuple[StageOffer, ...] = ()
        self._node = node
        self._model_hash = model_hash
        self._layer_count = layer_count
        self._known: dict[PeerId, _Known] = {}

    async def refresh(self) -> None:
        """Ask who serves the model now, and those we are connected to how they are."""
        offers = set(
            stage_offers(
                await self._node.find_peers(),
                model_hash=self._model_hash,
                layer_count=self._layer_count,
            )
        )
        for record in await self._published():
            offer = parse_offer(
                record.value.decode("ascii", "replace"), record.publisher, self._model_hash
            )
            if offer is not None and offer.last < self._layer_count:
                offers.add(offer)
        self.offers = tuple(
            sorted(offer for offer in offers if offer.peer_id != self._node.peer_id)
        )
        now, serving = trio.current_time(), {offer.peer_id for offer in self.offers}
        self._known = {
            peer_id: known
            for peer_id, known in self._known.items()
            if peer_id in serving or max(known.avoid_until, known.distrust_until) > now
        }
        async with trio.open_nursery() as nursery:
            for peer in self._node.peers():
                if peer.peer_id in serving and peer.is_reachable:
                    nursery.start_soon(self._describe, peer)

    def speeds(self) -> list[tuple[range, float]]:
        """Return for each stage its blocks, and the seconds of one position in one block."""
        costs = self._costs(frozenset())
        return [(offer.blocks, costs.compute_s(offer.peer_id)) for offer in self.offers]

    async def warm_up(self) -> None:
        """Connect to stages that we may need, nearest to being needed first, and ask them."""
        wanted = sorted({offer.peer_id for offer in self.offers} - self._unusable())
        async with trio.open_nursery() as nursery:
            for peer_id in wanted[:DESCRIBED_MAX]:
                nursery.start_soon(self._connect_and_describe, peer_id)

    def route(
        self, *, without: Collection[PeerId] = (), beside: Iterable[StageOffer] = ()
    ) -> tuple[StageOffer, ...]:
        """Return the quickest route as far as we know.

        Args:
            without: Peers that are not to be on it.
            beside: Stages of a route that is slow just now: others are preferred.

        Raises:
            NoRoute: Some blocks are served by nobody else.
        """
        unusable = self._unusable().union(without)
        return choose_route(
            (offer for offer in self.offers if offer.peer_id not in unusable),
            layer_count=self._layer_count,
            costs=self._costs({offer.peer_id for offer in beside}),
        )

    def blame(self, peer_id: PeerId) -> float:
        """Take in that a stage failed; return until when it comes last."""
        known = self._of(peer_id)
        avoid_s = min(AVOID_S * 2**known.strikes, AVOID_S_MAX)
        known.strikes += 1
        known.avoid_until = max(known.avoid_until, trio.current_time() + avoid_s)
        return known.avoid_until

    def replica(self, offer: StageOffer, without: Collection[PeerId]) -> StageOffer | None:
        """Return the same blocks at another peer, the quickest; None if nobody else has them."""
        unusable = {*self._unusable(), *without, offer.peer_id}
        costs = self._costs(frozenset())
        others = [
            other.peer_id
            for other in self.offers
            if other.peer_id not in unusable and set(offer.blocks) <= set(other.blocks)
        ]
        if not others:
            return None
        quickest = min(others, key=lambda one: (costs.hop_s(costs.client, one), one))
        return StageOffer(offer.first, offer.last, quickest)

    def is_trusted(self, route: Iterable[StageOffer]) -> bool:
        """Whether none of these stages gave wrong numbers."""
        now = trio.current_time()
        return all(self._of(offer.peer_id).distrust_until <= now for offer in route)

    def distrust(self, offer: StageOffer) -> None:
        """Leave a stage alone that gave wrong numbers."""
        self._of(offer.peer_id).distrust_until = trio.current_time() + DISTRUST_S

    def doubt(self, route: Iterable[StageOffer]) -> None:
        """Prefer others to stages of which one was slow."""
        for offer in route:
            self._of(offer.peer_id).doubt_s += DOUBT_S

    def praise(self, route: Iterable[StageOffer]) -> None:
        """Take in that stages have answered as they should."""
        for offer in route:
            if (known := self._known.get(offer.peer_id)) is not None:
                known.strikes = 0
                known.doubt_s /= 2

    def step_s(self, route: Sequence[StageOffer]) -> float:
        """Return the seconds that a step of one token should take on a route."""
        costs = self._costs(frozenset())
        ends = [costs.client, *(offer.peer_id for offer in route), costs.client]
        way_s = sum(costs.hop_s(one, other) for one, other in itertools.pairwise(ends))
        return way_s + self.compute_s(route)

    def compute_s(self, route: Sequence[StageOffer]) -> float:
        """Return the seconds of such a step that are spent computing, and not on the way."""
        costs = self._costs(frozenset())
        return sum(len(offer.blocks) * costs.compute_s(offer.peer_id) for offer in route)

    async def _published(self) -> list[Record]:
        try:
            return await self._node.lookup(service_key(model_service(self._model_hash)))
        except NatswarmError:
            return []  # this node takes no part in routing, or nobody answers just now

    async def _connect_and_describe(self, peer_id: PeerId) -> None:
        with suppress(NatswarmError):
            await self._describe(await self._node.connect(peer_id))

    async def _describe(self, peer: Peer) -> None:
        # A stage that can't be asked is found out again when a route is opened through it.
        with suppress(NatswarmError, trio.BrokenResourceError):
            self._of(peer.peer_id).description = await peer.call(
                DESCRIBE, DescribeStage(), timeout_s=DESCRIBE_TIMEOUT_S
            )

    def _of(self, peer_id: PeerId) -> _Known:
        return self._known.setdefault(peer_id, _Known())

    def _unusable(self) -> set[PeerId]:
        now = trio.current_time()
        distrusted = {
            peer_id for peer_id, known in self._known.items() if known.distrust_until > now
        }
        # Where no path leads from us, one may from others; but most likely the peer is gone.
        return distrusted | {peer.peer_id for peer in self._node.peers() if not peer.is_reachable}

    def _costs(self, beside: Collection[PeerId]) -> RouteCosts:
        us = self._node.peer_id
        costs = RouteCosts(client=us, default_rtt_s=UNKNOWN_RTT_S)
        for peer in self._node.peers():
            if (rtt_s := peer.statistics().rtt_s) is not None:
                costs.rtt_s[us, peer.peer_id] = rtt_s
        for peer_id, known in self._known.items():
            costs.enter_s[peer_id] = known.doubt_s
            if known.avoid_until > trio.current_time():
                costs.enter_s[peer_id] += AVOID_COST_S
            if (described := known.description) is not None:
                costs.block_s[peer_id] = described.block_s
                costs.enter_s[peer_id] += described.waiting_s
                if not described.session_room or not described.position_room:
                    costs.enter_s[peer_id] += FULL_S
                for link in described.links:
                    costs.rtt_s.setdefault((peer_id, PeerId(link.peer)), link.rtt_s)
        for peer_id in beside:
            costs.enter_s[peer_id] = costs.enter_s.get(peer_id, 0.0) + DOUBT_S
        return costs
