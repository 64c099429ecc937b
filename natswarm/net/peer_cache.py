"""The peer cache on disk: one SQLite file in the state folder.

It lives in `net`, not in `discovery`, since it touches a file, threads and the clock of the disk;
what is worth remembering is the pure `discovery/cache.py`'s affair. SQLite, since a phone's battery
ends in the middle of a write: in WAL mode what was committed is there after the process is killed,
and the file is whole after the power fails, short perhaps of the last seconds.

A file that is damaged, or something else, is set aside as `NAME.damaged`, one warning says so, and
an empty one takes its place: a cache is worth no crash. Each call opens the file, works in a thread
and closes it, about 2 ms: between calls nothing is held that a crash could leave behind.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from natswarm.address import Endpoint
from natswarm.discovery.cache import NETWORKS_MAX, PEERS_MAX, CachedPeer, Sightings
from natswarm.errors import ConfigurationError, NatswarmError
from natswarm.identity import PeerId

__all__ = ["PeerCache", "PeerStore"]

logger = logging.getLogger("natswarm.cache")

# "nsw" and the version of the schema; a file of another one is set aside, not guessed at.
APPLICATION_ID = 0x6E737701
SCHEMA = """
CREATE TABLE peers (
    peer_id BLOB PRIMARY KEY,
    sealed_record BLOB,
    is_open INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE sightings (
    peer_id BLOB NOT NULL REFERENCES peers ON DELETE CASCADE,
    network TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    answered_count REAL NOT NULL,
    silent_count REAL NOT NULL,
    answered_at_s REAL NOT NULL,
    silent_at_s REAL NOT NULL,
    PRIMARY KEY (peer_id, network)
) WITHOUT ROWID;
"""
# Another process of ours writes for milliseconds.
BUSY_TIMEOUT_S = 2.0
BUSY_TRIES = 40

T = TypeVar("T")


class PeerStore(Protocol):
    """Where a node keeps what it remembers of peers."""

    async def load(self) -> list[CachedPeer]:
        """Return all that is kept.

        Raises:
            NatswarmError: It cannot be read now.
        """
        ...

    async def save(self, changed: Sequence[CachedPeer], forgotten: Sequence[PeerId]) -> None:
        """Keep these, instead of what was kept of the same peers, and forget those.

        Raises:
            NatswarmError: It cannot be written now; nothing has changed.
        """
        ...


class PeerCache:
    """A `PeerStore` in one file.

    Args:
        path: The file; it and its folder are made when first needed, readable by this user alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # One writer at a time; the limiter also keeps calls in order.
        self._turn = trio.CapacityLimiter(1)

    async def load(self) -> list[CachedPeer]:
        """See `PeerStore.load`; at most 512 peers. Rows that make no sense are left out."""
        return await trio.to_thread.run_sync(self._call, _load, limiter=self._turn)

    async def save(self, changed: Sequence[CachedPeer], forgotten: Sequence[PeerId]) -> None:
        """See `PeerStore.save`; all or nothing. Cancelled, it finishes first."""
        call = partial(_save, changed=changed, forgotten=forgotten)
        await trio.to_thread.run_sync(self._call, call, limiter=self._turn)

    def _call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Work on the open file; a damaged one is set aside, once.

        Raises:
            ConfigurationError: The file cannot be used: not writable, disk full, in use.
        """
        try:
            try:
                return self._attempt(work)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                self._set_aside(str(error))
                return self._attempt(work)
        except (sqlite3.Error, OSError) as error:
            raise ConfigurationError(
                f"cannot use the peer cache {self._path}: {error}; going on without it. Free the "
                "disk or repair the permissions, or choose another folder with --state"
            ) from error

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path.touch(mode=0o600)
        with contextlib.closing(
            sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        ) as connection:
            _prepare(connection)
            return work(connection)

    def _set_aside(self, why: str) -> None:
        damaged = self._path.with_name(self._path.name + ".damaged")
        self._path.replace(damaged)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        logger.warning(
            "the peer cache was damaged (%s): it is now %s, and an empty one takes its place. "
            "If no peer is found, join once more by an invite",
            why,
            damaged,
        )


def _prepare(connection: sqlite3.Connection) -> None:
    _enter_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    with _transaction(connection):
        [application_id] = connection.execute("PRAGMA application_id").fetchone()
        [table_count] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application_id == 0 and table_count == 0:
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        elif application_id != APPLICATION_ID:
            raise sqlite3.DatabaseError("it is not a peer cache of this version")


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Turn on write-ahead logging, which two who open a new file at once refuse each other.

    SQLite does not wait with its busy timeout here, as both may hold a lock the other needs.
    """
    for _ in range(BUSY_TRIES):
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")
            return
        time.sleep(BUSY_TIMEOUT_S / BUSY_TRIES)  # in a thread of its own
    connection.execute("PRAGMA journal_mode = WAL")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what the body does, or nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _load(connection: sqlite3.Connection) -> list[CachedPeer]:
    [verdict] = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    sightings: dict[bytes, list[Sightings]] = {}
    for peer_id, *row in connection.execute(
        "SELECT * FROM sightings ORDER BY max(answered_at_s, silent_at_s) DESC LIMIT ?",
        (PEERS_MAX * NETWORKS_MAX,),
    ):
        if (one := _sightings_of(row)) is not None:
            sightings.setdefault(peer_id, []).append(one)
    peers = []
    for peer_id, sealed_record, is_open in connection.execute(
        "SELECT * FROM peers LIMIT ?", (PEERS_MAX,)
    ):
        with contextlib.suppress(NatswarmError, TypeError):
            peers.append(
                CachedPeer(
                    PeerId.decode_untrusted(peer_id),
                    sealed_record if isinstance(sealed_record, bytes) else None,
                    bool(is_open),
                    tuple(sightings.get(peer_id, [])[:NETWORKS_MAX]),
                )
            )
    return peers


def _sightings_of(row: Sequence[object]) -> Sightings | None:
    network, endpoint, *numbers = row
    figures = [number for number in numbers if isinstance(number, float)]
    if len(figures) < len(numbers):
        return None
    with contextlib.suppress(NatswarmError):
        return Sightings(str(network), Endpoint.parse(str(endpoint)), *figures)
    return None


def _save(
    connection: sqlite3.Connection, *, changed: Iterable[CachedPeer], forgotten: Iterable[PeerId]
) -> None:
    with _transaction(connection):
        for peer_id in forgotten:
            connection.execute("DELETE FROM peers WHERE peer_id = ?", (peer_id.key,))
        for peer in changed:
            connection.execute("DELETE FROM peers WHERE peer_id = ?", (peer.peer_id.key,))
            connection.execute(
                "INSERT INTO peers VALUES (?, ?, ?)",
                (peer.peer_id.key, peer.sealed_record, peer.is_open),
            )
            connection.executemany(
                "INSERT INTO sightings VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        peer.peer_id.key,
                        each.network,
                        str(each.endpoint),
                        each.answered_count,
                        each.silent_count,
                        each.answered_at_s,
                        each.silent_at_s,
                    )
                    for each in peer.sightings
                ],
            )
