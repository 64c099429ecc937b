"""Stages and client together: split is whole, failures are told, nothing is left behind."""

from __future__ import annotations

import dataclasses
import re

import msgspec
import numpy as np
import pytest
import trio
from fake_mesh import FakeMesh

from llmload.engine.generate import generate_tokens
from llmload.engine.kv_cache import cache_bytes
from llmload.engine.sampler import SamplingParameters
from llmload.errors import PromptTooLong, StageFailed
from llmload.swarm.client import SwarmTimeouts
from llmload.swarm.protocol import (
    SESSION_PROTOCOL,
    TOKENS_PROTOCOL,
    Hop,
    OpenSession,
    SessionFailed,
    SessionOpened,
    Step,
    Tokens,
    TokensOf,
    WireSampling,
    checksum,
    pack_token_ids,
)
from llmload.swarm.route import NoRoute, StageOffer
from llmload.swarm.stage import StageLimits
from natswarm import ConnectionLost, MessageStream

PROMPT = [5, 17, 3, 250, 17]
SAMPLED = SamplingParameters(temperature=0.9, top_k=50, top_p=0.95, seed=11)


# --- What must hold when all goes well ---------------------------------------------------------


@pytest.mark.parametrize("stage_count", [2, 3])
@pytest.mark.parametrize("sampling", [SamplingParameters(temperature=0), SAMPLED])
async def test_split_model_gives_the_tokens_of_the_whole(
    autojump_clock, pipeline, engines, config, stage_count, sampling
):
    whole = engines[config.blocks]
    expected = list(generate_tokens([whole], PROMPT, sampling=sampling, max_new_tokens=64))
    swarm = pipeline(stage_count)
    assert await swarm.tokens(PROMPT, sampling=sampling, max_new_tokens=64) == expected
    await swarm.check_nothing_is_left()
    # The prompt is one step, and the last token is not computed on.
    assert [stage.statistics.step_count for stage in swarm.stages] == [64] * stage_count
    assert [stage.statistics.position_count for stage in swarm.stages] == [68] * stage_count


async def test_activations_go_from_stage_to_stage(autojump_clock, pipeline):
    swarm = pipeline(3)
    await swarm.tokens(PROMPT, max_new_tokens=2)
    first, second, third = (stage.offer.peer_id for stage in swarm.stages)
    client = swarm.client._desk._node.peer_id
    nodes = swarm.mesh.nodes
    # The client asks all of them how they are; sessions go the shortest way.
    assert set(nodes[client].connected) == {first, second, third}
    assert nodes[first].connected == [second]
    assert nodes[second].connected == [third]
    assert nodes[third].connected == [client]


async def test_answer_ends_with_the_context(autojump_clock, pipeline, config):
    swarm = pipeline()
    prompt = [7] * (config.n_ctx - 3)
    assert len(await swarm.tokens(prompt)) == 3
    assert len(await swarm.tokens(prompt, max_new_tokens=2)) == 2


async def test_answer_ends_where_the_model_ends_the_document(
    autojump_clock, pipeline, engines, config, model
):
    expected = list(generate_tokens([engines[config.blocks]], PROMPT, max_new_tokens=10))
    swarm = pipeline()
    # The stages need not know the end token, only the client does.
    swarm.client._model = dataclasses.replace(
        model, config=dataclasses.replace(model.config, eos_token_id=expected[4])
    )
    async with swarm.client.generate(PROMPT) as answer:
        tokens = [token async for token in answer]
        assert [token.token_id for token in tokens] == expected[: expected.index(expected[4])]
        assert [token.position for token in tokens] == [5 + i for i in range(len(tokens))]
        assert answer.token_ids == (*PROMPT, *expected[: len(tokens)])
        assert answer.finish_reason == "stop"
        with pytest.raises(StopAsyncIteration):
            await anext(answer)


