"""Invites survive copy and paste; whatever else is damaged or forged is an InviteError in words."""

from __future__ import annotations

import base64
import random
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import segno
from hypothesis import example, given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.discovery.introduction import NodeRecord
from natswarm.discovery.invite import Invite
from natswarm.discovery.invite_book import InviteBook
from natswarm.errors import DecodeError, InviteError
from natswarm.identity import Identity
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.profile import NatProfile

ALICE, MALLORY = Identity(b"a" * 32), Identity(b"m" * 32)
RECORD = NodeRecord(
    ALICE.peer_id,
    1000.0,
    "alice",
    NatProfile.unknown([Endpoint("192.168.1.2", 4000)]),
    services=("chat/1",),
)
DAY_S = 86_400.0
PINNED = (
    "natswarm:akxqni7dfelrjzhtk3azzgyvzumvd3domzrku556a5kh6ketqm2b2flkv3tniwscuwt4du5"
    "tatw723rcija4zf52usfxrv4cylknltag2xb24dzvhaqiqrmbvkelxbkgnbngyyg3xwscxpmv42omrla"
    "c5ibzw4mw7hcvspubemoltknjevacp2a54eumstgojyw5duz3ykydimjhgm47lqar2m5qyusma5amvqm"
    "gvzdejdqryr6p4bihdama5iezbuaa"
)
TEXT = str(Invite.of(RECORD, ALICE))


def test_round_trip():
    invite = Invite.parse(TEXT)
    assert invite.record == replace(RECORD, services=())
    assert str(invite) == TEXT
    assert Invite.parse(invite.qr_text) == invite


@pytest.mark.parametrize(
    "spaced",
    [f"  {TEXT}\n", "\r\n".join(TEXT[i : i + 60] for i in range(0, len(TEXT), 60)), f"{TEXT}\t"],
    ids=["around", "wrapped", "tab"],
)
def test_white_space_of_mails_and_terminals_is_ignored(spaced):
    assert Invite.parse(spaced) == Invite.parse(TEXT)


