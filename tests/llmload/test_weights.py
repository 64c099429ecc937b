"""Weights survive the disk; folders that are damaged, foreign or dangerous are refused by name."""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile
from itertools import islice

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from llmload import model_folder as model_folder_module
from llmload.config import GPT2Config, parameter_shapes
from llmload.errors import ModelFolderError
from llmload.model_folder import load_model, save_config
from llmload.weights import (
    bundled_model_path,
    content_hash,
    content_hash_of_folder,
    load_weights,
    random_weights,
    replace_file,
    save_weights,
    save_weights_in_parts,
)


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, values in expected.items():
        assert actual[name].dtype == np.float32
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


def test_saved_weights_are_read_back(model_folder, weights):
    assert_same(load_weights(model_folder), weights)


def test_other_layouts_of_the_same_model_are_read(model_folder, weights, config):
    """Without prefix, with old masks, with the tied head spelled out: as found in the wild."""
    extras = {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 8, 8), dtype=np.uint8)),
        "h.0.attn.masked_bias": np.array(-1e4, dtype=np.float32),
        "lm_head.weight": weights["wte.weight"].copy(),
    }
    save_file({**weights, **extras}, model_folder / "model.safetensors")
    assert_same(load_weights(model_folder), weights)
    assert content_hash_of_folder(model_folder) == content_hash(config, weights.items())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(model_folder, weights, dtype):
    save_weights(model_folder, weights, dtype=dtype)
    rounded = {name: values.astype(dtype).astype(np.float32) for name, values in weights.items()}
    assert_same(load_weights(model_folder), rounded)


