"""Journals: what a crash does to them, and who may write."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.errors import ConfigurationError, DecodeError
from natswarm.field_test.carrier import CarrierLabel
from natswarm.field_test.journal import JOURNAL_NAME, Journal, read_journal
from natswarm.field_test.plan import FieldTestPlan
from natswarm.field_test.records import AttemptRecord, Begin, Result, Start
from natswarm.field_test.session import open_session
from natswarm.field_test.side import SideConfig
from natswarm.net.udp import UdpNetwork

BEGIN = Begin(
    at="2026-01-01T00:00:00.000Z",
    session="s",
    mode="run",
    plan=FieldTestPlan(),
    sides=(),
    versions={},
    helper_count=2,
)


def attempt(key: str, result: Result) -> AttemptRecord:
    return AttemptRecord(
        at="2026-01-01T00:00:01.000Z",
        key=key,
        round_index=0,
        wanted_strategy="auto",
        direction="left-to-right",
        repeat=1,
        seed=1,
        began_at="2026-01-01T00:00:00.000Z",
        result=result,
        reason="because",
    )


RECORDS = [
    BEGIN,
    Start(at="2026-01-01T00:00:00.000Z", key="a"),
    attempt("a", Result.OK),
    attempt("b", Result.VOID),
    attempt("b", Result.FAILED),
    attempt("c", Result.VOID),
]
LINES = [msgspec.json.encode(record) + b"\n" for record in RECORDS]


def write_all(folder: Path) -> Path:
    with Journal(folder, resume=False) as journal:
        for record in RECORDS:
            journal.append(record)
    return journal.path


def test_what_was_written_is_read_again(tmp_path: Path):
    contents = read_journal(write_all(tmp_path))
    assert contents.records == RECORDS
    assert contents.begin == BEGIN
    assert contents.done_keys == {"a", "b"}
    assert not contents.broken_lines


@given(st.integers(0, sum(map(len, LINES))))
def test_a_journal_cut_anywhere_keeps_every_whole_line(tmp_path_factory, size: int):
    folder = tmp_path_factory.mktemp("journal")
    path = folder / JOURNAL_NAME
    path.write_bytes(b"".join(LINES)[:size])
    whole = [end for end in range(len(LINES) + 1) if sum(map(len, LINES[:end])) <= size]
    contents = read_journal(path)
    # A line that lacks but its line feed is whole.
    assert len(contents.records) in (whole[-1], whole[-1] + 1)
    assert contents.records == RECORDS[: len(contents.records)]
    assert contents.is_torn == bool(contents.broken_lines)
    # Resumed, it goes on in a line of its own, and nothing that was there is changed.
    before = path.read_bytes()
    with Journal(folder, resume=True) as journal:
        journal.append(attempt("d", Result.OK))
    assert path.read_bytes().startswith(before)
    after = read_journal(path)
    assert after.records == [*contents.records, attempt("d", Result.OK)]
    assert not after.is_torn


def test_two_tests_do_not_share_a_journal(tmp_path: Path):
    with (
        Journal(tmp_path, resume=False),
        pytest.raises(ConfigurationError, match="another field test writes"),
    ):
        Journal(tmp_path, resume=False)


def test_beginning_and_resuming_are_told_apart(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="no field test to resume"):
        Journal(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    write_all(tmp_path)
    with pytest.raises(ConfigurationError, match="--resume"):
        Journal(tmp_path, resume=False)


def test_a_journal_of_a_later_version_is_refused(tmp_path: Path):
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(LINES[0].replace(b'"schema":1', b'"schema":2'))
    with pytest.raises(DecodeError, match="update natswarm"):
        read_journal(path)
    path.write_bytes(b'{"kind":"begin","schema":7,"other":"words"}\n')
    with pytest.raises(DecodeError, match="update natswarm"):
        read_journal(path)


def test_what_is_no_journal_is_told(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_journal(tmp_path / JOURNAL_NAME)
    (tmp_path / JOURNAL_NAME).write_bytes(b"\xff\xfe\n[[[[\n{}\n")
    contents = read_journal(tmp_path / JOURNAL_NAME)
    assert contents.broken_lines == [1, 2, 3]
    with pytest.raises(DecodeError, match="first line is missing"):
        _ = contents.begin


def test_a_resumed_test_keeps_to_what_was_agreed(tmp_path: Path):
    def open_one(**options):
        defaults = {
            "resume": True,
            "mode": "run",
            "plan": None,
            "sides": [],
            "helper_count": 2,
            "full_addresses": False,
            "show": shown.append,
        }
        return open_session(tmp_path, **{**defaults, **options})

    shown = []
    with open_one(resume=False, plan=FieldTestPlan(repeats=7)) as session:
        name = session.begin.session
    with pytest.raises(ConfigurationError, match="another plan"):
        open_one(plan=FieldTestPlan(repeats=8))
    with pytest.raises(ConfigurationError, match="another one"):
        open_one(mode="join", session="other")
    with pytest.raises(ConfigurationError, match="shortens addresses"):
        open_one(full_addresses=True)
    with open_one(plan=FieldTestPlan(repeats=7)) as session:
        assert session.begin.plan.repeats == 7
        assert session.begin.session == name
    assert [type(record).__name__ for record in shown] == ["Begin", "Resume"]


def test_a_side_of_a_resumed_test_keeps_its_label(tmp_path: Path):
    def side(text: str, source: str) -> SideConfig:
        return SideConfig("left", CarrierLabel(text, source), UdpNetwork, interface="usb0")

    def open_one(one: SideConfig, *, resume: bool) -> None:
        with open_session(
            tmp_path,
            resume=resume,
            mode="run",
            plan=None,
            sides=[one.record()],
            helper_count=2,
            full_addresses=not resume,
            show=lambda record: None,
        ) as session:
            one.keep_to(session.begin)

    open_one(side("NL KPN", "user"), resume=False)
    unnamed, renamed = side("usb0", "interface"), side("NL Simyo", "user")
    open_one(unnamed, resume=True)
    open_one(renamed, resume=True)
    assert (unnamed.label, unnamed.status.carrier) == ("NL KPN", "NL KPN")
    assert renamed.label == "NL Simyo"
    assert unnamed.full_addresses
