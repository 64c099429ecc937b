"""Tracing by the kernel's routers: what it finds, without privileges, and that it sends no more."""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.topology import Host, Lab
from natswarm.net.path import IP_RECVERR

OpenSocket = Callable[[Host], socket.socket]

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]
PORT = 4000
TTL_MAX = 16

# Prints the report of one trace: (address, TTL of an opener, NATs, reached, reason).
SCRIPT = """
import json, sys, trio
sys.path.insert(0, sys.argv[1])
from natswarm.address import Endpoint
from natswarm.net.path import SystemPaths, trace_path
options = json.loads(sys.argv[2])
destination = Endpoint(options.pop("peer"), options.pop("port"))
report = trio.run(lambda: trace_path(SystemPaths(**options), destination))
print(json.dumps({
    "ips": [hop.ip for hop in report.hops], "opener_ttl": report.opener_ttl,
    "nats": report.nat_count_at_least, "reached": report.reached, "reason": report.reason,
    "local_ip": report.local_ip, "has_scapy": "scapy" in sys.modules,
    "rtts": [hop.rtt_s for hop in report.hops],
}))
"""
SILENCE = """
table ip quiet {
    chain speaking {
        type filter hook output priority filter; policy accept;
        icmp type time-exceeded drop
    }
}
"""
# Root without a single capability: who may read our files, and no more.
UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]


def trace(
    host: Host, peer: str, *, port: int = PORT, is_privileged: bool = True, **options: object
) -> dict[str, object]:
    argv = [] if is_privileged else list(UNPRIVILEGED)
    argv += [sys.executable, "-c", SCRIPT, str(ROOT)]
    argv += [json.dumps({"peer": peer, "port": port, **options})]
    return json.loads(host.namespace.run(argv, timeout_s=60))


class Wire:
    """All frames that come from a client to its router."""

    def __init__(self, host: Host) -> None:
        assert host.router is not None
        with host.router.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self._socket.bind(("lan", 0))
        self._socket.setblocking(False)
        self._host = host

    def close(self) -> None:
        self._socket.close()

    def packets(self) -> Iterator[tuple[int, int, str, int]]:
        """Yield (protocol, TTL, destination, destination's port) of what the client sent."""
        while True:
            try:
                frame, address = self._socket.recvfrom(2048)
            except BlockingIOError:
                return
            if address[2] == socket.PACKET_OUTGOING:
                continue  # from the router
            if address[1] == 0x0800:
                assert socket.inet_ntoa(frame[26:30]) == self._host.ip
                (port,) = struct.unpack_from(">H", frame, 36)
                yield frame[23], frame[22], socket.inet_ntoa(frame[30:34]), port
            elif address[1] == 0x86DD:
                # The kernel's own multicast and neighbour discovery.
                assert frame[20] in (0, socket.IPPROTO_ICMPV6), "a program sent by IPv6"
            else:
                assert address[1] == 0x0806, "neither IP nor ARP"


MECHANISMS = pytest.mark.parametrize(
    ("is_privileged", "has_error_queue"),
    [(True, True), (False, True), (True, False)],
    ids=["error queue", "error queue, unprivileged", "raw socket"],
)


@MECHANISMS
def test_the_way_through_a_nat_and_nothing_else_is_sent(
    lab: Lab, is_privileged: bool, has_error_queue: bool
):
    client = lab.add_client("client", KernelNat(NatKind.RANDOM))
    peer = lab.add_public("peer")  # its port is closed, so its kernel answers
    wire = Wire(client)
    options = {"is_privileged": is_privileged, "has_error_queue": has_error_queue}
    found = trace(client, peer.ip, **options)
    sent = list(wire.packets())
    wire.close()
    assert found["reached"]
    home, core, end = found["ips"]
    assert home == client.ip.rsplit(".", 1)[0] + ".1"
    assert core.startswith(("203.0.113.", "198.51.100."))
    assert end == peer.ip
    assert (found["opener_ttl"], found["nats"], found["reason"]) == (2, 1, "")
    assert found["local_ip"] == client.ip
    assert found["has_scapy"] == (not has_error_queue)
    assert all(rtt is None or 0 < rtt < 1 for rtt in found["rtts"])
    assert {(protocol, ip, port) for protocol, _, ip, port in sent} == {
        (socket.IPPROTO_UDP, peer.ip, PORT)
    }
    ttls = [ttl for _, ttl, _, _ in sent]
    assert set(ttls) == set(range(1, TTL_MAX + 1))
    assert all(ttls.count(ttl) <= 3 for ttl in ttls)


