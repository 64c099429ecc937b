"""Text in, text out: whole, in a stream, and when the tokens are nonsense."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from llmload.errors import ModelFolderError
from llmload.tokenizer import Tokenizer, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(bpe):
    return Tokenizer(bpe)


def test_text_survives(tokenizer):
    for text in ("", "the mesh", " leading", "Grüße, 漢字 🦔\n\t\x00", "é"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the mesh")) < len("the mesh")


def test_vocabulary_and_merges_are_the_same_tokenizer(model_folder, bpe, config):
    """The layout of OpenAI's own files, which have no settings of their own."""
    (model_folder / "tokenizer.json").unlink()
    bpe.model.save(str(model_folder))
    vocabulary = json.loads((model_folder / "vocab.json").read_text())
    (model_folder / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": 0}))
    tokenizer = Tokenizer.from_folder(model_folder, config)
    text = "the mesh of Grüße, 漢字 🦔"
    assert tokenizer.encode(text) == bpe.encode(text).ids
    assert tokenizer.decode([0, *tokenizer.encode(text)]) == text
    again = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.to_json()))
    assert again.encode(text) == tokenizer.encode(text)
    (model_folder / "merges.txt").write_text("#version: 0.2\nthe thing that is no merge")
    with pytest.raises(ModelFolderError, match=r"vocab\.json.*damaged"):
        Tokenizer.from_folder(model_folder, config)


def test_bytes_are_a_tokenizer():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]
    assert tokenizer.decode(range(32, 127)) == bytes(range(32, 127)).decode()


@given(st.text())
def test_any_text_survives_the_stream(tokenizer, text):
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""


@given(st.lists(st.integers(0, 289), max_size=30))
def test_stream_of_any_tokens_is_what_the_library_decodes(tokenizer, bpe, token_ids):
    """Also where the bytes are no UTF-8, as a model may emit them."""
    assert tokenizer.decode(token_ids) == bpe.decode(token_ids)


def test_a_character_appears_when_its_last_byte_comes(tokenizer):
    stream = tokenizer.stream()
    token_ids = tokenizer.encode("🦔!")
    assert len(token_ids) == 5
    assert [stream.push(token_id) for token_id in token_ids] == ["", "", "", "🦔", "!"]


def test_bytes_that_never_become_a_character_do_not_block_the_stream(tokenizer):
    hedgehog = tokenizer.encode("🦔")
    stream = tokenizer.stream()
    assert [stream.push(hedgehog[0]), stream.push(hedgehog[0])] == ["", "\ufffd"]
    assert stream.push(tokenizer.encode("x")[0]) == "\ufffdx"
    stream.push(hedgehog[0])
    assert stream.finish() == "\ufffd"


def test_special_and_unknown_tokens_are_no_text(tokenizer):
    assert tokenizer.decode([0]) == ""
    assert tokenizer.decode([10**6, *tokenizer.encode("a"), 0]) == "a"


def test_added_tokens_are_themselves(bpe):
    library = tokenizers.Tokenizer.from_str(bpe.to_str())
    library.add_tokens([AddedToken("<Ü>")])
    tokenizer = Tokenizer(library)
    token_ids = tokenizer.encode("a<Ü>b")
    assert len(token_ids) == 3
    assert tokenizer.decode(token_ids) == "a<Ü>b"


def test_leftovers_of_training_do_not_change_a_prompt(bpe):
    library = tokenizers.Tokenizer.from_str(bpe.to_str())
    library.enable_truncation(2)
    library.enable_padding(length=50)
    assert Tokenizer(library).encode("xyzw") == Tokenizer(bpe).encode("xyzw")


def test_tokenizer_larger_than_the_model_is_refused(model_folder, config):
    fits = dataclasses.replace(
        config, vocab_size=Tokenizer.from_folder(model_folder, config).largest_id + 1
    )
    Tokenizer.from_folder(model_folder, fits)
    smaller = dataclasses.replace(fits, vocab_size=fits.vocab_size - 1)
    with pytest.raises(ModelFolderError, match="has the token id"):
        Tokenizer.from_folder(model_folder, smaller)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer_is_refused(model_folder, config, content):
    (model_folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json: damaged or not supported"):
        Tokenizer.from_folder(model_folder, config)


def test_other_kinds_of_tokenizers_are_refused(model_folder, config):
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(model_folder / "tokenizer.json"))
    with pytest.raises(ModelFolderError, match="no byte-level BPE"):
        Tokenizer.from_folder(model_folder, config)


def test_vocabulary_that_is_not_made_of_bytes_is_refused():
    library = tokenizers.Tokenizer(models.WordLevel({"\u2581word": 0}, unk_token="?"))
    library.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="not made of bytes"):
        Tokenizer(library)


def test_missing_tokenizer_is_refused(model_folder, config):
    (model_folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFolderError, match="can't be read"):
        Tokenizer.from_folder(model_folder, config)
