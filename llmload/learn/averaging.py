"""Averaging some parts of the model within a group: a butterfly all-reduce.

    part      16 Ki numbers of the anchor
    round     the same number at all who average together, such as minutes of the clock
    reducer   the member of the group that averages a part, drawn by a hash of it, part and round

Each member sends each part to its reducer and gets the mean back, so it sends and receives about
twice what it averages, however large the group is. All take the same bits.

Nobody leads a group, and nobody has to agree on it beforehand. Once a reducer averages itself, it
waits `WINDOW_S` for the members that it knows of, and leaves out who was silent from then on; as
long do those who came before wait for it to begin. A part whose reducer is silent stays as it is.
Training goes on meanwhile, and what a step has changed since a part was sent stays
(`OuterLoop.move`).

A member whose part lies far from those of the others is left out of the mean: it was away, is too
slow, or lies. What it gets moves it towards the others. A reducer that lies moves nobody further
than members usually are apart (ClippedGossip, `OuterLoop.reach`).

Source: Ryabinin et al. 2021, "Moshpit SGD" (arXiv 2103.03239) for groups that change and the
butterfly; He, Karimireddy and Jaggi 2022 (2202.01545) for ClippedGossip.

This file does not know who should be in a group, or when.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import trio

from llmload.learn.codecs import Codec
from llmload.learn.mixing import reducer
from llmload.learn.outer import DISTANCE_FACTOR, OuterLoop
from llmload.learn.protocol import REDUCE, Mean
from llmload.learn.robust import length_of
from llmload.learn.shards import (
    EncodedShard,
    ShardHeader,
    ShardLayout,
    Vector,
    decode_shard_untrusted,
    encode_shard,
)
from llmload.swarm.beside import beside
from natswarm import (
    Call,
    CallFailed,
    DecodeError,
    NatswarmError,
    Node,
    Peer,
    PeerId,
    RequestRefused,
)

__all__ = ["AVERAGE_CODEC", "Averaged", "Averaging", "mean_of_near"]

# 0.05 % of each weight is much less than a step.
AVERAGE_CODEC = Codec.FP16
# 32 KiB as float16: a good link carries it in a moment, and a round has a few for each member.
PART_VALUE_COUNT = 16 * 1024
# Clocks differ by seconds, and so do the ends of long steps.
WINDOW_S = 10.0
CALL_TIMEOUT_S = 60.0
# Clocks that are a little off may be in the round before or after ours.
ROUND_OFF_MAX = 1
# A member makes one in each round.
CALLS_PER_PEER_MAX = 1 + 2 * ROUND_OFF_MAX


@dataclass(frozen=True, slots=True)
class Averaged:
    """What one round has brought.

    Attributes:
        counts: For each part, how many members its mean is of; 0 where none came.
        failures: Members that refused, were lost, or sent nonsense, and why.
    """

    counts: Mapping[int, int]
    failures: Mapping[PeerId, NatswarmError]


@dataclass(eq=False)
class _Reduction:
    """A part that we average: what its members sent, and what all of them get in the end."""

    offered: dict[PeerId, Vector] = field(default_factory=dict)
    is_complete: trio.Event = field(default_factory=trio.Event)
    mean: EncodedShard | None = None
    count: int = 0


@dataclass(eq=False)
class _Round:
    """The parts of one round.

    Attributes:
        begun: We take part ourselves.
        members: Whose parts are waited for.
        ours: Parts that fall to us. Others come from who takes others for members: they are given
            the mean of what is there.
        open: What is being averaged, by part; held while somebody waits for it.
        over: Parts that were averaged.
    """

    begun: trio.Event = field(default_factory=trio.Event)
    members: set[PeerId] = field(default_factory=set)
    ours: frozenset[int] = frozenset()
    open: dict[int, _Reduction] = field(default_factory=dict)
    over: set[int] = field(default_factory=set)

    def offer(self, part: int, peer_id: PeerId, values: Vector) -> _Reduction:
        """Take what a member sends of a part."""
        reduction = self.open.get(part) or _Reduction()
        if part in self.over or peer_id in reduction.offered:
            raise RequestRefused("this part of the round is over")
        self.open[part] = reduction
        reduction.offered[peer_id] = values
        self._look()
        return reduction

    def withdraw(self, part: int, peer_id: PeerId) -> None:
        """Forget what somebody sent of a part, if that is not averaged yet."""
        if (reduction := self.open.get(part)) is not None:
            reduction.offered.pop(peer_id, None)
            if not reduction.offered:
                del self.open[part]

    def begin(self, members: Iterable[PeerId], ours: Iterable[int]) -> None:
        """Say of whom which parts are expected."""
        self.members.update(members)
        self.ours = frozenset(ours)
        self.begun.set()
        self._look()

    def end(self, part: int, reduction: _Reduction) -> None:
        """Let no more come of a part; whoever is missing is not waited for again."""
        del self.open[part]
        self.over.add(part)
        if part in self.ours:
            self.members &= reduction.offered.keys()
            self._look()

    def _look(self) -> None:
        """Wake who waits for what is complete now."""
        for part, reduction in self.open.items() if self.begun.is_set() else ():
            if part not in self.ours or self.members <= reduction.offered.keys():
                reduction.is_complete.set()


class Averaging:
    """Our part in groups that average.

    Args:
        node: We.
        outer: Whose anchor it is.
        model_lock: Held while the anchor is written.
        round_number: Returns that of now; others may be one off.
        note_traffic: Told of payload bytes sent to and received from a peer.
    """

    def __init__(
        self,
        node: Node,
        outer: OuterLoop,
        model_lock: trio.Lock,
        round_number: Callable[[], int],
        note_traffic: Callable[[PeerId, int, int], None],
    ) -> None:
        self.layout = ShardLayout(outer.layout.space, PART_VALUE_COUNT)
        self._node = node
        self._outer = outer
        self._model_lock = model_lock
        self._round_number = round_number
        self._note_traffic = note_traffic
        self._rounds: dict[int, _Round] = {}

    def start(self) -> None:
        """Average for others from now on, in tasks of the node."""
        self._node.serve_calls(REDUCE, self._serve, calls_per_peer_max=CALLS_PER_PEER_MAX)

    async def average(
        self, peers: Sequence[Peer], parts: Sequence[int], round_number: int
    ) -> Averaged:
        """Average parts of our anchor with those of some peers, who do the same at this time."""
        me = self._node.peer_id
        members = [me, *(peer.peer_id for peer in peers)]
        shares: dict[PeerId, list[int]] = {member: [] for member in members}
        for part in parts:
            shares[reducer(members, part=part, round_number=round_number)].append(part)
        before = {part: self._outer.anchor[self.layout.bounds(part)].copy() for part in parts}
        means: dict[int, tuple[Vector, int]] = {}
        failures: dict[PeerId, NatswarmError] = {}

        async def ask(peer: Peer) -> None:
            share = {part: before[part] for part in shares[peer.peer_id]}
            try:
                if share:
                    await self._ask(peer, share, round_number, means)
            except NatswarmError as error:
                failures[peer.peer_id] = error
            except trio.EndOfChannel:
                failures[peer.peer_id] = CallFailed("it ended the call before all means were there")

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(ask, peer)
            await self._reduce_ours(
                members, {part: before[part] for part in shares[me]}, round_number, means
            )
        # Not while calls go on: a step of training, which may take minutes, holds the lock.
        async with self._model_lock:
            for part, (mean, _) in means.items():
                self._outer.move(self.layout.bounds(part), before[part], mean)
        counts = {part: count for part, (_, count) in means.items()}
        return Averaged(dict.fromkeys(parts, 0) | counts, failures)

    async def _ask(
        self,
        peer: Peer,
        before: Mapping[int, Vector],
        round_number: int,
        means: dict[int, tuple[Vector, int]],
    ) -> None:
        """Send a reducer its parts, and note the means, and of how many, as they come back."""
        first, *others = before
        ours = self._encode(first, before[first], round_number)
        async with peer.start_call(
            REDUCE, ours.header, ours.payload, timeout_s=CALL_TIMEOUT_S
        ) as call:

            async def send_others() -> None:
                with suppress(NatswarmError):  # receiving says why
                    for part in others:
                        ours = self._encode(part, before[part], round_number)
                        await call.send(ours.header, ours.payload)
                    await call.end()

            async with beside(send_others):
                for part in before:
                    mean, payload = await call.receive()
                    if mean.shard.shard != part:
                        raise DecodeError(f"part {mean.shard.shard} in place of {part}")
                    self._note_traffic(peer.peer_id, len(payload), len(payload))
                    means[part] = self._decode(EncodedShard(mean.shard, payload)), mean.count

    async def _reduce_ours(
        self,
        members: Sequence[PeerId],
        before: Mapping[int, Vector],
        round_number: int,
        means: dict[int, tuple[Vector, int]],
    ) -> None:
        """Average the parts that fall to us."""
        current = self._round(round_number)
        current.begin(members, before)
        reductions: dict[int, _Reduction] = {}
        for part, values in before.items():
            ours = self._decode(self._encode(part, values, round_number))
            with suppress(RequestRefused):  # the others did not wait for us
                reductions[part] = current.offer(part, self._node.peer_id, ours)
        for part, reduction in reductions.items():
            mean = await self._mean(current, part, reduction)
            means[part] = self._decode(mean), reduction.count

    async def _serve(self, call: Call[Mean, ShardHeader]) -> None:
        peer_id = call.peer.peer_id
        async for header, payload in call:
            number = header.version
            if abs(number - self._round_number()) > ROUND_OFF_MAX:
                raise RequestRefused(f"round {number} is not now: set the clock")
            current, values = self._round(number), self._decode(EncodedShard(header, payload))
            reduction = current.offer(header.shard, peer_id, values)
            try:
                mean = await self._mean(current, header.shard, reduction)
            finally:
                current.withdraw(header.shard, peer_id)  # nothing is held for who has left
            self._note_traffic(peer_id, len(mean.payload), len(payload))
            await call.send(Mean(mean.header, reduction.count), mean.payload)

    async def _mean(self, current: _Round, part: int, reduction: _Reduction) -> EncodedShard:
        """Wait for the members of a part, and average what has come then."""
        with trio.move_on_after(WINDOW_S):
            await current.begun.wait()
        if not current.begun.is_set():
            raise RequestRefused("we don't average in this round")
        with trio.move_on_after(WINDOW_S):
            await reduction.is_complete.wait()
        if reduction.mean is None:
            current.end(part, reduction)
            ours = self._outer.anchor[self.layout.bounds(part)]
            offered = [values for _, values in sorted(reduction.offered.items())]
            outer = self._outer
            mean, reduction.count = mean_of_near(ours, offered, outer.stride, outer.reach)
            reduction.mean = self._encode(part, mean, 0)
        return reduction.mean

    def _round(self, number: int) -> _Round:
        now = self._round_number()
        self._rounds = {
            each: found for each, found in self._rounds.items() if abs(each - now) <= ROUND_OFF_MAX
        }
        return self._rounds.setdefault(number, _Round())

    def _encode(self, part: int, values: Vector, version: int) -> EncodedShard:
        return encode_shard(self.layout, part, values, codec=AVERAGE_CODEC, version=version)

    def _decode(self, encoded: EncodedShard) -> Vector:
        return decode_shard_untrusted(self.layout, encoded.header, encoded.payload)


def mean_of_near(
    ours: Vector, offered: Sequence[Vector], stride: float, reach: float
) -> tuple[Vector, int]:
    """Return the mean of those vectors that lie near the middle, and of how many it is.

    The middle is that one which is nearest to half of them: ours may be what lies apart. Who is
    further away than twice what is usual among them was away, is too slow, or lies.

    Args:
        ours: float32 (count,).
        offered: The same, at least one.
        stride: Who is not further away than this, as root mean square, is near in any case.
        reach: Who is further away than this is not, whatever is usual.
    """

    def distances(values: Vector) -> list[float]:
        return [length_of(other - values) / math.sqrt(values.size) for other in offered]

    # Ours where it is as near as any.
    middle = min([ours, *offered], key=lambda each: statistics.median(distances(each)))
    found = distances(middle)
    bound = min(reach, DISTANCE_FACTOR * max(stride, statistics.median(found)))
    near = [each for each, distance in zip(offered, found, strict=True) if distance <= bound]
    total: Vector = np.zeros_like(middle)
    for values in near:
        total += values - middle
    # Of equal ones, their very bits.
    mean: Vector = middle + total / np.float32(max(1, len(near)))
    return mean, len(near)
