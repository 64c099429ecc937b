"""Peers that learn, on virtual time: what `tools/bench/learning.py` measures.

All methods train the same small GPT-2 (35 thousand parameters, bytes as tokens) from the same
weights, with the same number of local steps, on text of eight packages of Python's standard
library, one a peer, and where there are more peers of the library's modules; the loss is that of
held-out text of all, in nats a byte. The weights are those of a model that has learned other
packages before, as `llmload learn` goes on from one that is there; or random ones. Time is virtual:
a step takes `STEP_S` on a device, and what is sent waits for the sender's uplink, then takes one
way over two 4G links. Methods with rounds wait for the slowest.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from llmload import AdamWSettings, GPT2Config, Trainer
from llmload.learn.averaging import PART_VALUE_COUNT, mean_of_near
from llmload.learn.codecs import Codec
from llmload.learn.exchange import AVERAGE_EVERY_S, GROUP_SIZE
from llmload.learn.forwarding import Acquaintances
from llmload.learn.mixing import group_of
from llmload.learn.optimizer import AdamW
from llmload.learn.outer import OuterLoop, OuterSettings
from llmload.learn.shards import (
    EncodedShard,
    ShardLayout,
    Vector,
    decode_shard_untrusted,
    encode_shard,
)
from llmload.weights import random_weights
from natswarm import PeerId, World
from natswarm.sim.presets import LINK_4G

CONFIG = GPT2Config(vocab_size=256, n_ctx=48, n_embd=32, n_layer=2, n_head=4)
PACKAGES = (
    "asyncio", "email", "tkinter", "unittest", "encodings", "pydoc_data", "multiprocessing", "xml",
)  # fmt: skip
PEER_COUNT = len(PACKAGES)
# What the model has read before.
OTHER_PACKAGES = (
    "idlelib", "lib2to3", "distutils", "importlib", "json", "http", "logging", "ctypes",
    "concurrent", "urllib", "sqlite3", "curses",
)  # fmt: skip
BEFORE_BATCH, BEFORE_RATE = 32, 0.016
TEXT_BYTES = 400_000
BATCH, TIME = 4, 48
VALIDATION_WINDOWS = 24  # of each peer's text

# A phone's, for a model a hundred times as large: so that steps and transfers are of one order.
STEP_S = 0.25
# What one QUIC connection carries over the emulated 4G links, measured.
UPLINK_BYTES_PER_S = 300_000
WARM_UP_STEPS = 30


@dataclass(frozen=True, slots=True)
class Size:
    """How much work a run is.

    Attributes:
        steps: Local steps of each peer.
        before: Steps that the model has made before, on other text; 0: its weights are random.
        measure_every: Steps between two points of a curve.
        attackers: How many of the peers attack, one experiment for each.
        crowd: Peers where it is about more than one update reaches.
    """

    steps: int
    before: int
    measure_every: int
    attackers: tuple[int, ...]
    crowd: int = 24


@dataclass
class Curve:
    """How one method went: points (step, virtual seconds, bytes a peer, loss).

    Attributes:
        drift: Of ours, at each point: how far models lie from their mean (root mean square), over
            how far that has come from the start.
        by_text: Of ours, at each point: the loss on the text of each peer, (peers,).
    """

    points: list[tuple[int, float, float, float]] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    by_text: list[NDArray[np.float64]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The mean of the last three points: single ones are noisy."""
        return float(np.mean([point[3] for point in self.points[-3:]]))

    def on_texts_of(self, peers: Sequence[int]) -> Curve:
        """Return the curve of the loss on the text of some peers alone."""
        losses = [float(by_text[list(peers)].mean()) for by_text in self.by_text]
        return Curve([(*p[:3], loss) for p, loss in zip(self.points, losses, strict=True)])

    def time_to(self, loss: float) -> float:
        """Return the virtual time at which the curve first is at `loss`, between two points.

        That of the first point if it starts below, and infinity if it never gets there.
        """
        if self.points[0][3] <= loss:
            return self.points[0][1]
        for (_, t0, _, l0), (_, t1, _, l1) in zip(self.points, self.points[1:], strict=False):
            if l1 <= loss < l0:
                return t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
        return math.inf


