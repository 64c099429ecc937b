"""The order of 1F1B, on paper: nobody waits for ever, and no more is held than there are stages."""

from __future__ import annotations

import pytest

from llmload.learn.pipeline.schedule import (
    Operation,
    Progress,
    cut_blocks,
    operations,
    stuck_stage,
)
from llmload.learn.pipeline.search import place_stages
from natswarm import PeerId

SIZES = [(stages, count) for stages in range(1, 6) for count in range(1, 9)]


def text(stage, stage_count, count):
    return " ".join(
        f"{op.kind[0].upper()}{op.micro_batch}" for op in operations(stage, stage_count, count)
    )


def run_through(stage_count, count):
    """Return for each stage when its operations end, each taking one unit, and the way none."""
    orders = [operations(stage, stage_count, count) for stage in range(stage_count)]
    done: dict[tuple[int, Operation], int] = {}
    at = [0] * stage_count
    free = [0] * stage_count
    while any(at[stage] < len(order) for stage, order in enumerate(orders)):
        went_on = False
        for stage, order in enumerate(orders):
            if at[stage] == len(order):
                continue
            op = order[at[stage]]
            needs = []
            if op.kind == "forward" and stage > 0:
                needs.append((stage - 1, op))
            if op.kind == "backward":
                needs.append((stage, Operation("forward", op.micro_batch)))
                if stage + 1 < stage_count:
                    needs.append((stage + 1, op))
            if all(need in done for need in needs):
                free[stage] = max([free[stage], *(done[need] for need in needs)]) + 1
                done[stage, op] = free[stage]
                at[stage] += 1
                went_on = True
        assert went_on, "all wait for each other"
    return free


def test_the_order_is_that_of_the_picture():
    assert text(0, 3, 5) == "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4"
    assert text(1, 3, 5) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4"
    assert text(2, 3, 3) == "F0 B0 F1 B1 F2 B2"
    assert text(0, 3, 1) == "F0 B0"
    assert text(0, 1, 2) == "F0 B0 F1 B1"


@pytest.mark.parametrize(("stage_count", "count"), SIZES)
def test_all_is_done_once_and_no_more_is_held_than_there_are_stages(stage_count, count):
    for stage in range(stage_count):
        order = operations(stage, stage_count, count)
        held, most = 0, 0
        for kind in ("forward", "backward"):
            assert [op.micro_batch for op in order if op.kind == kind] == list(range(count))
        for op in order:
            held += 1 if op.kind == "forward" else -1
            most = max(most, held)
        assert most <= stage_count - stage
    # The bubble is that of the paper: one way through the other stages, forward and back.
    assert max(run_through(stage_count, count)) == 2 * (count + stage_count - 1)


def test_who_keeps_the_others_waiting():
    assert stuck_stage([Progress(3, 0), Progress(2, 0), Progress(0, 0)], 5) == 2
    assert stuck_stage([Progress(1, 0), Progress(0, 0), Progress(0, 0)], 5) == 0
    assert stuck_stage([Progress(3, 0), Progress(1, 0), Progress(1, 1)], 5) == 1
    assert stuck_stage([Progress(3, 0), Progress(2, 0), Progress(1, 1)], 5) == 1
    assert stuck_stage([Progress(3, 0), Progress(2, 1), Progress(1, 1)], 5) == 0
    assert stuck_stage([Progress(5, 5)] * 3, 5) is None


def test_who_keeps_a_validation_waiting():
    def stuck(*done):
        return stuck_stage([Progress(each, 0) for each in done], 5, is_validation=True)

    assert stuck(0, 0, 0) == 0
    assert stuck(3, 1, 0) == 1  # the first stage has no more than three are on the way
    assert stuck(3, 3, 1) == 0
    assert stuck(5, 5, 4) == 2
    assert stuck(5, 5, 5) is None


def test_blocks_are_cut_evenly_as_far_as_there_is_room():
    assert cut_blocks(range(5), [9, 9]) == [range(3), range(3, 5)]
    assert cut_blocks(range(5), [1, 9, 9]) == [range(1), range(1, 3), range(3, 5)]
    assert cut_blocks(range(2, 4), [1, 1, 1]) == [range(2, 3), range(3, 4), range(4, 4)]
    assert cut_blocks(range(5), [2, 2]) is None
    assert cut_blocks(range(5), []) is None


def test_devices_keep_their_places_and_who_is_new_takes_those_of_the_gone():
    a, b, c, d = (PeerId(bytes([index]) * 32) for index in range(1, 5))

    def place(before, rooms, count=2):
        found = place_stages(before, rooms, range(4), count)
        return found and [(offer.peer_id, offer.first, offer.last) for offer in found]

    assert place([], {b: 4, a: 4}) == [(b, 0, 1), (a, 2, 3)]
    assert place([], {b: 4, a: 4, c: 4}, 3) == [(b, 0, 1), (a, 2, 2), (c, 3, 3)]
    assert place([a, b], {c: 4, b: 4}) == [(c, 0, 1), (b, 2, 3)]
    assert place([None, b], {b: 4, c: 4, a: 4}) == [(c, 0, 1), (b, 2, 3)]
    assert place([a, b], {b: 4}) == [(b, 0, 3)]
    # The nearest have no room for all; others have.
    assert place([], {a: 1, b: 1, c: 2, d: 3}) == [(d, 0, 1), (c, 2, 3)]
    assert place([], {a: 1, b: 1, c: 1}) is None
