"""A stage that gives wrong numbers is found, told of, and left."""

from __future__ import annotations

import pytest
import trio

from llmload.swarm.blocks import BlockStack

PROMPT = [5, 17, 3, 250, 17]


def spoil(stage, engines) -> None:
    """Let a stage compute something else: finite, of the right shape, and wrong."""
    run_batch = stage._shop.stack.run_batch

    class Spoilt(BlockStack):
        def run_batch(self, items):
            return [1.1 * output + 0.3 for output in run_batch(items)]

    spoilt = Spoilt([engines[range(index, index + 1)] for index in stage.offer.blocks])
    spoilt.new_cache = stage._shop.stack.new_cache
    stage._shop.stack = spoilt


@pytest.mark.parametrize("codec", ["float32", "float16"])
async def test_honest_stages_pass_every_check(autojump_clock, pipeline, codec):
    swarm = pipeline(3, replicas=2)
    told = []
    generation = swarm.client.generate(
        PROMPT, max_new_tokens=30, check_share=1, codec=codec, tell=told.append
    )
    async with generation as answer:
        async for _ in answer:
            await trio.sleep(0.2)  # time for the check
        assert answer.statistics().check_count > 5
        assert answer.statistics().failover_count == 0
    assert not [text for text in told if "numbers" in text]
    await swarm.check_nothing_is_left()


@pytest.mark.parametrize("block", [0, 1, 2])
async def test_a_third_tells_which_of_two_is_wrong(autojump_clock, pipeline, engines, block):
    swarm = pipeline(3, replicas=3)
    told = []
    generation = swarm.client.generate(
        PROMPT, max_new_tokens=40, check_share=1, speculate=False, tell=told.append
    )
    async with generation as answer:
        await anext(answer)
        liar = answer.route[block]
        (stage,) = [stage for stage in swarm.stages if stage.offer == liar]
        spoil(stage, engines)
        async for _ in answer:
            await trio.sleep(0.5)
        assert liar not in answer.route
    assert f"{liar} gave wrong numbers and is left alone" in told
    assert len([text for text in told if "wrong numbers" in text]) == 1
    await swarm.check_nothing_is_left()


async def test_of_two_that_differ_both_come_last(autojump_clock, pipeline, engines):
    swarm = pipeline(3, replicas=2)
    told = []
    generation = swarm.client.generate(
        PROMPT, max_new_tokens=6, check_share=1, speculate=False, tell=told.append
    )
    async with generation as answer:
        await anext(answer)
        (stage,) = [stage for stage in swarm.stages if stage.offer == answer.route[1]]
        spoil(stage, engines)
        async for _ in answer:
            await trio.sleep(0.5)
    assert any("give different numbers" in text for text in told)


async def test_without_another_peer_nothing_is_repeated(autojump_clock, pipeline):
    swarm = pipeline(2)
    async with swarm.client.generate(PROMPT, max_new_tokens=5, check_share=1) as answer:
        async for _ in answer:
            await trio.sleep(0.2)
        assert answer.statistics().check_count == 0
    assert [stage.statistics.opened_session_count for stage in swarm.stages] == [1, 1]
