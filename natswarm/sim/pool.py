"""Which of a NAT's external addresses a mapping gets.

A carrier has thousands of subscribers for each address and many addresses. Paired, a subscriber
keeps to one of them; arbitrary, each mapping may come from another, and a peer that knows one echo
does not even know the address to probe.

Every address has all ports and its own allocator. Inside the NAT an external endpoint is a *slot*,
65,536 times the index of its address plus its port; with one address slots are ports, and no pool
is in the way.

Source: RFC 4787 section 4.1, REQ-2 ("IP address pooling"). Knows no table.
"""

from __future__ import annotations

import random

from natswarm.nat.behaviour import Pooling
from natswarm.sim.ports import Allocation, Allocator, IsFree, make_allocator

__all__ = ["PORT_COUNT", "make_pool"]

PORT_COUNT = 65_536


def make_pool(
    allocation: Allocation, address_count: int, pooling: Pooling, rng: random.Random
) -> Allocator:
    """Return what gives out slots."""
    if address_count == 1:
        return make_allocator(allocation, rng)
    allocators = [make_allocator(allocation, rng) for _ in range(address_count)]
    if pooling is Pooling.PAIRED:
        return _PairedPool(allocators, rng)
    return _ArbitraryPool(allocators, rng)


class _Pool:
    def __init__(self, allocators: list[Allocator], rng: random.Random) -> None:
        self._allocators = allocators
        self._rng = rng

    def skip(self, count: int) -> None:
        # What is skipped is large where it matters; the remainder would change nothing.
        for allocator in self._allocators:
            allocator.skip(count // len(self._allocators))

    def release(self, subscriber: str, port: int) -> None:
        self._allocators[port // PORT_COUNT].release(subscriber, port % PORT_COUNT)

    def _allocate_at(
        self, index: int, subscriber: str, port: int, is_free: IsFree, now: float
    ) -> int | None:
        base = index * PORT_COUNT

        def is_port_free(port: int) -> bool:
            return is_free(base + port)

        found = self._allocators[index].allocate(subscriber, port, is_port_free, now)
        return None if found is None else base + found


class _PairedPool(_Pool):
    """A subscriber draws its address with its first mapping and gives it back with its last.

    When that address has no port left for it, it gets none, though others may have.
    """

    def __init__(self, allocators: list[Allocator], rng: random.Random) -> None:
        super().__init__(allocators, rng)
        self._pairs: dict[str, tuple[int, int]] = {}  # subscriber -> address index, holdings

    def allocate(self, subscriber: str, port: int, is_free: IsFree, now: float) -> int | None:
        pair = self._pairs.get(subscriber)
        index, count = (self._rng.randrange(len(self._allocators)), 0) if pair is None else pair
        slot = self._allocate_at(index, subscriber, port, is_free, now)
        if slot is not None:
            self._pairs[subscriber] = (index, count + 1)
        return slot

    def release(self, subscriber: str, port: int) -> None:
        super().release(subscriber, port)
        index, count = self._pairs[subscriber]
        if count > 1:
            self._pairs[subscriber] = (index, count - 1)
        else:
            del self._pairs[subscriber]


class _ArbitraryPool(_Pool):
    """A random address first, then the ones after it."""

    def allocate(self, subscriber: str, port: int, is_free: IsFree, now: float) -> int | None:
        count = len(self._allocators)
        first = self._rng.randrange(count)
        for step in range(count):
            slot = self._allocate_at((first + step) % count, subscriber, port, is_free, now)
            if slot is not None:
                return slot
        return None
