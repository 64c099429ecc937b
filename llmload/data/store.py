"""The records of this device: one SQLite file in the state folder.

    records   each with who gave it and whether others may have it, in the order in which they came;
              of a forgotten one only what is needed to know it again
    bands     where to look for a text that is nearly the same (`near.py`)
    refused   ids of what others gave and we had, so that it is not given again

What `add`, `share` and `forget` have returned from is on the disk: a killed process or a dead
battery loses nothing of it (WAL, synced at each commit), and a full disk leaves all as it was. What
is forgotten is overwritten. Each call opens the file and closes it, 2 ms without the disk's own
time, so a command and a learner may use one store side by side; all calls block.

This file does not know peers' standing, or how records travel.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

import numpy as np

from llmload.data.near import NEAR, band_keys, normalise, resemblance, signature
from llmload.data.record import SignedRecord, TextRecord, open_record_untrusted
from llmload.errors import StoreFailed
from natswarm import DecodeError, PeerId

__all__ = ["RECEIVED_BYTES_MAX", "Added", "RecordStore", "StoredRecord"]

# "llr" and the version of the schema.
APPLICATION_ID = 0x6C6C7201
SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    record_id BLOB NOT NULL UNIQUE,
    digest BLOB NOT NULL UNIQUE,
    smallest BLOB NOT NULL,
    sealed BLOB,
    byte_count INTEGER NOT NULL,
    giver BLOB,
    is_shared INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS records_giver ON records (giver);
CREATE TABLE IF NOT EXISTS bands (
    key INTEGER NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (key, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refused (
    number INTEGER PRIMARY KEY AUTOINCREMENT, record_id BLOB NOT NULL UNIQUE
);
"""
# Another process of ours writes for as long as the disk takes.
BUSY_TIMEOUT_S = 10.0
BUSY_TRIES = 100
# Of others: as text some 20 million tokens, days of training on a phone.
RECEIVED_BYTES_MAX = 64_000_000
# The latest; what a peer gives again and again fills nobody's disk.
REFUSED_MAX = 50_000
# Texts made to share a band with everything must not make each question a long one.
CANDIDATES_MAX = 64

T = TypeVar("T")


