"""Begin a field test, or go on with one: the journal decides what was agreed."""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from natswarm.errors import ConfigurationError
from natswarm.field_test.journal import Journal
from natswarm.field_test.plan import FieldTestPlan
from natswarm.field_test.records import Begin, Record, Resume, Side, utc_text

__all__ = ["Session", "open_session", "versions"]


def versions() -> dict[str, str]:
    """Return what this device runs."""
    return {
        "natswarm": version("natswarm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "qh3": version("qh3"),
    }


class Session:
    """A field test whose journal is open; a context manager.

    Args:
        journal: Open; closed on leaving.
        begin: Its first line.
        earlier: What it held when it was opened.
        show: Told of every record that is written.
    """

    def __init__(
        self, journal: Journal, begin: Begin, earlier: list[Record], show: Callable[[Record], None]
    ) -> None:
        self._journal = journal
        self._show = show
        self.begin = begin
        self.earlier = earlier

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.__exit__()

    def append(self, record: Record) -> None:
        """Write a record, then show it."""
        self._journal.append(record)
        self._show(record)


def open_session(
    folder: Path,
    *,
    resume: bool,
    mode: str,
    plan: FieldTestPlan | None,
    sides: Sequence[Side],
    helper_count: int,
    full_addresses: bool,
    show: Callable[[Record], None],
    session: str = "",
) -> Session:
    """Open the journal of a field test and write its first line, or that it goes on.

    Args:
        folder: Where the journal is.
        resume: Whether it is there already.
        mode: `run`, `host` or `join`.
        plan: What to do; None: the default, or what the journal says.
        sides: Both.
        helper_count: How many observe and introduce.
        full_addresses: Whether whole addresses are written down.
        show: Told of every record that is written.
        session: Its name, where another device gave it one.

    Raises:
        ConfigurationError: It cannot be begun or resumed in this way; says why.
    """
    journal = Journal(folder, resume=resume)
    try:
        contents = journal.contents
        now = utc_text(time.time())
        if resume:
            begin = contents.begin
            if plan is not None and plan != begin.plan:
                raise ConfigurationError(
                    "the field test to resume has another plan: leave --plan out, or name another "
                    "folder with --out"
                )
            if begin.mode != mode or (session and session != begin.session):
                raise ConfigurationError(
                    f"the field test to resume is another one ({begin.mode}, {begin.session})"
                )
            if full_addresses and not begin.full_addresses:
                raise ConfigurationError(
                    "the field test to resume shortens addresses, and goes on to: leave "
                    "--full-addresses out"
                )
            first: Record = Resume(
                at=now,
                versions=versions(),
                sides=tuple(sides),
                torn_line_count=len(contents.broken_lines),
                done_count=len(contents.done_keys),
            )
        else:
            first = begin = Begin(
                at=now,
                session=session or secrets.token_hex(8),
                mode=mode,
                plan=plan or FieldTestPlan(),
                sides=tuple(sides),
                versions=versions(),
                helper_count=helper_count,
                full_addresses=full_addresses,
            )
        opened = Session(journal, begin, list(contents.records), show)
        opened.append(first)
    except BaseException:
        journal.__exit__()
        raise
    return opened
