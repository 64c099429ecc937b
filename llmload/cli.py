"""The `llmload` command: look at models, generate text, serve blocks to others.

No logic of its own: it loads a model, opens a node and prints what they say. Text goes to standard
output, everything about it to standard error, so that the text can be piped. Expected errors are
one line and exit status 1, wrong usage is 2, an interrupt is 130.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import platformdirs
import trio
import typer
from rich.console import Console
from rich.markup import escape

from llmload import cli_model
from llmload.answer_screen import AnswerScreen
from llmload.cli_model import show_model
from llmload.config import GPT2Config
from llmload.engine.generate import generate_tokens
from llmload.engine.prepared import open_stage
from llmload.engine.sampler import SamplingParameters
from llmload.errors import LlmloadError
from llmload.graph.quantize import Precision
from llmload.model_folder import Model, load_model
from llmload.model_store import ModelStore
from llmload.swarm.beside import beside
from llmload.swarm.blocks import BlockStack
from llmload.swarm.client import SwarmClient, prompt_token_ids
from llmload.swarm.route import format_blocks, parse_blocks, stage_service
from llmload.swarm.stage import StageLimits, StageServer
from llmload.weights import bundled_model_path
from natswarm import (
    OPEN_SWARM,
    ConnectFailed,
    Identity,
    Invite,
    NatswarmError,
    Node,
    NodeConfig,
    NodeEvent,
    PeerConnected,
    PeerLost,
    PunctureEnded,
    SwarmKey,
    SystemPaths,
    open_node,
)

__all__ = ["app", "main"]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
# A peer that restarts is back in about a minute; dialling costs one datagram a try.
REJOIN_INTERVAL_S = 15.0

DEFAULT_LIMITS = StageLimits()

T = TypeVar("T")

app = typer.Typer(
    name="llmload",
    help="Run a GPT-2 on this device, or spread over the devices of a natswarm mesh.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_model.app)

DEFAULT_STATE = platformdirs.user_state_path("llmload", appauthor=False)

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
JoinOption = Annotated[
    list[str] | None,
    typer.Option(
        "--join",
        metavar="INVITE",
        help="Invite of a peer of the mesh, natswarm:...; may be given more than once.",
        show_default=False,
    ),
]
BindOption = Annotated[
    str,
    typer.Option("--bind", metavar="IP", help="Local address, such as that of one interface."),
]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65_535, help="UDP port; 0 lets the system choose.")
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=1, max=256, help="Processor threads for one step.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

# Not wrapped: an invite must survive copy and paste, and text is the model's.
output = Console(soft_wrap=True, highlight=False)
remarks = Console(stderr=True, soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command line; exits with 0, 1 (it failed), 2 (wrong usage) or 130 (interrupted)."""
    try:
        app()
    except (NatswarmError, LlmloadError, trio.BrokenResourceError, OSError) as error:
        remarks.print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(1)


# --- info --------------------------------------------------------------------------------------


@app.command()
def info(model: ModelOption = None, as_json: JsonOption = False) -> None:
    """Show the shape of a model, its size, and the hash by which peers know it."""
    show_model(_folder(model), as_json)


