"""Records: signed, named by content, bounded; and texts that are nearly the same."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmload.data.near import HASH_COUNT, SHINGLE_BYTES, band_keys, normalise, resemblance
from llmload.data.near import signature as sign_text
from llmload.data.record import (
    RECORD_BYTES_MAX,
    TEXT_BYTES_MAX,
    FeedbackRecord,
    TextRecord,
    cut_text,
    open_record_untrusted,
    sign_record,
)
from natswarm import DecodeError, Identity

ME = Identity(bytes(range(32)))
RECORD = TextRecord("the peers of the mesh", "CC0-1.0", "en", "notes")


@pytest.mark.parametrize("record", [RECORD, FeedbackRecord("ask", "say", -1, "CC0-1.0")])
def test_what_was_signed_is_read(record):
    signed = sign_record(ME, record)
    assert open_record_untrusted(signed.sealed) == signed
    assert (signed.author, signed.record) == (ME.peer_id, record)


def test_the_format_is_this():
    """An id that changes makes all records of all devices strangers."""
    signed = sign_record(ME, RECORD)
    assert signed.record_id.hex() == (
        "2bc39793fae341999a557afe90b446cecfdd2077c05f1923b2f2437e256b3ee2"
    )
    assert signed.sealed[96:] == (
        b"\x85\xa4type\xaaTextRecord\xa4text\xb5the peers of the mesh"
        b"\xa7licence\xa7CC0-1.0\xa8language\xa2en\xa5title\xa5notes"
    )


def test_ids_are_of_author_and_content():
    ids = {
        sign_record(identity, record).record_id
        for identity in (ME, Identity(bytes(32)))
        for record in (RECORD, TextRecord(RECORD.text), FeedbackRecord("", RECORD.text, 1))
    }
    assert len(ids) == 6


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damage_is_a_decode_error_and_nothing_else(data):
    sealed = bytearray(sign_record(ME, RECORD).sealed)
    if data.draw(st.booleans()):
        del sealed[data.draw(st.integers(0, len(sealed) - 1)) :]
    else:
        sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DecodeError):
        open_record_untrusted(bytes(sealed))


def test_what_is_too_long_is_neither_signed_nor_read():
    assert sign_record(ME, TextRecord("é" * (TEXT_BYTES_MAX // 2)))
    for record in (
        TextRecord("é" * (TEXT_BYTES_MAX // 2) + "x"),
        FeedbackRecord("x" * TEXT_BYTES_MAX, "y", 1),
        TextRecord("x", title="x" * 201),
        TextRecord(""),
    ):
        with pytest.raises(ValueError, match=r"at most|length"):
            sign_record(ME, record)
    with pytest.raises(DecodeError, match="at most"):
        open_record_untrusted(bytes(RECORD_BYTES_MAX + 1))


@given(st.text(alphabet="ab \né€😀", max_size=200), st.integers(4, 40))
def test_the_pieces_are_the_text(text, bytes_max):
    pieces = list(cut_text(text, bytes_max))
    assert all(0 < len(piece.encode()) <= bytes_max for piece in pieces)
    # Only white space may be missing.
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_pieces_end_with_paragraphs():
    paragraphs = ["a" * 30 + "\n\n", "b" * 30 + "\n\n", "c" * 10]
    assert list(cut_text("".join(paragraphs), 64)) == ["".join(paragraphs[:2]), paragraphs[2]]


# --- Nearly the same -----------------------------------------------------------------------------


def words(rng, count):
    return [f"{rng.choice('bcdfgklmnprst')}{rng.choice('aeiou')}{rng.randrange(99)}"
            for _ in range(count)]  # fmt: skip


def shared_shingles(one, other):
    sets = [
        {data[i : i + SHINGLE_BYTES] for i in range(len(data) - SHINGLE_BYTES + 1)}
        for data in (normalise(one), normalise(other))
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_the_share_of_common_shingles():
    rng = random.Random(3)
    errors = []
    for changed in range(0, 60, 2):
        text = words(rng, 300)
        other = list(text)
        for index in rng.sample(range(300), changed):
            other[index] = "changed"
        one, other = " ".join(text), " ".join(other)
        truth = shared_shingles(one, other)
        estimate = resemblance(sign_text(one), sign_text(other))
        deviation = np.sqrt(truth * (1 - truth) / HASH_COUNT)
        errors.append((estimate - truth) / max(deviation, 1e-9) if deviation else 0)
    assert np.abs(errors).max() < 4
    assert np.sqrt(np.mean(np.square(errors))) < 1.5


def test_a_few_changed_words_are_nearly_the_same_and_another_text_is_not():
    rng = random.Random(4)
    text = words(rng, 1000)
    edited = [*text[:500], "inserted", *text[500:990], "and", "an", "end"]
    one, near, far = (sign_text(" ".join(each)) for each in (text, edited, words(rng, 1000)))
    assert resemblance(one, near) >= 0.8
    assert set(band_keys(one)) & set(band_keys(near))
    assert resemblance(one, far) < 0.2
    assert not set(band_keys(one)) & set(band_keys(far))
    # Case and white space are no difference at all; short texts have a signature, too.
    upper = sign_text("  ".join(text).upper())
    assert resemblance(one, upper) == 1
    assert sign_text("a").shape == sign_text("").shape == (HASH_COUNT,)
