"""End a text before the first of some strings, while it comes in pieces.

Tokens are not aligned with stop strings: one may begin in the middle of a token and end in another.
So the end of the text is held back as long as it may be the beginning of a stop string, and what
has been given out never has to be taken back. The result does not depend on how the text was cut:
of several stop strings the one that is complete first ends it, of two that are complete at once the
longer one.

This file does not know tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopFilter"]


class StopFilter:
    """Passes on a text up to the first stop string.

    Args:
        stop: Strings that end the text and are no part of it; none: everything is passed on.

    Raises:
        ValueError: One of them is empty.

    Attributes:
        is_stopped: Whether a stop string was met; nothing comes after that.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty")
        self.is_stopped = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> str:
        """Return what is certain to be in the text, now that this piece of it came."""
        if self.is_stopped:
            return ""
        text = self._held + piece
        # The first occurrence of each is also the first to be complete.
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if found:
            end, negative_length = min(found)
            self.is_stopped = True
            self._held = ""
            return text[: end + negative_length]
        count = self._open_count(text)
        self._held = text[len(text) - count :]
        return text[: len(text) - count]

    def finish(self) -> str:
        """Return what was held back, because no more text comes."""
        held, self._held = self._held, ""
        return held

    def _open_count(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0
