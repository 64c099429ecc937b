"""What the table of a NAT holds: mappings and their sessions; `nat.py` says what they are."""

from __future__ import annotations

from natswarm.address import Endpoint

__all__ = ["Key", "PortMapping", "Session"]

Key = tuple[object, ...]


class PortMapping:
    """An external port given to an internal endpoint."""

    __slots__ = ("claims", "dies_at", "expires", "external", "internal", "key", "permitted", "slot")

    def __init__(
        self, key: Key | None, internal: Endpoint, external: Endpoint, slot: int, dies_at: float
    ) -> None:
        self.key = key
        self.internal = internal
        self.external = external
        self.slot = slot
        self.dies_at = dies_at
        self.expires = 0.0  # the latest of its sessions
        self.claims: dict[Key, int] = {}  # claim -> sessions that need it
        self.permitted: dict[Key, int] = {}  # filter key -> open sessions


class Session:
    """One remote endpoint that uses a mapping."""

    __slots__ = (
        "expires",
        "external",
        "internal",
        "is_open",
        "is_replied",
        "mapping",
        "remote",
        "replied_from",
        "sequence",
        "tcp_seen",
    )

    def __init__(self, mapping: PortMapping, remote: Endpoint, expires: float) -> None:
        self.mapping = mapping
        self.remote = remote
        self.internal = mapping.internal
        self.external = mapping.external
        self.expires = expires
        self.is_open = False  # lets its filter key in; else it only pins the port of replies
        self.is_replied = False  # the remote has sent in
        self.replied_from = 0.0  # when that begins to lengthen its life
        self.sequence = 0  # of its entry in the heap; any other entry of it is out of date
        self.tcp_seen = 0  # what a `TcpNat` saw of the connection
