"""`natswarm lab`: any program behind an emulated carrier. Linux, root.

No logic of its own: `natswarm/lab` does it, here it is asked for and shown.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from natswarm.cli.options import JsonOption, console, print_json
from natswarm.errors import ConfigurationError
from natswarm.lab.capability import check_capable
from natswarm.lab.capture import capture_core, capture_device
from natswarm.lab.client import ask, exec_in, start_lab, stop_lab
from natswarm.lab.namespace import remove_stale
from natswarm.lab.registry import LabState, Registry
from natswarm.lab.settings import CORE, LabSettings, NatChoice
from natswarm.lab.supervisor import keep_lab
from natswarm.lab.verify import verify_lab

__all__ = ["lab_app"]

lab_app = typer.Typer(
    name="lab",
    no_args_is_help=True,
)

LabOption = Annotated[
    str | None,
    typer.Option("--name", help="Which lab; not needed while only one runs.", show_default=False),
]
DeviceArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A device of the lab.", show_default=False)
]


@lab_app.callback()
def _options() -> None:
    """Run any program behind an emulated carrier: network namespaces, Linux, root.

    natswarm lab up a=kpn-nl b=o2-uk-4g,home s=public --delay 25ms --loss 1%
    natswarm lab exec s python3 -m http.server &
    natswarm lab exec a curl http://198.51.100.3:8000/
    natswarm lab down
    """


@lab_app.command()
def up(
    devices: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=PRESET...",
            help="What to make: a device behind a carrier (a=kpn-nl), behind a home router behind "
            "a carrier (b=o2-uk-4g,home), beside another (c=@b), or public (s=public).",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Of the lab.", show_default="lab")
    ] = None,
    delay: Annotated[str, typer.Option(help="One-way delay of the core.")] = "10ms",
    jitter: Annotated[str, typer.Option(help="On top of it, from 0 to this.")] = "0ms",
    loss: Annotated[str, typer.Option(help="Share of packets that the core loses.")] = "0%",
    rate: Annotated[
        str, typer.Option(help="What each address may send, such as 10mbit.", show_default="any")
    ] = "",
    queue: Annotated[
        str, typer.Option(help="What may wait for the rate.", show_default="100 ms of it")
    ] = "",
    hops: Annotated[int, typer.Option(help="Routers in the core.")] = 8,
    knobs: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME.KNOB=VALUE",
            help="Turn a knob of a device's NAT (docs/emulator.md), such as a.hairpinning=yes or "
            "b.linux-home.poison=takes-port. May be given again.",
            show_default=False,
        ),
    ] = None,
    nat: Annotated[
        NatChoice, typer.Option(help="Who carries out the NATs next to the devices.")
    ] = NatChoice.AUTO,
    seed: Annotated[int, typer.Option(help="Of all that the emulator draws.")] = 1,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until Ctrl-C, then take it down.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a lab, and print what was made. It stays until `natswarm lab down`."""
    registry = _registry()
    settings = LabSettings(
        name=name if name is not None else registry.free_name(),
        devices=tuple(devices),
        knobs=tuple(knobs or ()),
        nat=nat.value,
        delay=delay,
        jitter=jitter,
        loss=loss,
        rate=rate,
        queue=queue,
        hops=hops,
        seed=seed,
    )
    if foreground:
        keep_lab(settings, lambda state: _show_made(state, as_json))
    else:
        _show_made(start_lab(settings), as_json)


@lab_app.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run_program(
    device: DeviceArgument,
    command: Annotated[
        list[str], typer.Argument(metavar="CMD...", help="Program and its arguments.")
    ],
    name: LabOption = None,
) -> None:
    """Run a program on a device, with this terminal, environment, folder and exit status."""
    state = _registry().find(name)
    exec_in(state.device(device), command)


@lab_app.command()
def verify(name: LabOption = None, as_json: JsonOption = False) -> None:
    """Probe each device from both sides: does it behave as its presets say? Status 1 if not."""
    state = _registry().find(name)
    table = Table("device", "what", "expected", "seen", "", title=f"lab {state.name}")
    checks = []
    for check in verify_lab(state):
        checks.append(check)
        verdict = "[green]ok[/]" if check.is_ok else "[bold red]NO[/]"
        table.add_row(check.device, check.what, check.expected, check.seen, verdict)
    is_ok = all(check.is_ok for check in checks)
    if as_json:
        print_json({"ok": is_ok, "checks": [msgspec.to_builtins(check) for check in checks]})
    else:
        Console().print(table)
    raise typer.Exit(0 if is_ok else 1)


