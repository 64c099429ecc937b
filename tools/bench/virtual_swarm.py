"""A swarm that serves a small model, whole nodes on the virtual internet, in virtual time.

What is real: nodes, NATs, punctures, QUIC, sessions, and the numbers that the model computes. What
is modelled: how long computing takes, because a mock clock does not wait for a processor.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import trio
from trio.testing import MockClock

from llmload import BlockStack, Model, StageEngine, StageServer, bundled_model_path, load_model
from llmload.swarm.placement import windows
from llmload.swarm.stage import StageLimits
from llmload.swarm.stage_session import Compute
from llmload.swarm.volunteer import Volunteer
from natswarm import Identity, Internet, Node, NodeConfig, VirtualNetwork, World, open_node
from natswarm import run_world as step_world
from natswarm.sim.link import LinkConditions
from natswarm.sim.topology import Host

__all__ = [
    "CARRIERS",
    "VirtualSwarm",
    "load_small_model",
    "open_virtual_swarm",
    "run_in_virtual_time",
]

# Carriers whose NATs are opened in a second or two; who needs a birthday puncture joins as well,
# only later.
CARRIERS = ("linux-home", "vodafone-nl", "lyca-nl", "lebara-nl")

# A block of GPT-2 124M takes a phone about so long for one token.
BLOCK_S = 0.002
# What each further row of a step takes of that: the weights are read once.
ROW_SHARE = 0.1
CUT = LinkConditions(loss=1.0)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Running:
    """A node and its own tasks."""

    node: Node
    host: Host
    nursery: trio.Nursery
    stopped: trio.Event


@dataclass(slots=True, eq=False)
class VirtualSwarm:
    """Nodes by name around one public node, `campus`; a token takes `block_s` in each block."""

    model: Model
    engines: Mapping[int, StageEngine]
    internet: Internet
    rng: random.Random
    seed: int
    nursery: trio.Nursery
    block_s: float = BLOCK_S
    running: dict[str, _Running] = field(default_factory=dict)

    @property
    def whole(self) -> list[StageEngine]:
        """The model on one device."""
        return [self.engines[index] for index in self.model.config.blocks]

    def node(self, name: str) -> Node:
        """Return a running node."""
        return self.running[name].node

    async def add(self, name: str, kind: str) -> Node:
        """Start a node behind a NAT; it joins by `campus` and looks at its NAT."""
        host = self.internet.add_host(name, kind)
        config = NodeConfig(
            identity=Identity(f"{self.seed}/{name}".encode().ljust(32, b".")[:32]),
            network=VirtualNetwork(host),
            name=name,
            seed=self.rng.getrandbits(32),
        )
        node: Node = await self.nursery.start(self._run, name, host, config)
        if name != "campus":
            await node.connect(await self.node("campus").invite())
            await node.inspect()
        return node

    async def serve(self, name: str, blocks: range) -> StageServer:
        """Let a node serve blocks."""
        stack = BlockStack([self.engines[index] for index in blocks])
        server = StageServer(
            self.node(name),
            stack,
            self.model.content_hash,
            block_s=self.block_s,
            compute=self._compute(len(blocks)),
        )
        server.start()
        self.running[name].nursery.start_soon(server.keep_links)
        await self.node(name).announce([server.service])
        return server

    async def volunteer(self, name: str, block_count: int) -> Volunteer:
        """Let a node serve the blocks that are lacking most, and others when that changes."""
        volunteer = Volunteer(
            self.node(name),
            self.model.config,
            self.model.content_hash,
            open_block=self.engines.__getitem__,
            candidates=windows([1] * self.model.config.n_layer, block_count),
            limits=StageLimits(),
            on_change=lambda _blocks, _reason: None,
            compute=self._compute(block_count),
            rng=random.Random(self.rng.getrandbits(32)),
        )
        await self.running[name].nursery.start(volunteer.run)
        return volunteer

    def _compute(self, block_count: int) -> Compute:
        async def compute(work: Callable[..., T], /, *arguments: Any) -> T:
            if getattr(work, "__func__", None) is BlockStack.measure_block_s:
                return cast(T, self.block_s)  # and not how busy this machine is
            batch = arguments[0] if arguments and isinstance(arguments[0], Mapping) else {}
            rows = sum(len(item.x) for item in batch.values()) or 1
            await trio.sleep(self.block_s * block_count * (1 + ROW_SHARE * (rows - 1)))
            return work(*arguments)

        return compute

    def name_of(self, peer_id: object) -> str:
        """Return whose PeerId it is."""
        return next(
            name for name, running in self.running.items() if running.node.peer_id == peer_id
        )

    async def crash(self, name: str) -> None:
        """Let a node vanish at once: nobody hears a goodbye."""
        running = self.running.pop(name)
        uplink = running.host.uplink
        uplink.upload.conditions = uplink.download.conditions = CUT
        running.nursery.cancel_scope.cancel()

    async def leave(self, name: str) -> None:
        """Let a node leave as a user does: its peers are told goodbye."""
        running = self.running.pop(name)
        running.nursery.cancel_scope.cancel()
        await running.stopped.wait()

    async def _run(
        self, name: str, host: Host, config: NodeConfig, task_status: trio.TaskStatus[Node]
    ) -> None:
        stopped = trio.Event()
        try:
            async with open_node(config) as node, trio.open_nursery() as nursery:
                self.running[name] = _Running(node, host, nursery, stopped)
                task_status.started(node)
                await trio.sleep_forever()
        finally:
            stopped.set()


@asynccontextmanager
async def open_virtual_swarm(
    model: Model, engines: Mapping[int, StageEngine], seed: int
) -> AsyncIterator[VirtualSwarm]:
    """Open the internet and its first two nodes: two observers tell EIM from ADM."""
    internet = Internet(World(seed=seed))
    async with step_world(internet.world), trio.open_nursery() as nursery:
        swarm = VirtualSwarm(model, engines, internet, random.Random(seed), seed, nursery)
        await swarm.add("campus", "public")
        await swarm.add("library", "public")
        yield swarm
        nursery.cancel_scope.cancel()


def load_small_model() -> tuple[Model, dict[int, StageEngine]]:
    """Return the shipped model and one engine for each block; all nodes share them."""
    model = load_model(bundled_model_path())
    return model, {
        index: StageEngine(model.config, model.weights, range(index, index + 1))
        for index in model.config.blocks
    }


def run_in_virtual_time(main: Callable[..., Any], *arguments: Any) -> Any:
    """Run an async function under a clock that jumps whenever everybody waits."""
    return trio.run(main, *arguments, clock=MockClock(autojump_threshold=0))
