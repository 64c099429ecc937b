"""UDP ports on a virtual host: the other side of the seam, for whole nodes without a socket.

A world has its own time; here it runs in step with Trio's clock, the real one or an autojumping
`trio.testing.MockClock`. One task sleeps until the next event is due, and runs all that are; no
task and no timer exists per datagram. Whoever sends first brings the world up to the present, so
that a datagram leaves when it is sent, not when the driver happens to be scheduled.

    internet = Internet(World(seed=7))
    alice = internet.add_host("alice", "kpn-nl")
    async with run_world(internet.world):
        port = VirtualNetwork(alice).bind(Endpoint("0.0.0.0", 0))

Limits, as a kernel's: a bounded receive queue that drops when full, and sending that never waits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Generic, TypeVar

import trio

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.nat.path import PathAnswer
from natswarm.net.nursery import open_private_nursery
from natswarm.net.port import ANY_ADDRESS, ANY_ADDRESS_6, Arrival, MergedArrival, PortStatistics
from natswarm.sim.packet import TIME_EXCEEDED, Packet
from natswarm.sim.topology import DEFAULT_TTL, Host, SimPort
from natswarm.sim.world import World

__all__ = ["VirtualNetwork", "VirtualPort", "VirtualPortGroup", "VirtualProber", "run_world"]

# As many full-sized datagrams as 4 MiB hold: what QUIC stacks ask for with SO_RCVBUF, and 40 ms of
# 100 MB/s, longer than any task may hold the loop.
QUEUE_DATAGRAMS = 3000

# `receive_batch` promises "some dozens", so that one busy port can't hold the loop for long.
BATCH_DATAGRAMS = 64

MAX_DATAGRAM_BYTES = 65_507  # 65,535 - 20 (IPv4 header) - 8 (UDP header)
MAX_DATAGRAM_BYTES_6 = 65_527  # 65,535 - 8 (UDP header): IPv6 does not count its own header


@asynccontextmanager
async def run_world(world: World) -> AsyncIterator[None]:
    """Keep `world` in step with Trio's clock inside the block; afterwards it stands still.

    An exception of an event comes out of the block, or of the `send` that ran the event.

    Raises:
        RuntimeError: The world is in step with a clock already.
    """
    if world.clock is not None:
        raise RuntimeError("the world is in step with a clock already")
    driver = _Driver(world)
    world.clock = driver.present
    try:
        async with open_private_nursery() as nursery:
            nursery.start_soon(driver.run)
            yield
    finally:
        world.clock = None
        world.set_alarm(-math.inf, None)


class _Driver:
    """Keeps a world in step with Trio's clock."""

    def __init__(self, world: World) -> None:
        self._world = world
        # A world that ran before goes on from where it stood.
        self._offset = trio.current_time() - world.now
        self._due = world.now
        self._sleep = trio.CancelScope()

    def present(self) -> float:
        return trio.current_time() - self._offset

    async def run(self) -> None:
        world = self._world
        while True:
            # The clock may read a hair less than the deadline it woke us for (floating point);
            # without `max` the same deadline would wake us again, for ever on a mock clock.
            world.run_until(max(self._due, self.present()))
            self._due = world.next_time()
            world.set_alarm(self._due, self._wake_at)
            with trio.CancelScope(deadline=self._due + self._offset) as self._sleep:
                await trio.sleep_forever()
            world.set_alarm(-math.inf, None)

    def _wake_at(self, due: float) -> None:
        # Moving a deadline is all it takes: no event object, no rescheduling.
        self._due = due
        self._sleep.deadline = due + self._offset


class VirtualNetwork:
    """The `Network` of one virtual host. Its world must be inside `run_world` to move."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def bind(self, local: Endpoint) -> VirtualPort:
        """Bind one UDP port; see `Network.bind`.

        A port of `::` or an IPv6 address speaks IPv6 alone, as `UdpNetwork`'s do.
        """
        own = self._own_address(local.ip)
        return VirtualPort(self._host, self._host.open_port(local.port, own), local.ip)

    def bind_group(self, ip: str, count: int) -> VirtualPortGroup:
        """Bind `count` ports that the host draws; see `Network.bind_group`."""
        own = self._own_address(ip)
        ports: list[VirtualPort] = []
        try:
            for _ in range(count):
                ports.append(VirtualPort(self._host, self._host.open_port(0, own), ip))
        except ConfigurationError as error:
            for port in ports:
                port.close()
            raise ConfigurationError(
                f"{count} ports asked for, {len(ports)} were free: {error}"
            ) from error
        return VirtualPortGroup(ports)

    async def open_prober(self, destination: Endpoint, ttl_max: int) -> VirtualProber:
        """Open ports for a trace; see `PathNetwork.open_prober` (`natswarm/net/path.py`)."""
        own = self._own_address(ANY_ADDRESS)
        ports = [self._host.open_port(0, own) for _ in range(ttl_max)]
        return VirtualProber(self._host, ports, destination)

    def local_addresses(self) -> list[str]:
        """Our own addresses, IPv4 first."""
        return self._host.addresses

    def _own_address(self, ip: str) -> str:
        """Return the host's address that `ip` means."""
        addresses = self._host.addresses
        if ip in (ANY_ADDRESS, ANY_ADDRESS_6):
            is_ipv6 = ip == ANY_ADDRESS_6
            addresses = [address for address in addresses if (":" in address) == is_ipv6]
            if addresses:
                return addresses[0]
        elif ip in addresses:
            return ip
        raise ConfigurationError(
            f"{ip} is not an address of {self._host.name}; bind "
            f"{' or '.join(self._host.addresses)}, or {ANY_ADDRESS} for any IPv4 and "
            f"{ANY_ADDRESS_6} for any IPv6 it has"
        )


