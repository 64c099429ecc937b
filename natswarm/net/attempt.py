"""Carry out one puncture: the Trio driver of a `Puncturer`.

Moves bytes between the machine and the ports, arms one timer, reports the one event that ends it.
Datagrams of the attempt reach it through `receive`, called by whoever owns the ports; for the ports
that a birthday puncture opens it is itself the owner, until one of them has won.

`receive` works before `run` has begun and after it has ended: a peer may be faster than our
scheduler, and its last question may be on the way, or our last answer lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from natswarm.address import Endpoint
from natswarm.net.nursery import open_private_nursery
from natswarm.net.port import DatagramPort, Network, PortGroup
from natswarm.puncture.puncturer import PathFound, ProbeToSend, PunctureExhausted, Puncturer

__all__ = ["Attempt", "PunctureReport"]

# HELLO retransmission: twice as long each time, as long as the plan lasts. A stranger needs one to
# arrive; at 30 % loss seven of them, which fit into ten seconds, all fail once in 4,600.
HELLO_FIRST_S = 0.1
HELLO_INTERVAL_MAX_S = 5.0

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
        on_path: Called at once, in the turn in which the path is found: the peer may start QUIC
            with its very next datagram, so whoever takes the path must be listening when this
            returns. A port other than the main one is the callee's from then on.
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
        on_path: PathHandler,
        hello: bytes = b"",
        hello_targets: Sequence[Endpoint] = (),
    ) -> None:
        self._puncturer = puncturer
        self._main_port = main_port
        self._network = network
        self._bind_ip = bind_ip
        self._on_path = on_path
        self._hello = hello
        self._hello_targets = hello_targets
        self._started_at = trio.current_time()
        self._group: PortGroup | None = None
        self._wakeup = trio.Event()
        self._path: PathFound | None = None
        self._path_port: DatagramPort = main_port
        self._failure: PunctureExhausted | None = None

    @property
    def is_answered(self) -> bool:
        """Whether anything authentic has come from the peer."""
        return self._puncturer.statistics().received_count > 0

    async def run(self) -> PunctureReport:
        """Probe until a path is found or the plan is exhausted.

        Cancelled, it has closed the ports it opened.

        Raises:
            ConfigurationError: The system gives fewer ports than the plan needs.
        """
        try:
            async with open_private_nursery() as nursery:
                if self._hello:
                    nursery.start_soon(self._knock)
                await self._drive(nursery)
        finally:
            if self._group is not None:
                self._group.close()
                self._group = None
        return self.report("" if self._failure is None else self._failure.reason)

    def report(self, reason: str) -> PunctureReport:
        """Return how it went so far."""
        counts = self._puncturer.statistics()
        return PunctureReport(
            strategy=self._puncturer.strategy,
            probe_count=counts.sent_count,
            received_count=counts.received_count,
            seconds=(
                trio.current_time() - self._started_at
                if self._path is None
                else self._path.elapsed_s
            ),
            is_ok=self._path is not None and not reason,
            reason=reason,
        )

    def receive(self, data: bytes, source: Endpoint, *, port_index: int = 0) -> None:
        """Take a datagram of this attempt that came in on port `port_index`."""
        now = trio.current_time()
        self._puncturer.receive_datagram(port_index, data, source, now)
        self._send_due(now)
        self._take_events()
        self._wakeup.set()

    async def _drive(self, nursery: trio.Nursery) -> None:
        while True:
            now = trio.current_time()
            self._puncturer.handle_timer(now)
            # Not before a step comes that needs them: most punctures end before that.
            if self._group is None and self._puncturer.step_port_count > 0:
                port_count = self._puncturer.extra_port_count
                self._group = self._network.bind_group(self._bind_ip, port_count)
                nursery.start_soon(self._receive_from_group, self._group)
            self._send_due(now)
            self._take_events()
            if self._path is not None or self._failure is not None:
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
        while not self.is_answered:
            with contextlib.suppress(trio.ClosedResourceError):
                for target in self._hello_targets:
                    self._main_port.send(self._hello, target)
            await trio.sleep(interval_s)
            interval_s = min(2 * interval_s, HELLO_INTERVAL_MAX_S)

    def _send_due(self, now: float) -> None:
        for probe in self._puncturer.probes_to_send(now):
            # A port that was closed under us (its node leaves, or its path ended) is a lost probe.
            with contextlib.suppress(trio.ClosedResourceError):
                self._send(probe)

    def _send(self, probe: ProbeToSend) -> None:
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
                self._on_path(event, self._path_port)
            else:
                self._failure = event
