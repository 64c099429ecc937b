"""What `natswarm demo` shows while it runs: devices, punctures, the answer, the learning.

A view of a `DemoReport` that is still being filled in; knows how it looks and nothing of how it
comes about.
"""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmload.demo_report import DemoReport

__all__ = ["DemoScreen"]


class DemoScreen:
    """A live screen of a demo's report; a context manager.

    On a terminal it redraws in place; into a pipe or file it prints the final state once.
    """

    def __init__(self, report: DemoReport) -> None:
        self._report = report
        self._live = Live(
            get_renderable=self.render, console=Console(), refresh_per_second=8, transient=False
        )

    def __enter__(self) -> DemoScreen:
        self._live.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.__exit__(None, None, None)
        if not self._live.console.is_terminal:
            self._live.console.print()  # what rich leaves out there: the end of the last line

    def render(self) -> RenderableType:
        """Return the screen as it is now."""
        report = self._report
        parts: list[RenderableType] = [
            Text(
                f"natswarm demo, seed {report.seed}: {len(report.devices)} devices on a virtual "
                "internet in this process, real time, no server",
                style="bold",
            ),
            self._devices(),
            self._punctures(),
        ]
        if report.stages:
            parts.append(self._answer())
        if report.learning.losses:
            parts.append(self._learning())
        if report.status:
            parts.append(Text(report.status, style="bold cyan" if report.is_ok else "bold red"))
        return Group(*parts)

    def _devices(self) -> Table:
        table = Table(title="Devices, and their NATs as they found out themselves", expand=True)
        for heading in ("device", "carrier", "mapping", "filtering", "allocation", "connected to"):
            table.add_column(heading)
        for device in self._report.devices:
            table.add_row(
                device.name,
                device.carrier,
                device.mapping or "…",
                device.filtering or "…",
                device.allocation or "…",
                " ".join(device.connected_to),
            )
        return table

    def _punctures(self) -> Table:
        table = Table(title="Punctures", expand=True)
        for heading, justify in (
            ("pair", "left"),
            ("plan", "left"),
            ("probes", "right"),
            ("seconds", "right"),
            ("", "left"),
        ):
            table.add_column(heading, justify="right" if justify == "right" else "left")
        for puncture in self._report.punctures:
            outcome = {True: "[green]open[/]", False: "[red]closed[/]", None: "[yellow]probing[/]"}
            table.add_row(
                f"{puncture.a} ⇄ {puncture.b}",
                puncture.plan,
                str(puncture.probes) if puncture.ok is not None else "…",
                f"{puncture.seconds:.2f}" if puncture.ok is not None else "…",
                outcome[puncture.ok],
            )
        return table

    def _answer(self) -> Panel:
        report = self._report
        text = f"[dim]{escape(report.prompt)}[/][bold]{escape(report.answer)}[/]"
        speed = f", {report.tokens_per_second:.1f} tokens/s" if report.tokens_per_second else ""
        return Panel(text, title=f"{escape(report.asker)} asks; {report.stages_text}{speed}")

    def _learning(self) -> Panel:
        learning = self._report.learning
        losses = " → ".join(f"{loss:.3f}" for loss in learning.losses)
        equal = {True: ", weights equal bit for bit", False: ", WEIGHTS DIFFER", None: ""}
        return Panel(
            f"loss on the other's text {losses} nats a token{equal[learning.weights_equal]}",
            title=f"{' and '.join(learning.learners)} learn from each other's text",
        )