_Item = TypeVar("_Item")


class _Inbox(Generic[_Item]):
    """A bounded queue with one waiting task.

    Not a `trio.MemoryChannel`: that costs a lock and a checkpoint for each datagram, this for each
    batch.
    """

    def __init__(self) -> None:
        self.overflow_count = 0
        self._items: deque[_Item] = deque()
        self._receiver: trio.lowlevel.Task | None = None
        self.is_closed = False

    def put_nowait(self, item: _Item) -> None:
        if len(self._items) >= QUEUE_DATAGRAMS:
            self.overflow_count += 1
            return
        self._items.append(item)
        self._wake()

    async def receive_batch(self) -> list[_Item]:
        if self._receiver is not None:
            raise trio.BusyResourceError("another task receives here already")
        if self.is_closed:
            raise trio.ClosedResourceError
        if self._items:
            await trio.lowlevel.checkpoint()
        while not self._items and not self.is_closed:
            self._receiver = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._give_up)
        if self.is_closed:
            raise trio.ClosedResourceError
        items = self._items
        if len(items) <= BATCH_DATAGRAMS:
            batch = list(items)
            items.clear()
            return batch
        return [items.popleft() for _ in range(BATCH_DATAGRAMS)]

    def take_out(self, belongs: Callable[[_Item], bool]) -> list[_Item]:
        """Remove and return the items for which `belongs` holds."""
        taken = [item for item in self._items if belongs(item)]
        self._items = deque(item for item in self._items if not belongs(item))
        return taken

    def close(self) -> None:
        self.is_closed = True
        self._items.clear()
        self._wake()

    def _wake(self) -> None:
        if self._receiver is not None:
            trio.lowlevel.reschedule(self._receiver)
            self._receiver = None

    def _give_up(self, _: Callable[[], object]) -> trio.lowlevel.Abort:
        self._receiver = None
        return trio.lowlevel.Abort.SUCCEEDED


class VirtualPort:
    """One UDP port of a virtual host: a `DatagramPort`."""

    def __init__(self, host: Host, sim_port: SimPort, ip: str) -> None:
        self._world = host.internet.world
        self._sim_port = sim_port
        self._local_endpoint = Endpoint(ip, sim_port.endpoint.port)
        self._statistics = PortStatistics()
        self._inbox: _Inbox[Arrival] = _Inbox()
        self._is_closed = False
        self._can_send = _can_send_6 if ":" in ip else _can_send
        self.deliver_to(self._inbox.put_nowait)

    @property
    def local_endpoint(self) -> Endpoint:
        """The bound address and port."""
        return self._local_endpoint

    @property
    def statistics(self) -> PortStatistics:
        """Counters so far."""
        return self._statistics

    @property
    def overflow_count(self) -> int:
        """Datagrams dropped because nobody received them in time, as a full socket buffer does."""
        return self._inbox.overflow_count

    def send(self, data: bytes, destination: Endpoint, *, ttl: int | None = None) -> None:
        """Send one datagram; see `DatagramPort.send`."""
        if self._is_closed:
            raise trio.ClosedResourceError
        if not self._can_send(data, destination):
            self._statistics.send_failed_count += 1
            self._statistics.last_refusal = "not a destination for this port"
            return
        self._world.catch_up()
        self._statistics.sent_count += 1
        self._sim_port.send(data, destination, DEFAULT_TTL if ttl is None else ttl)

    def send_run(self, datagrams: Sequence[bytes], destination: Endpoint) -> None:
        """Send several datagrams to one destination; see `DatagramPort.send_run`."""
        if self._is_closed:
            raise trio.ClosedResourceError
        self._world.catch_up()
        statistics, send, can_send = self._statistics, self._sim_port.send, self._can_send
        for data in datagrams:
            if can_send(data, destination):
                statistics.sent_count += 1
                send(data, destination)
            else:
                statistics.send_failed_count += 1

    async def receive_batch(self) -> list[Arrival]:
        """Wait for datagrams; see `DatagramPort.receive_batch`."""
        return await self._inbox.receive_batch()

    async def receive_merged(self) -> list[MergedArrival]:
        """Wait for datagrams; see `DatagramPort.receive_merged`. Here nothing is merged."""
        return [MergedArrival(*arrival, 0) for arrival in await self._inbox.receive_batch()]

    def close(self) -> None:
        """Close; idempotent."""
        self._is_closed = True
        self._sim_port.close()
        self._inbox.close()

    def deliver_to(self, put: Callable[[Arrival], None]) -> None:
        """Have arrivals go elsewhere than to `receive_batch`: for a group."""
        statistics = self._statistics

        def on_datagram(data: bytes, source: Endpoint) -> None:
            statistics.received_count += 1
            put(Arrival(data, source))

        self._sim_port.on_datagram = on_datagram

    def deliver_here(self, earlier: Iterable[Arrival]) -> None:
        """Have arrivals come to `receive_batch` again, after those that came `earlier`."""
        for arrival in earlier:
            self._inbox.put_nowait(arrival)
        self.deliver_to(self._inbox.put_nowait)


