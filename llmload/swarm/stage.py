"""Serve some blocks of a model to peers: open sessions or say why not, and tell how we are.

A stage holds nothing that the client could not send again, so it may refuse whatever does not fit:
sessions beyond a number, and the caches of those that have been idle longest (`CachePool`).

Source: Petals (arXiv 2209.01188) for stages with caches; unlike there, activations go from stage to
stage, and not back to the client after each.
This file does not know how a route is chosen, nor what a session does once it is open: see
`stage_session.py`.
"""

from __future__ import annotations

import itertools
from contextlib import AsyncExitStack

import msgspec
import trio

from llmload.engine.kv_cache import cache_bytes
from llmload.engine.sampler import SamplingParameters
from llmload.errors import CacheFull
from llmload.swarm.blocks import BlockStack
from llmload.swarm.directory import StageDirectory
from llmload.swarm.protocol import (
    DESCRIBE,
    LINKS_MAX,
    SESSION_PROTOCOL,
    TOKENS_PROTOCOL,
    DescribeStage,
    Link,
    OpenSession,
    SessionFailed,
    SessionOpened,
    StageDescription,
    TokensOf,
    printable_reason,
)
from llmload.swarm.route import HopFailed, StageOffer, stage_service
from llmload.swarm.stage_session import (
    Compute,
    StageLimits,
    StageSession,
    StageStatistics,
    Workshop,
    in_thread,
)
from natswarm import MessageStream, NatswarmError, Node, Peer, PeerId, Stream

__all__ = ["StageLimits", "StageServer", "StageStatistics"]

# Who opens a stream has its first message ready; two round trips over a slow radio link are 2 s.
FIRST_MESSAGE_TIMEOUT_S = 15.0
# Each hop keeps a tenth of the time it was given: the innermost one runs out first, so the client
# hears which stage did not answer, and not just that none did.
BUDGET_SHARE_OF_NEXT = 0.9
# How often new stages are looked for, to connect to them before they are needed.
LINKS_INTERVAL_S = 20.0
# Until the blocks were measured: that of a small device.
BLOCK_S = 0.005


