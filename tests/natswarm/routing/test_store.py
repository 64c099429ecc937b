"""Records: genuine, alive and latest, or not kept and not served."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.errors import DecodeError, RequestRefused
from natswarm.identity import Identity
from natswarm.routing import store as store_module
from natswarm.routing.record import (
    LIFETIME_MAX_S,
    SKEW_S,
    Record,
    RecordKind,
    decode_published_untrusted,
    own_key,
    service_key,
)
from natswarm.routing.store import PER_KEY_MAX, PER_PUBLISHER_MAX, RecordStore

ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
NOW = 1_700_000_000.0
RECORD = Record(ALICE.peer_id, RecordKind.OWN, "profile", 7, NOW + 3600, b"value")


@pytest.fixture
def store() -> RecordStore:
    return RecordStore(bytes(32), random.Random(1))


@given(
    st.sampled_from(RecordKind),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=128),
    st.integers(0, 2**63 - 1),
    st.binary(max_size=1000),
)
def test_round_trip(kind, topic, version, value):
    record = Record(ALICE.peer_id, kind, topic, version, NOW, value)
    assert decode_published_untrusted(record.seal(ALICE)) == record


@given(st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_is_noticed(at, bit):
    sealed = bytearray(RECORD.seal(ALICE))
    sealed[at % len(sealed)] ^= 1 << bit
    with pytest.raises(DecodeError):
        decode_published_untrusted(bytes(sealed))


@given(st.binary(max_size=300))
def test_garbage_is_a_decode_error(data):
    with pytest.raises(DecodeError):
        decode_published_untrusted(data)


@pytest.mark.parametrize(
    "change", [{"value": bytes(1001)}, {"topic": "x" * 129}, {"topic": "\x1b"}, {"version": -1}]
)
def test_bounds(change):
    record = replace(RECORD, **change)
    assert record.complaint() is not None
    with pytest.raises(DecodeError):
        decode_published_untrusted(record.seal(ALICE))


def test_keys():
    assert RECORD.key == own_key(ALICE.peer_id, "profile")
    assert own_key(BOB.peer_id, "profile") != own_key(ALICE.peer_id, "profile")
    service = replace(RECORD, kind=RecordKind.SERVICE)
    assert service.key == service_key("profile") != RECORD.key


def test_an_old_version_is_never_served(store):
    new, old = replace(RECORD, version=8, value=b"new"), RECORD
    for record in (old, new, old):
        store.put(record.seal(ALICE), NOW)
    assert store.get(RECORD.key, NOW) == (new.seal(ALICE),)
    # Nor after the new one has expired, while the old one could still be alive.
    brief = replace(RECORD, version=9, expires_at_s=NOW + 60)
    store.put(brief.seal(ALICE), NOW)
    assert store.get(RECORD.key, NOW + 61) == ()
    store.put(new.seal(ALICE), NOW + 61)
    assert store.get(RECORD.key, NOW + 61) == ()
    store.forget_old(NOW + LIFETIME_MAX_S)
    assert len(store) == 0


def test_two_records_of_one_version_end_the_same_everywhere(store):
    one, two = (replace(RECORD, value=value).seal(ALICE) for value in (b"one", b"two"))
    other = RecordStore(bytes(32), random.Random(2))
    for sealed in (one, two):
        store.put(sealed, NOW)
    for sealed in (two, one):
        other.put(sealed, NOW)
    assert store.get(RECORD.key, NOW) == other.get(RECORD.key, NOW)


def test_a_bad_signature_is_refused(store):
    forged = bytearray(RECORD.seal(BOB))
    forged[:32] = ALICE.peer_id.key
    with pytest.raises(RequestRefused, match="signature"):
        store.put(bytes(forged), NOW)
    assert store.refused_count == 1
    assert store.get(RECORD.key, NOW) == ()


def test_dates_out_of_range_are_refused_and_say_whose_clock(store):
    with pytest.raises(RequestRefused, match=r"expired 5 s ago by my clock"):
        store.put(replace(RECORD, expires_at_s=NOW - 5).seal(ALICE), NOW)
    with pytest.raises(RequestRefused, match="lives too long by my clock"):
        store.put(replace(RECORD, expires_at_s=NOW + LIFETIME_MAX_S + SKEW_S + 1).seal(ALICE), NOW)


def test_one_publisher_fills_a_share_and_no_more(store):
    for index in range(PER_PUBLISHER_MAX):
        store.put(replace(RECORD, topic=str(index)).seal(ALICE), NOW)
    with pytest.raises(RequestRefused, match="of one publisher"):
        store.put(replace(RECORD, topic="more").seal(ALICE), NOW)
    store.put(replace(RECORD, topic="0", version=8).seal(ALICE), NOW)  # a new version is not more
    store.put(replace(RECORD, publisher=BOB.peer_id).seal(BOB), NOW)


def test_a_service_that_many_serve_is_a_bounded_sample(store):
    record = replace(RECORD, kind=RecordKind.SERVICE, topic="llmload/stage/4-7", value=bytes(100))
    for index in range(PER_KEY_MAX + 10):
        identity = Identity(index.to_bytes(32, "big"))
        store.put(replace(record, publisher=identity.peer_id).seal(identity), NOW)
    assert len(store) == PER_KEY_MAX
    samples = {store.get(record.key, NOW) for _ in range(5)}
    assert len(samples) == 5
    assert all(sum(map(len, sample)) <= store_module.ANSWER_BYTES_MAX for sample in samples)
    publishers = {decode_published_untrusted(each).publisher for each in next(iter(samples))}
    assert len(publishers) > 5


def test_a_full_store_keeps_what_is_nearest(store, monkeypatch):
    monkeypatch.setattr(store_module, "RECORDS_MAX", 10)
    records = []
    for index in range(30):
        identity = Identity(index.to_bytes(32, "big"))
        record = replace(RECORD, publisher=identity.peer_id)
        records.append(record)
        try:
            store.put(record.seal(identity), NOW)
        except RequestRefused as error:
            assert "nearer ones" in str(error)  # noqa: PT017 - some are refused, some are not
    assert len(store) == 10
    kept = {stored.record.key for stored in store.alive(NOW)}
    assert kept == set(sorted(record.key for record in records)[:10])
