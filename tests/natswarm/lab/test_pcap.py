"""Captures that other programs can read."""

from __future__ import annotations

from pathlib import Path

from scapy.layers.inet import IP
from scapy.utils import rdpcap

from natswarm.address import Endpoint
from natswarm.lab.ipv4 import encode_packet
from natswarm.lab.pcap import PCAP_RECORD_BYTES, pcap_header, pcap_record
from natswarm.sim.packet import Packet


def test_the_format_is_pinned():
    assert pcap_header().hex() == "a1b23c4d000200040000000000000000" + "0000ffff" + "00000065"
    record = pcap_record(b"\x45rest", 1_700_000_000_123_456_789)
    assert record.hex() == "6553f100075bcd150000000500000005" + "4572657374"
    assert len(record) == PCAP_RECORD_BYTES + 5


def test_scapy_reads_it(tmp_path: Path):
    packet = encode_packet(
        Packet(Endpoint("192.0.2.1", 1000), Endpoint("192.0.2.2", 2000), b"hello"), 61
    )
    file = tmp_path / "x.pcap"
    file.write_bytes(pcap_header() + 3 * pcap_record(packet, 1_700_000_000_500_000_000))
    read = rdpcap(str(file))
    assert len(read) == 3
    assert bytes(read[0][IP]) == packet
    assert float(read[0].time) == 1_700_000_000.5
