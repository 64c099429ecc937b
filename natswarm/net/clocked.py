"""Keep appointments with a peer: at each, bind the port agreed on and puncture.

When, where and under which name is `discovery/rendezvous.py`'s affair. Here a plan that only waits
is stretched over its slot, so that the peer's clock may be wrong; and the time between slots is
used to look for a peer whose clock is, where both send bursts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import trio

from natswarm.address import Endpoint
from natswarm.discovery.rendezvous import MeetingClock, profiles_at
from natswarm.errors import ConfigurationError, ConnectFailed, PunctureFailed
from natswarm.identity import PeerId
from natswarm.nat.profile import NatProfile
from natswarm.net.dialler import Dial, Dialler
from natswarm.net.peer import Peer
from natswarm.net.port import Network
from natswarm.puncture.plan import Plan, Strategy

__all__ = ["ClockedMeeting"]

# What is left of a slot after the last attempt in it: time to close, and to bind the next port.
SLOT_REST_S = 4.0
TOGETHER = (Strategy.TWO_SIDED_BIRTHDAY, Strategy.SEQUENTIAL_PREDICTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockedMeeting:
    """A wish to meet one peer by the clock.

    Attributes:
        peer_id: Whom.
        clock: When and where.
        mine: What the peer knows of our NAT.
        theirs: What we know of its.
        utc: The clock on the wall.
        patience_s: After this the wish is given up.
    """

    peer_id: PeerId
    clock: MeetingClock
    mine: NatProfile
    theirs: NatProfile
    utc: Callable[[], float]
    patience_s: float

    async def keep(
        self,
        dialler: Dialler,
        network: Network,
        bind_ip: str,
        *,
        plan: Callable[[NatProfile, NatProfile], Plan],
        run: Callable[[Dial], Awaitable[Peer]],
        living: Callable[[], Peer | None],
    ) -> Peer:
        """Go from one appointment to the next until the peer is there.

        Args:
            dialler: Carries out the dials.
            network: Where ports come from.
            bind_ip: The address they are bound to.
            plan: Plans our side, from our profile and the peer's.
            run: Carries out a dial, and takes the connection.
            living: The connection to the peer, if it has come by another way.

        Raises:
            PunctureFailed: These NATs can't be opened by what is known of them, or nobody came.
        """
        give_up_at = trio.current_time() + self.patience_s
        plan(*profiles_at(self.mine, self.theirs, 1, 1))  # what cannot open fails at once
        seek_s, count, failure = 0.0, 0, ""
        while True:
            if (peer := living()) is not None:
                return peer
            now_s = self.utc()
            appointment = self.clock.next(now_s, seek_s=seek_s)
            starts_at = trio.current_time() + appointment.starts_at_s - now_s
            if starts_at > give_up_at:
                raise PunctureFailed(
                    f"{self.peer_id.short} came to none of {count} appointments in "
                    f"{self.patience_s:.0f} s ({failure or 'none was due'}); both sides must ask "
                    "for it at the same time, their clocks be right, and their networks the same "
                    "as when they met"
                )
            await trio.sleep_until(starts_at)
            count += 1
            ports = appointment.my_port, appointment.their_port
            half = plan(*profiles_at(self.mine, self.theirs, *ports))
            is_together = any(step.strategy in TOGETHER for step in half.steps)
            seek_s = half.total_duration_s + SLOT_REST_S if is_together else 0.0
            slot_left_s = appointment.slot_ends_at_s - appointment.starts_at_s - SLOT_REST_S
            try:
                home = dialler.open_home(network.bind(Endpoint(bind_ip, appointment.my_port)))
            except ConfigurationError as error:  # taken: the next epoch names another
                failure = str(error)
                await trio.sleep(1)
                continue
            with contextlib.ExitStack() as unless_dialled:
                unless_dialled.callback(home.port.close)
                dial = dialler.prepare(
                    self.peer_id, _stretched(half, slot_left_s), appointment.attempt, home=home
                )
                unless_dialled.pop_all()
            try:
                return await run(dial)
            except ConnectFailed as error:
                failure = str(error)


def _stretched(plan: Plan, window_s: float) -> Plan:
    """Return a plan whose last step, if it only waits and asks, lasts as long as its slot."""
    *before, last = plan.steps
    if last.burst is None:
        used_s = sum(step.duration_s for step in before)
        last = replace(last, duration_s=max(last.duration_s, window_s - used_s))
    return Plan.chain([*before, last])
