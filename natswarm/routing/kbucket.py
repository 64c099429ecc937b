"""A k-bucket: the neighbours that share so many leading bits with us, and who might replace them.

In a network of NATs an entry of a routing table is only worth something as a living, punctured
connection. So a bucket has two parts: *links*, which can be used, and a replacement cache of
*candidates*, ids that somebody mentioned and that may be dead, unreachable or invented.

Source: Kademlia sections 2.2 and 4.1 (replacement caches; old contacts first, since who has been
here for long will stay for long). Knows neither our own id nor how links are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from natswarm.routing.distance import as_int

__all__ = ["Candidate", "K", "KBucket", "Link"]

# Kademlia's k, with BEP 5's value: size of a replacement cache, of the set of nearest neighbours
# and of the set of replicas. All of 8 vanish within an hour with a chance below 1 % even if half
# of all nodes do.
K = 8

# The pause after a first try in vain to link to a candidate; it doubles each time. Nobody mentions
# who is dead, so caches forget the dead as the living are mentioned; those that are kept are what a
# partition heals from, so they are asked for ever.
RETRY_S = 60.0
RETRY_MAX_S = 600.0

# What one neighbour may make us pass on, see `Link.take`: a lookup is one request on each of some
# ten links of the swarm, so a neighbour that speaks for 1,000 others asks for far less than this.
REQUESTS_PER_S = 20.0
REQUESTS_BURST = 60.0


@dataclass(slots=True, eq=False)
class Link:
    """A neighbour: a peer with a living connection on which requests are passed on.

    Attributes:
        node_id: Who.
        since: When the link came up.
        prefix: The part of its address that costs money: the limits count by it.
        number: The id as a number.
        round_trip_s: Smoothed time until it accepts a request.
        strikes: Requests in a row that it left without any reaction.
        answered_count: Requests through it that were answered.
        lost_count: Requests that it accepted and that then were heard of no more.
    """

    node_id: bytes
    since: float
    prefix: str = ""
    number: int = field(init=False)
    round_trip_s: float = 0.2
    strikes: int = 0
    answered_count: int = 0
    lost_count: int = 0
    _tokens: float = REQUESTS_BURST
    _filled_at: float = 0.0

    def __post_init__(self) -> None:
        self.number = as_int(self.node_id)

    @property
    def is_suspect(self) -> bool:
        """Whether others should be tried first: silent now, or a hole that requests vanish in."""
        return self.strikes > 0 or self.lost_count > 2 + self.answered_count

    def take(self, now: float) -> bool:
        """Return whether the neighbour may ask for one more thing now, and count it if so."""
        filled = self._tokens + (now - self._filled_at) * REQUESTS_PER_S
        self._tokens, self._filled_at = min(REQUESTS_BURST, filled), now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(slots=True, eq=False)
class Candidate:
    """An id that may be worth a link.

    Attributes:
        node_id: Whose.
        failure_count: Tries in vain since it was last heard of at first hand.
        failed_at: When the last try failed.
        retry_at: Not to be tried before.
    """

    node_id: bytes
    number: int = field(init=False)
    failure_count: int = 0
    failed_at: float = 0.0
    retry_at: float = 0.0

    def __post_init__(self) -> None:
        self.number = as_int(self.node_id)

    def hasten(self) -> None:
        """Something speaks for its being there: let it wait as after a first failure, at most."""
        self.retry_at = min(self.retry_at, self.failed_at + RETRY_S)


class KBucket:
    """Links and candidates of one distance; links are unbounded here, the table bounds them."""

    __slots__ = ("_candidates", "_links")

    def __init__(self) -> None:
        self._links: dict[bytes, Link] = {}
        self._candidates: dict[bytes, Candidate] = {}

    def __bool__(self) -> bool:
        return bool(self._links or self._candidates)

    @property
    def links(self) -> list[Link]:
        """The links, oldest first."""
        return list(self._links.values())

    @property
    def link_count(self) -> int:
        """How many links."""
        return len(self._links)

    def candidates(self, now: float) -> Iterator[Candidate]:
        """The candidates that may be tried now, latest news first."""
        for candidate in reversed(self._candidates.values()):
            if candidate.retry_at <= now:
                yield candidate

    def add_link(self, link: Link) -> bool:
        """A link is up; it is a candidate no more. Return whether earlier tries were in vain."""
        known = self._candidates.pop(link.node_id, None)
        self._links[link.node_id] = link
        return known is not None and known.failure_count > 0

    def hasten(self) -> None:
        """Something speaks for the candidates' being there; see `Candidate.hasten`."""
        for candidate in self._candidates.values():
            candidate.hasten()

    def remove_link(self, node_id: bytes) -> None:
        """A link is gone; its peer may come back, so it becomes a candidate."""
        if self._links.pop(node_id, None) is not None:
            self.add_candidate(node_id)

    def add_candidate(self, node_id: bytes) -> Candidate | None:
        """Somebody mentioned an id; return it if it was not known.

        A full cache forgets its oldest entry, those that failed before the others. Who mentions an
        id is linked to it, so the pause after failures is cut short.
        """
        if node_id in self._links:
            return None
        if (known := self._candidates.get(node_id)) is not None:
            known.hasten()
            return None
        if len(self._candidates) >= K:
            worst = max(self._candidates.values(), key=lambda each: each.failure_count)
            del self._candidates[worst.node_id]
        candidate = self._candidates[node_id] = Candidate(node_id)
        return candidate

    def note_failure(self, node_id: bytes, now: float) -> None:
        """A try to link to a candidate failed."""
        if (candidate := self._candidates.get(node_id)) is None:
            return
        candidate.failure_count += 1
        candidate.failed_at = now
        pause_s = RETRY_S * 2.0 ** min(candidate.failure_count - 1, 10)
        candidate.retry_at = now + min(pause_s, RETRY_MAX_S)
