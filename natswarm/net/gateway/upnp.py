"""Ask the gateway in UPnP-IGD: search it, read its description, have it carry out actions.

Thin: the words are igd.py's, HTTP is http.py's. Connections go to the gateway's address only, and
everything it sends is bounded in size (http.py) and time (here).

UPnP protects nobody from anybody: any device on the link may map and unmap for any other. We touch
only entries that are ours by address, port and description.
"""

from __future__ import annotations

import contextlib

import trio

from natswarm.address import Endpoint
from natswarm.errors import DecodeError, GatewayError
from natswarm.net.gateway import igd
from natswarm.net.gateway.http import HttpResponse, HttpResponseReader
from natswarm.net.gateway.igd import ConnectionService, HttpTarget, SoapFault
from natswarm.net.gateway.mapping import (
    Gateway,
    MappingProtocol,
    PortMapping,
    Reach,
    ServiceReport,
    check_external_ip,
)

__all__ = ["UpnpService"]

# Devices answer a search within MX seconds, one here; searched again in case it got lost.
SEARCH_TRIES = 3
SEARCH_WAIT_S = 1.0
# For one request with its answer. Gateways with a slow CPU take a second for an action.
REQUEST_TIMEOUT_S = 4.0
RECEIVE_BYTES = 16 * 1024
# With 64,000 ports to draw from, five are enough unless a gateway refuses all.
PORT_TRIES = 5
FIRST_RANDOM_PORT = 1024
# WANIPConnection:2, 2.3.9: a week at most; more is cut by some and refused by others.
MAX_LEASE_S = 604_800

DESCRIPTION = "natswarm"


