"""What is known of an interface and its carrier, and what of addresses is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from natswarm.errors import ConfigurationError
from natswarm.field_test import link as link_module
from natswarm.field_test.carrier import find_carrier
from natswarm.field_test.link import Link, LinkCounters
from natswarm.field_test.privacy import shorten_ip, shorten_text
from natswarm.net.interfaces import (
    AddressSpace,
    Interface,
    InterfaceAddress,
    InterfaceKind,
)

ROUTES = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("198.51.100.7", "198.51.0.0/16"),
        ("2001:db8:1:2::3", "2001:db8::/32"),
        ("not an address", "not an address"),
    ],
)
def test_an_address_becomes_its_network(text: str, short: str):
    assert shorten_ip(text) == short


def test_addresses_in_sentences_are_shortened():
    said = "a path over 198.51.100.7:4242 was found, 2001:db8::7 fell silent at 12:30:01.5"
    assert shorten_text(said) == (
        "a path over 198.51.0.0/16:4242 was found, 2001:db8::/32 fell silent at 12:30:01.5"
    )
    for text in ("took 1.2.3 s", "version 1.2.3.4.5", "ports 1024..2047", "block 256 at 4096", ""):
        assert shorten_text(text) == text
    assert shorten_text(shorten_text(said)) == shorten_text(said)
    assert shorten_text("the interface enx0250f4000001 is gone") == "the interface enx* is gone"


def modem_manager(argv) -> str | None:
    answers = {
        ("mmcli", "-L", "-J"): {"modem-list": ["/Modem/0", "/Modem/1"]},
        ("mmcli", "-m", "/Modem/0", "-J"): {
            "modem": {"generic": {"ports": ["cdc-wdm0 (mbim)", "wwan0 (net)"]}}
        },
        ("mmcli", "-m", "/Modem/1", "-J"): {
            "modem": {
                "generic": {"ports": ["wwan1 (net)"]},
                "3gpp": {"operator-name": "KPN", "operator-code": "20408"},
            }
        },
    }
    found = answers.get(tuple(argv))
    if found is not None:
        return json.dumps(found)
    return "Galaxy of Ann\n" if argv[0] == "nmcli" and argv[-1] != "eth9" else None


def test_a_carrier_is_called_by_who_knows_best():
    def find(interface: str, given: str = "") -> tuple[str, str]:
        return tuple(find_carrier(interface, given, run=modem_manager))

    assert find("wwan1", " NL  KPN ") == ("NL KPN", "user")
    assert find("wwan1") == ("KPN 20408", "modem")
    assert find("wwan0") == ("Galaxy of Ann", "network"), "that modem has no network"
    assert find("eth9") == ("eth9", "interface")
    assert find("") == ("unknown", "interface")
    assert find_carrier("wwan1", run=lambda _: "damaged") == ("damaged", "network")
    assert find("usb0", "\x1b[31mred" + 60 * "x")[0].startswith("[31mred")


@pytest.fixture
def system(tmp_path: Path, monkeypatch):
    """An interface usb1 beside eth0, in files."""

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def find(name: str) -> Interface:
        if name != "usb1":
            raise ConfigurationError(f"this machine has no interface {name!r}")
        address = InterfaceAddress("192.168.42.7", 24, AddressSpace.HOME)
        return Interface("usb1", InterfaceKind.MOBILE, ("its name",), (address,))

    monkeypatch.setattr(link_module, "find_interface", find)
    for name, value in (("tx_packets", 5), ("tx_bytes", 500), ("rx_packets", 3)):
        write(f"sys/class/net/usb1/statistics/{name}", f"{value}\n")
    write("sys/class/net/usb1/carrier", "1\n")
    write("proc/net/route", f"{ROUTES}eth0 00000000 0102A8C0 0003 0 0 100 00000000 0 0 0\n")
    return tmp_path, write


def test_an_interface_that_can_be_used(system):
    root, write = system
    line = "usb1 00000000 012AA8C0 0003 0 0 200 00000000 0 0 0\n"
    write("proc/net/route", (root / "proc/net/route").read_text() + line)
    for name in ("all", "usb1"):
        write(f"proc/sys/net/ipv4/conf/{name}/rp_filter", "0\n")
    link = Link("usb1", root)
    assert link.check().kind is InterfaceKind.MOBILE
    assert link.counters() == LinkCounters(5, 500, 3)
    write("proc/sys/net/ipv4/conf/usb1/rp_filter", "1\n")
    with pytest.raises(ConfigurationError, match=r"reverse path filter.*sysctl -w"):
        link.check()
    # The greater number counts, and 2 is the loose one.
    write("proc/sys/net/ipv4/conf/all/rp_filter", "2\n")
    link.check()


def test_an_interface_that_cannot(system):
    root, write = system
    with pytest.raises(ConfigurationError, match="usb1 has no default route"):
        Link("usb1", root).check()
    write("sys/class/net/usb1/carrier", "0\n")
    with pytest.raises(ConfigurationError, match=r"no carrier: connect it first"):
        Link("usb1", root).check()
    with pytest.raises(ConfigurationError, match="no interface 'usb7'"):
        Link("usb7", root).check()
    assert Link("usb7", root).outage() == "the interface usb7 is gone"
    assert Link("usb7", root).counters() is None
