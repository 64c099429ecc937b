"""When to send beacons, and which of those that come in tell something new.

    a link appears     beacons after about 0, 3 and 12 s: multicast on Wi-Fi gets lost
    from then on       one in five minutes, a tenth more or less (BEP 14)
    a new peer shows   one within 2 s, but never two in a minute: it may not have heard us

A link is one address of ours on one interface: a laptop with Ethernet and Wi-Fi, IPv4 and IPv6,
has four. A beacon that comes back by another link of ours, or from ourselves, tells nothing.

Bounds: what is remembered of 256 peers, at most 16 at one address, since keys are free; whoever
fills the room of its own address leaves the others' alone. Rates are the driver's affair.

Pure: time and randomness are arguments. Source: BEP 14.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from natswarm.address import Endpoint
from natswarm.discovery.beacon import SALT_BYTES, BeaconCipher
from natswarm.errors import DecodeError
from natswarm.identity import Identity, PeerId

__all__ = ["BeaconSchedule", "BeaconStatistics", "Link", "PeerHeard"]

ANNOUNCE_INTERVAL_S = 300.0  # BEP 14
ANNOUNCE_GAP_S = 60.0  # BEP 14: one a minute at most; the first three of a link excepted
FIRST_ANNOUNCES_S = (0.0, 3.0, 12.0)
FIRST_JITTER_S = 1.0  # machines of one house start together when the power comes back
ANSWER_DELAY_S = (0.2, 2.0)

# A peer that is heard again sooner tells nothing new; the third first beacon is a second chance
# for a dial that failed.
HEARD_AGAIN_S = 8.0
# Not heard in three intervals: gone, or somewhere else.
FORGOTTEN_S = 3 * ANNOUNCE_INTERVAL_S
HEARD_MAX = 256
HEARD_PER_ADDRESS_MAX = 16


@dataclass(frozen=True, slots=True, order=True)
class Link:
    """Where beacons are sent and heard.

    Attributes:
        interface: Its name.
        ip: Our address there, without scope: beacons leave from it.
    """

    interface: str
    ip: str


@dataclass(frozen=True, slots=True)
class PeerHeard:
    """A peer says that it takes strangers at `endpoint`; it signed that, and sends from there."""

    peer_id: PeerId
    endpoint: Endpoint
    interface: str


@dataclass(slots=True)
class BeaconStatistics:
    """Counters; they only grow."""

    sent_count: int = 0
    heard_count: int = 0
    """Beacons of our swarm by others, news or not."""
    foreign_count: int = 0
    """Not a beacon, or one of another swarm."""
    forged_count: int = 0
    """Of our swarm, but from another address than it names, or with a bad signature."""
    crowded_count: int = 0
    """Authentic, but of one peer too many at one address."""


@dataclass(slots=True)
class _Plan:
    """The beacons of one link."""

    due_at: float
    first_left: list[float]
    sent_at: float = float("-inf")


class BeaconSchedule:
    """The beacons of one node.

    Args:
        identity: Who we are.
        port: Our main port: where we take strangers at each of our addresses.
        cipher: Of our swarm.
        rng: Draws the jitter.
        entropy: Draws salts: a number of bytes -> that many, never the same twice.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        port: int,
        cipher: BeaconCipher,
        rng: random.Random,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._identity = identity
        self._port = port
        self._cipher = cipher
        self._rng = rng
        self._entropy = entropy
        self._plans: dict[Link, _Plan] = {}
        self._heard: OrderedDict[tuple[PeerId, Endpoint], float] = OrderedDict()
        self._statistics = BeaconStatistics()

    def statistics(self) -> BeaconStatistics:
        """Return the counters so far."""
        return self._statistics

    @property
    def links(self) -> list[Link]:
        """Where we send, oldest first."""
        return list(self._plans)

    def add_link(self, link: Link, now: float) -> None:
        """Begin to send on a link that has appeared."""
        starts = [now + delay + self._rng.uniform(0, FIRST_JITTER_S) for delay in FIRST_ANNOUNCES_S]
        self._plans[link] = _Plan(due_at=starts[0], first_left=starts[1:])

    def remove_link(self, link: Link) -> None:
        """Stop: it is gone."""
        del self._plans[link]

    def next_timer(self) -> float | None:
        """When the next beacon is due; None: never."""
        return min((plan.due_at for plan in self._plans.values()), default=None)

    def datagrams_to_send(self, now: float) -> list[tuple[Link, bytes]]:
        """Return the beacons that are due, and the link of each."""
        due = [(link, plan) for link, plan in self._plans.items() if plan.due_at <= now]
        for _, plan in due:
            plan.sent_at = now
            # A machine that slept has missed some of the first; they are not sent in one go.
            plan.due_at = (
                max(plan.first_left.pop(0), now + FIRST_JITTER_S)
                if plan.first_left
                else now + ANNOUNCE_INTERVAL_S * self._rng.uniform(0.9, 1.1)
            )
        self._statistics.sent_count += len(due)
        return [
            (
                link,
                self._cipher.encode(
                    self._identity, Endpoint(link.ip, self._port), self._entropy(SALT_BYTES)
                ),
            )
            for link, _ in due
        ]

    def receive_untrusted(
        self, data: bytes, source: Endpoint, interface: str, now: float
    ) -> PeerHeard | None:
        """Take a datagram that came to the group; return what is new in it.

        Args:
            data: What anybody on the LAN may have sent.
            source: Where it came from, by the system's word, with scope where the system says one.
            interface: Where it came in.
            now: Seconds.
        """
        try:
            beacon = self._cipher.decode_untrusted(data)
        except DecodeError:
            self._statistics.foreign_count += 1
            return None
        if beacon.sender == self._identity.peer_id:
            return None
        self._statistics.heard_count += 1
        endpoint = Endpoint(source.ip, beacon.endpoint.port)
        if beacon.endpoint.ip != source.ip.partition("%")[0] or beacon.endpoint.port == 0:
            self._statistics.forged_count += 1
            return None
        key = (beacon.sender, endpoint)
        heard_at = self._heard.get(key)
        if heard_at is not None and now < heard_at + HEARD_AGAIN_S:
            return None
        try:
            beacon.verify_untrusted()
        except DecodeError:
            self._statistics.forged_count += 1
            return None
        if not self._remember(key, now):
            return None
        if heard_at is None:
            self._answer(interface, source, now)
        return PeerHeard(beacon.sender, endpoint, interface)

    def _remember(self, key: tuple[PeerId, Endpoint], now: float) -> bool:
        while self._heard and next(iter(self._heard.values())) < now - FORGOTTEN_S:
            self._heard.popitem(last=False)
        if key not in self._heard:
            beside = sum(other.ip == key[1].ip for _, other in self._heard)
            if beside >= HEARD_PER_ADDRESS_MAX:
                self._statistics.crowded_count += 1
                return False
        self._heard[key] = now
        self._heard.move_to_end(key)
        if len(self._heard) > HEARD_MAX:
            self._heard.popitem(last=False)
        return True

    def _answer(self, interface: str, source: Endpoint, now: float) -> None:
        """Let a peer that we never heard hear us soon, by the link it came from."""
        is_ipv6 = ":" in source.ip
        for link, plan in self._plans.items():
            if link.interface == interface and (":" in link.ip) == is_ipv6:
                answer_at = now + self._rng.uniform(*ANSWER_DELAY_S)
                plan.due_at = min(plan.due_at, max(answer_at, plan.sent_at + ANNOUNCE_GAP_S))
