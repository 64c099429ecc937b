"""Open a model folder: configuration, tokenizer, weights and the hash that names the model.

The folder is in Hugging Face layout: `config.json`; `model.safetensors`, or several files and their
index; `tokenizer.json`, or `vocab.json` and `merges.txt`.

This file does not know how any of the three is read; it only ties them together.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmload.config import CONFIG_FILE_NAME, GPT2Config
from llmload.model_cache import ModelCache
from llmload.tokenizer import Tokenizer
from llmload.weights import Weights, content_hash_of_folder, load_weights, replace_file

__all__ = ["Model", "copy_tokenizer", "load_model", "remember_hash", "save_config"]

TOKENIZER_FILE_NAMES = ("tokenizer.json", "vocab.json", "merges.txt")
_HASH_FACT = "content_hash"


@dataclass(frozen=True)
class Model:
    """A model, or the part of it that a stage holds.

    Attributes:
        folder: Where it was read from.
        config: The shape of the whole model.
        tokenizer: Text to ids and back.
        blocks: The blocks that this process holds.
        content_hash: SHA-256 of configuration and values of the WHOLE model, in hexadecimal:
            holders of different parts of one model have the same.
    """

    folder: Path
    config: GPT2Config
    tokenizer: Tokenizer
    blocks: range
    content_hash: str

    @cached_property
    def weights(self) -> Weights:
        """Parameters of the blocks, float32 by name; read when they are first asked for.

        Raises:
            ModelFolderError: The file was removed or damaged since the model was loaded.
        """
        return load_weights(self.folder, self.blocks, config=self.config)


def load_model(folder: Path, blocks: range | None = None) -> Model:
    """Read a model folder, or the part of it that a stage needs.

    The content hash needs one pass over the whole file, about a second for GPT-2 124M, with one
    tensor in memory at a time. It is remembered (`ModelCache`) until a file of the folder changes,
    and with it that all values were read and checked.

    Args:
        folder: Model folder; `weights.bundled_model_path()` is the one that is shipped.
        blocks: Contiguous range of blocks to hold; None for all.

    Raises:
        ModelFolderError: Anything in the folder is missing, damaged, or does not fit together.
        ValueError: `blocks` is not a contiguous part of the model.
    """
    config = GPT2Config.from_folder(folder)
    held = config.blocks if blocks is None else blocks
    config.check_blocks(held)
    tokenizer = Tokenizer.from_folder(folder, config)
    identity = ModelCache(folder).recall(_HASH_FACT)
    if type(identity) is not str:
        identity = content_hash_of_folder(folder, config=config)
        remember_hash(folder, identity)
    return Model(folder, config, tokenizer, held, identity)


def remember_hash(folder: Path, identity: str) -> None:
    """Spare `load_model` the pass over a folder whose values were just read and checked."""
    ModelCache(folder).remember(_HASH_FACT, identity)


def copy_tokenizer(model: Model, folder: Path) -> None:
    """Copy the files of a model's tokenizer to another folder, unless they are there.

    Raises:
        OSError: One can't be written.
    """
    for name in TOKENIZER_FILE_NAMES:
        source, copy = model.folder / name, folder / name
        if source.exists() and not copy.exists():
            shutil.copyfile(source, copy)


def save_config(folder: Path, config: GPT2Config) -> Path:
    """Write `config.json`, readable by `transformers` as well, and return its path.

    Raises:
        OSError: The file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CONFIG_FILE_NAME
    text = json.dumps(config.to_fields(), indent=2) + "\n"
    replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))
    return file
