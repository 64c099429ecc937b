"""Datagram formats of natswarm: byte layout, encoding, decoding.

One UDP socket carries these, QUIC and mainline's KRPC, told apart by the first byte in the
spirit of RFC 9443: QUIC sets bit 0x40, KRPC starts with `d`, natswarm with 4..15. Every datagram is
authenticated: by an Ed25519 signature before two peers share keys, by a keyed BLAKE2s MAC
afterwards (probes are many, so they must be cheap and of one size). No answer is larger than what
it answers, so nobody can use us to amplify. Unknown trailing bytes are ignored; they are not
covered by the signature or MAC and later versions may put padding there.

    type 1 | version 1 | ...                                                   bytes, big-endian

    ECHO_REQUEST  4 | 1 | flags 1 | transaction 8 | sender 32 | to 18 | token 20 | signature 64
    ECHO_REPLY    5 | 1 | flags 1 | transaction 8 | sender 32 | seen 18 | token 20 | signature 64
    HELLO         6 | 1 | zero 1 | attempt 8 | sender 32 | target 32 | signature 64
    PROBE         7 | 1 | kind 1 | attempt 8 | sequence 4 | observed 18 | MAC 16

Both echoes have 145 bytes, a HELLO has 139, a PROBE 49. In a private swarm the signed ones travel
inside type 8, `swarm_key.py`.

Knows neither sockets nor when to send what. Pinned as hex in tests/vectors/wire.json.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from dataclasses import dataclass

from natswarm.address import ENDPOINT_BYTES, Endpoint
from natswarm.errors import DecodeError
from natswarm.identity import SIGNATURE_BYTES, Identity, PeerId

__all__ = [
    "ATTEMPT_BYTES",
    "ECHO_TOKEN_BYTES",
    "NO_TOKEN",
    "TFTP_PORT",
    "TFTP_READ_REQUEST",
    "TRANSACTION_BYTES",
    "DatagramType",
    "EchoReply",
    "EchoRequest",
    "Hello",
    "Probe",
    "ProbeKind",
    "decode_echo_reply_untrusted",
    "decode_echo_request_untrusted",
    "decode_hello_untrusted",
    "decode_probe_untrusted",
    "encode_probe",
    "hello_target_untrusted",
    "probe_attempt_untrusted",
]

VERSION = 1
ATTEMPT_BYTES = 8
TRANSACTION_BYTES = 8
ECHO_TOKEN_BYTES = 20
MAC_BYTES = 16
PEER_ID_BYTES = 32

NO_TOKEN = bytes(ECHO_TOKEN_BYTES)

# RFC 1350 section 5: a read request (opcode 1, name, mode) for a file that nobody has. A NAT with a
# TFTP helper acts on it wherever it goes.
TFTP_PORT = 69
TFTP_READ_REQUEST = b"\x00\x01natswarm\x00octet\x00"

_NO_ENDPOINT = bytes(ENDPOINT_BYTES)

ECHO_LAYOUT = struct.Struct(f">BBB{TRANSACTION_BYTES}s32s{ENDPOINT_BYTES}s{ECHO_TOKEN_BYTES}s")
HELLO_LAYOUT = struct.Struct(f">BBB{ATTEMPT_BYTES}s32s32s")
PROBE_LAYOUT = struct.Struct(f">BBB{ATTEMPT_BYTES}sI{ENDPOINT_BYTES}s")

PROBE_BYTES = PROBE_LAYOUT.size + MAC_BYTES


class DatagramType(enum.IntEnum):
    """The first byte of a natswarm datagram, 4..15."""

    ECHO_REQUEST = 4
    ECHO_REPLY = 5
    HELLO = 6
    PROBE = 7


class ProbeKind(enum.IntEnum):
    """What a probe says."""

    PROBE = 0
    """Do you hear me? Answer where this came from."""
    ACK = 1
    """I heard your probe `sequence`, from `observed`."""
    NOMINATE = 2
    """Let this path be ours; only the controlling side says so."""
    NOMINATED = 3
    """It is."""
    SPARE = 4
    """As PROBE, by a path that is only kept ready: use another while one answers."""


@dataclass(frozen=True, slots=True)
class EchoRequest:
    """Ask a peer from which endpoint it sees us.

    Attributes:
        transaction: 8 random bytes that the reply repeats.
        sender: Who asks; signs.
        from_alternate_port: Whether the answer should come from the peer's second port.
        deliver_to: Where the answer should go; None: where the request came from. Another endpoint
            takes a token for its address.
        token: 20 bytes from an earlier reply of this peer's (`nat/address_token.py`).
    """

    transaction: bytes
    sender: PeerId
    from_alternate_port: bool = False
    deliver_to: Endpoint | None = None
    token: bytes = NO_TOKEN

    def encode(self, identity: Identity) -> bytes:
        """Return 145 bytes signed by `identity`, which must be the sender's."""
        return _signed(
            ECHO_LAYOUT.pack(
                DatagramType.ECHO_REQUEST,
                VERSION,
                int(self.from_alternate_port),
                self.transaction,
                self.sender.key,
                _NO_ENDPOINT if self.deliver_to is None else self.deliver_to.to_bytes(),
                self.token,
            ),
            identity,
        )


