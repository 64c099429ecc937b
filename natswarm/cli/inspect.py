"""`natswarm inspect`: what the NATs between here and the swarm do."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import trio
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from natswarm.cli.inspect_view import offers_table, profile_view, report_view
from natswarm.cli.options import (
    DEFAULT_STATE,
    BindOption,
    DhtFileOption,
    DhtNodeOption,
    DhtOption,
    InterfaceOption,
    JoinOption,
    JsonOption,
    StateOption,
    print_json,
    with_node,
)
from natswarm.device import DhtOptions, device_config
from natswarm.discovery.invite import Invite
from natswarm.errors import ConfigurationError, DecodeError
from natswarm.identity import Identity
from natswarm.inspector import (
    FULL,
    QUICK,
    QUICK_LIMIT_S,
    InspectionReport,
    Outcome,
    ProgressCallback,
    SignedProfile,
    State,
    Test,
    all_offers,
    changes,
    find_test,
    open_signed_profile_untrusted,
)
from natswarm.inspector import inspect as inspect_nat
from natswarm.nat.findings import NatTest
from natswarm.node import Node

__all__ = ["inspect"]

WATCH_INTERVAL_S = 10.0
REJOIN_S = 2.0


def inspect(
    join: JoinOption = None,
    state: StateOption = DEFAULT_STATE,
    bind: BindOption = "0.0.0.0",
    interface: InterfaceOption = None,
    dht: DhtOption = False,
    dht_node: DhtNodeOption = None,
    dht_file: DhtFileOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under 3 s: gateway, path, behaviour.")
    ] = False,
    lifetimes: Annotated[
        bool, typer.Option("--lifetimes", help="Measure how long mappings live, too: minutes.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="TEST", help="Do this test alone; may be given twice."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="TEST", help="Leave this test out; may be given twice."),
    ] = None,
    costs: Annotated[
        bool, typer.Option("--costs", help="List the tests and what each costs; do nothing.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Inspect again and again; mark what changed.")
    ] = False,
    every: Annotated[
        float, typer.Option("--every", min=1, metavar="SECONDS", help="Pause of --watch.")
    ] = WATCH_INTERVAL_S,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write the profile, signed, for others."),
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option("--show", metavar="FILE", help="Show a profile that was exported."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find out what the NATs between here and the swarm do, by asking ordinary peers.

    Without --join it shows what can be known alone: interfaces and the router's services.
    docs/inspect.md explains every line.
    """
    out = Console()
    if costs:
        if as_json:
            print_json({"tests": [offer.as_json() for offer in all_offers()]})
        else:
            out.print(offers_table(all_offers(), QUICK))
        return
    if show is not None:
        signed = read_profile(show)
        if as_json:
            print_json(signed.as_json())
        else:
            out.print(profile_view(signed))
        return
    if watch and export is not None:
        raise ConfigurationError("--export writes one report, --watch makes many: choose one")
    tests = choose_tests(quick=quick, lifetimes=lifetimes, only=only or (), skip=skip or ())
    invites = [Invite.parse(text) for text in join or ()]
    config = device_config(
        state,
        invites=invites,
        bind=bind,
        interface=interface,
        dht=DhtOptions(dht, dht_node or (), dht_file),
    )

    async def body(node: Node) -> None:
        if not invites:  # whoever of the cache answers at once can be asked
            with trio.move_on_after(REJOIN_S):
                await node.rejoin()
        once = partial(
            inspect_nat,
            node,
            invites=invites,
            tests=tests,
            interface=interface,
            time_limit_s=QUICK_LIMIT_S if quick else None,
        )
        if watch:
            await _watch(once, every, out, as_json=as_json)
            return
        with _progress() as on_progress:
            report = await once(on_progress=on_progress)
        if as_json:
            print_json(report.as_json())
        else:
            out.print(report_view(report))
        if export is not None:  # last: minutes of measuring are on the screen if it fails
            write_profile(export, report, config.identity)

    trio.run(with_node, state, config, body)


def choose_tests(
    *, quick: bool, lifetimes: bool, only: Collection[str], skip: Collection[str]
) -> frozenset[Test]:
    """Return the tests that the options ask for.

    Raises:
        ConfigurationError: They name a test that is not there, contradict each other, or leave
            nothing to do.
    """
    tests = QUICK if quick else FULL
    if only:
        tests = frozenset(map(find_test, only))
    if lifetimes:
        tests |= {NatTest.LIFETIMES}
    if quick and NatTest.LIFETIMES in tests:
        raise ConfigurationError("--quick takes 3 s, lifetimes take minutes: choose one")
    tests -= set(map(find_test, skip))
    if not tests:
        raise ConfigurationError("every test is left out: name fewer of them with --skip")
    return tests


# Profiles to hand over ----------------------------------------------------------------------------


def write_profile(path: Path, report: InspectionReport, identity: Identity) -> None:
    """Write the signed profile of a report.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    signed = SignedProfile(report.peer_id, report.inspected_at_s, report.profile)
    try:
        path.write_text(signed.seal(identity) + "\n")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the profile to {path}: {error.strerror}; name another file"
        ) from error


def read_profile(path: Path) -> SignedProfile:
    """Read what `write_profile` wrote.

    Raises:
        ConfigurationError: The file cannot be read.
        DecodeError: It holds something else, or was damaged.
    """
    try:
        text = path.read_text("ascii")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DecodeError(f"{path} holds no signed profile: it is not text") from error
    try:
        return open_signed_profile_untrusted(text)
    except DecodeError as error:
        raise DecodeError(f"{path} holds no signed profile: {error}") from error


# While it runs ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[ProgressCallback]:
    """Show which tests run, on a terminal; elsewhere nothing."""
    console = Console(stderr=True)
    spinner = SpinnerColumn(finished_text=" ")
    tasks: dict[Test, TaskID] = {}
    with Progress(
        spinner,
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:

        def show(outcome: Outcome) -> None:
            if outcome.test not in tasks:
                tasks[outcome.test] = progress.add_task("", total=1)
            packets = "" if outcome.packet_count is None else f"  {outcome.packet_count} packets"
            progress.update(
                tasks[outcome.test],
                description=f"{outcome.test.value:12}{packets}",
                completed=outcome.state is not State.RUNNING,
            )

        yield show


async def _watch(
    once: Callable[[], Awaitable[InspectionReport]], every_s: float, out: Console, *, as_json: bool
) -> None:
    """Inspect for ever; Ctrl-C ends it."""
    before: InspectionReport | None = None
    is_drawn = out.is_terminal and not as_json
    # Taller than most terminals: what does not fit scrolls out at the top.
    drawing = Live(console=out, auto_refresh=False, vertical_overflow="visible")
    with drawing if is_drawn else contextlib.nullcontext():
        while True:
            report = await once()
            changed = () if before is None else changes(before, report)
            if as_json:
                print_json(report.as_json() | {"changed": list(changed)})
            elif is_drawn:
                drawing.update(report_view(report, changed), refresh=True)
            else:
                out.print(report_view(report, changed))
            before = report
            await trio.sleep(every_s)
