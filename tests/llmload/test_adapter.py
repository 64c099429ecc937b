"""Adapters: gradients against differences, beside the base as merged into it, files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llmload import reference
from llmload.adapter import (
    LAYERS,
    Adapter,
    AdapterSettings,
    adapter_shapes,
    fresh_adapter,
    load_adapter,
    merged,
    save_adapter,
)
from llmload.config import GPT2Config
from llmload.errors import ModelFolderError
from llmload.graph import head
from llmload.graph.quantize import EMBEDDING_BITS, bits_of, dequantize, quantize
from llmload.learn.trainer import Trainer
from llmload.weights import random_weights

CONFIG = GPT2Config(vocab_size=13, n_ctx=7, n_embd=8, n_layer=2, n_head=2)
BASE = "0" * 64
TOKENS = np.array([[3, 1, 3, 3, 12], [0, 1, 12, 5, 0]])
TARGETS = np.array([[1, 3, 3, 12, 7], [1, 12, 5, 0, 3]])
STEP = 1e-5


def lively_weights(seed=5):
    """Return weights without the zeros and ones of a fresh model, which would hide mistakes."""
    rng = np.random.default_rng(seed)
    return {
        name: (values + 0.3 * rng.standard_normal(values.shape)).astype(np.float32)
        for name, values in random_weights(CONFIG, seed).items()
    }


def lively_adapter(settings, seed=6, config=CONFIG):
    rng = np.random.default_rng(seed)
    return Adapter(
        settings,
        {
            name: rng.standard_normal(shape).astype(np.float32) / 4
            for name, shape in adapter_shapes(config, settings).items()
        },
    )


def exact_loss(weights, adapter):
    """Return the loss with the adapter merged, by the NumPy reference in float64."""
    whole = reference.as_type(merged(weights, adapter), np.float64)
    logits, _ = reference.forward(CONFIG, whole, TOKENS)
    largest = logits.max(axis=-1, keepdims=True)
    log_sums = largest[..., 0] + np.log(np.exp(logits - largest).sum(axis=-1))
    return (log_sums - np.take_along_axis(logits, TARGETS[..., None], axis=-1)[..., 0]).mean()


@pytest.mark.parametrize("recompute", [None, 1])
@pytest.mark.parametrize("layers", [LAYERS, ("attn.c_attn",), ("mlp.c_proj", "attn.c_proj")])
def test_gradients_are_the_differences_of_the_merged_model(layers, recompute):
    settings = AdapterSettings(rank=3, alpha=2.0, layers=layers)
    weights, adapter = lively_weights(), lively_adapter(settings)
    trainer = Trainer(CONFIG, weights, adapter=adapter, recompute=recompute)
    loss, gradient = trainer.gradients((TOKENS, TARGETS))
    exact = reference.as_type(weights, np.float64)
    tensors = reference.as_type(adapter.tensors, np.float64)
    assert loss == pytest.approx(exact_loss(exact, Adapter(settings, tensors)), rel=1e-6)
    views = trainer.space.views(gradient)
    assert views.keys() == adapter.tensors.keys()
    rng = np.random.default_rng(1)
    for name, analytic in views.items():
        # One random direction meets every coordinate.
        direction = rng.standard_normal(analytic.shape)
        above, below = (
            exact_loss(exact, Adapter(settings, tensors | {name: tensors[name] + step * direction}))
            for step in (STEP, -STEP)
        )
        error = abs((analytic * direction).sum() - (above - below) / (2 * STEP))
        assert error < 1e-4 * np.linalg.norm(analytic), name


def test_beside_the_base_is_as_merged_into_it():
    adapter = lively_adapter(AdapterSettings(rank=2))
    weights = lively_weights()
    beside = Trainer(CONFIG, weights, adapter=adapter).losses(TOKENS, TARGETS)
    inside = Trainer(CONFIG, merged(weights, adapter)).losses(TOKENS, TARGETS)
    assert beside == pytest.approx(inside, rel=1e-5)
    without = Trainer(CONFIG, weights).losses(TOKENS, TARGETS)
    assert abs(beside - without).max() > 0.1


@pytest.mark.parametrize("recompute", [None, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_gradients_over_a_quantised_base_are_those_over_what_it_stands_for(
    precision, tied, recompute, monkeypatch
):
    monkeypatch.setattr(head, "PIECE_SIZE", 5)
    # Wider than a group of weights with one scale, and no multiple of it.
    config = GPT2Config(
        vocab_size=13, n_ctx=7, n_embd=132, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    settings = AdapterSettings(rank=2)
    weights, adapter = random_weights(config, 1), lively_adapter(settings, config=config)
    rounded = dict(weights)
    for name in weights:
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            rounded[name] = through_bits(weights[name].T, bits_of(precision)).T
    # Tied embeddings have 8 bits where they are looked up, and those of the matrices as output.
    rounded["wte.weight"] = through_bits(weights["wte.weight"], EMBEDDING_BITS)
    rounded["lm_head.weight"] = through_bits(weights[config.lm_head_name], bits_of(precision))
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    expected = Trainer(untied, rounded, adapter=adapter)
    found = Trainer(config, weights, adapter=adapter, precision=precision, recompute=recompute)
    loss, gradient = found.gradients((TOKENS, TARGETS))
    expected_loss, expected_gradient = expected.gradients((TOKENS, TARGETS))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    difference = np.linalg.norm(gradient - expected_gradient)
    assert difference < 1e-4 * np.linalg.norm(expected_gradient)
    assert found.loss(TOKENS, TARGETS) == pytest.approx(loss, rel=1e-6)


def through_bits(matrix, bits):
    """Return what a matrix (out, in) is after it was quantised."""
    return dequantize(*quantize(matrix, bits), bits, matrix.shape[1])


def test_a_model_is_not_trained_in_few_bits():
    with pytest.raises(ValueError, match="int8"):
        Trainer(CONFIG, lively_weights(), precision="int8")


def test_a_fresh_adapter_changes_nothing_and_learns():
    weights = lively_weights()
    before = {name: values.copy() for name, values in weights.items()}
    trainer = Trainer(CONFIG, weights, adapter=fresh_adapter(CONFIG, AdapterSettings(rank=4)))
    first = trainer.loss(TOKENS, TARGETS)
    assert first == pytest.approx(Trainer(CONFIG, weights).loss(TOKENS, TARGETS), rel=1e-6)
    for _ in range(60):
        trainer.step([(TOKENS, TARGETS)], learning_rate=1e-2)
    assert trainer.loss(TOKENS, TARGETS) < first / 2
    for name, values in before.items():  # the base is as it was
        assert np.array_equal(weights[name], values)
    learned = Trainer(CONFIG, merged(weights, trainer.adapter)).loss(TOKENS, TARGETS)
    assert learned == pytest.approx(trainer.loss(TOKENS, TARGETS), rel=1e-4)
    trainer.parameters[:] = trainer.reference(weights)
    assert trainer.loss(TOKENS, TARGETS) == pytest.approx(first, rel=1e-6)


def test_all_begin_with_the_same_values():
    settings = AdapterSettings(rank=4)
    one, other = fresh_adapter(CONFIG, settings), fresh_adapter(CONFIG, settings)
    for name, values in one.tensors.items():
        assert np.array_equal(values, other.tensors[name])
        assert values.any() != name.endswith("lora_B")


def test_learners_of_other_adapters_are_told_apart():
    shapes = [
        AdapterSettings(rank=4),
        AdapterSettings(rank=8),
        AdapterSettings(rank=4, alpha=4),
        AdapterSettings(rank=4, layers=("attn.c_attn",)),
    ]
    names = {settings.identity(base) for settings in shapes for base in (BASE, "1" * 64)}
    assert len(names) == 8


# --- Files -------------------------------------------------------------------------------------


def test_a_file_gives_the_adapter_back(tmp_path):
    adapter = lively_adapter(AdapterSettings(rank=2, alpha=3.0, layers=("attn.c_attn",)))
    file = tmp_path / "new" / "adapter.safetensors"
    save_adapter(file, adapter, base=BASE)
    found = load_adapter(file, CONFIG, base=BASE)
    assert found.settings == adapter.settings
    for name, values in adapter.tensors.items():
        assert np.array_equal(found.tensors[name], values)
    # As PEFT names and shapes them.
    stored = load_file(file)
    prefix = "base_model.model.transformer.h.1.attn.c_attn"
    assert stored[f"{prefix}.lora_A.weight"].shape == (2, 8)
    assert stored[f"{prefix}.lora_B.weight"].shape == (24, 2)


def rewritten(file, *, change_tensors=None, change_facts=None):
    """Write a damaged copy of an adapter in its place."""
    with safe_open(file, framework="numpy") as stored:
        facts = stored.metadata()
    tensors = load_file(file)
    if change_tensors:
        change_tensors(tensors)
    if change_facts:
        change_facts(facts)
    save_file(tensors, file, metadata=facts)


def set_fields(**fields):
    def change(facts):
        facts["adapter"] = json.dumps(json.loads(facts["adapter"]) | fields)

    return change


def spoil(tensors):
    next(iter(tensors.values()))[0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"change_facts": lambda facts: facts.pop("adapter")}, "does not say what adapter"),
        ({"change_facts": lambda facts: facts.update(adapter="[")}, "does not say what adapter"),
        ({"change_facts": set_fields(rank=0)}, "does not say what adapter"),
        ({"change_facts": set_fields(rank=10**9)}, "does not say what adapter"),
        ({"change_facts": set_fields(layers=["wte"])}, "does not say what adapter"),
        ({"change_facts": set_fields(more=1)}, "does not say what adapter"),
        ({"change_facts": set_fields(rank=3)}, "do not fit"),
        ({"change_facts": lambda facts: facts.update(base="x")}, "another model"),
        ({"change_tensors": lambda tensors: tensors.popitem()}, "do not fit"),
        ({"change_tensors": spoil}, "not finite"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, problem):
    file = tmp_path / "adapter.safetensors"
    save_adapter(file, lively_adapter(AdapterSettings(rank=2)), base=BASE)
    rewritten(file, **change)
    with pytest.raises(ModelFolderError, match=problem):
        load_adapter(file, CONFIG, base=BASE)


def test_what_can_not_be_read_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match="can't be read"):
        load_adapter(tmp_path / "missing.safetensors", CONFIG, base=BASE)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(b"no safetensors")
    with pytest.raises(ModelFolderError, match="can't be read"):
        load_adapter(file, CONFIG, base=BASE)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"rank": 2, "alpha": 0}, "alpha"),
        ({"rank": 2, "layers": ()}, "layers"),
        ({"rank": 2, "layers": ("wte",)}, "layers"),
        ({"rank": 2, "layers": ("attn.c_attn", "attn.c_attn")}, "layers"),
    ],
)
def test_settings_are_checked(wrong, problem):
    with pytest.raises(ValueError, match=problem):
        AdapterSettings(**wrong)
