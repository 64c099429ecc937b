"""Models fetched by newcomers: only what was named, from whoever has it, whatever others do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import trio

from llmload.learn import joining
from llmload.learn.codecs import Codec
from llmload.learn.joining import StateFetch, StateServer
from llmload.learn.protocol import DIGEST_BYTES, MANIFEST, STATE, FetchManifest, FetchShards
from llmload.learn.shards import ParameterSpace, ShardLayout, decode_shard_untrusted, encode_shard
from natswarm import RequestRefused

sys.path.append(str(Path(__file__).parent))
from fake_mesh import FakeMesh

LAYOUT = ShardLayout(ParameterSpace.of({"w": (95,)}), shard_value_count=10)
TIMEOUT_S = 30


@pytest.fixture
def mesh(nursery):
    return FakeMesh(nursery)


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch):
    monkeypatch.setattr(joining, "SHARDS_PER_FETCH", 2)


def model(seed):
    """Return numbers that float16 holds exactly."""
    return np.random.default_rng(seed).integers(-9, 10, LAYOUT.space.size).astype(np.float32)


class Source:
    """A node that serves a model, and counts the shards that it is asked for."""

    def __init__(self, mesh, name, values, version=1):
        self.node, self.values, self.version = mesh.node(name), values, version
        self.server = StateServer(LAYOUT, lambda: (self.values, self.version))
        self.server.start(self.node)
        self.asked = []
        serve = self.server._serve_shards

        async def counting(call):
            await self.before_serving(call)
            receive = call.receive

            async def receive_and_count():
                message = await receive()
                self.asked += [shard for shard, _ in message[0].wanted]
                return message

            call.receive = receive_and_count
            await serve(call)

        self.node.serve_calls(STATE, counting)

    async def before_serving(self, call):
        await trio.lowlevel.checkpoint()

    def serve_instead(self, send):
        """Answer for shards with what `send(call, request)` sends."""

        async def serve(call):
            request, _ = await call.receive()
            self.asked += [shard for shard, _ in request.wanted]
            await send(call, request)

        self.node.serve_calls(STATE, serve)


def fetch_from(mesh, *sources):
    return StateFetch(mesh.node("new"), LAYOUT, [source.node.peer_id for source in sources])


async def next_model(fetch):
    with trio.fail_after(TIMEOUT_S):
        found = await fetch.next_model()
    return None if found is None else found.copy()


async def test_a_model_is_that_of_one_learner_whole(mesh):
    sources = [Source(mesh, name, model(i), version=i) for i, name in enumerate("abc")]
    fetch = fetch_from(mesh, *sources)
    # What has learned for longest comes first.
    for source in reversed(sources):
        assert np.array_equal(await next_model(fetch), source.values)
    assert await next_model(fetch) is None


async def test_equal_shards_come_from_everybody_who_has_them(mesh):
    a, b = Source(mesh, "a", model(1)), Source(mesh, "b", model(1))
    c = Source(mesh, "c", model(1), version=2)
    c.values[:50] = 0.0  # shards 0..4 are others
    found = await next_model(fetch_from(mesh, a, b, c))
    assert np.array_equal(found, model(1))  # two have all of it
    assert sorted(a.asked + b.asked + c.asked) == list(range(10))
    assert a.asked
    assert b.asked
    assert set(c.asked) <= set(range(5, 10))


async def test_who_sends_other_bytes_than_were_named_is_left_out(mesh):
    honest, liar = Source(mesh, "a", model(1)), Source(mesh, "b", model(1))
    other = encode_shard(LAYOUT, 0, np.ones(10, dtype=np.float32), codec=Codec.FP16, version=1)

    async def lie(call, request):
        await call.send(other.header, other.payload)

    liar.serve_instead(lie)
    fetch = fetch_from(mesh, honest, liar)
    assert np.array_equal(await next_model(fetch), model(1))
    assert len(liar.asked) <= 2
    assert fetch._manifests.keys() == {honest.node.peer_id}


async def test_an_exponent_that_was_changed_is_noticed(mesh):
    honest, liar = Source(mesh, "a", model(1)), Source(mesh, "b", model(1))

    async def lie(call, request):
        for shard, _ in request.wanted:
            bounds = LAYOUT.bounds(shard)
            twice = encode_shard(
                LAYOUT, shard, 2 * model(1)[bounds], codec=Codec.FP16, version=1
            )  # the same payload
            await call.send(twice.header, twice.payload)

    liar.serve_instead(lie)
    assert np.array_equal(await next_model(fetch_from(mesh, honest, liar)), model(1))


@pytest.mark.parametrize("sent_count", [0, 1])
async def test_what_came_counts_when_a_source_goes_away(mesh, sent_count):
    """Of half a model the other half comes from elsewhere, and nothing comes twice."""
    first = Source(mesh, "a", model(1), version=9)
    second = Source(mesh, "b", model(1))
    second.values[-5:] = 7.0  # the last shard is another

    async def send_some_and_vanish(call, request):
        for shard, _ in request.wanted[:sent_count]:
            ours = encode_shard(
                LAYOUT, shard, model(1)[LAYOUT.bounds(shard)], codec=Codec.FP16, version=9
            )
            await call.send(ours.header, ours.payload)

    first.serve_instead(send_some_and_vanish)
    found = await next_model(fetch_from(mesh, first, second))
    if sent_count:
        # Each call brings one shard, at last the one that nobody else has.
        assert np.array_equal(found, model(1))
    else:
        # Its last shard never came; the model of the other needs one shard more.
        assert np.array_equal(found, second.values)
        assert sorted(second.asked) == list(range(10))


async def test_those_that_fail_in_any_way_are_passed_over(mesh):
    good = Source(mesh, "a", model(1))
    refusing, short = mesh.node("refusing"), mesh.node("short")

    async def name_too_few(call):
        await call.receive()
        await call.send(joining.Manifest(5), bytes(DIGEST_BYTES))

    short.serve_calls(MANIFEST, name_too_few)
    silent = mesh.node("silent")

    async def end_at_once(call):
        await call.receive()

    silent.serve_calls(MANIFEST, end_at_once)
    gone = mesh.node("gone")
    mesh.kill(gone)
    others = [node.peer_id for node in (refusing, short, silent, gone)]
    fetch = StateFetch(mesh.node("new"), LAYOUT, [*others, good.node.peer_id])
    assert np.array_equal(await next_model(fetch), model(1))
    assert await next_model(StateFetch(mesh.node("newer"), LAYOUT, others)) is None


async def test_tries_are_bounded(mesh, monkeypatch):
    monkeypatch.setattr(joining, "TRIES_MAX", 2)
    fetch = fetch_from(mesh, *(Source(mesh, name, model(i)) for i, name in enumerate("abc")))
    found = [await next_model(fetch) for _ in range(3)]
    assert [each is None for each in found] == [False, False, True]


# --- Serving -------------------------------------------------------------------------------------


async def ask(asker, source, method, request):
    peer = await asker.connect(source.node.peer_id)
    async with peer.start_call(method, request) as call:
        return [message async for message in call]


async def digests_of(asker, source):
    ((_, payload),) = await ask(asker, source, MANIFEST, FetchManifest(LAYOUT.hash))
    return payload


async def test_a_snapshot_stays_as_it_is_while_it_is_fetched_and_then_goes(mesh, autojump_clock):
    source, asker = Source(mesh, "a", model(1)), mesh.node("b")
    first = await digests_of(asker, source)
    source.values = model(2)  # training goes on
    for _ in range(3):
        await trio.sleep(joining.SNAPSHOT_FRESH_S / 2)
        source.server.let_go()
        request = FetchShards(LAYOUT.hash, ((3, first[3 * DIGEST_BYTES : 4 * DIGEST_BYTES]),))
        ((header, payload),) = await ask(asker, source, STATE, request)
        values = decode_shard_untrusted(LAYOUT, header, payload)
        assert np.array_equal(values, model(1)[LAYOUT.bounds(3)])
        assert await digests_of(asker, source) == first
    await trio.sleep(joining.SNAPSHOT_IDLE_S + 1)
    source.server.let_go()
    with pytest.raises(RequestRefused, match="no longer"):
        await ask(asker, source, STATE, request)
    assert await digests_of(asker, source) != first


async def test_a_snapshot_does_not_grow_old_however_often_it_is_asked_for(mesh, autojump_clock):
    source, asker = Source(mesh, "a", model(1)), mesh.node("b")
    first = await digests_of(asker, source)
    source.values = model(2)
    pause_s = joining.SNAPSHOT_IDLE_S / 2
    for _ in range(int(joining.SNAPSHOT_AGE_MAX_S / pause_s)):
        await trio.sleep(pause_s)
        assert await digests_of(asker, source) == first
    await trio.sleep(pause_s)
    assert await digests_of(asker, source) != first


@pytest.mark.parametrize("wanted", [((3, bytes(DIGEST_BYTES)),), ((99, bytes(DIGEST_BYTES)),)])
async def test_what_was_not_named_is_refused(mesh, wanted):
    source, asker = Source(mesh, "a", model(1)), mesh.node("b")
    await digests_of(asker, source)
    with pytest.raises(RequestRefused, match="no longer"):
        await ask(asker, source, STATE, FetchShards(LAYOUT.hash, wanted))
    other = bytes(len(LAYOUT.hash))
    for method, request in ((STATE, FetchShards(other, wanted)), (MANIFEST, FetchManifest(other))):
        with pytest.raises(RequestRefused, match="another shape"):
            await ask(asker, source, method, request)
