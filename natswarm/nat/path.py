"""The path outward: which routers a datagram of ours passes, and where our own NATs end.

Openers should leave all NATs of ours, so that they make mappings, and die before a stranger's,
which may take them amiss (`Poison` in `natswarm/nat/behaviour.py`). A trace finds the hop limit for
it: probes with hop limits from 1 up, and the routers where they run out say so by ICMP.

A NAT answers from its inner address. A datagram whose limit runs out there was not translated yet;
one more hop takes it through. So the limit wanted is that of the last private or shared hop, plus
1, if the hop there answers with a global address. If it is silent, it may be one more NAT of ours;
then the first hop with a global address is sure to be outside. Routers beyond may have private
addresses, too, since nobody needs to reach them: after two global hops in a row we are outside.

What a trace cannot see: a NAT that is silent right before a silent end; one that answers from its
outer address (then the opener dies in it: rare, Linux does not); how far a stranger is. The limit
is the smallest that leaves, which is the best there is.

Source: RFC 792 and RFC 1812 section 4.3.2 (ICMP errors), RFC 1918, RFC 6598 (addresses), hyperdht
and frp (openers of TTL 5, and of 7, then 4), which guess. Knows no sockets and no clock: a driver
(`natswarm/net/path.py`) sends, waits and tells.
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass
from typing import NamedTuple

from natswarm.address import AddressKind, Endpoint, address_kind

__all__ = ["Hop", "PathAnswer", "PathReport", "PathTrace", "Realm"]

# So many answers in a row from global addresses are the internet, not a carrier that has given one
# of its inner routers a global address.
GLOBAL_RUN = 2

CARRIER_PRIVATE = ipaddress.ip_network("10.0.0.0/8")


class Realm(enum.IntEnum):
    """What an address says about where it is; ascending outwards."""

    HOME = 1
    """192.168.0.0/16, 172.16.0.0/12: homes and offices."""
    CARRIER = 2
    """100.64.0.0/10 and 10.0.0.0/8: networks that are too large for the others."""
    GLOBAL = 3


class PathAnswer(NamedTuple):
    """What came back for a probe.

    Attributes:
        ttl: Of the probe.
        ip: Who says it.
        is_end: Whether no higher limit leads further: the destination itself, or a router that has
            no way to it.
    """

    ttl: int
    ip: str
    is_end: bool


@dataclass(frozen=True, slots=True)
class Hop:
    """One router on the way, or the destination.

    Attributes:
        ttl: Hop limit with which a datagram ends there, from 1 up.
        ip: Its address; None when it is silent.
        rtt_s: Time until it answered, seconds; None when it is silent, or answered only after it
            was asked again, and may have meant either.
    """

    ttl: int
    ip: str | None
    rtt_s: float | None = None


@dataclass(frozen=True, slots=True)
class PathReport:
    """What a trace found.

    Attributes:
        destination: Towards whom; None where there was nobody.
        local_ip: Our own address on that way; None where it is not known.
        hops: From TTL 1 without a gap; silent ones behind the last answer are left out.
        reached: Whether the last hop is the destination.
        trouble: Why nothing was traced; empty if something was.
    """

    destination: Endpoint | None
    local_ip: str | None
    hops: tuple[Hop, ...]
    reached: bool
    trouble: str = ""

    @property
    def inside_hop_count(self) -> int:
        """Where private and shared addresses end: the TTL of the last such hop of ours; else 0."""
        last = 0
        run = 0
        for hop in self._way:
            realm = _realm(hop.ip)
            if realm is Realm.GLOBAL:
                run += 1
                if run == GLOBAL_RUN:
                    break
            elif realm is not None:
                last, run = hop.ttl, 0
        return last

    @property
    def first_global_ttl(self) -> int | None:
        """The TTL of the first router outside, which has a global address; None if none answers."""
        for hop in self._way:
            if hop.ttl > self.inside_hop_count and _realm(hop.ip) is Realm.GLOBAL:
                return hop.ttl
        return None

    @property
    def nat_count_at_least(self) -> int:
        """How many NATs of ours are on the way, as far as addresses tell.

        Where the addresses change from those of homes to those of carriers, or from either to
        global ones, something translates; our own address counts, too. NATs between two networks of
        one kind cannot be seen. Only a carrier that gives private addresses to routers and does
        not translate at them makes the count one too high: nothing on the way tells it apart.
        """
        count, outmost = 0, _realm(self.local_ip)
        theirs = [hop for hop in self.hops if hop.ip == self._theirs]
        for hop in (*self._way, *theirs):
            realm = _realm(hop.ip)
            if realm is None:
                continue
            if outmost is not None and realm > outmost:
                count += 1
            outmost = max(realm, outmost or realm)
        return count

    @property
    def opener_ttl(self) -> int | None:
        """The smallest hop limit that surely leaves our NATs; None when it cannot be known.

        Without a NAT on the way, that of the first router that answers.
        """
        return self.first_global_ttl

    @property
    def reason(self) -> str:
        """Why there is no `opener_ttl`; empty if there is one."""
        if self.trouble:
            return self.trouble
        if self.opener_ttl is not None:
            return ""
        loop_ttl, way = self._loop_ttl, self._way
        if loop_ttl is not None:
            return f"the way turns in a circle at {self.hops[loop_ttl - 1].ip}, hop {loop_ttl}"
        if not way and not (self.reached and len(self.hops) == 1):
            before = " before the destination" if self.reached else ""
            return f"no router on the way{before} says where a hop limit runs out"
        if self.reached:
            return (
                "the destination comes before any router with a global address: trace towards a "
                "peer that is further away"
            )
        return f"behind {way[-1].ip}, hop {way[-1].ttl}, nobody answers: there may be one more NAT"

    @property
    def _theirs(self) -> str | None:
        return None if self.destination is None else self.destination.ip

    @property
    def _loop_ttl(self) -> int | None:
        """Where an address comes again after another one; twice in a row is a NAT's habit."""
        seen: list[str] = []
        for hop in self.hops:
            if hop.ip is None or (seen and seen[-1] == hop.ip):
                continue
            if hop.ip in seen:
                return hop.ttl
            seen.append(hop.ip)
        return None

    @property
    def _way(self) -> tuple[Hop, ...]:
        """The routers: what has the destination's address is it or its NAT; a loop is no way."""
        loop_ttl = self._loop_ttl
        way: list[Hop] = []
        for hop in self.hops:
            if hop.ttl == loop_ttl or hop.ip == self._theirs:
                break
            way.append(hop)
        while way and way[-1].ip is None:
            way.pop()
        return tuple(way)


