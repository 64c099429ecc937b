"""How the emulated NATs choose external ports: five laws, as data and as machines.

The law decides what a puncture costs: nothing for a port that is kept, a few probes for a sequence
or a block, hundreds to tens of thousands for a uniform draw. Which ports are free is the business
of the NAT's table; a law only asks.

Source: RFC 4787 section 4.2 (preservation, overloading), RFC 6888 and RFC 7422 (blocks), the
measured laws in `presets.py`. Estimating a law from observed ports is `natswarm/nat/allocation.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from natswarm.nat.behaviour import AllocationLaw

__all__ = [
    "Allocation",
    "Allocator",
    "Blocks",
    "IsFree",
    "Preserving",
    "ScaledBeta",
    "Sequential",
    "Uniform",
    "make_allocator",
    "poisson",
]

FIRST_USUAL_PORT = 1024  # RFC 6335: below are the well-known ports
LAST_PORT = 65_535

# Draws that meet a port in use are repeated; beyond this many the free ports are listed instead.
# 256 draws fail together once in 13 times with 99 % of the range in use.
MAX_DRAWS = 256

# Above this mean a Poisson number is drawn from the normal law: the error is far below one
# standard deviation, and idling for an hour must not cost 100,000 draws.
NORMAL_ABOVE_MEAN = 500.0

IsFree = Callable[[int], bool]


def _check_range(low: int, high: int) -> None:
    if not 1 <= low <= high <= LAST_PORT:
        raise ValueError(f"not a range of ports: {low}..{high}")


@dataclass(frozen=True, slots=True)
class Preserving:
    """The internal port where it is free; else uniform over `low`..`high`, both included."""

    law: ClassVar[AllocationLaw] = AllocationLaw.PRESERVING
    low: int = FIRST_USUAL_PORT
    high: int = LAST_PORT

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Each port of `low`..`high`, both included, with the same probability."""

    law: ClassVar[AllocationLaw] = AllocationLaw.UNIFORM
    low: int = FIRST_USUAL_PORT
    high: int = LAST_PORT

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)


@dataclass(frozen=True, slots=True)
class ScaledBeta:
    """`offset` + `span` * Beta(`alpha`, `beta`), rounded: a law fitted to observed ports.

    Its `law` is the nearest a profile can name: drawn at random, in no order.
    """

    law: ClassVar[AllocationLaw] = AllocationLaw.UNIFORM
    offset: float
    span: float
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    @property
    def low(self) -> int:
        """The lowest port that can be drawn."""
        return round(self.offset)

    @property
    def high(self) -> int:
        """The highest port that can be drawn."""
        return round(self.offset + self.span)


@dataclass(frozen=True, slots=True)
class Sequential:
    """The last port plus `step`, round and round in `low`..`high`.

    Attributes:
        step: Distance of successive ports, of either sign.
        cross_traffic_per_s: Mean rate at which other subscribers take a step (Poisson).
    """

    law: ClassVar[AllocationLaw] = AllocationLaw.SEQUENTIAL
    low: int = FIRST_USUAL_PORT
    high: int = LAST_PORT
    step: int = 1
    cross_traffic_per_s: float = 0.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        if self.step == 0 or self.cross_traffic_per_s < 0:
            raise ValueError(f"not a sequence: {self}")


