"""Every exception natswarm raises on purpose.

    NatswarmError
    ├── DecodeError            bytes from a stranger were not what they had to be
    ├── AddressError           text is not an address this system can use
    ├── IdentityError          the identity file is damaged, unreadable or open to others
    ├── InviteError            an invite is damaged, forged, expired or meant for another swarm
    ├── ConfigurationError     a setting or command-line value cannot work
    ├── ConnectFailed          no connection to a peer
    │   ├── PeerNotFound       nobody we can reach knows the peer
    │   ├── PunctureFailed     the NATs between us stayed closed; says why and what to try
    │   ├── HandshakeFailed    a path was there, but not the right peer at its end
    │   └── AlreadyConnecting  the peer is connecting to us at this moment, so it declined our wish
    ├── CallFailed             a call to a connected peer came to nothing
    │   ├── CallTimedOut       its time was over (also a `trio.TooSlowError`)
    │   ├── PeerUnreachable    no path leads to the peer at the moment
    │   └── ProtocolUnknown    the peer does not speak it (also a `trio.BrokenResourceError`)
    ├── RequestRefused         the peer understood and said no; says why
    ├── GatewayError           the gateway did not do what it was asked in one protocol; says why
    ├── PortMappingFailed      the gateway made no port mapping in any protocol; says why for each
    ├── LabError               a command of `natswarm lab` failed (`natswarm/lab/errors.py`)
    └── ConnectionLost         a living connection ended (also a `trio.BrokenResourceError`)

The text of each error says what happened, why, and what to do. Knows nothing else of the project.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio

__all__ = [
    "AddressError",
    "AlreadyConnecting",
    "CallFailed",
    "CallTimedOut",
    "ConfigurationError",
    "ConnectFailed",
    "ConnectionLost",
    "DecodeError",
    "GatewayError",
    "HandshakeFailed",
    "IdentityError",
    "InviteError",
    "NatswarmError",
    "PeerNotFound",
    "PeerUnreachable",
    "PortMappingFailed",
    "ProtocolUnknown",
    "PunctureFailed",
    "RequestRefused",
    "is_expected",
]


class NatswarmError(Exception):
    """Base of all errors natswarm raises on purpose.

    Attributes:
        code: A word for programs where callers react to this very error, over the network too;
            else empty.
    """

    code: str = ""


class DecodeError(NatswarmError):
    """Bytes from outside were not what they had to be: count it, drop them, go on."""


class AddressError(NatswarmError, ValueError):
    """Text is not an address this system can use."""


class IdentityError(NatswarmError):
    """The identity file is damaged, unreadable, or readable by other users."""


class InviteError(NatswarmError):
    """An invite is damaged, forged, expired, or meant for another swarm."""


class ConfigurationError(NatswarmError):
    """A setting or a command-line value cannot work."""


class ConnectFailed(NatswarmError):
    """No connection to a peer came about."""


class PeerNotFound(ConnectFailed):
    """Nobody we can reach knows the peer."""

    code = "peer-not-found"


class PunctureFailed(ConnectFailed):
    """The NATs between two peers stayed closed."""

    code = "puncture-failed"


class HandshakeFailed(ConnectFailed):
    """A path was there, but the peer at its end was not the one asked for, or fell silent."""


class AlreadyConnecting(ConnectFailed):
    """The peer is connecting to us at this moment and so declined our own wish to."""

    code = "already-connecting"


class CallFailed(NatswarmError):
    """A call to a connected peer came to nothing; the peer may have carried it out all the same."""

    code = "call-failed"


class CallTimedOut(CallFailed, trio.TooSlowError):
    """The time that a call was given is over."""

    code = "timed-out"


class PeerUnreachable(CallFailed):
    """No path leads to the peer at the moment; the connection waits for the next one."""

    code = "unreachable"


class ProtocolUnknown(CallFailed, trio.BrokenResourceError):
    """The peer does not speak the protocol, or not this version of it."""

    code = "protocol-unknown"


class RequestRefused(NatswarmError):
    """The peer understood a request and said no.

    Args:
        reason: Why, in the peer's words.
        code: The code of the error that made it refuse.
    """

    def __init__(self, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.code = code


class GatewayError(NatswarmError):
    """The gateway did not do what it was asked in one protocol; says why."""


class PortMappingFailed(NatswarmError):
    """The gateway made no mapping in any protocol.

    Args:
        gateway_ip: Who was asked.
        reasons: Why not, by name of the protocol.
    """

    def __init__(self, gateway_ip: str, reasons: Mapping[str, str]) -> None:
        super().__init__(
            f"the gateway {gateway_ip} makes no port mapping: "
            + "; ".join(f"{protocol}: {reason}" for protocol, reason in reasons.items())
            + ". Switch one of them on in its settings, or go on without: puncturing needs none"
        )
        self.gateway_ip = gateway_ip
        self.reasons = dict(reasons)


class ConnectionLost(NatswarmError, trio.BrokenResourceError):
    """A living connection ended; streams on it raise this, as Trio's streams would."""

    code = "connection-lost"


def is_expected(error: BaseException) -> bool:
    """Whether whoever serves a peer may end with this: the peer went away or broke the rules."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_expected, error.exceptions))
    return isinstance(
        error,
        (NatswarmError, trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel),
    )
