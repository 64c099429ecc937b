"""The presets say what their sources say, and every one works."""

from __future__ import annotations

import pytest

from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.ports import Blocks, Preserving, ScaledBeta, Uniform
from natswarm.sim.presets import PRESETS, Site
from natswarm.sim.presets6 import PRESETS6
from natswarm.sim.topology import Internet
from natswarm.sim.world import World

EXPECTED = {
    "vodafone-nl": ("EIM", "ADF", ScaledBeta),
    "kpn-nl": ("APDM", "APDF", Blocks),
    "lebara-nl": ("EIM", "ADF", Blocks),
    "lyca-nl": ("EIM", "EIF", Uniform),
    "mycall-no": ("EIM", "EIF", Uniform),
    "lyca-bg": ("EIM", "ADF", Uniform),
    "telia-no": ("EIM", "ADF", Uniform),
    "orange-bg": ("APDM", "APDF", Uniform),
    "o2-uk-4g": ("APDM", "APDF", Uniform),
    "sky-uk-dsl": ("EIM", "APDF", Preserving),
    "tmobile-us": ("APDM", "APDF", Uniform),
    "juniper-pba": ("APDM", "APDF", Blocks),
    "linux-home": ("EIM", "APDF", Preserving),
    "linux-random": ("APDM", "APDF", Uniform),
    "cloud-natgw": ("APDM", "APDF", Uniform),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_what_was_measured(name: str):
    behaviour = PRESETS[name].behaviour
    assert behaviour is not None
    mapping, filtering, law = EXPECTED[name]
    assert behaviour.mapping is Mapping(mapping)
    assert behaviour.filtering is Filtering(filtering)
    assert isinstance(behaviour.allocation, law)


def test_all_presets_are_covered_and_give_their_source():
    assert set(PRESETS) == {"public", *EXPECTED}
    assert not PRESETS.keys() & PRESETS6.keys()
    for name, preset in (PRESETS | PRESETS6).items():
        assert preset.source, name
        unknown = preset.behaviour is not None and preset.site is Site.CARRIER
        assert preset.note or not unknown, f"{name} assumes something and does not say so"


def test_details_that_sources_give():
    o2, juniper = PRESETS["o2-uk-4g"].behaviour, PRESETS["juniper-pba"].behaviour
    assert o2 is not None
    assert juniper is not None
    assert o2.tftp_helper
    assert (o2.allocation.low, o2.allocation.high) == (15_340, 44_360)
    assert isinstance(juniper.allocation, Blocks)
    assert (juniper.allocation.size, juniper.allocation.max_blocks) == (128, 8)
    kpn = PRESETS["kpn-nl"].behaviour
    assert kpn is not None
    assert isinstance(kpn.allocation, Blocks)
    assert (kpn.allocation.size, kpn.allocation.is_aligned) == (256, True)
    assert len(kpn.allocation.bases()) == 252


@pytest.mark.parametrize("name", PRESETS | PRESETS6)
def test_every_preset_carries_a_request_and_its_answer(name: str):
    internet = Internet(World(seed=3))
    client, server = internet.add_host("client", name), internet.add_host("server")
    answers = []
    for attempt in range(20):  # one in a thousand is lost on 4G
        asking = client.open_port()
        serving = server.open_port(1000 + attempt)
        asking.on_datagram = lambda data, source: answers.append((data, source))
        serving.on_datagram = lambda data, source, port=serving: port.send(data + b"!", source)
        asking.send(b"ping", serving.endpoint)
        internet.world.run()
        asking.close()
    assert len(answers) >= 18
    assert answers[0][0] == b"ping!"
    assert answers[0][1].ip == server.ip
