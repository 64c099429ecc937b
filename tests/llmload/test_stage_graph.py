"""Every form of a stage computes what the reference computes: cut anywhere, in any batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmload import reference
from llmload.config import GPT2Config, parameter_shapes
from llmload.engine.session import BatchStep, StageEngine
from llmload.graph.quantize import dequantize, quantize, stored_tensors, stored_types
from llmload.graph.stage import ATTENTION_FORMS, build_stage_graph

TOLERANCE = 2e-5  # float32 against float32; measured 3e-6, with logits up to 4

SPLITS = [
    [range(3)],
    [range(1), range(1, 3)],
    [range(2), range(2, 3)],
    [range(1), range(1, 2), range(2, 3)],
]


def run_stages(stages, caches, x, logits_count):
    for stage, cache in zip(stages, caches, strict=True):
        x = stage.run(x, cache, logits_count=logits_count)
    return x


@pytest.mark.parametrize(
    ("split", "attention"),
    [*((split, "grouped") for split in SPLITS), *((SPLITS[2], f) for f in ATTENTION_FORMS[1:])],
    ids=str,
)
def test_stages_equal_the_reference(config, weights, split, attention):
    """Prefill, decode and a chunk, for a batch of two: logits of every position."""
    rng = np.random.default_rng(1)
    stages = [StageEngine(config, weights, blocks, attention=attention) for blocks in split]
    caches = [stage.new_cache(batch=2) for stage in stages]
    past = None
    for time in (9, 1, 1, 4, 1):
        tokens = rng.integers(0, config.vocab_size, (2, time))
        expected, past = reference.forward(config, weights, tokens, past)
        actual = run_stages(stages, caches, tokens, logits_count=time)
        assert actual.shape == expected.shape
        assert abs(actual - expected).max() < TOLERANCE
    held = [array for cache in caches for array in cache.arrays]
    for actual, expected in zip(held, [array for pair in past for array in pair], strict=True):
        assert abs(actual - expected).max() < TOLERANCE


@pytest.mark.parametrize("attention", ATTENTION_FORMS)
def test_sequences_at_different_positions_share_a_step(config, weights, attention):
    """Some decode, some prefill, some wait, one takes back a guess; each is as if alone."""
    rng = np.random.default_rng(2)
    stages = [StageEngine(config, weights, b, attention=attention) for b in (range(2), range(2, 3))]
    arenas = [stage.new_arena(4) for stage in stages]
    caches = [[arena.new_cache() for arena in arenas] for _ in range(4)]
    histories = [[] for _ in range(4)]
    for counts in (
        [5, 3, 0, 7],
        [1, 1, 0, 1],
        [0, 2, 4, 1],
        [1, 1, 1, 1],
        [0, 4, 0, 0],
        [3, 1, 2, 0],
    ):
        new = {i: list(rng.integers(0, 300, n)) for i, n in enumerate(counts) if n}
        rows = [np.array(ids) for ids in new.values()]
        for stage_index, stage in enumerate(stages):
            steps = [
                BatchStep(x, caches[i][stage_index], logits_count=2)
                for i, x in zip(new, rows, strict=True)
            ]
            rows = stage.run_batch(steps)
        for i, logits in zip(new, rows, strict=True):
            histories[i] += new[i]
            expected, _ = reference.forward(config, weights, np.array([histories[i]]))
            assert abs(logits - expected[0, -min(2, len(new[i])) :]).max() < TOLERANCE
            if len(new[i]) == 4:
                del histories[i][-3:]
                for cache in caches[i]:
                    cache.truncate(len(histories[i]))


@pytest.mark.parametrize(
    "shape",
    [
        {"n_head": 1},
        {"n_head": 32},
        {"n_layer": 1},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
def test_other_shapes_equal_the_reference(trained_looking_weights, shape):
    fields = {"vocab_size": 60, "n_ctx": 20, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**fields | shape)
    weights = trained_looking_weights(config, seed=2)
    tokens = np.random.default_rng(2).integers(0, 60, (1, 20))
    engine = StageEngine(config, weights)
    actual = engine.run(tokens, engine.new_cache(), logits_count=20)
    expected, _ = reference.forward(config, weights, tokens)
    assert abs(actual - expected).max() < TOLERANCE


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_values_are_the_nearest(bits):
    matrix = np.random.default_rng(3).standard_normal((5, 170), dtype=np.float32)
    matrix[2] = 0
    values, scales = quantize(matrix, bits)
    assert values.shape == (5, 2, 16 * bits)  # filled up to blocks of 128
    error = abs(dequantize(values, scales, bits, 170) - matrix)
    # Half a step, but for the end of the range that has one value less.
    steps = abs(scales).repeat(128, axis=1)[:, :170]
    assert (error <= 1.001 * steps).all()
    assert np.median(error / np.maximum(steps, 1e-9)) < 0.3
    assert (error[2] == 0).all()


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_stages_equal_the_reference_with_the_same_weights(
    trained_looking_weights, precision, bits, tied
):
    """What is lost is what is lost by rounding the weights, and by activations in 8 bits."""
    fields = {"vocab_size": 60, "n_ctx": 20, "n_embd": 48, "n_layer": 2, "n_head": 3}
    config = GPT2Config(**fields, tie_word_embeddings=tied)
    weights = trained_looking_weights(config, seed=2)
    rounded = dict(weights)
    for name, array in weights.items():
        if name.startswith("h.") and array.ndim == 2:
            rounded[name] = dequantize(*quantize(array.T, bits), bits, array.shape[0]).T
    head = weights[config.lm_head_name]
    rounded_head = {config.lm_head_name: dequantize(*quantize(head, bits), bits, 48)}
    tokens = np.random.default_rng(2).integers(0, 60, (1, 20))
    wte = dequantize(*quantize(weights["wte.weight"], 8), 8, 48)
    x = reference.embed(config, weights | {"wte.weight": wte}, tokens, 0)
    for index in config.blocks:
        x, _ = reference.block(config, rounded, index, x)
    expected = reference.next_token_logits(config, rounded | rounded_head, x)
    for split in ([range(2)], [range(1), range(1, 2)]):
        stages = [StageEngine(config, weights, blocks, precision=precision) for blocks in split]
        caches = [stage.new_cache() for stage in stages]
        actual = run_stages(stages, caches, tokens, logits_count=20)
        error = abs(actual - expected).max() / np.abs(expected).max()
        assert error < 0.04  # activations of 8 bits; measured 0.01


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", TOLERANCE), ("int8", 0.1), ("int4", 0.1)]
)
def test_replay_in_one_piece_gives_what_decoding_gave(config, weights, precision, tolerance):
    tokens = np.random.default_rng(5).integers(0, 300, (1, 12))
    engine = StageEngine(config, weights, precision=precision)
    whole = engine.run(tokens, engine.new_cache(), logits_count=12)
    cache = engine.new_cache()
    single = [engine.run(tokens[:, i : i + 1], cache) for i in range(12)]
    assert abs(np.concatenate(single, axis=1) - whole).max() < tolerance  # logits up to 4


def test_stored_types_are_those_of_the_stored_tensors(config, weights):
    for blocks, precision in itertools.product(
        (range(3), range(1), range(1, 3)), ("float32", "int8", "int4")
    ):
        stored = dict(stored_tensors(config, blocks, precision, weights.__getitem__))
        types = stored_types(config, blocks, precision)
        assert {n: (a.shape, a.dtype) for n, a in stored.items()} == types
        graph = build_stage_graph(config, blocks, precision=precision).graph
        external = {t.name for t in graph.initializer if t.external_data}
        assert external == set(types)
        if precision == "float32":
            assert set(types) == set(parameter_shapes(config, blocks))


def test_graph_carries_no_weights(config):
    assert build_stage_graph(config, range(1, 3)).ByteSize() < 50_000
    with pytest.raises(ValueError, match="no contiguous part"):
        build_stage_graph(config, range(2, 5))
