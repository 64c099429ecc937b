"""How often devices in labs of `natswarm lab` meet: emulated carriers and the kernel's NAT.

    python -m tools.lab.punctures --runs 20 --json results.json

Needs root. Real nodes on real sockets: a hub and an observer with public addresses stay, and for
each run two new devices behind their NATs join, find out what these do, and one connects to the
other. A run takes about seven seconds, most of which is Python starting. `repeat.py` does the same
on kernel NATs alone, with a model on top.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from natswarm.lab.capability import missing_capability
from natswarm.lab.client import start_lab, stop_lab
from natswarm.lab.errors import LabError
from natswarm.lab.process import LabProcess
from natswarm.lab.registry import LabState
from natswarm.lab.settings import LabSettings, NatChoice
from tools.lab.pair import NATSWARM

__all__ = ["PAIRS", "Pair", "main"]

SEQUENTIAL = "allocation=sequential:cross_traffic_per_s=20"
BLOCK = "allocation=blocks:size=1024,max_blocks=1"


@dataclass(frozen=True, slots=True)
class Pair:
    """What a and b are behind, as `natswarm lab up` takes it."""

    a: str
    b: str
    knobs: tuple[str, ...] = ()
    nat: NatChoice = NatChoice.EMULATED

    def __str__(self) -> str:
        knobs = "".join(f" {knob}" for knob in self.knobs)
        return f"{self.a} x {self.b}{knobs} ({self.nat.value})"


PAIRS = (
    Pair("home", "linux-random", nat=NatChoice.KERNEL),
    Pair("home", "linux-random"),
    Pair("linux-random", "linux-random", (f"a.{BLOCK}", f"b.{BLOCK}"), NatChoice.KERNEL),
    Pair("kpn-nl", "kpn-nl"),
    Pair("orange-bg", "orange-bg", (f"a.{SEQUENTIAL}", f"b.{SEQUENTIAL}")),
    Pair("kpn-nl,home", "kpn-nl", nat=NatChoice.AUTO),
)
"""What must meet: preserving x random, block x block, counter x counter, double NAT x block.

The kernel cannot count, and blocks of 1,024 ports are the ones it can do; of two NATs in a row it
can be the one next to the device.
"""

# Starting Python takes seconds on a busy machine of two cores, joining and inspecting three.
# These bound a hang, not a performance.
START_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How one run went.

    Attributes:
        strategy: Of the last puncture of the side that connects.
        tries: Punctures it began.
        probes: That both sides sent, in all tries.
        seconds: From the start of the first try to the path, tries only.
        reason: What went wrong; empty if nothing did.
    """

    strategy: str = ""
    tries: int = 0
    probes: int = 0
    seconds: float = 0.0
    reason: str = ""


