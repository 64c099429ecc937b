"""Texts go both ways between stores; private ones never, and lies are found out."""

from __future__ import annotations

import random
import sys
import zlib
from pathlib import Path

import pytest
import trio

from llmload.data import exchange as exchange_module
from llmload.data.barter import LIES_MAX, BarterLimits
from llmload.data.exchange import TextExchange
from llmload.data.protocol import (
    TEXTS,
    GivenText,
    Offer,
    Offers,
    WantTexts,
    offer_of,
    open_given_untrusted,
    pack,
)
from llmload.data.record import FeedbackRecord, TextRecord, sign_record
from llmload.data.sketch import make_sketch
from llmload.data.store import RecordStore
from natswarm import DecodeError, Identity, RequestRefused

sys.path.append(str(Path(__file__).parent))
from fake_mesh import FakeMesh

TIMEOUT_S = 30


def text(number, licence="CC0-1.0", words=60):
    rng = random.Random(number)
    said = " ".join(f"{number}-{rng.randrange(10**6)}" for _ in range(words))
    return sign_record(Identity(bytes(32)), TextRecord(said, licence))


@pytest.fixture
def mesh(nursery):
    return FakeMesh(nursery)


@pytest.fixture
def make(mesh, tmp_path, monkeypatch):
    """A function that puts an exchange on a node of its own, answering whoever asks how often."""
    monkeypatch.setattr(exchange_module, "ANSWER_EVERY_S", 0)

    def make(name, *, limits=None, novelty=len, worth=lambda _peer: 1.0):
        async def novelties(samples):
            return [float(novelty(sample)) for sample in samples]

        node, store = mesh.node(name), RecordStore(tmp_path / f"{name}.sqlite")
        found = TextExchange(
            node,
            store,
            lambda: [each for each in mesh.nodes if each != node.peer_id],
            novelties,
            worth,
            limits=limits,
            rng=random.Random(1),
        )
        found.start()
        found.node, found.store = node, store  # for the tests
        return found

    return make


async def ask(asker, giver):
    with trio.fail_after(TIMEOUT_S):
        return await asker.ask(await asker.node.connect(giver.node.peer_id))


def kept(exchange):
    return {each.signed.record_id for each in exchange.store.records()}


def ids(records):
    return {each.record_id for each in records}


async def test_what_one_lacks_it_gets_and_gives_on(make):
    a, b, c = make("a"), make("b"), make("c")
    ours, theirs = [text(n) for n in range(4)], [text(n) for n in range(2, 7)]
    a.store.add(ours, is_shared=True)
    b.store.add(theirs, is_shared=True)
    assert await ask(a, b) == 3
    assert await ask(a, b) == 0  # nothing is sent twice
    assert kept(a) == ids([*ours, *theirs])
    report = a.reports[b.node.peer_id]
    assert (report.taken, report.repeated, report.refused) == (3, 0, 0)
    assert report.received_bytes == b.reports[a.node.peer_id].sent_bytes > 0
    # Signed by their authors, they go on from hand to hand.
    assert await ask(c, a) == 7
    assert kept(c) == kept(a)


async def test_what_is_here_already_under_another_name_is_given_once(make):
    a, b = make("a"), make("b")
    ours = text(1)
    copy = sign_record(Identity(bytes(range(32))), ours.record)
    a.store.add([ours])
    b.store.add([copy], is_shared=True)
    assert await ask(a, b) == 0
    report = a.reports[b.node.peer_id]
    assert (report.taken, report.repeated) == (0, 1)
    received = report.received_bytes
    assert await ask(a, b) == 0
    assert report.received_bytes == received


