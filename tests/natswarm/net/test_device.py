"""Ports of one interface alone, on the loopback, which every machine has."""

from __future__ import annotations

import errno
import socket

import pytest

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.net import device, interfaces
from natswarm.net.udp import UdpNetwork

LOOPBACK = next(
    (
        each
        for each in interfaces.inspect_interfaces().interfaces
        if any(address.ip == "127.0.0.1" for address in each.addresses)
    ),
    None,
)
pytestmark = pytest.mark.skipif(LOOPBACK is None, reason="this machine has no loopback")
NAME = "" if LOOPBACK is None else LOOPBACK.name


@pytest.mark.parametrize("ip", ["0.0.0.0", "127.0.0.1"])
async def test_datagrams_pass(ip):
    network = UdpNetwork(interface=NAME)
    port, group = network.bind(Endpoint(ip, 0)), network.bind_group(ip, 2)
    group.send(1, b"hello", Endpoint("127.0.0.1", port.local_endpoint.port))
    [arrival] = await port.receive_batch()
    assert arrival == (b"hello", Endpoint("127.0.0.1", group.local_endpoint(1).port))
    port.close()
    group.close()


@pytest.mark.parametrize(
    ("name", "ip", "text"),
    [
        ("nosuch0", "0.0.0.0", f"no interface 'nosuch0'; it has .*{NAME}"),
        ("a" * 40, "0.0.0.0", "no interface"),
        (NAME, "192.0.2.77", f"192.0.2.77 is not an address of {NAME}, which has 127.0.0.1"),
    ],
)
def test_what_cannot_work_is_said(name, ip, text):
    network = UdpNetwork(interface=name)
    with pytest.raises(ConfigurationError, match=text):
        network.bind(Endpoint(ip, 0))
    with pytest.raises(ConfigurationError, match=text):
        network.bind_group(ip, 3)


class FakeSocket(socket.socket):
    """Refuses SO_BINDTODEVICE, as the system does to others than root before Linux 5.7."""

    error = errno.EPERM

    def setsockopt(self, level, option, *value):
        if option == device.SO_BINDTODEVICE:
            raise OSError(self.error, "refused")
        super().setsockopt(level, option, *value)


@pytest.mark.skipif(device.SO_BINDTODEVICE is None, reason="Linux alone ties sockets to devices")
@pytest.mark.parametrize(
    ("error", "text"), [(errno.EPERM, "takes root.*--bind"), (errno.ENODEV, "has it gone")]
)
def test_a_refusal_says_what_to_do(monkeypatch, error, text):
    monkeypatch.setattr(socket, "socket", FakeSocket)
    monkeypatch.setattr(FakeSocket, "error", error)
    with pytest.raises(ConfigurationError, match=text):
        UdpNetwork(interface=NAME).bind_group("0.0.0.0", 3)


async def test_elsewhere_the_address_of_the_interface_is_bound(monkeypatch):
    monkeypatch.setattr(device, "SO_BINDTODEVICE", None)
    port = UdpNetwork(interface=NAME).bind(Endpoint("0.0.0.0", 0))
    assert port.local_endpoint.ip == "127.0.0.1"
    port.close()


def test_host_candidates_are_those_of_the_interface():
    everywhere = UdpNetwork().local_addresses()
    for each in interfaces.inspect_interfaces().interfaces:
        here = UdpNetwork(interface=each.name).local_addresses()
        assert set(here) == {address.ip for address in each.addresses} & set(everywhere)
    assert UdpNetwork(interface="nosuch0").local_addresses() == []