class PathTrace:
    """A trace under way.

    Args:
        destination: Where the probes go.
        local_ip: Our own address.
        ttl_max: Probes have hop limits from 1 to this.
    """

    def __init__(self, destination: Endpoint, local_ip: str, ttl_max: int) -> None:
        self._destination = destination
        self._local_ip = local_ip
        self._ttl_max = ttl_max
        self._sent_at: dict[int, list[float]] = {}
        self._hops: dict[int, Hop] = {}
        self._end_ttl: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every router up to the end of the way has answered."""
        return not self._open_ttls()

    def ttls_to_send(self, now: float) -> list[int]:
        """Return the hop limits of the probes to send now: those that nobody has answered."""
        ttls = self._open_ttls()
        for ttl in ttls:
            self._sent_at.setdefault(ttl, []).append(now)
        return ttls

    def hear(self, answer: PathAnswer, now: float) -> None:
        """Take in an answer; only the first to each hop limit counts."""
        ttl = answer.ttl
        sent_at = self._sent_at.get(ttl)
        if sent_at is None or ttl in self._hops:
            return
        rtt_s = now - sent_at[0] if len(sent_at) == 1 else None
        self._hops[ttl] = Hop(ttl, answer.ip, rtt_s)
        if answer.is_end and (self._end_ttl is None or ttl < self._end_ttl):
            self._end_ttl = ttl

    def report(self) -> PathReport:
        """Return what is known by now."""
        end_ttl = self._end_ttl or max(self._hops, default=0)
        hops = tuple(self._hops.get(ttl, Hop(ttl, None)) for ttl in range(1, end_ttl + 1))
        reached = self._end_ttl is not None and hops[-1].ip == self._destination.ip
        return PathReport(self._destination, self._local_ip, hops, reached)

    def _open_ttls(self) -> list[int]:
        last = self._ttl_max if self._end_ttl is None else self._end_ttl
        return [ttl for ttl in range(1, last + 1) if ttl not in self._hops]


def _realm(ip: str | None) -> Realm | None:
    """Return where an address is from; None for none and for those that say nothing."""
    if ip is None:
        return None
    match address_kind(ip):
        case AddressKind.GLOBAL:
            return Realm.GLOBAL
        case AddressKind.SHARED:
            return Realm.CARRIER
        case AddressKind.PRIVATE:
            is_large = ipaddress.ip_address(ip) in CARRIER_PRIVATE
            return Realm.CARRIER if is_large else Realm.HOME
        case _:
            return None
