"""A node's main port is forwarded while it runs, wherever it is, and given back."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.net.forwarder import SETTLE_S, Forwarder, SystemGateway
from natswarm.net.gateway import Gateway, Reach

from .fake_gateway import HOME, FakeGateway, FakeReachNetwork


@dataclass
class Source:
    """Where the fake gateway is; None: nowhere."""

    reach: Reach
    gateway: Gateway | None = HOME

    def find(self) -> Gateway:
        if self.gateway is None:
            raise ConfigurationError("nobody to ask")
        return self.gateway


@pytest.fixture
async def fake(nursery):
    return FakeGateway()


@pytest.fixture
def source(fake, nursery):
    network = FakeReachNetwork(fake, nursery)
    return Source(Reach(network, network.connect, random.Random(1), random.Random(2).randbytes))


@pytest.fixture
def changes():
    return []


@pytest.fixture
def forwarder(source, changes):
    forwarder = Forwarder(source, 4000, lambda: changes.append(forwarder.endpoint))
    return forwarder


OPEN = Endpoint("203.0.113.9", 4000)


async def test_it_is_offered_kept_and_given_back(fake, forwarder, changes, autojump_clock):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forwarder.run)
        await forwarder.wait_tried()
        assert forwarder.endpoint == OPEN
        await trio.sleep(7200)
        assert list(fake.mappings) == [4000], "renewed"
        fake.external_ip = "203.0.113.10"
        fake.reboot()
        await trio.sleep(120)
        assert changes == [OPEN, Endpoint("203.0.113.10", 4000)]
        nursery.cancel_scope.cancel()
    assert fake.mappings == {}


async def test_below_another_nat_it_is_not_offered(fake, forwarder, changes, autojump_clock):
    fake.external_ip = "100.64.3.4"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forwarder.run)
        await forwarder.wait_tried()
        assert forwarder.endpoint is None
        assert changes == []
        nursery.cancel_scope.cancel()
    assert fake.mappings == {}


async def test_it_follows_us_to_another_network(fake, source, forwarder, changes, autojump_clock):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forwarder.run)
        await forwarder.wait_tried()
        source.gateway = None
        forwarder.move()
        await trio.sleep(5)
        assert forwarder.endpoint is None
        assert fake.mappings == {}
        source.gateway = HOME
        await trio.sleep(60)
        assert fake.mappings == {}, "nobody is asked again and again"
        forwarder.move()
        await trio.sleep(5)
        assert changes == [OPEN, OPEN]
        nursery.cancel_scope.cancel()


async def test_most_gateways_have_no_such_service(fake, forwarder, changes, autojump_clock):
    fake.speaks = set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forwarder.run)
        began_at = trio.current_time()
        await forwarder.wait_tried()
        assert trio.current_time() - began_at == pytest.approx(SETTLE_S)
        fake.speaks = {*FakeGateway().speaks}
        await trio.sleep(1900)
        assert changes == [OPEN], "it was asked again after half an hour"
        nursery.cancel_scope.cancel()


class Interfaces:
    """One interface with a default route."""

    def __init__(self, name: str, ip: str) -> None:
        self._name, self._ip = name, ip

    def interfaces(self):
        return [self._name]

    def ifaddresses(self, name):
        return {2: [{"addr": self._ip, "netmask": "255.255.255.0"}]}

    def gateways(self):
        gateway = f"{self._ip.rpartition('.')[0]}.1"
        return {"default": {2: (gateway, self._name)}, 2: [(gateway, self._name, True)]}

    def routed_without_gateway(self):
        return []


def test_which_gateway_is_asked():
    home = Interfaces("wlan0", "192.168.1.7")
    assert SystemGateway(source=home).find() == HOME
    assert SystemGateway("wlan0", source=home).find() == HOME
    assert SystemGateway(bind_ip="192.168.1.7", source=home).find() == HOME
    with pytest.raises(ConfigurationError, match="we are bound to"):
        SystemGateway(bind_ip="192.168.1.8", source=home).find()
    with pytest.raises(ConfigurationError, match="vpn"):
        SystemGateway(source=Interfaces("wg0", "10.1.1.7")).find()
    with pytest.raises(ConfigurationError, match="public"):
        SystemGateway(source=Interfaces("eth0", "8.8.4.4")).find()


async def test_a_node_offers_it_to_all(open_swarm, fake, source, autojump_clock):
    async with open_swarm(seed=1) as swarm:
        await swarm.add_observers()
        node = await swarm.add_inspected("a", "linux-home", gateway=source)
        port = node.local_endpoint.port
        assert fake.mappings[port][:2] == (HOME.local_ip, port)
        # Nobody sees the node at the address that the gateway names: there is a further NAT.
        assert node.profile.local_endpoints[0] == Endpoint(fake.external_ip, port)
        assert node.profile.forwarded_endpoints == ()
        assert (await node.invite()).dialled_endpoints == ()

        (fake.external_ip,) = node.profile.public_ips
        fake.reboot()
        await trio.sleep(120)
        forwarded = (Endpoint(fake.external_ip, port),)
        assert (await node.invite()).dialled_endpoints == forwarded
        for name in ("obs0", "obs1"):
            assert swarm.peer(name, "a").record.profile.forwarded_endpoints == forwarded
        # It is no address of its own: the next look still finds the NAT.
        assert (await node.inspect()).is_translated
        assert node.local_addresses() == [swarm.hosts["a"].ip]
        await swarm.stop("a")
        assert fake.mappings == {}
