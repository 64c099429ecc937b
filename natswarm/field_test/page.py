"""The report of field tests: one page that needs no network, a CSV of all attempts, and a PNG.

Whatever stands in a journal was written by somebody else's device and is shown as text only.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from natswarm.errors import ConfigurationError
from natswarm.field_test.chart import histogram, port_histogram
from natswarm.field_test.picture import matrix_png
from natswarm.field_test.records import Result
from natswarm.field_test.tally import Cell, Meeting, Tally, median

__all__ = ["attempts_csv", "report_page", "write_report"]

PAGE_NAME, CSV_NAME, PNG_NAME = "index.html", "attempts.csv", "matrix.png"

# A cell of a table that begins like a formula would be run as one by a spreadsheet.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

STYLE = """
:root{color-scheme:light dark;--ink:#191c21;--paper:#fff;--soft:#5c6470;--line:#d9dde3;
--bar:#3465a4}
@media (prefers-color-scheme:dark){
:root{--ink:#e6e8eb;--paper:#14171b;--soft:#9aa3af;--line:#333a43;--bar:#7aa7e0}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;
max-width:64rem;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem}h3{font-size:1rem;margin-bottom:.2rem}
.wide{overflow-x:auto;overflow-wrap:normal}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{border:1px solid var(--line);padding:.3rem .6rem;text-align:left;vertical-align:top}
th{font-weight:600}.matrix td{min-width:8rem}.matrix b{font-size:1.1rem}
small,.tick,.none,caption{color:var(--soft)}.tick{font-size:14px;fill:var(--soft)}
svg{width:100%;max-width:40rem;height:auto;display:block}.bar{fill:var(--bar)}
.axis{stroke:var(--line)}code{font-size:.9em}.reason{min-width:16rem}
"""


def write_report(tally: Tally, folder: Path) -> Path:
    """Write page, CSV and PNG into a folder; return the page.

    Raises:
        ConfigurationError: They cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAGE_NAME).write_text(report_page(tally), encoding="utf-8")
        (folder / CSV_NAME).write_text(attempts_csv(tally), encoding="utf-8", newline="")
        (folder / PNG_NAME).write_bytes(matrix_png(tally))
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the report to {folder}: {error.strerror}; name another with --out"
        ) from error
    return folder / PAGE_NAME


