"""`natswarm demo`: the main job on the embedded default, in one process, in real time.

Devices behind emulated carrier NATs join one ordinary peer by its invite, find out what their NATs
do, puncture to each other, answer a prompt with a GPT-2 whose blocks are spread over three of them,
and two of them learn from each other's text. Nothing leaves the process: the internet is virtual,
everything on it is real.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from itertools import combinations, repeat
from typing import Annotated

import numpy as np
import trio
import typer
from numpy.typing import NDArray

from llmload.demo_report import DemoDevice, DemoPuncture, DemoReport
from llmload.demo_screen import DemoScreen
from llmload.engine.sampler import SamplingParameters
from llmload.errors import LlmloadError
from llmload.learn.exchange import Learner
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.outer import OuterSettings
from llmload.learn.trainer import Trainer
from llmload.model_folder import Model, load_model
from llmload.swarm.blocks import BlockStack
from llmload.swarm.client import SwarmClient, prompt_token_ids
from llmload.swarm.route import format_blocks
from llmload.swarm.stage import StageServer
from llmload.weights import bundled_model_path
from natswarm import (
    ConnectFailed,
    Identity,
    Internet,
    Invite,
    NatswarmError,
    Node,
    NodeConfig,
    NodeEvent,
    PeerConnected,
    PeerId,
    ProfileLearned,
    PunctureEnded,
    PunctureStarted,
    VirtualNetwork,
    World,
    open_node,
    run_world,
)

__all__ = ["demo", "run_demo"]

DEFAULT_PROMPT = "It was a cold morning, and Mr. Holmes"
NEW_TOKENS = 40

# In order of joining. The first has a public address, and its invite is all that the others are
# given; it is a peer like any other. The second lets strangers in, so from the start there are two
# observers, which it takes to tell EIM from ADM.
CAMPUS, LENA = "campus", "lena"
DEVICES = {
    CAMPUS: "public",
    LENA: "lyca-nl",
    "vera": "vodafone-nl",
    "home": "linux-home",
    "kim": "kpn-nl",
    "otto": "o2-uk-4g",
}
STAGES = ("kim", "otto", "home")
ASKER = "vera"

# Models are megabytes, so the demo's learners have good lines: on the 4G links, with a packet in a
# thousand lost, one QUIC connection carries some 0.3 MB/s.
LEARNERS = ("home", CAMPUS)
LEARNING_STEPS = 4
LEARNING_RATE = 6e-4
# Few steps, so what each has learned should be with the other soon.
LEARNING = OuterSettings(local_steps=2, density=0.05)

# What each learner has on its device and never sends; what it learns of the other's, it learns by
# updates of the model alone.
TEXTS = {
    "home": (
        "A device behind a carrier's translator has no address of its own. It shares one with ten "
        "thousand neighbours, and the port by which it is reached is drawn anew for each it speaks "
        "to. So two of them must guess, both at once, until two guesses meet. "
    ),
    CAMPUS: (
        "No server stands between the telephones of this swarm. Whoever is asked for a way points "
        "it out and steps aside; whoever has learned something hands on what it learned, and keeps "
        "the words it learned it from. "
    ),
}

DEADLINE_S = 58.0


async def run_demo(report: DemoReport) -> None:
    """Do it all, filling in `report` on the way; failures end up in its `status`."""
    started_at = trio.current_time()
    try:
        with trio.fail_after(DEADLINE_S):
            await _run(report)
        report.status = "Everything worked." if report.is_ok else "Not everything worked."
    except trio.TooSlowError:
        report.status = f"Not done after {DEADLINE_S:.0f} s: this machine is busy, or a bug is."
    except (NatswarmError, LlmloadError, ValueError) as error:
        report.status = f"Failed: {error}"
    report.seconds = trio.current_time() - started_at


async def _run(report: DemoReport) -> None:
    model = await trio.to_thread.run_sync(load_model, bundled_model_path())
    prompt_token_ids(model, report.prompt)  # a prompt that cannot be asked is refused at once
    async with _open_devices(report) as nodes:
        await _join(report, nodes)
        for a, b in combinations(list(nodes)[1:], 2):
            await _connect(report, nodes, a, b, nodes[b].peer_id)
        # The first two came when there were too few to tell them all about their NATs.
        async with trio.open_nursery() as nursery:
            for name in (CAMPUS, LENA):
                nursery.start_soon(nodes[name].inspect)
        await _ask(report, nodes, model)
        await _learn(report, nodes, model)


@asynccontextmanager
async def _open_devices(report: DemoReport) -> AsyncIterator[dict[str, Node]]:
    """Put the devices on a virtual internet and open a node on each."""
    internet = Internet(World(seed=report.seed))
    names: dict[PeerId, str] = {}
    nodes: dict[str, Node] = {}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(run_world(internet.world))
        for index, (name, carrier) in enumerate(DEVICES.items()):
            # Keys from the seed, so that ties by PeerId fall the same way each time.
            identity = Identity(hashlib.sha256(f"demo/{report.seed}/{name}".encode()).digest())
            names[identity.peer_id] = name
            device = DemoDevice(name, carrier)
            report.devices.append(device)
            config = NodeConfig(
                identity=identity,
                network=VirtualNetwork(internet.add_host(name, carrier)),
                name=name,
                seed=report.seed * len(DEVICES) + index,
                on_event=_Recorder(report, device, names).record,
            )
            nodes[name] = await stack.enter_async_context(open_node(config))
        yield nodes


async def _join(report: DemoReport, nodes: dict[str, Node]) -> None:
    """Let everybody dial the one peer they were invited by, and find out what their NATs do."""
    invite = await nodes[CAMPUS].invite()
    newcomers = [name for name in nodes if name != CAMPUS]
    async with trio.open_nursery() as nursery:
        for name in newcomers:
            nursery.start_soon(_connect, report, nodes, name, CAMPUS, invite)
    await nodes[LENA].inspect()
    async with trio.open_nursery() as nursery:
        for name in newcomers[1:]:
            nursery.start_soon(nodes[name].inspect)


async def _connect(
    report: DemoReport, nodes: dict[str, Node], a: str, b: str, target: PeerId | Invite
) -> None:
    """Connect a to b; a failure is the report's, so that the others go on."""
    puncture = DemoPuncture(a, b)
    report.punctures.append(puncture)
    try:
        await nodes[a].connect(target)
    except ConnectFailed as error:
        puncture.reason = str(error)
    puncture.ok = not puncture.reason


