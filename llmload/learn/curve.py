"""Write down how learning goes, and draw it: loss over steps, and below it the bytes exchanged.

What is drawn is the table that `llmload learn` appends to, whatever wrote it and however often it
was stopped meanwhile. matplotlib does it, where it is installed (extra `plots`); nothing else needs
it, so it is loaded with the first picture.

This file does not know when a line or a picture is wanted, nor what learning is.
"""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["append_row", "can_draw", "draw_curve"]

SENT = ("sent_bytes", "text_bytes_sent")
RECEIVED = ("received_bytes", "text_bytes_received")
# Column: what it counts as where a table does not have it.
NEEDED = {
    **dict.fromkeys(("step", "loss", "validation_loss"), math.nan),
    **dict.fromkeys((*SENT, *RECEIVED), 0.0),
}


def append_row(table: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Append a line to a table; a new one gets a heading first.

    A table with another heading, of another kind of learning or an earlier version, is set aside
    under a free name: `curve-1.csv` for `curve.csv`.

    Args:
        table: CSV; its folder is made, too.
        columns: The heading.
        row: Values by column; what is missing is left empty.

    Raises:
        OSError: It can't be written.
    """
    if table.exists() and _heading(table) != list(columns):
        names = (table.with_stem(f"{table.stem}-{number}") for number in count(1))
        table.rename(next(name for name in names if not name.exists()))
    is_new = not table.exists()
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _heading(table: Path) -> list[str]:
    with table.open(newline="") as file:
        return next(csv.reader(file), [])


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curve(table: Path, picture: Path) -> None:
    """Draw a table as a picture.

    Args:
        table: CSV with a heading; drawn are the columns `NEEDED`. Lines that are not complete are
            left out: a device that lost power may have cut one off. Of lines of one step the last
            is drawn: who went back to a checkpoint makes steps again.
        picture: PNG, overwritten.

    Raises:
        OSError: The table can't be read, or the picture not be written.
    """
    from matplotlib.figure import Figure

    columns = _read(table)
    last = _last_of_each(columns["step"])
    steps = columns["step"][last]
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, transfers = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    losses.plot(steps, columns["loss"][last], label="own batches")
    losses.plot(steps, columns["validation_loss"][last], label="text not learned from")
    losses.set(ylabel="loss, nats a token")
    for label, names in (("sent", SENT), ("received", RECEIVED)):
        total = np.sum([_over_all_runs(columns[name]) for name in names], axis=0)
        transfers.plot(steps, total[last] / 1e6, label=label)
    transfers.set(xlabel="steps", ylabel="MB", ylim=(0, None))
    for axes in (losses, transfers):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(picture)


def _read(table: Path) -> dict[str, NDArray[np.float64]]:
    """Return the needed columns, float64 (rows,) each."""
    with table.open(newline="") as file:
        rows = [
            [_number(row.get(name, default)) for name, default in NEEDED.items()]
            for row in csv.DictReader(file)
        ]
    # A loss that is not known yet, NaN, is a gap in the line; what was cut off is no row.
    kept = [values for values in rows if None not in values]
    grid = np.array(kept, dtype=np.float64).reshape(-1, len(NEEDED))
    return dict(zip(NEEDED, grid.T, strict=True))


def _last_of_each(steps: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return where each step stands last, in the order of steps."""
    _, from_the_end = np.unique(steps[::-1], return_index=True)
    places: NDArray[np.intp] = steps.size - 1 - from_the_end
    return places


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _over_all_runs(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum since the first run of counts that begin at 0 again with each."""
    growth = np.diff(counts, prepend=0.0)
    total: NDArray[np.float64] = np.cumsum(np.where(growth < 0, counts, growth))
    return total
