"""Who serves which blocks, and which peers together are a whole model.

A stage announces itself as a service of its node, `llmload/stage/<model>/<first>-<last>`, with the
first 16 digits of the model's content hash. A route is a list of stages in which each begins where
the one before ends. The one with the fewest stages is taken: every hop costs half a round trip a
token, which on paths between carriers is more than a block costs to compute.

Pure: names and ranges. Knows neither how peers are found nor how fast they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmload.errors import LlmloadError
from llmload.swarm.protocol import Hop
from natswarm import NodeRecord, PeerId

__all__ = [
    "NoRoute",
    "StageOffer",
    "choose_route",
    "format_blocks",
    "parse_blocks",
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
        missing: Blocks that nobody serves; empty where every block is served but the ranges do not
            follow each other.
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


def stage_service(model_hash: str, blocks: range) -> str:
    """Return the name under which a stage is announced."""
    return f"llmload/stage/{model_hash[:MODEL_PREFIX_CHARACTERS]}/{blocks[0]}-{blocks[-1]}"


def stage_offers(
    records: Iterable[NodeRecord], *, model_hash: str, layer_count: int
) -> list[StageOffer]:
    """Return the offers for one model that stand in the records of peers, sorted.

    Names that are no stage, of another model, or out of range are somebody else's business.
    """
    offers = set()
    for record in records:
        for service in record.services:
            match = _SERVICE.fullmatch(service)
            if match is None or match[1] != model_hash[:MODEL_PREFIX_CHARACTERS]:
                continue
            first, last = int(match[2]), int(match[3])
            if first <= last < layer_count:
                offers.add(StageOffer(first, last, record.peer_id))
    return sorted(offers)


def choose_route(offers: Iterable[StageOffer], *, layer_count: int) -> tuple[StageOffer, ...]:
    """Return the shortest route through all blocks; of equals, that of the lowest peer ids.

    Raises:
        NoRoute: There is none; says which blocks nobody serves.
    """
    known = sorted(set(offers))
    # Best route from each block to the end, backwards; an offer leads from its first block to the
    # block after its last.
    best: dict[int, tuple[StageOffer, ...]] = {layer_count: ()}
    for start in reversed(range(layer_count)):
        routes = [
            (offer, *best[offer.last + 1])
            for offer in known
            if offer.first == start and offer.last + 1 in best
        ]
        if routes:
            best[start] = min(routes, key=lambda route: (len(route), route))
    if 0 in best:
        return best[0]
    raise _no_route(known, layer_count)


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


def _no_route(offers: Sequence[StageOffer], layer_count: int) -> NoRoute:
    served = {block for offer in offers for block in offer.blocks}
    missing = _ranges(block for block in range(layer_count) if block not in served)
    if missing:
        names = ", ".join(format_blocks(blocks) for blocks in missing)
        return NoRoute(
            f"nobody we know of serves block {names} of this model's 0-{layer_count - 1}. "
            f"Start `llmload serve --blocks {format_blocks(missing[0])}` on another device.",
            missing,
        )
    shown = ", ".join(map(str, offers))
    return NoRoute(
        f"every block is served, but the stages do not follow each other: {shown}. "
        f"Each stage must begin with the block after the last one of another.",
        (),
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
