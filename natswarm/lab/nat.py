"""The NATs that the Linux kernel can be, as nftables rules.

| kind       | RFC 4787        | external ports                      | found in life               |
|------------|-----------------|-------------------------------------|-----------------------------|
| preserving | EIM-like / APDF | the internal port until it collides | home routers that run Linux |
| random     | APDM / APDF     | any of 64,512, drawn per remote     | gateways of clouds          |
| block      | APDM / APDF     | any of 1,024, drawn per remote      | carriers with port blocks   |

The kernel overloads: one external port of a block may serve several remotes at once, which a
carrier with strict blocks does not do. What else it cannot be (sequential, ADM, absolute
lifetimes, EIF) is left to the emulator in `natswarm/sim`.

Source: nft(8), "NAT statements"; kernel, net/netfilter/nf_nat_core.c. Runs nothing.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

from natswarm.nat.behaviour import Filtering, Mapping, Poison
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.ports import Allocation, Blocks, Preserving, Uniform
from natswarm.sim.presets import LINUX_REPLIED_AGE_S

__all__ = ["BLOCK_PORTS", "KernelNat", "NatKind", "kernel_nat", "loss_ruleset"]

BLOCK_PORTS = 1024
BLOCK_BASE = 40_960

# A chain must not be called `fwd`: that is a keyword of nft.
_RULESET = """\
table ip lab {{
    chain masquerading {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "wan" {masquerade}
        oifname "wan" masquerade
    }}
    # A datagram that is accepted here gets a conntrack entry, even where no socket takes it, and
    # that entry occupies the very tuple our client's mapping towards the peer would use: one early
    # probe of the peer then moves our port. Dropped in this hook, it leaves nothing.
    chain to_router {{
        type filter hook input priority filter; policy {to_router};
        iifname {{ "lo", "lan" }} accept
    }}
    # Conntrack knows a reply by its whole tuple: address-and-port-dependent filtering.
    chain through_router {{
        type filter hook forward priority filter; policy drop;
        iifname "lan" oifname "wan" accept
        ct state established,related accept
    }}
{helper}}}
"""

# The helper expects the answer of a TFTP server from a port of its choice, and NAT lets it in.
_HELPER = """\
    ct helper tftp_answers { type "tftp" protocol udp; }
    chain helping {
        type filter hook prerouting priority filter; policy accept;
        iifname "lan" udp dport 69 ct helper set "tftp_answers"
    }
"""

_LOSS_RULESET = """\
table ip lab {{
    chain lossy {{
        type filter hook forward priority filter; policy accept;
        numgen random mod {scale} < {limit} drop
    }}
}}
"""
_LOSS_SCALE = 1_000_000


class NatKind(enum.Enum):
    """How a router translates; the table above."""

    PRESERVING = "preserving"
    RANDOM = "random"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class KernelNat:
    """One NAT.

    Attributes:
        kind: How it translates.
        block_base: BLOCK: the lowest port of its 1,024.
        unreplied_lifetime_s: Idle lifetime of a mapping nobody has answered on; the kernel's own
            default.
        replied_lifetime_s: The same once both directions were used for two seconds.
        is_poisonable: Whether a datagram from a stranger moves a mapping, as it does where the
            router's own firewall accepts it.
        has_tftp_helper: Whether a TFTP request lets the answer in from another port.
    """

    kind: NatKind
    block_base: int = BLOCK_BASE
    unreplied_lifetime_s: int = 30
    replied_lifetime_s: int = 120
    is_poisonable: bool = False
    has_tftp_helper: bool = False

    def __post_init__(self) -> None:
        if not 1024 <= self.block_base <= 65_536 - BLOCK_PORTS:
            raise ValueError(f"no block of {BLOCK_PORTS} ports starts at {self.block_base}")

    @property
    def block(self) -> range:
        """The external ports of a BLOCK NAT."""
        return range(self.block_base, self.block_base + BLOCK_PORTS)

    @property
    def ruleset(self) -> str:
        """For a router whose interfaces are `lan` and `wan`."""
        match self.kind:
            case NatKind.PRESERVING:
                masquerade = "masquerade"
            case NatKind.RANDOM:
                masquerade = "masquerade random,fully-random"
            case NatKind.BLOCK:
                # Without `fully-random` an internal port that lies in the block would be kept.
                masquerade = (
                    "meta l4proto { tcp, udp } masquerade "
                    f"to :{self.block[0]}-{self.block[-1]} fully-random"
                )
        to_router = "accept" if self.is_poisonable else "drop"
        helper = _HELPER if self.has_tftp_helper else ""
        return _RULESET.format(masquerade=masquerade, to_router=to_router, helper=helper)

    @property
    def sysctls(self) -> dict[str, int]:
        """Kernel parameters of the router's namespace; the rules must be loaded before."""
        return {
            "net.netfilter.nf_conntrack_udp_timeout": self.unreplied_lifetime_s,
            "net.netfilter.nf_conntrack_udp_timeout_stream": self.replied_lifetime_s,
        }


