"""The table of a NAT: pure logic that rewrites the addresses of packets, or drops them.

Three levels, as in the connection tracking of real boxes:

    mapping   an external port given to an internal endpoint, for all remotes, one remote address
              or one remote endpoint: the key under which it is found again says which (EIM, ADM,
              APDM), and nothing else differs
    session   one remote endpoint that uses a mapping; it has the idle timer
    claim     what keeps two mappings off one external port: the port alone where ports are
              exclusive, else the port with that part of the remote the filter looks at, so that
              an inbound packet never fits two mappings

External ports are slots here (`pool.py`): with one external address, the port itself.

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
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import TypeVar

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering, Mapping, Poison
from natswarm.sim.checkers import check_nat
from natswarm.sim.load import BackgroundFlows
from natswarm.sim.nat_behaviour import (
    TFTP_PORT,
    TFTP_REQUESTS,
    NatBehaviour,
    NatCounters,
)
from natswarm.sim.nat_session import Key, PortMapping, Session
from natswarm.sim.packet import ICMP, Packet, make_packet
from natswarm.sim.pool import PORT_COUNT, make_pool
from natswarm.sim.ports import IsFree
from natswarm.sim.rate import TokenBuckets

__all__ = ["Nat", "NatBehaviour", "NatCounters"]

_K = TypeVar("_K")


class Nat:
    """One NAT.

    Feed it packets with times that never go back. It owns `rng`.

    Args:
        external_ip: Its address, or as many as its behaviour has.

    Attributes:
        behaviour: What it does; fixed.
        external_ip: The address the outside sees; of several, the first.
        external_ips: All of them.
        counters: What became of the packets.
        load_counters: The same for the flows of the background load.
    """

    def __init__(
        self, behaviour: NatBehaviour, external_ip: str | Sequence[str], rng: random.Random
    ) -> None:
        ips = (external_ip,) if isinstance(external_ip, str) else tuple(external_ip)
        if len(set(ips)) != behaviour.address_count:
            raise ValueError(f"a NAT of {behaviour.address_count} addresses cannot have {ips}")
        self.behaviour = behaviour
        self.external_ip = ips[0]
        self.external_ips = ips
        self.counters = NatCounters()
        self.load_counters = NatCounters()
        self._slot_bases = {ip: index * PORT_COUNT for index, ip in enumerate(ips)}
        self._rng = rng
        self._allocator = make_pool(
            behaviour.allocation, behaviour.address_count, behaviour.pooling, rng
        )
        self._rates = (
            None
            if behaviour.subscriber_rate is None and behaviour.nat_rate is None
            else TokenBuckets(behaviour.subscriber_rate, behaviour.nat_rate)
        )
        self._flows = (
            None
            if behaviour.load is None
            else BackgroundFlows(behaviour.load, random.Random(rng.getrandbits(64)))
        )
        self._exclusive = behaviour.exclusive_ports
        self._unreplied_s = behaviour.unreplied_lifetime_s
        self._replied_s = behaviour.replied_lifetime_s
        self._replied_age_s = behaviour.replied_age_s
        self._inbound_refreshes = behaviour.refreshed_by_inbound
        self._has_helper = behaviour.tftp_helper
        self._mapping_key = _MAPPING_KEYS[behaviour.mapping]
        self._filter_key = _FILTER_KEYS[behaviour.filtering]
        self._mappings: dict[Key, PortMapping] = {}
        # Both by 4-tuples of plain text and numbers: `Endpoint` hashes in Python, they do in C.
        self._outgoing: dict[tuple[str, int, str, int], Session] = {}
        self._incoming: dict[tuple[int, str, int], Session] = {}
        self._claims: dict[Key, PortMapping] = {}
        # The requests whose answers are awaited, by our slot and the remote address. An expectation
        # ends with the session of its request, as in Linux, where its own 5 minutes never matter.
        self._expectations: dict[tuple[int, str], Session] = {}
        self._slot_users: dict[int, int] = {}  # slot -> mappings
        # slot -> mappings and mapping -> sessions, kept only where poison has to find them.
        self._finds_mappings = behaviour.poison in (Poison.RETIRES_MAPPING, Poison.BURNS_MAPPING)
        self._mappings_of: dict[int, list[PortMapping]] = {}
        self._sessions_of: dict[PortMapping, dict[Session, None]] = {}
        self._subscribers: dict[str, int] = {}  # internal address -> mappings
        # Every session once, at a time not after its expiry: looked at again when it is due.
        self._due: list[tuple[float, int, Session]] = []
        self._sequence = 0

    def outbound(self, packet: Packet, now: float) -> Packet | None:
        """Translate a packet from the inside; None when it is dropped."""
        internal, remote, data, protocol, _ = packet
        session = self._outgoing.get((internal.ip, internal.port, remote.ip, remote.port))
        if session is None or not session.is_open or session.expires <= now:
            opened = self._open(internal, remote, now)
            if opened is None:
                return None
            session = opened
        self._refresh(session, now)
        if self._has_helper and remote.port == TFTP_PORT and data[:2] in TFTP_REQUESTS:
            self._expectations[session.mapping.slot, remote.ip] = session
        self.counters.outbound_count += 1
        return make_packet(Packet, (session.external, remote, data, protocol, None))

    def inbound(self, packet: Packet, now: float) -> Packet | None:
        """Translate a packet from the outside; None when it is dropped.

        Raises:
            ValueError: It is not for an external address of ours.
        """
        remote, external, data, protocol, _ = packet
        slot = external.port
        if external.ip != self.external_ip:
            slot = self._slot_of(external)
        session = self._incoming.get((slot, remote.ip, remote.port))
        if session is None or not session.is_open or session.expires <= now:
            admitted = self._admit(slot, remote, now)
            if admitted is None:
                return None
            session = admitted
        session.is_replied = True
        if self._inbound_refreshes:
            self._refresh(session, now)
        self.counters.inbound_count += 1
        return make_packet(Packet, (remote, session.internal, data, protocol, None))

    def error_inbound(self, error: Packet, now: float) -> Packet | None:
        """Translate an ICMP error from the outside about a packet of the inside; changes nothing.

        None where there is no session that the packet belongs to (RFC 5508 REQ-3 to REQ-5).
        """
        about = error.about
        if about is None or about.source != error.destination:
            return None
        session = self._session_inbound(about.source, about.destination, now)
        if session is None:
            return None
        internal = session.internal
        about = about._replace(source=internal)
        return Packet(error.source, internal, error.data, ICMP, about)

    def error_outbound(self, error: Packet, now: float) -> Packet | None:
        """Translate an ICMP error of the inside about a packet that came in; changes nothing.

        It comes from our external address then, whoever said it, as in Linux.
        """
        about = error.about
        if about is None or about.source != error.destination:
            return None
        internal, remote = about.destination, about.source
        session = self._outgoing.get((internal.ip, internal.port, remote.ip, remote.port))
        if session is None or not session.is_open or session.expires <= now:
            return None
        about = about._replace(destination=session.external)
        return Packet(Endpoint(session.external.ip, 0), remote, error.data, ICMP, about)

    def external_endpoint(
        self, internal: Endpoint, remote: Endpoint, now: float
    ) -> Endpoint | None:
        """Return what `remote` sees of `internal` while a session of the two lives.

        For tests and demonstrations, which may look inside; changes nothing.
        """
        session = self._outgoing.get((internal.ip, internal.port, remote.ip, remote.port))
        return session.external if session is not None and session.expires > now else None

    def mapping_count(self, now: float) -> int:
        """Return how many mappings are alive, those of the background load included."""
        self._catch_up(now)
        return sum(self._subscribers.values())

    def ports_in_use(self, now: float) -> list[int]:
        """Return the external ports that have a mapping, ascending; of all addresses."""
        self._catch_up(now)
        return sorted(slot % PORT_COUNT for slot in self._slot_users)

    def _refresh(self, session: Session, now: float) -> None:
        mapping = session.mapping
        is_replied = session.is_replied and now >= session.replied_from
        expires = now + (self._replied_s if is_replied else self._unreplied_s)
        if expires > mapping.dies_at:
            expires = mapping.dies_at
        session.expires = expires
        if expires > mapping.expires:
            mapping.expires = expires

    def _open(self, internal: Endpoint, remote: Endpoint, now: float) -> Session | None:
        """Return the session for the first packet the inside sends to `remote`."""
        self._catch_up(now)
        session = self._outgoing.get((internal.ip, internal.port, remote.ip, remote.port))
        if session is None:
            mapping = self._mapping_for(internal, remote, now)
            if mapping is None:
                return None
            session = self._add_session(mapping, remote, now + self._unreplied_s)
            session.replied_from = now + self._replied_age_s
        self._permit(session)
        return session

    def _permit(self, session: Session) -> None:
        if not session.is_open:
            session.is_open = True
            permitted, key = session.mapping.permitted, self._filter_key(session.remote)
            permitted[key] = permitted.get(key, 0) + 1

    def _mapping_for(self, internal: Endpoint, remote: Endpoint, now: float) -> PortMapping | None:
        key = self._mapping_key(internal, remote)
        mapping = self._mappings.get(key)
        if mapping is not None:
            owner = self._claims.get(self._claim(mapping.slot, remote))
            if owner is None or owner is mapping:
                return mapping
        behaviour = self.behaviour
        subscriber = internal.ip
        count = self._subscribers.get(subscriber, 0)
        if behaviour.max_mappings is not None and count >= behaviour.max_mappings:
            self.counters.dropped_cap += 1
            return None
        rates = self._rates
        if rates is not None and not rates.allow(subscriber, now):
            self.counters.dropped_rate += 1
            return None
        slot = self._allocator.allocate(
            subscriber, internal.port, self._is_free(internal, remote), now
        )
        if slot is None:
            self.counters.dropped_no_port += 1
            return None
        if rates is not None:
            rates.take(subscriber, now)
        self.counters.mapping_count += 1
        self.counters.moved_count += mapping is not None
        dies_at = math.inf
        if behaviour.absolute_lifetime_s is not None:
            dies_at = now + self._rng.uniform(*behaviour.absolute_lifetime_s)
        # The endpoint's next remotes use the new port too. Linux prefers the port that the internal
        # endpoint has already; a mapping that had to move stays for its old sessions alone.
        mapping = PortMapping(key, internal, self._external(slot), slot, dies_at)
        self._mappings[key] = mapping
        self._subscribers[subscriber] = count + 1
        self._slot_users[slot] = self._slot_users.get(slot, 0) + 1
        if self._finds_mappings:
            self._mappings_of.setdefault(slot, []).append(mapping)
            self._sessions_of[mapping] = {}
        return mapping

    def _is_free(self, internal: Endpoint, remote: Endpoint) -> IsFree:
        """Return the test of slots for a new mapping."""
        claims = self._claims
        suffix = () if self._exclusive else self._filter_key(remote)
        if not self.behaviour.preserves_parity:
            return lambda slot: (slot, *suffix) not in claims
        parity = internal.port % 2
        return lambda slot: slot % 2 == parity and (slot, *suffix) not in claims

    def is_expected(self, packet: Packet, now: float) -> bool:
        """Return whether a packet from the outside belongs to a session; changes nothing."""
        return self._session_inbound(packet.destination, packet.source, now) is not None

    def _session_inbound(self, external: Endpoint, remote: Endpoint, now: float) -> Session | None:
        session = self._incoming.get((self._slot_of(external), remote.ip, remote.port))
        return session if session and session.is_open and session.expires > now else None

    def _slot_of(self, external: Endpoint) -> int:
        if external.ip not in self._slot_bases:
            raise ValueError(f"a packet for {external} came to the NAT at {self.external_ip}")
        return self._slot_bases[external.ip] + external.port

    def _external(self, slot: int) -> Endpoint:
        return Endpoint(self.external_ips[slot // PORT_COUNT], slot % PORT_COUNT)

    def _admit(self, slot: int, remote: Endpoint, now: float) -> Session | None:
        """Return the session for a packet from outside that meets none we opened."""
        self._catch_up(now)
        session = self._incoming.get((slot, remote.ip, remote.port))
        if session is not None and session.is_open:
            return session
        mapping = self._claims.get(self._claim(slot, remote))
        if mapping is not None and self._filter_key(remote) in mapping.permitted:
            session = session or self._session_of_admitted(mapping, remote)
            if self._inbound_refreshes:
                self._permit(session)
            return session
        if self._has_helper and session is None:
            # One answer for each request: in Linux a packet uses its expectation up.
            request = self._expectations.pop((slot, remote.ip), None)
            if request is not None:
                session = self._session_of_admitted(request.mapping, remote)
                self._permit(session)
                return session
        if slot in self._slot_users:
            self.counters.dropped_filtered += 1
        else:
            self.counters.dropped_unmapped += 1
        if self.behaviour.poison is not Poison.NONE:
            self._poison(slot, remote, session, now)
        return None

    def _poison(self, slot: int, remote: Endpoint, session: Session | None, now: float) -> None:
        """Do what a refused packet does here to the mappings of the slot it came to."""
        if self.behaviour.poison is Poison.TAKES_PORT:
            if session is None:
                own = self._external(slot)
                session = self._add_session(
                    PortMapping(None, own, own, slot, math.inf), remote, 0.0
                )
            self._refresh(session, now)
            self.counters.poisoned_count += 1
            return
        for mapping in list(self._mappings_of.get(slot, ())):
            if self.behaviour.poison is Poison.BURNS_MAPPING:
                for session in list(self._sessions_of[mapping]):
                    self._remove(session)
                    session.sequence = 0
            elif mapping.key is not None and self._mappings.get(mapping.key) is mapping:
                del self._mappings[mapping.key]
            else:
                continue
            self.counters.poisoned_count += 1

    def _session_of_admitted(self, mapping: PortMapping, remote: Endpoint) -> Session:
        internal = mapping.internal
        session = self._outgoing.get((internal.ip, internal.port, remote.ip, remote.port))
        if session is not None:
            return session  # the two speak through another port already, and replies keep to it
        # Unless it is refreshed, a stranger must not keep the mapping alive a moment longer.
        return self._add_session(mapping, remote, mapping.expires)

    def _claim(self, slot: int, remote: Endpoint) -> Key:
        return (slot,) if self._exclusive else (slot, *self._filter_key(remote))

    def _add_session(self, mapping: PortMapping, remote: Endpoint, expires: float) -> Session:
        session = Session(mapping, remote, min(expires, mapping.dies_at))
        internal, slot = mapping.internal, mapping.slot
        claim = self._claim(slot, remote)
        assert self._claims.get(claim, mapping) is mapping, "two mappings for one inbound packet"
        self._claims[claim] = mapping
        mapping.claims[claim] = mapping.claims.get(claim, 0) + 1
        self._outgoing[internal.ip, internal.port, remote.ip, remote.port] = session
        incoming_key = (slot, remote.ip, remote.port)
        assert incoming_key not in self._incoming, "two sessions for one inbound packet"
        self._incoming[incoming_key] = session
        self._look_at(session, session.expires)
        if self._finds_mappings:
            self._sessions_of[mapping][session] = None
        return session

    def _look_at(self, session: Session, due: float) -> None:
        """Have `_expire` look at a session at a time not after its expiry, and at no other."""
        self._sequence = session.sequence = self._sequence + 1
        heappush(self._due, (due, session.sequence, session))

    def _catch_up(self, now: float) -> None:
        """Bring the table up to the present: flows of others, and what is over."""
        flows = self._flows
        if flows is not None:
            mine, self.counters = self.counters, self.load_counters
            self._allocator.skip(flows.skipped(now))
            for time, internal, remote in flows.until(now):
                self._expire(time)
                mapping = self._mapping_for(internal, remote, time)
                if mapping is not None:
                    session = self._add_session(mapping, remote, time + flows.hold_s)
                    mapping.expires = max(mapping.expires, session.expires)
                    self._permit(session)
            self.counters = mine
        self._expire(now)

    def _expire(self, now: float) -> None:
        """Remove every session that is over, and what lived by it alone."""
        due = self._due
        while due and due[0][0] <= now:
            _, sequence, session = heappop(due)
            if session.sequence != sequence:
                continue
            if session.expires > now:
                heappush(due, (session.expires, sequence, session))
            else:
                self._remove(session)

    def _remove(self, session: Session) -> None:
        mapping, remote = session.mapping, session.remote
        internal, slot = mapping.internal, mapping.slot
        del self._outgoing[internal.ip, internal.port, remote.ip, remote.port]
        del self._incoming[slot, remote.ip, remote.port]
        if self._finds_mappings:
            del self._sessions_of[mapping][session]
        if remote.port == TFTP_PORT:
            self._expectations.pop((slot, remote.ip), None)
        if session.is_open:
            _count_down(mapping.permitted, self._filter_key(remote))
        claim = self._claim(slot, remote)
        _count_down(mapping.claims, claim)
        if claim not in mapping.claims:
            del self._claims[claim]
        if mapping.claims or mapping.key is None:
            return
        if self._mappings.get(mapping.key) is mapping:
            del self._mappings[mapping.key]
        if self._finds_mappings:
            del self._sessions_of[mapping]
            found = self._mappings_of[slot]
            found.remove(mapping)
            if not found:
                del self._mappings_of[slot]
        _count_down(self._slot_users, slot)
        _count_down(self._subscribers, internal.ip)
        self._allocator.release(internal.ip, slot)

    def check(self) -> None:
        """Assert what must hold between packets, whatever came before.

        Raises:
            AssertionError: The table is wrong.
        """
        check_nat(self)


def _count_down(counts: dict[_K, int], key: _K) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]


def _no_part(remote: Endpoint) -> Key:
    return ()


def _address(remote: Endpoint) -> Key:
    return (remote.ip,)


def _address_and_port(remote: Endpoint) -> Key:
    return (remote.ip, remote.port)


_FILTER_KEYS: dict[Filtering, Callable[[Endpoint], Key]] = {
    Filtering.EIF: _no_part,
    Filtering.ADF: _address,
    Filtering.APDF: _address_and_port,
}

_MAPPING_KEYS: dict[Mapping, Callable[[Endpoint, Endpoint], Key]] = {
    Mapping.EIM: lambda internal, remote: (internal.ip, internal.port),
    Mapping.ADM: lambda internal, remote: (internal.ip, internal.port, remote.ip),
    Mapping.APDM: lambda internal, remote: (internal.ip, internal.port, remote.ip, remote.port),
}
