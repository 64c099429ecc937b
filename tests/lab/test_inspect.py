"""What `natswarm inspect` says of the kernel's NATs, with two ordinary nodes as observers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.topology import Lab
from tools.lab.pair import NATSWARM

pytestmark = pytest.mark.lab


def start_observer(lab: Lab, name: str, state: Path) -> str:
    host = lab.add_public(name)
    options = ["--json", "--bind", host.ip, "--state", str(state / name)]
    node = host.namespace.spawn([*NATSWARM, "up", *options])
    line = node.wait_line(lambda line: json.loads(line)["event"] == "up", timeout_s=60)
    return json.loads(line)["invite"]


def test_each_nat_is_found_out(lab: Lab, tmp_path: Path):
    nats = {
        "preserving": (KernelNat(NatKind.PRESERVING), "EIM", "preserving"),
        "random": (KernelNat(NatKind.RANDOM), "APDM", "uniform"),
        "block": (KernelNat(NatKind.BLOCK), "APDM", "block 1024 at 40960..41983"),
    }
    invites = [start_observer(lab, name, tmp_path) for name in ("first", "second")]
    joins = [option for invite in invites for option in ("--join", invite)]
    for name, (nat, mapping, allocation) in nats.items():
        client = lab.add_client(name, nat)
        printed = client.namespace.run(
            [*NATSWARM, "inspect", "--json", "--state", str(tmp_path / name), *joins], timeout_s=60
        )
        profile = json.loads(printed)
        assert profile["mapping"] == mapping
        assert profile["filtering"] == "APDF"
        assert profile["allocation"].startswith(allocation)
        assert profile["public_ips"] == [client.public_ip]