def save_in_shards(folder, weights, count=3):
    """As `save_pretrained` does beyond 5 GB."""
    names = sorted(weights)
    shards = {f"model-{i + 1:05}-of-{count:05}.safetensors": names[i::count] for i in range(count)}
    for file, members in shards.items():
        save_file({f"transformer.{name}": weights[name] for name in members}, folder / file)
    index = {f"transformer.{name}": file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink(missing_ok=True)
    return list(shards)


def test_weights_in_several_files_are_the_same_model(model_folder, config, weights):
    save_in_shards(model_folder, weights)
    assert_same(load_weights(model_folder), weights)
    assert content_hash_of_folder(model_folder) == content_hash(config, weights.items())
    assert_same(
        load_model(model_folder, range(1, 2)).weights, load_weights(model_folder, range(1, 2))
    )


def test_parts_take_the_place_of_one_file(model_folder, config, weights):
    other = {name: values + 1 for name, values in weights.items()}
    names = iter(other)
    first = {name: other[name] for name in islice(names, 5)}
    save_weights_in_parts(model_folder, [first, {name: other[name] for name in names}], "step1")
    assert_same(load_weights(model_folder), other)


def test_damaged_shards_are_named(model_folder, weights):
    shards = save_in_shards(model_folder, weights)
    second = model_folder / shards[1]
    content = second.read_bytes()
    second.write_bytes(content[:-3])
    with pytest.raises(ModelFolderError, match="damaged or cut short") as caught:
        load_weights(model_folder)
    assert caught.value.file == second
    second.unlink()
    with pytest.raises(ModelFolderError, match=r"is missing, but model\.safetensors\.index\.json"):
        load_weights(model_folder)
    index = model_folder / "model.safetensors.index.json"
    for stranger in ("../other.safetensors", "/etc/passwd", 7, "model.bin"):
        index.write_text(json.dumps({"weight_map": {"wte.weight": stranger}}))
        with pytest.raises(ModelFolderError, match="no file of this folder"):
            load_weights(model_folder)
    for nonsense in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'):
        index.write_text(nonsense)
        with pytest.raises(ModelFolderError, match=r"does not say|names 0 files"):
            load_weights(model_folder)


def test_the_hash_of_a_folder_is_found_once_and_anew_when_a_file_changes(
    model_folder, weights, monkeypatch
):
    first = load_model(model_folder).content_hash
    reads = []
    monkeypatch.setattr(
        model_folder_module, "content_hash_of_folder", lambda *_, **__: reads.append(1) or "new"
    )
    assert load_model(model_folder, range(1)).content_hash == first
    assert not reads
    save_weights(model_folder, {n: w + np.float32(1) for n, w in weights.items()})
    assert load_model(model_folder).content_hash == "new"
    assert reads == [1]


def test_a_stage_reads_only_what_it_needs(model_folder, config, weights):
    """Damage in another stage's tensors goes unnoticed, because they are not read."""
    damaged = dict(weights)
    damaged["h.0.mlp.c_fc.weight"] = np.full_like(weights["h.0.mlp.c_fc.weight"], np.nan)
    save_file(damaged, model_folder / "model.safetensors")
    for blocks in (range(1, 2), range(1, 3)):
        names = parameter_shapes(config, blocks)
        expected = {name: weights[name] for name in names}
        assert_same(load_weights(model_folder, blocks), expected)
    with pytest.raises(ModelFolderError, match="NaN"):
        load_weights(model_folder, range(1))


def test_untied_head_is_a_parameter_of_its_own(tmp_path, config):
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    weights = random_weights(untied, seed=1)
    save_config(tmp_path, untied)
    save_weights(tmp_path, weights)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert_same(load_weights(tmp_path), weights)


# --- Damaged folders: what is done to model.safetensors, and what the message must name ---------


def truncated(file):
    file.write_bytes(file.read_bytes()[:-7])


def header_cut(file):
    file.write_bytes(file.read_bytes()[:20])


def empty(file):
    file.write_bytes(b"")


def trailing_bytes(file):
    file.write_bytes(file.read_bytes() + b"x")


def bare_pickle(file):
    file.write_bytes(pickle.dumps({"wte.weight": [1.0] * 100}))


def zipped_pickle(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def missing_file(file):
    file.unlink()


def only_pickle(file):
    file.rename(file.with_name("pytorch_model.bin"))


def sharded(file):
    file.rename(file.with_name("model-00001-of-00002.safetensors"))
    file.with_name("model.safetensors.index.json").write_text("{}")


def directory(file):
    file.unlink()
    file.mkdir()


def changed(**changes):
    """Return a damage that replaces tensors; None removes one."""

    def damage(file):
        tensors = load_file(file) | {name.replace("__", "."): v for name, v in changes.items()}
        save_file({name: v for name, v in tensors.items() if v is not None}, file)

    return damage


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncated, "damaged or cut short"),
        (header_cut, "damaged or cut short"),
        (empty, "damaged or cut short"),
        (trailing_bytes, "damaged or cut short"),
        (bare_pickle, "pickle"),
        (zipped_pickle, "pickle"),
        (missing_file, "there is no model.safetensors"),
        (only_pickle, "this format is not read"),
        (sharded, "does not say which tensor is in which file"),
        (directory, "can't be read"),
        (changed(transformer__ln_f__bias=None), "ln_f.bias is missing"),
        (changed(transformer__wte__weight=None), "wte.weight is missing"),
        (changed(transformer__h__3__ln_1__bias=zeros(32)), "h.3.ln_1.bias is no parameter"),
        (changed(transformer__h__0__attn__bias_lora=zeros(3)), "attn.bias_lora is no parameter"),
        (changed(adapter=zeros(3)), "adapter is no parameter"),
        (changed(transformer__h__1__attn__c_proj__weight=zeros(32, 33)), "shape (32, 33)"),
        (changed(transformer__ln_f__bias=zeros(32, dtype=np.float64)), "stored as F64"),
        (changed(transformer__ln_f__bias=zeros(32, dtype=np.int8)), "stored as I8"),
        (changed(transformer__ln_f__bias=zeros(32) + np.nan), "ln_f.bias holds NaN"),
        (changed(transformer__ln_f__bias=zeros(32) + np.inf), "ln_f.bias holds NaN"),
        (changed(ln_f__bias=zeros(32)), "ln_f.bias is there twice"),
        (changed(lm_head__weight=zeros(300, 32)), "lm_head.weight differs"),
        (changed(lm_head__weight=zeros(3, 32)), "lm_head.weight has the shape"),
    ],
)
def test_damaged_weights_are_refused(model_folder, damage, complaint):
    damage(model_folder / "model.safetensors")
    with pytest.raises(ModelFolderError) as caught:
        load_model(model_folder)
    assert complaint in caught.value.problem
    assert caught.value.file.is_relative_to(model_folder)
    assert caught.value.advice.endswith(".")


