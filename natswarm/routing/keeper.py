"""Who keeps which record: publishing again and again, and handing on to newcomers.

A record lives on the K nodes nearest to its key. Its publisher stores it anew before it expires;
whoever takes it in first hands it to the others. In between nodes come and go: of those that hold
a record, the one nearest to its key gives it to nodes near the key that do not have it yet. Every
few minutes all of them show it to the nearest they know, and who has a later version sends it back:
so a replica that missed a version learns of it.

Source: Kademlia section 2.5. Knows no lookups; the overlay carries out what it says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from natswarm.errors import RequestRefused
from natswarm.identity import Identity
from natswarm.routing.distance import as_int
from natswarm.routing.kbucket import K
from natswarm.routing.protocol import RECORDS_PER_REPLICATE, Replicate
from natswarm.routing.record import Record, RecordKind
from natswarm.routing.store import RecordStore
from natswarm.routing.table import RoutingTable

__all__ = ["Keeper"]

# A record outlives two publications that failed.
LIFETIME_S = 3600.0
REPUBLISH_S = 1200.0
# How soon a publication that nobody took is tried again.
REPUBLISH_SOON_S = 30.0

HANDOVER_S = 30.0
SHOW_S = 300.0
# To one newcomer at a time: 16 records are 5 to 20 KB.
HANDOVER_RECORDS_MAX = 16


@dataclass(slots=True)
class _Publication:
    record: Record
    next_at: float


class Keeper:
    """The records of one node: its own and those it keeps for others.

    Args:
        identity: Signs what we publish.
        table: Whom we are linked to.
        store: The records we keep.
        rng: Draws jitter.
    """

    def __init__(
        self, identity: Identity, table: RoutingTable, store: RecordStore, rng: random.Random
    ) -> None:
        self._identity = identity
        self._table = table
        self._store = store
        self._rng = rng
        self._publications: dict[tuple[RecordKind, str], _Publication] = {}
        self._next_handover = 0.0
        self._next_show = 0.0

    # What we publish ------------------------------------------------------------------------------

    def publish(self, kind: RecordKind, topic: str, value: bytes, now: float) -> Record:
        """Return a new record, which is published again until `withdraw`.

        Raises:
            ValueError: Nobody would keep it.
        """
        record = Record(
            self._identity.peer_id, kind, topic, int(now * 1000), now + LIFETIME_S, value
        )
        known = self._publications.get((kind, topic))
        if known is not None and known.record.version >= record.version:
            record = replace(record, version=known.record.version + 1)
        if (complaint := record.complaint()) is not None:
            raise ValueError(complaint)
        next_at = now + REPUBLISH_S * self._rng.uniform(0.75, 1.0)
        self._publications[kind, topic] = _Publication(record, next_at)
        return record

    def withdraw(self, kind: RecordKind, topic: str) -> None:
        """Let a record expire."""
        self._publications.pop((kind, topic), None)

    def note_unpublished(self, record: Record, now: float) -> None:
        """Nobody took a record; it is tried again soon."""
        publication = self._publications.get((record.kind, record.topic))
        if publication is not None:
            publication.next_at = min(publication.next_at, now + REPUBLISH_SOON_S)

    def due_publications(self, now: float) -> list[Record]:
        """Return what is to be published again now."""
        due = [each for each in self._publications.values() if each.next_at <= now]
        return [
            self.publish(each.record.kind, each.record.topic, each.record.value, now)
            for each in due
        ]

    def next_timer(self) -> float:
        """Return when something is due."""
        times = [each.next_at for each in self._publications.values()]
        if len(self._store):
            times.append(self._next_handover)
        return min(times, default=float("inf"))

    # What we keep ---------------------------------------------------------------------------------

    def take_in(self, sealed: bytes, point: bytes, now: float) -> list[tuple[bytes, Replicate]]:
        """Store a record that was brought here to be stored.

        Args:
            sealed: The record.
            point: What it was brought here as the nearest to: its key, or a point near it.
            now: The time.

        Returns:
            To whom to hand it.

        Raises:
            RequestRefused: It is not kept.
        """
        stored = self._store.put(sealed, now)
        replicas = self._table.replicas(as_int(point), K - 1)
        fresh = [link.node_id for link in replicas if link.node_id not in stored.sent_to]
        stored.sent_to.update(fresh)
        return [(node_id, Replicate((stored.sealed,))) for node_id in fresh]

    def receive_untrusted(
        self, message: Replicate, neighbour: bytes, now: float
    ) -> list[tuple[bytes, Replicate]]:
        """Keep what a neighbour hands over; return later versions of it for the neighbour."""
        later: list[bytes] = []
        for sealed in message.records[:RECORDS_PER_REPLICATE]:
            try:
                stored = self._store.put(sealed, now)
            except RequestRefused:
                continue  # counted by the store
            stored.sent_to.add(neighbour)
            if stored.sealed != sealed and stored.record.expires_at_s > now:
                later.append(stored.sealed)
        return [(neighbour, Replicate(tuple(later)))] if later else []

    def due_handovers(self, now: float) -> Iterator[tuple[bytes, Replicate]]:
        """Yield what is to be handed to newcomers now."""
        if now < self._next_handover:
            return
        self._next_handover = now + HANDOVER_S * self._rng.uniform(0.75, 1.25)
        self._store.forget_old(now)
        is_show = now >= self._next_show
        if is_show:
            self._next_show = now + SHOW_S * self._rng.uniform(0.75, 1.25)
        batches: dict[bytes, list[bytes]] = {}
        for stored in self._store.alive(now):
            if stored.settled_at == self._table.change_count and not is_show:
                continue
            key = as_int(stored.record.key)
            replicas = self._table.replicas(key, K - 1)
            own = self._table.own_number ^ key
            holders = [link for link in replicas if link.node_id in stored.sent_to]
            is_nearest = not any(link.number ^ key < own for link in holders)
            # Where somebody nearer has it, that one sees to the rest; but its version may be old.
            if is_show and not is_nearest:
                stored.sent_to.discard(replicas[0].node_id)
            stored.settled_at = self._table.change_count
            for link in replicas if is_nearest else replicas[:1]:
                if link.node_id in stored.sent_to:
                    continue
                batch = batches.setdefault(link.node_id, [])
                if len(batch) < HANDOVER_RECORDS_MAX:
                    stored.sent_to.add(link.node_id)
                    batch.append(stored.sealed)
                else:
                    stored.settled_at = -1
        for node_id, batch in batches.items():
            for start in range(0, len(batch), RECORDS_PER_REPLICATE):
                yield node_id, Replicate(tuple(batch[start : start + RECORDS_PER_REPLICATE]))