class Added(Enum):
    """What became of a record that was to be added.

    `REPEATED` and `NEAR` also where the other one was forgotten: what is forgotten stays away.
    """

    TAKEN = "taken"
    REPEATED = "there already"
    NEAR = "nearly the same as one that is there"
    FULL = "no room for more of others"


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record and what we know of it.

    Attributes:
        number: Rising in the order of adding.
        signed: The record.
        giver: Who gave it to us; None for those of this device.
        is_shared: Whether others may have it.
    """

    number: int
    signed: SignedRecord
    giver: PeerId | None
    is_shared: bool


class RecordStore:
    """All records of this device.

    Args:
        path: The file; it and its folder are made when first needed, readable by this user alone.
        received_bytes_max: Of what others gave.

    All methods raise `StoreFailed` where the file can't be read or written; nothing has changed
    then.
    """

    def __init__(self, path: Path, *, received_bytes_max: int = RECEIVED_BYTES_MAX) -> None:
        self._path = path
        self._received_bytes_max = received_bytes_max

    def add(
        self,
        records: Iterable[SignedRecord],
        *,
        giver: PeerId | None = None,
        is_shared: bool = False,
    ) -> list[Added]:
        """Keep records, all that are new or none.

        Args:
            records: With right signatures.
            giver: Who gave them; None: this device's own.
            is_shared: Whether others may have them.

        Raises:
            ValueError: To be shared without a licence.
        """
        records = list(records)
        if is_shared and not all(signed.record.licence for signed in records):
            raise ValueError("a record without a licence can't be shared")

        def work(connection: sqlite3.Connection) -> list[Added]:
            with _transaction(connection):
                results = [
                    self._add(connection, signed, giver=giver, is_shared=is_shared)
                    for signed in records
                ]
                if giver is not None:
                    _refuse(connection, records, results)
                return results

        return self._call(work)

    def records(self, *, after: int = 0) -> list[StoredRecord]:
        """Return the records in the order of adding, but for the forgotten.

        Args:
            after: Only those with higher numbers.
        """
        return self._call(lambda connection: _read(connection, "number > ?", (after,)))

    def find(self, prefix: bytes) -> list[StoredRecord]:
        """Return the records whose ids begin so, but for the forgotten."""
        return self._call(
            lambda connection: _read(
                connection, "substr(record_id, 1, ?) = ?", (len(prefix), prefix)
            )
        )

    def told_ids(self) -> list[bytes]:
        """Return the ids of which others may learn that we have them, or want them no more.

        All that others gave, kept or not, and all that was ever shared. Not those of private
        records: by them anybody could find out whether a text that he guesses is here.
        """
        return self._call(
            lambda connection: [
                row[0]
                for row in connection.execute(
                    "SELECT record_id FROM records WHERE giver IS NOT NULL OR is_shared "
                    "UNION SELECT record_id FROM refused"
                )
            ]
        )

    def shared_ids(self, is_wanted: Callable[[PeerId], bool] | None = None) -> list[bytes]:
        """Return the ids of the records that others may have.

        Args:
            is_wanted: Whether those that a peer gave us are among them; None for all.
        """

        def work(connection: sqlite3.Connection) -> list[bytes]:
            of_giver: dict[bytes | None, list[bytes]] = {}
            for record_id, giver in connection.execute(
                "SELECT record_id, giver FROM records WHERE is_shared AND sealed IS NOT NULL"
            ):
                of_giver.setdefault(giver, []).append(record_id)
            return [
                record_id
                for giver, record_ids in of_giver.items()
                if giver is None or is_wanted is None or is_wanted(PeerId(giver))
                for record_id in record_ids
            ]

        return self._call(work)

    def shared(self, record_ids: Sequence[bytes]) -> list[SignedRecord]:
        """Return those of some records that others may have."""

        def work(connection: sqlite3.Connection) -> list[SignedRecord]:
            return [
                found.signed
                for record_id in record_ids
                for found in _read(connection, "record_id = ? AND is_shared", (record_id,))
            ]

        return self._call(work)

    def received_bytes(self, giver: PeerId) -> int:
        """Return how much we have taken from a peer, forgotten records too."""

        def work(connection: sqlite3.Connection) -> int:
            [count] = connection.execute(
                "SELECT coalesce(sum(byte_count), 0) FROM records WHERE giver = ?", (giver.key,)
            ).fetchone()
            return int(count)

        return self._call(work)

    def share(self, records: Mapping[bytes, SignedRecord]) -> None:
        """Let others have records, from now on.

        Args:
            records: By the id that each has now: as others get it, which may have got a licence.

        Raises:
            ValueError: One has no licence; nothing was done.
        """
        if not all(signed.record.licence for signed in records.values()):
            raise ValueError("a record without a licence can't be shared")
        self._each(
            "UPDATE records SET record_id = ?, sealed = ?, byte_count = ?, is_shared = 1 "
            "WHERE record_id = ? AND sealed IS NOT NULL",
            [
                (signed.record_id, signed.sealed, len(signed.sealed), record_id)
                for record_id, signed in records.items()
            ],
        )

    def forget(self, record_ids: Sequence[bytes]) -> None:
        """Remove the text of records, and take neither them nor nearly the same again."""
        self._each(
            "UPDATE records SET sealed = NULL WHERE record_id = ?",
            [(record_id,) for record_id in record_ids],
        )
        # The text is overwritten in the file, but the log still holds the page.
        self._call(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close())

    def _add(
        self,
        connection: sqlite3.Connection,
        signed: SignedRecord,
        *,
        giver: PeerId | None,
        is_shared: bool,
    ) -> Added:
        digest = _digest(signed)
        if connection.execute(
            "SELECT 1 FROM records WHERE record_id = ? OR digest = ?", (signed.record_id, digest)
        ).fetchone():
            return Added.REPEATED
        if giver is not None:
            [received] = connection.execute(
                "SELECT coalesce(sum(byte_count), 0) FROM records WHERE giver IS NOT NULL"
            ).fetchone()
            if received + len(signed.sealed) > self._received_bytes_max:
                return Added.FULL
        keys, smallest = [], b""
        # Two people's marks on one answer are two facts: of feedback nothing is nearly the same.
        if isinstance(signed.record, TextRecord):
            ours = signature(signed.record.text)
            keys, smallest = band_keys(ours), ours.astype("<u4").tobytes()
            for [other] in connection.execute(
                "SELECT DISTINCT smallest FROM bands JOIN records USING (number) "
                f"WHERE key IN ({', '.join('?' * len(keys))}) LIMIT {CANDIDATES_MAX}",
                keys,
            ):
                if resemblance(ours, np.frombuffer(other, dtype="<u4")) >= NEAR:
                    return Added.NEAR
        number = connection.execute(
            "INSERT INTO records (record_id, digest, smallest, sealed, byte_count, giver, "
            "is_shared) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                signed.record_id,
                digest,
                smallest,
                signed.sealed,
                len(signed.sealed),
                None if giver is None else giver.key,
                is_shared,
            ),
        ).lastrowid
        connection.executemany("INSERT INTO bands VALUES (?, ?)", [(key, number) for key in keys])
        return Added.TAKEN

    def _each(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                connection.executemany(statement, rows)

        self._call(work)

    def _call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.touch(mode=0o600)
            with closing(
                sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            ) as connection:
                _prepare(connection)
                return work(connection)
        except (sqlite3.Error, OSError) as error:
            raise StoreFailed(
                f"cannot use the records in {self._path}: {error}; nothing of them has changed. "
                "Free the disk or repair the permissions; if the file is damaged, put back a copy, "
                "or move it away to begin without any"
            ) from error


def _prepare(connection: sqlite3.Connection) -> None:
    _enter_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    [application_id] = connection.execute("PRAGMA application_id").fetchone()
    if application_id == APPLICATION_ID:
        return
    with _transaction(connection):
        [application_id] = connection.execute("PRAGMA application_id").fetchone()
        [table_count] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if table_count and application_id != APPLICATION_ID:
            raise sqlite3.DatabaseError("it is no store of records of this version")
        for statement in SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Turn on write-ahead logging; two who open a new file at once refuse each other at once."""
    for _ in range(BUSY_TRIES):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            time.sleep(BUSY_TIMEOUT_S / BUSY_TRIES)  # of a command, or in a thread of its own
        else:
            return
    raise sqlite3.OperationalError("another process keeps it locked")


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what the body does, or nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _read(
    connection: sqlite3.Connection, condition: str, values: Sequence[object]
) -> list[StoredRecord]:
    found = []
    for number, sealed, giver, is_shared in connection.execute(
        "SELECT number, sealed, giver, is_shared FROM records "
        f"WHERE sealed IS NOT NULL AND {condition} ORDER BY number",
        values,
    ):
        try:
            signed = open_record_untrusted(sealed)
            source = None if giver is None else PeerId.decode_untrusted(giver)
        except DecodeError as error:
            raise sqlite3.DatabaseError(f"record {number} is damaged: {error}") from error
        found.append(StoredRecord(number, signed, source, bool(is_shared)))
    return found


def _refuse(
    connection: sqlite3.Connection, records: Sequence[SignedRecord], results: Sequence[Added]
) -> None:
    """Remember what others gave in vain."""
    connection.executemany(
        "INSERT OR IGNORE INTO refused (record_id) VALUES (?)",
        [
            (signed.record_id,)
            for signed, result in zip(records, results, strict=True)
            if result in (Added.REPEATED, Added.NEAR)
        ],
    )
    connection.execute(
        "DELETE FROM refused WHERE number <= (SELECT max(number) FROM refused) - ?", (REFUSED_MAX,)
    )


def _digest(signed: SignedRecord) -> bytes:
    """Return what is equal for records that say the same: of feedback, those of one author."""
    record = signed.record
    if isinstance(record, TextRecord):
        return hashlib.sha256(normalise(record.text)).digest()
    said = (str(signed.author), record.prompt, record.answer, str(record.mark))
    return hashlib.sha256("\0".join(said).encode()).digest()
