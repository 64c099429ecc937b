"""`natswarm recipes`: what this device has learned of the networks between which it punctured."""

from __future__ import annotations

import trio
import typer
from rich.markup import escape
from rich.table import Table

from natswarm.cli.options import DEFAULT_STATE, StateOption, console
from natswarm.net.notes import Notes

__all__ = ["recipes_app"]

recipes_app = typer.Typer(
    name="recipes",
    no_args_is_help=True,
    help="What was learned of networks: which strategy opens which pair.",
)


@recipes_app.command()
def show(state: StateOption = DEFAULT_STATE) -> None:
    """Print a table of pairs of networks and strategies; older outcomes weigh less."""
    scores = Notes.load(state).recipes.scores()
    if not scores:
        console.print("Nothing was learned yet: punctures by introduction teach.")
        return
    table = Table("networks", "strategy", "opened", "failed")
    for label, known in reversed(scores.items()):
        for strategy, score in known.items():
            table.add_row(
                escape(label), strategy.value, f"{score.opened:.1f}", f"{score.failed:.1f}"
            )
    console.print(table)


@recipes_app.command()
def export(state: StateOption = DEFAULT_STATE) -> None:
    """Print them as JSON; prefixes of public addresses are in it."""
    typer.echo(Notes.load(state).recipes.encode().decode())


@recipes_app.command()
def clear(state: StateOption = DEFAULT_STATE) -> None:
    """Forget them."""
    notes = Notes.load(state)
    notes.recipes.clear()
    trio.run(notes.save)
