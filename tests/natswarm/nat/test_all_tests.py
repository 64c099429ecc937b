"""Every test of an inspection, one after another, on every preset: nothing wrong is said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from natswarm.nat.behaviour import Filtering
from natswarm.nat.findings import NatTest
from natswarm.nat.inspection import TESTS
from natswarm.sim.presets import PRESETS
from natswarm.sim.topology import Internet
from natswarm.sim.world import World
from tools.bench.simulated_inspection import SimulatedInspection, SimulatedObserver


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("name", PRESETS)
def test_all_that_is_said_of_a_preset_is_so(name: str, loss: float) -> None:
    internet = Internet(World(5))
    observers = [SimulatedObserver(internet, f"P{index}") for index in range(3)]
    host = internet.add_host("phone", name)
    for link in (host.uplink.upload, host.uplink.download):
        link.conditions = replace(link.conditions, loss=loss)
    inspection = SimulatedInspection(host, host.open_port(), observers, tests=set(NatTest))
    profile = inspection.run()
    findings, behaviour = inspection.findings, PRESETS[name].behaviour
    print(f"{name}, loss {loss:.0%}: {internet.world.now:.0f} s, {findings.packet_counts}")
    assert set(TESTS) == set(NatTest)
    if behaviour is None:
        assert profile.hairpinning is profile.poison is profile.idle_lifetime_s is None
        return
    assert profile.hairpinning in (None, behaviour.hairpinning)
    assert profile.poison in (None, behaviour.poison)
    assert profile.tftp_helper in (None, behaviour.tftp_helper)
    if behaviour.tftp_helper:
        assert profile.tftp_helper is True
    assert profile.max_mappings is None
    assert profile.mapping_rate_per_s in (None, math.inf)
    for found, truth in (
        (profile.idle_unreplied_s, behaviour.unreplied_lifetime_s),
        (profile.idle_lifetime_s, behaviour.replied_lifetime_s),
    ):
        if truth > 300:
            assert found == math.inf
        elif behaviour.absolute_lifetime_s is None:
            assert found == pytest.approx(truth, rel=0.1)
    if behaviour.absolute_lifetime_s is None:
        assert profile.absolute_lifetime_s == math.inf
    else:
        low, high = behaviour.absolute_lifetime_s
        assert profile.absolute_lifetime_s is not None
        assert low * 0.9 <= profile.absolute_lifetime_s <= high * 1.05
    assert profile.inbound_refreshes in (None, True)
    overloading = None if profile.allocation is None else profile.allocation.is_overloading
    if behaviour.filtering is not Filtering.EIF:
        assert overloading in (None, behaviour.overloading)
    for field in ("hairpinning", "poison", "tftp_helper", "idle_lifetime_s", "inbound_refreshes"):
        assert (getattr(profile, field) is None) is (field in findings.unknown)
