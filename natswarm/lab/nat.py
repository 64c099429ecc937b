"""The NATs that the Linux kernel can be, as nftables rules.

| kind       | RFC 4787        | external ports                      | found in life               |
|------------|-----------------|-------------------------------------|-----------------------------|
| preserving | EIM-like / APDF | the internal port until it collides | home routers that run Linux |
| random     | APDM / APDF     | any of 64,512, drawn per remote     | gateways of clouds          |
| block      | APDM / APDF     | any of 1,024, drawn per remote      | carriers with port blocks   |

The kernel overloads: one external port of a block may serve several remotes at once, which a
carrier with strict blocks does not do. What else it cannot be (sequential, ADM, absolute
lifetimes, EIF) is left to the emulator in `natswarm/sim`.

Source: nft(8), "NAT statements"; kernel, net/netfilter/nf_nat_core.c. Text only: runs nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["BLOCK_PORTS", "KernelNat", "NatKind", "loss_ruleset"]

BLOCK_PORTS = 1024

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
}}
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
    """

    kind: NatKind
    block_base: int = 40_960
    unreplied_lifetime_s: int = 30
    replied_lifetime_s: int = 120
    is_poisonable: bool = False

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
        return _RULESET.format(masquerade=masquerade, to_router=to_router)

    @property
    def sysctls(self) -> dict[str, int]:
        """Kernel parameters of the router's namespace; the rules must be loaded before."""
        return {
            "net.netfilter.nf_conntrack_udp_timeout": self.unreplied_lifetime_s,
            "net.netfilter.nf_conntrack_udp_timeout_stream": self.replied_lifetime_s,
        }


def loss_ruleset(loss: float) -> str:
    """Return rules for a router that drops each packet it forwards with probability `loss`.

    Raises:
        ValueError: `loss` is not from 0 to below 1.
    """
    if not 0 <= loss < 1:
        raise ValueError(f"the share of lost packets lies from 0 to below 1, unlike {loss}")
    return _LOSS_RULESET.format(scale=_LOSS_SCALE, limit=int(loss * _LOSS_SCALE))
