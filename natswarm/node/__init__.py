"""A node: every core and driver of natswarm connected, the whole graph in one place.

    main port p ──┐                              ┌── EchoService   what do others see of us?
    second port q ┴─ PortPump ─ first byte ──────┼── Dialler       probes: dials under way
                       │                         └── Connector     HELLO: strangers who knock
                       └─ QUIC by remote endpoint ── Peer ── streams ── handlers by protocol
                                                                ├── Introducer
                                                                └── OverlayService  routing
    PathSet: the paths of each connection    Renewer: the next path    Roamer: are we elsewhere?

`open_node` starts it and, on leaving, closes everything it opened. The node owns its peers: a lost
connection takes its Peer away and tells `on_event`; connecting again is the caller's decision.

| module | what is in it |
|---|---|
| config.py | how a node is opened |
| events.py | what it tells as it happens |
| own_nat.py | what it knows of its own NAT |
| node.py | everything connected |
"""

from __future__ import annotations

from natswarm.net.peer import Peer
from natswarm.node.config import NodeConfig
from natswarm.node.events import (
    NodeEvent,
    PathChanged,
    PeerConnected,
    PeerLost,
    ProfileLearned,
    PunctureEnded,
    PunctureStarted,
)
from natswarm.node.node import Node, StreamHandler, open_node

__all__ = [
    "Node",
    "NodeConfig",
    "NodeEvent",
    "PathChanged",
    "Peer",
    "PeerConnected",
    "PeerLost",
    "ProfileLearned",
    "PunctureEnded",
    "PunctureStarted",
    "StreamHandler",
    "open_node",
]
