"""The `llmload serve` command: an OpenAI-compatible HTTP API, and a page to chat.

No logic of its own; see `serve/`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import trio
import typer

from llmload.cli_mesh import (
    BindOption,
    DraftOption,
    JoinOption,
    asking_config,
    join_mesh,
    open_draft_in_thread,
    stay_joined,
)
from llmload.cli_shared import (
    JsonOption,
    ModelOption,
    ThreadsOption,
    model_folder,
    output,
    print_json,
    remarks,
    run_async,
)
from llmload.engine.prepared import open_stage
from llmload.engine.tuning import EngineSettings
from llmload.graph.quantize import Precision
from llmload.graph.stage import default_attention
from llmload.model_folder import Model, load_model
from llmload.serve.app import make_app
from llmload.serve.local import LocalSource
from llmload.serve.server import listen, serve_app
from llmload.serve.source import Source, SwarmSource
from llmload.swarm.beside import beside
from llmload.swarm.codec import Codec
from natswarm import Invite, open_node

__all__ = ["serve"]

DEFAULT_HTTP_PORT = 8000


def serve(
    model: ModelOption = None,
    join: JoinOption = None,
    bind: BindOption = "0.0.0.0",
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="IP",
            help="Address for HTTP. With another than this, others can use it as well.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65_535, help="TCP port; 0 lets the system choose.")
    ] = DEFAULT_HTTP_PORT,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="A name by which this device is reached, besides localhost and addresses.",
            show_default=False,
        ),
    ] = None,
    answers: Annotated[
        int, typer.Option("--answers", min=1, max=64, help="How many are computed at once.")
    ] = 4,
    waiting: Annotated[
        int, typer.Option("--waiting", min=0, help="How many requests may wait for their turn.")
    ] = 32,
    threads: ThreadsOption = 1,
    precision: Annotated[
        Precision, typer.Option(help="Of the weights on this device, without --join.")
    ] = "float32",
    wire: Annotated[
        Codec, typer.Option(help="How activations travel over long links; see `generate`.")
    ] = "float32",
    draft: DraftOption = None,
    as_json: JsonOption = False,
) -> None:
    """Offer a model to programs of this device by OpenAI's HTTP API, and to you by a web page.

    Programs are told the base URL that this prints, with any key. With --join, the answers come
    from peers that run `llmload up`, who can read them; without, they are computed here.
    """
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise typer.BadParameter(f"{host!r} is no address", param_hint="--host") from None
    if draft is not None and not join:
        raise typer.BadParameter("it saves trips over the mesh: needs --join", param_hint="--draft")
    invites = [Invite.parse(text) for text in join or ()]
    loaded = load_model(model_folder(model))
    # Before anything slow: most often it is the port that is wrong.
    listener = listen(host, port)
    if not is_local:
        remarks.print("[yellow]Whoever reaches this address can use the model, without a key.[/]")

    if invites:
        source = partial(_open_swarm, loaded, invites, bind, wire, draft)
    else:
        source = partial(_open_here, loaded, answers, precision, threads)

    async def run() -> None:
        async with source() as opened, trio.open_nursery() as nursery:
            app = make_app(opened, answers_max=answers, waiting_max=waiting, hosts=allow_host or ())
            (url,) = await nursery.start(serve_app, app, listener)
            _announce(url, loaded, as_json)

    run_async(run)


def _announce(url: str, model: Model, as_json: bool) -> None:
    name = model.folder.name
    if as_json:
        print_json({"event": "serving", "url": url, "base_url": f"{url}/v1", "model": name})
    else:
        output.print(
            f"Chat      {url}/\nPrograms  base URL {url}/v1, model {name}, any key\n"
            "Press Ctrl-C to stop.",
            markup=False,
        )


@asynccontextmanager
async def _open_here(
    model: Model, answers: int, precision: Precision, threads: int
) -> AsyncIterator[Source]:
    # The form of attention that computes several sequences together.
    settings = EngineSettings(attention=default_attention(model.config), threads=threads)
    engine = await trio.to_thread.run_sync(
        partial(open_stage, model.folder, precision=precision, settings=settings)
    )
    # Twice: an answer that was cancelled keeps its slot until it is collected.
    yield LocalSource(model, engine, slot_count=2 * answers)


@asynccontextmanager
async def _open_swarm(
    model: Model, invites: Sequence[Invite], bind: str, codec: Codec, draft: Path | None
) -> AsyncIterator[Source]:
    config = asking_config(invites, bind)
    opened = await open_draft_in_thread(draft, model)
    async with open_node(config) as node:
        await join_mesh(node, invites)
        async with beside(stay_joined, node, invites):
            yield SwarmSource(node, model, codec=codec, draft=opened)
