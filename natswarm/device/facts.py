"""What is known of a node and its peers, as plain dictionaries for JSON; null is not known."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import trio

from natswarm.errors import ConfigurationError
from natswarm.nat.profile import NatProfile
from natswarm.nat.votes import prefix_of
from natswarm.node import Node, Peer

__all__ = ["peer_as_json", "peer_details_as_json", "profile_as_json", "status_as_json"]


def profile_as_json(profile: NatProfile) -> dict[str, Any]:
    """Return what is known of a NAT; null is what is not known."""
    allocation = profile.allocation
    return {
        "translated": profile.is_translated,
        "mapping": profile.mapping.value if profile.mapping else None,
        "filtering": profile.filtering.value if profile.filtering else None,
        "allocation": str(allocation) if allocation is not None else None,
        "public_ips": list(profile.public_ips),
        "endpoint": str(profile.main_endpoint) if profile.main_endpoint else None,
        "echoes": profile.echo_count,
        "observers": profile.observer_count,
    }


def peer_as_json(peer: Peer) -> dict[str, Any]:
    """Return what is known of a peer we are connected to; null is what is not known."""
    record, statistics = peer.record, peer.statistics()
    profile = None if record is None else record.profile
    # Of the paths' round trips the active one's, which probes measure; QUIC's own lags behind.
    active = next((path for path in peer.paths.paths if path.endpoint == peer.paths.remote), None)
    return {
        "peer_id": str(peer.peer_id),
        "name": "" if record is None else record.name,
        "services": [] if record is None else list(record.services),
        "at": str(peer.seen_at),
        "network": prefix_of(peer.seen_at.ip.partition("%")[0]),
        "nat": None if profile is None or profile.is_translated is None else str(profile),
        "reachable": peer.is_reachable,
        "strategy": "" if peer.puncture is None else peer.puncture.strategy,
        "rtt_ms": None if active is None or active.rtt_s is None else 1000 * active.rtt_s,
        "sent_bytes": statistics.sent_bytes,
        "received_bytes": statistics.received_bytes,
        "connected_s": trio.current_time() - peer.connected_at,
    }


def peer_details_as_json(peer: Peer) -> dict[str, Any]:
    """Return the same with the figures of the connection, its paths and the probes that keep them.

    Seconds, bytes and counts; a figure that is not known is null.
    """
    probes = peer.paths.probe_statistics()
    return {
        **peer_as_json(peer),
        "connection": asdict(peer.statistics()) | {"call_count": peer.calls.call_count},
        "paths": [
            {
                **asdict(each),
                "local": str(each.local),
                "remote": str(each.remote),
                "silent_s": each.silent_s if math.isfinite(each.silent_s) else None,
            }
            for each in peer.paths.statistics()
        ],
        "probes": asdict(probes),
    }


def status_as_json(node: Node) -> dict[str, Any]:
    """Return how a node is; null is what it takes no part in."""
    record = node.record()
    routing = mainline = None
    try:
        overlay = node.overlay
    except ConfigurationError:
        pass
    else:
        buckets = overlay.neighbours_by_bucket()
        routing = {
            "links": sum(map(len, buckets.values())),
            "buckets": {str(index): len(links) for index, links in buckets.items()},
            "swarm_size": overlay.size_estimate(),
        }
    if node.mainline is not None:
        mainline = {"nodes": len(node.mainline.contacts()), "votes": len(node.mainline.votes())}
    return {
        "peer_id": str(node.peer_id),
        "name": record.name,
        "swarm": "open" if node.swarm.is_open else node.swarm.label,
        "local": str(node.local_endpoint),
        "nat": {"text": str(record.profile), **profile_as_json(record.profile)},
        "routing": routing,
        "mainline": mainline,
        "peers": [peer_as_json(peer) for peer in node.peers()],
    }
