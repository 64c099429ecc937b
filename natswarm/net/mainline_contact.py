"""Reach a peer that nobody near knows, by its meeting record in the mainline DHT.

    it takes strangers                     it is dialled where it says
    it is behind a closed NAT              its introducers are dialled, and asked to introduce us
    it is, and none of them is there       both sides have to act: by the clock

Whom the record names gets a knock and a dozen probes, on the word of whoever published it.
"""

from __future__ import annotations

import logging

import trio

from natswarm.address import Endpoint
from natswarm.discovery.invite import Invite
from natswarm.errors import ConnectFailed, NatswarmError, PeerNotFound
from natswarm.identity import PeerId
from natswarm.net.connector import Connector
from natswarm.net.mainline import MainlineService
from natswarm.net.peer import Peer

__all__ = ["connect_by_mainline"]

logger = logging.getLogger("natswarm.mainline")

# As of peers from the cache: whoever is there has answered by then.
INTRODUCER_TIMEOUT_S = 5.0


async def connect_by_mainline(
    mainline: MainlineService, connector: Connector, peer_id: PeerId
) -> Peer:
    """Return a connection to a peer, found by the mainline DHT.

    Raises:
        PeerNotFound: Nothing is known of it there either.
        ConnectFailed: It is known, and was not reached; says why, and what to do.
    """
    meeting = await mainline.find_meeting(peer_id)
    profile = meeting.record.profile
    # Who knows nothing of its NAT, and names nobody, may be on a network of ours.
    is_open = profile.accepts_strangers or bool(profile.forwarded_endpoints)
    if is_open or (profile.is_translated is None and not meeting.introducers):
        return await connector.connect(Invite(meeting.record, ""))
    async with trio.open_nursery() as nursery:
        for introducer, endpoint in meeting.introducers:
            nursery.start_soon(_dial, connector, introducer, endpoint)
    try:
        return await connector.connect(peer_id)
    except PeerNotFound as error:
        raise ConnectFailed(
            f"the mainline DHT knows {peer_id.short}, which takes no strangers, and none of the "
            f"{len(meeting.introducers)} neighbours it names introduced us: have both sides run "
            "`natswarm connect PEERID --by-clock`, or ask its user for an invite"
        ) from error


async def _dial(connector: Connector, peer_id: PeerId, endpoint: Endpoint) -> None:
    with trio.move_on_after(INTRODUCER_TIMEOUT_S):
        try:
            await connector.connect_at(peer_id, (endpoint,))
        except NatswarmError as error:
            logger.info("%s, named in the mainline, is not there: %s", peer_id.short, error)
