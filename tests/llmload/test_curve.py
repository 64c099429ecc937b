"""The picture of a learning curve: what is read from the table, and that it becomes a PNG."""

from __future__ import annotations

import numpy as np
import pytest

from llmload.learn import curve

pytestmark = pytest.mark.skipif(
    not curve.can_draw(), reason="matplotlib is not installed: pip install 'natswarm[plots]'"
)

TABLE = """\
step,loss,validation_loss,sent_bytes,text_bytes_sent,received_bytes,text_bytes_received,x
20,3.0,3.5,100,10,5,0,
40,nan,3.2,300,20,6,0,7
60,2.0,2.9,50,5,1,0,
80,1.9,2"""


def test_a_table_that_was_cut_off_becomes_a_picture(tmp_path):
    table, picture = tmp_path / "curve.csv", tmp_path / "curve.png"
    table.write_text(TABLE)
    curve.draw_curve(table, picture)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    # The lines are drawn: another table is another picture.
    table.write_text(TABLE.replace("2.9", "9.9"))
    curve.draw_curve(table, picture)
    assert picture.read_bytes() != content


def test_only_complete_lines_are_read(tmp_path):
    table = tmp_path / "curve.csv"
    table.write_text(TABLE)
    columns = curve._read(table)
    assert columns["step"].tolist() == [20, 40, 60]
    assert np.isnan(columns["loss"][1])


def test_of_steps_that_were_made_twice_the_last_ones_are_drawn():
    assert curve._last_of_each(np.array([20.0, 40, 60, 40, 60, 80])).tolist() == [0, 3, 4, 5]
    assert curve._last_of_each(np.array([])).tolist() == []


def test_bytes_are_added_up_over_all_runs():
    # The second run counts from 0 again, with its first line at 50.
    counts = np.array([100.0, 300.0, 50.0, 80.0])
    assert curve._over_all_runs(counts).tolist() == [100, 300, 350, 380]


def test_a_table_without_some_columns_is_read_too(tmp_path):
    table = tmp_path / "out" / "curve.csv"
    columns = ("step", "validation_loss", "sent_bytes", "x")
    for step in (20, 40):
        curve.append_row(table, columns, {"step": step, "sent_bytes": 7, "x": "a, b"})
    assert table.read_text().splitlines() == [",".join(columns), '20,,7,"a, b"', '40,,7,"a, b"']
    table.write_text("step,validation_loss,sent_bytes\n20,3.5,7\n40,3.2")
    columns = curve._read(table)
    assert columns["validation_loss"].tolist() == [3.5]
    assert columns["text_bytes_sent"].tolist() == [0]
    assert np.isnan(columns["loss"]).all()


def test_a_table_without_lines_is_drawn_too(tmp_path):
    table = tmp_path / "curve.csv"
    table.write_text(TABLE.splitlines()[0])
    curve.draw_curve(table, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()


def test_a_table_with_another_heading_is_set_aside(tmp_path):
    table = tmp_path / "curve.csv"
    for columns in (("step", "loss"), ("step", "norm"), ("step", "loss")):
        for step in (1, 2):
            curve.append_row(table, columns, {"step": step, columns[1]: 7})
    assert (tmp_path / "curve-1.csv").read_text().split() == ["step,loss", "1,7", "2,7"]
    assert (tmp_path / "curve-2.csv").read_text().split() == ["step,norm", "1,7", "2,7"]
    assert table.read_text().split() == ["step,loss", "1,7", "2,7"]
