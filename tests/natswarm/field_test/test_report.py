"""Reports: the numbers, and that nothing of a journal can do more than be shown."""

from __future__ import annotations

import csv
import io
import re
import struct
import zlib
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from natswarm.cli.field_test_view import record_as_text, status_view
from natswarm.errors import ConfigurationError, DecodeError
from natswarm.field_test.carrier import CarrierLabel
from natswarm.field_test.page import attempts_csv, report_page, write_report
from natswarm.field_test.picture import matrix_png
from natswarm.field_test.plan import FieldTestPlan
from natswarm.field_test.records import (
    Alarm,
    AttemptRecord,
    Begin,
    End,
    NatSeen,
    PathQuality,
    PunctureSeen,
    Record,
    Result,
    Resume,
    Side,
    SideSeen,
    Survey,
)
from natswarm.field_test.schedule import Status
from natswarm.field_test.side import SideConfig
from natswarm.field_test.tally import Tally, load_tally, median, wilson
from natswarm.net.udp import UdpNetwork

AT = "2026-01-01T00:00:00.000Z"
EVIL = "=<script>alert(1)</script>"


def seen(carrier: str, probe_count: int) -> SideSeen:
    puncture = PunctureSeen(
        strategy="direct", is_ok=True, probe_count=probe_count, received_count=1, seconds=0.5
    )
    return SideSeen(
        carrier=carrier,
        nat=NatSeen(text="EIM/ADF, uniform 1..9", is_translated=True, mapping="EIM"),
        punctures=(puncture,),
        ports_seen=(1024, 40_000, 65_535),
    )


def attempt(
    number: int, result: Result, direction: str = "left-to-right", reason: str = "why"
) -> AttemptRecord:
    return AttemptRecord(
        at=AT,
        key=f"0/auto/{direction}/{number}",
        round_index=0,
        wanted_strategy="auto",
        direction=direction,
        repeat=number,
        seed=number,
        began_at=f"2026-01-01T00:00:{number:02}.000Z",
        result=result,
        reason=reason,
        strategy="direct",
        hole_s=0.25 * number if result is Result.OK else None,
        connect_s=1.0,
        left=seen("NL KPN", 10),
        right=seen(EVIL, number),
        quality=PathQuality(rtts_ms=(40.0, 60.0), out_bytes_per_s=1e6, out_loss=0.01),
    )


RECORDS: list[Record] = [
    attempt(1, Result.OK),
    attempt(2, Result.OK),
    attempt(3, Result.FAILED, reason=EVIL),
    attempt(4, Result.VOID, reason="usb1 is gone"),
    attempt(5, Result.SKIPPED),
    attempt(6, Result.FAILED, "right-to-left"),
    Alarm(at=AT, key="k", side="left", what="down", is_over=False, text=EVIL),
    Survey(
        at=AT,
        round_index=0,
        side="left",
        nat=NatSeen(text="EIM", idle_lifetime_s=120.0, absolute_lifetime_s="inf", remotes_seen=64),
        unknown={"max_mappings": EVIL},
    ),
]