class StageServer:
    """Serves blocks on one node.

    A node serves one stage: a second server would take over the streams of the first.

    Args:
        node: Where sessions come from and next hops are reached.
        stack: Computes; its blocks are the ones served.
        model_hash: `Model.content_hash` of the whole model.
        limits: What to give to strangers.
        block_s: Seconds that one position takes in one block, as `BlockStack.measure_block_s` says;
            corrected by what the sessions take.
        compute: Where to compute; a thread.
    """

    def __init__(
        self,
        node: Node,
        stack: BlockStack,
        model_hash: str,
        *,
        limits: StageLimits | None = None,
        block_s: float = BLOCK_S,
        compute: Compute = in_thread,
    ) -> None:
        self._node = node
        self._model_hash = model_hash
        self._shop = Workshop(stack, compute, limits or StageLimits(), block_s)
        self._keys = itertools.count()
        self._session_count = 0
        # Prefill sends the rows of a whole prompt at once; nothing else is as large.
        self._payload_bytes_max = 4 * stack.config.n_ctx * stack.config.n_embd
        self.offer = StageOffer(stack.blocks[0], stack.blocks[-1], node.peer_id)

    @property
    def service(self) -> str:
        """The name to announce, so that clients find this stage."""
        return stage_service(self._model_hash, self._shop.stack.blocks)

    @property
    def statistics(self) -> StageStatistics:
        """What was done so far."""
        return self._shop.statistics

    @property
    def session_count(self) -> int:
        """Sessions that are open or being opened."""
        return self._session_count

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values held for all sessions."""
        return self._shop.pool.byte_size

    def start(self) -> None:
        """Answer streams from now on, in tasks of the node."""
        self._node.serve(SESSION_PROTOCOL, self.handle)
        self._node.answer(DESCRIBE, self._describe)

    async def keep_links(self) -> None:
        """Keep connections to the other stages of the model, for ever.

        A session that has to go on elsewhere so finds its way open; to puncture takes seconds.
        """
        config = self._shop.stack.config
        directory = StageDirectory(self._node, self._model_hash, config.n_layer)
        while True:
            await directory.refresh()
            await directory.warm_up()
            await trio.sleep(LINKS_INTERVAL_S)

    def describe(self) -> StageDescription:
        """Return how this stage is."""
        shop, config = self._shop, self._shop.stack.config
        room_bytes = shop.limits.cache_bytes_max - shop.pool.byte_size
        links = [
            Link(peer.peer_id.key, rtt_s)
            for peer in self._node.peers()
            if peer.is_reachable and (rtt_s := peer.statistics().rtt_s) is not None
        ]
        return StageDescription(
            first=self.offer.first,
            last=self.offer.last,
            block_s=shop.block_s,
            waiting_s=shop.turns.waiting_count * shop.block_s * len(shop.stack.blocks),
            session_room=max(shop.limits.session_count_max - self._session_count, 0),
            position_room=max(room_bytes, 0) // cache_bytes(config, shop.stack.blocks, 1, 1),
            links=tuple(sorted(links, key=lambda link: link.rtt_s)[:LINKS_MAX]),
        )

    async def _describe(self, _request: DescribeStage, _peer: Peer) -> StageDescription:
        return self.describe()

    async def handle(self, stream: Stream, peer: Peer) -> None:
        """Serve one session stream to its end; owns the stream.

        Returns when the session is over, however it ended: whatever the peer or the next hops do is
        told to the peer and counted. Cancelled, it frees everything as well; a computation that is
        under way in its thread is waited for, because it works on the cache.

        Raises:
            NatswarmError: The first message was none that could be answered.
            trio.BrokenResourceError: The peer was lost while the session was being opened.
        """
        async with MessageStream(stream, payload_bytes_max=self._payload_bytes_max) as upstream:
            try:
                with trio.fail_after(FIRST_MESSAGE_TIMEOUT_S):
                    request, _ = await upstream.receive(OpenSession)
            except (trio.TooSlowError, trio.EndOfChannel):
                return  # a stream without a request: nothing to answer
            key = next(self._keys)
            self._session_count += 1
            try:
                await self._serve_session(key, upstream, request, peer)
            except HopFailed as refusal:
                self.statistics.refused_session_count += 1
                await upstream.send(
                    SessionFailed(refusal.offer.hop, printable_reason(refusal.reason))
                )
            finally:
                self._session_count -= 1
                self._shop.pool.close(key)

    async def _serve_session(
        self, key: int, upstream: MessageStream, request: OpenSession, peer: Peer
    ) -> None:
        """Open the rest of the chain, then answer steps until the session ends.

        Raises:
            HopFailed: The session did not come about.
        """
        self._check_route(request, peer)
        sampling = self._check_request(request)
        blocks = StageOffer.of_hop(request.route[0]).blocks
        try:
            self._shop.pool.open(key, self._shop.stack.new_cache(blocks))
        except CacheFull as error:
            raise self._refusal(str(error)) from error
        downstream, next_peer = await self._open_downstream(request)
        async with downstream:
            await upstream.send(SessionOpened())
            self.statistics.opened_session_count += 1
            session = StageSession(
                self._shop, key, request, sampling, upstream, downstream, next_peer
            )
            if await session.run() is not None:
                self.statistics.failed_session_count += 1

    def _check_route(self, request: OpenSession, peer: Peer) -> None:
        me, *rest = map(StageOffer.of_hop, request.route)
        if request.model_hash != self._model_hash:
            raise self._refusal(
                f"serves model {self._model_hash[:16]}, not {request.model_hash[:16]}"
            )
        if me.peer_id != self._node.peer_id or not self._shop.stack.holds(me.blocks):
            raise self._refusal(f"is not {me}")
        ends = [offer.last + 1 for offer in (me, *rest)]
        starts = [offer.first for offer in rest]
        if [*starts, self._shop.stack.config.n_layer] != ends:
            raise self._refusal("the route behind it does not lead through the rest of the model")
        # Tokens go to the client on a connection that the last stage makes. Nobody may have one
        # made to a third party.
        if me.first == 0 and request.client != peer.peer_id.key:
            raise self._refusal("a session may be opened by its client alone")

    def _check_request(self, request: OpenSession) -> SamplingParameters:
        limits, stack = self._shop.limits, self._shop.stack
        if self._session_count > limits.session_count_max:
            raise self._refusal(f"has {limits.session_count_max} sessions already; try again later")
        if request.position_count > stack.config.n_ctx:
            raise self._refusal(
                f"can't hold {request.position_count} positions: the context is "
                f"{stack.config.n_ctx}"
            )
        blocks = StageOffer.of_hop(request.route[0]).blocks
        if cache_bytes(stack.config, blocks, 1, request.position_count) > limits.cache_bytes_max:
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

    def _refusal(self, reason: str) -> HopFailed:
        return HopFailed(self.offer, reason)

    async def _open_downstream(self, request: OpenSession) -> tuple[MessageStream, Peer]:
        """Open the stream to the next stage, or from the last stage to the client.

        Raises:
            HopFailed: It, or a stage behind it, could not be reached or said no.
        """
        rest = request.route[1:]
        # Who cannot be reached is at fault; the client is no stage.
        target = StageOffer.of_hop(rest[0]) if rest else self.offer
        toward = "" if rest else "the client: "
        budget_s = request.budget_s * BUDGET_SHARE_OF_NEXT
        try:
            with trio.fail_after(budget_s):
                deadline = trio.current_effective_deadline()
                peer = await self._node.connect(PeerId(rest[0].peer if rest else request.client))
                stream = await peer.open_stream(SESSION_PROTOCOL if rest else TOKENS_PROTOCOL)
                async with AsyncExitStack() as stack:
                    downstream = await stack.enter_async_context(
                        # Nothing but words comes back on it.
                        MessageStream(stream, payload_bytes_max=self._payload_bytes_max)
                    )
                    if rest:
                        left_s = max(deadline - trio.current_time(), 1e-3)
                        await downstream.send(
                            msgspec.structs.replace(request, route=rest, budget_s=left_s)
                        )
                        await receive_opened(downstream, target)
                    else:
                        await downstream.send(TokensOf(request.session))
                    stack.pop_all()  # it stays open
                return downstream, peer
        except trio.TooSlowError:
            raise HopFailed(target, f"{toward}did not answer in {budget_s:.1f} s") from None
        except (NatswarmError, trio.BrokenResourceError) as error:
            raise HopFailed(target, f"{toward}can't be reached: {error}") from error


async def receive_opened(chain: MessageStream, target: StageOffer) -> None:
    """Wait until the chain of stages from `target` on is open.

    Raises:
        HopFailed: One of them said no, or closed the stream.
        NatswarmError: The answer was damaged.
        trio.BrokenResourceError: The connection was lost.
    """
    try:
        answer, _ = await chain.receive(SessionOpened, SessionFailed)
    except trio.EndOfChannel:
        raise HopFailed(target, "closed the stream unanswered") from None
    if isinstance(answer, SessionFailed):
        raise HopFailed.of_message(answer)
