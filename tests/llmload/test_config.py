"""The configuration takes GPT-2's own file as it is, and nothing that is not GPT-2."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmload.config import GPT2Config, parameter_shapes
from llmload.errors import ModelFolderError
from llmload.model_folder import save_config

# The config.json of https://huggingface.co/openai-community/gpt2, field for field.
GPT2_124M = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def test_published_gpt2_is_read():
    config = GPT2Config.from_fields(GPT2_124M)
    assert config == GPT2Config(
        vocab_size=50257,
        n_ctx=1024,
        n_embd=768,
        n_layer=12,
        n_head=12,
        bos_token_id=50256,
        eos_token_id=50256,
    )
    assert config.head_size == 64
    # 124,439,808 is the number that everybody reports for this model.
    shapes = parameter_shapes(config, config.blocks).values()
    assert sum(rows * (columns or [1])[0] for rows, *columns in shapes) == 124_439_808


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "gelu"}, "activation_function = 'gelu'"),
        ({"n_inner": 100}, "n_inner = 100"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_ctx": 512}, "contradicts"),
        ({"n_head": 7}, "does not divide"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": True}, "n_layer"),
        ({"n_embd": "768"}, "n_embd"),
        ({"vocab_size": 10**18}, "vocab_size"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"eos_token_id": 50257}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"vocab_size": None}, "missing: vocab_size"),
    ],
)
def test_what_is_not_gpt2_is_named(tmp_path, change, complaint):
    (tmp_path / "config.json").write_text(json.dumps({**GPT2_124M, **change}))
    with pytest.raises(ModelFolderError) as caught:
        GPT2Config.from_folder(tmp_path)
    assert caught.value.file == tmp_path / "config.json"
    assert complaint in caught.value.problem


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b" " * 1_000_001]
)
def test_what_is_not_a_config_file_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFolderError):
        GPT2Config.from_folder(tmp_path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match=r"config\.json: can't be read"):
        GPT2Config.from_folder(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=2),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from(sorted(GPT2_124M)), json_values))
def test_any_fields_give_a_config_or_a_value_error(changes):
    """Types of fields come from a stranger's file too."""
    try:
        config = GPT2Config.from_fields({**GPT2_124M, **changes})
    except ValueError:
        return
    assert config.n_embd == config.n_head * config.head_size


def test_saved_config_is_read_back(tmp_path, config):
    untied = dataclasses.replace(config, tie_word_embeddings=False, eos_token_id=None)
    for original in (config, untied):
        save_config(tmp_path, original)
        assert GPT2Config.from_folder(tmp_path) == original


def test_stages_share_only_the_tied_embedding(config):
    """Cutting the model anywhere loses no parameter and doubles none but wte."""
    whole = parameter_shapes(config, config.blocks)
    for cut in range(1, config.n_layer):
        head = parameter_shapes(config, range(cut))
        tail = parameter_shapes(config, range(cut, config.n_layer))
        assert head | tail == whole
        assert head.keys() & tail.keys() == {"wte.weight"}


@pytest.mark.parametrize("blocks", [range(0), range(2, 1), range(4), range(-1, 2), range(0, 3, 2)])
def test_blocks_must_be_a_part_of_the_model(config, blocks):
    with pytest.raises(ValueError, match="no contiguous part"):
        parameter_shapes(config, blocks)
