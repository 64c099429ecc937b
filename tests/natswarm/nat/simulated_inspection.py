"""Observers and an inspecting host on the virtual internet, for tests of inspection and puncture.

Echoes travel as bare bytes here; signatures are wire.py's business and would cost most of the time.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from natswarm.address import Endpoint
from natswarm.identity import PeerId
from natswarm.nat.classify import AnswerFrom, EchoToSend, NatInspection
from natswarm.nat.measurement import Observer
from natswarm.nat.profile import NatProfile
from natswarm.sim.topology import Host, Internet, SimPort

REQUEST = struct.Struct(">B8s?")
REPLY = struct.Struct(">B8s18s")
ECHO_TAG, REPLY_TAG = 200, 201


def peer_id(name: str) -> PeerId:
    return PeerId(name.encode().ljust(32, b"."))


class SimulatedObserver:
    """A public host with ports p and q that says what it sees."""

    def __init__(
        self,
        internet: Internet,
        name: str,
        lie: Callable[[Endpoint], Endpoint] = lambda seen: seen,
    ) -> None:
        host = internet.add_host(name)
        self.main, self.alternate = host.open_port(4000), host.open_port(4001)
        self.lie = lie
        self.observer = Observer(
            peer_id(name), self.main.endpoint, self.alternate.endpoint, is_neighbour=True
        )
        self.main.on_datagram = self._on_main
        self.alternate.on_datagram = self._on_alternate

    def _on_main(self, data: bytes, source: Endpoint) -> None:
        _, transaction, from_alternate = REQUEST.unpack(data)
        self.reply(self.alternate if from_alternate else self.main, transaction, source)

    def _on_alternate(self, data: bytes, source: Endpoint) -> None:
        self.reply(self.alternate, REQUEST.unpack(data)[1], source)

    def reply(self, port: SimPort, transaction: bytes, source: Endpoint) -> None:
        port.send(REPLY.pack(REPLY_TAG, transaction, self.lie(source).to_bytes()), source)


class SimulatedInspection:
    """A host that inspects its NAT, from `main` and fresh ports."""

    def __init__(
        self,
        host: Host,
        main: SimPort,
        observers: list[SimulatedObserver],
        *,
        fresh_port_count: int = 16,
    ) -> None:
        self.world = host.internet.world
        # Third peers are hosts that no port of ours ever sends to.
        self.third = host.internet.add_host(f"third-of-{host.name}").open_port()
        self.ports = [main, *(host.open_port() for _ in range(fresh_port_count))]
        self.machine = NatInspection(
            [each.observer for each in observers],
            local_ports=[port.endpoint.port for port in self.ports],
            local_endpoints=[main.endpoint],
            rng=self.world.stream(f"inspection/{host.name}"),
            now=self.world.now,
        )
        for index, port in enumerate(self.ports):
            port.on_datagram = self._receiver(index)
        self.request_count = 0
        self.finished_at: float | None = None
        self._act()

    def run(self) -> NatProfile:
        """Run the world until the inspection is over; close the fresh ports."""
        assert self.world.run(until=lambda: self.machine.result() is not None, deadline=60.0)
        self.ports[0].on_datagram = None
        for port in self.ports[1:]:
            port.close()
        profile = self.machine.result()
        assert profile is not None
        return profile

    def _receiver(self, index: int) -> Callable[[bytes, Endpoint], None]:
        def receive(data: bytes, source: Endpoint) -> None:
            _, transaction, observed = REPLY.unpack(data)
            self.machine.receive_reply(
                index, transaction, Endpoint.decode_untrusted(observed), source, self.world.now
            )
            self._act()

        return receive

    def _act(self) -> None:
        for echo in self.machine.requests_to_send(self.world.now):
            self._send(echo)
        timer = self.machine.next_timer()
        if timer is not None:
            self.world.at(max(timer, self.world.now), self._act_if_due)

    def _act_if_due(self) -> None:
        timer = self.machine.next_timer()
        if timer is not None and timer <= self.world.now:
            self._act()

    def _send(self, echo: EchoToSend) -> None:
        self.request_count += 1
        if echo.answer_from is AnswerFrom.THIRD_PEER:
            assert echo.observed is not None
            reply = REPLY.pack(REPLY_TAG, echo.transaction, echo.observed.to_bytes())
            self.third.send(reply, echo.observed)
        else:
            request = REQUEST.pack(
                ECHO_TAG, echo.transaction, echo.answer_from is AnswerFrom.ALTERNATE
            )
            self.ports[echo.port_index].send(request, echo.destination)


def random_endpoint(rng: random.Random) -> Endpoint:
    return Endpoint(f"203.0.113.{rng.randint(1, 254)}", rng.randint(1024, 65_535))
