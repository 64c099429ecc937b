"""A real gateway grants, hands on, takes back and forgets mappings: Debian's miniupnpd.

It runs in the NAT router's namespace; its nftables chains are its own, the lab's rules let through
what they translated.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.errors import PortMappingFailed
from natswarm.inspector.gateway import ask_leases, ask_services
from natswarm.lab.errors import LabError
from natswarm.lab.namespace import Namespace
from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.process import LabProcess
from natswarm.lab.topology import Host, Lab
from natswarm.net.gateway import (
    Gateway,
    MappingProtocol,
    PortMapping,
    Reach,
    inspect_gateway,
    open_port_mapping,
)
from natswarm.net.gateway.datagram import NatPmpService, PcpService
from natswarm.net.gateway.upnp import UpnpService
from natswarm.net.interfaces import InterfaceKind
from natswarm.net.udp import UdpNetwork, UdpPort

pytestmark = pytest.mark.lab

OpenSocket = Callable[[Host], socket.socket]
StartGateway = Callable[..., Gateway]

SERVICES = {
    MappingProtocol.PCP: PcpService,
    MappingProtocol.NAT_PMP: NatPmpService,
    MappingProtocol.UPNP_IGD: UpnpService,
}
# miniupnpd refuses to work with the documentation networks that the lab lives in. This one was a
# test bed of amateur radio; no link leads out of the lab.
EXTERNAL_IP = "44.128.0.1"
HOME_IPV6, GATEWAY_IPV6 = "2001:db8:1::7", "2001:db8:1::1"
START_TIMEOUT_S = 10.0
# miniupnpd looks for expired leases when its next second begins.
EXPIRY_TIMEOUT_S = 15.0

CHAINS = """
table inet upnp {
    chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        jump prerouting_miniupnpd
    }
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        jump postrouting_miniupnpd
    }
    # For IPv6 there is nothing to translate, only a firewall to open; IPv4 is the lab's own affair.
    chain through {
        type filter hook forward priority filter; policy accept;
        meta nfproto ipv4 accept
        ct state established,related accept
        iifname "wan" jump miniupnpd
        iifname "wan" drop
    }
    chain miniupnpd {
    }
    chain prerouting_miniupnpd {
    }
    chain postrouting_miniupnpd {
    }
}
add rule ip lab through_router iifname "wan" ct status dnat accept
"""
CONFIGURATION = """\
ext_ifname=wan
listening_ip=lan
enable_natpmp=yes
enable_upnp=yes
secure_mode=yes
system_uptime=no
min_lifetime=2
max_lifetime=3600
upnp_table_name=upnp
upnp_nat_table_name=upnp
uuid=00000000-0000-4000-8000-000000000001
"""


@pytest.fixture
def start_gateway(_capable_machine: None, lab: Lab, tmp_path: Path) -> Iterator[StartGateway]:
    """Run miniupnpd on the router of a client; what it printed shows where a test fails."""
    if shutil.which("miniupnpd") is None:
        reason = "miniupnpd is not installed: apt-get install miniupnpd-nftables"
        if os.environ.get("NATSWARM_LAB") == "require":
            pytest.fail(f"NATSWARM_LAB=require, but {reason}")
        pytest.skip(reason)
    processes: list[LabProcess] = []

    def start(host: Host, *options: str, settings: str = f"ext_ip={EXTERNAL_IP}\n") -> Gateway:
        assert host.router is not None
        network = host.ip.rpartition(".")[0]
        host.router.nft(CHAINS)
        host.router.ip(f"address add {EXTERNAL_IP}/32 dev wan")
        lab.core.ip(f"route add {EXTERNAL_IP} via {host.public_ip}")
        configuration = tmp_path / "miniupnpd.conf"
        configuration.write_text(
            f"{CONFIGURATION}{settings}"
            f"allow 1024-65535 {network}.0/24 1024-65535\n"
            "deny 0-65535 0.0.0.0/0 0-65535\n"
        )
        files = ["-f", str(configuration), "-P", str(tmp_path / "pid")]
        process = host.router.spawn(["miniupnpd", "-d", *files, *options])
        processes.append(process)
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Listening for NAT-PMP/PCP" not in process.error_text():
            assert time.monotonic() < deadline, process.error_text()
            time.sleep(0.02)  # another process starts; its words are all that tells
        return Gateway(f"{network}.1", host.ip)

    yield start
    for process in processes:
        print(process.error_text())


class NamespaceNetwork(UdpNetwork):
    """The network of one namespace of the lab."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__()
        self._namespace = namespace

    def bind(self, local: Endpoint) -> UdpPort:
        with self._namespace.entered():
            return super().bind(local)


