"""A stateful IPv6 firewall: nothing is translated, but strangers stay out until we have sent.

What stands between two hosts with global IPv6 addresses at home or on a phone. A packet from inside
leaves a state behind, and what comes in must fit one: the same three kinds of filtering as a NAT's,
over the same two idle lifetimes. Ports and addresses are known beforehand, so puncturing it takes
one packet from each side.

Source: RFC 6092 section 3.2 (UDP filters of home gateways: endpoint-independent for transparency,
address-dependent where stricter; states live two minutes at the least), Linux connection tracking
(address-and-port-dependent, 30 s unreplied, 120 s replied). Terms: RFC 4787. Knows no links.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering
from natswarm.sim.packet import Packet

__all__ = ["Firewall", "FirewallBehaviour", "FirewallCounters"]

_Key = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallBehaviour:
    """What an IPv6 firewall does.

    Attributes:
        filtering: Who may send in once the inside has sent.
        unreplied_lifetime_s: Idle seconds after which a state dies that saw no inbound packet.
        replied_lifetime_s: The same for one that did; not shorter.
        refreshed_by_inbound: Whether inbound packets restart the idle time too.
        max_states: States one host may have at a time; None for any number.
    """

    filtering: Filtering = Filtering.APDF
    unreplied_lifetime_s: float = 30.0
    replied_lifetime_s: float = 120.0
    refreshed_by_inbound: bool = True
    max_states: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.unreplied_lifetime_s <= self.replied_lifetime_s:
            raise ValueError("lifetimes must be positive, and a reply must not shorten them")
        if self.max_states is not None and self.max_states < 1:
            raise ValueError("a host needs at least one state")


@dataclass(slots=True)
class FirewallCounters:
    """What became of the packets; counters only grow."""

    outbound_count: int = 0
    """Let out."""
    inbound_count: int = 0
    """Let in."""
    state_count: int = 0
    """States made."""
    dropped_cap: int = 0
    """Outbound: the host has `max_states`."""
    dropped_filtered: int = 0
    """Inbound: no state lets it in."""


class _State:
    __slots__ = ("expires", "host", "is_replied", "key")

    def __init__(self, key: _Key, host: str, expires: float) -> None:
        self.key = key
        self.host = host
        self.expires = expires
        self.is_replied = False


class Firewall:
    """One firewall. Feed it packets with times that never go back.

    Attributes:
        behaviour: What it does; fixed.
        counters: What became of the packets.
    """

    def __init__(self, behaviour: FirewallBehaviour) -> None:
        self.behaviour = behaviour
        self.counters = FirewallCounters()
        self._key = _KEYS[behaviour.filtering]
        self._states: dict[_Key, _State] = {}
        self._hosts: dict[str, int] = {}  # internal address -> states
        # Every state once, at a time not after its expiry: looked at again when it is due.
        self._due: list[tuple[float, int, _State]] = []
        self._sequence = 0

    def outbound(self, packet: Packet, now: float) -> bool:
        """Return whether a packet from the inside passes."""
        host = packet.source.ip
        key = self._key(packet.source, packet.destination)
        state = self._states.get(key)
        if state is None or state.expires <= now:
            self._expire(now)
            count = self._hosts.get(host, 0)
            cap = self.behaviour.max_states
            if cap is not None and count >= cap:
                self.counters.dropped_cap += 1
                return False
            self._hosts[host] = count + 1
            state = self._states[key] = _State(key, host, now + self.behaviour.unreplied_lifetime_s)
            self._sequence += 1
            heappush(self._due, (state.expires, self._sequence, state))
            self.counters.state_count += 1
        else:
            self._refresh(state, now)
        self.counters.outbound_count += 1
        return True

    def inbound(self, packet: Packet, now: float) -> bool:
        """Return whether a packet from the outside passes."""
        state = self._states.get(self._key(packet.destination, packet.source))
        if state is None or state.expires <= now:
            self.counters.dropped_filtered += 1
            return False
        state.is_replied = True
        if self.behaviour.refreshed_by_inbound:
            self._refresh(state, now)
        self.counters.inbound_count += 1
        return True

    def state_count(self, now: float) -> int:
        """Return how many states are alive."""
        self._expire(now)
        return len(self._states)

    def check(self) -> None:
        """Assert what must hold between packets.

        Raises:
            AssertionError: The table is wrong.
        """
        assert len(self._due) == len(self._states)
        for key, state in self._states.items():
            assert state.key == key
        hosts: dict[str, int] = {}
        for state in self._states.values():
            hosts[state.host] = hosts.get(state.host, 0) + 1
        assert hosts == self._hosts, "the count of states of each host is wrong"
        cap = self.behaviour.max_states
        assert cap is None or all(count <= cap for count in hosts.values()), "the cap does not hold"

    def _refresh(self, state: _State, now: float) -> None:
        behaviour = self.behaviour
        state.expires = now + (
            behaviour.replied_lifetime_s if state.is_replied else behaviour.unreplied_lifetime_s
        )

    def _expire(self, now: float) -> None:
        due = self._due
        while due and due[0][0] <= now:
            _, sequence, state = heappop(due)
            if state.expires > now:
                heappush(due, (state.expires, sequence, state))
                continue
            del self._states[state.key]
            left = self._hosts[state.host] - 1
            if left:
                self._hosts[state.host] = left
            else:
                del self._hosts[state.host]


_KEYS: dict[Filtering, Callable[[Endpoint, Endpoint], _Key]] = {
    Filtering.EIF: lambda internal, remote: (internal.ip, internal.port),
    Filtering.ADF: lambda internal, remote: (internal.ip, internal.port, remote.ip),
    Filtering.APDF: lambda internal, remote: (internal.ip, internal.port, remote.ip, remote.port),
}