async def test_text_goes_in_and_comes_out(autojump_clock, pipeline, model):
    swarm = pipeline()
    async with swarm.client.generate("the mesh", max_new_tokens=20) as answer:
        pieces = [token.text async for token in answer]
        assert answer.prompt_ids == tuple(model.tokenizer.encode("the mesh"))
        assert answer.finish_reason == "length"
        assert len("".join(pieces)) > 0
        # A character that never gets complete is only in what is left at the end.
        assert "".join(pieces) + answer.finish() == answer.text
        assert answer.text == model.tokenizer.decode(answer.token_ids[len(answer.prompt_ids) :])


async def test_answer_ends_before_a_stop_string(autojump_clock, pipeline):
    swarm = pipeline()
    options = {"max_new_tokens": 20, "speculate": False}
    async with swarm.client.generate("the mesh", **options) as answer:
        tokens = [token async for token in answer]
        whole = answer.text + answer.finish()
    stop = whole[4:7]
    async with swarm.client.generate("the mesh", stop=["nowhere", stop], **options) as answer:
        pieces = [token.text async for token in answer]
        assert answer.finish_reason == "stop"
        assert answer.finish() == ""
        assert "".join(pieces) == answer.text == whole[: whole.index(stop)]
        # No trip more than it took to see it.
        assert answer.statistics().trip_count == len(pieces) < len(tokens)
        with pytest.raises(StopAsyncIteration):
            await anext(answer)
    with pytest.raises(ValueError, match="stop string is empty"):
        async with swarm.client.generate("the mesh", stop=[""]):
            pass
    await swarm.check_nothing_is_left()


async def test_empty_prompt_starts_a_document(autojump_clock, pipeline, config):
    async with pipeline().client.generate("", max_new_tokens=1) as answer:
        assert answer.prompt_ids == (config.bos_token_id,)
        assert (await anext(answer)).position == 1


async def test_statistics_add_up(autojump_clock, pipeline):
    generation = pipeline(3).client.generate(PROMPT, max_new_tokens=5, speculate=False)
    async with generation as answer:
        assert answer.statistics().token_count == 0
        assert answer.statistics().tokens_per_s == 0
        async for _ in answer:
            pass
        statistics = answer.statistics()
    assert (statistics.prompt_count, statistics.token_count) == (5, 5)
    assert len(statistics.stage_s) == 3
    assert statistics.first_token_s > 0
    assert statistics.tokens_per_s == pytest.approx(4 / statistics.decode_s)
    per_token_s = sum(statistics.stage_s) + statistics.network_s
    assert per_token_s == pytest.approx(statistics.decode_s / 4)
    assert statistics.network_s == pytest.approx(0, abs=1e-9)  # memory streams take no time


async def test_many_generations_at_once_do_not_mix(autojump_clock, pipeline, engines, config):
    prompts = [[1 + i, 2 + i, 30 + i] for i in range(6)]
    swarm = pipeline()
    answers = {}

    async def generate(index):
        answers[index] = await swarm.tokens(prompts[index], max_new_tokens=12)

    async with trio.open_nursery() as nursery:
        for index in range(len(prompts)):
            nursery.start_soon(generate, index)
    for index, prompt in enumerate(prompts):
        expected = list(generate_tokens([engines[config.blocks]], prompt, max_new_tokens=12))
        assert answers[index] == expected
    await swarm.check_nothing_is_left()


# --- Mistakes of the caller --------------------------------------------------------------------


async def test_prompt_that_fills_the_context_goes_nowhere(autojump_clock, pipeline, config):
    swarm = pipeline()
    with pytest.raises(PromptTooLong, match=f"{config.n_ctx} tokens"):
        await swarm.tokens([1] * config.n_ctx)
    assert swarm.mesh.send_count == 0


@pytest.mark.parametrize(
    ("prompt", "options"),
    [([300], {}), ([-1], {}), ([1], {"max_new_tokens": 0}), ([1], {"route": []})],
)
async def test_mistakes_are_value_errors(autojump_clock, pipeline, prompt, options):
    swarm = pipeline()
    with pytest.raises(ValueError, match=r"token ids|max_new_tokens|route"):
        await swarm.tokens(prompt, **options)
    assert swarm.mesh.send_count == 0


