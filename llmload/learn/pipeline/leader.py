"""Lead the training of a model that does not fit on this device, over stages that others lend.

    texts -> embeddings -> [stage 0] -> [stage 1] -> the last block, the loss
                  ^------- gradients come back the same way -------'

This device holds both ends of the model, so texts and losses stay here; all other blocks lie on the
stages. A step: all micro-batches forward and back (1F1B), then one Apply with the length of the
whole gradient, by which all clip alike. Between steps text that is not learned from goes forward.

Every so many steps all keep their state on disk, and this device fetches a copy of all states: from
then on the training can be gone back to there. When a stage dies, is silent or refuses, the others
and whoever takes its place go back to the latest such step and go on; what is lost are the steps
since. Micro-batches are a function of the step and sums have a fixed order, so the training ends
with the same bits, as long as the devices compute alike.

A step on which this device or a stage has died is never half done: states are only kept between
steps, and count once all of them are here.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from llmload.config import GPT2Config
from llmload.errors import LearningFailed
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.pipeline.ends import EndsWorker
from llmload.learn.pipeline.jump import JumpWatch
from llmload.learn.pipeline.link import Guard, Link, Traffic
from llmload.learn.pipeline.manifest import Manifest
from llmload.learn.pipeline.part import ModelPart, units_of
from llmload.learn.pipeline.protocol import (
    PIPELINE,
    ROWS_BYTES_MAX,
    STAGE,
    STATE,
    Assign,
    FetchState,
    Keep,
    Opened,
    OpenPipeline,
    Release,
    StatePiece,
    WireOptimizer,
)
from llmload.learn.pipeline.search import StageSearch
from llmload.learn.pipeline.snapshots import Snapshots
from llmload.learn.pipeline.stage import PATIENCE_S, OpenPart, receive_opened
from llmload.learn.pipeline.watch import SilenceWatch
from llmload.learn.trainer import Batch
from llmload.swarm.beside import open_quiet_nursery
from llmload.swarm.codec import Codec
from llmload.swarm.route import HopFailed, StageOffer
from llmload.swarm.stage_session import Compute, in_thread
from natswarm import Call, Message, NatswarmError, Node, RequestRefused

__all__ = ["PipelineSettings", "PipelineTrainer", "StepReport"]

# A stage writes its blocks; or fetches them first, over whatever link.
KEEP_TIMEOUT_S = 300.0
ASSIGN_TIMEOUT_S = 3600.0
RELEASE_TIMEOUT_S = 3.0
# Failures without a step beyond those made before: it is not the devices.
FAILURES_MAX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    """How a training goes over stages.

    Attributes:
        stage_count: Devices beside this one, if there are so many.
        keep_every: Steps between two states that can be gone back to.
        codec: How hidden states and gradients travel.
        open_s: How long a way through all stages may take to open.
        replica_s: How long to wait for devices when there are too few; 0 gives up at once.
    """

    stage_count: int
    keep_every: int = 50
    codec: Codec = "float16"
    open_s: float = 120.0
    replica_s: float = 600.0

    def __post_init__(self) -> None:
        if self.stage_count < 1 or self.keep_every < 1:
            raise ValueError(f"stage_count and keep_every must be positive: {self}")


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step.

    Attributes:
        step: Steps made, with this one.
        loss: Mean cross-entropy before it, nats a token.
        norm: The length of its gradient.
        seconds: How long it took.
        validation_loss: The same after it, of text that is not learned from; None where there was
            no validation.
    """

    step: int
    loss: float
    norm: float
    seconds: float
    validation_loss: float | None


@dataclass(eq=False, slots=True)
class _Attempt:
    """A way through the stages, from its opening to its end.

    Attributes:
        number: Counted; a late call of an earlier one is refused.
        guard: Ends it.
        opened: Its last stage has called us, and `ring` is there.
        ring: The link to the last stage.
    """

    number: int
    guard: Guard
    opened: trio.Event
    ring: Link | None = None