def reach_of(host: Host) -> Reach:
    async def connect(local_ip: str, remote: Endpoint) -> trio.SocketStream:
        with host.namespace.entered():
            sock = trio.socket.socket()
        try:
            await sock.bind((local_ip, 0))
            await sock.connect((remote.ip, remote.port))
            return trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise

    return Reach(NamespaceNetwork(host.namespace), connect)


def strangers_get_in(
    open_socket: OpenSocket, stranger: Host, udp: socket.socket, mapping: PortMapping
) -> bool:
    """Whether a datagram of somebody new reaches our socket through the external endpoint.

    Nothing else comes in: should it not get through, one from ourselves comes first.
    """
    new = open_socket(stranger)
    new.sendto(b"from a stranger", (mapping.external.ip, mapping.external.port))
    udp.sendto(b"from ourselves", udp.getsockname())
    data, source = udp.recvfrom(100)
    if data == b"from ourselves":
        return False
    assert (data, source) == (b"from a stranger", new.getsockname())
    assert udp.recv(100) == b"from ourselves"
    return True


def wait_until_closed(
    open_socket: OpenSocket, stranger: Host, udp: socket.socket, mapping: PortMapping
) -> None:
    deadline = time.monotonic() + EXPIRY_TIMEOUT_S
    while strangers_get_in(open_socket, stranger, udp, mapping):
        assert time.monotonic() < deadline
        time.sleep(0.1)  # miniupnpd lets it go on its own clock


@pytest.fixture
def home(lab: Lab) -> Host:
    return lab.add_client("home", KernelNat(NatKind.PRESERVING))


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        (MappingProtocol.PCP, ()),
        (MappingProtocol.NAT_PMP, ()),
        (MappingProtocol.UPNP_IGD, ()),
        (MappingProtocol.UPNP_IGD, ("-1",)),  # IGD version 1
    ],
)
async def test_strangers_get_in_while_the_mapping_is_held(
    lab: Lab,
    home: Host,
    start_gateway: StartGateway,
    open_socket: OpenSocket,
    protocol: MappingProtocol,
    options: tuple[str, ...],
):
    gateway = start_gateway(home, *options)
    udp, stranger = open_socket(home), lab.add_public("stranger")
    port = udp.getsockname()[1]
    async with open_port_mapping(
        gateway, port, external_port=40_123, lease_s=600, protocols=[protocol], reach=reach_of(home)
    ) as held:
        mapping = held.mapping
        # UPnP's lease is read back, maybe a little later.
        assert 590 <= mapping.lease_s <= 600
        assert mapping == PortMapping(
            protocol, Endpoint(home.ip, port), Endpoint(EXTERNAL_IP, 40_123), mapping.lease_s
        )
        assert mapping.is_public
        assert strangers_get_in(open_socket, stranger, udp, mapping)
    assert not strangers_get_in(open_socket, stranger, udp, mapping)