@settings(max_examples=60)
@given(st.data())
def test_flipped_header_bits_never_crash(tmp_path_factory, data):
    """Whatever is flipped, the file is read or refused with the one documented error."""
    config = GPT2Config(vocab_size=4, n_ctx=2, n_embd=2, n_layer=1, n_head=1)
    folder = tmp_path_factory.getbasetemp() / "flipped"
    content = bytearray(save_weights(folder, random_weights(config, seed=0)).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    # The file is replaced, not written to: a mapping of the last example may still be alive.
    replace_file(folder / "model.safetensors", lambda path: path.write_bytes(content))
    try:
        weights = load_weights(folder, config=config)
    except ModelFolderError:
        return
    assert all(np.isfinite(values).all() for values in weights.values())


# --- Writing -----------------------------------------------------------------------------------


def test_failed_save_leaves_the_old_file(model_folder, weights):
    before = (model_folder / "model.safetensors").read_bytes()
    files = sorted(model_folder.iterdir())

    def write_and_fail(path):
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(model_folder / "model.safetensors", write_and_fail)
    with pytest.raises(ValueError, match="not finite as float16"):
        save_weights(model_folder, {"ln_f.bias": np.float32([1e6])}, dtype=np.float16)
    assert (model_folder / "model.safetensors").read_bytes() == before
    assert sorted(model_folder.iterdir()) == files


def test_random_weights_are_those_of_a_fresh_gpt2(config):
    weights = random_weights(config, seed=3)
    assert {n: w.shape for n, w in weights.items()} == parameter_shapes(config, config.blocks)
    assert_same(random_weights(config, seed=3), weights)
    assert not np.array_equal(random_weights(config, seed=4)["wte.weight"], weights["wte.weight"])
    assert (weights["h.0.ln_1.weight"] == 1).all()
    assert (weights["ln_f.weight"] == 1).all()
    assert (weights["h.2.mlp.c_fc.bias"] == 0).all()
    assert weights["wte.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert weights["h.1.mlp.c_proj.weight"].std() == pytest.approx(0.02 / 6**0.5, rel=0.05)


# --- The model as one object -------------------------------------------------------------------


def test_parts_of_one_model_have_one_hash(model_folder, config, weights):
    whole = load_model(model_folder)
    part = load_model(model_folder, range(1, 2))
    assert part.content_hash == whole.content_hash == content_hash(config, weights.items())
    assert part.blocks == range(1, 2)
    assert set(part.weights) == set(parameter_shapes(config, range(1, 2)))
    assert whole.tokenizer.decode(whole.tokenizer.encode("the mesh")) == "the mesh"


def test_hash_tells_models_apart(config, weights):
    hashes = {content_hash(config, weights.items())}
    other = {**weights, "ln_f.bias": np.nextafter(weights["ln_f.bias"], np.float32(1))}
    hashes.add(content_hash(config, other.items()))
    # The same numbers under another rule are another model.
    hashes.add(content_hash(dataclasses.replace(config, n_head=2), weights.items()))
    assert len(hashes) == 3
    with pytest.raises(ValueError, match=r"missing from ln_f\.bias on"):
        content_hash(config, list(weights.items())[:-1])


def test_hash_is_pinned():
    """Peers of different versions compare it, so it must not change by accident."""
    config = GPT2Config(vocab_size=2, n_ctx=1, n_embd=1, n_layer=1, n_head=1)
    shapes = parameter_shapes(config, config.blocks)
    counted = [
        (name, np.full(shape, index, np.float32))
        for index, (name, shape) in enumerate(shapes.items())
    ]
    assert content_hash(config, counted) == (
        "0306c49b30b4495e4c466fad18c2842c7ea5c54b1f4f8f48054ea69b69040496"
    )


def test_bundled_model_is_sound():
    model = load_model(bundled_model_path())
    assert model.tokenizer.decode(model.tokenizer.encode("def f(x):")) == "def f(x):"
