"""Write down packets as pcap: what a device's interface sees, or what the core carries.

Source: packet(7). Packets of an interface come without link header, as a TUN device has none.
"""

from __future__ import annotations

import math
import select
import socket
import time
from collections.abc import Iterator

from natswarm.lab.client import open_core_capture
from natswarm.lab.errors import LabError
from natswarm.lab.namespace import entered
from natswarm.lab.pcap import PCAP_RECORD_BYTES, pcap_header, pcap_record
from natswarm.lab.registry import DeviceState, LabState

__all__ = ["capture_core", "capture_device"]

ETH_P_ALL = 0x0003
ETH_P_IP = 0x0800
PACKET_BYTES_MAX = 65_535
# Some thousand packets may come before we run again.
BUFFER_BYTES = 8 << 20


def capture_device(
    device: DeviceState, *, count: int | None = None, seconds: float | None = None
) -> Iterator[bytes]:
    """Yield what a device's interface sends and receives: the header of a capture, then records.

    Args:
        device: Whose.
        count: So many packets; None for any number.
        seconds: For so long; None for ever.
    """
    deadline = _deadline(seconds)
    with entered(device.namespace):
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    with packets:
        packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        packets.bind((device.interface, ETH_P_ALL))
        yield pcap_header()
        number = 0
        while (count is None or number < count) and _wait(packets, deadline):
            packet, address = packets.recvfrom(PACKET_BYTES_MAX)
            if address[1] == ETH_P_IP:
                yield pcap_record(packet, time.time_ns())
                number += 1


def capture_core(
    state: LabState, *, count: int | None = None, seconds: float | None = None
) -> Iterator[bytes]:
    """Yield what the core of a lab carries; as `capture_device`.

    Raises:
        LabError: The lab does not answer, or ended.
    """
    deadline = _deadline(seconds)
    with open_core_capture(state) as connection:
        yield connection.recv(len(pcap_header()), socket.MSG_WAITALL)
        number = 0
        while (count is None or number < count) and _wait(connection, deadline):
            head = connection.recv(PCAP_RECORD_BYTES, socket.MSG_WAITALL)
            if len(head) < PCAP_RECORD_BYTES:
                raise LabError(f"lab {state.name} ended, and the capture with it")
            size = int.from_bytes(head[8:12], "big")
            yield head + connection.recv(size, socket.MSG_WAITALL)
            number += 1


def _deadline(seconds: float | None) -> float:
    return math.inf if seconds is None else time.monotonic() + seconds


def _wait(readable: socket.socket, deadline: float) -> bool:
    """Wait for something to read; return whether there is before the deadline."""
    timeout_s = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
    return bool(select.select([readable], [], [], timeout_s)[0])
