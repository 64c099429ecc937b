"""What a stage remembers of a sequence, and how much of that a device can hold.

Attention needs the keys and values of all earlier positions, so a stage keeps them between steps.
They are the one thing in inference that grows: 2 * n_embd * 4 bytes a position and block, 74 KB a
position for the whole of GPT-2 124M. A server has many sequences and clients that never come back,
hence a pool with a bound.

Nothing here is precious. A cache can be computed again from the tokens (or hidden states) that went
through the stage, and the client keeps those; so the pool may evict whatever is idle.

This file does not know ONNX Runtime, and nothing here is thread-safe: a pool belongs to one event
loop, a borrowed cache to whoever borrowed it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmload.config import GPT2Config
from llmload.errors import CacheFull

__all__ = ["CachePool", "KVCache", "cache_bytes"]

Key = TypeVar("Key", bound=Hashable)


def cache_bytes(config: GPT2Config, blocks: range, batch: int, positions: int) -> int:
    """Return the size in bytes of the keys and values of a stage at some number of positions."""
    float32_bytes = 4
    return 2 * len(blocks) * batch * positions * config.n_embd * float32_bytes


class KVCache:
    """Keys and values of one sequence (or a batch in lockstep) in the blocks of one stage.

    Args:
        config: The shape of the model.
        blocks: The blocks of the stage.
        batch: Sequences that advance together, position by position.
    """

    def __init__(self, config: GPT2Config, blocks: range, *, batch: int = 1) -> None:
        config.check_blocks(blocks)
        if batch < 1:
            raise ValueError(f"a cache is for at least one sequence, not {batch}")
        self.config = config
        self.blocks = blocks
        self.batch = batch
        empty = np.zeros((batch, config.n_head, 0, config.head_size), dtype=np.float32)
        self._arrays: tuple[NDArray[np.float32], ...] = (empty,) * (2 * len(blocks))

    @property
    def position(self) -> int:
        """How many positions are held, which is also the position of the next token."""
        return int(self._arrays[0].shape[2])

    @property
    def room(self) -> int:
        """How many positions may still come."""
        return self.config.n_ctx - self.position

    @property
    def byte_size(self) -> int:
        """Memory that the keys and values take, in bytes."""
        return cache_bytes(self.config, self.blocks, self.batch, self.position)

    @property
    def arrays(self) -> tuple[NDArray[np.float32], ...]:
        """Key, value, key, value, ... in the order of the blocks.

        Each is float32 (batch, n_head, position, head_size). They are replaced, never written to.
        """
        return self._arrays

    def replace(self, arrays: Sequence[NDArray[np.float32]]) -> None:
        """Take over the extended arrays that a step has computed, in the order of `arrays`.

        While a step runs, old and new arrays exist: it needs twice the memory of one sequence.

        Raises:
            ValueError: They are not what one step of this stage can give.
        """
        config = self.config
        if len(arrays) != len(self._arrays):
            raise ValueError(f"{len(self._arrays)} arrays were expected, got {len(arrays)}")
        position = arrays[0].shape[2]
        if not self.position <= position <= config.n_ctx:
            raise ValueError(f"position {position} is not in {self.position}..{config.n_ctx}")
        expected = (self.batch, config.n_head, position, config.head_size)
        if any(array.shape != expected for array in arrays):
            raise ValueError(f"not all arrays have the shape {expected}")
        self._arrays = tuple(arrays)

    def truncate(self, position: int) -> None:
        """Forget everything from `position` on, as if those tokens had never come.

        Wrong guesses of speculative decoding are taken back so; 0 starts a new sequence.

        Raises:
            ValueError: `position` is negative or beyond what is held.
        """
        if not 0 <= position <= self.position:
            raise ValueError(f"position {position} is not in 0..{self.position}")
        if position < self.position:
            # A copy, because a view would keep the memory of what is forgotten.
            self._arrays = tuple(array[:, :, :position].copy() for array in self._arrays)


class CachePool(Generic[Key]):
    """The caches of many sequences, together never larger than a bound.

    When room is needed, the cache that has been idle longest goes. Whoever comes back for it finds
    it gone (`KeyError`) and sends its history again.

    Args:
        max_bytes: Bound on the keys and values of all sequences. While steps run, their own
            sequences take up to twice their size: see `KVCache.replace`.
    """

    def __init__(self, *, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self.max_bytes = max_bytes
        self.evicted_count = 0
        self._idle: OrderedDict[Key, KVCache] = OrderedDict()  # longest idle first
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

    def open(self, key: Key, cache: KVCache) -> None:
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
    def borrow(self, key: Key, growth: int) -> Iterator[KVCache]:
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
        reserved = cache.byte_size + cache_bytes(cache.config, cache.blocks, cache.batch, growth)
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

    def _put_idle(self, key: Key, cache: KVCache) -> None:
        self._idle[key] = cache
        self._idle_bytes += cache.byte_size

    def _drop_idle(self, key: Key) -> None:
        self._idle_bytes -= self._idle.pop(key).byte_size
