"""What of an address is written down: by default only the network, not the subscriber.

A public address with a port and a time names a subscriber to whoever holds the carrier's logs, and
a journal is made to be shared. The first half of an IPv4 address (the first 32 bits of an IPv6
one) still tells the carrier and its pools apart. Whoever needs more asks for it, and asks the
people at both ends first: field-tests/README.md.

Interfaces of tethered phones may be called by their hardware address (`enx0250f4000001`), which is
as good as a name, too.
"""

from __future__ import annotations

import ipaddress
import re

__all__ = ["shorten_ip", "shorten_text"]

PREFIX_LENGTHS = {4: 16, 6: 32}

_HARDWARE_NAME = re.compile(r"\benx[0-9a-f]{12}\b")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)(?!/)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])(?!/)")


def shorten_ip(ip: str) -> str:
    """Return the network of an address, such as `198.51.0.0/16`; other text as it is."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return ip
    return str(ipaddress.ip_network((address, PREFIX_LENGTHS[address.version]), strict=False))


def shorten_text(text: str) -> str:
    """Return a sentence with every address in it shortened."""
    text = _HARDWARE_NAME.sub("enx*", text)
    for pattern in (_IPV4, _IPV6):
        text = pattern.sub(lambda found: shorten_ip(found[0]), text)
    return text
