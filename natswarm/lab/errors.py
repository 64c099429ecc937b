"""What goes wrong in the laboratory, as one exception."""

from __future__ import annotations

from natswarm.errors import NatswarmError

__all__ = ["LabError"]


class LabError(NatswarmError):
    """A command in the laboratory failed or took too long; the text says which and what it said."""