@MECHANISMS
def test_a_peer_that_drops_probes_is_not_reached_but_the_way_is_known(
    lab: Lab, open_socket: OpenSocket, is_privileged: bool, has_error_queue: bool
):
    client, peer = lab.add_client("client", KernelNat(NatKind.PRESERVING)), lab.add_public("peer")
    port = open_socket(peer).getsockname()[1]
    options = {"is_privileged": is_privileged, "has_error_queue": has_error_queue}
    found = trace(client, peer.ip, port=port, **options)
    assert not found["reached"]
    assert len(found["ips"]) == 2
    assert (found["opener_ttl"], found["nats"]) == (2, 1)


def test_a_raw_socket_takes_privileges_and_says_so(lab: Lab):
    host, peer = lab.add_public("host"), lab.add_public("peer")
    found = trace(host, peer.ip, is_privileged=False, has_error_queue=False)
    assert "raw socket" in found["reason"]
    assert "run as root" in found["reason"]
    assert found["ips"] == []


@pytest.mark.parametrize("has_error_queue", [True, False])
def test_an_interface_is_kept_to_and_a_silent_router_is_none(lab: Lab, has_error_queue: bool):
    """A second way out without a route: only who ties the socket to it goes there."""
    client, peer = lab.add_client("client", KernelNat(NatKind.PRESERVING)), lab.add_public("peer")
    client.namespace.ip(
        "link add name sim type veth peer name nobody",
        "address add 10.9.9.2/24 dev sim",
        "link set dev sim up",
        "link set dev nobody up",
    )
    assert client.router is not None
    client.router.nft(SILENCE)
    wire = Wire(client)
    found = trace(client, peer.ip, interface="lan", has_error_queue=has_error_queue)
    assert found["ips"][0] is None
    assert (found["ips"][-1], found["opener_ttl"], found["nats"]) == (peer.ip, 2, 1)
    ttls = [ttl for _, ttl, _, _ in wire.packets()]
    assert ttls.count(1) == 3  # the silent router is asked again
    found = trace(client, peer.ip, interface="sim", has_error_queue=has_error_queue)
    assert (found["local_ip"], found["ips"], found["opener_ttl"]) == ("10.9.9.2", [], None)
    assert list(wire.packets()) == []
    wire.close()


class ErrorQueue:
    """What routers say about the datagrams of a socket."""

    def __init__(self, udp: socket.socket) -> None:
        udp.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        self._socket = udp

    def send(self, destination: tuple[str, int], ttl: int = 64) -> None:
        self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._socket.sendto(b"probe", destination)

    def next(self) -> tuple[str, int, int, int] | None:
        """Return (who says it, type, code, port it was sent to), or None if nothing is there."""
        try:
            _, [(_, _, value)], _, (_, port) = self._socket.recvmsg(9, 99, socket.MSG_ERRQUEUE)
        except BlockingIOError:
            return None
        return socket.inet_ntoa(value[20:24]), value[5], value[6], port

    def wait(self) -> tuple[str, int, int, int]:
        """Wait for an error and return it as `next`."""
        poll = select.poll()
        poll.register(self._socket, 0)  # errors are always told
        assert poll.poll(5000), "no router said anything"
        error = self.next()
        assert error is not None
        return error


def test_errors_about_what_comes_in_are_those_of_the_emulator(lab: Lab, open_socket: OpenSocket):
    """`tests/natswarm/sim/test_icmp.py` says the same of emulated NATs."""
    client, peer = lab.add_client("client", KernelNat(NatKind.PRESERVING)), lab.add_public("peer")
    inside, outside = open_socket(client), open_socket(peer)
    inside.sendto(b"opens", outside.getsockname())
    _, mapped = outside.recvfrom(100)
    queue = ErrorQueue(outside)
    queue.send((client.public_ip, 9), ttl=2)  # silent: the NAT would not forward it
    queue.send((client.public_ip, 9))  # and what it refuses it refuses in silence
    queue.send(mapped, ttl=2)
    assert queue.wait() == (client.public_ip, 11, 0, mapped[1])
    inside.close()
    queue.send(mapped)
    assert queue.wait() == (client.public_ip, 3, 3, mapped[1])


def test_a_router_says_as_much_as_an_emulated_one(lab: Lab, open_socket: OpenSocket):
    client, peer = lab.add_client("client", KernelNat(NatKind.PRESERVING)), lab.add_public("peer")
    inside, outside = open_socket(client), open_socket(peer)
    queue = ErrorQueue(inside)
    for _ in range(20):
        queue.send(outside.getsockname(), ttl=1)
    queue.send(outside.getsockname())
    _, mapped = outside.recvfrom(100)
    outside.sendto(b"comes behind all errors", mapped)
    inside.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    assert inside.recv(100) == b"comes behind all errors"
    inside.setblocking(False)
    errors = []
    while (error := queue.next()) is not None:
        errors.append(error)
    # 20 datagrams a second's fraction apart: six at once, and perhaps one more.
    assert len(errors) in (6, 7)
