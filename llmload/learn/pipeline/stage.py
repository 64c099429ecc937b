"""Lend this device to the training of a model that is too big for others: hold blocks of it.

One training at a time has the device: it says which blocks, as of which step; micro-batches then
come from the stage before and go to the one behind. What is asked to be kept lies on this device's
disk until another training comes; so a training that goes back by some steps need not send it.

Who leads a training decides what is computed here, within the room that was offered, and may have
the blocks. Whether its gradients make sense, a stage can't know.

This file does not know what is computed while a pipeline is open: see `worker.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import trio
from msgspec import structs

from llmload.config import GPT2Config
from llmload.errors import LlmloadError
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.pipeline.link import Guard, Link
from llmload.learn.pipeline.part import ModelPart
from llmload.learn.pipeline.protocol import (
    PIPELINE,
    STAGE,
    STATE,
    AskStage,
    Assign,
    Done,
    FetchState,
    Keep,
    Opened,
    OpenPipeline,
    Release,
    StageState,
    StatePiece,
    training_service,
)
from llmload.learn.pipeline.snapshots import Snapshots
from llmload.learn.pipeline.worker import StageWorker
from llmload.swarm.protocol import SessionFailed, printable_reason
from llmload.swarm.route import HopFailed, StageOffer
from llmload.swarm.stage_session import Compute, in_thread
from natswarm import Call, Message, NatswarmError, Node, Peer, PeerId, RequestRefused

__all__ = ["PATIENCE_S", "OpenPart", "TrainingStage", "receive_opened"]

# A training that was not heard of for so long has left.
IDLE_S = 300.0
# For what is being computed, when it is to be something else.
LOCK_TIMEOUT_S = 60.0
# Paths that are being renewed are gone for less, a peer that roams for five seconds.
PATIENCE_S = 10.0
# Each stage keeps a tenth of the time it was given: the innermost one runs out first.
BUDGET_SHARE_OF_NEXT = 0.9

# Makes the part with some blocks, as the model has them; blocking.
OpenPart: TypeAlias = Callable[[range, AdamWSettings], ModelPart]


@dataclass(eq=False, slots=True)
class _Run:
    """The training that has this device.

    Attributes:
        run: Its name.
        leader: Who leads it.
        snapshots: What was kept of it.
        part: The blocks; None before they are there.
        settings: With which they are trained.
        worker: What computes while a pipeline is open.
        heard_at: When it was last heard of, or its pipeline ended.
        scope: Ends the pipeline.
        lock: Of whoever works on the part.
    """

    run: bytes
    leader: PeerId
    snapshots: Snapshots
    heard_at: float
    part: ModelPart | None = None
    settings: AdamWSettings | None = None
    worker: StageWorker | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    lock: trio.Lock = field(default_factory=trio.Lock)


class TrainingStage:
    """Holds blocks for trainings that others lead.

    Args:
        node: Where they come from.
        config: The shape of the model.
        model_hash: `Model.content_hash` of the model that a training begins with.
        open_part: Reads blocks of it.
        folder: Where states are kept; of this stage alone.
        room: Blocks that there is memory for.
        compute: Where to compute; a thread.
        tell: Told in words, for the user, who has the device.
    """

    def __init__(
        self,
        node: Node,
        config: GPT2Config,
        model_hash: str,
        *,
        open_part: OpenPart,
        folder: Path,
        room: int,
        compute: Compute = in_thread,
        tell: Callable[[str], None] = lambda _words: None,
    ) -> None:
        self.service = training_service(model_hash)
        self._node = node
        self._config = config
        self._model_hash = model_hash
        self._open_part = open_part
        self._folder = folder
        self._room = room
        self._compute = compute
        self._tell = tell
        self._run: _Run | None = None

    def start(self) -> None:
        """Answer from now on, in tasks of the node."""
        self._node.answer(STAGE, self._answer)
        self._node.serve_calls(PIPELINE, self._serve)
        self._node.serve_calls(STATE, self._serve_state)

    # --- Control -------------------------------------------------------------------------------

    async def _answer(self, request: Message, peer: Peer) -> Message:
        match request:
            case AskStage():
                return self._state(peer)
            case Assign():
                await self._assign(request, peer)
            case Keep():
                await self._keep(self._known(request.run, peer), request.step)
            case Release():
                run = self._known(request.run, peer)
                run.scope.cancel()
                self._run = None
                self._tell("free")
        return Done()

    def _state(self, peer: Peer) -> StageState:
        worker = None if self._run is None else self._run.worker
        is_free = self._is_free_for(peer)
        if worker is None:
            return StageState(self._room, is_free, 0, 0, 0, 0)
        return StageState(
            self._room, is_free, worker.step_count, *worker.progress, worker.validated_count
        )

    def _is_free_for(self, peer: Peer) -> bool:
        run = self._run
        if run is None or run.leader == peer.peer_id:
            return True
        return run.worker is None and trio.current_time() > run.heard_at + IDLE_S

    def _known(self, run: bytes, peer: Peer) -> _Run:
        if self._run is None or (self._run.run, self._run.leader) != (run, peer.peer_id):
            raise RequestRefused("does not take part in this training", "unknown")
        self._run.heard_at = trio.current_time()
        return self._run

    async def _assign(self, request: Assign, peer: Peer) -> None:
        blocks, count = range(request.first, request.last + 1), self._config.n_layer
        if request.model_hash != self._model_hash:
            raise RequestRefused("has another model", "model")
        if not blocks or blocks.stop >= count:
            raise RequestRefused(f"trains blocks before the last of 0-{count - 1}", "blocks")
        if len(blocks) > self._room:
            raise RequestRefused(f"has room for {self._room} blocks, not {len(blocks)}", "room")
        if len(request.digests) != (len(blocks) if request.step else 0):
            raise RequestRefused("wants a digest for each block", "digests")
        if not self._is_free_for(peer):
            raise RequestRefused("is training for somebody else; try again later", "busy")
        run = await self._take(request.run, peer)
        run.scope.cancel()
        await _acquire(run.lock, LOCK_TIMEOUT_S)
        try:
            await self._load(run, request, blocks, peer)
        except (LlmloadError, OSError, ValueError) as error:
            raise RequestRefused(str(error), "failed") from error
        finally:
            run.heard_at = trio.current_time()
            run.lock.release()
        words = f"blocks {request.first}-{request.last} for {peer.peer_id.short}"
        self._tell(f"{words} from step {request.step} on")

    async def _take(self, name: bytes, peer: Peer) -> _Run:
        """Begin with a training, or go on with it."""
        if self._run is not None and self._run.run == name:
            self._run.leader = peer.peer_id
            return self._run
        if self._run is not None:
            self._run.scope.cancel()
        folder = self._folder / name.hex()
        snapshots = Snapshots(folder, self._config, self._compute)
        self._run = _Run(name, peer.peer_id, snapshots, trio.current_time())
        others = [each for each in self._folder.glob("*") if each != folder]
        for other in others:
            await self._compute(shutil.rmtree, other, True)
        return self._run

    async def _load(self, run: _Run, request: Assign, blocks: range, peer: Peer) -> None:
        settings = request.optimizer.settings
        is_ours = run.part is not None and (run.part.blocks, run.settings) == (blocks, settings)
        if not (is_ours and request.step):
            run.part = None  # its memory first
            run.part = await self._compute(self._open_part, blocks, settings)
            run.settings = settings
        if request.step:
            for block, digest in zip(blocks, request.digests, strict=True):
                await run.snapshots.fetch(peer, run.run, block, request.step, digest)
            states = await run.snapshots.load(blocks, request.step)
            assert run.part is not None, "opened above"
            await self._compute(run.part.restore, states)

    async def _keep(self, run: _Run, step: int) -> None:
        if run.part is None or run.part.step != step:
            raise RequestRefused(f"is not at step {step}", "step")
        try:
            await run.snapshots.keep(run.part)
        except OSError as error:
            raise RequestRefused(f"can't keep its blocks: {error}", "failed") from error

    async def _serve_state(self, call: Call[StatePiece, FetchState]) -> None:
        request, _ = await call.receive()
        await self._known(request.run, call.peer).snapshots.serve(call, request)

    # --- The pipeline --------------------------------------------------------------------------

    async def _serve(self, call: Call[Message, Message]) -> None:
        request, _ = await call.receive()
        run = self._run
        if not isinstance(request, OpenPipeline) or run is None or run.run != request.run:
            raise RequestRefused("does not take part in this training", "unknown")
        deadline = trio.current_time() + request.budget_s
        own = StageOffer.of_hop(request.route[0])
        run.scope.cancel()
        try:
            await _acquire(run.lock, request.budget_s)
            try:
                part = self._check(request, run, own)
                with trio.CancelScope() as run.scope:
                    await self._work(call, request, run, part, deadline)
            finally:
                run.worker = None
                run.heard_at = trio.current_time()
                run.lock.release()
        except HopFailed as failure:
            reason = printable_reason(failure.reason)
            await call.send(SessionFailed(failure.offer.hop, reason, failure.is_input))

    def _check(self, request: OpenPipeline, run: _Run, own: StageOffer) -> ModelPart:
        if run.part is None or own != StageOffer(
            run.part.blocks[0], run.part.blocks[-1], self._node.peer_id
        ):
            raise HopFailed(own, "holds other blocks")
        if len(request.route) < 2 or request.route[-1].peer != run.leader.key:
            raise HopFailed(own, "the way has to end where it began", is_input=True)
        run.part.forget_gradient()  # of a step that was not finished
        return run.part

    async def _work(
        self,
        call: Call[Message, Message],
        request: OpenPipeline,
        run: _Run,
        part: ModelPart,
        deadline: float,
    ) -> None:
        """Open the pipeline behind us, then compute until it ends.

        Raises:
            HopFailed: We or somebody behind us can't go on.
        """
        own, following = map(StageOffer.of_hop, request.route[:2])
        try:
            with trio.fail_after(_left_s(deadline)):
                peer = await self._node.connect(following.peer_id)
            left_s = _left_s(deadline)
            behind = structs.replace(
                request, route=request.route[1:], stage=request.stage + 1, budget_s=left_s
            )
            async with peer.start_call(PIPELINE, behind, patience_s=PATIENCE_S) as next_call:
                with trio.fail_after(left_s):
                    await receive_opened(next_call, following)
                await call.send(Opened())
                room = request.stage + len(request.route) + 1
                above, below = Link(call, own, room), Link(next_call, following, room)
                run.worker = StageWorker(part, self._config, request, above, below, self._compute)
                await Guard().run(run.worker.run, above.run, below.run)
        except trio.TooSlowError as error:
            raise HopFailed(following, "did not answer in time") from error
        except NatswarmError as error:
            raise HopFailed(following, f"can't be reached: {error}") from error


async def _acquire(lock: trio.Lock, timeout_s: float) -> None:
    """Take a lock of which whoever has it is told to let go.

    Raises:
        RequestRefused: A thread has not come back.
    """
    try:
        with trio.fail_after(timeout_s):
            await lock.acquire()
    except trio.TooSlowError:
        raise RequestRefused("still computes what nobody waits for any more", "busy") from None


def _left_s(deadline: float) -> float:
    return max(BUDGET_SHARE_OF_NEXT * (deadline - trio.current_time()), 1e-3)


async def receive_opened(call: Call[Message, Message], target: StageOffer) -> None:
    """Wait until the pipeline from `target` on is open.

    Raises:
        HopFailed: It, or somebody behind it, said no.
        NatswarmError: It was lost.
    """
    try:
        answer, _ = await call.receive()
    except trio.EndOfChannel:
        raise HopFailed(target, "ended the call unanswered") from None
    if isinstance(answer, SessionFailed):
        raise HopFailed.of_message(answer)
    if not isinstance(answer, Opened):
        raise HopFailed(target, "said something else than that it is open")
