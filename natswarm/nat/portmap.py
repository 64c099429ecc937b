"""Speak PCP and NAT-PMP: how a host asks its gateway for a port mapping.

Byte formats, retransmission, renewal and the epoch rules, as pure functions; who is asked, over
which socket and when, is the driver's affair (natswarm/net/gateway).

Source: RFC 6887 (PCP, version 2, opcodes ANNOUNCE and MAP), RFC 6886 (NAT-PMP, version 0). Both
live on UDP port 5351 of the gateway, and a gateway that knows only the older one says so.

    PCP request   0       version 2
                  1       opcode: 0 ANNOUNCE, 1 MAP
                  4..7    lifetime asked for, seconds; 0 deletes
                  8..23   our own address, IPv4 mapped into IPv6
    PCP response  0, 1    version 2, opcode + 0x80
                  3       result code
                  4..7    lifetime granted, or how long the error will last
                  8..11   epoch: seconds since the gateway last lost its state
    PCP MAP       24..35  nonce: only who knows it may change the mapping
                  36      IP protocol, 17 for UDP
                  40..43  internal port, external port (suggested or assigned)
                  44..59  external address, IPv4 mapped into IPv6
                  60..    options: code, reserved, length, data padded to 4 bytes

    NAT-PMP       0       version 0
                  1       opcode: 0 external address, 1 map UDP; + 0x80 in responses
                  2..3    response: result code
                  4..7    response: epoch
                  8..     response to 0: external IPv4 address
                  4.. / 8..  map: internal port, external port, lifetime (4 bytes)
"""

from __future__ import annotations

import enum
import ipaddress
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from natswarm.errors import DecodeError

__all__ = [
    "GATEWAY_CONTROL_PORT",
    "NONCE_BYTES",
    "NatPmpAnswer",
    "NatPmpEpoch",
    "NatPmpResult",
    "PcpAnswer",
    "PcpEpoch",
    "PcpMap",
    "PcpResult",
    "decode_nat_pmp_untrusted",
    "decode_pcp_untrusted",
    "encode_nat_pmp_address_request",
    "encode_nat_pmp_map_request",
    "encode_pcp_announce_request",
    "encode_pcp_map_request",
    "explain_result",
    "nat_pmp_retransmission_delays",
    "pcp_retransmission_delays",
    "renewal_delay_s",
]

# Of the specifications ----------------------------------------------------------------------------

GATEWAY_CONTROL_PORT = 5351
PCP_VERSION = 2
NAT_PMP_VERSION = 0
NONCE_BYTES = 12
PCP_MAX_BYTES = 1100
IS_RESPONSE = 0x80
OPCODE_ANNOUNCE = 0
OPCODE_MAP = 1
OPCODE_EXTERNAL_ADDRESS = 0
OPCODE_MAP_UDP = 1
IP_PROTOCOL_UDP = 17
UINT32_MAX = 0xFFFF_FFFF

PCP_FIRST_DELAY_S = 3.0
PCP_MAX_DELAY_S = 1024.0
PCP_JITTER = 0.1
NAT_PMP_FIRST_DELAY_S = 0.25
NAT_PMP_TRIES = 9

RENEWAL_MIN_DELAY_S = 4.0  # RFC 6887, 11.2.1
# RFC 6887, 15: "clients SHOULD impose an upper limit", 24 hours: a longer lease is only renewed
# earlier than it had to be.
LEASE_CAP_S = 24 * 3600

_PCP_REQUEST = struct.Struct("!BBHI16s")
_PCP_RESPONSE = struct.Struct("!BBBBII12x")
_PCP_MAP = struct.Struct("!12sB3xHH16s")
_PCP_OPTION = struct.Struct("!BxH")
_NAT_PMP_RESPONSE = struct.Struct("!BBHI")
_NAT_PMP_MAP_REQUEST = struct.Struct("!BBHHHI")
_NAT_PMP_MAP = struct.Struct("!HHI")


