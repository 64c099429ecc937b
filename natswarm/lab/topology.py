r"""A small internet: public hosts, and clients behind NATs of their own, around one core router.

           public host            public host
          203.0.113.2/30        198.51.100.6/30        one network a connection, so that
                 \                   /                 neighbours share no prefix by accident
                  └───── core ──────┘
                  /                 \
          203.0.113.10/30       198.51.100.14/30
             NAT router            NAT router
           192.168.2.1/24        192.168.3.1/24
                 │                     │
           192.168.2.2/24        192.168.3.2/24
              client                client

No link leads out of the lab: nothing sent in it can leave the machine.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

from natswarm.lab.errors import LabError
from natswarm.lab.namespace import Namespace, new_prefix, remove_all, remove_stale
from natswarm.lab.nat import KernelNat, loss_ruleset

__all__ = ["Host", "Lab"]

# RFC 5737 documentation networks, which no router of the real internet carries.
PUBLIC_NETWORKS = ("203.0.113", "198.51.100")
CONNECTIONS_MAX = 64  # networks of four addresses each in 256


class Host:
    """A machine of the lab.

    Attributes:
        namespace: Where it lives: run commands and open sockets there.
        ip: Its own address.
        public_ip: What the core sees: its own address, or its NAT's.
        router: Its NAT's namespace; None for a public host.
    """

    def __init__(
        self, namespace: Namespace, ip: str, public_ip: str, router: Namespace | None
    ) -> None:
        self.namespace = namespace
        self.ip = ip
        self.public_ip = public_ip
        self.router = router

    def __repr__(self) -> str:
        return f"Host({self.namespace.name}, {self.ip})"


class Lab:
    """The laboratory, while the body of `with Lab() as lab:` runs.

    Leaving it, however, kills what runs in it and removes every namespace and link. What a run left
    that was killed itself goes when the next lab starts.

    Args:
        loss: Share of packets that the core drops, in each direction; from 0 to below 1.

    Raises:
        LabError: The system does not let us; `capability.missing_capability` says why beforehand.
    """

    def __init__(self, *, loss: float = 0.0) -> None:
        self.prefix = new_prefix()
        self._loss = loss
        self._connection_count = 0
        self._stack = contextlib.ExitStack()
        self._core: Namespace | None = None

    def __enter__(self) -> Self:
        remove_stale()
        # Below everything else: catches what an interrupt kept from being registered.
        self._stack.callback(remove_all, self.prefix)
        try:
            self._core = self._namespace("core")
            self._core.sysctl("net.ipv4.ip_forward", 1)
            if self._loss:
                self._core.nft(loss_ruleset(self._loss))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # One that cannot be removed does not keep the others: the stack goes on and raises last.
        self._core = None
        self._stack.close()

    @property
    def core(self) -> Namespace:
        """The router that all connections lead to.

        Raises:
            LabError: Outside the `with` block.
        """
        if self._core is None:
            raise LabError("a lab exists only inside its `with` block")
        return self._core

    def add_public(self, name: str) -> Host:
        """Add a host with a public address and no firewall."""
        namespace = self._namespace(name)
        _, ip = self._connect(namespace)
        return Host(namespace, ip, ip, None)

    def add_client(self, name: str, nat: KernelNat) -> Host:
        """Add a host behind a NAT of its own."""
        return self._add_way(self._namespace(name), nat, "lan", metric=0)

    def add_second_way(self, client: Host, interface: str, nat: KernelNat) -> Host:
        """Give a client a second interface, behind another NAT, that routes do not prefer.

        Returns the same client, as it is seen there.
        """
        return self._add_way(client.namespace, nat, interface, metric=1000)

    def _add_way(self, client: Namespace, nat: KernelNat, interface: str, *, metric: int) -> Host:
        router = self._namespace(f"nat-{client.name}-{interface}")
        index, public_ip = self._connect(router)
        router.sysctl("net.ipv4.ip_forward", 1)
        router.nft(nat.ruleset)
        for key, value in nat.sysctls.items():
            router.sysctl(key, value)
        network = f"192.168.{index}"
        router.ip(
            f"link add name lan type veth peer name {interface} netns {client.full_name}",
            f"address add {network}.1/24 dev lan",
            "link set dev lan up",
        )
        client.ip(
            f"address add {network}.2/24 dev {interface}",
            f"link set dev {interface} up",
            f"route add default via {network}.1 metric {metric}",
        )
        return Host(client, f"{network}.2", public_ip, router)

    def _connect(self, namespace: Namespace) -> tuple[int, str]:
        """Connect to the core; return the number of the connection and the address there."""
        index = self._connection_count
        if index == CONNECTIONS_MAX:
            raise LabError(f"a lab has at most {CONNECTIONS_MAX} connections to its core")
        self._connection_count += 1
        network, first = PUBLIC_NETWORKS[index % len(PUBLIC_NETWORKS)], 4 * index
        self.core.ip(
            f"link add name to{index} type veth peer name wan netns {namespace.full_name}",
            f"address add {network}.{first + 1}/30 dev to{index}",
            f"link set dev to{index} up",
        )
        namespace.ip(
            f"address add {network}.{first + 2}/30 dev wan",
            "link set dev wan up",
            f"route add default via {network}.{first + 1}",
        )
        return index, f"{network}.{first + 2}"

    def _namespace(self, name: str) -> Namespace:
        namespace = Namespace(self.prefix, name)
        self._stack.callback(namespace.remove)
        return namespace