@lab_app.command()
def capture(
    device: Annotated[
        str,
        typer.Argument(metavar=f"NAME|{CORE}", help="A device, or the middle of the internet."),
    ],
    out: Annotated[str, typer.Option("--out", help="File; - is standard output.")] = "-",
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many packets.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Stop after so long.")] = None,
    name: LabOption = None,
) -> None:
    """Write packets down as pcap until Ctrl-C, for tcpdump -r, Wireshark and the like."""
    state = _registry().find(name)
    if device == CORE:
        pieces = capture_core(state, count=count, seconds=seconds)
    else:
        pieces = capture_device(state.device(device), count=count, seconds=seconds)
    if out == "-" and sys.stdout.isatty():
        raise ConfigurationError(
            "a capture is no text for a terminal: give --out FILE, or pipe it: | tcpdump -nr -"
        )
    packets = -1  # the first piece is the file's header
    with _output(out) as file, suppress(KeyboardInterrupt):
        for piece in pieces:
            file.write(piece)
            file.flush()
            packets += 1
    if out != "-":
        typer.echo(f"{max(packets, 0)} packets in {out}", err=True)


@lab_app.command()
def status(name: LabOption = None, as_json: JsonOption = False) -> None:
    """Show the labs that run: devices, addresses, mappings, what passed and what was dropped."""
    registry = _registry()
    labs = [registry.find(name)] if name is not None else registry.labs()
    answers = [ask(lab, "status") for lab in labs]
    if as_json:
        print_json({"labs": answers})
        return
    if not answers:
        typer.echo("No lab runs.")
    for answer in answers:
        _show_status(answer)


@lab_app.command()
def down(
    name: LabOption = None,
    every: Annotated[bool, typer.Option("--all", help="All labs.")] = False,
) -> None:
    """End a lab: what still runs in it is killed, everything is removed."""
    registry = _registry()
    for state in registry.labs() if every else [registry.find(name)]:
        stop_lab(state)
        typer.echo(f"lab {state.name} is gone")


def _registry() -> Registry:
    """Return the labs that run, once what others left behind is gone.

    Raises:
        LabError: No lab can be here.
    """
    check_capable()
    registry = Registry()
    registry.remove_stale()
    remove_stale()
    return registry


def _output(out: str) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdout.buffer) if out == "-" else Path(out).open("wb")


def _show_made(state: LabState, as_json: bool) -> None:
    if as_json:
        print_json({"event": "up", **msgspec.to_builtins(state)})
        return
    table = Table("device", "own address", "seen from outside", "behind", title=f"lab {state.name}")
    for device in state.devices:
        behind = " behind ".join(reversed(device.presets)) or "nothing: public"
        if device.router:
            behind = behind.replace(device.presets[-1], f"{device.presets[-1]} (kernel)", 1)
        table.add_row(device.name, device.ip, ", ".join(device.external_ips), behind)
    Console().print(table)
    option = "" if state.settings.name == "lab" else f" --name {state.name}"
    console.print(f"Run a program: natswarm lab exec{option} {state.devices[0].name} CMD...")


def _show_status(answer: dict[str, Any]) -> None:
    core = answer["core"]
    title = f"lab {answer['name']}: up {answer['up_s']:g} s, seed {answer['seed']}, core " + (
        ", ".join(f"{name} {value:g}" for name, value in core.items())
    )
    table = Table("device", "behind", "mappings", "packets out, in", "dropped")
    for device in answer["devices"]:
        drops = [f"{count} {reason}" for reason, count in device["refused"].items()]
        counters = device["counters"]
        packets = f"{counters['sent_count']}, {counters['received_count']}" if counters else ""
        table.add_row(f"{device['name']} {device['ip']}", "", "", packets, ", ".join(drops))
        for nat in reversed(device["nats"]):
            table.add_row(
                "",
                f"{nat['preset']} ({nat['by']}) {', '.join(nat['external_ips'])}",
                ", ".join(f"{count} {kind}" for kind, count in nat["mappings"].items() if count),
                "",
                ", ".join(_drops_of_nat(nat)),
            )
    console.print(title)
    Console().print(table)
    words = [
        f"{count} {_words(name)}"
        for name, count in answer["counters"].items()
        if count and name not in ("sent_count", "delivered_count")
    ]
    console.print(f"elsewhere: {', '.join(words) or 'nothing to tell'}")


def _drops_of_nat(nat: dict[str, Any]) -> list[str]:
    return [
        f"{count} {protocol} {_words(name)}"
        for protocol, counters in nat.get("counters", {}).items()
        for name, count in counters.items()
        if name.startswith("dropped_") and count
    ]


def _words(counter: str) -> str:
    """Return the name of a counter as people say it."""
    word = counter.removesuffix("_count").removeprefix("dropped_").replace("_", " ")
    return {"ttl": "out of hops", "error": "ICMP errors"}.get(word, word)
