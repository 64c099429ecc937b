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
from natswarm.swarm_key import OPEN_SWARM, SwarmKey
from natswarm.wire import (
    TFTP_READ_REQUEST,
    EchoReply,
    EchoRequest,
    decode_echo_reply_untrusted,
)

__all__ = ["AskNeighbour", "InspectionDriver"]

AskNeighbour = Callable[[PeerId, bytes, Endpoint], Awaitable[None]]

# A full buffer refuses one datagram or two; this many in a row, 15 ms apart, are a network that is
# gone.
REFUSALS_MAX = 5

# Systems draw ports from 28,000 or more; where one is drawn again that an earlier test had, its
# mapping may still be there, and what is seen of it is not new. So some more are bound.
EPHEMERAL_PORTS = 28_000
SPARE_PORTS = 4


class _FreshPorts:
    """The ports of one test: none of a number that the inspection had before, as far as there are.

    Attributes:
        indices: Their indices in the inspection.
        group: What was bound, some spare ones included.
    """

    def __init__(self, indices: range, group: PortGroup, bound: int, used: set[int]) -> None:
        self.indices = indices
        self.group = group
        numbers = [group.local_endpoint(each).port for each in range(bound)]
        in_order = sorted(range(bound), key=lambda each: numbers[each] in used)
        self._chosen = in_order[: len(indices)]
        self._index_of = dict(zip(self._chosen, indices, strict=True))
        used.update(numbers[each] for each in self._chosen)

    def member(self, port_index: int) -> int:
        """Return which port of the group has an index of ours."""
        return self._chosen[port_index - self.indices.start]

    def port_index(self, member: int) -> int | None:
        """Return the index of a port of the group; None for a spare one."""
        return self._index_of.get(member)


class InspectionDriver:
    """Runs one inspection.

    Args:
        machine: What to ask and when.
        identity: Signs requests.
        network: Where fresh ports come from.
        bind_ip: The address they are bound to.
        main_port: The port of index 0; whoever reads it passes replies to `receive_untrusted`.
        ask_neighbour: Asks a neighbour that a third peer send a reply to an endpoint of ours.
        swarm: Whose key seals what goes out and opens what comes to fresh ports.
    """

    def __init__(
        self,
        machine: NatInspection,
        identity: Identity,
        network: Network,
        bind_ip: str,
        main_port: DatagramPort,
        ask_neighbour: AskNeighbour,
        swarm: SwarmKey = OPEN_SWARM,
    ) -> None:
        self._machine = machine
        self._identity = identity
        self._network = network
        self._bind_ip = bind_ip
        self._main_port = main_port
        self._ask_neighbour = ask_neighbour
        self._swarm = swarm
        self._fresh: list[_FreshPorts] = []
        self._used_ports = {main_port.local_endpoint.port}
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
            for fresh in self._fresh:
                fresh.group.close()

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
        for fresh in self._fresh:
            if fresh.indices.stop <= needed.start:
                fresh.group.close()
        self._fresh = [each for each in self._fresh if each.indices.stop > needed.start]
        if machine.port_count > self._bound_count:
            indices = range(self._bound_count, machine.port_count)
            bound = len(indices)
            if self._bound_count > 1:
                bound += SPARE_PORTS + 2 * bound * len(self._used_ports) // EPHEMERAL_PORTS
            group = self._network.bind_group(self._bind_ip, bound)
            fresh = _FreshPorts(indices, group, bound, self._used_ports)
            self._fresh.append(fresh)
            self._bound_count = machine.port_count
            nursery.start_soon(self._receive, fresh)

    def _group_of(self, port_index: int) -> tuple[PortGroup, int] | None:
        for fresh in self._fresh:
            if port_index in fresh.indices:
                return fresh.group, fresh.member(port_index)
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
            return self._swarm.seal(reply.encode(self._identity))
        asked = EchoRequest(
            request.transaction,
            own,
            from_alternate_port=request.from_alternate,
            deliver_to=request.deliver_to,
            token=request.token,
        )
        return self._swarm.seal(asked.encode(self._identity))

    async def _ask(self, request: AskThirdPeer) -> None:
        try:
            await self._ask_neighbour(request.observer, request.transaction, request.observed)
        except (NatswarmError, trio.BrokenResourceError):
            self._machine.withdraw(request.transaction)
            self._wakeup.set()

    async def _receive(self, fresh: _FreshPorts) -> None:
        while True:
            try:
                batch = await fresh.group.receive_batch()
            except trio.ClosedResourceError:
                return
            for member, arrival in batch:
                port_index = fresh.port_index(member)
                if port_index is None:
                    continue
                try:
                    data = self._swarm.open_untrusted(arrival.data)
                    self.receive_untrusted(port_index, data, arrival.source)
                except DecodeError:
                    continue
