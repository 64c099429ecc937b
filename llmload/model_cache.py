"""What this device has found out about a model folder and need not find out again.

The hash of the whole model (a pass over every weight), graphs whose weights lie as the processor
wants them (seconds of work), and which settings are the fastest here. All of it can be made again,
so it lives in the cache folder of the user, and a folder that can't be written to only costs time.

A model folder is known by its path and by the sizes and times of its files: whoever changes a file
gets a new entry, and the old one is removed.

This file does not know what is kept, only where.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

from llmload.config import CONFIG_FILE_NAME
from llmload.weights import weights_files

__all__ = ["ModelCache"]

_FACTS_FILE_NAME = "facts.json"
# A few facts of a few hundred bytes; more is damage.
_MAX_FACTS_BYTES = 1_000_000


class ModelCache:
    """The entry of one model folder, as the folder is now.

    Args:
        folder: The model folder.
        root: Where entries lie; None for the cache folder of the user.

    Raises:
        ModelFolderError: The folder has no weights.
    """

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        folder = folder.resolve()
        files = [folder / CONFIG_FILE_NAME, *weights_files(folder)]
        state = [str(folder)]
        for file in files:
            with suppress(OSError):  # whoever reads it next says that it is missing
                found = file.stat()
                state.append(f"{file.name} {found.st_size} {found.st_mtime_ns}")
        root = platformdirs.user_cache_path("llmload", appauthor=False) if root is None else root
        # Entries of one folder share a beginning, so that those of its past are found.
        self._of_folder = hashlib.sha256(state[0].encode()).hexdigest()[:12]
        self._root = root
        self.path = (
            root / f"{self._of_folder}-{hashlib.sha256(repr(state).encode()).hexdigest()[:12]}"
        )

    def recall(self, name: str) -> Any:
        """Return the fact that was remembered under `name`, or None."""
        return self._facts().get(name)

    def remember(self, name: str, value: Any) -> None:
        """Keep a fact, anything that JSON can hold; nothing happens where it can't be written."""
        with suppress(OSError):
            self._make()
            temporary = self.path / f".facts.{secrets.token_hex(4)}"
            temporary.write_text(json.dumps(self._facts() | {name: value}), encoding="utf-8")
            temporary.replace(self.path / _FACTS_FILE_NAME)

    def temporary_folder(self) -> Path:
        """Return a new empty folder in which something to keep is made.

        Raises:
            OSError: It can't be made.
        """
        self._make()
        folder = self.path / f".new-{secrets.token_hex(4)}"
        folder.mkdir()
        return folder

    def _facts(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, RecursionError):
            file = self.path / _FACTS_FILE_NAME
            if file.stat().st_size <= _MAX_FACTS_BYTES:
                facts = json.loads(file.read_text(encoding="utf-8"))
                if isinstance(facts, dict):
                    return facts
        return {}

    def _make(self) -> None:
        if self.path.is_dir():
            return
        self.path.mkdir(parents=True)
        for other in self._root.glob(f"{self._of_folder}-*"):
            if other != self.path:
                shutil.rmtree(other, ignore_errors=True)
