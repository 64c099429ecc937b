"""Nodes that share a LAN find each other by multicast, and nobody else finds them.

    kim ──┐
    lou ──┼── bridge "house" ── mia ── bridge "attic" ── ned

mia has two interfaces, and forwards nothing.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from natswarm.lab.errors import LabError
from natswarm.lab.namespace import Namespace, new_prefix, remove_all
from natswarm.lab.process import LabProcess
from natswarm.net.lan import GROUP_IPV4, GROUP_PORT
from tools.lab.pair import NATSWARM

pytestmark = pytest.mark.lab

# A first beacon, a jitter and a dial take 2 s; lost ones come again after 3 and 12 s.
FOUND_S = 30


class House:
    """Namespaces of people, and switches between them."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._prefix = new_prefix()
        self._switches = Namespace(self._prefix, "switches")
        self._counts: dict[str, int] = {}
        self.people: dict[str, Namespace] = {}

    def add(self, name: str, *bridges: str) -> Namespace:
        person = self.people[name] = Namespace(self._prefix, name)
        for bridge in bridges:
            self.plug(name, bridge)
        return person

    def plug(self, name: str, bridge: str) -> str:
        """Connect somebody to a bridge; return the interface."""
        if bridge not in self._counts:
            self._counts[bridge] = 0
            # No snooping: nobody in this house asks who is in which group.
            self._switches.ip(
                f"link add name {bridge} type bridge mcast_snooping 0", f"link set dev {bridge} up"
            )
        self._counts[bridge] += 1
        interface, person = f"eth-{bridge}", self.people[name]
        number = list(self._counts).index(bridge)
        self._switches.ip(
            f"link add name {name}-{bridge} type veth peer name {interface} "
            f"netns {person.full_name}",
            f"link set dev {name}-{bridge} master {bridge} up",
        )
        person.sysctl(f"net.ipv6.conf.{interface}.accept_dad", 0)
        person.ip(
            f"address add 192.168.{number}.{self._counts[bridge]}/24 dev {interface}",
            f"link set dev {interface} up",
        )
        return interface

    def start(self, name: str, *options: str) -> LabProcess:
        folder = str(self._state / name)
        return self.people[name].spawn([*NATSWARM, "up", "--json", "--state", folder, *options])

    def up(self, *names: str, options: tuple[str, ...] = ()) -> list[LabProcess]:
        """Start nodes, all at once, and wait until they run."""
        nodes = [self.start(name, *options) for name in names]
        for node in nodes:
            wait_up(node)
        return nodes

    def remove(self) -> None:
        for person in self.people.values():
            person.remove()
        remove_all(self._prefix)


@pytest.fixture
def house(_capable_machine: None, tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    try:
        yield house
    finally:
        house.remove()


def wait_up(node: LabProcess) -> dict[str, str]:
    line = node.wait_line(lambda line: json.loads(line)["event"] == "up", timeout_s=60)
    return json.loads(line)


def peer_id(node: LabProcess) -> str:
    return wait_up(node)["peer_id"]


def wait_connected(node: LabProcess, other: LabProcess) -> str:
    """Wait until a node has found another; return where it is."""

    def matches(line: str) -> bool:
        event = json.loads(line)
        return event["event"] == "connected" and event["peer_id"] == peer_id(other)

    return str(json.loads(node.wait_line(matches, timeout_s=FOUND_S))["at"])


def connected(node: LabProcess) -> set[str]:
    events = [json.loads(line) for line in node.lines]
    return {event["peer_id"] for event in events if event["event"] == "connected"}


def test_neighbours_of_every_lan_are_found_and_nobody_behind_them(house: House):
    for name, *bridges in (("kim", "house"), ("mia", "house", "attic"), ("ned", "attic")):
        house.add(name, *bridges)
    kim, mia, ned = house.up("kim", "mia", "ned")
    assert wait_connected(mia, kim).startswith("192.168.0.1:")
    assert wait_connected(mia, ned).startswith("192.168.1.2:")
    for node in (kim, ned):
        wait_connected(node, mia)
    assert connected(kim) == connected(ned) == {peer_id(mia)}


def test_link_local_ipv6_is_enough(house: House):
    """Of two interfaces the right one is used, though the address does not tell which."""
    for name, *bridges in (("kim", "house"), ("mia", "house", "attic"), ("ned", "attic")):
        person = house.add(name, *bridges)
        for bridge in bridges:
            person.ip(f"address flush dev eth-{bridge} scope global")
    kim, mia, ned = house.up("kim", "mia", "ned", options=("--bind", "::"))
    pairs = ((mia, kim, "house"), (kim, mia, "house"), (mia, ned, "attic"), (ned, mia, "attic"))
    for node, other, bridge in pairs:
        at = wait_connected(node, other)
        assert at.startswith("[fe80::")
        assert f"%eth-{bridge}]:" in at
    assert connected(kim) == connected(ned) == {peer_id(mia)}


def test_a_lan_that_comes_later_and_one_that_goes(house: House):
    house.add("kim", "house")
    house.add("mia", "attic")
    kim, mia = house.up("kim", "mia")
    house.plug("mia", "house")
    wait_connected(kim, mia)
    house.people["mia"].ip("link delete dev eth-attic")
    house.add("lou", "house")
    [lou] = house.up("lou")
    wait_connected(mia, lou)
    assert mia.error_text() == kim.error_text() == ""


def test_who_does_not_want_to_be_found_is_not(house: House):
    house.add("kim", "house")
    house.add("lou", "house")
    house.add("mia", "house")
    kim = house.start("kim", "--no-lan")
    lou, mia = house.up("lou", "mia")
    wait_up(kim)
    wait_connected(lou, mia)
    assert connected(kim) == set()


def test_a_flood_on_the_group_does_not_stop_the_search(house: House):
    house.add("kim", "house")
    eve = house.add("eve", "house")
    [kim] = house.up("kim")
    with contextlib.ExitStack() as stack:
        with eve.entered():
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind(("192.168.0.2", 0))
            route = socket.inet_aton("192.168.0.2")
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, route)
        for index in range(5000):
            sock.sendto(b"nsw\x01" + index.to_bytes(200, "big"), (GROUP_IPV4, GROUP_PORT))
        house.add("lou", "house")
        wait_connected(kim, house.start("lou"))
    assert kim.error_text() == ""
    with pytest.raises(LabError, match="did not print"):
        kim.wait_line(lambda line: json.loads(line)["event"] == "lost", timeout_s=0.1)


def test_a_node_comes_back_by_its_cache_alone(house: House):
    house.add("kim", "house")
    house.add("lou", "house")
    kim = house.start("kim", "--no-lan")
    lou = house.start("lou", "--no-lan", "--join", wait_up(kim)["invite"])
    wait_connected(lou, kim)
    lou.interrupt()
    with contextlib.suppress(LabError):  # the status of Ctrl-C is 130
        lou.wait(timeout_s=20)
    wait_connected(house.start("lou", "--no-lan"), kim)
