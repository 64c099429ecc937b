"""Whole inspections on the virtual internet: every preset is found out, with loss and with a liar.

Run with `-s` to see the table that docs/puncturing.md quotes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from natswarm.address import Endpoint
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.ports import Blocks, Sequential, Uniform
from natswarm.sim.presets import PRESETS, Preset
from natswarm.sim.topology import Internet
from natswarm.sim.world import World
from tools.bench.simulated_inspection import SimulatedInspection, SimulatedObserver

SEEDS = 25


def inspect(
    kind: str | Preset | NatBehaviour, seed: int, *, loss: float = 0.0, liars: int = 0
) -> tuple[NatProfile, SimulatedInspection]:
    internet = Internet(World(seed))
    observers = [SimulatedObserver(internet, f"P{index}") for index in range(3)]
    for observer in observers[:liars]:
        observer.lie = lambda seen: Endpoint("203.0.113.66", seen.port ^ 1)
    host = internet.add_host("phone", kind)
    if loss:
        for link in (host.uplink.upload, host.uplink.download):
            link.conditions = replace(link.conditions, loss=loss)
    inspection = SimulatedInspection(host, host.open_port(), observers)
    return inspection.run(), inspection


def expected_law(behaviour: NatBehaviour) -> AllocationLaw:
    allocation = behaviour.allocation
    if isinstance(allocation, Blocks) and allocation.is_sequential:
        return AllocationLaw.SEQUENTIAL  # in its block it counts, and that is what peers can use
    return allocation.law


@pytest.mark.parametrize("loss", [0.0, 0.1])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_found_out(name: str, loss: float) -> None:
    behaviour = PRESETS[name].behaviour
    right = 0
    requests, seconds = 0, 0.0
    for seed in range(SEEDS):
        profile, inspection = inspect(name, seed, loss=loss)
        requests += len(inspection.requests)
        seconds += inspection.world.now
        if behaviour is None:
            right += profile.is_translated is False and profile.accepts_strangers
            continue
        assert profile.public_ips
        right += (
            profile.mapping is behaviour.mapping
            and profile.filtering is behaviour.filtering
            and profile.allocation is not None
            and profile.allocation.law is expected_law(behaviour)
            and profile.is_predictable is (behaviour.mapping is Mapping.EIM)
        )
    print(
        f"{name:12} loss {loss:.0%}: {right}/{SEEDS} right, {requests / SEEDS:.0f} requests, "
        f"{seconds / SEEDS:.1f} s; e.g. {profile}; seeds 0..{SEEDS - 1}"
    )
    assert right >= (SEEDS if loss == 0 else SEEDS - 2)


@pytest.mark.parametrize("mapping", Mapping)
@pytest.mark.parametrize("filtering", Filtering)
def test_every_pair_of_behaviours_is_found_out(mapping: Mapping, filtering: Filtering) -> None:
    for allocation in (Uniform(), Blocks(size=512), Sequential(cross_traffic_per_s=20)):
        behaviour = NatBehaviour(mapping=mapping, filtering=filtering, allocation=allocation)
        profile, _ = inspect(behaviour, seed=11)
        assert (profile.mapping, profile.filtering) == (mapping, filtering)
        assert profile.allocation is not None
        assert profile.allocation.law is allocation.law
        assert profile.accepts_strangers is (filtering is Filtering.EIF)


@pytest.mark.parametrize("name", ["linux-home", "vodafone-nl", "kpn-nl"])
def test_a_liar_among_three_observers_overwrites_nothing(name: str) -> None:
    behaviour = PRESETS[name].behaviour
    assert behaviour is not None
    for seed in range(10):
        honest, _ = inspect(name, seed)
        profile, inspection = inspect(name, seed, liars=1)
        assert profile.public_ips == honest.public_ips
        assert profile.mapping is behaviour.mapping
        assert profile.filtering is behaviour.filtering
        assert profile.main_endpoint == honest.main_endpoint
        assert "203.0.113.66" in {each.observed.ip for each in inspection.findings.observations}
