"""`llmload learn --stages` and `llmload up --train`: a model too big for one device, in training.

No logic of its own; see `learn/pipeline`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import trio
import typer
from numpy.typing import NDArray

from llmload.cli_mesh import join_mesh, stay_joined
from llmload.cli_shared import INTERRUPTED, output, print_facts, print_json
from llmload.config import GPT2Config
from llmload.learn.curve import append_row, can_draw, draw_curve
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.pipeline.leader import PipelineSettings, PipelineTrainer, StepReport
from llmload.learn.pipeline.part import BYTES_PER_PARAMETER, ModelPart, parameter_count
from llmload.learn.pipeline.stage import TrainingStage
from llmload.learn.schedule import LearningRateSchedule
from llmload.learn.sources import Windows
from llmload.learn.trainer import Batch, batches
from llmload.model_folder import Model, copy_tokenizer, save_config
from llmload.swarm.beside import beside
from llmload.swarm.codec import Codec
from llmload.swarm.route import format_blocks
from llmload.weights import open_weights
from natswarm import Invite, NatswarmError, Node, NodeConfig, open_device

__all__ = ["CodecOption", "Lesson", "StagesOption", "check_blocks", "lead", "lend", "training_room"]

# The rest is for activations and the gradient of one micro-batch, of one block at a time.
WEIGHTS_SHARE = 0.75

StagesOption = Annotated[
    int | None,
    typer.Option(
        "--stages",
        min=1,
        metavar="DEVICES",
        help="Hold no more than the embeddings and one block here, and the others on at most so "
        "many devices that run `llmload up --train`. Learned from is --data alone.",
        show_default=False,
    ),
]
CodecOption = Annotated[
    Codec | None,
    typer.Option(
        "--codec",
        help="With --stages: how hidden states and gradients travel; float16 if not given.",
        show_default=False,
    ),
]

COLUMNS = (
    "step",
    "loss",
    "validation_loss",
    "doubtful",
    "norm",
    "step_s",
    "devices",
    "kept",
    "failovers",
    "redone",
    "sent_bytes",
    "received_bytes",
    "route",
)


# --- llmload up --train --------------------------------------------------------------------------


def check_blocks(config: GPT2Config) -> None:
    """Check that a model has a block besides the one that stays with who leads.

    Raises:
        typer.BadParameter: It has not.
    """
    if config.n_layer < 2:
        raise typer.BadParameter(
            "it has one block, which stays on the device that leads: learn without --stages",
            param_hint="--model",
        )


def training_room(config: GPT2Config, memory_bytes: int) -> int:
    """Return how many blocks a device with so much memory can train.

    Raises:
        typer.BadParameter: None, or there is none to lend.
    """
    check_blocks(config)
    block_bytes = BYTES_PER_PARAMETER * parameter_count(config, 0)
    room = min(int(memory_bytes * WEIGHTS_SHARE) // block_bytes, config.n_layer - 1)
    if room < 1:
        raise typer.BadParameter(
            f"a block of this model takes {block_bytes / 1e6:.0f} MB in training, and a quarter of "
            f"the memory is kept for activations: give at least "
            f"{block_bytes / WEIGHTS_SHARE / 1e6 + 1:.0f}MB",
            param_hint="--memory",
        )
    return room


async def lend(
    state: Path,
    node_config: NodeConfig,
    model: Model,
    room: int,
    threads: int,
    invites: Sequence[Invite],
    as_json: bool,
) -> None:
    """Offer room for blocks in training until cancelled."""

    def tell(words: str) -> None:
        if as_json:
            print_json({"event": "training", "words": words})
        else:
            output.print(f"training   {words}", markup=False)

    async with open_device(state, node_config) as node:
        stage = TrainingStage(
            node,
            model.config,
            model.content_hash,
            open_part=partial(_open_part, model, threads),
            folder=state / "training",
            room=room,
            tell=tell,
        )
        stage.start()
        await node.announce([stage.service])
        await join_mesh(node, invites)
        with suppress(NatswarmError):  # neighbours hear of it by our record alone
            await node.publish(stage.service, is_service=True)
        invite = str(await node.invite())
        if as_json:
            facts = {"event": "offering", "peer_id": str(node.peer_id), "blocks": room}
            print_json({**facts, "service": stage.service, "invite": invite})
        else:
            output.print(
                f"Offering room for {room} of {model.config.n_layer} blocks of model "
                f"{model.content_hash[:16]} in training as {node.peer_id.short}.\n"
                f"Invite  {invite}\nPress Ctrl-C to stop.",
                markup=False,
            )
        await stay_joined(node, invites)


def _open_part(model: Model, threads: int, blocks: range, optimizer: AdamWSettings) -> ModelPart:
    with open_weights(model.folder, model.config) as tensors:
        return ModelPart(
            model.config, blocks, tensors.read, optimizer=optimizer, thread_count=threads
        )


# --- llmload learn --stages ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is learned, how, and where it goes.

    Attributes:
        tokens: The text, int64 (length,).
        validation: Windows of text that is not learned from.
        batch: Windows in a micro-batch.
        window: Tokens of a window.
        parts: Micro-batches in a step; None for twice as many as there are devices.
        seed: Draws the windows.
        schedule: The learning rate.
        steps: After how many to stop; None for at an interrupt.
        stages: Devices beside this one.
        codec: How hidden states travel.
        report_every: Steps between two lines with the loss of `validation`, and between two states
            that are kept.
        out: The folder of states, curve and learned model.
        threads: Of the runtime.
    """

    tokens: NDArray[np.int64]
    validation: Windows
    batch: int
    window: int
    parts: int | None
    seed: int
    schedule: LearningRateSchedule
    steps: int | None
    stages: int
    codec: Codec
    report_every: int
    out: Path
    threads: int

    @property
    def curve(self) -> Path:
        """The table of how it went."""
        return self.out / "curve.csv"

    def batches_at(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step, the same ones each time."""
        rng = np.random.default_rng([self.seed, step])
        drawn = batches(self.tokens, batch=self.batch, time=self.window, rng=rng)
        return list(islice(drawn, self.parts or 2 * (self.stages + 1)))

    def validation_at(self, step: int) -> list[Batch]:
        """Return what is validated with after so many steps, in micro-batches as in a step."""
        if step % self.report_every:
            return []
        tokens, targets = self.validation
        starts = range(0, len(tokens), self.batch)
        return [
            (tokens[start : start + self.batch], targets[start : start + self.batch])
            for start in starts
        ]


async def lead(
    lesson: Lesson,
    model: Model,
    state: Path,
    node_config: NodeConfig,
    invites: Sequence[Invite],
    as_json: bool,
) -> None:
    """Train a model over the devices that offer it, and write what was learned.

    Raises:
        typer.Exit: It was interrupted; what was learned is written.
    """
    async with open_device(state, node_config) as node:
        await join_mesh(node, invites)
        tell = partial(print_facts, as_json)
        tell({"event": "learning", "invite": str(await node.invite())})
        trainer = _trainer(lesson, model, node, tell)
        interrupted = trio.Event()
        try:
            async with (
                beside(stay_joined, node, invites),
                beside(_stop_on_interrupt, trainer, interrupted, tell),
            ):
                await trainer.run(lesson.steps)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_write, lesson, model, trainer, tell)
    if interrupted.is_set():
        raise typer.Exit(INTERRUPTED)


def _trainer(
    lesson: Lesson, model: Model, node: Node, tell: Callable[[dict[str, Any]], None]
) -> PipelineTrainer:
    def report(made: StepReport) -> None:
        if (validation_loss := made.validation_loss) is not None:
            row = _row(made, validation_loss, trainer)
            append_row(lesson.curve, COLUMNS, row)
            tell(row)

    trainer = PipelineTrainer(
        node,
        model.config,
        model.content_hash,
        open_part=partial(_open_part, model, lesson.threads),
        folder=lesson.out / "states",
        batches_at=lesson.batches_at,
        validation_at=lesson.validation_at,
        optimizer=AdamWSettings(learning_rate=lesson.schedule.peak),
        rate_at=lesson.schedule.rate_at,
        settings=PipelineSettings(
            stage_count=lesson.stages, keep_every=lesson.report_every, codec=lesson.codec
        ),
        tell=lambda words: tell({"event": "stages", "words": words}),
        after_step=report,
    )
    return trainer


def _row(made: StepReport, validation_loss: float, trainer: PipelineTrainer) -> dict[str, Any]:
    stages = [f"{offer.peer_id.short} {format_blocks(offer.blocks)}" for offer in trainer.route]
    return {
        "step": made.step,
        "loss": round(made.loss, 4),
        "validation_loss": round(validation_loss, 4),
        "doubtful": trainer.is_doubtful,
        "norm": round(made.norm, 4),
        "step_s": round(made.seconds, 3),
        "devices": len(trainer.route),
        "kept": trainer.kept_step,
        "failovers": trainer.failover_count,
        "redone": trainer.redone_count,
        "sent_bytes": trainer.traffic.sent_bytes,
        "received_bytes": trainer.traffic.received_bytes,
        "route": ", ".join(stages),
    }


async def _stop_on_interrupt(
    trainer: PipelineTrainer, interrupted: trio.Event, tell: Callable[[dict[str, Any]], None]
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            tell({"event": "stopping", "words": "after this step; once more to stop at once"})
            interrupted.set()
            trainer.stop()
            return  # the next one is for whoever was to get the first


def _write(
    lesson: Lesson,
    model: Model,
    trainer: PipelineTrainer,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Write what was learned as a folder that all commands read, and draw how it went."""
    if trainer.kept_step:
        trainer.snapshots.export(trainer.kept_step, lesson.out)
        save_config(lesson.out, model.config)
        copy_tokenizer(model, lesson.out)
        tell({"event": "saved", "step": trainer.kept_step, "folder": str(lesson.out)})
    if can_draw() and lesson.curve.exists():
        draw_curve(lesson.curve, lesson.curve.with_suffix(".png"))
