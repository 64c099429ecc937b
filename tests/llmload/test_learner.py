"""Learners on a mesh: they get better by each other's text, and nobody can hold them back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import trio
from msgspec import structs

from llmload.adapter import AdapterSettings, fresh_adapter
from llmload.config import GPT2Config
from llmload.errors import LearningFailed
from llmload.learn import averaging, exchange
from llmload.learn.averaging import AVERAGE_CODEC
from llmload.learn.exchange import Learner
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.outer import OuterSettings
from llmload.learn.protocol import UPDATE, UpdateTaken
from llmload.learn.shards import ParameterSpace, ShardLayout, encode_shard
from llmload.learn.trainer import Trainer, batches
from natswarm import ConnectFailed, Method, PeerId, RequestRefused
from natswarm.net.call import CallBegin
from natswarm.net.message_stream import MessageStream

sys.path.append(str(Path(__file__).parent))
from fake_mesh import FakeMesh

CONFIG = GPT2Config(vocab_size=40, n_ctx=16, n_embd=16, n_layer=1, n_head=2)
MODEL = "0123456789abcdef" * 4
SETTINGS = OuterSettings(local_steps=2, density=0.5)
TIMEOUT_S = 30


def text(seed: int):
    """A text that is easy to learn, ten tokens again and again; those of others are others."""
    tokens = np.tile(np.arange(10 * seed, 10 * seed + 10), 40)
    return batches(tokens, batch=4, time=8, rng=np.random.default_rng(seed))


@pytest.fixture
def mesh(nursery):
    return FakeMesh(nursery)


@pytest.fixture
async def make_learner(mesh, trained_looking_weights):
    """A function that puts a learner on a node of its own, announced and answering."""

    async def make(name, own_text=1, *, own_batches=None, adapter=None, **options) -> Learner:
        trainer = Trainer(
            CONFIG,
            trained_looking_weights(CONFIG, 1),
            adapter=None if adapter is None else fresh_adapter(CONFIG, adapter),
            optimizer=AdamWSettings(learning_rate=3e-3),
        )
        options = {"settings": SETTINGS} | options
        node = mesh.node(name)
        learner = Learner(node, trainer, own_batches or text(own_text), MODEL, **options)
        learner.start()
        await node.announce([learner.service])
        learner.trainer, learner.node = trainer, node  # for the tests
        return learner

    return make


async def run_all(*learners, step_count):
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            for learner in learners:
                nursery.start_soon(learner.run, step_count)


async def average_all(a, b):
    """Average the whole models of two that do not train."""
    round_number, parts = a.round_number, range(a.part_count)
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            for ours, theirs in ((a, b), (b, a)):
                peer = await ours.node.connect(theirs.node.peer_id)
                nursery.start_soon(ours.average, [peer], round_number, parts)


def loss_on(learner, seed):
    return learner.trainer.loss(*next(text(seed)))


# --- Together ------------------------------------------------------------------------------------


async def test_learners_that_are_no_neighbours_find_each_other_by_routing(mesh, make_learner):
    mesh.published = {}
    a, b = await make_learner("a", 1), await make_learner("b", 2)
    await run_all(a, step_count=2)  # nobody is there
    assert mesh.published == {a.service: [a.node.peer_id]}
    await run_all(b, step_count=2)
    assert b.node.connected == [a.node.peer_id]


async def test_updates_go_both_ways_and_the_replies_say_what_became_of_them(make_learner):
    a, b = await make_learner("a", 1), await make_learner("b", 2)
    await run_all(a, b, step_count=40)
    for ours, theirs in ((a, b), (b, a)):
        report = ours.reports[theirs.node.peer_id]
        assert report.confirmed > 0
        assert report.sent_bytes > 0 < report.received_bytes
        assert 0 <= report.taken_weight <= 1  # of the latest, which may have been overtaken
        assert ours.outer.statistics.weight > 0
        assert ours.outer.statistics.taken > 0
        assert ours.outer.crowd > 1
        assert ours.step_count == 40
        assert ours.loss is not None


async def test_a_run_ends_when_its_last_update_is_with_the_others(make_learner):
    a, b = await make_learner("a", 1), await make_learner("b", 2)
    a.meet(await a.node.connect(b.node.peer_id))
    for updates in (1, 2, 3):
        await run_all(a, step_count=SETTINGS.local_steps)
        assert a.reports[b.node.peer_id].confirmed == updates
        assert b.outer.statistics.taken == updates * b.outer.layout.shard_count


async def test_settling_takes_what_came_after_the_last_step(make_learner):
    a, b = await make_learner("a", 1), await make_learner("b", 2)
    b.meet(await b.node.connect(a.node.peer_id))
    await run_all(b, step_count=SETTINGS.local_steps)
    # B's step waits for A, of which nothing came yet; A's can be made once both are heard.
    await run_all(a, step_count=SETTINGS.local_steps)
    assert not np.array_equal(a.trainer.parameters, b.trainer.parameters)
    for each in (a, b):
        await each.settle()
    assert a.trainer.parameters.tobytes() == b.trainer.parameters.tobytes()
    assert a.trainer.parameters.tobytes() == a.outer.anchor.tobytes()


async def test_updates_reach_those_whom_their_sender_cannot(mesh, make_learner):
    a, b, c = [await make_learner(name, index) for index, name in enumerate("abc", 1)]

    async def connect(peer_id, reach=a.node.connect):
        if peer_id == c.node.peer_id:
            raise ConnectFailed("both sit behind NATs that nobody gets through")
        return await reach(peer_id)

    a.node.connect = connect
    c.node.connect = lambda peer_id, reach=c.node.connect: (
        connect(c.node.peer_id) if peer_id == a.node.peer_id else reach(peer_id)
    )
    await run_all(a, b, c, step_count=40)
    assert set(a.partners) <= {b.node.peer_id}
    for ours, theirs in ((a, c), (c, a)):
        assert ours.outer.seen(theirs.node.peer_id) > 0, "passed on by the one in the middle"
    # Its own counts no more than once, since all are heard.
    assert a._count_unheard() == c._count_unheard() == 0


async def test_what_is_passed_on_of_those_whom_we_hear_ourselves_is_left_out(make_learner):
    a, b, c = [await make_learner(name) for name in "abc"]
    b.meet(await b.node.connect(c.node.peer_id))
    peer = await a.node.connect(b.node.peer_id)
    layout = a.outer.layout
    values = np.ones(layout.value_count(0), dtype=np.float32)
    shard = encode_shard(layout, 0, values, codec=AVERAGE_CODEC, version=1)
    stranger = PeerId(bytes(32))
    for origin, weight in ((a, 0), (b, 0), (c, 0), (None, 1)):
        key = (stranger if origin is None else origin.node.peer_id).key
        header = structs.replace(shard.header, origin=key)
        async with peer.start_call(UPDATE, header, shard.payload) as call:
            await call.end()
            taken, _ = await call.receive()
        # The sender itself is a partner by now, whom we hear directly.
        assert taken.weight == weight
    assert b.outer.statistics.taken == 1


async def test_whoever_speaks_for_others_cannot_silence_them(make_learner):
    a, b, c = [await make_learner(name, index) for index, name in enumerate("abc", 1)]
    peer = await a.node.connect(b.node.peer_id)
    layout = a.outer.layout
    values = np.ones(layout.value_count(0), dtype=np.float32)
    shard = encode_shard(layout, 0, values, codec=AVERAGE_CODEC, version=2**61)
    header = structs.replace(shard.header, origin=c.node.peer_id.key)
    async with peer.start_call(UPDATE, header, shard.payload) as call:
        await call.end()
        await call.receive()
    c.meet(await c.node.connect(b.node.peer_id))
    await run_all(c, step_count=SETTINGS.local_steps)
    assert c.reports[b.node.peer_id].taken_weight == 1
    assert b.outer.statistics.repeated == 0


async def test_learners_of_adapters_teach_each_other(make_learner):
    settings = AdapterSettings(rank=4)
    a = await make_learner("a", 1, adapter=settings, parts=2)
    b = await make_learner("b", 2, adapter=settings, parts=2)
    before = loss_on(a, 2), loss_on(b, 1)
    for _ in range(10):  # threads decide who is ahead, and so how much each hears of the other
        await run_all(a, b, step_count=30)
        if loss_on(a, 2) < 0.97 * before[0] and loss_on(b, 1) < 0.97 * before[1]:
            break
    assert loss_on(a, 2) < 0.97 * before[0]
    assert loss_on(b, 1) < 0.97 * before[1]
    assert a.outer.statistics.taken > 0 < b.outer.statistics.taken


async def test_alone_it_trains(make_learner):
    learner = await make_learner("a")
    before = loss_on(learner, 1)
    await run_all(learner, step_count=30)
    assert loss_on(learner, 1) < 0.8 * before
    assert learner.partners == []


async def test_who_is_lost_is_no_partner(make_learner):
    a, b = await make_learner("a"), await make_learner("b")
    peer = await a.node.connect(b.node.peer_id)
    a.meet(peer)
    assert a.partners == [peer.peer_id]
    peer.is_lost = True
    assert a.partners == []


async def test_averaging_all_gives_both_the_same_bits(make_learner):
    a, b = await make_learner("a", 1), await make_learner("b", 2)
    await run_all(a, step_count=4)
    await run_all(b, step_count=4)
    assert not np.array_equal(a.trainer.parameters, b.trainer.parameters)
    for each in (a, b):
        await each.settle()  # what they sent each other
    ours, theirs = (each.trainer.parameters.copy() for each in (a, b))
    await average_all(a, b)
    assert a.trainer.parameters.tobytes() == b.trainer.parameters.tobytes()
    # And they are those of averaging in one process, but for the rounding of the way.
    assert np.allclose(a.trainer.parameters, (ours + theirs) / 2, atol=2**-10)


async def test_groups_average_by_the_clock(make_learner, monkeypatch):
    monkeypatch.setattr(exchange, "AVERAGE_EVERY_S", 0.05)
    monkeypatch.setattr(averaging, "WINDOW_S", 0.05)
    a, b = await make_learner("a", 1), await make_learner("b", 2)
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            for learner in (a, b):
                nursery.start_soon(learner.run)
            # Nothing tells of it; it takes a few steps.
            while not (a.outer.statistics.averaged and b.outer.statistics.averaged):  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


# --- Those who hold back nobody ------------------------------------------------------------------


async def test_a_peer_that_never_answers_costs_the_others_nothing(mesh, make_learner, monkeypatch):
    monkeypatch.setattr(exchange, "LAST_UPDATE_S", 0.1)
    a, b = await make_learner("a", 1), await make_learner("b", 2)
    silent = mesh.node("silent")
    await silent.announce([a.service])

    async def never_answer(_stream, _peer):
        await trio.sleep_forever()

    silent.serve(UPDATE.name, never_answer)
    await run_all(a, b, step_count=40)
    assert a.step_count == b.step_count == 40
    assert a.reports[b.node.peer_id].confirmed > 0
    assert a.reports[silent.peer_id].confirmed == 0


async def test_a_peer_that_ends_calls_without_an_answer_stops_nobody(mesh, make_learner):
    a, b = await make_learner("a", 1), await make_learner("b", 2)
    mute = mesh.node("mute")
    await mute.announce([a.service])

    async def end(call):
        await call.receive()

    mute.serve_calls(UPDATE, end)
    await run_all(a, b, step_count=10)
    assert a.step_count == b.step_count == 10
    assert a.reports[mute.peer_id].failures > 0


async def test_an_update_without_shards_is_refused_and_not_passed_on(make_learner):
    a, b, c = [await make_learner(name) for name in "abc"]
    for other in (a, c):
        b.meet(await b.node.connect(other.node.peer_id))
        b._acquaintances.tell(other.node.peer_id, [b.node.peer_id.key])
    assert b._acquaintances.targets(a.node.peer_id) == [c.node.peer_id]
    peer = await a.node.connect(b.node.peer_id)
    async with await peer.open_stream(UPDATE.name) as stream:
        messages = MessageStream(stream)
        await messages.send(CallBegin())
        await messages.send_eof()
        with pytest.raises(RequestRefused, match="has shards"):
            await messages.receive(UpdateTaken)
    assert not b._partners[c.node.peer_id].waiting


async def test_no_shard_is_longer_than_one_of_an_update(make_learner):
    a, b = await make_learner("a"), await make_learner("b")
    peer = await a.node.connect(b.node.peer_id)
    layout = a.outer.layout
    values = np.ones(layout.value_count(0), dtype=np.float32)
    shard = encode_shard(layout, 0, values, codec=AVERAGE_CODEC, version=1)
    unbounded = Method(UPDATE.name, UPDATE.requests, UPDATE.replies, payload_bytes_max=2**24)
    async with peer.start_call(unbounded, shard.header, bytes(2**18)) as call:
        with pytest.raises(RequestRefused, match="over the bounds"):
            await call.receive()


async def test_who_begins_anew_is_not_taken_for_a_repetition(make_learner):
    a = await make_learner("a", 1)
    for life in (1, 2):
        b = await make_learner("b", 2)
        b.meet(await b.node.connect(a.node.peer_id))
        for _ in range(2):
            await run_all(b, step_count=SETTINGS.local_steps)
        assert a.outer.statistics.taken == life * 2 * a.outer.layout.shard_count
    assert a.outer.statistics.repeated == 0


async def test_a_peer_that_vanishes_in_the_middle_is_left_behind(mesh, make_learner):
    a, b = await make_learner("a", 1), await make_learner("b", 2)

    def until_ten():
        """Its text: the tenth batch is the last thing that it does."""
        for index, batch in enumerate(text(3)):
            if index == 10:
                mesh.kill(gone.node)
            yield batch

    gone = await make_learner("gone", 3, own_batches=until_ten())
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gone.run, 12)
            nursery.start_soon(a.run, 40)
            nursery.start_soon(b.run, 40)
    assert a.step_count == b.step_count == 40
    assert a.reports[b.node.peer_id].confirmed > 0


async def test_shards_of_another_model_are_refused(make_learner):
    a, b = await make_learner("a"), await make_learner("b")
    peer = await a.node.connect(b.node.peer_id)
    other = ShardLayout(ParameterSpace.of({"w": (10,)}))
    shard = encode_shard(other, 0, np.ones(10, dtype=np.float32), codec=AVERAGE_CODEC, version=1)

    async def ask(method, request, payload=b""):
        async with peer.start_call(method, request, payload) as call:
            await call.end()
            await call.receive()

    with pytest.raises(RequestRefused, match="another shape"):
        await ask(UPDATE, shard.header, shard.payload)
    beyond = structs.replace(shard.header, layout=b.outer.layout.hash, shard=99)
    with pytest.raises(RequestRefused, match=r"has \d+ shards"):
        await ask(UPDATE, beyond, shard.payload)


async def test_nan_in_training_is_an_error_with_advice(make_learner):
    learner = await make_learner("a")
    learner.trainer.parameters[:] = np.nan
    with pytest.raises(LearningFailed, match="learning rate"):
        await learner.run(3)


# --- Joining -------------------------------------------------------------------------------------


async def test_a_newcomer_takes_the_model_over_if_it_is_better(make_learner):
    a, b = await make_learner("a", 1), await make_learner("b", 1)
    await run_all(a, b, step_count=40)
    await average_all(a, b)
    newcomer = await make_learner("new", 1)
    assert await newcomer.join() == newcomer.outer.layout.shard_count
    assert np.allclose(newcomer.trainer.parameters, a.outer.anchor, atol=2**-10)
    # Those who are worse than it is already are not copied.
    await run_all(newcomer, step_count=20)
    kept = newcomer.trainer.parameters.copy()
    for each in (a, b):
        each.trainer.parameters[:] = 0
        each.outer.restart()
    assert await newcomer.join() == 0
    assert np.array_equal(newcomer.trainer.parameters, kept)


async def test_a_model_that_is_worse_is_not_taken_and_the_next_one_is(mesh, make_learner):
    learned = await make_learner("a", 1)
    await run_all(learned, step_count=40)
    liar = await make_learner("b", 1)
    liar.trainer.parameters[:] *= -3
    liar.outer.restart()
    liar.step_count = 1_000_000  # so it is tried first
    newcomer = await make_learner("new", 1)
    assert await newcomer.join() == newcomer.outer.layout.shard_count
    assert np.allclose(newcomer.trainer.parameters, learned.trainer.parameters, atol=2**-10)


async def test_who_was_away_takes_over_what_the_others_have_learned_meanwhile(mesh, make_learner):
    rates = {"a": 3e-3, "b": 3e-3, "c": 3e-3}
    a, b, away = [
        await make_learner(name, rate_at=lambda _, name=name: rates[name]) for name in rates
    ]
    await run_all(a, b, away, step_count=10)
    mesh.kill(away.node)
    await run_all(a, b, step_count=60)
    await run_all(away, step_count=30)  # meanwhile it learns alone
    rates |= {"a": 1e-9, "b": 1e-9}  # from now on they stand still

    def distance():
        others = (a.outer.anchor, b.outer.anchor)
        return min(float(np.linalg.norm(away.outer.anchor - anchor)) for anchor in others)

    apart = distance()
    taken_over = []
    restart = away.outer.restart

    def noted():
        restart()
        taken_over.append(distance())

    away.outer.restart = noted
    mesh.nodes[away.node.peer_id] = away.node
    await run_all(a, b, away, step_count=20)
    assert len(taken_over) == 1
    assert taken_over[0] < 0.05 * apart, (taken_over, apart)


async def test_with_nobody_there_nothing_is_taken_over(make_learner):
    learner = await make_learner("a")
    assert await learner.join() == 0
