"""What is remembered of peers, how good each one is to come back to, and in which order.

A node that was away for hours or days rejoins by peers that it met before. Of each it remembers who
it is, its signed record, and for each network that we were in where it was seen, how often and when
it last answered there, and how often it stayed silent. Home addresses (192.168.x.y) mean something
in one network only; public ones are tried from everywhere.

    score = reliability * freshness * 2 (answered in this network) * 3 (takes strangers)

Reliability is (answers + 1) / (answers + silences + 2), with counts that halve in two weeks, so
that a peer unknown here starts at one half; freshness is 1 / (1 + days since it last answered).
Whoever refuses or vanishes thus sinks, and comes last, but is not forgotten at once.

Bounds: 512 peers, of each the 8 latest networks. Pure: the time is an argument, seconds since 1970.
Where it is kept: `net/peer_cache.py`; who uses it: `net/rejoin.py`.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, replace

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.identity import PeerId

__all__ = [
    "NETWORKS_MAX",
    "PEERS_MAX",
    "CachedPeer",
    "Sightings",
    "network_label",
    "rejoin_order",
    "score",
    "surplus",
    "with_answer",
    "with_presence",
    "with_silence",
]

PEERS_MAX = 512
NETWORKS_MAX = 8

HALF_LIFE_S = 14 * 86_400.0
DAY_S = 86_400.0
SAME_NETWORK_FACTOR = 2.0
OPEN_FACTOR = 3.0

ENDPOINTS_MAX = 4
LABEL_BYTES = 8


@dataclass(frozen=True, slots=True)
class Sightings:
    """A peer as it was seen from one network of ours.

    Attributes:
        network: Of ours; `network_label`.
        endpoint: Where the peer was, as we saw it ourselves.
        answered_count: Connections that came about, halved every two weeks.
        silent_count: Attempts in vain, halved every two weeks.
        answered_at_s: When it was last there, seconds since 1970; 0: never.
        silent_at_s: When it last was not; 0: never.
    """

    network: str
    endpoint: Endpoint
    answered_count: float = 0.0
    silent_count: float = 0.0
    answered_at_s: float = 0.0
    silent_at_s: float = 0.0

    @property
    def changed_at_s(self) -> float:
        """When anything was last noted."""
        return max(self.answered_at_s, self.silent_at_s)

    def faded(self, now_s: float) -> Sightings:
        """Return the same with the counts as they weigh now."""
        # A clock that was set back makes nothing newer than new.
        weight = 0.5 ** (max(0.0, now_s - self.changed_at_s) / HALF_LIFE_S)
        return replace(
            self,
            answered_count=self.answered_count * weight,
            silent_count=self.silent_count * weight,
        )


@dataclass(frozen=True, slots=True)
class CachedPeer:
    """What is remembered of one peer.

    Attributes:
        peer_id: Who.
        sealed_record: What it last said of itself, signed; None: nothing.
        is_open: Whether it takes strangers, by its record.
        sightings: Of each network of ours, the latest first.
    """

    peer_id: PeerId
    sealed_record: bytes | None
    is_open: bool
    sightings: tuple[Sightings, ...] = ()

    @property
    def answered_at_s(self) -> float:
        """When it last answered anywhere; 0: never."""
        return max((each.answered_at_s for each in self.sightings), default=0.0)

    def seen_from(self, network: str) -> Sightings | None:
        """Return how it was seen from a network; None: not yet."""
        return next((each for each in self.sightings if each.network == network), None)

    def endpoints(self, network: str) -> tuple[Endpoint, ...]:
        """Return where to dial it from a network: at most 4 endpoints, the likeliest first."""
        here = [each.endpoint for each in self.sightings if each.network == network]
        elsewhere = [
            each.endpoint
            for each in self.sightings
            if address_kind(each.endpoint.ip) is AddressKind.GLOBAL
        ]
        return tuple(dict.fromkeys(here + elsewhere))[:ENDPOINTS_MAX]


def network_label(ips: Iterable[str]) -> str:
    """Return a name for the network that a node with these addresses is in.

    It is made of the IPv4 networks (/24), or of the IPv6 ones (/64) where there are no others,
    since many homes get new IPv6 prefixes every day. Two homes with the same private network have
    one label: then a peer is tried at a wrong address once more, and nothing else happens.
    """
    addresses = {ipaddress.ip_address(ip.partition("%")[0]) for ip in ips}
    version = min((address.version for address in addresses), default=4)
    networks = sorted(
        str(ipaddress.ip_network((address, 24 if version == 4 else 64), strict=False))
        for address in addresses
        if address.version == version
    )
    return hashlib.blake2s(
        " ".join(dict.fromkeys(networks)).encode(), digest_size=LABEL_BYTES
    ).hexdigest()


def with_answer(peer: CachedPeer, network: str, endpoint: Endpoint, now_s: float) -> CachedPeer:
    """Return what is known of a peer after it answered us at `endpoint`."""
    before = (peer.seen_from(network) or Sightings(network, endpoint)).faded(now_s)
    return _with(
        peer,
        replace(
            before,
            endpoint=endpoint,
            answered_count=before.answered_count + 1,
            answered_at_s=now_s,
        ),
    )


def with_presence(peer: CachedPeer, network: str, endpoint: Endpoint, now_s: float) -> CachedPeer:
    """Return what is known of a peer that is connected to us for a while already."""
    before = (peer.seen_from(network) or Sightings(network, endpoint)).faded(now_s)
    return _with(peer, replace(before, endpoint=endpoint, answered_at_s=now_s))


def with_silence(peer: CachedPeer, network: str, now_s: float) -> CachedPeer:
    """Return what is known of a peer after it did not answer; nothing new if never seen."""
    before = peer.seen_from(network)
    if before is None:
        endpoints = peer.endpoints(network)
        if not endpoints:
            return peer
        before = Sightings(network, endpoints[0])
    before = before.faded(now_s)
    return _with(peer, replace(before, silent_count=before.silent_count + 1, silent_at_s=now_s))


def _with(peer: CachedPeer, sightings: Sightings) -> CachedPeer:
    others = [each for each in peer.sightings if each.network != sightings.network]
    return replace(peer, sightings=(sightings, *others)[:NETWORKS_MAX])


def score(peer: CachedPeer, network: str, now_s: float) -> float:
    """Return how good a peer is to come back to from a network; more is better."""
    faded = [each.faded(now_s) for each in peer.sightings]
    here = [each for each in faded if each.network == network]
    # What happened elsewhere tells something only where nothing has happened here.
    counted = here or faded
    answers = sum(each.answered_count for each in counted)
    silences = sum(each.silent_count for each in counted)
    reliability = (answers + 1) / (answers + silences + 2)
    freshness = 1 / (1 + max(0.0, now_s - peer.answered_at_s) / DAY_S)
    factor = OPEN_FACTOR if peer.is_open else 1.0
    if any(each.answered_at_s > 0 for each in here):
        factor *= SAME_NETWORK_FACTOR
    return reliability * freshness * factor


def rejoin_order(peers: Iterable[CachedPeer], network: str, now_s: float) -> list[CachedPeer]:
    """Return the peers that can be dialled from a network, the best first."""
    ranked = [
        (-score(peer, network, now_s), peer.peer_id, peer)
        for peer in peers
        if peer.endpoints(network)
    ]
    return [peer for _, _, peer in sorted(ranked, key=lambda each: each[:2])]


def surplus(peers: Iterable[CachedPeer], network: str, now_s: float) -> list[CachedPeer]:
    """Return whom to forget, so that at most 512 remain: the worst."""
    ranked = sorted(peers, key=lambda peer: (-score(peer, network, now_s), peer.peer_id))
    return ranked[PEERS_MAX:]