class VirtualPortGroup:
    """Many ports behind one wait: a `PortGroup`."""

    def __init__(self, ports: Sequence[VirtualPort]) -> None:
        self._ports: list[VirtualPort | None] = list(ports)
        self._inbox: _Inbox[tuple[int, Arrival]] = _Inbox()
        for index, port in enumerate(ports):
            port.deliver_to(partial(self._put, index))

    @property
    def count(self) -> int:
        """How many ports the group was opened with."""
        return len(self._ports)

    def local_endpoint(self, index: int) -> Endpoint:
        """Return the address and port that port `index` is bound to."""
        return self._port(index).local_endpoint

    def send(
        self, index: int, data: bytes, destination: Endpoint, *, ttl: int | None = None
    ) -> None:
        """Send from port `index`; see `PortGroup.send`."""
        self._port(index).send(data, destination, ttl=ttl)

    def statistics(self, index: int) -> PortStatistics:
        """Return the counters of port `index` so far."""
        return self._port(index).statistics

    async def receive_batch(self) -> list[tuple[int, Arrival]]:
        """Wait for datagrams on any port of the group; see `PortGroup.receive_batch`."""
        return await self._inbox.receive_batch()

    def take(self, index: int) -> VirtualPort:
        """Take one port out, with what it has received and nobody has seen.

        Raises:
            ValueError: It was taken before.
            trio.ClosedResourceError: The group was closed.
        """
        port = self._port(index)
        self._ports[index] = None
        mine = self._inbox.take_out(lambda item: item[0] == index)
        port.deliver_here(arrival for _, arrival in mine)
        return port

    def close(self) -> None:
        """Close every port that was not taken; idempotent."""
        for port in self._ports:
            if port is not None:
                port.close()
        self._inbox.close()

    def _port(self, index: int) -> VirtualPort:
        if self._inbox.is_closed:
            raise trio.ClosedResourceError
        port = self._ports[index]
        if port is None:
            raise ValueError(f"port {index} was taken out of the group")
        return port

    def _put(self, index: int, arrival: Arrival) -> None:
        self._inbox.put_nowait((index, arrival))


class VirtualProber:
    """A port of a virtual host for each hop limit of a trace: a `PathProber`."""

    def __init__(self, host: Host, ports: Sequence[SimPort], destination: Endpoint) -> None:
        self._world = host.internet.world
        self._ports = ports
        self._destination = destination
        self._inbox: _Inbox[PathAnswer] = _Inbox()
        for ttl, port in enumerate(ports, 1):
            port.on_error = partial(self._take_error, ttl)
            port.on_datagram = partial(self._take_datagram, ttl)

    @property
    def local_ip(self) -> str:
        """See `PathProber.local_ip`."""
        return self._ports[0].endpoint.ip

    def send(self, ttl: int, data: bytes) -> None:
        """See `PathProber.send`."""
        self._world.catch_up()
        self._ports[ttl - 1].send(data, self._destination, ttl)

    async def receive(self) -> list[PathAnswer]:
        """See `PathProber.receive`."""
        return await self._inbox.receive_batch()

    def close(self) -> None:
        """See `PathProber.close`."""
        for port in self._ports:
            port.close()
        self._inbox.close()

    def _take_error(self, ttl: int, error: Packet) -> None:
        is_end = error.data != TIME_EXCEEDED
        self._inbox.put_nowait(PathAnswer(ttl, error.source.ip, is_end))

    def _take_datagram(self, ttl: int, data: bytes, source: Endpoint) -> None:
        if source == self._destination:
            self._inbox.put_nowait(PathAnswer(ttl, source.ip, is_end=True))


def _can_send(data: bytes, destination: Endpoint) -> bool:
    """Whether Linux would take the datagram from an IPv4 socket."""
    return len(data) <= MAX_DATAGRAM_BYTES and destination.port != 0 and ":" not in destination.ip


def _can_send_6(data: bytes, destination: Endpoint) -> bool:
    """Whether Linux would take the datagram from an IPv6 socket bound with `IPV6_V6ONLY`."""
    return len(data) <= MAX_DATAGRAM_BYTES_6 and destination.port != 0 and ":" in destination.ip
