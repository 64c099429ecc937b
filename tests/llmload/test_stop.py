"""A text ends before the first stop string, however it is cut, and nothing is taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmload.stop import StopFilter

LETTERS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def end_of(text: str, stop: list[str]) -> str:
    """What is left of a text: the rule, word by word."""
    for end in range(1, len(text) + 1):
        complete = [one for one in stop if text[:end].endswith(one)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@given(st.lists(LETTERS, max_size=6), STOPS)
def test_the_text_ends_at_the_same_place_however_it_is_cut(pieces, stop):
    stops = StopFilter(stop)
    given_out = [stops.push(piece) for piece in pieces]
    rest = stops.finish()
    text = "".join(pieces)
    assert "".join(given_out) + rest == end_of(text, stop)
    assert stops.is_stopped == any(one in text for one in stop)
    assert not (stops.is_stopped and rest)


@given(LETTERS, STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop_string(text, stop):
    stops = StopFilter(stop)
    shown = "".join(map(stops.push, text))
    held = text[len(shown) :]
    if not stops.is_stopped:
        assert held == "" or any(one.startswith(held) for one in stop)


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["one\n", "\ntwo"], ["\n\n"], ["one", "", ""]),
        (["one\n", "two"], ["\n\n"], ["one", "\ntwo", ""]),
        (["abc"], ["abcd", "b"], ["a", ""]),  # complete first
        (["xab"], ["b", "ab"], ["x", ""]),  # complete at once
        (["a", "a"], ["aab"], ["", "", "aa"]),
        (["x"], [], ["x", ""]),
    ],
)
def test_what_is_shown_when(pieces, stop, shown):
    stops = StopFilter(stop)
    assert [*map(stops.push, pieces), stops.finish()] == shown


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopFilter(["a", ""])
