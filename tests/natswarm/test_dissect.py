"""The dissector names what the wire's own decoders read, and a whole capture of two nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw
from scapy.utils import wrpcap

from natswarm import Endpoint
from natswarm.discovery.beacon import BeaconCipher
from natswarm.identity import Identity
from natswarm.swarm_key import SwarmKey
from natswarm.wire import decode_echo_request_untrusted, decode_hello_untrusted
from tools import dissect

VECTORS = json.loads(
    (Path(__file__).parents[1] / "vectors" / "wire.json").read_text(encoding="utf-8")
)
NATSWARM = {name: bytes.fromhex(text) for name, text in VECTORS.items() if isinstance(text, str)}


def test_the_layers_split_datagrams_as_the_wire_does():
    hello = NATSWARM["hello"]
    layer, decoded = dissect.layer_of(hello), decode_hello_untrusted(hello)
    assert (layer.attempt, layer.sender, layer.target) == (
        decoded.attempt,
        decoded.sender.key,
        decoded.target.key,
    )
    request = NATSWARM["echo_request_elsewhere"]
    layer, echo = dissect.layer_of(request), decode_echo_request_untrusted(request)
    assert (layer.transaction, layer.token) == (echo.transaction, echo.token)
    assert Endpoint.decode_untrusted(layer.deliver_to) == echo.deliver_to
    for data in (hello, request):
        assert bytes(dissect.layer_of(data)) == data


def test_what_is_signed_is_checked():
    hello = bytearray(NATSWARM["hello"])
    kind, text = dissect.explain(bytes(hello))
    assert kind == "HELLO"
    assert "knocks at" in text
    assert "NOT AUTHENTIC" not in text
    hello[20] ^= 1
    assert "NOT AUTHENTIC" in dissect.explain(bytes(hello)).text


def test_each_kind_of_the_vectors_is_named():
    kinds = {dissect.explain(data).kind for data in NATSWARM.values()}
    assert {"ECHO?", "ECHO", "HELLO", "PROBE", "ACK"} <= kinds
    for data in NATSWARM.values():
        assert "cut off" in dissect.explain(data[:-1]).text or data[0] > 7


def test_private_swarms_open_with_their_key_alone():
    swarm = SwarmKey.generate()
    sealed = swarm.seal(NATSWARM["hello"])
    assert dissect.explain(sealed).kind == "SEALED"
    assert dissect.explain(sealed, swarm).kind == "HELLO"
    beacon = BeaconCipher(swarm).encode(
        Identity(b"i" * 32), Endpoint("192.0.2.1", 4000), b"12 bytes salt"[:12]
    )
    assert dissect.explain(beacon).text == "of another swarm"
    assert "192.0.2.1:4000" in dissect.explain(beacon, swarm).text


@given(st.binary(max_size=200))
def test_nothing_makes_it_fail(data):
    kind, text = dissect.explain(data)
    assert kind
    assert text.isprintable()


async def test_a_capture_of_two_nodes(open_swarm, autojump_clock, tmp_path, capsys):
    captured = []
    async with open_swarm() as swarm:
        swarm.internet.world.trace = lambda now, event, where, packet: (
            captured.append((now, packet)) if event == "sent" and where in ("a", "obs0") else None
        )
        await swarm.add_observers(1)
        await swarm.add_inspected("a")
        await swarm.check_talk("a", "obs0")
    packets = []
    for now, packet in captured:
        source, destination = packet.source, packet.destination
        framed = IP(src=source.ip, dst=destination.ip) / UDP(
            sport=source.port, dport=destination.port
        )
        framed = framed / Raw(packet.data)
        framed.time = now
        packets.append(framed)
    path = tmp_path / "capture.pcap"
    wrpcap(str(path), packets)
    capsys.readouterr()
    assert dissect.main([str(path)]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert len(lines) == len(packets)
    assert "HELLO" in {line.split()[4] for line in lines}
    for word in ("knocks at", "do you hear me?", "yes, it came from", "sees you at", "Initial"):
        assert any(word in line for line in lines), word
    assert "QUIC" in summary
    assert "?" not in {part.split()[1] for part in summary.split(", ")}
    assert dissect.main([str(path), "--only", "HELLO", "--show"]) == 0
    assert "natswarm hello" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no capture at all, but long enough to look at"])
def test_what_is_no_capture_is_a_plain_error(tmp_path, capsys, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert dissect.main([str(path)]) == 1
    assert dissect.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("dissect: ") == 2
