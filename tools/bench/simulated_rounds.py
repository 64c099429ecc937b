"""Other ways to learn together, all with rounds: what `tools/bench/learning.py` compares ours with.

The peers, their texts, links and time are those of `simulated_learning.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmload.learn.mixing import groups
from llmload.learn.shards import Vector
from natswarm.sim.presets import LINK_4G
from tools.bench.simulated_learning import STEP_S, UPLINK_BYTES_PER_S, Classroom, Curve, Student

__all__ = ["all_reduce", "di_lo_co", "fed_avg", "local", "no_lo_co"]

ROUND_STEPS = 20


def in_rounds(
    room: Classroom,
    round_steps: int,
    sent_bytes: float,
    average: Callable[[list[Student], int], None],
    *,
    slowest: float = 1.0,
) -> Curve:
    """Let all make some steps, wait for the slowest, exchange, and so on."""
    students, curve = room.students(), Curve()
    round_s = round_steps * STEP_S * slowest + sent_bytes / UPLINK_BYTES_PER_S
    round_s += 4 * (LINK_4G.delay_s + LINK_4G.jitter_s / 2)  # there and back
    for index in range(room.size.steps // round_steps):
        for student in students:
            for step in range(index * round_steps, (index + 1) * round_steps):
                student.step(step)
        average(students, index)
        steps = (index + 1) * round_steps
        if steps % room.size.measure_every < round_steps:
            loss = np.mean([room.loss(student.parameters) for student in measured(students)])
            sent = sent_bytes * (index + 1)
            curve.points.append((steps, (index + 1) * round_s, sent, float(loss)))
    return curve


def measured(students: list[Student]) -> list[Student]:
    """Return those whose models differ: one is enough where all are equal."""
    first = students[0].parameters
    equal = all(np.array_equal(first, other.parameters) for other in students[1:])
    return students[:1] if equal else students


def all_reduce_bytes(room: Classroom) -> float:
    """Return what each sends for a mean of all float32 vectors, in a ring."""
    count = len(room.texts)
    return 2 * (count - 1) / count * 4 * room.space.size


def all_reduce(room: Classroom) -> Curve:
    """Average the gradients of all peers at each step."""
    students, curve = room.students(), Curve()
    model = students[0]
    sent_bytes = all_reduce_bytes(room)
    step_s = STEP_S + sent_bytes / UPLINK_BYTES_PER_S
    step_s += 2 * (len(students) - 1) * 2 * (LINK_4G.delay_s + LINK_4G.jitter_s / 2)
    for step in range(room.size.steps):
        gradients = [room.gradient(model.parameters, each.batch()) for each in students]
        mean: Vector = np.stack(gradients).mean(axis=0)
        model.optimizer.update(model.parameters, mean, learning_rate=room.rate_at(step))
        done = step + 1
        if done % room.size.measure_every == 0:
            loss = room.loss(model.parameters)
            curve.points.append((done, done * step_s, done * sent_bytes, loss))
    return curve


def local(room: Classroom) -> Curve:
    """Let everybody learn alone."""
    return in_rounds(room, room.size.measure_every, 0.0, lambda students, index: None)


def fed_avg(room: Classroom, *, slowest: float = 1.0) -> Curve:
    """Average all models after each round, sent to each other as a ring does."""

    def average(students: list[Student], _index: int) -> None:
        mean = np.mean([student.parameters for student in students], axis=0, dtype=np.float32)
        for student in students:
            student.parameters[:] = mean

    sent_bytes = all_reduce_bytes(room)
    steps = ROUND_STEPS
    return in_rounds(room, steps, sent_bytes, average, slowest=slowest)


def di_lo_co(room: Classroom) -> Curve:
    """Average pseudo-gradients; Nesterov momentum 0.9, outer rate 0.7 (arXiv 2311.08105)."""
    anchor, momentum = room.start.copy(), np.zeros_like(room.start)

    def average(students: list[Student], _index: int) -> None:
        mean = np.mean([student.parameters for student in students], axis=0, dtype=np.float32)
        movement = anchor - mean
        momentum[:] = 0.9 * momentum + movement
        anchor[:] -= 0.7 * (movement + 0.9 * momentum)
        for student in students:
            student.parameters[:] = anchor

    sent_bytes = all_reduce_bytes(room)
    return in_rounds(room, ROUND_STEPS, sent_bytes, average)


def no_lo_co(room: Classroom) -> Curve:
    """Average with one partner a round, momentum 0.5, outer rate 0.7 (arXiv 2506.10911)."""
    anchors = np.stack([room.start] * len(room.texts))
    momenta = np.zeros_like(anchors)

    def average(students: list[Student], index: int) -> None:
        by_id = {student.peer_id: student for student in students}
        for pair in groups(list(by_id), round_number=index):
            rows = [by_id[member].index for member in pair]
            movement = np.mean([students[row].parameters - anchors[row] for row in rows], axis=0)
            mean = anchors[rows].mean(axis=0)
            for row in rows:
                momenta[row] = 0.5 * momenta[row] + 0.7 * (movement + mean - anchors[row])
            for row in rows:
                anchors[row] += momenta[row]
                students[row].parameters[:] = anchors[row]

    sent_bytes = 2 * 4 * room.space.size
    return in_rounds(room, ROUND_STEPS, sent_bytes, average)