async def test_error_in_the_callers_block_comes_out_as_it_is(autojump_clock, pipeline):
    swarm = pipeline()

    async def fail() -> None:
        async with swarm.client.generate(PROMPT) as answer:
            await anext(answer)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await fail()
    await swarm.check_nothing_is_left()


# --- Refusals ----------------------------------------------------------------------------------


async def test_missing_blocks_are_named(autojump_clock, pipeline):
    swarm = pipeline(3)
    swarm.mesh.kill(swarm.mesh.nodes[swarm.stages[1].offer.peer_id])
    with pytest.raises(NoRoute, match="serves block 1 of this model's 0-2"):
        await swarm.tokens(PROMPT)


async def test_stage_of_another_model_refuses(autojump_clock, pipeline):
    swarm = pipeline()
    swarm.stages[1]._model_hash = "f" * 64
    with pytest.raises(StageFailed, match=r"blocks 1-2\): serves model ffffffffffffffff, not"):
        await swarm.tokens(PROMPT, route=swarm.route)
    await swarm.check_nothing_is_left()
    assert swarm.stages[1].statistics.refused_session_count == 1


async def test_stage_refuses_blocks_that_it_does_not_serve(autojump_clock, pipeline):
    swarm = pipeline(3)
    first, second, third = swarm.route
    wrong = dataclasses.replace(second, last=2)
    with pytest.raises(StageFailed, match="is not"):
        await swarm.tokens(PROMPT, route=[first, wrong])
    with pytest.raises(StageFailed, match="does not lead through the rest"):
        await swarm.tokens(PROMPT, route=[first, third])
    with pytest.raises(StageFailed, match="does not lead through the rest"):
        await swarm.tokens(PROMPT, route=[first, second])
    await swarm.check_nothing_is_left()


async def test_stage_takes_so_many_sessions_and_no_more(autojump_clock, pipeline):
    swarm = pipeline(limits=StageLimits(session_count_max=1))
    async with swarm.client.generate(PROMPT, route=swarm.route) as first:
        await anext(first)
        with pytest.raises(StageFailed, match=r"has 1 sessions already"):
            await swarm.tokens(PROMPT, route=swarm.route)
        await anext(first)
    await swarm.check_nothing_is_left()
    assert len(await swarm.tokens(PROMPT, max_new_tokens=3)) == 3


async def test_sequence_that_would_never_fit_is_refused_at_once(autojump_clock, pipeline, config):
    bytes_max = cache_bytes(config, range(1, 3), 1, 20)
    swarm = pipeline(limits=StageLimits(cache_bytes_max=bytes_max))
    with pytest.raises(StageFailed, match="not enough memory for 21 positions"):
        await swarm.tokens(PROMPT, max_new_tokens=16)
    assert len(await swarm.tokens(PROMPT, max_new_tokens=15)) == 15


async def test_idle_sequence_makes_room_and_is_told_so(autojump_clock, pipeline, config):
    bytes_max = cache_bytes(config, range(1, 3), 1, 20)
    swarm = pipeline(limits=StageLimits(cache_bytes_max=bytes_max))
    async with swarm.client.generate(PROMPT, max_new_tokens=15) as idle:
        await anext(idle)
        assert len(await swarm.tokens(PROMPT, max_new_tokens=15)) == 15
        with pytest.raises(StageFailed, match=r"blocks 1-2\): its memory .* had to make room"):
            await anext(idle)
        with pytest.raises(StopAsyncIteration):
            await anext(idle)
    await swarm.check_nothing_is_left()


async def test_idle_session_is_closed_after_a_while(autojump_clock, pipeline):
    swarm = pipeline(limits=StageLimits(idle_timeout_s=0.02))
    async with swarm.client.generate(PROMPT) as answer:
        await anext(answer)
        await swarm.mesh.wait_quiet()
        with pytest.raises(StageFailed, match=r"no step came for 0\.02 s"):
            await anext(answer)
    await swarm.check_nothing_is_left()


