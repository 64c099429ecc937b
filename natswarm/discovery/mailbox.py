"""The mailbox of an invite in the mainline DHT: where its guest leaves an invite of its own.

    host ── invite ──▶ guest                         by a chat, a letter, a camera
    host ◀── mailbox ── the guest's invite           by nodes that neither of them knows

Two nodes behind closed NATs puncture if each knows the other's NAT, but an invite tells of one side
only. So the guest answers: with its own invite, in an item whose key and contents nobody can derive
who does not know the meeting that the host's invite names. The host looks there while invites of
its own are out. One item for all guests of a meeting: of two at once one has to come again.

Pure. Source: BEP 44; magic-wormhole's mailbox for the idea and the name.
"""

from __future__ import annotations

from natswarm.discovery.invite import Invite
from natswarm.discovery.mainline_item import MutableItem
from natswarm.discovery.sealed_value import open_value_untrusted, seal_value
from natswarm.errors import DecodeError, InviteError
from natswarm.identity import Identity, PeerId
from natswarm.swarm_key import SwarmKey

__all__ = ["Mailbox"]


class Mailbox:
    """Where the guests of one meeting answer.

    Args:
        swarm: Of both.
        host: Whose invite it is.
        meeting: 8 bytes that the invite names.

    Attributes:
        owner: The key under which the item stands; it has no salt.
    """

    def __init__(self, swarm: SwarmKey, host: PeerId, meeting: bytes) -> None:
        context = host.key + meeting
        self._writer = Identity(swarm.derive(b"boxowner", context))
        self._key = swarm.derive(b"boxvalue", context)
        self.owner = self._writer.peer_id

    def seal(self, answer: Invite, sequence: int, nonce: bytes) -> MutableItem:
        """Return the item with the guest's invite.

        Args:
            answer: An invite to the guest.
            sequence: Higher than ever before, such as the seconds since 1970.
            nonce: 12 random bytes.
        """
        value = seal_value(self._key, str(answer).encode(), nonce)
        return MutableItem.sign(self._writer, b"", sequence, value)

    def open_untrusted(self, item: MutableItem) -> Invite:
        """Return the guest's invite; the item's signature was checked.

        Raises:
            DecodeError: There is none in it.
        """
        try:
            return Invite.parse(open_value_untrusted(self._key, item).decode("ascii"))
        except (UnicodeDecodeError, InviteError) as error:
            raise DecodeError(f"no invite in the mailbox: {error}") from error