def write_journal(folder: Path, records: list[Record], **begin) -> Path:
    first = Begin(
        at=AT,
        session=begin.pop("session", "s"),
        mode="run",
        plan=FieldTestPlan(),
        sides=(
            Side(name="left", carrier="NL KPN", carrier_source="user"),
            Side(name="right", carrier=EVIL, carrier_source="user"),
        ),
        versions={"natswarm": "0"},
        helper_count=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    lines = [msgspec.json.encode(record) for record in (first, *records)]
    (folder / "journal.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


@pytest.fixture
def tally(tmp_path: Path) -> Tally:
    return load_tally([write_journal(tmp_path / "one", RECORDS)])


@pytest.mark.parametrize(
    ("ok", "count", "low", "high"),
    # From R: binom::binom.wilson
    [
        (0, 0, 0, 1),
        (0, 5, 0, 0.4345),
        (3, 3, 0.4385, 1),
        (9, 10, 0.5958, 0.9821),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_intervals_are_wilsons(ok: int, count: int, low: float, high: float):
    assert wilson(ok, count) == pytest.approx((low, high), abs=5e-5)


def test_a_median():
    assert median([3, 1, 2]) == 2
    assert median([4, 1]) == 2.5
    assert median([]) is None


def test_only_what_says_something_of_the_nats_counts(tally: Tally):
    cells = tally.cells()
    assert {pair: (len(cell.ok), len(cell.failed)) for pair, cell in cells.items()} == {
        ("NL KPN", EVIL): (2, 1),
        (EVIL, "NL KPN"): (0, 1),
    }
    assert cells["NL KPN", EVIL].hole_s == [0.25, 0.5]
    assert cells["NL KPN", EVIL].probe_counts == [11, 12]
    assert tally.result_counts[Result.VOID] == 1
    assert tally.ports()["NL KPN"] == [1024, 40_000, 65_535] * 6


def test_the_page_holds_everything_and_runs_nothing(tally: Tally):
    page = report_page(tally)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
    for wanted in ("2/3", "21% to 94%", "usb1 is gone", "longer than tried", "120 s", "64"):
        assert wanted in page, wanted
    # No network needed: nothing is fetched from anywhere.
    links = re.findall(r'(?:href|src)="?([^" >]+)', page)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in page
    assert "@import" not in page


def test_the_csv_has_every_attempt_and_no_formula(tally: Tally):
    rows = list(csv.DictReader(io.StringIO(attempts_csv(tally))))
    assert [row["result"] for row in rows] == ["ok", "ok", "failed", "void", "skipped", "failed"]
    assert rows[0]["probes"] == "11"
    assert rows[0]["median_rtt_ms"] == "50.0"
    assert not any(value.startswith("=") for row in rows for value in row.values())


def test_the_picture_is_a_png(tally: Tally):
    data = matrix_png(tally)
    width, height = struct.unpack_from(">II", data, 16)
    start = data.index(b"IDAT")
    (size,) = struct.unpack_from(">I", data, start - 4)
    pixels = zlib.decompress(data[start + 4 : start + 4 + size])
    assert len(pixels) == height * (1 + 3 * width)
    assert zlib.crc32(data[start : start + 4 + size]) == int.from_bytes(
        data[start + 4 + size : start + 8 + size]
    )
    assert matrix_png(Tally()), "nothing was tried, and that can be drawn"


def test_a_report_of_nothing_is_a_page(tmp_path: Path):
    empty = load_tally([write_journal(tmp_path / "one", [])])
    assert "0 attempts" in write_report(empty, tmp_path / "out").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.html",
        "attempts.csv",
        "matrix.png",
    }


def test_halves_of_two_devices_are_one_attempt(tmp_path: Path):
    whole = attempt(1, Result.OK)
    half = msgspec.structs.replace(whole, left=None, quality=None, hole_s=None, connect_s=None)
    lost = msgspec.structs.replace(
        attempt(2, Result.SKIPPED), left=None, right=None, connect_s=None
    )
    one = write_journal(tmp_path / "one", [whole, attempt(2, Result.FAILED)])
    two = write_journal(tmp_path / "two", [half, lost])
    for folders in ([one, two], [two, one]):
        tally = load_tally(folders)
        assert [each.attempt.result for each in tally.meetings] == [Result.OK, Result.FAILED]
        assert tally.meetings[0].attempt == whole
    other = write_journal(tmp_path / "three", [whole], session="other")
    assert len(load_tally([one, two, other]).meetings) == 3


def test_damage_is_noted_and_a_foreign_folder_refused(tmp_path: Path):
    folder = write_journal(tmp_path / "one", RECORDS)
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write("nonsense\n" + '{"kind":"att')
    tally = load_tally([folder])
    assert len(tally.meetings) == 6
    assert tally.notes == [
        "one/journal.jsonl: the last line was torn by a crash, and left out",
        "one/journal.jsonl: no records, and left out: lines 10",
    ]
    with pytest.raises(ConfigurationError):
        load_tally([tmp_path / "none"])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/journal.jsonl").write_text("{}\n")
    with pytest.raises(DecodeError):
        load_tally([tmp_path / "bare"])


def test_each_record_has_its_line():
    records = [*RECORDS, Resume(at=AT, versions={}, torn_line_count=1, done_count=3), End(at=AT)]
    for record in records:
        text = record_as_text(record)
        assert text
        console = Console(file=io.StringIO(), width=200)
        console.print(text)
        assert "<script>" not in text or "<script>" in console.file.getvalue()


def test_the_live_view_shows_both_sides():
    sides = [
        SideConfig(name, CarrierLabel("[red]NL KPN", "user"), UdpNetwork, interface="usb0")
        for name in ("left", "right")
    ]
    sides[1].status.troubles = ("down",)
    sides[0].status.handed_count = 29_000
    console = Console(file=io.StringIO(), width=160)
    console.print(status_view(Status(10, done_count=4, waiting="plug it in again"), sides))
    shown = console.file.getvalue()
    for wanted in ("4 of 10", "plug it in again", "[red]NL KPN", "down", "29,000"):
        assert wanted in shown, wanted
