"""Data of a stream that came before what belongs in front of them.

Lanes overtake each other. Adjacent pieces are joined, so that many small ones cost no more than
one. Pure; whoever calls bounds the bytes, by the stream's credit.
"""

from __future__ import annotations

from natswarm.net.frames import ProtocolViolation

__all__ = ["MAX_PIECES", "MIN_PIECE_BYTES", "Reassembly"]

# What a lane other than the first carries at least in one frame, but for the end of what was sent
# in one go, which is over 64 KiB (`Multiplexer.send_data`): a window of 4 MiB holds at most
# 1,024 pieces, and as many of the first lane may lie between them.
MIN_PIECE_BYTES = 4 * 1024
MAX_PIECES = 4096


class Reassembly:
    """Pieces by their position."""

    def __init__(self) -> None:
        self._pieces: dict[int, bytearray] = {}
        self._starts: dict[int, int] = {}  # by where they end

    def __len__(self) -> int:
        """Return how many bytes wait."""
        return sum(map(len, self._pieces.values()))

    def add(self, position: int, data: memoryview) -> None:
        """Keep data until what is in front of them is there.

        Raises:
            ProtocolViolation: Too many pieces, or one twice.
        """
        start = self._starts.pop(position, None)
        if start is None:
            if position in self._pieces:
                raise ProtocolViolation(f"position {position} of a stream came twice")
            start = position
        piece = self._pieces.setdefault(start, bytearray())
        piece += data
        self._starts[start + len(piece)] = start
        if len(self._pieces) > MAX_PIECES:
            raise ProtocolViolation(f"more than {MAX_PIECES} holes in a stream")

    def take(self, position: int) -> bytearray | None:
        """Remove and return what was waiting for exactly this position."""
        piece = self._pieces.pop(position, None)
        if piece is not None:
            self._starts.pop(position + len(piece), None)
        return piece

    def clear(self) -> None:
        """Drop everything."""
        self._pieces.clear()
        self._starts.clear()
