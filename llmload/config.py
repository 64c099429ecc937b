"""The shape of a GPT-2 model, as a Hugging Face `config.json` describes it.

Other projects carry one configuration class for two hundred architectures. Here is one
architecture, so every field means one thing, is checked once, and whoever holds a `GPT2Config` may
rely on it. From the shape follows which parameters exist and how large they are: that table is the
contract between the weight loader, the NumPy reference, the ONNX graphs and the trainer.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; field and
parameter names are those of OpenAI's code and of `transformers.GPT2Config`.

This file does not know where weights live or how they are computed with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmload.errors import ModelFolderError

__all__ = ["CONFIG_FILE_NAME", "GPT2Config", "parameter_shapes"]

CONFIG_FILE_NAME = "config.json"

# A config.json of a real model has about 1 KB. The bound keeps a stranger's file from filling the
# memory before anything is known about it.
MAX_CONFIG_BYTES = 1_000_000

# No dimension of a published GPT-2 class model comes near: GPT-2 XL has 50,257 tokens and 1,600
# channels. The bound keeps later products of dimensions within 64 bits.
MAX_DIMENSION = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config:
    """The hyperparameters of one GPT-2 model.

    Attributes:
        vocab_size: Rows of the token embedding `wte`.
        n_ctx: Positions that the model knows: rows of `wpe`, bound of prompt and answer together.
        n_embd: Channels of the residual stream.
        n_layer: Transformer blocks.
        n_head: Attention heads a block; divides `n_embd`.
        layer_norm_epsilon: Added to the variance in every layer norm.
        tie_word_embeddings: Whether the output layer is the token embedding, transposed.
        bos_token_id: Token that opens a document, if the model has one.
        eos_token_id: Token that ends a document, if the model has one; generation stops there.

    Raises:
        ValueError: A field is out of its range, or fields contradict each other.
    """

    vocab_size: int
    n_ctx: int
    n_embd: int
    n_layer: int
    n_head: int
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_ctx", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            # `bool` is a subclass of `int`: without the exact type, `true` would be one layer.
            if type(value) is not int or not 1 <= value <= MAX_DIMENSION:
                raise ValueError(f"{name} must be an integer in 1..{MAX_DIMENSION}, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head = {self.n_head} does not divide n_embd = {self.n_embd}")
        epsilon = self.layer_norm_epsilon
        if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
            raise ValueError(f"layer_norm_epsilon must be in (0, 1), got {epsilon!r}")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(
                f"tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}"
            )
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and (type(token) is not int or not 0 <= token < self.vocab_size):
                raise ValueError(f"{name} must be null or in 0..{self.vocab_size - 1}: {token!r}")

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def lm_head_name(self) -> str:
        """Name of the output matrix (vocab_size, n_embd): the token embedding if they are tied."""
        return "wte.weight" if self.tie_word_embeddings else "lm_head.weight"

    @property
    def blocks(self) -> range:
        """All blocks of the model; a stage of the pipeline owns a contiguous part of them."""
        return range(self.n_layer)

    def check_blocks(self, blocks: range) -> None:
        """Raise ValueError unless `blocks` is a non-empty contiguous part of this model."""
        if blocks.step != 1 or not 0 <= blocks.start < blocks.stop <= self.n_layer:
            raise ValueError(f"{blocks} is no contiguous part of the {self.n_layer} blocks")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> GPT2Config:
        """Build the configuration from the fields of a parsed `config.json`.

        Fields that only steer training (dropout) or other libraries are ignored; fields that would
        change the arithmetic must have the value that this package computes with.

        Raises:
            ValueError: A field is missing, out of range, or asks for another architecture.
        """
        if (model_type := fields.get("model_type", "gpt2")) != "gpt2":
            raise ValueError(f"model_type is {model_type!r}, only 'gpt2' is supported")
        # Old files call it n_ctx, newer ones n_positions, most carry both.
        n_ctx = fields.get("n_positions", fields.get("n_ctx"))
        if fields.get("n_ctx", n_ctx) != n_ctx:
            raise ValueError(f"n_positions = {n_ctx!r} contradicts n_ctx = {fields['n_ctx']!r}")
        values = {"n_ctx": n_ctx}
        for name in ("vocab_size", "n_embd", "n_layer", "n_head"):
            values[name] = fields.get(name)
        if missing := [name for name, value in values.items() if value is None]:
            raise ValueError(f"fields are missing: {', '.join(missing)}")

        supported: dict[str, tuple[Any, ...]] = {
            "activation_function": ("gelu_new",),
            "n_inner": (None, 4 * values["n_embd"] if type(values["n_embd"]) is int else None),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        }
        for name, allowed in supported.items():
            if (value := fields.get(name, allowed[0])) not in allowed:
                raise ValueError(f"{name} = {value!r} is not supported, only {allowed[-1]!r}")
        for name in (
            "layer_norm_epsilon",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
        ):
            if name in fields:
                values[name] = fields[name]
        return cls(**values)

    @classmethod
    def from_folder(cls, folder: Path) -> GPT2Config:
        """Read `config.json` of a model folder.

        Raises:
            ModelFolderError: The file is missing, not JSON, or describes a model that is not GPT-2.
        """
        file = folder / CONFIG_FILE_NAME
        try:
            with file.open("rb") as stream:
                content = stream.read(MAX_CONFIG_BYTES + 1)
        except OSError as error:
            raise ModelFolderError(
                file,
                f"can't be read ({error.strerror})",
                "A model folder holds config.json, model.safetensors and tokenizer.json.",
            ) from error
        if len(content) > MAX_CONFIG_BYTES:
            raise ModelFolderError(
                file, f"larger than {MAX_CONFIG_BYTES} bytes", "This is no model configuration."
            )
        try:
            fields = json.loads(content)
        # RecursionError: deep nesting is the one way in which json fails other than by ValueError.
        except (ValueError, RecursionError) as error:
            raise ModelFolderError(
                file, f"not valid JSON ({error})", "Copy or download the model folder again."
            ) from error
        if not isinstance(fields, dict):
            raise ModelFolderError(
                file, "not a JSON object", "Copy or download the model folder again."
            )
        try:
            return cls.from_fields(fields)
        except ValueError as error:
            raise ModelFolderError(
                file,
                str(error),
                "Use a model of the GPT-2 architecture in Hugging Face layout "
                "(gpt2, distilgpt2 and their fine-tunes).",
            ) from error

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of a `config.json` that `transformers` reads as well."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "n_positions": self.n_ctx,
            **asdict(self),
        }


def parameter_shapes(config: GPT2Config, blocks: range) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter that a stage with `blocks` needs, in model order.

    The first stage holds the embeddings, the last one the final norm and the output layer; with
    tied embeddings both of them hold `wte.weight`. Matrices are (in, out), as OpenAI stored them:
    a linear layer is `x @ weight + bias`.

    Raises:
        ValueError: `blocks` is not a contiguous part of the model.
    """
    config.check_blocks(blocks)
    n_embd = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {}
    if blocks.start == 0:
        shapes["wte.weight"] = (config.vocab_size, n_embd)
        shapes["wpe.weight"] = (config.n_ctx, n_embd)
    for index in blocks:
        shapes[f"h.{index}.ln_1.weight"] = (n_embd,)
        shapes[f"h.{index}.ln_1.bias"] = (n_embd,)
        shapes[f"h.{index}.attn.c_attn.weight"] = (n_embd, 3 * n_embd)
        shapes[f"h.{index}.attn.c_attn.bias"] = (3 * n_embd,)
        shapes[f"h.{index}.attn.c_proj.weight"] = (n_embd, n_embd)
        shapes[f"h.{index}.attn.c_proj.bias"] = (n_embd,)
        shapes[f"h.{index}.ln_2.weight"] = (n_embd,)
        shapes[f"h.{index}.ln_2.bias"] = (n_embd,)
        shapes[f"h.{index}.mlp.c_fc.weight"] = (n_embd, 4 * n_embd)
        shapes[f"h.{index}.mlp.c_fc.bias"] = (4 * n_embd,)
        shapes[f"h.{index}.mlp.c_proj.weight"] = (4 * n_embd, n_embd)
        shapes[f"h.{index}.mlp.c_proj.bias"] = (n_embd,)
    if blocks.stop == config.n_layer:
        shapes["ln_f.weight"] = (n_embd,)
        shapes["ln_f.bias"] = (n_embd,)
        shapes[config.lm_head_name] = (config.vocab_size, n_embd)
    return shapes
