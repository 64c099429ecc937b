"""NATs as they were met in the wild, each with its source, and the links that go with them.

What a source does not say is assumed, and said to be assumed, in one way for all:

* `_LIFETIME`: a carrier's idle lifetime is the median of cellular networks, 65 s, replied or not
  (Richter et al., "A Multi-perspective Analysis of Carrier-Grade NAT Deployment", IMC 2016,
  arXiv 1605.05606); the spread there is 10 to 200 s;
* `_OVERLOADING`: external ports serve several remotes; it is the harder case for a puncture in a
  block, because a NAT that does not overload uses each port of a block once;
* 4G takes 25 to 45 ms one way and loses 1 in 1,000, home lines take 8 ms: with the core in between,
  round trips of some 160 and 52 ms between two of a kind.

Data only. A variation is `dataclasses.replace` away.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.firewall6 import FirewallBehaviour
from natswarm.sim.link import LinkConditions
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.ports import Blocks, Preserving, ScaledBeta, Uniform

__all__ = [
    "CELLULAR_LIFETIME_S",
    "HOME_LINE",
    "HOPS_4G",
    "LINK_4G",
    "LINUX_REPLIED_AGE_S",
    "PRESETS",
    "Ipv6",
    "Preset",
    "Site",
    "Transition",
]


class Site(enum.Enum):
    """Where a NAT stands, and with it which side its slow link is on."""

    CARRIER = "carrier"
    """In the carrier's network: the access link lies between the subscribers and the NAT."""
    HOME = "home"
    """At the customer's: the access link lies between the NAT and the internet."""


class Transition(enum.Enum):
    """What hosts of a network with IPv6 have of IPv4."""

    DUAL_STACK = "dual stack"
    """Addresses of both."""
    NAT64 = "NAT64"
    """Nothing: they reach IPv4 at 64:ff9b::/96 (RFC 6146), where the network's NAT translates."""
    XLAT464 = "464XLAT"
    """The same, and a CLAT on every host for programs that speak IPv4 (RFC 6877)."""


@dataclass(frozen=True, slots=True)
class Ipv6:
    """IPv6 at an attachment: global addresses, never translated.

    Attributes:
        firewall: What stands before them; None where nothing does.
        transition: What is left of IPv4.
    """

    firewall: FirewallBehaviour | None = None
    transition: Transition = Transition.DUAL_STACK


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of attachment to the internet.

    Attributes:
        behaviour: What the NAT does; None where there is none.
        site: Which side of the NAT the access link is on.
        access: The access link, down, and up where `access_up` does not say otherwise.
        access_hops: Routers on the access link, the NAT and the core not counted.
        source: Who measured it or says so.
        note: What is not known, and what we assumed.
        access_up: The access link's direction up; None where it is as the other.
        ipv6: IPv6 besides or instead; None where there is none.
        answers_ttl: Whether the NAT and the routers on the access link say so where a hop limit
            runs out.
    """

    behaviour: NatBehaviour | None
    site: Site
    access: LinkConditions
    access_hops: int
    source: str
    note: str = ""
    access_up: LinkConditions | None = None
    ipv6: Ipv6 | None = None
    answers_ttl: bool = True

    def __post_init__(self) -> None:
        has_router = self.behaviour is not None
        if not has_router and self.ipv6 is not None and self.ipv6 != Ipv6():
            raise ValueError("a firewall and a NAT64 stand in a router, which takes a behaviour")
        if self.access_hops < 0:
            raise ValueError(f"{self.access_hops} routers on a link")

    @property
    def upload(self) -> LinkConditions:
        """The access link's direction up."""
        return self.access if self.access_up is None else self.access_up


LINK_4G: Final = LinkConditions(delay_s=0.025, jitter_s=0.020, loss=0.001)
HOPS_4G: Final = 2  # assumed: phone - P-GW - one router - CGN
HOME_LINE: Final = LinkConditions(delay_s=0.008)
CELLULAR_LIFETIME_S: Final = 65.0
LINUX_REPLIED_AGE_S: Final = 2.0

_KOTLIN: Final = "OrestisKan/kotlin-birthday-connect"

_LIFETIME: Final = "lifetime unknown: median of cellular networks assumed"
_OVERLOADING: Final = "overloading unknown: assumed"
_UNKNOWN: Final = f"{_LIFETIME}; {_OVERLOADING}"


def _carrier(behaviour: NatBehaviour, source: str, note: str = _UNKNOWN) -> Preset:
    return Preset(behaviour, Site.CARRIER, LINK_4G, HOPS_4G, source, note)


def _home(behaviour: NatBehaviour, source: str, note: str = "") -> Preset:
    return Preset(behaviour, Site.HOME, HOME_LINE, 0, source, note)


def _cellular(
    mapping: Mapping,
    filtering: Filtering,
    allocation: Uniform | Blocks | ScaledBeta,
    *,
    tftp_helper: bool = False,
    absolute_lifetime_s: tuple[float, float] | None = None,
) -> NatBehaviour:
    return NatBehaviour(
        mapping=mapping,
        filtering=filtering,
        allocation=allocation,
        unreplied_lifetime_s=CELLULAR_LIFETIME_S,
        replied_lifetime_s=CELLULAR_LIFETIME_S,
        tftp_helper=tftp_helper,
        absolute_lifetime_s=absolute_lifetime_s,
    )