async def test_nobody_may_have_a_third_party_called(autojump_clock, pipeline):
    swarm = pipeline()
    victim = swarm.mesh.node("victim")
    request = open_session(swarm, client=victim.peer_id.key)
    peer = await swarm.client._desk._node.connect(swarm.route[0].peer_id)
    async with MessageStream(await peer.open_stream(SESSION_PROTOCOL)) as stream:
        refusal = await stream.call(request, SessionFailed)
        assert "by its client alone" in refusal.reason


# --- What comes over the wire ------------------------------------------------------------------


def open_session(swarm, **changes) -> OpenSession:
    request = OpenSession(
        session=b"s" * 16,
        model_hash=swarm.client._model.content_hash,
        route=tuple(offer.hop for offer in swarm.route),
        client=swarm.client._desk._node.peer_id.key,
        position_count=20,
        sampling=WireSampling(0.0, None, 1.0, 0),
        budget_s=5.0,
    )
    return msgspec.structs.replace(request, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_count": 97}, "context is 96"),
        ({"sampling": WireSampling(-1.0, None, 1.0, 0)}, "temperature"),
        ({"sampling": WireSampling(float("nan"), None, 1.0, 0)}, "temperature"),
        ({"sampling": WireSampling(1.0, 0, 1.0, 0)}, "top_k"),
        ({"route": (Hop(b"x" * 32, 5, 2),)}, "is not"),
    ],
)
async def test_request_that_can_not_be_served_is_refused(autojump_clock, pipeline, changes, reason):
    swarm = pipeline()
    peer = await swarm.client._desk._node.connect(swarm.route[0].peer_id)
    async with MessageStream(await peer.open_stream(SESSION_PROTOCOL)) as stream:
        refusal = await stream.call(open_session(swarm, **changes), SessionFailed)
        assert re.search(reason, refusal.reason)
    await swarm.check_nothing_is_left()


IDS = pack_token_ids(np.array(PROMPT))
NOTE = bytes(32)


def step(index, position, row_count, codec, stage_s=(), payload=IDS) -> Step:
    return Step(index, position, row_count, 1, codec, checksum(payload), stage_s)


@pytest.mark.parametrize(
    ("bad", "payload", "reason"),
    [
        (step(0, 0, 5, "int32"), IDS[:-1], "5 rows has 20 bytes, not 19"),
        (step(0, 0, 4, "int32"), IDS, "4 rows has 16 bytes, not 20"),
        (step(0, 0, 5, "float32"), IDS, "this stage takes int32"),
        (step(0, 1, 5, "int32"), IDS, "step at position 1 came, 0 are held"),
        (step(1, 0, 5, "int32"), IDS, "step 0 was due"),
        (step(0, 0, 5, "int32"), IDS[:-1] + b"!", "do not have its checksum"),
        (msgspec.structs.replace(step(0, 0, 5, "int32"), draw_count=6), IDS, "6 tokens were asked"),
        (step(0, 0, 1, "int32"), pack_token_ids(np.array([300])), "outside of 0..299"),
        (step(0, 0, 1, "int32"), pack_token_ids(np.array([-1])), "outside of 0..299"),
        (step(0, 0, 21, "int32"), pack_token_ids(np.arange(21)), "opened for 20"),
        (SessionOpened(), b"", "instead of a step"),
        (step(0, -1, 5, "int32"), IDS, "instead of a step"),
        (step(0, 0, 5, "int8"), IDS, "this stage takes int32"),
        (step(0, 0, 5, "int4"), IDS, "instead of a step"),
        (step(0, 0, 5, "int32", (float("nan"),)), IDS, "instead of a step"),
        (step(0, 0, 3073, "int32"), bytes(12292), "over the bounds"),
    ],
)
async def test_bad_step_ends_the_session_with_a_reason(
    autojump_clock, pipeline, bad, payload, reason
):
    swarm = pipeline()
    swarm.client._desk._node.serve(TOKENS_PROTOCOL, hold_open)
    peer = await swarm.client._desk._node.connect(swarm.route[0].peer_id)
    async with MessageStream(await peer.open_stream(SESSION_PROTOCOL)) as stream:
        await stream.call(open_session(swarm), SessionOpened)
        if isinstance(bad, Step) and "checksum" not in reason:
            bad = msgspec.structs.replace(bad, checksum=checksum(payload))
        await stream.send(bad, payload)
        failure, _ = await stream.receive(SessionFailed)
        assert reason in failure.reason
        assert failure.hop == swarm.route[0].hop
    await swarm.check_nothing_is_left()


