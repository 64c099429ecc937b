"""What a node knows of its own NAT, in the words of RFC 4787, and says to its peers.

A profile is all that the other side needs to plan a puncture: can my port be known beforehand, whom
does my NAT let in, and where do its ports come from? It is evidence, not truth: what was not seen
is None, and every property that fills a gap says with what. Peers receive profiles from strangers,
so decoding checks every bound and a profile that lies harms only the puncture with the liar: bursts
go to addresses that a third party has seen the peer at, never to what a profile claims.

Source: RFC 4787 sections 4 and 5. Found by `classify.py`; used by `natswarm/puncture/plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import get_type_hints

import msgspec

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.errors import AddressError, DecodeError
from natswarm.nat.allocation import (
    BLOCK_SIZE_MAX,
    BLOCK_SIZE_MIN,
    BLOCKS_MAX,
    PortAllocation,
)
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Poison, Pooling
from natswarm.nat.shape import WEIGHT_MAX, WEIGHT_SLICES

__all__ = ["LOCAL_ENDPOINTS_MAX", "NatProfile", "decode_profile_untrusted"]

PROFILE_VERSION = 2
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
        local_endpoints: Host candidates: the main port at each of our own addresses, and where our
            gateway forwards to it.
        is_translated: False: an observer saw our own address and port, so there is no NAT on the
            way (there may be a firewall: see `filtering`). None: no echoes.
        echo_count: Echoes the profile rests on.
        observer_count: Distinct addresses they came from.
        pooling: Whether all our mappings have one public address; None: not known.
        hairpinning: Whether our NAT turns round what we send to its own address; None: not known.
        poison: What a packet that our NAT refuses does to the mapping it came to; None: not known.
        tftp_helper: Whether a TFTP request to an address lets in an answer from any port of it;
            None: not known.
        idle_unreplied_s: How long a mapping lives without traffic that nobody has answered on;
            infinity: longer than was tried; None: not measured.
        idle_lifetime_s: The same for one that was answered on.
        absolute_lifetime_s: How long a mapping lives whatever its traffic, the shortest seen;
            infinity: longer than was tried; None: not measured.
        inbound_refreshes: Whether inbound packets restart the idle time, too; None: not measured.
        mappings_seen: The most mappings we had alive at once: at least so many are allowed.
        max_mappings: Mappings we may have at once; None: no limit was met up to `mappings_seen`.
        mapping_rate_per_s: New mappings we may make in a second, after a burst; infinity: as fast
            as was tried; None: not measured.
        mapping_burst: New mappings we may make at once where `mapping_rate_per_s` is finite.
        remotes_seen: The most remotes that one port of ours talked to at once.
        nat_count: NATs on our way out, at least; None: not known.
        opener_ttl: Hop limit with which a datagram leaves all our NATs and reaches nobody's; None:
            not known.
        inferred: Names of those fields above that follow from something else that was measured.
            What is None is unknown, the rest was measured.
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
    pooling: Pooling | None = None
    hairpinning: bool | None = None
    poison: Poison | None = None
    tftp_helper: bool | None = None
    idle_unreplied_s: float | None = None
    idle_lifetime_s: float | None = None
    absolute_lifetime_s: float | None = None
    inbound_refreshes: bool | None = None
    mappings_seen: int = 0
    max_mappings: int | None = None
    mapping_rate_per_s: float | None = None
    mapping_burst: int | None = None
    remotes_seen: int = 0
    nat_count: int | None = None
    opener_ttl: int | None = None
    inferred: tuple[str, ...] = ()

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
    def is_counter(self) -> bool:
        """Whether new mappings get a counter's next port: what is known of it ages in seconds."""
        return (
            not self.is_predictable
            and self.allocation is not None
            and self.allocation.law is AllocationLaw.SEQUENTIAL
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

    @property
    def forwarded_endpoints(self) -> tuple[Endpoint, ...]:
        """Endpoints that the gateway forwards to us on request (PCP, NAT-PMP, UPnP-IGD).

        They stand among the host candidates: an IPv4 address that is public, not our own, and the
        one that others see us at. Seen at another, there is a further NAT above the gateway, and
        the port leads nowhere.
        """
        if not self.is_translated:
            return ()
        return tuple(
            endpoint
            for endpoint in self.local_endpoints
            if ":" not in endpoint.ip
            and endpoint.kind is AddressKind.GLOBAL
            and endpoint.ip in self.public_ips
        )

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
        """Return the msgpack form: version and fields in order, at most 1,024 bytes."""
        values = (getattr(self, each.name) for each in fields(self))
        data = msgspec.msgpack.encode(_Form(PROFILE_VERSION, *values))
        assert len(data) <= PROFILE_BYTES_MAX, "bounded by the counts above"
        return data


_FIELDS = tuple(each.name for each in fields(NatProfile))
_HINTS = get_type_hints(NatProfile)
# An array, not a map: names would be two thirds of the bytes. Later versions append fields.
_Form = msgspec.defstruct(
    "_Form",
    [
        ("version", int),
        *((each.name, _HINTS[each.name], each.default) for each in fields(NatProfile)),
    ],
    array_like=True,
)


def decode_profile_untrusted(data: bytes) -> NatProfile:
    """Read a profile that a peer wrote.

    Raises:
        DecodeError: Damaged, over the bounds, or with values that no NAT can have.
    """
    if len(data) > PROFILE_BYTES_MAX:
        raise DecodeError(f"a profile has at most {PROFILE_BYTES_MAX} bytes, not {len(data)}")
    try:
        version, *values = msgspec.structs.astuple(msgspec.msgpack.decode(data, type=_Form))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"not a profile: {error}") from error
    if version < PROFILE_VERSION:
        raise DecodeError(f"a profile of version {version}; this side reads {PROFILE_VERSION} up")
    profile = NatProfile(**dict(zip(_FIELDS, values, strict=True)))
    try:
        _check(profile)
    except AddressError as error:
        raise DecodeError(f"not a profile: {error}") from error
    return profile