class UpnpService:
    """UPnP-IGD towards one gateway, for one internal port.

    Args:
        gateway: Who is asked.
        internal_port: Ours.
        reach: The way there.
        allow_permanent_lease: Whether a mapping that never ends is better than none; a program
            that is killed leaves it behind.
    """

    protocol = MappingProtocol.UPNP_IGD

    def __init__(
        self,
        gateway: Gateway,
        internal_port: int,
        reach: Reach,
        *,
        allow_permanent_lease: bool = False,
    ) -> None:
        if gateway.is_ipv6:
            raise GatewayError("UPnP-IGD maps IPv4 ports only")
        self._gateway = gateway
        self._internal_port = internal_port
        self._reach = reach
        self._allow_permanent_lease = allow_permanent_lease
        self._service: ConnectionService | None = None
        self._asked_ports: list[int] = []
        """External ports that an unfinished `map` has asked for."""

    async def probe(self) -> ServiceReport:
        """See `GatewayService.probe`: search, description, external address."""
        try:
            location = await self._search()
            response = await self._request(location, igd.encode_get(location))
            if response.status != 200:
                raise GatewayError(f"its description: {_http_problem(response)}")
            services = igd.decode_description_untrusted(response.body, location, self._gateway.ip)
        except DecodeError as error:
            raise GatewayError(str(error)) from error
        problem: GatewayError | None = None
        for service in services:  # of several connections, the first that is connected
            self._service = service
            try:
                external_ip = check_external_ip(await self._ask_external_ip())
            except GatewayError as error:
                problem = problem or error
            else:
                return ServiceReport(self.protocol, True, service.short_name, external_ip)
        self._service = None
        raise problem or GatewayError("its description names no connection")

    async def map(self, external_port: int, lease_s: int) -> PortMapping:
        """See `GatewayService.map`."""
        lease_s = min(lease_s, MAX_LEASE_S)
        self._asked_ports.clear()
        try:
            external_ip = check_external_ip(await self._ask_external_ip())
        except GatewayError:
            # Many choose another TCP port whenever they start.
            await self.probe()
            external_ip = check_external_ip(await self._ask_external_ip())
        external_port = await self._add(external_port or self._internal_port, lease_s)
        if not external_port:
            raise GatewayError("it added a mapping without a port")
        granted_s = await self._granted_lease_s(external_port, lease_s)
        self._asked_ports.clear()
        if granted_s == 0 and not self._allow_permanent_lease:
            await self._delete(external_port)
            raise GatewayError(
                "it grants only leases without end, which a killed program would leave behind"
            )
        return PortMapping(
            self.protocol,
            Endpoint(self._gateway.local_ip, self._internal_port),
            Endpoint(external_ip, external_port),
            granted_s or None,
        )

    async def unmap(self, mapping: PortMapping | None) -> None:
        """See `GatewayService.unmap`."""
        ports = self._asked_ports if mapping is None else [mapping.external.port]
        for port in list(ports):
            if await self._is_entry_ours(port):
                await self._delete(port)

    async def still_holds(self, mapping: PortMapping) -> bool:
        """See `GatewayService.still_holds`: asks for the entry itself, and the address."""
        try:
            is_ours = await self._is_entry_ours(mapping.external.port)
        except GatewayError:
            await self.probe()  # as in `map`
            is_ours = await self._is_entry_ours(mapping.external.port)
        return is_ours and await self._ask_external_ip() == mapping.external.ip

    # Searching ------------------------------------------------------------------------------------

    async def _search(self) -> HttpTarget:
        """Find the description: ask the gateway alone, and its link in case it hears only that.

        The answer counts only if it comes from the gateway's address.
        """
        problem = f"no answer from UDP port {self._gateway.ssdp_port}"
        hosts = (
            Endpoint(self._gateway.ip, self._gateway.ssdp_port),
            Endpoint(igd.SSDP_GROUP_IP, self._gateway.ssdp_port),
        )
        # A port of its own for each search: late answers to an earlier one may be out of date.
        with contextlib.closing(self._reach.bind(self._gateway)) as port:
            for _ in range(SEARCH_TRIES):
                for host in hosts:
                    for target in igd.SEARCH_TARGETS:
                        port.send(igd.encode_search(host, target), host)
                with trio.move_on_after(SEARCH_WAIT_S):
                    while True:
                        for data, source in await port.receive_batch():
                            if source.ip != self._gateway.ip:
                                continue
                            try:
                                return igd.decode_search_answer_untrusted(data, self._gateway.ip)
                            except DecodeError as error:
                                problem = f"no usable answer: {error}"
        raise GatewayError(problem)

    # Actions --------------------------------------------------------------------------------------

    async def _ask_external_ip(self) -> str:
        results = await self._act_or_fail("GetExternalIPAddress", {})
        try:
            return igd.decode_ip_untrusted(results, "NewExternalIPAddress")
        except DecodeError as error:
            raise GatewayError(str(error)) from error

    async def _add(self, external_port: int, lease_s: int) -> int:
        """Add the mapping, at another external port if it must be; return which."""
        problem: SoapFault | None = None
        for _ in range(PORT_TRIES):
            # The entry may be somebody's who is switched off at the moment, and not every gateway
            # minds our overwriting it.
            if await self._is_entry_foreign(external_port):
                external_port = self._random_port()
                continue
            try:
                return await self._add_at(external_port, lease_s)
            except SoapFault as fault:
                problem = fault
            if problem.code in igd.FAULTS_PORT_IS_TAKEN:
                external_port = self._random_port()
            elif (
                problem.code == igd.FAULT_SAME_PORT_REQUIRED
                and external_port != self._internal_port
            ):
                external_port = self._internal_port
            elif (
                problem.code == igd.FAULT_ONLY_PERMANENT_LEASES
                and lease_s
                and self._allow_permanent_lease
            ):
                lease_s = 0
            else:
                break
        raise GatewayError(
            f"it added no mapping: {problem or 'all external ports we tried are taken'}"
        )

    def _random_port(self) -> int:
        return self._reach.rng.randrange(FIRST_RANDOM_PORT, 65_536)

    async def _add_at(self, external_port: int, lease_s: int) -> int:
        """Add the mapping and return its external port, which a version 2 gateway may choose."""
        assert self._service is not None
        arguments = {
            "NewRemoteHost": "",
            "NewExternalPort": str(external_port),
            "NewProtocol": "UDP",
            "NewInternalPort": str(self._internal_port),
            "NewInternalClient": self._gateway.local_ip,
            "NewEnabled": "1",
            "NewPortMappingDescription": DESCRIPTION,
            "NewLeaseDuration": str(lease_s),
        }
        self._asked_ports.append(external_port)
        if self._service.is_version_2:
            try:
                results = await self._act("AddAnyPortMapping", arguments)
                return igd.decode_number_untrusted(results, "NewReservedPort", maximum=65_535)
            except SoapFault as fault:
                if fault.code not in igd.FAULTS_NO_SUCH_ACTION:
                    raise
            except DecodeError as error:
                raise GatewayError(str(error)) from error
        await self._act("AddPortMapping", arguments)
        return external_port

    async def _delete(self, external_port: int) -> None:
        await self._act_or_fail("DeletePortMapping", _entry_arguments(external_port))

    async def _entry(self, external_port: int) -> dict[str, str] | None:
        """Return the mapping at an external port; None without one."""
        try:
            return await self._act("GetSpecificPortMappingEntry", _entry_arguments(external_port))
        except SoapFault as fault:
            if fault.code == igd.FAULT_NO_SUCH_ENTRY:
                return None
            raise

    async def _is_entry_foreign(self, external_port: int) -> bool:
        try:
            entry = await self._entry(external_port)
        except SoapFault:
            return False  # it may add, but not read
        return entry is not None and not self._is_ours(entry)

    async def _is_entry_ours(self, external_port: int) -> bool:
        try:
            entry = await self._entry(external_port)
        except SoapFault as fault:
            raise GatewayError(str(fault)) from fault
        return entry is not None and self._is_ours(entry)

    def _is_ours(self, entry: dict[str, str]) -> bool:
        return (
            entry.get("NewInternalClient") == self._gateway.local_ip
            and entry.get("NewInternalPort") == str(self._internal_port)
            # Some gateways put words of their own before or after it.
            and DESCRIPTION in entry.get("NewPortMappingDescription", "")
        )

    async def _granted_lease_s(self, external_port: int, asked_s: int) -> int:
        """Return the lease the gateway noted, 0 for one without end."""
        try:
            entry = await self._entry(external_port)
            if entry is None or not self._is_ours(entry):
                raise GatewayError("it confirmed a mapping and does not have it")
            return igd.decode_number_untrusted(entry, "NewLeaseDuration", maximum=MAX_LEASE_S)
        except (SoapFault, DecodeError):
            return asked_s  # it does not say, so what we asked for must do

    # HTTP -----------------------------------------------------------------------------------------

    async def _act_or_fail(self, action: str, arguments: dict[str, str]) -> dict[str, str]:
        try:
            return await self._act(action, arguments)
        except SoapFault as fault:
            raise GatewayError(f"{action}: {fault}") from fault

    async def _act(self, action: str, arguments: dict[str, str]) -> dict[str, str]:
        """Have the gateway carry out an action; return its results.

        Raises:
            SoapFault: It refused, in UPnP's words.
            GatewayError: No answer, or not one we can use.
        """
        if self._service is None:
            raise GatewayError("no service of the gateway is known")
        request = igd.encode_action(self._service, action, arguments)
        response = await self._request(self._service.control, request)
        try:
            if response.status == 200:
                return igd.decode_action_untrusted(response.body, action)
            if response.status == 500:
                raise igd.decode_fault_untrusted(response.body)
        except DecodeError as error:
            raise GatewayError(f"{action}: {error}") from error
        raise GatewayError(f"{action}: {_http_problem(response)}")

    async def _request(self, target: HttpTarget, request: bytes) -> HttpResponse:
        assert target.endpoint.ip == self._gateway.ip
        where = f"TCP port {target.endpoint.port}"
        reader = HttpResponseReader()
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                stream = await self._reach.connect(self._gateway.local_ip, target.endpoint)
                async with stream:
                    await stream.send_all(request)
                    while not reader.is_complete:
                        reader.receive_untrusted(await stream.receive_some(RECEIVE_BYTES))
        except trio.TooSlowError as error:
            raise GatewayError(f"{where}: no answer in {REQUEST_TIMEOUT_S:g} s") from error
        except (OSError, trio.BrokenResourceError, DecodeError) as error:
            raise GatewayError(f"{where}: {str(error) or type(error).__name__}") from error
        return reader.response()


def _entry_arguments(external_port: int) -> dict[str, str]:
    return {"NewRemoteHost": "", "NewExternalPort": str(external_port), "NewProtocol": "UDP"}


def _http_problem(response: HttpResponse) -> str:
    if 300 <= response.status < 400:
        return f"it redirects us (HTTP {response.status}), which is not followed"
    return f"HTTP status {response.status}"
