"""The reference is the oracle of all other tests, so it is checked against what is not NumPy code:
numbers worked out by hand, a second implementation in scalar Python, and properties of GPT-2.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmload import reference
from llmload.config import GPT2Config
from llmload.weights import random_weights


@pytest.fixture(scope="module")
def exact(weights):
    return reference.as_type(weights, np.float64)


def some_tokens(config, batch, time, seed=5):
    print(f"token seed {seed}")
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, time))


def test_gelu_new_and_softmax_by_hand():
    # 0.5 (1 + tanh(0.7978845608 * 1.044715)) = 0.5 (1 + 0.6823839...) from a table of tanh.
    assert reference.gelu_new(np.float64([0, 1, -1])) == pytest.approx([0, 0.841192, -0.158808])
    assert reference.gelu_new(np.float64([40, -40])) == pytest.approx([40, 0])
    shares = reference.softmax(np.log(np.float64([[1, 2, 5], [7, 7, 7]])))
    assert shares == pytest.approx(np.float64([[0.125, 0.25, 0.625], [1 / 3, 1 / 3, 1 / 3]]))
    assert reference.softmax(np.float64([1000.0, -np.inf])).tolist() == [1, 0]


def test_two_channels_by_hand():
    """With blocks that add nothing, GPT-2 is: embed, norm, compare with the embedding."""
    config = GPT2Config(
        vocab_size=3, n_ctx=2, n_embd=2, n_layer=1, n_head=1, layer_norm_epsilon=0.75
    )
    weights = {
        name: np.zeros_like(values) if name.startswith("h.") else values
        for name, values in random_weights(config, 0).items()
    }
    weights["wte.weight"] = np.float32([[0, 0], [3, 0], [0, 5]])
    weights["wpe.weight"] = np.float32([[0, 0], [0, 2]])
    weights["ln_f.weight"] = np.float32([1, 10])
    weights["ln_f.bias"] = np.float32([0.5, 0])
    # Position 0, token 1: x = (3, 0), mean 1.5, variance 2.25, + 0.75 = 3: (+-1.5) / sqrt(3).
    # Position 1, token 1: x = (3, 2), mean 2.5, variance 0.25, + 0.75 = 1: (+-0.5).
    u = 1.5 / math.sqrt(3)
    expected = [
        [0, 3 * (u + 0.5), 5 * -10 * u],
        [0, 3 * (0.5 + 0.5), 5 * -10 * 0.5],
    ]
    logits, _ = reference.forward(config, weights, np.array([[1, 1]]))
    assert logits[0] == pytest.approx(np.array(expected))


def test_attention_averages_by_hand():
    """Equal scores make attention the running mean of the values."""
    config = GPT2Config(vocab_size=2, n_ctx=4, n_embd=2, n_layer=1, n_head=2)
    identity = np.eye(2)
    weights = {
        "a.c_attn.weight": np.concatenate([0 * identity, identity, identity], axis=1),
        "a.c_attn.bias": np.zeros(6),
        "a.c_proj.weight": 2 * identity,
        "a.c_proj.bias": np.array([0.0, 1.0]),
    }
    x = np.array([[[1.0, 0.0], [3.0, 6.0], [2.0, -3.0]]])
    y, _ = reference.attention(config, weights, "a", x)
    assert y[0] == pytest.approx(np.array([[2, 1], [4, 7], [4, 3]]))


def scalar_gpt2(config, weights, tokens):
    """GPT-2 without a cache in plain Python floats, position by position, written separately."""
    w = {name: values.tolist() for name, values in weights.items()}
    width, head_size = config.n_embd, config.n_embd // config.n_head

    def norm(vector, name):
        mean = sum(vector) / width
        variance = sum((value - mean) ** 2 for value in vector) / width
        deviation = math.sqrt(variance + config.layer_norm_epsilon)
        scale, shift = w[name + ".weight"], w[name + ".bias"]
        return [(vector[i] - mean) / deviation * scale[i] + shift[i] for i in range(width)]

    def affine(vector, name):
        matrix, bias = w[name + ".weight"], w[name + ".bias"]
        return [
            bias[j] + sum(vector[i] * matrix[i][j] for i in range(len(vector)))
            for j in range(len(bias))
        ]

    def gelu(z):
        return z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    stream = [
        [a + b for a, b in zip(w["wte.weight"][token], w["wpe.weight"][place], strict=True)]
        for place, token in enumerate(tokens)
    ]
    for layer in range(config.n_layer):
        qkv = [affine(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn") for x in stream]
        for place in range(len(tokens)):
            collected = []
            for first in range(0, width, head_size):
                channels = range(first, first + head_size)
                scores = [
                    sum(qkv[place][c] * qkv[j][width + c] for c in channels) / head_size**0.5
                    for j in range(place + 1)
                ]
                powers = [math.exp(score) for score in scores]
                for c in channels:
                    mixed = sum(p * qkv[j][2 * width + c] for j, p in enumerate(powers))
                    collected.append(mixed / sum(powers))
            added = affine(collected, f"h.{layer}.attn.c_proj")
            stream[place] = [a + b for a, b in zip(stream[place], added, strict=True)]
            hidden = affine(norm(stream[place], f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
            added = affine([gelu(z) for z in hidden], f"h.{layer}.mlp.c_proj")
            stream[place] = [a + b for a, b in zip(stream[place], added, strict=True)]
    rows = w[config.lm_head_name]
    return [
        [sum(a * b for a, b in zip(norm(x, "ln_f"), row, strict=True)) for row in rows]
        for x in stream
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_equals_a_scalar_implementation(trained_looking_weights, tied):
    config = GPT2Config(
        vocab_size=11, n_ctx=8, n_embd=12, n_layer=2, n_head=3, tie_word_embeddings=tied
    )
    weights = reference.as_type(trained_looking_weights(config, seed=6), np.float64)
    tokens = some_tokens(config, 1, 8)
    logits, _ = reference.forward(config, weights, tokens)
    assert logits[0] == pytest.approx(np.array(scalar_gpt2(config, weights, tokens[0])), abs=1e-10)


def test_nobody_looks_into_the_future(config, exact):
    tokens = some_tokens(config, 1, 10)
    logits, _ = reference.forward(config, exact, tokens)
    for changed in range(10):
        other = tokens.copy()
        other[0, changed] = (other[0, changed] + 1) % config.vocab_size
        changed_logits, _ = reference.forward(config, exact, other)
        np.testing.assert_array_equal(changed_logits[:, :changed], logits[:, :changed])
        assert abs(changed_logits[:, changed:] - logits[:, changed:]).max(axis=-1).min() > 1e-3


def test_cache_changes_nothing(config, exact):
    tokens = some_tokens(config, 2, 12)
    whole, whole_cache = reference.forward(config, exact, tokens)
    cache, parts = None, []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 12)]:  # prefill, decode twice, a chunk
        logits, cache = reference.forward(config, exact, tokens[:, start:stop], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-12)
    for (key, value), (whole_key, whole_value) in zip(cache, whole_cache, strict=True):
        np.testing.assert_allclose(key, whole_key, rtol=0, atol=1e-12)
        np.testing.assert_allclose(value, whole_value, rtol=0, atol=1e-12)


def test_sequences_of_a_batch_do_not_meet(config, exact):
    tokens = some_tokens(config, 3, 6)
    together, _ = reference.forward(config, exact, tokens)
    for row in range(3):
        alone, _ = reference.forward(config, exact, tokens[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=1e-12)


def test_order_matters(config, exact):
    tokens = some_tokens(config, 1, 6)
    logits, _ = reference.forward(config, exact, tokens)
    swapped, _ = reference.forward(config, exact, tokens[:, [1, 0, 2, 3, 4, 5]])
    assert abs(logits[0, -1] - swapped[0, -1]).max() > 1e-3


def test_float32_is_near_float64(config, weights, exact):
    tokens = some_tokens(config, 1, 40)
    rounded, _ = reference.forward(config, weights, tokens)
    logits, _ = reference.forward(config, exact, tokens)
    assert rounded.dtype == np.float32
    assert logits.dtype == np.float64
    assert abs(rounded - logits).max() < 1e-4
    assert logits.std() > 0.3  # or the comparison would say nothing


def test_the_context_ends(config, exact):
    tokens = some_tokens(config, 1, config.n_ctx)
    _, cache = reference.forward(config, exact, tokens)
    with pytest.raises(ValueError, match="beyond the context of 96"):
        reference.forward(config, exact, tokens[:, :1], cache)
