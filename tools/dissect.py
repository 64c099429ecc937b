"""Explain a capture line by line: every datagram that a node sends or gets.

    python -m tools.dissect capture.pcap [--swarm-key FILE] [--only HELLO] [--show]

    0.000  10.0.0.2:40000 > 198.51.100.7:36397  HELLO  attempt 3f1c22aa: 6vqkx2d3 knocks at xlmvjybx

Names datagrams by their bytes alone, so any port will do. What is signed is checked; a probe's MAC
can't be, since its key is its two ends' own. Of a private swarm, whose datagrams are sealed, the
swarm's key opens them. What QUIC carries only its keys tell: docs/seeing.md, Wireshark.

The layers are for scapy's own tools, too: `layer_of(data).show()`.

Source: natswarm/wire.py and swarm_key.py for the layouts; RFC 9000 section 17 for QUIC's headers.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from scapy.fields import (
    BitField,
    ByteEnumField,
    ByteField,
    IntField,
    XStrFixedLenField,
)
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw
from scapy.utils import PcapReader

from natswarm.address import ENDPOINT_BYTES, Endpoint
from natswarm.discovery.beacon import HEAD as BEACON_HEAD
from natswarm.discovery.beacon import BeaconCipher
from natswarm.discovery.krpc import Error, Query, Response, decode_krpc_untrusted
from natswarm.errors import ConfigurationError, DecodeError, NatswarmError
from natswarm.identity import SIGNATURE_BYTES, PeerId
from natswarm.swarm_key import OPEN_SWARM, QUIC_SEALED, SEALED, SwarmKey
from natswarm.wire import (
    ATTEMPT_BYTES,
    ECHO_TOKEN_BYTES,
    MAC_BYTES,
    NO_TOKEN,
    PEER_ID_BYTES,
    TRANSACTION_BYTES,
    DatagramType,
    ProbeKind,
    decode_echo_reply_untrusted,
    decode_echo_request_untrusted,
    decode_hello_untrusted,
)

__all__ = [
    "EchoReplyLayer",
    "EchoRequestLayer",
    "Explanation",
    "HelloLayer",
    "ProbeLayer",
    "explain",
    "layer_of",
    "main",
]

NO_ENDPOINT = bytes(ENDPOINT_BYTES)
TYPES = {kind.value: kind.name for kind in DatagramType}
PROBE_TEXTS = {
    ProbeKind.PROBE: "do you hear me?",
    ProbeKind.ACK: "yes, it came from {observed}",
    ProbeKind.NOMINATE: "let this path be ours",
    ProbeKind.NOMINATED: "it is; that came from {observed}",
    ProbeKind.SPARE: "do you hear me? use this path only if no other answers",
}

QUIC_FIXED_BIT = 0x40
QUIC_LONG = 0x80
QUIC_TYPES = ("Initial", "0-RTT", "Handshake", "Retry")
# Connections' ids have this many bytes; a short header does not say.
QUIC_ID_BYTES = 8


class EchoRequestLayer(Packet):
    """ECHO_REQUEST: from where do you see me?"""

    name = "natswarm echo request"
    fields_desc: ClassVar[list[Any]] = [
        ByteEnumField("type", DatagramType.ECHO_REQUEST, TYPES),
        ByteField("version", 1),
        BitField("reserved", 0, 7),
        BitField("from_alternate_port", 0, 1),
        XStrFixedLenField("transaction", b"", TRANSACTION_BYTES),
        XStrFixedLenField("sender", b"", PEER_ID_BYTES),
        XStrFixedLenField("deliver_to", NO_ENDPOINT, ENDPOINT_BYTES),
        XStrFixedLenField("token", NO_TOKEN, ECHO_TOKEN_BYTES),
        XStrFixedLenField("signature", b"", SIGNATURE_BYTES),
    ]


class EchoReplyLayer(Packet):
    """ECHO_REPLY: from there."""

    name = "natswarm echo reply"
    fields_desc: ClassVar[list[Any]] = [
        ByteEnumField("type", DatagramType.ECHO_REPLY, TYPES),
        ByteField("version", 1),
        BitField("reserved", 0, 6),
        BitField("is_unsolicited", 0, 1),
        BitField("from_alternate_port", 0, 1),
        XStrFixedLenField("transaction", b"", TRANSACTION_BYTES),
        XStrFixedLenField("sender", b"", PEER_ID_BYTES),
        XStrFixedLenField("observed", NO_ENDPOINT, ENDPOINT_BYTES),
        XStrFixedLenField("token", NO_TOKEN, ECHO_TOKEN_BYTES),
        XStrFixedLenField("signature", b"", SIGNATURE_BYTES),
    ]


class HelloLayer(Packet):
    """HELLO: a stranger knocks."""

    name = "natswarm hello"
    fields_desc: ClassVar[list[Any]] = [
        ByteEnumField("type", DatagramType.HELLO, TYPES),
        ByteField("version", 1),
        ByteField("zero", 0),
        XStrFixedLenField("attempt", b"", ATTEMPT_BYTES),
        XStrFixedLenField("sender", b"", PEER_ID_BYTES),
        XStrFixedLenField("target", b"", PEER_ID_BYTES),
        XStrFixedLenField("signature", b"", SIGNATURE_BYTES),
    ]


class ProbeLayer(Packet):
    """PROBE: is there a path, and is it still there?"""

    name = "natswarm probe"
    fields_desc: ClassVar[list[Any]] = [
        ByteEnumField("type", DatagramType.PROBE, TYPES),
        ByteField("version", 1),
        ByteEnumField("kind", 0, {kind.value: kind.name for kind in ProbeKind}),
        XStrFixedLenField("attempt", b"", ATTEMPT_BYTES),
        IntField("sequence", 0),
        XStrFixedLenField("observed", NO_ENDPOINT, ENDPOINT_BYTES),
        XStrFixedLenField("mac", b"", MAC_BYTES),
    ]


LAYERS: dict[int, type[Packet]] = {
    DatagramType.ECHO_REQUEST: EchoRequestLayer,
    DatagramType.ECHO_REPLY: EchoReplyLayer,
    DatagramType.HELLO: HelloLayer,
    DatagramType.PROBE: ProbeLayer,
}


class Explanation(NamedTuple):
    """What a datagram is, in a word, and what it says."""

    kind: str
    text: str


def layer_of(data: bytes) -> Packet:
    """Return a natswarm datagram as a scapy layer; `Raw` where it is none, or cut off."""
    layer = LAYERS.get(data[0]) if data else None
    return Raw(data) if layer is None or len(data) < len(layer()) else layer(data)


def explain(data: bytes, swarm: SwarmKey = OPEN_SWARM) -> Explanation:
    """Say what a datagram is.

    Args:
        data: What UDP carried.
        swarm: The key of the swarm, for what is sealed.
    """
    if not data:
        return Explanation("EMPTY", "no bytes")
    if data.startswith(BEACON_HEAD):
        return _beacon(data, swarm)
    if data[0] == SEALED:
        return _sealed(data, swarm)
    if data[0] in LAYERS:
        return _natswarm(data)
    if data[:1] == b"d" and data[1:2].isdigit():
        return _krpc(data)
    if data[0] & QUIC_FIXED_BIT:
        return _quic(data, swarm)
    return Explanation("?", f"{len(data)} bytes that are none of ours")


def _sealed(data: bytes, swarm: SwarmKey) -> Explanation:
    try:
        if not swarm.is_open:
            kind, text = explain(swarm.open_untrusted(data))
            return Explanation(kind, f"{text} (sealed)")
    except DecodeError:
        pass
    return Explanation("SEALED", f"{len(data)} bytes of a private swarm; --swarm-key opens them")


def _natswarm(data: bytes) -> Explanation:
    kind = DatagramType(data[0]).name
    layer = layer_of(data)
    match layer:
        case Raw():
            return Explanation(kind, f"cut off after {len(data)} bytes")
        case HelloLayer():
            text = (
                f"attempt {layer.attempt.hex()[:8]}: {_short(layer.sender)} knocks at "
                f"{_short(layer.target)}"
            )
            return Explanation(kind, text + _forgery(decode_hello_untrusted, data))
        case EchoRequestLayer():
            port = "; answer from your other port" if layer.from_alternate_port else ""
            where = f"; answer to {_endpoint(layer.deliver_to)}" if any(layer.deliver_to) else ""
            text = f"{layer.transaction.hex()[:8]}: {_short(layer.sender)} asks where it is seen"
            return Explanation(
                "ECHO?", text + port + where + _forgery(decode_echo_request_untrusted, data)
            )
        case EchoReplyLayer():
            whose = "for a neighbour, " if layer.is_unsolicited else ""
            text = (
                f"{layer.transaction.hex()[:8]}: {whose}{_short(layer.sender)} sees you at "
                f"{_endpoint(layer.observed)}"
            )
            return Explanation("ECHO", text + _forgery(decode_echo_reply_untrusted, data))
    try:
        probe_kind = ProbeKind(layer.kind)
    except ValueError:
        return Explanation(kind, f"of an unknown kind, {layer.kind}")
    said = PROBE_TEXTS[probe_kind].format(observed=_endpoint(layer.observed))
    text = f"attempt {layer.attempt.hex()[:8]}, number {layer.sequence}: {said}"
    return Explanation(probe_kind.name, text)


def _beacon(data: bytes, swarm: SwarmKey) -> Explanation:
    try:
        beacon = BeaconCipher(swarm).decode_untrusted(data)
    except DecodeError:
        return Explanation("BEACON", "of another swarm")
    return Explanation("BEACON", f"{beacon.sender.short} takes strangers at {beacon.endpoint}")


def _krpc(data: bytes) -> Explanation:
    try:
        message = decode_krpc_untrusted(data)
    except DecodeError as error:
        return Explanation("KRPC", f"damaged: {error}")
    transaction = message.transaction.hex()
    match message:
        case Query():
            return Explanation("KRPC", f"{transaction}: asks {message.method.decode('ascii')}")
        case Response():
            seen = "" if message.observed is None else f", sees you at {message.observed}"
            return Explanation("KRPC", f"{transaction}: answers{seen}")
        case Error():
            return Explanation("KRPC", f"{transaction}: refuses")


def _quic(data: bytes, swarm: SwarmKey) -> Explanation:
    sealed = ""
    if data[0] == QUIC_SEALED:
        opened = swarm.open_quic_untrusted([data])
        if not opened or opened[0] == data:
            text = f"{len(data)} bytes of a private swarm's handshake; --swarm-key opens"
            return Explanation("QUIC", text)
        data, sealed = opened[0], " (sealed)"
    if not data[0] & QUIC_LONG:
        connection = data[1 : 1 + QUIC_ID_BYTES].hex()
        return Explanation("QUIC", f"{len(data)} bytes to connection {connection}")
    kinds = " + ".join(_long_headers(data))
    size = data[5] if len(data) > 5 else 0
    connection = data[6 : 6 + size].hex()
    return Explanation("QUIC", f"{kinds}, {len(data)} bytes to connection {connection}{sealed}")


def _long_headers(data: bytes) -> Iterator[str]:
    """Yield the types of the packets that share a datagram; of what follows them only that."""
    while data and data[0] & QUIC_LONG:
        kind = QUIC_TYPES[data[0] >> 4 & 3]
        yield kind
        try:
            at = 6 + data[5]
            at += 1 + data[at]
            if kind == "Initial":
                token_bytes, at = _variable_integer(data, at)
                at += token_bytes
            length, at = _variable_integer(data, at)
        except IndexError:
            return
        data = data[at + length :]


def _variable_integer(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of RFC 9000 section 16 and where it ends."""
    size = 1 << (data[at] >> 6)
    return int.from_bytes(data[at : at + size]) & (1 << (8 * size - 2)) - 1, at + size


