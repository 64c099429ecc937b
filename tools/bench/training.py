"""A step of training on one device, beside torch, eager and compiled, in one run.

    python -m tools.bench.training [--seed N] [--threads N] [--rounds N] [--quick] [--json]
                                   [--only CASE] [--sides NAME ...]

Two models with random weights: one in the shape of the small model that is shipped, and GPT-2 124M.
Each side is a process of its own, and they take turns: in a round, each computes the gradients of
one batch, and later does whole steps (gradients, clipping, AdamW). Our side runs a second time with
`recompute`, activations of one block at once; and twice with an adapter of rank 8 that is
trained in the place of the model, which is held in float32 and in 4 bits. `products` are the matrix
products of the gradients alone, at the speed of the same runtime: what no trainer on it can beat.

What else the machine does lengthens a time and never shortens it, so a figure is the best of the
rounds. With `--threads 1` times are processor time, which leaves out what the system gives to
others meanwhile; with more, time on the clock. Memory is the most that the process ever had
resident, libraries included: after the rounds of gradients, and after those of whole steps.

`torch` is in the extra `rivals` of the project; without it our figures stand alone. `--quick`
leaves out torch.compile, which takes most of a minute to compile, and GPT-2 124M.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from llmload import GPT2Config, bundled_model_path
from llmload.weights import random_weights

SHAPES = {
    "small": GPT2Config.from_folder(bundled_model_path()),
    "124M": GPT2Config(vocab_size=50257, n_ctx=1024, n_embd=768, n_layer=12, n_head=12),
}
OURS = ("ours", "ours-recompute")
ADAPTERS = ("adapter", "adapter-int4")
PRODUCTS = "products"
RIVALS = ("torch-eager", "torch-compile")

IS_TORCH_INSTALLED = importlib.util.find_spec("torch") is not None

# Of the time of torch eager.
TIME_TARGETS = {"small": 0.9, "124M": 0.7}
COMPILED_TIME_TARGET = 1.0
MEMORY_TARGET = 0.8
GRADIENT_ERROR_MAX = 1e-4


@dataclass(frozen=True, slots=True)
class Case:
    """One model and one shape of batch."""

    model: str
    batch: int
    time: int

    @property
    def name(self) -> str:
        """As in figures: model, batch x time."""
        return f"{self.model} {self.batch}x{self.time}"


FULL_CASES = (
    Case("small", 1, 128),
    Case("small", 4, 256),
    Case("124M", 1, 128),
    Case("124M", 4, 256),
)
QUICK_CASES = (Case("small", 4, 128),)


class Child:
    """A process with one side; see `training_child.py`."""

    def __init__(self, name: str, case: Case, weights: Path, options: Options) -> None:
        wish = {
            "name": name,
            "shape": asdict(SHAPES[case.model]),
            "weights": str(weights),
            "batch": case.batch,
            "time": case.time,
            "seed": options.seed,
            "threads": options.threads,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.training_child", json.dumps(wish)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.name = name
        self.start_s: float = self._read()["start_s"]

    def ask(self, wish: str) -> dict[str, Any]:
        """Return the answer to one wish."""
        assert self._process.stdin is not None
        self._process.stdin.write(wish + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.name} ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer


# --- The run --------------------------------------------------------------------------------------

Figures = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    seed: int
    threads: int
    rounds: int


def measure(case: Case, names: Sequence[str], options: Options) -> Figures:
    """Return the figures of each side for one case."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = folder / "weights.safetensors"
        save_file(random_weights(SHAPES[case.model], options.seed), weights)
        children = []
        for name in names:
            children.append(Child(name, case, weights, options))
            stack.callback(children[-1].close)
        figures: Figures = {child.name: {"start_s": round(child.start_s, 3)} for child in children}
        for wish in ("gradients", "step"):
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(options.rounds):
                for child in children:
                    seconds[child.name].append(child.ask(wish)["seconds"])
            if wish == "gradients":
                for child in children:
                    file = folder / f"{child.name}.safetensors"
                    figures[child.name]["loss"] = child.ask(f"save {file}")["loss"]
            for child in children:
                figures[child.name][f"{wish}_s"] = round(min(seconds[child.name]), 4)
                figures[child.name][f"{wish}_mb"] = child.ask("memory")["memory_mb"]
        if RIVALS[0] in names:
            for name in {*names} - {*ADAPTERS, PRODUCTS}:
                files = (folder / f"{name}.safetensors", folder / f"{RIVALS[0]}.safetensors")
                figures[name]["gradient_error"] = gradient_error(*files)
    return figures


