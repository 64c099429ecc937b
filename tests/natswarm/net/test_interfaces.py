"""What an interface is, by the evidence; and what vanishes while one looks."""

from __future__ import annotations

import netifaces
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.errors import ConfigurationError
from natswarm.net import interfaces
from natswarm.net.interfaces import (
    AddressSpace,
    InterfaceKind,
    find_interface,
    inspect_interfaces,
)

IPV4, IPV6 = netifaces.AF_INET, netifaces.AF_INET6


class FakeSource:
    """Interfaces as netifaces reports them: {name: ["address/prefix", ...]}."""

    def __init__(self, there, *, gateways=None, without_gateway=(), gone=()):
        self._there = there
        self._gateways = gateways or {"default": {}}
        self._without_gateway = list(without_gateway)
        self._gone = dict(gone)

    def interfaces(self):
        return [*self._there, *self._gone]

    def ifaddresses(self, name):
        if name in self._gone:
            raise self._gone[name]
        families = {netifaces.AF_LINK: [{"addr": "02:00:00:00:00:01"}]}
        for text in self._there[name]:
            ip, _, prefix = text.partition("/")
            if ":" in ip:
                entry = {"addr": f"{ip}%{name}" if ip.startswith("fe80") else ip}
                entry["netmask"] = f"ffff:ffff:ffff:ffff::/{prefix}"
                families.setdefault(IPV6, []).append(entry)
            else:
                bits = 0xFFFF_FFFF << (32 - int(prefix)) & 0xFFFF_FFFF
                mask = ".".join(str(byte) for byte in bits.to_bytes(4, "big"))
                families.setdefault(IPV4, []).append({"addr": ip, "netmask": mask})
        return families

    def gateways(self):
        if isinstance(self._gateways, Exception):
            raise self._gateways
        return self._gateways

    def routed_without_gateway(self):
        return self._without_gateway


def look(name, *addresses):
    return find_interface(name, FakeSource({name: list(addresses)}))


@pytest.mark.parametrize(
    ("name", "addresses", "kind"),
    [
        ("lo", ["127.0.0.1/8", "::1/128"], InterfaceKind.LOOPBACK),
        ("Loopback Pseudo-Interface 1", ["127.0.0.1/8"], InterfaceKind.LOOPBACK),
        ("lo", [], InterfaceKind.LOOPBACK),
        ("eth0", ["192.168.1.7/24", "2001:db8::7/64"], InterfaceKind.LAN),
        ("wlp3s0", ["10.0.0.4/24"], InterfaceKind.LAN),
        ("en0", ["fe80::1/64", "2600::1/64"], InterfaceKind.LAN),
        ("eth1", [], InterfaceKind.LAN),
        ("wwan0", ["10.20.30.40/30"], InterfaceKind.MOBILE),
        ("wwp0s20u4", ["100.70.1.2/30"], InterfaceKind.MOBILE),
        ("rmnet_data0", ["100.70.1.2/30"], InterfaceKind.MOBILE),
        ("rmnet0", ["2600::1/64"], InterfaceKind.MOBILE),
        ("v4-rmnet_data1", ["192.0.0.4/32"], InterfaceKind.MOBILE),
        ("ccmni2", ["10.1.1.1/8"], InterfaceKind.MOBILE),
        ("pdp_ip0", ["10.1.1.1/32"], InterfaceKind.MOBILE),
        ("usb0", ["192.168.42.17/24"], InterfaceKind.MOBILE),
        ("wlan0", ["172.20.10.3/28"], InterfaceKind.MOBILE),
        ("tun0", ["10.8.0.2/32"], InterfaceKind.VPN),
        ("wg0", ["10.8.0.2/24"], InterfaceKind.VPN),
        ("utun3", ["fe80::1/64"], InterfaceKind.VPN),
        ("tailscale0", ["100.101.102.103/32"], InterfaceKind.VPN),
        ("docker0", ["172.17.0.1/16"], InterfaceKind.VIRTUAL),
        ("br-1a2b3c", ["172.18.0.1/16"], InterfaceKind.VIRTUAL),
        ("veth12ab", [], InterfaceKind.VIRTUAL),
        ("ppp0", ["100.64.3.4/32"], InterfaceKind.CARRIER),
        ("eth0", ["100.64.3.4/10"], InterfaceKind.CARRIER),
        ("ppp0", ["8.8.4.1/32"], InterfaceKind.PUBLIC),
        ("ens3", ["203.0.113.9/24"], InterfaceKind.PUBLIC),
        ("{4D36E972-E325-11CE}", ["192.168.0.5/24"], InterfaceKind.LAN),
        ("{4D36E972-E325-11CE}", ["fe80::5/64"], InterfaceKind.UNKNOWN),
        ("ppp0", [], InterfaceKind.UNKNOWN),
    ],
)
def test_kind_and_its_evidence(name, addresses, kind):
    interface = look(name, *addresses)
    assert interface.kind is kind
    assert interface.evidence
    assert all(text for text in interface.evidence)
    assert [str(address) for address in interface.addresses] == sorted(
        addresses, key=lambda text: ":" in text
    )


