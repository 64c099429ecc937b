"""Stages die, stall, lie and come back; the text stays the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import trio
from fake_mesh import compute_here

from llmload.engine.generate import generate_tokens
from llmload.engine.sampler import SamplingParameters
from llmload.errors import StageFailed
from llmload.swarm.client import SwarmTimeouts
from llmload.swarm.living_sequence import (
    OPENING_S,
    PREFILL_SHARE,
    STALL_FACTOR,
    LivingSequence,
)
from llmload.swarm.route import NoRoute
from llmload.swarm.stage import StageLimits, StageServer

PROMPT = [5, 17, 3, 250, 17]
SAMPLED = SamplingParameters(temperature=0.9, top_k=50, top_p=0.95, seed=11)
COUNT = 24


@pytest.fixture
def expected(engines, config):
    def tokens(sampling=SAMPLED):
        whole = [engines[config.blocks]]
        return list(generate_tokens(whole, PROMPT, sampling=sampling, max_new_tokens=COUNT))

    return tokens


async def collect(answer):
    return [token.token_id async for token in answer]


def node_of(swarm, offer):
    return swarm.mesh.nodes[offer.peer_id]


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("victims", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
async def test_any_stages_may_die_while_replicas_exist(
    autojump_clock, pipeline, expected, victims, speculate
):
    swarm = pipeline(3, replicas=2)
    generation = swarm.client.generate(
        PROMPT, sampling=SAMPLED, max_new_tokens=COUNT, speculate=speculate
    )
    async with generation as answer:
        got = [(await anext(answer)).token_id for _ in range(5)]
        for victim in victims:
            swarm.mesh.kill(node_of(swarm, answer.route[victim]))
        got += await collect(answer)
        assert got == expected()
        assert answer.statistics().failover_count == 1
        assert answer.statistics().lost_s < 1
    await swarm.check_nothing_is_left()


async def test_stage_that_falls_silent_is_passed_by(autojump_clock, pipeline, expected):
    """It keeps its connections and takes what it is sent: only the clock tells."""
    swarm = pipeline(3, replicas=2)

    async def silence(*_):
        await trio.sleep(100)
        raise StageFailed("far too late")

    generation = swarm.client.generate(PROMPT, sampling=SAMPLED, max_new_tokens=COUNT)
    async with generation as answer:
        got = [(await anext(answer)).token_id for _ in range(5)]
        silent = answer.route[1]
        (stage,) = [stage for stage in swarm.stages if stage.offer == silent]
        stage._shop.compute = silence
        got += await collect(answer)
        assert silent not in answer.route
        assert answer.statistics().failover_count == 1
        assert answer.statistics().lost_s < 2
    assert got == expected()
    swarm.mesh.kill(node_of(swarm, silent))
    await trio.sleep(1)
    # The silent one is not done yet.
    assert all(stage.session_count == 0 for stage in swarm.stages if stage.offer != silent)


async def test_patience_grows_with_what_is_computed_and_not_with_the_way():
    """A prompt travels at once, however far; only its rows are computed one by one."""
    directory = SimpleNamespace(step_s=lambda _route: 0.5, compute_s=lambda _route: 0.01)
    sequence = LivingSequence(None, None, directory, None, SwarmTimeouts(), print)
    racer = SimpleNamespace(session=None, route=())
    one, many = (sequence._patience_s(racer, [7] * rows, []) for rows in (1, 400))
    assert one == OPENING_S + STALL_FACTOR * 0.5
    assert many - one == pytest.approx(STALL_FACTOR * 399 * PREFILL_SHARE * 0.01)


async def test_without_a_replica_it_waits_for_one(autojump_clock, pipeline, expected, stack, model):
    patient = SwarmTimeouts(replica_s=60)
    swarm = pipeline(3, timeouts=patient)
    told = []
    generation = swarm.client.generate(
        PROMPT, sampling=SAMPLED, max_new_tokens=COUNT, tell=told.append
    )
    async with generation as answer:
        got = [(await anext(answer)).token_id for _ in range(5)]
        swarm.mesh.kill(node_of(swarm, answer.route[1]))

        async def come_back() -> None:
            await trio.sleep(20)
            node = swarm.mesh.node("newcomer")
            blocks = stack(range(1, 3))
            stage = StageServer(node, blocks, model.content_hash, compute=compute_here)
            stage.start()
            await node.announce([stage.service])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_back)
            got += await collect(answer)
    assert got == expected()
    assert any("waiting: nobody we know of serves block 1 of" in text for text in told)


async def test_who_waits_for_too_long_gives_up_with_the_reason(autojump_clock, pipeline):
    swarm = pipeline(3, timeouts=SwarmTimeouts(replica_s=30))
    async with swarm.client.generate(PROMPT) as answer:
        await anext(answer)
        before = trio.current_time()
        swarm.mesh.kill(node_of(swarm, answer.route[1]))
        with pytest.raises(StageFailed, match=r"blocks 1-1\): .*lost"):
            await collect(answer)
        assert 30 <= trio.current_time() - before < 40
    with pytest.raises(NoRoute):
        async with swarm.client.generate(PROMPT):
            pass
    await swarm.check_nothing_is_left()


async def test_stream_cut_anywhere_changes_nothing_while_replicas_exist(
    autojump_clock, pipeline, expected
):
    """At every seventh send of a whole answer, whatever it carries."""
    swarm = pipeline(2, replicas=2)
    options = {"sampling": SAMPLED, "max_new_tokens": COUNT}
    assert await swarm.tokens(PROMPT, **options) == expected()
    for send in range(0, swarm.mesh.send_count, 7):
        swarm = pipeline(2, replicas=2)
        swarm.mesh.cut_at_send, swarm.mesh.cut_bytes = send, 3
        assert await swarm.tokens(PROMPT, **options) == expected(), f"cut at send {send}"
        await swarm.check_nothing_is_left()


async def test_evicted_memory_is_computed_again(autojump_clock, pipeline, expected, config):
    """Two sequences that do not fit together take turns, and both come out right."""
    swarm = pipeline(2, limits=StageLimits(cache_bytes_max=16_000), timeouts=SwarmTimeouts())
    answers = {}

    async def ask(index: int) -> None:
        answers[index] = await swarm.tokens(PROMPT, sampling=SAMPLED, max_new_tokens=COUNT)

    async with trio.open_nursery() as nursery:
        for index in range(2):
            nursery.start_soon(ask, index)
    assert answers == {0: expected(), 1: expected()}
    assert sum(stage._shop.pool.evicted_count for stage in swarm.stages) > 0


async def test_long_prompts_go_in_parts_side_by_side(
    autojump_clock, pipeline, engines, config, monkeypatch
):
    monkeypatch.setattr("llmload.swarm.route_session.PART_ROWS", 16)
    prompt = [(7 * i) % 300 for i in range(80)]
    whole = [engines[config.blocks]]
    swarm = pipeline(3)
    started_at = trio.current_time()
    got = await swarm.tokens(prompt, max_new_tokens=1)
    elapsed_s = trio.current_time() - started_at
    assert got == list(generate_tokens(whole, prompt, max_new_tokens=1))
    assert [stage.statistics.step_count for stage in swarm.stages] == [5, 5, 5]
    # Five parts through three stages of 10 ms: 7 turns one after the other instead of 15. Each hop
    # adds a checkpoint or two of the mock clock.
    assert elapsed_s == pytest.approx(0.07, abs=0.005)
