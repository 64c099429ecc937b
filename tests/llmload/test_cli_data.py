"""`llmload data` and `feedback`: what is kept, what is shared, what is gone."""

from __future__ import annotations

import io
import json
import sys

import pytest

from llmload import cli


@pytest.fixture
def data(monkeypatch, capsys, tmp_path):
    """A function that runs `llmload data`; returns exit status, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def data(*arguments, command="data"):
        state = ["--state", str(tmp_path / "state")]
        monkeypatch.setattr(sys, "argv", ["llmload", command, *arguments, *state])
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
    _, said, remark = data("add", str(notes), "--share", "--licence", "CC0-1.0")
    assert "there already" in said
    assert "stays as it was, private or shared" in remark
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


def test_a_file_without_text_is_a_usage_error(data, tmp_path):
    file = tmp_path / "empty.txt"
    file.touch()
    status, _, said = data("add", str(file))
    assert (status, "holds no text" in said) == (2, True)


def test_what_others_wrote_does_not_get_at_the_terminal(data, tmp_path):
    file = tmp_path / "a\x1b[2Jb.txt"
    file.write_text("text")
    data("add", str(file))
    assert "\x1b" not in data("list")[1]


def feedback(data, *arguments):
    return data(*arguments, command="feedback")


def test_feedback_is_a_record_too(data):
    assert feedback(data, "+1", "--prompt", "why?", "--answer", "because")[0] == 0
    assert feedback(data, "-1", "--answer", "so", "--share", "--licence", "CC0-1.0")[0] == 0
    assert [(each["kind"], each["shared"], each["shown"]) for each in listed(data)] == [
        ("+1", False, "because"),
        ("-1", True, "so"),
    ]


def test_feedback_takes_what_generate_prints(data, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "a", "text": "b", "seed": 3}'))
    assert feedback(data, "-1")[0] == 0
    assert [(each["kind"], each["shown"]) for each in listed(data)] == [("-1", "b")]


@pytest.mark.parametrize("said", ["", "[]", '{"prompt": "a"}'])
def test_feedback_on_nothing_is_a_usage_error(data, monkeypatch, said):
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    status, _, error = feedback(data, "+1")
    assert (status, "generate --json" in error) == (2, True)


def test_marks_are_these_two(data):
    for mark in ("+2", "-x", "good"):
        assert feedback(data, mark, "--answer", "x")[0] == 2
    assert listed(data) == []
