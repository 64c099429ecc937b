"""`natswarm swarm`: which swarm the node of a state folder is in."""

from __future__ import annotations

import typer

from natswarm.cli.options import DEFAULT_STATE, StateOption, console
from natswarm.device.config import IDENTITY_FILE, SWARM_FILE
from natswarm.errors import ConfigurationError
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

__all__ = ["swarm_app"]

swarm_app = typer.Typer(
    name="swarm",
    no_args_is_help=True,
    help="Private swarms: who has no invite to one does not see who is in it.",
)


@swarm_app.command()
def new(state: StateOption = DEFAULT_STATE) -> None:
    """Make a private swarm, and put the node of a new state folder into it.

    Others come in by its invites, which hold the key.
    """
    path = state / SWARM_FILE
    if (known := SwarmKey.load(path)) is not None:
        raise ConfigurationError(f"the node of {state} is in {known} already; name a new folder")
    if (state / IDENTITY_FILE).exists():
        raise ConfigurationError(
            f"the node of {state} is in the open swarm, which knows its PeerId: for a private "
            "swarm name a new folder with --state"
        )
    swarm = SwarmKey.generate().store_new(path)
    console.print(
        f"The node of {state} is in {swarm}; the key is in {path}.\n"
        "Start it with `natswarm up` and this folder, and invite others by what it prints."
    )


@swarm_app.command()
def show(state: StateOption = DEFAULT_STATE) -> None:
    """Print which swarm the node is in."""
    console.print(str(SwarmKey.load(state / SWARM_FILE) or OPEN_SWARM))
