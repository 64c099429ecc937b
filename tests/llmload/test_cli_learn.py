"""`llmload learn` and `llmload eval`: better on the text, resumed where it stopped."""

from __future__ import annotations

import csv
import json
import math
import sys

import pytest

from llmload import cli, cli_learn
from llmload.cli_shared import print_facts
from llmload.data.record import FeedbackRecord, TextRecord, sign_record
from llmload.data.store import RecordStore
from llmload.learn import texts
from llmload.learn.curve import can_draw
from llmload.model_folder import load_model
from natswarm import Identity

TEXT = "the mesh of the peers, the peers of the mesh. " * 60


@pytest.fixture
def run(monkeypatch, capsys, model_folder, tmp_path):
    """A function that runs a command on the small model; returns exit status and JSON lines."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    monkeypatch.setenv("COLUMNS", "200")

    def run(command, *arguments, model=model_folder):
        base = ["llmload", command, "--model", str(model), "--data", str(file), "--json"]
        monkeypatch.setattr(sys, "argv", [*base, *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        written = capsys.readouterr()
        lines = [json.loads(line) for line in written.out.splitlines()]
        return status, lines, written.err

    run.file = file
    return run


def learn(run, tmp_path, steps, *more):
    place = ["--bind", "127.0.0.1", "--no-lan", "--no-gateway"]
    place += ["--state", str(tmp_path / "state")]
    options = ["--window", "16", "--rate", "0.003", "--report-every", "5", "--steps", str(steps)]
    return run("learn", "--out", str(tmp_path / "out"), *place, *options, *more)


def test_learning_goes_on_where_it_stopped_and_helps(run, tmp_path, model_folder):
    _, [before], _ = run("eval", "--window", "16")
    assert before.keys() == {"tokens", "loss", "perplexity", "bits_per_byte"}
    status, lines, _ = learn(run, tmp_path, 10)
    assert status == 0
    assert [line["step"] for line in lines if "loss" in line] == [5, 10]
    assert lines[-1] == {"event": "saved", "step": 10, "folder": str(tmp_path / "out")}
    status, lines, _ = learn(run, tmp_path, 20)
    assert status == 0
    assert lines[0] == {"event": "resumed", "step": 10}
    assert [line["step"] for line in lines if "loss" in line] == [15, 20]
    with (tmp_path / "out" / "curve.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5", "10", "15", "20"]
    assert (tmp_path / "out" / "curve.png").exists() == can_draw()
    # What came out is a model folder like any other.
    out = load_model(tmp_path / "out")
    assert out.content_hash != load_model(model_folder).content_hash
    _, [after], _ = run("eval", "--window", "16", model=tmp_path / "out")
    assert after["loss"] < 0.8 * before["loss"]


def test_what_this_device_keeps_is_learned_from_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PREFER_EVERY", 5)
    me, store = Identity(bytes(32)), RecordStore(tmp_path / "state" / "records.sqlite")
    kept = (TextRecord("of all nodes " * 99), FeedbackRecord("the peers", " of the mesh", 1))
    store.add([sign_record(me, record) for record in kept])
    status, lines, _ = learn(run, tmp_path, 5, "--no-texts")
    assert status == 0
    row = lines[-2]
    assert 0 < row["preference_loss"] < 0.5  # the text has taught what was marked as good
    assert (row["texts"], row["text_bytes_sent"], row["useless_sources"]) == (0, 0, 0)


def test_how_a_step_is_made_can_be_chosen(run, tmp_path):
    chosen = ["--parts", "2", "--batch", "2", "--recompute", "1", "--warmup", "2", "--decay", "4"]
    status, lines, _ = learn(run, tmp_path, 5, *chosen)
    assert status == 0
    assert [line["step"] for line in lines if "loss" in line] == [5]
    status, _, said = learn(run, tmp_path, 5, "--warmup", "4", "--decay", "4")
    assert status == 2
    assert "must be more than" in said


def test_without_matplotlib_it_learns_all_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_learn, "can_draw", lambda: False)
    status, lines, _ = learn(run, tmp_path, 5)
    assert status == 0
    (hint,) = [line for line in lines if line.get("event") == "no picture"]
    assert "natswarm[plots]" in hint["advice"]
    assert not (tmp_path / "out" / "curve.png").exists()


def test_an_adapter_is_learned_and_used(run, tmp_path, model_folder, monkeypatch, capsys):
    _, [before], _ = run("eval", "--window", "16")
    for steps, precision in ((5, "float32"), (10, "int8")):
        chosen = ["--adapter", "4", "--rate", "0.02", "--precision", precision]
        status, lines, said = learn(run, tmp_path, steps, *chosen)
        assert status == 0, said
        assert [line["step"] for line in lines if "loss" in line] == [steps]
    file = tmp_path / "out" / "adapter.safetensors"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    _, [after], _ = run("eval", "--window", "16", "--adapter", str(file))
    assert after["loss"] < 0.95 * before["loss"]
    # A checkpoint of another shape is no place to go on from.
    status, _, said = learn(run, tmp_path, 15, "--adapter", "5")
    assert status == 1
    assert "another model or adapter" in said
    status, _, said = learn(run, tmp_path, 15, "--precision", "int8")
    assert status == 2
    assert "only with --adapter" in said

    answers = []
    for adapter in ([], ["--adapter", str(file)]):
        options = ["--model", str(model_folder), "--json", "--temperature", "0", "-n", "8"]
        monkeypatch.setattr(sys, "argv", ["llmload", "generate", "the", *options, *adapter])
        with pytest.raises(SystemExit):
            cli.main()
        answers.append(json.loads(capsys.readouterr().out)["text"])
    assert answers[0] != answers[1]


def test_a_text_that_is_too_short_or_no_text_is_a_usage_error(run, tmp_path):
    run.file.write_text("short")
    status, _, said = learn(run, tmp_path, 5)
    assert status == 2
    assert "too few" in said
    run.file.write_bytes(b"\xff\xfe\x00\x81")
    status, _, said = learn(run, tmp_path, 5)
    assert status == 2
    assert "UTF-8" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--window", "100000"), "tokens at once"),
        (("--codec", "int8"), "only with --stages"),
    ],
)
def test_options_that_would_do_nothing_are_refused(run, tmp_path, options, why):
    status, lines, errors = learn(run, tmp_path, 10, *options)
    assert (status, lines) == (2, [])
    assert why in " ".join(errors.split())


def test_a_loss_that_is_no_number_is_null_in_json(capsys):
    print_facts(True, {"step": 3, "loss": math.nan, "norm": math.inf, "rate": 0.5})
    assert json.loads(capsys.readouterr().out) == {
        "step": 3,
        "loss": None,
        "norm": None,
        "rate": 0.5,
    }


@pytest.mark.parametrize("place", ["text.txt", "text.txt/inside", "model"])
def test_a_folder_that_can_not_be_is_told_before_anything_is_learned(run, tmp_path, place):
    status, lines, said = learn(run, tmp_path, 5, "--out", str(tmp_path / place))
    assert (status, lines) == (2, [])
    assert "--out" in said
