"""Which devices train which blocks: who offers, who is tried first, and who was found wanting.

A device that trained before keeps its place in the row and so, most of the time, its blocks, whose
states are on its disk; whoever is new takes the place of one that is gone.

This file does not know what a training does with the devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import trio

from llmload.learn.pipeline.protocol import STAGE, AskStage, StageState, training_service
from llmload.learn.pipeline.schedule import cut_blocks
from llmload.swarm.route import HopFailed, NoRoute, StageOffer
from natswarm import NatswarmError, Node, PeerId

__all__ = ["StageSearch", "place_stages"]

# For so long after a failure a device is taken only if nobody else is there; each further one in a
# row doubles it.
AVOID_S = 30.0
AVOID_S_MAX = 3600.0
RETRY_S = 1.0
ASK_TIMEOUT_S = 5.0
# Devices asked at once; each may cost a puncture.
ASKED_MAX = 32


def place_stages(
    before: Sequence[PeerId | None], rooms: Mapping[PeerId, int], blocks: range, stage_count: int
) -> tuple[StageOffer, ...] | None:
    """Return who holds which blocks; None if there is no room for all.

    Args:
        before: Who held them until now, in order; None for who is to be replaced.
        rooms: Blocks that each device has room for, the ones to prefer first.
        blocks: What is to be held.
        stage_count: Devices at most.
    """
    new = [peer_id for peer_id in rooms if peer_id not in before]
    row = []
    for peer_id in before:
        if peer_id is not None and peer_id in rooms:
            row.append(peer_id)
        elif new:
            row.append(new.pop(0))
    row = [*row, *new][:stage_count]
    parts = cut_blocks(blocks, [rooms[peer_id] for peer_id in row])
    if parts is None:
        row = sorted(rooms, key=lambda peer_id: -rooms[peer_id])[:stage_count]
        parts = cut_blocks(blocks, [rooms[peer_id] for peer_id in row])
    if parts is None:
        return None
    return tuple(
        StageOffer(part[0], part[-1], peer_id)
        for part, peer_id in zip(parts, row, strict=True)
        if part
    )


class StageSearch:
    """Finds devices for one training.

    Args:
        node: Whom to ask.
        model_hash: `Model.content_hash` of the model that the training began with.
        block_count: Blocks to be held, from the first on.
    """

    def __init__(self, node: Node, model_hash: str, block_count: int) -> None:
        self._node = node
        self._service = training_service(model_hash)
        self._blocks = range(block_count)
        self._strikes: dict[PeerId, int] = {}
        self._avoid_until: dict[PeerId, float] = {}

    def shun(self, failure: HopFailed, route: Sequence[StageOffer]) -> None:
        """Leave a stage alone for a while, and the one before it where that may be the culprit."""
        blamed = [failure.offer.peer_id]
        row = [offer.peer_id for offer in route]
        if failure.is_input and failure.offer.peer_id in row[1:]:
            blamed.append(row[row.index(failure.offer.peer_id) - 1])
        for peer_id in blamed:
            strikes = self._strikes.get(peer_id, 0)
            self._strikes[peer_id] = strikes + 1
            avoid_s = min(AVOID_S * 2**strikes, AVOID_S_MAX)
            self._avoid_until[peer_id] = trio.current_time() + avoid_s

    async def wait_route(
        self,
        before: Sequence[StageOffer],
        *,
        stage_count: int,
        patience_s: float,
        is_over: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> tuple[StageOffer, ...]:
        """Wait until there is room for all blocks.

        Args:
            before: Who held them until now.
            stage_count: Devices at most.
            patience_s: How long to wait; 0 gives up at once.
            is_over: Whether nobody wants to know any more.
            tell: Told in words what is waited for.

        Returns:
            Who holds what; empty if it is over.

        Raises:
            NoRoute: There is not enough room.
        """
        since = trio.current_time()
        told = ""
        while not is_over():
            rooms = await self._rooms()
            row = [None if self._is_shunned(offer.peer_id) else offer.peer_id for offer in before]
            route = place_stages(row, rooms, self._blocks, stage_count)
            if route is not None:
                return route
            missing = self._missing(rooms, stage_count)
            if trio.current_time() >= since + patience_s:
                raise missing
            if str(missing) != told:
                told = str(missing)
                tell(f"waiting: {missing}")
            await trio.sleep(RETRY_S)
        return ()

    async def _rooms(self) -> dict[PeerId, int]:
        """Return who offers room for how many blocks, those to prefer first."""
        found: dict[PeerId, tuple[bool, float, int]] = {}

        async def ask(peer_id: PeerId) -> None:
            with suppress(NatswarmError):
                peer = await self._node.connect(peer_id)
                state = await peer.call(STAGE, AskStage(), timeout_s=ASK_TIMEOUT_S)
                if isinstance(state, StageState) and state.is_free and state.room:
                    rtt_s = peer.statistics().rtt_s
                    found[peer_id] = (
                        self._is_shunned(peer_id),
                        math.inf if rtt_s is None else rtt_s,
                        state.room,
                    )

        async with trio.open_nursery() as nursery:
            for peer_id in (await self._offering())[:ASKED_MAX]:
                nursery.start_soon(ask, peer_id)
        in_order = sorted(found, key=lambda peer_id: (*found[peer_id][:2], peer_id))
        return {peer_id: found[peer_id][2] for peer_id in in_order}

    async def _offering(self) -> list[PeerId]:
        """Return who says that it trains this model: of our neighbourhood, and by routing."""
        found = {
            record.peer_id
            for record in await self._node.find_peers()
            if self._service in record.services
        }
        with suppress(NatswarmError):  # this node takes no part in routing, or nobody answers
            found.update(await self._node.find_service(self._service))
        return sorted(found - {self._node.peer_id})

    def _is_shunned(self, peer_id: PeerId) -> bool:
        return self._avoid_until.get(peer_id, -math.inf) > trio.current_time()

    def _missing(self, rooms: Mapping[PeerId, int], stage_count: int) -> NoRoute:
        count = len(self._blocks)
        if not rooms:
            return NoRoute(
                "nobody we know of offers to train this model, or all are busy. Start "
                "`llmload up --train` with it on other devices, and give one's invite by --join.",
                [self._blocks],
            )
        room = sum(sorted(rooms.values(), reverse=True)[:stage_count])
        return NoRoute(
            f"{len(rooms)} devices offer to train this model, of which {stage_count} may be used; "
            f"they have room for {room} of {count} blocks. Start `llmload up --train` on more "
            "devices or give it more --memory, and let --stages be as many.",
            [range(room, count)],
        )