class Classroom:
    """The model, the texts, and what every method needs of them."""

    def __init__(self, seed: int, size: Size, rate: float, *, peer_count: int = PEER_COUNT) -> None:
        self.size = size
        self.seed = seed
        self.adamw = AdamWSettings(learning_rate=rate)
        self.trainer = Trainer(CONFIG, random_weights(CONFIG, seed))
        self.start = begin(seed, size.before)
        self.space = self.trainer.space
        texts = read_texts(peer_count)
        cut = [int(0.9 * len(text)) for text in texts]
        self.texts = [text[:end] for text, end in zip(texts, cut, strict=True)]
        rng = np.random.default_rng([seed, 99])
        windows = [
            draw(text[end:], VALIDATION_WINDOWS, rng) for text, end in zip(texts, cut, strict=True)
        ]
        self._validation = windows

    def students(self) -> list[Student]:
        """Return peers at the start, each with its text."""
        return [Student(self, index) for index in range(len(self.texts))]

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.adamw.learning_rate * share_of_rate(step, self.size.steps)

    def gradient(self, parameters: Vector, batch: tuple[Any, Any]) -> Vector:
        """Return the gradient at some parameters."""
        self.trainer.parameters[:] = parameters
        return self.trainer.gradients(batch)[1]

    def loss(self, parameters: Vector) -> float:
        """Return the loss on held-out text of all peers."""
        return float(self.losses(parameters).mean())

    def losses(self, parameters: Vector) -> NDArray[np.float64]:
        """Return the loss on held-out text of each peer, (peers,)."""
        self.trainer.parameters[:] = parameters
        return np.array([self.trainer.loss(*windows) for windows in self._validation])


class Student:
    """One peer: parameters, optimiser and text."""

    def __init__(self, room: Classroom, index: int) -> None:
        self.room = room
        self.index = index
        self.parameters = room.start.copy()
        self.optimizer = AdamW(room.space, room.adamw)
        self.rng = np.random.default_rng([room.seed, index])
        self.texts = [room.texts[index]]
        self.peer_id = PeerId(hashlib.sha256(f"{room.seed}/{index}".encode()).digest())

    def batch(self) -> tuple[Any, Any]:
        """Draw windows from all texts that the peer has, each as likely as its length."""
        lengths = np.array([len(text) for text in self.texts])
        chosen = self.rng.choice(len(self.texts), size=BATCH, p=lengths / lengths.sum())
        windows = [draw(self.texts[text], 1, self.rng) for text in chosen]
        tokens, targets = (np.concatenate(part) for part in zip(*windows, strict=True))
        return tokens, targets

    def step(self, number: int) -> tuple[Vector, float, float]:
        """Make one local step; return its gradient, the length of that, and the learning rate."""
        gradient, rate = (
            self.room.gradient(self.parameters, self.batch()),
            self.room.rate_at(number),
        )
        return gradient, self.optimizer.update(self.parameters, gradient, learning_rate=rate), rate


def read_text(package: str) -> NDArray[np.int64]:
    """Return source files of a package of the standard library as bytes, int64 (length,)."""
    folder = Path(os.__file__).parent / package
    data = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return np.frombuffer(data[:TEXT_BYTES], dtype=np.uint8).astype(np.int64)


def read_texts(count: int) -> list[NDArray[np.int64]]:
    """Return a text for each peer: packages, then equal slices of the modules beside them.

    A slice is of modules that follow each other in the alphabet: 16 of them have 0.3 MB each.
    """
    texts = [read_text(package) for package in PACKAGES[:count]]
    if count > PEER_COUNT:
        folder = Path(os.__file__).parent
        data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        modules = np.frombuffer(data, dtype=np.uint8).astype(np.int64)
        texts += np.array_split(modules, count - PEER_COUNT)
    return texts


