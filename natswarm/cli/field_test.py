"""`natswarm field-test`: puncture between two carriers again and again, and report.

No logic of its own: `natswarm/field_test` does it, here it is asked for and shown.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import trio
import typer

from natswarm.cli.field_test_view import live_view, record_as_text
from natswarm.cli.options import (
    DEFAULT_STATE,
    InterfaceOption,
    JsonOption,
    StateOption,
    console,
    print_json,
)
from natswarm.discovery.invite import Invite
from natswarm.errors import ConfigurationError
from natswarm.field_test.carrier import find_carrier
from natswarm.field_test.link import Link
from natswarm.field_test.local import LocalBench
from natswarm.field_test.page import write_report
from natswarm.field_test.plan import FieldTestPlan, read_plan
from natswarm.field_test.records import Record, Result, Side
from natswarm.field_test.remote import FieldTestLink, RemoteBench
from natswarm.field_test.schedule import Bench, FieldTest
from natswarm.field_test.session import Session, open_session
from natswarm.field_test.side import SideConfig
from natswarm.field_test.tally import load_tally
from natswarm.identity import Identity, PeerId
from natswarm.net.udp import UdpNetwork

__all__ = ["field_test_app"]

field_test_app = typer.Typer(name="field-test", no_args_is_help=True)

ShowRecord = Callable[[Record], None]

DEFAULT_FOLDER = Path("field-test")
DEFAULT_REPORT = Path("field-test-report")
# Of a test between two devices, whose link names the host for as long as the test takes. Not in the
# folder of the results, which is made to be shared.
IDENTITY_NAME = "field-test-{}"

HelperOption = Annotated[
    list[str] | None,
    typer.Option(
        "--join",
        help="Invite of a helper: a node that both sides can reach; two are better than one.",
        show_default=False,
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", help="Plan file (TOML), see field-tests/README.md.", show_default=False),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of the journal.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with the field test in that folder.")
]
CarrierOption = Annotated[
    str,
    typer.Option("--carrier", help='Its label, such as "NL KPN".', show_default="found out"),
]
FullOption = Annotated[
    bool,
    typer.Option(
        "--full-addresses",
        help="Write down whole public addresses, not only their networks. Ask the people at both "
        "ends first.",
    ),
]


@field_test_app.callback()
def _options() -> None:
    """Puncture between two carriers, again and again, and report.

    natswarm field-test run --left usb0 --right usb1 --join INVITE --join INVITE
    natswarm field-test host --interface wwan0 --join INVITE     # or on two devices
    natswarm field-test report field-test
    """


@field_test_app.command()
def run(
    left: Annotated[str, typer.Option(help="Interface of one SIM, such as usb0.")],
    right: Annotated[str, typer.Option(help="Interface of the other, such as usb1.")],
    left_carrier: Annotated[
        str, typer.Option(help='Its label, such as "NL KPN".', show_default="found out")
    ] = "",
    right_carrier: Annotated[
        str, typer.Option(help="The label of the other.", show_default="found out")
    ] = "",
    join: HelperOption = None,
    plan: PlanOption = None,
    out: OutOption = DEFAULT_FOLDER,
    resume: ResumeOption = False,
    full_addresses: FullOption = False,
    as_json: JsonOption = False,
) -> None:
    """Test between two SIMs of this laptop: two tethered phones, or modems."""
    if left == right:
        raise ConfigurationError(f"both sides are {left}: name the interface of another SIM")
    helpers = tuple(Invite.parse(text) for text in join or ())
    one = make_side("left", left, left_carrier, helpers, full_addresses=full_addresses)
    other = make_side("right", right, right_carrier, helpers, full_addresses=full_addresses)
    warn_of_helpers(len(helpers))
    with open_session(
        out,
        resume=resume,
        mode="run",
        plan=load_plan(plan),
        sides=[one.record(), other.record()],
        helper_count=len(helpers),
        full_addresses=full_addresses,
        show=record_printer(as_json=as_json),
    ) as session:
        one.keep_to(session.begin)
        other.keep_to(session.begin)
        bench = LocalBench(session.begin.plan, one, other, session.append)
        trio.run(carry_out, session, bench, as_json)


@field_test_app.command()
def host(
    interface: InterfaceOption = None,
    carrier: CarrierOption = "",
    join: HelperOption = None,
    plan: PlanOption = None,
    out: OutOption = DEFAULT_FOLDER,
    resume: ResumeOption = False,
    full_addresses: FullOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Test with another device: print the link for its `natswarm field-test join`."""
    helpers = tuple(join or ())
    if not helpers:
        raise ConfigurationError(
            "two devices need at least one helper, through which they agree: start `natswarm up` "
            "on a machine with a public address, and name its invite with --join"
        )
    warn_of_helpers(len(helpers))
    side = make_side(
        "left",
        interface,
        carrier,
        tuple(Invite.parse(text) for text in helpers),
        full_addresses=full_addresses,
    )
    with open_session(
        out,
        resume=resume,
        mode="host",
        plan=load_plan(plan),
        sides=[side.record()],
        helper_count=len(helpers),
        full_addresses=full_addresses,
        show=record_printer(as_json=as_json),
    ) as session:
        side.keep_to(session.begin)
        identity = _identity(state, session)
        link = FieldTestLink(
            session=session.begin.session,
            host=identity.peer_id.key,
            plan=session.begin.plan,
            helpers=helpers,
            carrier=side.label,
        )
        if as_json:
            print_json({"kind": "link", "link": str(link)})
        else:
            console.print(f"On the other device: natswarm field-test join {link}", markup=False)
        _test_with_other(session, side, identity, None, as_json=as_json)


