"""Which blocks a peer takes, when it moves, and that a swarm so gets and stays whole."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmload.swarm.placement import best_window, better_window, block_rates, windows

SIZES = [100] * 12


def test_what_fits():
    assert windows([5, 1, 1, 1, 5], 5) == [range(1), range(1, 4), range(4, 5)]
    assert windows([5, 1, 1, 1, 5], 7) == [range(3), range(1, 4), range(2, 5)]
    assert windows([5, 1, 1], 0) == []
    assert windows([1, 1, 1], 99) == [range(3)]


def test_gaps_come_first_then_the_slowest():
    fits = windows(SIZES, 400)
    served = [(range(4), 0.01), (range(8, 12), 0.01)]
    assert best_window(fits, block_rates(served, 12)) == range(4, 8)
    served += [(range(4, 8), 0.001)]
    assert best_window(fits, block_rates(served, 12)) in (range(4), range(8, 12))


def test_of_equals_peers_take_different_ones():
    fits = windows(SIZES, 400)
    taken = {best_window(fits, [0.0] * 12, tie).start for tie in range(9)}
    assert taken == set(range(9))


def test_a_move_must_pay_and_leave_no_gap():
    fits = windows(SIZES, 400)
    others = block_rates([(range(4), 0.01), (range(4, 8), 0.01)], 12)
    # 8-11 are ours alone.
    assert better_window(range(8, 12), 0.01, fits, others) is None
    # A gap at 8-11, and what we serve is served by others, too.
    assert better_window(range(4), 0.01, fits, others) == range(8, 12)
    # To fill one gap we would leave another of the same size.
    lonely = block_rates([(range(4), 0.01)], 12)
    assert better_window(range(4, 8), 0.01, fits, lonely) is None
    # One part is much slower than the others.
    uneven = [(range(4), 0.01), (range(4, 8), 0.01), (range(8, 12), 0.02)]
    assert better_window(range(4), 0.01, fits, block_rates(uneven, 12)) == range(8, 12)
    assert better_window(range(4), 0.01, fits, block_rates(uneven[:2] * 2, 12)) == range(8, 12)


@pytest.mark.parametrize("seed", range(20))
def test_a_swarm_gets_whole_and_stays_so_while_peers_come_and_go(seed):
    """One after the other, as the volunteers do who look again before they move."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    peers: dict[int, tuple[range, float, list[range]]] = {}

    def rates(without: int | None = None) -> list[float]:
        served = [(blocks, s) for name, (blocks, s, _) in peers.items() if name != without]
        return block_rates(served, 12)

    def join(name: int) -> None:
        fits = windows(SIZES, rng.choice([200, 300, 400, 600]))
        blocks = best_window(fits, rates(), rng.getrandbits(16))
        peers[name] = blocks, rng.uniform(0.001, 0.01), fits

    def settle() -> int:
        """Let everybody look until nobody moves; return how often that was."""
        for moves in range(100):
            for name, (blocks, block_s, fits) in rng.sample(sorted(peers.items()), len(peers)):
                better = better_window(blocks, block_s, fits, rates(name), rng.getrandbits(16))
                if better is not None:
                    peers[name] = better, block_s, fits
                    break
            else:
                return moves
        pytest.fail("they move for ever")

    for name in range(12):
        join(name)
    settle()
    assert min(rates()) > 0
    for name in range(12, 60):
        del peers[rng.choice(sorted(peers))]
        gaps = rates().count(0)
        settle()
        assert rates().count(0) <= gaps
        join(name)
        settle()
        assert min(rates()) > 0


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=6),
    st.integers(0, 8),
    st.integers(0, 99),
)
def test_a_move_never_makes_it_worse(ranges, start, tie):
    rates = block_rates([(range(min(r), max(r) + 1), 0.01) for r in ranges], 12)
    mine = range(start, start + 4)
    better = better_window(mine, 0.01, windows(SIZES, 400), rates, tie)
    if better is None:
        return

    def weakest(window):
        ours = block_rates([(window, 0.01)], 12)
        total = [a + b for a, b in zip(rates, ours, strict=True)]
        return -total.count(0), min(total)

    assert weakest(better) > weakest(mine)
