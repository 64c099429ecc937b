"""How published systems puncture: what they would send, as far as their constants are public.

Each rival is a schedule of datagrams (when, from which socket, where to, with which hop limit) made
from the same two profiles as our plan. Whoever hears a probe answers it and holds still for a
second, as all of them do in some way. What a system negotiates before and after is left out, which
favours the rival.

Sources: hyperdht `lib/holepuncher.js` and `lib/connect.js`; frp `pkg/nathole`; EasyTier
`connector/udp_hole_punch`; OrestisKan/kotlin-birthday-connect `ConnectionEstablisher.kt` and
`PortChooser.kt`; Tribler/py-ipv8 `community.py`. Measured in a lab: docs/puncturing.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from natswarm.address import Endpoint
from natswarm.nat.behaviour import AllocationLaw
from natswarm.nat.profile import NatProfile

__all__ = ["RIVALS", "Schedule", "Send", "View"]


# Before it punches, the side whose ports are drawn dials and waits so long for an answer
# (`try_connect_with_socket`).
EASYTIER_DIAL_S = 3.0


class Send(NamedTuple):
    """One datagram: seconds since the start, socket number, where to, hop limit."""

    at_s: float
    socket: int
    destination: Endpoint
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What one side goes by.

    Attributes:
        mine: Our NAT.
        theirs: The peer's.
        is_first: Whether we called.
        rng: Draws what is random.
        draw_port: A port by the law that the peer's carrier is known for, as an app could ship it.
    """

    mine: NatProfile
    theirs: NatProfile
    is_first: bool
    rng: random.Random
    draw_port: Callable[[random.Random], int]

    @property
    def their_ip(self) -> str:
        """Where the peer's NAT is."""
        return self.theirs.public_ips[0]

    @property
    def known(self) -> Endpoint | None:
        """Where the peer is, if that can be known."""
        return self.theirs.main_endpoint if self.theirs.is_predictable else None

    @property
    def counter(self) -> int | None:
        """The peer's last port if its NAT counts."""
        return _last_port(self.theirs)


Schedule = Iterator[Send]


def _last_port(profile: NatProfile) -> int | None:
    allocation = profile.allocation
    if allocation is None or allocation.law is not AllocationLaw.SEQUENTIAL:
        return None
    return allocation.last_port


def hyperdht(view: View) -> Schedule:
    """256 sockets with TTL 5, 1,750 random ports at 20 ms; nothing where both draw ports."""
    known = view.known
    if known is not None and view.mine.is_predictable:
        yield from (Send(float(second), 0, known) for second in range(10))
    elif known is not None:
        yield from (Send(0.0, socket, known, 5) for socket in range(256))
        yield from (Send(0.02 * (1 + count), count % 256, known) for count in range(1750))
    elif view.mine.is_predictable:
        for count in range(1750):
            yield Send(0.02 * count, 0, Endpoint(view.their_ip, 1000 + view.rng.randrange(64_536)))


def frp(view: View) -> Schedule:
    """Behaviours of mode 0, 1, 2 or 3 in turn: TTL 7, then 4, then none; 5 s or 20 s each."""
    known = view.known
    for attempt, ttl in enumerate((7, 4, None)):
        if known is not None and view.mine.is_predictable:
            yield Send(5.0 * attempt, 0, known, None if view.is_first else ttl)
        elif known is not None and _last_port(view.mine) is not None:
            yield Send(5.0 * attempt, 0, known)  # mode 1: the side whose ports count is the sender
        elif known is not None:  # mode 2: the receiver, 256 sockets
            yield from (Send(20.0 * attempt, socket, known, ttl) for socket in range(257))
        elif (counter := view.counter) is not None:  # modes 1 and 3: ports around the last one
            for index, port in enumerate(range(counter - 10, counter + 11)):
                hops = None if view.is_first and not view.mine.is_predictable else ttl
                yield Send(5.0 * attempt + 0.002 * index, 0, Endpoint(view.their_ip, port), hops)
        elif view.mine.is_predictable:  # mode 2: the sender, 1,000 distinct ports after 3 s
            for index, port in enumerate(view.rng.sample(range(1024, 65_535), 1000)):
                at_s = 20.0 * attempt + 3.0 + 0.015 * index
                yield Send(at_s, 0, Endpoint(view.their_ip, port))


def easytier(view: View) -> Schedule:
    """84 sockets every 200 ms, and 600..800 ports a round, each three times, twice.

    Two counters meet from 25 sockets at the 20th next port.
    """
    known = view.known
    if known is not None and view.mine.is_predictable:
        yield from (Send(0.2 * count, 0, known) for count in range(25))
    elif known is not None:
        yield Send(0.0, 0, known)
        for step in range(100):
            at_s = EASYTIER_DIAL_S + 0.2 * step
            yield from (Send(at_s, socket, known) for socket in range(84))
    elif (counter := view.counter) is not None and _last_port(view.mine) is not None:
        target = Endpoint(view.their_ip, counter + 20)
        for step in range(50):
            yield from (Send(0.1 * step, socket, target) for socket in range(25))
    elif view.mine.is_predictable:
        ports = view.rng.sample(range(1, 65_536), 65_535)
        if counter is not None:
            ports[:0] = [*range(counter + 1, counter + 51)] * 2
        at_s, position = EASYTIER_DIAL_S, 0
        for round_index in range(1, 6):
            count = view.rng.randrange(600, 800)
            if round_index > 2:
                count = max(2 * count // round_index, 180)
            for _ in range(2):
                for port in ports[position : position + count]:
                    yield from (Send(at_s, 0, Endpoint(view.their_ip, port)) for _ in range(3))
                    at_s += 0.001
            position += count
            at_s += 1.0  # it listens on


def kotlin(view: View) -> Schedule:
    """Ten datagrams at 200 ms to a known port, else up to 243,587 random ports at 7,500/s."""
    known = view.known
    if known is not None:
        yield from (Send(0.2 * count, 0, known) for count in range(10))
        return
    for count in range(243_587):
        yield Send(0.002 * (count // 15), 0, Endpoint(view.their_ip, view.draw_port(view.rng)))


def py_ipv8(view: View) -> Schedule:
    """One datagram to where the peer was last seen."""
    target = view.theirs.main_endpoint
    if target is not None:
        yield Send(0.0, 0, target)


RIVALS: dict[str, Callable[[View], Schedule]] = {
    "hyperdht": hyperdht,
    "frp": frp,
    "EasyTier": easytier,
    "kotlin-bc": kotlin,
    "py-ipv8": py_ipv8,
}
