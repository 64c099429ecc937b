"""Invites: everything a stranger needs to find one node, as text to paste or a QR code to scan.

    natswarm:BASE32     format 1 | key 32 | signature 64 | body, deflated

The body is what a puncture from cold needs: name, addresses and NAT profile of the inviting node,
until when it holds, under which name two that hold each other's invites meet, and for a private
swarm its key. Usual invites have 170 bytes: deflate starts from the words that profiles are made
of. Base32, since a QR code takes capitals and digits with 5.5 bits each and other text with 8, so
that a usual invite fits into 80 columns of a terminal; and since chats take the `_` of base64 for
italics. Case does not matter.

A signature binds the invite to the node, not to its reader: whoever sees it can use it. A one-time
invite carries a ticket, which the inviting node takes once (`invite_book.py`).

Pure: text to record and back. Knows no clock: `check` is told the time.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from dataclasses import dataclass, replace

from natswarm.address import Endpoint
from natswarm.discovery.introduction import (
    NodeRecord,
    complaint_about,
    decode_endpoint_untrusted,
)
from natswarm.errors import DecodeError, InviteError
from natswarm.identity import KEY_BYTES, Identity, open_envelope_untrusted
from natswarm.message import Message, decode_message_untrusted, encode_message
from natswarm.nat.profile import decode_profile_untrusted
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

__all__ = ["INVITE_LIFETIME_S", "MEETING_BYTES", "TICKET_BYTES", "Invite"]

SCHEME = "natswarm:"
FORMAT = 2  # 1 was the whole record in base64, without an expiry
CONTEXT = b"invite 2"

# A week: long enough for a letter; after that, carriers have given most addresses to others.
INVITE_LIFETIME_S = 7 * 86_400.0
# Clocks of phones without a network are wrong by minutes.
CLOCK_TOLERANCE_S = 600.0

MEETING_BYTES = 8
TICKET_BYTES = 8
# A full profile has 1,024 bytes, the rest some 300; a bomb must not take more.
BODY_BYTES_MAX = 2048
TEXT_CHARACTERS_MAX = 4096

# What deflate may refer back to, the likeliest last. Part of the format: to change it is to change
# FORMAT.
DICTIONARY = (
    b"\xa8uniform\xaasequential\xa5block\xaapreserving\xa9arbitrary\xa6paired\xa3EIF\xa3ADM\xa3ADF"
    b"tftp_helper poison hairpinning pooling filtering mapping\xaanone\xaatakes port"
    b"\xaa192.168.1.\xa92001:db8:\xa910.0.0.\xac100.64.0."
    b"\xa4APDM\xa4APDF\x8e\xa3law\xa5block\xa3low\xcd\x04\x00\xa4high\xcd\xff\xff"
    b"\xa8seen_low\xc0\xa9seen_high\xc0\xaablock_size\xcd\x01\x00\xa6blocks\x91\xcd"
    b"\xa3EIM\xa4APDF\x8e\xa3law\xaapreserving\xa3low\xcd\x04\x00\xa4high\xcd\xff\xff"
    b"\xa8seen_low\xc0\xa9seen_high\xc0\xaablock_size\xc0\xa6blocks\x90\xa4step\xc0"
    b"\xacothers_per_s\xc0\xa9last_port\xc0\xaeis_overloading\xc0\xacsample_count("
    b"\xa5shape\xc0\xb0preserves_parity\xc0\xaflaw_probability\xcb?\xf0\0\0\0\0\0\0\x91"
    b"\x82\xa2ip\xac\xa4port\xcd\x91\x82\xa2ip\xaa\xa4port\xcd\xc3(\x02\xa6paired"
    b"\xc0\xc0\xc0\xc0\xc0\xc0\xc0\0\xc0\xc0\xc0\0\xc0\xc0\x90\xc0"
)


class _Body(Message, frozen=True, array_like=True, tag=False):
    """What is inside the envelope."""

    issued_at_s: int
    lifetime_s: int
    meeting: bytes
    ticket: bytes
    swarm_key: bytes
    name: str
    alternate_endpoint: str | None
    profile: bytes


@dataclass(frozen=True, slots=True)
class Invite:
    """An invitation to one node.

    Attributes:
        record: What the node says of itself, without its services.
        text: The form to hand around, `natswarm:...`.
        expires_at_s: Until when it holds, seconds since 1970.
        meeting: 8 bytes from which two that hold each other's invites derive where they meet.
        ticket: 8 bytes of a one-time invite; empty where it may be used again.
        swarm_key: Of the private swarm that the node is in; empty: the open one.
    """

    record: NodeRecord
    text: str
    expires_at_s: float = math.inf
    meeting: bytes = bytes(MEETING_BYTES)
    ticket: bytes = b""
    swarm_key: bytes = b""

    def __str__(self) -> str:
        return self.text

    @property
    def dialled_endpoints(self) -> tuple[Endpoint, ...]:
        """Where the inviting node takes a HELLO from anybody; empty if it does nowhere."""
        profile = self.record.profile
        if profile.accepts_strangers and profile.main_endpoint is not None:
            return (profile.main_endpoint,)
        # Who has met nobody yet may be on a network of ours, or know its gateway.
        return (
            profile.local_endpoints
            if profile.is_translated is None
            else profile.forwarded_endpoints
        )

    @property
    def qr_text(self) -> str:
        """The same in capitals, of which a QR code holds half as many again."""
        return self.text.upper()

    def check(self, now_s: float) -> None:
        """Raise if the invite has expired; ten minutes late is not late.

        Raises:
            InviteError: It has.
        """
        if now_s > self.expires_at_s + CLOCK_TOLERANCE_S:
            days = (now_s - self.expires_at_s) / 86_400
            ago = f"{days:.0f} days" if days >= 2 else f"{24 * days:.1f} hours"
            raise InviteError(
                f"the invite expired {ago} ago; ask for a new one"
                " (or set this device's clock, if it is wrong)"
            )

    def check_swarm(self, swarm: SwarmKey) -> None:
        """Raise if the invite is of another swarm than ours.

        Raises:
            InviteError: It is.
        """
        if self.swarm != swarm:
            raise InviteError(
                f"the invite is to {self.swarm}, and this node is in {swarm}: a node is in one "
                "swarm; start another for that one, with a new folder of its own (--state FOLDER)"
            )

    @property
    def swarm(self) -> SwarmKey:
        """The swarm that the node is in."""
        return SwarmKey(self.swarm_key) if self.swarm_key else OPEN_SWARM

    @classmethod
    def of(
        cls,
        record: NodeRecord,
        identity: Identity,
        *,
        lifetime_s: float = INVITE_LIFETIME_S,
        meeting: bytes = bytes(MEETING_BYTES),
        ticket: bytes = b"",
        swarm_key: bytes = b"",
    ) -> Invite:
        """Write an invite of our own node; the record's date is that of the invite."""
        record = replace(record, issued_at_s=float(int(record.issued_at_s)), services=())
        alternate = record.alternate_endpoint
        body = _Body(
            issued_at_s=int(record.issued_at_s),
            lifetime_s=int(lifetime_s),
            meeting=meeting,
            ticket=ticket,
            swarm_key=swarm_key,
            name=record.name,
            alternate_endpoint=None if alternate is None else str(alternate),
            profile=record.profile.encode(),
        )
        squeezer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
        squeezed = squeezer.compress(encode_message(body)) + squeezer.flush()
        data = bytes([FORMAT]) + identity.seal(CONTEXT, squeezed)
        text = SCHEME + base64.b32encode(data).decode().rstrip("=").lower()
        expires_at_s = record.issued_at_s + int(lifetime_s)
        return cls(record, text, expires_at_s, meeting, ticket, swarm_key)

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Read an invite that a user pasted or scanned; whether it has expired tells `check`.

        Raises:
            InviteError: Not an invite, damaged, forged, or of another version.
        """
        stripped = "".join(text.split()).lower()  # line breaks of mails and terminals
        if not stripped.startswith(SCHEME):
            raise InviteError(
                f"an invite starts with {SCHEME!r}; this starts with {stripped[:12]!r}"
            )
        try:
            data = _from_base32(stripped.removeprefix(SCHEME))
            if data[0] != FORMAT:
                raise DecodeError(
                    f"or made by another version of natswarm: format {data[0]}, "
                    f"this one reads {FORMAT}"
                )
            return cls._decode_untrusted(data[1:], stripped)
        except DecodeError as error:
            raise InviteError(
                f"the invite is damaged ({error}); ask for it again and paste all of it"
            ) from error

    @classmethod
    def _decode_untrusted(cls, sealed: bytes, text: str) -> Invite:
        peer_id, squeezed = open_envelope_untrusted(CONTEXT, sealed)
        body = decode_message_untrusted(_inflate_untrusted(squeezed), _Body)
        if (complaint := complaint_about(body.name, ())) is not None:
            raise DecodeError(complaint)
        if not 0 <= body.issued_at_s < 2**40 or not 0 < body.lifetime_s < 2**40:
            raise DecodeError("not a date")
        if (
            len(body.meeting) != MEETING_BYTES
            or len(body.ticket) not in (0, TICKET_BYTES)
            or len(body.swarm_key) not in (0, KEY_BYTES)
        ):
            raise DecodeError("a key has another length")
        alternate: Endpoint | None = None
        if body.alternate_endpoint is not None:
            alternate = decode_endpoint_untrusted(body.alternate_endpoint)
        record = NodeRecord(
            peer_id=peer_id,
            issued_at_s=float(body.issued_at_s),
            name=body.name,
            profile=decode_profile_untrusted(body.profile),
            alternate_endpoint=alternate,
        )
        expires_at_s = float(body.issued_at_s + body.lifetime_s)
        return cls(record, text, expires_at_s, body.meeting, body.ticket, body.swarm_key)


def _from_base32(encoded: str) -> bytes:
    if len(encoded) > TEXT_CHARACTERS_MAX:
        raise DecodeError(f"it has at most {TEXT_CHARACTERS_MAX} characters")
    try:
        data = base64.b32decode(encoded.upper() + "=" * (-len(encoded) % 8))
    except (binascii.Error, ValueError) as error:
        raise DecodeError(
            "or made by another version of natswarm: this one writes letters and the digits 2-7"
        ) from error
    if not data:
        raise DecodeError("nothing is in it")
    return data


def _inflate_untrusted(squeezed: bytes) -> bytes:
    stretcher = zlib.decompressobj(-15, zdict=DICTIONARY)
    try:
        body = stretcher.decompress(squeezed, BODY_BYTES_MAX)
    except zlib.error as error:
        raise DecodeError(f"not deflated: {error}") from error
    if not stretcher.eof:
        raise DecodeError(f"cut, or more than {BODY_BYTES_MAX} bytes")
    return body