@dataclass(frozen=True, slots=True)
class EchoReply:
    """Tell a peer from which endpoint we see it.

    Attributes:
        transaction: From the request.
        sender: Who answers; signs.
        observed: Where the request came from, as the sender saw it.
        token: 20 bytes that let the asker have later answers sent to the address of `observed`;
            zeros where it gets none.
        from_alternate_port: Whether this left from the sender's second port.
        is_unsolicited: Whether the sender was asked by a third peer, not by the receiver.
    """

    transaction: bytes
    sender: PeerId
    observed: Endpoint
    token: bytes = NO_TOKEN
    from_alternate_port: bool = False
    is_unsolicited: bool = False

    def encode(self, identity: Identity) -> bytes:
        """Return 145 bytes signed by `identity`, which must be the sender's."""
        flags = int(self.from_alternate_port) | int(self.is_unsolicited) << 1
        return _signed(
            ECHO_LAYOUT.pack(
                DatagramType.ECHO_REPLY,
                VERSION,
                flags,
                self.transaction,
                self.sender.key,
                self.observed.to_bytes(),
                self.token,
            ),
            identity,
        )


@dataclass(frozen=True, slots=True)
class Hello:
    """Knock at a peer that may not know us, at an endpoint that may or may not be its own.

    Attributes:
        attempt: 8 bytes that name this attempt; the probes that follow repeat them.
        sender: Who knocks; signs.
        target: Whom we want to meet; anybody else stays silent.
    """

    attempt: bytes
    sender: PeerId
    target: PeerId

    def encode(self, identity: Identity) -> bytes:
        """Return 139 bytes signed by `identity`, which must be the sender's."""
        return _signed(
            HELLO_LAYOUT.pack(
                DatagramType.HELLO, VERSION, 0, self.attempt, self.sender.key, self.target.key
            ),
            identity,
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe of a puncture or its answer.

    Attributes:
        kind: What it says.
        attempt: 8 bytes that both sides know.
        sequence: 0..2^32-1, chosen by who sends a PROBE or NOMINATE, repeated by its answer.
        observed: In answers, where the probe came from; else None.
    """

    kind: ProbeKind
    attempt: bytes
    sequence: int
    observed: Endpoint | None = None


def encode_probe(probe: Probe, key: bytes) -> bytes:
    """Return 49 bytes authenticated with `key`, the sender's `ProbeKeys.send`."""
    observed = _NO_ENDPOINT if probe.observed is None else probe.observed.to_bytes()
    body = PROBE_LAYOUT.pack(
        DatagramType.PROBE, VERSION, probe.kind, probe.attempt, probe.sequence, observed
    )
    return body + _mac(body, key)


def decode_probe_untrusted(data: bytes, key: bytes) -> Probe:
    """Read a probe made by the peer with whom we share `key`, our `ProbeKeys.receive`.

    Raises:
        DecodeError: Not a probe, or not by that peer.
    """
    _check_head(data, DatagramType.PROBE, PROBE_BYTES)
    body = data[: PROBE_LAYOUT.size]
    if not hmac.compare_digest(_mac(body, key), data[PROBE_LAYOUT.size : PROBE_BYTES]):
        raise DecodeError("the probe's MAC is not that of the peer")
    _, _, kind, attempt, sequence, observed = PROBE_LAYOUT.unpack(body)
    try:
        probe_kind = ProbeKind(kind)
    except ValueError as error:
        raise DecodeError(f"unknown kind of probe {kind}") from error
    endpoint = None if observed == _NO_ENDPOINT else Endpoint.decode_untrusted(observed)
    return Probe(probe_kind, attempt, sequence, endpoint)


def probe_attempt_untrusted(data: bytes) -> bytes:
    """Return the attempt that a probe claims to belong to, to find the key that can prove it.

    Raises:
        DecodeError: Not a probe.
    """
    _check_head(data, DatagramType.PROBE, PROBE_BYTES)
    return data[3 : 3 + ATTEMPT_BYTES]


def decode_echo_request_untrusted(data: bytes) -> EchoRequest:
    """Read a signed echo request.

    Raises:
        DecodeError: Not an echo request, or the signature is wrong.
    """
    flags, transaction, sender, to, token = _decode_echo_untrusted(data, DatagramType.ECHO_REQUEST)
    return EchoRequest(
        transaction,
        sender,
        from_alternate_port=bool(flags & 1),
        deliver_to=None if to == _NO_ENDPOINT else Endpoint.decode_untrusted(to),
        token=token,
    )


def decode_echo_reply_untrusted(data: bytes) -> EchoReply:
    """Read a signed echo reply.

    Raises:
        DecodeError: Not an echo reply, or the signature is wrong.
    """
    flags, transaction, sender, observed, token = _decode_echo_untrusted(
        data, DatagramType.ECHO_REPLY
    )
    return EchoReply(
        transaction,
        sender,
        Endpoint.decode_untrusted(observed),
        token,
        from_alternate_port=bool(flags & 1),
        is_unsolicited=bool(flags & 2),
    )


def decode_hello_untrusted(data: bytes) -> Hello:
    """Read a signed hello.

    Raises:
        DecodeError: Not a hello, or the signature is wrong.
    """
    _check_head(data, DatagramType.HELLO, HELLO_LAYOUT.size + SIGNATURE_BYTES)
    _, _, _, attempt, sender_key, target_key = HELLO_LAYOUT.unpack_from(data)
    sender = PeerId.decode_untrusted(sender_key)
    _verify_untrusted(data, HELLO_LAYOUT.size, sender)
    return Hello(attempt, sender, PeerId.decode_untrusted(target_key))


def hello_target_untrusted(data: bytes) -> bytes:
    """Return the key of whom a HELLO claims to be for: cheap, before anything is verified.

    Raises:
        DecodeError: Not a hello.
    """
    _check_head(data, DatagramType.HELLO, HELLO_LAYOUT.size + SIGNATURE_BYTES)
    return data[HELLO_LAYOUT.size - PEER_ID_BYTES : HELLO_LAYOUT.size]


def _decode_echo_untrusted(
    data: bytes, kind: DatagramType
) -> tuple[int, bytes, PeerId, bytes, bytes]:
    _check_head(data, kind, ECHO_LAYOUT.size + SIGNATURE_BYTES)
    _, _, flags, transaction, sender_key, endpoint, token = ECHO_LAYOUT.unpack_from(data)
    sender = PeerId.decode_untrusted(sender_key)
    _verify_untrusted(data, ECHO_LAYOUT.size, sender)
    return flags, transaction, sender, endpoint, token


def _check_head(data: bytes, kind: DatagramType, size: int) -> None:
    if len(data) < size:
        raise DecodeError(f"a {kind.name} has at least {size} bytes, not {len(data)}")
    if data[0] != kind:
        raise DecodeError(f"first byte {data[0]} is not that of a {kind.name}")
    if data[1] != VERSION:
        raise DecodeError(f"unknown version {data[1]}; this side speaks {VERSION}")


def _signed(body: bytes, identity: Identity) -> bytes:
    # The type byte leads the body, so a signature for one kind is void for another.
    return body + identity.sign(b"natswarm datagram\0" + body)


def _verify_untrusted(data: bytes, body_size: int, sender: PeerId) -> None:
    signature = data[body_size : body_size + SIGNATURE_BYTES]
    sender.verify_untrusted(signature, b"natswarm datagram\0" + data[:body_size])


def _mac(body: bytes, key: bytes) -> bytes:
    return hashlib.blake2s(body, key=key, digest_size=MAC_BYTES).digest()
