r"""Two devices behind NATs puncture, connect, and write a text together: real processes all.

       hub (natswarm up)   observer (natswarm up)   asker (llmload generate)
               \                   |                   /
                └───────────── the core ──────────────┘
                      /                       \
                  NAT of a                 NAT of b
                     |                        |
        a (blocks 0-2 of the model)   b (blocks 3-5)

All they are given is the hub's invite. The asker sends the prompt to a, which needs b to go on: the
hub introduces them, both puncture, and activations go from a to b straight through both NATs.

Knows the commands and the JSON lines they print, and nothing inside them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from natswarm.lab.errors import LabError
from natswarm.lab.nat import KernelNat
from natswarm.lab.process import LabProcess
from natswarm.lab.topology import Host, Lab

__all__ = ["NATSWARM", "PROMPT", "TOKEN_COUNT", "PairReport", "run_pair"]

PROMPT = "It was a cold morning, and"
TOKEN_COUNT = 24

# Starting Python with ONNX Runtime takes seconds on a busy machine of two cores, and an inspection
# two. These bound a hang, not a performance.
START_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 240.0

HUB_PORT = 4242

# As the installed commands, but from this very environment, whatever PATH says.
NATSWARM = [sys.executable, "-c", "from natswarm.cli import main; main()"]
LLMLOAD = [sys.executable, "-c", "from llmload.cli import main; main()"]
DEVICE = [sys.executable, "-m", "tools.lab.device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    """How one pair did.

    Attributes:
        a: NAT of the device that wished to connect.
        b: NAT of the other.
        seen_a: Device a's NAT as it found out itself.
        seen_b: Device b's.
        strategy: Of the puncture that found a path, or of the last that did not.
        tries: Punctures that a began.
        probes_a: Probes that a sent in all tries.
        probes_b: Probes that b sent.
        seconds: From the start of a's first try to its path, tries only.
        answer: What the model wrote; empty if it came to nothing.
        reason: What went wrong; empty if nothing did.
        complaints: What the nodes wrote to standard error; empty unless there is a bug.
    """

    a: str
    b: str
    seen_a: str = ""
    seen_b: str = ""
    strategy: str = ""
    tries: int = 0
    probes_a: int = 0
    probes_b: int = 0
    seconds: float = 0.0
    answer: str = ""
    reason: str = ""
    complaints: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether they connected and the text came."""
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {"ok": self.is_ok, **asdict(self)}


def run_pair(a: KernelNat, b: KernelNat, *, seed: int, loss: float = 0.0) -> PairReport:
    """Build the lab, run the devices, and take it all down.

    Args:
        a: NAT of the device that wishes to connect.
        b: NAT of the other.
        seed: Draws identities and what the devices draw; the kernel's ports cannot be fixed.
        loss: Probability that a packet is lost in the core, in each direction.
    """
    with tempfile.TemporaryDirectory() as state, Lab(loss=loss) as lab:
        return _Run(lab, Path(state), seed).report(a, b)


class _Run:
    def __init__(self, lab: Lab, state: Path, seed: int) -> None:
        self._lab = lab
        self._state = state
        self._seed = seed
        self._nodes: dict[str, LabProcess] = {}

    def report(self, a: KernelNat, b: KernelNat) -> PairReport:
        kinds = {"a": a.kind.value, "b": b.kind.value}
        answer = reason = ""
        try:
            invite = self._start_public("hub", "--port", str(HUB_PORT))
            self._start_public("observer", "--join", invite)
            # One after the other, as people do; and it keeps two cores from doing all at once.
            for name, nat, blocks in (("a", a, "0-2"), ("b", b, "3-5")):
                host = self._lab.add_client(name, nat)
                self._start_device(host, name, blocks, invite)
            answer = self._ask(self._lab.add_public("asker"), invite)
        except LabError as error:
            reason = str(error)
        devices = [self._nodes[name] for name in kinds if name in self._nodes]
        report = _summary(devices, answer=answer, reason=reason, **kinds)
        errors = {name: node.error_text() for name, node in self._nodes.items()}
        return replace(
            report, complaints="\n".join(f"{name}: {text}" for name, text in errors.items() if text)
        )

    def _start_public(self, name: str, *options: str) -> str:
        """Start an ordinary node with a public address; return its invite."""
        host = self._lab.add_public(name)
        state = ["--state", str(self._state / name)]
        self._nodes[name] = node = host.namespace.spawn(
            [*NATSWARM, "up", "--json", "--name", name, "--bind", host.ip, *state, *options]
        )
        return str(_wait_event(node, "up")["invite"])

    def _start_device(self, host: Host, name: str, blocks: str, invite: str) -> None:
        options = ["--name", name, "--blocks", blocks, "--join", invite, "--seed", str(self._seed)]
        self._nodes[name] = device = host.namespace.spawn([*DEVICE, *options])
        _wait_event(device, "serving")

    def _ask(self, host: Host, invite: str) -> str:
        options = ["--join", invite, "--json", "--temperature", "0", "-n", str(TOKEN_COUNT)]
        printed = host.namespace.run(
            [*LLMLOAD, "generate", PROMPT, *options], timeout_s=ANSWER_TIMEOUT_S
        )
        return str(json.loads(printed)["text"])


def _summary(devices: list[LabProcess], *, a: str, b: str, answer: str, reason: str) -> PairReport:
    events = [[_event(line) for line in device.lines] for device in devices]
    events += [[]] * (2 - len(events))  # one that never started has said nothing
    ids = [_last(of_one, "serving").get("peer_id") for of_one in events]
    seen = [_nat_as_seen(_last(of_one, "profile")) for of_one in events]
    tries = [
        [each for each in of_one if each["event"] == "punctured" and each["peer_id"] == other]
        for of_one, other in zip(events, reversed(ids), strict=True)
    ]
    return PairReport(
        a=a,
        b=b,
        seen_a=seen[0],
        seen_b=seen[1],
        strategy=tries[0][-1]["strategy"] if tries[0] else "",
        tries=len(tries[0]),
        probes_a=sum(each["probes"] for each in tries[0]),
        probes_b=sum(each["probes"] for each in tries[1]),
        seconds=sum(each["seconds"] for each in tries[0]),
        answer=answer,
        reason=reason or ("" if tries[0] else "an answer came, but not by a puncture"),
    )


def _nat_as_seen(profile: dict[str, Any]) -> str:
    words = (profile.get(key) for key in ("mapping", "filtering", "allocation"))
    return ", ".join("unknown" if word is None else word for word in words) if profile else ""


def _wait_event(process: LabProcess, name: str) -> dict[str, Any]:
    line = process.wait_line(lambda line: _event(line)["event"] == name, timeout_s=START_TIMEOUT_S)
    return _event(line)


def _last(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((each for each in reversed(events) if each["event"] == name), {})


def _event(line: str) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict) or "event" not in value:
        raise LabError(f"not an event: {line[:200]}")
    return value
