"""Gradients of whole models against float64 differences; AdamW against its formula; determinism."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmload import reference
from llmload.config import GPT2Config
from llmload.errors import LearningFailed
from llmload.graph import build, head
from llmload.graph.training import build_forward_graph, build_gradient_graph
from llmload.learn.gradients import OPEN_SHAPE_COUNT_MAX
from llmload.learn.optimizer import CHUNK_VALUE_COUNT, AdamW, AdamWSettings
from llmload.learn.shards import ParameterSpace
from llmload.learn.trainer import Trainer, batches
from llmload.weights import random_weights

RELATIVE_ERROR = 1e-4
STEP = 1e-5

TIED = GPT2Config(vocab_size=13, n_ctx=7, n_embd=8, n_layer=2, n_head=2)
UNTIED = GPT2Config(
    vocab_size=13, n_ctx=7, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=False
)
# Repeated ids: their rows of the embedding collect several gradients.
TOKENS = np.array([[3, 1, 3, 3, 12], [0, 1, 12, 5, 0]])
TARGETS = np.array([[1, 3, 3, 12, 7], [1, 12, 5, 0, 3]])


def lively_weights(config, seed=5):
    """Return weights without the zeros and ones of a fresh model, which would hide mistakes."""
    rng = np.random.default_rng(seed)
    weights = random_weights(config, seed)
    return {
        name: (values + 0.3 * rng.standard_normal(values.shape)).astype(np.float32)
        for name, values in weights.items()
    }


def reference_losses(config, weights):
    """Return the cross-entropies by the NumPy reference, in the type of the weights."""
    logits, _ = reference.forward(config, weights, TOKENS)  # (b, t, v)
    largest = logits.max(axis=-1, keepdims=True)
    log_sums = largest[..., 0] + np.log(np.exp(logits - largest).sum(axis=-1))  # (b, t)
    chosen = np.take_along_axis(logits, TARGETS[..., None], axis=-1)[..., 0]  # (b, t)
    return log_sums - chosen


def reference_loss(config, weights):
    """Return their mean."""
    return reference_losses(config, weights).mean()


def difference(config, weights, name, direction):
    """Return the derivative of the loss along a direction of one parameter, in float64."""
    above = weights | {name: weights[name] + STEP * direction}
    below = weights | {name: weights[name] - STEP * direction}
    return (reference_loss(config, above) - reference_loss(config, below)) / (2 * STEP)


# --- Gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "piece_size"), [(build.QUERY_SPAN, head.PIECE_SIZE), (2, 5)], ids=["whole", "cut"]
)
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_every_parameter_against_differences_of_the_reference(
    config, span, piece_size, monkeypatch
):
    monkeypatch.setattr(build, "QUERY_SPAN", span)
    monkeypatch.setattr(head, "PIECE_SIZE", piece_size)
    weights = lively_weights(config)
    trainer = Trainer(config, weights)
    loss, gradient = trainer.gradients((TOKENS, TARGETS))
    gradients = trainer.space.views(gradient)
    assert set(gradients) == set(weights)

    exact = reference.as_type(weights, np.float64)
    assert loss == pytest.approx(reference_loss(config, exact), rel=1e-6)
    rng = np.random.default_rng(1)
    for name, analytic in gradients.items():
        length = np.linalg.norm(analytic)
        # One random direction meets every coordinate.
        direction = rng.standard_normal(analytic.shape)
        error = abs((analytic * direction).sum() - difference(config, exact, name, direction))
        assert error / length < RELATIVE_ERROR, f"{name}, random direction: {error / length:.1e}"
        # The three largest coordinates and three others, one by one.
        order = np.argsort(-np.abs(analytic), axis=None)
        chosen = [*order[:3], *rng.choice(order, 3)]
        numeric = []
        for position in chosen:
            direction = np.zeros(analytic.size)
            direction[position] = 1
            numeric.append(difference(config, exact, name, direction.reshape(analytic.shape)))
        error = np.linalg.norm(analytic.reshape(-1)[chosen] - numeric) / np.linalg.norm(numeric)
        assert error < RELATIVE_ERROR, f"{name}: {error:.1e}"


def test_positions_beyond_the_batch_have_no_gradient():
    trainer = Trainer(TIED, lively_weights(TIED))
    _, gradient = trainer.gradients((TOKENS, TARGETS))
    assert not trainer.space.views(gradient)["wpe.weight"][TOKENS.shape[1] :].any()


@pytest.mark.parametrize("recompute", [1, 2, 3, 9])
def test_activations_computed_again_give_the_same_gradients(recompute):
    config = GPT2Config(vocab_size=13, n_ctx=7, n_embd=8, n_layer=3, n_head=2)
    weights = lively_weights(config)
    loss, gradient = Trainer(config, weights).gradients((TOKENS, TARGETS))
    trainer = Trainer(config, weights, recompute=recompute)
    loss_again, gradient_again = trainer.gradients((TOKENS, TARGETS))
    assert loss_again == pytest.approx(loss, rel=1e-6)
    assert trainer.loss(TOKENS, TARGETS) == pytest.approx(loss, rel=1e-6)
    for name, expected in trainer.space.views(gradient).items():
        found = trainer.space.views(gradient_again)[name]
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(config):
    """Of unequal sizes: each part counts by its tokens."""
    weights = lively_weights(config)
    rng = np.random.default_rng(8)
    parts = [tuple(rng.integers(13, size=(2, batch, 6))) for batch in (3, 1, 2)]
    whole = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    trainer = Trainer(config, weights)
    loss, gradient = trainer.gradients(whole)
    loss_in_parts, in_parts = trainer.gradients(*parts)
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    assert np.linalg.norm(in_parts - gradient) < 1e-6 * np.linalg.norm(gradient)


def test_parts_of_other_lengths_count_by_their_tokens():
    trainer = Trainer(TIED, lively_weights(TIED))
    long, short = (TOKENS, TARGETS), (TOKENS[:1, :2], TARGETS[:1, :2])
    (long_loss, long_gradient), (short_loss, short_gradient) = map(trainer.gradients, (long, short))
    loss, gradient = trainer.gradients(long, short)
    assert loss == pytest.approx((10 * long_loss + 2 * short_loss) / 12, rel=1e-6)
    assert gradient == pytest.approx((10 * long_gradient + 2 * short_gradient) / 12, abs=1e-6)
    with pytest.raises(ValueError, match="no batch"):
        trainer.gradients()


def test_a_step_is_gradients_and_apply():
    one, other = (Trainer(TIED, lively_weights(TIED)) for _ in range(2))
    parts = [(TOKENS, TARGETS), (TARGETS, TOKENS)]
    for _ in range(2):
        loss, gradient = one.gradients(*parts)
        one.apply(gradient, learning_rate=0.01)
        assert other.step(parts, learning_rate=0.01) == loss
    assert one.parameters.tobytes() == other.parameters.tobytes()


def test_loss_alone_is_the_loss_of_the_gradients():
    trainer = Trainer(TIED, lively_weights(TIED))
    assert trainer.loss(TOKENS, TARGETS) == pytest.approx(
        trainer.gradients((TOKENS, TARGETS))[0], rel=1e-6
    )


@pytest.mark.parametrize("piece_size", [head.PIECE_SIZE, 5])
def test_each_token_counts_as_its_upstream_says(piece_size, monkeypatch):
    """Upstream of either sign and of zero, logits far apart: every part of the softmax matters."""
    monkeypatch.setattr(head, "PIECE_SIZE", piece_size)
    weights = lively_weights(UNTIED)
    weights["lm_head.weight"] *= 30
    trainer = Trainer(UNTIED, weights)
    upstream = np.array([[0, 1, -2, 0.5, 0], [3, 0, 0, -1, 0.25]], dtype=np.float32)
    found = trainer.space.views(trainer.gradient_of(TOKENS, TARGETS, upstream))["lm_head.weight"]
    exact = reference.as_type(weights, np.float64)
    losses = reference_losses(UNTIED, exact)
    assert trainer.losses(TOKENS, TARGETS) == pytest.approx(losses, rel=1e-5, abs=1e-5)

    def weighed(matrix):
        return (reference_losses(UNTIED, exact | {"lm_head.weight": matrix}) * upstream).sum()

    direction = np.random.default_rng(2).standard_normal(found.shape)
    matrix = exact["lm_head.weight"]
    numeric = weighed(matrix + STEP * direction) - weighed(matrix - STEP * direction)
    error = abs((found * direction).sum() - numeric / (2 * STEP))
    assert error < RELATIVE_ERROR * np.linalg.norm(found)


def test_gradients_of_the_last_layers_are_computed_first():
    """The runtime takes results from the last node on; whatever waits holds what it needs."""
    nodes = build_gradient_graph(UNTIED, batch=2, time=5).graph.node
    results = [name for node in nodes for name in node.output]
    assert results.index("h.0.attn.c_attn.weight.grad") < results.index("h.1.ln_1.weight.grad")
    assert results.index("h.1.ln_1.weight.grad") < results.index("h.1.mlp.c_proj.weight.grad")
    used = {name for node in nodes for name in node.input}
    first = min(i for i, node in enumerate(nodes) if used.isdisjoint(node.output))
    assert all(used.isdisjoint(node.output) for node in nodes[first:])


def test_graph_sizes_are_checked():
    with pytest.raises(ValueError, match="time 8"):
        build_gradient_graph(TIED, batch=1, time=8)
    with pytest.raises(ValueError, match="batch 0"):
        build_forward_graph(TIED, batch=0, time=1)
    with pytest.raises(ValueError, match="contiguous"):
        build_forward_graph(TIED, batch=1, time=1, blocks=range(1, 3))


# --- The trainer -------------------------------------------------------------------------------


def test_a_small_batch_is_learnt_by_heart():
    config = GPT2Config(vocab_size=64, n_ctx=16, n_embd=32, n_layer=2, n_head=4)
    trainer = Trainer(config, random_weights(config, 1), optimizer=AdamWSettings(weight_decay=0))
    text = np.random.default_rng(2).integers(64, size=200)
    tokens, targets = next(batches(text, batch=4, time=16, rng=np.random.default_rng(3)))
    first = trainer.loss(tokens, targets)
    assert first == pytest.approx(math.log(64), abs=0.1)  # a fresh model knows nothing
    for _ in range(100):
        _, gradient = trainer.gradients((tokens, targets))
        trainer.apply(gradient, learning_rate=5e-3)
    assert trainer.loss(tokens, targets) < first / 20


def trained(thread_count=1):
    config = GPT2Config(vocab_size=64, n_ctx=32, n_embd=32, n_layer=2, n_head=4)
    trainer = Trainer(config, random_weights(config, 1), thread_count=thread_count)
    text = np.random.default_rng(2).integers(64, size=500)
    stream = batches(text, batch=4, time=32, rng=np.random.default_rng(3))
    losses = []
    for _, (tokens, targets) in zip(range(5), stream, strict=False):
        loss, gradient = trainer.gradients((tokens, targets))
        trainer.apply(gradient)
        losses.append(loss)
    return losses, trainer.parameters


@pytest.mark.parametrize("thread_count", [1, 2])
def test_equal_runs_give_equal_bits(thread_count):
    losses, parameters = trained(thread_count)
    again, parameters_again = trained(thread_count)
    assert losses == again
    assert parameters.tobytes() == parameters_again.tobytes()


def test_a_gradient_belongs_to_the_caller():
    trainer = Trainer(TIED, lively_weights(TIED))
    _, first = trainer.gradients((TOKENS, TARGETS))
    kept = first.copy()
    trainer.gradients((TARGETS, TOKENS))
    trainer.apply(first)
    assert np.array_equal(first, kept)


def test_weights_come_in_and_go_out_as_copies():
    weights = lively_weights(TIED)
    before = {name: values.copy() for name, values in weights.items()}
    trainer = Trainer(TIED, weights)
    given_out = trainer.weights()
    _, gradient = trainer.gradients((TOKENS, TARGETS))
    trainer.apply(gradient)
    for name, values in before.items():
        assert np.array_equal(weights[name], values)
        assert np.array_equal(given_out[name], values)
        assert not np.array_equal(trainer.weights()[name], values)


def test_writing_parameters_moves_the_model():
    trainer = Trainer(TIED, lively_weights(TIED, seed=5))
    other = Trainer(TIED, lively_weights(TIED, seed=6))
    assert trainer.loss(TOKENS, TARGETS) != other.loss(TOKENS, TARGETS)
    trainer.parameters[:] = other.parameters
    assert trainer.loss(TOKENS, TARGETS) == other.loss(TOKENS, TARGETS)


def test_graphs_of_many_shapes_do_not_pile_up():
    trainer = Trainer(TIED, lively_weights(TIED))
    for time in (1, 2, 3, 4, 5, 1):
        for _ in range(2):
            trainer.loss(TOKENS[:, :time], TARGETS[:, :time])
    assert len(trainer._graphs._open) == OPEN_SHAPE_COUNT_MAX


@pytest.mark.parametrize(
    ("tokens", "targets", "problem"),
    [
        (TOKENS, TARGETS[:, :-1], "targets"),
        (TOKENS[0], TARGETS[0], r"tokens int64 \(5,\)"),
        (TOKENS.astype(np.float32), TARGETS, "tokens float32"),
        (TOKENS - 1, TARGETS, "tokens holds ids outside of 0..12"),
        (TOKENS, TARGETS + 1, "targets holds ids outside of 0..12"),
        (TOKENS.repeat(2, axis=1), TARGETS.repeat(2, axis=1), "time 10"),
        (TOKENS[:, :0], TARGETS[:, :0], "time 0"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tokens, targets, problem):
    trainer = Trainer(TIED, lively_weights(TIED))
    with pytest.raises(ValueError, match=problem):
        trainer.gradients((tokens, targets))


def test_weights_that_do_not_fit_are_refused():
    weights = lively_weights(TIED)
    with pytest.raises(ValueError, match="wte"):
        Trainer(TIED, {name: values for name, values in weights.items() if name != "wte.weight"})
    with pytest.raises(ValueError, match="lm_head"):
        Trainer(TIED, lively_weights(UNTIED))
    with pytest.raises(ValueError, match="expected"):
        Trainer(TIED, weights).apply(np.zeros(3, dtype=np.float32))


# --- AdamW -------------------------------------------------------------------------------------

# A matrix that takes more than one chunk, and a bias.
SPACE = ParameterSpace.of({"weight": (3, CHUNK_VALUE_COUNT // 2), "bias": (5,)})


def plain_adamw(theta, gradients, settings, rates):
    """Return parameters after AdamW as the paper writes it, in float64."""
    theta = theta.astype(np.float64)
    mean, mean_square = np.zeros_like(theta), np.zeros_like(theta)
    decay = SPACE.flatten({"weight": np.ones((3, CHUNK_VALUE_COUNT // 2)), "bias": np.zeros(5)})
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = gradient.astype(np.float64)
        g = g * min(1, settings.gradient_norm_max / np.linalg.norm(g))
        mean = settings.beta1 * mean + (1 - settings.beta1) * g
        mean_square = settings.beta2 * mean_square + (1 - settings.beta2) * g**2
        unbiased = mean / (1 - settings.beta1**step)
        unbiased_square = mean_square / (1 - settings.beta2**step)
        theta = theta - rate * settings.weight_decay * decay * theta
        theta = theta - rate * unbiased / (np.sqrt(unbiased_square) + settings.epsilon)
    return theta


@pytest.mark.parametrize("norm_max", [1.0, math.inf])
def test_adamw_is_its_formula(norm_max):
    rng = np.random.default_rng(4)
    settings = AdamWSettings(gradient_norm_max=norm_max, weight_decay=0.2)
    start = rng.standard_normal(SPACE.size).astype(np.float32)
    gradients = [rng.standard_normal(SPACE.size).astype(np.float32) * s for s in (1e-3, 1, 10, 1)]
    rates = [1e-2, 1e-3, 1e-2, 1e-2]
    parameters = start.copy()
    optimizer = AdamW(SPACE, settings)
    for gradient, rate in zip(gradients, rates, strict=True):
        norm = optimizer.update(parameters, gradient, learning_rate=rate)
        assert norm == pytest.approx(np.linalg.norm(gradient.astype(np.float64)), rel=1e-6)
    expected = plain_adamw(start, gradients, settings, rates)
    moved = np.linalg.norm(expected - start)
    assert np.linalg.norm(parameters - expected) < 1e-5 * moved


def test_threads_do_not_change_a_bit():
    rng = np.random.default_rng(6)
    start = rng.standard_normal(SPACE.size).astype(np.float32)
    gradients = rng.standard_normal((2, SPACE.size)).astype(np.float32)
    results = []
    for thread_count in (1, 2, 3):
        parameters = start.copy()
        optimizer = AdamW(SPACE, AdamWSettings(), thread_count=thread_count)
        norms = [optimizer.update(parameters, gradient) for gradient in gradients]
        results.append((norms, parameters.tobytes()))
    assert results[0] == results[1] == results[2]


def test_only_matrices_decay():
    parameters = np.ones(SPACE.size, dtype=np.float32)
    optimizer = AdamW(SPACE, AdamWSettings(learning_rate=0.1, weight_decay=0.5))
    optimizer.update(parameters, np.zeros(SPACE.size, dtype=np.float32))
    views = SPACE.views(parameters)
    assert np.all(views["bias"] == 1)
    assert np.all(views["weight"] == np.float32(0.95))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    trainer, untouched = (Trainer(TIED, lively_weights(TIED)) for _ in range(2))
    _, gradient = trainer.gradients((TOKENS, TARGETS))
    spoilt = gradient.copy()
    spoilt[100] = value
    with pytest.raises(LearningFailed, match="NaN or infinity"):
        trainer.apply(spoilt)
    trainer.apply(gradient)
    untouched.apply(gradient)
    assert trainer.parameters.tobytes() == untouched.parameters.tobytes()


@pytest.mark.parametrize(
    "values",
    [{"beta1": 1.0}, {"beta2": -0.1}, {"learning_rate": 0}, {"weight_decay": -1}],
)
def test_settings_are_checked(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        AdamWSettings(**values)


# --- Batches -----------------------------------------------------------------------------------


def test_targets_are_the_tokens_that_follow():
    text = np.arange(100, 120, dtype=np.uint16)
    stream = batches(text, batch=500, time=4, rng=np.random.default_rng(1))
    tokens, targets = next(stream)
    assert tokens.shape == targets.shape == (500, 4)
    assert tokens.dtype == targets.dtype == np.int64
    assert np.array_equal(tokens + 1, targets)
    # Windows start anywhere, up to the one that ends with the text.
    assert set(tokens[:, 0]) == set(range(100, 116))
    assert not np.array_equal(tokens, next(stream)[0])


def test_a_seed_repeats_the_batches():
    text = np.arange(1000)
    first, again = (
        next(batches(text, batch=3, time=5, rng=np.random.default_rng(7)))[0] for _ in range(2)
    )
    assert np.array_equal(first, again)


def test_a_text_that_is_too_short_is_refused():
    assert next(batches(np.arange(5), batch=1, time=4, rng=np.random.default_rng(1)))
    with pytest.raises(ValueError, match="4 tokens"):
        next(batches(np.arange(4), batch=1, time=4, rng=np.random.default_rng(1)))