def report_page(tally: Tally) -> str:
    """Return the whole page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>natswarm field test</title><style>{STYLE}</style>",
        "<h1>natswarm field test</h1>",
        _summary(tally),
        "<h2>Who met whom</h2>",
        (
            "<p>Paths found of tries, and between which values the true share lies (95 %, Wilson). "
            "Rows asked, columns were asked. Below: median time to the path, median probes of both."
        ),
        _matrix(tally),
        "<h2>By strategy</h2>",
        _strategies(tally),
        "<h2>Time to the path</h2>",
        _distributions(tally, lambda cell: cell.hole_s, "s"),
        "<h2>Probes of both sides</h2>",
        _distributions(tally, lambda cell: cell.probe_counts, "probes"),
        "<h2>The paths</h2>",
        _qualities(tally),
        "<h2>The NATs</h2>",
        _nats(tally),
        "<h2>Ports</h2>",
        "<p>External ports that helpers saw, over all attempts.",
        *(
            f"<h3>{escape(carrier)} <small>{len(ports)} ports seen</small></h3>"
            f"{port_histogram(ports)}"
            for carrier, ports in tally.ports().items()
        ),
        "<h2>Every failure</h2>",
        _failures(tally, (Result.FAILED,)),
        "<h2>Attempts that do not count</h2>",
        (
            "<p>The bench failed (<code>void</code>, made again), or the wanted strategy does not "
            "apply to the pair (<code>skipped</code>)."
        ),
        _failures(tally, (Result.VOID, Result.SKIPPED)),
        "<h2>What stopped sending</h2>",
        _alarms(tally),
        "<h2>The field tests</h2>",
        _sessions(tally),
        (
            f'<p><a download="{CSV_NAME}" href="{_data_link(attempts_csv(tally), "text/csv")}">All '
            "attempts as CSV</a>"
        ),
        "</html>\n",
    ]
    return "\n".join(parts)


def _summary(tally: Tally) -> str:
    counts = tally.result_counts
    words = ", ".join(f"{counts[result]} {result.value}" for result in Result)
    times = [each.attempt.began_at for each in tally.meetings]
    lines = [f"{len(tally.meetings)} attempts: {words}."]
    if times:
        lines.append(f"From {min(times)} to {max(times)}.")
    notes = "".join(f"<p><b>Note:</b> {escape(note)}" for note in tally.notes)
    return f"<p>{escape(' '.join(lines))}{notes}"


def _sessions(tally: Tally) -> str:
    rows = [
        (
            begin.session,
            begin.mode,
            begin.at,
            ", ".join(
                f"{side.name}: {side.carrier}"
                + (f" ({side.carrier_source})" if side.carrier_source else "")
                for side in begin.sides
            ),
            str(begin.helper_count),
            str(begin.plan.seed),
            ", ".join(f"{name} {version}" for name, version in sorted(begin.versions.items())),
        )
        for begin in tally.begins
    ]
    heads = ("session", "mode", "began", "carriers", "helpers", "seed", "versions")
    return _table(heads, rows)


def _matrix(tally: Tally) -> str:
    carriers, cells = tally.carriers, tally.cells()
    head = "".join(f"<th scope=col>{escape(carrier)}" for carrier in carriers)
    rows = []
    for asker in carriers:
        row = "".join(_cell(cells.get((asker, asked))) for asked in carriers)
        rows.append(f"<tr><th scope=row>{escape(asker)}{row}")
    return f"<div class=wide><table class=matrix><tr><td>{head}{''.join(rows)}</table></div>"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td><small>not tried</small>"
    share = len(cell.ok) / cell.count
    low, high = cell.interval
    colour = f"hsla({round(120 * share)},65%,45%,.3)"
    return (
        f'<td style="background:{colour}"><b>{len(cell.ok)}/{cell.count}</b> = {share:.0%}'
        f"<br><small>{low:.0%} to {high:.0%}<br>{_number(median(cell.hole_s), 's')}, "
        f"{_number(median(cell.probe_counts), 'probes')}</small>"
    )


def _strategies(tally: Tally) -> str:
    rows = []
    for (strategy, *_), cell in tally.cells("strategy").items():
        low, high = cell.interval
        rows.append(
            (
                strategy,
                f"{len(cell.ok)}/{cell.count}",
                f"{low:.0%} to {high:.0%}",
                _number(median(cell.hole_s), "s"),
                _number(max(cell.hole_s, default=None), "s"),
                _number(median(cell.probe_counts), "probes"),
            )
        )
    heads = ("strategy", "paths of tries", "95 %", "median time", "longest", "median probes")
    return _table(heads, rows)


def _distributions(tally: Tally, values: Callable[[Cell], Sequence[float]], unit: str) -> str:
    parts = []
    for pair, cell in tally.cells().items():
        name = " asks ".join(pair)
        parts.append(f"<h3>{escape(name)}</h3>{histogram(values(cell), unit)}")
    return "".join(parts) or "<p class=none>nothing measured"


def _qualities(tally: Tally) -> str:
    rows = []
    for pair, cell in tally.cells().items():
        found = [each.attempt.quality for each in cell.ok if each.attempt.quality is not None]
        rtts = [rtt for quality in found for rtt in quality.rtts_ms]
        out = [q.out_bytes_per_s for q in found if q.out_bytes_per_s is not None]
        back = [q.back_bytes_per_s for q in found if q.back_bytes_per_s is not None]
        losses = [q.out_loss for q in found if q.out_loss is not None]
        losses += [q.back_loss for q in found if q.back_loss is not None]
        gaps = [q.longest_gap_s for q in found if q.longest_gap_s is not None]
        rows.append(
            (
                " asks ".join(pair),
                _number(median(rtts), "ms"),
                _number(max(rtts, default=None), "ms"),
                _rate(median(out)),
                _rate(median(back)),
                "-" if not losses else f"{sum(losses) / len(losses):.2%}",
                _number(max(gaps, default=None), "s"),
                str(sum(bool(quality.trouble) for quality in found)),
            )
        )
    heads = (
        "pair",
        "median round trip",
        "longest",
        "out",
        "back",
        "packets lost",
        "longest gap",
        "ended early",
    )
    return _table(heads, rows)


def _nats(tally: Tally) -> str:
    rows = [
        (carrier, "; ".join(f"{kind} ({count} times)" for kind, count in kinds.most_common()))
        for carrier, kinds in tally.nats().items()
    ]
    surveyed = [
        (
            carrier,
            survey.at,
            "-" if survey.nat is None else survey.nat.text,
            *(
                "-" if survey.nat is None else _lifetime(getattr(survey.nat, name))
                for name in ("idle_unreplied_s", "idle_lifetime_s", "absolute_lifetime_s")
            ),
            "-" if survey.nat is None else str(survey.nat.max_mappings or "-"),
            "-" if survey.nat is None else str(survey.nat.remotes_seen or "-"),
            "; ".join(f"{name}: {why}" for name, why in sorted(survey.unknown.items())),
        )
        for carrier, survey in tally.surveys
    ]
    heads = (
        "carrier",
        "at",
        "NAT",
        "idle, unanswered",
        "idle, answered",
        "absolute",
        "mappings at most",
        "remotes at once",
        "not known, because",
    )
    text = _table(("carrier", "NAT as inspected before each attempt"), rows)
    if surveyed:
        text += "<h3>Lifetimes and quotas</h3>" + _table(heads, surveyed)
    return text


def _failures(tally: Tally, results: Sequence[Result]) -> str:
    rows = [
        (
            each.attempt.began_at,
            " asks ".join(each.pair),
            each.attempt.key,
            each.attempt.result.value,
            each.attempt.strategy or "-",
            f"{each.attempt.probe_count:,}",
            each.attempt.reason,
        )
        for each in tally.meetings
        if each.attempt.result in results
    ]
    heads = ("began", "pair", "slot", "result", "strategy", "probes", "reason")
    return _table(heads, rows)


def _alarms(tally: Tally) -> str:
    rows = [
        (each.at, each.key, each.side, each.what + (" (over)" if each.is_over else ""), each.text)
        for each in tally.alarms
    ]
    return _table(("at", "slot", "side", "what", "reason"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=reason' if head == 'reason' else ''}>{escape(text)}"
            for head, text in zip(heads, row, strict=True)
        )
        for row in rows
    )
    if not body:
        return "<p class=none>none"
    head = "".join(f"<th scope=col>{escape(name)}" for name in heads)
    return f"<div class=wide><table><tr>{head}{body}</table></div>"


# The CSV ------------------------------------------------------------------------------------------

COLUMNS = (
    "session",
    "key",
    "began_at",
    "asker",
    "asked",
    "wanted_strategy",
    "strategy",
    "result",
    "reason",
    "hole_s",
    "connect_s",
    "probes",
    "asker_nat",
    "asked_nat",
    "median_rtt_ms",
    "out_bytes_per_s",
    "back_bytes_per_s",
    "out_loss",
    "back_loss",
    "seed",
)


def attempts_csv(tally: Tally) -> str:
    """Return every attempt as a line."""
    output = io.StringIO()
    writer = csv.writer(output)
    writer.writerow(COLUMNS)
    for meeting in tally.meetings:
        writer.writerow([_harmless(value) for value in _values(meeting)])
    return output.getvalue()


def _values(meeting: Meeting) -> list[object]:
    attempt = meeting.attempt
    nats = [
        None if side is None or side.nat is None else side.nat.text for _, side in meeting.sides
    ]
    quality = attempt.quality
    return [
        meeting.session,
        attempt.key,
        attempt.began_at,
        *meeting.pair,
        attempt.wanted_strategy,
        attempt.strategy,
        attempt.result.value,
        attempt.reason,
        attempt.hole_s,
        attempt.connect_s,
        attempt.probe_count,
        *nats,
        None if quality is None else median(quality.rtts_ms),
        None if quality is None else quality.out_bytes_per_s,
        None if quality is None else quality.back_bytes_per_s,
        None if quality is None else quality.out_loss,
        None if quality is None else quality.back_loss,
        attempt.seed,
    ]


def _harmless(value: object) -> object:
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value


# Words --------------------------------------------------------------------------------------------


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f} {unit}" if value >= 100 or unit == "probes" else f"{value:.3g} {unit}"


def _rate(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else f"{8 * bytes_per_s / 1e6:.3g} Mbit/s"


def _lifetime(seconds: float | str | None) -> str:
    if seconds is None:
        return "-"
    return "longer than tried" if isinstance(seconds, str) else f"{seconds:.0f} s"


def _data_link(text: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"
