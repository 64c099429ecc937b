"""The journal of a field test: append-only lines that survive a crash and a pulled cable.

Each record is one line, flushed and synced to the disk before the test goes on, so that a crash
loses at most the attempt under way. What was written is never changed: a line that a crash tore is
closed with a line feed and skipped by readers, who say so. A lock keeps two tests out of one file.

The slots that are done are those with a result that is not `void`; an attempt that only started
has none. So a resumed test neither repeats nor loses a result.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec

from natswarm.errors import ConfigurationError, DecodeError
from natswarm.field_test.records import (
    SCHEMA_VERSION,
    AttemptRecord,
    Begin,
    Record,
    Result,
)

__all__ = ["JOURNAL_NAME", "Journal", "JournalContents", "read_journal"]

JOURNAL_NAME = "journal.jsonl"
# What a record of ours can be at most is some 30 kB; a longer line is something else.
LINE_BYTES_MAX = 1_000_000


@dataclass(slots=True)
class JournalContents:
    """What a journal says.

    Attributes:
        records: In order.
        broken_lines: Numbers, from 1, of lines that are no records.
        is_torn: Whether the last line is one of them, or lacks its end: a crash.
        ends_in_line_feed: Whether one may append at once.
    """

    records: list[Record] = field(default_factory=list)
    broken_lines: list[int] = field(default_factory=list)
    is_torn: bool = False
    ends_in_line_feed: bool = True

    @property
    def begin(self) -> Begin:
        """The first line.

        Raises:
            DecodeError: There is none.
        """
        for record in self.records:
            if isinstance(record, Begin):
                return record
        raise DecodeError("the journal does not say what was tested: its first line is missing")

    @property
    def attempts(self) -> list[AttemptRecord]:
        """All that ended, `void` ones included."""
        return [record for record in self.records if isinstance(record, AttemptRecord)]

    @property
    def done_keys(self) -> set[str]:
        """Keys of the slots that have their result."""
        return {each.key for each in self.attempts if each.result is not Result.VOID}


def read_journal(path: Path) -> JournalContents:
    """Read a journal, whatever a crash did to it.

    Raises:
        ConfigurationError: The file cannot be read.
        DecodeError: It was written by a later version, in other words.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the journal {path}: {error.strerror}; name the folder of a field test"
        ) from error
    contents = JournalContents(ends_in_line_feed=not data or data.endswith(b"\n"))
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if len(line) > LINE_BYTES_MAX:
                raise msgspec.DecodeError("longer than any record")
            record: Record = msgspec.json.decode(line, type=Record)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            _check_schema(line, path)
            contents.broken_lines.append(number)
            continue
        if isinstance(record, Begin) and record.schema > SCHEMA_VERSION:
            _check_schema(line, path)
        contents.records.append(record)
    last = len(lines) - (1 if contents.ends_in_line_feed else 0)
    contents.is_torn = last in contents.broken_lines
    return contents


def _check_schema(line: bytes, path: Path) -> None:
    class Head(msgspec.Struct):
        schema: int = 0

    try:
        schema = msgspec.json.decode(line, type=Head).schema
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if schema > SCHEMA_VERSION:
        raise DecodeError(
            f"{path} was written by a later version (schema {schema}, this one reads up to "
            f"{SCHEMA_VERSION}): update natswarm"
        )


class Journal:
    """A journal that is written; a context manager.

    Args:
        folder: Where it is; made if it is not there.
        resume: Whether a journal must be there already. Otherwise none may be.

    Attributes:
        path: The file.
        contents: What it said when it was opened.

    Raises:
        ConfigurationError: There is one, or none; another test writes it; the folder is not ours.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.path = folder / JOURNAL_NAME
        if resume and not self.path.exists():
            raise ConfigurationError(
                f"{folder} holds no field test to resume: leave --resume out to begin one"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to {self.path}: {error.strerror}; name another folder with --out"
            ) from error
        try:
            self._lock()
            self.contents = read_journal(self.path)
            if self.contents.records and not resume:
                raise ConfigurationError(
                    f"{folder} holds a field test already: go on with --resume, or name another "
                    "folder with --out"
                )
            if not self.contents.ends_in_line_feed:
                self._write(b"\n")
            _sync_folder(folder)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def append(self, record: Record) -> None:
        """Write one record; it is on the disk when this returns.

        Raises:
            ConfigurationError: The disk is full or gone.
        """
        self._write(msgspec.json.encode(record) + b"\n")

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to {self.path}: {error.strerror}; the test stops so that no result "
                "gets lost. Make room, then go on with --resume"
            ) from error

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        import fcntl  # not on Windows

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                f"another field test writes to {self.path}: wait for its end, or name another "
                "folder with --out"
            ) from error


def _sync_folder(folder: Path) -> None:
    """Have the name of a new file on the disk, too."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
