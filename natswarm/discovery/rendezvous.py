"""Meet again by the clock alone: when, under which name and at which ports, with nobody in between.

Two peers that met once keep each other's record, and from their keys both derive one secret. That
and UTC are enough to agree on the rest without a word:

    slot    every 120 s by the clock on the wall both start a puncture
    epoch   every 30 min: the name of the attempts, and from which local port each side starts
    roles   by the order of the PeerIds: the first side keeps to its slots, the second one seeks

**Ports.** Whatever port a socket had when the two met is gone with its mapping. But a NAT that
keeps ports, and a host without one, shows the port that the socket is bound to: so each side binds
one that both can derive, and its endpoint is known to the other with no word said. A NAT that draws
ports is met by the law it draws them by, as the record tells it. A counter has moved on; only the
range it moves in is left of it. A block of ports may have gone back to the carrier.

**Clocks.** Where one side can wait with its NAT open, it does so for the whole slot, and any clock
will do. Where both send bursts they must start within about 4 s of each other. The second side
starts with the slot, as clocks of phones and computers are right to a second; in between it tries
the starts that a wrong clock of the other side would have, 8 s apart. Clocks that differ by minutes
name different epochs for those minutes before and after one begins.

Pure: the time is an argument. Source: reference section 4.9; our own.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

from natswarm.address import Endpoint
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw
from natswarm.nat.profile import NatProfile
from natswarm.wire import ATTEMPT_BYTES

__all__ = ["EPOCH_S", "SLOT_S", "Appointment", "MeetingClock", "profiles_at"]

SLOT_S = 120.0
EPOCH_S = 1800.0
# Bursts of both sides fit together if they start within `START_SKEW_S` of each other, 4 s.
PHASE_S = 8.0
# Of so many starts of slots one may be missed for seeking.
LATE_SHARE = 3

# Above what systems give out by themselves on most hosts, below what some reserve at the top.
PORT_LOW, PORT_COUNT = 20_000, 12_000


@dataclass(frozen=True, slots=True)
class Appointment:
    """One attempt to meet.

    Attributes:
        starts_at_s: When, seconds since 1970 by our own clock.
        slot_ends_at_s: When its slot is over, by our own clock.
        attempt: 8 bytes that name it on both sides.
        my_port: Where we bind.
        their_port: Where the peer binds.
    """

    starts_at_s: float
    slot_ends_at_s: float
    attempt: bytes
    my_port: int
    their_port: int


class MeetingClock:
    """The appointments of one side with one peer.

    Args:
        secret: 32 bytes that only the two can derive.
        is_first: Whether our PeerId is the lower one.
    """

    def __init__(self, secret: bytes, *, is_first: bool) -> None:
        self._secret = secret
        self._is_first = is_first
        self._tries = [0] * int(SLOT_S / PHASE_S)  # of each phase; 0 is the start of a slot

    def next(self, now_s: float, *, seek_s: float = 0.0) -> Appointment:
        """Return the next appointment.

        Args:
            now_s: By our own clock.
            seek_s: How long an attempt takes that must start together with the peer's; 0 where it
                need not, so that the starts of slots are enough.
        """
        slot = math.floor(now_s / SLOT_S) * SLOT_S
        if now_s > slot:
            phase = self._seek(now_s - slot, seek_s)
            if phase is not None:
                return self._appointment(slot + phase * PHASE_S, phase)
            slot += SLOT_S
        return self._appointment(slot, 0)

    def _seek(self, since_s: float, seek_s: float) -> int | None:
        """Return the phase to try in what is left of a slot, the least tried one first."""
        if self._is_first or seek_s <= 0 or self._tries[0] == 0:
            return None
        ahead = [phase for phase in range(1, len(self._tries)) if since_s <= phase * PHASE_S]
        # The last ones cost the start of the next slot: they come after all others, and seldom.
        # With it they leave time for the first ones, which the start of the slot takes else.
        late = math.floor((SLOT_S - seek_s) / PHASE_S) + 1
        if LATE_SHARE * sum(self._tries[late:]) >= self._tries[0]:
            ahead = [phase for phase in ahead if phase < late]
        return min(
            ahead, key=lambda phase: (self._tries[phase], phase >= late, phase), default=None
        )

    def _appointment(self, starts_at_s: float, phase: int) -> Appointment:
        self._tries[phase] += 1
        # The slot of the other side that begins now, if its clock is wrong by as little as can be.
        shift_s = phase * PHASE_S
        theirs_s = starts_at_s - shift_s + (SLOT_S if shift_s > SLOT_S / 2 else 0.0)
        epoch = math.floor(theirs_s / EPOCH_S)
        return Appointment(
            starts_at_s=starts_at_s,
            slot_ends_at_s=starts_at_s - shift_s + SLOT_S,
            attempt=self._derive(b"name", epoch)[:ATTEMPT_BYTES],
            my_port=self._port(self._is_first, epoch),
            their_port=self._port(not self._is_first, epoch),
        )

    def _port(self, is_first: bool, epoch: int) -> int:
        draw = self._derive(b"first" if is_first else b"second", epoch)
        return PORT_LOW + int.from_bytes(draw[:4], "big") % PORT_COUNT

    def _derive(self, what: bytes, epoch: int) -> bytes:
        message = epoch.to_bytes(8, "big", signed=True)
        return hashlib.blake2s(message, key=self._secret, person=what).digest()


def profiles_at(
    mine: NatProfile, theirs: NatProfile, my_port: int, their_port: int
) -> tuple[NatProfile, NatProfile]:
    """Return what profiles of some time ago say of fresh sockets that are bound to these ports.

    A block goes back to the carrier when none of its ports is used. Against a side whose endpoint
    is known there is room to try the old block first, and then all ports.
    """
    one, other = _at_port(mine, my_port), _at_port(theirs, their_port)
    if other.is_predictable:
        one = _with_block_in_doubt(one)
    if one.is_predictable:
        other = _with_block_in_doubt(other)
    return one, other


def _with_block_in_doubt(profile: NatProfile) -> NatProfile:
    allocation = profile.allocation
    if allocation is None or allocation.law is not AllocationLaw.BLOCK or not allocation.blocks:
        return profile
    newest = allocation.ranges[0]
    law = PortAllocation(AllocationLaw.UNIFORM, seen_low=newest.low, seen_high=newest.high)
    return replace(profile, allocation=law)


def _at_port(profile: NatProfile, port: int) -> NatProfile:
    allocation = profile.allocation
    keeps_port = allocation is not None and allocation.law is AllocationLaw.PRESERVING
    main: Endpoint | None = None
    ip = profile.public_ips[0] if profile.public_ips else None
    if ip is None and profile.main_endpoint is not None:
        ip = profile.main_endpoint.ip
    if ip is not None and (keeps_port or profile.is_translated is False):
        main = Endpoint(ip, port)
    if allocation is not None and allocation.law is AllocationLaw.SEQUENTIAL:
        allocation = PortAllocation(AllocationLaw.UNIFORM, allocation.low, allocation.high)
    # What a gateway forwarded was another port.
    local_ips = [
        endpoint.ip
        for endpoint in profile.local_endpoints
        if not (profile.is_translated and endpoint.ip == ip)
    ]
    return replace(
        profile,
        main_endpoint=main,
        allocation=allocation,
        local_endpoints=tuple(Endpoint(each, port) for each in dict.fromkeys(local_ips)),
    )