def gradient_error(file: Path, truth_file: Path) -> float:
    """Return the largest error of the gradient of any parameter, relative to its length."""
    found, truth = load_file(file), load_file(truth_file)
    return max(
        float(np.linalg.norm(found[name] - values) / np.linalg.norm(values))
        for name, values in truth.items()
    )


def targets_of(figures: dict[str, Figures]) -> Iterator[tuple[str, float, float]]:
    """Yield name, value and the most that it should be, for all that could be measured."""
    for case, sides in figures.items():
        if not {*OURS, RIVALS[0]} <= sides.keys():
            continue
        ours, eager = sides[OURS[0]], sides[RIVALS[0]]
        model = case.partition(" ")[0]
        for what in ("gradients", "step"):
            time_ratio = ours[f"{what}_s"] / eager[f"{what}_s"]
            yield f"{case}: {what}, time to torch eager", time_ratio, TIME_TARGETS[model]
            if RIVALS[1] in sides:
                value = ours[f"{what}_s"] / sides[RIVALS[1]][f"{what}_s"]
                yield f"{case}: {what}, time to torch.compile", value, COMPILED_TIME_TARGET
            for side in OURS:
                value = sides[side][f"{what}_mb"] / eager[f"{what}_mb"]
                yield f"{case}: {what}, memory of {side} to torch eager", value, MEMORY_TARGET
        for side in OURS:
            yield f"{case}: gradient of {side}", sides[side]["gradient_error"], GRADIENT_ERROR_MAX


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the weights and batches")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every side"
    )
    parser.add_argument("--rounds", type=int, default=6, help="2 or more")
    parser.add_argument("--only", default="", help="cases that begin so, as '124M 1x128'")
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=(*OURS, *ADAPTERS, PRODUCTS, *RIVALS),
        help="these sides alone",
    )
    parser.add_argument("--quick", action="store_true", help="the small model, not compiled")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: a step holds the most when AdamW's vectors are there: the second")
    options = Options(arguments.seed, arguments.threads, 3 if arguments.quick else arguments.rounds)
    rivals = RIVALS if not arguments.quick else RIVALS[:1]
    names = arguments.sides or [*OURS, *ADAPTERS, PRODUCTS, *(rivals if IS_TORCH_INSTALLED else ())]
    cases = [
        case
        for case in (QUICK_CASES if arguments.quick else FULL_CASES)
        if case.name.startswith(arguments.only)
    ]
    figures = {case.name: measure(case, names, options) for case in cases}
    targets = {
        name: {"value": float(f"{value:.3g}"), "target": target, "ok": value <= target}
        for name, value, target in targets_of(figures)
    }
    if arguments.json:
        facts = {
            "benchmark": "training",
            "seed": options.seed,
            "threads": options.threads,
            "quick": arguments.quick,
            "processor": platform.processor() or platform.machine(),
            "cases": figures,
            "skipped": {} if IS_TORCH_INSTALLED else {"torch": "skipped: torch is not installed"},
            "targets": targets,
        }
        print(json.dumps(facts))
    else:
        _print_text(figures, targets)


def _print_text(figures: dict[str, Figures], targets: dict[str, Any]) -> None:
    for case, sides in figures.items():
        columns = max((list(values) for values in sides.values()), key=len)
        print(f"{case:16}" + "".join(f"{column:>16}" for column in columns))
        for name, values in sides.items():
            shown = (f"{values[c]:.4g}" if c in values else "" for c in columns)
            print(f"  {name:14}" + "".join(f"{value:>16}" for value in shown))
    if not targets:
        print("torch is not installed: nothing to compare with (extra `rivals`)")
    for name, target in targets.items():
        verdict = "met" if target["ok"] else "MISSED"
        print(f"{name:56} {target['value']:9.3g}   at most {target['target']:g}: {verdict}")


if __name__ == "__main__":
    main()
