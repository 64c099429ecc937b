"""Observers and an asking host on the bare virtual internet, for benchmarks and tests.

Echoes travel as bare bytes here; signatures are wire.py's business and would cost most of the time.
Else observers do what `net/echo.py` does: tokens are real, and answering is rate limited.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence

from natswarm.address import ENDPOINT_BYTES, Endpoint
from natswarm.identity import PeerId
from natswarm.nat.address_token import AddressTokens
from natswarm.nat.findings import Findings, NatTest
from natswarm.nat.inspection import QUICK, NatInspection
from natswarm.nat.measurement import (
    AskThirdPeer,
    Observer,
    Reply,
    Request,
    SendEcho,
    SendSelf,
)
from natswarm.nat.profile import NatProfile
from natswarm.net.budget import Budget
from natswarm.sim.topology import Host, Internet, SimPort
from natswarm.wire import ECHO_TOKEN_BYTES, NO_TOKEN, TFTP_READ_REQUEST, TRANSACTION_BYTES

__all__ = ["EchoPorts", "SimulatedInspection", "SimulatedObserver", "peer_id"]

_ECHO = struct.Struct(f">B{TRANSACTION_BYTES}s32s{ENDPOINT_BYTES}s{ECHO_TOKEN_BYTES}s")
_REQUEST, _REQUEST_ALTERNATE, _REPLY = 200, 201, 202
_BACK = bytes(ENDPOINT_BYTES)

# What a real observer allows one NAT, and room for the pace of a test to be uneven.
ANSWERS_PER_S = 200.0

# An observer and a third peer talk over a connection of their own: there and back, once.
THIRD_PEER_DELAY_S = 0.1


def peer_id(name: str) -> PeerId:
    """Return the id of a peer that signs nothing."""
    return PeerId(name.encode().ljust(32, b"."))


class SimulatedObserver:
    """A public host with ports p and q that says what it sees.

    Attributes:
        internet: Where it is.
        lie: What it says in place of what it sees.
        is_silent: Whether it has stopped to answer.
        delay_s: How long it takes to answer.
    """

    def __init__(
        self,
        internet: Internet,
        name: str,
        lie: Callable[[Endpoint], Endpoint] = lambda seen: seen,
    ) -> None:
        self.internet = internet
        host = internet.add_host(name)
        self.main, self.alternate = host.open_port(4000), host.open_port(4001)
        self.lie = lie
        self.is_silent = False
        self.delay_s = 0.0
        self.observer = Observer(
            peer_id(name), self.main.endpoint, self.alternate.endpoint, is_neighbour=True
        )
        self._world = internet.world
        self._tokens = AddressTokens(name.encode().ljust(32, b"."))
        self._budget = Budget(per_s=ANSWERS_PER_S)
        self.main.on_datagram = self._on_main
        self.alternate.on_datagram = self._on_alternate

    def _on_main(self, data: bytes, source: Endpoint) -> None:
        self._answer(self.alternate if data[0] == _REQUEST_ALTERNATE else self.main, data, source)

    def _on_alternate(self, data: bytes, source: Endpoint) -> None:
        self._answer(self.alternate, data, source)

    def _answer(self, port: SimPort, data: bytes, source: Endpoint) -> None:
        now = self._world.now
        if self.is_silent or not self._budget.take(now):
            return
        _, transaction, asker, to, token = _ECHO.unpack(data)
        target = source if to == _BACK else Endpoint.decode_untrusted(to)
        if to != _BACK and not self._tokens.is_valid(token, PeerId(asker), target.ip, now):
            return
        given = NO_TOKEN
        if target.ip == source.ip:
            given = self._tokens.issue(PeerId(asker), source.ip, now)
        observed = self.lie(source).to_bytes()
        reply = _ECHO.pack(_REPLY, transaction, self.observer.peer_id.key, observed, given)
        self._world.after(self.delay_s, port.send, reply, target)


class EchoPorts:
    """The ports from which a host asks.

    Args:
        host: Whose they are.
        receive: Takes every echo reply.

    Attributes:
        ports: By their index in an inspection; 0 is the main port.
    """

    def __init__(self, host: Host, receive: Callable[[Reply], None]) -> None:
        self.ports: list[SimPort] = []
        self._world = host.internet.world
        self._me = peer_id(host.name)
        self._receive = receive
        # Third peers are hosts that no port of ours ever sends to.
        self._third = host.internet.add_host(f"third-of-{host.name}").open_port()

    def add(self, port: SimPort) -> None:
        """Have a port be the next one."""
        port.on_datagram = self._receiver(len(self.ports))
        self.ports.append(port)

    def _receiver(self, index: int) -> Callable[[bytes, Endpoint], None]:
        def receive(data: bytes, source: Endpoint) -> None:
            kind, transaction, sender, observed, token = _ECHO.unpack(data)
            assert kind == _REPLY
            self._receive(
                Reply(
                    port_index=index,
                    local_port=self.ports[index].endpoint.port,
                    transaction=transaction,
                    sender=PeerId(sender),
                    source=source,
                    observed=Endpoint.decode_untrusted(observed),
                    token=token,
                )
            )

        return receive

    def send(self, request: Request) -> None:
        """Carry a request out."""
        if isinstance(request, SendEcho):
            data = _ECHO.pack(
                _REQUEST_ALTERNATE if request.from_alternate else _REQUEST,
                request.transaction,
                self._me.key,
                _BACK if request.deliver_to is None else request.deliver_to.to_bytes(),
                request.token,
            )
            self.ports[request.port_index].send(data, request.destination)
        elif isinstance(request, AskThirdPeer):
            reply = self._reply(peer_id("third"), request.transaction, request.observed)
            self._world.after(THIRD_PEER_DELAY_S, self._third.send, reply, request.observed)
        elif isinstance(request, SendSelf):
            reply = self._reply(self._me, request.transaction, request.destination)
            self.ports[request.port_index].send(reply, request.destination)
        else:
            self.ports[request.port_index].send(TFTP_READ_REQUEST, request.destination)

    def _reply(self, sender: PeerId, transaction: bytes, observed: Endpoint) -> bytes:
        return _ECHO.pack(_REPLY, transaction, sender.key, observed.to_bytes(), NO_TOKEN)


class SimulatedInspection:
    """A host that inspects its NAT, from `main` and fresh ports.

    Attributes:
        requests: All that was asked to be sent, with when.
        finished_at: When it was over; None before.
    """

    def __init__(
        self,
        host: Host,
        main: SimPort,
        observers: Sequence[SimulatedObserver],
        *,
        tests: Iterable[NatTest] = QUICK,
    ) -> None:
        self.world = host.internet.world
        self._host = host
        self._asker = EchoPorts(host, self._receive)
        self._used_ports = {main.endpoint.port}
        self._closed_count = 1
        self.machine = NatInspection(
            [each.observer for each in observers],
            tests=tests,
            local_endpoints=[main.endpoint],
            rng=self.world.stream(f"inspection/{host.name}"),
            now=self.world.now,
        )
        self._asker.add(main)
        self.requests: list[tuple[float, Request]] = []
        self.finished_at: float | None = None
        self._act()

    @property
    def findings(self) -> Findings:
        """What was found so far."""
        return self.machine.findings

    def run(self, deadline: float = 1e6) -> NatProfile:
        """Run the world until the inspection is over; close the fresh ports.

        Args:
            deadline: In virtual seconds, by when it has to be over.
        """
        is_over = self.world.run(until=lambda: self.finished_at is not None, deadline=deadline)
        assert is_over, f"no end by {deadline} s (seed {self.world.seed})"
        main, *fresh = self._asker.ports
        main.on_datagram = None
        for port in fresh:
            port.close()
        return self.findings.profile

    def _receive(self, reply: Reply) -> None:
        self.machine.receive_reply(reply, self.world.now)
        self._act()

    def _act(self) -> None:
        now = self.world.now
        requests = self.machine.requests_to_send(now)
        self._bind()
        for request in requests:
            self.requests.append((now, request))
            self._asker.send(request)
        timer = self.machine.next_timer()
        if timer is not None:
            self.world.at(max(timer, now), self._act_if_due)
        elif self.finished_at is None:
            self.finished_at = now

    def _bind(self) -> None:
        # As in `net/inspection.py`: an earlier port of the same number may still have a mapping.
        repeated: list[SimPort] = []
        while len(self._asker.ports) < self.machine.port_count:
            port = self._host.open_port()
            if port.endpoint.port in self._used_ports:
                repeated.append(port)
                continue
            self._used_ports.add(port.endpoint.port)
            self._asker.add(port)
        for port in repeated:
            port.close()
        for port in self._asker.ports[self._closed_count : self.machine.fresh_ports.start]:
            port.close()
        self._closed_count = max(self._closed_count, self.machine.fresh_ports.start)

    def _act_if_due(self) -> None:
        timer = self.machine.next_timer()
        if timer is not None and timer <= self.world.now:
            self._act()