async def _ask(report: DemoReport, nodes: dict[str, Node], model: Model) -> None:
    """Spread the blocks over the stages and have them answer the prompt."""
    cuts = np.linspace(0, model.config.n_layer, len(STAGES) + 1).astype(int)
    for name, first, end in zip(STAGES, cuts, cuts[1:], strict=False):
        blocks = range(first, end)
        stack = await trio.to_thread.run_sync(BlockStack.open, model.config, model.weights, blocks)
        server = StageServer(nodes[name], stack, model.content_hash)
        server.start()
        await nodes[name].announce([server.service])
    client = SwarmClient(nodes[ASKER], model)
    device_names = {node.peer_id: name for name, node in nodes.items()}
    route = await client.find_route()
    report.asker = ASKER
    report.stages = [
        {"device": device_names[offer.peer_id], "blocks": format_blocks(offer.blocks)}
        for offer in route
    ]
    # Drawn, not greedy: small models repeat themselves when they always say the likeliest.
    sampling = SamplingParameters(temperature=0.7, top_k=40, seed=report.seed)
    async with client.generate(
        report.prompt, sampling=sampling, max_new_tokens=NEW_TOKENS, route=route
    ) as generation:
        async for token in generation:
            report.answer += token.text
            report.tokens_per_second = generation.statistics().tokens_per_s
    report.answer_is_complete = bool(report.answer)


