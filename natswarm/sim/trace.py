"""What to do with the trace of a world: a digest to compare runs, or lines to read.

Two runs of one seed must agree in every step, whatever Python's hash seed; comparing one digest
shows whether they do, and the lines show where they part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

__all__ = ["TraceDigest", "TraceLines"]


class TraceDigest:
    """A `Trace` that keeps only a digest and a count."""

    def __init__(self) -> None:
        self.step_count = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def __call__(self, time: float, event: str, where: str, about: object) -> None:
        """Take in one step."""
        self.step_count += 1
        self._digest.update(f"{time!r} {event} {where} {about!r}\n".encode())

    def hexdigest(self) -> str:
        """Return the digest of all steps so far, 32 hexadecimal digits."""
        return self._digest.hexdigest()


class TraceLines:
    """A `Trace` that hands one readable line a step to `write`, such as `print`."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def __call__(self, time: float, event: str, where: str, about: object) -> None:
        """Write one step."""
        self._write(f"{time * 1000:12.3f} ms  {where:<16} {event:<12} {about}")
