"""The table of a NAT: pure logic that rewrites the addresses of packets, or drops them.

Three levels, as in the connection tracking of real boxes:

    mapping   an external port given to an internal endpoint, for all remotes, one remote address
              or one remote endpoint: the key under which it is found again says which (EIM, ADM,
              APDM), and nothing else differs
    session   one remote endpoint that uses a mapping; it has the idle timer
    claim     what keeps two mappings off one external port: the port alone where ports are
              exclusive, else the port with that part of the remote the filter looks at, so that
              an inbound packet never fits two mappings

Filtering is a set of keys of the same three kinds. A packet that the filter lets in from a remote
without a session gets one, so that replies to exactly that remote leave through the port it came
in by; without this, an APDM mapping with a wider filter would answer from another port.

Idea of the keys: tailscale's `tstest/natlab`. Terms: RFC 4787. What is said of Linux is from its
`nf_nat_core.c`, `nf_conntrack_core.c` and `nf_conntrack_tftp.c`. Knows neither links nor hop limits
nor routing (`topology.py`), and no clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TypeVar

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.packet import Packet
from natswarm.sim.ports import Allocation, Preserving, make_allocator

__all__ = ["Nat", "NatBehaviour", "NatCounters"]

# RFC 1350 section 2 and 4: requests go to port 69 and are answered from a port of the server's
# choice; opcode 1 is a read request, 2 a write request.
TFTP_PORT = 69
TFTP_REQUESTS = (b"\x00\x01", b"\x00\x02")

_Key = tuple[object, ...]
_K = TypeVar("_K")


@dataclass(frozen=True, slots=True, kw_only=True)
class NatBehaviour:
    """What a NAT does, in the words of RFC 4787.

    Attributes:
        mapping: When an internal endpoint keeps its external port.
        filtering: Who may send in through a mapping.
        allocation: The law of external ports.
        overloading: Whether mappings may share an external port as long as the filter tells their
            remotes apart. With EIM, two internal endpoints may then come to share a port, and
            one of them moves to another when both want the same remote: this is Linux.
        unreplied_lifetime_s: Idle time after which a session dies that saw no inbound packet.
        replied_lifetime_s: The same for one that did; not shorter.
        refreshed_by_inbound: Whether inbound packets restart the idle time too (RFC 4787 REQ-6).
        absolute_lifetime_s: Bounds of the age at which a mapping dies whatever its traffic, drawn
            uniformly for each; None where traffic keeps it alive for ever.
        max_mappings: Mappings one subscriber (internal address) may have at a time.
        hairpinning: Whether packets to the NAT's own external address turn round inside.
        tftp_helper: Whether a TFTP request to a remote address lets the answer in from any one
            port of it (an application layer gateway; Linux `nf_conntrack_tftp`).
        accepts_strangers: Whether the box takes packets without a mapping as meant for itself, as
            Linux does with an INPUT chain that accepts. They leave a session of its own behind, and
            a port in it is no longer free towards that remote: an early probe moves our mapping.
    """

    mapping: Mapping
    filtering: Filtering
    allocation: Allocation = field(default_factory=Preserving)
    overloading: bool = True
    unreplied_lifetime_s: float = 30.0
    replied_lifetime_s: float = 120.0
    refreshed_by_inbound: bool = True
    absolute_lifetime_s: tuple[float, float] | None = None
    max_mappings: int | None = None
    hairpinning: bool = False
    tftp_helper: bool = False
    accepts_strangers: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.unreplied_lifetime_s <= self.replied_lifetime_s:
            raise ValueError("lifetimes must be positive, and a reply must not shorten them")
        if self.absolute_lifetime_s is not None:
            low, high = self.absolute_lifetime_s
            if not 0 < low <= high:
                raise ValueError(f"not bounds of a lifetime: {self.absolute_lifetime_s}")
        if self.max_mappings is not None and self.max_mappings < 1:
            raise ValueError("a subscriber needs at least one mapping")
        if self.accepts_strangers and not (self.overloading and self.filtering is Filtering.APDF):
            raise ValueError("only a NAT that tells remotes apart by endpoint accepts strangers")

    @property
    def exclusive_ports(self) -> bool:
        """Whether an external port serves one mapping at a time.

        With EIF it always does: there is nothing to tell two mappings of one port apart by.
        """
        return not self.overloading or self.filtering is Filtering.EIF


@dataclass(slots=True)
class NatCounters:
    """What became of the packets; counters only grow."""

    outbound_count: int = 0
    """Translated on the way out."""
    inbound_count: int = 0
    """Translated on the way in."""
    mapping_count: int = 0
    """Mappings made."""
    moved_count: int = 0
    """Endpoints that got another port because theirs was taken towards a remote."""
    dropped_no_port: int = 0
    """Outbound: no free port, or the subscriber owns no more blocks."""
    dropped_cap: int = 0
    """Outbound: the subscriber has `max_mappings`."""
    dropped_unmapped: int = 0
    """Inbound: to a port without a mapping."""
    dropped_filtered: int = 0
    """Inbound: there is a mapping, but not for this remote."""
    dropped_hairpin: int = 0
    """From inside to our own external address, without hairpinning."""


class _Mapping:
    __slots__ = ("claims", "dies_at", "expires", "external", "internal", "key", "permitted")

    def __init__(
        self, key: _Key | None, internal: Endpoint, external: Endpoint, dies_at: float
    ) -> None:
        self.key = key
        self.internal = internal
        self.external = external
        self.dies_at = dies_at
        self.expires = 0.0  # the latest of its sessions
        self.claims: dict[_Key, int] = {}  # claim -> sessions that need it
        self.permitted: dict[_Key, int] = {}  # filter key -> open sessions


class _Session:
    __slots__ = ("expires", "external", "internal", "is_open", "is_replied", "mapping", "remote")

    def __init__(self, mapping: _Mapping, remote: Endpoint, expires: float) -> None:
        self.mapping = mapping
        self.remote = remote
        self.internal = mapping.internal
        self.external = mapping.external
        self.expires = expires
        self.is_open = False  # lets its filter key in; else it only pins the port of replies
        self.is_replied = False  # the remote has sent in


class Nat:
    """One NAT with one external address.

    Feed it packets with times that never go back. It owns `rng`.

    Attributes:
        behaviour: What it does; fixed.
        external_ip: The address the outside sees.
        counters: What became of the packets.
    """

    def __init__(self, behaviour: NatBehaviour, external_ip: str, rng: random.Random) -> None:
        self.behaviour = behaviour
        self.external_ip = external_ip
        self.counters = NatCounters()
        self._rng = rng
        self._allocator = make_allocator(behaviour.allocation, rng)
        self._exclusive = behaviour.exclusive_ports
        self._unreplied_s = behaviour.unreplied_lifetime_s
        self._replied_s = behaviour.replied_lifetime_s
        self._inbound_refreshes = behaviour.refreshed_by_inbound
        self._has_helper = behaviour.tftp_helper
        self._mapping_key = _MAPPING_KEYS[behaviour.mapping]
        self._filter_key = _FILTER_KEYS[behaviour.filtering]
        self._mappings: dict[_Key, _Mapping] = {}
        # Both by 4-tuples of plain text and numbers: `Endpoint` hashes in Python, they do in C.
        self._outgoing: dict[tuple[str, int, str, int], _Session] = {}
        self._incoming: dict[tuple[int, str, int], _Session] = {}
        self._claims: dict[_Key, _Mapping] = {}
        # The requests whose answers are awaited, by our port and the remote address. An expectation
        # ends with the session of its request, as in Linux, where its own 5 minutes never matter.
        self._expectations: dict[tuple[int, str], _Session] = {}
        self._port_users: dict[int, int] = {}  # external port -> mappings
        self._subscribers: dict[str, int] = {}  # internal address -> mappings
        # Every session once, at a time not after its expiry: looked at again when it is due.
        self._due: list[tuple[float, int, _Session]] = []
        self._sequence = 0

    def outbound(self, packet: Packet, now: float) -> Packet | None:
        """Translate a packet from the inside; None when it is dropped."""
        internal, remote, data = packet
        session = self._outgoing.get((internal.ip, internal.port, remote.ip, remote.port))
        if session is None or not session.is_open or session.expires <= now:
            opened = self._open(internal, remote, now)
            if opened is None:
                return None
            session = opened
        self._refresh(session, now)
        if self._has_helper and remote.port == TFTP_PORT and data[:2] in TFTP_REQUESTS:
            self._expectations[session.external.port, remote.ip] = session
        self.counters.outbound_count += 1
        return Packet(session.external, remote, data)

    def inbound(self, packet: Packet, now: float) -> Packet | None:
        """Translate a packet from the outside; None when it is dropped.

        Raises:
            ValueError: It is not for our external address.
        """
        remote, external, data = packet
        if external.ip != self.external_ip:
            raise ValueError(f"a packet for {external} came to the NAT at {self.external_ip}")
        session = self._incoming.get((external.port, remote.ip, remote.port))
        if session is None or not session.is_open or session.expires <= now:
            admitted = self._admit(external.port, remote, now)
            if admitted is None:
                return None
            session = admitted
        session.is_replied = True
        if self._inbound_refreshes:
            self._refresh(session, now)
        self.counters.inbound_count += 1
        return Packet(remote, session.internal, data)

    def external_endpoint(
        self, internal: Endpoint, remote: Endpoint, now: float
    ) -> Endpoint | None:
        """Return what `remote` sees of `internal` while a session of the two lives.

        For tests and demonstrations, which may look inside; changes nothing.
        """
        session = self._outgoing.get((internal.ip, internal.port, remote.ip, remote.port))
        return session.external if session is not None and session.expires > now else None

    def mapping_count(self, now: float) -> int:
        """Return how many mappings are alive."""
        self._expire(now)
        return sum(self._subscribers.values())

    def ports_in_use(self, now: float) -> list[int]:
        """Return the external ports that have a mapping, ascending."""
        self._expire(now)
        return sorted(self._port_users)

    def _refresh(self, session: _Session, now: float) -> None:
        mapping = session.mapping
        expires = now + (self._replied_s if session.is_replied else self._unreplied_s)
        if expires > mapping.dies_at:
            expires = mapping.dies_at
        session.expires = expires
        if expires > mapping.expires:
            mapping.expires = expires

    def _open(self, internal: Endpoint, remote: Endpoint, now: float) -> _Session | None:
        """Return the session for the first packet the inside sends to `remote`."""
        self._expire(now)
        session = self._outgoing.get((internal.ip, internal.port, remote.ip, remote.port))
        if session is None:
            mapping = self._mapping_for(internal, remote, now)
            if mapping is None:
                return None
            session = self._add_session(mapping, remote, now + self._unreplied_s)
        self._permit(session)
        return session

    def _permit(self, session: _Session) -> None:
        if not session.is_open:
            session.is_open = True
            permitted, key = session.mapping.permitted, self._filter_key(session.remote)
            permitted[key] = permitted.get(key, 0) + 1

    def _mapping_for(self, internal: Endpoint, remote: Endpoint, now: float) -> _Mapping | None:
        key = self._mapping_key(internal, remote)
        mapping = self._mappings.get(key)
        if mapping is not None:
            owner = self._claims.get(self._claim(mapping.external.port, remote))
            if owner is None or owner is mapping:
                return mapping
        behaviour = self.behaviour
        subscriber = internal.ip
        count = self._subscribers.get(subscriber, 0)
        if behaviour.max_mappings is not None and count >= behaviour.max_mappings:
            self.counters.dropped_cap += 1
            return None
        claims = self._claims
        suffix = () if self._exclusive else self._filter_key(remote)
        port = self._allocator.allocate(
            subscriber, internal.port, lambda port: (port, *suffix) not in claims, now
        )
        if port is None:
            self.counters.dropped_no_port += 1
            return None
        self.counters.mapping_count += 1
        self.counters.moved_count += mapping is not None
        dies_at = math.inf
        if behaviour.absolute_lifetime_s is not None:
            dies_at = now + self._rng.uniform(*behaviour.absolute_lifetime_s)
        # The endpoint's next remotes use the new port too. Linux prefers the port that the internal
        # endpoint has already; a mapping that had to move stays for its old sessions alone.
        mapping = _Mapping(key, internal, Endpoint(self.external_ip, port), dies_at)
        self._mappings[key] = mapping
        self._subscribers[subscriber] = count + 1
        self._port_users[port] = self._port_users.get(port, 0) + 1
        return mapping

    def _admit(self, port: int, remote: Endpoint, now: float) -> _Session | None:
        """Return the session for a packet from outside that meets none we opened."""
        self._expire(now)
        session = self._incoming.get((port, remote.ip, remote.port))
        if session is not None and session.is_open:
            return session
        mapping = self._claims.get(self._claim(port, remote))
        if mapping is not None and self._filter_key(remote) in mapping.permitted:
            session = session or self._session_of_admitted(mapping, remote)
            if self._inbound_refreshes:
                self._permit(session)
            return session
        if self._has_helper and session is None:
            # One answer for each request: in Linux a packet uses its expectation up.
            request = self._expectations.pop((port, remote.ip), None)
            if request is not None:
                session = self._session_of_admitted(request.mapping, remote)
                self._permit(session)
                return session
        if self.behaviour.accepts_strangers:
            if session is None:
                own = Endpoint(self.external_ip, port)
                session = self._add_session(_Mapping(None, own, own, math.inf), remote, 0.0)
            self._refresh(session, now)
        if port in self._port_users:
            self.counters.dropped_filtered += 1
        else:
            self.counters.dropped_unmapped += 1
        return None

    def _session_of_admitted(self, mapping: _Mapping, remote: Endpoint) -> _Session:
        internal = mapping.internal
        session = self._outgoing.get((internal.ip, internal.port, remote.ip, remote.port))
        if session is not None:
            return session  # the two speak through another port already, and replies keep to it
        # Unless it is refreshed, a stranger must not keep the mapping alive a moment longer.
        return self._add_session(mapping, remote, mapping.expires)

    def _claim(self, port: int, remote: Endpoint) -> _Key:
        return (port,) if self._exclusive else (port, *self._filter_key(remote))

    def _add_session(self, mapping: _Mapping, remote: Endpoint, expires: float) -> _Session:
        session = _Session(mapping, remote, min(expires, mapping.dies_at))
        internal, port = mapping.internal, mapping.external.port
        claim = self._claim(port, remote)
        assert self._claims.get(claim, mapping) is mapping, "two mappings for one inbound packet"
        self._claims[claim] = mapping
        mapping.claims[claim] = mapping.claims.get(claim, 0) + 1
        self._outgoing[internal.ip, internal.port, remote.ip, remote.port] = session
        incoming_key = (port, remote.ip, remote.port)
        assert incoming_key not in self._incoming, "two sessions for one inbound packet"
        self._incoming[incoming_key] = session
        self._sequence += 1
        heappush(self._due, (session.expires, self._sequence, session))
        return session

    def _expire(self, now: float) -> None:
        """Remove every session that is over, and what lived by it alone."""
        due = self._due
        while due and due[0][0] <= now:
            _, sequence, session = heappop(due)
            if session.expires > now:
                heappush(due, (session.expires, sequence, session))
            else:
                self._remove(session)

    def _remove(self, session: _Session) -> None:
        mapping, remote = session.mapping, session.remote
        internal, port = mapping.internal, mapping.external.port
        del self._outgoing[internal.ip, internal.port, remote.ip, remote.port]
        del self._incoming[port, remote.ip, remote.port]
        if remote.port == TFTP_PORT:
            self._expectations.pop((port, remote.ip), None)
        if session.is_open:
            _count_down(mapping.permitted, self._filter_key(remote))
        claim = self._claim(port, remote)
        _count_down(mapping.claims, claim)
        if claim not in mapping.claims:
            del self._claims[claim]
        if mapping.claims or mapping.key is None:
            return
        if self._mappings.get(mapping.key) is mapping:
            del self._mappings[mapping.key]
        _count_down(self._port_users, port)
        _count_down(self._subscribers, internal.ip)
        self._allocator.release(internal.ip, port)

    def check(self) -> None:
        """Assert what must hold between packets, whatever came before."""
        mappings: dict[int, _Mapping] = {}
        claims: dict[_Key, int] = {}
        permitted: dict[tuple[int, _Key], int] = {}
        for session in self._outgoing.values():
            mapping, remote = session.mapping, session.remote
            port = mapping.external.port
            assert self._incoming[port, remote.ip, remote.port] is session
            assert session.expires <= min(mapping.expires, mapping.dies_at), "outlives its mapping"
            claim = self._claim(port, remote)
            assert self._claims[claim] is mapping, "a port without a claim to it"
            claims[claim] = claims.get(claim, 0) + 1
            assert mapping.claims[claim] > 0
            if session.is_open:
                key = (id(mapping), self._filter_key(remote))
                permitted[key] = permitted.get(key, 0) + 1
            mappings[id(mapping)] = mapping
        assert len(self._incoming) == len(self._outgoing) == len(self._due)
        assert claims.keys() == self._claims.keys()
        assert sum(claims.values()) == sum(sum(m.claims.values()) for m in mappings.values())
        assert permitted == {
            (id(mapping), key): count
            for mapping in mappings.values()
            for key, count in mapping.permitted.items()
        }, "the filter forgot somebody, or remembers too long"
        ports: dict[int, int] = {}
        for mapping in mappings.values():
            if mapping.key is not None:
                ports[mapping.external.port] = ports.get(mapping.external.port, 0) + 1
        assert ports == self._port_users, "the count of mappings of each port is wrong"
        assert sum(ports.values()) == sum(self._subscribers.values())
        if self._exclusive:
            assert all(count == 1 for count in ports.values()), "an exclusive port is shared"
        for mapping_key, mapping in self._mappings.items():
            assert mapping.key == mapping_key
            assert mappings[id(mapping)] is mapping, "a mapping without a session"
        for (port, ip), session in self._expectations.items():
            assert self._incoming[port, ip, TFTP_PORT] is session, "an answer to no request"


def _count_down(counts: dict[_K, int], key: _K) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]


def _no_part(remote: Endpoint) -> _Key:
    return ()


def _address(remote: Endpoint) -> _Key:
    return (remote.ip,)


def _address_and_port(remote: Endpoint) -> _Key:
    return (remote.ip, remote.port)


_FILTER_KEYS: dict[Filtering, Callable[[Endpoint], _Key]] = {
    Filtering.EIF: _no_part,
    Filtering.ADF: _address,
    Filtering.APDF: _address_and_port,
}

_MAPPING_KEYS: dict[Mapping, Callable[[Endpoint, Endpoint], _Key]] = {
    Mapping.EIM: lambda internal, remote: (internal.ip, internal.port),
    Mapping.ADM: lambda internal, remote: (internal.ip, internal.port, remote.ip),
    Mapping.APDM: lambda internal, remote: (internal.ip, internal.port, remote.ip, remote.port),
}
