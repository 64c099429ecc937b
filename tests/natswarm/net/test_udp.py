"""Real sockets on loopback: batches, runs, TTLs, errors, and many ports behind one wait."""

from __future__ import annotations

import errno
import resource
import selectors
import socket
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.errors import ConfigurationError
from natswarm.net import udp
from natswarm.net.udp import UdpNetwork, UdpPort

NETWORK = UdpNetwork()
LOOPBACK = Endpoint("127.0.0.1", 0)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="uses constants of Linux")


def bind_two(local=LOOPBACK):
    return NETWORK.bind(local), NETWORK.bind(local)


async def receive(port, count):
    arrivals = []
    while len(arrivals) < count:
        arrivals += await port.receive_batch()
    assert len(arrivals) == count
    return arrivals


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
async def test_datagram_arrives_with_its_source(ip):
    try:
        a, b = bind_two(Endpoint(ip, 0))
    except ConfigurationError as error:
        pytest.skip(str(error))
    assert a.local_endpoint.ip == ip
    assert a.local_endpoint.port != 0
    a.send(b"hello", b.local_endpoint)
    [arrival] = await b.receive_batch()
    assert arrival == (b"hello", a.local_endpoint)
    b.send(b"", a.local_endpoint)
    [arrival] = await a.receive_batch()
    assert arrival == (b"", b.local_endpoint)
    assert a.statistics.sent_count == a.statistics.received_count == 1
    a.close()
    b.close()


@pytest.mark.parametrize(
    "sizes",
    [
        [1200] * 3,
        [1200] * 200,
        [1200] * 10 + [77] + [1200] * 5 + [1201, 3, 3, 3, 0, 0, 9],
        [65_000, 1],
        [1] * 130,
        [],
    ],
)
@pytest.mark.parametrize("can_segment", [True, False])
async def test_run_arrives_as_it_was(sizes, can_segment):
    a, b = bind_two()
    a._can_segment = a._can_segment and can_segment
    datagrams = [bytes([index % 251]) * size for index, size in enumerate(sizes)]
    a.send_run(datagrams, b.local_endpoint)
    arrivals = await receive(b, len(datagrams))
    assert [arrival.data for arrival in arrivals] == datagrams
    assert a.statistics.sent_count == b.statistics.received_count == len(datagrams)
    a.close()
    b.close()


class RefusesSegments:
    """A socket on a system, or in front of a device, without UDP_SEGMENT."""

    def __init__(self, sock, error_number):
        self._sock = sock
        self._error_number = error_number
        self.refused_count = 0

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def sendmsg(self, *_):
        self.refused_count += 1
        raise OSError(self._error_number, "not here")


@pytest.mark.parametrize("error_number", [errno.EIO, errno.EINVAL])
async def test_run_falls_back_for_good_where_the_kernel_refuses_segments(error_number):
    a, b = bind_two()
    a._can_segment = True
    a._socket = refusing = RefusesSegments(a._socket, error_number)
    for _ in range(2):
        a.send_run([b"12", b"34", b"5"], b.local_endpoint)
    arrivals = await receive(b, 6)
    assert [arrival.data for arrival in arrivals] == [b"12", b"34", b"5"] * 2
    assert refusing.refused_count == 1
    assert a.statistics.send_failed_count == 0
    a.close()
    b.close()


async def test_full_socket_counts_as_lost():
    a, b = bind_two()
    a._can_segment = True
    a._socket = RefusesSegments(a._socket, errno.EAGAIN)
    a.send_run([b"12", b"34", b"5"], b.local_endpoint)
    assert a.statistics.send_failed_count == 3
    assert a._can_segment
    a.close()
    b.close()


@given(st.lists(st.integers(0, 2000), max_size=200))
def test_equal_runs_cover_everything_in_order_within_the_limits(sizes):
    datagrams = [bytes(size) for size in sizes]
    covered = 0
    for start, end in udp._equal_runs(datagrams):
        run = sizes[start:end]
        assert start == covered
        covered = end
        assert 1 <= len(run) <= udp.MAX_RUN_SEGMENTS
        assert sum(run) <= udp.MAX_RUN_BYTES
        assert len(run) == 1 or (set(run[:-1]) == {run[0]} and 0 < run[-1] <= run[0])
    assert covered == len(sizes)


@on_linux
async def test_ttl_is_of_one_datagram_alone():
    port = NETWORK.bind(LOOPBACK)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        sink.setsockopt(socket.IPPROTO_IP, 12, 1)  # IP_RECVTTL
        sink.settimeout(5)
        destination = Endpoint(*sink.getsockname())
        default = port._default_ttl
        for ttl in (None, 3, 3, None, 7, None):
            port.send(b"x", destination, ttl=ttl)
        port.send(b"x", destination, ttl=9)
        port.send_run([b"x", b"x"], destination)
        seen = []
        for _ in range(9):
            _, ancillary, _, _ = sink.recvmsg(100, 100)
            seen += [int.from_bytes(value[:4], "little") for _, kind, value in ancillary if kind]
        assert seen == [default, 3, 3, default, 7, default, 9, default, default]
    port.close()


async def test_what_the_system_refuses_is_counted_not_raised():
    port = NETWORK.bind(LOOPBACK)
    port.send(bytes(70_000), port.local_endpoint)  # longer than a datagram can be
    port.send(b"x", Endpoint("127.0.0.1", 0))  # no such port
    port.send(b"x", Endpoint("192.0.2.77", 9))  # not from 127.0.0.1
    port.send(b"x", Endpoint("::1", 9))  # the other family
    assert port.statistics.send_failed_count == 4
    assert port.statistics.sent_count == 0
    port.close()