def kernel_nat(behaviour: NatBehaviour, rng: random.Random) -> KernelNat:
    """Return the kernel's NAT that does the same as an emulated one, for one subscriber.

    Args:
        behaviour: Of the emulated NAT.
        rng: Draws the block where the subscriber would get any.

    Raises:
        ValueError: The kernel cannot do that; says what.
    """
    for is_beyond, what in _beyond_the_kernel(behaviour):
        if is_beyond:
            raise ValueError(f"the kernel cannot do {what}")
    kind, block_base = _kind(behaviour.mapping, behaviour.allocation, rng)
    return KernelNat(
        kind,
        block_base=block_base,
        unreplied_lifetime_s=int(behaviour.unreplied_lifetime_s),
        replied_lifetime_s=int(behaviour.replied_lifetime_s),
        is_poisonable=behaviour.poison is Poison.TAKES_PORT,
        has_tftp_helper=behaviour.tftp_helper,
    )


def _beyond_the_kernel(behaviour: NatBehaviour) -> list[tuple[bool, str]]:
    lifetimes = (behaviour.unreplied_lifetime_s, behaviour.replied_lifetime_s)
    return [
        (behaviour.filtering is not Filtering.APDF, f"{behaviour.filtering.value} filtering"),
        (not behaviour.overloading, "exclusive ports"),
        (
            behaviour.replied_age_s != LINUX_REPLIED_AGE_S,
            f"replies that count from {behaviour.replied_age_s:g} s on, but from 2 s on",
        ),
        (any(each % 1 for each in lifetimes), "lifetimes of parts of a second"),
        (not behaviour.refreshed_by_inbound, "lifetimes that inbound packets do not restart"),
        (behaviour.absolute_lifetime_s is not None, "absolute lifetimes"),
        (behaviour.preserves_parity, "parity of ports"),
        (behaviour.address_count > 1, "several addresses"),
        (behaviour.max_mappings is not None, "a cap on mappings"),
        (bool(behaviour.subscriber_rate or behaviour.nat_rate), "a rate of new mappings"),
        (behaviour.hairpinning, "hairpinning of mappings"),
        (
            behaviour.poison not in (Poison.NONE, Poison.TAKES_PORT),
            f"poison that is {behaviour.poison.value}",
        ),
        (behaviour.load is not None, "a background load"),
    ]


def _kind(mapping: Mapping, law: Allocation, rng: random.Random) -> tuple[NatKind, int]:
    """Return the kind and the block's base that give a mapping and a law of allocation."""
    if mapping is Mapping.EIM and law == Preserving():
        return NatKind.PRESERVING, BLOCK_BASE
    if mapping is Mapping.APDM and law == Uniform():
        return NatKind.RANDOM, BLOCK_BASE
    if mapping is Mapping.APDM and isinstance(law, Uniform):
        if law.high - law.low + 1 == BLOCK_PORTS:
            return NatKind.BLOCK, law.low
    elif (
        mapping is Mapping.APDM
        and isinstance(law, Blocks)
        and (law.size, law.max_blocks, law.is_sequential) == (BLOCK_PORTS, 1, False)
    ):
        return NatKind.BLOCK, rng.choice(law.bases())
    raise ValueError(
        f"the kernel cannot do {mapping.value} mapping with ports that are {law}; it does EIM with "
        f"preserving, APDM with uniform over 1024..65535 or over {BLOCK_PORTS} ports, and APDM "
        f"with one block of {BLOCK_PORTS}"
    )


def loss_ruleset(loss: float) -> str:
    """Return rules for a router that drops each packet it forwards with probability `loss`.

    Raises:
        ValueError: `loss` is not from 0 to below 1.
    """
    if not 0 <= loss < 1:
        raise ValueError(f"the share of lost packets lies from 0 to below 1, unlike {loss}")
    return _LOSS_RULESET.format(scale=_LOSS_SCALE, limit=int(loss * _LOSS_SCALE))
