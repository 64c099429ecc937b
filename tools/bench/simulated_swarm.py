"""Thousands of overlays on the bare event heap: links with delays and NATs, nodes that come and go.

What is real is everything in `natswarm.routing`, signatures included. What is modelled is below it:
a link is a reliable stream (QUIC), so a lost datagram is a late one; a dead peer is noticed after
20 to 30 s, as QUIC's keepalive does; a puncture takes seconds and works by the classes of the two
NATs; and wanting a link means asking the peer for it over the routing itself, as real nodes do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from natswarm.identity import Identity, PeerId
from natswarm.message import encode_message
from natswarm.routing.distance import as_int
from natswarm.routing.lookup import ALPHA, GivenAnswer
from natswarm.routing.overlay import Asked, LinkUnwanted, LinkWanted, LookupEnded, Overlay
from natswarm.routing.protocol import (
    HOPS_MAX,
    Accepted,
    Answered,
    Declined,
    Forward,
    LinkMessage,
    Told,
)
from natswarm.routing.table import LINKS_MAX
from natswarm.sim.world import World

__all__ = ["Conditions", "NatClass", "SimulatedNode", "SimulatedSwarm", "Watched"]

# The overlay's clock: seconds since 1970.
EPOCH_S = 1_700_000_000.0

FRAME_BYTES = 8 + 12  # of MessageStream, and of the stream's and QUIC's frames, about
RETRANSMISSION_S = 0.25


class NatClass(Enum):
    """What matters of a NAT for who can link to whom."""

    OPEN = "accepts strangers"
    PREDICTABLE = "endpoint-independent mapping"
    BLOCK = "address-and-port-dependent mapping, small port blocks"
    UNIFORM = "address-and-port-dependent mapping, any port"


# Three of five nodes on mobile carriers, 40 % of which map by endpoint (reference, section 2); most
# of those in port blocks; a few nodes in ten have no NAT or one that lets strangers in.
NAT_MIX = {
    NatClass.OPEN: 0.1,
    NatClass.PREDICTABLE: 0.65,
    NatClass.BLOCK: 0.17,
    NatClass.UNIFORM: 0.08,
}
PUNCTURE_SUCCESS = 0.97

# Homes have a /24 to themselves as far as we see it; a carrier puts its subscribers behind few.
CARRIER_SHARE = 0.4
CARRIER_PREFIXES = 160


@dataclass(frozen=True, slots=True)
class Conditions:
    """The network between nodes.

    Attributes:
        delay_s: Range of a node's own access delay, one way; a message takes both ends'.
        loss: Of datagrams; a message is late by 0.25 s for each loss.
        death_noticed_s: Range of the time until a neighbour notices that a node is gone.
        puncture_s: Range of the time a puncture takes.
    """

    delay_s: tuple[float, float] = (0.005, 0.06)
    loss: float = 0.01
    death_noticed_s: tuple[float, float] = (20.0, 30.0)
    puncture_s: tuple[float, float] = (0.3, 3.0)


@dataclass(slots=True, eq=False)
class Watched:
    """What a lookup cost.

    Attributes:
        started_at: When, virtual.
        ended_at: When.
        hops: Of its longest path.
        message_count: All messages that it caused, those back included.
        answers: Its outcome.
    """

    started_at: float
    ended_at: float | None = None
    hops: int = 0
    message_count: int = 0
    answers: tuple[GivenAnswer, ...] = ()


class SimulatedNode:
    """One node: an overlay and what a driver does for it."""

    def __init__(self, swarm: SimulatedSwarm, identity: Identity, rng: random.Random) -> None:
        self.swarm = swarm
        self.identity = identity
        self.rng = rng
        self.overlay = Overlay(identity, rng=rng, links_max=swarm.links_max, alpha=swarm.alpha)
        self.is_alive = True
        self.delay_s = rng.uniform(*swarm.conditions.delay_s)
        self.nat = rng.choices(list(NAT_MIX), list(NAT_MIX.values()))[0]
        is_mobile = rng.random() < CARRIER_SHARE
        self.prefix = f"carrier-{rng.randrange(CARRIER_PREFIXES)}" if is_mobile else ""
        self.side = 0
        self.connected: dict[PeerId, SimulatedNode] = {}
        self.sent_count = 0
        self.sent_bytes = 0
        self._armed_for = float("inf")

    @property
    def peer_id(self) -> PeerId:
        """Who it is."""
        return self.identity.peer_id

    # Overlay to world -----------------------------------------------------------------------------

    def drain(self) -> None:
        """Carry out what the overlay wants, after each input."""
        overlay = self.overlay
        while True:
            for peer_id, message in overlay.messages_to_send():
                self._send(peer_id, message)
            if not overlay.events:
                break
            event = overlay.events.popleft()
            match event:
                case LinkWanted(peer_id):
                    self._want_link(peer_id)
                case LinkUnwanted(peer_id):
                    if (other := self.connected.pop(peer_id, None)) is not None:
                        other.lose(self)
                case Asked(lookup, origin, body):
                    is_willing = body != b"link" or overlay.accepts_link(origin, self.swarm.now)
                    overlay.tell(lookup, b"yes" if is_willing else b"no")
                case LookupEnded(lookup, answers):
                    self.swarm.note_end(lookup, answers)
        due = overlay.next_timer()
        if due < self._armed_for:
            self._armed_for = due
            self.swarm.at(due, self._fire)

    def _fire(self) -> None:
        now = self.swarm.now
        if not self.is_alive or now < self._armed_for:
            return
        self._armed_for = float("inf")
        self.overlay.handle_timer(now)
        self.drain()

    def _send(self, peer_id: PeerId, message: LinkMessage) -> None:
        size = len(encode_message(message)) + FRAME_BYTES
        self.sent_count += 1
        self.sent_bytes += size
        swarm = self.swarm
        swarm.note_message(self, peer_id, message, size)
        other = self.connected.get(peer_id)
        if other is None or not other.is_alive or other.side != self.side:
            return
        delay_s = self.delay_s + other.delay_s
        while self.rng.random() < swarm.conditions.loss:
            delay_s += RETRANSMISSION_S
        swarm.world.after(delay_s, other.receive, message, self)

    def receive(self, message: LinkMessage, sender: SimulatedNode) -> None:
        """Take a message from a neighbour."""
        if self.is_alive and self.connected.get(sender.peer_id) is sender:
            self.overlay.receive_untrusted(message, sender.peer_id, self.swarm.now)
            self.drain()

    # Links ----------------------------------------------------------------------------------------

    def _want_link(self, peer_id: PeerId) -> None:
        if peer_id in self.connected:
            self.overlay.link_failed(peer_id, self.swarm.now)
            return
        name = self.overlay.ask(peer_id, b"link", self.swarm.now, is_for_link=True)
        self.swarm.when_ended(name, lambda answers: self._introduced(peer_id, answers))

    def _introduced(self, peer_id: PeerId, answers: tuple[GivenAnswer, ...]) -> None:
        other = self.swarm.nodes.get(peer_id)
        is_willing = any(
            isinstance(given.answer, Told) and given.answer.body == b"yes" for given in answers
        )
        if not answers and other is not None and other.nat is NatClass.OPEN:
            # Nobody on the way: it is dialled at the address it had.
            is_willing = other.overlay.accepts_link(self.peer_id, self.swarm.now)
        conditions = self.swarm.conditions
        took_s = self.rng.uniform(*conditions.puncture_s)
        self.swarm.world.after(took_s, self._punctured, peer_id, is_willing)

    def _punctured(self, peer_id: PeerId, is_willing: bool) -> None:
        if not self.is_alive:
            return
        other = self.swarm.nodes.get(peer_id)
        if not is_willing or other is None or not self.can_reach(other):
            self.overlay.link_failed(peer_id, self.swarm.now)
            self.drain()
        elif peer_id not in self.connected:
            self.link(other)

    def can_reach(self, other: SimulatedNode) -> bool:
        """Whether a puncture to another node works out."""
        if not other.is_alive or other.side != self.side:
            return False
        if self.nat is NatClass.UNIFORM and other.nat in (NatClass.UNIFORM, NatClass.BLOCK):
            return False
        if other.nat is NatClass.UNIFORM and self.nat is NatClass.BLOCK:
            return False
        return self.rng.random() < PUNCTURE_SUCCESS

    def link(self, other: SimulatedNode) -> None:
        """Connect two nodes."""
        now = self.swarm.now
        for one, two in ((self, other), (other, self)):
            one.connected[two.peer_id] = two
            prefix = two.prefix if self.swarm.has_prefixes else ""
            one.overlay.link_up(two.peer_id, now, prefix=prefix)
        for one in (self, other):
            one.drain()

    def lose(self, other: SimulatedNode) -> None:
        """The connection to another node has ended."""
        if self.is_alive and self.connected.pop(other.peer_id, None) is not None:
            self.overlay.link_down(other.peer_id, self.swarm.now)
            self.drain()


@dataclass(slots=True)
class SimulatedSwarm:
    """A swarm and its world.

    Attributes:
        seed: Replays it.
        conditions: The network.
        links_max: Links of each node.
        alpha: Disjoint paths of each lookup.
        has_prefixes: Whether nodes tell their table where addresses are; without, no limits.
    """

    seed: int
    conditions: Conditions = field(default_factory=Conditions)
    links_max: int = LINKS_MAX
    alpha: int = ALPHA
    has_prefixes: bool = True
    world: World = field(init=False)
    rng: random.Random = field(init=False)
    nodes: dict[PeerId, SimulatedNode] = field(init=False, default_factory=dict)
    by_kind: Counter[str] = field(init=False, default_factory=Counter)
    watched: dict[bytes, Watched] = field(init=False, default_factory=dict)
    _labels: dict[tuple[PeerId, int], Watched] = field(init=False, default_factory=dict)
    _on_end: dict[bytes, Callable[[tuple[GivenAnswer, ...]], None]] = field(
        init=False, default_factory=dict
    )
    _made_count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.world = World(self.seed)
        self.rng = self.world.stream("swarm")

    @property
    def now(self) -> float:
        """The overlays' time."""
        return EPOCH_S + self.world.now

    def at(self, time: float, callback: Callable[[], None]) -> None:
        """Call back at a time of the overlays."""
        self.world.at(max(time - EPOCH_S, self.world.now), callback)

    # Nodes ----------------------------------------------------------------------------------------

    def add(
        self,
        contact: SimulatedNode | None = None,
        *,
        identity: Identity | None = None,
        node_type: type[SimulatedNode] | None = None,
    ) -> SimulatedNode:
        """Add a node that knows one other, by an invite."""
        self._made_count += 1
        rng = self.world.stream(f"node {self._made_count}")
        identity = identity or Identity(rng.randbytes(32))
        node = (node_type or SimulatedNode)(self, identity, rng)
        if contact is None:
            node.nat = NatClass.OPEN
        self.nodes[node.peer_id] = node
        if contact is not None:
            node.link(contact)
        return node

    def grow(self, count: int, *, every_s: float = 0.2, until: float | None = None) -> None:
        """Let nodes join one after the other, each through a random living node that is open."""
        open_nodes = [node for node in self.alive() if node.nat is NatClass.OPEN]
        for _ in range(count):
            living = [self.rng.choice(open_nodes) for _ in range(3)] if open_nodes else []
            contact = next((node for node in living if node.is_alive), None)
            node = self.add(contact)
            if node.nat is NatClass.OPEN:
                open_nodes.append(node)
            self.world.run_for(every_s)

    def remove(self, node: SimulatedNode, *, says_goodbye: bool = False) -> None:
        """Let a node vanish; its neighbours notice after a while, or at once if it says so."""
        node.is_alive = False
        del self.nodes[node.peer_id]
        for other in node.connected.values():
            if says_goodbye:
                other.lose(node)
            else:
                self.world.after(
                    other.rng.uniform(*self.conditions.death_noticed_s), other.lose, node
                )

    def alive(self) -> list[SimulatedNode]:
        """Return all nodes that live."""
        return list(self.nodes.values())

    def pick(self) -> SimulatedNode:
        """Return any living node."""
        return self.rng.choice(list(self.nodes.values()))

    def churn(self, duration_s: float, *, median_session_s: float) -> Iterator[float]:
        """Let nodes leave and others come, as many; yield about once a second."""
        end = self.world.now + duration_s
        size = len(self.nodes)
        # Exponential sessions: the median is ln 2 of the mean.
        per_s = size * 0.6931 / median_session_s
        while self.world.now < end:
            pause_s = self.rng.expovariate(per_s)
            self.world.run_for(min(pause_s, 1.0))
            if pause_s <= 1.0:
                self.remove(self.pick(), says_goodbye=self.rng.random() < 0.5)
                contacts = [node for node in self.nodes.values() if node.nat is NatClass.OPEN]
                self.add(self.rng.choice(contacts))
            yield self.world.now

    def split(self, sides: int) -> None:
        """Cut the swarm into parts that do not hear of each other; 1 mends it."""
        for node in self.nodes.values():
            node.side = self.rng.randrange(sides)
        for node in self.nodes.values():
            for other in list(node.connected.values()):
                if other.side != node.side:
                    delay_s = node.rng.uniform(*self.conditions.death_noticed_s)
                    self.world.after(delay_s, node.lose, other)

    # Lookups --------------------------------------------------------------------------------------

    def watch(self, node: SimulatedNode, name: bytes) -> Watched:
        """Watch a lookup that was just started."""
        watched = self.watched[name] = Watched(self.world.now)
        node.drain()
        return watched

    def when_ended(self, name: bytes, then: Callable[[tuple[GivenAnswer, ...]], None]) -> None:
        """Call `then` with the answers when a lookup has ended."""
        self._on_end[name] = then

    def note_end(self, name: bytes, answers: tuple[GivenAnswer, ...]) -> None:
        """A lookup has ended."""
        if (watched := self.watched.pop(name, None)) is not None:
            watched.ended_at = self.world.now
            watched.answers = answers
        if (then := self._on_end.pop(name, None)) is not None:
            then(answers)

    def note_message(
        self, sender: SimulatedNode, to: PeerId, message: LinkMessage, size: int
    ) -> None:
        """A message is sent."""
        self.by_kind[type(message).__name__] += size
        if isinstance(message, Forward):
            watched = self.watched.get(message.lookup)
            if watched is not None:
                watched.message_count += 1
                watched.hops = max(watched.hops, HOPS_MAX - message.hops_left)
                self._labels[sender.peer_id, message.label] = watched
        elif isinstance(message, (Accepted, Answered, Declined)):
            watched = self._labels.get((to, message.label))
            if watched is not None:
                watched.message_count += 1

    def nearest(self, key: bytes, count: int = 1) -> list[SimulatedNode]:
        """Return who truly is nearest to a key."""
        number = as_int(key)
        return sorted(self.nodes.values(), key=lambda node: as_int(node.peer_id.key) ^ number)[
            :count
        ]
