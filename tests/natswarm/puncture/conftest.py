"""Lets tests import the helper modules beside them and, as a puncture starts with an inspection,
those of the tests of `nat`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "nat")]
