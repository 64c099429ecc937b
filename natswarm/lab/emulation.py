"""The emulated part of a lab: a virtual internet whose hosts are TUN devices.

For each place where a namespace meets the emulated internet there is a virtual host; packets that
the namespace's kernel sends are sent by that host, and packets that reach it are written to the
device. The world runs in step with the real clock (`run_world`).

    namespace a ── TUN ── host a ── NAT (emulated) ──┐
                                                    core ── host s ── TUN ── namespace s
    namespace b ── NAT (kernel) ── TUN ── host b ────┘

No task, queue or timer exists per packet: one task a device reads what is there, up to a batch, and
the world's events write. Knows packets and descriptors; namespaces are made in `builder.py`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import trio

from natswarm.errors import DecodeError
from natswarm.lab.fragments import Reassembly, is_fragment, split_packet
from natswarm.lab.ipv4 import HEADER_BYTES, decode_packet_untrusted, encode_packet
from natswarm.lab.settings import DevicePlan, LabPlan
from natswarm.lab.tun import MTU
from natswarm.sim.host import Host
from natswarm.sim.link import IDEAL, Link
from natswarm.sim.packet import Packet
from natswarm.sim.presets import PRESETS
from natswarm.sim.router import NatRouter
from natswarm.sim.topology import Internet
from natswarm.sim.world import World

__all__ = ["LabInternet", "TunPort", "add_host"]

# Packets read before others have their turn: some milliseconds.
BATCH_PACKETS = 64

Tap = Callable[[Packet, int], None]


class LabInternet(Internet):
    """A virtual internet whose core has jitter, loss and a rate besides its delay.

    Each address has a link of its own into the core, so that what one sends does not queue behind
    what others do.

    Attributes:
        taps: Called with each packet that the core carries, and its hop limit.
    """

    def __init__(self, plan: LabPlan) -> None:
        super().__init__(World(plan.seed), core_hops=plan.hops, core_delay_s=plan.delay_s)
        self.taps: list[Tap] = []
        self._conditions = plan.core
        self._links: dict[str, Link] = {}

    def route(self, packet: Packet, ttl: int, departure: float) -> None:
        """Carry a packet through the core, if it gets into it."""
        for tap in self.taps:
            tap(packet, ttl)
        if self._conditions == IDEAL:
            super().route(packet, ttl, departure)
        elif departure > self.world.now:
            # A link with a memory must see packets in the order in which they come.
            self.world.at(departure, self._enter, packet, ttl)
        else:
            self._enter(packet, ttl)

    def _enter(self, packet: Packet, ttl: int) -> None:
        ip = packet.source.ip
        link = self._links.get(ip)
        if link is None:
            rng = self.world.stream(f"core/{ip}")
            link = self._links[ip] = Link(self._conditions, rng)
        arrival = link.arrival_time(self.world.now, packet.data)
        if arrival is None:
            self.drop_lost(packet, "core")
        else:
            super().route(packet, ttl, arrival)


def add_host(internet: Internet, device: DevicePlan) -> tuple[Host, list[NatRouter]]:
    """Add a device's emulated NATs, unless they are there, and the host that meets its namespace.

    Returns:
        The host, and the NATs from the internet inwards. Where the innermost NAT is the kernel's,
        the host is its outer side.
    """
    emulated = [nat for nat in device.nats if nat.kernel is None]
    behind: NatRouter | None = None
    routers = []
    for index, nat in enumerate(emulated, start=1):
        name = f"{device.beside or device.name}/{index}"
        known = internet.nats.get(name)
        behind = known or internet.add_nat(name, nat.kind, behind=behind)
        routers.append(behind)
    kind = PRESETS["public"]
    if device.kernel is not None:
        # The line of a home lies between its NAT and the internet.
        kind = replace(device.nats[-1].kind, behaviour=None)
    return internet.add_host(device.name, kind, behind=behind), routers


@dataclass(slots=True)
class TunCounters:
    """What passed a TUN device; counters only grow."""

    sent_count: int = 0
    """From the namespace."""
    received_count: int = 0
    """To the namespace."""
    overflow_count: int = 0
    """To the namespace, whose kernel would not take it."""


class TunPort:
    """A TUN device at work.

    Args:
        descriptor: Of the device, non-blocking; it stays the caller's to close.
        host: Whose packets it carries.

    Attributes:
        counters: What passed.
        ip: The address of the host.
        refused: How many packets of the namespace were not carried, by reason.
    """

    def __init__(self, descriptor: int, host: Host) -> None:
        self.counters = TunCounters()
        self.refused: Counter[str] = Counter()
        self._descriptor = descriptor
        self._host = host
        self.ip = host.ip
        self._world = host.internet.world
        self._reassembly = Reassembly()
        self._identification = 0
        host.on_packet = self._deliver

    async def run(self) -> None:
        """Carry packets until cancelled, or until the device is no more."""
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            self._world.catch_up()
            for _ in range(BATCH_PACKETS):
                try:
                    datagram = os.read(self._descriptor, MTU)
                except BlockingIOError:
                    break
                except OSError:
                    return  # somebody in the namespace has deleted the device
                self._send(datagram)

    def _send(self, datagram: bytes) -> None:
        """Send what the namespace sent."""
        self.counters.sent_count += 1
        try:
            if len(datagram) >= HEADER_BYTES and is_fragment(datagram):
                whole = self._reassembly.add_untrusted(datagram, self._world.now)
                if whole is None:
                    return
                datagram = whole
            packet, ttl = decode_packet_untrusted(datagram)
        except DecodeError as error:
            self.refused[str(error)] += 1
            return
        if packet.source.ip != self.ip:
            self.refused["a source address that is not the device's"] += 1
            return
        self._host.send_packet(packet, ttl)

    def _deliver(self, packet: Packet, ttl: int) -> None:
        """Hand a packet to the namespace. Inside an event."""
        datagram = encode_packet(packet, ttl)
        pieces = [datagram]
        if len(datagram) > MTU:
            self._identification = (self._identification + 1) % 65_536
            pieces = split_packet(datagram, MTU, self._identification)
        for piece in pieces:
            try:
                os.write(self._descriptor, piece)
            except OSError:
                # The queue of the namespace is full, or its interface is down.
                self.counters.overflow_count += 1
                return
        self.counters.received_count += 1
