"""How long nodes take to find each other with nothing but a cache, or but an invite.

    python -m tools.bench.discovery [--seed N] [--count N] [--quick] [--json]

Whole nodes, QUIC included, on the virtual internet, so the seconds are those of its clock.

    rejoin    a phone has met 20 nodes that take strangers; 10, 50 or 90 % of them are gone when it
              comes back, all alone: seconds until the first peer, and until 8 or all that are left
    invites   two devices with no common contact and no LAN, each behind a carrier, each with the
              other's invite; or only the guest with one where the host takes strangers: seconds
              from the first `connect` to the connection, the second one up to 2 s later
    mailbox   the same with one invite and nobody else but 8 mainline nodes, which tell both what
              mapping their NATs have, not what filter, and carry the guest's answer
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import trio
import trio.testing

from natswarm import (
    Endpoint,
    Identity,
    Internet,
    NatswarmError,
    NatTest,
    Node,
    NodeConfig,
    NodeEvent,
    PeerConnected,
    PeerId,
    SwarmKey,
    VirtualNetwork,
    World,
    open_node,
    run_world,
)
from natswarm.discovery.cache import CachedPeer
from natswarm.net.mainline import MainlineConfig
from natswarm.net.rejoin import WANTED_PEERS

CACHED_COUNT = 20
GONE_PERCENT = (10, 50, 90)
FIRST_WITHIN_S = 10.0

# One of each class that issue reports name: EIM with each filter, blocks of 256 and of 2048, a wide
# range with a TFTP helper, and a home router.
CARRIERS = ("linux-home", "vodafone-nl", "lyca-nl", "kpn-nl", "juniper-pba", "o2-uk-4g")
# `up` takes a quick look; of a helper, which decides between hundreds of probes and 100,000, a
# device learns by `inspect`.
WITH_HELPER = ("o2-uk-4g",)
# Without a peer nobody knows of a TFTP helper, and wide ranges need one.
KNOWN_BY_MAPPING = CARRIERS[:4]
SKEW_MAX_S = 2.0
CONNECTED_WITHIN_S = 10.0
MAINLINE_COUNT = 8
PATIENCE_S = 60.0


class MemoryStore:
    """A peer cache without a disk, whose threads would not know the virtual clock."""

    def __init__(self) -> None:
        self.peers: dict[PeerId, CachedPeer] = {}

    async def load(self) -> list[CachedPeer]:
        """Return all that is kept."""
        await trio.lowlevel.checkpoint()
        return list(self.peers.values())

    async def save(self, changed: Sequence[CachedPeer], forgotten: Sequence[PeerId]) -> None:
        """Keep these, and forget those."""
        await trio.lowlevel.checkpoint()
        for peer_id in forgotten:
            self.peers.pop(peer_id, None)
        self.peers |= {peer.peer_id: peer for peer in changed}


@dataclass
class Devices:
    """Nodes on hosts of one virtual internet.

    Attributes:
        seed: Of all that is random.
        stack: Closes what is opened.
    """

    seed: int
    stack: AsyncExitStack
    internet: Internet = field(init=False)
    _count: int = 0

    def __post_init__(self) -> None:
        self.internet = Internet(World(seed=self.seed))

    @asynccontextmanager
    async def device(self, kind: str, **config: Any) -> AsyncIterator[Node]:
        """Run a node on a host of its own."""
        self._count += 1
        name = f"{kind}-{self._count}"
        network = config.pop("network", None) or self.network(name, kind)
        identity = Identity(f"{self.seed}/{name}".encode().ljust(32, b".")[:32])
        async with open_node(
            NodeConfig(identity, network, name, seed=1000 * self.seed + self._count, **config)
        ) as node:
            yield node

    def network(self, name: str, kind: str) -> VirtualNetwork:
        """Put a host onto the internet."""
        return VirtualNetwork(self.internet.add_host(name, kind))

    async def add(self, kind: str, **config: Any) -> Node:
        """Start a node that runs to the end."""
        return await self.stack.enter_async_context(self.device(kind, **config))


def simulate(work: Callable[[Devices], Awaitable[Any]], seed: int) -> Any:
    """Run `work` on a virtual internet of its own and return its result."""

    async def main() -> Any:
        async with AsyncExitStack() as stack:
            devices = Devices(seed, stack)
            await stack.enter_async_context(run_world(devices.internet.world))
            return await work(devices)

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# Rejoining ----------------------------------------------------------------------------------------


async def rejoin(devices: Devices, gone_percent: int) -> tuple[float, float]:
    """Return the seconds until the first peer, and until 8 or all that are left."""
    store = MemoryStore()
    network = devices.network("phone", "linux-home")
    lost_count = CACHED_COUNT * gone_percent // 100
    others = [await devices.add("public") for _ in range(CACHED_COUNT - lost_count)]
    async with AsyncExitStack() as gone:
        for _ in range(lost_count):
            others.append(await gone.enter_async_context(devices.device("public")))
        random.Random(devices.seed).shuffle(others)
        async with devices.device("phone", network=network, cache=store) as phone:
            for other in others:
                await other.inspect()
                await phone.connect(await other.invite())
            await trio.sleep(10)
    await trio.sleep(3600)
    connected_at: list[float] = []

    def note(event: NodeEvent) -> None:
        if isinstance(event, PeerConnected):
            connected_at.append(trio.current_time())

    async with devices.device("phone", network=network, cache=store, on_event=note) as phone:
        begun = trio.current_time()
        await phone.rejoin()
        await trio.sleep(PATIENCE_S)
    wanted = min(WANTED_PEERS, CACHED_COUNT - lost_count)
    never = [math.inf] * wanted
    took = [at - begun for at in connected_at] + never
    return took[0], took[wanted - 1]


# Invites ------------------------------------------------------------------------------------------


async def meet_by_invite(devices: Devices, kinds: tuple[str, str]) -> float:
    """Return the seconds until two devices are connected; infinite where they are not."""
    nodes = []
    for kind in kinds:
        # Each has met two nodes of its own, which know nobody else: it knows its NAT.
        node = await devices.add(kind)
        for _ in range(2):
            friend = await devices.add("public")
            await node.connect(await friend.invite())
        await node.inspect([NatTest.TFTP_HELPER] if kind in WITH_HELPER else [])
        nodes.append(node)
    invites = [await node.invite() for node in nodes]
    begun = trio.current_time()

    async def connect(index: int, delay_s: float) -> None:
        await trio.sleep(delay_s)
        try:
            await nodes[index].connect(invites[1 - index])
        except NatswarmError:
            return
        scope.cancel()

    # Whose host takes strangers needs no second invite.
    one_is_enough = invites[1].record.profile.accepts_strangers
    with trio.move_on_after(PATIENCE_S) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, 0, 0.0)
            if not one_is_enough:
                skew_s = random.Random(devices.seed).uniform(0, SKEW_MAX_S)
                nursery.start_soon(connect, 1, skew_s)
    return trio.current_time() - begun if nodes[0].is_connected(nodes[1].peer_id) else math.inf


async def meet_by_mailbox(devices: Devices, kinds: tuple[str, str]) -> float:
    """Return the seconds until a guest with one invite is connected; infinite where it is not."""
    nodes: list[Endpoint] = []
    for _ in range(MAINLINE_COUNT):
        # In a swarm of their own they speak to ours as BitTorrent's do: KRPC alone.
        node = await devices.add(
            "public",
            swarm=SwarmKey(b"d" * 32),
            mainline=MainlineConfig(tuple(nodes[:1]), answers=True),
        )
        nodes.append(Endpoint(node.local_addresses()[0], node.local_endpoint.port))
    host, guest = [await devices.add(kind, mainline=MainlineConfig(tuple(nodes))) for kind in kinds]
    for node in (host, guest):
        assert node.mainline is not None
        await node.mainline.wait_bootstrapped()
        await node.inspect()
    invite = await host.invite()
    await trio.sleep(random.Random(devices.seed).uniform(10, 60))
    begun = trio.current_time()
    with suppress(NatswarmError):
        await guest.connect(invite)
        return trio.current_time() - begun
    return math.inf


# The report ---------------------------------------------------------------------------------------


def measure(seed: int, count: int) -> dict[str, Any]:
    """Measure everything `count` times."""
    seeds = range(seed, seed + count)
    rejoined: dict[str, dict[str, float]] = {}
    for percent in GONE_PERCENT:
        times = [simulate(partial(rejoin, gone_percent=percent), each) for each in seeds]
        rejoined[f"{percent} % gone"] = {
            "first_median_s": statistics.median(first for first, _ in times),
            "first_most_s": max(first for first, _ in times),
            "all_median_s": statistics.median(complete for _, complete in times),
            "all_most_s": max(complete for _, complete in times),
        }
    invited: dict[str, dict[str, float]] = {}
    for kinds in combinations_with_replacement(CARRIERS, 2):
        took = [simulate(partial(meet_by_invite, kinds=kinds), each) for each in seeds]
        invited[" x ".join(kinds)] = {"median_s": statistics.median(took), "most_s": max(took)}
    answered: dict[str, dict[str, float]] = {}
    for kinds in combinations_with_replacement(KNOWN_BY_MAPPING, 2):
        took = [simulate(partial(meet_by_mailbox, kinds=kinds), each) for each in seeds]
        answered[" x ".join(kinds)] = {"median_s": statistics.median(took), "most_s": max(took)}
    first = max(each["first_most_s"] for each in rejoined.values())
    slowest = max(each["most_s"] for each in [*invited.values(), *answered.values()])
    targets = {
        "rejoin: first peer": {
            "value": first,
            "target": f"< {FIRST_WITHIN_S:.0f} s",
            "ok": first < FIRST_WITHIN_S,
        },
        "invites: every pair connected": {
            "value": slowest,
            "target": f"< {CONNECTED_WITHIN_S:.0f} s",
            "ok": slowest < CONNECTED_WITHIN_S,
        },
    }
    return {
        "seed": seed,
        "count": count,
        "rejoin": rejoined,
        "invites": invited,
        "mailbox": answered,
        "targets": targets,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, help="runs of each case; 10, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="each case once")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measure(options.seed, options.count or (1 if options.quick else 10))
    if options.json:
        print(json.dumps(report))
        return
    for section in ("rejoin", "invites", "mailbox"):
        print(f"{section}, {report['count']} runs from seed {report['seed']}")
        for name, figures in report[section].items():
            print(f"  {name:28}", *(f"{key} {value:6.2f}" for key, value in figures.items()))
    for name, verdict in report["targets"].items():
        met = "met" if verdict["ok"] else "MISSED"
        print(f"{met:7} {name}: {verdict['value']:.2f} s, target {verdict['target']}")


if __name__ == "__main__":
    main()