async def hold_open(stream, peer):
    """Be a client that reads its tokens and says nothing."""
    async with stream:
        while await stream.receive_some():
            pass


async def test_repeated_step_is_dropped(autojump_clock, pipeline):
    swarm = pipeline()
    swarm.client._desk._node.serve(TOKENS_PROTOCOL, hold_open)
    peer = await swarm.client._desk._node.connect(swarm.route[0].peer_id)
    async with MessageStream(await peer.open_stream(SESSION_PROTOCOL)) as stream:
        await stream.call(open_session(swarm), SessionOpened)
        for _ in range(2):
            await stream.send(step(0, 0, 5, "int32"), IDS)
        await stream.send_eof()
    await swarm.check_nothing_is_left()
    assert [stage.statistics.step_count for stage in swarm.stages] == [1, 1]
    assert [stage.statistics.repeated_step_count for stage in swarm.stages] == [1, 0]


async def test_hidden_states_that_are_not_finite_are_refused(
    autojump_clock, pipeline, engines, monkeypatch
):
    swarm = pipeline()
    run_batch = engines[range(1)].run_batch

    def spoilt(steps):
        (hidden,) = run_batch(steps)
        hidden[-1, 3] = np.nan
        return [hidden]

    monkeypatch.setattr(engines[range(1)], "run_batch", spoilt)
    with pytest.raises(StageFailed, match=r"blocks 1-2\): .* NaN or infinite"):
        await swarm.tokens(PROMPT)
    await swarm.check_nothing_is_left()


async def test_engine_that_fails_names_its_stage(autojump_clock, pipeline, engines, monkeypatch):
    swarm = pipeline(3)

    def out_of_memory(steps):
        raise StageFailed("out of memory")

    monkeypatch.setattr(engines[range(1, 2)], "run_batch", out_of_memory)
    with pytest.raises(StageFailed, match=r"blocks 1-1\): out of memory"):
        await swarm.tokens(PROMPT)
    await swarm.check_nothing_is_left()


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (Tokens(0, (300,), (0.1,), (NOTE,)), "which the model does not have"),
        (Tokens(1, (3,), (0.1,), (NOTE,)), "answered step 1"),
        (Tokens(0, (3, 4), (0.1,), (NOTE,)), "drew 2 tokens instead of 1"),
        (Tokens(0, (), (0.1,), (NOTE,)), "drew 0 tokens instead of 1"),
        (Tokens(0, (3,), (), (NOTE,)), "0 stages instead of 1"),
        (Tokens(0, (3,), (0.1,), (b"",)), "something else than tokens"),
        (Tokens(0, (-3,), (0.1,), (NOTE,)), "something else than tokens"),
        (TokensOf(b"s" * 16), "something else than tokens"),
        (
            SessionFailed(Hop(b"x" * 32, 9, 2), "\x1b[2J fire"),
            r"blocks 0-2\): blames .*blocks 9-2\):  \[2J fire",
        ),
        (None, "closed the stream of tokens"),
    ],
)
async def test_lying_stage_is_named_and_left(nursery, autojump_clock, pipeline, token, reason):
    swarm = pipeline()
    liar = swarm.mesh.node("liar")

    async def lie(stream, peer):
        async with MessageStream(stream) as upstream:
            request, _ = await upstream.receive(OpenSession)
            client = await liar.connect(peer.peer_id)
            async with MessageStream(await client.open_stream(TOKENS_PROTOCOL)) as tokens:
                await tokens.send(TokensOf(request.session))
                await upstream.send(SessionOpened())
                await upstream.receive(Step)
                if token is None:
                    await tokens.aclose()
                else:
                    await tokens.send(token)
                with pytest.raises((trio.EndOfChannel, trio.BrokenResourceError)):
                    await upstream.receive(Step)

    liar.serve(SESSION_PROTOCOL, lie)
    expected = await swarm.tokens(PROMPT, max_new_tokens=3)
    told = []
    route = [StageOffer(0, 2, liar.peer_id)]
    assert await swarm.tokens(PROMPT, max_new_tokens=3, route=route, tell=told.append) == expected
    assert any(re.search(reason, text) for text in told), told
    await swarm.check_nothing_is_left()


