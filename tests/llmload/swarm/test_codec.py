"""How hidden states travel: exactly, or with a bounded error, and whatever comes is checked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmload.swarm.codec import CODECS, choose_codec, decode_hidden_untrusted, encode_hidden
from natswarm import DecodeError


def gpt2_like_rows(count: int, n_embd: int, seed: int) -> np.ndarray:
    """Rows with a few channels a hundred times larger than the rest."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, n_embd)).astype(np.float32)
    rows[:, rng.choice(n_embd, 3, replace=False)] *= 100
    return rows


@pytest.mark.parametrize(
    ("codec", "row_bytes", "error"),
    [("float32", 3072, 0), ("float16", 1536, 4e-4), ("int8", 824, 0.01)],
)
def test_size_and_error_of_a_row(codec, row_bytes, error):
    rows = gpt2_like_rows(5, 768, 1)
    used, payload = encode_hidden(rows, codec)
    assert used == codec
    assert memoryview(payload).nbytes == 5 * row_bytes
    back = decode_hidden_untrusted(bytes(payload), codec, 5, 768)
    assert back.dtype == np.float32
    small = np.abs(rows) < 10  # the outliers are not what is hard
    assert np.linalg.norm((back - rows)[small]) <= error * np.linalg.norm(rows[small])
    assert np.linalg.norm(back - rows) <= error * np.linalg.norm(rows)


@given(st.integers(1, 4), st.integers(1, 200), st.integers(0, 2**32 - 1), st.sampled_from(CODECS))
def test_any_shape_comes_back(count, n_embd, seed, codec):
    rows = gpt2_like_rows(count, n_embd + 2, seed)
    _, payload = encode_hidden(rows, codec)
    back = decode_hidden_untrusted(bytes(payload), codec, count, n_embd + 2)
    assert back.shape == rows.shape
    assert np.abs(back - rows).max() <= 0.02 * np.abs(rows).max()
    if codec == "float32":
        assert np.array_equal(back, rows)


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_zeros_and_tiny_values_do_no_harm(codec):
    rows = np.zeros((1, 64), dtype=np.float32)
    rows[0, 5] = 1e-30
    _, payload = encode_hidden(rows, codec)
    assert np.abs(decode_hidden_untrusted(bytes(payload), codec, 1, 64)).max() <= 1e-30


def test_values_beyond_float16_travel_exactly():
    rows = np.full((1, 64), 1e6, dtype=np.float32)
    for codec in ("float16", "int8"):
        used, payload = encode_hidden(rows, codec)
        assert used == "float32"
        assert np.array_equal(decode_hidden_untrusted(bytes(payload), used, 1, 64), rows)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(codec, value):
    rows = np.ones((2, 64), dtype=np.float32)
    _, payload = encode_hidden(rows, codec)
    damaged = bytearray(payload)
    kind = "<f4" if codec == "float32" else "<f2"
    at = 64 if codec == "int8" else 0  # the scale of the first row
    damaged[at : at + np.dtype(kind).itemsize] = np.array(value, dtype=kind).tobytes()
    with pytest.raises(DecodeError, match="NaN or infinite"):
        decode_hidden_untrusted(bytes(damaged), codec, 2, 64)


def test_outlier_in_a_channel_that_is_not_there():
    _, payload = encode_hidden(np.ones((1, 64), dtype=np.float32), "int8")
    damaged = bytearray(payload)
    damaged[66:68] = (64).to_bytes(2, "little")  # behind 64 values and one scale
    with pytest.raises(DecodeError, match="beyond 64"):
        decode_hidden_untrusted(bytes(damaged), "int8", 1, 64)


@given(st.binary(max_size=2000), st.integers(1, 3), st.sampled_from(CODECS))
def test_any_bytes_are_rows_or_a_decode_error(data, count, codec):
    try:
        rows = decode_hidden_untrusted(data, codec, count, 64)
    except DecodeError:
        return
    assert rows.shape == (count, 64)
    assert np.isfinite(rows).all()


def test_short_links_carry_everything_exactly():
    assert choose_codec("int8", 0.001) == "float32"
    assert choose_codec("int8", 0.05) == "int8"
    assert choose_codec("float16", None) == "float16"