class PipelineTrainer:
    """Trains one model over stages; `run` does all of it.

    Args:
        node: We.
        config: The shape of the model.
        model_hash: `Model.content_hash` of the model to begin with.
        open_part: Reads our part of it.
        folder: Where states are kept, and a training that was interrupted goes on.
        batches_at: The micro-batches of a step, counted from 0; always as many, and the same ones
            whenever a step is made again.
        validation_at: Micro-batches that are not learned from, and whose loss is wanted when so
            many steps are made; none for no validation. Their shapes should be those of steps,
            since graphs are made for each.
        optimizer: Hyperparameters of AdamW.
        rate_at: Learning rate of a step, counted from 0.
        settings: How it goes over the stages.
        compute: Where to compute; a thread.
        tell: Told in words, for the user, whenever something changes.
        after_step: Told of each step.

    Attributes:
        step: Steps made.
        kept_step: The step that would be gone back to.
        route: The stages that train now; empty before the first.
        failover_count: How often the training went back because a stage failed.
        redone_count: Steps that were made again for it.
        traffic: Bytes that this device has sent and received for it.
        is_doubtful: The latest validation loss has jumped. Until the next one no state is kept, so
            that one can go back to before it.

    Raises:
        ValueError: The model has one block, which stays here.
    """

    def __init__(
        self,
        node: Node,
        config: GPT2Config,
        model_hash: str,
        *,
        open_part: OpenPart,
        folder: Path,
        batches_at: Callable[[int], Sequence[Batch]],
        validation_at: Callable[[int], Sequence[Batch]] = lambda _step: (),
        optimizer: AdamWSettings,
        rate_at: Callable[[int], float],
        settings: PipelineSettings,
        compute: Compute = in_thread,
        tell: Callable[[str], None] = lambda _words: None,
        after_step: Callable[[StepReport], None] = lambda _report: None,
    ) -> None:
        if config.n_layer < 2:
            raise ValueError("the model has one block, which stays on this device")
        self.step = self.kept_step = 0
        self.route: tuple[StageOffer, ...] = ()
        self.failover_count = self.redone_count = 0
        self.traffic = Traffic()
        self.is_doubtful = False
        self.snapshots = Snapshots(folder, config, compute, self.traffic)
        self._node = node
        self._config = config
        self._model_hash = model_hash
        self._open_part = open_part
        self._folder = folder
        self._batches_at = batches_at
        self._validation_at = validation_at
        self._optimizer = optimizer
        self._rate_at = rate_at
        self._settings = settings
        self._compute = compute
        self._tell = tell
        self._after_step = after_step
        self._blocks = range(config.n_layer - 1, config.n_layer)
        self._run = secrets.token_bytes(16)
        self._digests: Mapping[str, str] = {}  # by block, of the step kept
        self._part: ModelPart | None = None
        self._attempt: _Attempt | None = None
        self._attempt_count = 0
        self._is_stopping = False
        self._jumps = JumpWatch()
        self._highest_step = 0
        self._longest_s = 0.0

    def stop(self) -> None:
        """Let `run` end after the step under way, with its state kept."""
        self._is_stopping = True

    async def run(self, until: int | None = None) -> None:
        """Train until so many steps are made, or `stop`; the last state is kept if not doubtful.

        Raises:
            NoRoute: Too few devices offer to train the model, for `replica_s`.
            HopFailed: Stages failed again and again.
            LearningFailed: The loss or the gradient is not finite; or what was kept is damaged.
            OSError: Our own states can't be written.
        """
        self._node.serve_calls(PIPELINE, self._serve_ring)
        self._node.serve_calls(STATE, self._serve_state)
        manifest = Manifest.load(self._folder, self._model_hash)
        if manifest is not None:
            self._run, self.kept_step = manifest.run, manifest.step
            self._digests = manifest.digests
            self._tell(f"going on from step {self.kept_step}")
        await self._go_back()
        search = StageSearch(self._node, self._model_hash, self._blocks.start)
        failures = 0
        while not self._is_done(until):
            route = await search.wait_route(
                self.route,
                stage_count=self._settings.stage_count,
                patience_s=self._settings.replica_s,
                is_over=lambda: self._is_stopping,
                tell=self._tell,
            )
            if not route:
                return
            self.route = route
            try:
                await self._assign()
                await self._train(until)
            except HopFailed as failure:
                failures = 1 if self.step > self._highest_step else failures + 1
                self._highest_step = max(self._highest_step, self.step)
                if failures > FAILURES_MAX:
                    raise
                search.shun(failure, route)
                self.failover_count += 1
                self.redone_count += self.step - self.kept_step
                self._tell(f"{failure}; going on from step {self.kept_step}")
                await self._go_back()
        with suppress(HopFailed):  # who can't be told finds out by itself
            await self._ask_all(lambda _offer: Release(self._run), RELEASE_TIMEOUT_S)

    def _is_done(self, until: int | None) -> bool:
        return self._is_stopping or (until is not None and self.step >= until)

    # --- Where the training stands --------------------------------------------------------------

    async def _go_back(self) -> None:
        """Take our own part back to the step kept."""
        # What was kept after it, of which not all came, must not push out what counts.
        await self._compute(self.snapshots.forget_others, self.kept_step)
        if self._part is None or not self.kept_step:
            self._part = None  # its memory first
            self._part = await self._compute(self._open_part, self._blocks, self._optimizer)
        if self.kept_step:
            units = units_of(self._config, self._blocks)
            states = await self.snapshots.load(units, self.kept_step)
            await self._compute(self._part.restore, states)
        self.step = self.kept_step
        self.is_doubtful = False

    async def _keep(self, worker: EndsWorker) -> None:
        """Let all keep the state of this step, each on its disk.

        Raises:
            HopFailed: A stage did not.
            OSError: We could not.
        """
        assert self._part is not None, "made before the first step"
        await worker.wait_applied()
        await self._ask_all(lambda _offer: Keep(self._run, self.step), KEEP_TIMEOUT_S)
        await self.snapshots.keep(self._part)

    async def _collect(self, step: int) -> None:
        """Fetch what the stages have kept, and make it the step to go back to.

        Raises:
            HopFailed: A stage did not give it.
            OSError: We could not write it.
        """
        digests = {}
        for offer in self.route:
            try:
                peer = await self._node.connect(offer.peer_id)
                for block in offer.blocks:
                    await self.snapshots.fetch(peer, self._run, block, step)
                    digests[str(block)] = self.snapshots.digest(block, step) or ""
            except NatswarmError as error:
                raise HopFailed(offer, str(error)) from error
        manifest = Manifest(self._run, self._model_hash, step, digests)
        await self._compute(manifest.save, self._folder)
        self.kept_step, self._digests = step, digests
        await self._compute(self.snapshots.forget_others, step)

    async def _serve_state(self, call: Call[StatePiece, FetchState]) -> None:
        request, _ = await call.receive()
        if request.run != self._run or call.peer.peer_id not in [
            offer.peer_id for offer in self.route
        ]:
            raise RequestRefused("leads another training", "unknown")
        await self.snapshots.serve(call, request)

    # --- The way through the stages -------------------------------------------------------------

    async def _assign(self) -> None:
        """Let all stages hold their blocks as of the step kept.

        Raises:
            HopFailed: One can't.
        """

        def assign(offer: StageOffer) -> Assign:
            digests = [self._digests[str(block)] for block in offer.blocks if self.kept_step]
            return Assign(
                self._run,
                self._model_hash,
                offer.first,
                offer.last,
                self.kept_step,
                tuple(digests),
                WireOptimizer.of(self._optimizer),
            )

        await self._ask_all(assign, ASSIGN_TIMEOUT_S)

    async def _train(self, until: int | None) -> None:
        """Open the way and train until done.

        Raises:
            HopFailed: A stage failed.
        """
        first = self.route[0]
        own = StageOffer(self._blocks[0], self._blocks[-1], self._node.peer_id)
        self._attempt_count += 1
        guard = Guard()
        self._attempt = attempt = _Attempt(self._attempt_count, guard, trio.Event())
        batches = self._batches_at(self.step)
        rows_bytes = 4 * self._config.n_embd * max(tokens.size for tokens, _ in batches)
        if rows_bytes > ROWS_BYTES_MAX:
            raise LearningFailed(
                f"a micro-batch takes {rows_bytes / 2**20:.0f} MiB on its way, and at most "
                f"{ROWS_BYTES_MAX / 2**20:.0f} MiB are sent at once. Take more parts of fewer, or "
                "shorter, windows (--parts, --batch, --window)"
            )
        request = OpenPipeline(
            run=self._run,
            attempt=attempt.number,
            route=tuple(offer.hop for offer in (*self.route, own)),
            stage=0,
            micro_batch_count=len(batches),
            codec=self._settings.codec,
            budget_s=self._settings.open_s,
        )
        try:
            peer = await self._node.connect(first.peer_id)
            async with peer.start_call(PIPELINE, request, patience_s=PATIENCE_S) as call:
                with trio.fail_after(self._settings.open_s):
                    await receive_opened(call, first)
                    await attempt.opened.wait()
                assert attempt.ring is not None, "there once it is open"
                assert self._part is not None, "made before the first step"
                link = Link(call, first, len(request.route) + 1, self.traffic)
                worker = EndsWorker(
                    self._part,
                    self._config,
                    self.route,
                    first=link,
                    ring=attempt.ring,
                    guard=guard,
                    codec=self._settings.codec,
                    compute=self._compute,
                )
                watch = SilenceWatch(self._node, self.route, worker, lambda: self._longest_s)
                await guard.run(partial(self._steps, worker, until), link.run, watch.run)
        except trio.TooSlowError as error:
            raise HopFailed(first, "did not open the way in time") from error
        except NatswarmError as error:
            raise HopFailed(first, str(error)) from error
        finally:
            self._attempt = None

    async def _serve_ring(self, call: Call[Message, Message]) -> None:
        """Take the call of the last stage, and keep it until it ends."""
        request, _ = await call.receive()
        attempt, last = self._attempt, self.route[-1] if self.route else None
        if (
            attempt is None
            or attempt.ring is not None
            or last is None
            or not isinstance(request, OpenPipeline)
            or (request.run, request.attempt) != (self._run, attempt.number)
            or call.peer.peer_id != last.peer_id
        ):
            raise RequestRefused("leads another training", "unknown")
        await call.send(Opened())
        attempt.ring = Link(call, last, len(self.route) + 2, self.traffic)
        attempt.opened.set()
        try:
            await attempt.ring.run(attempt.guard.fail)
        finally:
            attempt.guard.fail(HopFailed(last, "has left"))

    async def _ask_all(self, request_to: Callable[[StageOffer], Message], timeout_s: float) -> None:
        """Ask all stages for something at once.

        Raises:
            HopFailed: One did not do it.
        """
        failures: list[HopFailed] = []

        async def ask(offer: StageOffer) -> None:
            try:
                peer = await self._node.connect(offer.peer_id)
                await peer.call(
                    STAGE, request_to(offer), timeout_s=timeout_s, patience_s=PATIENCE_S
                )
            except NatswarmError as error:
                failures.append(HopFailed(offer, str(error)))

        async with trio.open_nursery() as nursery:
            for offer in self.route:
                nursery.start_soon(ask, offer)
        if failures:
            raise failures[0]

    async def _steps(self, worker: EndsWorker, until: int | None) -> None:
        """Make steps, and keep what they lead to, until done."""
        every = self._settings.keep_every
        due_at = (self.step // every + 1) * every
        collected = trio.Event()
        collected.set()

        async def collect(step: int, done: trio.Event) -> None:
            try:
                await self._collect(step)
            except (HopFailed, OSError) as error:
                self._tell(f"step {step} could not be kept: {error}")
            finally:
                done.set()

        async with open_quiet_nursery() as nursery:
            while not self._is_done(until):
                started_at = trio.current_time()
                loss, norm = await worker.make_step(
                    self._batches_at(self.step), self._rate_at(self.step)
                )
                seconds = trio.current_time() - started_at
                self.step += 1
                self._longest_s = max(self._longest_s, seconds)
                validation_loss = await self._validate(worker)
                self._after_step(StepReport(self.step, loss, norm, seconds, validation_loss))
                if self.step >= due_at and collected.is_set() and not self.is_doubtful:
                    due_at = (self.step // every + 1) * every
                    await self._keep(worker)
                    collected = trio.Event()
                    nursery.start_soon(collect, self.step, collected)
            await collected.wait()
        if self.kept_step != self.step and not self.is_doubtful:
            await self._keep(worker)
            await self._collect(self.step)

    async def _validate(self, worker: EndsWorker) -> float | None:
        """Return the loss of what is to be validated with now, if anything is."""
        batches = self._validation_at(self.step)
        if not batches:
            return None
        loss = await worker.validate(batches)
        self.is_doubtful = self._jumps.is_jump(self.step, loss)
        if self.is_doubtful:
            self._tell(
                f"the loss on text not learned from jumped to {loss:.4g} by step {self.step}: a "
                "device may compute wrong numbers, or the learning rate is too high. No state is "
                "kept before the next validation: stop until then to go on from the latest"
            )
        return loss
