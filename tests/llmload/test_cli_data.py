"""`llmload data`: what is kept, what is shared, what is gone."""

from __future__ import annotations

import json
import sys

import pytest

from llmload import cli


@pytest.fixture
def data(monkeypatch, capsys, tmp_path):
    """A function that runs `llmload data`; returns exit status, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def data(*arguments):
        state = ["--state", str(tmp_path / "state")]
        monkeypatch.setattr(sys, "argv", ["llmload", "data", *arguments, *state])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return data


@pytest.fixture
def notes(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("\n\n".join(f"Paragraph {n}. " + f"word{n} " * 300 for n in range(9)))
    return file


def listed(data):
    return [json.loads(line) for line in data("list", "--json")[1].splitlines()]


def test_files_are_cut_signed_kept_and_private(data, notes):
    assert "No texts yet" in data("list")[1]
    status, said, _ = data("add", str(notes))
    assert status == 0
    records = listed(data)
    assert len(records) == len(said.splitlines()) > 1
    assert {(each["shared"], each["giver"], each["licence"]) for each in records} == {
        (False, None, "")
    }
    assert len({each["author"] for each in records}) == 1
    assert "there already" in data("add", str(notes))[1]
    assert "private ours" in data("list")[1]


def test_sharing_needs_a_licence_and_names_what_is_shared(data, notes):
    status, _, said = data("add", str(notes), "--share")
    assert (status, "--licence" in said) == (2, True)
    assert listed(data) == []
    data("add", str(notes))
    first, second, *_ = [each["id"][:12] for each in listed(data)]
    status, _, said = data("share", first)
    assert (status, "--licence" in said) == (2, True)
    assert data("share", first, "--licence", "CC0-1.0")[0] == 0
    assert next(each["id"][:12] for each in listed(data) if not each["shared"]) == second
    assert [each["licence"] for each in listed(data) if each["shared"]] == ["CC0-1.0"]
    data("add", "--share", "--licence", "MIT", __file__)
    assert {each["licence"] for each in listed(data) if each["shared"]} == {"CC0-1.0", "MIT"}


def test_what_is_forgotten_is_gone_and_stays_away(data, notes):
    data("add", str(notes))
    first = listed(data)[0]["id"][:12]
    assert data("forget", first)[0] == 0
    status, _, said = data("forget", first)
    assert (status, "not there" in said) == (2, True)
    data("add", str(notes))
    assert first not in [each["id"][:12] for each in listed(data)]


@pytest.mark.parametrize("prefix", ["xyz", "00ff", ""])
def test_ids_that_name_nothing_are_usage_errors(data, notes, prefix):
    data("add", str(notes))
    assert data("forget", prefix)[0] == 2


def test_what_others_wrote_does_not_get_at_the_terminal(data, tmp_path):
    file = tmp_path / "a\x1b[2Jb.txt"
    file.write_text("text")
    data("add", str(file))
    assert "\x1b" not in data("list")[1]
