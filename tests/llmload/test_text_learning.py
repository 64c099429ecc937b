"""What texts of others do to a learner: mixed in fairly, measured, and discounted if useless."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trio

from llmload.config import GPT2Config
from llmload.data import exchange as text_exchange
from llmload.data.record import FeedbackRecord, TextRecord, sign_record
from llmload.data.store import RecordStore, StoredRecord
from llmload.learn.exchange import Learner
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.pool import TextPool
from llmload.learn.sources import PROBATION_COUNT, Sources
from llmload.learn.texts import TextLearning
from llmload.learn.trainer import Trainer, batches
from llmload.tokenizer import byte_tokenizer
from llmload.weights import random_weights
from natswarm import Identity, PeerId

sys.path.append(str(Path(__file__).parent))
from fake_mesh import FakeMesh

ME = Identity(bytes(range(32)))
A, B, C = (PeerId(name.encode() * 32) for name in "abc")
CONFIG = GPT2Config(vocab_size=256, n_ctx=32, n_embd=24, n_layer=1, n_head=2)
TIME = 16


def record(words, giver=None, number=1):
    return StoredRecord(number, sign_record(ME, TextRecord(words)), giver, False)


def encode(text):
    return list(text.encode())


# --- The pool ------------------------------------------------------------------------------------


def pool_of(own, weight=lambda _giver: 1.0, seed=1, batch=4):
    rng = np.random.default_rng(seed)
    return TextPool(own, encode, end=0, batch=batch, time=TIME, rng=rng, weight=weight)


def test_without_records_batches_are_those_of_our_text_to_the_bit():
    own = np.arange(500) % 256
    pool = pool_of(own)
    expected = batches(own, batch=4, time=TIME, rng=np.random.default_rng(1))
    pool.add([record("short", A)])  # no window fits
    for _ in range(5):
        for ours, theirs in zip(next(pool), next(expected), strict=True):
            assert np.array_equal(ours, theirs)


def test_sources_count_by_length_and_weight_and_none_for_more_than_our_own():
    weights = {A: 1.0, B: 0.5, C: 0.0}
    pool = pool_of(np.full(1000, 1), weights.get, batch=500)
    pool.add([record("a" * 4000, A, number) for number in range(3)])
    pool.add([record("b" * 1000, B), record("c" * 4000, C), record("o" * 500)])
    tokens, targets = next(pool)
    assert tokens.shape == targets.shape == (500, TIME)
    # Each window is of one source; those of the records end with the token 0 now and then.
    shares = {
        name: float(np.mean([name in row for row in tokens])) for name in (1, *encode("abco"))
    }
    expected = dict(
        zip((1, *encode("abco")), np.array([1000, 1000, 500, 0, 500]) / 3000, strict=True)
    )
    for name, share in expected.items():
        assert shares[name] == pytest.approx(share, abs=4 * np.sqrt(0.25 / 500))
    assert pool.givers == [A, B, C]
    assert np.array_equal(tokens[:, 1:], targets[:, :-1])


def test_feedback_is_no_text():
    pool = pool_of(np.full(100, 1))
    pool.add([StoredRecord(1, sign_record(ME, FeedbackRecord("x" * 99, "y" * 99, 1)), A, True)])
    assert pool.givers == []


# --- Sources -------------------------------------------------------------------------------------

WORDS = "the peer of a mesh is with all other nodes as one that may learn from what they say to it"


def language(seed, count=4000):
    """A text of a few words in random order: what can be learned is how they are spelled."""
    rng = np.random.default_rng(seed)
    return np.array(encode(" ".join(rng.choice(WORDS.split(), size=count // 4))), dtype=np.int64)


class Classroom:
    """A model in training on one text, and sources that are measured on the way."""

    def __init__(self, seed=1):
        self.rng = np.random.default_rng(seed)
        self.trainer = Trainer(
            CONFIG, random_weights(CONFIG, seed), optimizer=AdamWSettings(learning_rate=3e-3)
        )
        self.own = self.windows(language(1))
        held_out = next(batches(language(2), batch=8, time=TIME, rng=self.rng))
        self.sources = Sources(self.trainer, held_out, self.rng)
        self.texts = {}

    def windows(self, text):
        return batches(text, batch=8, time=TIME, rng=self.rng)

    def train(self, count):
        for _ in range(count):
            self.trainer.apply(self.trainer.gradients(next(self.own))[1])

    def measure(self, count):
        for _ in range(count * len(self.texts)):
            self.sources.measure_next(list(self.texts), lambda source: next(self.texts[source]))
            self.train(1)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_tokens_are_noticed_and_good_text_is_not_taken_for_them(seed):
    room = Classroom(seed)
    room.train(60)
    rng = np.random.default_rng(7)
    room.texts = {
        A: room.windows(language(3)),
        B: room.windows(rng.integers(256, size=4000)),
        C: room.windows(rng.permutation(language(3))),
    }
    assert [room.sources.weight(source) for source in (A, B, C)] == [0, 0, 0]
    assert room.sources.worth(B) == 0.5
    room.measure(PROBATION_COUNT + 14)
    assert room.sources.effect(A) > 0.1 > room.sources.effect(B)
    assert room.sources.weight(A) == room.sources.worth(A) == 1
    # Noise has an effect of nothing; letters in no order one that is hard to tell from nothing.
    assert room.sources.weight(B) == room.sources.worth(B) < 0.3
    assert room.sources.weight(C) < 0.6


def test_who_turns_to_poison_is_found_out_and_who_betters_itself_comes_back():
    room = Classroom()
    room.train(60)
    good = room.windows(language(3))
    bad = room.windows(np.random.default_rng(7).integers(256, size=4000))
    room.texts = {A: good, B: bad}
    room.measure(20)
    assert room.sources.weight(B) < 0.3 < 1 == room.sources.weight(A)
    room.texts = {A: bad, B: good}
    room.measure(60)
    assert room.sources.weight(A) < 0.5 < 1 == room.sources.weight(B)


def test_measuring_leaves_the_model_as_it_is():
    room = Classroom()
    kept = room.trainer.parameters.copy()
    room.texts = {A: room.windows(language(3))}
    assert room.sources.measure_next([A], lambda _source: next(room.texts[A])) == A
    assert room.sources.measure_next([], lambda _source: next(room.own)) is None
    assert np.array_equal(room.trainer.parameters, kept)


# --- All together --------------------------------------------------------------------------------


async def test_learners_give_each_other_texts_and_learn_from_them(nursery, tmp_path, monkeypatch):
    """What one shares the other takes and learns from; of noise it takes, and learns nothing."""
    monkeypatch.setattr(text_exchange, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(text_exchange, "ANSWER_EVERY_S", 0)
    monkeypatch.setattr("llmload.learn.texts.MEASURE_EVERY", 2)
    monkeypatch.setattr("llmload.learn.texts.REFRESH_EVERY", 5)
    mesh = FakeMesh(nursery)
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(5)
    shared = {
        "a": [], "b": ["".join(map(chr, language(4)))],
        "noise": ["".join(map(chr, rng.integers(32, 127, size=4000)))],
    }  # fmt: skip
    learners, peer_ids = {}, {}
    for index, (name, words) in enumerate(shared.items()):
        weights = random_weights(CONFIG, 1)
        model = SimpleNamespace(config=CONFIG, tokenizer=tokenizer, weights=weights)
        trainer = Trainer(CONFIG, weights, optimizer=AdamWSettings(learning_rate=3e-3))
        store = RecordStore(tmp_path / f"{name}.sqlite")
        records = [sign_record(ME, TextRecord(each, "CC0-1.0")) for each in words]
        store.add(records, is_shared=True)
        own = language(10 + index)
        held_out = next(batches(language(20 + index), batch=8, time=TIME, rng=rng))
        texts = TextLearning(
            model, trainer, store, own, held_out, batch=4, time=TIME, learning_rate=3e-3,
            rng=np.random.default_rng(index), seed=index,
        )  # fmt: skip
        node = mesh.node(name)

        async def between_steps(name=name):
            learner, texts, _ = learners[name]
            await texts.between_steps(learner.step_count)

        learner = Learner(node, trainer, texts.batches, "0" * 64, between_steps=between_steps)
        learner.start()
        await node.announce([learner.service])
        learners[name] = learner, texts, texts.start(node, learner)
        peer_ids[name] = node.peer_id
    with trio.fail_after(60):
        async with trio.open_nursery() as running:
            # The others only answer.
            running.start_soon(learners["a"][0].run)
            running.start_soon(learners["a"][2].run)
            sources = learners["a"][1].sources
            b, noise = peer_ids["b"], peer_ids["noise"]
            while not (sources.weight(b) == 1 and sources.worth(noise) < 0.3):  # noqa: ASYNC110
                await trio.sleep(0.05)  # nothing tells of it
            running.cancel_scope.cancel()
    reports = learners["a"][2].reports
    assert reports[b].taken > 0
    assert set(learners["a"][1].batches.givers) >= {b, noise}