def _forgery(decode: object, data: bytes) -> str:
    assert callable(decode)
    try:
        decode(data)
    except DecodeError as error:
        return f" - NOT AUTHENTIC: {error}"
    return ""


def _short(key: bytes) -> str:
    try:
        return PeerId.decode_untrusted(key).short
    except DecodeError:
        return "nobody"


def _endpoint(data: bytes) -> str:
    try:
        return str(Endpoint.decode_untrusted(data)) if any(data) else "nowhere"
    except DecodeError:
        return "an impossible endpoint"


def _lines(
    capture: Path, swarm: SwarmKey
) -> Iterator[tuple[float, Endpoint, Endpoint, Explanation, bytes]]:
    """Yield what is UDP of a capture, by time from its first packet."""
    first: float | None = None
    # Opened here, since scapy leaves open what is no capture; its types know of names only.
    with (
        capture.open("rb") as file,
        PcapReader(file) as packets,  # type: ignore[arg-type]
    ):
        for packet in packets:
            first = float(packet.time) if first is None else first
            if UDP not in packet or not (IP in packet or IPv6 in packet):
                continue
            ip, udp = packet[IP] if IP in packet else packet[IPv6], packet[UDP]
            data = bytes(udp.payload)
            source, destination = Endpoint(ip.src, udp.sport), Endpoint(ip.dst, udp.dport)
            yield float(packet.time) - first, source, destination, explain(data, swarm), data


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("capture", type=Path, help="pcap or pcapng file")
    parser.add_argument("--swarm-key", type=Path, help="swarm key file of a private swarm")
    parser.add_argument("--only", help="only this kind, such as HELLO")
    parser.add_argument("--show", action="store_true", help="all fields, as scapy shows them")
    chosen = parser.parse_args(arguments)
    swarm = OPEN_SWARM
    counts: Counter[str] = Counter()
    try:
        if chosen.swarm_key is not None:
            loaded = SwarmKey.load(chosen.swarm_key)
            if loaded is None:
                raise ConfigurationError(f"there is no swarm key at {chosen.swarm_key}")
            swarm = loaded
        for at_s, source, destination, (kind, text), data in _lines(chosen.capture, swarm):
            counts[kind] += 1
            if chosen.only in (None, kind):
                print(f"{at_s:9.3f}  {source} > {destination}  {kind:9} {text}")
                if chosen.show:
                    layer_of(data).show()
    except (NatswarmError, OSError) as error:
        print(f"dissect: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # scapy raises its own for what is no capture.
        if type(error).__module__.split(".")[0] != "scapy":
            raise
        print(f"dissect: {chosen.capture} is not a capture: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "no UDP in it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
