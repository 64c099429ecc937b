"""Learners on real nodes for five minutes: does each get better at the others' text?

    python -m tools.bench.mesh_learning [--lab] [--minutes M] [--seed N] [--quick] [--json]

Three devices behind carrier NATs train the shipped model, each on source code of another package of
the standard library, and exchange what they learn. A fourth trains on the first one's text alone,
for as long, to show what comes of the mesh. Then each model is judged on the last tenth of every
text, which nobody has learned from.

Without `--lab` the nodes are in this process, on the virtual internet, on the clock of the wall.
With it each is a `llmload learn` of its own in a network namespace, behind NATs that the kernel or
the emulator runs (Linux, root). --quick takes 20 s.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from llmload import AdamWSettings, Learner, Model, Trainer, bundled_model_path, load_model
from llmload.learn.trainer import batches
from natswarm import Identity, Internet, Node, NodeConfig, VirtualNetwork, World, open_node
from natswarm import run_world as step_world
from natswarm.lab.capability import missing_capability
from natswarm.lab.client import start_lab, stop_lab
from natswarm.lab.process import LabProcess
from natswarm.lab.settings import LabSettings, NatChoice
from tools.lab.pair import LLMLOAD, NATSWARM

# Device: its NAT, and the package whose source is its text.
DEVICES = {
    "a": ("linux-home", "email"),
    "b": ("kpn-nl", "asyncio"),
    "c": ("vodafone-nl", "unittest"),
}
LAB_NATS = {"a": "home", "b": "kpn-nl", "c": "linux-random"}
ALONE = "a alone"
TEXT_BYTES = 400_000
HELD_OUT_SHARE = 0.1
BATCH, WINDOW, RATE = 2, 96, 5e-4
JUDGED_WINDOWS = 12
STARTED_S = 90.0
STOPPED_S = 60.0
INTERRUPTED = 130


def read_text(package: str) -> str:
    """Return source of a package of the standard library."""
    folder = Path(os.__file__).parent / package
    files = (path.read_text("utf-8", "replace") for path in sorted(folder.rglob("*.py")))
    return "\n".join(files)[:TEXT_BYTES]


def judge(
    model: Model, weights: Mapping[str, NDArray[Any]], texts: Mapping[str, NDArray[np.int64]]
) -> dict[str, float]:
    """Return the loss on each text, nats a token."""
    trainer = Trainer(model.config, weights, thread_count=2)
    losses = {}
    for name, tokens in texts.items():
        starts = np.linspace(0, len(tokens) - WINDOW - 1, JUDGED_WINDOWS).astype(np.int64)
        windows = tokens[starts[:, None] + np.arange(WINDOW + 1)]
        losses[name] = round(trainer.loss(windows[:, :-1], windows[:, 1:]), 4)
    return losses


# In the virtual internet --------------------------------------------------------------------------


async def learn_in_process(
    model: Model, texts: Mapping[str, NDArray[np.int64]], seed: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Train on virtual hosts; return for each learner its weights and how it went."""
    internet = Internet(World(seed=seed))
    trainers = {
        name: Trainer(model.config, model.weights, optimizer=AdamWSettings(learning_rate=RATE))
        for name in (*texts, ALONE)
    }
    found: dict[str, dict[str, Any]] = {}

    async def run(name: str, learner: Learner) -> None:
        with trio.move_on_after(seconds):
            await learner.run()
        found[name] = {
            "weights": trainers[name].weights(),
            "steps": learner.step_count,
            "taken": learner.outer.statistics.taken,
            "sent_bytes": sum(report.sent_bytes for report in learner.reports.values()),
        }

    async with step_world(internet.world), trio.open_nursery() as nursery:

        async def add(name: str, kind: str) -> Node:
            config = NodeConfig(
                identity=Identity(f"{seed}/{name}".encode().ljust(32, b".")[:32]),
                network=VirtualNetwork(internet.add_host(name, kind)),
                name=name,
                seed=seed,
            )
            node: Node = await nursery.start(_keep_open, config)
            return node

        hub = await add("hub", "public")
        await (await add("observer", "public")).connect(await hub.invite())
        learners = {}
        for index, name in enumerate((*texts, ALONE)):
            text = texts.get(name, texts["a"])
            node = await add(name, DEVICES.get(name, ("linux-home",))[0])
            rng = np.random.default_rng((seed, index % len(texts)))
            learners[name] = Learner(
                node,
                trainers[name],
                batches(text, batch=BATCH, time=WINDOW, rng=rng),
                model.content_hash,
            )
            if name == ALONE:
                continue
            await node.connect(await hub.invite())
            await node.inspect()
            learners[name].start()
            await node.announce([learners[name].service])
        async with trio.open_nursery() as training:
            for name, learner in learners.items():
                training.start_soon(run, name, learner)
        nursery.cancel_scope.cancel()
    return found


async def _keep_open(config: NodeConfig, task_status: trio.TaskStatus[Node]) -> None:
    async with open_node(config) as node:
        task_status.started(node)
        await trio.sleep_forever()


# In the laboratory --------------------------------------------------------------------------------


