"""Groups that average parts of their models: the same bits at all, whoever is silent or lies."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio

from llmload.learn.averaging import (
    AVERAGE_CODEC,
    CALL_TIMEOUT_S,
    CALLS_PER_PEER_MAX,
    PART_VALUE_COUNT,
    WINDOW_S,
    Averaging,
    mean_of_near,
)
from llmload.learn.mixing import reducer
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.outer import OuterLoop, OuterSettings
from llmload.learn.protocol import REDUCE
from llmload.learn.shards import ParameterSpace, ShardLayout, encode_shard
from natswarm import RequestRefused

sys.path.append(str(Path(__file__).parent))
from fake_mesh import FakeMesh

PARTS = 6
SPACE = ParameterSpace.of({"w": (PARTS * PART_VALUE_COUNT - 5,)})
ROUND = 7
RATE = 1e-2


class Member:
    """One that averages; its model is `start` and some noise of its own."""

    def __init__(self, mesh, name, start, *, round_number=ROUND):
        self.node = mesh.node(name)
        noise = np.random.default_rng(list(name.encode())).standard_normal(start.size)
        self.parameters = start + 1e-3 * noise.astype(np.float32)
        self.outer = OuterLoop(
            ShardLayout(SPACE),
            self.parameters,
            self.node.peer_id,
            OuterSettings(local_steps=2),
            optimizer=AdamWSettings(learning_rate=RATE),
        )
        self.traffic = 0
        self.round_number = round_number
        self.lock = trio.Lock()
        self.averaging = Averaging(
            self.node, self.outer, self.lock, lambda: self.round_number, self.note_traffic
        )
        self.averaging.start()
        self.found = None

    def note_traffic(self, _peer_id, sent_bytes, _received_bytes):
        self.traffic += sent_bytes

    async def average(self, members):
        others = [member for member in members if member is not self]
        peers = [await self.node.connect(member.node.peer_id) for member in others]
        self.found = await self.averaging.average(peers, range(PARTS), ROUND)


@pytest.fixture
def group(nursery):
    """Four members, whose models lie close together."""
    mesh = FakeMesh(nursery)
    start = np.random.default_rng(1).standard_normal(SPACE.size).astype(np.float32)
    members = [Member(mesh, name, start) for name in "abcd"]
    members[0].mesh = mesh
    return members


async def offer(member, target, part=0):
    """Send a part of a member's model, and wait for the mean."""
    peer = await member.node.connect(target.node.peer_id)
    layout = member.averaging.layout
    values = member.parameters[layout.bounds(part)]
    ours = encode_shard(layout, part, values, codec=AVERAGE_CODEC, version=ROUND)
    async with peer.start_call(REDUCE, ours.header, ours.payload) as call:
        await call.receive()


async def average(members, views=None, *, timeout_s=60):
    with trio.fail_after(timeout_s):
        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(member.average, (views or {}).get(member, members))


def mean_of(members):
    return np.mean([member.parameters for member in members], axis=0, dtype=np.float64)


def parts_of(member, members):
    """Return the parts that a member averages."""
    ids = [each.node.peer_id for each in members]
    drawn = [reducer(ids, part=part, round_number=ROUND) for part in range(PARTS)]
    return [part for part in range(PARTS) if drawn[part] == member.node.peer_id]


async def test_all_get_the_same_bits_and_they_are_the_mean(group, autojump_clock):
    exact = mean_of(group)
    await average(group)
    for member in group:
        assert member.found.counts == dict.fromkeys(range(PARTS), 4)
        assert not member.found.failures
        assert member.parameters.tobytes() == group[0].parameters.tobytes()
        assert member.outer.anchor.tobytes() == member.parameters.tobytes()
    assert np.allclose(group[0].parameters, exact, rtol=2**-10, atol=1e-5)
    assert trio.current_time() < 1, "nobody waited for anything"
    # Sent: what we don't average ourselves, and the means of what we do to all others.
    sent = sum(member.traffic for member in group)
    assert sent == pytest.approx(2 * (4 - 1) * 2 * SPACE.size, rel=0.01)


