"""Who serves which blocks, and which peers together are a whole model.

A stage announces itself as a service of its node, `llmload/stage/<model>/<first>-<last>`, with the
first 16 digits of the model's content hash. A route is a list of stages in which each begins where
the one before ends; a stage may be used for a part of what it serves. The quickest is taken: the
sum of half a round trip for every hop and of what the blocks take to compute.

Pure: names, ranges and seconds. Knows neither how peers are found nor how times are measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from llmload.errors import LlmloadError, StageFailed
from llmload.swarm.protocol import Hop, SessionFailed, printable_reason
from natswarm import NodeRecord, PeerId

__all__ = [
    "HopFailed",
    "NoRoute",
    "RouteCosts",
    "StageOffer",
    "choose_route",
    "format_blocks",
    "missing_blocks",
    "model_service",
    "parse_blocks",
    "parse_offer",
    "stage_offers",
    "stage_service",
]

# 64 bits tell all models apart that ever meet by accident; the session compares the whole hash.
MODEL_PREFIX_CHARACTERS = 16

_SERVICE = re.compile(r"llmload/stage/([0-9a-f]{16})/(\d{1,7})-(\d{1,7})", re.ASCII)
_BLOCKS = re.compile(r"\s*(\d{1,7})(?:\s*-\s*(\d{1,7}))?\s*", re.ASCII)


class NoRoute(LlmloadError):
    """The peers we know of do not serve the whole model.

    Attributes:
        missing: Blocks that nobody serves.
    """

    def __init__(self, message: str, missing: Sequence[range]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


@dataclass(frozen=True, slots=True, order=True)
class StageOffer:
    """One peer's offer to serve some blocks of a model.

    Attributes:
        first: First block.
        last: Last block, inclusive.
        peer_id: Who offers.
    """

    first: int
    last: int
    peer_id: PeerId

    @property
    def blocks(self) -> range:
        """The blocks as a range."""
        return range(self.first, self.last + 1)

    @property
    def hop(self) -> Hop:
        """The offer as part of a route on the wire."""
        return Hop(self.peer_id.key, self.first, self.last)

    def __str__(self) -> str:
        # Not by `blocks`: a peer may have written a hop that ends before it begins.
        return f"{self.peer_id.short} (blocks {self.first}-{self.last})"

    @classmethod
    def of_hop(cls, hop: Hop) -> StageOffer:
        """Read a hop off the wire; its sizes are checked by its schema."""
        return cls(hop.first, hop.last, PeerId(hop.peer))


class HopFailed(StageFailed):
    """A stage of a route failed, was lost, or refused.

    Attributes:
        offer: The stage at fault, as far as it could be told.
        reason: What happened, fit for a terminal.
        is_input: It complains of what it was given, so the stage before may be at fault as well.
    """

    def __init__(self, offer: StageOffer, reason: str, *, is_input: bool = False) -> None:
        super().__init__(f"{offer}: {reason}")
        self.offer = offer
        self.reason = reason
        self.is_input = is_input

    @classmethod
    def of_message(cls, failure: SessionFailed) -> HopFailed:
        """Read what a peer says."""
        offer = StageOffer.of_hop(failure.hop)
        return cls(offer, printable_reason(failure.reason), is_input=failure.is_input)


def stage_service(model_hash: str, blocks: range) -> str:
    """Return the name under which a stage is announced."""
    return f"llmload/stage/{model_hash[:MODEL_PREFIX_CHARACTERS]}/{blocks[0]}-{blocks[-1]}"


def model_service(model_hash: str) -> str:
    """Return the name under which all stages of a model publish, where routing is on."""
    return f"llmload/model/{model_hash[:MODEL_PREFIX_CHARACTERS]}"


def parse_offer(service: str, peer_id: PeerId, model_hash: str) -> StageOffer | None:
    """Read a name of `stage_service`; None if it is another one, or that of another model."""
    match = _SERVICE.fullmatch(service)
    if match is None or match[1] != model_hash[:MODEL_PREFIX_CHARACTERS]:
        return None
    first, last = int(match[2]), int(match[3])
    return StageOffer(first, last, peer_id) if first <= last else None


def stage_offers(
    records: Iterable[NodeRecord], *, model_hash: str, layer_count: int
) -> list[StageOffer]:
    """Return the offers for one model that stand in the records of peers, sorted.

    Names that are no stage, of another model, or out of range are somebody else's business.
    """
    offers = {
        offer
        for record in records
        for service in record.services
        if (offer := parse_offer(service, record.peer_id, model_hash)) is not None
        and offer.last < layer_count
    }
    return sorted(offers)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteCosts:
    """What a step of one position costs on the way: seconds, as far as they are known.

    Attributes:
        block_s: In one block of a peer.
        enter_s: Whatever else a peer costs each step: its queue, or a doubt about it.
        rtt_s: Round trips of links, by both ends; either order will do.
        client: Where steps begin and tokens end.
        default_block_s: For peers that are not in `block_s`.
        default_rtt_s: For links that are not in `rtt_s`; they may have to be made first.
    """

    block_s: dict[PeerId, float] = field(default_factory=dict)
    enter_s: dict[PeerId, float] = field(default_factory=dict)
    rtt_s: dict[tuple[PeerId, PeerId], float] = field(default_factory=dict)
    client: PeerId | None = None
    default_block_s: float = 0.005
    default_rtt_s: float = 0.1

    def hop_s(self, sender: PeerId | None, receiver: PeerId | None) -> float:
        """Return the seconds from one peer to another, one way."""
        if sender is None or receiver is None:
            return self.default_rtt_s / 2
        if sender == receiver:
            return 0.0
        known = self.rtt_s.get((sender, receiver), self.rtt_s.get((receiver, sender)))
        return (self.default_rtt_s if known is None else known) / 2

    def compute_s(self, peer_id: PeerId) -> float:
        """Return the seconds of one block."""
        return self.block_s.get(peer_id, self.default_block_s)


NO_COSTS = RouteCosts()


def choose_route(
    offers: Iterable[StageOffer], *, layer_count: int, costs: RouteCosts = NO_COSTS
) -> tuple[StageOffer, ...]:
    """Return the quickest way through all blocks, each stage with the blocks it is to compute.

    An offer may be used in part. Shortest paths over (block, peer): to stay at a peer costs its
    computing alone, to change costs the hop as well, and the end the way back to the client. Of
    equals that of the lowest peer ids.

    Raises:
        NoRoute: There is none; says which blocks nobody serves.
    """
    offers = sorted(set(offers))
    # Cheapest way through the blocks so far, by the peer that computes the last of them.
    best: dict[PeerId, tuple[float, tuple[StageOffer, ...]]] = {}
    for block in range(layer_count):
        serving = sorted({offer.peer_id for offer in offers if block in offer.blocks})
        reached = {}
        for peer_id in serving:
            stage = StageOffer(block, block, peer_id)
            enter_s = costs.enter_s.get(peer_id, 0.0)
            ways = [
                (seconds, (*way[:-1], replace(way[-1], last=block)))
                if last == peer_id
                else (seconds + costs.hop_s(last, peer_id) + enter_s, (*way, stage))
                for last, (seconds, way) in best.items()
            ]
            if block == 0:
                ways = [(costs.hop_s(costs.client, peer_id) + enter_s, (stage,))]
            seconds, way = min(ways)
            reached[peer_id] = seconds + costs.compute_s(peer_id), way
        if not reached:
            raise _no_route(offers, layer_count)
        best = reached
    _, way = min(
        (seconds + costs.hop_s(last, costs.client), way) for last, (seconds, way) in best.items()
    )
    return way


def format_blocks(blocks: range) -> str:
    """Return blocks as users write them: `4`, or `0-3` with both ends included."""
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"


def parse_blocks(text: str) -> range:
    """Read blocks as users write them: `4`, or `0-3` with both ends included.

    Raises:
        ValueError: Neither of the two.
    """
    match = _BLOCKS.fullmatch(text)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"{text!r} is no range of blocks; write FIRST-LAST, such as 0-3")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def missing_blocks(offers: Iterable[StageOffer], layer_count: int) -> list[range]:
    """Return the blocks that none of the offers serves, as contiguous ranges."""
    served = {block for offer in offers for block in offer.blocks}
    return _ranges(block for block in range(layer_count) if block not in served)


def _no_route(offers: Sequence[StageOffer], layer_count: int) -> NoRoute:
    missing = missing_blocks(offers, layer_count)
    names = ", ".join(format_blocks(blocks) for blocks in missing)
    return NoRoute(
        f"nobody we know of serves block {names} of this model's 0-{layer_count - 1}. "
        f"Start `llmload up --blocks {format_blocks(missing[0])}` on another device.",
        missing,
    )


def _ranges(indexes: Iterable[int]) -> list[range]:
    """Return the contiguous parts of ascending numbers."""
    parts: list[range] = []
    for index in indexes:
        if parts and parts[-1].stop == index:
            parts[-1] = range(parts[-1].start, index + 1)
        else:
            parts.append(range(index, index + 1))
    return parts
