"""The process that keeps a lab: builds it, carries its packets, answers questions, ends it.

    python -m natswarm.lab.supervisor < settings.json

says `{"ready": ...}` or `{"error": ...}` on one line and lives until SIGTERM. `client.py` starts it
and asks it, over a socket that only root can open. A request is a word:

| request | answer |
|---|---|
| `status` | a line of JSON: devices, mappings, counters |
| `observers` | a line of JSON: two public devices, made at the first request, for `verify` |
| `capture` | the packets that the core carries, as pcap, until the asker goes |

Whatever ends it, nothing of the lab remains (`watchdog.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from natswarm.errors import NatswarmError
from natswarm.lab.builder import Builder, Device
from natswarm.lab.emulation import LabInternet
from natswarm.lab.ipv4 import encode_packet
from natswarm.lab.namespace import new_prefix, remove_all, remove_stale, started_at
from natswarm.lab.pcap import pcap_header, pcap_record
from natswarm.lab.registry import DeviceState, LabState, Registry
from natswarm.lab.settings import DevicePlan, LabSettings, NatPlan, make_plan
from natswarm.lab.watchdog import Watchdog
from natswarm.net.nursery import open_private_nursery
from natswarm.net.virtual import run_world
from natswarm.sim.packet import ICMP, TCP, UDP, Packet
from natswarm.sim.router import NatRouter

__all__ = ["OBSERVERS", "keep_lab"]

OBSERVERS = ("observer.1", "observer.2")
"""Names that no device of a user can have."""

PROTOCOLS = {"udp": UDP, "tcp": TCP, "icmp": ICMP}

# A capture that is not read is not worth holding packets up for.
CAPTURE_QUEUE_PACKETS = 2000
REQUEST_BYTES_MAX = 100


def keep_lab(settings: LabSettings, on_ready: Callable[[LabState], None]) -> None:
    """Build a lab and keep it until SIGTERM, SIGHUP or Ctrl-C.

    Args:
        settings: What it is to be.
        on_ready: Called once it is there.

    Raises:
        ConfigurationError: The settings cannot be.
        LabError: The system does not let us, or a lab of the name runs already.
    """
    registry = Registry()
    plan = make_plan(settings)
    registry.check_free(plan.name)
    remove_stale()
    prefix = new_prefix()

    def clean_up() -> None:
        registry.remove(plan.name, prefix)
        remove_all(prefix)

    watchdog = Watchdog(clean_up)
    try:
        trio.run(_Supervisor(settings, prefix, watchdog.pid, on_ready).run)
    finally:
        try:
            clean_up()
        finally:
            watchdog.close()


class _Supervisor:
    def __init__(
        self,
        settings: LabSettings,
        prefix: str,
        watchdog_pid: int,
        on_ready: Callable[[LabState], None],
    ) -> None:
        self._settings = settings
        self._plan = plan = make_plan(settings)
        self._prefix = prefix
        self._watchdog_pid = watchdog_pid
        self._registry = Registry()
        self._on_ready = on_ready
        self._internet = LabInternet(plan)
        self._started = time.monotonic()

    async def run(self) -> None:
        """Keep the lab until a signal ends it."""
        # What is unfinished is taken apart by whoever runs this, processes and all.
        with contextlib.ExitStack() as stack:
            self._builder = Builder(self._prefix, self._internet, stack)
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
                async with run_world(self._internet.world), open_private_nursery() as nursery:
                    self._nursery = nursery
                    for device in self._plan.devices:
                        self._add(device)
                    state = self._state()
                    self._registry.add(state)
                    listener = await self._listen()
                    nursery.start_soon(trio.serve_listeners, self._answer, [listener])
                    self._on_ready(state)
                    await anext(signals)
                    nursery.cancel_scope.cancel()

    def _add(self, plan: DevicePlan) -> Device:
        device = self._builder.add(plan)
        if device.tun is not None:
            self._nursery.start_soon(device.tun.run)
        return device

    def _state(self) -> LabState:
        pid = os.getpid()
        return LabState(
            name=self._plan.name,
            settings=self._settings,
            pid=pid,
            started_at=started_at(pid),
            watchdog_pid=self._watchdog_pid,
            prefix=self._prefix,
            devices=tuple(device.state for device in self._builder.devices.values()),
        )

    async def _listen(self) -> trio.SocketListener:
        path = self._registry.socket_path(self._plan.name)
        path.unlink(missing_ok=True)
        listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(8)
        return trio.SocketListener(listening)

    async def _answer(self, stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                request = await stream.receive_some(REQUEST_BYTES_MAX)
                if request == b"capture":
                    await self._capture(stream)
                    return
                try:
                    answer = self._answer_to(request)
                except NatswarmError as error:
                    # Whoever asks for what cannot be done must not end the lab.
                    answer = {"error": str(error)}
                await stream.send_all(json.dumps(answer).encode() + b"\n")

    def _answer_to(self, request: bytes | bytearray) -> dict[str, Any]:
        match request:
            case b"status":
                return self._status()
            case b"observers":
                return {"observers": [msgspec.to_builtins(each) for each in self._observers()]}
            case _:
                return {"error": f"a lab does not know the request {bytes(request)!r}"}

    def _observers(self) -> list[DeviceState]:
        known = self._builder.devices
        return [(known.get(name) or self._add(DevicePlan(name))).state for name in OBSERVERS]

    async def _capture(self, stream: trio.SocketStream) -> None:
        put, take = trio.open_memory_channel[bytes](CAPTURE_QUEUE_PACKETS)

        def tap(packet: Packet, ttl: int) -> None:
            with contextlib.suppress(trio.WouldBlock):
                put.send_nowait(pcap_record(encode_packet(packet, ttl), time.time_ns()))

        self._internet.taps.append(tap)
        try:
            async with open_private_nursery() as nursery:
                nursery.start_soon(self._cancel_when_gone, stream, nursery.cancel_scope)
                await stream.send_all(pcap_header())
                async for record in take:
                    await stream.send_all(record)
        finally:
            self._internet.taps.remove(tap)

    @staticmethod
    async def _cancel_when_gone(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        """End a capture in whose time no packet comes when nobody is there to read it."""
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.receive_some(1)
        scope.cancel()

    def _status(self) -> dict[str, Any]:
        return {
            "name": self._plan.name,
            "pid": os.getpid(),
            "seed": self._plan.seed,
            "up_s": round(time.monotonic() - self._started, 1),
            "core": {
                "hops": self._plan.hops,
                "delay_s": self._plan.delay_s,
                **{
                    name: value
                    for name, value in dataclasses.asdict(self._plan.core).items()
                    if value
                },
            },
            "counters": dataclasses.asdict(self._internet.counters),
            "devices": [self._device_status(each) for each in self._builder.devices.values()],
        }

    def _device_status(self, device: Device) -> dict[str, Any]:
        nats = [
            self._nat_status(plan, router)
            for plan, router in zip(device.plan.nats, device.routers, strict=False)
        ]
        home, tun = device.home, device.tun
        if home is not None:
            count = int(home.namespace.read_sysctl("net.netfilter.nf_conntrack_count"))
            nats.append(
                {
                    "preset": device.plan.nats[-1].preset,
                    "by": "kernel",
                    "external_ips": [home.ip],
                    "mappings": {"in all": count},
                    "counters": {},
                }
            )
        return {
            "name": device.plan.name,
            "beside": device.plan.beside,
            "ip": device.state.ip,
            "namespace": device.state.namespace,
            "external_ips": list(device.state.external_ips),
            "nats": nats,
            "counters": {} if tun is None else dataclasses.asdict(tun.counters),
            "refused": {} if tun is None else dict(tun.refused),
        }

    def _nat_status(self, plan: NatPlan, router: NatRouter) -> dict[str, Any]:
        now = self._internet.world.now
        tables = {name: router.table(protocol) for name, protocol in PROTOCOLS.items()}
        return {
            "preset": plan.preset,
            "by": "emulator",
            "external_ips": list(router.nat.external_ips),
            "mappings": {name: table.mapping_count(now) for name, table in tables.items() if table},
            "counters": {
                name: dataclasses.asdict(table.counters) for name, table in tables.items() if table
            },
        }


def main() -> None:
    """Be the process that `client.start_lab` starts."""
    output = os.fdopen(os.dup(1), "w")

    def say(value: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            output.write(json.dumps(value) + "\n")
            output.flush()
        output.close()
        # Whoever started us and waits for the end of our output need not wait for ours.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)

    # Whoever started us has nobody to wait for: init is our parent now.
    if os.fork():
        os._exit(0)
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=LabSettings)
    try:
        keep_lab(settings, lambda state: say({"ready": msgspec.to_builtins(state)}))
    except NatswarmError as error:
        say({"error": str(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()
