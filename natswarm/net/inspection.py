"""The Trio driver of a `NatInspection`: fresh ports, requests out, replies in, one timer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError, DecodeError, NatswarmError
from natswarm.identity import Identity, PeerId
from natswarm.nat.inspection import NatInspection
from natswarm.nat.measurement import (
    AskThirdPeer,
    Reply,
    Request,
    SendEcho,
    SendSelf,
    SendTftp,
)
from natswarm.net.nursery import open_private_nursery
from natswarm.net.port import DatagramPort, Network, PortGroup
from natswarm.wire import EchoReply, EchoRequest, decode_echo_reply_untrusted

__all__ = ["AskNeighbour", "InspectionDriver"]

AskNeighbour = Callable[[PeerId, bytes, Endpoint], Awaitable[None]]

# RFC 1350 section 5: a read request for a file that nobody has. A helper of a NAT acts on it
# wherever it goes; observers are asked at no other port than 69, where nobody need listen.
TFTP_READ_REQUEST = b"\x00\x01natswarm\x00octet\x00"

# A full buffer refuses one datagram or two; this many in a row, 15 ms apart, are a network that is
# gone.
REFUSALS_MAX = 5


class InspectionDriver:
    """Runs one inspection.

    Args:
        machine: What to ask and when.
        identity: Signs requests.
        network: Where fresh ports come from.
        bind_ip: The address they are bound to.
        main_port: The port of index 0; whoever reads it passes replies to `receive_untrusted`.
        ask_neighbour: Asks a neighbour that a third peer send a reply to an endpoint of ours.
    """

    def __init__(
        self,
        machine: NatInspection,
        identity: Identity,
        network: Network,
        bind_ip: str,
        main_port: DatagramPort,
        ask_neighbour: AskNeighbour,
    ) -> None:
        self._machine = machine
        self._identity = identity
        self._network = network
        self._bind_ip = bind_ip
        self._main_port = main_port
        self._ask_neighbour = ask_neighbour
        self._groups: list[tuple[range, PortGroup]] = []  # indices and their ports
        self._bound_count = 1
        self._refusal_count = 0
        self._wakeup = trio.Event()

    async def run(self) -> None:
        """Return when the inspection is over; whatever happens, its fresh ports are closed."""
        try:
            async with open_private_nursery() as nursery:
                while True:
                    self._act(nursery)
                    timer = self._machine.next_timer()
                    if timer is None:
                        return
                    self._wakeup = trio.Event()
                    with trio.move_on_at(timer):
                        await self._wakeup.wait()
        finally:
            for _, group in self._groups:
                group.close()

    def receive_untrusted(self, port_index: int, data: bytes, source: Endpoint) -> None:
        """Take what came in on a port.

        Raises:
            DecodeError: Not an authentic echo reply.
        """
        reply = decode_echo_reply_untrusted(data)
        self._machine.receive_reply(
            Reply(
                port_index=port_index,
                local_port=self._local_port(port_index),
                transaction=reply.transaction,
                sender=reply.sender,
                source=source,
                observed=reply.observed,
                token=reply.token,
            ),
            trio.current_time(),
        )
        self._wakeup.set()

    def _act(self, nursery: trio.Nursery) -> None:
        """Send what is due, from ports that are bound by then."""
        requests = self._machine.requests_to_send(trio.current_time())
        try:
            self._bind(nursery)
        except ConfigurationError as error:
            # The next test may want fewer.
            self._bound_count = self._machine.port_count
            self._machine.give_up(str(error))
            return
        for request in requests:
            if isinstance(request, AskThirdPeer):
                nursery.start_soon(self._ask, request)
            elif (refusal := self._send(request)) is None:
                self._refusal_count = 0
            elif self._is_hopeless(request, refusal):
                return

    def _is_hopeless(self, request: Request, refusal: str) -> bool:
        """Take note of a request that the system did not take; give up after several in a row."""
        if not isinstance(request, SendTftp):  # nobody waits for an answer to that one
            self._machine.withdraw(request.transaction)
        self._refusal_count += 1
        if self._refusal_count < REFUSALS_MAX:
            return False
        self._refusal_count = 0
        self._machine.give_up(
            f"the system refuses to send ({refusal}): is the interface up, with a route?"
        )
        return True

    def _bind(self, nursery: trio.Nursery) -> None:
        """Close the ports that are done with; bind those that the test under way wants.

        Raises:
            ConfigurationError: The system gives no more.
        """
        machine = self._machine
        needed = machine.fresh_ports
        for indices, group in self._groups:
            if indices.stop <= needed.start:
                group.close()
        self._groups = [entry for entry in self._groups if entry[0].stop > needed.start]
        if machine.port_count > self._bound_count:
            indices = range(self._bound_count, machine.port_count)
            group = self._network.bind_group(self._bind_ip, len(indices))
            self._groups.append((indices, group))
            self._bound_count = machine.port_count
            nursery.start_soon(self._receive, indices.start, group)

    def _group_of(self, port_index: int) -> tuple[PortGroup, int] | None:
        for indices, group in self._groups:
            if port_index in indices:
                return group, port_index - indices.start
        return None

    def _local_port(self, port_index: int) -> int:
        found = self._group_of(port_index)
        if found is None:
            return self._main_port.local_endpoint.port
        group, index = found
        return group.local_endpoint(index).port

    def _send(self, request: SendEcho | SendSelf | SendTftp) -> str | None:
        """Send a request; return what the system said where it did not take it."""
        data = self._encode(request)
        found = None if request.port_index == 0 else self._group_of(request.port_index)
        if found is None:
            statistics = self._main_port.statistics
            failed_before = statistics.send_failed_count
            try:
                self._main_port.send(data, request.destination)
            except trio.ClosedResourceError:
                return "the main port was closed"
        else:
            group, index = found
            statistics = group.statistics(index)
            failed_before = statistics.send_failed_count
            group.send(index, data, request.destination)
        if statistics.send_failed_count == failed_before:
            return None
        return statistics.last_refusal

    def _encode(self, request: SendEcho | SendSelf | SendTftp) -> bytes:
        if isinstance(request, SendTftp):
            return TFTP_READ_REQUEST
        own = self._identity.peer_id
        if isinstance(request, SendSelf):
            reply = EchoReply(request.transaction, own, request.destination)
            return reply.encode(self._identity)
        return EchoRequest(
            request.transaction,
            own,
            from_alternate_port=request.from_alternate,
            deliver_to=request.deliver_to,
            token=request.token,
        ).encode(self._identity)

    async def _ask(self, request: AskThirdPeer) -> None:
        try:
            await self._ask_neighbour(request.observer, request.transaction, request.observed)
        except (NatswarmError, trio.BrokenResourceError):
            self._machine.withdraw(request.transaction)
            self._wakeup.set()

    async def _receive(self, first_index: int, group: PortGroup) -> None:
        while True:
            try:
                batch = await group.receive_batch()
            except trio.ClosedResourceError:
                return
            for index, arrival in batch:
                try:
                    self.receive_untrusted(first_index + index, arrival.data, arrival.source)
                except DecodeError:
                    continue
