"""`llmload up --train` and `llmload learn --stages`: processes on loopback."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest

from llmload import cli
from llmload.config import GPT2Config
from llmload.learn.curve import can_draw
from llmload.model_folder import load_model, save_config
from llmload.weights import save_weights

TEXT = "the mesh of the peers, the peers of the mesh. " * 60
TIMEOUT_S = 60


@contextmanager
def llmload(*arguments):
    """Run a command in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", "from llmload.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def read_event(process, wanted):
    for line in process.stdout:
        facts = json.loads(line)
        if wanted(facts):
            return facts
    raise AssertionError(process.stderr.read())


@pytest.fixture
def place(model_folder, tmp_path):
    """A function that returns the options that any command takes here."""

    def options(name):
        state = ["--model", str(model_folder), "--state", str(tmp_path / name)]
        return [*state, "--bind", "127.0.0.1", "--no-lan", "--no-gateway", "--json"]

    return options


def test_training_over_devices_stops_and_goes_on(place, tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text(TEXT)
    with llmload("up", "--train", "--memory", "1MB", *place("stage")) as stage:
        offering = read_event(stage, lambda facts: facts["event"] == "offering")
        assert offering["blocks"] == 2
        command = ["learn", "--data", str(file), "--out", str(out), "--stages", "1"]
        command += ["--window", "16", "--rate", "0.003", "--report-every", "1"]
        command += ["--join", offering["invite"], *place("leader")]
        with llmload(*command) as learner:
            first = read_event(learner, lambda facts: facts.get("step") == 2)
            assert first["route"].endswith(" 0-1")
            learner.send_signal(signal.SIGINT)
            saved = read_event(learner, lambda facts: facts.get("event") == "saved")
            assert learner.wait(TIMEOUT_S) == 130
        learned = load_model(out)
        assert learned.content_hash != load_model(tmp_path / "model").content_hash

        steps = saved["step"] + 2
        monkeypatch.setattr(sys, "argv", ["llmload", *command, "--steps", str(steps)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if "loss" in line]
    assert [row["step"] for row in rows] == [steps - 1, steps]
    assert rows[-1]["validation_loss"] < first["validation_loss"]
    assert {row["devices"] for row in rows} == {1}
    assert 0 < rows[0]["sent_bytes"] < rows[1]["sent_bytes"]
    with (out / "curve.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table] == list(range(1, steps + 1))
    assert table[-1] == {name: str(value) for name, value in rows[-1].items()}
    assert (out / "curve.png").exists() == can_draw()
    words = f"going on from step {saved['step']}"
    assert {"event": "stages", "words": words} in lines
    assert {"event": "saved", "step": steps, "folder": str(out)} in lines
    assert load_model(out).content_hash != learned.content_hash


@pytest.mark.parametrize(
    "arguments", [["up", "--train"], ["learn", "--stages", "1", "--out", "out", "--data", __file__]]
)
def test_a_model_of_one_block_has_none_to_lend(
    monkeypatch, capsys, model_folder, trained_looking_weights, arguments
):
    config = replace(GPT2Config.from_folder(model_folder), n_layer=1)
    save_config(model_folder, config)
    save_weights(model_folder, trained_looking_weights(config, 1))
    monkeypatch.setattr(sys, "argv", ["llmload", *arguments, "--model", str(model_folder)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "one block" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up", "--train", "--memory", "0.1MB"], "give at least"),
        (["up", "--train", "--memory", "1MB", "--blocks", "0-1"], "says which"),
        (["learn", "--stages", "1", "--adapter", "4"], "leave out"),
    ],
)
def test_wrong_usage_is_explained(place, tmp_path, monkeypatch, capsys, arguments, said):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    if arguments[0] == "learn":
        arguments = [*arguments, "--data", str(file), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["llmload", *arguments, *place("state")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
