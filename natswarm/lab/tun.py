"""A TUN device: the end of a namespace's network is a descriptor in our hands.

What the namespace's kernel sends out of the device is read here as whole IPv4 packets, what is
written here arrives there. The device lives as long as its descriptor is open.

Source: Linux, Documentation/networking/tuntap.rst. Knows neither packets nor addresses.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from natswarm.lab.errors import LabError
from natswarm.lab.namespace import Namespace

__all__ = ["MTU", "open_tun"]

TUN_DEVICE = Path("/dev/net/tun")
# As Ethernet, so that TCP and QUIC choose the sizes they choose in the field.
MTU = 1500
# The device drops what finds its queue full. 25 ms at 40,000 packets/s; Linux's own default is 500.
QUEUE_PACKETS = 1000

_TUNSETIFF = 0x4004_54CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_IFREQ = struct.Struct("16sH22x")


def open_tun(namespace: Namespace, name: str) -> int:
    """Make a TUN device in a namespace and bring it up; return its non-blocking descriptor.

    Raises:
        LabError: The kernel has none, or does not let us.
    """
    with namespace.entered():
        try:
            descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise LabError(
                f"cannot open {TUN_DEVICE}, which the emulated carriers need: {error.strerror}; "
                "`modprobe tun` loads the module, and a container needs --device=/dev/net/tun"
            ) from error
        try:
            request = _IFREQ.pack(name.encode(), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
        except OSError as error:
            os.close(descriptor)
            raise LabError(f"cannot make a TUN device in {namespace.name}: {error}") from error
    try:
        namespace.ip(f"link set dev {name} mtu {MTU} txqueuelen {QUEUE_PACKETS} up")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
