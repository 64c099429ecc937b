"""Echoes: tell others what we see of them, and find out what they see of us.

The answering half does for peers what STUN servers did. The asking half drives a `NatInspection`
over the main port and a group of fresh ports that live for the inspection only.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence

import trio

from natswarm.address import Endpoint
from natswarm.errors import DecodeError, NatswarmError
from natswarm.identity import Identity, PeerId
from natswarm.nat.classify import (
    FRESH_PORT_COUNT,
    AnswerFrom,
    EchoToSend,
    NatInspection,
    classify,
)
from natswarm.nat.measurement import Observer
from natswarm.nat.profile import NatProfile
from natswarm.net.budget import Budget
from natswarm.net.nursery import open_private_nursery
from natswarm.net.port import DatagramPort, Network, PortGroup
from natswarm.wire import (
    EchoReply,
    EchoRequest,
    decode_echo_reply_untrusted,
    decode_echo_request_untrusted,
)

__all__ = ["AskNeighbour", "EchoService"]

# An inspection asks about 40 times in all; this serves several newcomers a second. Each request
# costs a signature and a verification, 0.15 ms together.
ECHOES_PER_S = 200.0

# Replies to somebody we never heard from, on the word of a neighbour: four for each newcomer.
UNSOLICITED_ECHOES_PER_S = 20.0

AskNeighbour = Callable[[PeerId, bytes, Endpoint], Awaitable[None]]


class EchoService:
    """Both halves, for one node.

    Args:
        identity: Signs requests and replies.
        network: Where the fresh ports of an inspection come from.
        bind_ip: The address they are bound to.
        main_port: The node's port p.
        alternate_port: Its port q.
    """

    def __init__(
        self,
        identity: Identity,
        network: Network,
        bind_ip: str,
        main_port: DatagramPort,
        alternate_port: DatagramPort,
    ) -> None:
        self._identity = identity
        self._network = network
        self._bind_ip = bind_ip
        self._main_port = main_port
        self._alternate_port = alternate_port
        self._budget = Budget(per_s=ECHOES_PER_S)
        self._unsolicited_budget = Budget(per_s=UNSOLICITED_ECHOES_PER_S)
        self._inspection: _Inspection | None = None

    # Answering ------------------------------------------------------------------------------------

    def answer_untrusted(
        self, data: bytes, source: Endpoint, *, arrived_at_alternate: bool = False
    ) -> None:
        """Answer an echo request, from the port it came to or, if it asks so, from port q.

        Raises:
            DecodeError: Not an authentic request.
        """
        if not self._budget.take(trio.current_time()):
            return
        request = decode_echo_request_untrusted(data)
        from_alternate = arrived_at_alternate or request.from_alternate_port
        reply = EchoReply(
            request.transaction,
            self._identity.peer_id,
            source,
            from_alternate_port=from_alternate,
        )
        port = self._alternate_port if from_alternate else self._main_port
        port.send(reply.encode(self._identity), source)

    def answer_for_neighbour(self, transaction: bytes, observed: Endpoint) -> None:
        """Send a reply to whoever asked a neighbour of ours, which vouches for the address."""
        if self._unsolicited_budget.take(trio.current_time()):
            reply = EchoReply(
                transaction, self._identity.peer_id, observed, is_unsolicited=True
            ).encode(self._identity)
            self._main_port.send(reply, observed)

    # Asking ---------------------------------------------------------------------------------------

    def receive_reply_untrusted(self, data: bytes, source: Endpoint) -> None:
        """Take an echo reply that came to the main port.

        Raises:
            DecodeError: Not an authentic reply.
        """
        if self._inspection is not None:
            self._inspection.receive_untrusted(0, data, source)

    async def inspect(
        self,
        observers: Sequence[Observer],
        *,
        host_candidates: Sequence[Endpoint],
        rng: random.Random,
        ask_neighbour: AskNeighbour,
    ) -> NatProfile:
        """Ask `observers` what they see of us; one inspection at a time.

        Raises:
            ConfigurationError: The system gives no fresh ports.
            trio.ClosedResourceError: The main port was closed meanwhile.

        Args:
            observers: Whom to ask.
            host_candidates: Our own addresses with the main port.
            rng: Draws transactions.
            ask_neighbour: Asks a neighbour that a third peer send a reply to an endpoint of ours.
        """
        if not observers:
            return classify([], local_endpoints=host_candidates)
        group = self._network.bind_group(self._bind_ip, FRESH_PORT_COUNT)
        try:
            local_ports = [self._main_port.local_endpoint.port]
            local_ports += [group.local_endpoint(index).port for index in range(group.count)]
            inspection = NatInspection(
                observers,
                local_ports=local_ports,
                local_endpoints=host_candidates,
                rng=rng,
                now=trio.current_time(),
            )
            self._inspection = _Inspection(
                inspection, self._identity, self._main_port, group, ask_neighbour
            )
            return await self._inspection.run()
        finally:
            self._inspection = None
            group.close()


class _Inspection:
    """The Trio driver of one `NatInspection`."""

    def __init__(
        self,
        machine: NatInspection,
        identity: Identity,
        main_port: DatagramPort,
        group: PortGroup,
        ask_neighbour: AskNeighbour,
    ) -> None:
        self._machine = machine
        self._identity = identity
        self._main_port = main_port
        self._group = group
        self._ask_neighbour = ask_neighbour
        self._wakeup = trio.Event()

    async def run(self) -> NatProfile:
        async with open_private_nursery() as nursery:
            nursery.start_soon(self._receive)
            while True:
                now = trio.current_time()
                for echo in self._machine.requests_to_send(now):
                    self._send(echo, nursery)
                if (profile := self._machine.result()) is not None:
                    return profile
                timer = self._machine.next_timer()
                assert timer is not None, "something is under way where there is no result"
                self._wakeup = trio.Event()
                with trio.move_on_at(timer):
                    await self._wakeup.wait()

    def receive_untrusted(self, port_index: int, data: bytes, source: Endpoint) -> None:
        reply = decode_echo_reply_untrusted(data)
        self._machine.receive_reply(
            port_index,
            reply.transaction,
            reply.observed,
            source,
            trio.current_time(),
            sender=reply.sender,
        )
        self._wakeup.set()

    def _send(self, echo: EchoToSend, nursery: trio.Nursery) -> None:
        if echo.answer_from is AnswerFrom.THIRD_PEER:
            if echo.observed is not None:
                nursery.start_soon(self._ask, echo.observer, echo.transaction, echo.observed)
            return
        request = EchoRequest(
            echo.transaction,
            self._identity.peer_id,
            from_alternate_port=echo.answer_from is AnswerFrom.ALTERNATE,
        ).encode(self._identity)
        if echo.port_index == 0:
            self._main_port.send(request, echo.destination)
        else:
            self._group.send(echo.port_index - 1, request, echo.destination)

    async def _ask(self, observer: PeerId, transaction: bytes, observed: Endpoint) -> None:
        try:
            await self._ask_neighbour(observer, transaction, observed)
        except (NatswarmError, trio.BrokenResourceError):
            self._machine.withdraw(transaction)
            self._wakeup.set()

    async def _receive(self) -> None:
        while True:
            for index, arrival in await self._group.receive_batch():
                try:
                    self.receive_untrusted(index + 1, arrival.data, arrival.source)
                except DecodeError:
                    continue
