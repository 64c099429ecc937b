"""Serve some blocks of a model to peers: take steps from the hop before, hand them to the next.

    upstream --Step--> [ cache | blocks in a thread ] --Step--> next stage
                                                      --Token-> client, from the last stage

A session belongs to the task that serves its stream, and lives exactly as long: when either end
closes, when nothing came for a while, or when something failed, the task ends, and with it the
stream to the next hop and the cache. What went wrong is told upwards, and by the last stage also to
the client at once.

A stage holds nothing that the client could not send again, so it may refuse whatever does not fit:
sessions beyond a number, and the caches of those that have been idle longest (`CachePool`).

Source: Petals (arXiv 2209.01188) for stages with caches; unlike there, activations go from stage to
stage, and not back to the client after each.
This file does not know how a route is chosen, nor what the client does with the tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import trio
from numpy.typing import NDArray

from llmload.engine.kv_cache import CachePool, KVCache, cache_bytes
from llmload.engine.sampler import SamplingParameters, sample
from llmload.engine.session import StageEngine
from llmload.errors import StageFailed
from llmload.swarm.protocol import (
    SESSION_PROTOCOL,
    STAGES_MAX,
    TOKENS_PROTOCOL,
    OpenSession,
    SessionFailed,
    SessionOpened,
    Step,
    Token,
    TokensOf,
    pack_hidden,
    printable_reason,
    unpack_hidden_untrusted,
    unpack_token_ids_untrusted,
)
from llmload.swarm.route import StageOffer, stage_service
from natswarm import (
    DecodeError,
    MessageStream,
    NatswarmError,
    Node,
    Peer,
    PeerId,
    Refusal,
    RequestRefused,
    Stream,
)

__all__ = ["StageLimits", "StageServer", "StageStatistics"]

# Who opens a stream has its first message ready; two round trips over a slow radio link are 2 s.
FIRST_MESSAGE_TIMEOUT_S = 15.0
# Each hop keeps a tenth of the time it was given: the innermost one runs out first, so the client
# hears which stage did not answer, and not just that none did.
BUDGET_SHARE_OF_NEXT = 0.9
# When a send fails, the reason may already be on its way towards us on the same stream.
REASON_GRACE_S = 2.0
# Telling why a session failed is a courtesy; a peer that does not read must not keep its task.
REPORT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """What a stage gives to strangers.

    Attributes:
        session_count_max: Sessions at once; more are refused.
        cache_bytes_max: Keys and values of all of them; the cache that was idle longest goes.
        idle_timeout_s: A session without a step for so long is ended.
        send_timeout_s: How long the next hop may take to accept a step.
        steps_at_once: Steps computed at the same time, each with the engine's number of threads.
    """

    session_count_max: int = 32
    cache_bytes_max: int = 512 * 2**20
    idle_timeout_s: float = 120.0
    send_timeout_s: float = 30.0
    steps_at_once: int = 1


@dataclass(slots=True)
class StageStatistics:
    """What a stage has done since it started."""

    opened_session_count: int = 0
    refused_session_count: int = 0
    failed_session_count: int = 0
    step_count: int = 0
    position_count: int = 0
    repeated_step_count: int = 0


@dataclass(slots=True)
class _Session:
    """One sequence that passes through this stage."""

    key: int
    request: OpenSession
    sampling: SamplingParameters
    upstream: MessageStream
    downstream: MessageStream
    next_step: int = 0
    position: int = 0


class StageServer:
    """Serves the blocks of one engine on one node.

    A node serves one stage: a second server would take over the streams of the first.

    Args:
        node: Where sessions come from and next hops are reached.
        engine: Computes; its blocks are the ones served.
        model_hash: `Model.content_hash` of the whole model.
        limits: What to give to strangers.
    """

    def __init__(
        self,
        node: Node,
        engine: StageEngine,
        model_hash: str,
        *,
        limits: StageLimits | None = None,
    ) -> None:
        self._node = node
        self._engine = engine
        self._config = engine.config
        self._model_hash = model_hash
        self._limits = limits or StageLimits()
        self._pool: CachePool[int] = CachePool(max_bytes=self._limits.cache_bytes_max)
        self._turn = trio.CapacityLimiter(self._limits.steps_at_once)
        # Our own keys: the ids of sessions are drawn by strangers, who may draw equal ones.
        self._keys = itertools.count()
        self._session_count = 0
        # The largest payload is a whole context at once: token ids, or hidden states.
        self._sent_bytes_max = self._config.n_ctx * self._config.n_embd * 4
        self._received_bytes_max = (
            self._config.n_ctx * 4 if engine.is_first else self._sent_bytes_max
        )
        self.offer = StageOffer(engine.blocks[0], engine.blocks[-1], node.peer_id)
        self.statistics = StageStatistics()

    @property
    def service(self) -> str:
        """The name to announce, so that clients find this stage."""
        return stage_service(self._model_hash, self._engine.blocks)

    @property
    def session_count(self) -> int:
        """Sessions that are open or being opened."""
        return self._session_count

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values held for all sessions."""
        return self._pool.byte_size

    def start(self) -> None:
        """Answer session streams from now on, in tasks of the node."""
        self._node.serve(SESSION_PROTOCOL, self.handle)

    async def handle(self, stream: Stream, peer: Peer) -> None:
        """Serve one session stream to its end; owns the stream.

        Returns when the session is over, however it ended: whatever the peer or the next hops do is
        told to the peer and counted. Cancelled, it frees everything as well; a computation that is
        under way in its thread is waited for, because it works on the cache.

        Raises:
            NatswarmError: The first message was none that could be answered.
            trio.BrokenResourceError: The peer was lost while the session was being opened.
        """
        async with MessageStream(stream, payload_bytes_max=self._received_bytes_max) as upstream:
            try:
                with trio.fail_after(FIRST_MESSAGE_TIMEOUT_S):
                    request, _ = await upstream.receive(OpenSession)
            except (trio.TooSlowError, trio.EndOfChannel):
                return  # a stream without a request: nothing to answer
            key = next(self._keys)
            self._session_count += 1
            try:
                await self._serve_session(key, upstream, request, peer)
            except RequestRefused as refusal:
                self.statistics.refused_session_count += 1
                await upstream.send(Refusal(printable_reason(str(refusal))))
            finally:
                self._session_count -= 1
                self._pool.close(key)

    # Opening a session ----------------------------------------------------------------------------

    async def _serve_session(
        self, key: int, upstream: MessageStream, request: OpenSession, peer: Peer
    ) -> None:
        """Open the rest of the chain, then answer steps until the session ends.

        Raises:
            RequestRefused: The session did not come about.
        """
        self._check_route(request, peer)
        sampling = self._check_request(request)
        self._pool.open(key, self._engine.new_cache())
        async with await self._open_downstream(request) as downstream:
            await upstream.send(SessionOpened())
            self.statistics.opened_session_count += 1
            session = _Session(key, request, sampling, upstream, downstream)
            failure = await self._run(session)
            if failure is not None:
                self.statistics.failed_session_count += 1
                await self._report(session, failure)

    def _check_route(self, request: OpenSession, peer: Peer) -> None:
        me, *rest = map(StageOffer.of_hop, request.route)
        if request.model_hash != self._model_hash:
            raise self._refusal(
                f"serves model {self._model_hash[:16]}, not {request.model_hash[:16]}"
            )
        if me != self.offer:
            raise self._refusal(f"is not {me}")
        ends = [offer.last + 1 for offer in (me, *rest)]
        starts = [offer.first for offer in rest]
        if [*starts, self._config.n_layer] != ends:
            raise self._refusal("the route behind it does not lead through the rest of the model")
        # Tokens go to the client on a connection that the last stage makes. Nobody may have one
        # made to a third party.
        if self._engine.is_first and request.client != peer.peer_id.key:
            raise self._refusal("a session may be opened by its client alone")

    def _check_request(self, request: OpenSession) -> SamplingParameters:
        limits, config = self._limits, self._config
        if self._session_count > limits.session_count_max:
            raise self._refusal(f"has {limits.session_count_max} sessions already; try again later")
        if request.position_count > config.n_ctx:
            raise self._refusal(
                f"can't hold {request.position_count} positions: the context is {config.n_ctx}"
            )
        if (
            cache_bytes(config, self._engine.blocks, 1, request.position_count)
            > limits.cache_bytes_max
        ):
            raise self._refusal(
                f"has not enough memory for {request.position_count} positions; ask for less"
            )
        try:
            return SamplingParameters(
                temperature=request.sampling.temperature,
                top_k=request.sampling.top_k,
                top_p=request.sampling.top_p,
                seed=request.sampling.seed,
            )
        except ValueError as error:
            raise self._refusal(str(error)) from error

    def _refusal(self, reason: str) -> RequestRefused:
        return RequestRefused(f"{self.offer}: {reason}")

    async def _open_downstream(self, request: OpenSession) -> MessageStream:
        """Open the stream to the next stage, or from the last stage to the client.

        Raises:
            RequestRefused: It, or a stage behind it, could not be reached or said no.
        """
        rest = request.route[1:]
        target = str(StageOffer.of_hop(rest[0])) if rest else "the client"
        budget_s = request.budget_s * BUDGET_SHARE_OF_NEXT
        try:
            with trio.fail_after(budget_s):
                deadline = trio.current_effective_deadline()
                peer = await self._node.connect(PeerId(rest[0].peer if rest else request.client))
                stream = await peer.open_stream(SESSION_PROTOCOL if rest else TOKENS_PROTOCOL)
                async with AsyncExitStack() as stack:
                    downstream = await stack.enter_async_context(
                        # Nothing but words comes back on it.
                        MessageStream(stream, payload_bytes_max=self._sent_bytes_max)
                    )
                    if rest:
                        left_s = max(deadline - trio.current_time(), 1e-3)
                        onward = msgspec.structs.replace(request, route=rest, budget_s=left_s)
                        await downstream.call(onward, SessionOpened)
                    else:
                        await downstream.send(TokensOf(request.session))
                    stack.pop_all()  # it stays open
                return downstream
        except trio.TooSlowError:
            raise self._refusal(f"{target} did not answer in {budget_s:.1f} s") from None
        except RequestRefused:
            raise  # says itself who refused, and why
        except (NatswarmError, trio.BrokenResourceError) as error:
            raise self._refusal(f"can't reach {target}: {error}") from error

    # Running a session ----------------------------------------------------------------------------

    async def _run(self, session: _Session) -> SessionFailed | None:
        """Return what went wrong, or None if the hop before has closed the session."""
        ends: list[SessionFailed | None] = []  # the first one decides
        async with trio.open_nursery() as nursery:

            async def until_over(
                part: Callable[[_Session], Awaitable[SessionFailed | None]],
            ) -> None:
                ends.append(await part(session))
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_over, self._answer_steps)
            nursery.start_soon(until_over, self._watch_downstream)
        return ends[0]

    async def _answer_steps(self, session: _Session) -> SessionFailed | None:
        idle_s = self._limits.idle_timeout_s
        while True:
            try:
                with trio.fail_after(idle_s):
                    step, payload = await session.upstream.receive(Step)
            except trio.TooSlowError:
                return self._failure(f"no step came for {idle_s:g} s, so the session was closed")
            except (trio.EndOfChannel, trio.BrokenResourceError):
                return None
            except NatswarmError as error:
                return self._failure(f"what came instead of a step was damaged: {error}")
            if step.step < session.next_step:
                self.statistics.repeated_step_count += 1
                continue
            received_at = trio.current_time()
            try:
                result = await self._compute(session, step, payload)
            except (DecodeError, StageFailed) as error:
                return self._failure(str(error))
            failure = await self._hand_on(session, step, result, received_at)
            if failure is not None:
                return failure

    async def _compute(
        self, session: _Session, step: Step, payload: bytes
    ) -> NDArray[np.float32] | int:
        """Return the hidden states float32 (1, row_count, n_embd), or the token if we are last.

        Raises:
            DecodeError: The step is not the one that is due, or its rows are bad.
            StageFailed: The cache is gone or has no room, or the runtime failed.
        """
        if (step.step, step.position) != (session.next_step, session.position):
            raise DecodeError(
                f"step {step.step} at position {step.position} came, "
                f"step {session.next_step} at position {session.position} was due"
            )
        end = step.position + step.row_count
        if end > session.request.position_count:
            raise DecodeError(
                f"a step to position {end} came, the session was opened for "
                f"{session.request.position_count}"
            )
        unpack = unpack_token_ids_untrusted if self._engine.is_first else unpack_hidden_untrusted
        rows = unpack(step, payload, self._config)
        async with self._turn:
            try:
                with self._pool.borrow(session.key, step.row_count) as cache:
                    result = await trio.to_thread.run_sync(
                        self._advance, rows, cache, session.sampling
                    )
            except KeyError:
                raise StageFailed(
                    "its memory of this sequence had to make room for others; start again"
                ) from None
        session.next_step += 1
        session.position = end
        self.statistics.step_count += 1
        self.statistics.position_count += step.row_count
        return result

    def _advance(
        self, rows: NDArray[Any], cache: KVCache, sampling: SamplingParameters
    ) -> NDArray[np.float32] | int:
        """Compute one step; runs in a thread, alone with its cache."""
        output = self._engine.run(rows, cache)
        if not self._engine.is_last:
            return output  # (1, row_count, n_embd)
        try:
            return sample(output[0, -1], sampling, cache.position)  # of (1, 1, vocab_size)
        except ValueError as error:
            raise StageFailed(f"no token can be chosen: {error}") from error

    async def _hand_on(
        self, session: _Session, step: Step, result: NDArray[np.float32] | int, received_at: float
    ) -> SessionFailed | None:
        """Send the result of a step to the next stage or the client; return what went wrong."""
        stage_s = (*step.stage_s, trio.current_time() - received_at)[-STAGES_MAX:]
        send_timeout_s = self._limits.send_timeout_s
        try:
            with trio.fail_after(send_timeout_s):
                if isinstance(result, int):
                    await session.downstream.send(
                        Token(
                            step=step.step,
                            position=session.position,
                            token_id=result,
                            stage_s=stage_s,
                        )
                    )
                else:
                    onward = Step(
                        step=step.step,
                        position=step.position,
                        row_count=step.row_count,
                        codec="float32",
                        stage_s=stage_s,
                    )
                    await session.downstream.send(onward, pack_hidden(result))
        except trio.TooSlowError:
            return self._downstream_failure(session, f"took nothing for {send_timeout_s:g} s")
        except trio.BrokenResourceError as error:
            # If the next hop said why before it closed, the watcher is about to read it.
            await trio.sleep(REASON_GRACE_S)
            return self._downstream_failure(session, f"the connection was lost ({error})")
        return None

    async def _watch_downstream(self, session: _Session) -> SessionFailed:
        """Wait for the next hop to fail or to go away."""
        try:
            failure, _ = await session.downstream.receive(SessionFailed)
        except trio.EndOfChannel:
            reason = "closed the session without a reason"
        except trio.BrokenResourceError as error:
            reason = f"the connection was lost ({error})"
        except NatswarmError as error:
            reason = f"sent something that was damaged: {error}"
        else:
            return msgspec.structs.replace(failure, reason=printable_reason(failure.reason))
        if self._engine.is_last:
            # A client that is done closes both its streams, and the longer way is through the
            # chain: not a failure if the end comes from there in a moment.
            await trio.sleep(REASON_GRACE_S)
        return self._downstream_failure(session, reason)

    def _failure(self, reason: str) -> SessionFailed:
        return SessionFailed(self.offer.hop, printable_reason(reason))

    def _downstream_failure(self, session: _Session, reason: str) -> SessionFailed:
        """Blame the next stage; the client is no stage, so losing it is our own failure."""
        rest = session.request.route[1:]
        if rest:
            return SessionFailed(rest[0], printable_reason(reason))
        return self._failure(f"the stream of tokens to the client: {reason}")

    async def _report(self, session: _Session, failure: SessionFailed) -> None:
        """Tell the hop before, and from the last stage the client, what went wrong."""
        hearers = [session.upstream]
        if self._engine.is_last:
            hearers.append(session.downstream)
        for hearer in hearers:
            with (
                trio.move_on_after(REPORT_TIMEOUT_S),
                suppress(trio.BrokenResourceError, trio.ClosedResourceError),
            ):
                await hearer.send(failure)
