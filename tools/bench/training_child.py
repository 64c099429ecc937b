"""The process of one side of `tools.bench.training`: asked by lines of JSON.

Each side loads what it needs and nothing of the others, so that memory is its own: the model comes
as plain numbers and a file.

    python -m tools.bench.training_child '{"name": "ours", "shape": ..., "weights": FILE, ...}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file


class Side(Protocol):
    """What is measured."""

    def gradients(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        """Compute the loss and all gradients, and return the loss."""

    def apply(self) -> None:
        """Do a step of AdamW along the latest gradient."""

    def gradient(self) -> dict[str, NDArray[np.float32]]:
        """Return the latest gradient by name."""


def main() -> None:
    """Open a side, compute once, say how long that took, then answer until the input ends."""
    wish = json.loads(sys.argv[1], object_hook=lambda fields: SimpleNamespace(**fields))
    # Of one thread the time that the system gives to others is left out.
    clock = time.process_time if wish.threads == 1 else time.perf_counter
    side = open_side(wish)
    rng = np.random.default_rng(wish.seed)
    text = rng.integers(wish.shape.vocab_size, size=(wish.batch, wish.time + 1))
    tokens, targets = text[:, :-1].copy(), text[:, 1:].copy()

    def timed(action: Callable[[], object]) -> float:
        started_at = clock()
        action()
        return clock() - started_at

    _say({"start_s": timed(lambda: side.gradients(tokens, targets))})
    for line in sys.stdin:
        asked, _, argument = line.strip().partition(" ")
        if asked == "save":
            save_file(side.gradient(), argument)
            _say({"loss": side.gradients(tokens, targets)})
        elif asked == "gradients":
            _say({"seconds": timed(lambda: side.gradients(tokens, targets))})
        elif asked == "step":
            seconds = timed(lambda: side.gradients(tokens, targets)) + timed(side.apply)
            _say({"seconds": seconds})
        else:
            _say({"memory_mb": _peak_memory_mb()})


def open_side(wish: SimpleNamespace) -> Side:
    """Open one side by its name."""
    if wish.name.startswith("torch"):
        from tools.bench.training_torch import TorchTrainer

        is_compiled = wish.name == "torch-compile"
        weights = load_file(wish.weights)
        return TorchTrainer(wish.shape, weights, wish.threads, is_compiled=is_compiled)
    if wish.name == "products":
        from tools.bench.training_products import Products

        return Products(wish.shape, wish.batch, wish.time, wish.threads)
    from tools.bench.training_own import OwnSide

    return OwnSide(wish.shape, load_file(wish.weights), wish.threads, wish.name)


def _peak_memory_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    raise RuntimeError("/proc/self/status does not tell VmHWM")


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
