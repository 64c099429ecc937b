"""A phone with two SIMs: which one does a port use?

Both modems reach a host with the same address, each its own, so that whoever answers tells the way.
Only the first has the default route, as with SIMs of which one is preferred for data.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.lab.namespace import Namespace, new_prefix, remove_all
from natswarm.net.udp import UdpNetwork

pytestmark = pytest.mark.lab

REMOTE = "203.0.113.9"


@pytest.fixture
def phone(_capable_machine: None) -> Iterator[tuple[Namespace, list[Namespace]]]:
    prefix = new_prefix()
    try:
        phone = Namespace(prefix, "phone")
        carriers = [Namespace(prefix, f"carrier{index}") for index in range(2)]
        for index, carrier in enumerate(carriers):
            carrier.ip(
                f"link add name sim type veth peer name wwan{index} netns {phone.full_name}",
                f"address add 10.{index}.0.1/24 dev sim",
                f"address add {REMOTE}/32 dev lo",
                "link set dev sim up",
            )
            phone.ip(
                f"address add 10.{index}.0.2/24 dev wwan{index}",
                f"link set dev wwan{index} up",
                f"route add default via 10.{index}.0.1 metric {100 * (index + 1)}",
            )
        yield phone, carriers
    finally:
        remove_all(prefix)


def bind(namespace: Namespace, network: UdpNetwork, ip: str = "0.0.0.0"):
    with namespace.entered():
        return network.bind(Endpoint(ip, 0))


async def carrier_reached(phone, carriers, network: UdpNetwork) -> tuple[int, str]:
    """Return whose host heard us, and from which address."""
    port = bind(phone, network)
    with carriers[0].entered():
        remotes = [UdpNetwork().bind(Endpoint(REMOTE, 4000))]
    with carriers[1].entered():
        remotes.append(UdpNetwork().bind(Endpoint(REMOTE, 4000)))
    heard: list[tuple[int, str]] = []

    async def listen(index: int, done: trio.CancelScope) -> None:
        [arrival] = await remotes[index].receive_batch()
        heard.append((index, arrival.source.ip))
        remotes[index].send(b"answer", arrival.source)
        done.cancel()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for index in range(2):
                nursery.start_soon(listen, index, nursery.cancel_scope)
            port.send(b"question", Endpoint(REMOTE, 4000))
        [answer] = await port.receive_batch()
    assert answer.data == b"answer"
    for each in (port, *remotes):
        each.close()
    return heard[0]


async def test_a_port_uses_the_interface_it_was_told(phone):
    assert await carrier_reached(*phone, UdpNetwork()) == (0, "10.0.0.2")
    for index in range(2):
        network = UdpNetwork(interface=f"wwan{index}")
        assert await carrier_reached(*phone, network) == (index, f"10.{index}.0.2")


def test_addresses_are_those_of_the_interface(phone):
    namespace, _ = phone
    with namespace.entered():
        assert UdpNetwork().local_addresses() == ["10.0.0.2", "10.1.0.2"]
        assert UdpNetwork(interface="wwan1").local_addresses() == ["10.1.0.2"]
        with pytest.raises(ConfigurationError, match=r"10\.0\.0\.2 is not an address of wwan1"):
            UdpNetwork(interface="wwan1").bind(Endpoint("10.0.0.2", 0))


async def test_an_interface_that_vanishes_loses_datagrams_and_nothing_else(phone):
    namespace, _ = phone
    network = UdpNetwork(interface="wwan1")
    port = bind(namespace, network)
    namespace.ip("link delete dev wwan1")
    port.send(b"lost", Endpoint(REMOTE, 4000))
    assert port.statistics.send_failed_count == 1
    with (
        namespace.entered(),
        pytest.raises(ConfigurationError, match=r"no interface 'wwan1'; it has .*wwan0"),
    ):
        network.bind(Endpoint("0.0.0.0", 0))
    port.close()
