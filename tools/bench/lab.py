"""How fast a lab is: packets through TUN devices and the emulator, and making and removing one.

    python -m tools.bench.lab [--seed N] [--quick] [--json]

Needs root, as labs do. One device behind a carrier sends UDP to a public one as fast as it can:
each packet is read from one TUN device, translated, carried and written to another. 10,000 a second
are what 100 Mbit/s of full-sized packets take, more than the uplinks that the presets are of. All
else on the machine slows it down, the sender itself first: the best of several rounds counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import select
import socket
import statistics
import sys
import time
from dataclasses import asdict, dataclass

from natswarm.errors import NatswarmError
from natswarm.lab.capability import check_capable
from natswarm.lab.client import start_lab, stop_lab
from natswarm.lab.namespace import entered
from natswarm.lab.registry import LabState, Registry
from natswarm.lab.settings import LabSettings
from natswarm.sim.presets import PRESETS

TARGETS = {"packets_per_s": 10_000.0}

PAYLOAD_BYTES = {"small": 100, "full": 1400}
# What is under way: fits the socket's buffer and the device's queue.
WINDOW_PACKETS = 200
# The carriers' links lose some, which must not narrow the window for ever.
LOSS_TIMEOUT_S = 0.5
# Two access links there and back; the core delays nothing here.
NOMINAL_ROUND_TRIP_S = 2 * 2 * PRESETS["public"].access.delay_s


@dataclass(frozen=True, slots=True)
class Size:
    """How much work one round is."""

    rounds: int
    flood_s: float
    echoes: int
    labs: int


FULL = Size(5, 3.0, 2000, 5)
QUICK = Size(3, 1.0, 300, 2)


def open_udp(state: LabState, device: str) -> socket.socket:
    """Open a UDP socket on a device."""
    where = state.device(device)
    with entered(where.namespace):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    udp.bind((where.ip, 0))
    udp.setblocking(False)
    return udp


def flood(state: LabState, seconds: float, payload_bytes: int) -> float:
    """Return packets/s that arrive at s from a, with a window of them under way."""
    data = bytes(payload_bytes)
    with open_udp(state, "a") as sender, open_udp(state, "s") as receiver:
        sender.connect(receiver.getsockname())
        arrived = under_way = 0
        started = now = time.perf_counter()
        while now - started < seconds:
            for _ in range(WINDOW_PACKETS - under_way):
                sender.send(data)
            under_way = WINDOW_PACKETS
            if select.select([receiver], [], [], LOSS_TIMEOUT_S)[0]:
                count = _drain(receiver)
                arrived += count
                under_way -= count
            else:
                under_way = 0
            now = time.perf_counter()
        return arrived / (now - started)


def _drain(udp: socket.socket) -> int:
    count = 0
    while True:
        try:
            udp.recv(2048)
        except BlockingIOError:
            return count
        count += 1


def late_s(state: LabState, echoes: int) -> float:
    """Return by how much the median round trip of one datagram is longer than it should be."""
    taken = []
    with open_udp(state, "p") as asker, open_udp(state, "s") as echo:
        for _ in range(echoes):
            started = time.perf_counter()
            asker.sendto(b"ping", echo.getsockname())
            select.select([echo], [], [], 1.0)
            data, source = echo.recvfrom(100)
            echo.sendto(data, source)
            select.select([asker], [], [], 1.0)
            asker.recv(100)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken) - NOMINAL_ROUND_TRIP_S


def making_s(size: Size, seed: int) -> tuple[float, float]:
    """Return the median seconds that making and removing a lab of three devices takes."""
    made, removed = [], []
    for _ in range(size.labs):
        started = time.perf_counter()
        state = make("a=kpn-nl", "b=o2-uk-4g,home", "s=public", seed=seed)
        made.append(time.perf_counter() - started)
        started = time.perf_counter()
        stop_lab(state)
        removed.append(time.perf_counter() - started)
    return statistics.median(made), statistics.median(removed)


def make(*devices: str, seed: int) -> LabState:
    """Make a lab whose core neither delays nor loses."""
    name = Registry().free_name()
    return start_lab(LabSettings(name=name, devices=devices, delay="0", seed=seed))


def measure(size: Size, seed: int) -> dict[str, float]:
    """Return all figures."""
    figures: dict[str, float] = {}
    # A carrier without jitter or loss of its own: what bounds it is the lab.
    state = make("a=cloud-natgw", "p=public", "s=public", seed=seed)
    try:
        for word, payload_bytes in PAYLOAD_BYTES.items():
            rounds = [flood(state, size.flood_s, payload_bytes) for _ in range(size.rounds)]
            figures[f"{word}_packets_per_s"] = max(rounds)
        figures["packets_per_s"] = figures["full_packets_per_s"]
        figures["mbit_per_s"] = figures["packets_per_s"] * 8 * PAYLOAD_BYTES["full"] / 1e6
        figures["late_ms"] = 1000 * late_s(state, size.echoes)
    finally:
        stop_lab(state)
    made_s, removed_s = making_s(size, seed)
    return {**figures, "make_s": made_s, "remove_s": removed_s}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How fast a lab is; needs root.")
    parser.add_argument("--seed", type=int, default=1, help="of every lab (default 1)")
    parser.add_argument("--quick", action="store_true", help="less work: about 15 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    try:
        check_capable()
        measured = measure(size, arguments.seed)
    except NatswarmError as error:
        sys.exit(f"no laboratory here: {error}")
    figures = {name: round(value, 3) for name, value in measured.items()}
    targets = {
        name: {"value": figures[name], "target": target, "ok": figures[name] >= target}
        for name, target in TARGETS.items()
    }
    if arguments.json:
        setting = {
            "seed": arguments.seed,
            "size": asdict(size),
            "python": platform.python_version(),
        }
        print(json.dumps({"benchmark": "lab", **setting, **figures, "targets": targets}))
        return
    for name, value in figures.items():
        verdict = ""
        if name in targets:
            verdict = f"target {TARGETS[name]:,.0f}: {'met' if targets[name]['ok'] else 'MISSED'}"
        print(f"{name:<24} {value:>12,.2f}  {verdict}")


if __name__ == "__main__":
    main()
