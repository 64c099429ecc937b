"""Guesses from the text itself, and how many of them pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmload.engine.generate import generate_tokens
from llmload.engine.sampler import SamplingParameters
from llmload.swarm.speculate import GuessCount, PromptLookup, accepted_count


def test_what_followed_the_last_time_is_guessed():
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3])
    assert lookup.guess(3) == [4, 9, 2]
    lookup.extend([4])
    assert lookup.guess(1) == [9]
    lookup.extend([7])
    assert lookup.guess(4) == []  # 4 7 stood nowhere


def test_the_longest_run_decides():
    assert PromptLookup([1, 2, 3, 5, 9, 2, 3, 6, 1, 2, 3]).guess(1) == [5]


def test_a_circle_is_guessed_on():
    assert PromptLookup([8, 1, 2, 3, 1, 2]).guess(7) == [3, 1, 2, 3, 1, 2, 3]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 16))
def test_guesses_come_from_the_text_and_bit_by_bit_is_at_once(ids, count):
    lookup = PromptLookup(ids[:7])
    for token_id in ids[7:]:
        lookup.extend([token_id])
    guesses = lookup.guess(count)
    assert guesses == PromptLookup(ids).guess(count)
    assert len(guesses) in (0, count)
    assert set(guesses) <= set(ids)


def test_accepted_is_the_right_beginning():
    assert accepted_count([1, 2, 3], [1, 2, 9, 4]) == 2
    assert accepted_count([1, 2], [1, 2, 3]) == 2
    assert accepted_count([5], [1, 2]) == 0
    assert accepted_count([], [1]) == 0


def trained(*, right: float, trip_s: float, row_s: float) -> GuessCount:
    count = GuessCount()
    assert count.best() == 0  # before the first trip
    count.learn(guesses=0, accepted=0, elapsed_s=trip_s, compute_s=row_s)
    for index in range(200):
        accepted = 4 if index % 10 < 10 * right else 0
        count.learn(guesses=4, accepted=accepted, elapsed_s=trip_s + 4 * row_s, compute_s=5 * row_s)
    return count


def test_far_and_right_guesses_much_near_and_wrong_nothing():
    assert trained(right=1.0, trip_s=0.2, row_s=0.001).best() == 16
    assert trained(right=0.0, trip_s=0.2, row_s=0.02).best() == 0
    middle = trained(right=0.5, trip_s=0.1, row_s=0.01).best()
    assert 1 <= middle < 16
    assert trained(right=0.5, trip_s=0.012, row_s=0.01).best() <= middle


def test_what_never_pays_is_tried_again_now_and_then():
    count = trained(right=0.0, trip_s=0.2, row_s=0.02)
    tried = [count.best() for _ in range(160)]
    assert set(tried) == {0, 1}
    assert sum(tried) == 10


@pytest.mark.parametrize(
    "sampling",
    [SamplingParameters(temperature=0), SamplingParameters(temperature=0.3, top_k=3, seed=5)],
)
async def test_the_answer_is_that_of_plain_decoding(
    autojump_clock, pipeline, engines, config, sampling, monkeypatch
):
    """With as many guesses as there may be, right and wrong ones."""
    monkeypatch.setattr(GuessCount, "best", lambda self: 16)
    prompt = [5, 17, 3, 250, 17] * 4
    whole = [engines[config.blocks]]
    expected = list(generate_tokens(whole, prompt, sampling=sampling, max_new_tokens=70))
    swarm = pipeline(3)
    generation = swarm.client.generate(prompt, sampling=sampling, max_new_tokens=70)
    async with generation as answer:
        assert [token.token_id async for token in answer] == expected
        statistics = answer.statistics()
    assert statistics.guess_count > statistics.accepted_count > 0
    assert statistics.trip_count == 70 - statistics.accepted_count
    await swarm.check_nothing_is_left()
