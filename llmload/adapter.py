"""Low-rank adapters (LoRA): a small change of a model, as two thin matrices beside some layers.

    y = x W + b + (alpha / rank) (x A^T) B^T        A: (rank, in), B: (out, rank)

W stays as it is, and may be quantised; A and B are what is trained, exchanged and saved. With B = 0
an adapter changes nothing. Merged into W it costs nothing when the model runs.

A file is safetensors with the names and shapes of the PEFT library; settings, and which model the
adapter was trained on, are in its metadata.

Source: Hu et al. 2021 (arXiv 2106.09685); initial values as in PEFT.

This file does not know graphs or training.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmload.config import GPT2Config
from llmload.errors import ModelFolderError
from llmload.weights import Weights, replace_file

__all__ = [
    "LAYERS",
    "RANK_MAX",
    "Adapter",
    "AdapterSettings",
    "adapter_shapes",
    "fresh_adapter",
    "load_adapter",
    "lora_names",
    "merged",
    "save_adapter",
]

# The linear layers of a block.
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
RANK_MAX = 256
_PREFIX, _SUFFIX = "base_model.model.transformer.", ".weight"
# All who learn begin with the same A, or the mean of their adapters would mean nothing.
_SEED = 1
_COPY_AGAIN = "Copy the adapter again, or learn it anew."


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The shape of an adapter.

    Attributes:
        rank: Rows of A, 1..256.
        alpha: Twice the rank is usual; None for that.
        layers: Some of `LAYERS`: those that are adapted, in each block.
    """

    rank: int
    alpha: float | None = None
    layers: tuple[str, ...] = LAYERS

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= RANK_MAX:
            raise ValueError(f"rank must be in 1..{RANK_MAX}: {self.rank!r}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"alpha must be positive: {self.alpha!r}")
        if not self.layers or len({*self.layers} & {*LAYERS}) != len(self.layers):
            raise ValueError(f"layers must be some of {', '.join(LAYERS)}: {self.layers!r}")

    @property
    def scale(self) -> float:
        """What x A^T B^T is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def identity(self, base: str) -> str:
        """Return what tells learners of this shape of adapter on one model from all others, hex.

        Args:
            base: Content hash of the model.
        """
        facts = json.dumps([base, self.rank, self.scale, sorted(self.layers)])
        return hashlib.sha256(facts.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter and its values.

    Attributes:
        settings: Its shape.
        tensors: As of `adapter_shapes`, float32.
    """

    settings: AdapterSettings
    tensors: Weights


def lora_names(layer: str) -> tuple[str, str]:
    """Return the names of A and B of a linear layer such as "h.0.attn.c_attn"."""
    return f"{layer}.lora_A", f"{layer}.lora_B"


def adapter_shapes(
    config: GPT2Config, settings: AdapterSettings, blocks: range | None = None
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of an adapter, for some blocks or for all."""
    width = config.n_embd
    sizes = {  # (in, out)
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for index in config.blocks if blocks is None else blocks:
        for layer in settings.layers:
            in_count, out_count = sizes[layer]
            name_a, name_b = lora_names(f"h.{index}.{layer}")
            shapes[name_a] = (settings.rank, in_count)
            shapes[name_b] = (out_count, settings.rank)
    return shapes


def fresh_adapter(config: GPT2Config, settings: AdapterSettings) -> Adapter:
    """Return an adapter that changes nothing yet: A is drawn, the same everywhere, B is zero."""
    rng = np.random.default_rng(_SEED)
    tensors = {}
    for name, shape in adapter_shapes(config, settings).items():
        bound = 1 / math.sqrt(shape[1])
        values = np.zeros(shape) if name.endswith("_B") else rng.uniform(-bound, bound, shape)
        tensors[name] = values.astype(np.float32)
    return Adapter(settings, tensors)


def merged(weights: Weights, adapter: Adapter) -> dict[str, NDArray[np.float32]]:
    """Return the weights that base and adapter are together; the base is not changed.

    Args:
        weights: Of some blocks, or of the whole model.
        adapter: Of the whole model.
    """
    result = dict(weights)
    for name, values in weights.items():
        name_a, name_b = lora_names(name.removesuffix(".weight"))
        if name_a in adapter.tensors:
            change = adapter.tensors[name_a].T @ adapter.tensors[name_b].T  # (in, out)
            result[name] = values + np.float32(adapter.settings.scale) * change
    return result


def save_adapter(file: Path, adapter: Adapter, *, base: str) -> None:
    """Write an adapter; the file appears whole or not at all.

    Args:
        file: Ends in `.safetensors` by custom.
        adapter: What to write.
        base: Content hash of the model that it was trained on.

    Raises:
        OSError: The file can't be written.
    """
    tensors = {
        f"{_PREFIX}{name}{_SUFFIX}": np.ascontiguousarray(values)
        for name, values in adapter.tensors.items()
    }
    facts = {"format": "pt", "adapter": json.dumps(asdict(adapter.settings)), "base": base}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda path: save_file(tensors, path, metadata=facts))


def load_adapter(file: Path, config: GPT2Config, *, base: str) -> Adapter:
    """Read an adapter that belongs to a model.

    Args:
        file: From `save_adapter`, from anywhere.
        config: The shape of the model.
        base: Content hash of the model.

    Raises:
        ModelFolderError: The file is missing, damaged, no adapter, or of another model.
    """
    try:
        with safe_open(file, framework="numpy") as stored:
            facts = stored.metadata() or {}
            names = list(stored.keys())
            tensors = {name: stored.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ModelFolderError(file, f"can't be read ({error})", _COPY_AGAIN) from error
    settings = _settings(file, facts)
    if facts.get("base") != base:
        raise ModelFolderError(
            file, "the adapter was trained on another model", "Name that model with --model."
        )
    found = {
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX): values for name, values in tensors.items()
    }
    if {name: values.shape for name, values in found.items()} != adapter_shapes(config, settings):
        raise ModelFolderError(file, "its matrices do not fit the model", _COPY_AGAIN)
    for name, values in found.items():
        if values.dtype != np.float32 or not np.isfinite(values).all():
            raise ModelFolderError(file, f"{name} is not float32, or not finite", _COPY_AGAIN)
    return Adapter(settings, found)


def _settings(file: Path, facts: Mapping[str, str]) -> AdapterSettings:
    try:
        fields = json.loads(facts["adapter"])
        return AdapterSettings(**{**fields, "layers": tuple(fields["layers"])})
    except (KeyError, TypeError, ValueError) as error:
        problem = "does not say what adapter it is"
        raise ModelFolderError(file, problem, _COPY_AGAIN) from error
