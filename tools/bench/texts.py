"""Texts or updates: what eight peers learn from the same bytes of either, or of both.

    python -m tools.bench.texts [--seed N] [--quick] [--json] [--picture FILE]

    updates   `llmload.learn.outer` alone, at several densities
    texts     each learns alone, from its own text and from what others gave it, chosen by novelty
    both      updates of half the density, texts for the other half of the bytes

All make the same number of steps; the loss is that on held-out text of all eight, and bytes are
what one peer sent. `tools/bench/simulated_texts.py` says what is real and what simulated; learning
rates are the best of `tools/bench/learning.py` in so few steps for ours (updates, both) and for
local (texts).
"""

from __future__ import annotations

import argparse
import json
import platform
from html import escape
from pathlib import Path
from typing import Any

from tools.bench.simulated_learning import Classroom, Curve, Size
from tools.bench.simulated_rounds import all_reduce
from tools.bench.simulated_texts import TextsAndUpdates

ALONE_RATE, ALL_REDUCE_RATE, OURS_RATE = 0.001, 0.008, 0.004
# About 0.1, 0.25 and 0.7 MB of updates in 200 steps.
DENSITIES = (0.01, 0.03, 0.09)
FULL, QUICK = Size(200, 1500, 20, ()), Size(40, 100, 20, ())
# Both together, beside the better one of the two alone, at equal bytes.
LOSS_RATIO_MAX = 1.0


def run(
    seed: int, size: Size, rate: float, density: float, text_bytes: int, *, by_novelty: bool = True
) -> dict[str, Any]:
    """Run one setting; returns where it ended and what it cost."""
    room = Classroom(seed, size, rate)
    simulated = TextsAndUpdates(room, density=density, text_bytes=text_bytes, by_novelty=by_novelty)
    return figures(simulated.run())


def figures(curve: Curve) -> dict[str, Any]:
    """Return loss and bytes of a run."""
    return {"loss": round(curve.loss, 4), "sent_bytes_per_peer": round(curve.points[-1][2])}


def compare(seed: int, size: Size, densities: tuple[float, ...]) -> dict[str, Any]:
    """Run all; what costs most comes last, so that a broken run has shown something."""
    report: dict[str, Any] = {
        "alone": run(seed, size, ALONE_RATE, 0, 0),
        "all-reduce": figures(all_reduce(Classroom(seed, size, ALL_REDUCE_RATE))),
        "updates": [], "texts": [], "both": [],
    }  # fmt: skip
    for density in densities:
        updates = run(seed, size, OURS_RATE, density, 0)
        budget = updates["sent_bytes_per_peer"]
        report["updates"].append(updates)
        report["texts"].append(run(seed, size, ALONE_RATE, 0, budget))
        report["both"].append(run(seed, size, OURS_RATE, density / 2, budget // 2))
    middle = report["updates"][len(densities) // 2]["sent_bytes_per_peer"]
    report["texts at random"] = run(seed, size, ALONE_RATE, 0, middle, by_novelty=False)
    return report


def verdicts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return whether both together are better than either, at the middle budget."""
    index = len(report["both"]) // 2
    better = min(report[name][index]["loss"] for name in ("updates", "texts"))
    ratio = round(report["both"][index]["loss"] / better, 4)
    verdict = {"value": ratio, "target": LOSS_RATIO_MAX, "ok": ratio <= LOSS_RATIO_MAX}
    return {"both_to_better_of_two": verdict}


# --- The picture -------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP = 560, 280, 60, 20
COLOURS = {"updates": "#3b6ea8", "texts": "#c0632b", "both": "#3f8f4f"}


def draw(report: dict[str, Any], title: str) -> str:
    """Return loss over bytes as SVG: a line for each way, dashed ones for alone and all-reduce."""
    points = [point for name in COLOURS for point in report[name]]
    x_max = 1.05 * float(max(point["sent_bytes_per_peer"] for point in points))
    losses = [point["loss"] for point in (*points, report["alone"], report["all-reduce"])]
    low, high = float(min(losses)) - 0.02, float(max(losses)) + 0.02

    def x(sent: float) -> float:
        return LEFT + WIDTH * sent / x_max

    def y(loss: float) -> float:
        return TOP + HEIGHT * (high - loss) / (high - low)

    view = f"0 0 {LEFT + WIDTH + 110} {TOP + HEIGHT + 50}"
    axes = f"M{LEFT} {TOP}V{TOP + HEIGHT}H{LEFT + WIDTH}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" font-family="sans-serif">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<path d="{axes}" fill="none" stroke="#888"/>',
        _text(LEFT + WIDTH / 2, TOP + HEIGHT + 40, "MB that one peer sent", "middle"),
        _text(LEFT, TOP - 6, "loss, nats a byte"),
    ]
    for step in range(5):
        sent, loss = x_max * step / 4, low + (high - low) * step / 4
        parts += [
            _text(x(sent), TOP + HEIGHT + 18, f"{sent / 1e6:.2f}", "middle"),
            _text(LEFT - 8, y(loss) + 4, f"{loss:.2f}", "end"),
        ]
    for name in ("alone", "all-reduce"):
        height = y(report[name]["loss"])
        parts += [
            f'<path d="M{LEFT} {height:.1f}h{WIDTH}" stroke="#888" stroke-dasharray="4 4"/>',
            _text(LEFT + WIDTH + 8, height + 4, name),
        ]
    for name, colour in COLOURS.items():
        line = [(x(each["sent_bytes_per_peer"]), y(each["loss"])) for each in report[name]]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in line]
        parts.append(_text(line[-1][0] + 8, line[-1][1] + 4, name, colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, said: str, anchor: str = "start", colour: str = "#444") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="12" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{said}</text>'


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Texts or updates: what the same bytes teach.")
    parser.add_argument("--seed", type=int, default=1, help="of weights, batches and links")
    parser.add_argument("--quick", action="store_true", help="few steps: under 40 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it as SVG")
    arguments = parser.parse_args()
    size, densities = (QUICK, DENSITIES[-1:]) if arguments.quick else (FULL, DENSITIES)
    report = compare(arguments.seed, size, densities)
    targets = verdicts(report)
    if arguments.picture:
        title = f"Loss after {size.steps} steps at equal bytes, seed {arguments.seed}"
        arguments.picture.write_text(draw(report, title), encoding="utf-8")
    if arguments.json:
        setting = {"seed": arguments.seed, "python": platform.python_version()}
        print(json.dumps({"benchmark": "texts", **setting, **report, "targets": targets}))
        return
    for name, value in report.items():
        for each in value if isinstance(value, list) else [value]:
            print(f"{name:<16} loss {each['loss']:.4f}  sent {each['sent_bytes_per_peer']:>9,}")
    for name, verdict in targets.items():
        met = "met" if verdict["ok"] else "MISSED"
        print(f"{name:<22} {verdict['value']} (target {verdict['target']}: {met})")


if __name__ == "__main__":
    main()
