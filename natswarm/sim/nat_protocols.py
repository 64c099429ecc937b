"""The tables that a NAT has for TCP and for ICMP queries, besides that for UDP.

A port number of TCP and one of UDP are different things, and so is an identifier of ICMP: each
protocol has a table of its own (`nat.py`), which maps and filters alike. What differs is when a
session is over: TCP says when it begins and ends. Caps, rates and laws of allocation hold in each
table for itself; an absolute lifetime, the load and the TFTP helper are UDP's alone.

Source: RFC 5382 (TCP: an inbound SYN follows the filter; idle lifetimes of REQ-5), RFC 5508 (ICMP:
REQ-2 for the lifetime).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from natswarm.sim.nat import Nat, NatBehaviour
from natswarm.sim.nat_session import Session
from natswarm.sim.packet import ICMP, TCP, Packet

__all__ = ["TcpNat", "make_table"]

TCP_TRANSITORY_S = 240.0
TCP_ESTABLISHED_S = 7440.0
ICMP_LIFETIME_S = 60.0

# Flags of a segment (RFC 9293 section 3.1), which stand 9 bytes behind its ports.
_FLAGS_AT = 9
_FIN, _SYN, _RST = 0x01, 0x02, 0x04

# What was seen of a connection: SYN and FIN of each direction, and how far that brought it.
_SYN_OUT, _SYN_IN, _FIN_OUT, _FIN_IN, _IS_UP, _IS_RESET = 1, 2, 4, 8, 16, 32


def make_table(
    protocol: int, behaviour: NatBehaviour, ips: Sequence[str], rng: random.Random
) -> Nat | None:
    """Make the table of a protocol other than UDP; None where NATs know nothing of it.

    Args:
        protocol: IANA number.
        behaviour: What the NAT does with UDP.
        ips: Its addresses.
        rng: The table's own.
    """
    behaviour = replace(behaviour, absolute_lifetime_s=None, load=None, tftp_helper=False)
    if protocol == TCP:
        return TcpNat(behaviour, ips, rng)
    if protocol == ICMP:
        lifetime_s = ICMP_LIFETIME_S
        behaviour = replace(
            behaviour, unreplied_lifetime_s=lifetime_s, replied_lifetime_s=lifetime_s
        )
        return Nat(behaviour, ips, rng)
    return None


class TcpNat(Nat):
    """A table whose sessions are connections.

    A session lives long from the first segment after both SYNs until both FINs or a RST, and short
    before and after. Each direction keeps it alive, whatever the behaviour says of UDP.
    """

    def __init__(self, behaviour: NatBehaviour, ips: Sequence[str], rng: random.Random) -> None:
        super().__init__(
            replace(
                behaviour,
                unreplied_lifetime_s=TCP_TRANSITORY_S,
                replied_lifetime_s=TCP_ESTABLISHED_S,
                refreshed_by_inbound=True,
            ),
            ips,
            rng,
        )
        self._flags = 0  # of the segment at hand
        self._is_inbound = False

    def outbound(self, packet: Packet, now: float) -> Packet | None:
        """As any NAT's; a segment too short to have flags has none."""
        self._flags, self._is_inbound = _flags(packet.data), False
        return super().outbound(packet, now)

    def inbound(self, packet: Packet, now: float) -> Packet | None:
        """As any NAT's; a segment too short to have flags has none."""
        self._flags, self._is_inbound = _flags(packet.data), True
        return super().inbound(packet, now)

    def _refresh(self, session: Session, now: float) -> None:
        session.tcp_seen = seen = _next(session.tcp_seen, self._flags, self._is_inbound)
        mapping = session.mapping
        lifetime_s = TCP_ESTABLISHED_S if _is_established(seen) else TCP_TRANSITORY_S
        expires = min(now + lifetime_s, mapping.dies_at)
        if expires < session.expires:
            self._look_at(session, expires)
        session.expires = expires
        mapping.expires = max(mapping.expires, expires)


def _flags(data: bytes) -> int:
    return data[_FLAGS_AT] if len(data) > _FLAGS_AT else 0


def _next(seen: int, flags: int, is_inbound: bool) -> int:
    """Return what was seen of a connection after one more segment."""
    if flags & _RST:
        return seen | _IS_RESET
    if flags & _SYN:
        if not _is_established(seen) and seen & (_IS_UP | _IS_RESET):
            seen = 0  # the ports are used again
        return seen | (_SYN_IN if is_inbound else _SYN_OUT)
    if seen & _SYN_OUT and seen & _SYN_IN:
        seen |= _IS_UP
    if flags & _FIN:
        seen |= _FIN_IN if is_inbound else _FIN_OUT
    return seen


def _is_established(seen: int) -> bool:
    both_fins = _FIN_OUT | _FIN_IN
    return bool(seen & _IS_UP) and not seen & _IS_RESET and seen & both_fins != both_fins