def draw(text: NDArray[np.int64], count: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Return tokens and targets, int64 (count, TIME) each."""
    starts = rng.integers(len(text) - TIME - 1, size=count)
    windows = text[starts[:, None] + np.arange(TIME + 1)]
    return windows[:, :-1], windows[:, 1:]


def share_of_rate(step: int, steps: int) -> float:
    """Return how much of its rate a step has: linear warm-up, then half a cosine to a tenth."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps))))


@cache
def begin(seed: int, steps: int) -> Vector:
    """Return the parameters that all start with, float32: random, or after steps on other text."""
    trainer = Trainer(CONFIG, random_weights(CONFIG, seed))
    rng = np.random.default_rng([seed, 777])
    texts = [read_text(package) for package in OTHER_PACKAGES]
    lengths = np.array([len(text) for text in texts])
    for step in range(steps):
        chosen = rng.choice(len(texts), size=BEFORE_BATCH, p=lengths / lengths.sum())
        windows = [draw(texts[text], 1, rng) for text in chosen]
        tokens, targets = (np.concatenate(part) for part in zip(*windows, strict=True))
        trainer.step([(tokens, targets)], learning_rate=BEFORE_RATE * share_of_rate(step, steps))
    return trainer.parameters


def one_way_s(rng: random.Random) -> float:
    """Return the delay between two devices on 4G, two access links."""
    return 2 * LINK_4G.delay_s + LINK_4G.jitter_s * (rng.random() + rng.random())


@dataclass(frozen=True, slots=True)
class Setting:
    """Who is special in a run of ours; indices of peers.

    Attributes:
        slow: Takes ten times as long for a step.
        flapping: Is there for half a minute, then away for one.
        attackers: Send something else than what they learned.
        attack: "flip", "scale" or "random".
        absent: Take no part.
        unreachable: Pairs that never reach each other.
        outer: How often and how much is published; None: nothing is.
    """

    slow: tuple[int, ...] = ()
    flapping: tuple[int, ...] = ()
    attackers: tuple[int, ...] = ()
    attack: str = ""
    absent: tuple[int, ...] = ()
    unreachable: frozenset[tuple[int, int]] = frozenset()
    outer: OuterSettings | None = field(default_factory=OuterSettings)


class Ours:
    """Outer loops on virtual time."""

    def __init__(self, room: Classroom, setting: Setting) -> None:
        self.room, self.setting = room, setting
        self.world = World(room.seed)
        self.layout = ShardLayout(room.space)
        self.parts = ShardLayout(room.space, PART_VALUE_COUNT)
        self.present = [i for i in range(len(room.texts)) if i not in setting.absent]
        self.watched = [
            i for i in self.present
            if i not in (*setting.slow, *setting.flapping, *setting.attackers)
        ]  # fmt: skip
        self.students = room.students()
        self.index_of = {student.peer_id: student.index for student in self.students}
        self.acquaintances = [self._acquaintances(i) for i in range(len(self.students))]
        self.loops = [
            OuterLoop(
                self.layout,
                student.parameters,
                student.peer_id,
                setting.outer,
                optimizer=room.adamw,
            )
            for student in self.students
        ]
        self.rng = self.world.stream("links")
        self.noise = np.random.default_rng([room.seed, 7])
        self.idle_from = [0.0] * len(room.texts)
        self.sent_bytes = [0.0] * len(room.texts)
        self.steps = [0] * len(room.texts)
        self.fetching: set[int] = set()
        self.curve = Curve()

    def run(self) -> Curve:
        """Run until the watched have made all their steps."""
        for index in self.present:
            self.world.after(self._step_s(index), self._end_step, index)
            if self.setting.outer:
                self.world.after(AVERAGE_EVERY_S, self._average, index, 1)
        every_s = self.room.size.measure_every * STEP_S
        for number in range(1, self.room.size.steps // self.room.size.measure_every + 1):
            self.world.run_until(number * every_s + STEP_S / 2)
            by_text = self._losses()
            sent = float(np.mean([self.sent_bytes[i] for i in self.watched]))
            point = (number * self.room.size.measure_every, self.world.now, sent)
            self.curve.points.append((*point, float(by_text.mean())))
            self.curve.drift.append(self._drift())
            self.curve.by_text.append(by_text)
        return self.curve

    def _losses(self) -> NDArray[np.float64]:
        """Return the loss on each text, (peers,): the mean over the models of the watched."""
        anchors = [self.loops[i].anchor for i in self.watched]
        if all(np.array_equal(anchors[0], each) for each in anchors):
            anchors = anchors[:1]
        losses = np.stack([self.room.losses(anchor) for anchor in anchors])  # (models, peers)
        mean: NDArray[np.float64] = losses.mean(axis=0)
        return mean

    def _drift(self) -> float:
        anchors = np.stack([self.loops[i].anchor for i in self.watched])
        mean = anchors.mean(axis=0)
        apart = np.linalg.norm(anchors - mean) / math.sqrt(len(anchors))
        return float(apart / np.linalg.norm(mean - self.room.start))

    def _step_s(self, index: int) -> float:
        return STEP_S * (10.0 if index in self.setting.slow else 1.0)

    def _is_there(self, index: int) -> bool:
        return index not in self.setting.flapping or self.world.now % 90 < 30

    def _end_step(self, index: int) -> None:
        """End a step that began one step ago, with the parameters of then."""
        loop, student = self.loops[index], self.students[index]
        # The schedule is by the clock, which all have.
        loop.note_step(*student.step(int(self.world.now / STEP_S) - 1))
        self.steps[index] += 1
        if self.steps[index] % loop.settings.local_steps == 0 and self.setting.outer is None:
            loop.go_alone()
        elif self.steps[index] % loop.settings.local_steps == 0:
            partners = self._partners(index)
            update = loop.publish([self.students[other].peer_id for other in partners])
            if self._is_there(index):
                shards = [self._forged(index, shard) for shard in update.shards]
                for other in partners:
                    self._send(index, other, index, shards)
        loop.merge()
        if loop.is_behind and index not in self.fetching:
            self._catch_up(index)
        self.world.after(self._step_s(index), self._end_step, index)

    def _catch_up(self, index: int) -> None:
        """Fetch the model of somebody who is there, as `Learner` does, without its tries."""
        there = [other for other in self._partners(index) if self._is_there(other)]
        source = self.rng.choice(there)
        model = self.loops[source].anchor.copy()
        self.fetching.add(index)
        self.world.at(self._arrival(source, 2 * model.size), self._take_over, index, model)

    def _take_over(self, index: int, model: Vector) -> None:
        self.fetching.discard(index)
        self.students[index].parameters[:] = model
        self.loops[index].restart()

    def _acquaintances(self, index: int) -> Acquaintances:
        found = Acquaintances(self.students[index].peer_id)
        for partner in self._partners(index):
            keys = [self.students[other].peer_id.key for other in self._partners(partner)]
            found.tell(self.students[partner].peer_id, keys)
        return found

    def _partners(self, index: int) -> list[int]:
        cut = {a + b - index for a, b in self.setting.unreachable if index in (a, b)}
        return [other for other in self.present if other != index and other not in cut]

    def _send(self, index: int, other: int, origin: int, shards: list[EncodedShard]) -> None:
        """Send somebody an update, ours or one that we pass on."""
        size = sum(len(shard.payload) + 90 for shard in shards)
        self.world.at(self._arrival(index, size), self._receive, index, other, origin, shards)

    def _arrival(self, index: int, size: int) -> float:
        self.sent_bytes[index] += size
        begin = max(self.world.now, self.idle_from[index])
        self.idle_from[index] = begin + size / UPLINK_BYTES_PER_S
        return self.idle_from[index] + one_way_s(self.rng)

    def _receive(self, index: int, other: int, origin: int, shards: list[EncodedShard]) -> None:
        if not self._is_there(other):
            return
        me, sender = self.loops[other], self.students[origin].peer_id
        seen = self.loops[index].seen(self.students[other].peer_id)
        for shard in shards:
            me.receive(sender, structs.replace(shard.header, seen=seen), shard.payload)
        if origin == index:
            for target in self.acquaintances[other].targets(sender):
                self._send(other, self.index_of[target], origin, shards)

    def _average(self, index: int, round_number: int) -> None:
        """Average with the group of this round, which the first of its members collects."""
        ids = {self.students[i].peer_id: i for i in self.present if self._is_there(i)}
        me = self.students[index].peer_id
        if me in ids:
            group = group_of(me, sorted(ids), round_number=round_number, size=GROUP_SIZE)
            if group[0] == me and len(group) > 1:
                self._average_group([ids[member] for member in group], round_number)
        self.world.after(AVERAGE_EVERY_S, self._average, index, round_number + 1)

    def _average_group(self, group: list[int], round_number: int) -> None:
        """Average one part in a butterfly, whose bytes are counted, and which takes two ways."""
        part = round_number % self.parts.shard_count
        bounds = self.parts.bounds(part)
        before = [self.loops[i].anchor[bounds].copy() for i in group]
        first = self.loops[group[0]]
        mean, _ = mean_of_near(before[0], before, first.stride, first.reach)
        size = int(2 * (len(group) - 1) / len(group) * 2 * mean.size) + 180
        for i, own in zip(group, before, strict=True):
            arrival = self._arrival(i, size) + one_way_s(self.rng)
            self.world.at(arrival, self.loops[i].move, bounds, own, mean)

    def _forged(self, index: int, shard: EncodedShard) -> EncodedShard:
        if index not in self.setting.attackers:
            return shard
        header = shard.header
        values = decode_shard_untrusted(self.layout, header, shard.payload)
        kept = np.flatnonzero(values)
        if self.setting.attack == "flip":
            values = -values
        elif self.setting.attack == "scale":
            values = -100 * values
        else:
            noise = self.noise.standard_normal(kept.size, dtype=np.float32)
            noise *= np.linalg.norm(values) / np.linalg.norm(noise)
            values[kept] = 0
            values[self.noise.permutation(values.size)[: kept.size]] = noise
        return encode_shard(
            self.layout,
            header.shard,
            values,
            codec=Codec.TOPK,
            version=header.version,
            density=kept.size / values.size,
        )


def ours(room: Classroom, **setting: Any) -> Curve:
    """Run our outer loops."""
    return Ours(room, Setting(**setting)).run()
