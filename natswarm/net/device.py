"""Have a UDP socket use one network interface alone: one SIM of several.

Binding an address does not do it: the system's routes choose the interface by destination, so that
datagrams with the address of one SIM may leave through another one. Linux ties a socket to a
device, for everybody since 5.7; elsewhere the interface's address is all there is, and the routes
must fit.

Source: socket(7), SO_BINDTODEVICE; Linux commit c427bfec18f2, "net: core: enable SO_BINDTODEVICE
for non-root users".
"""

from __future__ import annotations

import errno
import ipaddress
import socket

from natswarm.address import AddressKind, address_kind
from natswarm.errors import ConfigurationError
from natswarm.net.interfaces import find_interface

__all__ = ["address_on", "tie_to_interface"]

SO_BINDTODEVICE: int | None = getattr(socket, "SO_BINDTODEVICE", None)  # Linux
UNUSABLE = (AddressKind.LINK_LOCAL, AddressKind.UNUSABLE)


def address_on(name: str, ip: str) -> str:
    """Return the address to bind for a socket that is to use one interface alone.

    Args:
        name: The interface.
        ip: The address wanted: one of the interface's, or `0.0.0.0` or `::` for any of them.

    Raises:
        ConfigurationError: There is no such interface, or it lacks the address; says what there is.
    """
    addresses = [address.ip for address in find_interface(name).addresses]
    there = [each for each in addresses if address_kind(each) not in UNUSABLE]
    if not ipaddress.ip_address(ip).is_unspecified:
        if ip not in there:
            raise ConfigurationError(
                f"{ip} is not an address of {name}, which has {' and '.join(there) or 'none'}; "
                "leave one of the two out"
            )
        return ip
    of_family = [each for each in there if (":" in each) == (":" in ip)]
    if not of_family:
        raise ConfigurationError(
            f"interface {name} has no {'IPv6' if ':' in ip else 'IPv4'} address: connect it first, "
            "or take another one"
        )
    return ip if SO_BINDTODEVICE is not None else of_family[0]


def tie_to_interface(sock: socket.socket, name: str) -> None:
    """Have a socket use one interface alone, where the system can; else the address must do.

    Raises:
        ConfigurationError: The system refuses.
    """
    if SO_BINDTODEVICE is None:
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, name.encode() + b"\0")
    except OSError as error:
        advice = "has it gone? try again"
        if error.errno in (errno.EPERM, errno.EACCES):
            advice = (
                "before Linux 5.7, and in some containers, that takes root; without it, give the "
                "address of the interface with --bind and see to the routes"
            )
        raise ConfigurationError(
            f"cannot tie a UDP port to interface {name}: {error.strerror}; {advice}"
        ) from error
