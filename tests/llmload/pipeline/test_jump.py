"""A jump is told from a loss that falls and wavers."""

from __future__ import annotations

import math

import numpy as np

from llmload.learn.pipeline.jump import JumpWatch


def jumps(*losses):
    watch = JumpWatch()
    return [step for step, loss in enumerate(losses) if watch.is_jump(step, loss)]


def test_a_rise_by_more_than_twice_the_largest_change_is_a_jump():
    before = (4.0, 3.7, 3.8, 3.6)  # changes by 0.3 at most
    assert jumps(*before, 4.59) == []
    assert jumps(*before, 4.61) == [4]
    assert jumps(*before, math.nan) == [4]
    assert jumps(*before[1:], 9.0) == []  # too few to know


def test_what_was_learned_fast_at_first_does_not_hide_a_jump_for_ever():
    falling = [9.0, 6.0, 4.0, *[3.0] * 8]
    assert jumps(*falling[:8], 3.1) == []
    assert jumps(*falling, 3.1) == [11]


def test_a_loss_that_falls_and_wavers_hardly_ever_jumps():
    falling = 3 + np.exp(-np.arange(200) / 30)
    noises = np.random.default_rng(1).normal(scale=0.02, size=(50, 200))
    assert sum(len(jumps(*(falling + noise))) for noise in noises) <= 10  # of 10,000


def test_what_is_of_steps_that_are_made_again_is_forgotten():
    watch = JumpWatch()
    for step, loss in enumerate((3.0, 2.9, 2.8, 2.7, 2.6)):
        assert not watch.is_jump(step, loss)
    assert watch.is_jump(5, 7.0)
    assert not watch.is_jump(4, 2.6)
    assert watch.is_jump(5, 7.0)
    assert not watch.is_jump(6, 7.1)  # it has happened, and is told once
