"""Ask the gateway for its port mapping services, and each that it has for a lease.

A lease shows only in a mapping that was made. So one is made for each protocol, of a fresh port of
ours that takes what comes and answers nothing, and taken back at once.
"""

from __future__ import annotations

from dataclasses import replace

from natswarm.errors import GatewayError, PortMappingFailed
from natswarm.inspector.report import GatewayFindings, ServiceFindings
from natswarm.net.gateway import (
    Gateway,
    MappingProtocol,
    Reach,
    inspect_gateway,
    open_port_mapping,
)

__all__ = ["ask_leases", "ask_services"]

# What programs commonly ask for; the gateway gives what it wants.
LEASE_WANTED_S = 3600


async def ask_services(gateway: Gateway, reach: Reach, *, timeout_s: float) -> GatewayFindings:
    """Ask which services there are, for `timeout_s` or 6 s; changes nothing at the gateway."""
    report = await inspect_gateway(gateway, reach=reach, timeout_s=timeout_s)
    return GatewayFindings(
        gateway,
        tuple(
            ServiceFindings(each.protocol, each.is_available, each.detail, each.external_ip)
            for each in report.services
        ),
    )


async def ask_leases(found: GatewayFindings, reach: Reach) -> GatewayFindings:
    """Return the same with the leases that the available services gave, or why they gave none."""
    services = []
    for service in found.services:
        if service.is_available:
            try:
                lease_s = await _ask_lease(found.gateway, service.protocol, reach)
            except PortMappingFailed as error:
                service = replace(service, lease_problem="; ".join(error.reasons.values()))
            except GatewayError as error:
                service = replace(service, lease_problem=str(error))
            else:
                service = replace(service, lease_s=lease_s)
        services.append(service)
    return replace(found, services=tuple(services))


async def _ask_lease(gateway: Gateway, protocol: MappingProtocol, reach: Reach) -> float:
    port = reach.bind(gateway)
    try:
        async with open_port_mapping(
            gateway,
            port.local_endpoint.port,
            lease_s=LEASE_WANTED_S,
            protocols=[protocol],
            reach=reach,
        ) as held:
            assert held.mapping is not None, "it was made a moment ago"
            lease_s = held.mapping.lease_s
            return float("inf") if lease_s is None else float(lease_s)
    finally:
        port.close()
