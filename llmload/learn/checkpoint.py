"""Training that survives a crash at any byte.

    folder/checkpoint-<step>.safetensors    vectors, and in its metadata numbers and a SHA-256

A checkpoint is written beside the others under a temporary name, synced, renamed, and only then the
oldest go; so at every moment the latest whole one is there, whatever was cut off. Reading goes from
the newest back to the first whose checksum is right.

What is kept follows from what is needed to go on bit for bit: parameters, the state of the
optimiser and of the outer loop, and where in the text we were.

This file does not know what the vectors are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmload.learn.shards import Vector
from llmload.weights import replace_file

__all__ = [
    "Checkpoint",
    "checkpoint_file",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "stored_digest",
]

# The one before the last is for a disk that lies about what it has written.
KEPT_COUNT = 2

_NAME = re.compile(r"checkpoint-(\d{1,15})\.safetensors", re.ASCII)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What is needed to go on.

    Attributes:
        step: Steps made.
        vectors: float32 arrays by name.
        facts: Anything that JSON can hold.
    """

    step: int
    vectors: Mapping[str, Vector]
    facts: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, then remove all but the latest ones; return its path.

    Raises:
        OSError: It can't be written, for example because the disk is full. The earlier ones stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vectors = {name: np.ascontiguousarray(values) for name, values in checkpoint.vectors.items()}
    facts = json.dumps(dict(checkpoint.facts), sort_keys=True)
    metadata = {"facts": facts, "sha256": _digest(vectors, facts)}
    file = checkpoint_file(folder, checkpoint.step)
    try:
        replace_file(file, lambda path: save_file(vectors, path, metadata=metadata))
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"{file}: can't be written: {error}") from error
    _sync(folder)
    for _, old in _files(folder)[KEPT_COUNT:]:
        old.unlink(missing_ok=True)
    return file


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the latest whole checkpoint of a folder; None if there is none.

    Raises:
        OSError: A file is there and can't be read.
    """
    for step, file in _files(folder):
        if (checkpoint := read_checkpoint(file, step)) is not None:
            return checkpoint
    return None


def checkpoint_file(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is kept."""
    return folder / f"checkpoint-{step}.safetensors"


def read_checkpoint(file: Path, step: int) -> Checkpoint | None:
    """Return the checkpoint in a file; None if it is not whole.

    Raises:
        OSError: The file can't be read.
    """
    try:
        with safe_open(file, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            names = list(stored.keys())
            vectors = {name: stored.get_tensor(name) for name in names}
    except SafetensorError:
        return None
    if metadata.get("sha256") != _digest(vectors, metadata.get("facts", "")):
        return None
    return Checkpoint(step, vectors, json.loads(metadata["facts"]))


def stored_digest(file: Path) -> str | None:
    """Return the SHA-256 that a checkpoint says it has; None if it can't be read at all."""
    try:
        with safe_open(file, framework="numpy") as stored:
            return (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None


def _files(folder: Path) -> list[tuple[int, Path]]:
    """Return checkpoints and their steps, the latest first, damaged or not."""
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), file) for file in folder.iterdir() if (match := _NAME.fullmatch(file.name))
    ]
    return sorted(found, reverse=True)


def _digest(vectors: Mapping[str, Vector], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(vectors):
        digest.update(name.encode())
        digest.update(vectors[name].data)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Make a rename last; where folders can't be synced (Windows), renames are atomic only."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
