"""What a user may type for a lab, and what is said of what cannot be."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import msgspec
import pytest

from natswarm.errors import ConfigurationError
from natswarm.lab.nat import BLOCK_PORTS, KernelNat, NatKind, kernel_nat
from natswarm.lab.settings import LabPlan, LabSettings, make_plan
from natswarm.lab.units import parse_bytes, parse_duration, parse_rate, parse_share
from natswarm.nat.behaviour import Poison
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.ports import Blocks, ScaledBeta, Uniform
from natswarm.sim.presets import PRESETS
from natswarm.sim.rate import RateLimit


def plan(*devices: str, **settings: Any) -> LabPlan:
    return make_plan(LabSettings(name="lab", devices=devices, **settings))


def behaviour(*knobs: str, device: str = "a=kpn-nl") -> NatBehaviour:
    return plan(device, knobs=knobs).devices[0].nats[-1].behaviour


def test_a_chain_is_read_from_the_internet_inwards():
    made = plan("a=kpn-nl", "b=o2-uk-4g,home", "s=public", "c=@b")
    a, b, s, c = made.devices
    assert [nat.preset for nat in a.nats] == ["kpn-nl"]
    assert a.kernel is None
    assert [nat.preset for nat in b.nats] == ["o2-uk-4g", "linux-home"]
    assert b.nats[0].kernel is None
    assert b.kernel == KernelNat(NatKind.PRESERVING)
    assert s.nats == ()
    assert (c.nats, c.beside) == (b.nats, "b")


def test_the_core_is_as_told():
    made = plan("a=home", delay="25ms", jitter="5ms", loss="1%", rate="10mbit", hops=5)
    assert (made.delay_s, made.hops) == (0.025, 5)
    assert (made.core.jitter_s, made.core.loss) == (0.005, 0.01)
    assert made.core.rate_bytes_per_s == 1.25e6
    assert made.core.queue_bytes == 125_000
    assert plan("a=home", rate="1mbit", queue="64kB").core.queue_bytes == 64_000


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", True), ("kernel", True), ("emulated", False)]
)
def test_who_carries_out_a_home(choice: str, expected: bool):
    assert (plan("a=home", nat=choice).devices[0].kernel is not None) is expected


def test_a_knob_the_kernel_lacks_has_the_home_emulated():
    assert plan("a=home", knobs=("a.hairpinning=yes",)).devices[0].kernel is None
    assert plan("a=home,kpn-nl").devices[0].kernel is None


def test_knobs():
    assert behaviour("a.hairpinning=yes").hairpinning
    assert behaviour("a.max_mappings=64").max_mappings == 64
    assert behaviour("a.absolute_lifetime_s=48..75").absolute_lifetime_s == (48.0, 75.0)
    assert behaviour("a.absolute_lifetime_s=none").absolute_lifetime_s is None
    assert behaviour("a.poison=burns-mapping").poison is Poison.BURNS_MAPPING
    assert behaviour("a.subscriber_rate=per_s=100,burst=50").subscriber_rate == RateLimit(100, 50)
    assert behaviour("a.allocation=uniform:low=2000,high=3000").allocation == Uniform(2000, 3000)
    assert behaviour("a.allocation=blocks:is_sequential=yes").allocation == Blocks(
        is_sequential=True
    )
    law = "a.allocation=scaled-beta:offset=4000,span=100,alpha=2,beta=3"
    assert behaviour(law).allocation == ScaledBeta(4000, 100, 2, 3)


def test_knobs_that_fit_together_only_are_turned_together():
    turned = behaviour("a.unreplied_lifetime_s=200", "a.replied_lifetime_s=300")
    assert (turned.unreplied_lifetime_s, turned.replied_lifetime_s) == (200.0, 300.0)


def test_a_knob_of_one_nat_of_several():
    made = plan("b=kpn-nl,home", knobs=("b.home.poison=takes-port", "b.kpn-nl.hairpinning=on"))
    outer, inner = made.devices[0].nats
    assert outer.behaviour.hairpinning
    assert inner.kernel == KernelNat(NatKind.PRESERVING, is_poisonable=True)


def test_a_knob_of_one_of_two_alike():
    outer, inner = plan("a=home,home", knobs=("a.1.hairpinning=yes",)).devices[0].nats
    assert (outer.behaviour.hairpinning, inner.behaviour.hairpinning) == (True, False)


@pytest.mark.parametrize(
    ("devices", "settings", "error"),
    [
        ((), {}, "needs a device"),
        (("a",), {}, "no device: write NAME=PRESET"),
        (("a=",), {}, "no device: write NAME=PRESET"),
        (("A=home",), {}, "small letters"),
        (("core=home",), {}, "middle of the lab"),
        (("a=home", "a=kpn-nl"), {}, "two devices are called 'a'"),
        (("a=nonsense",), {}, "no preset 'nonsense'; there are public, vodafone-nl"),
        (("a=linux-home-dual",), {}, "IPv6, which a lab does not carry; take .* linux-home"),
        (("a=xlat464-4g",), {}, "IPv6, which a lab does not carry"),
        (("a=public,home",), {}, "host without a NAT"),
        (("a=home,public",), {}, "host without a NAT"),
        (("b=@a",), {}, "no device 'a' is named before"),
        (("a=public", "b=@a"), {}, "write b=public"),
        (("a=home", "b=@a"), {"knobs": ("b.hairpinning=yes",)}, "set a's knobs"),
        (("a=kpn-nl",), {"nat": "kernel"}, "cannot be the kernel's: it stands in a carrier's"),
        (
            ("a=home",),
            {"nat": "kernel", "knobs": ("a.filtering=EIF",)},
            "cannot be the kernel's: the kernel cannot do EIF filtering",
        ),
        (("a=home",), {"delay": "25"}, "'25' is not a duration, such as 25ms"),
        (("a=home",), {"delay": "25 parsecs"}, "the units are us, ms, s, min"),
        (("a=home",), {"delay": "-5ms"}, "not a duration"),
        (("a=home",), {"loss": "120%"}, "from 0 to 100%"),
        (("a=home",), {"rate": "fast"}, "not a rate, such as 10mbit"),
        (("a=home",), {"rate": "0mbit"}, "carries nothing"),
        (("a=home",), {"queue": "64kB"}, "give --rate"),
        (("a=home",), {"hops": 0}, "1 to 30 routers"),
        (("a=home",), {"knobs": ("hairpinning=yes",)}, "write NAME.KNOB=VALUE"),
        (("a=home",), {"knobs": ("a.hairpinning",)}, "write NAME.KNOB=VALUE"),
        (("a=home",), {"knobs": ("b.hairpinning=yes",)}, "no device 'b'; there are a"),
        (("a=public",), {"knobs": ("a.hairpinning=yes",)}, "no NAT to set knobs of"),
        (("a=home",), {"knobs": ("a.kpn-nl.hairpinning=yes",)}, "not behind kpn-nl, but behind"),
        (("a=kpn-nl,home",), {"knobs": ("a.hairpinning=yes",)}, "which NAT of a"),
        (
            ("a=home,home",),
            {"knobs": ("a.home.hairpinning=yes",)},
            r"Write a\.1\.hairpinning or a\.2\.hairpinning",
        ),
        (("a=home",), {"knobs": ("a.colour=red",)}, "no knob 'colour'; there are mapping"),
        (("a=home",), {"knobs": ("a.hairpinning=maybe",)}, "yes or no, not 'maybe'"),
        (("a=home",), {"knobs": ("a.mapping=cone",)}, "one of eim, adm, apdm"),
        (("a=home",), {"knobs": ("a.max_mappings=many",)}, "a whole number"),
        (("a=home",), {"knobs": ("a.max_mappings=0",)}, "at least one mapping"),
        (("a=home",), {"knobs": ("a.absolute_lifetime_s=48",)}, "bounds such as 48..75"),
        (("a=home",), {"knobs": ("a.allocation=random",)}, "no law of allocation 'random'"),
        (("a=home",), {"knobs": ("a.allocation=uniform:low=9,high=5",)}, "not a range of ports"),
        (("a=home",), {"knobs": ("a.allocation=uniform:width=5",)}, "not one of low=, high="),
        (("a=home",), {"knobs": ("a.allocation=scaled-beta",)}, "lacks parameters"),
        (
            ("a=home",),
            {"knobs": ("a.hairpinning=yes", "a.hairpinning=no")},
            "hairpinning is set twice",
        ),
        (
            ("a=lyca-nl",),
            {"knobs": ("a.poison=burns-mapping",)},
            "poison=burns-mapping cannot be: a filter that lets anyone in",
        ),
    ],
)
def test_what_cannot_be_is_refused(devices: tuple[str, ...], settings: dict[str, Any], error: str):
    with pytest.raises(ConfigurationError, match=error):
        plan(*devices, **settings)


@pytest.mark.parametrize("name", ["", "9lives", "a b", "../etc", "x" * 21, "lab.1"])
def test_names_are_words(name: str):
    with pytest.raises(ConfigurationError, match="cannot be the name of a lab"):
        make_plan(LabSettings(name=name, devices=("a=home",)))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "public"])
def test_every_preset_is_carried_out_by_somebody(preset: str):
    nat = plan(f"a={preset}").devices[0].nats[0]
    is_kernel = nat.kernel is not None
    assert is_kernel == (preset in ("linux-home", "linux-random", "sky-uk-dsl"))


def test_the_settings_travel_as_text():
    settings = LabSettings(name="x", devices=("a=home",), knobs=("a.poison=none",), seed=7)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=LabSettings) == settings


def test_the_kernel_s_block_is_where_the_subscriber_s_is():
    base = PRESETS["linux-random"].behaviour
    assert base is not None
    block = dataclasses.replace(base, allocation=Uniform(40_960, 41_983))
    at = kernel_nat(block, random.Random(1))
    assert at == KernelNat(NatKind.BLOCK, block_base=40_960)
    blocks = dataclasses.replace(base, allocation=Blocks(size=BLOCK_PORTS))
    drawn = kernel_nat(blocks, random.Random(1))
    assert drawn.kind is NatKind.BLOCK
    assert drawn.block_base % BLOCK_PORTS == 0


def test_units():
    assert parse_duration("250us") == pytest.approx(0.00025)
    assert parse_duration("1.5s") == 1.5
    assert parse_duration("0") == 0.0
    assert parse_share("1%") == parse_share("0.01") == 0.01
    assert parse_rate("512kbit") == 64_000.0
    assert parse_bytes("1.5kB") == 1500