async def test_all_protocols_answer_and_the_best_is_taken(
    lab: Lab, home: Host, start_gateway: StartGateway, open_socket: OpenSocket
):
    gateway, reach = start_gateway(home), reach_of(home)
    report = await inspect_gateway(gateway, reach=reach)
    assert [service.is_available for service in report.services] == [True] * 3
    pcp, nat_pmp, upnp = report.services
    assert pcp.detail.startswith("version 2")
    assert nat_pmp.external_ip == upnp.external_ip == EXTERNAL_IP
    assert upnp.detail == "WANIPConnection:2"

    async with open_port_mapping(gateway, 5000, reach=reach) as held:
        assert held.mapping is not None
        assert held.mapping.protocol is MappingProtocol.PCP
        assert held.mapping.lease_s == 1200


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_what_a_killed_program_leaves_ends_with_its_lease(
    lab: Lab,
    home: Host,
    start_gateway: StartGateway,
    open_socket: OpenSocket,
    protocol: MappingProtocol,
):
    gateway = start_gateway(home)
    udp, stranger = open_socket(home), lab.add_public("stranger")
    service = SERVICES[protocol](gateway, udp.getsockname()[1], reach_of(home))
    await service.probe()
    mapping = await service.map(0, 2)
    assert mapping.lease_s <= 2
    assert strangers_get_in(open_socket, stranger, udp, mapping)
    wait_until_closed(open_socket, stranger, udp, mapping)


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_a_renewed_mapping_is_the_same(
    home: Host, start_gateway: StartGateway, protocol: MappingProtocol
):
    gateway = start_gateway(home)
    service = SERVICES[protocol](gateway, 5000, reach_of(home))
    await service.probe()
    mapping = await service.map(0, 100)
    assert await service.still_holds(mapping)
    renewed = await service.map(mapping.external.port, 200)
    assert renewed.external == mapping.external
    assert renewed.lease_s == 200
    await service.unmap(renewed)


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_a_port_that_another_device_holds_is_not_taken(
    lab: Lab, home: Host, start_gateway: StartGateway, protocol: MappingProtocol
):
    gateway = start_gateway(home)
    other_ip = f"{home.ip.rpartition('.')[0]}.77"
    home.namespace.ip(f"address add {other_ip}/24 dev lan")
    other = Gateway(gateway.ip, other_ip)
    reach = reach_of(home)
    async with open_port_mapping(other, 5000, external_port=40_123, reach=reach) as theirs:
        assert theirs.mapping is not None
        assert theirs.mapping.external.port == 40_123
        async with open_port_mapping(
            gateway, 5000, external_port=40_123, protocols=[protocol], reach=reach
        ) as ours:
            assert ours.mapping is not None
            assert ours.mapping.external.port != 40_123


async def test_a_gateway_behind_another_nat_makes_none(home: Host, start_gateway: StartGateway):
    # Without the address it is told, it sees that its own is not of the internet.
    gateway = start_gateway(home, settings="")
    with pytest.raises(PortMappingFailed) as caught:
        async with open_port_mapping(gateway, 5000, reach=reach_of(home)):
            pytest.fail("it made one")
    assert set(caught.value.reasons) == {each.value for each in MappingProtocol}


def test_a_node_behind_it_is_dialled_by_its_invite(
    lab: Lab, home: Host, start_gateway: StartGateway, tmp_path: Path
):
    start_gateway(home)
    assert home.router is not None
    stranger = lab.add_public("stranger")
    natswarm = [sys.executable, "-c", "from natswarm.cli import main; main()"]

    def command(name: str, *words: str) -> list[str]:
        return [*natswarm, *words, "--json", "--state", str(tmp_path / name)]

    def forwarded() -> bool:
        assert home.router is not None
        return "dnat" in home.router.run(["nft", "list", "table", "inet", "upnp"], timeout_s=10)

    with home.namespace.spawn(command("home", "up")) as node:
        line = node.wait_line(lambda line: json.loads(line)["event"] == "up", timeout_s=30)
        assert forwarded()
        invite = json.loads(line)["invite"]
        lines = stranger.namespace.run(command("stranger", "connect", invite), timeout_s=60)
        assert any(json.loads(each)["event"] == "connected" for each in lines.splitlines())
        node.interrupt()
        with contextlib.suppress(LabError):  # its exit status is that of Ctrl-C
            node.wait(timeout_s=10)
    assert not forwarded(), "given back"

    with home.namespace.spawn(command("home", "up", "--no-gateway")) as node:
        node.wait_line(lambda line: json.loads(line)["event"] == "up", timeout_s=30)
        assert not forwarded()


