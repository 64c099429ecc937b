"""The mainline nodes a node knows: k-buckets by the length of the prefix shared with our id.

A node is good for 15 minutes after it answered us; a good one is never pushed out by a newcomer,
which is what keeps a flood of new nodes from taking a table over. Only nodes that have answered
come in. At one public address there is one node in the table, and of two where there is room for
one, the node whose id fits its address stays (BEP 42).

Source: BEP 5, Kademlia. Pure: the time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

from natswarm.address import AddressKind, Endpoint
from natswarm.discovery.krpc import ID_BYTES, Contact
from natswarm.discovery.mainline_id import distance, is_secure_id

__all__ = ["BUCKET_SIZE", "GOOD_FOR_S", "MainlineTable"]

BUCKET_SIZE = 8  # k of BEP 5
GOOD_FOR_S = 15 * 60.0  # BEP 5
FAILURES_MAX = 2


@dataclass(slots=True)
class _Entry:
    contact: Contact
    answered_at: float
    is_secure: bool
    failure_count: int = 0


class MainlineTable:
    """The table of one node.

    Args:
        own_id: 20 bytes.
    """

    def __init__(self, own_id: bytes) -> None:
        self.own_id = own_id
        self._buckets: dict[int, list[_Entry]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def contacts(self) -> list[Contact]:
        """Return all nodes, in a stable order."""
        return [entry.contact for index in sorted(self._buckets) for entry in self._buckets[index]]

    def note_answer(self, contact: Contact, now: float) -> None:
        """Take in a node that has answered us, or know it to be good again."""
        if contact.id == self.own_id:
            return
        self._forget_former_id(contact)
        bucket = self._buckets.setdefault(self._index(contact.id), [])
        for entry in bucket:
            if entry.contact == contact:
                entry.answered_at, entry.failure_count = now, 0
                return
            if entry.contact.id == contact.id and now < entry.answered_at + GOOD_FOR_S:
                return  # somebody else's id: who has it stays
        if not self._make_room(contact, bucket, now):
            return
        bucket.append(_Entry(contact, now, is_secure_id(contact.id, contact.endpoint.ip)))

    def _forget_former_id(self, contact: Contact) -> None:
        """A node that learned its address has taken another id, and left the old one."""
        for bucket in self._buckets.values():
            bucket[:] = [
                entry
                for entry in bucket
                if entry.contact.endpoint != contact.endpoint or entry.contact == contact
            ]

    def _make_room(self, contact: Contact, bucket: list[_Entry], now: float) -> bool:
        if contact.endpoint.kind is AddressKind.GLOBAL:
            for other in self.contacts():
                if other.endpoint.ip == contact.endpoint.ip:
                    return False
        bucket[:] = [entry for entry in bucket if entry.contact.id != contact.id]
        if len(bucket) < BUCKET_SIZE:
            return True
        is_secure = is_secure_id(contact.id, contact.endpoint.ip)
        for entry in bucket:
            is_bad = entry.failure_count > 0 and now >= entry.answered_at + GOOD_FOR_S
            if is_bad or (is_secure and not entry.is_secure):
                bucket.remove(entry)
                return True
        return False

    def has_room_for(self, contact: Contact) -> bool:
        """Whether a node that is not in the table would come in without pushing anybody out."""
        bucket = self._buckets.get(self._index(contact.id), [])
        is_public = contact.endpoint.kind is AddressKind.GLOBAL
        return len(bucket) < BUCKET_SIZE and not any(
            other.id == contact.id
            or other.endpoint == contact.endpoint
            or (is_public and other.endpoint.ip == contact.endpoint.ip)
            for other in self.contacts()
        )

    def note_failure(self, endpoint: Endpoint) -> None:
        """Take note that a node did not answer; after the second time in a row it goes."""
        for bucket in self._buckets.values():
            for entry in bucket:
                if entry.contact.endpoint == endpoint:
                    entry.failure_count += 1
            bucket[:] = [entry for entry in bucket if entry.failure_count < FAILURES_MAX]

    def closest(self, target: bytes, count: int = BUCKET_SIZE) -> list[Contact]:
        """Return the nodes closest to a target, the closest first."""
        return sorted(self.contacts(), key=lambda each: distance(each.id, target))[:count]

    def questionable(self, now: float, count: int) -> list[Contact]:
        """Return nodes that have not answered for 15 minutes, the stalest first."""
        stale = [
            entry
            for bucket in self._buckets.values()
            for entry in bucket
            if now >= entry.answered_at + GOOD_FOR_S
        ]
        stale.sort(key=lambda entry: (entry.answered_at, entry.contact))
        return [entry.contact for entry in stale[:count]]

    def rebuilt(self, own_id: bytes, now: float) -> MainlineTable:
        """Return a table of the same nodes around another id of ours."""
        table = MainlineTable(own_id)
        for contact in self.contacts():
            table.note_answer(contact, now)
        return table

    def _index(self, node_id: bytes) -> int:
        return 8 * ID_BYTES - distance(self.own_id, node_id).bit_length()