@on_linux
async def test_icmp_errors_do_not_disturb_receiving():
    a, b = bind_two()
    nobody = NETWORK.bind(LOOPBACK)
    gone = nobody.local_endpoint
    nobody.close()
    a._socket.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR: report ICMP errors
    for _ in range(3):
        a.send(b"anybody?", gone)
    b.send(b"here", a.local_endpoint)
    [arrival] = await a.receive_batch()
    assert arrival.data == b"here"
    a.close()
    b.close()


async def test_closing_wakes_the_receiver_and_stops_senders():
    port = NETWORK.bind(LOOPBACK)

    async def receive_until_closed():
        with pytest.raises(trio.ClosedResourceError):
            await port.receive_batch()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_until_closed)
        await trio.testing.wait_all_tasks_blocked()
        port.close()
        port.close()
    await receive_until_closed()
    with pytest.raises(trio.ClosedResourceError):
        port.send(b"x", LOOPBACK)
    with pytest.raises(trio.ClosedResourceError):
        port.send_run([b"x", b"y"], LOOPBACK)
    assert "closed" in repr(port)


async def test_only_one_task_receives():
    port = NETWORK.bind(LOOPBACK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.receive_batch)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await port.receive_batch()
        nursery.cancel_scope.cancel()
    port.close()


def test_bind_says_what_is_wrong():
    port = NETWORK.bind(LOOPBACK)
    with pytest.raises(ConfigurationError, match="another program holds the port"):
        NETWORK.bind(port.local_endpoint)
    with pytest.raises(ConfigurationError, match="no interface"):
        NETWORK.bind(Endpoint("192.0.2.77", 0))
    trio_free_close(port)


def trio_free_close(port: UdpPort) -> None:
    # notify_closing needs a running Trio; ports live inside one.
    async def close():
        port.close()

    trio.run(close)


async def check_group(count):
    group = NETWORK.bind_group("127.0.0.1", count)
    other = NETWORK.bind(LOOPBACK)
    assert group.count == count
    assert len({group.local_endpoint(index) for index in range(count)}) == count
    for index in range(count):
        group.send(index, b"out %d" % index, other.local_endpoint)
        other.send(b"in %d" % index, group.local_endpoint(index))
    received = {}
    while len(received) < count:
        for index, arrival in await group.receive_batch():
            received[index] = arrival
    assert received == {i: (b"in %d" % i, other.local_endpoint) for i in range(count)}
    sources = {arrival.source for arrival in await receive(other, count)}
    assert sources == {group.local_endpoint(index) for index in range(count)}

    taken = group.take(1)
    with pytest.raises(trio.ClosedResourceError):
        group.take(1)
    with pytest.raises(trio.ClosedResourceError):
        group.send(1, b"x", other.local_endpoint)
    other.send(b"to the taken", taken.local_endpoint)
    other.send(b"to the group", group.local_endpoint(0))
    assert [arrival.data for _, arrival in await group.receive_batch()] == [b"to the group"]

    async def receive_until_closed():
        with pytest.raises(trio.ClosedResourceError):
            await group.receive_batch()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_until_closed)
        await trio.testing.wait_all_tasks_blocked()
        group.close()
        group.close()
    await receive_until_closed()
    with pytest.raises(trio.ClosedResourceError):
        group.send(0, b"x", other.local_endpoint)
    with pytest.raises(trio.ClosedResourceError):
        group.take(2)
    # What was taken lives on.
    assert [arrival.data for arrival in await taken.receive_batch()] == [b"to the taken"]
    taken.close()
    other.close()


async def test_group_of_many_ports():
    await check_group(300)


async def test_group_where_the_system_has_select_only(monkeypatch):
    monkeypatch.setattr(selectors, "DefaultSelector", selectors.SelectSelector)
    await check_group(10)


async def test_flooded_port_of_a_group_does_not_starve_the_others():
    group = NETWORK.bind_group("127.0.0.1", 2)
    other = NETWORK.bind(LOOPBACK)
    for _ in range(100):
        other.send(b"flood", group.local_endpoint(0))
    other.send(b"one", group.local_endpoint(1))
    batch = await group.receive_batch()
    assert (1, (b"one", other.local_endpoint)) in batch
    assert len(batch) < 100
    group.close()
    other.close()


def open_descriptor_count():
    return len(list(Path("/proc/self/fd").iterdir()))


@on_linux
async def test_group_names_the_limit_it_ran_into():
    open_before = open_descriptor_count()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_before + 60, hard))
    try:
        with pytest.raises(ConfigurationError, match=r"RLIMIT_NOFILE.*ulimit -n 756"):
            NETWORK.bind_group("127.0.0.1", 500)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptor_count() == open_before


async def test_group_on_an_address_that_is_not_ours():
    with pytest.raises(ConfigurationError, match="opened 0 of 3"):
        NETWORK.bind_group("192.0.2.77", 3)


def test_local_addresses_are_usable_and_in_a_stable_order():
    addresses = NETWORK.local_addresses()
    assert addresses == NETWORK.local_addresses()
    assert len(addresses) == len(set(addresses))
    for address in addresses:
        assert "%" not in address
        kind = address_kind(address)
        assert kind not in {AddressKind.LOOPBACK, AddressKind.LINK_LOCAL, AddressKind.UNUSABLE}
