"""One iterative lookup: ask ever closer nodes, until the eight closest have answered.

Bounds: 4 questions under way, 64 in all; at one public address one node is asked, so that whoever
runs many nodes at one address cannot fill the shortlist. Who is silent or says nonsense is left
out. Source: BEP 5, Kademlia section 2.3. Knows no datagrams and no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from natswarm.address import AddressKind, Endpoint
from natswarm.discovery.krpc import Contact
from natswarm.discovery.mainline_id import distance
from natswarm.discovery.mainline_item import MutableItem
from natswarm.discovery.mainline_table import BUCKET_SIZE

__all__ = ["Lookup", "Purpose"]

ALPHA = 4
QUESTIONS_MAX = 64
SHORTLIST_MAX = 128
PEERS_MAX = 256


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a lookup is for.

    Attributes:
        method: `find_node`, `get_peers` or `get`.
        target: 20 bytes.
        announced_port: With `get_peers`: announce us at this port afterwards; None: do not.
        put: With `get`: put this item afterwards.
        owner_key: With `get`: whose item; 32 bytes.
        salt: With `get`: which item.
    """

    method: bytes
    target: bytes
    announced_port: int | None = None
    put: MutableItem | None = None
    owner_key: bytes = b""
    salt: bytes = b""


@dataclass(slots=True)
class Lookup:
    """A lookup under way.

    Attributes:
        purpose: What for.
        peers: Found so far, in order, at most 256.
        item: The newest found so far; its signature is good.
        stored_count: Nodes that took our announcement or item.
        storing: Such requests under way.
        has_stored: Whether they have begun.
    """

    purpose: Purpose
    peers: dict[Endpoint, None] = field(default_factory=dict)
    item: MutableItem | None = None
    stored_count: int = 0
    storing: int = 0
    has_stored: bool = False
    _shortlist: list[Contact] = field(default_factory=list)
    _asked: dict[Endpoint, None] = field(default_factory=dict)
    _waiting: dict[Endpoint, None] = field(default_factory=dict)
    _answered: dict[Contact, bytes] = field(default_factory=dict)

    def offer(self, contacts: Iterable[Contact]) -> None:
        """Take in nodes that somebody named."""
        for contact in contacts:
            if contact.endpoint in self._asked and contact not in self._answered:
                continue  # it was silent, or is asked at this moment
            if any(_are_one(contact.endpoint, other.endpoint) for other in self._shortlist):
                continue
            self._shortlist.append(contact)
        self._shortlist.sort(key=lambda each: distance(each.id, self.purpose.target))
        del self._shortlist[SHORTLIST_MAX:]

    def next_questions(self) -> list[Contact]:
        """Return whom to ask now; they count as asked."""
        questions = []
        # Beyond the eight closest that are alive nothing better can be found.
        for contact in self._shortlist[: BUCKET_SIZE + len(self._waiting)]:
            if len(self._waiting) >= ALPHA or len(self._asked) >= QUESTIONS_MAX:
                break
            if contact.endpoint not in self._asked:
                self._asked[contact.endpoint] = None
                self._waiting[contact.endpoint] = None
                questions.append(contact)
        return questions

    @property
    def is_over(self) -> bool:
        """Whether nobody is left to ask, once `next_questions` has returned nobody."""
        return not self._waiting

    def note_answer(self, contact: Contact, endpoint: Endpoint, token: bytes) -> None:
        """Take note of an answer; `contact` is who answered at `endpoint`."""
        self._waiting.pop(endpoint, None)
        # It may have another id than was said, or none was known: a node the user named.
        self._shortlist = [each for each in self._shortlist if each.endpoint != endpoint]
        self._answered[contact] = token
        self.offer([contact])

    def note_failure(self, endpoint: Endpoint) -> None:
        """Take note that a node does not answer."""
        self._waiting.pop(endpoint, None)
        self._shortlist = [each for each in self._shortlist if each.endpoint != endpoint]

    def add_peers(self, peers: Iterable[Endpoint]) -> None:
        """Take in peers of the info-hash."""
        for peer in peers:
            if len(self.peers) < PEERS_MAX:
                self.peers[peer] = None

    def closest_answered(self) -> list[tuple[Contact, bytes]]:
        """Return the eight closest nodes that answered, and the token of each."""
        ranked = sorted(
            self._answered.items(), key=lambda each: distance(each[0].id, self.purpose.target)
        )
        return ranked[:BUCKET_SIZE]


def _are_one(one: Endpoint, other: Endpoint) -> bool:
    return one == other or (one.ip == other.ip and one.kind is AddressKind.GLOBAL)
