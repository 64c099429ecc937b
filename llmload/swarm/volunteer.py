"""Serve what the swarm lacks most, and something else when that changes.

    look who serves what -> choose blocks -> open them -> announce -> wait -> look again ...

A volunteer with fixed blocks only opens and announces them. One without looks around again every
minute or so, at a time drawn anew, and just before it moves once more: of several that see the same
gap, those who come later see it filled. Sessions under way stay with the blocks that they began on
until they end; new ones get the new blocks.

This file does not know what makes one range better than another: see `placement.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress

import trio

from llmload.config import GPT2Config, parameter_shapes
from llmload.engine.session import StageEngine
from llmload.swarm.blocks import BlockStack
from llmload.swarm.directory import StageDirectory
from llmload.swarm.placement import best_window, better_window, block_rates
from llmload.swarm.route import model_service
from llmload.swarm.stage import StageServer
from llmload.swarm.stage_session import Compute, StageLimits, in_thread
from natswarm import NatswarmError, Node

__all__ = ["Volunteer", "block_bytes"]

# How often we look whether other blocks need us more, from and to.
LOOK_AGAIN_S = (40.0, 80.0)
# Peers that came since the last look are asked how quick they are in so long.
SETTLE_S = (0.0, 10.0)


def block_bytes(config: GPT2Config, bytes_per_parameter: float = 4) -> list[int]:
    """Return the size of each block as an engine of its own.

    The first one holds the embeddings as well, the last one the head.
    """
    sizes = []
    for block in config.blocks:
        shapes = parameter_shapes(config, range(block, block + 1)).values()
        sizes.append(int(bytes_per_parameter * sum(map(math.prod, shapes))))
    return sizes


class Volunteer:
    """Serves blocks of one model on one node.

    Args:
        node: Where.
        config: The shape of the model.
        model_hash: `Model.content_hash`.
        open_block: Returns the engine of one block; blocking.
        candidates: Ranges to choose from; one, to serve that.
        limits: What strangers are given.
        on_change: Told the blocks that are served from now on, and why.
        compute: Where to open and compute.
        rng: Decides when to look, and among equals.

    Attributes:
        server: What serves now; None before the first blocks are open.
    """

    def __init__(
        self,
        node: Node,
        config: GPT2Config,
        model_hash: str,
        *,
        open_block: Callable[[int], StageEngine],
        candidates: Sequence[range],
        limits: StageLimits,
        on_change: Callable[[range, str], None],
        compute: Compute = in_thread,
        rng: random.Random | None = None,
    ) -> None:
        if not candidates:
            raise ValueError("there is no range of blocks to choose from")
        self.server: StageServer | None = None
        self._node = node
        self._config = config
        self._model_hash = model_hash
        self._open_block = open_block
        self._candidates = candidates
        self._limits = limits
        self._on_change = on_change
        self._compute = compute
        self._rng = rng or random.Random()
        self._directory = StageDirectory(node, model_hash, config.n_layer)
        self._engines: dict[int, StageEngine] = {}
        self._block_s = 0.0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once the first blocks are served.

        Raises:
            StageFailed: The runtime does not take a block.
            OSError: A block can't be read.
        """
        await self._directory.refresh()
        await self._directory.warm_up()  # how quick the others are decides, too
        rates = await self._rates()
        best = best_window(self._candidates, rates, self._rng.getrandbits(16))
        await self._serve(best, self._reason(best, rates))
        task_status.started()
        while True:
            await self._directory.warm_up()
            await trio.sleep(self._rng.uniform(*LOOK_AGAIN_S))
            if await self._better() is None:
                continue
            # Others may be about to do the same.
            await trio.sleep(self._rng.uniform(*SETTLE_S))
            if (better := await self._better()) is not None:
                await self._serve(better, "the swarm needs these more")

    async def _better(self) -> range | None:
        assert self.server is not None, "called after the first blocks were opened"
        rates = await self._rates()
        return better_window(
            self.server.offer.blocks,
            self.server.describe().block_s,
            self._candidates,
            rates,
            self._rng.getrandbits(16),
        )

    async def _rates(self) -> list[float]:
        """Return what the others can do, as far as we know."""
        await self._directory.refresh()
        return block_rates(self._directory.speeds(), self._config.n_layer)

    def _reason(self, blocks: range, rates: Sequence[float]) -> str:
        if len(self._candidates) == 1:
            return "as asked"
        missing = sum(rates[block] == 0 for block in blocks)
        return f"{missing} of them were missing" if missing else "they were the slowest"

    async def _serve(self, blocks: range, reason: str) -> None:
        """Open blocks, and serve them instead of what was served."""
        engines = {block: self._engines[block] for block in blocks if block in self._engines}
        for block in blocks:
            if block not in engines:
                engines[block] = await self._compute(self._open_block, block)
        self._engines = engines
        stack = BlockStack([self._engines[block] for block in blocks])
        if not self._block_s:
            self._block_s = await self._compute(stack.measure_block_s)
        server = StageServer(
            self._node,
            stack,
            self._model_hash,
            limits=self._limits,
            block_s=self._block_s,
            compute=self._compute,
        )
        server.start()
        self.server = server
        await self._node.announce([server.service])
        # Where this node takes no part in routing, neighbours hear of it by our record alone.
        with suppress(NatswarmError):
            await self._node.publish(
                model_service(self._model_hash), server.service.encode(), is_service=True
            )
        self._on_change(blocks, reason)
