"""What is told of connections: figures of paths, qlogs, and keys that open their datagrams."""

from __future__ import annotations

import io
import json
import stat

import pytest
import trio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from rich.console import Console, Group

from natswarm import ConfigurationError, NodeConfig, Tracing, VirtualNetwork, open_node
from natswarm.cli.status_view import peer_details
from natswarm.device.facts import peer_details_as_json


async def test_figures_of_each_path(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "kpn-nl")
        peer = await a.connect(b.peer_id)
        await swarm.check_talk("a", "b")
        found = peer_details_as_json(peer)
        (path,) = [each for each in found["paths"] if each["is_active"]]
        assert path["remote"] == str(peer.seen_at)
        assert path["sent_bytes"] == found["connection"]["sent_bytes"] > 2000
        assert path["received_datagram_count"] == found["connection"]["received_datagram_count"]
        assert 0 < path["rtt_s"] < 1
        assert found["probes"]["sent_count"] > 0
        assert found["probes"]["forged_count"] == 0
        json.dumps(found)
        screen = Console(width=120, file=io.StringIO())
        screen.print(Group(peer_details(found)))
        assert f"- {peer.seen_at}: active" in screen.file.getvalue()


async def test_a_qlog_tells_of_datagrams_paths_and_the_end(open_swarm, autojump_clock, tmp_path):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        await swarm.add_inspected("a", "linux-home", tracing=Tracing(qlog_folder=tmp_path / "q"))
        await swarm.check_talk("a", "obs0")
        mend = swarm.cut("a")
        await trio.sleep(30)
        mend()
        await trio.sleep(30)
        await swarm.check_talk("a", "obs0")
        await swarm.stop("a")
    files = sorted((tmp_path / "q").iterdir())
    assert len(files) == 2  # one for each observer
    header, *events = [
        json.loads(record) for record in files[0].read_text().split("\x1e") if record
    ]
    assert header["qlog_version"] == "0.3"
    assert header["trace"]["vantage_point"]["type"] in files[0].name
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    names = {event["name"] for event in events}
    assert {
        "transport:datagrams_sent",
        "transport:datagrams_received",
        "recovery:metrics_updated",
        "natswarm:path_switched",
    } <= names
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert events[-1]["name"] == "connectivity:connection_closed"


def opened(datagram: bytes, connection_id_bytes: int, secret: bytes) -> bytes | None:
    """Return what a QUIC packet with a short header carries (RFC 9001, AES-128-GCM), None: not."""

    def derived(label: bytes, length: int) -> bytes:
        label = b"tls13 " + label
        info = length.to_bytes(2) + bytes([len(label)]) + label + b"\0"
        return HKDFExpand(hashes.SHA256(), length, info).derive(secret)

    number_at = 1 + connection_id_bytes
    sample = datagram[number_at + 4 : number_at + 20]
    mask = Cipher(algorithms.AES(derived(b"quic hp", 16)), modes.ECB()).encryptor().update(sample)
    first = datagram[0] ^ (mask[0] & 0x1F)
    size = (first & 3) + 1
    number = bytes(x ^ y for x, y in zip(datagram[number_at:][:size], mask[1:], strict=False))
    nonce = int.from_bytes(derived(b"quic iv", 12)) ^ int.from_bytes(number)
    header = bytes([first]) + datagram[1:number_at] + number
    try:
        return AESGCM(derived(b"quic key", 16)).decrypt(
            nonce.to_bytes(12), datagram[number_at + size :], header
        )
    except Exception:
        return None


async def test_the_keys_open_what_went_over_the_wire(open_swarm, autojump_clock, tmp_path):
    keys = tmp_path / "keys.log"
    captured = []
    async with open_swarm() as swarm:
        swarm.internet.world.trace = lambda _now, event, where, packet: (
            captured.append(packet.data) if event == "sent" and where == "a" else None
        )
        await swarm.add_observers(1)
        a = await swarm.add("a", tracing=Tracing(key_file=keys))
        await a.connect(await swarm.nodes["obs0"].invite())

        async def take(_stream, _peer):
            await trio.sleep_forever()

        swarm.nodes["obs0"].serve("test", take)
        stream = await swarm.peer("a", "obs0").open_stream("test")
        await stream.send_all(b"a sentence that is to be found")
        await trio.sleep(1)
    lines = [line.split() for line in keys.read_text().splitlines()]
    assert {label for label, _, _ in lines} == {
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
        "CLIENT_TRAFFIC_SECRET_0",
        "SERVER_TRAFFIC_SECRET_0",
    }
    assert len({client_random for _, client_random, _ in lines}) == 1
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    secrets = [bytes.fromhex(secret) for label, _, secret in lines if label.endswith("_0")]
    plain = [
        text
        for datagram in captured
        if datagram[0] & 0xC0 == 0x40
        for secret in secrets
        if (text := opened(datagram, 8, secret)) is not None
    ]
    assert any(b"a sentence that is to be found" in text for text in plain)


async def test_files_that_cannot_be_written_are_a_plain_error(open_swarm, autojump_clock, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    async with open_swarm() as swarm:
        host = swarm.internet.add_host("a")
        for tracing in (Tracing(qlog_folder=blocked), Tracing(key_file=tmp_path / "no" / "keys")):
            config = NodeConfig(
                identity=swarm.identity("a"), network=VirtualNetwork(host), tracing=tracing
            )
            with pytest.raises(ConfigurationError, match="can't trace connections"):
                async with open_node(config):
                    pass
        assert not host.ports
