"""Ports on a virtual host, under Trio's autojumping clock and under the real one."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.net.port import Arrival, DatagramPort, Network, PortGroup
from natswarm.net.virtual import QUEUE_DATAGRAMS, VirtualNetwork, VirtualPort, run_world
from natswarm.sim.link import LinkConditions
from natswarm.sim.topology import Host, Internet
from natswarm.sim.world import World

ANY = Endpoint("0.0.0.0", 0)


@pytest.fixture
async def internet() -> AsyncIterator[Internet]:
    internet = Internet(World(seed=1))
    async with run_world(internet.world):
        yield internet


def bind(host: Host, port: int = 0) -> VirtualPort:
    return VirtualNetwork(host).bind(Endpoint("0.0.0.0", port))


def outside(host: Host, port: int) -> Endpoint:
    return Endpoint(host.nat.external_ip if host.nat is not None else host.ip, port)


def test_the_types_fit_the_seam():
    """Checked by mypy where it is run over the tests; here for the reader."""
    host = Internet(World(1)).add_host("a")
    network: Network = VirtualNetwork(host)
    port: DatagramPort = network.bind(ANY)
    group: PortGroup = network.bind_group("0.0.0.0", 2)
    assert (port.local_endpoint.port != 0, group.count) == (True, 2)


async def test_two_hosts_behind_home_routers_puncture_and_echo(internet: Internet, autojump_clock):
    a, b = internet.add_host("a", "linux-home"), internet.add_host("b", "linux-home")
    left, right = bind(a, 4000), bind(b, 4001)
    left.send(b"opens", outside(b, 4001))
    await trio.sleep(1)
    right.send(b"passes", outside(a, 4000))
    started = trio.current_time()
    assert await left.receive_batch() == [Arrival(b"passes", outside(b, 4001))]
    assert trio.current_time() - started == pytest.approx(0.026)
    left.send(b"back", outside(b, 4001))
    assert await right.receive_batch() == [Arrival(b"back", outside(a, 4000))]
    assert (left.statistics.sent_count, left.statistics.received_count) == (2, 1)


async def test_time_in_the_world_is_trios_time(internet: Internet, autojump_clock):
    start, zero = trio.current_time(), internet.world.now
    a, b = bind(internet.add_host("a")), bind(internet.add_host("b"))
    for pause in (0.0, 1e-9, 0.1, 12_345.678):
        await trio.sleep(pause)
        a.send(b"x", Endpoint("198.51.100.2", b.local_endpoint.port))
        assert internet.world.now - zero == pytest.approx(trio.current_time() - start)
        assert len(await b.receive_batch()) == 1
        assert internet.world.now - zero == pytest.approx(trio.current_time() - start)


async def test_what_is_scheduled_earlier_than_all_else_still_comes_in_time(
    internet: Internet, autojump_clock
):
    """The driver sleeps until something far away; a nearer thing must move its alarm."""
    times: list[float] = []
    world = internet.world
    await trio.sleep(3.0)
    world.catch_up()
    start, zero = trio.current_time(), world.now
    for due in (50.0, 10.0, 1.0):
        world.after(due, lambda: times.append(world.now))
        await trio.lowlevel.checkpoint()
        assert world.now - zero < 1.0  # and it must not run ahead
    await trio.sleep(5.0)
    assert times == [pytest.approx(zero + 1.0)]
    world.after(1.0, lambda: times.append(world.now))
    await trio.sleep_until(start + 60)
    assert [time - zero for time in times] == pytest.approx([1.0, 6.0, 10.0, 50.0])


async def test_a_world_that_ran_before_goes_on_and_stands_still_afterwards(autojump_clock):
    world = World(1)
    world.run_until(100.0)
    seen: list[float] = []
    world.after(1.0, lambda: seen.append(world.now))
    async with run_world(world):
        await trio.sleep(2.0)
    assert seen == [pytest.approx(101.0)]
    await trio.sleep(5.0)
    world.catch_up()
    assert world.now == pytest.approx(101.0)
    async with run_world(world):
        await trio.sleep(1.0)
        world.catch_up()
    assert world.now == pytest.approx(102.0)


async def test_a_world_has_one_driver(internet: Internet, autojump_clock):
    with pytest.raises(RuntimeError, match="clock already"):
        async with run_world(internet.world):
            raise AssertionError


async def test_errors_come_out_as_they_were_raised(autojump_clock):
    async def fail_after(delay_s: float) -> None:
        async with run_world(World(1)):
            await trio.sleep(delay_s)
            raise KeyError("body")

    async def fail_in_event() -> None:
        world = World(1)
        async with run_world(world):
            world.after(1.0, lambda: 1 / 0)
            await trio.sleep_forever()

    for delay_s in (0.0, 1.0):
        with pytest.raises(KeyError, match="body"):
            await fail_after(delay_s)
    with pytest.raises(ZeroDivisionError):
        await fail_in_event()
    with trio.move_on_after(1) as scope:
        async with run_world(World(1)):
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_closed_port_says_so(internet: Internet, autojump_clock):
    port = bind(internet.add_host("a"), 4000)
    port.close()
    port.close()
    with pytest.raises(trio.ClosedResourceError):
        port.send(b"x", outside(internet.hosts["a"], 4000))
    with pytest.raises(trio.ClosedResourceError):
        port.send_run([b"x"], outside(internet.hosts["a"], 4000))
    with pytest.raises(trio.ClosedResourceError):
        await port.receive_batch()
    again = bind(internet.hosts["a"], 4000)

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await again.receive_batch()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        again.close()


async def test_only_one_task_receives_and_a_cancelled_one_loses_nothing(
    internet: Internet, autojump_clock
):
    host = internet.add_host("a")
    port = bind(host, 4000)
    with trio.move_on_after(1):
        await port.receive_batch()
    port.send(b"to myself", outside(host, 4000))
    assert (await port.receive_batch())[0].data == b"to myself"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.receive_batch)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await port.receive_batch()
        nursery.cancel_scope.cancel()
    port.send(b"again", outside(host, 4000))
    await trio.sleep(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await port.receive_batch()
    assert scope.cancelled_caught
    assert (await port.receive_batch())[0].data == b"again"


async def test_receiving_is_a_checkpoint(internet: Internet, autojump_clock):
    host = internet.add_host("a")
    port = bind(host, 4000)
    port.send(b"x", outside(host, 4000))
    await trio.sleep(1)
    with trio.testing.assert_checkpoints():
        await port.receive_batch()


async def test_batches_keep_order_and_stay_small(internet: Internet, autojump_clock):
    a, b = bind(internet.add_host("a")), bind(internet.add_host("b"), 4000)
    a.send_run([bytes([index]) for index in range(200)], outside(internet.hosts["b"], 4000))
    await trio.sleep(1)
    received: list[bytes] = []
    while len(received) < 200:
        batch = await b.receive_batch()
        assert 1 <= len(batch) <= 64
        received += [arrival.data for arrival in batch]
    assert received == [bytes([index]) for index in range(200)]


async def test_a_full_queue_drops_and_counts(internet: Internet, autojump_clock):
    a, b = bind(internet.add_host("a")), bind(internet.add_host("b"), 4000)
    a.send_run([b"x"] * (QUEUE_DATAGRAMS + 7), outside(internet.hosts["b"], 4000))
    await trio.sleep(1)
    assert b.overflow_count == 7
    received = 0
    while received < QUEUE_DATAGRAMS:
        received += len(await b.receive_batch())
    a.send(b"fits again", outside(internet.hosts["b"], 4000))
    assert (await b.receive_batch())[0].data == b"fits again"


async def test_what_a_kernel_refuses_counts_as_failed(internet: Internet, autojump_clock):
    host = internet.add_host("a")
    port = bind(host)
    here = outside(host, 4000)
    port.send(b"x" * 65_508, here)
    port.send(b"x", Endpoint("2001:db8::1", 4000))
    port.send_run([b"x"], Endpoint(host.ip, 0))
    assert (port.statistics.send_failed_count, port.statistics.sent_count) == (3, 0)
    port.send(b"x" * 65_507, here)
    assert port.statistics.sent_count == 1


async def test_a_ttl_is_carried(internet: Internet, autojump_clock):
    a, b = bind(internet.add_host("a")), bind(internet.add_host("b"), 4000)
    for ttl in (1, 8, 9, None):
        a.send(str(ttl).encode(), outside(internet.hosts["b"], 4000), ttl=ttl)
    await trio.sleep(1)
    assert [arrival.data for arrival in await b.receive_batch()] == [b"9", b"None"]


async def test_binding_checks_addresses_and_ports(internet: Internet, autojump_clock, monkeypatch):
    host = internet.add_host("a", "linux-home")
    network = VirtualNetwork(host)
    assert network.local_addresses() == [host.ip]
    own = network.bind(Endpoint(host.ip, 4000))
    assert own.local_endpoint == Endpoint(host.ip, 4000)
    assert network.bind(ANY).local_endpoint.ip == "0.0.0.0"
    with pytest.raises(ConfigurationError, match="4000"):
        network.bind(Endpoint("0.0.0.0", 4000))
    for ip in ("198.51.100.77", "::"):
        with pytest.raises(ConfigurationError, match="not an address"):
            network.bind(Endpoint(ip, 0))
        with pytest.raises(ConfigurationError, match="not an address"):
            network.bind_group(ip, 1)
    before = len(host.ports)
    monkeypatch.setattr("natswarm.sim.host.EPHEMERAL_PORTS", (40_000, 40_099))
    with pytest.raises(ConfigurationError, match="500 ports asked for, 100 were free"):
        network.bind_group("0.0.0.0", 500)
    assert len(host.ports) == before


async def test_ports_of_both_families_are_bound_apart(internet: Internet, autojump_clock):
    host, server = internet.add_host("a", "linux-home-dual"), internet.add_host("b", "public-dual")
    network = VirtualNetwork(host)
    assert network.local_addresses() == [host.ip, host.ip6]
    old, new = network.bind(Endpoint("0.0.0.0", 4000)), network.bind(Endpoint("::", 4000))
    assert new.local_endpoint == Endpoint("::", 4000)
    there = [bind(server, 5000), VirtualNetwork(server).bind(Endpoint(str(server.ip6), 5000))]
    for port, own, other in zip((old, new), there, reversed(there), strict=True):
        for ip in server.addresses:
            port.send(b"x", Endpoint(ip, 5000))
        assert (port.statistics.sent_count, port.statistics.send_failed_count) == (1, 1)
        [arrival] = await own.receive_batch()
        assert (":" in arrival.source.ip) == (port is new)
        own.send_run([b"y"], arrival.source)
        other.send_run([b"y"], arrival.source)
        assert [arrival.data for arrival in await port.receive_batch()] == [b"y"]
    new.send(bytes(65_527), Endpoint(str(server.ip6), 5000))
    new.send(bytes(65_528), Endpoint(str(server.ip6), 5000))
    assert (new.statistics.sent_count, new.statistics.send_failed_count) == (2, 2)
    with pytest.raises(ConfigurationError, match="4000"):
        network.bind(Endpoint(str(host.ip6), 4000))
    group = network.bind_group("::", 3)
    group.send(2, b"from a group", Endpoint(str(server.ip6), 5000))
    new.close()
    assert len(host.ports6) == 3
    group.close()
    assert (len(host.ports), len(host.ports6)) == (1, 0)


async def test_a_phone_of_ipv6_alone_binds_ipv4_by_its_clat(internet: Internet, autojump_clock):
    phone, server = internet.add_host("phone", "xlat464-4g"), internet.add_host("server")
    phone.uplink.upload.conditions = phone.uplink.download.conditions = LinkConditions(0.03)
    port, there = VirtualNetwork(phone).bind(ANY), bind(server, 4000)
    port.send(b"literal", outside(server, 4000))
    [arrival] = await there.receive_batch()
    there.send(b"back", arrival.source)
    assert (await port.receive_batch())[0].source == outside(server, 4000)


async def test_a_group_hears_on_all_its_ports_and_gives_one_away(
    internet: Internet, autojump_clock
):
    phone, server = internet.add_host("phone", "orange-bg"), internet.add_host("server")
    # A radio link that loses nothing: loss is another test.
    phone.uplink.upload.conditions = phone.uplink.download.conditions = LinkConditions(0.03)
    group, answering = VirtualNetwork(phone).bind_group("0.0.0.0", 100), bind(server, 4000)
    for index in range(100):
        group.send(index, bytes([index]), outside(server, 4000), ttl=64)
    answers: list[tuple[int, Arrival]] = []
    asked: list[Arrival] = []
    while len(asked) < 100:
        asked += await answering.receive_batch()
    for arrival in asked:
        answering.send(arrival.data, arrival.source)
    await trio.sleep(1)
    while len(answers) < 36:
        answers += await group.receive_batch()
    assert all(arrival.data == bytes([index]) for index, arrival in answers)

    unseen = next(i for i in range(100) if i not in [index for index, _ in answers])
    taken = group.take(unseen)
    with pytest.raises(ValueError, match="taken"):
        group.take(unseen)
    with pytest.raises(ValueError, match="taken"):
        group.send(unseen, b"", outside(server, 4000))
    assert [arrival.data for arrival in await taken.receive_batch()] == [bytes([unseen])]
    group.close()
    group.close()
    assert len(phone.ports) == 1
    with pytest.raises(trio.ClosedResourceError):
        await group.receive_batch()
    with pytest.raises(trio.ClosedResourceError):
        group.send(0, b"", outside(server, 4000))
    with pytest.raises(trio.ClosedResourceError):
        group.take(0)
    taken.send(b"alive", outside(server, 4000))
    [arrival] = await answering.receive_batch()
    answering.send(b"so am I", arrival.source)
    assert (await taken.receive_batch())[0].data == b"so am I"


def test_under_the_real_clock():
    """No sleeping: two round trips of 30 ms are all the time it takes."""

    async def main() -> None:
        internet = Internet(World(seed=2), core_delay_s=0.001)
        a, b = internet.add_host("a"), internet.add_host("b")
        async with run_world(internet.world):
            left, right = bind(a, 1), bind(b, 2)
            start = trio.current_time()
            for _ in range(2):
                left.send(b"ping", outside(b, 2))
                assert (await right.receive_batch())[0].data == b"ping"
                right.send(b"pong", outside(a, 1))
                assert (await left.receive_batch())[0].data == b"pong"
            assert trio.current_time() - start >= 4 * 0.005
            assert internet.world.next_time() == math.inf

    trio.run(main)
