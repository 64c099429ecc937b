"""One sequence that passes through a stage: take steps from the hop before, hand them to the next.

    upstream --Step--> [ cache | blocks in a thread ] --Step---> next stage
                                                      --Tokens-> client, from the last stage

A session belongs to the task that serves its stream, and lives exactly as long: when either end
closes, when nothing came for a while, or when something failed, the task ends, and with it the
stream to the next hop and the cache. What went wrong is told upwards, and by the last stage also to
the client at once.

This file does not know how a session is opened or refused: see `stage.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import trio
from numpy.typing import NDArray

from llmload.engine.kv_cache import CachePool
from llmload.engine.sampler import SamplingParameters, sample
from llmload.errors import CacheFull, StageFailed
from llmload.swarm.blocks import BatchItem, BlockStack, StackCache
from llmload.swarm.codec import choose_codec, encode_hidden
from llmload.swarm.protocol import (
    STAGES_MAX,
    OpenSession,
    SessionFailed,
    Step,
    Tokens,
    checksum,
    printable_reason,
    unpack_hidden_untrusted,
    unpack_token_ids_untrusted,
)
from llmload.swarm.receipt import take_receipt
from llmload.swarm.turns import BatchTurns
from natswarm import DecodeError, MessageStream, NatswarmError, Peer, PeerId

__all__ = ["StageLimits", "StageSession", "StageStatistics", "Workshop", "in_thread"]

# When a send fails, the reason may already be on its way towards us on the same stream.
REASON_GRACE_S = 2.0
# Telling why a session failed is a courtesy; a peer that does not read must not keep its task.
REPORT_TIMEOUT_S = 5.0
# A next hop without a path for so long is told of: the client may have a replica. Paths that are
# being renewed are gone for less, a peer that roams for five seconds.
UNREACHABLE_S = 1.0
# How much one step changes what we believe a block costs.
MEASURE_SHARE = 0.1
# Rows computed together. Enough for the weights to be read once for many; few enough that a token
# does not wait for several parts of prompts.
BATCH_ROWS_MAX = 128
# Steps of more rows are prefill, which costs less a row.
DECODE_ROWS_MAX = 2

T = TypeVar("T")


class Compute(Protocol):
    """Runs a blocking function without blocking the loop."""

    async def __call__(self, work: Callable[..., T], /, *arguments: Any) -> T:
        """Return what `work(*arguments)` returns."""


async def in_thread(work: Callable[..., T], /, *arguments: Any) -> T:
    """Compute in a thread of this process; not cancelled before it is done."""
    return await trio.to_thread.run_sync(work, *arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """What a stage gives to strangers.

    Attributes:
        session_count_max: Sessions at once; more are refused.
        cache_bytes_max: Keys and values of all of them; the cache that was idle longest goes.
        idle_timeout_s: A session without a step for so long is ended.
        send_timeout_s: How long the next hop may take to accept a step.
    """

    session_count_max: int = 32
    cache_bytes_max: int = 512 * 2**20
    idle_timeout_s: float = 120.0
    send_timeout_s: float = 30.0


@dataclass(slots=True)
class StageStatistics:
    """What a stage has done since it started."""

    opened_session_count: int = 0
    refused_session_count: int = 0
    failed_session_count: int = 0
    step_count: int = 0
    position_count: int = 0
    repeated_step_count: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class StepWork:
    """A step that is to be computed.

    Attributes:
        session: Whose.
        step: Its header.
        rows: Token ids (1, time), or hidden states (1, time, n_embd).
    """

    session: StageSession
    step: Step
    rows: NDArray[Any]

    def item(self, cache: StackCache) -> BatchItem:
        """Return the step on its cache, with what is beyond its beginning forgotten.

        Raises:
            DecodeError: The step begins beyond what is held.
        """
        if self.step.position > cache.position:
            raise DecodeError(
                f"a step at position {self.step.position} came, {cache.position} are held"
            )
        cache.truncate(self.step.position)
        # At least the last position's: also a part of a prompt leaves a receipt.
        return BatchItem(self.rows[0], cache, max(self.step.draw_count, 1))

    def result(self, output: NDArray[np.float32]) -> StepResult | StageFailed:
        """Return what the step has led to: at the model's end tokens are drawn."""
        step, session = self.step, self.session
        if not session.is_last:
            return StepResult(output)  # (row_count, n_embd)
        # of (draw_count, vocab_size): after the last rows, so the first token stands at
        first = step.position + step.row_count - step.draw_count + 1
        try:
            token_ids = tuple(
                sample(output[index], session.sampling, first + index)
                for index in range(step.draw_count)
            )
        except ValueError as error:
            return StageFailed(f"no token can be chosen: {error}")
        return StepResult(None, token_ids, session.receipt(step, output[-1]))


