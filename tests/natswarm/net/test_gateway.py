"""A mapping is chosen, held, renewed, found again after a reboot and deleted; gateways may be bad.

The gateway here is a fake that speaks all three protocols, under Trio's autojumping clock.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import trio
import trio.testing

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError, PortMappingFailed
from natswarm.net.gateway import (
    Gateway,
    MappingProtocol,
    PortMapping,
    Reach,
    inspect_gateway,
    open_port_mapping,
)
from natswarm.net.interfaces import (
    AddressSpace,
    Interface,
    InterfaceAddress,
    InterfaceKind,
)
from natswarm.net.port import Arrival
from natswarm.net.udp import UdpNetwork

from .fake_gateway import HOME, IGD, NAT_PMP, PCP, UPNP, FakeGateway, FakeReachNetwork

STRANGER = Endpoint("192.168.1.66", 5351)


@pytest.fixture
async def fake(nursery):
    return FakeGateway()


@pytest.fixture
async def network(fake, nursery):
    network = FakeReachNetwork(fake, nursery)
    yield network
    assert network.open_count == 0


@pytest.fixture
def reach(network):
    return Reach(network, network.connect, random.Random(1), random.Random(2).randbytes)


OURS = (HOME.local_ip, 5000)


@pytest.mark.parametrize("protocol", MappingProtocol)
@pytest.mark.parametrize("igd_version", [1, 2])
async def test_made_and_deleted(autojump_clock, fake, reach, protocol, igd_version):
    fake.igd_version = igd_version
    async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach) as held:
        mapping = held.mapping
        assert mapping is not None
        assert fake.living() == {mapping.external.port: OURS}
        assert mapping == PortMapping(
            protocol, Endpoint(*OURS), Endpoint("203.0.113.9", mapping.external.port), 1200
        )
        assert mapping.is_public
        assert str(mapping).endswith(f"-> 192.168.1.7:5000 ({protocol.value}, lease 1200 s)")
    assert not fake.mappings


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_the_wanted_port_is_asked_for(autojump_clock, fake, reach, protocol):
    async with open_port_mapping(
        HOME, 5000, external_port=41_000, protocols=[protocol], reach=reach
    ) as held:
        assert held.mapping.external.port == 41_000


async def test_the_best_protocol_is_taken_and_no_other_makes_a_mapping(autojump_clock, fake, reach):
    async with open_port_mapping(HOME, 5000, reach=reach) as held:
        assert held.mapping.protocol is PCP
        assert trio.current_time() < 0.1
    assert "NAT-PMP 1" not in fake.log
    assert not any("Add" in line for line in fake.log)


@pytest.mark.parametrize(
    ("speaks", "taken", "within_s"),
    [
        ({NAT_PMP, UPNP}, NAT_PMP, 0.1),  # it tells us that it knows no PCP
        ({UPNP}, UPNP, 0.6),  # silence; a moment's grace for the better ones
        ({PCP}, PCP, 0.1),
    ],
)
async def test_the_next_best_is_taken(autojump_clock, fake, reach, speaks, taken, within_s):
    fake.speaks = speaks
    started_at = trio.current_time()
    async with open_port_mapping(HOME, 5000, reach=reach) as held:
        assert held.mapping.protocol is taken
        assert trio.current_time() - started_at < within_s


async def test_a_protocol_that_answers_and_refuses_gives_way_to_the_next(
    autojump_clock, fake, reach
):
    fake.pcp_result = 2
    async with open_port_mapping(HOME, 5000, reach=reach) as held:
        assert held.mapping.protocol is NAT_PMP


async def test_nobody_answers(autojump_clock, fake, reach):
    fake.speaks = set()
    started_at = trio.current_time()
    with pytest.raises(PortMappingFailed, match="Switch one of them on") as caught:
        async with open_port_mapping(HOME, 5000, reach=reach):
            pytest.fail("made of nothing")
    assert trio.current_time() - started_at <= 6
    assert caught.value.reasons == {
        "PCP": "no answer from UDP port 5351",
        "NAT-PMP": "no answer from UDP port 5351",
        "UPnP-IGD": "no answer from UDP port 1900",
    }


async def test_report_of_the_services(autojump_clock, fake, reach):
    fake.speaks = {NAT_PMP, UPNP}
    pcp, nat_pmp, upnp = (await inspect_gateway(HOME, reach=reach)).services
    assert not pcp.is_available
    assert "does not speak this version" in pcp.detail
    assert nat_pmp.is_available
    assert nat_pmp.external_ip == "203.0.113.9"
    assert upnp.is_available
    assert upnp.detail == "WANIPConnection:1"
    assert not fake.mappings
    assert fake.log.count("NAT-PMP 0") == 1


@pytest.mark.parametrize(
    ("protocol", "lost_count", "after_s"), [(PCP, 1, 3), (NAT_PMP, 3, 1.75), (UPNP, 4, 1)]
)
async def test_lost_datagrams_are_sent_again(
    autojump_clock, fake, reach, protocol, lost_count, after_s
):
    fake.lost_count = lost_count
    started_at = trio.current_time()
    async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach) as held:
        assert held.mapping is not None
        assert trio.current_time() - started_at == pytest.approx(after_s, rel=0.1)


# Hostile gateways, and neighbours who pretend to be it --------------------------------------------


async def test_answers_from_anybody_else_do_not_count(autojump_clock, fake, network, reach):
    fake.external_ip = "198.51.100.66"
    lies = [
        fake.handle_datagram(request, Endpoint(*OURS), Endpoint(HOME.ip, port))
        for request, port in (
            (b"\0\0", 5351),
            (b"\2\0" + bytes(22), 5351),
            (f"\nST: {IGD}1\r\n".encode(), 1900),
        )
    ]
    fake.speaks = set()
    elsewhere = (STRANGER, Endpoint(HOME.ip, 5352), Endpoint(HOME.local_ip, 1900))
    network.forged = [Arrival(lie, source) for lie in lies for source in elsewhere[:1]]
    network.forged += [Arrival(lie, elsewhere[1]) for lie in lies[:2]]
    report = await inspect_gateway(HOME, reach=reach)
    assert [service.is_available for service in report.services] == [False] * 3


async def test_a_mapping_with_another_nonce_is_not_ours(autojump_clock, fake, network, reach):
    network.spoil = lambda answer: answer[:24] + bytes(12) + answer[36:]
    with pytest.raises(PortMappingFailed, match="PCP: no answer"):
        async with open_port_mapping(HOME, 5000, protocols=[PCP], reach=reach):
            pytest.fail("not ours")


@pytest.mark.parametrize("protocol", [PCP, NAT_PMP])
async def test_malformed_answers(autojump_clock, fake, network, reach, protocol):
    network.spoil = lambda answer: answer[:7]
    with pytest.raises(PortMappingFailed, match=r"no usable answer: a .* cannot have 7 bytes"):
        async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach):
            pytest.fail("out of seven bytes")


@pytest.mark.parametrize("protocol", MappingProtocol)
@pytest.mark.parametrize("ip", ["0.0.0.0", "127.0.0.1", "224.0.0.1", "169.254.7.7"])
async def test_external_addresses_that_are_none(autojump_clock, fake, reach, protocol, ip):
    fake.external_ip = ip
    with pytest.raises(PortMappingFailed, match="seems to have no connection"):
        async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach):
            pytest.fail("there is no way in")
    assert not fake.mappings


@pytest.mark.parametrize("ip", ["100.64.7.7", "10.0.0.2"])
async def test_another_nat_beyond_the_gateway_shows(autojump_clock, fake, reach, ip):
    fake.external_ip = ip
    async with open_port_mapping(HOME, 5000, reach=reach) as held:
        assert not held.mapping.is_public


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ({"location": "http://192.168.1.66:5000/desc.xml"}, "leads to another host"),
        ({"location": "http://example.com/desc.xml"}, "leads to another host"),
        ({"location": "file:///etc/passwd"}, "no plain http URL"),
        ({"control_url": "http://192.168.1.66:80/ctl"}, "unusable: .* another host"),
        (
            {"http": b"HTTP/1.1 302 Found\r\nLocation: http://example.com/\r\n\r\n"},
            r"redirects us \(HTTP 302\)",
        ),
        ({"http": b"HTTP/1.1 404 Not Found\r\n\r\n"}, "HTTP status 404"),
        ({"http": b"HTTP/1.1 200 OK\r\n\r\n" + bytes(200_000)}, "body of more than 131072 bytes"),
        ({"http": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n<root>"}, "cut off"),
        ({"http": b"HTTP/1.1 200 OK\r\n\r\n<!DOCTYPE r [<!ENTITY a 'b'>]><r>&a;</r>"}, "document"),
        ({"http": b"220 ftp ready\r\n\r\n"}, "no status line"),
        ({"http": b""}, "before the HTTP response began"),
        ({"soap_faults": {"GetExternalIPAddress": 501}}, "the action failed"),
        ({"soap_faults": {"AddPortMapping": 606}}, "its settings do not allow it"),
        ({"soap_faults": {"AddPortMapping": 718}}, "the external port is taken"),
        ({"soap_faults": {"AddPortMapping": 725}}, "only leases without end"),
        ({"lease_max_s": 0}, "only leases without end"),
    ],
)
async def test_bad_upnp_gateways(autojump_clock, fake, reach, spoil, why):
    for name, value in spoil.items():
        setattr(fake, name, value)
    started_at = trio.current_time()
    with pytest.raises(PortMappingFailed, match=why):
        async with open_port_mapping(HOME, 5000, protocols=[UPNP], reach=reach):
            pytest.fail("it was allowed")
    assert not fake.mappings
    assert trio.current_time() - started_at < 6


@pytest.mark.parametrize("drip_s", [0.5, 5.0])
async def test_a_gateway_that_drips_its_answer(autojump_clock, fake, network, reach, drip_s):
    network.drip_s = drip_s
    started_at = trio.current_time()
    with pytest.raises(PortMappingFailed, match="no answer in 4 s"):
        async with open_port_mapping(HOME, 5000, protocols=[UPNP], reach=reach):
            pytest.fail("so slow")
    assert trio.current_time() - started_at < 6.5


async def test_leases_without_end_if_they_are_wanted(autojump_clock, fake, reach):
    fake.lease_max_s = 0
    async with open_port_mapping(
        HOME, 5000, protocols=[UPNP], allow_permanent_lease=True, reach=reach
    ) as held:
        assert held.mapping.lease_s is None
        assert "no end" in str(held.mapping)
        await trio.sleep(80_000)
        assert fake.living()
    assert not fake.mappings


async def test_a_foreign_entry_is_neither_overwritten_nor_deleted(autojump_clock, fake, reach):
    games = ("192.168.1.50", 5000, "game console", float("inf"))
    by_hand = ("192.168.1.7", 5000, "by hand", float("inf"))
    fake.mappings = {5000: games, 6000: by_hand}
    for external_port in (5000, 6000):
        async with open_port_mapping(
            HOME, 5000, external_port=external_port, protocols=[UPNP], reach=reach
        ) as held:
            assert held.mapping.external.port not in (5000, 6000)
    assert fake.mappings == {5000: games, 6000: by_hand}


async def test_a_gateway_that_wants_both_ports_the_same(autojump_clock, fake, reach):
    act = fake._act

    def wants_same(name, arguments):
        if name == "AddPortMapping" and arguments["NewExternalPort"] != "5000":
            return 724
        return act(name, arguments)

    fake._act = wants_same
    async with open_port_mapping(
        HOME, 5000, external_port=41_000, protocols=[UPNP], reach=reach
    ) as held:
        assert held.mapping.external.port == 5000


async def test_a_version_2_gateway_that_knows_only_the_old_action(autojump_clock, fake, reach):
    fake.igd_version = 2
    fake.soap_faults = {"AddAnyPortMapping": 401}
    async with open_port_mapping(HOME, 5000, protocols=[UPNP], reach=reach) as held:
        assert held.mapping.external.port == 5000


@pytest.mark.parametrize(
    ("lies", "why"),
    [
        ({"AddPortMapping": {}}, "confirmed a mapping and does not have it"),
        ({"GetExternalIPAddress": {"NewExternalIPAddress": "example.com"}}, "not an IPv4 address"),
        ({"AddAnyPortMapping": {"NewReservedPort": 0}}, "without a port"),
        ({"AddAnyPortMapping": {"NewReservedPort": 99_999}}, "not a number up to 65535"),
    ],
)
async def test_upnp_gateways_that_tell_tales(autojump_clock, fake, reach, lies, why):
    fake.igd_version = 2 if "AddAnyPortMapping" in lies else 1
    act = fake._act
    fake._act = lambda name, arguments: lies[name] if name in lies else act(name, arguments)
    with pytest.raises(PortMappingFailed, match=why):
        async with open_port_mapping(HOME, 5000, protocols=[UPNP], reach=reach):
            pytest.fail("out of nothing")
    assert not fake.mappings


# Time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", MappingProtocol)
@pytest.mark.parametrize("lease_s", [1200, 120, 7])
async def test_renewed_in_time_for_an_hour(autojump_clock, fake, reach, protocol, lease_s):
    fake.lease_max_s = lease_s
    async with open_port_mapping(
        HOME, 5000, lease_s=lease_s, protocols=[protocol], reach=reach
    ) as held:
        external = held.mapping.external
        for _ in range(1200):
            assert fake.living() == {external.port: OURS}
            await trio.sleep(3)
        assert held.mapping.external == external
        assert held.loss_count == 0
        renewals = 3600 / lease_s
        assert 1.4 * min(renewals, 500) <= held.renewal_count <= 2 * renewals
    assert not fake.mappings


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_a_reboot_is_noticed_within_a_minute(autojump_clock, fake, reach, protocol):
    async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach) as held:
        await trio.sleep(100)
        fake.reboot()
        assert not fake.living()
        await trio.sleep(61)
        assert list(fake.living().values()) == [OURS]
        assert held.loss_count == 1
        await trio.sleep(1000)
        assert held.loss_count == 1


async def test_a_upnp_gateway_that_moves_to_another_tcp_port(autojump_clock, fake, reach):
    async with open_port_mapping(HOME, 5000, protocols=[UPNP], reach=reach) as held:
        fake.reboot()
        fake.location = f"http://{HOME.ip}:5001/desc.xml"
        await trio.sleep(65)
        assert list(fake.living().values()) == [OURS]
        assert held.loss_count == 1
    assert not fake.mappings


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_answers_that_come_twice_are_no_reboot(
    autojump_clock, fake, network, reach, protocol
):
    network.copy_count = 2
    async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach) as held:
        await trio.sleep(3600)
        assert held.loss_count == 0
        assert list(fake.living().values()) == [OURS]


@pytest.mark.parametrize(("protocol", "within_s"), [(PCP, 5 / 8 * 1200), (NAT_PMP, 60), (UPNP, 60)])
async def test_a_new_external_address_is_told(autojump_clock, fake, reach, protocol, within_s):
    async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach) as held:
        await trio.sleep(30)
        fake.external_ip = "203.0.113.77"
        with trio.fail_after(within_s + 1):
            mapping = await held.wait_changed()
        assert mapping == held.mapping
        assert mapping.external.ip == "203.0.113.77"


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_a_gateway_that_falls_silent_and_comes_back(autojump_clock, fake, reach, protocol):
    async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach) as held:
        fake.speaks = set()
        assert await held.wait_changed() is None
        assert 1200 <= trio.current_time() < 1220
        assert "no answer" in held.problem or "refused" in held.problem
        await trio.sleep(1000)
        fake.speaks = set(MappingProtocol)
        fake.reboot()
        with trio.fail_after(75):
            mapping = await held.wait_changed()
        assert mapping == held.mapping
        assert held.problem == ""
        assert list(fake.living().values()) == [OURS]
    assert not fake.mappings


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_deleted_when_cancelled(autojump_clock, fake, reach, protocol):
    with trio.move_on_after(10):
        async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach):
            assert fake.mappings
            await trio.sleep_forever()
    assert not fake.mappings


async def test_leaving_does_not_wait_long_for_a_silent_gateway(autojump_clock, fake, reach):
    async with open_port_mapping(HOME, 5000, reach=reach):
        fake.speaks = set()
        left_at = trio.current_time()
    assert trio.current_time() - left_at <= 2


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_cancelled_before_the_answer_came_takes_back(
    autojump_clock, fake, network, reach, protocol
):
    """The gateway makes the mapping, its answer is lost, and we give up."""
    act = fake._act

    def lose(answer):
        return b"" if fake.mappings else answer

    def hang(name, arguments):
        result = act(name, arguments)
        if name == "AddPortMapping":
            network.drip_s = 10.0
        return result

    network.spoil = lose
    fake._act = hang
    async with trio.open_nursery() as nursery:

        async def run():
            async with open_port_mapping(HOME, 5000, protocols=[protocol], reach=reach):
                pytest.fail("the answer was lost")

        nursery.start_soon(run)
        await trio.sleep(0.1)
        assert fake.mappings
        network.drip_s = 0.0
        nursery.cancel_scope.cancel()
    assert not fake.mappings


async def test_errors_of_the_body_come_out_as_they_are(autojump_clock, fake, reach):
    with pytest.raises(KeyError):
        async with open_port_mapping(HOME, 5000, reach=reach):
            raise KeyError("mine")
    assert not fake.mappings


# What is asked, and of whom -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"internal_port": 0},
        {"internal_port": 65_536},
        {"external_port": -1},
        {"external_port": 65_536},
        {"lease_s": 0},
        {"lease_s": 2**32},
    ],
)
async def test_arguments_out_of_range(autojump_clock, fake, reach, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
        async with open_port_mapping(HOME, **({"internal_port": 5000} | arguments), reach=reach):
            pytest.fail("out of range")


def test_gateways_that_are_none():
    with pytest.raises(ConfigurationError, match="no address of a gateway"):
        Gateway("224.0.0.1", "192.168.1.7")
    with pytest.raises(ConfigurationError, match="different address families"):
        Gateway("192.168.1.1", "fe80::1")


def interface(*addresses, **gateways):
    return Interface(
        "eth0",
        InterfaceKind.LAN,
        ("a test",),
        tuple(InterfaceAddress(ip, length, space) for ip, length, space in addresses),
        **gateways,
    )


def test_gateway_of_an_interface():
    lan = interface(
        ("192.168.1.7", 24, AddressSpace.HOME),
        ("fd00::7", 64, AddressSpace.UNIQUE_LOCAL_IPV6),
        ("2001:db8::7", 64, AddressSpace.GLOBAL_IPV6),
        ("fe80::7", 64, AddressSpace.LINK_LOCAL),
        gateway_ipv4="192.168.1.1",
        gateway_ipv6="fe80::1",
    )
    assert Gateway.of(lan) == HOME
    # Asked from the global address, since that is the one it opens.
    assert Gateway.of(lan, is_ipv6=True) == Gateway("fe80::1%eth0", "2001:db8::7")
    with pytest.raises(ConfigurationError, match="eth0 has no IPv6 gateway"):
        Gateway.of(interface(gateway_ipv4="192.168.1.1"), is_ipv6=True)
    with pytest.raises(ConfigurationError, match="eth0 has no IPv4 address"):
        Gateway.of(interface(gateway_ipv4="192.168.1.1"))


async def serve_udp(port, fake):
    with contextlib.suppress(trio.ClosedResourceError):
        while True:
            for data, source in await port.receive_batch():
                answer = fake.handle_datagram(data, source, port.local_endpoint)
                if answer is not None:
                    port.send(answer, source)


@pytest.mark.parametrize("protocol", MappingProtocol)
async def test_on_real_sockets(protocol, nursery):
    network = UdpNetwork()
    control, ssdp = network.bind(Endpoint("127.0.0.1", 0)), network.bind(Endpoint("127.0.0.1", 0))
    gateway = Gateway(
        "127.0.0.1",
        "127.0.0.1",
        control_port=control.local_endpoint.port,
        ssdp_port=ssdp.local_endpoint.port,
    )
    fake = FakeGateway(gateway)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    fake.location = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/desc.xml"
    serve = FakeReachNetwork(fake, nursery)._serve
    nursery.start_soon(trio.serve_listeners, lambda stream: serve(stream, "127.0.0.1"), [listener])
    nursery.start_soon(serve_udp, control, fake)
    nursery.start_soon(serve_udp, ssdp, fake)
    with trio.fail_after(20):
        async with open_port_mapping(gateway, 5000, protocols=[protocol]) as held:
            assert held.mapping.protocol is protocol
            assert fake.living() == {held.mapping.external.port: ("127.0.0.1", 5000)}
    assert not fake.mappings
    control.close()
    ssdp.close()


async def test_a_local_address_that_is_gone():
    with pytest.raises(PortMappingFailed, match="no interface of this machine has that address"):
        async with open_port_mapping(Gateway("192.0.2.1", "192.0.2.177"), 5000):
            pytest.fail("from nowhere")


async def test_only_pcp_knows_ipv6(autojump_clock):
    report = await inspect_gateway(Gateway("::1", "::1", control_port=9))
    assert [service.is_available for service in report.services] == [False] * 3
    assert [service.detail for service in report.services[1:]] == [
        "NAT-PMP knows IPv4 only",
        "UPnP-IGD maps IPv4 ports only",
    ]