async def test_what_came_before_a_call_failed_is_kept(make, mesh):
    a, giver = make("a"), mesh.node("giver")

    async def answer(call):
        await call.receive()
        await call.send(Offers((offer_of(text(1)), offer_of(text(2))), 10**6))
        await call.receive()
        await call.send(GivenText(text(1).record_id), pack(text(1)))
        raise RequestRefused("the battery is empty")

    giver.serve_calls(TEXTS, answer)
    with trio.fail_after(TIMEOUT_S):
        assert await a.ask(await a.node.connect(giver.peer_id)) == 1
    assert kept(a) == {text(1).record_id}


async def test_feedback_travels_too(make):
    a, b = make("a"), make("b")
    mark = sign_record(Identity(bytes(32)), FeedbackRecord("why?", "because", -1, "CC0-1.0"))
    b.store.add([mark], is_shared=True)
    assert await ask(a, b) == 1
    assert kept(a) == {mark.record_id}


async def test_what_is_private_never_leaves_whatever_is_asked(make):
    a, b = make("a"), make("b")
    private, public = text(1), text(2)
    b.store.add([private])
    b.store.add([public], is_shared=True)
    assert await ask(a, b) == 1
    assert kept(a) == {public.record_id}
    peer = await a.node.connect(b.node.peer_id)
    async with peer.start_call(TEXTS, *make_sketch([], random.Random(1))) as call:
        offers, _ = await call.receive()
        assert {offer.record_id for offer in offers.offers} == {public.record_id}
        await call.send(WantTexts((private.record_id,)))
        with pytest.raises(RequestRefused, match="not offered"):
            await call.receive()


async def test_who_gives_nothing_gets_the_present_and_no_more(make):
    size = len(pack(text(0)))
    limits = BarterLimits(gift_bytes=int(3.5 * size), gift_bytes_per_s=0)
    a, b = make("a", limits=limits), make("b", limits=limits)
    a.store.add([text(n) for n in range(20)], is_shared=True)
    assert await ask(b, a) == 3
    assert await ask(b, a) == 0
    # It gives two texts, and is paid.
    b.store.add([text(n) for n in range(20, 22)], is_shared=True)
    assert await ask(a, b) == 2
    assert await ask(b, a) > 2


async def test_those_are_taken_that_are_newest_to_our_model(make):
    size = len(pack(text(10)))
    a = make("a", limits=BarterLimits(taken_bytes_max=int(3.5 * size)),
             novelty=lambda sample: int(sample.split("-")[0]))  # fmt: skip
    b = make("b")
    records = [text(n) for n in range(10, 20)]
    b.store.add(records, is_shared=True)
    assert await ask(a, b) == 3
    assert kept(a) == ids(records[-3:])


async def test_of_useless_sources_little_is_taken_and_nothing_passed_on(make):
    worths = {}
    a = make("a", worth=lambda peer: worths.get(peer, 1.0))
    b, c = make("b"), make("c")
    b.store.add([text(n) for n in range(4)], is_shared=True)
    assert await ask(a, b) == 4
    worths[b.node.peer_id] = 0.0
    a.store.add([text(9)], is_shared=True)
    assert await ask(c, a) == 1
    assert kept(c) == {text(9).record_id}


LIES = {
    "another record": lambda offer: (GivenText(offer.record_id), pack(text(99))),
    "a bent signature": lambda offer: (
        GivenText(offer.record_id),
        pack(text(1))[:-1] + bytes([pack(text(1))[-1] ^ 1]),
    ),
    "no zlib": lambda offer: (GivenText(offer.record_id), b"text"),
    "a bomb": lambda offer: (
        GivenText(offer.record_id),
        zlib.compress(bytes(10_000_000), 9)[:10_000],
    ),
    "never asked for": lambda _offer: (GivenText(bytes(32)), pack(text(1))),
    "not licensed": lambda _offer: (
        GivenText(text(1, "").record_id),
        pack(text(1, "")),
    ),
}


