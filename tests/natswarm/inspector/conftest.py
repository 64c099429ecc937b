"""What is around a host of the virtual internet."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from natswarm import Surroundings
from tools.virtual_surroundings import surroundings_of


@pytest.fixture
def surround() -> Callable[..., Surroundings]:
    """`surround(host)`: its one interface, a silent router, and the path outward."""
    return surroundings_of
