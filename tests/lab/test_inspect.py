"""What `natswarm inspect` says of the kernel's NATs, with two ordinary nodes as observers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from natswarm.lab.errors import LabError
from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.topology import Host, Lab
from tools.lab.pair import NATSWARM

pytestmark = pytest.mark.lab

NATS = {
    "preserving": (KernelNat(NatKind.PRESERVING), "EIM", "preserving"),
    "random": (KernelNat(NatKind.RANDOM), "APDM", "uniform"),
    "block": (KernelNat(NatKind.BLOCK), "APDM", "block 1024 at 40960..41983"),
}


@pytest.fixture(scope="module")
def joins(shared_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name two observers; all tests ask the same."""
    state, nodes = tmp_path_factory.mktemp("observers"), []
    for name in ("first", "second"):
        host = shared_lab.add_public(name)
        options = ["--json", "--bind", host.ip, "--state", str(state / name)]
        nodes.append(host.namespace.spawn([*NATSWARM, "up", *options]))
    lines = [
        node.wait_line(lambda line: json.loads(line)["event"] == "up", timeout_s=60)
        for node in nodes
    ]
    return [option for line in lines for option in ("--join", json.loads(line)["invite"])]


def inspect(client: Host, state: Path, *options: str) -> dict[str, Any]:
    command = [*NATSWARM, "inspect", "--json", "--state", str(state), *options]
    return json.loads(client.namespace.run(command, timeout_s=60))


def test_each_nat_is_found_out(shared_lab: Lab, tmp_path: Path, joins: list[str]):
    for name, (nat, mapping, allocation) in NATS.items():
        client = shared_lab.add_client(name, nat)
        report = inspect(client, tmp_path / name, "--quick", *joins)
        found = {field: finding["value"] for field, finding in report["nat"].items()}
        assert (found["mapping"], found["filtering"]) == (mapping, "APDF")
        assert found["allocation"]["text"].startswith(allocation)
        assert found["public_ips"] == [client.public_ip]
        assert (found["is_translated"], found["nat_count"], found["opener_ttl"]) == (True, 1, 2)
        assert report["interface"] == "lan"
        assert report["path"]["hops"][0]["ip"] == report["gateway"]["ip"]
        assert report["duration_s"] < 3
        assert report["tests"]["behaviour"]["packets"] <= 60


def test_what_the_kernel_does_besides(shared_lab: Lab, tmp_path: Path, joins: list[str]):
    """Poison and the TFTP helper, which the kernel can do as well as not."""
    skipped = [each for name in ("gateway", "lease", "quota") for each in ("--skip", name)]
    clients = [
        shared_lab.add_client(
            f"besides-{is_there}".lower(),
            KernelNat(NatKind.PRESERVING, is_poisonable=is_there, has_tftp_helper=is_there),
        )
        for is_there in (False, True)
    ]

    def look(client: Host) -> dict[str, Any]:
        return inspect(client, tmp_path / client.namespace.name[-5:], *skipped, *joins)

    # Both at once: most of an inspection is waiting.
    with ThreadPoolExecutor(len(clients)) as pool:
        reports = list(pool.map(look, clients))
    for is_there, report in zip((False, True), reports, strict=True):
        found = {field: finding["value"] for field, finding in report["nat"].items()}
        assert found["poison"] == ("takes port" if is_there else "none"), report["nat"]["poison"]
        assert found["tftp_helper"] is is_there, report["nat"]["tftp_helper"]
        # A router that takes packets for itself spoils the ports that would show it.
        assert found["hairpinning"] is (None if is_there else False), report["nat"]["hairpinning"]
        assert report["nat"]["max_mappings"]["reason"] == "it was left out"


def test_one_interface_of_several(shared_lab: Lab, tmp_path: Path, joins: list[str]):
    client = shared_lab.add_client("phone", KernelNat(NatKind.PRESERVING))
    # A second SIM that leads nowhere, and that the system prefers.
    client.namespace.ip(
        "link add name wwan0 type veth peer name nowhere",
        "address add 10.9.0.2/24 dev wwan0",
        "link set dev nowhere up",
        "link set dev wwan0 up",
        f"route replace default via {client.ip.removesuffix('2')}1 dev lan metric 100",
        "route del default metric 0",
        "route add default via 10.9.0.1 metric 1",
    )
    report = inspect(client, tmp_path, "--quick", "--interface", "lan", *joins)
    assert report["interface"] == "lan"
    assert report["nat"]["mapping"]["value"] == "EIM"
    assert report["nat"]["opener_ttl"]["value"] == 2
    assert any("wwan0 leads out, too" in each for each in report["warnings"])
    report = inspect(client, tmp_path, "--quick", "--interface", "wwan0", *joins)
    assert report["interface"] == "wwan0"
    assert report["nat"]["mapping"]["evidence"] == "unknown"
    assert len([each for each in report["warnings"] if "could not be asked" in each]) == 2
    with pytest.raises(LabError, match="no interface 'wwan1'; it has"):
        inspect(client, tmp_path, "--quick", "--interface", "wwan1", *joins)


def test_an_interface_that_vanishes_meanwhile(shared_lab: Lab, tmp_path: Path, joins: list[str]):
    client = shared_lab.add_client("unplugged", KernelNat(NatKind.RANDOM))
    options = ["--json", "--state", str(tmp_path / "client"), "--quick", *joins]
    command = client.namespace.spawn([*NATSWARM, "inspect", "--watch", "--every", "1", *options])
    first = json.loads(command.wait_line(lambda _line: True, timeout_s=60))
    assert first["nat"]["mapping"]["value"] == "APDM"
    client.namespace.ip("link delete dev lan")
    line = command.wait_line(lambda line: "interfaces" in json.loads(line)["changed"], timeout_s=60)
    report = json.loads(line)
    assert report["interface"] is None or any("vanished" in each for each in report["warnings"])
    assert command.error_text() == ""
