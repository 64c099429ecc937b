"""Open a model folder: configuration, tokenizer, weights and the hash that names the model.

The folder is in Hugging Face layout: `config.json`, `model.safetensors`, `tokenizer.json`.

This file does not know how any of the three is read; it only ties them together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llmload.config import CONFIG_FILE_NAME, GPT2Config
from llmload.tokenizer import Tokenizer
from llmload.weights import (
    Weights,
    content_hash,
    content_hash_of_folder,
    load_weights,
    replace_file,
)

__all__ = ["Model", "load_model", "save_config"]


@dataclass(frozen=True, slots=True)
class Model:
    """A model, or the part of it that a stage holds.

    Attributes:
        folder: Where it was read from.
        config: The shape of the whole model.
        tokenizer: Text to ids and back.
        blocks: The blocks that this process holds.
        weights: Parameters of those blocks, float32 by name.
        content_hash: SHA-256 of configuration and values of the WHOLE model, in hexadecimal:
            holders of different parts of one model have the same.
    """

    folder: Path
    config: GPT2Config
    tokenizer: Tokenizer
    blocks: range
    weights: Weights
    content_hash: str


def load_model(folder: Path, blocks: range | None = None) -> Model:
    """Read a model folder, or the part of it that a stage needs.

    The content hash needs one pass over the whole file even where few blocks are wanted: about a
    second for GPT-2 124M, with one tensor in memory at a time.

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
    weights = load_weights(folder, held, config=config)
    if held == config.blocks:
        identity = content_hash(config, weights.items())
    else:
        identity = content_hash_of_folder(folder, config=config)
    return Model(folder, config, tokenizer, held, weights, identity)


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