class PcpResult(enum.IntEnum):
    """RFC 6887, 7.4."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    MALFORMED_REQUEST = 3
    UNSUPP_OPCODE = 4
    UNSUPP_OPTION = 5
    MALFORMED_OPTION = 6
    NETWORK_FAILURE = 7
    NO_RESOURCES = 8
    UNSUPP_PROTOCOL = 9
    USER_EX_QUOTA = 10
    CANNOT_PROVIDE_EXTERNAL = 11
    ADDRESS_MISMATCH = 12
    EXCESSIVE_REMOTE_PEERS = 13


class NatPmpResult(enum.IntEnum):
    """RFC 6886, 3.5."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    NETWORK_FAILURE = 3
    NO_RESOURCES = 4
    UNSUPP_OPCODE = 5


_MEANING = {
    "UNSUPP_VERSION": "it does not speak this version of the protocol",
    "NOT_AUTHORIZED": "its settings do not allow port mappings",
    "MALFORMED_REQUEST": "it could not read our request",
    "UNSUPP_OPCODE": "it does not know this kind of request",
    "UNSUPP_OPTION": "it does not know an option of the request",
    "MALFORMED_OPTION": "it could not read an option of the request",
    "NETWORK_FAILURE": "it has no connection to the internet itself",
    "NO_RESOURCES": "it has no port left",
    "UNSUPP_PROTOCOL": "it does not map UDP",
    "USER_EX_QUOTA": "we have as many mappings as it allows",
    "CANNOT_PROVIDE_EXTERNAL": "it cannot give the external port that was asked for",
    "ADDRESS_MISMATCH": "there is another NAT between it and us",
    "EXCESSIVE_REMOTE_PEERS": "it cannot filter for so many peers",
}


def explain_result(kind: type[enum.IntEnum], code: int) -> str:
    """Return a result code in words."""
    try:
        name = kind(code).name
    except ValueError:
        return f"it answered with unknown result code {code}"
    return f"{_MEANING[name]} ({name})" if name in _MEANING else name


# PCP ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PcpMap:
    """The body of a MAP request or response; UDP only.

    Attributes:
        nonce: 12 bytes, ours alone; the same for renewal and deletion.
        internal_port: 1..65535.
        external_port: Suggested or assigned; 0 suggests nothing.
        external_ip: Suggested or assigned; `0.0.0.0` or `::` suggests nothing.
        ip_protocol: 17; a response may name another and is not ours then.
    """

    nonce: bytes
    internal_port: int
    external_port: int
    external_ip: str
    ip_protocol: int = IP_PROTOCOL_UDP


@dataclass(frozen=True, slots=True)
class PcpAnswer:
    """A response to a PCP request.

    Attributes:
        opcode: 0 ANNOUNCE, 1 MAP; of NAT-PMP's where `result` is UNSUPP_VERSION.
        result: Code; compare with `PcpResult`.
        lifetime_s: Granted, or how long the error will last.
        epoch_s: Seconds since the gateway last lost its state.
        mapping: The body of a MAP response; None where it has none.
    """

    opcode: int
    result: int
    lifetime_s: int
    epoch_s: int
    mapping: PcpMap | None = None


def encode_pcp_announce_request(client_ip: str) -> bytes:
    """Return a request that asks nothing but whether, and since when, a PCP server is there."""
    return _PCP_REQUEST.pack(PCP_VERSION, OPCODE_ANNOUNCE, 0, 0, _pack_ip(client_ip))


def encode_pcp_map_request(client_ip: str, mapping: PcpMap, lifetime_s: int) -> bytes:
    """Return a request to make, renew or (lifetime 0) delete a mapping.

    Raises:
        ValueError: A port, the nonce or the lifetime is out of range.
    """
    if len(mapping.nonce) != NONCE_BYTES:
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes, not {len(mapping.nonce)}")
    _check_ports(mapping.internal_port, mapping.external_port, lifetime_s)
    return _PCP_REQUEST.pack(
        PCP_VERSION, OPCODE_MAP, 0, lifetime_s, _pack_ip(client_ip)
    ) + _PCP_MAP.pack(
        mapping.nonce,
        mapping.ip_protocol,
        mapping.internal_port,
        mapping.external_port,
        _pack_ip(mapping.external_ip),
    )


