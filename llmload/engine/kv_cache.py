"""What a stage remembers of a sequence, and how much of that a device can hold.

Attention needs the keys and values of all earlier positions, so a stage keeps them between steps.
They are the one thing in inference that grows: 2 * n_embd * 4 bytes a position and block, 74 KB a
position for the whole of GPT-2 124M. A server has many sequences and clients that never come back,
hence a pool with a bound.

Nothing here is precious. A cache can be computed again from the tokens (or hidden states) that went
through the stage, and the client keeps those; so the pool may evict whatever is idle.

This file does not know ONNX Runtime, and nothing here is thread-safe: pools and arenas belong to
one event loop, a borrowed cache to whoever borrowed it.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmload.config import GPT2Config
from llmload.errors import CacheFull

__all__ = ["CachePool", "KVArena", "KVCache", "SequenceCache", "cache_bytes"]

_FLOAT32_BYTES = 4
# Gives pages back to the system; None where there is no such call.
_DISCARD: int | None = getattr(mmap, "MADV_DONTNEED", None)


class SequenceCache(Protocol):
    """What a pool has to know of a cache."""

    @property
    def byte_size(self) -> int:
        """Memory that it takes, in bytes."""

    def growth_bytes(self, positions: int) -> int:
        """Return how much more it takes with so many more positions."""


Key = TypeVar("Key", bound=Hashable)
CacheT = TypeVar("CacheT", bound=SequenceCache)


def cache_bytes(config: GPT2Config, blocks: range, batch: int, positions: int) -> int:
    """Return the size in bytes of the keys and values of a stage at some number of positions."""
    return 2 * len(blocks) * batch * positions * config.n_embd * _FLOAT32_BYTES


class KVArena:
    """Room for the keys and values of several sequences, side by side in one array per tensor.

    Sequences of one arena can take a step together without a copy: the runtime is given the array,
    or the part of it in which they lie, and works in place. The room is address space for whole
    contexts; the system gives it memory page by page, as positions are written.

    Args:
        config: The shape of the model.
        blocks: The blocks of the stage.
        slot_count: Sequences that find room.
    """

    def __init__(self, config: GPT2Config, blocks: range, slot_count: int) -> None:
        config.check_blocks(blocks)
        if slot_count < 1:
            raise ValueError(f"a cache is for at least one sequence, not {slot_count}")
        self.config = config
        self.blocks = blocks
        self.slot_count = slot_count
        shape = (slot_count, config.n_head, config.n_ctx, config.head_size)
        self._slot_bytes = math.prod(shape[1:]) * _FLOAT32_BYTES
        self._maps = [_map_memory(slot_count * self._slot_bytes) for _ in range(2 * len(blocks))]
        self._arrays = tuple(
            np.frombuffer(memory, dtype=np.float32).reshape(shape) for memory in self._maps
        )
        self._free = list(range(slot_count))

    @property
    def arrays(self) -> tuple[NDArray[np.float32], ...]:
        """Key, value, key, value, ... in the order of the blocks, of all slots.

        Each is float32 (slot_count, n_head, n_ctx, head_size).
        """
        return self._arrays

    @property
    def free_count(self) -> int:
        """How many sequences still find room."""
        return len(self._free)

    def new_cache(self) -> KVCache:
        """Return the empty cache of a new sequence. Its slot is free again when it is dropped.

        Raises:
            CacheFull: All slots are taken.
        """
        if not self._free:
            raise CacheFull(f"all {self.slot_count} slots of this arena are taken; try again later")
        # The lowest: slots in use stay close together, and so do those of one step.
        slot = min(self._free)
        self._free.remove(slot)
        cache = KVCache(self.config, self.blocks, arena=self, first_slot=slot)
        weakref.finalize(cache, self._release, slot)
        return cache

    def _release(self, slot: int) -> None:
        # Whole pages only; what is left at the ends is less than a page.
        start = -(-slot * self._slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (slot + 1) * self._slot_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if _DISCARD is not None and end > start:
            for memory in self._maps:
                memory.madvise(_DISCARD, start, end - start)
        self._free.append(slot)


class KVCache:
    """Keys and values of one sequence (or a batch in lockstep) in the blocks of one stage.

    Args:
        config: The shape of the model.
        blocks: The blocks of the stage.
        batch: Sequences that advance together, position by position.
        arena: Where they lie; None for an arena of their own.
        first_slot: The first of the `batch` slots in the arena that are theirs.
    """

    def __init__(
        self,
        config: GPT2Config,
        blocks: range,
        *,
        batch: int = 1,
        arena: KVArena | None = None,
        first_slot: int = 0,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.batch = batch
        self.arena = KVArena(config, blocks, batch) if arena is None else arena
        self.first_slot = first_slot
        self._position = 0
        self._touched_count = 0  # positions that have memory, also those that were taken back

    @property
    def position(self) -> int:
        """How many positions are held, which is also the position of the next token."""
        return self._position

    @property
    def room(self) -> int:
        """How many positions may still come."""
        return self.config.n_ctx - self._position

    @property
    def byte_size(self) -> int:
        """Memory that the keys and values take, in bytes; what was taken back keeps its memory."""
        return cache_bytes(self.config, self.blocks, self.batch, self._touched_count)

    def growth_bytes(self, positions: int) -> int:
        """Return how much more memory so many more positions take, in bytes."""
        return cache_bytes(self.config, self.blocks, self.batch, positions)

    @property
    def arrays(self) -> tuple[NDArray[np.float32], ...]:
        """Key, value, key, value, ... in the order of the blocks.

        Each is float32 (batch, n_head, position, head_size), a view that later steps do not change
        unless positions are taken back.
        """
        slots = slice(self.first_slot, self.first_slot + self.batch)
        return tuple(array[slots, :, : self._position] for array in self.arena.arrays)

    def advance(self, count: int) -> None:
        """Count in `count` positions that a step has written behind those held.

        Raises:
            ValueError: There is no room for so many.
        """
        if not 0 <= count <= self.room:
            raise ValueError(f"{count} new positions, there is room for {self.room}")
        self._position += count
        self._touched_count = max(self._touched_count, self._position)

    def truncate(self, position: int) -> None:
        """Forget everything from `position` on, as if those tokens had never come.

        Wrong guesses of speculative decoding are taken back so; 0 starts a new sequence. It costs
        nothing: what comes next is written over it.

        Raises:
            ValueError: `position` is negative or beyond what is held.
        """
        if not 0 <= position <= self._position:
            raise ValueError(f"position {position} is not in 0..{self._position}")
        self._position = position


def _map_memory(byte_count: int) -> mmap.mmap:
    memory = mmap.mmap(-1, byte_count)
    # With huge pages the first position of a head would take 2 MB.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages does not know the advice
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class CachePool(Generic[Key, CacheT]):
    """The caches of many sequences, together never larger than a bound.

    When room is needed, the cache that has been idle longest goes. Whoever comes back for it finds
    it gone (`KeyError`) and sends its history again.

    Args:
        max_bytes: Bound on the keys and values of all sequences.
    """

    def __init__(self, *, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self.max_bytes = max_bytes
        self.evicted_count = 0
        self._idle: OrderedDict[Key, CacheT] = OrderedDict()  # longest idle first
        self._idle_bytes = 0
        self._borrowed_bytes: dict[Key, int] = {}  # with the growth that was asked for
        self._closed_while_borrowed: set[Key] = set()

    def __len__(self) -> int:
        return len(self._idle) + len(self._borrowed_bytes)

    def __contains__(self, key: object) -> bool:
        return key in self._idle or key in self._borrowed_bytes

    @property
    def byte_size(self) -> int:
        """Bytes held or reserved; never more than `max_bytes`."""
        return self._idle_bytes + sum(self._borrowed_bytes.values())

    def open(self, key: Key, cache: CacheT) -> None:
        """Add the cache of a new sequence.

        Raises:
            ValueError: The key is in use.
            CacheFull: There is no room for it.
        """
        if key in self:
            raise ValueError(f"there is a cache for {key!r} already")
        self._make_room(cache.byte_size)
        self._put_idle(key, cache)

    def close(self, key: Key) -> None:
        """Drop a sequence; one that is borrowed goes when it is given back. Unknown keys pass."""
        if key in self._borrowed_bytes:
            self._closed_while_borrowed.add(key)
        elif key in self._idle:
            self._drop_idle(key)

    @contextmanager
    def borrow(self, key: Key, growth: int) -> Iterator[CacheT]:
        """Lend a cache for one step that adds up to `growth` positions.

        The memory is reserved before the step starts, so the bound holds whatever else runs.

        Raises:
            KeyError: The sequence is unknown, closed, or was evicted.
            ValueError: It is borrowed already: steps of one sequence follow each other.
            CacheFull: Even with everything idle evicted there is no room for the growth.
        """
        if key in self._borrowed_bytes:
            raise ValueError(f"the cache of {key!r} is in use by another step")
        if growth < 0:
            raise ValueError(f"growth must not be negative, got {growth}")
        cache = self._idle[key]
        reserved = cache.byte_size + cache.growth_bytes(growth)
        self._drop_idle(key)
        try:
            self._make_room(reserved)
        except CacheFull:
            self._put_idle(key, cache)  # it came from there, so its room is still free
            raise
        self._borrowed_bytes[key] = reserved
        try:
            yield cache
        finally:
            del self._borrowed_bytes[key]
            if key in self._closed_while_borrowed:
                self._closed_while_borrowed.discard(key)
            else:
                self._put_idle(key, cache)

    def _make_room(self, wanted_bytes: int) -> None:
        borrowed_bytes = sum(self._borrowed_bytes.values())
        if borrowed_bytes + wanted_bytes > self.max_bytes:
            # Checked before anything is evicted: an impossible wish must not empty the pool.
            raise CacheFull(
                f"{wanted_bytes} bytes do not fit into a pool of {self.max_bytes}, of which "
                f"{borrowed_bytes} are in use"
            )
        while borrowed_bytes + self._idle_bytes + wanted_bytes > self.max_bytes:
            self._drop_idle(next(iter(self._idle)))
            self.evicted_count += 1

    def _put_idle(self, key: Key, cache: CacheT) -> None:
        self._idle[key] = cache
        self._idle_bytes += cache.byte_size

    def _drop_idle(self, key: Key) -> None:
        self._idle_bytes -= self._idle.pop(key).byte_size