async def test_a_silent_member_is_left_out_after_one_wait(group, autojump_clock):
    silent, *others = group
    before = silent.parameters.copy()
    exact, lost = mean_of(others), parts_of(silent, group)
    await average(others, dict.fromkeys(others, group))
    assert np.array_equal(silent.parameters, before)
    for member in others:
        assert member.found.counts == {part: 0 if part in lost else 3 for part in range(PARTS)}
        assert "don't average" in str(member.found.failures[silent.node.peer_id])
        for part in range(PARTS):
            bounds = member.averaging.layout.bounds(part)
            close = np.allclose(member.parameters[bounds], exact[bounds], rtol=2**-10, atol=1e-5)
            assert close == (part not in lost)
    assert trio.current_time() < 1.5 * WINDOW_S


async def test_parts_of_a_reducer_that_is_gone_stay_as_they_are(group, autojump_clock):
    gone, *others = group
    lost = parts_of(gone, group)
    assert lost
    before = others[0].parameters.copy()

    async def vanish(call):
        group[0].mesh.kill(gone.node)

    gone.node.serve_calls(REDUCE, vanish)
    await average(others, dict.fromkeys(others, group))
    for member in others:
        assert list(member.found.failures) == [gone.node.peer_id]
        assert [part for part, count in member.found.counts.items() if count == 0] == lost
        assert {count for count in member.found.counts.values() if count} == {3}
    for part in lost:
        bounds = others[0].averaging.layout.bounds(part)
        assert np.array_equal(others[0].parameters[bounds], before[bounds])


async def test_a_reducer_that_ends_the_call_without_means_is_a_failure(group, autojump_clock):
    mute, *others = group

    async def end(call):
        await call.receive()

    mute.node.serve_calls(REDUCE, end)
    await average(others, dict.fromkeys(others, group))
    for member in others:
        assert "ended the call" in str(member.found.failures[mute.node.peer_id])
        assert {count for count in member.found.counts.values() if count} == {3}


async def test_who_knows_of_fewer_members_spoils_no_more_than_the_parts_it_averages(
    group, autojump_clock
):
    first, *_, ignorant = group
    spoiled = set(parts_of(ignorant, group)) | set(parts_of(ignorant, [first, ignorant]))
    assert len(spoiled) < PARTS
    await average(group, {ignorant: [first, ignorant]})
    for member in group[:3]:
        for part, count in member.found.counts.items():
            assert count in ({0, 1, 2, 3} if part in spoiled else {3, 4})
            bounds = member.averaging.layout.bounds(part)
            if part not in spoiled:
                assert np.array_equal(member.parameters[bounds], first.parameters[bounds])
    assert any(ignorant.found.counts.values())


async def test_a_liar_moves_the_others_a_little_and_a_lying_reducer_too(group, autojump_clock):
    liar, *others = group
    exact = mean_of(others)
    liar.parameters += 100
    liar.outer.restart()
    await average(group)
    for member in others:
        moved = np.sqrt(np.mean(np.square(member.parameters - exact)))
        assert moved < 2 * member.outer.reach
    assert others[0].outer.reach < 100 / 20


async def test_a_mean_that_is_far_away_is_not_reached(group):
    outer = group[0].outer
    bounds = group[0].averaging.layout.bounds(0)
    before = outer.anchor[bounds].copy()
    assert outer.move(bounds, before, before + 100) < 0.01
    assert np.abs(outer.anchor[bounds] - before).max() < 1.01 * outer.reach


async def test_other_rounds_and_other_models_are_refused(group, autojump_clock):
    a, b = group[:2]
    peer = await a.node.connect(b.node.peer_id)
    layout = a.averaging.layout
    values = a.parameters[layout.bounds(0)]

    async def ask(encoded):
        async with peer.start_call(REDUCE, encoded.header, encoded.payload) as call:
            await call.end()
            await call.receive()

    old = encode_shard(layout, 0, values, codec=AVERAGE_CODEC, version=ROUND + 2)
    with pytest.raises(RequestRefused, match="clock"):
        await ask(old)
    other = ShardLayout(ParameterSpace.of({"w": (10,)}))
    foreign = encode_shard(
        other, 0, np.ones(10, dtype=np.float32), codec=AVERAGE_CODEC, version=ROUND
    )
    with pytest.raises(RequestRefused, match="another model"):
        await ask(foreign)


