"""`llmload learn` and `llmload eval`: train on files with a mesh, and say how good a model is.

No logic of its own: it reads text, opens a node, runs a `Learner` and writes down how it goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import trio
import typer
from numpy.typing import NDArray

from llmload.adapter import (
    RANK_MAX,
    AdapterSettings,
    fresh_adapter,
    load_adapter,
    save_adapter,
)
from llmload.cli_data import open_store
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
from llmload.cli_pipeline import CodecOption, Lesson, StagesOption, check_blocks, lead
from llmload.cli_shared import (
    AdapterOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    make_out,
    model_folder,
    output,
    print_facts,
    print_json,
    run_async,
)
from llmload.config import GPT2Config
from llmload.graph.quantize import Precision
from llmload.learn.checkpoint import load_checkpoint, save_checkpoint
from llmload.learn.curve import append_row, can_draw, draw_curve
from llmload.learn.exchange import Learner
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.resume import resume, take_checkpoint
from llmload.learn.schedule import LearningRateSchedule
from llmload.learn.sources import Windows
from llmload.learn.texts import TextLearning
from llmload.learn.trainer import Trainer
from llmload.model_folder import Model, copy_tokenizer, load_model, save_config
from llmload.swarm.beside import beside
from llmload.weights import save_weights
from natswarm import DhtOptions, Invite, NodeConfig, device_config, open_device

__all__ = ["evaluate", "learn"]

# Tokens of a window, where the model sees so many.
WINDOW = 128
# The end of the text is not learned from: by it one sees whether learning helps.
VALIDATION_SHARE = 0.05
VALIDATION_WINDOWS_MAX = 16
# By fewer of them sources of texts are judged, each of them now and then.
SOURCE_WINDOWS = 8
ADAPTER_FILE_NAME = "adapter.safetensors"
COLUMNS = ("step", "loss", "validation_loss", "partners", "crowd", "taken", "stale", "doubted",
           "sent_bytes", "received_bytes", "caught_up", "texts", "useless_sources",
           "text_bytes_sent", "text_bytes_received", "preference_loss")  # fmt: skip

DataOption = Annotated[
    list[Path],
    typer.Option(
        "--data", metavar="FILE", exists=True, dir_okay=False, help="Text in UTF-8; more than once."
    ),
]


WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        min=2,
        help="Tokens in one window, at most the model's context; without it 128 or that.",
        show_default=False,
    ),
]


def learn(
    data: DataOption,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            file_okay=False,
            writable=True,
            help="Folder of the learned model or adapter, its checkpoints and curve.",
        ),
    ],
    model: ModelOption = None,
    join: JoinOption = None,
    state: StateOption = DEFAULT_STATE,
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
    adapter: Annotated[
        int | None,
        typer.Option(
            "--adapter",
            min=1,
            max=RANK_MAX,
            metavar="RANK",
            help="Learn an adapter of this rank beside the model, which stays as it is.",
        ),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the model beside an adapter; less is smaller.")
    ] = "float32",
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Stop after so many in all; else at an interrupt."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows in one step.")] = 4,
    window: WindowOption = None,
    parts: Annotated[
        int | None,
        typer.Option(
            "--parts",
            min=1,
            help="Batches in one step, computed one after the other. Without it one; with "
            "--stages twice as many as there are devices.",
            show_default=False,
        ),
    ] = None,
    stages: StagesOption = None,
    codec: CodecOption = None,
    recompute: Annotated[
        int | None,
        typer.Option(
            "--recompute",
            min=1,
            metavar="BLOCKS",
            help="Hold activations of so many blocks at once: less memory, more time.",
        ),
    ] = None,
    rate: Annotated[float, typer.Option("--rate", min=1e-9, max=1, help="Learning rate.")] = 3e-4,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Steps until the learning rate is reached.")
    ] = 0,
    decay: Annotated[
        int | None,
        typer.Option(
            "--decay",
            min=1,
            metavar="STEPS",
            help="Step at which a tenth of it is left.",
        ),
    ] = None,
    texts: Annotated[
        bool,
        typer.Option(
            "--texts/--no-texts",
            help="Take texts that others share, and give them those that are shared here.",
        ),
    ] = True,
    report_every: Annotated[
        int,
        typer.Option("--report-every", min=1, help="Steps between two lines, and two checkpoints."),
    ] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the windows.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Train a model on text of this device, together with everybody who trains the same one.

    Goes on where it stopped if --out holds a checkpoint. The last 5 % of --data are not learned
    from: each line tells the loss on them, as does curve.csv. The text stays here, but much of it
    can be computed back from what is sent: learn with strangers only from text that strangers may
    read.
    Also learned from is what `llmload data` and `llmload feedback` keep; what is shared there is
    given to others, for what they share.
    """
    if adapter is None and precision != "float32":
        raise typer.BadParameter("only with --adapter", param_hint="--precision")
    if stages is None and codec is not None:
        raise typer.BadParameter(
            "only with --stages; what learners of whole models exchange has a codec of its own",
            param_hint="--codec",
        )
    if stages is not None and (adapter is not None or recompute is not None):
        raise typer.BadParameter(
            "stages hold the activations of one block at a time, and train no adapters: leave out "
            "--recompute and --adapter",
            param_hint="--stages",
        )
    invites = [Invite.parse(text) for text in join or ()]
    folder = model_folder(model)
    loaded = load_model(folder)
    if stages is not None:
        check_blocks(loaded.config)
    window = _window_of(loaded.config, window)
    tokens = _read_tokens(loaded, data)
    cut = int(len(tokens) * (1 - VALIDATION_SHARE))
    if cut <= window or len(tokens) - cut <= window:
        raise typer.BadParameter(
            f"{len(tokens)} tokens are too few for windows of {window}; {VALIDATION_SHARE:.0%} of "
            "them are kept to validate with. Give more text, or a smaller --window",
            param_hint="--data",
        )
    try:
        schedule = LearningRateSchedule(peak=rate, warmup_steps=warmup, decay_steps=decay)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--decay") from error
    make_out(out, folder)
    config = device_config(
        state,
        invites=invites,
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
    if not can_draw():
        print_facts(as_json, {"event": "no picture", "advice": "pip install 'natswarm[plots]'"})
    validation = tokens[cut:]
    if stages is not None:
        # In micro-batches of one shape: graphs are made for each.
        window_count = max(1, VALIDATION_WINDOWS_MAX // batch) * batch
        lesson = Lesson(
            tokens=tokens[:cut],
            validation=_windows(validation, window, window_count),
            batch=batch,
            window=window,
            parts=parts,
            seed=seed,
            schedule=schedule,
            steps=steps,
            stages=stages,
            codec=codec or "float16",
            report_every=report_every,
            out=out,
            threads=threads,
        )
        run_async(lead, lesson, loaded, state, config, invites, as_json)
        return
    rng = np.random.default_rng(seed)
    new = None if adapter is None else fresh_adapter(loaded.config, AdapterSettings(rank=adapter))
    trainer = Trainer(
        loaded.config,
        loaded.weights,
        adapter=new,
        precision=precision,
        optimizer=AdamWSettings(learning_rate=rate),
        recompute=recompute,
        thread_count=threads,
    )
    records = TextLearning(
        loaded,
        trainer,
        open_store(state),
        tokens[:cut],
        _windows(validation, window, SOURCE_WINDOWS),
        batch=batch,
        time=window,
        learning_rate=rate,
        rng=rng,
        seed=seed,
    )
    course = _Course(loaded, trainer, rng, records, validation, window, out, report_every, as_json)
    pace = _Pace(schedule, parts or 1, steps)
    run_async(_learn, course, state, config, invites, pace, texts)


def evaluate(
    data: DataOption,
    model: ModelOption = None,
    window: WindowOption = None,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how well a model predicts text: loss a token, perplexity, bits a byte."""
    loaded = load_model(model_folder(model))
    window = _window_of(loaded.config, window)
    tokens = _read_tokens(loaded, data)
    if len(tokens) <= window:
        raise typer.BadParameter(
            f"{len(tokens)} tokens are too few for a window of {window}. Give more text, or a "
            "smaller --window",
            param_hint="--data",
        )
    beside = None
    if adapter is not None:
        beside = load_adapter(adapter, loaded.config, base=loaded.content_hash)
    loss = _loss(Trainer(loaded.config, loaded.weights, adapter=beside), tokens, window)
    bytes_per_token = sum(file.stat().st_size for file in data) / len(tokens)
    facts = {
        "tokens": len(tokens),
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "bits_per_byte": round(loss / math.log(2) / bytes_per_token, 4),
    }
    if as_json:
        print_json(facts)
    else:
        output.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False)


async def _learn(
    course: _Course,
    state: Path,
    config: NodeConfig,
    invites: Sequence[Invite],
    pace: _Pace,
    exchanges_texts: bool,
) -> None:
    async with open_device(state, config) as node:
        learner = Learner(
            node,
            course.trainer,
            course.texts.batches,
            course.learned_hash,
            rate_at=pace.schedule.rate_at,
            parts=pace.parts,
            between_steps=course.between_steps,
        )
        course.begin(learner)
        learner.start()
        await node.announce([learner.service])
        await join_mesh(node, invites)
        course.tell({"event": "learning", "invite": str(await node.invite())})
        if learner.step_count == 0:
            course.tell({"event": "joined", "shards": await learner.join()})
        left = None if pace.steps is None else max(0, pace.steps - learner.step_count)
        try:
            async with AsyncExitStack() as stack:
                if exchanges_texts:
                    exchange = course.texts.start(node, learner)
                    await stack.enter_async_context(beside(exchange.run))
                await stack.enter_async_context(beside(stay_joined, node, invites))
                await learner.run(left)
                await learner.settle()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(course.finish)


class _Pace(NamedTuple):
    """How a run goes on: the rate of each step, batches in one, and after how many it stops."""

    schedule: LearningRateSchedule
    parts: int
    steps: int | None


class _Course:
    """One run of `llmload learn`: its text, its files and what it shows."""

    def __init__(
        self,
        model: Model,
        trainer: Trainer,
        rng: np.random.Generator,
        texts: TextLearning,
        validation: NDArray[np.int64],
        window: int,
        out: Path,
        report_every: int,
        as_json: bool,
    ) -> None:
        self.model, self.trainer, self.rng, self.texts = model, trainer, rng, texts
        self.window = window
        self._validation = validation
        self._out, self._report_every = out, report_every
        self.tell = partial(print_facts, as_json)
        self._curve = out / "curve.csv"

    @property
    def learned_hash(self) -> str:
        """By which those are known who learn the same: this model, or adapters like ours on it."""
        base, adapter = self.model.content_hash, self.trainer.adapter
        return base if adapter is None else adapter.settings.identity(base)

    def begin(self, learner: Learner) -> None:
        """Go on from the latest checkpoint, if there is one."""
        self._learner = learner
        note = learner.outer.note_step
        self.texts.on_gradient = lambda gradient: note(gradient, 1.0, 0.0)
        self.texts.refresh()
        checkpoint = load_checkpoint(self._out)
        if checkpoint is not None:
            learner.step_count = resume(
                checkpoint, self.trainer, learner.outer, self.rng, self.learned_hash
            )
            self.tell({"event": "resumed", "step": learner.step_count})

    async def between_steps(self) -> None:
        """Report and save, now and then."""
        await self.texts.between_steps(self._learner.step_count)
        if self._learner.step_count % self._report_every == 0:
            self.tell(await trio.to_thread.run_sync(self._report))

    def save(self) -> None:
        """Write a checkpoint, and the model as a folder that all commands read, or the adapter."""
        learner = self._learner
        save_checkpoint(
            self._out,
            take_checkpoint(
                self.trainer, learner.outer, self.rng, learner.step_count, self.learned_hash
            ),
        )
        adapter = self.trainer.adapter
        if adapter is not None:
            save_adapter(self._out / ADAPTER_FILE_NAME, adapter, base=self.model.content_hash)
            return
        save_config(self._out, self.model.config)
        save_weights(self._out, self.trainer.weights())
        copy_tokenizer(self.model, self._out)

    def finish(self) -> None:
        """Save, say so, and draw the curve where that is possible."""
        self.save()
        step = self._learner.step_count
        self.tell({"event": "saved", "step": step, "folder": str(self._out)})
        if can_draw() and self._curve.exists():
            draw_curve(self._curve, self._curve.with_suffix(".png"))

    def _report(self) -> dict[str, Any]:
        learner, counts = self._learner, self._learner.outer.statistics
        loss = _loss(self.trainer, self._validation, self.window)
        row = {
            "step": learner.step_count,
            "loss": round(learner.loss or math.nan, 4),
            "validation_loss": round(loss, 4),
            "partners": len(learner.partners),
            "crowd": round(learner.outer.crowd, 2),
            "taken": counts.taken,
            "stale": counts.stale,
            "doubted": counts.doubted,
            "sent_bytes": sum(report.sent_bytes for report in learner.reports.values()),
            "received_bytes": sum(report.received_bytes for report in learner.reports.values()),
            "caught_up": learner.caught_up_count,
            **self._texts_report(),
        }
        self.save()
        append_row(self._curve, COLUMNS, row)
        return row

    def _texts_report(self) -> dict[str, Any]:
        exchange, sources = self.texts.exchange, self.texts.sources
        marks = self.texts.preference_loss
        reports = () if exchange is None else exchange.reports.values()
        return {
            "texts": sum(report.taken for report in reports),
            "useless_sources": sum(
                sources.worth(giver) == 0 for giver in self.texts.batches.givers
            ),
            "text_bytes_sent": sum(report.sent_bytes for report in reports),
            "text_bytes_received": sum(report.received_bytes for report in reports),
            **({} if marks is None else {"preference_loss": round(marks, 4)}),
        }


def _window_of(config: GPT2Config, window: int | None) -> int:
    if window is not None and window > config.n_ctx:
        raise typer.BadParameter(
            f"the model sees {config.n_ctx} tokens at once; give at most that",
            param_hint="--window",
        )
    return min(WINDOW, config.n_ctx) if window is None else window


def _read_tokens(model: Model, files: Sequence[Path]) -> NDArray[np.int64]:
    """Return all text as token ids, int64 (length,)."""
    ids: list[int] = []
    for file in files:
        try:
            ids += model.tokenizer.encode(file.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"{file} is no text in UTF-8", param_hint="--data") from error
    return np.array(ids, dtype=np.int64)


def _loss(trainer: Trainer, tokens: NDArray[np.int64], window: int) -> float:
    """Return the mean loss over windows spread evenly over a text, nats a token."""
    windows = zip(*_windows(tokens, window, VALIDATION_WINDOWS_MAX), strict=True)
    return float(np.mean([trainer.loss(row[None], targets[None]) for row, targets in windows]))


def _windows(tokens: NDArray[np.int64], window: int, count_max: int) -> Windows:
    """Return tokens and targets of windows spread evenly over a text, int64 (count, window)."""
    count = min(count_max, max(1, (len(tokens) - 1) // window))
    starts = np.linspace(0, len(tokens) - window - 1, count).astype(np.int64)
    windows = tokens[starts[:, None] + np.arange(window + 1)]  # (count, window + 1)
    return windows[:, :-1], windows[:, 1:]