def main() -> None:
    """Run the command line; the exit status is 0 only if every run connected."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=20, help="of each pair (default: 20)")
    parser.add_argument("--only", default="", help="pairs whose description holds this text")
    parser.add_argument("--seed", type=int, default=1, help="of what the emulator draws")
    parser.add_argument("--loss", default="1%", help="of the core (default: 1%%)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to FILE")
    arguments = parser.parse_args()
    if (reason := missing_capability()) is not None:
        sys.exit(f"no laboratory here: {reason}")
    # By default SIGTERM ends Python without leaving `with` and `finally`: labs would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True, width=120)
    results = []
    for index, pair in enumerate(PAIRS):
        if arguments.only not in str(pair):
            continue
        settings = LabSettings(
            name=f"punctures-{index}",
            devices=(f"a={pair.a}", f"b={pair.b}", "hub=public", "observer=public"),
            knobs=pair.knobs,
            nat=pair.nat.value,
            loss=arguments.loss,
            seed=arguments.seed + index,
        )
        runs = []
        for number, run in enumerate(_runs(settings, arguments.runs), start=1):
            runs.append(run)
            console.print(f"{pair} {number}: {run.reason or run}", markup=False)
        results.append(_summary(pair, runs))
    _print(results, f"{arguments.runs} runs of each pair, loss {arguments.loss}")
    if arguments.json is not None:
        document = {"seed": arguments.seed, "loss": arguments.loss, "pairs": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(any(result["successes"] < result["runs"] for result in results))


def _runs(settings: LabSettings, count: int) -> Iterator[Run]:
    lab = start_lab(settings)
    try:
        with tempfile.TemporaryDirectory() as state:
            scene = _Scene(lab, Path(state))
            with scene.start("hub", "up", "--port", "4242") as hub:
                scene.invite = _wait(hub, "up")["invite"]
                with scene.start("observer", "up", "--join", scene.invite) as observer:
                    _wait(observer, "up")
                    for number in range(count):
                        yield _run(scene, number)
    finally:
        stop_lab(lab)


class _Scene:
    """A lab with a hub, and a folder for the identities of everybody."""

    def __init__(self, lab: LabState, folder: Path) -> None:
        self._namespaces = {device.name: device.namespace for device in lab.devices}
        self._folder = folder
        self.invite = ""

    def start(self, device: str, *words: str, identity: str = "") -> LabProcess:
        """Start `natswarm` on a device."""
        state = ["--state", str(self._folder / (identity or device))]
        return LabProcess(
            [*NATSWARM, words[0], "--json", *state, *words[1:]],
            enter=["ip", "netns", "exec", self._namespaces[device]],
        )


def _run(scene: _Scene, number: int) -> Run:
    join = ("--join", scene.invite)
    try:
        with scene.start("a", "up", *join, identity=f"a{number}") as a:
            peer_id = _wait(a, "up")["peer_id"]
            with scene.start("b", "connect", peer_id, *join, identity=f"b{number}") as b:
                b.wait(timeout_s=CONNECT_TIMEOUT_S)
            tries = _punctures(b, peer_id)
            probes = sum(each["probes"] for each in tries)
            others = [each for each in _events(a, "punctured") if each["ok"] or len(tries) > 1]
            probes += sum(each["probes"] for each in others[-len(tries) :])
    except LabError as error:
        return Run(reason=str(error))
    if not tries:
        return Run(reason="connected, but not by a puncture")
    return Run(
        strategy=tries[-1]["strategy"],
        tries=len(tries),
        probes=probes,
        seconds=sum(each["seconds"] for each in tries),
    )


def _punctures(process: LabProcess, peer_id: str) -> list[dict[str, Any]]:
    return [each for each in _events(process, "punctured") if each["peer_id"] == peer_id]


def _events(process: LabProcess, name: str) -> list[dict[str, Any]]:
    return [event for line in process.lines if (event := json.loads(line))["event"] == name]


def _wait(process: LabProcess, name: str) -> dict[str, Any]:
    line = process.wait_line(
        lambda line: bool(json.loads(line)["event"] == name), timeout_s=START_TIMEOUT_S
    )
    event: dict[str, Any] = json.loads(line)
    return event


def _summary(pair: Pair, runs: list[Run]) -> dict[str, Any]:
    met = [run for run in runs if not run.reason] or runs
    return {
        "pair": str(pair),
        "runs": len(runs),
        "successes": sum(not run.reason for run in runs),
        "strategies": sorted({run.strategy for run in met}),
        "probes_median": statistics.median(run.probes for run in met),
        "probes_max": max(run.probes for run in met),
        "seconds_median": statistics.median(run.seconds for run in met),
        "seconds_max": max(run.seconds for run in met),
        "reports": [asdict(run) for run in runs],
    }


def _print(results: list[dict[str, Any]], title: str) -> None:
    columns = ("a x b", "strategy", "met", "probes of both", "most", "seconds", "longest")
    table = Table(*columns, title=title)
    for each in results:
        table.add_row(
            each["pair"],
            ", ".join(each["strategies"]),
            f"{each['successes']} of {each['runs']}",
            f"{each['probes_median']:g}",
            str(each["probes_max"]),
            f"{each['seconds_median']:.2f}",
            f"{each['seconds_max']:.2f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
