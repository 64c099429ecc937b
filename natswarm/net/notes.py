"""Small things that a node remembers from run to run, each in a file of the state folder.

    invites.json    which invites are out, which are used up     discovery/invite_book.py
    recipes.json    which strategy opened which networks         puncture/recipes.py
    mainline.dat    mainline nodes that answered last time       discovery/mainline_files.py

A file is written beside and moved into place, some seconds after a change and at the end, so a
crash loses seconds and leaves no half a file. One that is damaged becomes `NAME.damaged`, with a
warning, and an empty one takes its place. A disk that is full or read-only is said once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self, TypeVar

import trio

from natswarm.discovery.invite_book import InviteBook
from natswarm.discovery.mainline_files import KnownNodes
from natswarm.errors import DecodeError
from natswarm.puncture.recipes import Recipes

__all__ = ["Notes"]

logger = logging.getLogger("natswarm.notes")

SAVE_S = 5.0
FILE_BYTES_MAX = 1 << 20


class _Book(Protocol):
    """What is kept in one file."""

    is_changed: bool

    def encode(self) -> bytes:
        """Return the stored form."""
        ...

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Read the stored form.

        Raises:
            DecodeError: Damaged, or of another version.
        """
        ...


BookT = TypeVar("BookT", bound=_Book)


@dataclass
class Notes:
    """What is remembered.

    Attributes:
        folder: Where; None: in memory alone.
        invites: Of ours that are out.
        recipes: What was learned of networks.
        mainline: Nodes of the mainline DHT to start from.
    """

    folder: Path | None = None
    invites: InviteBook = field(default_factory=InviteBook)
    recipes: Recipes = field(default_factory=Recipes)
    mainline: KnownNodes = field(default_factory=KnownNodes)
    _has_complained: bool = False

    @classmethod
    def load(cls, folder: Path) -> Notes:
        """Read what is in a folder; what is not there is empty."""
        return cls(
            folder,
            invites=_read(folder / "invites.json", InviteBook),
            recipes=_read(folder / "recipes.json", Recipes),
            mainline=_read(folder / "mainline.dat", KnownNodes),
        )

    async def run(self) -> None:
        """Save what changes, until cancelled."""
        while self.folder is not None:
            await trio.sleep(SAVE_S)
            await self.save()

    async def save(self) -> None:
        """Save what has changed; a disk that does not take it is only complained about."""
        books: tuple[tuple[str, _Book], ...] = (
            ("invites.json", self.invites),
            ("recipes.json", self.recipes),
            ("mainline.dat", self.mainline),
        )
        for name, book in books:
            if self.folder is None or not book.is_changed:
                continue
            book.is_changed = False
            try:
                await trio.to_thread.run_sync(_write, self.folder / name, book.encode())
            except OSError as error:
                book.is_changed = True
                if not self._has_complained:
                    self._has_complained = True
                    logger.warning(
                        "cannot write %s in %s: %s; going on without. Free the disk, repair the "
                        "permissions, or choose another folder with --state",
                        name,
                        self.folder,
                        error.strerror,
                    )


def _read(path: Path, kind: type[BookT]) -> BookT:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX)
    except FileNotFoundError:
        return kind()
    except OSError as error:
        logger.warning("cannot read %s: %s; going on without", path, error.strerror)
        return kind()
    try:
        book = kind.decode_untrusted(data)
    except DecodeError as error:
        damaged = path.with_name(path.name + ".damaged")
        with contextlib.suppress(OSError):
            path.replace(damaged)
        logger.warning("%s was damaged (%s): it is now %s", path, error, damaged)
        return kind()
    return book


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