PRESETS: Final[dict[str, Preset]] = {
    "public": Preset(
        None,
        Site.HOME,
        LinkConditions(delay_s=0.002),
        0,
        "a host with a global address",
        "no firewall; 2 ms to the core assumed",
    ),
    "vodafone-nl": _carrier(
        _cellular(Mapping.EIM, Filtering.ADF, ScaledBeta(4630.72, 13937.38, 2.242, 5.008)),
        _KOTLIN,
        f'the law\'s author says "not sure if correct"; {_UNKNOWN}',
    ),
    "kpn-nl": _carrier(
        _cellular(Mapping.APDM, Filtering.APDF, Blocks(1024, 65_535, size=256, max_blocks=8)),
        _KOTLIN,
        f"blocks a subscriber may own unknown: 8 assumed; random in the block assumed; {_UNKNOWN}",
    ),
    "lebara-nl": _carrier(
        _cellular(Mapping.EIM, Filtering.ADF, Blocks(1024, 65_535, size=256, max_blocks=8)),
        _KOTLIN,
        "range unknown: 1024..65535 assumed; blocks a subscriber may own unknown: 8 assumed; "
        f"random in the block assumed; {_UNKNOWN}",
    ),
    "lyca-nl": _carrier(
        _cellular(Mapping.EIM, Filtering.EIF, Uniform(2048, 65_535)), _KOTLIN, _LIFETIME
    ),
    "mycall-no": _carrier(
        _cellular(Mapping.EIM, Filtering.EIF, Uniform(1024, 65_535)), _KOTLIN, _LIFETIME
    ),
    "lyca-bg": _carrier(_cellular(Mapping.EIM, Filtering.ADF, Uniform(1024, 65_535)), _KOTLIN),
    "telia-no": _carrier(_cellular(Mapping.EIM, Filtering.ADF, Uniform(1024, 65_535)), _KOTLIN),
    "orange-bg": _carrier(_cellular(Mapping.APDM, Filtering.APDF, Uniform(1024, 65_535)), _KOTLIN),
    "o2-uk-4g": _carrier(
        _cellular(Mapping.APDM, Filtering.APDF, Uniform(15_340, 44_360), tftp_helper=True),
        "kupson/udp-hole-punching",
        f"random-looking ports, 15340..44360 seen: taken as uniform; {_UNKNOWN}",
    ),
    "sky-uk-dsl": _home(
        NatBehaviour(
            mapping=Mapping.EIM,
            filtering=Filtering.APDF,
            allocation=Preserving(),
            replied_age_s=LINUX_REPLIED_AGE_S,
            tftp_helper=True,
        ),
        "kupson/udp-hole-punching",
        "a home router with Linux inside assumed: its lifetimes and its overloading",
    ),
    "tmobile-us": _carrier(
        _cellular(
            Mapping.APDM,
            Filtering.APDF,
            Uniform(1024, 65_535),
            absolute_lifetime_s=(48.0, 75.0),
        ),
        "n0-computer/iroh#4424",
        "absolute lifetime of 48..75 s seen in spite of heartbeats, taken as uniform; mapping, "
        f"filtering and ports unknown: the hardest assumed; {_OVERLOADING}",
    ),
    "juniper-pba": _carrier(
        NatBehaviour(
            mapping=Mapping.APDM,
            filtering=Filtering.APDF,
            allocation=Blocks(
                1024, 65_535, size=128, max_blocks=8, is_sequential=True, keeps_newest=True
            ),
            overloading=False,
            unreplied_lifetime_s=CELLULAR_LIFETIME_S,
            replied_lifetime_s=CELLULAR_LIFETIME_S,
        ),
        "Juniper, `block-allocation` and `port` statements: 128 ports, 8 blocks a host, the last "
        "block stays active, sequential ports",
        f"mapping and filtering are configurable: the strictest taken; ports exclusive and the "
        f"range assumed; {_LIFETIME}",
    ),
    "linux-home": _home(
        NatBehaviour(
            mapping=Mapping.EIM,
            filtering=Filtering.APDF,
            allocation=Preserving(),
            replied_age_s=LINUX_REPLIED_AGE_S,
        ),
        "Linux `masquerade`, measured in network namespaces",
        "endpoint-independent until two endpoints want one port towards one remote",
    ),
    "linux-random": _home(
        NatBehaviour(
            mapping=Mapping.APDM,
            filtering=Filtering.APDF,
            allocation=Uniform(),
            replied_age_s=LINUX_REPLIED_AGE_S,
        ),
        "Linux `masquerade random,fully-random`, measured in network namespaces",
    ),
    "cloud-natgw": Preset(
        NatBehaviour(
            mapping=Mapping.APDM,
            filtering=Filtering.APDF,
            allocation=Uniform(1024, 65_535),
            unreplied_lifetime_s=350.0,
            replied_lifetime_s=350.0,
        ),
        Site.CARRIER,
        LinkConditions(delay_s=0.001),
        0,
        "n0-computer/patchbay",
        f"1 ms inside a data centre and the range assumed; {_OVERLOADING}",
    ),
}
"""By name. Add one when somebody measured one; never change one without its source.

Those with IPv6 are in `presets6.py`."""
