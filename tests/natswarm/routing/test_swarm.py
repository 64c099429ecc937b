"""Whole swarms on the bare heap: joining, churn, disasters, liars; each with the seed it prints."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.identity import Identity
from natswarm.message import encode_message
from natswarm.routing import protocol
from natswarm.routing.overlay import LinkUnwanted, LookupEnded, Overlay
from natswarm.routing.protocol import (
    BODY_BYTES_MAX,
    Accepted,
    Answered,
    Declined,
    Fetch,
    Fetched,
    Forward,
    Goodbye,
    Mode,
    Neighbours,
    Replicate,
    Sampled,
    digest_of,
    open_answer_untrusted,
    seal_answer,
    seal_request,
)
from natswarm.routing.record import RecordKind, decode_published_untrusted, own_key, service_key
from tools.bench.simulated_swarm import (
    NatClass,
    SimulatedNode,
    SimulatedSwarm,
)
from tools.bench.sybils import SybilNode, add_sybils

ALICE, BOB, CAROL = (Identity(letter * 32) for letter in (b"a", b"b", b"c"))
NOW = 1_700_000_000.0


class Hole(SimulatedNode):
    """Links, and reacts to no request at all."""

    def receive(self, message, sender):
        if not isinstance(message, Forward):
            super().receive(message, sender)


def grown(seed: int, count: int, **options) -> SimulatedSwarm:
    print(f"swarm seed {seed}")
    swarm = SimulatedSwarm(seed, **options)
    swarm.add()
    swarm.grow(count - 1, every_s=0.5)
    swarm.world.run_for(120)
    return swarm


def found(swarm, pairs) -> float:
    """Return the share of pairs of which one finds the other."""
    watched = []
    for one, other in pairs:
        name = one.overlay.ask(other.peer_id, b"hello", swarm.now)
        watched.append(swarm.watch(one, name))
        swarm.world.run_for(0.05)
    swarm.world.run_for(30)
    return sum(bool(each.answers) for each in watched) / len(watched)


def publish(swarm, node, topic: str, value: bytes, *, kind=RecordKind.OWN):
    watched = swarm.watch(node, node.overlay.publish(kind, topic, value, swarm.now))
    swarm.world.run_for(15)
    return watched


def fetch(swarm, node, key: bytes):
    watched = swarm.watch(node, node.overlay.fetch(key, swarm.now))
    swarm.world.run_for(15)
    return [
        decode_published_untrusted(sealed)
        for given in watched.answers
        for sealed in given.answer.records
    ]


def random_pairs(swarm, count: int):
    nodes = [node for node in swarm.alive() if not isinstance(node, (SybilNode, Hole))]
    return [tuple(swarm.rng.sample(nodes, 2)) for _ in range(count)]


def test_everybody_finds_everybody_though_each_joined_through_one():
    swarm = grown(1, 24)
    nodes = swarm.alive()
    assert found(swarm, [(a, b) for a in nodes for b in nodes if a is not b]) == 1.0
    assert max(len(node.overlay.table) for node in nodes) <= 30


def test_few_links_are_enough():
    swarm = grown(2, 60, links_max=16)
    assert found(swarm, random_pairs(swarm, 200)) >= 0.99
    # Newcomers' first links come on top, for a minute.
    assert max(len(node.overlay.table) for node in swarm.alive()) <= 18


def test_a_record_is_found_by_all_and_only_its_latest_version():
    swarm = grown(3, 40)
    publisher, *readers = swarm.alive()
    publish(swarm, publisher, "profile", b"one")
    watched = publish(swarm, publisher, "profile", b"two")
    assert max(given.answer.replica_count for given in watched.answers) == 7
    key = own_key(publisher.peer_id, "profile")
    for reader in readers:
        records = fetch(swarm, reader, key)
        assert max(records, key=lambda record: record.version).value == b"two"
    # Replicas that missed the new version learn of it within minutes.
    swarm.world.run_for(600)
    for reader in readers[:10]:
        assert {record.value for record in fetch(swarm, reader, key)} == {b"two"}
    assert fetch(swarm, readers[0], own_key(publisher.peer_id, "nothing")) == []


def test_a_service_is_found_by_its_name():
    swarm = grown(4, 30)
    servers = swarm.alive()[:5]
    for server in servers:
        publish(swarm, server, "llmload/stage/4-7", b"", kind=RecordKind.SERVICE)
    records = fetch(swarm, swarm.alive()[20], service_key("llmload/stage/4-7"))
    assert {record.publisher for record in records} == {server.peer_id for server in servers}


def test_records_move_to_newcomers_and_outlive_their_replicas():
    swarm = grown(5, 40)
    publisher = swarm.alive()[7]
    publish(swarm, publisher, "profile", b"value")
    key = own_key(publisher.peer_id, "profile")
    for _ in range(4):
        for node in swarm.nearest(key, 4):
            if node is not publisher:
                swarm.remove(node)
        swarm.grow(3, every_s=1.0)
        swarm.world.run_for(90)
    reader = next(node for node in swarm.alive() if node is not publisher)
    assert [record.value for record in fetch(swarm, reader, key)][:1] == [b"value"]


def test_a_record_expires_with_its_publisher_and_is_renewed_without():
    swarm = grown(6, 12)
    gone, stays, reader = swarm.alive()[3:6]
    for node in (gone, stays):
        publish(swarm, node, "profile", b"value")
    swarm.remove(gone)
    swarm.world.run_for(3700)
    assert fetch(swarm, reader, own_key(gone.peer_id, "profile")) == []
    assert fetch(swarm, reader, own_key(stays.peer_id, "profile"))
    stays.overlay.withdraw(RecordKind.OWN, "profile")
    swarm.world.run_for(3700)
    assert fetch(swarm, reader, own_key(stays.peer_id, "profile")) == []


def test_churn_is_survived():
    swarm = grown(7, 40)
    watched = []
    for _ in swarm.churn(300, median_session_s=600):
        one, other = swarm.rng.sample(swarm.alive(), 2)
        name = one.overlay.ask(other.peer_id, b"hello", swarm.now)
        watched.append((other, swarm.watch(one, name)))
    swarm.world.run_for(30)
    answers = [bool(each.answers) for other, each in watched if other.is_alive]
    assert len(answers) > 200
    assert sum(answers) / len(answers) >= 0.99


def test_a_third_vanishes_at_once():
    swarm = grown(8, 45)
    for node in swarm.rng.sample(swarm.alive(), 15):
        swarm.remove(node)
    swarm.world.run_for(45)
    assert found(swarm, random_pairs(swarm, 200)) >= 0.99


def test_a_partition_heals():
    swarm = grown(9, 24)
    swarm.split(2)
    swarm.world.run_for(600)
    sides = {node.peer_id: node.side for node in swarm.alive()}
    swarm.split(1)
    swarm.world.run_for(720)  # the longest pause of who tries again, and what follows from it
    across = [(a, b) for a, b in random_pairs(swarm, 300) if sides[a.peer_id] != sides[b.peer_id]]
    assert found(swarm, across) == 1.0


def test_two_swarms_become_one_where_two_of_their_nodes_meet():
    swarm = grown(14, 15)
    first = swarm.alive()
    founder = swarm.add()
    for _ in range(14):
        swarm.add(founder)
        swarm.world.run_for(0.5)
    swarm.world.run_for(120)
    assert found(swarm, [(first[0], founder)]) == 0.0
    founder.link(first[0])
    swarm.world.run_for(240)
    second = [node for node in swarm.alive() if node not in first]
    across = [swarm.rng.sample((a, b), 2) for a in first for b in second]
    assert found(swarm, across) == 1.0


def test_sybils_spoil_little():
    swarm = grown(10, 40)
    add_sybils(swarm, 10)
    swarm.world.run_for(120)
    assert found(swarm, random_pairs(swarm, 100)) >= 0.97
    honest = [node for node in swarm.alive() if not isinstance(node, SybilNode)]
    right = 0
    for node in honest[:10]:
        publish(swarm, node, "profile", b"value")
    for index in range(30):
        key = own_key(honest[index % 10].peer_id, "profile")
        right += bool(fetch(swarm, swarm.rng.choice(honest), key))
    assert right >= 27


def test_who_does_not_react_is_no_obstacle():
    swarm = grown(11, 30)
    contact = swarm.alive()[0]
    hole = swarm.add(contact, node_type=Hole)
    hole.nat = NatClass.OPEN
    swarm.world.run_for(60)
    assert len(hole.connected) > 5
    assert found(swarm, random_pairs(swarm, 200)) == 1.0
    silent = [node.overlay.router.statistics.silent_count for node in swarm.alive()]
    assert sum(silent) > 0, "nobody asked it anything"


def test_walks_reach_all_nodes_alike():
    swarm = grown(12, 16)
    counts: Counter = Counter()
    watched = []
    for index in range(500):
        node = swarm.alive()[index % 3]  # wherever they begin
        watched.append(swarm.watch(node, node.overlay.sample(swarm.now)))
        swarm.world.run_for(0.3)
    swarm.world.run_for(30)
    for each in watched:
        if each.answers:
            assert isinstance(each.answers[0].answer, Sampled)
            counts[each.answers[0].signer] += 1
    total = sum(counts.values())
    assert total >= 0.98 * 500
    expected = total / 16
    chi_squared = sum((counts[node.peer_id] - expected) ** 2 / expected for node in swarm.alive())
    assert chi_squared < 37.7  # 15 degrees of freedom, one in a thousand


def test_a_seed_replays_a_swarm():
    first, second = (grown(13, 20) for _ in range(2))
    assert first.by_kind == second.by_kind
    assert first.world.event_count == second.world.event_count


# One overlay, by hand -----------------------------------------------------------------------------


def overlay_with(*identities: Identity) -> Overlay:
    overlay = Overlay(ALICE, rng=random.Random(1))
    for identity in identities:
        overlay.link_up(identity.peer_id, NOW)
    overlay.messages_to_send()
    return overlay


def forward(request: bytes, target: bytes, lookup: bytes = b"l" * 16) -> Forward:
    return Forward(1, Mode.CLOSEST, lookup, target, request, 10, 0, 5000)


def test_a_request_that_is_forged_or_put_under_another_name_is_declined():
    near = ALICE.peer_id.key  # nobody is nearer than we are
    genuine = seal_request(BOB, Fetch(b"l" * 16, near))
    for request, lookup in (
        (CAROL.peer_id.key + genuine[32:], b"l" * 16),
        (genuine, b"m" * 16),
        (b"", b"n" * 16),
    ):
        overlay = overlay_with(BOB)
        overlay.receive_untrusted(forward(request, near, lookup), BOB.peer_id, NOW)
        assert [type(message) for _, message in overlay.messages_to_send()] == [Declined]
        assert overlay.rejected_count == 1
    overlay = overlay_with(BOB)
    overlay.receive_untrusted(forward(genuine, near), BOB.peer_id, NOW)
    ((_, message),) = overlay.messages_to_send()
    signer, answer = open_answer_untrusted(message.answer, digest_of(genuine))
    assert (signer, answer.records) == (ALICE.peer_id, ())


def test_strangers_and_unlinked_peers_are_not_heard():
    overlay = overlay_with(BOB)
    overlay.receive_untrusted(Neighbours((bytes(32),)), CAROL.peer_id, NOW)
    assert overlay.messages_to_send() == []
    assert overlay.table.wanted(NOW) == []


def test_goodbye_ends_the_link_and_tells_of_others():
    overlay = overlay_with(BOB)
    overlay.receive_untrusted(Goodbye((CAROL.peer_id.key,)), BOB.peer_id, NOW)
    assert overlay.events.popleft() == LinkUnwanted(BOB.peer_id, "the peer has too many links")
    assert overlay.table.wanted(NOW) == [CAROL.peer_id.key]


def test_a_neighbour_that_reacts_to_no_request_is_given_up():
    overlay = overlay_with(BOB, CAROL)
    now = NOW
    for _ in range(3):
        overlay.ask(Identity(b"d" * 32).peer_id, b"hello", now)
        for _ in range(10):
            now += 1.0
            overlay.handle_timer(now)
            for peer_id, message in overlay.messages_to_send():
                if isinstance(message, Forward) and peer_id == BOB.peer_id:
                    overlay.receive_untrusted(Accepted(message.label), BOB.peer_id, now)
    given_up = [event for event in overlay.events if isinstance(event, LinkUnwanted)]
    assert given_up == [LinkUnwanted(CAROL.peer_id, "it does not react to requests")]


def test_without_neighbours_lookups_end_empty_and_in_time():
    overlay = Overlay(ALICE, rng=random.Random(1))
    name = overlay.ask(BOB.peer_id, b"hello", NOW)
    while (due := overlay.next_timer()) < NOW + 60 and not overlay.events:
        overlay.handle_timer(due)
    assert overlay.events.popleft() == LookupEnded(name, ())
    with pytest.raises(ValueError, match="does not ask itself"):
        overlay.ask(ALICE.peer_id, b"hello", NOW)


MESSAGES = st.one_of(
    st.builds(
        Forward,
        label=st.integers(-1, 5),
        mode=st.integers(-1, 4),
        lookup=st.binary(min_size=15, max_size=16),
        target=st.sampled_from([bytes(32), ALICE.peer_id.key, b"x"]),
        request=st.binary(max_size=150),
        hops_left=st.integers(-1, 34),
        detours_left=st.integers(-1, 3),
        patience_ms=st.integers(-1, 20_000),
        degree=st.integers(-1, 40),
    ),
    st.builds(Accepted, st.integers(-1, 5)),
    st.builds(Answered, st.integers(-1, 5), st.binary(max_size=150)),
    st.builds(Declined, st.integers(-1, 5), st.integers(-1, 9)),
    st.builds(Neighbours, st.lists(st.binary(min_size=31, max_size=32), max_size=10).map(tuple)),
    st.builds(Replicate, st.lists(st.binary(max_size=150), max_size=6).map(tuple)),
)


@given(st.lists(st.tuples(MESSAGES, st.sampled_from([BOB, CAROL]), st.floats(0, 5)), max_size=40))
def test_whatever_neighbours_say_nothing_breaks_and_all_is_bounded(script):
    overlay = overlay_with(BOB, CAROL)
    overlay.fetch(bytes(32), NOW)
    now = NOW
    for message, identity, pause_s in script:
        now += pause_s
        overlay.receive_untrusted(message, identity.peer_id, now)
        if overlay.next_timer() <= now:
            overlay.handle_timer(now)
        for _, sent in overlay.messages_to_send():
            assert len(encode_message(sent)) <= BODY_BYTES_MAX + 256
    assert len(overlay.router) <= len(script) + protocol.HOPS_MAX
    assert len(overlay.store) == 0


def test_the_largest_answers_fit_the_bound():
    digest = bytes(16)
    ids = tuple(bytes(32) for _ in range(8))
    answer = Fetched(digest, (bytes(2048), bytes(2048)), ids)
    assert len(seal_answer(ALICE, answer)) <= BODY_BYTES_MAX
