"""GPT-2 on one device, beside transformers on torch and llama.cpp, in one run.

    python -m tools.bench.inference [--seed N] [--threads N] [--rounds N] [--quick] [--json]

GPT-2 124M in shape, with random weights: speed and memory do not depend on their values, and all
engines get the same ones, so that their logits can be compared as well. Each engine is a process of
its own, open for the whole run, and they take turns: in a round, each prefills and decodes once at
each context. What else the machine does lengthens a time and never shortens it, so a figure is the
best of the rounds; the median is in the JSON beside it. With `--threads 1` times are processor
time, which leaves out what the system gives to others meanwhile; with more, time on the clock.

`transformers`, `torch` and `llama-cpp-python` (with `gguf`) are the extra `rivals` of the project;
what is not installed is left out, and so are the targets against it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# First of what loads ONNX Runtime: it switches its telemetry off.
import llmload
from llmload.config import GPT2Config, parameter_shapes
from llmload.engine.generate import PART_ROWS
from llmload.engine.kv_cache import KVCache
from llmload.engine.tuning import EngineSettings, measure_forms, measure_threads
from llmload.graph.quantize import PRECISIONS, Precision
from llmload.graph.stage import default_attention
from llmload.model_cache import ModelCache
from llmload.model_folder import save_config
from llmload.tokenizer import TOKENIZER_FILE_NAME, byte_tokenizer
from llmload.weights import load_weights, random_weights, save_weights
from tools.bench.inference_rivals import RIVALS, Rival, missing_packages, write_gguf_files

FULL_SHAPE = GPT2Config(vocab_size=50257, n_ctx=1024, n_embd=768, n_layer=12, n_head=12)
QUICK_SHAPE = GPT2Config(vocab_size=8192, n_ctx=1024, n_embd=768, n_layer=2, n_head=12)
CONTEXTS = (128, 512)
DECODED_COUNT = 8
READ_COUNT = 16

# (figure, engine, rival, how many times as fast)
SPEED_TARGETS = (
    ("decode", "float32", "transformers", 2.0),
    ("decode", "float32", "llama-f32-keys32", 1.0),
    ("decode", "int8", "llama-q8_0", 1.0),
    ("decode", "int4", "llama-q4_0", 1.0),
    ("prefill", "float32", "llama-f32", 1.2),
    ("prefill", "int8", "llama-q8_0", 1.2),
    ("prefill", "int4", "llama-q4_0", 1.2),
)
START_S_MAX = 1.0
# float32 against float32, of logits up to about 3, as a check that all compute the same model;
# llama.cpp keeps keys and values in 16 bits. What int8 and int4 lose is in `tools.bench.precision`.
LOGITS_DIFFERENCE_MAX = 5e-3


class Engine(Protocol):
    """What every engine can do, ours and the rivals'."""

    def prefill(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Start a new sequence; return the logits behind it, float32 (vocab_size,)."""

    def decode(self, token_id: int) -> NDArray[np.float32]:
        """Add one token; return the logits behind it."""


class OwnEngine:
    """llmload's, from a prepared and mapped file."""

    def __init__(self, folder: Path, cache_root: Path, precision: Precision, threads: int) -> None:
        config = GPT2Config.from_folder(folder)
        settings = EngineSettings(attention=default_attention(config), threads=threads)
        cache = ModelCache(folder, cache_root)
        self._stage = llmload.open_stage(
            folder, precision=precision, settings=settings, cache=cache
        )
        self._cache: KVCache = self._stage.new_cache()

    def prefill(self, token_ids: list[int]) -> NDArray[np.float32]:
        """See `Engine`."""
        self._cache.truncate(0)
        return self._advance(token_ids)

    def decode(self, token_id: int) -> NDArray[np.float32]:
        """See `Engine`."""
        return self._advance([token_id])

    def _advance(self, token_ids: list[int]) -> NDArray[np.float32]:
        for start in range(0, len(token_ids), PART_ROWS):
            part = np.array([token_ids[start : start + PART_ROWS]])
            logits: NDArray[np.float32] = self._stage.run(part, self._cache)[0, -1]
        return logits


# --- A child: one engine, asked by lines of JSON --------------------------------------------------


def run_child(name: str, folder: Path, threads: int) -> None:
    """Open an engine, say how long it took, then answer until the input ends."""
    clock = time.process_time if threads == 1 else time.perf_counter
    engine: Engine
    if name in PRECISIONS:
        started_at = clock()
        engine = OwnEngine(folder, folder / "cache", name, threads)
    else:
        rival: Rival = RIVALS[name]()  # imports, which are not counted
        started_at = clock()
        engine = rival.open(folder, threads)
    engine.prefill([1])
    _say({"start_s": round(clock() - started_at, 4)})
    for line in sys.stdin:
        _say(_answer(engine, json.loads(line), clock))


def _answer(engine: Engine, wish: dict[str, Any], clock: Callable[[], float]) -> dict[str, Any]:
    if wish["do"] == "memory":
        return _memory_mb()
    token_ids = wish["token_ids"]
    started_at = clock()
    logits = engine.prefill(token_ids)
    prefill_s = clock() - started_at
    if wish["do"] == "logits":
        return {"logits": logits.tolist()}
    decode_s = []
    for token_id in token_ids[:DECODED_COUNT]:
        started_at = clock()
        engine.decode(token_id)
        decode_s.append(clock() - started_at)
    return {"prefill_s": prefill_s, "decode_s": min(decode_s)}


def _memory_mb() -> dict[str, float]:
    wanted = {"Rss:": "resident_mb", "Anonymous:": "anonymous_mb"}
    fields = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    return {wanted[f[0]]: round(int(f[1]) * 1024 / 1e6, 1) for f in fields if f[0] in wanted}


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class Child:
    """A process with one engine."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        command = [sys.executable, "-m", "tools.bench.inference", "--child", name]
        self._process = subprocess.Popen(
            [*command, "--folder", str(folder), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.name = name
        self.start_s: float = self._read()["start_s"]

    def ask(self, do: str, token_ids: list[int] | None = None) -> dict[str, Any]:
        """Return the answer to one wish."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "token_ids": token_ids}) + "\n")
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


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    seed: int
    threads: int
    rounds: int
    quick: bool


def make_model(folder: Path, options: Options) -> GPT2Config:
    """Write the random model for every engine."""
    config = QUICK_SHAPE if options.quick else FULL_SHAPE
    save_config(folder, config)
    save_weights(folder, random_weights(config, options.seed))
    (folder / TOKENIZER_FILE_NAME).write_text(byte_tokenizer().to_json(), encoding="utf-8")
    if not missing_packages("llama-f32"):
        write_gguf_files(folder, config, load_weights(folder))
    return config


def measure(folder: Path, options: Options, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the figures of each engine; all of them are open, and take turns."""
    config = GPT2Config.from_folder(folder)
    contexts = CONTEXTS[:1] if options.quick else CONTEXTS
    rng = np.random.default_rng(options.seed)
    prompts = {n: rng.integers(0, config.vocab_size, n).tolist() for n in contexts}
    for precision in PRECISIONS:  # so that the children find it, as every start but the first does
        OwnEngine(folder, folder / "cache", precision, options.threads)
    with ExitStack() as stack:
        children = []
        for name in names:
            children.append(Child(name, folder, options.threads))
            stack.callback(children[-1].close)
        figures = {child.name: {"start_s": child.start_s} for child in children}
        logits = {
            child.name: np.array(child.ask("logits", prompts[contexts[0]])["logits"])
            for child in children
        }
        for name, values in logits.items():
            difference = float(abs(values - logits["float32"]).max())
            figures[name]["logits_difference"] = difference
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for context, prompt in prompts.items():
                for child in children:
                    answer = child.ask("run", prompt)
                    for key, per in (("prefill", context), ("decode", 1)):
                        rate_s = answer[f"{key}_s"] / per
                        times.setdefault((child.name, f"{key}_{context}_ms"), []).append(rate_s)
        for (name, key), seconds in times.items():
            figures[name][key] = round(1e3 * min(seconds), 3)
            figures[name][f"{key}_median"] = round(1e3 * statistics.median(seconds), 3)
        for child in children:
            figures[child.name] |= child.ask("memory")
    return figures


def targets_of(figures: dict[str, dict[str, float]]) -> Iterator[tuple[str, float, float, bool]]:
    """Yield name, value, target and whether it is met, for all that could be measured."""
    for figure, ours, rival, target in SPEED_TARGETS:
        for context in CONTEXTS:
            key = f"{figure}_{context}_ms"
            if rival in figures and key in figures[ours]:
                value = figures[rival][key] / figures[ours][key]
                yield f"{figure}_{context}_{ours}_to_{rival}", value, target, value >= target
    if "llama-q4_0" in figures:
        value = figures["int4"]["resident_mb"] / figures["llama-q4_0"]["resident_mb"]
        yield "resident_int4_to_llama-q4_0", value, 1.0, value <= 1.0
    for precision in PRECISIONS:
        value = figures[precision]["start_s"]
        yield f"start_s_{precision}", value, START_S_MAX, value <= START_S_MAX
    for name in ("transformers", "llama-f32"):
        if name in figures:
            value = figures[name]["logits_difference"]
            limit = LOGITS_DIFFERENCE_MAX
            yield f"logits_difference_{name}", value, limit, value <= limit


def reading_ms(config: GPT2Config, threads: int) -> float:
    """Return how long it takes to read as many bytes as float32 weights have, once, on one thread.

    No decoder is faster that keeps its weights in float32. NumPy's maximum is what reads fastest.
    """
    shapes = parameter_shapes(config, config.blocks).values()
    values = np.ones(sum(map(math.prod, shapes)), dtype=np.float32)
    clock = time.process_time if threads == 1 else time.perf_counter
    times = []
    for _ in range(READ_COUNT):
        started_at = clock()
        values.max()
        times.append(clock() - started_at)
    return 1000 * min(times)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the weights and prompts")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every engine"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        run_child(arguments.child, arguments.folder, arguments.threads)
        return
    rounds = 2 if arguments.quick else arguments.rounds
    options = Options(arguments.seed, arguments.threads, rounds, arguments.quick)
    names: list[str] = [*PRECISIONS]
    skipped = {}
    for rival in RIVALS:
        if missing := missing_packages(rival):
            skipped[rival] = f"skipped, because {', '.join(missing)} is not installed"
        else:
            names.append(rival)
    with tempfile.TemporaryDirectory() as folder:
        config = make_model(Path(folder), options)
        figures = measure(Path(folder), options, names)
    forms = measure_forms(config, "int4")
    read_ms = reading_ms(config, options.threads)
    threads = measure_threads(config, "int4", default_attention(config))
    targets = {
        name: {"value": round(value, 4), "target": target, "ok": is_met}
        for name, value, target, is_met in targets_of(figures)
    }
    if arguments.json:
        print(
            json.dumps(
                {
                    "benchmark": "inference",
                    "seed": options.seed,
                    "threads": options.threads,
                    "quick": options.quick,
                    "processor": platform.processor() or platform.machine(),
                    "engines": figures,
                    "skipped": skipped,
                    "reading_float32_ms": round(read_ms, 2),
                    "two_blocks_int4_ms_by_form": {k: 1e3 * s for k, s in forms.items()},
                    "two_blocks_int4_ms_by_threads": {k: 1e3 * s for k, s in threads.items()},
                    "targets": targets,
                }
            )
        )
        return
    _print_text(figures, skipped, targets)
    print(f"reading all weights in float32 once, with one thread: {read_ms:.1f} ms")
    print("two blocks in int4, ms of processor time a token:", end=" ")
    print(", ".join(f"{form} {1e3 * seconds:.2f}" for form, seconds in forms.items()))


def _print_text(
    figures: dict[str, dict[str, float]], skipped: dict[str, str], targets: dict[str, Any]
) -> None:
    columns = [key for key in figures["float32"] if not key.endswith("_median")]
    print(f"{'':18}" + "".join(f"{column:>19}" for column in columns))
    for name, values in figures.items():
        print(f"{name:18}" + "".join(f"{values[column]:>19.3f}" for column in columns))
    for name, reason in skipped.items():
        print(f"{name:18}{reason}")
    for name, target in targets.items():
        verdict = "met" if target["ok"] else "MISSED"
        print(f"{name:42} {target['value']:9.3f}   target {target['target']:g}: {verdict}")


if __name__ == "__main__":
    main()
