"""The blocks that a device holds, each an engine of its own, so that a session may use any of them.

Peers have memory for different numbers of blocks, and come and go: their ranges overlap as they
may. If a session had to take a peer's range whole, most of them would not fit together. So a peer
that holds blocks 0-6 also serves 0-3 to one session and 5-6 to another.

Every block is a session of ONNX Runtime. Against one session for the whole range that costs a call
and a copy of the hidden states a block: some tens of microseconds of milliseconds.

This file does not know streams, and nothing here is thread-safe: see `StageEngine`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmload.config import GPT2Config
from llmload.engine.kv_cache import KVCache
from llmload.engine.session import BatchStep, StageEngine
from llmload.weights import Weights

__all__ = ["BatchItem", "BlockStack", "StackCache"]

# Enough steps for a median, after one that warms up.
MEASURED_STEPS = 5
SLOTS = 64


class StackCache:
    """What some consecutive blocks remember of one sequence."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches = tuple(caches)
        self.blocks = range(self.caches[0].blocks.start, self.caches[-1].blocks.stop)

    @property
    def position(self) -> int:
        """How many positions are held."""
        return self.caches[0].position

    @property
    def byte_size(self) -> int:
        """Memory that the keys and values take, in bytes."""
        return sum(cache.byte_size for cache in self.caches)

    def growth_bytes(self, positions: int) -> int:
        """Return how much more memory so many more positions take, in bytes."""
        return sum(cache.growth_bytes(positions) for cache in self.caches)

    def truncate(self, position: int) -> None:
        """Forget everything from `position` on; see `KVCache.truncate`."""
        for cache in self.caches:
            cache.truncate(position)


class BatchItem(NamedTuple):
    """What one sequence adds to a step of many.

    Attributes:
        x: Token ids (time,) where its blocks begin with the first of the model, otherwise hidden
            states float32 (time, n_embd).
        cache: Of `BlockStack.new_cache`.
        logits_count: For how many of the last positions logits are wanted at the model's end.
    """

    x: NDArray[Any]
    cache: StackCache
    logits_count: int = 1


class BlockStack:
    """Consecutive blocks of a model, ready to compute.

    Args:
        engines: In order; each starts where the one before has ended. A session may begin and end
            only where an engine does.
        slot_count: Sequences that find room at once.

    Raises:
        ValueError: They are not one part of one model.
    """

    def __init__(self, engines: Sequence[StageEngine], *, slot_count: int = SLOTS) -> None:
        blocks = [index for engine in engines for index in engine.blocks]
        if not blocks or blocks != list(range(blocks[0], blocks[0] + len(blocks))):
            raise ValueError(f"the engines hold blocks {blocks}, which do not follow each other")
        if any(engine.config != engines[0].config for engine in engines):
            raise ValueError("the engines are of different models")
        self.config: GPT2Config = engines[0].config
        self.blocks = range(blocks[0], blocks[-1] + 1)
        self._engines = {engine.blocks.start: engine for engine in engines}
        # Side by side, so that sequences are computed together. Only address space until used.
        self._arenas = {engine.blocks.start: engine.new_arena(slot_count) for engine in engines}

    @classmethod
    def open(
        cls, config: GPT2Config, weights: Weights, blocks: range, *, intra_op_threads: int = 1
    ) -> BlockStack:
        """Open one engine for each block.

        Args:
            config: The shape of the model.
            weights: At least the parameters of `blocks`.
            blocks: Contiguous range of block indexes.
            intra_op_threads: Threads that work on one operator.

        Raises:
            ValueError: `blocks` is not a part of the model, or `weights` do not fit it.
            StageFailed: The runtime does not take the model.
        """
        config.check_blocks(blocks)
        return cls(
            [
                StageEngine(
                    config, weights, range(index, index + 1), intra_op_threads=intra_op_threads
                )
                for index in blocks
            ]
        )

    def holds(self, blocks: range) -> bool:
        """Whether a session may use exactly these blocks."""
        return bool(blocks) and self._chain(blocks) is not None

    def new_cache(self, blocks: range) -> StackCache:
        """Return the empty cache of a new sequence in some of the blocks.

        Raises:
            ValueError: They are not held, or an engine holds more than these.
            CacheFull: All slots are taken.
        """
        chain = self._chain(blocks)
        if not chain:
            raise ValueError(f"blocks {blocks} are not among {self.blocks}")
        return StackCache([self._arenas[engine.blocks.start].new_cache() for engine in chain])

    def run_batch(self, items: Sequence[BatchItem]) -> list[NDArray[np.float32]]:
        """Advance many sequences, each through the blocks of its own cache.

        Returns:
            For each item logits float32 (min(logits_count, time), vocab_size) at the model's end,
            hidden states float32 (time, n_embd) before it.

        Raises:
            ValueError: An item does not fit, or the context has no room.
            StageFailed: The runtime could not compute.
            In both cases the caches are unchanged.
        """
        positions = [item.cache.position for item in items]
        outputs = [item.x for item in items]
        try:
            for start, engine in self._engines.items():
                present = [
                    (index, part)
                    for index, item in enumerate(items)
                    for part in item.cache.caches
                    if part.blocks.start == start
                ]
                results = engine.run_batch(
                    [
                        BatchStep(outputs[index], part, items[index].logits_count)
                        for index, part in present
                    ]
                )
                for (index, _), result in zip(present, results, strict=True):
                    outputs[index] = result
        except BaseException:
            for item, position in zip(items, positions, strict=True):
                item.cache.truncate(position)  # the blocks that came that far
            raise
        return outputs

    def measure_block_s(self) -> float:
        """Return the seconds that one position takes in one block, the head of the model included.

        Blocking; some ten steps of one token.
        """
        shape = (1,) if self.blocks.start == 0 else (1, self.config.n_embd)
        x = np.zeros(shape, dtype=np.int64 if self.blocks.start == 0 else np.float32)
        cache = self.new_cache(self.blocks)
        seconds = []
        for _ in range(MEASURED_STEPS + 1):
            started_at = time.perf_counter()
            self.run_batch([BatchItem(x, cache)])
            seconds.append(time.perf_counter() - started_at)
            cache.truncate(0)
        return float(np.median(seconds[1:])) / len(self.blocks)

    def _chain(self, blocks: range) -> list[StageEngine] | None:
        """Return the engines that together hold exactly these blocks, or None."""
        chain, start = [], blocks.start
        while start < blocks.stop:
            engine = self._engines.get(start)
            if engine is None or engine.blocks.stop > blocks.stop:
                return None
            chain.append(engine)
            start = engine.blocks.stop
        return chain
