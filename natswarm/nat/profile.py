"""What a node knows of its own NAT, in the words of RFC 4787, and says to its peers.

A profile is all that the other side needs to plan a puncture: can my port be known beforehand, whom
does my NAT let in, and where do its ports come from? It is evidence, not truth: what was not seen
is None, and every property that fills a gap says with what. Peers receive profiles from strangers,
so decoding checks every bound and a profile that lies harms only the puncture with the liar: bursts
go to addresses that a third party has seen the peer at, never to what a profile claims.

Source: RFC 4787 sections 4 and 5. Found by `classify.py`; used by `natswarm/puncture/plan.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.errors import AddressError, DecodeError
from natswarm.nat.allocation import BLOCK_SIZES, BLOCKS_MAX, PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping

__all__ = ["NatProfile", "decode_profile_untrusted"]

# A profile travels in signed records and introductions; usual ones take 300 bytes, full
# ones 700.
PROFILE_BYTES_MAX = 1024
# Pools that give one subscriber several addresses ("arbitrary pooling") show two or three; a
# puncture pays for each with as many probes again.
PUBLIC_IPS_MAX = 4
# Interfaces of a laptop with a VPN and IPv6; each costs a peer some probes to try.
LOCAL_ENDPOINTS_MAX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NatProfile:
    """What a NAT does, as far as it was seen.

    Attributes:
        mapping: None: not known. That is so with a single observer that saw the same endpoint from
            both its ports, which is EIM or ADM.
        filtering: None: nobody tried, or too few tries to tell silence from loss.
        allocation: The law of external ports; None: no echoes.
        public_ips: Our addresses as a quorum of observers saw them, the usual one first.
        main_endpoint: Where a peer finds the node's main UDP port; None where that cannot be
            known. It is the external endpoint if that is the same for every peer (EIM, a
            preserved port, no NAT), or, behind a NAT that lets in anybody, any endpoint that an
            observer saw. With `mapping` None it is what the only observer saw: right unless ADM.
        local_endpoints: Host candidates: the main port at each of our own addresses.
        is_translated: False: an observer saw our own address and port, so there is no NAT on the
            way (there may be a firewall: see `filtering`). None: no echoes.
        echo_count: Echoes the profile rests on.
        observer_count: Distinct addresses they came from.
        idle_lifetime_s: How long a mapping lives without traffic; None: not measured.
        absolute_lifetime_s: How long a mapping lives whatever its traffic; infinity: as long as
            was tried; None: not measured.
    """

    mapping: Mapping | None = None
    filtering: Filtering | None = None
    allocation: PortAllocation | None = None
    public_ips: tuple[str, ...] = ()
    main_endpoint: Endpoint | None = None
    local_endpoints: tuple[Endpoint, ...] = ()
    is_translated: bool | None = None
    echo_count: int = 0
    observer_count: int = 0
    idle_lifetime_s: float | None = None
    absolute_lifetime_s: float | None = None

    @classmethod
    def unknown(cls, local_endpoints: tuple[Endpoint, ...] | list[Endpoint] = ()) -> NatProfile:
        """Return the profile of a node that has met nobody yet."""
        return cls(local_endpoints=tuple(local_endpoints)[:LOCAL_ENDPOINTS_MAX])

    @property
    def is_predictable(self) -> bool:
        """Whether a peer that was never contacted will see our main port at `main_endpoint`."""
        if self.main_endpoint is None:
            return False
        return (
            self.is_translated is False
            or self.mapping in (Mapping.EIM, None)
            or (self.allocation is not None and self.allocation.law is AllocationLaw.PRESERVING)
        )

    @property
    def accepts_strangers(self) -> bool:
        """Whether a packet from anybody to `main_endpoint` gets in.

        A host without a NAT counts as open until a test has shown a firewall.
        """
        if self.main_endpoint is None:
            return False
        if self.filtering is None:
            return self.is_translated is False
        return self.filtering is Filtering.EIF

    @property
    def accepts_address(self) -> bool:
        """Whether one packet out to an address opens a port of ours for all its ports."""
        return self.filtering in (Filtering.EIF, Filtering.ADF)

    def __str__(self) -> str:
        """As on a screen: `APDM/APDF, block 256 at 41216..41471`."""
        if self.is_translated is None:
            return "not known yet: nobody has told us what they see"
        mapping = "EIM or ADM" if self.mapping is None else self.mapping.value
        filtering = "filtering not known" if self.filtering is None else self.filtering.value
        if not self.is_translated:
            return f"no NAT, {self.filtering.value if self.filtering else 'firewall not known'}"
        joint = "/" if self.filtering is not None else ", "
        ports = "" if self.allocation is None else f", {self.allocation}"
        return f"{mapping}{joint}{filtering}{ports}"

    def encode(self) -> bytes:
        """Return the msgpack form, at most 1,024 bytes."""
        data = msgspec.msgpack.encode(self)
        assert len(data) <= PROFILE_BYTES_MAX, "bounded by the counts above"
        return data


def decode_profile_untrusted(data: bytes) -> NatProfile:
    """Read a profile that a peer wrote.

    Raises:
        DecodeError: Damaged, over the bounds, or with values that no NAT can have.
    """
    if len(data) > PROFILE_BYTES_MAX:
        raise DecodeError(f"a profile has at most {PROFILE_BYTES_MAX} bytes, not {len(data)}")
    try:
        profile = msgspec.msgpack.decode(data, type=NatProfile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"not a profile: {error}") from error
    try:
        _check(profile)
    except AddressError as error:
        raise DecodeError(f"not a profile: {error}") from error
    return profile


def _check(profile: NatProfile) -> None:
    """Raise DecodeError or AddressError for values that no node states honestly."""
    if len(profile.public_ips) > PUBLIC_IPS_MAX:
        raise DecodeError(f"more than {PUBLIC_IPS_MAX} public addresses")
    if len(profile.local_endpoints) > LOCAL_ENDPOINTS_MAX:
        raise DecodeError(f"more than {LOCAL_ENDPOINTS_MAX} host candidates")
    for ip in profile.public_ips:
        _check_ip(ip)
        if address_kind(ip) is not AddressKind.GLOBAL:
            raise DecodeError(f"{ip} is not a public address")
    main = () if profile.main_endpoint is None else (profile.main_endpoint,)
    for endpoint in (*profile.local_endpoints, *main):
        _check_ip(endpoint.ip)
        if not 1 <= endpoint.port <= 65_535:
            raise DecodeError(f"{endpoint.port} is not a port")
    for count in (profile.echo_count, profile.observer_count):
        if not 0 <= count < 2**31:
            raise DecodeError("a count out of bounds")
    for lifetime_s in (profile.idle_lifetime_s, profile.absolute_lifetime_s):
        if lifetime_s is not None and (math.isnan(lifetime_s) or lifetime_s <= 0):
            raise DecodeError("a lifetime is positive")
    if profile.allocation is not None:
        _check_allocation(profile.allocation)


def _check_ip(ip: str) -> None:
    if address_kind(ip) is AddressKind.UNUSABLE:
        raise DecodeError(f"{ip} can be nobody's address")
    # The canonical form alone: profiles are compared and planned with as text.
    if Endpoint.decode_untrusted(Endpoint(ip, 1).to_bytes()).ip != ip:
        raise DecodeError(f"{ip!r} is not in its shortest form")


def _check_allocation(allocation: PortAllocation) -> None:
    if not 1 <= allocation.low <= allocation.high <= 65_535:
        raise DecodeError("not a range of ports")
    seen = (allocation.seen_low, allocation.seen_high)
    if seen != (None, None) and not (
        seen[0] is not None
        and seen[1] is not None
        and allocation.low <= seen[0] <= seen[1] <= allocation.high
    ):
        raise DecodeError("ports seen outside of the range")
    if allocation.law is AllocationLaw.BLOCK:
        size = allocation.block_size
        if size not in BLOCK_SIZES or not 1 <= len(allocation.blocks) <= BLOCKS_MAX:
            raise DecodeError("not blocks of ports")
        distinct = len(dict.fromkeys(allocation.blocks)) == len(allocation.blocks)
        if not distinct or any(
            base % size or not 0 <= base <= 65_536 - size for base in allocation.blocks
        ):
            raise DecodeError("blocks of ports are aligned and distinct")
    if allocation.law is AllocationLaw.SEQUENTIAL:
        if allocation.last_port is None or not 1 <= allocation.last_port <= 65_535:
            raise DecodeError("a counter has a last port")
        if not allocation.step or abs(allocation.step) > 65_535:
            raise DecodeError("a counter has a step")
    if allocation.others_per_s is not None and not 0 <= allocation.others_per_s <= 1e6:
        raise DecodeError("a rate of other subscribers' mappings out of bounds")
    if not 0 <= allocation.sample_count < 2**31:
        raise DecodeError("a count out of bounds")
