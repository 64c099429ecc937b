"""Port mapping at the local gateway: PCP, NAT-PMP and UPnP-IGD, asked directly.

Where the router at home grants one, we are reachable without puncturing; where a carrier's NAT
follows, the mapping still takes the first of two NATs out of the way. Nobody but the gateway of our
own link is asked, ever: no server elsewhere has a part in it. docs/gateway.md explains what it
means and what it exposes.

| file | idea |
|---|---|
| mapping.py | types, and the seam to the operating system |
| hold.py | choose, renew, notice a reboot, delete |
| datagram.py | drivers for PCP and NAT-PMP; their bytes are natswarm/nat/portmap.py's |
| upnp.py | driver for UPnP-IGD |
| igd.py, http.py | UPnP's words and HTTP's, pure |
"""

from natswarm.net.gateway.hold import HeldPortMapping, inspect_gateway, open_port_mapping
from natswarm.net.gateway.mapping import (
    Gateway,
    GatewayReport,
    MappingProtocol,
    PortMapping,
    Reach,
    ServiceReport,
)

__all__ = [
    "Gateway",
    "GatewayReport",
    "HeldPortMapping",
    "MappingProtocol",
    "PortMapping",
    "Reach",
    "ServiceReport",
    "inspect_gateway",
    "open_port_mapping",
]
