"""Our node behind a kernel NAT, and three nodes of libtorrent on the other side, each a process.

    client ── NAT ── core ── t0, t1, t2

Everything that the client sends and receives is captured, and read by programs of others.
"""

from __future__ import annotations

import json
import socket
import sys
import time
import warnings
from pathlib import Path

import pytest

from natswarm.identity import Identity
from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.pcap import pcap_header, pcap_record
from natswarm.lab.topology import Host, Lab

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]
PORT = 6881  # in TORRENT, too
ME, KIM = Identity(b"m" * 32), Identity(b"k" * 32)

TORRENT = """
import hashlib, json, sys, time
import libtorrent
ip, peers, ours, theirs, publisher = sys.argv[1:]
session = libtorrent.session({
    "listen_interfaces": f"{ip}:6881", "dht_bootstrap_nodes": "", "enable_dht": True,
    "enable_lsd": False, "enable_upnp": False, "enable_natpmp": False,
    "dht_restrict_routing_ips": False, "dht_restrict_search_ips": False,
    "dht_ignore_dark_internet": False,
    "alert_mask": libtorrent.alert.category_t.all_categories,
})
for peer in json.loads(peers):
    session.add_dht_node((peer, 6881))
print("up", flush=True)
private = bytearray(hashlib.sha512(b"k" * 32).digest())
private[0] &= 248
private[31] = (private[31] & 63) | 64
while True:
    if ip == publisher:
        session.dht_put_mutable_item(bytes(private), bytes.fromhex(theirs), b"from them", b"salt")
    session.dht_get_mutable_item(bytes.fromhex(ours), b"salt")
    time.sleep(1)  # in a process of its own: libtorrent is asked again until it has found it
    for alert in session.pop_alerts():
        if alert.what() == "dht_mutable_item" and b"from us" in str(alert.item).encode():
            print("got", flush=True)
"""

OURS = """
import json, sys, trio
sys.path.insert(0, sys.argv[1])
from natswarm import Endpoint, Identity, NodeConfig, PeerId, open_node
from natswarm.discovery.mainline_item import MutableItem
from natswarm.net.mainline import MainlineConfig
nodes = tuple(map(Endpoint.parse, json.loads(sys.argv[2])))
me, kim = Identity(b"m" * 32), PeerId(bytes.fromhex(sys.argv[3]))
async def main():
    async with open_node(NodeConfig(me, mainline=MainlineConfig(nodes))) as node:
        mainline = node.mainline
        await mainline.wait_bootstrapped()
        profile = await node.inspect()
        stored = await mainline.put_item(MutableItem.sign(me, b"salt", 7, b"from us"))
        item = None
        while item is None:
            await trio.sleep(0.5)
            item = await mainline.get_item(kim, b"salt")
        print(json.dumps({
            "votes": {ip: str(seen) for ip, seen in mainline.votes().items()},
            "mapping": profile.mapping.value, "public": list(profile.public_ips),
            "stored": stored, "item": item.value.decode(),
            "rejected": mainline.statistics().rejected_count,
        }), flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


class Capture:
    """All IP packets of a host, as a pcap file."""

    def __init__(self, host: Host) -> None:
        with host.namespace.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self._socket.setblocking(False)

    def write(self, path: Path) -> None:
        records = [pcap_header()]
        while True:
            try:
                packet, address = self._socket.recvfrom(65_535)
            except BlockingIOError:
                break
            if address[1] == 0x0800:
                records.append(pcap_record(packet, time.time_ns()))
        self._socket.close()
        path.write_bytes(b"".join(records))


def test_among_real_nodes_and_what_was_on_the_wire(lab: Lab, tmp_path: Path, caplog):
    libtorrent = pytest.importorskip(
        "libtorrent", reason="libtorrent is not installed: pip install natswarm[dev]"
    )
    client = lab.add_client("client", KernelNat(NatKind.PRESERVING))
    others = [lab.add_public(f"t{index}") for index in range(3)]
    ips = [host.ip for host in others]
    capture = Capture(client)
    keys = [ME.peer_id.key.hex(), KIM.peer_id.key.hex(), ips[0]]
    torrents = [
        host.namespace.spawn([sys.executable, "-c", TORRENT, host.ip, json.dumps(ips), *keys])
        for host in others
    ]
    for torrent in torrents:
        torrent.wait_line(lambda line: line == "up", timeout_s=60)
    nodes = json.dumps([f"{ip}:{PORT}" for ip in ips])
    ours = client.namespace.spawn(
        [sys.executable, "-c", OURS, str(ROOT), nodes, KIM.peer_id.key.hex()]
    )
    found = json.loads(ours.wait_line(lambda line: line.startswith("{"), timeout_s=90))
    for torrent in torrents:  # each has read our item
        torrent.wait_line(lambda line: line == "got", timeout_s=30)
    assert set(found["votes"]) == set(ips)
    assert len(set(found["votes"].values())) == 1, "the NAT keeps the port for all"
    assert (found["mapping"], len(found["public"])) == ("EIM", 1)
    assert not found["public"][0].startswith("192.168.")
    assert (found["stored"], found["item"], found["rejected"]) == (3, "9:from them", 0)

    capture.write(tmp_path / "wire.pcap")
    from scapy.layers.inet import IP, UDP  # slow to import
    from scapy.utils import rdpcap

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packets = rdpcap(str(tmp_path / "wire.pcap"))
        messages = [bytes(packet[UDP].payload) for packet in packets if UDP in packet]
    assert [each for each in caplog.records if each.name.startswith("scapy")] == []
    assert all(IP in packet for packet in packets)
    assert len(messages) > 20
    kinds = {libtorrent.bdecode(message)[b"y"] for message in messages}
    assert kinds == {b"q", b"r"}, "no error and nothing that is not KRPC"
