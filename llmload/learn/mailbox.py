"""Updates that wait for a partner: our own, and those of others that we pass on to it.

This file does not know how they are sent, or what is in them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from llmload.learn.shards import EncodedShard
from natswarm import Peer, PeerId

__all__ = ["Mailbox", "Parcel"]

# Updates that wait for a partner, of one learner and of all; older ones are dropped, as is what is
# sent while it is away.
WAITING_OF_ONE = 2
MAILBOX_SIZE = 8
# A partner that failed is left alone for so long.
REST_S = 30.0


@dataclass(frozen=True, eq=False)
class Parcel:
    """An update on its way to a partner.

    Attributes:
        shards: As they were published.
        origin: Who did that; None for ourselves.
    """

    shards: Sequence[EncodedShard]
    origin: PeerId | None = None

    @property
    def payload_bytes(self) -> int:
        """Of all shards; headers (about 90 bytes each) not counted."""
        return sum(len(shard.payload) for shard in self.shards)


@dataclass(eq=False)
class Mailbox:
    """What we have for one partner, a peer that learns the same model.

    Attributes:
        peer: The partner.
        waiting: Ours, and what we pass on.
        news: Something waits.
        is_resting: A call to it has failed; it is left alone for a while.
        is_steady: It did its part when we averaged last, or has confirmed an update since.
        has_all: Nothing of ours waits or is on the way, or it rests.
    """

    peer: Peer
    waiting: deque[Parcel] = field(default_factory=lambda: deque(maxlen=MAILBOX_SIZE))
    news: trio.Event = field(default_factory=trio.Event)
    is_resting: bool = False
    is_steady: bool = True
    has_all: trio.Event = field(default_factory=trio.Event)

    def post(self, parcel: Parcel) -> None:
        """Let an update wait."""
        same = [each for each in self.waiting if each.origin == parcel.origin]
        if len(same) >= WAITING_OF_ONE:
            self.waiting.remove(same[0])
        self.waiting.append(parcel)
        self.news.set()
        if parcel.origin is None and not self.is_resting:
            self.has_all = trio.Event()

    async def next_parcel(self) -> Parcel:
        """Wait for an update, and take it out."""
        if all(parcel.origin is not None for parcel in self.waiting):
            self.has_all.set()
        while not self.waiting:
            self.news = trio.Event()
            await self.news.wait()
        return self.waiting.popleft()

    async def rest(self) -> None:
        """Leave the partner alone for a while."""
        self.is_resting = True
        self.has_all.set()
        await trio.sleep(REST_S)
        self.is_resting = False
