"""Flows of other subscribers: what they take, and that they come at the rate asked for."""

from __future__ import annotations

import math
import random

import pytest

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.load import BackgroundLoad
from natswarm.sim.nat import Nat, NatBehaviour
from natswarm.sim.packet import Packet
from natswarm.sim.ports import Allocation, Blocks, Preserving, Sequential, Uniform
from natswarm.sim.rate import RateLimit

US = Endpoint("10.0.0.1", 40_000)
LOAD = BackgroundLoad(subscriber_count=50, flows_per_s=20.0, hold_s=30.0)


@pytest.mark.parametrize(
    "values",
    [(0, 1.0, 1.0), (1, 0.0, 1.0), (1, 1.0, math.inf), (1, math.nan, 1.0), (1, 1e4, 100.0)],
)
def test_impossible_loads_are_refused(values: tuple[int, float, float]):
    with pytest.raises(ValueError, match=r"at least one|not a load|can be simulated"):
        BackgroundLoad(*values)


def make(allocation: Allocation, load: BackgroundLoad | None = LOAD, **more: object) -> Nat:
    usual: dict[str, object] = {
        "mapping": Mapping.APDM,
        "filtering": Filtering.APDF,
        "allocation": allocation,
        "overloading": False,
        "load": load,
    }
    behaviour = NatBehaviour(**(usual | more))  # type: ignore[arg-type]
    return Nat(behaviour, "198.51.100.1", random.Random(3))


def port_towards(nat: Nat, remote_port: int, now: float) -> int | None:
    packet = nat.outbound(Packet(US, Endpoint("203.0.113.9", remote_port), b""), now)
    return None if packet is None else packet.source.port


def test_a_load_is_on_from_the_start_and_stays():
    nat = make(Uniform())
    expected = LOAD.flows_per_s * LOAD.hold_s
    counts = [nat.mapping_count(now) for now in (0.0, 10.0, 500.0, 50_000.0, 50_001.0)]
    nat.check()
    # Flows alive are Poisson; 5 standard deviations.
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts)
    assert nat.counters.mapping_count == 0
    # The hours in between cost nothing.
    assert nat.load_counters.mapping_count < 5 * expected


def test_a_load_drives_a_sequence_on():
    nat = make(Sequential(step=1), BackgroundLoad(5, 20.0, 2.0))
    steps = []
    before = port_towards(nat, 1, 0.0)
    for index in range(1, 400):
        after = port_towards(nat, 1 + index, index * 1.0)
        assert before is not None
        assert after is not None
        steps.append((after - before) % 64_512 - 1)
        before = after
    mean = sum(steps) / len(steps)
    assert abs(mean - 20) < 5 * math.sqrt(20 / len(steps))
    variance = sum((step - mean) ** 2 for step in steps) / len(steps)
    assert variance == pytest.approx(20, rel=0.4)  # Poisson: as the mean


def test_a_rest_moves_the_sequence_as_far_as_the_flows_that_came_and_went():
    moved = []
    for seed in range(60):
        behaviour = NatBehaviour(
            mapping=Mapping.APDM,
            filtering=Filtering.APDF,
            allocation=Sequential(),
            load=BackgroundLoad(5, 2.0, 5.0),
        )
        nat = Nat(behaviour, "198.51.100.1", random.Random(seed))
        first, second = port_towards(nat, 1, 0.0), port_towards(nat, 2, 1000.0)
        assert first is not None
        assert second is not None
        moved.append((second - first) % 64_512 - 1)
    assert abs(sum(moved) / 60 - 2000) < 5 * math.sqrt(2000 / 60)


def test_a_load_takes_the_ports_we_would_keep():
    nat = make(Preserving(), BackgroundLoad(50, 500.0, 10.0))
    lost = 0
    for port in range(33_000, 33_100):
        source = Endpoint("10.0.0.1", port)
        packet = nat.outbound(Packet(source, Endpoint("203.0.113.9", 7), b""), 0.0)
        lost += packet is not None and packet.source.port != port
    nat.check()
    # 5,000 flows on 28,232 source ports, or elsewhere when theirs was taken: 16 % are.
    assert 5 <= lost <= 30


def test_a_load_fills_the_blocks():
    law = Blocks(1024, 1024 + 64 * 20 - 1, size=64)
    full = make(law, BackgroundLoad(200, 50.0, 30.0))
    assert port_towards(full, 1, 0.0) is None
    assert full.counters.dropped_no_port == 1
    assert full.load_counters.dropped_no_port > 0
    full.check()
    assert port_towards(make(law, BackgroundLoad(5, 2.0, 30.0)), 1, 0.0) is not None


def test_a_load_uses_up_the_nats_rate():
    nat = make(Uniform(), nat_rate=RateLimit(per_s=22.0, burst=5))
    made = sum(port_towards(nat, 1 + index, index / 50) is not None for index in range(1000))
    nat.check()
    # 22 a second for the load's 20 and our 50: about a third of all wishes come through.
    assert made < 22 * 20
    assert nat.counters.dropped_rate == 1000 - made
    assert nat.load_counters.dropped_rate > 0


def test_without_load_nothing_is_drawn_for_it():
    ports = []
    for load in (None, LOAD):
        nat = make(Uniform(), load)
        ports.append(port_towards(nat, 1, 0.0))
    assert ports[0] != ports[1]  # the load draws ports before us
    assert make(Uniform(), None).mapping_count(1e6) == 0


def test_strangers_reach_others_through_an_open_filter_only():
    nat = make(Uniform(), filtering=Filtering.EIF)
    taken = nat.ports_in_use(0.0)[0]
    stranger = Endpoint("203.0.113.9", 7)
    packet = nat.inbound(Packet(stranger, Endpoint(nat.external_ip, taken), b""), 0.0)
    assert packet is not None
    assert packet.destination.ip.startswith("other/")
