"""Where the stages of a route are: their names, networks and NATs, as far as this node knows.

A client connects to the first stage to ask, and to the others in the background, in case it has to
go on elsewhere; of those that it has not met yet it knows the PeerId alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmload.swarm.route import StageOffer, format_blocks
from natswarm import Node, peer_as_json

__all__ = ["route_as_json", "route_text"]


def route_as_json(node: Node, route: Sequence[StageOffer]) -> list[dict[str, Any]]:
    """Return the stages of a route in order, for programs.

    Each has `peer_id` and `blocks`; that of a connected peer `name`, `network` (a prefix), `nat`
    and `rtt_ms` as well. null: not known.
    """
    peers = {peer.peer_id: peer for peer in node.peers()}
    stages = []
    for offer in route:
        stage = {"peer_id": str(offer.peer_id), "blocks": format_blocks(offer.blocks)}
        if (peer := peers.get(offer.peer_id)) is not None:
            facts = peer_as_json(peer)
            stage |= {name: facts[name] for name in ("name", "network", "nat", "rtt_ms")}
        stages.append(stage)
    return stages


def route_text(node: Node, route: Sequence[StageOffer]) -> str:
    """Return a route in one line: `aTs9fkqz kim, 145.53.1.0/24 APDM/APDF (blocks 0-1) -> ...`."""
    stages = []
    for offer, stage in zip(route, route_as_json(node, route), strict=True):
        name = " ".join(filter(None, (offer.peer_id.short, stage.get("name"))))
        # Of the NAT mapping and filtering; the law of its ports is for those who puncture.
        nat = (stage.get("nat") or "").partition(",")[0]
        place = " ".join(filter(None, (stage.get("network"), nat)))
        stages.append(f"{', '.join(filter(None, (name, place)))} (blocks {stage['blocks']})")
    return " -> ".join(stages)
