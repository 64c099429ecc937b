"""The records a node keeps for others: only genuine, only the latest, only so many.

What has expired is not served any more, but its version is remembered for as long as an older one
could still be alive: otherwise a replica that missed the new version would bring the old one back.

Source: BEP 44 for the rules on versions. Knows no neighbours; `now` is seconds since 1970.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from natswarm.errors import DecodeError, RequestRefused
from natswarm.routing.distance import as_int
from natswarm.routing.record import LIFETIME_MAX_S, Record, decode_published_untrusted

__all__ = ["RecordStore", "StoredRecord"]

# 2,000 records of 300 bytes usually, 4 MB at worst: what a phone can spare. With 8 replicas each,
# that is 250 records for every node of the swarm.
RECORDS_MAX = 2000
# Of one publisher, over all keys: a device has a profile, a few services and meeting points.
PER_PUBLISHER_MAX = 32
# Of one key: services that many offer are answered with a sample anyway.
PER_KEY_MAX = 64

# What one answer holds: within the bound of answers, protocol.BODY_BYTES_MAX.
ANSWER_BYTES_MAX = 4096


@dataclass(slots=True, eq=False)
class StoredRecord:
    """A record and its way here.

    Attributes:
        record: Opened and checked.
        sealed: As it was signed.
        kept_until_s: When it may be forgotten altogether.
        sent_to: Links that have got this version from us.
        settled_at: The table's `change_count` when there was nobody left to hand it to.
    """

    record: Record
    sealed: bytes
    kept_until_s: float
    sent_to: set[bytes] = field(default_factory=set)  # only asked for membership, never iterated
    settled_at: int = -1


class RecordStore:
    """Keeps records.

    Args:
        own_id: Our id; of too many records those farthest from it go first.
        rng: Draws samples of services that many offer.
    """

    def __init__(self, own_id: bytes, rng: random.Random) -> None:
        self._own_number = as_int(own_id)
        self._rng = rng
        self._keys: dict[bytes, dict[bytes, StoredRecord]] = {}
        self._by_sealed: dict[bytes, StoredRecord] = {}
        self._publishers: dict[bytes, int] = {}
        self.refused_count = 0

    def __len__(self) -> int:
        return len(self._by_sealed)

    def put(self, sealed: bytes, now: float) -> StoredRecord:
        """Keep a record; return it as it is kept, which is a later version if there is one.

        Raises:
            RequestRefused: Not genuine, expired, or one too many; says which.
        """
        if (known := self._by_sealed.get(sealed)) is not None and known.record.expires_at_s > now:
            return known  # replicas show each other what they have: its signature was checked
        try:
            record = decode_published_untrusted(sealed)
        except DecodeError as error:
            self.refused_count += 1
            raise RequestRefused(str(error)) from error
        if (complaint := record.complaint_at(now)) is not None:
            self.refused_count += 1
            raise RequestRefused(complaint)
        publisher = record.publisher.key
        at_key = self._keys.get(record.key, {})
        if (known := at_key.get(publisher)) is not None:
            # Two records of one version: all replicas must end with the same one.
            if (record.version, sealed) <= (known.record.version, known.sealed):
                return known
            self._remove(known)
        elif self._publishers.get(publisher, 0) >= PER_PUBLISHER_MAX:
            self.refused_count += 1
            raise RequestRefused(f"I keep at most {PER_PUBLISHER_MAX} records of one publisher")
        elif len(at_key) >= PER_KEY_MAX:
            # Any of them: who publishes most often must not be able to push the others out.
            self._remove(self._rng.choice(list(at_key.values())))
        elif len(self) >= RECORDS_MAX:
            self._make_room(record.key, now)
        stored = StoredRecord(record, sealed, max(record.expires_at_s, now + LIFETIME_MAX_S))
        self._keys.setdefault(record.key, {})[publisher] = self._by_sealed[sealed] = stored
        self._publishers[publisher] = self._publishers.get(publisher, 0) + 1
        return stored

    def get(self, key: bytes, now: float) -> tuple[bytes, ...]:
        """Return the signed records of a key, a sample if they do not fit into one answer."""
        alive = [
            stored.sealed
            for stored in self._keys.get(key, {}).values()
            if stored.record.expires_at_s > now
        ]
        self._rng.shuffle(alive)
        room = ANSWER_BYTES_MAX
        answer = []
        for sealed in alive:
            if len(sealed) <= room:
                room -= len(sealed)
                answer.append(sealed)
        return tuple(answer)

    def alive(self, now: float) -> list[StoredRecord]:
        """Return every record that has not expired, by key."""
        return [
            stored
            for at_key in self._keys.values()
            for stored in at_key.values()
            if stored.record.expires_at_s > now
        ]

    def forget_old(self, now: float) -> None:
        """Drop what is of no use any more, also as a memory of versions."""
        for stored in [
            each
            for at_key in self._keys.values()
            for each in at_key.values()
            if each.kept_until_s <= now
        ]:
            self._remove(stored)

    def _make_room(self, key: bytes, now: float) -> None:
        """Drop the record farthest from us.

        Raises:
            RequestRefused: It would be the new one.
        """
        self.forget_old(now)
        if len(self) < RECORDS_MAX:
            return
        farthest = max(self._keys, key=self._distance)
        if self._distance(key) >= self._distance(farthest):
            self.refused_count += 1
            raise RequestRefused(f"I keep at most {RECORDS_MAX} records, and nearer ones")
        self._remove(next(iter(self._keys[farthest].values())))

    def _distance(self, key: bytes) -> int:
        return as_int(key) ^ self._own_number

    def _remove(self, stored: StoredRecord) -> None:
        key, publisher = stored.record.key, stored.record.publisher.key
        at_key = self._keys[key]
        del at_key[publisher], self._by_sealed[stored.sealed]
        if not at_key:
            del self._keys[key]
        self._publishers[publisher] -= 1
        if not self._publishers[publisher]:
            del self._publishers[publisher]
