"""Outer loops: sums in any order, error feedback, weights that senders do not choose."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from llmload.config import GPT2Config
from llmload.learn.codecs import Codec
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.outer import (
    AVERAGE_CODEC,
    STALENESS_FREE,
    UPDATES_PER_OURS_MAX,
    OuterLoop,
    OuterSettings,
)
from llmload.learn.robust import PROBATION_COUNT, Judge
from llmload.learn.shards import ParameterSpace, ShardLayout, encode_shard
from llmload.learn.trainer import Trainer, batches
from llmload.weights import random_weights
from natswarm import PeerId

LAYOUT = ShardLayout(ParameterSpace.of({"w": (2000,)}), 800)
A, B, C = (PeerId(hashlib.sha256(name).digest()) for name in (b"a", b"b", b"c"))


def loop(seed=1, *, reputation=None, **settings):
    parameters = np.random.default_rng(seed).standard_normal(2000).astype(np.float32)
    return parameters, OuterLoop(
        LAYOUT, parameters, OuterSettings(**settings), reputation=reputation
    )


def move(parameters, seed, length=1e-2):
    step = np.random.default_rng(seed).standard_normal(2000).astype(np.float32)
    parameters += np.float32(length) * step
    return np.float32(length) * step


def deliver(receiver, sender_id, update, seen=None):
    seen = receiver.version if seen is None else seen
    return [
        receiver.receive(sender_id, msgspec.structs.replace(shard.header, seen=seen), shard.payload)
        for shard in update.shards
    ]


# --- Ours ----------------------------------------------------------------------------------------


def test_alone_it_is_plain_training():
    parameters, outer = loop()
    expected = parameters.copy()
    for seed in range(5):
        expected += move(parameters, seed)
        outer.go_alone()
        outer.merge()
    assert np.allclose(parameters, expected, atol=1e-6)
    assert outer.crowd == 1


def test_what_was_not_published_is_kept_for_later():
    parameters, outer = loop(density=0.1)
    start = parameters.copy()
    moved = move(parameters, 1)
    for _ in range(60):
        update = outer.publish()
        assert {shard.header.codec for shard in update.shards} == {Codec.TOPK}
        assert update.payload_bytes < 2000 * 4 * 0.06
    published = parameters - start
    # Alone the rate is 1: in the end all of the movement is there, but for the rounding.
    assert np.linalg.norm(published - moved) < 0.05 * np.linalg.norm(moved)


def test_two_that_hear_each_other_stay_together():
    (p, a), (q, b) = loop(), loop()
    for round_number in range(40):
        for parameters, own in ((p, 100), (q, 200)):
            move(parameters, round_number)  # what both texts teach
            move(parameters, own + round_number)
        ours, theirs = a.publish(), b.publish()
        deliver(a, B, theirs)
        deliver(b, A, ours)
        a.merge()
        b.merge()
    assert a.crowd == pytest.approx(2, abs=0.1)
    distance = np.linalg.norm(a.anchor - b.anchor)
    assert distance < 0.1 * np.linalg.norm(a.anchor - loop()[0])
    assert np.array_equal(p, a.anchor)  # a step begins where all agree


def test_each_gets_better_on_the_text_of_the_other():
    config = GPT2Config(vocab_size=40, n_ctx=16, n_embd=16, n_layer=1, n_head=2)

    def text(seed):
        tokens = np.tile(np.arange(10 * seed, 10 * seed + 10), 40)
        return batches(tokens, batch=4, time=8, rng=np.random.default_rng(seed))

    def losses(is_together):
        trainers = [
            Trainer(config, random_weights(config, 1), optimizer=AdamWSettings(learning_rate=1e-2))
            for _ in range(2)
        ]
        texts = [text(1), text(2)]
        loops = [
            OuterLoop(ShardLayout(each.space), each.parameters, OuterSettings(density=0.1))
            for each in trainers
        ]
        for step in range(1, 81):
            for trainer, own in zip(trainers, texts, strict=True):
                trainer.apply(trainer.gradients(next(own))[1])
            if step % 4 == 0 and is_together:
                updates = [outer.publish() for outer in loops]
                deliver(loops[0], B, updates[1])
                deliver(loops[1], A, updates[0])
                for outer in loops:
                    outer.merge()
        return [
            trainer.loss(*next(text(other)))
            for trainer, other in zip(trainers, (2, 1), strict=True)
        ]

    start = np.log(40)
    assert min(losses(False)) > start
    assert max(losses(True)) < 0.6 * start


def test_a_movement_with_nan_is_not_published():
    parameters, outer = loop()
    parameters[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        outer.publish()


# --- Others' -------------------------------------------------------------------------------------


def update_of(seed, version=1):
    parameters, outer = loop()
    for _ in range(version):
        move(parameters, seed)
        update = outer.publish()
    return update


def test_an_update_counts_once_whole_or_in_parts_in_any_order():
    update = update_of(5)
    results = []
    for order in ([0, 1, 2], [2, 0, 1], [0, 0, 1, 2, 1]):
        parameters, outer = loop()
        for shard in order:
            outer.receive(B, update.shards[shard].header, update.shards[shard].payload)
        outer.merge()
        results.append(parameters)
        assert outer.statistics.taken == 3
        assert outer.statistics.repeated == len(order) - 3
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], loop()[0])


def test_what_comes_in_during_a_step_is_no_movement_of_ours():
    parameters, outer = loop()
    deliver(outer, B, update_of(5))
    moved = move(parameters, 6)
    outer.merge()
    assert np.allclose(parameters - outer.anchor, moved, atol=1e-6)
    assert not np.array_equal(outer.anchor, loop()[0])


def test_stale_updates_weigh_less_and_the_sender_cannot_change_it():
    parameters, outer = loop(staleness_max=40)
    deliver(outer, B, update_of(5))  # known from version 0 on
    weights = []
    for version in range(2, 60):
        move(parameters, version)
        outer.publish()
        update = update_of(5)
        shard = update.shards[0]
        header = msgspec.structs.replace(shard.header, version=version, seen=0)
        weights.append(outer.receive(B, header, shard.payload))
    assert all(earlier >= later for earlier, later in pairwise(weights))
    assert weights[STALENESS_FREE - 2] > 0.99 * weights[0] > 0
    assert weights[4 * STALENESS_FREE - 2] == pytest.approx(weights[0] / 2, rel=0.1)
    assert weights[-1] == 0
    assert outer.statistics.stale > 0
    # Who claims to have seen more than there is weighs as one who has seen all.
    header = msgspec.structs.replace(shard.header, version=99, seen=2**40)
    assert outer.receive(B, header, shard.payload) <= 1


def test_one_peer_cannot_drown_the_others():
    _, outer = loop()
    shard = update_of(5).shards[0]
    for version in range(1, 40):
        header = msgspec.structs.replace(shard.header, version=version)
        outer.receive(B, header, shard.payload)
    assert outer.statistics.taken == UPDATES_PER_OURS_MAX


def test_damaged_and_foreign_shards_are_counted():
    parameters, outer = loop()
    before = parameters.copy()
    shard = update_of(5).shards[0]
    assert outer.receive(B, shard.header, shard.payload[:-1]) == 0
    foreign = msgspec.structs.replace(shard.header, layout=bytes(16))
    assert outer.receive(B, foreign, shard.payload) == 0
    assert outer.average(foreign, shard.payload) == 0
    outer.merge()
    assert outer.statistics.damaged == 3
    assert np.array_equal(parameters, before)


def test_reputation_is_a_factor():
    update = update_of(5)
    for reputation, weight in ((1.0, 1.0), (0.25, 0.25), (7.0, 1.0), (-1.0, 0.0)):
        _, outer = loop(reputation=lambda peer, value=reputation: value)
        assert deliver(outer, B, update) == [weight] * 3


# --- Averages ------------------------------------------------------------------------------------


def test_both_have_the_bits_of_the_average():
    (p, a), (q, b) = loop(), loop()
    move(p, 1)
    move(q, 2)
    for each in (a, b):
        each.go_alone()
    for shard in range(LAYOUT.shard_count):
        halves = [
            encode_shard(
                LAYOUT, shard, each.anchor[LAYOUT.bounds(shard)], codec=AVERAGE_CODEC, version=1
            )
            for each in (a, b)
        ]
        assert a.average(halves[1].header, halves[1].payload) == 1
        assert b.average(halves[0].header, halves[0].payload) == 1
    assert p.tobytes() == q.tobytes()
    assert np.array_equal(a.anchor, p)


def test_who_is_far_away_pulls_no_harder():
    parameters, outer = loop()
    for seed in range(4):
        move(parameters, seed)
        outer.go_alone()
    before = outer.anchor.copy()
    bounds = LAYOUT.bounds(0)
    far = before[bounds] + 100
    shard = encode_shard(LAYOUT, 0, far, codec=AVERAGE_CODEC, version=1)
    assert outer.average(shard.header, shard.payload) < 0.01
    assert np.abs(outer.anchor - before).max() < 0.2


# --- The judge -----------------------------------------------------------------------------------


def judged(judge, peer, agreements, length=1.0):
    return [judge.weigh(peer, 0, length, agreement) for agreement in agreements]


def test_who_agrees_counts_and_who_does_not_fades_out():
    rng = np.random.default_rng(1)
    judge = Judge()
    for name in (b"d", b"e", b"f"):
        other = PeerId(hashlib.sha256(name).digest())
        judged(judge, other, 0.1 + 0.1 * rng.standard_normal(100))
    honest = judged(judge, A, 0.1 + 0.1 * rng.standard_normal(100))
    flipped = judged(judge, B, -0.1 + 0.1 * rng.standard_normal(100))
    noise = judged(judge, C, 0.02 * rng.standard_normal(300))
    assert min(honest[20:]) > 0.9
    assert flipped[: PROBATION_COUNT - 1] == [1.0] * (PROBATION_COUNT - 1)
    assert max(flipped[20:]) == 0
    assert np.mean(noise[20:]) < 0.4
    assert judge.agreement(A) > 0.05 > 0 > judge.agreement(B)


def test_strangers_among_strangers_are_not_doubted():
    rng = np.random.default_rng(1)
    judge = Judge()
    for _ in range(3):
        for peer in (A, B, C):
            weights = judged(judge, peer, -0.1 + 0.1 * rng.standard_normal(30))
            assert weights == [1.0] * 30


def test_lengths_are_cut_to_the_usual():
    judge = Judge()
    for _ in range(10):
        judge.note_own(0, 1.0)
    assert judge.weigh(A, 0, 1.5, 0.1) == 1
    assert judge.weigh(A, 0, 100.0, 0.1) == pytest.approx(0.02)
    # A liar alone can't raise what is usual by much.
    for _ in range(20):
        judge.weigh(A, 0, 1e6, 0.1)
        judge.note_own(0, 1.0)
    assert judge.weigh(B, 0, 100.0, 0.1) < 0.05


def test_settings_are_checked():
    for wrong in ({"local_steps": 0}, {"density": 0.0}, {"density": 1.1}, {"staleness_max": -1}):
        with pytest.raises(ValueError, match="settings"):
            OuterSettings(**wrong)
