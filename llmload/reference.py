"""GPT-2 in NumPy: the definition of what is right.

Graphs and engines of this package are fast; this file is slow and readable, and every one of them
is tested against it. It computes in the type of the weights it is given: float32 to compare with a
graph, float64 to know which of two float32 results is closer (`as_type` converts).

A GPT-2 reads token ids and says, at every position, which token may come next:

    token ids --wte + wpe--> x --block 0--> x --block 1--> ... x --ln_f, wte^T--> logits

`x` is the residual stream, one vector of `n_embd` numbers a position. A block only ever adds to it,
twice: once what attention has collected from earlier positions, once what the MLP makes of the
position by itself.

Shapes: b batch, t new positions, s positions in the cache plus new ones, h n_head, d head_size,
c n_embd = h * d, v vocab_size. Everything is (..., c) except inside of attention.

Source: Radford et al. 2019, and its code https://github.com/openai/gpt-2/blob/master/src/model.py,
which this file follows in names, order and constants.

This file does not know ONNX, and of a cache only that it is a list of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmload.config import GPT2Config

__all__ = [
    "Cache",
    "as_type",
    "attention",
    "block",
    "embed",
    "forward",
    "gelu_new",
    "generate_greedily",
    "layer_norm",
    "linear",
    "mlp",
    "next_token_logits",
    "softmax",
]

Array: TypeAlias = NDArray[np.floating[Any]]
Parameters: TypeAlias = Mapping[str, Array]
# Keys and values of every block so far: for each a pair of (b, h, s, d).
Cache: TypeAlias = list[tuple[Array, Array]]


def as_type(weights: Parameters, dtype: DTypeLike) -> dict[str, Array]:
    """Return the weights in another floating type; all arithmetic follows it."""
    return {name: values.astype(dtype, copy=False) for name, values in weights.items()}


def forward(
    config: GPT2Config,
    weights: Parameters,
    token_ids: NDArray[np.int64],
    cache: Cache | None = None,
) -> tuple[Array, Cache]:
    """Return the logits at every new position, and the cache that includes them.

    The cache changes nothing in the result. What earlier positions contribute to later ones are
    only their keys and values, and those never change because nobody looks into the future: so
    they are kept, and a new token costs one position instead of all.

    Args:
        config: The shape of the model.
        weights: All parameters, in one floating type.
        token_ids: int64 (b, t), the new tokens.
        cache: What an earlier call returned; None at the start of a sequence. It is not modified.

    Returns:
        Logits (b, t, v), and a new cache.

    Raises:
        ValueError: More positions than the model knows.
    """
    position = 0 if cache is None else cache[0][0].shape[2]
    x = embed(config, weights, token_ids, position)  # (b, t, c)
    present: Cache = []
    for index in config.blocks:
        past = None if cache is None else cache[index]
        x, key_value = block(config, weights, index, x, past)  # (b, t, c)
        present.append(key_value)
    return next_token_logits(config, weights, x), present  # (b, t, v)


def embed(
    config: GPT2Config, weights: Parameters, token_ids: NDArray[np.int64], position: int
) -> Array:
    """Return what the tokens are plus where they stand: (b, t) ids -> (b, t, c).

    Attention by itself does not see order; without `wpe` a text would be a bag of words.
    """
    end = position + token_ids.shape[1]
    if end > config.n_ctx:
        raise ValueError(f"position {end - 1} is beyond the context of {config.n_ctx}")
    tokens = weights["wte.weight"][token_ids]  # (b, t, c)
    places = weights["wpe.weight"][position:end]  # (t, c), the same for the whole batch
    x: Array = tokens + places  # (b, t, c)
    return x


def block(
    config: GPT2Config,
    weights: Parameters,
    index: int,
    x: Array,
    past: tuple[Array, Array] | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Add attention, then the MLP, to the residual stream: (b, t, c) -> (b, t, c).

    Each works on a normed copy ("pre-norm"), so the stream itself passes from the first block to
    the last untouched, which is what lets gradients reach the first.
    """
    name = f"h.{index}"
    normed = layer_norm(config, weights, f"{name}.ln_1", x)  # (b, t, c)
    y, present = attention(config, weights, f"{name}.attn", normed, past)  # (b, t, c)
    x = x + y  # (b, t, c)
    normed = layer_norm(config, weights, f"{name}.ln_2", x)  # (b, t, c)
    x = x + mlp(weights, f"{name}.mlp", normed)  # (b, t, c)
    return x, present


