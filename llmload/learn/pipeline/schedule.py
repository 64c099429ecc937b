"""Who computes what when: one forward, one backward (1F1B), and who gets which blocks.

A batch is cut into micro-batches that follow each other through the stages, so that all compute at
once. Each stage first takes as many forward as there are stages behind it; from then on it takes
one back for each that it takes forward. So no more are in flight than there are stages from here
on, whatever the batch; and the order is fixed, so that sums have the same bits each time.

    stage 0   F0 F1 F2 .. .. B0 F3 B1 F4 B2 ..
    stage 1      F0 F1 .. B0 F2 B1 F3 B2 F4 ..
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3 ..          the last: the loss, and back at once

Micro-batches of a validation, between two steps, go forward alone.

Source: PipeDream-Flush, also called 1F1B (Narayanan et al. 2021, arXiv 2006.09503).
Pure: numbers. Knows neither what is computed nor the way between stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

__all__ = ["Operation", "Progress", "cut_blocks", "operations", "stuck_stage"]


class Operation(NamedTuple):
    """One thing that a stage does.

    Attributes:
        kind: The way through the stage that is computed.
        micro_batch: Which, 0, 1, 2, ...
    """

    kind: Literal["forward", "backward"]
    micro_batch: int


class Progress(NamedTuple):
    """How many operations of each kind a stage has done in a step."""

    forward: int
    backward: int


def operations(
    stage: int, stage_count: int, micro_batch_count: int, *, is_validation: bool = False
) -> list[Operation]:
    """Return what a stage does in one step, in order.

    Args:
        stage: Which, 0 is the first.
        stage_count: All of them.
        micro_batch_count: In one step.
        is_validation: It is no step: nothing comes back.
    """
    if is_validation:
        return [Operation("forward", index) for index in range(micro_batch_count)]
    ahead = min(stage_count - 1 - stage, micro_batch_count)
    found = [Operation("forward", index) for index in range(ahead)]
    for index in range(ahead, micro_batch_count):
        found += [Operation("forward", index), Operation("backward", index - ahead)]
    found += [
        Operation("backward", index)
        for index in range(micro_batch_count - ahead, micro_batch_count)
    ]
    return found


def stuck_stage(
    progress: Sequence[Progress], micro_batch_count: int, *, is_validation: bool = False
) -> int | None:
    """Return the first stage that has what it needs and has not done what is next, or None.

    Where all stand still, that is who keeps the others waiting.

    Args:
        progress: What each stage says of itself, in order.
        micro_batch_count: In one step.
        is_validation: As for `operations`.
    """
    for stage, (forward, backward) in enumerate(progress):
        order = operations(stage, len(progress), micro_batch_count, is_validation=is_validation)
        left = order[forward + backward :]
        if not left:
            continue
        kind, index = left[0]
        if kind == "forward" and stage == 0:  # no more are on the way than there are stages
            can_go_on = index < progress[-1].forward + len(progress)
        elif kind == "forward":
            can_go_on = progress[stage - 1].forward > index
        else:
            can_go_on = stage == len(progress) - 1 or progress[stage + 1].backward > index
        if can_go_on:
            return stage
    return None


def cut_blocks(blocks: range, rooms: Sequence[int]) -> list[range] | None:
    """Cut blocks into one part for each device, as even as their rooms allow.

    Args:
        blocks: What is to be held.
        rooms: How many blocks each device can hold.

    Returns:
        A part for each device, in order, empty for who gets none; None if there is no room for all.
    """
    if sum(rooms) < len(blocks):
        return None
    shares = [0] * len(rooms)
    for _ in blocks:
        free = [index for index, room in enumerate(rooms) if shares[index] < room]
        shares[min(free, key=lambda index: shares[index])] += 1
    parts, start = [], blocks.start
    for share in shares:
        parts.append(range(start, start + share))
        start += share
    return parts