@dataclass(slots=True, eq=False)
class Workshop:
    """What all sessions of a stage share.

    Attributes:
        stack: The blocks.
        compute: Where they compute.
        limits: What strangers are given.
        block_s: Seconds that one position takes in one block; follows what is measured.
    """

    stack: BlockStack
    compute: Compute
    limits: StageLimits
    block_s: float
    statistics: StageStatistics = field(default_factory=StageStatistics)
    pool: CachePool[int, StackCache] = field(init=False)
    turns: BatchTurns[PeerId, StepWork, StepResult] = field(init=False)

    def __post_init__(self) -> None:
        self.pool = CachePool(max_bytes=self.limits.cache_bytes_max)
        self.turns = BatchTurns(self._compute_batch, rows_max=BATCH_ROWS_MAX)

    async def _compute_batch(self, works: Sequence[StepWork]) -> list[StepResult | Exception]:
        """Return what each step has led to, or what is wrong with it alone."""
        outcomes: dict[StepWork, StepResult | Exception] = {}
        items: dict[StepWork, BatchItem] = {}
        with ExitStack() as borrowed:
            for work in works:
                try:
                    lent = self.pool.borrow(work.session.key, work.step.row_count)
                    items[work] = work.item(borrowed.enter_context(lent))
                except KeyError:
                    outcomes[work] = StageFailed(
                        "its memory of this sequence had to make room for others; start again"
                    )
                except (CacheFull, DecodeError) as error:
                    outcomes[work] = error
            started_at = trio.current_time()
            try:
                results = await self.compute(self._advance, items)
            except StageFailed as error:
                outcomes.update(dict.fromkeys(items, error))
            else:
                outcomes.update(results)
                self._measure(list(items.values()), trio.current_time() - started_at)
        return [outcomes[work] for work in works]

    def _advance(
        self, items: Mapping[StepWork, BatchItem]
    ) -> dict[StepWork, StepResult | Exception]:
        """Compute a batch; runs in a thread, alone with the caches."""
        outputs = self.stack.run_batch(list(items.values()))
        return {work: work.result(output) for work, output in zip(items, outputs, strict=True)}

    def _measure(self, items: Sequence[BatchItem], elapsed_s: float) -> None:
        if len(items) == 1:
            ((x, cache, _),) = items
            if len(x) <= DECODE_ROWS_MAX:
                block_s = elapsed_s / (len(x) * len(cache.blocks))
                self.block_s += MEASURE_SHARE * (block_s - self.block_s)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has led to: hidden states (row_count, n_embd), or tokens and a receipt."""

    hidden: NDArray[np.float32] | None
    token_ids: tuple[int, ...] = ()
    receipt: bytes = b""


@dataclass(slots=True, eq=False)
class StageSession:
    """A session that is open in both directions.

    Attributes:
        workshop: What it shares with the others of the stage.
        key: Of its cache in the pool.
        request: What was asked for; its first hop is us.
        sampling: How tokens are chosen, if we are last.
        upstream: From the hop before, which is the client or a stage.
        downstream: To the next stage, or to the client.
        peer: At the other end of `downstream`.
    """

    workshop: Workshop
    key: int
    request: OpenSession
    sampling: SamplingParameters
    upstream: MessageStream
    downstream: MessageStream
    peer: Peer
    _next_step: int = 0

    async def run(self) -> SessionFailed | None:
        """Answer steps until the hop before closes the session, or something goes wrong.

        What went wrong is returned, after the peers were told.
        """
        ends: list[SessionFailed | None] = []  # the first one decides
        async with trio.open_nursery() as nursery:

            async def until_over(part: Callable[[], Awaitable[SessionFailed | None]]) -> None:
                ends.append(await part())
                nursery.cancel_scope.cancel()

            for part in (self._answer_steps, self._watch_downstream, self._watch_reachable):
                nursery.start_soon(until_over, part)
        if (failure := ends[0]) is not None:
            await self._report(failure)
        return failure

    @property
    def _is_first(self) -> bool:
        return self.request.route[0].first == 0

    @property
    def is_last(self) -> bool:
        """Whether the model ends here, and tokens are drawn."""
        return len(self.request.route) == 1

    # Steps ----------------------------------------------------------------------------------------

    async def _answer_steps(self) -> SessionFailed | None:
        idle_s = self.workshop.limits.idle_timeout_s
        while True:
            try:
                with trio.fail_after(idle_s):
                    step, payload = await self.upstream.receive(Step)
            except trio.TooSlowError:
                return self._failure(f"no step came for {idle_s:g} s, so the session was closed")
            except (trio.EndOfChannel, trio.BrokenResourceError):
                return None
            except NatswarmError as error:
                return self._failure(f"what came instead of a step was damaged: {error}", True)
            if step.step < self._next_step:
                self.workshop.statistics.repeated_step_count += 1
                continue
            received_at = trio.current_time()
            try:
                rows = self._unpack(step, payload)
                result = await self._compute(step, rows)
            except DecodeError as error:
                return self._failure(str(error), True)
            except StageFailed as error:
                return self._failure(str(error))
            receipts = step.receipts
            if not self._is_first:
                receipts += (self.receipt(step, rows[0, -1]),)
            failure = await self._hand_on(step, result, receipts, received_at)
            if failure is not None:
                return failure

    def _unpack(self, step: Step, payload: bytes) -> NDArray[Any]:
        """Return the rows of a step: token ids (1, time), or hidden states (1, time, n_embd).

        Raises:
            DecodeError: The step is not the one that is due, or its rows are bad.
        """
        if step.step != self._next_step:
            raise DecodeError(f"step {step.step} came, step {self._next_step} was due")
        if step.position + step.row_count > self.request.position_count:
            raise DecodeError(
                f"a step to position {step.position + step.row_count} came, the session was "
                f"opened for {self.request.position_count}"
            )
        if step.draw_count > step.row_count:
            raise DecodeError(f"{step.draw_count} tokens were asked for {step.row_count} rows")
        unpack = unpack_token_ids_untrusted if self._is_first else unpack_hidden_untrusted
        return unpack(step, payload, self.workshop.stack.config)

    async def _compute(self, step: Step, rows: NDArray[Any]) -> StepResult:
        """Advance the sequence by a step.

        Raises:
            DecodeError: The step begins beyond what is held.
            StageFailed: The cache is gone or has no room, or the runtime failed.
        """
        shop = self.workshop
        work = StepWork(self, step, rows)
        result = await shop.turns.run(PeerId(self.request.client), work, step.row_count)
        self._next_step += 1
        shop.statistics.step_count += 1
        shop.statistics.position_count += step.row_count
        return result

    def receipt(self, step: Step, row: NDArray[np.float32]) -> bytes:
        """Return the note on a row that the step came with, or led to."""
        return take_receipt(row, self.request.receipt_seed, step.position + step.row_count - 1)

    async def _hand_on(
        self, step: Step, result: StepResult, receipts: tuple[bytes, ...], received_at: float
    ) -> SessionFailed | None:
        """Send the result of a step to the next stage or the client; return what went wrong."""
        stage_s = (*step.stage_s, trio.current_time() - received_at)[-STAGES_MAX:]
        onward: Step | Tokens
        payload: bytes | memoryview = b""
        if result.hidden is None:
            onward = Tokens(step.step, result.token_ids, stage_s, (*receipts, result.receipt))
        else:
            codec = choose_codec(self.request.codec, self.peer.statistics().rtt_s)
            codec, payload = encode_hidden(result.hidden, codec)
            onward = msgspec.structs.replace(
                step, codec=codec, checksum=checksum(payload), stage_s=stage_s, receipts=receipts
            )
        send_timeout_s = self.workshop.limits.send_timeout_s
        try:
            with trio.fail_after(send_timeout_s):
                await self.downstream.send(onward, payload)
        except trio.TooSlowError:
            return self._downstream_failure(f"took nothing for {send_timeout_s:g} s")
        except trio.BrokenResourceError as error:
            # If the next hop said why before it closed, the watcher is about to read it.
            await trio.sleep(REASON_GRACE_S)
            return self._downstream_failure(f"the connection was lost ({error})")
        return None

    # Failures -------------------------------------------------------------------------------------

    async def _watch_downstream(self) -> SessionFailed:
        """Wait for the next hop to fail or to go away."""
        try:
            failure, _ = await self.downstream.receive(SessionFailed)
        except trio.EndOfChannel:
            reason = "closed the session without a reason"
        except trio.BrokenResourceError as error:
            reason = f"the connection was lost ({error})"
        except NatswarmError as error:
            reason = f"sent something that was damaged: {error}"
        else:
            return msgspec.structs.replace(failure, reason=printable_reason(failure.reason))
        if self.is_last:
            # A client that is done closes both its streams, and the longer way is through the
            # chain: not a failure if the end comes from there in a moment.
            await trio.sleep(REASON_GRACE_S)
        return self._downstream_failure(reason)

    async def _watch_reachable(self) -> SessionFailed:
        """Wait until no path leads to the next hop for a while; its connection lives on."""
        while True:
            await trio.sleep(UNREACHABLE_S / 2)
            if not self.peer.is_reachable:
                await trio.sleep(UNREACHABLE_S)
                if not self.peer.is_reachable:
                    return self._downstream_failure("no path leads to it any more")

    def _failure(self, reason: str, is_input: bool = False) -> SessionFailed:
        return SessionFailed(self.request.route[0], printable_reason(reason), is_input)

    def _downstream_failure(self, reason: str) -> SessionFailed:
        """Blame the next stage; the client is no stage, so losing it is our own failure."""
        rest = self.request.route[1:]
        if rest:
            return SessionFailed(rest[0], printable_reason(reason))
        return self._failure(f"the stream of tokens to the client: {reason}")

    async def _report(self, failure: SessionFailed) -> None:
        """Tell the hop before, and from the last stage the client, what went wrong."""
        hearers = [self.upstream]
        if self.is_last:
            hearers.append(self.downstream)
        for hearer in hearers:
            with (
                trio.move_on_after(REPORT_TIMEOUT_S),
                suppress(trio.BrokenResourceError, trio.ClosedResourceError),
            ):
                await hearer.send(failure)
