"""When to look for whom: links to make and to give up, neighbourhoods to look at again.

Nothing here is asked in vain when all is well: a link that lives needs no refresh, its connection
notices when it dies. What remains is to look at our own neighbourhood now and then (newcomers find
us anyway, since their first lookup ends at us), and at buckets that are empty.

Source: Kademlia section 2.3 (refresh, joining by a lookup of one's own id). Makes no links itself.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from natswarm.routing.distance import id_in_bucket
from natswarm.routing.table import RoutingTable

__all__ = ["Chores", "Upkeep"]

# A look at what is to do, and how soon after something happened.
TICK_S = 15.0
SOON_S = 1.0

# Our own neighbourhood. Kademlia and BEP 5 refresh in 60 and 15 minutes; phones stay for less.
HOME_REFRESH_S = 600.0
HOME_REFRESH_MIN_S = 20.0

# An empty bucket: at once, then with growing pauses up to BEP 5's, since it may well be empty.
BUCKET_REFRESH_S = 30.0
BUCKET_REFRESH_MAX_S = 900.0

# A puncture takes seconds and may take 256 sockets; two or three at a time leave room for others'.
TRIES_AT_ONCE = 3
TRY_TIMEOUT_S = 60.0
REFRESHES_AT_ONCE = 2

# How often near neighbours tell each other whom they know near the other.
GOSSIP_S = 180.0


@dataclass(slots=True)
class Chores:
    """What is to do now.

    Attributes:
        link_to: Candidates to link to.
        look_for: Ids to look for, to learn candidates.
        give_up: A link that there is no room for.
        tell_neighbours: Whether near neighbours are to be told of each other.
    """

    link_to: list[bytes] = field(default_factory=list)
    look_for: list[bytes] = field(default_factory=list)
    give_up: bytes | None = None
    tell_neighbours: bool = False


class Upkeep:
    """Looks after a routing table.

    Args:
        table: Whom we know.
        rng: Draws jitter and ids to look for.
    """

    def __init__(self, table: RoutingTable, rng: random.Random) -> None:
        self._table = table
        self._rng = rng
        self._tries: dict[bytes, float] = {}
        self._next_tick = math.inf
        self._home_at = 0.0
        self._home_looked_at = -math.inf
        self._gossip_at = 0.0
        self._refreshes: dict[int, tuple[float, float]] = {}  # bucket: (not before, pause)

    def next_timer(self) -> float:
        """Return when `due` is to be called."""
        return self._next_tick

    def note_change(self, now: float, *, is_near: bool) -> None:
        """A link came or went; `is_near` if our neighbourhood changed."""
        self._next_tick = min(self._next_tick, now + SOON_S * self._rng.uniform(0.5, 1.5))
        if is_near:
            soonest = max(now, self._home_looked_at + HOME_REFRESH_MIN_S)
            self._home_at = min(self._home_at, soonest)

    def try_over(self, node_id: bytes) -> None:
        """A try to link to a node is over, whatever came of it."""
        self._tries.pop(node_id, None)

    def due(self, now: float) -> Chores:
        """Return what is to do now; each thing is named once."""
        chores = Chores()
        if now < self._next_tick:
            return chores
        self._next_tick = now + TICK_S * self._rng.uniform(0.75, 1.25)
        table = self._table
        if len(table) > table.links_max and (spare := table.surplus(now)) is not None:
            chores.give_up = spare.node_id
            self._next_tick = now + SOON_S
        self._tries = {each: end for each, end in self._tries.items() if end > now}
        for node_id in table.wanted(now):
            if len(self._tries) >= TRIES_AT_ONCE:
                break
            if node_id not in self._tries:
                self._tries[node_id] = now + TRY_TIMEOUT_S
                chores.link_to.append(node_id)
        if len(table):
            self._refresh(chores, now)
        return chores

    def _refresh(self, chores: Chores, now: float) -> None:
        if now >= self._home_at:
            self._home_at = now + HOME_REFRESH_S * self._rng.uniform(0.75, 1.25)
            self._home_looked_at = now
            chores.look_for.append(self._table.own_id)
        if now >= self._gossip_at:
            self._gossip_at = now + GOSSIP_S * self._rng.uniform(0.75, 1.25)
            chores.tell_neighbours = True
        uncovered = self._table.uncovered(now)
        self._refreshes = {
            index: state for index, state in self._refreshes.items() if index in uncovered
        }
        for index in uncovered:
            not_before, pause_s = self._refreshes.get(index, (0.0, BUCKET_REFRESH_S))
            if len(chores.look_for) < REFRESHES_AT_ONCE and now >= not_before:
                self._refreshes[index] = now + pause_s, min(2 * pause_s, BUCKET_REFRESH_MAX_S)
                target = id_in_bucket(self._table.own_number, index, self._rng)
                chores.look_for.append(target)
