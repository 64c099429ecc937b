"""What mainline nodes tell of a NAT where there is no peer to ask, and beside peers."""

from __future__ import annotations

import json

import pytest

from natswarm import Evidence, Mapping, SwarmKey, inspect
from natswarm.inspector import QUICK
from natswarm.net.mainline import MainlineConfig

DHT_ONLY = SwarmKey(b"d" * 32)


async def add_dht(swarm, count=6, *, liars=0):
    """Start mainline nodes, some of which see everybody elsewhere; return how to take part."""
    endpoints = []
    for index in range(count):
        config = MainlineConfig(tuple(endpoints[:1]), answers=True)
        node = await swarm.add(f"dht{index}", swarm=DHT_ONLY, mainline=config)
        endpoints.append(node.record().profile.local_endpoints[0])
    for index in range(liars):
        lie(swarm.nodes[f"dht{index}"])
    return MainlineConfig(tuple(endpoints))


def lie(node) -> None:
    """Have a node say that it sees everybody at 6.6.6.6."""
    port = node.mainline._port
    send = port.send

    def send_lies(data, destination, **how):
        if (start := data.find(b"2:ip6:")) >= 0:
            data = data[: start + 6] + bytes([6] * 6) + data[start + 12 :]
        send(data, destination, **how)

    node.mainline._port = type("Liar", (), {"send": staticmethod(send_lies)})


@pytest.mark.parametrize(
    ("kind", "mapping"), [("linux-home", Mapping.EIM), ("kpn-nl", Mapping.APDM)]
)
@pytest.mark.parametrize("liars", [0, 2])
async def test_without_any_peer(open_swarm, autojump_clock, surround, kind, mapping, liars):
    async with open_swarm(seed=2) as swarm:
        dht = await add_dht(swarm, liars=liars)
        node = await swarm.add("me", kind, mainline=dht)
        report = await inspect(
            node, tests=QUICK, time_limit_s=3, surroundings=surround(swarm.hosts["me"])
        )
    assert report.profile.mapping is mapping
    assert "6.6.6.6" not in report.profile.public_ips
    assert report.profile.is_translated
    assert report.finding("filtering").evidence is Evidence.UNKNOWN
    assert {each.peer_id for each in report.observers} == {None}
    assert 5 <= len(report.observers) <= 8
    assert sum(each.echo_count == 0 for each in report.observers) <= liars
    assert json.loads(json.dumps(report.as_json()))["observers"][0]["peer_id"] is None
    assert "Nobody" not in " ".join(report.advice)


async def test_beside_a_peer_they_tell_eim_from_adm(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        dht = await add_dht(swarm)
        hub = await swarm.add("hub")
        node = await swarm.add("me", "linux-home", mainline=dht)
        report = await inspect(
            node,
            invites=[await hub.invite()],
            tests=QUICK,
            surroundings=surround(swarm.hosts["me"]),
        )
    assert report.profile.mapping is Mapping.EIM
    assert report.profile.filtering is not None
    assert report.profile.allocation is not None
    assert sum(each.peer_id is None for each in report.observers) >= 5
    assert report.observers[0].peer_id == hub.peer_id
    assert not [each for each in report.warnings if "all observers have one address" in each]
