"""What a node tells its user as it happens."""

from __future__ import annotations

from dataclasses import dataclass

from natswarm.address import Endpoint
from natswarm.nat.profile import NatProfile
from natswarm.net.dialler import PunctureEnded, PunctureStarted
from natswarm.net.peer import Peer

__all__ = [
    "NodeEvent",
    "PathChanged",
    "PeerConnected",
    "PeerLost",
    "ProfileLearned",
    "PunctureEnded",
    "PunctureStarted",
]


@dataclass(frozen=True, slots=True)
class ProfileLearned:
    """The node found out what its NAT does."""

    profile: NatProfile


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A peer is authenticated and streams can flow."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A connection ended."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PathChanged:
    """A connection goes by another path, or has none for the time being; it lives on.

    Attributes:
        peer: Whose.
        old: Where the peer was; None: no path was alive.
        new: Where it is; None: no path is alive.
        reason: Why, in words.
    """

    peer: Peer
    old: Endpoint | None
    new: Endpoint | None
    reason: str


NodeEvent = (
    ProfileLearned | PunctureStarted | PunctureEnded | PeerConnected | PathChanged | PeerLost
)
