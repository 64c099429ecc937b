"""What the QUIC transport carries and costs, beside Trio's TLS over TCP and plain QUIC drivers.

    python -m tools.bench.transport [--seed N] [--quick] [--json] [--slow-reader SECONDS]

Five parts. Two processes on 127.0.0.1, since the ends of a real connection share no core: every
round moves data through one connection of each kind, one right after the other, so that all see the
same noise of the machine; the ratio is the figure to trust, then CPU seconds. Plain drivers of qh3
and aioquic get less data, since they take their time; aioquic is left out, with a word, where it is
not installed. Then, in virtual time, emulated paths of 100 Mbit/s: those figures are the same on
any machine. Then many connections in one process: handshakes and memory; and what qh3's engine and
system calls alone cost, without which the first figures can't be judged.

With `--slow-reader` nothing but a sender that has all that it is let send, to a reader of 1 MB/s,
for so long: what both processes have in memory must not grow.

Loopback has no loss and no NAT; tools/bench/roaming_transfer.py and the lab look at those.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import trio
import trio.testing

from natswarm.address import Endpoint
from natswarm.net.udp import UdpNetwork
from tools.bench.emulated_path import Emulated, Path, measure_path
from tools.bench.transport_floor import measure_floor
from tools.bench.transport_kinds import (
    COUNT,
    ECHO,
    HERE,
    MESSAGE_BYTES,
    SECONDS,
    SINK,
    SLOW,
    SLOW_BYTES_PER_S,
    WRITE_BYTES,
    OpenStream,
    connect_plain,
    connect_quic,
    connect_tls,
    receive_exactly,
    resident_bytes,
    serve_plain_kind,
    serve_quic,
    serve_tls,
)
from tools.bench.transport_load import Load, measure_load
from tools.bench.transport_rivals import LIBRARIES, is_installed

# How much of the bulk a kind gets, so that a round of each takes about as long.
SHARES = {"quic": 1.0, "tls": 1.0, "qh3": 0.2, "aioquic": 0.03}

# From the figures and ratios that the transport is to reach.
AT_LEAST = {
    "quic_to_tls_throughput": 0.8,
    "quic_to_aioquic_throughput": 10.0,
    "striped_to_single_20_ms_1_percent": 3.0,
}
AT_MOST = {
    "quic_send_cpu_s_per_gb": 5.0,
    "quic_receive_cpu_s_per_gb": 2.2,
    "quic_round_trip_p50_ms": 1.9,
    "under_bulk_to_idle_p50": 5.0,
    "under_bulk_to_idle_p50_20_ms": 5.0,
    "quic_slow_reader_sender_growth_mb": 8.0,
    "quic_slow_reader_growth_mb": 8.0,
}

RTTS_S = (0.002, 0.02, 0.1)
LOSSES = (0.0, 0.01, 0.05)


@dataclass(frozen=True, slots=True)
class Size:
    """How much work one run is."""

    rounds: int
    bulk_bytes: int
    round_trips: int
    path_s: float
    paths: tuple[tuple[float, float], ...]
    connections: int
    slow_s: int


FULL = Size(
    5, 200_000_000, 500, 30.0, tuple((rtt_s, loss) for rtt_s in RTTS_S for loss in LOSSES), 1000, 10
)
QUICK = Size(2, 30_000_000, 100, 5.0, ((0.02, 0.0), (0.02, 0.01)), 50, 3)
WARM_UP = Size(1, 5_000_000, 50, 0.0, (), 0, 1)


@dataclass(frozen=True, slots=True)
class Figures:
    """One connection, measured."""

    connect_ms: float
    mb_per_s: float
    send_cpu_s_per_gb: float
    receive_cpu_s_per_gb: float
    round_trip_p50_ms: float
    round_trip_p99_ms: float
    under_bulk_p50_ms: float | None
    under_bulk_p99_ms: float | None
    slow_reader_mb_per_s: float | None
    """What a sender that could do more was let send to a reader of 1 MB/s."""
    slow_reader_sender_growth_mb: float | None
    slow_reader_growth_mb: float | None


Connect = Callable[[], AbstractAsyncContextManager[OpenStream]]
Measured = TypeVar("Measured")


async def measure(connect: Connect, size: Size, share: float, *, has_streams: bool) -> Figures:
    """Measure one connection: connecting, bulk to the child, then messages there and back."""
    started = time.perf_counter()
    async with connect() as open_stream:
        stream = await open_stream()
        await ask(stream, 1)
        connect_s = time.perf_counter() - started

        stream = await open_stream()
        data = bytes(WRITE_BYTES)
        writes = max(1, round(size.bulk_bytes * share / WRITE_BYTES))
        bulk_gb = writes * WRITE_BYTES / 1e9
        started, cpu_started = time.perf_counter(), time.process_time()
        await stream.send_all(SINK + COUNT.pack(writes * WRITE_BYTES))
        for _ in range(writes):
            await stream.send_all(data)
        (receive_cpu_s,) = SECONDS.unpack(await receive_exactly(stream, SECONDS.size))
        bulk_s, send_cpu_s = time.perf_counter() - started, time.process_time() - cpu_started

        idle = percentiles(await ask(await open_stream(), size.round_trips))
        under_bulk = slow = None
        if has_streams:
            under_bulk = percentiles(await ask_under_bulk(open_stream, size.round_trips))
            slow = await send_to_slow_reader(await open_stream(), size.slow_s)
    return Figures(
        connect_ms=connect_s * 1e3,
        mb_per_s=bulk_gb * 1e3 / bulk_s,
        send_cpu_s_per_gb=send_cpu_s / bulk_gb,
        receive_cpu_s_per_gb=receive_cpu_s / bulk_gb,
        round_trip_p50_ms=idle[0],
        round_trip_p99_ms=idle[1],
        under_bulk_p50_ms=under_bulk and under_bulk[0],
        under_bulk_p99_ms=under_bulk and under_bulk[1],
        slow_reader_mb_per_s=slow and slow[0],
        slow_reader_sender_growth_mb=slow and slow[1],
        slow_reader_growth_mb=slow and slow[2],
    )


async def ask(stream: trio.abc.Stream, count: int) -> list[float]:
    """Return how long each of `count` messages took there and back, one after the other."""
    message = bytes(MESSAGE_BYTES)
    round_trips = []
    await stream.send_all(ECHO + COUNT.pack(count))
    for _ in range(count):
        started = time.perf_counter()
        await stream.send_all(message)
        await receive_exactly(stream, MESSAGE_BYTES)
        round_trips.append(time.perf_counter() - started)
    return round_trips


async def ask_under_bulk(open_stream: OpenStream, count: int) -> list[float]:
    """As `ask`, while another stream sends as fast as it can."""
    bulk, talk = await open_stream(), await open_stream()

    async def send_bulk() -> None:
        await bulk.send_all(SINK + COUNT.pack(1 << 60))
        while True:
            await bulk.send_all(bytes(WRITE_BYTES))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_bulk)
        await trio.sleep(0.3)
        round_trips = await ask(talk, count)
        nursery.cancel_scope.cancel()
    await trio.aclose_forcefully(bulk)
    return round_trips


async def send_to_slow_reader(stream: trio.abc.Stream, seconds: int) -> tuple[float, float, float]:
    """Send as fast as possible to who reads 1 MB/s: MB/s, growth here and there in MB."""
    sent_bytes = 0

    async def send() -> None:
        nonlocal sent_bytes
        with suppress(trio.BrokenResourceError):  # the reader has seen enough
            while True:
                await stream.send_all(bytes(WRITE_BYTES))
                sent_bytes += WRITE_BYTES

    await stream.send_all(SLOW + COUNT.pack(seconds) + bytes(SLOW_BYTES_PER_S))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.sleep(0.5)  # the window fills
        before_bytes, started, sent_bytes = resident_bytes(), time.perf_counter(), 0
        (peer_growth_bytes,) = COUNT.unpack(await receive_exactly(stream, COUNT.size))
        nursery.cancel_scope.cancel()
    rate = sent_bytes / (time.perf_counter() - started)
    growth_bytes = max(0, resident_bytes() - before_bytes)
    await trio.aclose_forcefully(stream)
    return rate / 1e6, growth_bytes / 1e6, peer_growth_bytes / 1e6


def percentiles(times: list[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile, in ms."""
    cuts = statistics.quantiles(times, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3


# --- the two processes ---


async def run_child(seed: int, parent_port: int) -> None:
    """Serve all kinds; print the ports once all listen."""
    udp = {kind: free_udp_endpoint() for kind in ("quic", *LIBRARIES)}
    listeners = await trio.open_tcp_listeners(0, host=HERE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_quic, seed, udp["quic"], Endpoint(HERE, parent_port))
        nursery.start_soon(serve_tls, seed, listeners[0])
        for library in filter(is_installed, LIBRARIES):
            nursery.start_soon(serve_plain_kind, library, seed, udp[library])
        ports = {kind: endpoint.port for kind, endpoint in udp.items()}
        ports["tls"] = listeners[0].socket.getsockname()[1]
        await trio.testing.wait_all_tasks_blocked()
        print(json.dumps(ports), flush=True)


async def run_parent(
    seed: int, size: Size, udp: Endpoint, ports: dict[str, int]
) -> dict[str, list[Figures]]:
    """Measure every round and return its figures by kind of connection."""
    remotes = {kind: Endpoint(HERE, port) for kind, port in ports.items()}
    connects: dict[str, Connect] = {
        "quic": lambda: connect_quic(seed, udp, remotes["quic"]),
        "tls": lambda: connect_tls(seed, remotes["tls"]),
    }
    for library in filter(is_installed, LIBRARIES):
        connects[library] = partial(
            connect_plain, library, seed, free_udp_endpoint(), remotes[library]
        )
    rounds: dict[str, list[Figures]] = {kind: [] for kind in connects}
    # The first connections of a process load and compile what the others find ready.
    for number, each in enumerate([WARM_UP, *[size] * size.rounds]):
        for kind, connect in connects.items():
            has_streams = kind == "quic"
            figures = await measure(connect, each, SHARES[kind], has_streams=has_streams)
            if number:
                rounds[kind].append(figures)
    return rounds


def free_udp_endpoint() -> Endpoint:
    """Return an endpoint that nobody holds at the moment."""
    port = UdpNetwork().bind(Endpoint(HERE, 0))
    endpoint = port.local_endpoint
    port.close()
    return endpoint


async def run_slow_reader(
    seed: int, seconds: int, udp: Endpoint, ports: dict[str, int]
) -> dict[str, float]:
    """Return what a slow reader does to both ends in the long run."""
    async with connect_quic(seed, udp, Endpoint(HERE, ports["quic"])) as open_stream:
        await send_to_slow_reader(await open_stream(), WARM_UP.slow_s)
        rate, sender_growth, growth = await send_to_slow_reader(await open_stream(), seconds)
    return {
        "slow_reader_s": seconds,
        "quic_slow_reader_mb_per_s": round(rate, 3),
        "quic_slow_reader_sender_growth_mb": round(sender_growth, 3),
        "quic_slow_reader_growth_mb": round(growth, 3),
    }


async def main_parent(
    seed: int, measure_all: Callable[[Endpoint, dict[str, int]], Awaitable[Measured]]
) -> Measured:
    """Start the child and measure."""
    udp = free_udp_endpoint()
    command = [sys.executable, "-m", "tools.bench.transport"]
    command += ["--seed", str(seed), "--child", str(udp.port)]
    start_child = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
    async with trio.open_nursery() as nursery:
        child: trio.Process = await nursery.start(start_child)
        assert child.stdout is not None
        line = bytearray()
        while not line.endswith(b"\n"):
            line += await child.stdout.receive_some()
        measured = await measure_all(udp, json.loads(line))
        nursery.cancel_scope.cancel()
    return measured


# --- what it comes to ---


def summarize(rounds: dict[str, list[Figures]]) -> dict[str, float]:
    """Return the median of every figure, and the ratios of round to round."""
    figures = {}
    for kind, ones in rounds.items():
        for name in Figures.__slots__:
            values = [value for one in ones if (value := getattr(one, name)) is not None]
            if values:
                figures[f"{kind}_{name}"] = statistics.median(values)
    for kind in rounds:
        if kind != "quic":
            figures[f"quic_to_{kind}_throughput"] = statistics.median(
                quic.mb_per_s / other.mb_per_s
                for quic, other in zip(rounds["quic"], rounds[kind], strict=True)
            )
    figures["under_bulk_to_idle_p50"] = statistics.median(
        one.under_bulk_p50_ms / one.round_trip_p50_ms
        for one in rounds["quic"]
        if one.under_bulk_p50_ms is not None
    )
    return figures


def summarize_paths(paths: dict[str, tuple[Emulated, Emulated]]) -> dict[str, float]:
    """Return the ratios that have targets."""
    single, striped = paths["20 ms, 1 %"]
    clean, _ = paths["20 ms, 0 %"]
    return {
        "striped_to_single_20_ms_1_percent": striped.mb_per_s / single.mb_per_s,
        "under_bulk_to_idle_p50_20_ms": clean.under_bulk_p50_ms / clean.idle_p50_ms,
    }


def measure_paths(size: Size, seed: int) -> dict[str, tuple[Emulated, Emulated]]:
    """Return what one lane and what as many as help do on each path."""
    return {
        f"{rtt_s * 1e3:g} ms, {loss:.0%}".replace("%", " %"): (
            measure_path(Path(100, rtt_s, loss), seconds=size.path_s, seed=seed, may_stripe=False),
            measure_path(Path(100, rtt_s, loss), seconds=size.path_s, seed=seed),
        )
        for rtt_s, loss in size.paths
    }


def judge(figures: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return each target with its figure; one whose figure was not taken is left out."""
    targets: dict[str, dict[str, Any]] = {}
    for bounds, is_met in ((AT_LEAST, float.__ge__), (AT_MOST, float.__le__)):
        for name, target in bounds.items():
            if name in figures:
                value = figures[name]
                targets[name] = {"value": value, "target": target, "ok": is_met(value, target)}
    return targets


def show(
    figures: dict[str, float],
    targets: dict[str, dict[str, Any]],
    paths: dict[str, tuple[Emulated, Emulated]],
    load: Load,
) -> None:
    """Print for people."""
    for name, value in figures.items():
        verdict = ""
        if name in targets:
            word = "met" if targets[name]["ok"] else "MISSED"
            verdict = f"   target {targets[name]['target']:g}: {word}"
        print(f"{name:36} {value:10,.2f}{verdict}")
    if not is_installed("aioquic"):
        print('aioquic is not installed: pip install -e ".[bench]"')
    print("\n100 Mbit/s      one lane                        as many lanes as help")
    print("                MB/s  4 KiB idle/under bulk/p99   MB/s  ... (ms)                lanes")
    for name, ends in paths.items():
        row = "   ".join(
            f"{end.mb_per_s:5.2f}  {end.idle_p50_ms:5.1f} {end.under_bulk_p50_ms:6.1f} "
            f"{end.under_bulk_p99_ms:7.1f}    "
            for end in ends
        )
        print(f"{name:14} {row} {ends[1].lane_count}")
    print()
    for name, value in asdict(load).items():
        print(f"{name:36} {value:10,.2f}")


def show_slow_reader(figures: dict[str, float], as_json: bool) -> None:
    """Print what the slow reader alone came to."""
    targets = judge(figures)
    if as_json:
        print(json.dumps({"benchmark": "transport", **figures, "targets": targets}))
        return
    for name, value in figures.items():
        print(f"{name:36} {value:10,.2f}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the identities and of the losses")
    parser.add_argument("--quick", action="store_true", help="a rough figure in seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--slow-reader", type=int, metavar="SECONDS", help="this alone, so long")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        trio.run(run_child, arguments.seed, arguments.child)
        return
    if arguments.slow_reader is not None:
        measure_slow = partial(run_slow_reader, arguments.seed, arguments.slow_reader)
        show_slow_reader(trio.run(main_parent, arguments.seed, measure_slow), arguments.json)
        return
    size = QUICK if arguments.quick else FULL
    load = measure_load(size.connections, arguments.seed)
    rounds = trio.run(main_parent, arguments.seed, partial(run_parent, arguments.seed, size))
    floor = measure_floor(size.bulk_bytes, arguments.seed)
    paths = measure_paths(size, arguments.seed)
    figures = {
        name: round(value, 3)
        for name, value in (summarize(rounds) | summarize_paths(paths) | asdict(floor)).items()
    }
    figures["floor_to_tls_throughput"] = round(floor.mb_per_s / figures["tls_mb_per_s"], 3)
    targets = judge(figures)
    if not arguments.json:
        show(figures, targets, paths, load)
        return
    result = {
        "benchmark": "transport",
        "seed": arguments.seed,
        "quick": arguments.quick,
        "python": platform.python_version(),
        **figures,
        "load": asdict(load),
        "paths": {name: [asdict(end) for end in ends] for name, ends in paths.items()},
        "rounds": {kind: [asdict(one) for one in ones] for kind, ones in rounds.items()},
        "targets": targets,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