async def test_tokens_from_anybody_else_are_not_taken(autojump_clock, pipeline):
    swarm = pipeline()
    stranger = swarm.mesh.node("stranger")
    async with swarm.client.generate(PROMPT, max_new_tokens=3) as answer:
        (session,) = swarm.client._desk._inboxes
        client = await stranger.connect(swarm.client._desk._node.peer_id)
        async with MessageStream(await client.open_stream(TOKENS_PROTOCOL)) as forged:
            await forged.send(TokensOf(session))
            with pytest.raises(trio.EndOfChannel):  # closed on us
                await forged.receive(Tokens)
        assert len([token async for token in answer]) == 3


# --- Lost connections, lost peers, lost patience -----------------------------------------------


async def send_count(pipeline, stage_count: int) -> int:
    swarm = pipeline(stage_count)
    await swarm.tokens(PROMPT, max_new_tokens=3)
    await swarm.check_nothing_is_left()
    return swarm.mesh.send_count


@pytest.mark.parametrize(("stage_count", "cut_bytes"), [(2, 3), (3, 0)])
async def test_stream_cut_anywhere_is_told_and_leaves_nothing(
    autojump_clock, pipeline, stage_count, cut_bytes
):
    """At every message boundary, between header and payload, and inside of both."""
    sends = await send_count(pipeline, stage_count)
    assert sends > 6 * stage_count
    for send in range(sends):
        swarm = pipeline(stage_count)
        swarm.mesh.cut_at_send, swarm.mesh.cut_bytes = send, cut_bytes
        try:
            # What was cut may have been a question how a stage is.
            assert len(await swarm.tokens(PROMPT, max_new_tokens=3)) == 3
        except StageFailed as failure:
            assert re.search("lost|closed|damaged|reach", str(failure))  # noqa: PT017 - not always
        await swarm.check_nothing_is_left()


async def test_stream_cut_inside_of_an_activation(autojump_clock, pipeline, config):
    swarm = pipeline()
    swarm.mesh.cut_in_send_over = 5 * config.n_embd * 4
    swarm.mesh.cut_bytes = 5 * config.n_embd * 4 - 1
    with pytest.raises(StageFailed, match=r"lost"):
        await swarm.tokens(PROMPT, max_new_tokens=3)
    assert [stage.statistics.step_count for stage in swarm.stages] == [1, 0]
    await swarm.check_nothing_is_left()


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_stage_that_dies_is_named(autojump_clock, pipeline, victim):
    swarm = pipeline(3)
    async with swarm.client.generate(PROMPT) as answer:
        await anext(answer)
        swarm.mesh.kill(swarm.mesh.nodes[swarm.stages[victim].offer.peer_id])
        with pytest.raises(StageFailed, match=rf"blocks {victim}-{victim}\): .*lost"):
            await anext(answer)
    await swarm.check_nothing_is_left()


async def test_stage_that_is_gone_is_named(autojump_clock, pipeline):
    swarm = pipeline(3)
    route = swarm.route
    swarm.mesh.kill(swarm.mesh.nodes[route[2].peer_id])
    with pytest.raises(StageFailed, match=r"blocks 2-2\): can't be reached"):
        await swarm.tokens(PROMPT, route=route)
    swarm.mesh.kill(swarm.mesh.nodes[route[0].peer_id])
    with pytest.raises(StageFailed, match=r"blocks 0-0\): can't be reached"):
        await swarm.tokens(PROMPT, route=route)
    await swarm.check_nothing_is_left()


