"""Make the captures in docs/inspect.md: what `natswarm inspect` prints in three places.

python tools/inspect_captures.py

They run on the virtual internet, so that anybody can make them again. Each stands in the page
between `<!-- capture: NAME -->` and the end of the code block that follows.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import trio
import trio.testing
from rich.console import Console

from natswarm import (
    Identity,
    InspectionReport,
    Internet,
    Invite,
    NodeConfig,
    VirtualNetwork,
    World,
    inspect,
    open_node,
    run_world,
)
from natswarm.cli.inspect_view import report_view
from natswarm.net.nursery import open_private_nursery
from natswarm.sim.topology import Host
from tools.virtual_surroundings import surroundings_of

__all__ = ["CAPTURES", "PAGE", "capture", "written_captures"]

PAGE = Path(__file__).parents[1] / "docs" / "inspect.md"
WIDTH = 110
OBSERVERS = (260, 520)
# What stands before the host: NATs from outside inwards, and what its interface is called.
CAPTURES = {
    "home": (("sky-uk-dsl",), "wlan0"),
    "block": (("kpn-nl",), "wwan0"),
    "double": (("o2-uk-4g", "linux-home"), "wlan0"),
}


def capture(name: str) -> str:
    """Return what an inspection prints in one of `CAPTURES`."""
    nats, interface = CAPTURES[name]
    report = trio.run(_inspect, nats, interface, clock=trio.testing.MockClock(autojump_threshold=0))
    console = Console(width=WIDTH, file=io.StringIO(), record=True, color_system=None)
    # The one thing that the virtual internet does not decide.
    console.print(report_view(replace(report, inspected_at_s=1_772_355_600.0)))
    return "\n".join(line.rstrip() for line in console.export_text().strip().splitlines())


async def _inspect(nats: tuple[str, ...], interface: str) -> InspectionReport:
    internet = Internet(World(seed=7))
    router = None
    for index, preset in enumerate(nats):
        router = internet.add_nat(f"nat{index}", preset, behind=router)
    # Hosts are numbered one by one: observers from other networks than ours, and each other's.
    hosts = [internet.add_host(f"host{index}") for index in range(OBSERVERS[-1] + 1)]
    me = internet.add_host("me", behind=router)
    async with run_world(internet.world), open_private_nursery() as nursery:
        invites = []
        for index in OBSERVERS:
            observer = await nursery.start(_run_observer, hosts[index], index)
            invites.append(observer)
        config = NodeConfig(
            identity=Identity(b"me".ljust(32, b".")), network=VirtualNetwork(me), seed=7
        )
        async with open_node(config) as node:
            return await inspect(node, invites=invites, surroundings=surroundings_of(me, interface))


async def _run_observer(host: Host, index: int, task_status: trio.TaskStatus[Invite]) -> None:
    config = NodeConfig(
        identity=Identity(f"observer{index}".encode().ljust(32, b".")),
        network=VirtualNetwork(host),
        seed=index,
    )
    async with open_node(config) as node:
        task_status.started(await node.invite())
        await trio.sleep_forever()


def written_captures(page: str) -> dict[str, str]:
    """Return the captures that a page holds, by name."""
    return dict(re.findall(_CAPTURE.format(name=r"(\w+)"), page, flags=re.DOTALL))


_CAPTURE = r"<!-- capture: {name} -->\n+```text\n(.*?)```"


def main() -> None:
    """Put new captures into the page."""
    page = PAGE.read_text()
    for name in CAPTURES:
        print(text := capture(name))
        block = f"<!-- capture: {name} -->\n\n```text\n{text}\n```"
        page, count = re.subn(
            _CAPTURE.format(name=name), block.replace("\\", r"\\"), page, flags=re.DOTALL
        )
        assert count == 1, f"{PAGE} has {count} places for the capture {name}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
