"""The tests there are to choose from, and what each costs.

Source of the figures: `natswarm/nat/inspection.py` for what is asked of peers; for the rest the
retransmissions of `natswarm/net/gateway` and `natswarm/net/path.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.identity import PeerId
from natswarm.inspector.report import LocalTest, Test
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.findings import Findings, NatTest
from natswarm.nat.inspection import TESTS
from natswarm.nat.measurement import Observer
from natswarm.nat.profile import NatProfile
from natswarm.wire import ECHO_TOKEN_BYTES

__all__ = ["FULL", "QUICK", "QUICK_LIMIT_S", "Offer", "all_offers", "find_test"]

QUICK: frozenset[Test] = frozenset({LocalTest.GATEWAY, LocalTest.PATH, NatTest.BEHAVIOUR})
"""Under three seconds and some dozens of packets."""
QUICK_LIMIT_S = 2.9
FULL: frozenset[Test] = frozenset({*LocalTest, *NatTest} - {NatTest.LIFETIMES})
"""Under three minutes. Lifetimes take longer, so they are measured on request only."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One test, for those who choose.

    Attributes:
        test: Which.
        text: What it finds out, in words.
        recipient: Who is asked, in words.
        packet_count: Packets it sends at most.
        duration_s: Seconds it takes at most, at usual round trips.
    """

    test: Test
    text: str
    recipient: str
    packet_count: int
    duration_s: float

    def as_json(self) -> dict[str, Any]:
        """Return it for programs; keys as those of the report's tests."""
        return {
            "test": self.test.value,
            "text": self.text,
            "recipient": self.recipient,
            "packets": self.packet_count,
            "duration_s": self.duration_s,
        }


_LOCAL = (
    Offer(LocalTest.GATEWAY, "port mapping services it has", "your router", 40, 6.0),
    Offer(
        LocalTest.LEASE,
        "what lease they give: maps a dead port, then unmaps it",
        "your router",
        60,
        36.0,
    ),
    Offer(
        LocalTest.PATH, "hops outward, so how many NATs; an opener's hop limit", "one peer", 48, 1.7
    ),
)
_TEXTS: dict[NatTest, str] = {
    NatTest.BEHAVIOUR: "mapping, filtering, law of ports, public addresses, pooling",
    NatTest.HAIRPINNING: "whether what is sent to the NAT's own address turns round",
    NatTest.POISON: "what a packet that the NAT refuses does to a mapping",
    NatTest.TFTP_HELPER: "whether a TFTP request lets in answers from any port",
    NatTest.QUOTA: "mappings at once, new ones in a second, remotes at once",
    NatTest.LIFETIMES: "how long mappings live, idle and at all",
}


# What tests find after the quick part, as far as their costs depend on it; a wider range of ports
# than this is not searched.
_USUAL_NATS = (
    (Mapping.EIM, PortAllocation(AllocationLaw.PRESERVING)),
    (Mapping.APDM, PortAllocation(AllocationLaw.BLOCK, block_size=2048, blocks=(40_960,))),
    (Mapping.APDM, PortAllocation(AllocationLaw.UNIFORM, low=15_000, high=51_000)),
)


def all_offers() -> tuple[Offer, ...]:
    """Return all tests, in the order of asking."""
    usual = [_findings(mapping, allocation) for mapping, allocation in _USUAL_NATS]
    return _LOCAL + tuple(
        Offer(
            test,
            _TEXTS[test],
            "peers",
            max(offer.packets(findings) for findings in usual),
            offer.duration_s,
        )
        for test, offer in TESTS.items()
    )


def _findings(mapping: Mapping, allocation: PortAllocation) -> Findings:
    """Return what is known of a NAT after two neighbours were asked."""
    ips = ("198.51.100.1", "203.0.113.1")  # RFC 5737: nobody's
    observers = tuple(
        Observer(PeerId(bytes([index] * 32)), Endpoint(ip, 4000), Endpoint(ip, 4001), True)
        for index, ip in enumerate(ips)
    )
    profile = NatProfile(
        mapping=mapping,
        filtering=Filtering.APDF,
        allocation=allocation,
        public_ips=("192.0.2.1",),
        is_translated=True,
    )
    tokens = {observer.peer_id: bytes(ECHO_TOKEN_BYTES) for observer in observers}
    return Findings(observers=observers, profile=profile, tokens=tokens)


def find_test(name: str) -> Test:
    """Return the test of a name.

    Raises:
        ConfigurationError: There is none; says which there are.
    """
    tests: dict[str, Test] = {test.value: test for test in (*LocalTest, *NatTest)}
    if name not in tests:
        raise ConfigurationError(f"there is no test {name!r}; there are {', '.join(tests)}")
    return tests[name]
