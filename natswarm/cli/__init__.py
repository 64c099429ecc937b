"""The `natswarm` command. No logic of its own: it asks a node and prints what it says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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
    wanted = next((each for each in sys.argv[1:] if not each.startswith("-")), None)
    for entry in entry_points(group=PLUGIN_GROUP):
        if wanted not in (None, entry.name):  # what a plug-in imports may take a second
            continue
        try:
            command = entry.load()
        except ImportError as error:
            # Whatever is wrong with the other package, one's NAT can still be inspected.
            _console().print(f"[yellow]natswarm {entry.name} is not there:[/] {escape(str(error))}")
        else:
            app.command(entry.name)(command)
    run_command(app)


def run_command(command: Callable[[], object]) -> None:
    """Call a typer app; turn expected errors into one line on standard error.

    Args:
        command: The app; called without arguments.
    """
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseExceptionGroup as group:
        # Ctrl-C reached a task while another failed.
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has had enough; Python must not complain when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (NatswarmError, trio.BrokenResourceError, OSError) as error:
        _console().print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(1)


def _console() -> Console:
    return Console(stderr=True, soft_wrap=True)
