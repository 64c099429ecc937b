"""Nodes that lie: what routing has to stand, for benchmarks and tests.

A sybil plays along where that keeps it in others' tables: it links, gossips and answers who looks
for neighbours. Everything else it spoils. Requests to find a record or to keep one it answers at
once, well signed: "I am the nearest, and there is nothing". Requests for a peer it accepts, and
drops. All sybils of an attacker come from a few address prefixes, since addresses cost money.
"""

from __future__ import annotations

import random

from natswarm.errors import DecodeError
from natswarm.identity import Identity
from natswarm.routing.distance import as_int, shared_bits
from natswarm.routing.protocol import (
    Accepted,
    Answered,
    Fetch,
    Fetched,
    Forward,
    LinkMessage,
    Mode,
    Store,
    Stored,
    digest_of,
    open_request_untrusted,
    seal_answer,
)
from tools.bench.simulated_swarm import NatClass, SimulatedNode, SimulatedSwarm

__all__ = ["PREFIXES", "SybilNode", "add_sybils", "ground_identity"]

PREFIXES = 4


class SybilNode(SimulatedNode):
    """Swallows requests for peers, and denies that there are records."""

    def __init__(self, swarm: SimulatedSwarm, identity: Identity, rng: random.Random) -> None:
        super().__init__(swarm, identity, rng)
        self.nat = NatClass.PREDICTABLE  # never anybody's first contact
        self.prefix = f"attacker-{rng.randrange(PREFIXES)}"

    def receive(self, message: LinkMessage, sender: SimulatedNode) -> None:
        """Take a message from a neighbour."""
        if isinstance(message, Forward) and self._spoils(message, sender):
            return
        super().receive(message, sender)

    def _spoils(self, forward: Forward, sender: SimulatedNode) -> bool:
        if forward.mode == Mode.EXACT:
            if forward.target == self.peer_id.key:
                return False
            self._send(sender.peer_id, Accepted(forward.label))
            return True
        try:
            _, request = open_request_untrusted(forward)
        except DecodeError:
            return False
        digest = digest_of(forward.request)
        answer: Fetched | Stored
        if isinstance(request, Fetch):
            answer = Fetched(digest, ())
        elif isinstance(request, Store):
            answer = Stored(digest, 7)
        else:
            return False
        self._send(sender.peer_id, Answered(forward.label, seal_answer(self.identity, answer)))
        return True


def add_sybils(swarm: SimulatedSwarm, count: int, *, every_s: float = 0.2) -> list[SimulatedNode]:
    """Let sybils with random ids join."""
    contacts = [node for node in swarm.alive() if node.nat is NatClass.OPEN]
    sybils = []
    for _ in range(count):
        sybils.append(swarm.add(swarm.rng.choice(contacts), node_type=SybilNode))
        swarm.world.run_for(every_s)
    return sybils


def ground_identity(target: bytes, bits: int, rng: random.Random) -> Identity:
    """Return an identity whose id shares `bits` bits with a target: 2^bits keys are tried."""
    number = as_int(target)
    while True:
        identity = Identity(rng.randbytes(32))
        if shared_bits(as_int(identity.peer_id.key), number) >= bits:
            return identity
