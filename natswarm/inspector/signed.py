"""A profile to hand over: what a node says of its NAT, signed by it, as text to paste or keep.

    natswarm-nat:<base64 of the envelope>     a few hundred characters

The envelope holds the time and the profile (`natswarm/nat/profile.py` versions it). Records and
invites carry profiles between nodes; this one is for people: to plan a field test with somebody, to
keep what a carrier did last month. Whoever reads it knows who said so, not that it is true.

Pure: text to profile and back.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from typing import Any

from natswarm.errors import DecodeError
from natswarm.identity import Identity, PeerId, open_envelope_untrusted
from natswarm.inspector.evidence import TESTS_OF_FIELDS
from natswarm.inspector.schema import plain, utc_text
from natswarm.message import Message, decode_message_untrusted, encode_message
from natswarm.nat.profile import NatProfile, decode_profile_untrusted

__all__ = ["SignedProfile", "open_signed_profile_untrusted"]

CONTEXT = b"nat-profile"
SCHEME = "natswarm-nat:"
# 96 bytes of key and signature, a profile of at most 1,024 and its time; in base64 a third more.
TEXT_CHARACTERS_MAX = 2048


class _Body(Message, frozen=True, tag="SignedProfile"):
    """What is inside the envelope."""

    inspected_at_s: float
    profile: bytes


@dataclass(frozen=True, slots=True)
class SignedProfile:
    """A profile and who vouches for it.

    Attributes:
        peer_id: Whose NAT it is; signed it.
        inspected_at_s: When it was found out, seconds since 1970 by the signer's clock.
        profile: What was found.
    """

    peer_id: PeerId
    inspected_at_s: float
    profile: NatProfile

    def seal(self, identity: Identity) -> str:
        """Return the signed text.

        Raises:
            ValueError: `identity` is not that of `peer_id`.
        """
        if identity.peer_id != self.peer_id:
            raise ValueError(f"{identity!r} cannot sign for {self.peer_id!r}")
        body = _Body(inspected_at_s=self.inspected_at_s, profile=self.profile.encode())
        sealed = identity.seal(CONTEXT, encode_message(body))
        return SCHEME + base64.urlsafe_b64encode(sealed).decode().rstrip("=")

    def as_json(self) -> dict[str, Any]:
        """Return it for programs; null is what is not known."""
        return {
            "peer_id": str(self.peer_id),
            "at": utc_text(self.inspected_at_s),
            "inferred": list(self.profile.inferred),
            "nat": {name: plain(getattr(self.profile, name)) for name in TESTS_OF_FIELDS},
        }


def open_signed_profile_untrusted(text: str) -> SignedProfile:
    """Read what `SignedProfile.seal` wrote; line breaks and spaces do no harm.

    Raises:
        DecodeError: Something else, damaged, or not signed by whom it names.
    """
    stripped = "".join(text[: 2 * TEXT_CHARACTERS_MAX].split())
    if not stripped.startswith(SCHEME):
        raise DecodeError(f"a signed profile starts with {SCHEME!r}, this with {stripped[:13]!r}")
    if len(stripped) > TEXT_CHARACTERS_MAX:
        raise DecodeError(f"a signed profile has at most {TEXT_CHARACTERS_MAX} characters")
    encoded = stripped.removeprefix(SCHEME)
    try:
        sealed = base64.b64decode(
            encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True
        )
    except (binascii.Error, ValueError) as error:
        raise DecodeError(f"a signed profile is base64 behind {SCHEME!r}: {error}") from error
    peer_id, payload = open_envelope_untrusted(CONTEXT, sealed)
    body = decode_message_untrusted(payload, _Body)
    if not math.isfinite(body.inspected_at_s):
        raise DecodeError("a signed profile has a date")
    return SignedProfile(peer_id, body.inspected_at_s, decode_profile_untrusted(body.profile))
