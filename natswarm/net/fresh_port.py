"""Where peers will see a port that was just bound: by the NAT's law, or by asking some of them.

Knows no punctures.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import trio

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.identity import Identity
from natswarm.nat.behaviour import AllocationLaw, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.net.peer import Peer
from natswarm.net.port import DatagramPort
from natswarm.swarm_key import SwarmKey
from natswarm.wire import TRANSACTION_BYTES, EchoRequest, decode_echo_reply_untrusted

__all__ = ["external_endpoint"]

# Two round trips of a slow mobile network; an answer that is lost costs a birthday puncture.
ECHO_TIMEOUT_S = 0.6
ECHO_OBSERVERS_MAX = 3


async def external_endpoint(
    port: DatagramPort,
    profile: NatProfile,
    peers: Iterable[Peer],
    *,
    identity: Identity,
    swarm: SwarmKey,
    rng: random.Random,
) -> Endpoint | None:
    """Return where peers will see a fresh port; None where that cannot be known.

    Args:
        port: Nobody else receives from it yet.
        profile: What its NAT does, and to another port of ours.
        peers: Of whom those are asked that take strangers.
        identity: Signs the requests.
        swarm: Whose key seals them.
        rng: Draws what tells them from others.
    """
    main, number = profile.main_endpoint, port.local_endpoint.port
    if main is None:
        return None
    law = None if profile.allocation is None else profile.allocation.law
    if profile.is_translated is False or law is AllocationLaw.PRESERVING:
        return Endpoint(main.ip, number)
    if profile.mapping not in (Mapping.EIM, None):
        return None
    observers = {
        peer.peer_id: peer.seen_at
        for peer in peers
        if peer.is_reachable and peer.record and peer.record.profile.accepts_strangers
    }
    transaction = rng.randbytes(TRANSACTION_BYTES)
    request = swarm.seal(EchoRequest(transaction, identity.peer_id).encode(identity))
    for endpoint in list(observers.values())[:ECHO_OBSERVERS_MAX]:
        port.send(request, endpoint)
    with trio.move_on_after(ECHO_TIMEOUT_S if observers else 0):
        while True:
            for arrival in await port.receive_batch():
                try:
                    reply = decode_echo_reply_untrusted(swarm.open_untrusted(arrival.data))
                except DecodeError:
                    continue
                if reply.transaction == transaction and reply.sender in observers:
                    return reply.observed
    return None
