"""What the commands of `llmload` share: options, consoles, and how an async command is run."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import trio
import typer
from rich.console import Console

from llmload.model_store import ModelStore
from llmload.swarm.beside import beside
from llmload.weights import bundled_model_path

__all__ = [
    "INTERRUPTED",
    "AdapterOption",
    "JsonOption",
    "ModelOption",
    "ThreadsOption",
    "make_out",
    "model_folder",
    "output",
    "print_facts",
    "print_json",
    "remarks",
    "run_async",
]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

T = TypeVar("T")

ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="NAME|DIR",
        help="A model of this device (`llmload model list`), or the folder of a GPT-2 in Hugging "
        "Face layout. Without it, the small model that is shipped.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=1, max=256, help="Processor threads for one step.")
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="What `llmload learn --adapter` has learned on this model.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

# Not wrapped: an invite must survive copy and paste, and text is the model's.
output = Console(soft_wrap=True, highlight=False)
remarks = Console(stderr=True, soft_wrap=True, highlight=False)


def model_folder(model: Path | None) -> Path:
    """Return the folder of a model: one of this device, a path, or the shipped one."""
    return bundled_model_path() if model is None else ModelStore().find(str(model))


def make_out(out: Path, model: Path) -> None:
    """Make the folder for what is learned now, and not only when there is something to lose.

    Raises:
        typer.BadParameter: It can't be made, or is that of the model to begin with.
    """
    if out.resolve() == model.resolve():
        raise typer.BadParameter(
            "what is learned would take the place of --model, and could not be gone on with; take "
            "another folder",
            param_hint="--out",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(
            f"{out} can't be made a folder ({error.strerror}); take another", param_hint="--out"
        ) from error


def run_async(main: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run an async function; an interrupt cancels it, so that it says goodbye to its peers.

    Raises:
        typer.Exit: It was interrupted.
    """

    async def guarded() -> T:
        with trio.CancelScope() as scope:
            async with beside(_cancel_on_interrupt, scope):
                return await main(*arguments)
        raise typer.Exit(INTERRUPTED)

    return trio.run(guarded)


async def _cancel_on_interrupt(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
            return  # a second interrupt ends the process at once


def print_facts(as_json: bool, facts: dict[str, Any]) -> None:
    """Print what there is to say of a moment on one line."""
    if as_json:
        print_json(facts)
    else:
        output.print("  ".join(f"{name} {value}" for name, value in facts.items()), markup=False)


def print_json(value: dict[str, Any]) -> None:
    """Print one object on one line, at once; NaN and infinity, which JSON lacks, as null."""
    facts = {
        name: None if isinstance(fact, float) and not math.isfinite(fact) else fact
        for name, fact in value.items()
    }
    sys.stdout.write(json.dumps(facts, allow_nan=False) + "\n")
    sys.stdout.flush()