def decode_pcp_untrusted(data: bytes) -> PcpAnswer:
    """Read a response to a PCP request.

    An answer in another version, as NAT-PMP gateways give it, becomes `PcpResult.UNSUPP_VERSION`.

    Raises:
        DecodeError: It is none.
    """
    if len(data) < 4 or not data[1] & IS_RESPONSE:
        raise DecodeError("not a PCP response")
    if data[0] != PCP_VERSION:
        code = data[3]  # in NAT-PMP the second half of the same number
        if code != PcpResult.UNSUPP_VERSION:
            raise DecodeError(f"an answer in version {data[0]} to a question in PCP version 2")
        return PcpAnswer(data[1] & ~IS_RESPONSE, code, 0, 0)
    if len(data) < _PCP_RESPONSE.size or len(data) > PCP_MAX_BYTES or len(data) % 4:
        raise DecodeError(f"a PCP response cannot have {len(data)} bytes")
    _, opcode, _, result, lifetime_s, epoch_s = _PCP_RESPONSE.unpack_from(data)
    opcode &= ~IS_RESPONSE
    body = data[_PCP_RESPONSE.size :]
    mapping = None
    if opcode == OPCODE_MAP and len(body) >= _PCP_MAP.size:
        nonce, ip_protocol, internal_port, external_port, ip = _PCP_MAP.unpack_from(body)
        mapping = PcpMap(nonce, internal_port, external_port, _unpack_ip(ip), ip_protocol)
        body = body[_PCP_MAP.size :]
        if result == PcpResult.SUCCESS:
            _check_options_untrusted(body)
    elif opcode == OPCODE_MAP and result == PcpResult.SUCCESS:
        raise DecodeError("a PCP MAP response without its mapping")
    return PcpAnswer(opcode, result, lifetime_s, epoch_s, mapping)


def _check_options_untrusted(data: bytes) -> None:
    # We send none, so none needs to be understood; but what cannot be walked is damaged.
    while data:
        if len(data) < _PCP_OPTION.size:
            raise DecodeError("a PCP option is cut off")
        _, length = _PCP_OPTION.unpack_from(data)
        end = _PCP_OPTION.size + (length + 3) // 4 * 4
        if end > len(data):
            raise DecodeError("a PCP option is longer than its message")
        data = data[end:]


def pcp_retransmission_delays(rng: random.Random) -> Iterator[float]:
    """Yield the seconds to wait after each transmission, without end (RFC 6887, 8.1.1)."""
    delay = PCP_FIRST_DELAY_S
    while True:
        delay *= 1 + rng.uniform(-PCP_JITTER, PCP_JITTER)
        yield delay
        delay = min(2 * delay, PCP_MAX_DELAY_S)


# NAT-PMP ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NatPmpAnswer:
    """A response to a NAT-PMP request; of what follows, only what its opcode carries is not None.

    Attributes:
        opcode: 0 external address, 1 map UDP.
        result: Code; compare with `NatPmpResult`.
        epoch_s: Seconds since the gateway last lost its state; 0 where an error left it out.
        external_ip: Of opcode 0.
        internal_port: Of opcode 1.
        external_port: Of opcode 1; 0 after deletion.
        lifetime_s: Of opcode 1; granted.
    """

    opcode: int
    result: int
    epoch_s: int
    external_ip: str | None = None
    internal_port: int | None = None
    external_port: int | None = None
    lifetime_s: int | None = None


def encode_nat_pmp_address_request() -> bytes:
    """Return a request for the gateway's external address."""
    return bytes([NAT_PMP_VERSION, OPCODE_EXTERNAL_ADDRESS])


def encode_nat_pmp_map_request(internal_port: int, external_port: int, lifetime_s: int) -> bytes:
    """Return a request to make, renew or (both last ones 0) delete a mapping.

    Raises:
        ValueError: A port or the lifetime is out of range.
    """
    _check_ports(internal_port, external_port, lifetime_s)
    return _NAT_PMP_MAP_REQUEST.pack(
        NAT_PMP_VERSION, OPCODE_MAP_UDP, 0, internal_port, external_port, lifetime_s
    )