def test_a_mean_is_of_those_who_are_near():
    ours = np.zeros(4, dtype=np.float32)
    near, far = ours + np.float32(0.5), ours + np.float32(1e30)

    def mean(offered, stride=1e-3, reach=1.0):
        found, count = mean_of_near(ours, offered, stride, reach)
        assert np.array_equal(found, [found[0]] * 4)
        return found[0], count

    assert mean([ours, near]) == (0.25, 2)
    assert mean([ours, far]) == (0, 1)
    assert mean([ours], reach=0.0) == (0, 1)
    # Who reduces and is apart from the others does not draw them to itself.
    assert mean([ours, far, far, far]) == (far[0], 3)
    assert mean([ours, near, near, near]) == (0.5, 3)
    # One step away is near, even where all others are equal.
    assert mean([ours, ours, ours, near], stride=0.25) == (0.125, 4)
    assert mean([ours, ours, ours, near], stride=0.2) == (0, 3)


# --- Clocks, and those who come and go -----------------------------------------------------------


async def test_whose_clock_is_ahead_does_not_shorten_the_wait_for_the_others(group, autojump_clock):
    early, *usual, late = group
    begin_at = {early: 0, late: WINDOW_S + 2} | dict.fromkeys(usual, WINDOW_S - 2)

    async def average_then(member):
        await trio.sleep_until(begin_at[member])
        await member.average(group)

    async with trio.open_nursery() as nursery:
        for member in group:
            nursery.start_soon(average_then, member)
    parts = [part for member in usual for part in parts_of(member, group)]
    assert parts
    for member in group:
        assert {member.found.counts[part] for part in parts} == {4}


async def test_parts_that_came_long_before_we_begin_spoil_nothing(group, autojump_clock):
    a, b, silent, stranger = group
    part = parts_of(a, [a, b, silent])[0]

    async def ask_too_early(sender, at):
        await trio.sleep_until(at)
        with suppress(RequestRefused):
            await offer(sender, a, part)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_too_early, silent, 0)
        nursery.start_soon(ask_too_early, stranger, WINDOW_S / 2)
        await trio.sleep_until(WINDOW_S + 1)
        view = [a, b, silent]
        await average([a, b], {a: view, b: view})
    for member in (a, b):
        assert list(member.found.failures) == [silent.node.peer_id]
        assert member.found.counts[part] >= 2


async def test_nothing_is_held_for_who_has_left(group, autojump_clock):
    stranger, target = group[:2]
    for part in range(PARTS):
        with trio.move_on_after(1):
            await offer(stranger, target, part)
    await stranger.mesh.wait_quiet()
    assert not target.averaging._rounds[ROUND].open


async def test_a_peer_has_few_calls_at_once(group, autojump_clock):
    stranger, target = group[:2]
    async with trio.open_nursery() as nursery:
        for part in range(CALLS_PER_PEER_MAX):
            nursery.start_soon(offer, stranger, target, part)
        await trio.sleep(1)
        with pytest.raises(RequestRefused, match="no room"):
            await offer(stranger, target, CALLS_PER_PEER_MAX)
        nursery.cancel_scope.cancel()


async def test_a_clock_that_was_set_back_ends_no_round(group):
    member = group[0]
    member.round_number = 105
    for number in (104, 105, 106):
        member.averaging._round(number)
    member.round_number = 5
    ours = member.averaging._round(5)
    for number in (4, 6):
        member.averaging._round(number)
    assert member.averaging._round(5) is ours
    assert len(member.averaging._rounds) == 3


async def test_a_step_that_takes_long_costs_no_calls(group, autojump_clock):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(average, group, timeout_s=4 * CALL_TIMEOUT_S))
        async with group[0].lock:
            await trio.sleep(2 * CALL_TIMEOUT_S)
    for member in group:
        assert not member.found.failures
        assert member.parameters.tobytes() == group[0].parameters.tobytes()