def layer_norm(config: GPT2Config, weights: Parameters, name: str, x: Array) -> Array:
    """Give every position mean 0 and variance 1, then a learned scale and shift; the shape stays.

    Each position is normed by itself: neither the batch nor other positions play a part, so one
    token at a time gives the same as all at once.
    """
    mean = x.mean(axis=-1, keepdims=True)  # (b, t, 1)
    variance = x.var(axis=-1, keepdims=True)  # (b, t, 1), divided by c, not by c - 1
    normed = (x - mean) / np.sqrt(variance + x.dtype.type(config.layer_norm_epsilon))  # (b, t, c)
    y: Array = normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]  # (b, t, c)
    return y


def linear(weights: Parameters, name: str, x: Array) -> Array:
    """Return x @ weight + bias: (..., in) -> (..., out). GPT-2 stores weights as (in, out)."""
    return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(
    config: GPT2Config,
    weights: Parameters,
    name: str,
    x: Array,
    past: tuple[Array, Array] | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Let every position collect values of earlier positions: (b, t, c) -> (b, t, c).

    This is the one layer in which positions meet. Each asks a question (query) and offers a label
    (key) and a content (value). A query takes the mean of all contents up to its own position,
    weighted by how well their labels answer it. Heads do so independently, on d channels each.

    Returns:
        The result, and the keys and values of all positions so far, (b, h, s, d) each.
    """
    b, t, c = x.shape
    h, d = config.n_head, config.head_size

    qkv = linear(weights, f"{name}.c_attn", x)  # (b, t, 3c): all three by one matrix
    q, k, v = (
        part.reshape(b, t, h, d).transpose(0, 2, 1, 3)  # (b, t, c) -> (b, t, h, d) -> (b, h, t, d)
        for part in np.split(qkv, 3, axis=-1)
    )
    if past is not None:
        k = np.concatenate([past[0], k], axis=2)  # (b, h, s, d)
        v = np.concatenate([past[1], v], axis=2)  # (b, h, s, d)
    s = k.shape[2]

    # A product of d independent numbers has the deviation sqrt(d); divided by it, the softmax
    # starts out soft whatever the size of a head.
    scores = q @ k.transpose(0, 1, 3, 2) / x.dtype.type(np.sqrt(d))  # (b, h, t, s)

    # New position i is position s - t + i of the sequence, and sees the keys 0 .. s - t + i.
    visible = np.arange(s) <= np.arange(s - t, s)[:, None]  # (t, s)
    scores = np.where(visible, scores, x.dtype.type(-np.inf))  # (b, h, t, s)

    y = softmax(scores) @ v  # (b, h, t, s) @ (b, h, s, d) -> (b, h, t, d)
    y = y.transpose(0, 2, 1, 3).reshape(b, t, c)  # (b, t, h, d) -> (b, t, c): heads side by side
    return linear(weights, f"{name}.c_proj", y), (k, v)  # (b, t, c)


def softmax(scores: Array) -> Array:
    """Turn scores into shares that are positive and sum to 1 along the last axis.

    Taking the maximum off first cancels in the quotient, and keeps exp from overflowing.
    """
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def mlp(weights: Parameters, name: str, x: Array) -> Array:
    """Transform each position by itself: (b, t, c) -> (b, t, c), through 4c channels."""
    x = linear(weights, f"{name}.c_fc", x)  # (b, t, 4c)
    x = gelu_new(x)  # (b, t, 4c)
    return linear(weights, f"{name}.c_proj", x)  # (b, t, c)


def gelu_new(x: Array) -> Array:
    """Return x * P(a standard normal number <= x), by the tanh formula GPT-2 was trained with.

    The formula differs from the exact function (`gelu`) by up to 0.0005; models know which of the
    two they grew up with, so it is not a detail.
    """
    half, one, cubic = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(0.044715)
    gate = np.tanh(x.dtype.type(np.sqrt(2 / np.pi)) * (x + cubic * x * x * x))
    y: Array = half * x * (one + gate)
    return y


def next_token_logits(config: GPT2Config, weights: Parameters, x: Array) -> Array:
    """Compare each position with every token of the vocabulary: (b, t, c) -> (b, t, v).

    With tied embeddings a token is predicted by the same vector by which it is read.
    """
    x = layer_norm(config, weights, "ln_f", x)  # (b, t, c)
    return x @ weights[config.lm_head_name].T  # (b, t, c) @ (c, v) -> (b, t, v)


def generate_greedily(
    config: GPT2Config, weights: Parameters, prompt: Sequence[int], token_count: int
) -> list[int]:
    """Return the `token_count` tokens that follow the prompt, each the most likely one."""
    cache: Cache | None = None
    new_ids = np.array([prompt], dtype=np.int64)  # (1, t)
    answer: list[int] = []
    for _ in range(token_count):
        logits, cache = forward(config, weights, new_ids, cache)  # (1, t, v)
        answer.append(int(logits[0, -1].argmax()))
        new_ids = np.array([answer[-1:]], dtype=np.int64)  # (1, 1)
    return answer
