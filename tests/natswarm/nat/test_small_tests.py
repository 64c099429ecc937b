"""Hairpinning, poison and TFTP helper over the emulator's knobs: unknown is allowed, wrong is not.

Run with `-s` to see how many of the runs said something.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from laboratory import Laboratory

from natswarm.nat.asking import AskingTest
from natswarm.nat.behaviour import Filtering, Mapping, Poison
from natswarm.nat.hairpinning import HairpinningTest
from natswarm.nat.poison import PoisonTest
from natswarm.nat.tftp_helper import TftpHelperTest, birthday
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.ports import Blocks, Preserving, Sequential, Uniform

LAWS = (Preserving(), Uniform(), Blocks(size=256, max_blocks=4), Sequential())
LOSSES = [0.0, 0.01, 0.1]


def behaviours(**knobs: list[Any]) -> list[NatBehaviour]:
    """Return the behaviours of all combinations that there can be."""
    found = []
    names = ["mapping", "filtering", "allocation", *knobs]
    for values in itertools.product(Mapping, Filtering, LAWS, *knobs.values()):
        try:
            found.append(NatBehaviour(**dict(zip(names, values, strict=True))))
        except ValueError:
            continue
    return found


def look(
    make: type[AskingTest], behaviour: NatBehaviour, seed: int, loss: float, **options: Any
) -> Laboratory:
    laboratory = Laboratory(behaviour, seed, loss=loss, **options)
    laboratory.survey()
    findings = laboratory.findings
    ports = make.port_count(findings) if hasattr(make, "port_count") else make.PORT_COUNT
    bound = make.packets(findings)
    started_at = laboratory.world.now
    test = laboratory.run(make, ports)
    assert test.packet_count <= bound, f"{test.packet_count} packets, at most {bound} were stated"
    assert laboratory.world.now - started_at <= make.duration_s + 20 * loss + 2
    return laboratory


def census(
    make: type[AskingTest],
    field: str,
    cases: list[NatBehaviour],
    truth: Callable[[NatBehaviour], object],
    loss: float,
    seeds: range,
) -> Counter[str]:
    """Return how often it was right, unknown and wrong; print what was wrong."""
    counts: Counter[str] = Counter()
    # A seed of its own for each run: else all cases of one seed would lose the same datagrams.
    for seed, behaviour in enumerate(cases * len(seeds)):
        findings = look(make, behaviour, seed, loss).findings
        found = getattr(findings.profile, field)
        if found is None:
            assert findings.unknown[field], "unknown without a reason"
            counts["unknown"] += 1
        elif found == truth(behaviour):
            assert field not in findings.unknown
            counts["right"] += 1
        else:
            print(f"seed {seed}: {found} of {behaviour}")
            counts["wrong"] += 1
    print(f"{field}, loss {loss:.0%}: {dict(counts)}")
    return counts


@pytest.mark.parametrize("loss", LOSSES)
def test_hairpinning_is_found_out(loss: float) -> None:
    cases = behaviours(hairpinning=[False, True], overloading=[False, True])
    counts = census(
        HairpinningTest, "hairpinning", cases, lambda each: each.hairpinning, loss, range(2)
    )
    assert counts["wrong"] == 0
    assert counts["right"] >= 0.5 * counts.total()


def test_hairpinning_shows_in_spite_of_poison() -> None:
    for behaviour in behaviours(hairpinning=[True], poison=list(Poison)):
        if behaviour.mapping is Mapping.EIM:
            assert look(HairpinningTest, behaviour, 1, 0.0).findings.profile.hairpinning is True


def visible_poison(behaviour: NatBehaviour) -> Poison:
    """A retired mapping that comes back at the same port has not changed for anybody."""
    keeps_ports = isinstance(behaviour.allocation, Preserving) and behaviour.overloading
    if keeps_ports and behaviour.poison is Poison.RETIRES_MAPPING:
        return Poison.NONE
    return behaviour.poison


@pytest.mark.parametrize("loss", LOSSES)
def test_poison_is_found_out(loss: float) -> None:
    cases = behaviours(poison=list(Poison))
    counts = census(PoisonTest, "poison", cases, visible_poison, loss, range(3))
    assert counts["wrong"] == 0
    assert counts["right"] >= 0.5 * counts.total()


@pytest.mark.parametrize("poison", Poison)
def test_poison_of_a_predictable_nat_is_always_known(poison: Poison) -> None:
    for filtering in (Filtering.ADF, Filtering.APDF):
        if poison is Poison.TAKES_PORT and filtering is Filtering.ADF:
            continue
        for mapping in (Mapping.EIM, Mapping.ADM):
            behaviour = NatBehaviour(
                mapping=mapping, filtering=filtering, allocation=Uniform(), poison=poison
            )
            assert look(PoisonTest, behaviour, 5, 0.0).findings.profile.poison is poison


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tftp_helper_is_found_out(loss: float) -> None:
    cases = behaviours(tftp_helper=[False, True], overloading=[False, True])
    counts = census(
        TftpHelperTest, "tftp_helper", cases, lambda each: each.tftp_helper, loss, range(2)
    )
    assert counts["wrong"] == 0
    known = sum(each.filtering is Filtering.APDF for each in cases) * 2
    assert counts["right"] >= 0.6 * known


@pytest.mark.parametrize("make", [HairpinningTest, PoisonTest, TftpHelperTest])
@pytest.mark.parametrize("observer_count", [0, 1, 2])
def test_few_observers_make_it_unknown_not_wrong(
    make: type[AskingTest], observer_count: int
) -> None:
    for mapping, filtering in itertools.product(Mapping, Filtering):
        behaviour = NatBehaviour(mapping=mapping, filtering=filtering, allocation=Uniform())
        laboratory = Laboratory(behaviour, 3, observer_count=observer_count)
        ports = 12 if observer_count else 0
        laboratory.run(make, ports)
        profile = laboratory.findings.profile
        assert profile.hairpinning in (None, False)
        assert profile.poison in (None, Poison.NONE)
        assert profile.tftp_helper in (None, False)


def test_a_birthday_costs_what_it_must() -> None:
    block, wide, everything = (birthday(count, 192) for count in (256, 29_021, 64_512))
    assert block.packets <= 160
    assert block.power >= 0.999
    assert wide.packets <= 1500
    assert wide.power >= 0.99
    assert everything.packets > 1500
