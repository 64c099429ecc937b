"""The `llmload up` command: serve a part of a model to the mesh.

No logic of its own; see `swarm/volunteer.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llmload.cli_mesh import (
    DEFAULT_LINKS,
    DEFAULT_STATE,
    BindOption,
    DhtFileOption,
    DhtNodeOption,
    DhtOption,
    GatewayOption,
    InterfaceOption,
    JoinOption,
    LanOption,
    LinksOption,
    PortOption,
    StateOption,
    join_mesh,
    show_event,
    stay_joined,
)
from llmload.cli_pipeline import lend, training_room
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
from llmload.config import GPT2Config
from llmload.engine.prepared import open_stage
from llmload.engine.session import StageEngine
from llmload.engine.tuning import EngineSettings
from llmload.graph.stage import default_attention
from llmload.model_folder import load_model
from llmload.swarm.beside import open_quiet_nursery
from llmload.swarm.placement import windows
from llmload.swarm.route import format_blocks, parse_blocks, stage_service
from llmload.swarm.stage import StageLimits
from llmload.swarm.volunteer import Volunteer, block_bytes
from natswarm import (
    DhtOptions,
    Invite,
    NodeConfig,
    device_config,
    open_device,
)

__all__ = ["up"]

DEFAULT_LIMITS = StageLimits()
# The rest is for the keys and values of sessions.
WEIGHTS_SHARE = 0.75
# Half of what a small phone has, where the system does not tell.
MEMORY_BYTES_UNKNOWN = 1_000_000_000


def up(
    model: ModelOption = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Memory for blocks and sessions, such as 300MB or 2GB. Without it, half of what "
            "is free.",
            show_default=False,
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            metavar="FIRST-LAST",
            help="Serve exactly these, such as 0-3, instead of what the swarm lacks most.",
            show_default=False,
        ),
    ] = None,
    join: JoinOption = None,
    state: StateOption = DEFAULT_STATE,
    name: Annotated[str, typer.Option("--name", help="What other peers see.")] = "",
    bind: BindOption = "0.0.0.0",
    interface: InterfaceOption = None,
    port: PortOption = 0,
    lan: LanOption = True,
    gateway: GatewayOption = True,
    links: LinksOption = DEFAULT_LINKS,
    dht: DhtOption = False,
    dht_node: DhtNodeOption = None,
    dht_file: DhtFileOption = None,
    threads: ThreadsOption = 1,
    train: Annotated[
        bool,
        typer.Option(
            "--train",
            help="Hold blocks for others' training instead, which `llmload learn --stages` leads: "
            "as many as the memory has room for, whichever are given.",
        ),
    ] = False,
    sessions: Annotated[
        int, typer.Option("--sessions", min=1, help="How many may be served at once.")
    ] = DEFAULT_LIMITS.session_count_max,
    as_json: JsonOption = False,
) -> None:
    """Serve a part of a model to the mesh until interrupted.

    Looks who serves what, measures this device, and takes the blocks that are lacking most, as many
    as the memory holds; every minute it looks again, and moves if that helps the swarm. Devices
    that together hold all blocks answer each `llmload generate --join`. Without --join it meets
    the LAN and whom it remembers; the first device of a new mesh is alone: give the invite that it
    prints to the others. With --train it lends its memory to trainings that others lead instead.
    Meanwhile `natswarm status --state DIR`, `peers` and the like ask it.
    """
    folder = model_folder(model)
    config = GPT2Config.from_folder(folder)
    memory_bytes = _free_memory_bytes() // 2 if memory is None else _parse_size(memory)
    invites = [Invite.parse(text) for text in join or ()]
    node_config = device_config(
        state,
        invites=invites,
        name=name,
        bind=bind,
        interface=interface,
        port=port,
        lan=lan,
        links=links,
        dht=DhtOptions(dht, dht_node or (), dht_file),
        publishes=True,
        traces_path=True,
        asks_gateway=gateway,
        on_event=partial(show_event, as_json),
    )
    if train:
        if blocks is not None:
            raise typer.BadParameter("who leads the training says which", param_hint="--blocks")
        room = training_room(config, memory_bytes)
        run_async(lend, state, node_config, load_model(folder), room, threads, invites, as_json)
        return
    candidates, cache_bytes_max = _room(config, memory_bytes, blocks)
    limits = StageLimits(session_count_max=sessions, cache_bytes_max=cache_bytes_max)
    # The form of attention that computes several sequences together.
    settings = EngineSettings(attention=default_attention(config), threads=threads)

    def open_block(block: int) -> StageEngine:
        return open_stage(folder, range(block, block + 1), settings=settings)

    content_hash = load_model(folder).content_hash
    run_async(
        *(_serve, state, node_config, config, content_hash, open_block),
        *(candidates, limits, invites, as_json),
    )


def _room(config: GPT2Config, memory_bytes: int, blocks: str | None) -> tuple[list[range], int]:
    """Return the ranges of blocks to choose from, and the bytes for keys and values."""
    sizes = block_bytes(config)
    if blocks is None:
        candidates = windows(sizes, int(memory_bytes * WEIGHTS_SHARE))
        if not candidates:
            raise typer.BadParameter(
                f"a block of this model takes {min(sizes) / 1e6:.0f} MB, and a quarter of the "
                f"memory is kept for sessions: give at least "
                f"{min(sizes) / WEIGHTS_SHARE / 1e6 + 1:.0f}MB",
                param_hint="--memory",
            )
    else:
        try:
            held = parse_blocks(blocks)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--blocks") from error
        if held.stop > config.n_layer:
            raise typer.BadParameter(
                f"this model has blocks {format_blocks(config.blocks)}", param_hint="--blocks"
            )
        candidates = [held]
    largest = max(sum(sizes[block] for block in window) for window in candidates)
    return candidates, max(memory_bytes - largest, memory_bytes // 4)


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB)", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is no size; write 300MB or 2GB", param_hint="--memory")
    return int(float(match[1]) * {"MB": 1e6, "GB": 1e9}[match[2].upper()])


def _free_memory_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return 2 * MEMORY_BYTES_UNKNOWN


async def _serve(
    state: Path,
    node_config: NodeConfig,
    config: GPT2Config,
    model_hash: str,
    open_block: Callable[[int], StageEngine],
    candidates: Sequence[range],
    limits: StageLimits,
    invites: Sequence[Invite],
    as_json: bool,
) -> None:
    async with open_device(state, node_config) as node:
        await join_mesh(node, invites)
        invite = str(await node.invite())

        def on_change(blocks: range, reason: str) -> None:
            if as_json:
                facts = {"event": "serving", "peer_id": str(node.peer_id), "reason": reason}
                service = stage_service(model_hash, blocks)
                print_json({**facts, "service": service, "invite": invite})
            else:
                output.print(
                    f"Serving blocks {format_blocks(blocks)} of model {model_hash[:16]} as "
                    f"{node.peer_id.short}: {reason}.\nInvite  {invite}\nPress Ctrl-C to stop.",
                    markup=False,
                )

        volunteer = Volunteer(
            node,
            config,
            model_hash,
            open_block=open_block,
            candidates=candidates,
            limits=limits,
            on_change=on_change,
        )
        try:
            async with open_quiet_nursery() as nursery:
                nursery.start_soon(stay_joined, node, invites)
                await volunteer.run()
        finally:
            if volunteer.server is not None and not as_json:
                done = volunteer.server.statistics
                remarks.print(
                    f"[dim]{done.opened_session_count} sessions, {done.position_count} positions "
                    f"computed, {done.failed_session_count} sessions failed[/]"
                )
