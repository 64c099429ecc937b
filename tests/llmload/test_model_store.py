"""Models come in checked or not at all, and are found again by their name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from llmload import cli
from llmload.errors import ModelFolderError
from llmload.model_folder import load_model
from llmload.model_store import PUBLISHED_SHAPES, ModelStore


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path / "store")


def test_an_imported_model_is_the_same_and_needs_its_source_no_more(store, model_folder):
    expected = load_model(model_folder)
    stored = store.take_in(model_folder, "mine")
    shutil.rmtree(model_folder)
    assert [model.name for model in store.models()] == ["mine"]
    assert stored.content_hash == expected.content_hash == store.verify("mine")
    found = load_model(store.find("mine"))
    assert (found.config, found.content_hash) == (expected.config, expected.content_hash)
    assert found.tokenizer.encode("the mesh") == expected.tokenizer.encode("the mesh")
    assert stored.byte_size > 4 * sum(values.size for values in found.weights.values())


def test_one_of_several_weights_files_may_be_chosen(store, model_folder, weights):
    doubled = {name: values * np.float32(2) for name, values in weights.items()}
    save_file(doubled, model_folder / "tuned.safetensors")
    store.take_in(model_folder / "tuned.safetensors", "tuned")
    found = load_model(store.find("tuned")).weights
    np.testing.assert_array_equal(found["wpe.weight"], doubled["wpe.weight"])


def test_what_is_refused_leaves_nothing_behind(store, model_folder):
    file = model_folder / "model.safetensors"
    sound = file.read_bytes()
    config = model_folder / "config.json"
    fields = json.loads(config.read_text())

    def refuse(complaint, name="x"):
        with pytest.raises(ModelFolderError, match=complaint):
            store.take_in(model_folder, name)
        assert not store.root.exists() or not list(store.root.iterdir())

    tensors = load_file(file)
    save_file(tensors | {"transformer.ln_f.bias": np.full(32, np.nan, np.float32)}, file)
    refuse("NaN")
    file.write_bytes(sound)
    config.write_text(json.dumps(fields | {"model_type": "llama"}))
    refuse("model_type is 'llama', only 'gpt2' is supported.*GPT-2 architecture")
    config.write_text(json.dumps(fields))
    for name in ("../x", ".hidden", "a/b", "", "x" * 65):
        refuse("is no name for a model", name)
    store.take_in(model_folder, "x")
    with pytest.raises(ModelFolderError, match="already"):
        store.take_in(model_folder, "x")


def test_verify_notices_a_changed_model(store, model_folder, weights):
    stored = store.take_in(model_folder, "mine")
    file = stored.folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"was .* when it was imported"):
        store.verify("mine")
    with pytest.raises(ModelFolderError, match=r"Models here: mine\. Add one"):
        store.verify("other")


def test_a_random_model_has_the_published_size(store, monkeypatch):
    monkeypatch.setitem(PUBLISHED_SHAPES, "small", (2, 2, 16))
    one, same = store.make_random("small", 1), store.make_random("small", 1, "same")
    other = store.make_random("small", 2)
    assert one.name == "small-random-1"
    assert one.content_hash == same.content_hash != other.content_hash
    model = load_model(one.folder)
    assert (model.config.vocab_size, model.config.n_ctx, model.config.n_layer) == (50257, 1024, 2)
    assert model.tokenizer.decode(model.tokenizer.encode("Ü")) == "Ü"
    with pytest.raises(ValueError, match="no shape 'gpt3'"):
        store.make_random("gpt3", 1)


def test_commands(tmp_path, model_folder, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    run = CliRunner().invoke
    assert "No models yet" in run(cli.app, ["model", "list"]).output
    taken = json.loads(
        run(cli.app, ["model", "import", str(model_folder), "--name", "m", "--json"]).output
    )
    assert run(cli.app, ["model", "list"]).output.startswith("m  ")
    facts = json.loads(run(cli.app, ["model", "info", "m", "--json"]).output)
    assert (facts["hash"], facts["n_layer"]) == (taken["hash"], 3)
    assert facts == json.loads(run(cli.app, ["info", "--model", "m", "--json"]).output)
    checked = run(cli.app, ["model", "verify", "m", "--json"]).output
    assert json.loads(checked) == {"ok": True, "hash": taken["hash"]}
    assert run(cli.app, ["model", "make-random", "gpt3"]).exit_code == 2
