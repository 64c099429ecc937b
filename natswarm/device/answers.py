"""What a running node answers its user's other commands.

natswarm status, peers, invite, join, find ── net/control.py ── Answers ── Node
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from natswarm.device.facts import peer_as_json, peer_details_as_json, status_as_json
from natswarm.discovery.invite import Invite
from natswarm.errors import RequestRefused
from natswarm.identity import PeerId
from natswarm.net.control import open_control
from natswarm.node import Node, NodeConfig, open_node

__all__ = ["Answers", "open_device"]


@asynccontextmanager
async def open_device(state: Path, config: NodeConfig) -> AsyncIterator[Node]:
    """Run the node of a state folder while the body runs, and answer `natswarm status` and others.

    Args:
        state: The folder.
        config: Of `device_config`.

    Raises:
        ConfigurationError: A node runs with this folder already: two of one identity would take
            each other's connections away. Or what `open_node` raises.
    """
    async with open_node(config) as node, open_control(state, Answers(node).answer):
        yield node


class Answers:
    """What a running node answers the other commands.

    Args:
        node: The node.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked, and say how it went.

        Raises:
            NatswarmError: It could not be done, or is not known here.
        """
        match question:
            case {"do": "status"}:
                return status_as_json(self._node)
            case {"do": "peers"}:
                return {"peers": [peer_details_as_json(peer) for peer in self._node.peers()]}
            case {"do": "invite", "lifetime_s": float(lifetime_s), "one_time": bool(is_one_time)}:
                made = await self._node.invite(lifetime_s=lifetime_s, is_one_time=is_one_time)
                return {"invite": str(made), "expires_at_s": made.expires_at_s}
            case {"do": "join", "invite": str(text)}:
                return peer_as_json(await self._node.connect(Invite.parse(text)))
            case {"do": "find", "peer": str(text)}:
                return peer_as_json(await self._node.connect(PeerId.parse(text)))
        raise RequestRefused("the running node does not know this: is it of another version?")
