"""The routing table: few links, chosen so that every distance is covered and home is complete.

A table of Kademlia holds k contacts in each of some log2 n buckets, which are 100 at 10,000 nodes.
Ours holds connections, of which a phone keeps about 30. So buckets are not filled but *covered*:

* near   the K nearest nodes are all linked: who is nearest of all to a key is only found if the
         nodes around it know each other (Pastry's leaf set; S/Kademlia's siblings);
* far    each bucket farther out has one link, or two while there is room: each hop fixes at least
         one more bit of the id.

By the symmetry of XOR, whoever is in our bucket i has us in its own bucket i, so that one link
serves both, and what we need is what others are ready to give.

An attacker has as many ids as it likes, but addresses cost money: of one address prefix only a few
count as near, and where links must go, those of the prefix with the most go first.

Source: Kademlia; Rowstron and Druschel, "Pastry" (2001); Baumgart and Mies, "S/Kademlia" (2007).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from natswarm.routing.distance import ID_BITS, ID_BYTES, as_int, shared_bits
from natswarm.routing.kbucket import Candidate, K, KBucket, Link

__all__ = ["LINKS_MAX", "LINKS_MIN", "RoutingTable"]

# What a phone keeps (issue 5); each costs a PING of some 60 bytes every 10 s.
LINKS_MAX = 30
# The K nearest, and something for the far buckets: enough for some hundred nodes.
LINKS_MIN = 16

# Second links are not asked for beyond this share, so that others find room with us.
COMFORT_SHARE = 0.75

# Of K nearest nodes so many may come from one prefix, while there are others.
NEAR_PER_PREFIX = 2

# A node this many times farther from a key than the nearest should be on average is hardly the
# nearest: with random ids the chance is exp(-6), 0.2 %, or 2 % as our estimate is off by a third.
# A false alarm costs one more path.
IMPLAUSIBLE_SPACINGS = 6

# A link is not given up before. A newcomer learns whom else to link to in less.
PROBATION_S = 60.0

KnownT = TypeVar("KnownT", bound=Link | Candidate)


class RoutingTable:
    """Whom a node knows.

    Args:
        own_id: Our id.
        links_max: Links to keep, at least `LINKS_MIN`.

    Attributes:
        change_count: Links that came and went.
    """

    def __init__(self, own_id: bytes, *, links_max: int = LINKS_MAX) -> None:
        if links_max < LINKS_MIN:
            raise ValueError(f"a node needs at least {LINKS_MIN} links, not {links_max}")
        self.own_id = own_id
        self.own_number = as_int(own_id)
        self.links_max = links_max
        self.change_count = 0
        self._links: dict[bytes, Link] = {}
        self._buckets: dict[int, KBucket] = {}

    # What there is --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._links)

    def link(self, node_id: bytes) -> Link | None:
        """Return the link to a node, if there is one."""
        return self._links.get(node_id)

    def links(self) -> list[Link]:
        """Return all links, oldest first."""
        return list(self._links.values())

    def links_by_bucket(self) -> dict[int, list[Link]]:
        """Return the links by how many leading bits their ids share with ours."""
        return {
            index: bucket.links
            for index, bucket in sorted(self._buckets.items())
            if bucket.link_count
        }

    def bucket_index(self, node_id: bytes) -> int:
        """Return how many leading bits an id shares with ours, 0..256."""
        return shared_bits(self.own_number, as_int(node_id))

    def nearest(self, number: int) -> list[Link]:
        """Return all links, nearest to an id first."""
        return sorted(self._links.values(), key=lambda link: link.number ^ number)

    def replicas(self, number: int, count: int) -> list[Link]:
        """Return the `count` links nearest to an id, few of one prefix while there are others."""
        return diverse(self.nearest(number), count)

    def expected_spacing(self) -> int:
        """Return how far the nearest node is from any key on average, by how far ours are."""
        near = self.nearest(self.own_number)[:K]
        if len(near) < K:
            return 1 << ID_BITS  # too few to tell
        return (near[-1].number ^ self.own_number) // K

    def point_near(self, key: bytes, rng: random.Random) -> bytes:
        """Return a random point no farther from a key than its K-th nearest node should be."""
        reach = min(K * self.expected_spacing(), 1 << ID_BITS)
        return (as_int(key) ^ rng.randrange(reach)).to_bytes(ID_BYTES, "big")

    def is_plausible(self, node_id: bytes, target: bytes) -> bool:
        """Whether a node may be the one nearest to `target`, as far as we can tell."""
        apart = as_int(node_id) ^ as_int(target)
        return apart <= IMPLAUSIBLE_SPACINGS * self.expected_spacing()

    def size_estimate(self) -> float:
        """Return how many nodes there seem to be, ourselves included; off by a third, usually."""
        if len(self._links) < K:
            return len(self._links) + 1.0
        return (1 << ID_BITS) / self.expected_spacing()

    # What happens ---------------------------------------------------------------------------------

    def add_link(self, link: Link) -> None:
        """A link is up; another one to the same node is replaced."""
        self.change_count += 1
        self._links.pop(link.node_id, None)
        self._links[link.node_id] = link
        if self._bucket(link.node_id).add_link(link):
            # Whoever was cut off from us seldom comes back alone.
            for bucket in self._buckets.values():
                bucket.hasten()

    def remove_link(self, node_id: bytes) -> None:
        """A link is gone; the node stays known as a candidate."""
        if self._links.pop(node_id, None) is not None:
            self.change_count += 1
            self._bucket(node_id).remove_link(node_id)

    def add_candidate(self, node_id: bytes) -> bool:
        """Somebody mentioned a node; return whether it was news."""
        if node_id == self.own_id or node_id in self._links:
            return False
        return self._bucket(node_id).add_candidate(node_id) is not None

    def note_failure(self, node_id: bytes, now: float) -> None:
        """A try to link to a candidate failed."""
        self._bucket(node_id).note_failure(node_id, now)

    # What is wanted -------------------------------------------------------------------------------

    def wanted(self, now: float) -> list[bytes]:
        """Return the candidates to link to, most needed first."""
        near, depth = self._neighbourhood(now)
        needed = [each.node_id for each in near if each.node_id not in self._links]
        liked: list[bytes] = []
        is_comfortable = len(self._links) >= COMFORT_SHARE * self.links_max
        for index in range(depth):
            bucket = self._buckets.get(index)
            if bucket is None or bucket.link_count > 1 or (bucket.link_count and is_comfortable):
                continue
            candidate = next(bucket.candidates(now), None)
            if candidate is not None:
                (liked if bucket.link_count else needed).append(candidate.node_id)
        return needed + liked

    def uncovered(self, now: float) -> list[int]:
        """Return the buckets outside of our neighbourhood without a link or a candidate."""
        _, depth = self._neighbourhood(now)
        return [
            index
            for index in range(depth)
            if (bucket := self._buckets.get(index)) is None
            or (not bucket.link_count and next(bucket.candidates(now), None) is None)
        ]

    def surplus(self, now: float) -> Link | None:
        """Return the link that would be missed least, or None if each is needed.

        It is one of the fullest bucket; there, of the prefix with most links; of those the latest,
        but not one so young that it may be a newcomer's only one.
        """
        near = self._near_links()
        depth = self._depth(near)
        prefixes = Counter(link.prefix for link in self._links.values())
        spare = [
            (bucket.link_count, prefixes[link.prefix], link.since, link.node_id)
            for index, bucket in self._buckets.items()
            if index >= depth or bucket.link_count > 1
            for link in bucket.links
            if link not in near and link.since <= now - PROBATION_S
        ]
        return self._links[max(spare)[-1]] if spare else None

    def has_room_for(self, node_id: bytes, now: float) -> bool:
        """Whether a link to a node would be kept."""
        if node_id in self._links or len(self._links) < self.links_max:
            return True
        if self.surplus(now) is None:
            return False
        index = self.bucket_index(node_id)
        bucket = self._buckets.get(index)
        return bucket is None or not bucket.link_count or index >= self._depth(self._near_links())

    def _near_links(self) -> list[Link]:
        return self.replicas(self.own_number, K)

    def _depth(self, near: list[Link]) -> int:
        """Return the first bucket that lies wholly among our nearest."""
        if len(near) < K:
            return 0
        return min(shared_bits(self.own_number, link.number) for link in near)

    def _neighbourhood(self, now: float) -> tuple[list[Link | Candidate], int]:
        """Return the K nearest we know of, linked or not, and the depth at which they begin."""
        known: list[Link | Candidate] = list(self._links.values())
        for bucket in self._buckets.values():
            known.extend(bucket.candidates(now))
        own = self.own_number
        known.sort(key=lambda each: each.number ^ own)
        near = diverse(known, K)
        depth = min((shared_bits(own, each.number) for each in near), default=0)
        return near, depth

    def _bucket(self, node_id: bytes) -> KBucket:
        index = self.bucket_index(node_id)
        if (bucket := self._buckets.get(index)) is None:
            bucket = self._buckets[index] = KBucket()
        return bucket


def diverse(ranked: Iterable[KnownT], count: int) -> list[KnownT]:
    """Return the first `count`, at most `NEAR_PER_PREFIX` of a prefix while there are others."""
    taken: list[KnownT] = []
    passed_over: list[KnownT] = []
    counts: Counter[str] = Counter()
    for each in ranked:
        prefix = each.prefix if isinstance(each, Link) else ""
        if prefix and counts[prefix] >= NEAR_PER_PREFIX:
            passed_over.append(each)
            continue
        counts[prefix] += 1
        taken.append(each)
        if len(taken) == count:
            return taken
    return taken + passed_over[: count - len(taken)]
