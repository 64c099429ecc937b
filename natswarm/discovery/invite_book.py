"""What a node remembers of the invites it has made: where their holders meet it, what is used up.

Every invite names a *meeting*, 8 random bytes. Two nodes that hold each other's invites name their
attempt by a secret that only they can derive, and by the meeting of the lower PeerId's invite. All
invites of a node name one meeting, since the node cannot know which one the other side holds; it is
renewed once a week, so that what was recorded of an old attempt spoils no later one.

A one-time invite has a *ticket* besides. Its first holder to connect hands it in, and is let in
with it again; anybody else is told that it is used up. It keeps honest guests to one invite each.
It is no lock: the swarm is open to whoever knows an address.

Bounds: 2 meetings, 256 tickets, the oldest forgotten first. Pure: the time and the randomness are
arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from natswarm.discovery.invite import (
    CLOCK_TOLERANCE_S,
    INVITE_LIFETIME_S,
    MEETING_BYTES,
    TICKET_BYTES,
)
from natswarm.errors import DecodeError, InviteError
from natswarm.identity import PeerId

__all__ = ["InviteBook"]

MEETINGS_MAX = 2
TICKETS_MAX = 256


@dataclass(slots=True)
class _Meeting:
    name: bytes
    made_at_s: float
    expires_at_s: float


@dataclass(slots=True)
class _Ticket:
    name: bytes
    expires_at_s: float
    used_by: bytes = b""


class _Form(msgspec.Struct, forbid_unknown_fields=True):
    """What is stored."""

    meetings: list[_Meeting]
    tickets: list[_Ticket]


class InviteBook:
    """The invites of one node that may still be out.

    Attributes:
        is_changed: Whether something is new since this was last set to False.
    """

    def __init__(self) -> None:
        self._meetings: list[_Meeting] = []  # the newest first
        self._tickets: list[_Ticket] = []  # the newest last
        self.is_changed = False

    def meetings(self, now_s: float) -> list[bytes]:
        """Return where holders of our invites may wait for us, the newest first."""
        self._meetings = [
            each for each in self._meetings if each.expires_at_s + CLOCK_TOLERANCE_S > now_s
        ]
        return [each.name for each in self._meetings]

    def add(self, now_s: float, lifetime_s: float, entropy: Callable[[int], bytes]) -> bytes:
        """Note that an invite goes out; return the meeting it names."""
        self.meetings(now_s)  # forgets the expired ones
        if not self._meetings or now_s > self._meetings[0].made_at_s + INVITE_LIFETIME_S:
            fresh = _Meeting(entropy(MEETING_BYTES), now_s, now_s + lifetime_s)
            self._meetings = [fresh, *self._meetings][:MEETINGS_MAX]
        current = self._meetings[0]
        current.expires_at_s = max(current.expires_at_s, now_s + lifetime_s)
        self.is_changed = True
        return current.name

    def add_ticket(self, now_s: float, lifetime_s: float, entropy: Callable[[int], bytes]) -> bytes:
        """Return the ticket of a new one-time invite."""
        ticket = _Ticket(entropy(TICKET_BYTES), now_s + lifetime_s)
        self._tickets = [*self._tickets, ticket][-TICKETS_MAX:]
        self.is_changed = True
        return ticket.name

    def redeem(self, name: bytes, peer_id: PeerId, now_s: float) -> None:
        """Take the ticket that a peer hands in.

        Raises:
            InviteError: It is used up, has expired, or is none of ours.
        """
        for ticket in self._tickets:
            if ticket.name != name:
                continue
            if ticket.used_by not in (b"", peer_id.key):
                raise InviteError("this invite was for one guest, and is used up; ask for another")
            if now_s > ticket.expires_at_s + CLOCK_TOLERANCE_S:
                raise InviteError("this invite has expired; ask for a new one")
            self.is_changed = self.is_changed or not ticket.used_by
            ticket.used_by = peer_id.key
            return
        raise InviteError("this invite is not known here any more; ask for a new one")

    def encode(self) -> bytes:
        """Return the stored form, JSON."""
        return msgspec.json.encode(_Form(self._meetings, self._tickets))

    @classmethod
    def decode_untrusted(cls, data: bytes) -> InviteBook:
        """Read the stored form.

        Raises:
            DecodeError: Damaged, or of another version.
        """
        try:
            form = msgspec.json.decode(data, type=_Form)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(f"not a book of invites: {error}") from error
        book = cls()
        book._meetings = form.meetings[:MEETINGS_MAX]
        book._tickets = form.tickets[-TICKETS_MAX:]
        return book
