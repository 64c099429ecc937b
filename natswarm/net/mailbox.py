"""Answer invites, and look for answers, by mailboxes in the mainline DHT.

    guest    leave an invite of our own, then dial, again and again for half a minute
    host     look every 4 s while the last invite is young, later every 2 minutes; dial who answered

Only where the host takes no strangers: else the guest just dials it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Protocol

import trio

from natswarm.discovery.invite import Invite
from natswarm.discovery.mailbox import Mailbox
from natswarm.errors import ConnectFailed, NatswarmError, PunctureFailed
from natswarm.identity import PeerId
from natswarm.net.connector import Connector
from natswarm.net.mainline import NONCE_BYTES, MainlineService
from natswarm.net.peer import Peer
from natswarm.swarm_key import SwarmKey

__all__ = ["Home", "MailboxService"]

logger = logging.getLogger("natswarm.mailbox")

# Some 10 questions each time, of the 10 a second that a mainline node may ask.
LOOK_YOUNG_S = 4.0
LOOK_OLD_S = 120.0
YOUNG_S = 600.0
# Older ones are of guests that have given up. Clocks of phones are wrong by minutes.
ANSWER_AGE_MAX_S = 600.0
# The host looks within 4 s, and looking takes a second or two.
GUEST_PATIENCE_S = 30.0


class Home(Protocol):
    """What the mailbox service needs of its node."""

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        ...

    @property
    def swarm(self) -> SwarmKey:
        """Which swarm we are in."""
        ...

    @property
    def accepts_strangers(self) -> bool:
        """Whether a stranger's datagram reaches our main port."""
        ...

    def meetings(self) -> list[bytes]:
        """Where holders of our invites may wait, the newest first."""
        ...

    def is_connected(self, peer_id: PeerId) -> bool:
        """Whether there is a connection to a peer."""
        ...

    async def invite(self) -> Invite:
        """Return an invite to this node."""
        ...


class MailboxService:
    """Both ends, for one node.

    Args:
        home: The node.
        mainline: Where mailboxes are.
        connector: Dials.
        utc: Seconds since 1970.
    """

    def __init__(
        self,
        home: Home,
        mainline: MainlineService,
        connector: Connector,
        utc: Callable[[], float],
    ) -> None:
        self._home = home
        self._mainline = mainline
        self._connector = connector
        self._utc = utc
        self._invited_at = float("-inf")
        self._invited = trio.Event()
        self._seen: dict[bytes, int] = {}

    def note_invited(self) -> None:
        """Look more often: an invite has just gone out."""
        self._invited_at = trio.current_time()
        self._invited.set()

    # The guest ------------------------------------------------------------------------------------

    async def connect(self, invite: Invite) -> Peer:
        """Return a connection to the host of an invite, which finds our answer meanwhile.

        Raises:
            ConnectFailed: As `Connector.connect`.
        """
        box = Mailbox(self._home.swarm, invite.record.peer_id, invite.meeting)
        invited_at = self._invited_at
        answer = await self._home.invite()
        self._invited_at = invited_at  # nobody answers an answer
        try:
            await self._mainline.put_item(
                box.seal(answer, int(self._utc()), os.urandom(NONCE_BYTES))
            )
        except ConnectFailed as error:
            logger.warning("our answer to the invite is not in the mainline: %s", error)
        give_up_at = trio.current_time() + GUEST_PATIENCE_S
        while True:
            try:
                return await self._connector.connect(invite)
            except PunctureFailed:
                if trio.current_time() >= give_up_at:
                    raise

    # The host -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look for answers, and dial who answered, one at a time, until cancelled."""
        await self._mainline.wait_bootstrapped()
        while True:
            self._invited = trio.Event()
            if not self._home.accepts_strangers:
                for meeting in self._home.meetings():
                    await self._look(meeting)
            is_young = trio.current_time() < self._invited_at + YOUNG_S
            with trio.move_on_after(LOOK_YOUNG_S if is_young else LOOK_OLD_S):
                await self._invited.wait()

    async def _look(self, meeting: bytes) -> None:
        box = Mailbox(self._home.swarm, self._home.peer_id, meeting)
        try:
            item = await self._mainline.get_item(box.owner, b"")
            if item is None or item.sequence <= self._seen.get(meeting, -1):
                return
            self._seen[meeting] = item.sequence
            answer = box.open_untrusted(item)
            answer.check_swarm(self._home.swarm)
        except NatswarmError as error:
            logger.info("nothing of use in a mailbox: %s", error)
            return
        is_fresh = abs(self._utc() - answer.record.issued_at_s) < ANSWER_AGE_MAX_S
        if is_fresh and not self._home.is_connected(answer.record.peer_id):
            try:
                await self._connector.connect(answer)
            except NatswarmError as error:
                logger.info("%s answered, and was not met: %s", answer.record.peer_id.short, error)
