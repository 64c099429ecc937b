"""How two devices agree when to begin an attempt: by what their records say at the helpers.

    left    announces  field-test/SESSION/left/12/5f3a/ready    my 12th slot, all is set
    right   sees that among its helpers' peers, announces the same of itself
            and they begin; if it fails, who asked says so: .../failed

A record is small, signed by its node, and shown by the helpers to whoever asks for their peers. So
it reaches the other device although no path does, and no helper carries anything but records. The
random word tells an attempt from another try of the same slot.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NamedTuple

import trio

from natswarm.identity import PeerId
from natswarm.node import Node

__all__ = ["LOOK_INTERVAL_S", "Board", "Note", "Seen"]

PREFIX = "field-test"
LOOK_INTERVAL_S = 0.5
# A helper that was asked shows what it had; so often a record is told again that may have got lost.
TELL_INTERVAL_S = 5.0


class Note(NamedTuple):
    """What one device says of itself.

    Attributes:
        slot_index: Its slot, in the order of the plan; the slots before have their results.
        word: Names its try.
        state: `ready` or `failed`.
    """

    slot_index: int
    word: str
    state: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A note of the other device, and who that is."""

    peer_id: PeerId
    note: Note


class Board:
    """The notes of one session, seen by one device.

    Args:
        node: Ours, connected to the helpers.
        session: Which test.
        side: Ours, `left` or `right`.
        expected: Who the other device is; None: whoever knows the session.
    """

    def __init__(self, node: Node, session: str, side: str, expected: PeerId | None) -> None:
        self._node = node
        self._session = session
        self._side = side
        self._expected = expected
        self._note = Note(0, secrets.token_hex(2), "ready")

    async def tell(self, slot_index: int, state: str) -> None:
        """Show a note to the helpers, now and until the next one."""
        self._note = self._note._replace(slot_index=slot_index, state=state)
        words = map(str, self._note)
        service = "/".join([PREFIX, self._session, self._side, *words])
        await self._node.announce([service])

    async def look(self) -> Seen | None:
        """Return what the other device says; None: nothing that the helpers know."""
        for record in await self._node.find_peers():
            if self._expected is not None and record.peer_id != self._expected:
                continue
            for service in record.services:
                if (note := self._parse_untrusted(service)) is not None:
                    return Seen(record.peer_id, note)
        return None

    async def wait(self) -> Seen:
        """Wait for a note of the other device, telling ours again meanwhile."""
        told_at = trio.current_time()
        while True:
            if (seen := await self.look()) is not None:
                return seen
            await trio.sleep(LOOK_INTERVAL_S)
            if trio.current_time() - told_at >= TELL_INTERVAL_S:
                told_at = trio.current_time()
                await self.tell(self._note.slot_index, self._note.state)

    def _parse_untrusted(self, service: str) -> Note | None:
        prefix, *words = service.split("/")
        if prefix != PREFIX or len(words) != 5:
            return None
        session, side, index, word, state = words
        if session != self._session or side == self._side:
            return None
        if not (index.isascii() and index.isdigit() and len(index) <= 6):
            return None
        return Note(int(index), word, state)
