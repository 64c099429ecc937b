"""Learning together without waiting: every peer publishes gradients, and takes what comes.

    anchor     what all of this peer's model is made of that it shares
    walk       parameters - anchor: where steps of our own AdamW on our own text have led from there
    residual   gradients along the walk that were not published yet

Every `local_steps` steps, a stretch, a peer adds the mean gradient of its walk to the residual and
publishes the largest values of that to all; the rest stays for later (error feedback). In a crowd
that is fewer values, for whoever hears other peers than the others do drifts away from them by the
noise of what it hears: to be heard by all is worth more than to be heard in full. What came in from
the others and what we published are averaged, and the anchor makes one step of an AdamW that all
have alike: along the mean gradient of everybody, with betas to the power of `local_steps`, at the
sum of the stretch's rates / sqrt(local_steps), since a gradient over n batches has sqrt(n) times
less noise. The walk until the stretch's end has done its work then, which was to take gradients
where the model is going, and is taken back; what was walked since stays.

A mean of steps of AdamW, which others exchange, is no step of AdamW along the mean gradient: each
is as long as its own noise, and what is rare in one text is drowned by those who never see it.

There is no barrier: local steps go on while updates travel. The step of the anchor is made once the
latest update of everybody who was heard lately is younger than half a stretch, or that time has
passed; what comes later is part of the next. If nobody is heard the walk is kept: alone the loop is
plain training. Who is slow makes steps of its anchor in the middle of a stretch, as soon as most
others have sent two updates: so its gradients are not those of a model of yesterday.

Where some pairs can't reach each other, who hears less takes its own update for those it misses: so
the weights between peers, as a matrix, have no negative eigenvalues. With them, steps would drive
apart those that they should bring together, and all would unlearn (docs/decisions/0010).

An update is weighed by its staleness, which is how many of our own updates were not yet part of its
sender's anchor (1 / sqrt(staleness / 4) beyond 4), and by `robust.Judge`, which compares it with
those of the others in the same step. The sender never chooses its weight. Our own update is judged
like any other, so that all who heard the same make the same step.

Peers drift apart by what was lost or came too late; so groups average parts of their anchors now
and then (`averaging.py`), cut to the usual distance (`move`, ClippedGossip).

Source: DiLoCo (arXiv 2311.08105) for stretches; Deep Gradient Compression (1712.01887) and
SparseLoCo (2508.15706) for the largest values with error feedback; FedOpt (2003.00295) for an
optimiser over what peers send; FedBuff (2106.06639) for weights by staleness; He, Karimireddy and
Jaggi 2022 (2202.01545) for ClippedGossip.

This file does not know clocks, streams, or how the local steps are made.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmload.learn.codecs import Codec
from llmload.learn.inbox import Contribution, Inbox, Partner, usual_waiting
from llmload.learn.optimizer import AdamW, AdamWSettings
from llmload.learn.robust import Judge, Reputation, cosine, length_of
from llmload.learn.shards import (
    EncodedShard,
    ShardHeader,
    ShardLayout,
    Vector,
    decode_shard_untrusted,
    encode_shard,
)
from natswarm import DecodeError, PeerId

__all__ = ["DISTANCE_FACTOR", "OuterLoop", "OuterSettings", "OuterStatistics", "Update"]

# An uplink carries so many copies of an update of full density.
COPIES = 8
# Updates cross on the way; up to here that is no staleness. If each weighed those of the others
# less than its own, models would drift apart by what they weigh differently.
STALENESS_FREE = 4
# How much of the mean crowd the newest count is.
CROWD_MEMORY = 0.1
# Who was heard within so many of our stretches is waited for, half a stretch at the most.
LATELY_STRETCHES = 2
# Distances between anchors that are remembered to know what is usual, and from when on they are.
DISTANCES_KEPT = 64
DISTANCES_MIN = 8
# Anchors that lie further apart than this many usual distances are pulled no harder.
DISTANCE_FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class OuterSettings:
    """How often and how much a peer publishes.

    Attributes:
        local_steps: Steps between two updates.
        density: Share of the values that one update holds, with up to `COPIES` partners; with more
            so much less that all copies together are as long. 1 for all, as int8.
        staleness_max: Updates whose sender had not taken so many of ours are too old.
    """

    local_steps: int = 6
    density: float = 0.055
    staleness_max: int = 64

    def __post_init__(self) -> None:
        if self.local_steps < 1 or not 0 < self.density <= 1 or self.staleness_max < 0:
            raise ValueError(f"these are no settings to learn with: {self}")


@dataclass(frozen=True, slots=True)
class Update:
    """What a peer publishes; everybody gets the same.

    Attributes:
        version: Rising by 1.
        shards: Encoded, in the order of the layout. What they hold of `seen` is for nobody yet.
        payload_bytes: Of all shards; headers (about 90 bytes each) not counted.
    """

    version: int
    shards: tuple[EncodedShard, ...]
    payload_bytes: int


@dataclass(slots=True)
class OuterStatistics:
    """Shards that came in, and what became of them.

    Attributes:
        taken: Made part of our model, with some weight.
        weight: The sum of those weights.
        stale: Too old.
        doubted: Weighed nothing: by their direction or their sender's reputation.
        repeated: Came before, or too many from one peer.
        damaged: Could not be decoded, or were for another model.
        averaged: Parts of the anchor, with some of the others.
    """

    taken: int = 0
    weight: float = 0.0
    stale: int = 0
    doubted: int = 0
    repeated: int = 0
    damaged: int = 0
    averaged: int = 0


class OuterLoop:
    """The part of one peer: gradients in, updates out; others' updates in, steps of the anchor out.

    Holds five vectors of the size of the model: anchor, residual, where the last stretch ended, and
    two of AdamW; a sixth during the anchor's step.

    Args:
        layout: How the model is cut.
        parameters: float32 (size,), the trainer's own array. `publish`, `merge` and `move` write
            to it, so they must not run during a step.
        me: Whose part this is.
        settings: How often and how much.
        optimizer: As for local steps: what the anchor's steps follow from.
        reputation: A factor in 0..1 for each peer, from elsewhere; None for 1.
        version: To count updates from. Who begins anew must not begin below what it published
            before: its partners would take that for repetitions.
    """

    def __init__(
        self,
        layout: ShardLayout,
        parameters: Vector,
        me: PeerId,
        settings: OuterSettings | None = None,
        *,
        optimizer: AdamWSettings | None = None,
        reputation: Reputation | None = None,
        version: int = 0,
    ) -> None:
        self.layout = layout
        self.settings = settings or OuterSettings()
        self.version = version
        self.statistics = OuterStatistics()
        self._parameters = parameters
        self._me = me
        self._local = optimizer or AdamWSettings()
        self._optimizer = AdamW(
            layout.space,
            replace(
                self._local,
                beta1=self._local.beta1**self.settings.local_steps,
                beta2=self._local.beta2**self.settings.local_steps,
                gradient_norm_max=math.inf,
            ),
        )
        self._judge = Judge(reputation)
        self._anchor = parameters.copy()
        self._residual = np.zeros_like(parameters)
        self._stretch_end = parameters.copy()
        self._inbox = Inbox(layout.shard_count)
        # Learning rates of this stretch, and of the one whose step of the anchor is not made yet.
        self._rates = 0.0
        self._learning_rate = 0.0
        self._due_rates: float | None = None
        self._step_count = 0
        self._due_since = 0
        self._heard_count = 0.0
        self._crowd = 1.0
        self._distances: deque[float] = deque(maxlen=DISTANCES_KEPT)

    def vectors(self) -> dict[str, Vector]:
        """Return what a checkpoint needs, float32 (size,) each; not copies."""
        return {
            "anchor": self._anchor,
            "residual": self._residual,
            **{f"anchor_{name}": vector for name, vector in self._optimizer.vectors().items()},
        }

    def facts(self) -> dict[str, Any]:
        """Return what else a checkpoint needs, for JSON."""
        return {
            "version": self.version,
            "crowd": self._crowd,
            "rates": self._rates,
            "powers": list(self._optimizer.powers),
        }

    def go_on_from(self, facts: Mapping[str, Any]) -> None:
        """Take the rest of a checkpoint, whose vectors are in place.

        What came in and was not part of the model is lost, as if it had been on the way.
        """
        self.version = max(self.version, facts["version"])
        self._crowd, self._rates = facts["crowd"], facts["rates"]
        beta1_power, beta2_power = facts["powers"]
        self._optimizer.powers = (beta1_power, beta2_power)

    def restart(self) -> None:
        """Go on from parameters that somebody else has written."""
        self._anchor[:] = self._parameters
        self._forget()

    def _forget(self) -> None:
        """Drop gradients that were not published, and what came in."""
        self._residual[:] = 0
        self._rates = 0.0
        self._due_rates = None
        self._inbox.clear()

    @property
    def crowd(self) -> float:
        """Updates that come in for each one of ours, ours among them; 1 while we are alone."""
        return self._crowd

    @property
    def anchor(self) -> Vector:
        """The part of our model that is shared, float32 (size,); only to be read."""
        return self._anchor

    def seen(self, peer: PeerId) -> int:
        """Return the latest version of a peer that is in our anchor; 0 for none."""
        return self._inbox.seen(peer)

    @property
    def is_behind(self) -> bool:
        """Whether most of those who are heard lately were not for long: they went on without us."""
        since = self._step_count - LATELY_STRETCHES * self.settings.local_steps
        active = self._inbox.heard_since(since)
        missed = [each for each in active if each.missed_at is not None and each.missed_at > since]
        return 2 * len(missed) > len(active)

    def agreement(self, peer: PeerId) -> float:
        """Return how far a peer's updates point where those of the others point, -1..1."""
        return self._judge.agreement(peer)

    # --- Ours --------------------------------------------------------------------------------

    def note_step(self, gradient: Vector, length: float, learning_rate: float) -> None:
        """Take the gradient of a step that the trainer has made.

        Args:
            gradient: float32 (size,); unchanged. Cut to the length to which AdamW cuts it.
            length: Of it.
            learning_rate: Of the step; 0 for a gradient besides.
        """
        clip = min(1.0, self._local.gradient_norm_max / max(length, 1e-30))
        self._residual += np.float32(clip / self.settings.local_steps) * gradient
        self._rates += learning_rate
        self._learning_rate = learning_rate or self._learning_rate

    def publish(self, partners: Sequence[PeerId], *, unheard: int = 0) -> Update:
        """End a stretch of local steps: return what others get. `merge` makes the anchor's step.

        Args:
            partners: Who gets it, all; those who are new are waited for, too.
            unheard: How many others learn the same and are not heard at all. Our own update counts
                once more for each, up to as many as there are partners.

        Raises:
            ValueError: The gradients hold NaN or infinity: training has failed.
        """
        self.settle()
        for peer in partners:
            self._meet(peer)
        self.version += 1
        density = self.settings.density * min(1.0, COPIES / max(1, len(partners)))
        weight = 1.0 + min(unheard, len(partners))
        shards = []
        for shard in range(self.layout.shard_count):
            bounds = self.layout.bounds(shard)
            encoded = encode_shard(
                self.layout,
                shard,
                self._residual[bounds],
                codec=Codec.INT8X256 if density == 1 else Codec.TOPK,
                version=self.version,
                density=density,
            )
            shards.append(encoded)
            # As the others see it, with the rounding of the codec. The rest stays for next time.
            values = decode_shard_untrusted(self.layout, encoded.header, encoded.payload)
            self._residual[bounds] -= values
            self._inbox.put(Contribution(self._me, encoded, weight))
        self._end_stretch()
        return Update(self.version, tuple(shards), sum(len(each.payload) for each in shards))

    def go_alone(self) -> None:
        """End a stretch of local steps when nobody is there to publish to: keep all of it."""
        self._forget()
        self.version += 1
        self._anchor[:] = self._parameters
        self._end_stretch()
        self._due_rates = None

    def _end_stretch(self) -> None:
        self._crowd += CROWD_MEMORY * (1 + self._heard_count - self._crowd)
        self._heard_count = 0.0
        self._stretch_end[:] = self._parameters
        self._due_rates, self._rates = self._rates, 0.0
        self._due_since = self._step_count

    def merge(self) -> None:
        """Make a step of the anchor if it is time. Once between any two steps."""
        self._step_count += 1
        stretch = self.settings.local_steps
        active = self._inbox.heard_since(self._step_count - LATELY_STRETCHES * stretch)
        if self._due_rates is None:
            # We are slow: others have made more stretches. So that ours begins where they are.
            while usual_waiting(active) > 1:
                rates = stretch * self._learning_rate
                self._advance(self._inbox.take(1), rates, self._anchor)
            return
        fresh = self._step_count - stretch / 2
        if self._due_since < fresh or all(each.heard_at >= fresh for each in active):
            self._step()

    def settle(self) -> None:
        """Make the anchor's step if one is due: who is not heard by now is not waited for."""
        if self._due_rates is not None:
            self._step()

    def _step(self) -> None:
        """Step along the mean of what came in; the walk until the stretch's end is taken back."""
        assert self._due_rates is not None
        taken = self._inbox.take()
        if all(len(contributions) <= 1 for contributions in taken):
            # Nobody: what our own steps did is better than one along their gradients.
            self._anchor[:] = self._stretch_end
        else:
            self._advance(taken, self._due_rates, self._stretch_end)
        self._due_rates = None

    def _advance(
        self, taken: Sequence[Sequence[Contribution]], rates: float, walked_from: Vector
    ) -> None:
        """Make a step of the anchor, and go on from there by what was walked since then."""
        mean = np.empty_like(self._anchor)
        for shard, contributions in enumerate(taken):
            self._average_shard(shard, contributions, out=mean[self.layout.bounds(shard)])
        self._parameters -= walked_from
        rate = rates / math.sqrt(self.settings.local_steps)
        self._optimizer.update(self._anchor, mean, learning_rate=rate)
        self._parameters += self._anchor

    def _average_shard(
        self, shard: int, contributions: Sequence[Contribution], *, out: Vector
    ) -> None:
        """Write the mean of updates of a shard, as far as they are believed.

        Ours is judged like any other, and in one order: so all who have heard the same make the
        same step.
        """
        contributions = sorted(contributions, key=lambda each: each.peer)
        decoded = [each.decode(self.layout) for each in contributions]
        lengths = [length_of(values) for values in decoded]
        for values, factor in zip(decoded, self._judge.cut(shard, lengths), strict=True):
            values *= np.float32(factor)
        self._compare(contributions, decoded)
        out[:] = 0
        weights = 0.0
        for each, values in zip(contributions, decoded, strict=True):
            belief = self._judge.belief(each.peer)
            self.statistics.doubted += belief == 0
            out += np.float32(each.weight * belief) * values
            weights += each.weight * belief
        out /= np.float32(max(weights, 1e-9))

    def _compare(self, contributions: Sequence[Contribution], decoded: Sequence[Vector]) -> None:
        """Tell the judge how far what each peer sent points where that of all others does.

        Who is not believed has no say in it: flipped signs make a sum point where honest updates of
        unusual text do not. Nor has anybody in its own case, however many of its updates came.
        """
        by_peer: dict[PeerId, Vector] = {}
        for each, values in zip(contributions, decoded, strict=True):
            before = by_peer.get(each.peer)
            by_peer[each.peer] = values if before is None else before + values
        beliefs = {peer: np.float32(self._judge.belief(peer)) for peer in by_peer}
        total = np.zeros_like(decoded[0])
        for peer, values in by_peer.items():
            total += beliefs[peer] * values
        self._judge.note(
            {
                peer: cosine(values, total - beliefs[peer] * values)
                for peer, values in by_peer.items()
            }
        )

    # --- Others' -----------------------------------------------------------------------------

    def receive(self, peer: PeerId, header: ShardHeader, payload: bytes) -> float:
        """Take one shard of somebody's update; may run during a local step.

        Whatever is wrong with it is counted in `statistics`, never raised.

        Returns:
            The weight it was taken with, 0..1; 0 if it was not.
        """
        try:
            decode_shard_untrusted(self.layout, header, payload)
        except DecodeError:
            self.statistics.damaged += 1
            return 0.0
        partner = self._meet(peer)
        if not self._inbox.note(partner, header, self._step_count):
            self.statistics.repeated += 1
            return 0.0
        # Who claims to have seen more of ours than there is has seen all: it can't gain by it.
        staleness = max(0, self.version - max(header.seen, partner.met_at))
        if staleness > self.settings.staleness_max:
            self.statistics.stale += 1
            return 0.0
        weight = math.sqrt(STALENESS_FREE / max(staleness, STALENESS_FREE))
        self._inbox.put(Contribution(peer, EncodedShard(header, payload), weight), partner)
        self._heard_count += 1 / self.layout.shard_count
        self.statistics.taken += 1
        self.statistics.weight += weight
        return weight * self._judge.belief(peer)

    # --- Averaging ---------------------------------------------------------------------------

    @property
    def stride(self) -> float:
        """How far a step of the anchor leads at most, as root mean square."""
        # A step of AdamW moves values by the rate at most.
        return math.sqrt(self.settings.local_steps) * self._local.learning_rate

    @property
    def reach(self) -> float:
        """How far a mean of anchors may be from ours and is believed, as root mean square."""
        if len(self._distances) >= DISTANCES_MIN:
            # One step of the anchor away is never far: that is what somebody has missed.
            usual = max(self.stride, statistics.median(self._distances))
        else:
            # As far as several stretches lead.
            usual = DISTANCES_MIN * math.sqrt(self.settings.local_steps) * self.stride
        return DISTANCE_FACTOR * usual

    def move(self, bounds: slice, before: Vector, mean: Vector) -> float:
        """Move a part of the anchor to a mean of several, or towards it if that is far away.

        Args:
            bounds: Where the part lies.
            before: The part when it was given away to be averaged, float32 (count,). What it has
                changed by since then stays.
            mean: The same, of several anchors. Who is near gets its very bits.

        Returns:
            The share of the way that was gone, up to 1.
        """
        difference = mean - before
        distance = length_of(difference) / math.sqrt(mean.size)
        clip = min(1.0, self.reach / distance) if distance > 0 else 1.0
        self._distances.append(distance * clip)
        anchor = self._anchor[bounds]
        if clip == 1 and np.array_equal(anchor, before):
            moved = mean
        else:
            moved = anchor + difference * np.float32(clip)
        # Where we walked from there stays what it was.
        for vector in (self._parameters, self._stretch_end):
            vector[bounds] = moved + (vector[bounds] - anchor)
        self._anchor[bounds] = moved
        self.statistics.averaged += 1
        return clip

    def forget(self, peer: PeerId) -> None:
        """Forget what came of a peer and is not part of our model, and its versions."""
        self._inbox.forget(peer)

    def _meet(self, peer: PeerId) -> Partner:
        # Who is new counts as heard a stretch ago: it is waited for.
        step = self._step_count - self.settings.local_steps
        return self._inbox.meet(peer, version=self.version, step=step)