_COUNTS = (
    "echo_count",
    "observer_count",
    "mappings_seen",
    "max_mappings",
    "mapping_burst",
    "remotes_seen",
    "nat_count",
)
_POSITIVE = ("idle_unreplied_s", "idle_lifetime_s", "absolute_lifetime_s", "mapping_rate_per_s")


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
    for name in _COUNTS:
        count = getattr(profile, name)
        if count is not None and not 0 <= count < 2**31:
            raise DecodeError(f"{name} out of bounds")
    for name in _POSITIVE:
        value = getattr(profile, name)
        if value is not None and not value > 0:  # not a number, either
            raise DecodeError(f"{name} is positive")
    if profile.opener_ttl is not None and not 1 <= profile.opener_ttl <= 255:
        raise DecodeError("a hop limit is 1..255")
    if not set(profile.inferred) <= set(_FIELDS) or len(profile.inferred) > len(_FIELDS):
        raise DecodeError("an unknown field was inferred")
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
    if allocation.law is AllocationLaw.BLOCK or allocation.block_size is not None:
        _check_blocks(allocation.block_size, allocation.blocks)
    elif allocation.blocks:
        raise DecodeError("blocks of ports have a size")
    if allocation.shape is not None and not all(0 < each <= 1e3 for each in allocation.shape):
        raise DecodeError("not a Beta law")
    weights = allocation.weights
    if len(weights) > WEIGHT_SLICES or not all(0 < each <= WEIGHT_MAX for each in weights):
        raise DecodeError("not the weights of a range")
    if weights and allocation.law is not AllocationLaw.UNIFORM:
        raise DecodeError("only a range has weights")
    if allocation.law_probability is not None and not 0 <= allocation.law_probability <= 1:
        raise DecodeError("not a probability")
    if allocation.law is AllocationLaw.SEQUENTIAL:
        if allocation.last_port is None or not 1 <= allocation.last_port <= 65_535:
            raise DecodeError("a counter has a last port")
        if not allocation.step or abs(allocation.step) > 65_535:
            raise DecodeError("a counter has a step")
    if allocation.others_per_s is not None and not 0 <= allocation.others_per_s <= 1e6:
        raise DecodeError("a rate of other subscribers' mappings out of bounds")
    if not 0 <= allocation.sample_count < 2**31:
        raise DecodeError("a count out of bounds")


def _check_blocks(size: int | None, bases: tuple[int, ...]) -> None:
    if size is None or not BLOCK_SIZE_MIN <= size <= BLOCK_SIZE_MAX:
        raise DecodeError("not blocks of ports")
    if not 1 <= len(bases) <= BLOCKS_MAX:
        raise DecodeError(f"1 to {BLOCKS_MAX} blocks of ports")
    ascending = sorted(bases)
    if ascending[0] < 0 or ascending[-1] > 65_536 - size:
        raise DecodeError("a block outside of all ports")
    if any(after - before < size for before, after in pairwise(ascending)):
        raise DecodeError("blocks of ports do not overlap")