def give_ipv6(lab: Lab, home: Host, stranger: Host) -> None:
    """Lay IPv6 over the first two connections of a lab."""
    assert home.router is not None
    for namespace, links in (
        (home.namespace, {"lan": f"{HOME_IPV6}/64"}),
        (home.router, {"lan": f"{GATEWAY_IPV6}/64", "wan": "2001:db8:2::1/64"}),
        (lab.core, {"to0": "2001:db8:2::2/64", "to1": "2001:db8:3::1/64"}),
        (stranger.namespace, {"wan": "2001:db8:3::9/64"}),
    ):
        # Without duplicate address detection they can be used at once.
        namespace.ip(*(f"address add {ip} dev {link} nodad" for link, ip in links.items()))
    for router in (home.router, lab.core):
        router.sysctl("net.ipv6.conf.all.forwarding", 1)
    home.namespace.ip(f"route add default via {GATEWAY_IPV6}")
    home.router.ip("route add default via 2001:db8:2::2")
    lab.core.ip("route add 2001:db8:1::/64 via 2001:db8:2::1")
    stranger.namespace.ip("route add default via 2001:db8:3::1")


async def test_pcp_opens_an_ipv6_firewall(lab: Lab, home: Host, start_gateway: StartGateway):
    stranger = lab.add_public("stranger")
    give_ipv6(lab, home, stranger)
    start_gateway(home)
    gateway = Gateway(GATEWAY_IPV6, HOME_IPV6)
    with contextlib.ExitStack() as stack:

        def open_ipv6(host: Host, ip: str) -> socket.socket:
            with host.namespace.entered():
                udp = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
                udp.bind((ip, 0))
            udp.settimeout(5)
            return udp

        def gets_in() -> bool:
            new = open_ipv6(stranger, "2001:db8:3::9")
            new.sendto(b"from a stranger", udp.getsockname())
            udp.sendto(b"from ourselves", udp.getsockname())
            first = udp.recv(100)
            return first != b"from ourselves" and udp.recv(100) == b"from ourselves"

        udp = open_ipv6(home, HOME_IPV6)
        port = udp.getsockname()[1]
        # One exchange, so that everybody on the way knows its neighbours' link addresses: from then
        # on, what is sent first arrives first.
        friend = open_ipv6(stranger, "2001:db8:3::9")
        udp.sendto(b"hello", friend.getsockname())
        friend.sendto(*friend.recvfrom(100))
        assert udp.recv(100) == b"hello"
        assert not gets_in()
        async with open_port_mapping(gateway, port, reach=reach_of(home)) as held:
            assert held.mapping == PortMapping(
                MappingProtocol.PCP, Endpoint(HOME_IPV6, port), Endpoint(HOME_IPV6, port), 1200
            )
            assert gets_in()
        assert not gets_in()


async def test_interfaces_of_the_lab_name_the_gateway(home: Host):
    script = (
        "from natswarm.net.interfaces import inspect_interfaces\n"
        "from natswarm.net.gateway import Gateway\n"
        "lan = inspect_interfaces().default_ipv4\n"
        "print(lan.kind.value, Gateway.of(lan).ip, Gateway.of(lan).local_ip)"
    )
    printed = home.namespace.run([sys.executable, "-c", script], timeout_s=30)
    gateway_ip = f"{home.ip.rpartition('.')[0]}.1"
    assert printed == f"{InterfaceKind.LAN.value} {gateway_ip} {home.ip}"


async def test_an_inspection_shows_the_leases_and_leaves_nothing(
    home: Host, start_gateway: StartGateway
):
    gateway, reach = start_gateway(home), reach_of(home)
    services = await ask_services(gateway, reach, timeout_s=6)
    found = await ask_leases(services, reach)
    assert [each.is_available for each in found.services] == [True] * 3
    assert [each.lease_problem for each in found.services] == [""] * 3
    assert [each.lease_s for each in found.services] == [3600] * 3
    assert found.external_ip == EXTERNAL_IP
    assert home.router is not None
    rules = home.router.run(
        ["nft", "list", "chain", "inet", "upnp", "prerouting_miniupnpd"], timeout_s=10
    )
    assert "dnat" not in rules