def learn_in_lab(
    texts: Mapping[str, str], seed: int, seconds: float, folder: Path
) -> dict[str, dict[str, Any]]:
    """Train in namespaces; return for each learner its weights and how it went."""
    devices = [f"{name}={nat}" for name, nat in LAB_NATS.items()]
    settings = LabSettings(
        name="learners",
        devices=(*devices, "hub=public", "observer=public", "alone=public"),
        nat=NatChoice.AUTO.value,
        seed=seed,
    )
    lab = start_lab(settings)
    try:
        namespaces = {device.name: device.namespace for device in lab.devices}

        def start(device: str, *words: str) -> LabProcess:
            state = ["--state", str(folder / f"{device} state"), "--json"]
            return LabProcess([*words, *state], enter=["ip", "netns", "exec", namespaces[device]])

        with start("hub", *NATSWARM, "up", "--port", "4242") as hub:
            invite = _told(hub, "up")["invite"]
            with start("observer", *NATSWARM, "up", "--join", invite) as observer:
                _told(observer, "up")
                return _learn_together(start, texts, invite, seed, seconds, folder)
    finally:
        stop_lab(lab)


def _learn_together(
    start: Any, texts: Mapping[str, str], invite: str, seed: int, seconds: float, folder: Path
) -> dict[str, dict[str, Any]]:
    running: dict[str, LabProcess] = {}
    for name in (*texts, ALONE):
        text = folder / f"{name}.txt"
        text.write_text(texts.get(name, texts["a"]), "utf-8")
        options = ["--data", str(text), "--out", str(folder / f"{name} model")]
        options += ["--batch", str(BATCH), "--window", str(WINDOW), "--rate", str(RATE)]
        options += ["--seed", str(seed), "--no-lan", "--no-gateway", "--report-every", "10"]
        if name != ALONE:
            options += ["--join", invite]
        device = "alone" if name == ALONE else name
        running[name] = start(device, *LLMLOAD, "learn", *options)
    try:
        for process in running.values():
            _told(process, "joined")
        trio.run(trio.sleep, seconds)
        for process in running.values():
            process.interrupt()
        found = {}
        for name, process in running.items():
            with process:
                process.wait(timeout_s=STOPPED_S, expected_status=INTERRUPTED)
            last = [row for line in process.lines if "taken" in (row := json.loads(line))][-1]
            found[name] = {
                "weights": load_model(folder / f"{name} model").weights,
                "steps": last["step"],
                "taken": last["taken"],
                "sent_bytes": last["sent_bytes"],
            }
        return found
    finally:
        for process in running.values():
            process.kill()


def _told(process: LabProcess, event: str) -> dict[str, Any]:
    line = process.wait_line(
        lambda line: json.loads(line).get("event") == event, timeout_s=STARTED_S
    )
    found: dict[str, Any] = json.loads(line)
    return found


# Both ---------------------------------------------------------------------------------------------


def summarize(before: Mapping[str, float], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return targets: each learner's loss on the others' texts falls, and further than alone."""
    targets: dict[str, Any] = {}
    others = {name: [other for other in DEVICES if other != name] for name in DEVICES}
    for name, foreign in others.items():
        change = np.mean([found[name]["loss"][other] - before[other] for other in foreign])
        targets[f"{name}_on_others"] = {
            "value": round(float(change), 4),
            "target": 0.0,
            "ok": bool(change < 0),
        }
    mesh, alone = (np.mean([found[n]["loss"][o] for o in others["a"]]) for n in ("a", ALONE))
    targets["a_to_alone_on_others"] = {
        "value": round(float(mesh - alone), 4),
        "target": 0.0,
        "ok": bool(mesh < alone),
    }
    return targets


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lab", action="store_true", help="in network namespaces; needs root")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training")
    parser.add_argument("--seed", type=int, default=1, help="of batches and NATs")
    parser.add_argument("--quick", action="store_true", help="20 seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.lab and (reason := missing_capability()) is not None:
        sys.exit(f"no laboratory here: {reason}")
    seconds = 20.0 if arguments.quick else 60 * arguments.minutes
    model = load_model(bundled_model_path())
    texts = {name: read_text(package) for name, (_, package) in DEVICES.items()}
    cuts = {name: int(len(text) * (1 - HELD_OUT_SHARE)) for name, text in texts.items()}

    def tokens(text: str) -> NDArray[np.int64]:
        return np.array(model.tokenizer.encode(text), dtype=np.int64)

    held_out = {name: tokens(text[cuts[name] :]) for name, text in texts.items()}
    learned = {name: text[: cuts[name]] for name, text in texts.items()}
    before = judge(model, model.weights, held_out)
    if arguments.lab:
        with tempfile.TemporaryDirectory() as folder:
            found = learn_in_lab(learned, arguments.seed, seconds, Path(folder))
    else:
        own = {name: tokens(text) for name, text in learned.items()}
        found = trio.run(learn_in_process, model, own, arguments.seed, seconds)
    for each in found.values():
        each["loss"] = judge(model, each.pop("weights"), held_out)
    targets = summarize(before, found)
    report = {"benchmark": "mesh_learning", "lab": arguments.lab, "seconds": seconds}
    if arguments.json:
        print(json.dumps({**report, "before": before, "learners": found, "targets": targets}))
        return
    print("         steps  taken  MB sent  loss on text " + "      ".join(before))
    print(f"{'before':40}" + " ".join(f"{loss:6.3f}" for loss in before.values()))
    for name, each in sorted(found.items()):
        losses = " ".join(f"{loss:6.3f}" for loss in each["loss"].values())
        sent = each["sent_bytes"] / 1e6
        print(f"{name:8} {each['steps']:5} {each['taken']:6} {sent:8.2f}           {losses}")
    for name, target in targets.items():
        print(f"{name:22} {target['value']:+.4f}  {'met' if target['ok'] else 'MISSED'}")


if __name__ == "__main__":
    main()
