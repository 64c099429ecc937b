"""The parameters of a model as one flat vector: what a step of training and peers work on.

This file does not know how a vector is cut, sent or changed; nor peers, so that who trains alone
loads nothing of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["ParameterSpace", "Vector"]

Vector: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class ParameterSpace:
    """The order in which the parameters of a model form one flat vector.

    Attributes:
        shapes: Shape of each parameter, sorted by name; `of` sorts.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> ParameterSpace:
        """Order parameters by name, so that every peer has the same order."""
        return cls(tuple((name, tuple(shapes[name])) for name in sorted(shapes)))

    @cached_property
    def bounds(self) -> dict[str, slice]:
        """Where each parameter lies in the flat vector."""
        bounds, start = {}, 0
        for name, shape in self.shapes:
            stop = start + math.prod(shape)
            bounds[name] = slice(start, stop)
            start = stop
        return bounds

    @cached_property
    def size(self) -> int:
        """Values in the flat vector."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def check(self, parameters: Mapping[str, NDArray[Any]]) -> None:
        """Raise ValueError where a parameter is missing, of another shape, or unknown."""
        found = {name: values.shape for name, values in parameters.items()}
        if found != dict(self.shapes):
            wrong = sorted(set(found.items()) ^ set(self.shapes))
            raise ValueError(f"parameters do not fit: {wrong[:4]}")

    def flatten(self, parameters: Mapping[str, NDArray[Any]]) -> Vector:
        """Copy parameters into a new flat vector, float32 (size,).

        Raises:
            ValueError: A parameter is missing, of another shape, or unknown.
        """
        self.check(parameters)
        flat = np.empty(self.size, dtype=np.float32)
        for name, view in self.views(flat).items():
            view[...] = parameters[name]
        return flat

    def views(self, flat: Vector) -> dict[str, Vector]:
        """Return each parameter as a view of a flat vector: writing to one changes the other.

        Raises:
            ValueError: The vector is of another size.
        """
        if flat.shape != (self.size,):
            raise ValueError(f"vector of shape {flat.shape}, expected ({self.size},)")
        return {name: flat[self.bounds[name]].reshape(shape) for name, shape in self.shapes}
