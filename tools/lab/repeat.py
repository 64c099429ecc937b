"""How often pairs of kernel NATs connect, with how many probes, in how many seconds.

    python -m tools.lab.repeat --runs 10 --json results.json

Needs root. A run takes about ten seconds, most of which is Python starting.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from natswarm.lab.capability import missing_capability
from natswarm.lab.nat import BLOCK_PORTS, KernelNat, NatKind
from tools.lab.pair import PairReport, run_pair

__all__ = ["PAIRS", "main"]

PRESERVING, RANDOM = KernelNat(NatKind.PRESERVING), KernelNat(NatKind.RANDOM)
PAIRS = (
    (PRESERVING, PRESERVING),
    (PRESERVING, RANDOM),
    (RANDOM, PRESERVING),
    (
        KernelNat(NatKind.BLOCK, block_base=40_960),
        KernelNat(NatKind.BLOCK, block_base=7 * BLOCK_PORTS),
    ),
)
"""What must connect: the NAT of the device that wishes to, and that of the other."""


def main() -> None:
    """Run the command line; the exit status is 0 only if every run connected."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=10, help="of each pair (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of identities, probes and blocks")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to FILE")
    arguments = parser.parse_args()
    if (reason := missing_capability()) is not None:
        sys.exit(f"no laboratory here: {reason}")
    # By default SIGTERM ends Python without leaving `with` blocks: the lab would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    console = Console(stderr=True)
    rng = random.Random(arguments.seed)
    table = Table(*_COLUMNS, title=f"{arguments.runs} runs of each pair, seed {arguments.seed}")
    results = []
    for pair in PAIRS:
        reports = []
        for index in range(arguments.runs):
            a, b = (_moved(nat, rng) for nat in pair)
            report = run_pair(a, b, seed=rng.randrange(2**32), loss=arguments.loss)
            reports.append(report)
            console.print(f"{report.a} x {report.b} {index + 1}: {_outcome(report)}", markup=False)
        table.add_row(*_row(reports))
        results.append(_result(reports))
    Console(width=120).print(table)
    if arguments.json is not None:
        document = {"seed": arguments.seed, "loss": arguments.loss, "pairs": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(any(result["successes"] < result["runs"] for result in results))


def _moved(nat: KernelNat, rng: random.Random) -> KernelNat:
    """Return the NAT with its block somewhere else, as carriers place them: aligned."""
    if nat.kind is not NatKind.BLOCK:
        return nat
    return KernelNat(NatKind.BLOCK, block_base=BLOCK_PORTS * rng.randrange(1, 64))


_COLUMNS = ("a x b", "strategy", "connected", "probes a + b", "most", "seconds", "longest")


def _row(reports: Sequence[PairReport]) -> list[str]:
    result = _result(reports)
    return [
        result["pair"],
        ", ".join(result["strategies"]),
        f"{result['successes']} of {result['runs']}",
        f"{result['probes_median']:g}",
        str(result["probes_max"]),
        f"{result['seconds_median']:.2f}",
        f"{result['seconds_max']:.2f}",
    ]


def _result(reports: Sequence[PairReport]) -> dict[str, Any]:
    connected = [report for report in reports if report.is_ok] or reports
    probes = [report.probes_a + report.probes_b for report in connected]
    seconds = [report.seconds for report in connected]
    return {
        "pair": f"{reports[0].a} x {reports[0].b}",
        "runs": len(reports),
        "successes": sum(report.is_ok for report in reports),
        "strategies": sorted({report.strategy for report in reports}),
        "probes_median": statistics.median(probes),
        "probes_max": max(probes),
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
        "reports": [report.to_json() for report in reports],
    }


def _outcome(report: PairReport) -> str:
    if not report.is_ok:
        return f"FAILED: {report.reason}"
    return (
        f"{report.strategy}, {report.tries} tries, {report.probes_a} + {report.probes_b} probes, "
        f"{report.seconds:.2f} s"
    )


if __name__ == "__main__":
    main()