# --- generate ----------------------------------------------------------------------------------


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; '-' reads it from stdin.")],
    model: ModelOption = None,
    local: Annotated[
        bool, typer.Option("--local", help="Compute on this device alone; so it is without --join.")
    ] = False,
    join: JoinOption = None,
    bind: BindOption = "0.0.0.0",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of the answer at most.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="0 takes the likeliest token each time; higher is wilder."),
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Choose among the K likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Choose among the likeliest that make up this probability."
        ),
    ] = 0.95,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Repeats an answer; drawn if not given.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Processor threads on this device; without it, what is fastest."
        ),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the weights on this device; less is faster and smaller.")
    ] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Go on from a text, on this device or on the peers that serve the model.

    With --join, the blocks of the model are computed by peers that run `llmload serve`; only the
    configuration, tokenizer and hash of the local copy are used. The peers can read the text.
    """
    if local and join:
        raise typer.BadParameter("either --local or --join", param_hint="--local")
    try:
        sampling = SamplingParameters(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=secrets.randbits(64) if seed is None else seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    invites = [Invite.parse(text) for text in join or ()]
    loaded = load_model(_folder(model))
    prompt = sys.stdin.read() if prompt == "-" else prompt
    try:
        prompt_ids = prompt_token_ids(loaded, prompt)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="PROMPT") from error
    screen = AnswerScreen(remarks, quiet=as_json)
    if invites:
        facts = _run(
            partial(_generate_on_peers, loaded, prompt_ids, sampling, max_new_tokens, screen),
            invites,
            bind,
        )
    else:
        facts = _run(
            partial(_generate_here, loaded, prompt_ids, sampling, max_new_tokens, screen),
            precision,
            threads,
        )
    if as_json:
        settings = dataclasses.asdict(sampling)
        _print_json({"prompt": prompt, "text": screen.text, **settings, **facts})


async def _generate_here(
    model: Model,
    prompt_ids: Sequence[int],
    sampling: SamplingParameters,
    max_new_tokens: int,
    screen: AnswerScreen,
    precision: Precision,
    threads: int | None,
) -> dict[str, Any]:
    with screen:
        screen.tell("opening the model")
        engine = await trio.to_thread.run_sync(
            partial(open_stage, model.folder, precision=precision, threads=threads)
        )
        text = model.tokenizer.stream()
        started_at = first_at = last_at = trio.current_time()
        token_count = 0
        tokens = generate_tokens(
            [engine], prompt_ids, sampling=sampling, max_new_tokens=max_new_tokens
        )
        # In a thread, so that an interrupt is noticed between two tokens.
        while (token := await trio.to_thread.run_sync(next, tokens, None)) is not None:
            last_at = trio.current_time()
            first_at = last_at if token_count == 0 else first_at
            token_count += 1
            screen.add(text.push(token))
    decode_s = last_at - first_at
    tokens_per_s = (token_count - 1) / decode_s if decode_s > 0 else 0.0
    screen.remark(f"{token_count} tokens, {tokens_per_s:.1f} tokens/s on this device")
    return {
        "prompt_tokens": len(prompt_ids),
        "tokens": token_count,
        "first_token_s": round(first_at - started_at, 4),
        "tokens_per_s": round(tokens_per_s, 2),
        "route": [],
    }


async def _generate_on_peers(
    model: Model,
    prompt_ids: Sequence[int],
    sampling: SamplingParameters,
    max_new_tokens: int,
    screen: AnswerScreen,
    invites: Sequence[Invite],
    bind: str,
) -> dict[str, Any]:
    # Whoever only asks needs no lasting name, and may ask on a device that serves, too.
    config = NodeConfig(
        identity=Identity.generate(),
        swarm=_swarm_of(invites),
        bind_ip=bind,
        paths=SystemPaths(ip=bind),
    )
    with screen:
        screen.tell("joining the mesh")
        async with open_node(config) as node:
            await _join(node, invites)
            screen.tell("looking for peers that serve the model")
            client = SwarmClient(node, model)
            route = await client.find_route()
            way = " -> ".join(map(str, route))
            screen.tell(f"opening {way}")
            async with client.generate(
                prompt_ids,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                route=route,
                tell=screen.tell,
            ) as generation:
                screen.tell(f"waiting for the first token from {way}")
                async for token in generation:
                    screen.add(token.text)
                    screen.tell(f"{generation.statistics().tokens_per_s:.1f} tokens/s from {way}")
            statistics = generation.statistics()
    screen.remark(
        f"{statistics.token_count} tokens, {statistics.tokens_per_s:.1f} tokens/s, "
        f"{1000 * statistics.network_s:.0f} ms a token under way, from {way}"
    )
    return {
        "prompt_tokens": statistics.prompt_count,
        "tokens": statistics.token_count,
        "first_token_s": round(statistics.first_token_s, 4),
        "tokens_per_s": round(statistics.tokens_per_s, 2),
        "open_s": round(statistics.open_s, 4),
        "network_s": round(statistics.network_s, 4),
        "stage_s": [round(seconds, 4) for seconds in statistics.stage_s],
        "route": [
            {"peer_id": str(offer.peer_id), "blocks": format_blocks(offer.blocks)}
            for offer in route
        ],
    }


# --- serve -------------------------------------------------------------------------------------


@app.command()
def serve(
    blocks: Annotated[
        str, typer.Option("--blocks", metavar="FIRST-LAST", help="Blocks to serve, such as 0-3.")
    ],
    model: ModelOption = None,
    join: JoinOption = None,
    state: Annotated[
        Path,
        typer.Option(
            "--state", metavar="DIR", help="Folder of this device's identity.", show_default=False
        ),
    ] = DEFAULT_STATE,
    name: Annotated[str, typer.Option("--name", help="What other peers see.")] = "",
    bind: BindOption = "0.0.0.0",
    port: PortOption = 0,
    threads: ThreadsOption = 1,
    sessions: Annotated[
        int, typer.Option("--sessions", min=1, help="How many may be served at once.")
    ] = DEFAULT_LIMITS.session_count_max,
    cache_mb: Annotated[
        int, typer.Option("--cache-mb", min=1, help="Memory for all sessions, in megabytes.")
    ] = DEFAULT_LIMITS.cache_bytes_max // 2**20,
    as_json: JsonOption = False,
) -> None:
    """Serve blocks of a model to the mesh until interrupted.

    Several devices that together serve all blocks (`llmload info` says how many there are) answer
    each `llmload generate --join`. Without --join this is the first device of a new mesh: give the
    invite that it prints to the others.
    """
    folder = _folder(model)
    all_blocks = GPT2Config.from_folder(folder).blocks
    try:
        held = parse_blocks(blocks)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--blocks") from error
    if held.stop > all_blocks.stop:
        raise typer.BadParameter(
            f"this model has blocks {format_blocks(all_blocks)}", param_hint="--blocks"
        )
    invites = [Invite.parse(text) for text in join or ()]
    loaded = load_model(folder, held)
    stack = BlockStack.open(loaded.config, loaded.weights, held, intra_op_threads=threads)
    config = NodeConfig(
        identity=Identity.load_or_create(state / "identity"),
        swarm=_swarm_of(invites),
        name=name,
        bind_ip=bind,
        port=port,
        paths=SystemPaths(ip=bind),
        services=(stage_service(loaded.content_hash, held),),
        on_event=partial(_show_event, as_json),
    )
    limits = StageLimits(session_count_max=sessions, cache_bytes_max=cache_mb * 2**20)
    _run(_serve, stack, loaded.content_hash, config, limits, invites, as_json)


def _swarm_of(invites: Sequence[Invite]) -> SwarmKey:
    return invites[0].swarm if invites else OPEN_SWARM


async def _serve(
    stack: BlockStack,
    model_hash: str,
    config: NodeConfig,
    limits: StageLimits,
    invites: Sequence[Invite],
    as_json: bool,
) -> None:
    async with open_node(config) as node:
        # Before joining: the first record that peers get names the service already.
        server = StageServer(
            node, stack, model_hash, limits=limits, block_s=stack.measure_block_s()
        )
        server.start()
        await _join(node, invites)
        invite = str(await node.invite())
        if as_json:
            _print_json(
                {
                    "event": "serving",
                    "peer_id": str(node.peer_id),
                    "service": server.service,
                    "invite": invite,
                }
            )
        else:
            output.print(
                f"Serving blocks {format_blocks(stack.blocks)} of model {model_hash[:16]} as "
                f"{node.peer_id.short}.\nInvite  {invite}\nPress Ctrl-C to stop."
            )
        try:
            async with beside(server.keep_links):
                await _stay_joined(node, invites)
        finally:
            done = server.statistics
            if not as_json:
                remarks.print(
                    f"[dim]{done.opened_session_count} sessions, {done.position_count} positions "
                    f"computed, {done.failed_session_count} sessions failed[/]"
                )


async def _stay_joined(node: Node, invites: Sequence[Invite]) -> None:
    """Dial the peers that we joined by again and again; nothing happens while they are there."""
    while True:
        await trio.sleep(REJOIN_INTERVAL_S)
        for invite in invites:
            # Their loss was shown as an event, and the next try comes soon.
            with suppress(ConnectFailed):
                await node.connect(invite)


def _show_event(as_json: bool, event: NodeEvent) -> None:
    facts: dict[str, Any]
    match event:
        case PunctureEnded(peer_id, report):
            word, who = "punctured" if report.is_ok else "closed", peer_id
            facts = {
                "strategy": report.strategy,
                "probes": report.probe_count,
                "seconds": round(report.seconds, 4),
                "ok": report.is_ok,
                "reason": report.reason,
            }
        case PeerConnected(peer):
            word, who, facts = "connected", peer.peer_id, {"at": str(peer.seen_at)}
        case PeerLost(peer):
            word, who, facts = "lost", peer.peer_id, {"at": str(peer.seen_at)}
        case _:
            return
    if as_json:
        _print_json({"event": word, "peer_id": str(who), **facts})
    else:
        text = ", ".join(f"{name} {value}" for name, value in facts.items() if value != "")
        output.print(f"{word:<10} {who.short} {text}", markup=False)


# --- shared ------------------------------------------------------------------------------------


def _folder(model: Path | None) -> Path:
    return bundled_model_path() if model is None else ModelStore().find(str(model))


async def _join(node: Node, invites: Sequence[Invite]) -> None:
    for invite in invites:
        await node.connect(invite)
    if invites:
        await node.inspect()  # punctures to others are planned from what our NAT does


def _run(main: Callable[..., Awaitable[T]], *arguments: Any) -> T:
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


def _print_json(value: dict[str, Any]) -> None:
    """Print one object on one line, at once."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
