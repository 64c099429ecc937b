"""The `natswarm` command. No logic of its own: it asks a node and prints what it says."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import trio
from rich.console import Console
from rich.markup import escape

from natswarm.cli.app import app
from natswarm.errors import NatswarmError

__all__ = ["main", "run_command"]

# Other packages add commands here (llmload adds `demo`), so that natswarm need not know them.
PLUGIN_GROUP = "natswarm.commands"


def main() -> None:
    """Run the command line; exits with 0, 1 (it failed) or 2 (it was called wrongly)."""
    for entry in entry_points(group=PLUGIN_GROUP):
        app.command(entry.name)(entry.load())
    run_command(app)


def run_command(command: object) -> None:
    """Call a typer app; turn expected errors into one line on standard error.

    Args:
        command: The app; called without arguments.
    """
    console = Console(stderr=True, soft_wrap=True)
    try:
        command()  # type: ignore[operator]  # typer's __call__ is not typed
    except KeyboardInterrupt:
        sys.exit(130)
    except (NatswarmError, trio.BrokenResourceError) as error:
        console.print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(1)
