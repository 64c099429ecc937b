"""Rates of new mappings, for a subscriber and for a NAT."""

from __future__ import annotations

import math
import random

import pytest

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.nat import Nat, NatBehaviour
from natswarm.sim.packet import Packet
from natswarm.sim.ports import Uniform
from natswarm.sim.rate import RateLimit


@pytest.mark.parametrize("values", [(0.0, 1), (1.0, 0), (math.inf, 5), (math.nan, 5)])
def test_impossible_rates_are_refused(values: tuple[float, int]):
    with pytest.raises(ValueError, match="not a rate"):
        RateLimit(*values)


def make(subscriber: RateLimit | None, nat: RateLimit | None, **more: object) -> Nat:
    behaviour = NatBehaviour(
        mapping=Mapping.APDM,
        filtering=Filtering.APDF,
        allocation=Uniform(),
        subscriber_rate=subscriber,
        nat_rate=nat,
        **more,  # type: ignore[arg-type]
    )
    return Nat(behaviour, "198.51.100.1", random.Random(1))


def opens(nat: Nat, host: int, remote_port: int, now: float) -> bool:
    source, remote = Endpoint(f"10.0.0.{host}", 5000), Endpoint("203.0.113.9", remote_port)
    packet = nat.outbound(Packet(source, remote, b""), now)
    nat.check()
    return packet is not None


def test_a_subscriber_opens_a_burst_and_then_its_rate():
    nat = make(RateLimit(per_s=10.0, burst=20), None)
    made = [number / 100 for number in range(500) if opens(nat, 1, 1 + number, number / 100)]
    assert made[:20] == [number / 100 for number in range(20)]
    assert len(made) == 20 + 49  # 4.99 s at 10/s
    assert nat.counters.dropped_rate == 500 - len(made)
    assert opens(nat, 2, 1, 4.99)  # another subscriber has its own
    assert opens(nat, 1, 1, 5.0)  # a mapping that is there costs nothing
    assert nat.counters.mapping_count == len(made) + 1


def test_a_nat_shares_its_rate_among_all():
    nat = make(RateLimit(10.0, 20), RateLimit(per_s=5.0, burst=30))
    made = [host for number in range(40) for host in (1, 2, 3) if opens(nat, host, 1 + number, 0.0)]
    assert len(made) == 30
    assert [opens(nat, host, 100, 2.0) for host in range(1, 12)].count(True) == 10


def test_refused_packets_cost_no_tokens():
    nat = make(RateLimit(1.0, 5), None, max_mappings=3)
    assert [opens(nat, 1, number, 0.0) for number in range(1, 11)].count(True) == 3
    assert nat.counters.dropped_cap == 7
    assert [opens(nat, 1, number, 40.0) for number in range(11, 14)].count(True) == 3
