"""A sequence that outlives the stages it is computed on.

Stages hold nothing but keys and values, and those follow from the tokens. So when a stage fails,
whichever and however many, the client opens another route and sends the tokens that it has; the
draws depend on seed and position alone, so the text is the same.

A stage that says nothing is not waited for: after three times what a step should take, another
route is asked as well, and the first answer counts. When no route is left, it waits for one.

This file does not know text, nor how routes are found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from llmload.errors import StageFailed
from llmload.swarm.beside import open_quiet_nursery
from llmload.swarm.directory import StageDirectory
from llmload.swarm.protocol import BUDGET_S_MAX
from llmload.swarm.route import HopFailed, NoRoute, StageOffer
from llmload.swarm.route_session import Drawn, RouteSession, SequenceTerms, TokenDesk
from natswarm import PeerId

__all__ = ["LivingSequence", "SwarmTimeouts"]

# A step is late after so many times what it should take (Petals hedges nothing; "The tail at
# scale", Dean and Barroso 2013, hedges at the 95th percentile), and not before a lost datagram or
# two have been sent again.
STALL_FACTOR = 3.0
STALL_S_MIN = 0.4
# A row of a prompt costs at most this share of a step of its own: the weights are read once.
PREFILL_SHARE = 0.25
# To open a route, over punctures that may have to be made.
OPENING_S = 2.0
# Routes tried side by side. Two stages that died at once may hold up two of them.
RACERS_MAX = 3
# How often we look for a route when there is none, and for better ones while all is well.
RETRY_S = 1.0
REFRESH_S = 15.0
# How much one step changes what we take for normal.
TRUST = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmTimeouts:
    """How long a client waits.

    Attributes:
        open_s: For all stages of a route to be connected and ready, at most 120.
        step_s: For one answer of a route. The first one includes computing the prompt.
        replica_s: For somebody to serve blocks that nobody serves any more; 0 gives up at once.
    """

    open_s: float = 60.0
    step_s: float = 60.0
    replica_s: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.open_s <= BUDGET_S_MAX or not self.step_s > 0 or not self.replica_s >= 0:
            raise ValueError(f"timeouts are positive, and open_s is at most {BUDGET_S_MAX:g}")


@dataclass(slots=True, eq=False)
class _Racer:
    """One route that is asked for the next tokens."""

    route: tuple[StageOffer, ...]
    session: RouteSession | None = None


class LivingSequence:
    """A sequence on whatever stages there are.

    Args:
        nursery: Runs its sessions; they end with `aclose`.
        desk: Opens them.
        directory: Knows routes.
        terms: What is computed.
        timeouts: How long to wait.
        tell: Told in words, for the user, whenever something changes.

    Attributes:
        route: The stages that gave the latest answer; empty before the first.
        failover_count: How often another route took over because a stage failed or was late.
        hedge_count: How often another route was asked because an answer was late.
        lost_s: Seconds that steps with a change of route took longer than others.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        desk: TokenDesk,
        directory: StageDirectory,
        terms: SequenceTerms,
        timeouts: SwarmTimeouts,
        tell: Callable[[str], None],
    ) -> None:
        self.route: tuple[StageOffer, ...] = ()
        self.failover_count = 0
        self.hedge_count = 0
        self.lost_s = 0.0
        self._nursery = nursery
        self._desk = desk
        self._directory = directory
        self._terms = terms
        self._timeouts = timeouts
        self._tell = tell
        self._session: RouteSession | None = None
        self._sessions: set[RouteSession] = set()
        self._step_s = 0.0  # of one token, as measured
        self._shunned: dict[PeerId, float] = {}  # until when
        self._want_refresh = trio.Event()

    async def open(self, route: Sequence[StageOffer] | None) -> None:
        """Open the first route, the one given or the quickest.

        Raises:
            NoRoute: There is no way through the model.
            StageFailed: A stage could not be reached or refused, and there is no other.
        """
        failure: HopFailed | None = None
        since = trio.current_time()
        while True:
            if route is None:
                route = await self._wait_route(failure, since)
            self._tell("opening " + " -> ".join(map(str, route)))
            try:
                self._session = await self._open(tuple(route))
            except HopFailed as error:
                self._shun(error, route)
                failure, route = error, None
            else:
                self.route = self._session.route
                self._nursery.start_soon(self._keep_looking)
                return

    async def advance(self, token_ids: Sequence[int], guesses: Sequence[int] = ()) -> Drawn:
        """Return the token after a sequence, and one after each guess; see `RouteSession.advance`.

        Raises:
            StageFailed: No route gave it, and none was left, for `replica_s`.
            NoRoute: The same, before any stage failed.
        """
        started_at = trio.current_time()
        racers: list[_Racer] = []
        failure: HopFailed | None = None
        outcomes_in, outcomes = trio.open_memory_channel[tuple[_Racer, Drawn | HopFailed]](
            RACERS_MAX
        )

        async def run(racer: _Racer) -> None:
            try:
                if racer.session is None:
                    racer.session = await self._open(racer.route)
                drawn = await racer.session.advance(
                    token_ids, guesses, timeout_s=self._timeouts.step_s
                )
                await outcomes_in.send((racer, drawn))
            except HopFailed as error:
                await outcomes_in.send((racer, error))

        if self._session is not None and not self._directory.is_trusted(self._session.route):
            self._drop(self._session)
        async with open_quiet_nursery() as racing:

            def start(racer: _Racer) -> None:
                racers.append(racer)
                racing.start_soon(run, racer)

            if self._session is not None:
                start(_Racer(self._session.route, self._session))
            while True:
                if not racers:
                    start(_Racer(await self._wait_route(failure, started_at)))
                outcome = None
                with trio.move_on_after(self._patience_s(racers[-1], token_ids, guesses)):
                    outcome = await outcomes.receive()
                if outcome is None:
                    self._want_refresh.set()
                    if (route := self._other_route(racers)) is not None:
                        self.hedge_count += 1
                        start(_Racer(route))
                    continue
                racer, result = outcome
                racers.remove(racer)
                if isinstance(result, Drawn):
                    break
                failure = result
                self._shun(failure, racer.route)
                self._want_refresh.set()
                self._drop(racer.session)
        for loser in racers:
            self._directory.doubt(set(loser.route) - set(racer.route))
            self._drop(loser.session)
        self._note(racer, trio.current_time() - started_at, is_short=len(guesses) == 0)
        return result

    async def aclose(self) -> None:
        """Close all sessions, so that the stages free their memory."""
        # Side by side: each forgets its tokens at once, also where we are cancelled.
        async with trio.open_nursery() as nursery:
            for session in self._sessions:
                nursery.start_soon(session.aclose)

    async def _open(self, route: tuple[StageOffer, ...]) -> RouteSession:
        session = await self._desk.open(
            self._nursery, route, self._terms, open_s=self._timeouts.open_s
        )
        self._sessions.add(session)
        return session

    def _shun(self, failure: HopFailed, route: Sequence[StageOffer]) -> None:
        """Leave a stage alone for a while, and the one before it where that may be the culprit."""
        self._tell(f"{failure}; going on elsewhere")
        blamed = [failure.offer]
        if failure.is_input and failure.offer in route[1:]:
            blamed.append(route[route.index(failure.offer) - 1])
        for offer in blamed:
            self._shunned[offer.peer_id] = self._directory.blame(offer.peer_id)

    def _without(self) -> list[PeerId]:
        now = trio.current_time()
        return [peer_id for peer_id, until in self._shunned.items() if until > now]

    def _drop(self, session: RouteSession | None) -> None:
        if session is not None:
            self._sessions.discard(session)
            self._nursery.start_soon(session.aclose)
            if session is self._session:
                self._session = None

    def _note(self, winner: _Racer, elapsed_s: float, *, is_short: bool) -> None:
        """Take in which route won, and how long it took."""
        self._directory.praise(winner.route)
        if winner.session is not self._session:
            self.failover_count += 1
            self.lost_s += max(elapsed_s - self._step_s, 0.0)
        elif is_short:
            known = TRUST if self._step_s else 1.0
            self._step_s += known * (elapsed_s - self._step_s)
        self._session = winner.session
        self.route = winner.route

    def _patience_s(self, racer: _Racer, token_ids: Sequence[int], guesses: Sequence[int]) -> float:
        """Return how long to wait for an answer before another route is asked as well."""
        rows, opening_s = len(token_ids) + len(guesses), OPENING_S
        if racer.session is not None:
            rows, opening_s = racer.session.missing_count(token_ids) + len(guesses), 0.0
        # The way is the same for one row and for many.
        expected_s = self._step_s or self._directory.step_s(racer.route)
        expected_s += (rows - 1) * PREFILL_SHARE * self._directory.compute_s(racer.route)
        return opening_s + max(STALL_FACTOR * expected_s, STALL_S_MIN)

    def _other_route(self, racers: Sequence[_Racer]) -> tuple[StageOffer, ...] | None:
        """Return a route that none of the racers takes, as different as it gets."""
        if len(racers) == RACERS_MAX:
            return None
        try:
            route = self._directory.route(
                without=self._without(),
                beside=[offer for racer in racers for offer in racer.route],
            )
        except NoRoute:
            return None
        return None if any(route == racer.route for racer in racers) else route

    async def _wait_route(
        self, failure: StageFailed | None, since: float
    ) -> tuple[StageOffer, ...]:
        """Wait until there is a way through the model.

        Raises:
            StageFailed: `failure`, if nobody came for too long.
            NoRoute: The same, if there was no failure.
        """
        is_fresh = False
        while True:
            try:
                return self._directory.route(without=self._without())
            except NoRoute as missing:
                if is_fresh and trio.current_time() >= since + self._timeouts.replica_s:
                    raise failure or missing from None
                if is_fresh:
                    self._tell(f"waiting: {missing}")
                    await trio.sleep(RETRY_S)
            await self._directory.refresh()
            is_fresh = True

    async def _keep_looking(self) -> None:
        """Keep what we know of the stages fresh, and connections to those we may need."""
        while True:
            await self._directory.warm_up()
            with trio.move_on_after(REFRESH_S):
                await self._want_refresh.wait()
                await trio.sleep(RETRY_S)  # at most so often
            self._want_refresh = trio.Event()
            await self._directory.refresh()
