"""Natswarm: a serverless mesh through carrier-grade NATs.

    async with open_node(NodeConfig(identity=Identity.load_or_create(path))) as node:
        await node.connect(Invite.parse(text))      # somebody who takes strangers
        report = await inspect(node)                # what does our NAT do?
        peer = await node.connect(peer_id)          # introduced by a neighbour, punctured, secured
        answer = await peer.call(GREET, Greeting("hello"))  # a message for a message: docs/calls.md
        stream = await peer.open_stream("chat/1")   # a trio.abc.HalfCloseableStream

What is exported here is what users may rely on; everything else may move. General layout, lowest
layer first: address, errors, identity, wire, message; nat; puncture, discovery; sim; net; node;
inspector, device; cli. docs/architecture.md draws it.
"""

from __future__ import annotations

from natswarm.address import AddressKind, Endpoint
from natswarm.device import DhtOptions, device_config, open_device
from natswarm.device.facts import peer_as_json
from natswarm.discovery.introduction import NodeRecord
from natswarm.discovery.invite import Invite
from natswarm.errors import (
    AddressError,
    AlreadyConnecting,
    CallFailed,
    CallTimedOut,
    ConfigurationError,
    ConnectFailed,
    ConnectionLost,
    DecodeError,
    HandshakeFailed,
    IdentityError,
    InviteError,
    NatswarmError,
    PeerNotFound,
    PeerUnreachable,
    ProtocolUnknown,
    PunctureFailed,
    RequestRefused,
)
from natswarm.identity import Identity, PeerId, open_envelope_untrusted
from natswarm.inspector import (
    Evidence,
    Finding,
    InspectionReport,
    LocalTest,
    SignedProfile,
    Surroundings,
    inspect,
    open_signed_profile_untrusted,
)
from natswarm.message import Message, Refusal, decode_message_untrusted, encode_message
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.findings import NatTest
from natswarm.nat.profile import NatProfile
from natswarm.net.attempt import PunctureReport
from natswarm.net.call import Call, Method
from natswarm.net.forwarder import SystemGateway
from natswarm.net.lan import Lan
from natswarm.net.mainline import MainlineConfig
from natswarm.net.message_stream import MessageStream
from natswarm.net.notes import Notes
from natswarm.net.path import SystemPaths
from natswarm.net.peer_cache import PeerCache
from natswarm.net.port import Network
from natswarm.net.stream import Stream
from natswarm.net.tracing import Tracing
from natswarm.net.udp import UdpNetwork
from natswarm.net.virtual import VirtualNetwork, run_world
from natswarm.node import (
    Node,
    NodeConfig,
    NodeEvent,
    PathChanged,
    Peer,
    PeerConnected,
    PeerLost,
    ProfileLearned,
    PunctureEnded,
    PunctureStarted,
    open_node,
)
from natswarm.puncture.plan import Limits, Plan
from natswarm.routing.record import Record, own_key, service_key
from natswarm.routing.table import LINKS_MAX, LINKS_MIN
from natswarm.sim.presets import PRESETS
from natswarm.sim.topology import Internet
from natswarm.sim.world import World
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

__all__ = [
    "LINKS_MAX",
    "LINKS_MIN",
    "OPEN_SWARM",
    "PRESETS",
    "AddressError",
    "AddressKind",
    "AllocationLaw",
    "AlreadyConnecting",
    "Call",
    "CallFailed",
    "CallTimedOut",
    "ConfigurationError",
    "ConnectFailed",
    "ConnectionLost",
    "DecodeError",
    "DhtOptions",
    "Endpoint",
    "Evidence",
    "Filtering",
    "Finding",
    "HandshakeFailed",
    "Identity",
    "IdentityError",
    "InspectionReport",
    "Internet",
    "Invite",
    "InviteError",
    "Lan",
    "Limits",
    "LocalTest",
    "MainlineConfig",
    "Mapping",
    "Message",
    "MessageStream",
    "Method",
    "NatProfile",
    "NatTest",
    "NatswarmError",
    "Network",
    "Node",
    "NodeConfig",
    "NodeEvent",
    "NodeRecord",
    "Notes",
    "PathChanged",
    "Peer",
    "PeerCache",
    "PeerConnected",
    "PeerId",
    "PeerLost",
    "PeerNotFound",
    "PeerUnreachable",
    "Plan",
    "ProfileLearned",
    "ProtocolUnknown",
    "PunctureEnded",
    "PunctureFailed",
    "PunctureReport",
    "PunctureStarted",
    "Record",
    "Refusal",
    "RequestRefused",
    "SignedProfile",
    "Stream",
    "Surroundings",
    "SwarmKey",
    "SystemGateway",
    "SystemPaths",
    "Tracing",
    "UdpNetwork",
    "VirtualNetwork",
    "World",
    "decode_message_untrusted",
    "device_config",
    "encode_message",
    "inspect",
    "open_device",
    "open_envelope_untrusted",
    "open_node",
    "open_signed_profile_untrusted",
    "own_key",
    "peer_as_json",
    "run_world",
    "service_key",
]