@pytest.mark.parametrize(
    ("name", "address", "space"),
    [
        ("eth0", "10.0.0.4/24", AddressSpace.HOME),
        ("wwan0", "10.0.0.4/24", AddressSpace.CARRIER),
        ("wwan0", "100.64.0.4/24", AddressSpace.CARRIER),
        ("eth0", "100.127.255.4/24", AddressSpace.CARRIER),
        ("eth0", "100.128.0.4/24", AddressSpace.GLOBAL_IPV4),
        ("usb0", "192.168.42.4/24", AddressSpace.HOME),
        ("tun0", "10.0.0.4/24", AddressSpace.TUNNEL),
        ("tailscale0", "100.64.0.4/32", AddressSpace.TUNNEL),
        ("wg0", "fd00::4/64", AddressSpace.TUNNEL),
        ("eth0", "fd00::4/64", AddressSpace.UNIQUE_LOCAL_IPV6),
        ("wwan0", "2600::4/64", AddressSpace.GLOBAL_IPV6),
        ("eth0", "fe80::4/64", AddressSpace.LINK_LOCAL),
        ("eth0", "169.254.1.1/16", AddressSpace.LINK_LOCAL),
        ("lo", "127.0.0.1/8", AddressSpace.LOOPBACK),
        ("eth0", "240.0.0.1/8", AddressSpace.UNUSABLE),
    ],
)
def test_who_gave_the_address_out(name, address, space):
    assert look(name, address).addresses[0].space is space


def test_default_routes_and_gateways_of_several_sims():
    report = inspect_interfaces(
        FakeSource(
            {
                "wlan0": ["192.168.1.7/24", "fe80::7/64"],
                "wwan0": ["10.20.30.41/30"],
                "wwan1": ["100.70.0.9/32"],
            },
            gateways={
                "default": {IPV4: ("192.168.1.1", "wlan0"), IPV6: ("fe80::1%wlan0", "wlan0")},
                IPV4: [("192.168.1.1", "wlan0", True), ("10.20.30.42", "wwan0", False)],
                IPV6: [("fe80::1%wlan0", "wlan0", True)],
            },
            without_gateway=["wwan1"],
        )
    )
    home, first, second = report.interfaces
    assert report.default_ipv4 == report.default_ipv6 == home
    assert (home.gateway_ipv4, home.gateway_ipv6) == ("192.168.1.1", "fe80::1")
    assert first.gateway_ipv4 == "10.20.30.42"
    assert not first.is_default
    assert second.gateway_ipv4 is None
    assert not second.is_default


def test_a_modem_whose_route_names_no_gateway_is_the_default():
    source = FakeSource({"rmnet0": ["10.1.1.1/32"]}, without_gateway=["rmnet0"])
    default = inspect_interfaces(source).default_ipv4
    assert default is not None
    assert (default.name, default.gateway_ipv4) == ("rmnet0", None)


def test_our_address_towards_the_gateway():
    eth = look("eth0", "10.0.0.4/24", "192.168.7.4/24", "fe80::4/64", "2600::4/64")
    assert eth.source_address_for("192.168.7.1") == "192.168.7.4"
    assert eth.source_address_for("192.168.8.1") == "10.0.0.4"
    assert eth.source_address_for("fe80::1%eth0") == "fe80::4"
    assert eth.source_address_for("2600:1::1") == "2600::4"
    assert look("eth0", "fe80::4/64").source_address_for("10.0.0.1") is None


def test_an_unknown_name_is_an_error_that_lists_what_is_there():
    source = FakeSource({"lo": ["127.0.0.1/8"], "wwan0": ["10.1.1.1/30"]})
    with pytest.raises(ConfigurationError, match=r"'wwan1'; it has lo \(loopback\), wwan0 \(mob"):
        find_interface("wwan1", source)
    with pytest.raises(ConfigurationError, match="none at all"):
        find_interface("eth0", FakeSource({}))


@pytest.mark.parametrize("error", [ValueError("no such interface"), OSError(19, "gone")])
def test_an_interface_that_vanishes_is_left_out(error):
    source = FakeSource({"eth0": ["192.168.1.7/24"]}, gone={"wwan0": error})
    assert [each.name for each in inspect_interfaces(source).interfaces] == ["eth0"]


def test_no_routes_to_be_had():
    source = FakeSource({"eth0": ["192.168.1.7/24"]}, gateways=OSError("no netlink for you"))
    report = inspect_interfaces(source)
    assert report.default_ipv4 is None
    assert report.default_ipv6 is None


def test_routes_without_gateway_lowest_metric_first():
    lines = """\
wan\t00000000\t017100CB\t0003\t0\t0\t0\t00000000\t0\t0\t0
wwan0\t00000000\t00000000\t0001\t0\t0\t500\t00000000\t0\t0\t0
tun7\t0100080A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
wwan1\t00000000\t00000000\t0001\t0\t0\t200\t00000000\t0\t0\t0
torn"""
    found = interfaces._default_routes_without_gateway(lines.splitlines())
    assert found == ["wwan1", "wwan0"]


@given(
    st.dictionaries(
        st.sampled_from([IPV4, IPV6, netifaces.AF_LINK, 99]),
        st.lists(
            st.dictionaries(
                st.sampled_from(["addr", "netmask", "broadcast"]),
                st.sampled_from(
                    ["", "10.0.0.1", "fe80::1%x", "255.0.255.0", "::/999", "ffff::/64", "10/8"]
                )
                | st.text(max_size=12),
            ),
            max_size=4,
        ),
    )
)
def test_whatever_the_system_says_is_survived(families):
    source = FakeSource({"eth0": []})
    source.ifaddresses = lambda name: families
    [interface] = inspect_interfaces(source).interfaces
    for address in interface.addresses:
        interface.source_address_for(address.ip)


def test_this_machine():
    report = inspect_interfaces()
    assert any(each.kind is InterfaceKind.LOOPBACK for each in report.interfaces)
    for interface in report.interfaces:
        assert find_interface(interface.name).name == interface.name
