r"""Eight processes behind the kernel's NATs: their first contact dies, and all find each other.

        hub        eve
          \        /
           the core
      /    /   |   \    \    \
    ann  bob  cat  dan  fay  gus      NATs: four keep ports, two draw from a block
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from natswarm.errors import RequestRefused
from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.process import LabProcess
from natswarm.lab.topology import Host, Lab
from natswarm.net.control import ask_running_node
from tools.lab.pair import NATSWARM

pytestmark = pytest.mark.lab

NATS = dict.fromkeys(("ann", "bob", "cat", "dan"), KernelNat(NatKind.PRESERVING)) | dict.fromkeys(
    ("fay", "gus"), KernelNat(NatKind.BLOCK)
)
# They bound a hang: eight times Python on a busy machine of two cores.
START_TIMEOUT_S = 90.0
FIND_TIMEOUT_S = 120.0
# Of six others: who knew the hub alone would be left by itself.
PEERS_AFTER_JOIN = 3


def start(host: Host, folder: Path, *options: str) -> LabProcess:
    words = ["up", "--json", "--no-lan", "--bind", host.ip, "--state", str(folder), *options]
    return host.namespace.spawn([*NATSWARM, *words])


def wait_up(node: LabProcess) -> dict[str, Any]:
    line = node.wait_line(lambda line: json.loads(line)["event"] == "up", timeout_s=START_TIMEOUT_S)
    return json.loads(line)


async def wait_joined(folder: Path, hub_id: str) -> None:
    """Wait until the join is over: a node is linked to others than the hub alone."""
    while True:
        peers = (await ask_running_node(folder, {"do": "peers"}))["peers"]
        if sum(peer["peer_id"] != hub_id for peer in peers) >= PEERS_AFTER_JOIN:
            return
        await trio.sleep(0.2)


async def find_all(folder: Path, peer_ids: set[str]) -> None:
    for peer_id in sorted(peer_ids):
        found = await find(folder, peer_id)
        assert found["peer_id"] == peer_id


async def find(folder: Path, peer_id: str) -> dict[str, Any]:
    """Find a peer, again if need be: half a minute after a loss some links are still missing."""
    while True:
        try:
            return await ask_running_node(folder, {"do": "find", "peer": peer_id})
        except RequestRefused as error:
            print(f"{folder.name} does not find {peer_id[:8]} yet: {error}")
            await trio.sleep(1)


def test_all_find_each_other_after_their_first_contact_was_killed(lab: Lab, tmp_path: Path):
    hub = start(lab.add_public("hub"), tmp_path / "hub")
    hosts = {"eve": lab.add_public("eve")}
    hosts |= {name: lab.add_client(name, nat) for name, nat in NATS.items()}
    first = wait_up(hub)
    nodes = {
        tmp_path / name: start(host, tmp_path / name, "--join", first["invite"])
        for name, host in hosts.items()
    }
    peer_ids = {folder: wait_up(node)["peer_id"] for folder, node in nodes.items()}

    async def join() -> None:
        with trio.fail_after(START_TIMEOUT_S):
            for folder in nodes:
                await wait_joined(folder, first["peer_id"])

    trio.run(join)
    hub.kill()

    async def live_on() -> None:
        with trio.fail_after(FIND_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for folder, own in peer_ids.items():
                    nursery.start_soon(find_all, folder, {*peer_ids.values()} - {own})

    trio.run(live_on)
    complaints = {folder.name: node.error_text() for folder, node in nodes.items()}
    assert complaints == dict.fromkeys(hosts, "")
