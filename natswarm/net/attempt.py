"""Carry out one puncture: the Trio driver of a `Puncturer`.

Moves bytes between the machine and the ports, arms one timer, reports the one event that ends it.
Datagrams of the attempt reach it through `receive`, called by whoever owns the ports; for the ports
that a birthday puncture opens it is itself the owner, until one of them has won.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from natswarm.address import Endpoint
from natswarm.net.port import DatagramPort, Network, PortGroup
from natswarm.puncture.puncturer import PathFound, PunctureExhausted, Puncturer

__all__ = ["Attempt", "PunctureReport"]

# HELLO retransmission: twice as long each time. A stranger needs one to arrive; ten of them span
# 25 s, the patience of somebody who waits for the other phone to be switched on.
HELLO_FIRST_S = 0.1
HELLO_INTERVAL_MAX_S = 5.0

LINGER_S = 3.0

PathHandler = Callable[[PathFound, DatagramPort], None]


@dataclass(frozen=True, slots=True)
class PunctureReport:
    """How a puncture went.

    Attributes:
        strategy: The plan's strategy, such as `one-sided-birthday`.
        probe_count: Probes we sent.
        received_count: Authentic answers and probes we got.
        seconds: From the start of our side to its end.
        is_ok: Whether a path was found.
        reason: Why not, or an empty string.
    """

    strategy: str
    probe_count: int
    received_count: int
    seconds: float
    is_ok: bool
    reason: str = ""


class Attempt:
    """One puncture under way.

    Args:
        puncturer: The machine.
        main_port: The node's main port, index 0 of the machine.
        network: Where the further ports come from.
        bind_ip: The address they are bound to.
        hello: A signed HELLO for `hello_targets`, repeated until the peer shows itself; for peers
            that do not expect us.
        hello_targets: Where the peer may be.
    """

    def __init__(
        self,
        puncturer: Puncturer,
        *,
        main_port: DatagramPort,
        network: Network,
        bind_ip: str,
        hello: bytes = b"",
        hello_targets: Sequence[Endpoint] = (),
    ) -> None:
        self._puncturer = puncturer
        self._main_port = main_port
        self._network = network
        self._bind_ip = bind_ip
        self._hello = hello
        self._hello_targets = hello_targets
        self._group: PortGroup | None = None
        self._wakeup = trio.Event()
        self._on_path: PathHandler | None = None
        self._path: PathFound | None = None
        self._path_port: DatagramPort = main_port
        self._failure: PunctureExhausted | None = None

    async def run(self, on_path: PathHandler) -> PunctureReport:
        """Probe until a path is found or the plan is exhausted.

        Args:
            on_path: Called at once, in the turn in which the path is found: the peer may start QUIC
                with its very next datagram, so whoever takes the path must be listening when this
                returns. A port other than the main one is the callee's from then on.
        """
        started_at = trio.current_time()
        self._on_path = on_path
        port_count = self._puncturer.extra_port_count
        async with trio.open_nursery() as nursery:
            if port_count:
                self._group = self._network.bind_group(self._bind_ip, port_count)
                nursery.start_soon(self._receive_from_group, self._group)
            if self._hello:
                nursery.start_soon(self._knock)
            try:
                await self._drive()
            finally:
                if self._group is not None:
                    self._group.close()
                nursery.cancel_scope.cancel()
        counts = self._puncturer.statistics()
        return PunctureReport(
            strategy=self._puncturer.strategy,
            probe_count=counts.sent_count,
            received_count=counts.received_count,
            seconds=(
                self._path.elapsed_s if self._path is not None else trio.current_time() - started_at
            ),
            is_ok=self._path is not None,
            reason="" if self._failure is None else self._failure.reason,
        )

    async def linger(self) -> None:
        """Keep answering the peer for a few seconds after the path was found.

        Its last question may be on the way, or our last answer lost.
        """
        self._group = None
        with trio.move_on_after(LINGER_S):
            await self._drive(until_event=False)

    def receive(self, data: bytes, source: Endpoint, *, port_index: int = 0) -> None:
        """Take a datagram of this attempt that came in on port `port_index`."""
        now = trio.current_time()
        self._puncturer.receive_datagram(port_index, data, source, now)
        self._send_due(now)
        self._take_events()
        self._wakeup.set()

    async def _drive(self, *, until_event: bool = True) -> None:
        while True:
            now = trio.current_time()
            self._puncturer.handle_timer(now)
            self._send_due(now)
            self._take_events()
            if until_event and (self._path is not None or self._failure is not None):
                return
            timer = self._puncturer.next_timer()
            self._wakeup = trio.Event()
            with trio.move_on_at(float("inf") if timer is None else timer):
                await self._wakeup.wait()

    async def _receive_from_group(self, group: PortGroup) -> None:
        try:
            while True:
                for index, arrival in await group.receive_batch():
                    self.receive(arrival.data, arrival.source, port_index=index + 1)
        except trio.ClosedResourceError:
            pass

    async def _knock(self) -> None:
        interval_s = HELLO_FIRST_S
        while self._puncturer.statistics().received_count == 0:
            for target in self._hello_targets:
                self._main_port.send(self._hello, target)
            await trio.sleep(interval_s)
            interval_s = min(2 * interval_s, HELLO_INTERVAL_MAX_S)

    def _send_due(self, now: float) -> None:
        for probe in self._puncturer.probes_to_send(now):
            if probe.port_index == 0:
                self._main_port.send(probe.data, probe.destination, ttl=probe.ttl)
            elif self._path is not None and probe.port_index == self._path.port_index:
                self._path_port.send(probe.data, probe.destination, ttl=probe.ttl)
            elif self._group is not None:
                self._group.send(probe.port_index - 1, probe.data, probe.destination, ttl=probe.ttl)

    def _take_events(self) -> None:
        while (event := self._puncturer.next_event()) is not None:
            if isinstance(event, PathFound):
                self._path = event
                if event.port_index and self._group is not None:
                    self._path_port = self._group.take(event.port_index - 1)
                if self._on_path is not None:
                    self._on_path(event, self._path_port)
            else:
                self._failure = event
