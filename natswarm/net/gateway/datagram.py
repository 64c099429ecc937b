"""Ask the gateway in PCP and NAT-PMP: one small datagram each way, retransmitted as the RFCs say.

Only datagrams from the gateway's own address and port count. Neither protocol is encrypted: whoever
can forge the gateway's address on our link can lie to us, and could do worse to us anyway.

The bytes are natswarm/nat/portmap.py's affair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import trio

from natswarm.address import Endpoint
from natswarm.errors import DecodeError, GatewayError
from natswarm.nat.portmap import (
    NONCE_BYTES,
    OPCODE_ANNOUNCE,
    OPCODE_EXTERNAL_ADDRESS,
    OPCODE_MAP,
    OPCODE_MAP_UDP,
    NatPmpAnswer,
    NatPmpEpoch,
    NatPmpResult,
    PcpAnswer,
    PcpEpoch,
    PcpMap,
    PcpResult,
    decode_nat_pmp_untrusted,
    decode_pcp_untrusted,
    encode_nat_pmp_address_request,
    encode_nat_pmp_map_request,
    encode_pcp_announce_request,
    encode_pcp_map_request,
    explain_result,
    nat_pmp_retransmission_delays,
    pcp_retransmission_delays,
)
from natswarm.net.gateway.mapping import (
    Gateway,
    MappingProtocol,
    PortMapping,
    Reach,
    ServiceReport,
    check_external_ip,
)

__all__ = ["NatPmpService", "PcpService"]

# A gateway is a millisecond away. Enough for two PCP and four NAT-PMP transmissions; the full
# schedules (without end, and 128 s) are for clients that have nothing else to try.
ANSWER_TIMEOUT_S = 4.0
# RFC 6887, 15: believe an error no longer than half an hour.
ERROR_CAP_S = 30 * 60

T = TypeVar("T")


class _Exchange:
    """Questions to one UDP port of the gateway, one at a time."""

    def __init__(self, gateway: Gateway, reach: Reach) -> None:
        self._gateway = gateway
        self._reach = reach
        self._server = Endpoint(gateway.ip, gateway.control_port)

    async def ask(
        self, request: bytes, accept: Callable[[bytes], T | None], delays: Iterable[float]
    ) -> T:
        """Send until an answer is accepted.

        Each time from a port of its own: a late answer to an earlier question, with a clock that
        stands still since, would look like a reboot; and who forges answers has to guess the port.

        Args:
            request: One datagram.
            accept: Decodes an answer; None or DecodeError for what answers something else.
            delays: Seconds to wait after each transmission.

        Raises:
            GatewayError: No answer; says what came instead.
        """
        malformed = ""
        with (
            contextlib.closing(self._reach.bind(self._gateway)) as port,
            trio.move_on_after(ANSWER_TIMEOUT_S),
        ):
            for delay in delays:
                port.send(request, self._server)
                with trio.move_on_after(delay):
                    while True:
                        for data, source in await port.receive_batch():
                            if not self._is_server(source):
                                continue
                            try:
                                if (answer := accept(data)) is not None:
                                    return answer
                            except DecodeError as error:
                                malformed = str(error)
        if malformed:
            raise GatewayError(f"no usable answer: {malformed}")
        raise GatewayError(f"no answer from UDP port {self._server.port}")

    def _is_server(self, source: Endpoint) -> bool:
        # Sockets name link-local sources without their scope.
        own_ip = self._server.ip.partition("%")[0]
        return source.port == self._server.port and source.ip.partition("%")[0] == own_ip


class PcpService:
    """PCP towards one gateway, for one internal port. RFC 6887."""

    protocol = MappingProtocol.PCP

    def __init__(self, gateway: Gateway, internal_port: int, reach: Reach) -> None:
        self._gateway = gateway
        self._internal_port = internal_port
        self._reach = reach
        self._exchange = _Exchange(gateway, reach)
        self._nonce = reach.entropy(NONCE_BYTES)
        self._epoch = PcpEpoch()
        self._external_ip = "::" if gateway.is_ipv6 else "0.0.0.0"

    async def probe(self) -> ServiceReport:
        """See `GatewayService.probe`: ANNOUNCE, which asks for nothing."""
        answer, _ = await self._ask_announce()
        # A server that knows no ANNOUNCE has shown that it is one.
        if answer.result not in (PcpResult.SUCCESS, PcpResult.UNSUPP_OPCODE):
            raise _refusal(answer)
        return ServiceReport(
            self.protocol, True, f"version 2, state kept for {answer.epoch_s} s", None
        )

    async def map(self, external_port: int, lease_s: int) -> PortMapping:
        """See `GatewayService.map`."""
        answer = await self._ask_map(external_port, lease_s)
        if answer.result != PcpResult.SUCCESS:
            raise _refusal(answer)
        granted = answer.mapping
        if granted is None or not granted.external_port or not answer.lifetime_s:
            raise GatewayError("it granted a mapping without a port or a lifetime")
        self._epoch.shows_loss(answer.epoch_s, trio.current_time())
        self._external_ip = check_external_ip(granted.external_ip)
        return PortMapping(
            self.protocol,
            Endpoint(self._gateway.local_ip, self._internal_port),
            Endpoint(granted.external_ip, granted.external_port),
            answer.lifetime_s,
        )

    async def unmap(self, mapping: PortMapping | None) -> None:
        """See `GatewayService.unmap`."""
        external_port = 0 if mapping is None else mapping.external.port
        answer = await self._ask_map(external_port, 0)
        if answer.result != PcpResult.SUCCESS:
            raise _refusal(answer)

    async def still_holds(self, mapping: PortMapping) -> bool:
        """See `GatewayService.still_holds`: by the gateway's clock."""
        answer, now = await self._ask_announce()
        return not self._epoch.shows_loss(answer.epoch_s, now)

    async def _ask_announce(self) -> tuple[PcpAnswer, float]:
        def accept(data: bytes) -> PcpAnswer | None:
            answer = decode_pcp_untrusted(data)
            is_ours = answer.opcode == OPCODE_ANNOUNCE
            return answer if is_ours or answer.result == PcpResult.UNSUPP_VERSION else None

        answer = await self._exchange.ask(
            encode_pcp_announce_request(self._gateway.local_ip), accept, self._delays()
        )
        return answer, trio.current_time()

    async def _ask_map(self, external_port: int, lease_s: int) -> PcpAnswer:
        wish = PcpMap(self._nonce, self._internal_port, external_port, self._external_ip)

        def accept(data: bytes) -> PcpAnswer | None:
            answer = decode_pcp_untrusted(data)
            if answer.result == PcpResult.UNSUPP_VERSION:
                return answer
            theirs = answer.mapping
            if answer.opcode != OPCODE_MAP or theirs is None:
                return None
            is_ours = (theirs.nonce, theirs.ip_protocol, theirs.internal_port) == (
                wish.nonce,
                wish.ip_protocol,
                wish.internal_port,
            )
            # A delayed answer to an earlier wish: success with the other kind of lifetime.
            if answer.result == PcpResult.SUCCESS and bool(answer.lifetime_s) != bool(lease_s):
                return None
            return answer if is_ours else None

        request = encode_pcp_map_request(self._gateway.local_ip, wish, lease_s)
        return await self._exchange.ask(request, accept, self._delays())

    def _delays(self) -> Iterable[float]:
        return pcp_retransmission_delays(self._reach.rng)


