"""Marks on answers: the loss of KTO, its gradient, and what a model makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from llmload.config import GPT2Config
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.preference import BATCH, BETA, MarkedAnswer, PreferenceTrainer, kto
from llmload.learn.scorer import Scorer
from llmload.learn.trainer import Trainer
from natswarm import PeerId

CONFIG = GPT2Config(vocab_size=40, n_ctx=16, n_embd=16, n_layer=2, n_head=2)
TIME = 12


@pytest.fixture
def trainer(trained_looking_weights):
    return Trainer(
        CONFIG, trained_looking_weights(CONFIG, 1), optimizer=AdamWSettings(learning_rate=1e-3)
    )


def passages(count, seed=1):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(40, size=rng.integers(0, 5)), rng.integers(40, size=rng.integers(2, 7)))
        for _ in range(count)
    ]


# --- How likely a passage is ---------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_loss(trainer):
    scorer = Scorer(trainer, batch=3, time=TIME)
    some = passages(7)  # more than a batch
    found = scorer.log_probabilities(some)
    for (prompt, follows), value in zip(some, found, strict=True):
        ids = np.array([*prompt, *follows])
        whole = -trainer.loss(ids[None, :-1], ids[None, 1:]) * (len(ids) - 1)
        head = 0.0
        if len(prompt) > 1:
            head = -trainer.loss(prompt[None, :-1], prompt[None, 1:]) * (len(prompt) - 1)
        assert value == pytest.approx(whole - head, abs=2e-4)


def test_nothing_to_predict_is_zero_and_what_is_too_long_is_cut(trainer):
    scorer = Scorer(trainer, batch=4, time=TIME)
    rng = np.random.default_rng(2)
    long, answer = rng.integers(40, size=30), rng.integers(40, size=5)
    found = scorer.log_probabilities(
        [((), [3]), (long, answer), (long[-(TIME + 1 - 5) :], answer), (long, long)]
    )
    assert found[0] == 0
    assert found[1] == found[2] != 0
    assert np.isfinite(found[3])


def test_the_gradient_of_log_probabilities_is_the_difference_quotient(trainer):
    scorer = Scorer(trainer, batch=4, time=TIME)
    some, upstream = passages(3), np.array([1.0, -0.5, 2.0])
    gradient = scorer.gradient(some, upstream)
    rng, parameters = np.random.default_rng(3), trainer.parameters
    kept = parameters.copy()
    for _ in range(4):
        direction = rng.standard_normal(kept.size).astype(np.float32)
        direction += 20 * gradient / np.linalg.norm(gradient)  # one in which something happens
        direction /= np.linalg.norm(direction)
        values = []
        for sign in (1, -1):
            parameters[:] = kept + np.float32(sign * 1e-2) * direction
            values.append(float(upstream @ scorer.log_probabilities(some)))
        parameters[:] = kept
        quotient = (values[0] - values[1]) / 2e-2
        assert quotient == pytest.approx(float(gradient @ direction), rel=2e-2)


# --- The loss ------------------------------------------------------------------------------------


def test_the_derivative_of_the_loss_is_the_difference_quotient():
    rng = np.random.default_rng(1)
    ratios, mismatched = 9 * rng.standard_normal(6), 9 * rng.standard_normal(6)
    marks, weights = np.array([1, -1, 1, 1, -1, -1.0]), rng.uniform(0.2, 1, 6)
    _, derivative = kto(ratios, mismatched, marks, weights)
    for index in range(6):
        shifted = []
        for sign in (1, -1):
            moved = ratios.copy()
            moved[index] += sign * 1e-5
            shifted.append(kto(moved, mismatched, marks, weights)[0])
        quotient = (shifted[0] - shifted[1]) / 2e-5
        assert derivative[index] == pytest.approx(quotient, rel=1e-6)


def test_the_loss_is_that_of_the_paper():
    # By hand: z = max(0, mean) = 2; sigmoid(0.1 (5 - 2)) and sigmoid(0.1 (2 - -4)).
    loss, derivative = kto(
        np.array([5.0, -4.0]), np.array([3.0, 1.0]), np.array([1.0, -1.0]), np.array([1.0, 0.5])
    )
    good, bad = 1 / (1 + np.exp(-0.3)), 1 / (1 + np.exp(-0.6))
    assert BETA == 0.1
    assert loss == pytest.approx(((1 - good) + 0.5 * (1 - bad)) / 2)
    # Good answers are to become likelier, bad ones less likely; z below zero counts as zero.
    assert derivative[0] < 0 < derivative[1]
    one = (np.array([1.0]), np.array([1.0]), np.array([1.0]))
    assert kto(one[0], np.array([-5.0]), *one[1:]) == kto(one[0], np.array([]), *one[1:])


# --- Learning ------------------------------------------------------------------------------------


GOOD, BAD = PeerId(b"a" * 32), PeerId(b"b" * 32)
WEIGHTS = {GOOD: 0.5, BAD: 0.0}


def preference_trainer(trainer, reference=None):
    reference = trainer.parameters.copy() if reference is None else reference
    rng = np.random.default_rng(1)
    return PreferenceTrainer(
        trainer, reference, time=TIME, learning_rate=3e-3, rng=rng, weight=WEIGHTS.get
    )


def test_good_answers_become_likelier_and_bad_ones_less_likely(trainer):
    learner = preference_trainer(trainer)
    some = passages(20)
    answers = [MarkedAnswer(passage, 1 if index < 5 else -1) for index, passage in enumerate(some)]
    learner.add(answers)
    before = Scorer(trainer, batch=8, time=TIME).log_probabilities(some)
    losses = [learner.step() for _ in range(40)]
    moved = Scorer(trainer, batch=8, time=TIME).log_probabilities(some) - before
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:3])
    assert moved[:5].mean() > 3
    assert moved[5:].mean() < -3


def test_at_the_reference_the_gradient_is_that_of_the_marks(trainer):
    """There all ratios are 0, so each answer counts sigmoid'(0) = 1/4, balanced between kinds."""
    learner = preference_trainer(trainer)
    some = passages(4)
    answers = [MarkedAnswer(each, 1 if i else -1) for i, each in enumerate(some)]
    learner.add(answers)
    loss, gradient = learner.gradient(answers)
    balanced = np.array([1, 1 / 3, 1 / 3, 1 / 3])
    assert loss == pytest.approx(balanced.mean() / 2, abs=1e-5)
    upstream = BETA / 4 * balanced * np.array([1, -1, -1, -1]) / 4
    expected = Scorer(trainer, batch=BATCH, time=TIME).gradient(some, upstream)
    assert np.allclose(gradient, expected, atol=1e-5)


def test_marks_of_a_source_that_is_worth_nothing_do_nothing(trainer):
    learner = preference_trainer(trainer)
    kept = trainer.parameters.copy()
    assert learner.step() is None
    learner.add([MarkedAnswer(each, 1, BAD) for each in passages(4)])
    assert learner.step() is None
    assert np.array_equal(trainer.parameters, kept)


def test_no_source_drowns_our_own_marks(trainer):
    learner = preference_trainer(trainer)
    learner.add([MarkedAnswer(passages(1)[0], -1)] * 4)
    learner.add([MarkedAnswer(passages(1)[0], 1, GOOD)] * 10_000)
    answers, shares = learner._shares()
    assert len(answers) < 300
    assert shares[:4].sum() == 4
    assert shares[4:].sum() == pytest.approx(0.5 * BATCH)


def test_looking_at_the_reference_leaves_the_model_as_it_is(trainer):
    learner = preference_trainer(trainer, reference=np.zeros_like(trainer.parameters))
    kept = trainer.parameters.copy()
    learner.gradient([MarkedAnswer(each, 1) for each in passages(3)])
    assert np.array_equal(trainer.parameters, kept)