async def test_stage_that_never_answers_is_named(autojump_clock, pipeline):
    swarm = pipeline(3, timeouts=SwarmTimeouts(open_s=1, step_s=5, replica_s=0))
    swarm.mesh.nodes[swarm.route[2].peer_id].serve(SESSION_PROTOCOL, hold_open)
    with pytest.raises(StageFailed, match=r"blocks 2-2\): did not answer in 0\.\d s"):
        await swarm.tokens(PROMPT, route=swarm.route)
    await swarm.check_nothing_is_left()


async def test_first_stage_that_never_answers_is_named(autojump_clock, pipeline):
    swarm = pipeline(timeouts=SwarmTimeouts(open_s=0.05, step_s=5, replica_s=0))
    swarm.mesh.nodes[swarm.route[0].peer_id].serve(SESSION_PROTOCOL, hold_open)
    with pytest.raises(StageFailed, match=r"blocks 0-0\): did not open a session in 0\.05 s"):
        await swarm.tokens(PROMPT, route=swarm.route)
    await swarm.check_nothing_is_left()


async def test_token_that_never_comes_is_a_clear_error(autojump_clock, pipeline, monkeypatch):
    swarm = pipeline(timeouts=SwarmTimeouts(open_s=5, step_s=0.1, replica_s=0))

    async def stall(*_):
        await trio.sleep(10)
        raise StageFailed("far too late")

    monkeypatch.setattr(swarm.stages[1]._shop, "compute", stall)
    with pytest.raises(StageFailed, match=r"no token came in 0\.1 s by way of .* -> .*blocks 1-2"):
        await swarm.tokens(PROMPT)
    await swarm.check_nothing_is_left()


async def test_cancelled_client_frees_all_stages(autojump_clock, pipeline):
    swarm = pipeline(3)
    with trio.CancelScope() as scope:
        async with swarm.client.generate(PROMPT) as answer:
            await anext(answer)
            assert all(stage.cache_bytes for stage in swarm.stages)
            scope.cancel()
            await anext(answer)
    assert scope.cancelled_caught
    await swarm.check_nothing_is_left()


async def test_cancelled_while_opening_frees_all_stages(autojump_clock, pipeline):
    swarm = pipeline(3)
    waiting = trio.Event()

    async def stall(stream, peer):
        waiting.set()
        await hold_open(stream, peer)

    swarm.mesh.nodes[swarm.route[2].peer_id].serve(SESSION_PROTOCOL, stall)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(swarm.tokens, PROMPT)
        await waiting.wait()
        nursery.cancel_scope.cancel()
    # The stages before are still waiting for the one that stalls. Their budget would end it.
    swarm.mesh.kill(swarm.mesh.nodes[swarm.route[2].peer_id])
    await swarm.check_nothing_is_left()


async def test_stage_that_is_cancelled_while_computing_frees_its_cache(
    nursery, engines, model, autojump_clock, pipeline
):
    swarm = pipeline()
    stage = swarm.stages[0]
    async with trio.open_nursery() as inner:
        swarm.mesh.nursery = inner
        async with swarm.client.generate(PROMPT) as answer:
            await anext(answer)
            inner.cancel_scope.cancel()
    await swarm.check_nothing_is_left()
    assert stage.session_count == 0


async def test_connection_lost_while_connecting_is_a_stage_failure(
    autojump_clock, pipeline, monkeypatch
):
    swarm = pipeline()

    async def lost(self, peer_id):
        raise ConnectionLost("the path is gone")

    monkeypatch.setattr(type(swarm.mesh.nodes[swarm.route[0].peer_id]), "connect", lost)
    with pytest.raises(StageFailed, match=r"can't be reached: the path is gone"):
        await swarm.tokens(PROMPT)


def test_fake_mesh_is_a_mesh():
    """The fake has the methods of the real node that are used here."""
    from natswarm import Node, Peer

    for name in ("serve", "connect", "find_peers", "announce", "peers", "lookup", "publish"):
        assert hasattr(Node, name)
    for name in ("open_stream", "is_reachable", "statistics"):
        assert hasattr(Peer, name)
    assert FakeMesh
