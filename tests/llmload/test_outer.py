"""Outer loops: steps that all make alike, error feedback, weights that senders do not choose."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from llmload.config import GPT2Config
from llmload.learn.codecs import Codec
from llmload.learn.inbox import WAITING_MAX
from llmload.learn.optimizer import AdamW, AdamWSettings
from llmload.learn.outer import (
    DISTANCES_MIN,
    STALENESS_FREE,
    OuterLoop,
    OuterSettings,
    Update,
)
from llmload.learn.robust import LENGTH_FACTOR, PEERS_MAX, PROBATION_COUNT, Judge
from llmload.learn.shards import (
    ParameterSpace,
    ShardLayout,
    decode_shard_untrusted,
    encode_shard,
)
from llmload.learn.trainer import Trainer, batches
from llmload.weights import random_weights
from natswarm import PeerId

SPACE = ParameterSpace.of({"w": (2000,)})
LAYOUT = ShardLayout(SPACE, 800)
RATE = 1e-2
IDS = [PeerId(hashlib.sha256(bytes([number])).digest()) for number in range(8)]
ME, A, B, C, D, E = IDS[:6]


def loop(me=ME, *, reputation=None, **settings):
    parameters = np.random.default_rng(1).standard_normal(2000).astype(np.float32)
    settings = {"local_steps": 2, "density": 1.0} | settings
    return parameters, OuterLoop(
        LAYOUT,
        parameters,
        me,
        OuterSettings(**settings),
        optimizer=AdamWSettings(learning_rate=RATE),
        reputation=reputation,
    )


def gradient(seed, length=0.5):
    values = np.random.default_rng(seed).standard_normal(2000).astype(np.float32)
    return np.float32(length / np.linalg.norm(values)) * values


def walk(parameters, outer, own, *, merge=True):
    """Make one local step along a gradient, as AdamW might."""
    parameters -= np.float32(RATE) * np.sign(own)
    outer.note_step(own, float(np.linalg.norm(own)), RATE)
    if merge:
        outer.merge()


def deliver(receiver, sender_id, update, seen=None):
    seen = receiver.version if seen is None else seen
    return [
        receiver.receive(sender_id, msgspec.structs.replace(shard.header, seen=seen), shard.payload)
        for shard in update.shards
    ]


class Crowd:
    """Outer loops that hear each other at once."""

    def __init__(self, ids, **settings):
        self.ids = ids
        self.loops = [loop(each, **settings) for each in ids]

    def stretch(self, gradients, forge=lambda sender, update: update):
        """Let each walk a stretch along its gradient and publish; nobody steps before all have."""
        updates = []
        for me, (parameters, outer), own in zip(self.ids, self.loops, gradients, strict=True):
            for _ in range(outer.settings.local_steps):
                walk(parameters, outer, own, merge=False)
            updates.append(forge(me, outer.publish([each for each in self.ids if each != me])))
        for me, (_, outer) in zip(self.ids, self.loops, strict=True):
            for sender, update in zip(self.ids, updates, strict=True):
                if sender != me:
                    deliver(outer, sender, update)
            outer.merge()

    @property
    def anchors(self):
        return [outer.anchor.tobytes() for _, outer in self.loops]


# --- Away ----------------------------------------------------------------------------------------


def test_who_was_away_knows_it_when_most_are_heard_again():
    parameters, outer = loop()
    others = {peer_id: loop(peer_id)[1] for peer_id in (A, B, C)}

    def hear(**missed):
        for name, peer_id in (("a", A), ("b", B), ("c", C)):
            others[peer_id].version += missed.get(name, 0)
            deliver(outer, peer_id, others[peer_id].publish([ME]))
        walk(parameters, outer, gradient(1))
        return outer.is_behind

    assert not hear()
    assert not hear(a=20, b=10)
    assert hear(b=20)
    outer.restart()
    assert not hear()
    assert not hear(a=200_000, b=200_000, c=200_000)  # they began anew


# --- Ours ----------------------------------------------------------------------------------------


def test_alone_it_is_plain_training():
    parameters, outer = loop()
    expected = parameters.copy()
    for seed in range(6):
        own = gradient(seed)
        expected -= np.float32(RATE) * np.sign(own)
        walk(parameters, outer, own)
        if seed % 2:
            outer.go_alone()
            outer.merge()
    assert parameters.tobytes() == expected.tobytes() == outer.anchor.tobytes()
    assert outer.crowd == 1


def test_who_hears_nobody_keeps_its_walk():
    parameters, outer = loop(local_steps=4)
    expected = parameters.copy()
    for seed in range(12):
        own = gradient(seed)
        expected -= np.float32(RATE) * np.sign(own)
        walk(parameters, outer, own)
        if seed % 4 == 3:
            outer.publish([A, B])
            outer.merge()
    assert parameters.tobytes() == expected.tobytes()


def test_the_step_is_that_of_adamw_along_the_mean_gradient():
    crowd = Crowd([ME, A])
    start = crowd.loops[0][0].copy()
    gradients = [gradient(1), gradient(2)]
    expected = start.copy()
    reference = AdamW(SPACE, AdamWSettings(beta1=0.9**2, beta2=0.95**2))
    for _ in range(3):
        crowd.stretch(gradients)
        # A mean over two steps has half the noise of one: the rate of both / sqrt(2).
        reference.update(
            expected, np.mean(gradients, axis=0), learning_rate=2 * RATE / math.sqrt(2)
        )
    moved = np.linalg.norm(expected - start)
    for parameters, outer in crowd.loops:
        # The codec rounds; where both walked to is taken back.
        assert np.linalg.norm(outer.anchor - expected) < 0.1 * moved
        assert np.allclose(parameters, outer.anchor, atol=1e-6)
    assert len(set(crowd.anchors)) == 1
    assert crowd.loops[0][1].crowd > 1


def test_what_was_walked_meanwhile_stays():
    crowd = Crowd([ME, A])
    crowd.stretch([gradient(1), gradient(2)])
    parameters, outer = crowd.loops[0]
    walked = -np.float32(RATE) * np.sign(gradient(3))
    walk(parameters, outer, gradient(3), merge=False)
    assert np.allclose(parameters - outer.anchor, walked, atol=1e-6)


def test_the_step_waits_for_those_who_were_heard_lately_and_not_for_long():
    parameters, outer = loop(local_steps=8)
    peer, others = loop(A, local_steps=8)
    for step in range(8):
        walk(parameters, outer, gradient(step), merge=False)
        walk(peer, others, gradient(100 + step), merge=False)
    outer.publish([A])
    before = outer.anchor.copy()
    outer.merge()
    assert np.array_equal(outer.anchor, before)  # A was just met, and is due
    deliver(outer, A, others.publish([ME]))
    outer.merge()
    stepped = outer.anchor.copy()
    assert not np.array_equal(stepped, before)
    for _ in range(2):  # the next two stretches, of which A sends nothing
        for step in range(8):
            walk(parameters, outer, gradient(200 + step))
        outer.publish([A])
        merges = 0
        while np.array_equal(outer.anchor, stepped):
            outer.merge()
            merges += 1
        stepped = outer.anchor.copy()
        assert merges <= 5
    assert merges == 1  # it is given up


def test_what_was_not_published_is_kept_for_later():
    parameters, outer = loop(density=0.1, local_steps=1)
    walk(parameters, outer, gradient(1), merge=False)
    published = np.zeros(2000, dtype=np.float32)
    for _ in range(40):
        update = outer.publish([A])
        assert {shard.header.codec for shard in update.shards} == {Codec.TOPK}
        assert update.payload_bytes < 2000 * 4 * 0.06
        for shard in update.shards:
            published[LAYOUT.bounds(shard.header.shard)] += decode(shard)
    assert np.linalg.norm(published - gradient(1)) < 0.05 * np.linalg.norm(gradient(1))


def test_who_hears_less_takes_its_own_update_for_those_it_misses():
    """Two of three hear each other: to the first, its own counts twice."""
    steps = []
    for unheard in (0, 1, 50):
        (parameters, outer), (other_parameters, other) = loop(ME), loop(A)
        walk(parameters, outer, gradient(1), merge=False)
        walk(other_parameters, other, gradient(2), merge=False)
        outer.publish([A], unheard=unheard)
        deliver(outer, A, other.publish([ME]))
        outer.merge()
        steps.append(outer._optimizer.vectors()["mean"].copy())
    own, others = (gradient(seed) for seed in (1, 2))
    for mean, weight in zip(steps, (1, 2, 2), strict=True):  # no more than there are partners
        expected = (weight * own + others) / (weight + 1)
        assert mean @ expected / np.linalg.norm(mean) / np.linalg.norm(expected) > 0.999


def test_in_a_crowd_all_copies_of_an_update_are_as_long_as_those_for_a_few():
    crowd = [PeerId(hashlib.sha256(f"crowd {number}".encode()).digest()) for number in range(32)]

    def bytes_for(partners):
        parameters, outer = loop(density=0.1)
        walk(parameters, outer, gradient(1), merge=False)
        return len(partners) * outer.publish(partners).payload_bytes

    assert bytes_for(crowd[:4]) == pytest.approx(bytes_for(crowd[:8]) / 2, rel=0.01)
    # Names cost more, and so do magnitudes where a block is not full.
    assert bytes_for(crowd[:16]) == pytest.approx(bytes_for(crowd[:8]), rel=0.3)
    assert bytes_for(crowd) == pytest.approx(bytes_for(crowd[:8]), rel=0.7)


def decode(shard):
    return decode_shard_untrusted(LAYOUT, shard.header, shard.payload)


def test_long_gradients_are_cut_as_adamw_cuts_them():
    parameters, outer = loop(local_steps=1)
    walk(parameters, outer, gradient(1, length=50.0), merge=False)
    update = outer.publish([A])
    assert math.hypot(*(np.linalg.norm(decode(each)) for each in update.shards)) == pytest.approx(
        1.0, rel=0.01
    )


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
            OuterLoop(ShardLayout(each.space), each.parameters, me, OuterSettings(density=0.1))
            for me, each in zip((A, B), trainers, strict=True)
        ]
        for step in range(1, 121):
            for trainer, own, outer in zip(trainers, texts, loops, strict=True):
                along = trainer.gradients(next(own))[1]
                outer.note_step(along, trainer.apply(along), 1e-2)
            if step % 8 == 0 and is_together:
                updates = [
                    outer.publish([other]) for outer, other in zip(loops, (B, A), strict=True)
                ]
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


def test_a_gradient_with_nan_is_not_published():
    _, outer = loop()
    along = gradient(1)
    along[3] = np.nan
    outer.note_step(along, 1.0, RATE)
    with pytest.raises(ValueError, match="NaN"):
        outer.publish([A])


# --- Others' -------------------------------------------------------------------------------------


def update_of(seed, version=1, me=B):
    parameters, outer = loop(me)
    for _ in range(version):
        for _ in range(2):
            walk(parameters, outer, gradient(seed), merge=False)
        update = outer.publish([ME])
    return update


def stepped(outer, parameters):
    for seed in (1, 2):
        walk(parameters, outer, gradient(seed), merge=False)
    outer.publish([])
    outer.merge()
    return outer.anchor.tobytes()


def test_an_update_counts_once_whole_or_in_parts_in_any_order():
    update = update_of(5)
    results = set()
    for order in ([0, 1, 2], [2, 0, 1], [0, 0, 1, 2, 1]):
        parameters, outer = loop()
        for shard in order:
            outer.receive(B, update.shards[shard].header, update.shards[shard].payload)
        results.add(stepped(outer, parameters))
        assert outer.statistics.taken == 3
        assert outer.statistics.repeated == len(order) - 3
    assert len(results) == 1
    parameters, outer = loop()
    assert results != {stepped(outer, parameters)}


def test_stale_updates_weigh_less_and_the_sender_cannot_change_it():
    _, outer = loop(staleness_max=40)
    deliver(outer, B, update_of(5))  # known from version 0 on
    shard = update_of(5).shards[0]
    weights = []
    for version in range(2, 60):
        outer.go_alone()
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


def test_one_peer_cannot_fill_our_memory():
    _, outer = loop()
    shard = update_of(5).shards[0]
    for version in range(1, 40):
        header = msgspec.structs.replace(shard.header, version=version)
        outer.receive(B, header, shard.payload)
    assert outer.statistics.taken == WAITING_MAX


def test_a_slow_peer_goes_along_with_the_others():
    """It is in the middle of a stretch while the others make several."""
    crowd = Crowd([A, B, C])
    parameters, slow = loop(ME)
    for stretch in range(6):
        walk(parameters, slow, gradient(50))
        gradients = [gradient(10 * stretch + n) for n in range(3)]
        crowd.stretch(gradients, lambda me, update: (deliver(slow, me, update), update)[1])
        slow.merge()
    moved = np.linalg.norm(crowd.loops[0][1].anchor - loop()[0])
    assert np.linalg.norm(slow.anchor - loop()[0]) > 0.3 * moved
    assert np.linalg.norm(slow.anchor - crowd.loops[0][1].anchor) < 0.8 * moved


def test_damaged_and_foreign_shards_are_counted():
    parameters, outer = loop()
    before = parameters.copy()
    shard = update_of(5).shards[0]
    assert outer.receive(B, shard.header, shard.payload[:-1]) == 0
    foreign = msgspec.structs.replace(shard.header, layout=bytes(16))
    assert outer.receive(B, foreign, shard.payload) == 0
    outer.merge()
    assert outer.statistics.damaged == 2
    assert np.array_equal(parameters, before)


def huge(shard, codec, version):
    """A shard as long as the format lets it be: the square of a value does not fit float32."""
    values = np.full(LAYOUT.bounds(shard).stop - LAYOUT.bounds(shard).start, 2.0**95, np.float32)
    return encode_shard(LAYOUT, shard, values, codec=codec, version=version)


def test_values_without_measure_are_cut_and_spoil_no_measure():
    crowd = Crowd([ME, A])
    _, outer = crowd.loops[0]
    for stretch in range(3):
        far = huge(0, Codec.FP16, 1)
        values = decode_shard_untrusted(LAYOUT, far.header, far.payload)
        outer.move(LAYOUT.bounds(0), outer.anchor[LAYOUT.bounds(0)].copy(), values)
        lie = huge(0, Codec.INT8X256, stretch + 1)
        outer.receive(B, lie.header, lie.payload)
        before = outer.anchor.copy()
        crowd.stretch([gradient(1), gradient(2)])
        # No value goes further than AdamW lets it go in a stretch.
        assert np.abs(outer.anchor - before).max() < 4 * outer.settings.local_steps * RATE


def test_reputation_is_a_factor():
    update = update_of(5)
    for reputation, weight in ((1.0, 1.0), (0.25, 0.25), (7.0, 1.0), (-1.0, 0.0)):
        _, outer = loop(reputation=lambda peer, value=reputation: value)
        assert deliver(outer, B, update) == [weight] * 3


def forging(liars, lie):
    """Return what makes the updates of some a multiple of what they learned."""

    def forge(sender, update):
        if sender not in liars:
            return update
        shards = [
            encode_shard(
                LAYOUT,
                shard.header.shard,
                np.float32(lie) * decode(shard),
                codec=Codec.INT8X256,
                version=shard.header.version,
            )
            for shard in update.shards
        ]
        return Update(update.version, tuple(shards), update.payload_bytes)

    return forge


@pytest.mark.parametrize("lie", [-1.0, -100.0])
def test_liars_are_found_out_by_all_alike(lie):
    rng = np.random.default_rng(1)
    truth = gradient(99, length=0.3)
    liars = IDS[6:]
    forge = forging(liars, lie)
    crowd = Crowd(IDS)
    for _ in range(8):
        crowd.stretch([truth + gradient(rng.integers(2**32), length=0.6) for _ in crowd.ids], forge)
    assert len(set(crowd.anchors[:6])) == 1
    for _, outer in crowd.loops[:6]:
        assert outer.agreement(A) > 0 > max(map(outer.agreement, liars))
        assert outer.statistics.doubted >= 10
    # And the honest got where the truth is.
    moved = crowd.loops[0][1].anchor - loop()[0]
    assert moved @ truth < -0.3 * np.linalg.norm(moved) * np.linalg.norm(truth)


def test_liars_do_not_make_unusual_text_look_wrong():
    rng = np.random.default_rng(1)
    truth, own = gradient(99, length=0.3), gradient(98, length=0.5)
    unusual = IDS[4]
    forge = forging(IDS[5:], -1.0)
    crowd = Crowd(IDS)
    for _ in range(20):
        gradients = [truth + gradient(rng.integers(2**32), length=0.6) for _ in crowd.ids]
        gradients[4] = np.float32(0.5) * gradients[4] + own
        crowd.stretch(gradients, forge)
    _, outer = crowd.loops[0]
    # As if nobody had lied; with the liars in the sum it would be a third of that.
    assert outer.agreement(unusual) > 0.1


def test_nobody_agrees_with_its_own_copies():
    rng = np.random.default_rng(1)
    truth = gradient(99, length=0.3)
    crowd = Crowd(IDS)
    liar, (_, ours) = IDS[7], crowd.loops[0]
    flip = forging([liar], -1.0)

    def forge(sender, update):
        update = flip(sender, update)
        if sender != liar:
            return update
        for copy in range(4):
            for shard in update.shards:
                version = 4 * shard.header.version + copy
                header = msgspec.structs.replace(shard.header, version=version, seen=ours.version)
                ours.receive(liar, header, shard.payload)
        return update  # of an old version by now

    for _ in range(20):
        crowd.stretch([truth + gradient(rng.integers(2**32), length=0.6) for _ in crowd.ids], forge)
    assert ours.agreement(liar) < -0.1


# --- Averages ------------------------------------------------------------------------------------


def test_what_changed_while_a_part_was_averaged_stays():
    parameters, outer = loop()
    bounds = LAYOUT.bounds(0)
    before = outer.anchor[bounds].copy()
    walk(parameters, outer, gradient(1))
    outer.go_alone()
    changed = outer.anchor[bounds] - before
    parameters += np.float32(0.125)  # steps since the stretch's end
    assert np.abs(changed).max() > 0
    assert outer.move(bounds, before, before + np.float32(RATE)) == 1
    assert np.allclose(outer.anchor[bounds], before + RATE + changed, atol=1e-6)
    assert np.allclose(parameters - outer.anchor, 0.125, atol=1e-6)


def test_who_has_missed_a_step_is_not_far_away_even_where_all_others_are_equal():
    _, outer = loop()
    bounds = LAYOUT.bounds(0)
    before = outer.anchor[bounds].copy()
    for _ in range(DISTANCES_MIN):
        assert outer.move(bounds, before, before) == 1
    step = math.sqrt(outer.settings.local_steps) * RATE
    assert outer.move(bounds, before, before + np.float32(step)) == 1
    assert outer.move(bounds, before, before + np.float32(100 * step)) < 0.1


# --- The judge -----------------------------------------------------------------------------------


ALIKE = IDS[:5]


def judged(peer, agreements, *, usual=0.1, spread=0.1, alike=ALIKE, judge=None):
    """Return what is believed of a peer after each step, beside some that agree as usual."""
    rng = np.random.default_rng(1)
    judge = judge or Judge()
    beliefs = []
    for agreement in agreements:
        others = {other: usual + spread * rng.standard_normal() for other in alike}
        judge.note({**others, peer: agreement})
        beliefs.append(judge.belief(peer))
        assert min(map(judge.belief, alike)) > 0.6
    return np.array(beliefs)


def normal(count, mean, spread, seed=2):
    return mean + spread * np.random.default_rng(seed).standard_normal(count)


def test_who_flips_signs_is_found_out_and_may_come_back():
    flipped = judged(IDS[7], normal(100, -0.1, 0.1))
    assert flipped[: PROBATION_COUNT - 1].tolist() == [1.0] * (PROBATION_COUNT - 1)
    assert flipped[50:].max() == 0
    changed = judged(IDS[7], [*normal(100, -0.1, 0.1), *normal(300, 0.1, 0.1)])
    assert changed[99] == 0
    assert changed[-1] == 1


@pytest.mark.parametrize("seed", range(5))
def test_random_numbers_are_found_out_and_unusual_text_is_not(seed):
    # Random numbers agree with nobody, and each time alike: they have many components.
    assert judged(IDS[7], normal(200, 0.0, 0.01, seed))[20:].mean() < 0.05
    # As spread as honest ones, they take longer, the less the others agree.
    assert judged(IDS[7], normal(3000, 0.0, 0.1, seed))[2000:].mean() < 0.2
    assert judged(IDS[7], normal(3000, 0.03, 0.1, seed)).mean() > 0.9


def test_of_strangers_nobody_is_doubted():
    rng = np.random.default_rng(1)
    judge = Judge()
    for _ in range(60):
        judge.note({peer: -0.1 + 0.1 * rng.standard_normal() for peer in (A, B, C, D)})
        assert [judge.belief(peer) for peer in (A, B, C, D)] == [1.0] * 4


def test_half_of_a_jury_does_not_say_what_is_usual():
    # Two that send the same again and again agree with each other more than honest ones ever do.
    rng = np.random.default_rng(1)
    judge, honest, liars = Judge(), IDS[:3], IDS[3:5]
    for _ in range(300):
        judge.note(
            {peer: 0.01 + 0.02 * rng.standard_normal() for peer in honest}
            | {peer: 0.9 + 0.01 * rng.standard_normal() for peer in liars}
        )
    assert [judge.belief(peer) for peer in honest] == [1.0] * 3


def test_who_is_heard_is_remembered_whoever_passes_by():
    judge = Judge()
    for number in range(PEERS_MAX + 10):
        passing = PeerId(hashlib.sha256(number.to_bytes(2)).digest())
        judge.note({A: 0.5, passing: 0.1})
    assert judge.agreement(A) == 0.5
    assert judge.agreement(PeerId(hashlib.sha256(bytes(2)).digest())) == 0


def test_those_who_left_are_no_jury():
    rng = np.random.default_rng(1)
    judge = Judge()
    for number in range(40):
        gone = [PeerId(hashlib.sha256(bytes([number, each])).digest()) for each in range(3)]
        for _ in range(5):
            judge.note({peer: 0.001 * rng.standard_normal() for peer in gone})
    assert judged(IDS[7], normal(100, -0.1, 0.1), judge=judge)[50:].max() == 0


def test_lengths_are_cut_to_the_usual():
    judge = Judge()
    for _ in range(10):
        assert judge.cut(0, [1.0, 1.2]) == [1.0, 1.0]
    assert judge.cut(0, [1.5, 100.0]) == [1.0, pytest.approx(LENGTH_FACTOR * 1.1 / 100, rel=0.1)]
    assert Judge().cut(0, [1.0, 1e20])[1] < 1e-19  # between two, ours is the measure
    # A liar alone can't raise what is usual by much.
    for _ in range(20):
        judge.cut(0, [1.0, 1e6, 1.0])
    assert judge.cut(0, [1.0, 100.0])[1] < 0.05


def test_settings_are_checked():
    for wrong in ({"local_steps": 0}, {"density": 0.0}, {"density": 1.1}, {"staleness_max": -1}):
        with pytest.raises(ValueError, match="settings"):
            OuterSettings(**wrong)