@field_test_app.command("join")
def join_test(
    link: Annotated[str, typer.Argument(help="What `natswarm field-test host` printed.")],
    interface: InterfaceOption = None,
    carrier: CarrierOption = "",
    out: OutOption = DEFAULT_FOLDER,
    resume: ResumeOption = False,
    full_addresses: FullOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Test with the device that made a link; the plan comes with it."""
    test = FieldTestLink.parse(link)
    side = make_side("right", interface, carrier, test.invites(), full_addresses=full_addresses)
    with open_session(
        out,
        resume=resume,
        mode="join",
        plan=test.plan,
        sides=[Side(name="left", carrier=test.carrier), side.record()],
        helper_count=len(test.helpers),
        full_addresses=full_addresses,
        show=record_printer(as_json=as_json),
        session=test.session,
    ) as session:
        side.keep_to(session.begin)
        identity = _identity(state, session)
        _test_with_other(session, side, identity, test.host_id, as_json=as_json)


def _identity(state: Path, session: Session) -> Identity:
    return Identity.load_or_create(state / IDENTITY_NAME.format(session.begin.session))


def _test_with_other(
    session: Session,
    side: SideConfig,
    identity: Identity,
    other: PeerId | None,
    *,
    as_json: bool,
) -> None:
    begin = session.begin
    bench = RemoteBench(begin.session, begin.plan, side, identity, other, session.append)
    trio.run(carry_out, session, bench, as_json)


@field_test_app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Field tests.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")] = DEFAULT_REPORT,
) -> None:
    """Make one page of field tests, with a CSV and a PNG; it needs no network to be read."""
    tally = load_tally(folders)
    page = write_report(tally, out)
    counts = ", ".join(f"{tally.result_counts[result]} {result.value}" for result in Result)
    console.print(f"{len(tally.meetings)} attempts: {counts}\n{page}", markup=False)


def make_side(
    name: str,
    interface: str | None,
    carrier: str,
    helpers: tuple[Invite, ...],
    *,
    full_addresses: bool,
) -> SideConfig:
    """Return a side that uses one interface alone, or the system's routes.

    Raises:
        ConfigurationError: Nothing can get out or back by it.
    """
    if interface is None:
        return SideConfig(
            name=name,
            carrier=find_carrier("", carrier),
            make_network=UdpNetwork,
            helpers=helpers,
            full_addresses=full_addresses,
        )
    link = Link(interface)
    found = link.check()
    return SideConfig(
        name=name,
        carrier=find_carrier(interface, carrier),
        make_network=lambda: UdpNetwork(interface=interface),
        helpers=helpers,
        interface=interface,
        interface_kind=found.kind.value,
        link=link,
        full_addresses=full_addresses,
    )


def load_plan(path: Path | None) -> FieldTestPlan | None:
    """Read a plan file, if one was named.

    Raises:
        ConfigurationError: It cannot be read.
    """
    if path is None:
        return None
    try:
        return read_plan(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the plan {path}: {error}") from error


def warn_of_helpers(count: int) -> None:
    """Say what is missing with fewer than two helpers."""
    if count == 0:
        typer.echo(
            "No helper is named (--join): nobody tells the sides their public addresses, how "
            "their NATs behave, or introduces them. What works: a side without a NAT, IPv6 "
            "without a firewall, both in one network. For punctures start `natswarm up` on a "
            "machine with a public address, and name its invite.",
            err=True,
        )
    elif count == 1:
        typer.echo(
            "One helper is named: one address cannot tell EIM from ADM. A second one is better.",
            err=True,
        )


def record_printer(*, as_json: bool) -> ShowRecord:
    """Return what prints records as they are written."""

    def show(record: Record) -> None:
        if as_json:
            print_json(msgspec.to_builtins(record))
        elif text := record_as_text(record):
            console.print(text)

    return show


async def carry_out(session: Session, bench: Bench, as_json: bool) -> None:
    """Run a field test to its end with a live display on a terminal.

    Raises:
        ConfigurationError: It cannot go on.
    """
    begun = datetime.datetime.fromisoformat(session.begin.at)
    test = FieldTest(
        session.begin.plan,
        session.earlier,
        bench,
        session.append,
        begun_at_s=begun.timestamp(),
    )
    with live_view(test.status, bench.sides, console, is_shown=not as_json):
        await test.run()
