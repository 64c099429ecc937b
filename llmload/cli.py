"""The `llmload` command: look at models, generate text, serve blocks to others.

No logic of its own: it loads a model, opens a node and prints what they say. Text goes to standard
output, everything about it to standard error, so that the text can be piped. Expected errors are
one line and exit status 1, wrong usage is 2, an interrupt is 130.
"""

from __future__ import annotations

import dataclasses
import secrets
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import trio
import typer
from rich.markup import escape

from llmload import cli_data, cli_learn, cli_model
from llmload.adapter import load_adapter
from llmload.answer_screen import AnswerScreen
from llmload.cli_mesh import (
    BindOption,
    DraftOption,
    JoinOption,
    asking_config,
    join_mesh,
    open_draft_in_thread,
)
from llmload.cli_model import show_model
from llmload.cli_serve import serve
from llmload.cli_shared import (
    AdapterOption,
    JsonOption,
    ModelOption,
    model_folder,
    print_json,
    remarks,
    run_async,
)
from llmload.cli_up import up
from llmload.engine.generate import generate_tokens
from llmload.engine.prepared import open_stage
from llmload.engine.sampler import SamplingParameters
from llmload.errors import LlmloadError
from llmload.graph.quantize import Precision
from llmload.model_folder import Model, load_model
from llmload.swarm.client import SwarmClient, prompt_token_ids
from llmload.swarm.codec import Codec
from llmload.swarm.route_view import route_as_json, route_text
from natswarm import Invite, NatswarmError, open_node

__all__ = ["app", "main"]

app = typer.Typer(
    name="llmload",
    help="Run a GPT-2 on this device, or spread over the devices of a natswarm mesh.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_model.app)
app.add_typer(cli_data.app)
app.command(context_settings={"ignore_unknown_options": True})(cli_data.feedback)  # -1
app.command()(up)
app.command()(serve)
app.command()(cli_learn.learn)
app.command("eval")(cli_learn.evaluate)


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
    show_model(model_folder(model), as_json)


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
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End before this text; may be given more than once.",
            show_default=False,
        ),
    ] = None,
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
    adapter: AdapterOption = None,
    wire: Annotated[
        Codec,
        typer.Option(
            help="How activations travel over long links; float32 is exact, less is quicker on "
            "slow links and may change a token now and then."
        ),
    ] = "float32",
    draft: DraftOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on from a text, on this device or on the peers that serve the model.

    With --join, the blocks of the model are computed by peers that run `llmload up`; only the
    configuration, tokenizer and hash of the local copy are used. The peers can read the text.
    """
    stop = stop or []
    if "" in stop:
        raise typer.BadParameter("an empty text is everywhere", param_hint="--stop")
    if local and join:
        raise typer.BadParameter("either --local or --join", param_hint="--local")
    if adapter is not None and join:
        raise typer.BadParameter("peers serve the model without it", param_hint="--adapter")
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
    if draft is not None and not join:
        raise typer.BadParameter("it saves trips over the mesh: needs --join", param_hint="--draft")
    loaded = load_model(model_folder(model))
    prompt = sys.stdin.read() if prompt == "-" else prompt
    try:
        prompt_ids = prompt_token_ids(loaded, prompt)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="PROMPT") from error
    screen = AnswerScreen(remarks, quiet=as_json)
    if invites:
        facts = run_async(
            partial(_generate_on_peers, loaded, prompt_ids, sampling, max_new_tokens, screen),
            invites,
            bind,
            wire,
            stop,
            draft,
        )
    else:
        facts = run_async(
            partial(_generate_here, loaded, prompt_ids, sampling, max_new_tokens, screen),
            precision,
            threads,
            adapter,
            stop,
        )
    if as_json:
        settings = {**dataclasses.asdict(sampling), "stop": stop}
        print_json({"prompt": prompt, "text": screen.text, **settings, **facts})


async def _generate_here(
    model: Model,
    prompt_ids: Sequence[int],
    sampling: SamplingParameters,
    max_new_tokens: int,
    screen: AnswerScreen,
    precision: Precision,
    threads: int | None,
    adapter: Path | None,
    stop: Sequence[str],
) -> dict[str, Any]:
    with screen:
        screen.tell("opening the model")
        beside = None
        if adapter is not None:
            beside = load_adapter(adapter, model.config, base=model.content_hash)
        engine = await trio.to_thread.run_sync(
            partial(open_stage, model.folder, precision=precision, threads=threads, adapter=beside)
        )
        text = model.tokenizer.stream(stop)
        started_at = first_at = last_at = trio.current_time()
        token_count = 0
        tokens = generate_tokens(
            [engine], prompt_ids, sampling=sampling, max_new_tokens=max_new_tokens
        )
        while not text.is_stopped:
            # In a thread, so that an interrupt is noticed between two tokens.
            token = await trio.to_thread.run_sync(next, tokens, None)
            if token is None:
                break
            last_at = trio.current_time()
            first_at = last_at if token_count == 0 else first_at
            token_count += 1
            screen.add(text.push(token))
        screen.add(text.finish())
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
    codec: Codec = "float32",
    stop: Sequence[str] = (),
    draft: Path | None = None,
) -> dict[str, Any]:
    config = asking_config(invites, bind)
    with screen:
        screen.tell("joining the mesh")
        async with open_node(config) as node:
            await join_mesh(node, invites)
            screen.tell("looking for peers that serve the model")
            client = SwarmClient(node, model, draft=await open_draft_in_thread(draft, model))
            route = await client.find_route()
            async with client.generate(
                prompt_ids,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                stop=stop,
                route=route,
                codec=codec,
                tell=screen.tell_change,
            ) as generation:
                way = route_text(node, generation.route)
                screen.tell(f"waiting for the first token from {way}")
                async for token in generation:
                    screen.add(token.text)
                    way = route_text(node, generation.route)
                    screen.tell(f"{generation.statistics().tokens_per_s:.1f} tokens/s from {way}")
                screen.add(generation.finish())
                stages = route_as_json(node, generation.route)
            statistics = generation.statistics()
    guessed = f", {statistics.accepted_count} guessed right" if statistics.guess_count else ""
    failed = f", {statistics.failover_count} changes of route" if statistics.failover_count else ""
    screen.remark(
        f"{statistics.token_count} tokens{guessed}{failed}, "
        f"{statistics.tokens_per_s:.1f} tokens/s, "
        f"{1000 * statistics.network_s:.0f} ms a trip under way, from {way}"
    )
    return {
        "prompt_tokens": statistics.prompt_count,
        "tokens": statistics.token_count,
        "first_token_s": round(statistics.first_token_s, 4),
        "tokens_per_s": round(statistics.tokens_per_s, 2),
        "open_s": round(statistics.open_s, 4),
        "network_s": round(statistics.network_s, 4),
        "trips": statistics.trip_count,
        "guesses": statistics.guess_count,
        "guesses_right": statistics.accepted_count,
        "failovers": statistics.failover_count,
        "lost_s": round(statistics.lost_s, 4),
        "stage_s": [round(seconds, 4) for seconds in statistics.stage_s],
        "route": stages,
    }
