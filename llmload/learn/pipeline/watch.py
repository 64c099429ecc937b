"""Notice that nothing moves, and find out which stage is silent.

Connections tell of who has died. Who keeps a connection and computes nothing is told by the clock:
when nothing has come for several times what a step takes, all stages are asked how far they are. By
the order of 1F1B, one of them has what it needs and does not go on.

This file does not know what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import trio

from llmload.learn.pipeline.ends import EndsWorker
from llmload.learn.pipeline.protocol import STAGE, AskStage, StageState
from llmload.learn.pipeline.schedule import Progress, stuck_stage
from llmload.swarm.route import HopFailed, StageOffer
from natswarm import NatswarmError, Node

__all__ = ["SilenceWatch"]

# Not before lost datagrams were sent again.
STALL_FACTOR = 3.0
STALL_S_MIN = 5.0
# The first step makes the graphs, on devices of any speed.
FIRST_STEP_S = 120.0
ASK_TIMEOUT_S = 3.0
# So often nobody is found who is silent, before the whole way is made anew.
LOOKS_MAX = 3


class SilenceWatch:
    """Watches one way through the stages.

    Args:
        node: Whom to ask by.
        route: Its stages.
        worker: What makes the steps.
        longest_s: Returns what the longest step took so far; 0 before the first.
    """

    def __init__(
        self,
        node: Node,
        route: Sequence[StageOffer],
        worker: EndsWorker,
        longest_s: Callable[[], float],
    ) -> None:
        self._node = node
        self._route = route
        self._worker = worker
        self._longest_s = longest_s

    async def run(self, fail: Callable[[HopFailed], None]) -> None:
        """Watch until somebody is found; `fail` is told."""
        looks, seen_at = 0, 0.0
        while True:
            await trio.sleep(STALL_S_MIN / 5)
            moved_at, longest_s = self._worker.moved_at, self._longest_s()
            looks = looks if moved_at == seen_at else 0
            seen_at = moved_at
            stall_s = max(STALL_FACTOR * longest_s, STALL_S_MIN) if longest_s else FIRST_STEP_S
            if trio.current_time() < moved_at + (1 + looks) * stall_s:
                continue
            looks += 1
            silent = await self._find_silent()
            if self._worker.moved_at != moved_at:
                continue  # what was said is of the past
            if silent is not None:
                fail(silent)
                return
            if looks == LOOKS_MAX:
                fail(HopFailed(self._route[0], "nothing moves, and nobody knows why"))
                return

    async def _find_silent(self) -> HopFailed | None:
        """Return which stage keeps the others waiting, as far as they say."""
        found: dict[StageOffer, StageState] = {}

        async def ask(offer: StageOffer) -> None:
            with suppress(NatswarmError):
                peer = await self._node.connect(offer.peer_id)
                answer = await peer.call(STAGE, AskStage(), timeout_s=ASK_TIMEOUT_S)
                if isinstance(answer, StageState):
                    found[offer] = answer

        async with trio.open_nursery() as nursery:
            for offer in self._route:
                nursery.start_soon(ask, offer)
        for offer in self._route:
            if offer not in found:
                return HopFailed(offer, "does not answer")
        for offer in self._route:  # Apply goes from one to the next
            if found[offer].step < self._worker.step_count:
                return HopFailed(offer, "does not make the step that the others make")
        ours, is_validation = self._worker.done_count, self._worker.is_validating
        states = [found[offer] for offer in self._route]
        if is_validation:
            progress = [*(Progress(each.validated, 0) for each in states), Progress(ours, 0)]
        else:
            progress = [
                *(Progress(each.forward, each.backward) for each in states),
                Progress(ours, ours),
            ]
        stuck = stuck_stage(progress, self._worker.micro_batch_count, is_validation=is_validation)
        if stuck is None or stuck == len(self._route):
            return None  # on its way, or it is us
        return HopFailed(self._route[stuck], "has what it needs and does not go on")
