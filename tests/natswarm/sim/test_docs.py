"""The page of the emulator names every knob, and its example runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from natswarm.nat.behaviour import Poison
from natswarm.sim.fade import BurstLoss
from natswarm.sim.firewall6 import FirewallBehaviour
from natswarm.sim.link import LinkConditions
from natswarm.sim.load import BackgroundLoad
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.ports import Blocks, Preserving, ScaledBeta, Sequential, Uniform
from natswarm.sim.presets import Ipv6
from natswarm.sim.rate import RateLimit

PAGE = (Path(__file__).parents[3] / "docs" / "emulator.md").read_text(encoding="utf-8")
KNOBS = [
    NatBehaviour,
    LinkConditions,
    FirewallBehaviour,
    Ipv6,
    RateLimit,
    BackgroundLoad,
    BurstLoss,
]
LAWS = [Preserving, Uniform, ScaledBeta, Sequential, Blocks]


@pytest.mark.parametrize("kind", [*KNOBS, *LAWS], ids=lambda kind: kind.__name__)
def test_every_knob_is_on_the_page(kind: type):
    assert f"`{kind.__name__}" in PAGE
    for field in dataclasses.fields(kind):
        assert field.name in PAGE, f"{kind.__name__}.{field.name} is not in docs/emulator.md"


@pytest.mark.parametrize("kind", KNOBS, ids=lambda kind: kind.__name__)
def test_every_knob_has_its_say_in_the_docstring(kind: type):
    for field in dataclasses.fields(kind):
        assert f"        {field.name}: " in (kind.__doc__ or ""), field.name


def test_every_poison_is_on_the_page():
    assert all(f"| `{poison.name}` |" in PAGE for poison in Poison)


def test_the_example_runs():
    names: dict[str, object] = {}
    exec(PAGE.split("```python\n")[1].split("```")[0], names)
    internet = names["internet"]
    assert internet.counters.delivered_count == 2  # type: ignore[attr-defined]
