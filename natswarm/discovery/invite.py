"""Invites: everything a stranger needs to find one node, as text to paste or print.

`natswarm:` and the signed record of the inviting node in URL-safe base64. The record carries the
address and the NAT's behaviour, so whoever holds an invite can dial the node, or puncture together
with it when both hold each other's. Pure: text to record and back.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from natswarm.discovery.introduction import NodeRecord, decode_record_untrusted
from natswarm.errors import DecodeError, InviteError
from natswarm.identity import Identity

__all__ = ["Invite"]

SCHEME = "natswarm:"


@dataclass(frozen=True, slots=True)
class Invite:
    """An invitation to one node.

    Attributes:
        record: What the node says of itself.
        text: The form to hand around, `natswarm:...`.
    """

    record: NodeRecord
    text: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, record: NodeRecord, identity: Identity) -> Invite:
        """Write the invite of our own node."""
        encoded = base64.urlsafe_b64encode(record.seal(identity)).decode().rstrip("=")
        return cls(record, SCHEME + encoded)

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Read an invite that a user pasted.

        Raises:
            InviteError: Not an invite, damaged, or forged.
        """
        stripped = "".join(text.split())  # line breaks of mails and terminals
        if not stripped.startswith(SCHEME):
            raise InviteError(
                f"an invite starts with {SCHEME!r}; this starts with {stripped[:12]!r}"
            )
        encoded = stripped.removeprefix(SCHEME)
        try:
            sealed = base64.b64decode(
                encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True
            )
            return cls(decode_record_untrusted(sealed), stripped)
        except (binascii.Error, ValueError, DecodeError) as error:
            raise InviteError(
                f"the invite is damaged ({error}); ask for it again and paste all of it"
            ) from error
