"""Samples are repeatable, follow the distribution, and respect every limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmload.engine.sampler import SamplingParameters, probabilities, sample

LOGITS = np.log(np.float32([0.5, 0.25, 0.15, 0.1]))


def test_greedy_takes_the_first_maximum():
    greedy = SamplingParameters(temperature=0)
    assert sample(np.float32([1, 3, 3, 2]), greedy, 0) == 1
    assert sample(LOGITS, greedy, 7) == 0


def test_draws_are_pinned():
    """Peers of different versions must draw the same, so the stream may never change."""
    parameters = SamplingParameters(seed=42)
    draws = "".join(str(sample(LOGITS, parameters, position)) for position in range(20))
    assert draws == "20000200000301203012"


def test_draw_depends_on_seed_and_position_alone():
    parameters = SamplingParameters(seed=2**64 - 1)
    forward = [sample(LOGITS, parameters, position) for position in range(50)]
    backward = [sample(LOGITS, parameters, position) for position in reversed(range(50))]
    assert forward == backward[::-1]
    other = [sample(LOGITS, SamplingParameters(seed=1), position) for position in range(50)]
    assert forward != other


def test_draws_follow_the_distribution():
    """Chi-square over seeds and over positions; 16.3 is exceeded once in 1,000 at 3 degrees."""
    expected = probabilities(LOGITS, SamplingParameters())
    assert expected == pytest.approx([0.5, 0.25, 0.15, 0.1])
    count = 4000
    for draws in (
        [sample(LOGITS, SamplingParameters(seed=seed), 3) for seed in range(count)],
        [sample(LOGITS, SamplingParameters(seed=3), position) for position in range(count)],
    ):
        seen = np.bincount(draws, minlength=4)
        assert ((seen - count * expected) ** 2 / (count * expected)).sum() < 16.3


def test_temperature_top_k_and_top_p():
    def chances(**fields):
        return probabilities(LOGITS, SamplingParameters(**fields)).tolist()

    assert chances(temperature=0.5) == pytest.approx(np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345)
    assert chances(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert chances(top_k=9) == pytest.approx([0.5, 0.25, 0.15, 0.1])
    assert chances(top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert chances(top_p=0.8) == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0])
    assert chances(top_p=1e-300) == pytest.approx([1, 0, 0, 0])
    assert chances(top_k=3, top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert chances(temperature=1e-300) == pytest.approx([1, 0, 0, 0])
    # Shares that reach top_p exactly are enough.
    even = probabilities(np.zeros(4, dtype=np.float32), SamplingParameters(top_p=0.5))
    assert even.tolist() == [0.5, 0.5, 0, 0]
    # Tokens as likely as the k-th stay: which of them to drop would be an accident.
    tied = probabilities(np.zeros(4, dtype=np.float32), SamplingParameters(top_k=2))
    assert tied.tolist() == [0.25] * 4


@given(
    logits=arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e4, 1e4, width=32)),
    temperature=st.floats(1e-3, 1e3),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.floats(1e-6, 1.0),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
)
def test_only_tokens_with_a_chance_are_drawn(logits, temperature, top_k, top_p, seed, position):
    parameters = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    chances = probabilities(logits, parameters)
    assert chances.sum() == pytest.approx(1)
    assert chances[logits.argmax()] > 0
    token = sample(logits, parameters, position)
    assert chances[token] > 0
    assert token == sample(logits, parameters, position)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_parameters_are_checked(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SamplingParameters(**fields)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logits", [[1.0, np.nan], [np.inf, 0.0], [], [[1.0]]], ids=str)
def test_logits_are_checked(logits, temperature):
    with pytest.raises(ValueError, match="finite vector"):
        sample(np.float32(logits), SamplingParameters(temperature=temperature), 0)
    with pytest.raises(ValueError, match="position"):
        sample(LOGITS, SamplingParameters(), -1)
