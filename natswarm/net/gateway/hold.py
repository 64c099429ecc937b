"""Hold a port mapping at the gateway: choose a protocol, renew, notice a reboot, delete.

All protocols are tried for an answer side by side, which changes nothing at the gateway; then one
makes the mapping, so that two never do. Who runs it knows nothing of protocols.

Source: RFC 6887, 11.2.1 for renewal, 8.5 and 14 for a gateway that lost its state.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from natswarm.errors import GatewayError, PortMappingFailed
from natswarm.nat.portmap import RENEWAL_MIN_DELAY_S, renewal_delay_s
from natswarm.net.gateway.datagram import NatPmpService, PcpService
from natswarm.net.gateway.mapping import (
    Gateway,
    GatewayReport,
    GatewayService,
    MappingProtocol,
    PortMapping,
    Reach,
    ServiceReport,
)
from natswarm.net.gateway.upnp import UpnpService
from natswarm.net.nursery import open_private_nursery

__all__ = ["HeldPortMapping", "inspect_gateway", "open_port_mapping"]

ALL_PROTOCOLS = tuple(MappingProtocol)
# Long enough that renewal is no traffic, short enough that what a killed program leaves open closes
# within the hour's third.
DEFAULT_LEASE_S = 1200
# Each step's own waits are shorter; this ends a gateway that drips answers.
PROBE_TIMEOUT_S = 6.0
MAP_TIMEOUT_S = 10.0
# After the first protocol answered, how long a better one is waited for.
GRACE_S = 0.5
# Without it, a reboot of the gateway would show only when half of the lease is over.
CHECK_INTERVAL_S = 60.0
RETRY_AFTER_LOSS_S = 60.0
# Deleting is a courtesy: the lease ends by itself.
DELETE_TIMEOUT_S = 2.0


class HeldPortMapping:
    """A mapping that is kept alive while the body of `open_port_mapping` runs.

    Attributes:
        mapping: As granted last; None while the gateway does not grant it any more.
        problem: Why the last renewal failed; empty if it did not.
        renewal_count: Renewals that succeeded so far.
        loss_count: Times the gateway showed that it had lost the mapping: rebooted, new address,
            or the entry is gone.
    """

    def __init__(self, mapping: PortMapping) -> None:
        self.mapping: PortMapping | None = mapping
        self.problem = ""
        self.renewal_count = 0
        self.loss_count = 0
        self._changed = trio.Event()

    async def wait_changed(self) -> PortMapping | None:
        """Wait until the external endpoint changes, is lost or comes back; return it then."""
        await self._changed.wait()
        return self.mapping

    def _set(self, mapping: PortMapping | None) -> None:
        before = None if self.mapping is None else self.mapping.external
        after = None if mapping is None else mapping.external
        self.mapping = mapping
        if before != after:
            self._changed.set()
            self._changed = trio.Event()


async def inspect_gateway(
    gateway: Gateway,
    *,
    protocols: Sequence[MappingProtocol] = ALL_PROTOCOLS,
    reach: Reach | None = None,
    timeout_s: float = PROBE_TIMEOUT_S,
) -> GatewayReport:
    """Ask which mapping services a gateway has, making no mapping. Takes `timeout_s` at most."""
    services = _Services(gateway, 0, protocols, reach or Reach())  # no port: nothing is mapped
    services.probe_timeout_s = min(timeout_s, PROBE_TIMEOUT_S)
    async with trio.open_nursery() as nursery:
        services.start_probes(nursery)
    return GatewayReport(gateway, tuple(services.reports[each] for each in protocols))


@asynccontextmanager
async def open_port_mapping(
    gateway: Gateway,
    internal_port: int,
    *,
    external_port: int = 0,
    lease_s: int = DEFAULT_LEASE_S,
    protocols: Sequence[MappingProtocol] = ALL_PROTOCOLS,
    allow_permanent_lease: bool = False,
    reach: Reach | None = None,
) -> AsyncIterator[HeldPortMapping]:
    """Have the gateway hand on what arrives at one of its UDP ports, while the body runs.

    Asks nobody but `gateway`. Leaving the body deletes the mapping, waiting 2 s at most; a program
    that is killed leaves it until its lease ends.

    Args:
        gateway: Who is asked.
        internal_port: Our UDP port, 1..65535. Whatever listens there becomes reachable.
        external_port: Wanted; 0 leaves it to the gateway. Look at what it gave.
        lease_s: Wanted, 1..2**32-1 seconds; the gateway may give another. Renewed at half of it.
        protocols: Which to try.
        allow_permanent_lease: Whether to take a UPnP mapping that never ends by itself.
        reach: The way to the gateway; None means this machine's.

    Raises:
        PortMappingFailed: No protocol made one; says for each why. Comes before the body runs, in
            6 s where nobody answers, and at worst in 42 s.
        ValueError: A port or the lease is out of range.
    """
    _check_range("internal_port", internal_port, 1, 65_535)
    _check_range("external_port", external_port, 0, 65_535)
    _check_range("lease_s", lease_s, 1, 0xFFFF_FFFF)
    reach = reach or Reach()
    services = _Services(gateway, internal_port, protocols, reach, allow_permanent_lease)
    service, mapping = await services.make_mapping(external_port, lease_s)
    held = HeldPortMapping(mapping)
    try:
        async with open_private_nursery() as nursery:
            nursery.start_soon(_keep, held, service, lease_s, reach)
            yield held
    finally:
        if held.mapping is not None:
            await _unmap(service, held.mapping)


class _Services:
    """All protocols towards one gateway, and what they came to."""

    def __init__(
        self,
        gateway: Gateway,
        internal_port: int,
        protocols: Sequence[MappingProtocol],
        reach: Reach,
        allow_permanent_lease: bool = False,
    ) -> None:
        self.gateway = gateway
        self.probe_timeout_s = PROBE_TIMEOUT_S
        self.reports: dict[MappingProtocol, ServiceReport] = {}
        self._services: dict[MappingProtocol, GatewayService] = {}
        self._reported = trio.Event()
        for protocol in protocols:
            try:
                service: GatewayService
                match protocol:
                    case MappingProtocol.PCP:
                        service = PcpService(gateway, internal_port, reach)
                    case MappingProtocol.NAT_PMP:
                        service = NatPmpService(gateway, internal_port, reach)
                    case MappingProtocol.UPNP_IGD:
                        service = UpnpService(
                            gateway,
                            internal_port,
                            reach,
                            allow_permanent_lease=allow_permanent_lease,
                        )
            except GatewayError as error:
                self._report(ServiceReport(protocol, False, str(error)))
            else:
                self._services[protocol] = service

    def start_probes(self, nursery: trio.Nursery) -> None:
        """Ask in all protocols at once; what they come to stands in `reports`."""
        for service in self._services.values():
            nursery.start_soon(self._probe, service)

    async def make_mapping(
        self, external_port: int, lease_s: int
    ) -> tuple[GatewayService, PortMapping]:
        """Make the mapping in the best protocol that does; see `open_port_mapping`."""
        async with open_private_nursery() as nursery:
            self.start_probes(nursery)
            tried: dict[MappingProtocol, str] = {}
            while (service := await self._next_available(tried)) is not None:
                try:
                    return service, await _map(service, external_port, lease_s)
                except GatewayError as error:
                    tried[service.protocol] = str(error)
                    await _unmap(service, None)  # only the answer may have been lost
                except BaseException:
                    await _unmap(service, None)
                    raise
        reasons = {
            each.value: tried.get(each, self.reports[each].detail)
            for each in MappingProtocol
            if each in self.reports
        }
        raise PortMappingFailed(self.gateway.ip, reasons)

    async def _next_available(self, tried: dict[MappingProtocol, str]) -> GatewayService | None:
        """Return the best service that answers; None if none is left.

        Once one has answered, a better one gets a moment more.
        """
        with trio.CancelScope() as grace:
            while True:
                waiting_for_better = False
                for protocol, service in self._services.items():
                    report = self.reports.get(protocol)
                    if report is None:
                        waiting_for_better = True
                    elif report.is_available and protocol not in tried:
                        if not waiting_for_better:
                            return service
                        grace.deadline = min(grace.deadline, trio.current_time() + GRACE_S)
                if not waiting_for_better:
                    return None
                await self._reported.wait()
        return next(
            service
            for protocol, service in self._services.items()
            if protocol not in tried
            and protocol in self.reports
            and self.reports[protocol].is_available
        )

    async def _probe(self, service: GatewayService) -> None:
        try:
            with trio.fail_after(self.probe_timeout_s):
                report = await service.probe()
        except trio.TooSlowError:
            detail = f"no whole answer in {self.probe_timeout_s:.3g} s"
            report = ServiceReport(service.protocol, False, detail)
        except GatewayError as error:
            report = ServiceReport(service.protocol, False, str(error))
        self._report(report)

    def _report(self, report: ServiceReport) -> None:
        self.reports[report.protocol] = report
        self._reported.set()
        self._reported = trio.Event()


async def _map(service: GatewayService, external_port: int, lease_s: int) -> PortMapping:
    """Make or renew a mapping.

    Raises:
        GatewayError: Refused, or no answer.
    """
    try:
        with trio.fail_after(MAP_TIMEOUT_S):
            return await service.map(external_port, lease_s)
    except trio.TooSlowError as error:
        raise GatewayError(f"no whole answer in {MAP_TIMEOUT_S:g} s") from error


async def _unmap(service: GatewayService, mapping: PortMapping | None) -> None:
    """Delete, briefly, even while we are being cancelled."""
    with (
        trio.move_on_after(DELETE_TIMEOUT_S, shield=True),
        contextlib.suppress(GatewayError),
    ):
        await service.unmap(mapping)


async def _keep(held: HeldPortMapping, service: GatewayService, lease_s: int, reach: Reach) -> None:
    """Renew for ever: at half of the lease, and at once when the gateway has lost it."""
    last = held.mapping
    assert last is not None
    external_port = last.external.port
    ends_at = _end_of(last)
    renews_at = _renewal_time(ends_at, reach)
    while True:
        await trio.sleep_until(min(renews_at, trio.current_time() + CHECK_INTERVAL_S))
        if trio.current_time() < renews_at:
            if not await _has_lost(service, held.mapping):
                continue
            held.loss_count += 1
            ends_at = trio.current_time()
        try:
            mapping = await _map(service, external_port, lease_s)
        except GatewayError as error:
            held.problem = str(error)
            if trio.current_time() >= ends_at:
                held._set(None)
                renews_at = trio.current_time() + RETRY_AFTER_LOSS_S
            else:
                renews_at = _renewal_time(ends_at, reach)
        else:
            held.problem = ""
            held.renewal_count += 1
            held._set(mapping)
            external_port = mapping.external.port
            ends_at = _end_of(mapping)
            renews_at = _renewal_time(ends_at, reach)


async def _has_lost(service: GatewayService, mapping: PortMapping | None) -> bool:
    """Ask whether the mapping is still there; a gateway that does not answer is given time."""
    if mapping is None:
        return False
    try:
        with trio.fail_after(MAP_TIMEOUT_S):
            return not await service.still_holds(mapping)
    except (GatewayError, trio.TooSlowError):
        return False


def _end_of(mapping: PortMapping) -> float:
    lease_s = float("inf") if mapping.lease_s is None else mapping.lease_s
    return trio.current_time() + lease_s


def _renewal_time(ends_at: float, reach: Reach) -> float:
    now = trio.current_time()
    # In the last seconds of a lease, more tries would come to nothing else.
    delay_s = min(renewal_delay_s(max(0.0, ends_at - now), reach.rng), max(0.0, ends_at - now))
    return now + max(delay_s, RENEWAL_MIN_DELAY_S)


def _check_range(name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name} is {value}, not in {lowest}..{highest}")