async def _learn(report: DemoReport, nodes: dict[str, Node], model: Model) -> None:
    """Let two devices improve one model from texts that neither shows the other."""
    learning = report.learning
    learning.learners = list(LEARNERS)
    optimizer = AdamWSettings(learning_rate=LEARNING_RATE)
    trainers = [Trainer(model.config, model.weights, optimizer=optimizer) for _ in LEARNERS]
    lessons = [_lesson(model, TEXTS[name]) for name in LEARNERS]

    async def measure() -> None:
        """Note the loss of each learner on the other's text."""
        losses = [
            await trio.to_thread.run_sync(trainer.loss, *lesson)
            for trainer, lesson in zip(trainers, reversed(lessons), strict=True)
        ]
        learning.losses.append(sum(losses) / len(losses))

    await measure()
    learners = [
        Learner(nodes[name], trainer, repeat(lesson), model.content_hash, settings=LEARNING)
        for name, trainer, lesson in zip(LEARNERS, trainers, lessons, strict=True)
    ]
    for learner in learners:
        learner.start()
    peers = [
        await nodes[name].connect(nodes[other].peer_id)
        for name, other in zip(LEARNERS, reversed(LEARNERS), strict=True)
    ]
    async with trio.open_nursery() as nursery:
        for learner, peer in zip(learners, peers, strict=True):
            learner.meet(peer)
            nursery.start_soon(learner.run, LEARNING_STEPS)
    learning.updates = sum(learner.outer.statistics.taken for learner in learners)
    for learner in learners:
        await learner.settle()
    round_number, parts = learners[0].round_number, range(learners[0].part_count)
    async with trio.open_nursery() as nursery:
        for learner, peer in zip(learners, peers, strict=True):
            nursery.start_soon(learner.average, [peer], round_number, parts)
    await measure()
    # In this one process the two models can be compared themselves.
    learning.weights_equal = np.array_equal(trainers[0].parameters, trainers[1].parameters)


def _lesson(model: Model, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return tokens and targets, int64 (1, time), of a whole text."""
    ids = np.array([model.tokenizer.encode(text)[: model.config.n_ctx + 1]], dtype=np.int64)
    return ids[:, :-1], ids[:, 1:]


@dataclass(slots=True)
class _Recorder:
    """Writes what one node says happened into the report."""

    report: DemoReport
    device: DemoDevice
    names: dict[PeerId, str]

    def record(self, event: NodeEvent) -> None:
        match event:
            case ProfileLearned(profile):
                self.device.mapping = profile.mapping.value if profile.mapping else None
                self.device.filtering = profile.filtering.value if profile.filtering else None
                if profile.is_translated is False:
                    self.device.allocation = "no NAT"
                elif profile.allocation is not None:
                    self.device.allocation = str(profile.allocation)
            case PunctureStarted(peer_id, plan):
                self._puncture(peer_id).plan = plan.strategy.value
            case PunctureEnded(peer_id, outcome):
                puncture = self._puncture(peer_id)
                puncture.probes += outcome.probe_count
                if self.device.name == puncture.a:
                    puncture.seconds += outcome.seconds
            case PeerConnected(peer):
                self.device.connected_to.append(self.names[peer.peer_id])

    def _puncture(self, peer_id: PeerId) -> DemoPuncture:
        pair = {self.device.name, self.names[peer_id]}
        return next(each for each in self.report.punctures if {each.a, each.b} == pair)


def demo(
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the internet, its NATs and all ports.")
    ] = 1,
    prompt: Annotated[str, typer.Option(help="What the swarm is asked.")] = DEFAULT_PROMPT,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, nothing before.")
    ] = False,
) -> None:
    """Show everything at once: NATs, punctures, an answer and learning, in this process alone.

    Six devices behind emulated carriers find each other without a server, puncture, answer a prompt
    with a GPT-2 spread over three of them, and two learn together. Needs no network and no root;
    takes well under a minute. The exit status is 0 only if all of it worked.
    """
    report = DemoReport(seed=seed, prompt=prompt)
    with nullcontext() if as_json else DemoScreen(report):
        trio.run(run_demo, report)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    raise typer.Exit(0 if report.is_ok else 1)
