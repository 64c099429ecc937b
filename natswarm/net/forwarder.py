"""Keep the main port open at our gateway, for as long as the node runs.

    our addresses changed, or half an hour without a mapping    look for a gateway, ask it
    it granted a public endpoint                                a candidate of ours, told to all
    the endpoint changed, or is gone                            told to all
    the node leaves                                             given back

Most networks have no such service, so nothing waits for it but the first look at our NAT, briefly.

What a mapping exposes stands in docs/gateway.md; how one is made and renewed in `gateway/hold.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError, PortMappingFailed
from natswarm.net.gateway import Gateway, HeldPortMapping, Reach, open_port_mapping
from natswarm.net.interfaces import (
    InterfaceKind,
    InterfaceSource,
    find_interface,
    inspect_interfaces,
)
from natswarm.net.udp import UdpNetwork

__all__ = ["Forwarder", "GatewaySource", "SystemGateway"]

logger = logging.getLogger("natswarm.node")

# A router may be told to grant mappings, or be restarted without our addresses changing.
RETRY_S = 1800.0
# A gateway that has a service answers in milliseconds, by UPnP in a second; see `hold.GRACE_S`.
SETTLE_S = 1.5
# Behind these nobody would forward anything to us, or nobody needs to.
WITHOUT_GATEWAY = (InterfaceKind.PUBLIC, InterfaceKind.VPN, InterfaceKind.VIRTUAL)


class GatewaySource(Protocol):
    """Where the gateway is, and how it is reached."""

    @property
    def reach(self) -> Reach:
        """The way to it."""
        ...

    def find(self) -> Gateway:
        """Return the gateway as of now.

        Raises:
            ConfigurationError: There is none that could forward a port to us; says why.
        """
        ...


class SystemGateway:
    """The gateway of this machine's default route, or of one interface.

    Args:
        interface: Which; None: the one that IPv4 leaves by.
        bind_ip: The address that the main port is bound to; mappings lead to no other.
        source: What interfaces there are.
    """

    def __init__(
        self,
        interface: str | None = None,
        bind_ip: str = "0.0.0.0",
        source: InterfaceSource | None = None,
    ) -> None:
        self._interface = interface
        self._bind_ip = bind_ip
        self._source = source
        self.reach = Reach(UdpNetwork(interface=interface))

    def find(self) -> Gateway:
        """Return the gateway as of now; see `GatewaySource`."""
        if self._interface is None:
            interface = inspect_interfaces(self._source).default_ipv4
        else:
            interface = find_interface(self._interface, self._source)
        if interface is None:
            raise ConfigurationError("IPv4 does not leave this machine, so there is no gateway")
        if interface.kind in WITHOUT_GATEWAY:
            raise ConfigurationError(
                f"interface {interface.name} is {interface.kind.value}: no gateway to ask"
            )
        gateway = Gateway.of(interface)
        if self._bind_ip not in ("0.0.0.0", gateway.local_ip):
            raise ConfigurationError(
                f"the gateway knows us as {gateway.local_ip}, but we are bound to {self._bind_ip}"
            )
        return gateway


class Forwarder:
    """Holds the mapping of one port.

    Attributes:
        endpoint: Where the gateway forwards to us from, if that is public; None: it does not.

    Args:
        source: Whom to ask.
        port: Our UDP port.
        on_change: Called when `endpoint` has changed.
    """

    def __init__(self, source: GatewaySource, port: int, on_change: Callable[[], None]) -> None:
        self._source = source
        self._port = port
        self._on_change = on_change
        self._has_moved = trio.Event()
        self._was_tried = trio.Event()
        self.endpoint: Endpoint | None = None

    async def wait_tried(self) -> None:
        """Wait until the gateway has granted or refused it, briefly."""
        with trio.move_on_after(SETTLE_S):
            await self._was_tried.wait()

    def move(self) -> None:
        """Begin anew: our addresses have changed, and the gateway with them."""
        self._has_moved.set()

    async def run(self) -> None:
        """Hold it until cancelled, then give it back."""
        while True:
            self._has_moved = trio.Event()
            try:
                async with open_port_mapping(
                    self._source.find(),
                    self._port,
                    external_port=self._port,
                    reach=self._source.reach,
                ) as held:
                    await self._follow(held)
            except (ConfigurationError, PortMappingFailed) as error:
                logger.info("no port forwarded: %s", error)
                self._was_tried.set()
                with trio.move_on_after(RETRY_S):
                    await self._has_moved.wait()

    async def _follow(self, held: HeldPortMapping) -> None:
        """Say where we are reached until we are somewhere else."""
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                while True:
                    self._set(held)
                    self._was_tried.set()
                    await held.wait_changed()

            nursery.start_soon(follow)
            await self._has_moved.wait()
            nursery.cancel_scope.cancel()
        self.endpoint = None

    def _set(self, held: HeldPortMapping) -> None:
        mapping = held.mapping
        endpoint = mapping.external if mapping is not None and mapping.is_public else None
        if endpoint != self.endpoint:
            logger.info("the gateway forwards %s to us", endpoint or "nothing")
            self.endpoint = endpoint
            self._on_change()