@dataclass(frozen=True, slots=True)
class Blocks:
    """Ports out of blocks that one subscriber owns.

    A subscriber gets a random free block with its first mapping and another when its blocks are
    full; a block goes back when its last mapping dies.

    Attributes:
        size: Ports in a block.
        max_blocks: Blocks one subscriber may own at a time.
        is_aligned: Blocks start at multiples of `size`; else at `low`, `low + size`, ...
        is_sequential: Ports of a block are taken in order, round and round; else at random.
        keeps_newest: The newest block stays with its subscriber for ever, empty or not.
    """

    law: ClassVar[AllocationLaw] = AllocationLaw.BLOCK
    low: int = FIRST_USUAL_PORT
    high: int = LAST_PORT
    size: int = 256
    max_blocks: int = 1
    is_aligned: bool = True
    is_sequential: bool = False
    keeps_newest: bool = False

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        if self.size < 1 or self.max_blocks < 1 or not self.bases():
            raise ValueError(f"not blocks: {self}")

    def bases(self) -> list[int]:
        """Return the first ports of all whole blocks of the range, ascending."""
        first = -(-self.low // self.size) * self.size if self.is_aligned else self.low
        return list(range(first, self.high - self.size + 2, self.size))


Allocation = Preserving | Uniform | ScaledBeta | Sequential | Blocks


class Allocator(Protocol):
    """A law at work in one NAT."""

    def allocate(self, subscriber: str, port: int, is_free: IsFree, now: float) -> int | None:
        """Choose an external port for a new mapping.

        Args:
            subscriber: The internal IP address.
            port: The internal port.
            is_free: Whether the NAT's table lets the new mapping have a port.
            now: Seconds, never going back.

        Returns:
            A free port, which the subscriber then holds; None when there is none for it.
        """
        ...

    def release(self, subscriber: str, port: int) -> None:
        """Take back one holding of `port`."""
        ...

    def skip(self, count: int) -> None:
        """Go on as if `count` mappings had been made and had died since."""
        ...


def make_allocator(allocation: Allocation, rng: random.Random) -> Allocator:
    """Return the machine that carries out a law."""
    if isinstance(allocation, Blocks):
        return _BlockAllocator(allocation, rng)
    if isinstance(allocation, Sequential):
        return _SequentialAllocator(allocation, rng)
    if isinstance(allocation, Preserving):
        return _PreservingAllocator(allocation, rng)
    if isinstance(allocation, Uniform):
        low, high = allocation.low, allocation.high
        # `randrange` costs twice as much, and one part in 10**11 of bias is nobody's concern.
        width = high - low + 1
        return _DrawingAllocator(low, high, lambda: low + int(width * rng.random()), rng)
    law = allocation
    return _DrawingAllocator(
        law.low,
        law.high,
        lambda: round(law.offset + law.span * rng.betavariate(law.alpha, law.beta)),
        rng,
    )


def _draw_free(
    low: int, high: int, draw: Callable[[], int], is_free: IsFree, rng: random.Random
) -> int | None:
    for _ in range(MAX_DRAWS):
        port = draw()
        if is_free(port):
            return port
    free = [port for port in range(low, high + 1) if is_free(port)]
    return rng.choice(free) if free else None


class _DrawingAllocator:
    """Each port drawn on its own."""

    def __init__(self, low: int, high: int, draw: Callable[[], int], rng: random.Random) -> None:
        self._low = low
        self._high = high
        self._draw = draw
        self._rng = rng

    def allocate(self, subscriber: str, port: int, is_free: IsFree, now: float) -> int | None:
        return _draw_free(self._low, self._high, self._draw, is_free, self._rng)

    def release(self, subscriber: str, port: int) -> None:
        pass

    def skip(self, count: int) -> None:
        pass


class _PreservingAllocator(_DrawingAllocator):
    def __init__(self, law: Preserving, rng: random.Random) -> None:
        super().__init__(law.low, law.high, lambda: rng.randint(law.low, law.high), rng)

    def allocate(self, subscriber: str, port: int, is_free: IsFree, now: float) -> int | None:
        if self._low <= port <= self._high and is_free(port):
            return port
        return super().allocate(subscriber, port, is_free, now)


class _SequentialAllocator:
    """One counter for all subscribers, as the boxes that do this have."""

    def __init__(self, law: Sequential, rng: random.Random) -> None:
        self._law = law
        self._rng = rng
        self._width = law.high - law.low + 1
        self._last = rng.randint(law.low, law.high)
        self._last_time = 0.0

    def allocate(self, subscriber: str, port: int, is_free: IsFree, now: float) -> int | None:
        law = self._law
        passed_s, self._last_time = now - self._last_time, now
        steps_of_others = poisson(law.cross_traffic_per_s * passed_s, self._rng)
        position = self._last - law.low + law.step * steps_of_others
        for _ in range(self._width):
            position += law.step
            candidate = law.low + position % self._width
            if is_free(candidate):
                self._last = candidate
                return candidate
        return None

    def release(self, subscriber: str, port: int) -> None:
        pass

    def skip(self, count: int) -> None:
        law = self._law
        self._last = law.low + (self._last - law.low + law.step * count) % self._width


class _Block:
    __slots__ = ("base", "holding_count", "next_offset")

    def __init__(self, base: int) -> None:
        self.base = base
        self.holding_count = 0
        self.next_offset = 0


class _BlockAllocator:
    def __init__(self, law: Blocks, rng: random.Random) -> None:
        self._law = law
        self._rng = rng
        self._free_bases = law.bases()
        self._first_base = self._free_bases[0]
        self._owned: dict[str, list[_Block]] = {}

    def allocate(self, subscriber: str, port: int, is_free: IsFree, now: float) -> int | None:
        blocks = self._owned.get(subscriber, [])
        for block in reversed(blocks):  # the newest is the one most likely to have room
            found = self._find(block, is_free)
            if found is not None:
                block.holding_count += 1
                return found
        if len(blocks) >= self._law.max_blocks or not self._free_bases:
            return None
        # Order in the list of free ones does not matter, so the last takes the place of the drawn.
        index = self._rng.randrange(len(self._free_bases))
        last = self._free_bases.pop()
        base = last
        if index < len(self._free_bases):
            base, self._free_bases[index] = self._free_bases[index], last
        block = _Block(base)
        found = self._find(block, is_free)
        assert found is not None, "a block nobody owns has a port in use"
        block.holding_count = 1
        self._owned[subscriber] = [*blocks, block]
        return found

    def release(self, subscriber: str, port: int) -> None:
        size = self._law.size
        base = self._first_base + (port - self._first_base) // size * size
        blocks = self._owned[subscriber]
        block = next(block for block in blocks if block.base == base)
        block.holding_count -= 1
        if block.holding_count == 0 and not (self._law.keeps_newest and block is blocks[-1]):
            blocks.remove(block)
            self._free_bases.append(base)
            if not blocks:
                del self._owned[subscriber]

    def skip(self, count: int) -> None:
        pass

    def _find(self, block: _Block, is_free: IsFree) -> int | None:
        base, size = block.base, self._law.size
        if not self._law.is_sequential:
            rng = self._rng
            return _draw_free(
                base, base + size - 1, lambda: base + int(size * rng.random()), is_free, rng
            )
        for step in range(size):
            offset = (block.next_offset + step) % size
            if is_free(base + offset):
                block.next_offset = (offset + 1) % size
                return base + offset
        return None


def poisson(mean: float, rng: random.Random) -> int:
    """Draw a Poisson number by Knuth's product of uniforms; above 500 from the normal law."""
    if mean == 0:
        return 0
    if mean > NORMAL_ABOVE_MEAN:
        return max(0, round(rng.gauss(mean, math.sqrt(mean))))
    threshold = math.exp(-mean)
    count = 0
    product = rng.random()
    while product > threshold:
        count += 1
        product *= rng.random()
    return count
