"""What an emulated NAT does, knob by knob, and what it counts.

Data only: `natswarm/sim/nat.py` carries it out. `docs/emulator.md` has all knobs in one table.
Terms: RFC 4787, RFC 6888.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from natswarm.nat.behaviour import Filtering, Mapping, Poison, Pooling
from natswarm.sim.load import BackgroundLoad
from natswarm.sim.ports import Allocation, Blocks, Preserving, Sequential
from natswarm.sim.rate import RateLimit

__all__ = ["TFTP_PORT", "TFTP_REQUESTS", "NatBehaviour", "NatCounters"]

# RFC 1350 section 2 and 4: requests go to port 69 and are answered from a port of the server's
# choice; opcode 1 is a read request, 2 a write request.
TFTP_PORT = 69
TFTP_REQUESTS = (b"\x00\x01", b"\x00\x02")

# A /22 of addresses; a carrier's box has some hundreds.
MAX_ADDRESSES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class NatBehaviour:
    """What a NAT does, in the words of RFC 4787.

    Attributes:
        mapping: When an internal endpoint keeps its external port.
        filtering: Who may send in through a mapping.
        allocation: The law of external ports.
        overloading: Whether mappings may share an external port as long as the filter tells their
            remotes apart. With EIM, two internal endpoints may then come to share a port, and
            one of them moves to another when both want the same remote: this is Linux.
        unreplied_lifetime_s: Idle time after which a session dies that saw no inbound packet.
        replied_lifetime_s: The same for one that did; not shorter.
        replied_age_s: How old a session of ours must be for that: until then it lives as if it saw
            none. Linux waits 2 s for "some kind of UDP stream" (`nf_conntrack_proto_udp.c`).
        refreshed_by_inbound: Whether inbound packets restart the idle time too (RFC 4787 REQ-6).
        absolute_lifetime_s: Bounds of the age at which a mapping dies whatever its traffic, drawn
            uniformly for each; None where traffic keeps it alive for ever.
        preserves_parity: Whether even internal ports get even external ones and odd ones odd
            (RFC 4787 section 4.2.2), whatever the law of allocation.
        address_count: External addresses of the NAT, each with all ports.
        pooling: How a mapping gets one of several.
        max_mappings: Mappings one subscriber (internal address) may have at a time (RFC 6888
            REQ-4).
        subscriber_rate: New mappings one subscriber may make (RFC 6888 REQ-4 C); None for any.
        nat_rate: New mappings of all subscribers together; None for any.
        hairpinning: Whether packets to the NAT's own external address turn round inside.
        tftp_helper: Whether a TFTP request to a remote address lets the answer in from any one
            port of it (an application layer gateway; Linux `nf_conntrack_tftp`).
        poison: What a packet from outside that the filter refuses does to our mappings.
        load: Flows of other subscribers, besides those of hosts.
    """

    mapping: Mapping
    filtering: Filtering
    allocation: Allocation = field(default_factory=Preserving)
    overloading: bool = True
    unreplied_lifetime_s: float = 30.0
    replied_lifetime_s: float = 120.0
    replied_age_s: float = 0.0
    refreshed_by_inbound: bool = True
    absolute_lifetime_s: tuple[float, float] | None = None
    preserves_parity: bool = False
    address_count: int = 1
    pooling: Pooling = Pooling.PAIRED
    max_mappings: int | None = None
    subscriber_rate: RateLimit | None = None
    nat_rate: RateLimit | None = None
    hairpinning: bool = False
    tftp_helper: bool = False
    poison: Poison = Poison.NONE
    load: BackgroundLoad | None = None

    def __post_init__(self) -> None:
        if not 0 < self.unreplied_lifetime_s <= self.replied_lifetime_s:
            raise ValueError("lifetimes must be positive, and a reply must not shorten them")
        if self.replied_age_s < 0:
            raise ValueError(f"no session is {self.replied_age_s} s old")
        if self.absolute_lifetime_s is not None:
            low, high = self.absolute_lifetime_s
            if not 0 < low <= high:
                raise ValueError(f"not bounds of a lifetime: {self.absolute_lifetime_s}")
        if self.max_mappings is not None and self.max_mappings < 1:
            raise ValueError("a subscriber needs at least one mapping")
        if not 1 <= self.address_count <= MAX_ADDRESSES:
            raise ValueError(f"a NAT has 1 to {MAX_ADDRESSES} addresses, not {self.address_count}")
        if self.address_count == 1 and self.pooling is Pooling.ARBITRARY:
            raise ValueError("arbitrary pooling takes several addresses: set address_count")
        self._check_parity()
        self._check_poison()
        if self.load is not None:
            self._check_load(self.load)

    def _check_load(self, load: BackgroundLoad) -> None:
        if isinstance(self.allocation, Sequential) and self.allocation.cross_traffic_per_s:
            raise ValueError(
                "cross traffic is counted twice: give a load, or cross_traffic_per_s of the law"
            )
        if self.nat_rate is not None and self.nat_rate.per_s <= load.flows_per_s:
            raise ValueError(
                f"the load takes the NAT's whole rate: {load.flows_per_s:g} flows/s of "
                f"{self.nat_rate.per_s:g} new mappings/s"
            )

    def _check_parity(self) -> None:
        if not self.preserves_parity:
            return
        law = self.allocation
        if isinstance(law, Sequential) and law.step % 2 == (law.high - law.low + 1) % 2 == 0:
            raise ValueError("a sequence of even steps never changes parity, so cannot preserve it")
        if isinstance(law, Blocks) and law.size < 2:
            raise ValueError("a block of one port has no port of either parity")
        if law.low == law.high:
            raise ValueError("a range of one port has no port of either parity")

    def _check_poison(self) -> None:
        if self.poison is Poison.NONE:
            return
        if self.filtering is Filtering.EIF:
            raise ValueError("a filter that lets anyone in has no strangers to be poisoned by")
        if self.poison is Poison.TAKES_PORT and not (
            self.overloading and self.filtering is Filtering.APDF
        ):
            raise ValueError(
                "only a NAT that overloads ports and tells remotes apart by endpoint can take a "
                "port towards one of them"
            )
        if self.poison is Poison.RETIRES_MAPPING and self.mapping is Mapping.APDM:
            raise ValueError(
                "an APDM mapping has one remote: there is no next one to retire it for"
            )

    @property
    def exclusive_ports(self) -> bool:
        """Whether an external port serves one mapping at a time.

        With EIF it always does: there is nothing to tell two mappings of one port apart by.
        """
        return not self.overloading or self.filtering is Filtering.EIF


@dataclass(slots=True)
class NatCounters:
    """What became of the packets; counters only grow."""

    outbound_count: int = 0
    """Translated on the way out."""
    inbound_count: int = 0
    """Translated on the way in."""
    mapping_count: int = 0
    """Mappings made."""
    moved_count: int = 0
    """Endpoints that got another port because theirs was taken towards a remote."""
    dropped_no_port: int = 0
    """Outbound: no free port, or the subscriber owns no more blocks."""
    dropped_cap: int = 0
    """Outbound: the subscriber has `max_mappings`."""
    dropped_rate: int = 0
    """Outbound: new mappings come faster than `subscriber_rate` or `nat_rate`."""
    dropped_unmapped: int = 0
    """Inbound: to a port without a mapping."""
    dropped_filtered: int = 0
    """Inbound: there is a mapping, but not for this remote."""
    poisoned_count: int = 0
    """Inbound: refused packets that took a port, or retired or burned a mapping."""
    dropped_hairpin: int = 0
    """From inside to our own external address, without hairpinning."""
