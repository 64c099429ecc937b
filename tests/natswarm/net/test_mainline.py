"""Our mainline node among real ones: three of libtorrent's, on loopback addresses of their own."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from natswarm.address import Endpoint
from natswarm.discovery.introduction import NodeRecord
from natswarm.discovery.krpc_bencode import bencode
from natswarm.discovery.mainline_files import KnownNodes
from natswarm.discovery.mainline_item import MutableItem
from natswarm.discovery.mainline_meeting import Meeting, meeting_place
from natswarm.errors import ConfigurationError, ConnectFailed, PeerNotFound
from natswarm.identity import Identity, PeerId
from natswarm.nat.profile import NatProfile
from natswarm.net.mainline import MainlineConfig, MainlineService, read_mainline_nodes
from natswarm.net.nursery import open_private_nursery
from natswarm.net.pump import PortPump
from natswarm.net.udp import UdpNetwork
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

ME, KIM = Identity(b"m" * 32), Identity(b"k" * 32)
HASH = bytes(range(20))


class Anybody:
    accepts_strangers = True

    def __init__(self) -> None:
        self.said = NodeRecord(ME.peer_id, 1.0, "me", NatProfile())

    def record(self) -> NodeRecord:
        return self.said

    def introducers(self) -> list[tuple[PeerId, Endpoint]]:
        return []


@asynccontextmanager
async def open_service(
    nodes: list[Endpoint],
    *,
    ip: str = "127.0.0.20",
    identity: Identity = ME,
    swarm: SwarmKey = OPEN_SWARM,
    known: KnownNodes | None = None,
    **config: Any,
) -> AsyncIterator[MainlineService]:
    port = UdpNetwork().bind(Endpoint(ip, 0))
    pump = PortPump(port, lambda _data, _source: None)
    service = MainlineService(
        Anybody(),
        port=port,
        identity=identity,
        config=MainlineConfig(tuple(nodes), **config),
        swarm=swarm,
        known=known or KnownNodes(),
        rng=random.Random(1),
        clock_s=time.time,
    )
    pump.on_krpc = service.receive_untrusted
    try:
        async with open_private_nursery() as nursery:
            nursery.start_soon(pump.run)
            nursery.start_soon(service.run)
            with trio.fail_after(30):
                await service.wait_bootstrapped()
                yield service
    finally:
        port.close()


def endpoint_of(service: MainlineService) -> Endpoint:
    return service._port.local_endpoint


class Torrents:
    """Real mainline nodes that know each other."""

    def __init__(self, library: Any, count: int) -> None:
        self.library = library
        self.sessions = [self._start(index) for index in range(count)]
        self.endpoints = [
            Endpoint(f"127.0.0.{11 + index}", session.listen_port())
            for index, session in enumerate(self.sessions)
        ]
        for session in self.sessions:
            for endpoint in self.endpoints:
                session.add_dht_node((endpoint.ip, endpoint.port))

    def _start(self, index: int) -> Any:
        return self.library.session(
            {
                "listen_interfaces": f"127.0.0.{11 + index}:0",
                "dht_bootstrap_nodes": "",
                "enable_dht": True,
                "enable_lsd": False,
                "enable_upnp": False,
                "enable_natpmp": False,
                # What keeps nodes apart on the internet, where nobody has a loopback address.
                "dht_restrict_routing_ips": False,
                "dht_restrict_search_ips": False,
                "dht_ignore_dark_internet": False,
                "alert_mask": self.library.alert.category_t.all_categories,
            }
        )

    async def alert(self, index: int, kind: str, seconds: float = 20) -> Any:
        """Wait for an alert of one session, by the name of its type."""
        with trio.fail_after(seconds):
            while True:
                for alert in self.sessions[index].pop_alerts():
                    if alert.what() == kind:
                        return alert
                await trio.sleep(0.05)

    def write_session(self, path: Path) -> None:
        state = self.sessions[0].session_state()
        path.write_bytes(self.library.write_session_params_buf(state))

    async def wait_known(self, path: Path) -> list[Endpoint]:
        """Wait until the first session knows nodes; return those that its file names."""
        with trio.fail_after(20):
            while True:
                self.write_session(path)
                with contextlib.suppress(ConfigurationError):
                    return read_mainline_nodes(path)
                await trio.sleep(0.05)

    def close(self) -> None:
        for session in self.sessions:
            session.pause()
        self.sessions.clear()


@pytest.fixture
async def torrents() -> AsyncIterator[Torrents]:
    library = pytest.importorskip(
        "libtorrent", reason="libtorrent is not installed: pip install natswarm[dev]"
    )
    torrents = Torrents(library, 3)
    try:
        yield torrents
    finally:
        torrents.close()


async def test_real_nodes_say_where_they_see_us(torrents):
    async with open_service(torrents.endpoints) as service:
        assert {each.endpoint for each in service.contacts()} == set(torrents.endpoints)
        votes = service.votes()
        assert set(votes) == {each.ip for each in torrents.endpoints}
        assert set(votes.values()) == {endpoint_of(service)}
        assert service.statistics().rejected_count == 0


async def test_our_item_is_read_by_a_real_node(torrents):
    async with open_service(torrents.endpoints) as service:
        item = MutableItem.sign(ME, b"salt", 7, b"from us")
        assert await service.put_item(item) == 3
        torrents.sessions[2].dht_get_mutable_item(ME.peer_id.key, b"salt")
        alert = await torrents.alert(2, "dht_mutable_item")
        assert (alert.seq, b"from us" in str(alert.item).encode()) == (7, True)


async def test_an_item_of_a_real_node_is_read_by_us(torrents, tmp_path):
    async with open_service(torrents.endpoints) as service:
        await torrents.wait_known(tmp_path / "session")
        # libtorrent's private keys are the hash of the seed, clamped (RFC 8032, 5.1.5).
        private = bytearray(hashlib.sha512(b"k" * 32).digest())
        private[0] &= 248
        private[31] = (private[31] & 63) | 64
        torrents.sessions[0].dht_put_mutable_item(
            bytes(private), KIM.peer_id.key, b"from them", b"salt"
        )
        await torrents.alert(0, "dht_put")
        item = await service.get_item(KIM.peer_id, b"salt")
        assert item is not None
        assert item.value == bencode(b"from them")


async def test_two_of_ours_meet_by_real_nodes(torrents):
    """In a private swarm: others find nothing, and where they look there is nothing to see."""
    record = NodeRecord(KIM.peer_id, 5.0, "kim", NatProfile(main_endpoint=Endpoint("1.2.3.4", 5)))
    friend = ME.peer_id, Endpoint("5.6.7.8", 9)
    club = SwarmKey(b"s" * 32)
    async with (
        open_service(torrents.endpoints, swarm=club) as service,
        open_service(torrents.endpoints, ip="127.0.0.21", identity=KIM, swarm=club) as kim,
        open_service(torrents.endpoints, ip="127.0.0.22") as outsider,
    ):
        with pytest.raises(PeerNotFound, match="knows nothing of"):
            await service.find_meeting(KIM.peer_id)
        assert await kim.publish(record, [friend]) >= 3
        assert await service.find_meeting(KIM.peer_id) == Meeting(record, (friend,))
        with pytest.raises(PeerNotFound):
            await outsider.find_meeting(KIM.peer_id)
        item = await outsider.get_item(*meeting_place(club, KIM.peer_id))
        assert item is not None
        assert item.owner != KIM.peer_id
        assert b"kim" not in item.value


async def test_an_open_swarm_shares_the_dht_with_private_ones(torrents):
    async with (
        open_service(torrents.endpoints, identity=KIM, swarm=SwarmKey(b"s" * 32)) as private,
        open_service(torrents.endpoints, ip="127.0.0.21", identity=KIM) as opened,
    ):
        here = NodeRecord(KIM.peer_id, 5.0, "here", NatProfile())
        there = NodeRecord(KIM.peer_id, 6.0, "there", NatProfile())
        await private.publish(here)
        await opened.publish(there)
        assert (await private.find_meeting(KIM.peer_id)).record == here
        assert (await opened.find_meeting(KIM.peer_id)).record == there


async def test_nodes_that_answered_are_known_next_time(torrents):
    known = KnownNodes()
    async with open_service(torrents.endpoints[:1], known=known) as service:
        await trio.testing.wait_all_tasks_blocked()
        assert known.is_changed
        assert set(known.endpoints) <= set(torrents.endpoints)
        assert service.contacts()


async def test_peers_are_announced_and_found(torrents):
    async with (
        open_service(torrents.endpoints) as service,
        open_service(torrents.endpoints, ip="127.0.0.21") as other,
    ):
        assert await service.announce(HASH) >= 3
        assert await other.find_peers(HASH) == (endpoint_of(service),)


async def test_a_node_starts_from_the_session_file_of_a_client(torrents, tmp_path):
    nodes = await torrents.wait_known(tmp_path / "session")
    assert set(nodes) <= set(torrents.endpoints)
    async with open_service(nodes) as service:
        assert service.contacts()


async def test_nobody_there_is_a_clear_error(tmp_path):
    async with open_service([]) as service:
        with pytest.raises(ConnectFailed, match="name others with --dht-node"):
            await service.find_peers(HASH)
    (tmp_path / "bad").write_bytes(b"no such thing")
    for name in ("bad", "missing"):
        with pytest.raises(ConfigurationError, match=f"no mainline nodes from .*{name}"):
            read_mainline_nodes(tmp_path / name)


async def test_questions_of_one_address_are_bounded():
    async with open_service([], answers=True) as service:
        query = b"d1:ad2:id20:abcdefghij0123456789e1:q4:ping2:roi1e1:t2:aa1:y1:qe"
        for _ in range(100):
            service.receive_untrusted(query, Endpoint("127.0.0.9", 9))
        assert service.statistics().answered_query_count <= 5
        assert service.refused_count >= 95
        service.receive_untrusted(query, Endpoint("127.0.0.10", 9))
        assert service.refused_count <= 96