def decode_nat_pmp_untrusted(data: bytes) -> NatPmpAnswer:
    """Read a response to a NAT-PMP request.

    Raises:
        DecodeError: It is none.
    """
    if len(data) < 4 or not data[1] & IS_RESPONSE:
        raise DecodeError("not a NAT-PMP response")
    if data[0] != NAT_PMP_VERSION:
        raise DecodeError(f"an answer in version {data[0]} to a question in NAT-PMP")
    opcode, result = data[1] & ~IS_RESPONSE, int.from_bytes(data[2:4], "big")
    if result != NatPmpResult.SUCCESS:  # what follows is undefined, and some leave it out
        return NatPmpAnswer(opcode, result, int.from_bytes(data[4:8], "big"))
    if opcode == OPCODE_EXTERNAL_ADDRESS and len(data) == 12:
        epoch_s = _NAT_PMP_RESPONSE.unpack_from(data)[3]
        ip = str(ipaddress.IPv4Address(data[8:]))
        return NatPmpAnswer(opcode, result, epoch_s, external_ip=ip)
    if opcode == OPCODE_MAP_UDP and len(data) == 16:
        epoch_s = _NAT_PMP_RESPONSE.unpack_from(data)[3]
        internal_port, external_port, lifetime_s = _NAT_PMP_MAP.unpack_from(data, 8)
        return NatPmpAnswer(
            opcode,
            result,
            epoch_s,
            internal_port=internal_port,
            external_port=external_port,
            lifetime_s=lifetime_s,
        )
    raise DecodeError(f"a NAT-PMP response to opcode {opcode} cannot have {len(data)} bytes")


def nat_pmp_retransmission_delays() -> Iterator[float]:
    """Yield the seconds to wait after each of the nine transmissions (RFC 6886, 3.1)."""
    for index in range(NAT_PMP_TRIES):
        yield NAT_PMP_FIRST_DELAY_S * 2**index


# Time ---------------------------------------------------------------------------------------------


def renewal_delay_s(lease_s: float, rng: random.Random) -> float:
    """Return how long to wait before a renewal, with `lease_s` left of the lease.

    Between 1/2 and 5/8 of what is left. Asked again after a failed try, with what is left then,
    this gives RFC 6887's 3/4, 7/8, ... of the whole; and never a burst, however short the lease.
    """
    left_s = min(lease_s, LEASE_CAP_S)
    return max(RENEWAL_MIN_DELAY_S, left_s * rng.uniform(1 / 2, 5 / 8))


class PcpEpoch:
    """Notices that a PCP server lost its state, by its clock (RFC 6887, 8.5)."""

    def __init__(self) -> None:
        self._previous: tuple[int, float] | None = None

    def shows_loss(self, epoch_s: int, now: float) -> bool:
        """Take the epoch of an authentic answer that came at `now`; whether state was lost."""
        previous, self._previous = self._previous, (epoch_s, now)
        if previous is None:
            return False
        server_s, client_s = epoch_s - previous[0], now - previous[1]
        if server_s < -1:  # one second back is the answers' having changed places
            return True
        # Both clocks may be wrong by 1/16, and by two seconds of rounding.
        return client_s + 2 < server_s - server_s / 16 or server_s + 2 < client_s - client_s / 16


class NatPmpEpoch:
    """Notices that a NAT-PMP gateway lost its state, by its clock (RFC 6886, 3.6)."""

    def __init__(self) -> None:
        self._previous: tuple[int, float] | None = None

    def shows_loss(self, epoch_s: int, now: float) -> bool:
        """Take the epoch of an authentic answer that came at `now`; whether state was lost."""
        previous, self._previous = self._previous, (epoch_s, now)
        if previous is None:
            return False
        # The gateway's clock may be slow by 1/8.
        return epoch_s + 2 < previous[0] + (now - previous[1]) * 7 / 8


def _check_ports(internal_port: int, external_port: int, lifetime_s: int) -> None:
    if not 1 <= internal_port <= 65_535:
        raise ValueError(f"{internal_port} is not an internal port, 1..65535")
    if not 0 <= external_port <= 65_535:
        raise ValueError(f"{external_port} is not an external port, 0..65535")
    if not 0 <= lifetime_s <= UINT32_MAX:
        raise ValueError(f"a lifetime of {lifetime_s} s does not fit 32 bits")


def _pack_ip(ip: str) -> bytes:
    address = ipaddress.ip_address(ip.partition("%")[0])
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def _unpack_ip(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    mapped = address.ipv4_mapped
    return str(mapped if mapped is not None else address)