@pytest.mark.parametrize("lie", LIES)
async def test_lies_are_refused_counted_and_in_the_end_not_listened_to(make, mesh, lie):
    a, liar = make("a"), mesh.node("liar")
    offered = offer_of(text(1, "" if lie == "not licensed" else "CC0-1.0"))

    async def answer(call):
        await call.receive()
        await call.send(Offers((offered,), 10**6))
        await call.receive()
        await call.send(*LIES[lie](offered))

    liar.serve_calls(TEXTS, answer)
    peer = await a.node.connect(liar.peer_id)
    with trio.fail_after(TIMEOUT_S):
        for count in range(1, LIES_MAX + 1):
            assert await a.ask(peer) == 0
            assert a.reports[liar.peer_id].refused == count
        with pytest.raises(RequestRefused, match="no records"):
            await a.ask(peer)
    assert kept(a) == set()


async def test_who_asks_too_often_is_refused(make, monkeypatch):
    a, b = make("a"), make("b")
    monkeypatch.setattr(exchange_module, "ANSWER_EVERY_S", 1000)
    b.store.add([text(1)], is_shared=True)
    assert await ask(a, b) == 1
    with pytest.raises(RequestRefused, match="one such call"):
        await ask(a, b)
    assert await ask(make("c"), a) == 1  # others are not kept waiting by it


async def test_who_never_chooses_is_let_go(make, monkeypatch):
    monkeypatch.setattr(exchange_module, "ASK_TIMEOUT_S", 0.1)
    a, b = make("a"), make("b")
    peer = await a.node.connect(b.node.peer_id)
    with trio.fail_after(TIMEOUT_S):
        async with peer.start_call(TEXTS, *make_sketch([], random.Random(1))) as call:
            await call.receive()
            with pytest.raises(trio.EndOfChannel):
                await call.receive()


async def test_messages_out_of_turn_are_refused(make):
    a, b = make("a"), make("b")
    peer = await a.node.connect(b.node.peer_id)
    with trio.fail_after(TIMEOUT_S):
        async with peer.start_call(TEXTS, WantTexts(())) as call:
            with pytest.raises(RequestRefused, match="before there were offers"):
                await call.receive()
        sketch, bits = make_sketch([], random.Random(1))
        async with peer.start_call(TEXTS, sketch, bits) as call:
            await call.receive()
            await call.send(sketch, bits)
            with pytest.raises(RequestRefused, match="in place of a choice"):
                await call.receive()


async def test_partners_are_asked_in_turn_and_silent_ones_hold_up_nobody(make, mesh, monkeypatch):
    monkeypatch.setattr(exchange_module, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(exchange_module, "ASK_TIMEOUT_S", 0.5)
    a, b, c = make("a"), make("b"), make("c")
    b.store.add([text(1)], is_shared=True)
    c.store.add([text(2)], is_shared=True)
    silent = mesh.node("silent")

    async def never_answer(_call):
        await trio.sleep_forever()

    silent.serve_calls(TEXTS, never_answer)
    mesh.node("knows nothing of texts")
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.run)
            while kept(a) != {text(1).record_id, text(2).record_id}:  # noqa: ASYNC110
                await trio.sleep(0.05)  # nothing tells of it; it takes a few turns
            nursery.cancel_scope.cancel()


async def test_a_store_that_fails_is_nobody_elses_affair(make, tmp_path):
    a, b = make("a"), make("b")
    (tmp_path / "b.sqlite").write_text("damaged")
    with pytest.raises(RequestRefused, match="no texts to give") as refused:
        await ask(a, b)
    assert str(tmp_path) not in str(refused.value)


def test_an_offer_that_has_grown_is_refused():
    signed = text(1)
    smaller = Offer(signed.record_id, "text", 10, "")
    other = Offer(signed.record_id, "feedback", 5000, "")
    elsewhere = Offer(signed.record_id, "text", 5000, "another beginning")
    for offer in (smaller, other, elsewhere):
        with pytest.raises(DecodeError, match="not as it was offered"):
            open_given_untrusted(offer, pack(signed))
