from __future__ import annotations

import heapq
import random
from dataclasses import replace

import pytest

from natswarm.address import Endpoint
from natswarm.discovery.krpc import Contact, Query, Response, decode_krpc_untrusted
from natswarm.discovery.krpc_bencode import bencode
from natswarm.discovery.mainline import LookupEnded, Mainline
from natswarm.discovery.mainline_files import nodes_in_file_untrusted
from natswarm.discovery.mainline_id import distance, is_secure_id, secure_id
from natswarm.discovery.mainline_item import (
    MutableItem,
    item_target,
)
from natswarm.discovery.mainline_table import BUCKET_SIZE, GOOD_FOR_S, MainlineTable
from natswarm.errors import DecodeError
from natswarm.identity import Identity, PeerId

ME, EVE = Identity(b"m" * 32), Identity(b"e" * 32)
DELAY_S = 0.05
HASH = b"h" * 20


class Net:
    """Machines on a heap of events; a node that is down hears nothing."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.nodes: dict[Endpoint, Mainline] = {}
        self.ended: dict[tuple[Endpoint, int], LookupEnded] = {}
        self.queries: dict[Endpoint, int] = {}
        self.down: set[Endpoint] = set()
        self._heap: list[tuple[float, int, bytes, Endpoint, Endpoint]] = []
        self._serial = 0

    def add(self, index: int, *, answers: bool = True, is_ipv6: bool = False) -> Endpoint:
        ip = f"2001:db8:{index:x}::1" if is_ipv6 else f"198.18.{index // 250}.{index % 250 + 1}"
        endpoint = Endpoint(ip, 6881)
        rng = random.Random(self.rng.random())
        self.nodes[endpoint] = Mainline(
            is_ipv6=is_ipv6,
            rng=rng,
            entropy=rng.randbytes,
            now=self.now,
            is_read_only=not answers,
        )
        return endpoint

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        # Commands may have changed any node since.
        timers = {endpoint: self._drain(endpoint) for endpoint in self.nodes}
        while True:
            next_at = min([*timers.values(), *(event[0] for event in self._heap[:1])])
            if next_at >= end:
                self.now = end
                return
            self.now = max(self.now, next_at)
            touched = [endpoint for endpoint, timer in timers.items() if timer <= self.now]
            while self._heap and self._heap[0][0] <= self.now:
                _, _, data, source, destination = heapq.heappop(self._heap)
                if destination in self.nodes and destination not in self.down:
                    self.nodes[destination].receive_untrusted(data, source, self.now)
                    touched.append(destination)
            for endpoint in dict.fromkeys(touched):
                timers[endpoint] = self._drain(endpoint)

    def _drain(self, endpoint: Endpoint) -> float:
        """Let a node do what is due; return when it wants to be asked again."""
        if endpoint in self.down:
            return float("inf")
        node = self.nodes[endpoint]
        node.handle_timer(self.now)
        for data, destination in node.datagrams_to_send(self.now):
            self._serial += 1
            if isinstance(decode_krpc_untrusted(data), Query):
                self.queries[endpoint] = self.queries.get(endpoint, 0) + 1
            event = (self.now + DELAY_S, self._serial, data, endpoint, destination)
            heapq.heappush(self._heap, event)
        while (event := node.next_event()) is not None:
            self.ended[endpoint, event.handle] = event
        timer = node.next_timer()
        return float("inf") if timer is None else timer

    def outcome(self, endpoint: Endpoint, handle: int, *, within_s: float = 60) -> LookupEnded:
        begun = self.now
        while (endpoint, handle) not in self.ended:
            assert self.now < begun + within_s, "the lookup does not end"
            self.run(1.0)
        return self.ended[endpoint, handle]


def swarm(count: int, seed: int = 1, *, is_ipv6: bool = False) -> tuple[Net, list[Endpoint]]:
    net = Net(seed)
    ends = [net.add(index, is_ipv6=is_ipv6) for index in range(count)]
    for index, end in enumerate(ends):
        first = net.rng.sample(ends[:index], min(2, index))
        net.nodes[end].bootstrap(first, net.now)
        net.run(1.0)
    net.run(30)
    return net, ends


@pytest.fixture(scope="module")
def forty() -> tuple[Net, list[Endpoint]]:
    return swarm(40)


# Ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ip", "seed", "prefix"),
    [
        ("124.31.75.21", 1, "5fbfbf"),
        ("21.75.31.124", 86, "5a3ce9"),
        ("65.23.51.170", 22, "a5d432"),
        ("84.124.73.14", 65, "1b0321"),
        ("43.213.53.83", 90, "e56f6c"),
    ],
)
def test_the_examples_of_bep_42(ip, seed, prefix):
    example = bytes.fromhex(prefix) + bytes(16) + bytes([seed])
    assert is_secure_id(example, ip)
    ours = secure_id(ip, example)
    assert (ours[:2], ours[2] & 0xF8) == (example[:2], example[2] & 0xF8)
    assert is_secure_id(ours, ip)
    assert not is_secure_id(bytes([example[0] ^ 1]) + example[1:], ip)
    assert is_secure_id(bytes(20), "192.168.1.2")
    assert is_secure_id(secure_id("2a01:4f8::1", bytes(range(20))), "2a01:4f8::1")
    assert not is_secure_id(bytes(20), "2a01:4f8::1")


def test_our_id_follows_the_address_that_others_see(forty):
    net, ends = forty
    for end in ends[3:]:
        assert net.nodes[end].public_ip == end.ip
        assert is_secure_id(net.nodes[end].own_id, end.ip)


def test_liars_do_not_elect_our_address():
    net, ends = swarm(12)
    mine = ends[-1]
    votes = net.nodes[mine].votes()
    assert len(votes) >= 6
    node = net.nodes[mine]
    for index in range(100):  # from one prefix, and no answers to questions of ours
        lie = Response(b"tttt", {b"id": bytes(20)}, Endpoint("192.0.2.1", 1)).encode()
        node.receive_untrusted(lie, Endpoint(f"198.51.100.{index + 1}", 1), net.now)
    assert node.votes() == votes
    assert node.statistics().rejected_count == 100


# Items --------------------------------------------------------------------------------------------

BEP_44_KEY = PeerId(
    bytes.fromhex("77ff84905a91936367c01360803104f92432fcd904a43511876df5cdf3e7e548")
)


@pytest.mark.parametrize(
    ("salt", "target", "signature"),
    [
        (
            b"",
            "4a533d47ec9c7d95b1ad75f576cffc641853b750",
            (
                "305ac8aeb6c9c151fa120f120ea2cfb923564e11552d06a5d856091e5e853cff"
                "1260d3f39e4999684aa92eb73ffd136e6f4f3ecbfda0ce53a1608ecd7ae21f01"
            ),
        ),
        (
            b"foobar",
            "411eba73b6f087ca51a3795d9c8c938d365e32c1",
            (
                "6834284b6b24c3204eb2fea824d82f88883a3d95e8b4a21b8c0ded553d17d17d"
                "df9a8a7104b1258f30bed3787e6cb896fca78c58f8e03b5f18f14951a87d9a08"
            ),
        ),
    ],
)
def test_the_examples_of_bep_44(salt, target, signature):
    item = MutableItem(BEP_44_KEY, salt, 1, b"12:Hello World!", bytes.fromhex(signature))
    assert item.target.hex() == target
    item.verify_untrusted()
    with pytest.raises(DecodeError):
        replace(item, sequence=2).verify_untrusted()
    with pytest.raises(DecodeError):
        replace(item, salt=b"other").verify_untrusted()


# A swarm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_ipv6", [False, True])
def test_a_peer_that_announces_is_found(is_ipv6):
    net, ends = swarm(15, is_ipv6=is_ipv6)
    announced = net.nodes[ends[1]].announce(HASH, 6881)
    assert net.outcome(ends[1], announced).stored_count == 8
    found = net.outcome(ends[9], net.nodes[ends[9]].get_peers(HASH))
    assert found.peers == (ends[1],)
    nobody = net.outcome(ends[9], net.nodes[ends[9]].get_peers(b"x" * 20))
    assert (nobody.peers, nobody.answered_count) == ((), 8)


def test_an_item_is_found_and_the_newest_wins(forty):
    net, ends = forty
    for sequence in (1, 3, 2):
        item = MutableItem.sign(ME, b"salt", sequence, b"value %d" % sequence)
        ended = net.outcome(ends[sequence], net.nodes[ends[sequence]].put(item))
        assert (ended.stored_count == 8) == (sequence != 2)
    found = net.outcome(ends[20], net.nodes[ends[20]].get(ME.peer_id, b"salt"))
    assert found.item is not None
    assert (found.item.sequence, found.item.value) == (3, b"7:value 3")
    for owner, salt in ((EVE.peer_id, b"salt"), (ME.peer_id, b"other")):
        assert net.outcome(ends[20], net.nodes[ends[20]].get(owner, salt)).item is None


def test_the_item_is_with_the_closest_nodes(forty):
    net, ends = forty
    item = MutableItem.sign(EVE, b"", 1, b"x")
    net.outcome(ends[0], net.nodes[ends[0]].put(item))
    target = item_target(EVE.peer_id, b"")
    order = sorted(ends, key=lambda end: distance(net.nodes[end].own_id, target))
    keepers = [end for end in ends if net.nodes[end]._server._store.item(target, net.now)]
    assert len(set(keepers) & set(order[:8])) >= 7


def test_a_third_of_the_nodes_vanish():
    net, ends = swarm(30, seed=2)
    item = MutableItem.sign(ME, b"", 1, b"x")
    assert net.outcome(ends[0], net.nodes[ends[0]].put(item)).stored_count == 8
    net.down = set(net.rng.sample(ends[2:], 10))
    found = net.outcome(ends[1], net.nodes[ends[1]].get(ME.peer_id, b""))
    assert found.item == item


def test_who_is_read_only_answers_nobody_and_is_remembered_by_nobody():
    net, ends = swarm(10)
    quiet = net.add(200, answers=False)
    net.nodes[quiet].bootstrap(ends[:1], net.now)
    net.run(20)
    assert len(net.nodes[quiet].contacts()) >= 8
    assert all(contact.endpoint != quiet for end in ends for contact in net.nodes[end].contacts())
    assert net.nodes[quiet].statistics().answered_query_count == 0
    item = MutableItem.sign(ME, b"", 1, b"x")
    assert net.outcome(quiet, net.nodes[quiet].put(item)).stored_count == 8


def test_nobody_to_start_from_ends_at_once():
    net = Net(1)
    alone = net.add(1)
    net.nodes[alone].bootstrap([], net.now)
    assert net.outcome(alone, net.nodes[alone].get_peers(HASH)).answered_count == 0
    net.nodes[alone].bootstrap([Endpoint("198.18.9.9", 1), Endpoint("2001:db8::1", 1)], net.now)
    ended = net.outcome(alone, net.nodes[alone].get_peers(HASH), within_s=10)
    assert ended.answered_count == 0
    assert net.queries[alone] == 2


def test_manners(forty):
    net, ends = forty
    before = dict(net.queries)
    net.run(3600)
    rates = [(net.queries[end] - before.get(end, 0)) / 3600 for end in ends]
    assert max(rates) < 0.2, f"{max(rates)} queries a second, doing nothing"
    busy = net.nodes[ends[0]]
    count = net.queries[ends[0]]
    for number in range(20):
        busy.get_peers(number.to_bytes(20, "big"))
    net.run(5)
    assert net.queries[ends[0]] - count <= 20 + 10 * 5 + 1


# Attacks ------------------------------------------------------------------------------------------

STRANGER = Endpoint("203.0.113.9", 5000)


def ask(node: Mainline, method: bytes, source: Endpoint = STRANGER, **arguments):
    fields = {key.encode(): value for key, value in arguments.items()}
    query = Query(b"tt", method, {b"id": b"s" * 20, **fields}, is_read_only=True)
    node.receive_untrusted(query.encode(), source, 0.0)
    [(reply, destination)] = [
        each
        for each in node.datagrams_to_send(0.0)
        if not isinstance(decode_krpc_untrusted(each[0]), Query)
    ]
    assert destination == source
    return decode_krpc_untrusted(reply)


@pytest.fixture
def node() -> Mainline:
    rng = random.Random(1)
    return Mainline(is_ipv6=False, rng=rng, entropy=rng.randbytes, now=0.0, is_read_only=False)


def test_announcing_takes_the_token_of_the_address(node):
    token = ask(node, b"get_peers", info_hash=HASH).values[b"token"]
    elsewhere = Endpoint("203.0.113.10", 5000)
    for source, given in ((elsewhere, token), (STRANGER, b"x" * 8), (STRANGER, b"")):
        reply = ask(node, b"announce_peer", source, info_hash=HASH, port=1, token=given)
        assert reply.code == 203
    ask(node, b"announce_peer", info_hash=HASH, port=1234, token=token)
    assert ask(node, b"get_peers", info_hash=HASH).values[b"values"] == [
        bytes([203, 0, 113, 9, 4, 210])
    ]


def test_only_good_items_are_kept(node):
    token = ask(node, b"get", target=HASH).values[b"token"]
    good = MutableItem.sign(ME, b"", 5, b"x")

    def put(item: MutableItem, **more):
        return ask(
            node, b"put", token=token, k=item.owner.key, sig=item.signature, seq=item.sequence,
            v=item.value[2:], **more,
        )  # fmt: skip

    assert put(replace(good, signature=bytes(64))).code == 206
    assert put(replace(good, owner=EVE.peer_id)).code == 206
    assert put(good, salt=b"s").code == 206
    assert isinstance(put(good), Response)
    assert put(MutableItem.sign(ME, b"", 4, b"x")).code == 302
    assert put(MutableItem.sign(ME, b"", 6, b"x"), cas=4).code == 301
    assert isinstance(put(MutableItem.sign(ME, b"", 6, b"x"), cas=5), Response)
    large = MutableItem(ME.peer_id, b"", 7, bencode(b"x" * 1000), bytes(64))
    assert ask(node, b"put", token=token, k=large.owner.key, sig=bytes(64), seq=7,
               v=b"x" * 1000).code == 206  # fmt: skip
    assert ask(node, b"get", target=good.target).values[b"seq"] == 6


def test_nonsense_gets_an_error_or_nothing(node):
    assert ask(node, b"teleport").code == 204
    assert ask(node, b"find_node", target=b"short").code == 203
    for data in (b"d1:q", b"", bencode({b"t": b"a", b"y": b"q", b"q": b"ping", b"a": {}})):
        node.receive_untrusted(data, STRANGER, 0.0)
    assert node.datagrams_to_send(0.0) == []
    assert node.statistics().rejected_count == 3


def test_an_answer_from_elsewhere_is_nobodys(node):
    seed = Endpoint("203.0.113.1", 1)
    handle = node.bootstrap([seed], 0.0)
    [(data, _)] = node.datagrams_to_send(0.0)
    query = decode_krpc_untrusted(data)
    answer = Response(query.transaction, {b"id": b"x" * 20}).encode()
    node.receive_untrusted(answer, STRANGER, 0.1)
    assert node.contacts() == []
    node.receive_untrusted(answer, seed, 0.1)
    node.receive_untrusted(answer, seed, 0.1)
    assert node.contacts() == [Contact(b"x" * 20, seed)]
    assert node.next_event().handle == handle
    assert node.statistics().rejected_count == 2


def test_a_table_keeps_good_nodes_and_one_for_an_address():
    table = MainlineTable(bytes(20))
    first = [Contact(b"\xff" + bytes([n]) * 19, Endpoint(f"10.0.0.{n + 1}", 1)) for n in range(20)]
    for contact in first:
        table.note_answer(contact, 0.0)
    assert table.contacts() == first[:BUCKET_SIZE]
    table.note_failure(first[0].endpoint)
    table.note_answer(first[9], 10.0)
    assert first[9] not in table.contacts()
    table.note_answer(first[9], GOOD_FOR_S)
    assert first[9] in table.contacts()
    table.note_failure(first[1].endpoint)
    table.note_failure(first[1].endpoint)
    assert first[1] not in table.contacts()
    crowded = MainlineTable(bytes(20))
    for number in range(20):
        contact = Contact(bytes([number + 1]) * 20, Endpoint("203.0.113.1", number + 1))
        crowded.note_answer(contact, 0.0)
    assert len(crowded) == 1


# Files --------------------------------------------------------------------------------------------


def test_nodes_in_files_of_clients():
    four, six = bytes([203, 0, 113, 7, 26, 225]), bytes.fromhex("20010db8" + "00" * 11 + "071ae1")
    expected = [Endpoint("203.0.113.7", 6881), Endpoint("2001:db8::7", 6881)]
    for content in (
        {b"id": bytes(20), b"nodes": four, b"nodes6": six},
        {b"dht state": {b"nodes": [four], b"nodes6": [six], b"node-id": bytes(20)}},
        {b"settings": {b"x": 1}, b"dht state": {b"nodes": [bytes(20) + four], b"nodes6": [six]}},
    ):
        assert nodes_in_file_untrusted(bencode(content)) == expected
    for bad in ({}, {b"nodes": 5}, {b"nodes": b"12345"}, [], {b"nodes": bytes(6)}):
        with pytest.raises(DecodeError):
            nodes_in_file_untrusted(bencode(bad))
