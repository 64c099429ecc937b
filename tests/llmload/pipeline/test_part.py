"""A model in parts makes the steps of the whole one."""

from __future__ import annotations

import numpy as np
import pytest

from llmload.config import GPT2Config
from llmload.errors import LearningFailed
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.pipeline.part import ENDS, ModelPart
from llmload.learn.trainer import Trainer

# The gradient of a bias of keys is zero but for rounding; AdamW would make a whole step of that.
SETTINGS = AdamWSettings(learning_rate=1e-2, gradient_norm_max=0.5, epsilon=1e-3)
RELATIVE_ERROR = 1e-5


def small(tied):
    return GPT2Config(
        vocab_size=40, n_ctx=16, n_embd=16, n_layer=4, n_head=2, tie_word_embeddings=tied
    )


def micro_batches(config, count, seed=1):
    rng = np.random.default_rng(seed)
    windows = rng.integers(config.vocab_size, size=(count, 2, 9))
    return [(rows[:, :-1], rows[:, 1:]) for rows in windows]


def make_parts(config, weights, cuts):
    return [
        ModelPart(config, range(*bounds), weights.__getitem__, optimizer=SETTINGS)
        for bounds in zip([0, *cuts], [*cuts, config.n_layer], strict=True)
    ]


def step(parts, batches):
    """Do one step, one micro-batch at a time; returns loss and norm."""
    *stages, last = parts
    token_count = sum(tokens.size for tokens, _ in batches)
    loss = 0.0
    for tokens, targets in batches:
        hidden, kept = last.embed(tokens), []
        for stage in stages:
            *inputs, hidden = stage.forward(hidden)
            kept.append(inputs)
        share, passed = last.losses(hidden, targets, token_count)
        loss += share
        for stage in reversed(stages):
            passed = stage.backward(kept.pop(), passed)
        last.embed_backward(tokens, passed)
    norm = sum(part.squared_norm() for part in parts) ** 0.5
    for part in parts:
        part.apply(norm, SETTINGS.learning_rate)
    return loss, norm


def all_weights(parts):
    return {
        name: values.copy()
        for part in parts
        for unit in part.units
        for name, values in part.weights(unit).items()
    }


@pytest.mark.parametrize(("tied", "cuts"), [(True, []), (True, [1, 3]), (False, [2])])
def test_gradients_and_steps_are_those_of_the_whole(trained_looking_weights, tied, cuts):
    config = small(tied)
    weights = trained_looking_weights(config, 3)
    whole = Trainer(config, weights, optimizer=SETTINGS)
    parts = make_parts(config, weights, cuts)
    for seed in (1, 2):
        batches = micro_batches(config, 3, seed)
        loss, gradient = whole.gradients(*batches)
        norm = whole.apply(gradient)
        got_loss, got_norm = step(parts, batches)
        assert got_loss == pytest.approx(loss, rel=1e-6)
        assert got_norm == pytest.approx(norm, rel=1e-6)
    expected, got = whole.weights(), all_weights(parts)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        moved = np.linalg.norm(values - weights[name])
        assert np.linalg.norm(got[name] - values) <= RELATIVE_ERROR * moved, name


def test_a_validation_gives_the_losses_of_a_step_and_leaves_no_gradient(trained_looking_weights):
    config = small(True)
    stage, last = make_parts(config, trained_looking_weights(config, 3), [3])
    ((tokens, targets),) = micro_batches(config, 1)
    hidden = stage.infer(last.embed(tokens))
    assert np.array_equal(hidden, stage.forward(last.embed(tokens))[-1])
    loss = last.loss(hidden, targets, tokens.size)
    assert stage.squared_norm() == last.squared_norm() == 0
    expected, _ = last.losses(hidden, targets, tokens.size)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert last.squared_norm() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_each_gradient_is_that_of_the_whole(trained_looking_weights, tied):
    """Undone by hand: a step of plain length shows the gradient of each parameter."""
    config = small(tied)
    weights = trained_looking_weights(config, 3)
    batches = micro_batches(config, 3)
    _, gradient = (whole := Trainer(config, weights)).gradients(*batches)
    expected = whole.space.views(gradient)
    parts = make_parts(config, weights, [1, 3])
    got = {}

    class Keeping:
        """Takes the place of AdamW: keeps what it is given."""

        def __init__(self, part):
            self.part = part

        def squared_norm(self, vector):
            return float(vector @ vector)

        def update(self, _parameters, vector, **_options):
            got.update(self.part._space.views(vector.copy()))

    for part in parts:
        part._optimizer = Keeping(part)
    step(parts, batches)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        error = np.linalg.norm(got[name] - values)
        assert error <= RELATIVE_ERROR * np.linalg.norm(values), name


def test_parts_go_back_to_any_step_and_may_be_cut_anew(trained_looking_weights):
    config = small(True)
    weights = trained_looking_weights(config, 3)
    parts = make_parts(config, weights, [1, 3])
    step(parts, micro_batches(config, 2, 1))
    states = {unit: part.checkpoint(unit) for part in parts for unit in part.units}
    kept = {
        unit: type(state)(state.step, {n: v.copy() for n, v in state.vectors.items()}, state.facts)
        for unit, state in states.items()
    }
    assert sorted(kept) == [ENDS, 0, 1, 2, 3]
    step(parts, micro_batches(config, 2, 2))
    expected = all_weights(parts)
    others = make_parts(config, weights, [2, 3])
    *kept_inputs, result = others[0].forward(np.ones((1, 2, 16), "f4"))
    others[0].backward(kept_inputs, result)  # half of a step
    for part in others:
        part.restore({unit: kept[unit] for unit in part.units})
        assert part.step == 1
    step(others, micro_batches(config, 2, 2))
    got = all_weights(others)
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, rel=1e-5, abs=1e-7)
    with pytest.raises(ValueError, match="units"):
        others[0].restore(kept)


def test_a_gradient_that_is_not_finite_changes_nothing(trained_looking_weights):
    config = small(True)
    (part,) = make_parts(config, trained_looking_weights(config, 3), [])
    before = all_weights([part])
    with pytest.raises(LearningFailed, match="NaN"):
        part.apply(float("nan"), 1e-3)
    assert part.step == 0
    after = all_weights([part])
    assert all(np.array_equal(before[name], after[name]) for name in before)
