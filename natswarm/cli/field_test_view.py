"""How a field test looks while it runs: a line for what happened, a live view of what goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from natswarm.field_test.records import (
    Alarm,
    AttemptRecord,
    Begin,
    End,
    Record,
    Result,
    Resume,
    Survey,
)
from natswarm.field_test.schedule import Status
from natswarm.field_test.side import SideConfig

__all__ = ["live_view", "record_as_text", "status_view"]

REFRESH_PER_S = 4

COLOURS = {
    Result.OK: "green",
    Result.FAILED: "red",
    Result.SKIPPED: "yellow",
    Result.VOID: "magenta",
}


def record_as_text(record: Record) -> str:
    """Return one line of rich markup; empty for what need not be told."""
    match record:
        case Begin():
            sides = " and ".join(f"{side.name} {side.carrier}" for side in record.sides)
            kept = "whole addresses" if record.full_addresses else "networks, not addresses"
            return (
                f"[cyan]begin[/]    {escape(sides)}: {record.plan.slot_count} attempts, "
                f"{record.helper_count} helpers; written down are {kept}"
            )
        case Resume():
            torn = f", {record.torn_line_count} torn lines" if record.torn_line_count else ""
            return f"[cyan]resume[/]   {record.done_count} attempts are done{torn}"
        case Survey():
            nat = "nothing found" if record.nat is None else record.nat.text
            return f"[cyan]survey[/]   {record.side}: {escape(nat)}"
        case Alarm():
            colour = "green" if record.is_over else "bold red"
            return f"[{colour}]alarm[/]    {record.side}: {escape(record.text)}"
        case AttemptRecord():
            hole = "" if record.hole_s is None else f", {record.hole_s:.2f} s"
            return (
                f"[{COLOURS[record.result]}]{record.result.value:8}[/] {record.key}: "
                f"{escape(record.reason)}{hole}, {record.probe_count:,} probes"
            )
        case End():
            return "[cyan]end[/]      every attempt has its result"
        case _:
            return ""


@contextmanager
def live_view(
    status: Status, sides: Sequence[SideConfig], console: Console, *, is_shown: bool
) -> Iterator[None]:
    """Show what goes on while the body runs; on something other than a terminal nothing."""
    if not (is_shown and console.is_terminal):
        yield
        return
    with Live(
        get_renderable=lambda: status_view(status, sides),
        console=console,
        refresh_per_second=REFRESH_PER_S,
        transient=True,
    ):
        yield


def status_view(status: Status, sides: Sequence[SideConfig]) -> RenderableType:
    """Return progress, and what each side is at."""
    table = Table("side", "carrier", "now", "datagrams", "interface sent", "refused", "NAT")
    for side in sides:
        now = side.status
        trouble = Text(", ".join(now.troubles), style="bold red") if now.troubles else now.phase
        sent = "" if now.interface_sent_count is None else f"{now.interface_sent_count:,}"
        table.add_row(
            f"{side.name} {side.interface}",
            Text(now.carrier),
            trouble,
            f"{now.handed_count:,}",
            sent,
            f"{now.refused_count:,}",
            Text(now.nat),
        )
    counts = ", ".join(f"{count} {result.value}" for result, count in status.counts.items())
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=status.slot_count, completed=status.done_count, width=40),
        f"{status.done_count} of {status.slot_count}  {counts}",
    )
    return Group(bar, Text(status.waiting or status.key), table)
