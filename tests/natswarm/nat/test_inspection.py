"""Whole inspections on the virtual internet: every preset is found out, with loss and with a liar.

Run with `-s` to see the table that docs/puncturing.md quotes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from natswarm.address import Endpoint
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Pooling
from natswarm.nat.findings import NatTest
from natswarm.nat.inspection import TESTS
from natswarm.nat.profile import NatProfile
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.ports import Blocks, Sequential, Uniform
from natswarm.sim.presets import PRESETS, Preset
from natswarm.sim.topology import Internet
from natswarm.sim.world import World
from tools.bench.simulated_inspection import SimulatedInspection, SimulatedObserver

SEEDS = 15


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


@pytest.mark.parametrize("mapping", Mapping)
def test_addresses_that_are_drawn_do_not_look_equal_by_chance(mapping: Mapping) -> None:
    # The main port alone would see one endpoint everywhere in up to half of all cases.
    behaviour = NatBehaviour(
        mapping=mapping,
        filtering=Filtering.ADF if mapping is Mapping.ADM else Filtering.EIF,
        address_count=2,
        pooling=Pooling.ARBITRARY,
    )
    found = [inspect(behaviour, seed)[0].mapping for seed in range(40)]
    assert found.count(mapping) >= 38, found


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


def block_is_exact(profile: NatProfile, allocation: Blocks) -> bool:
    found = profile.allocation
    return (
        found is not None
        and found.block_size == allocation.size
        and set(found.blocks) <= set(allocation.bases())
    )


@pytest.mark.parametrize("name", PRESETS)
def test_two_observers_tell_each_preset_with_its_parameters(name: str) -> None:
    behaviour = PRESETS[name].behaviour
    if behaviour is None:
        return
    for seed in range(5):
        internet = Internet(World(seed))
        observers = [SimulatedObserver(internet, f"P{index}") for index in range(2)]
        host = internet.add_host("phone", name)
        inspection = SimulatedInspection(host, host.open_port(), observers)
        profile, findings = inspection.run(), inspection.findings
        allocation, law = profile.allocation, behaviour.allocation
        assert (profile.mapping, profile.filtering) == (behaviour.mapping, behaviour.filtering)
        assert profile.pooling is behaviour.pooling
        assert host.nat is not None
        assert profile.public_ips == (host.nat.external_ip,)
        assert profile.inferred == ()
        assert allocation is not None
        assert allocation.law is expected_law(behaviour)
        assert allocation.law_probability is not None
        assert allocation.law_probability > 0.98
        if isinstance(law, Blocks) and not law.is_sequential:
            assert block_is_exact(profile, law), f"seed {seed}: {allocation}"
        elif isinstance(law, Blocks):
            assert "allocation.block_size" in findings.unknown
        if isinstance(law, Uniform):
            low, high = findings.intervals["allocation.low"], findings.intervals["allocation.high"]
            # The truth lies near where it is said to, if not always within.
            assert abs(low.low - law.low) < 8000
            assert abs(high.high - law.high) < 8000
        assert findings.packet_counts[NatTest.BEHAVIOUR] <= 60
        assert inspection.world.now < 3.0


def run_with(
    observers: list[SimulatedObserver], kind: str, *, loss: float = 0.0
) -> SimulatedInspection:
    internet = observers[0].internet
    host = internet.add_host("phone", kind)
    for link in (host.uplink.upload, host.uplink.download):
        link.conditions = replace(link.conditions, loss=loss)
    inspection = SimulatedInspection(host, host.open_port(), observers)
    inspection.run()
    return inspection


def observers_of(seed: int, count: int) -> list[SimulatedObserver]:
    internet = Internet(World(seed))
    return [SimulatedObserver(internet, f"P{index}") for index in range(count)]


def nonsense(rng: random.Random) -> Callable[[Endpoint], Endpoint]:
    lies = [
        Endpoint("10.0.0.1", 4000),
        Endpoint("127.0.0.1", 4000),
        Endpoint("0.0.0.0", 0),
        Endpoint("192.168.1.2", 5),
        Endpoint("2606:4700::1", 4000),
    ]

    def lie(seen: Endpoint) -> Endpoint:
        return rng.choice(
            [*lies, Endpoint(seen.ip, 0), Endpoint("8.8.8.8", rng.randint(1, 65_535))]
        )

    return lie


@pytest.mark.parametrize("name", ["linux-home", "vodafone-nl", "kpn-nl"])
def test_nonsense_of_one_observer_among_three_is_outvoted(name: str) -> None:
    behaviour = PRESETS[name].behaviour
    assert behaviour is not None
    for seed in range(5):
        observers = observers_of(seed, 3)
        observers[0].lie = nonsense(random.Random(seed))
        profile = run_with(observers, name).findings.profile
        assert (profile.mapping, profile.filtering) == (behaviour.mapping, behaviour.filtering)
        assert len(profile.public_ips) == 1
        assert profile.allocation is not None
        assert profile.allocation.law is expected_law(behaviour), f"seed {seed}"


@pytest.mark.parametrize("name", ["kpn-nl", "juniper-pba"])
def test_invented_ports_of_one_observer_among_three_do_not_hide_the_law(name: str) -> None:
    behaviour = PRESETS[name].behaviour
    assert behaviour is not None
    right = 0
    for seed in range(10):
        observers = observers_of(seed, 3)
        rng = random.Random(seed)
        # mypy infers no type of a lambda with a default.
        observers[0].lie = lambda seen, rng=rng: Endpoint(seen.ip, rng.randint(1024, 65_535))  # type: ignore[misc]
        allocation = run_with(observers, name).findings.profile.allocation
        right += allocation is not None and allocation.law is expected_law(behaviour)
    assert right >= 9


def test_only_nonsense_is_unknown_and_says_so() -> None:
    observers = observers_of(1, 2)
    for observer in observers:
        observer.lie = lambda _seen: Endpoint("10.0.0.1", 0)
    findings = run_with(observers, "kpn-nl").findings
    assert findings.profile.is_translated is None
    assert "contradict" in findings.unknown["mapping"]


def test_a_silent_observer_costs_time_and_nothing_else() -> None:
    observers = observers_of(1, 3)
    observers[0].is_silent = True
    inspection = run_with(observers, "kpn-nl")
    profile = inspection.findings.profile
    assert (profile.mapping, profile.filtering) == (Mapping.APDM, Filtering.APDF)
    assert profile.observer_count == 2
    assert len(inspection.requests) <= 60
    assert inspection.world.now < 3.5


def test_a_late_observer_is_heard() -> None:
    observers = observers_of(1, 2)
    observers[0].delay_s = 0.7  # after the second try has left
    profile = run_with(observers, "lyca-nl").findings.profile
    assert (profile.mapping, profile.filtering) == (Mapping.EIM, Filtering.EIF)
    assert profile.observer_count == 2


def test_an_observer_that_dies_midway_leaves_what_the_other_saw() -> None:
    observers = observers_of(1, 2)
    world = observers[0].internet.world

    def die() -> None:
        observers[0].is_silent = True

    world.after(0.3, die)
    findings = run_with(observers, "kpn-nl").findings
    profile = findings.profile
    assert profile.mapping is Mapping.APDM
    assert profile.allocation is not None
    assert profile.allocation.law is AllocationLaw.BLOCK
    assert 0 < profile.echo_count < 40


@pytest.mark.parametrize("name", ["linux-home", "kpn-nl", "juniper-pba"])
def test_ten_per_cent_loss_with_two_observers(name: str) -> None:
    behaviour = PRESETS[name].behaviour
    assert behaviour is not None
    right = 0
    for seed in range(20):
        inspection = run_with(observers_of(seed, 2), name, loss=0.1)
        profile = inspection.findings.profile
        assert len(inspection.requests) <= 60
        assert profile.mapping in (behaviour.mapping, None), f"seed {seed}"
        assert profile.filtering in (behaviour.filtering, None), f"seed {seed}"
        right += profile.allocation is not None and profile.allocation.law is expected_law(
            behaviour
        )
    assert right >= 19


def test_all_tests_in_a_row_have_ports_of_their_own_and_keep_to_their_costs() -> None:
    observers = observers_of(3, 2)
    host = observers[0].internet.add_host("phone", "linux-home")
    tests = [test for test in TESTS if test is not NatTest.LIFETIMES]
    before = len(host.ports)
    inspection = SimulatedInspection(host, host.open_port(), observers, tests=tests)
    inspection.run()
    findings = inspection.findings
    assert len(host.ports) == before + 1, "the main port stays"
    for test, count in findings.packet_counts.items():
        assert count <= TESTS[test].packets(findings), test
    assert findings.profile.hairpinning is False
    assert findings.profile.mapping is Mapping.EIM
    assert inspection.world.now < 180
