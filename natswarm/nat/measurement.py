"""What all measurements of a NAT speak in: what to send, and what came back.

A measurement is a machine without sockets and clocks. Its driver (`net/echo.py`, or a test on the
bare virtual internet) sends what `requests_to_send` returns, feeds in every authentic echo reply
that one of its ports received, and calls again when `next_timer` is due; `next_timer` of None is
the end. Ports are known by index: 0 is the node's main port, the others are fresh ones, which the
driver binds when the inspection first counts them and closes at its end.

Silence is an answer to some questions, so what could not be asked must be told apart: a driver that
could not send a request calls `withdraw` with its transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from natswarm.address import Endpoint
from natswarm.identity import PeerId
from natswarm.wire import NO_TOKEN

__all__ = [
    "AskThirdPeer",
    "Measurement",
    "Observer",
    "Reply",
    "Request",
    "SendEcho",
    "SendSelf",
    "SendTftp",
]


@dataclass(frozen=True, slots=True)
class Observer:
    """A peer that can tell us what it sees.

    Attributes:
        peer_id: Who.
        endpoint: Where its main port p is, as we see it.
        alternate: Where its second port q is; None where not known.
        is_neighbour: Whether we are connected, so that it can be asked to find a third peer.
    """

    peer_id: PeerId
    endpoint: Endpoint
    alternate: Endpoint | None = None
    is_neighbour: bool = False


@dataclass(frozen=True, slots=True)
class SendEcho:
    """Send an echo request.

    Attributes:
        port_index: The port to send from.
        destination: A port of the observer's.
        observer: Who is asked.
        transaction: 8 random bytes, new for each request.
        from_alternate: Whether the reply is to come from the observer's second port.
        deliver_to: Where the reply is to go; None: back. Else an external endpoint of ours.
        token: From the newest reply of this observer; with `deliver_to` only.
    """

    port_index: int
    destination: Endpoint
    observer: PeerId
    transaction: bytes
    from_alternate: bool = False
    deliver_to: Endpoint | None = None
    token: bytes = NO_TOKEN


@dataclass(frozen=True, slots=True)
class AskThirdPeer:
    """Ask an observer, over the connection, that a neighbour of its sends us an echo reply.

    Attributes:
        observer: Who is asked.
        transaction: 8 random bytes, new for each request.
        observed: Our external endpoint to send to; at an address where the observer sees us.
    """

    observer: PeerId
    transaction: bytes
    observed: Endpoint


@dataclass(frozen=True, slots=True)
class SendSelf:
    """Send an echo reply of our own to an external endpoint of ours: does it turn round?

    Attributes:
        port_index: The port to send from.
        destination: The external endpoint of another port.
        transaction: 8 random bytes, new for each request.
    """

    port_index: int
    destination: Endpoint
    transaction: bytes


@dataclass(frozen=True, slots=True)
class SendTftp:
    """Send a TFTP read request, which nobody need answer: does a helper of the NAT act on it?

    Attributes:
        port_index: The port to send from.
        destination: Port 69 at an observer's address.
    """

    port_index: int
    destination: Endpoint


Request = SendEcho | AskThirdPeer | SendSelf | SendTftp


@dataclass(frozen=True, slots=True)
class Reply:
    """An echo reply whose signature is good.

    Attributes:
        port_index: The port it came in on.
        local_port: Its UDP port.
        transaction: From the request.
        sender: Who signed it; ourselves after `SendSelf`.
        source: Where it came from.
        observed: What the sender saw.
        token: Lets us have later replies of this sender sent to the address of `observed`.
    """

    port_index: int
    local_port: int
    transaction: bytes
    sender: PeerId
    source: Endpoint
    observed: Endpoint
    token: bytes = NO_TOKEN


class Measurement(Protocol):
    """One measurement, as its driver sees it."""

    def requests_to_send(self, now: float) -> list[Request]:
        """Return what is due, in the order to send it."""
        ...

    def receive_reply(self, reply: Reply, now: float) -> None:
        """Take a reply; one that is not expected is ignored."""
        ...

    def withdraw(self, transaction: bytes) -> None:
        """Forget a request that could not be sent: its silence proves nothing."""
        ...

    def next_timer(self) -> float | None:
        """Return when to call `requests_to_send` next; None when finished."""
        ...
