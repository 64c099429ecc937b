"""Attachments with IPv6: dual stack, and IPv6 alone with a NAT64.

Kept apart from `presets.py`, which are NATs as somebody met them: these are as a specification or a
kernel has them. No carrier's IPv6 firewall has been measured for this project yet. Data only.
"""

from __future__ import annotations

from typing import Final

from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.firewall6 import FirewallBehaviour
from natswarm.sim.link import LinkConditions
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.ports import Preserving, Uniform
from natswarm.sim.presets import (
    CELLULAR_LIFETIME_S,
    HOME_LINE,
    HOPS_4G,
    LINK_4G,
    LINUX_REPLIED_AGE_S,
    Ipv6,
    Preset,
    Site,
    Transition,
)

__all__ = ["PRESETS6"]

PRESETS6: Final[dict[str, Preset]] = {
    "public-dual": Preset(
        None,
        Site.HOME,
        LinkConditions(delay_s=0.002),
        0,
        "a host with global addresses of both families",
        "no firewall; 2 ms to the core assumed",
        ipv6=Ipv6(),
    ),
    "linux-home-dual": Preset(
        NatBehaviour(
            mapping=Mapping.EIM,
            filtering=Filtering.APDF,
            allocation=Preserving(),
            replied_age_s=LINUX_REPLIED_AGE_S,
        ),
        Site.HOME,
        HOME_LINE,
        0,
        "Linux `masquerade` and connection tracking of IPv6: 30 s unreplied, 120 s replied",
        "a router that forwards replies only; RFC 6092 asks for a wider filter and 120 s",
        ipv6=Ipv6(FirewallBehaviour()),
    ),
    "xlat464-4g": Preset(
        NatBehaviour(
            mapping=Mapping.EIM,
            filtering=Filtering.ADF,
            allocation=Uniform(1024, 65_535),
            unreplied_lifetime_s=300.0,
            replied_lifetime_s=300.0,
            hairpinning=True,
        ),
        Site.CARRIER,
        LINK_4G,
        HOPS_4G,
        "RFC 6146 (EIM, EIF or ADF, UDP_DEFAULT 5 min, hairpinning), RFC 6877",
        "a NAT64 as specified, not as measured: ADF, the range, and the firewall before the "
        "phones' own IPv6 assumed; overloading assumed",
        ipv6=Ipv6(
            FirewallBehaviour(
                unreplied_lifetime_s=CELLULAR_LIFETIME_S, replied_lifetime_s=CELLULAR_LIFETIME_S
            ),
            Transition.XLAT464,
        ),
    ),
}
"""By name; no name is in `PRESETS`, too."""
