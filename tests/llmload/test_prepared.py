"""What was prepared once is opened again, is the same model, and is made anew where it is bad."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmload.engine import prepared, tuning
from llmload.engine.prepared import open_stage
from llmload.engine.session import StageEngine
from llmload.engine.tuning import EngineSettings, best_settings
from llmload.graph.quantize import PRECISIONS
from llmload.graph.stage import ATTENTION_FORMS
from llmload.model_cache import ModelCache

GROUPED = EngineSettings(attention="grouped")


@pytest.fixture
def cache(model_folder, tmp_path):
    return ModelCache(model_folder, tmp_path / "cache")


@pytest.fixture
def count_preparations(monkeypatch):
    made = []
    prepare = prepared._prepare

    def counting(*arguments):
        made.append(arguments)
        prepare(*arguments)

    monkeypatch.setattr(prepared, "_prepare", counting)
    return made


def logits_of(stages, tokens):
    x = tokens
    for stage in stages:
        x = stage.run(x, stage.new_cache(), logits_count=9)
    return x


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_prepared_model_computes_the_same(model_folder, config, weights, cache, precision):
    tokens = np.random.default_rng(1).integers(0, 300, (1, 9))
    for attention in ("grouped", "plain"):
        settings = EngineSettings(attention=attention)
        from_arrays = StageEngine(config, weights, precision=precision, attention=attention)
        expected = logits_of([from_arrays], tokens)
        for split in ([None], [range(1), range(1, 3)]):
            for _ in range(2):  # made, and found
                stages = [
                    open_stage(model_folder, b, precision=precision, settings=settings, cache=cache)
                    for b in split
                ]
                np.testing.assert_allclose(logits_of(stages, tokens), expected, rtol=0, atol=1e-5)


def test_nothing_is_prepared_twice_and_damage_is_repaired(model_folder, cache, count_preparations):
    def open_it():
        return open_stage(model_folder, precision="int4", settings=GROUPED, cache=cache)

    open_it()
    open_it()
    assert len(count_preparations) == 1
    (folder,) = cache.path.glob("blocks-*")
    assert sorted(file.name for file in folder.iterdir()) == ["stage.data", "stage.onnx"]
    (folder / "stage.onnx").write_bytes(b"no graph")
    assert open_it().precision == "int4"
    assert len(count_preparations) == 2
    assert not list(cache.path.glob(".new-*"))


def test_a_changed_model_is_another_entry_and_the_old_one_goes(model_folder, tmp_path, cache):
    cache.remember("x", 1)
    assert ModelCache(model_folder, tmp_path / "cache").recall("x") == 1
    with (model_folder / "config.json").open("a") as file:
        file.write("\n")
    changed = ModelCache(model_folder, tmp_path / "cache")
    assert changed.recall("x") is None
    changed.remember("x", 2)
    assert not cache.path.exists()
    assert changed.recall("x") == 2
    (changed.path / "facts.json").write_text("[]")
    assert changed.recall("x") is None


def test_a_cache_that_can_not_be_written_costs_only_time(model_folder, config, weights, tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = ModelCache(model_folder, tmp_path / "file" / "cache")
    cache.remember("x", 1)
    assert cache.recall("x") is None
    tokens = np.array([[1, 2, 3]])
    stage = open_stage(model_folder, precision="int8", settings=GROUPED, cache=cache)
    expected = logits_of([StageEngine(config, weights, precision="int8")], tokens)
    np.testing.assert_array_equal(logits_of([stage], tokens), expected)


def test_the_fastest_form_wins_if_it_is_clear_and_is_remembered(config, cache, monkeypatch):
    seconds = {"grouped": 1.0, "plain": 0.95}
    asked = []
    monkeypatch.setattr(tuning, "measure_forms", lambda *_: asked.append(1) or seconds)
    monkeypatch.setattr(tuning, "measure_threads", lambda *_: {1: 1.0, 2: 0.5})
    assert best_settings(config, "int8", cache) == EngineSettings(attention="grouped", threads=2)
    seconds["plain"] = 0.8
    assert best_settings(config, "int4", cache) == EngineSettings(attention="plain", threads=2)
    assert best_settings(config, "int8", cache).attention == "grouped"
    assert len(asked) == 2
    facts = json.loads((cache.path / "facts.json").read_text())
    for damaged in ({"attention": "none", "threads": 1}, {"attention": "plain", "threads": 99}, 3):
        cache.remember(next(iter(facts)), damaged)
        assert best_settings(config, "int8", cache).attention == "plain"


def test_every_form_is_measured(config):
    forms = tuning.measure_forms(config, "int4")
    assert set(forms) == set(ATTENTION_FORMS)
    assert all(0 < seconds < 60 for seconds in forms.values())
    assert 1 in tuning.measure_threads(config, "float32", "grouped")