@pytest.mark.parametrize("size", [*range(12), len(TEXT) // 2, len(TEXT) - 5, len(TEXT) - 1])
def test_cut_invites_are_refused(size):
    with pytest.raises(InviteError):
        Invite.parse(TEXT[:size])


@given(position=st.integers(0, len(TEXT) - 1), bit=st.integers(0, 6))
def test_any_damaged_character_is_noticed(position, bit):
    damaged = TEXT[:position] + chr(ord(TEXT[position]) ^ 1 << bit) + TEXT[position + 1 :]
    try:
        invite = Invite.parse(damaged)
    except InviteError:
        return
    # Case, and bits of the last character that base32 does not use.
    assert invite.record == Invite.parse(TEXT).record


@given(st.text())
@example("natswarm:")
@example("natswarm:é")
@example("natswarm:====")
@example("natswarm:" + "A" * 10_000)
def test_any_text_is_an_invite_error(text):
    for candidate in (text, "natswarm:" + text):
        with pytest.raises(InviteError) as caught:
            Invite.parse(candidate)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def _text(data: bytes) -> str:
    return "natswarm:" + base64.b32encode(data).decode().rstrip("=")


def _bytes(invite: Invite) -> bytes:
    encoded = invite.qr_text.removeprefix("NATSWARM:")
    return base64.b32decode(encoded + "=" * (-len(encoded) % 8))


def test_a_forged_invite_is_refused():
    data = bytearray(_bytes(Invite.of(RECORD, MALLORY)))
    data[1:33] = ALICE.peer_id.key
    with pytest.raises(InviteError, match="signature"):
        Invite.parse(_text(data))


def test_other_versions_are_named():
    data = _bytes(Invite.of(RECORD, ALICE))
    with pytest.raises(InviteError, match="another version of natswarm: format 3, this one"):
        Invite.parse(_text(b"\3" + data[1:]))
    first = "natswarm:" + base64.urlsafe_b64encode(RECORD.seal(ALICE)).decode().rstrip("=")
    with pytest.raises(InviteError, match="another version"):
        Invite.parse(first)


def test_a_bomb_is_not_unpacked():
    squeezed = zlib.compress(bytes(1_000_000), wbits=-15)
    with pytest.raises(InviteError, match="more than 2048 bytes"):
        Invite.parse(_text(b"\2" + ALICE.seal(b"invite 2", squeezed)))


def test_the_format_is_pinned():
    """What others have on paper must stay readable: to change the form is to change its number."""
    assert Invite.parse(PINNED) == Invite(
        replace(RECORD, services=()), PINNED, 4600.0, b"meeting.", b"ticket.."
    )


@pytest.mark.parametrize(
    "options",
    [{"meeting": b"short"}, {"ticket": b"1234567"}, {"swarm_key": b"k"}, {"lifetime_s": 0}],
    ids=str,
)
def test_bounds_of_each_field(options):
    with pytest.raises(InviteError, match="damaged"):
        Invite.parse(str(Invite.of(RECORD, ALICE, **options)))


def test_expiry_in_words():
    invite = Invite.parse(str(Invite.of(RECORD, ALICE, lifetime_s=3600)))
    invite.check(1000.0)
    invite.check(4600.0 + 599)  # clocks differ
    with pytest.raises(InviteError, match=r"expired 1\.0 hours ago; ask for a new one"):
        invite.check(4600.0 + 3600)
    with pytest.raises(InviteError, match="expired 7 days ago"):
        invite.check(4600.0 + 7 * 86_400)


FULL = NatProfile(
    mapping=Mapping.APDM,
    filtering=Filtering.APDF,
    allocation=PortAllocation(
        AllocationLaw.BLOCK, 9472, 9727, block_size=256, blocks=(9472, 20480), sample_count=40
    ),
    public_ips=("203.0.113.1", "203.0.113.2", "203.0.113.3", "203.0.113.4"),
    local_endpoints=tuple(Endpoint(f"2001:db8:12:{i}:a:b:c:d{i}", 4000 + i) for i in range(8)),
    is_translated=True,
    idle_unreplied_s=12.25,
    idle_lifetime_s=31.7,
    absolute_lifetime_s=331.1,
    mapping_rate_per_s=123.4,
)


def test_it_fits_on_a_screen():
    """A phone reads what fits: 80 columns are version 13 with two blank modules around."""
    usual = replace(
        FULL,
        public_ips=("203.0.113.7",),
        local_endpoints=(Endpoint("100.64.3.2", 43135),),
        idle_unreplied_s=None,
        idle_lifetime_s=None,
        absolute_lifetime_s=None,
        mapping_rate_per_s=None,
    )
    for profile, name, version in ((usual, "phone", 10), (FULL, "x" * 64, 14)):
        record = replace(RECORD, issued_at_s=1.8e9, name=name, profile=profile)
        invite = Invite.of(record, ALICE, meeting=b"\x8e\x01q\xf2h%\x90S")
        code = segno.make(invite.qr_text, error="l")
        assert code.mode == "alphanumeric"
        assert code.version <= version, (len(str(invite)), code.version)


# The book -----------------------------------------------------------------------------------------


def _entropy(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


def test_all_invites_of_a_week_name_one_meeting():
    book, entropy = InviteBook(), _entropy(1)
    first = book.add(0.0, 7 * DAY_S, entropy)
    assert book.add(6 * DAY_S, 7 * DAY_S, entropy) == first
    second = book.add(8 * DAY_S, 7 * DAY_S, entropy)
    assert book.meetings(8 * DAY_S) == [second, first]  # one of the first's is still out
    assert book.meetings(14 * DAY_S) == [second]
    assert book.meetings(30 * DAY_S) == []


def test_a_ticket_is_for_one():
    book = InviteBook()
    ticket = book.add_ticket(0.0, DAY_S, _entropy(1))
    book.redeem(ticket, MALLORY.peer_id, 10.0)
    book = InviteBook.decode_untrusted(book.encode())
    book.redeem(ticket, MALLORY.peer_id, 20.0)
    with pytest.raises(InviteError, match="used up"):
        book.redeem(ticket, ALICE.peer_id, 20.0)
    with pytest.raises(InviteError, match="expired"):
        book.redeem(ticket, MALLORY.peer_id, 2 * DAY_S)
    with pytest.raises(InviteError, match="not known"):
        book.redeem(b"12345678", ALICE.peer_id, 20.0)


def test_the_book_is_bounded():
    book, entropy = InviteBook(), _entropy(1)
    tickets = [book.add_ticket(0.0, DAY_S, entropy) for _ in range(300)]
    with pytest.raises(InviteError, match="not known"):
        book.redeem(tickets[0], ALICE.peer_id, 0.0)
    book.redeem(tickets[-1], ALICE.peer_id, 0.0)
    assert len(book.encode()) < 32_768


@given(st.binary())
def test_a_damaged_book_is_a_decode_error(data):
    with pytest.raises(DecodeError):
        InviteBook.decode_untrusted(data)