def _refusal(answer: PcpAnswer) -> GatewayError:
    text = explain_result(PcpResult, answer.result)
    if answer.lifetime_s:
        text += f"; ask again in {min(answer.lifetime_s, ERROR_CAP_S)} s"
    return GatewayError(text)


class NatPmpService:
    """NAT-PMP towards one gateway, for one internal port. RFC 6886."""

    protocol = MappingProtocol.NAT_PMP

    def __init__(self, gateway: Gateway, internal_port: int, reach: Reach) -> None:
        if gateway.is_ipv6:
            raise GatewayError("NAT-PMP knows IPv4 only")
        self._gateway = gateway
        self._internal_port = internal_port
        self._exchange = _Exchange(gateway, reach)
        self._epoch = NatPmpEpoch()

    async def probe(self) -> ServiceReport:
        """See `GatewayService.probe`: asks for the external address."""
        answer = await self._ask_address()
        return ServiceReport(
            self.protocol,
            True,
            f"version 0, state kept for {answer.epoch_s} s",
            answer.external_ip,
        )

    async def map(self, external_port: int, lease_s: int) -> PortMapping:
        """See `GatewayService.map`."""
        # Asked anew each time: a renewal may find another address.
        external_ip = (await self._ask_address()).external_ip or "0.0.0.0"
        answer = await self._ask_map(external_port, lease_s)
        if not answer.external_port or not answer.lifetime_s:
            raise GatewayError("it granted a mapping without a port or a lifetime")
        self._epoch.shows_loss(answer.epoch_s, trio.current_time())
        return PortMapping(
            self.protocol,
            Endpoint(self._gateway.local_ip, self._internal_port),
            Endpoint(check_external_ip(external_ip), answer.external_port),
            answer.lifetime_s,
        )

    async def unmap(self, mapping: PortMapping | None) -> None:
        """See `GatewayService.unmap`."""
        await self._ask_map(0, 0)

    async def still_holds(self, mapping: PortMapping) -> bool:
        """See `GatewayService.still_holds`: by the gateway's clock and its external address."""
        answer = await self._ask_address()
        if self._epoch.shows_loss(answer.epoch_s, trio.current_time()):
            return False
        return answer.external_ip == mapping.external.ip

    async def _ask_address(self) -> NatPmpAnswer:
        def accept(data: bytes) -> NatPmpAnswer | None:
            answer = decode_nat_pmp_untrusted(data)
            return answer if answer.opcode == OPCODE_EXTERNAL_ADDRESS else None

        return await self._ask(encode_nat_pmp_address_request(), accept)

    async def _ask_map(self, external_port: int, lease_s: int) -> NatPmpAnswer:
        def accept(data: bytes) -> NatPmpAnswer | None:
            answer = decode_nat_pmp_untrusted(data)
            if answer.opcode != OPCODE_MAP_UDP:
                return None
            if answer.result == NatPmpResult.SUCCESS:
                is_ours = answer.internal_port == self._internal_port
                if not is_ours or bool(answer.lifetime_s) != bool(lease_s):
                    return None
            return answer

        request = encode_nat_pmp_map_request(self._internal_port, external_port, lease_s)
        return await self._ask(request, accept)

    async def _ask(
        self, request: bytes, accept: Callable[[bytes], NatPmpAnswer | None]
    ) -> NatPmpAnswer:
        answer = await self._exchange.ask(request, accept, nat_pmp_retransmission_delays())
        if answer.result != NatPmpResult.SUCCESS:
            raise GatewayError(explain_result(NatPmpResult, answer.result))
        return answer
