"""Nodes learn which strategy opens which networks, and both sides follow what one has learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from natswarm import PRESETS, PunctureStarted
from natswarm.net.notes import Notes
from natswarm.puncture.recipes import pair_label
from natswarm.puncture.strategy import Strategy

TFTP, TWO = Strategy.TFTP_HELPER, Strategy.TWO_SIDED_BIRTHDAY


def with_tftp(name: str):
    preset = PRESETS[name]
    return replace(preset, behaviour=replace(preset.behaviour, tftp_helper=True))


def plans(swarm, name: str, target: str) -> list[list[Strategy]]:
    peer_id = swarm.identity(target).peer_id
    return [
        [step.strategy for step in event.plan.steps]
        for event in swarm.events[name]
        if isinstance(event, PunctureStarted) and event.peer_id == peer_id
    ]


@pytest.mark.parametrize("knows", [False, True], ids=["fresh", "learned"])
async def test_the_asked_side_says_the_order(open_swarm, autojump_clock, knows):
    async with open_swarm(seed=4) as swarm:
        await swarm.add_observers()
        kind = with_tftp("kpn-nl")
        notes = {name: Notes() for name in "ab"}
        a, b = [await swarm.add_inspected(n, kind, notes=notes[n]) for n in "ab"]
        for node in (a, b):  # the quick part does not look for helpers
            node.adopt_profile(replace(node.profile, tftp_helper=True))
        await trio.sleep(1)
        pair = pair_label(a.profile, b.profile)
        if knows:
            for _ in range(40):
                notes["b"].recipes.note(pair, [TFTP, TWO], TWO)
        await a.connect(b.peer_id)
        await trio.sleep(1)
        await swarm.check_talk("a", "b")
        first, *_ = plans(swarm, "a", "b")
        assert first == ([TWO, TFTP] if knows else [TFTP, TWO])
        assert plans(swarm, "b", "a")[0] == first
        # Both sides have learned from it.
        learned = notes["a"].recipes.scores()[pair]
        assert sum(score.opened for score in learned.values()) == 1.0
        assert notes["b"].recipes.is_changed


async def test_a_file_from_run_to_run(tmp_path, caplog):
    notes = Notes.load(tmp_path)
    notes.recipes.note("pair", [TWO], TWO)
    await notes.save()
    assert not notes.recipes.is_changed
    assert Notes.load(tmp_path).recipes.scores() == notes.recipes.scores()
    assert [path.name for path in tmp_path.iterdir()] == ["recipes.json"]
    (tmp_path / "recipes.json").write_text("{")
    assert Notes.load(tmp_path).recipes.scores() == {}
    assert (tmp_path / "recipes.json.damaged").read_text() == "{"
    assert "was damaged" in caplog.text


async def test_a_disk_that_takes_nothing_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    notes = Notes(tmp_path / "file")
    for _ in range(2):
        notes.recipes.note("pair", [TWO], TWO)
        await notes.save()
    assert caplog.text.count("cannot write recipes.json") == 1
    assert notes.recipes.is_changed
