"""Kill `llmload learn` again and again: is any checkpoint lost, and is what comes of it the same?

    python -m tools.bench.crashes [--crashes N] [--seed N] [--quick] [--json]

A real process trains a very small model. It is killed (SIGKILL) at a random moment and started
again, 50 times; after every fifth kill its newest checkpoint is cut off at a random byte, and every
seventh life is on a disk that is full: files may not grow to the size of a checkpoint. Each life
has to go on from the last checkpoint that was whole. In the end the model has to be, bit for bit,
that of a run that nobody disturbed. The store of texts is killed in `tests/llmload/`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmload import GPT2Config
from llmload.learn.checkpoint import load_checkpoint
from llmload.model_folder import save_config
from llmload.tokenizer import TOKENIZER_FILE_NAME, byte_tokenizer
from llmload.weights import random_weights, save_weights
from tools.lab.pair import LLMLOAD

CONFIG = GPT2Config(vocab_size=258, n_ctx=32, n_embd=32, n_layer=2, n_head=2)
REPORT_EVERY = 5
CUT_EVERY, FULL_EVERY = 5, 7
# Long enough for some checkpoints.
LIFE_S_MAX = 1.0
START_TIMEOUT_S = 60.0
FULL_DISK_BYTES = 16 * 1024


@dataclass(slots=True)
class Outcome:
    """What became of all lives.

    Attributes:
        lost: Lives that began before the last whole checkpoint.
        silent: Lives on a full disk that did not say so.
        furthest: Steps made when the last one ended.
    """

    lost: int = 0
    silent: int = 0
    furthest: int = 0


def command(folder: Path, out: str, *more: str) -> list[str]:
    """Return how to learn in a folder."""
    options = ["--model", str(folder / "model"), "--data", str(folder / "text.txt")]
    options += ["--out", str(folder / out), "--state", str(folder / f"{out} state")]
    options += ["--bind", "127.0.0.1", "--no-lan", "--no-gateway", "--no-texts", "--links", "0"]
    options += ["--window", "16", "--batch", "2", "--report-every", str(REPORT_EVERY), "--json"]
    return [*LLMLOAD, "learn", *options, *more]


def prepare(folder: Path, seed: int) -> None:
    """Write model and text."""
    (folder / "model").mkdir()
    save_config(folder / "model", CONFIG)
    save_weights(folder / "model", random_weights(CONFIG, seed))
    tokenizer = byte_tokenizer().to_json()
    (folder / "model" / TOKENIZER_FILE_NAME).write_text(tokenizer, encoding="utf-8")
    (folder / "text.txt").write_text((__doc__ or "") * 20, encoding="utf-8")


def live(
    arguments: list[str], life_s: float, before: Callable[[], None] | None = None
) -> tuple[int | None, str]:
    """Run a life: killed so many seconds after it began to learn, if it has not ended before.

    Returns:
        The step of its first report (None: there was none), and what it complained of.
    """
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()  # it has opened its node
        time.sleep(life_s)
    finally:
        process.kill()
    said, complaint = process.communicate(timeout=START_TIMEOUT_S)
    rows = [json.loads(line) for line in said.splitlines() if line.endswith("}")]
    steps = [row["step"] for row in rows if "step" in row]
    return (steps[0] if steps else None), complaint


def crash(folder: Path, count: int, rng: random.Random) -> Outcome:
    """Live and be killed so often."""
    out, outcome = folder / "crashed", Outcome()
    for number in range(1, count + 1):
        kept = load_checkpoint(out)
        kept_step = 0 if kept is None else kept.step
        is_full = number % FULL_EVERY == 0
        first, complaint = live(
            command(folder, "crashed"),
            rng.uniform(0, LIFE_S_MAX) if not is_full else 4 * LIFE_S_MAX,
            _fill_disk if is_full else None,
        )
        now = load_checkpoint(out)
        now_step = 0 if now is None else now.step
        # Its first report is made at the next multiple of `REPORT_EVERY` after where it went on.
        went_on = first is None or first == kept_step - kept_step % REPORT_EVERY + REPORT_EVERY
        outcome.lost += now_step < kept_step or not went_on
        outcome.silent += is_full and "Error" not in complaint
        files = sorted(out.glob("checkpoint-*.safetensors"), key=lambda file: _step_of(file))
        if number % CUT_EVERY == 0 and len(files) > 1:
            os.truncate(files[-1], rng.randrange(files[-1].stat().st_size))
    last = load_checkpoint(out)
    outcome.furthest = 0 if last is None else last.step
    return outcome


def _fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, FULL_DISK_BYTES))


def _step_of(file: Path) -> int:
    return int(file.stem.partition("-")[2])


def finish(folder: Path, step_count: int) -> bool:
    """Run what was crashed, and a second one from the beginning; return whether both are equal."""
    found = []
    for out in ("crashed", "whole"):
        arguments = command(folder, out, "--steps", str(step_count))
        subprocess.run(arguments, check=True, capture_output=True)
        checkpoint = load_checkpoint(folder / out)
        assert checkpoint is not None, "a run that ended well has saved"
        found.append(checkpoint)
    crashed, whole = found
    return crashed.step == whole.step == step_count and all(
        np.array_equal(values, crashed.vectors[name]) for name, values in whole.vectors.items()
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--crashes", type=int, default=50, help="how often (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of moments, cuts and the model")
    parser.add_argument("--quick", action="store_true", help="seven crashes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    count = 7 if arguments.quick else arguments.crashes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.seed)
        outcome = crash(folder, count, random.Random(arguments.seed))
        step_count = outcome.furthest + 2 * REPORT_EVERY
        is_equal = finish(folder, step_count)
    values: dict[str, tuple[Any, Any]] = {
        "checkpoints_lost": (outcome.lost, 0),
        "full_disks_not_told": (outcome.silent, 0),
        "equal_to_undisturbed": (int(is_equal), 1),
    }
    targets = {
        name: {"value": value, "target": target, "ok": value == target}
        for name, (value, target) in values.items()
    }
    figures = {"benchmark": "crashes", "crashes": count, "steps": step_count, "targets": targets}
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{count} crashes in {step_count} steps", file=sys.stderr)
    for name, each in targets.items():
        verdict = "met" if each["ok"] else "MISSED"
        print(f"{name:22} {each['value']:3}   target {each['target']}: {verdict}")


if __name__ == "__main__":
    main()
