"""What a NAT does, in the words of RFC 4787: the enumerations everything else speaks in.

Two properties decide how two peers can meet: whether the external port of a socket depends on who
it talks to (mapping), and whose packets the NAT lets back in (filtering). A third, the law by which
external ports are drawn, decides how many probes a puncture costs. The old words (full cone,
symmetric, ...) mix the first two up and appear in the glossary only.

Source: RFC 4787 sections 4.1, 4.2 and 5; RFC 6888 and RFC 7753 for blocks of ports. Knows no
parameters of a law (ranges, block sizes, steps): those belong to whoever estimates or emulates one.
"""

from __future__ import annotations

import enum

__all__ = ["AllocationLaw", "Filtering", "Mapping", "Poison", "Pooling"]


class Mapping(enum.Enum):
    """When a NAT reuses the external endpoint of an internal one (RFC 4787 section 4.1)."""

    EIM = "EIM"
    """Endpoint-independent: one external endpoint towards every remote (REQ-1)."""
    ADM = "ADM"
    """Address-dependent: one external endpoint per remote address."""
    APDM = "APDM"
    """Address-and-port-dependent: one external endpoint per remote address and port."""


class Filtering(enum.Enum):
    """Whose packets a NAT lets in through a mapping (RFC 4787 section 5)."""

    EIF = "EIF"
    """Endpoint-independent: anyone's."""
    ADF = "ADF"
    """Address-dependent: from any port of an address the internal endpoint has sent to."""
    APDF = "APDF"
    """Address-and-port-dependent: only from an endpoint the internal endpoint has sent to."""


class AllocationLaw(enum.Enum):
    """How a NAT chooses the external port of a new mapping (RFC 4787 section 4.2)."""

    PRESERVING = "preserving"
    """The internal port where it is free (RFC 4787 section 4.2.1, "port preservation")."""
    SEQUENTIAL = "sequential"
    """The last one plus a step; other subscribers' mappings fall in between."""
    BLOCK = "block"
    """Inside a block of ports the subscriber owns (RFC 6888 REQ-14, RFC 7753, RFC 7422)."""
    UNIFORM = "uniform"
    """Drawn at random from a range (RFC 6056; RFC 6888 REQ-15 asks for unpredictable ports)."""


class Pooling(enum.Enum):
    """How a NAT with several external addresses chooses among them (RFC 4787 section 4.1)."""

    PAIRED = "paired"
    """All mappings of a subscriber have one address, as long as it has any; REQ-2 asks for it."""
    ARBITRARY = "arbitrary"
    """Each mapping has an address of its own choice, any with the same probability."""


class Poison(enum.Enum):
    """What a packet from outside that the filter refuses does to a mapping.

    It is why openers have a low TTL: a probe that arrives before the other side has sent its own
    may spoil the very port it aims at.
    """

    NONE = "none"
    """Nothing: it is dropped."""
    TAKES_PORT = "takes port"
    """The box takes it as meant for itself, as Linux does with an INPUT chain that accepts. It
    leaves a session of the box's own behind, and a port in it is no longer free towards that
    remote: our mapping moves to another port when we send there (measured on Linux)."""
    RETIRES_MAPPING = "retires mapping"
    """The mapping takes no new remotes: its sessions live on, the next remote sees another port.
    Not measured: the mild form of the next one."""
    BURNS_MAPPING = "burns mapping"
    """The mapping dies at once with all its sessions. Not measured: field reports of mappings that
    vanish under a scan, taken at their worst."""
