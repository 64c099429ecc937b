"""A model in training over stages, beside the same model on one device.

    python -m tools.bench.pipeline [--seed N] [--quick] [--json] [--only PART ...]

    steps     the shipped model over 1, 2 and 3 stages, whole nodes in this process: processor time
              of a step, what of it was computing, and virtual time on the way
    bubble    modelled computing, virtual time, links of 0, 20 and 100 ms one way: 8 micro-batches
              in the order of 1F1B, and one at a time
    memory    peak of a process that trains the whole model, a stage of it, or leads; GPT-2 124M
    codecs    loss after some steps where hidden states and gradients are rounded, and their bytes
    jumps     hidden states of a stage that are wrong but finite: how often the leader's validation
              tells, and how often it does where nothing is wrong
    kills     a stage vanishes or leaves at a random moment, carrier NATs, virtual time: does the
              training end with the bits of an undisturbed one, what was made again, how long it
              stood still

--quick: fewer steps and seeds, and memory of the shipped model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.pipeline_jumps import measure_jumps
from tools.bench.pipeline_parts import (
    measure_bubble,
    measure_codecs,
    measure_kills,
    measure_memory,
    measure_role,
    measure_steps,
)

# By the largest part of the layers that a stage of three holds, and what does not get smaller.
STAGE_MEMORY_TARGET = 0.6
FALSE_ALARMS_TARGET = 0.01


def judge(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the targets that these figures speak to."""
    targets: dict[str, dict[str, Any]] = {}

    def check(name: str, value: float, target: float, *, at_most: bool) -> None:
        is_met = value <= target if at_most else value >= target
        targets[name] = {"value": value, "target": target, "ok": is_met}

    if "kills" in figures:
        kills = figures["kills"]
        check("same_weights", kills["same_weights"], kills["kills"], at_most=False)
        check("redone_max", kills["redone_max"], 2 * kills["keep_every"], at_most=True)
    if "bubble" in figures:
        for row in figures["bubble"]:
            name = f"speedup_at_{row['delay_ms']}_ms"
            check(name, row["speedup"], 1.0, at_most=False)
    if "memory" in figures and figures["memory"]["whole"]["model"] == "124M":
        share = figures["memory"]["stage of 3"]["of_whole"]
        check("memory_of_a_third", share, STAGE_MEMORY_TARGET, at_most=True)
    if "codecs" in figures:
        exact, half = (figures["codecs"][name]["loss"] for name in ("float32", "float16"))
        check("float16_loss_ratio", round(half / exact, 4), 1.005, at_most=True)
    if "jumps" in figures:
        rows = figures["jumps"]
        count = sum(row["validations"] for row in rows)
        false_alarms = sum(row["false_alarms"] for row in rows)
        check("false_alarms", round(false_alarms / count, 4), FALSE_ALARMS_TARGET, at_most=True)
    return targets


def show(figures: dict[str, Any], targets: dict[str, dict[str, Any]]) -> None:
    """Print figures as text."""
    for part, rows in figures.items():
        print(f"\n{part}")
        if isinstance(rows, list):
            for row in rows:
                print("   " + "  ".join(f"{name} {value}" for name, value in row.items()))
            continue
        for name, row in rows.items():
            text = row
            if isinstance(row, dict):
                text = "  ".join(f"{key} {value}" for key, value in row.items())
            print(f"   {name:16} {text}")
    print("\ntargets")
    for name, target in targets.items():
        verdict = "met" if target["ok"] else "MISSED"
        print(f"   {name:22} {target['value']:>9}  target {target['target']:>6}: {verdict}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="under 40 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parts: dict[str, Callable[[int, bool, Path], Any]] = {
        "steps": measure_steps,
        "bubble": measure_bubble,
        "memory": measure_memory,
        "codecs": measure_codecs,
        "jumps": measure_jumps,
        "kills": measure_kills,
    }
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)  # of a process of `memory`
    arguments = parser.parse_args()
    if arguments.role is not None:
        print(json.dumps(measure_role(*arguments.role)))
        return
    figures: dict[str, Any] = {}
    for name in arguments.only:
        if not arguments.json:
            print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = parts[name](arguments.seed, arguments.quick, Path(folder))
    targets = judge(figures)
    if arguments.json:
        print(json.dumps({"benchmark": "pipeline", **figures, "targets": targets}))
    else:
        show(figures, targets)


if __name__ == "__main__":
    main()
