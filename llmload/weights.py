"""Read and write the parameters of a GPT-2 model as safetensors.

A folder may come from anywhere, so reading is strict: whatever is not exactly the model that
`config.json` promises is refused with the name of the file, what is wrong and what to do. Formats
that can run code when they are read (pickles) are never opened.

In memory a parameter has the name that OpenAI gave it without a prefix (`h.0.attn.c_attn.weight`)
and is float32; files may prefix it with `transformer.` and store float16 or bfloat16.

Source: https://github.com/huggingface/safetensors for the format; initial values of Radford et al.
2019, section 2.3.

This file does not know tokenizers, graphs or stages: a range of blocks is all it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmload.config import GPT2Config, parameter_shapes
from llmload.errors import ModelFolderError

__all__ = [
    "SHARDS_FILE_NAME",
    "WEIGHTS_FILE_NAME",
    "Weights",
    "bundled_model_path",
    "content_hash",
    "content_hash_of_folder",
    "load_weights",
    "open_weights",
    "random_weights",
    "replace_file",
    "save_weights",
    "save_weights_in_parts",
    "weights_files",
]

WEIGHTS_FILE_NAME = "model.safetensors"
# Large models are saved in several files; this one says which tensor is in which.
SHARDS_FILE_NAME = f"{WEIGHTS_FILE_NAME}.index.json"

# That of GPT-2 XL has 60 KB; and saving writes a file for every 5 GB.
MAX_SHARDS_FILE_BYTES = 10_000_000
MAX_SHARDS = 1000

# Name of a parameter -> its values, float32, shapes as in `config.parameter_shapes`.
Weights: TypeAlias = Mapping[str, NDArray[np.float32]]

_PREFIX = "transformer."
_READABLE_TYPES = ("F32", "F16", "BF16")
# Old checkpoints carry the causal mask as a tensor of each block. It is no parameter: ignored.
_MASK_NAME = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_COPY_AGAIN = "Copy or download the model folder again."


def load_weights(
    folder: Path, blocks: range | None = None, *, config: GPT2Config | None = None
) -> dict[str, NDArray[np.float32]]:
    """Read the parameters that a stage with `blocks` needs; the rest of the file is not touched.

    Args:
        folder: Model folder in Hugging Face layout.
        blocks: Contiguous range of blocks; None for all. The first block brings the embeddings
            along, the last one the final norm and the output matrix.
        config: The configuration, where the caller has read it already.

    Returns:
        float32 arrays by name, exactly those of `config.parameter_shapes(config, blocks)`.

    Raises:
        ModelFolderError: The file is missing, damaged or a pickle; a tensor is missing,
            unexpected, of a wrong shape or type, or holds NaN or infinity.
        ValueError: `blocks` is not a contiguous part of the model.
    """
    if config is None:
        config = GPT2Config.from_folder(folder)
    shapes = parameter_shapes(config, config.blocks if blocks is None else blocks)
    with open_weights(folder, config) as tensors:
        return {name: tensors.read(name) for name in shapes}


def content_hash(config: GPT2Config, weights: Iterable[tuple[str, NDArray[np.float32]]]) -> str:
    """Return the SHA-256 that identifies a model, as 64 hexadecimal digits.

    Peers compare it before they cooperate: stages of different models would compute nonsense
    without any error. It covers the configuration and the float32 values in model order, not the
    bytes of the file; so one model has one hash, with or without prefixes, extras or padding.

    Args:
        config: The shape of the model.
        weights: Name and float32 values of every parameter, in the order of `parameter_shapes`.

    Raises:
        ValueError: Parameters are missing, in another order, or of another shape.
    """
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    shapes = iter(parameter_shapes(config, config.blocks).items())
    for name, values in weights:
        if (name, values.shape) != next(shapes, None):
            raise ValueError(f"{name} {values.shape} is not the next parameter of the model")
        digest.update(name.encode())
        # Little-endian on every machine: the hash is compared between them.
        digest.update(np.ascontiguousarray(values, dtype="<f4").data)
    if missing := next(shapes, None):
        raise ValueError(f"parameters are missing from {missing[0]} on")
    return digest.hexdigest()


def content_hash_of_folder(folder: Path, *, config: GPT2Config | None = None) -> str:
    """Return `content_hash` of a model folder, with one tensor in memory at a time.

    Raises:
        ModelFolderError: As `load_weights` of the whole model.
    """
    if config is None:
        config = GPT2Config.from_folder(folder)
    with open_weights(folder, config) as tensors:
        names = parameter_shapes(config, config.blocks)
        return content_hash(config, ((name, tensors.read(name)) for name in names))


def save_weights(
    folder: Path, weights: Mapping[str, NDArray[Any]], *, dtype: DTypeLike = np.float32
) -> Path:
    """Write `model.safetensors`, readable by `transformers` as well, and return its path.

    The file appears whole or not at all, also when the machine loses power half-way.

    Args:
        folder: Model folder; made if it is missing.
        weights: Parameters by name without prefix.
        dtype: float32, or float16 for half the size.

    Raises:
        ValueError: A value is not finite, or too large for `dtype`.
        OSError: The file can't be written.
    """
    file = folder / WEIGHTS_FILE_NAME
    _save(file, weights, dtype)
    return file


def save_weights_in_parts(folder: Path, parts: Iterable[Weights], name: str) -> Path:
    """Write a model as several files and their index, one part in memory at a time.

    The index appears whole or not at all; until then a reader finds the model that was there, if it
    is under another `name`.

    Args:
        folder: Model folder; made if it is missing.
        parts: Parameters by name without prefix, each file's.
        name: A word that the names of the files carry.

    Returns:
        The path of the index.

    Raises:
        ValueError: A value is not finite.
        OSError: A file can't be written.
    """
    weight_map: dict[str, str] = {}
    byte_count = 0
    for number, weights in enumerate(parts, 1):
        file = folder / f"model-{name}-{number:05d}.safetensors"
        tensors = _save(file, weights, np.float32)
        weight_map |= dict.fromkeys(tensors, file.name)
        byte_count += sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": byte_count}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    replace_file(folder / SHARDS_FILE_NAME, lambda path: path.write_text(text, encoding="utf-8"))
    (folder / WEIGHTS_FILE_NAME).unlink(missing_ok=True)  # it would be read in place of the parts
    for old in folder.glob("model-*.safetensors"):
        if old.name not in weight_map.values():
            old.unlink(missing_ok=True)
    return folder / SHARDS_FILE_NAME


def _save(file: Path, weights: Mapping[str, NDArray[Any]], dtype: DTypeLike) -> dict[str, Any]:
    """Write one file of weights; returns the tensors in it."""
    tensors = {}
    for name, values in weights.items():
        with np.errstate(over="ignore"):
            # A C-ordered copy: safetensors writes the buffer as it lies in memory.
            stored = np.ascontiguousarray(values, dtype=dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"{name} holds values that are not finite as {np.dtype(dtype)}")
        # The output matrix stands outside of the transformer in the classes of `transformers`.
        tensors[name if name == "lm_head.weight" else _PREFIX + name] = stored
    file.parent.mkdir(parents=True, exist_ok=True)
    # `transformers` refuses a file that does not say which framework wrote its layout.
    replace_file(file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    return tensors


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `file`, then put it in the place of `file`.

    Readers see the old content or the new, never a part; on an error the old one stays.
    """
    # Not `tempfile`: its files are private to the user, and a model is as readable as any file.
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            # Without it a crash after the rename may leave an empty file under the final name.
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def random_weights(config: GPT2Config, seed: int) -> dict[str, NDArray[np.float32]]:
    """Return fresh parameters as GPT-2 starts its training; equal seeds give equal models.

    Normal with a deviation of 0.02, except that layers which write into the residual stream
    (`c_proj`, 2 a block) get 1 / sqrt(2 * n_layer) of it: the stream is the sum of their outputs,
    and its variance must not grow with the depth. Biases are 0, norms are the identity.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameter_shapes(config, config.blocks).items():
        if name.endswith(".bias"):
            weights[name] = np.zeros(shape, dtype=np.float32)
        elif ".ln_" in f".{name}":
            weights[name] = np.ones(shape, dtype=np.float32)
        else:
            deviation = 0.02
            if name.endswith(".c_proj.weight"):
                deviation /= math.sqrt(2 * config.n_layer)
            values = rng.standard_normal(shape, dtype=np.float32)
            weights[name] = values * np.float32(deviation)
    return weights


def bundled_model_path() -> Path:
    """Return the folder of the small model that this package ships, for trials and tests.

    Raises:
        ModelFolderError: The package was installed without it.
    """
    folder = Path(str(importlib.resources.files("llmload") / "models" / "tiny"))
    if not (folder / WEIGHTS_FILE_NAME).is_file():
        raise ModelFolderError(
            folder, "the bundled model is not there", "Install llmload again from its wheel."
        )
    return folder


class WeightsReader:
    """Open safetensors files, whose headers have been checked against the configuration."""

    def __init__(self, files: Mapping[Path, Any], config: GPT2Config) -> None:
        self._config = config
        self._shapes = parameter_shapes(config, config.blocks)
        # Name of the parameter -> its file, the tensors of that file, its name there.
        self._stored: dict[str, tuple[Path, Any, str]] = {}
        self._folder = next(iter(files)).parent
        for file, tensors in files.items():
            for stored_name in tensors.keys():  # noqa: SIM118 (the object is no mapping)
                name = stored_name.removeprefix(_PREFIX)
                if _MASK_NAME.fullmatch(name):
                    continue
                if name in self._stored:
                    raise _error(file, f"tensor {name} is there twice, with or without {_PREFIX!r}")
                self._stored[name] = (file, tensors, stored_name)
                self._check_header(name)

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one parameter as float32.

        Raises:
            ModelFolderError: It is missing, or holds NaN or infinity.
        """
        values = self._read_stored(name)
        if name == "wte.weight" and "lm_head.weight" in self._stored:
            self._check_tied(values)
        return values

    def _read_stored(self, name: str) -> NDArray[np.float32]:
        if name not in self._stored:
            raise _error(self._folder, f"tensor {name} is missing")
        file, tensors, stored_name = self._stored[name]
        try:
            stored = tensors.get_tensor(stored_name)
        except SafetensorError as error:
            raise _damaged_weights(file, error) from error
        values: NDArray[np.float32] = stored.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise _error(file, f"tensor {name} holds NaN or infinity")
        return values

    def _check_header(self, name: str) -> None:
        file, tensors, stored_name = self._stored[name]
        expected = self._shapes.get(name)
        if name == "lm_head.weight":  # a copy of wte, where the embeddings are tied
            expected = (self._config.vocab_size, self._config.n_embd)
        if expected is None:
            raise _error(file, f"tensor {stored_name} is no parameter of this model")
        header = tensors.get_slice(stored_name)
        if (shape := tuple(header.get_shape())) != expected:
            raise _error(
                file,
                f"tensor {stored_name} has the shape {shape}, config.json asks for {expected}",
            )
        if (stored_type := header.get_dtype()) not in _READABLE_TYPES:
            raise _error(
                file,
                f"tensor {stored_name} is stored as {stored_type}, only "
                f"{', '.join(_READABLE_TYPES)} can be read",
            )

    def _check_tied(self, wte: NDArray[np.float32]) -> None:
        if self._config.tie_word_embeddings and not np.array_equal(
            self._read_stored("lm_head.weight"), wte
        ):
            raise _error(
                self._stored["lm_head.weight"][0],
                "lm_head.weight differs from wte.weight, although config.json ties them",
                'Set "tie_word_embeddings": false in config.json, if that is what was trained.',
            )


@contextmanager
def open_weights(folder: Path, config: GPT2Config) -> Iterator[WeightsReader]:
    """Open the weights of a model folder, in one file or several, to read them one by one.

    Raises:
        ModelFolderError: As `load_weights`.
    """
    with ExitStack() as stack:
        files = {file: stack.enter_context(_open_file(file)) for file in weights_files(folder)}
        yield WeightsReader(files, config)


def weights_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a model folder; they may still be damaged.

    Raises:
        ModelFolderError: There are none, or the list of them is damaged.
    """
    if (folder / WEIGHTS_FILE_NAME).exists():
        return [folder / WEIGHTS_FILE_NAME]
    shards_file = folder / SHARDS_FILE_NAME
    if not shards_file.exists():
        raise _missing_weights(folder)
    try:
        with shards_file.open("rb") as stream:
            content = stream.read(MAX_SHARDS_FILE_BYTES + 1)
        names = set(json.loads(content[:MAX_SHARDS_FILE_BYTES])["weight_map"].values())
    except OSError as error:
        raise ModelFolderError(shards_file, f"can't be read ({error})", _COPY_AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFolderError(
            shards_file, "does not say which tensor is in which file", _COPY_AGAIN
        ) from error
    for name in names:
        # A list that came with a stranger's model must not make us read files elsewhere.
        if type(name) is not str or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFolderError(
                shards_file, f"names {name!r}, which is no file of this folder", _COPY_AGAIN
            )
    if not 1 <= len(names) <= MAX_SHARDS:
        raise ModelFolderError(shards_file, f"names {len(names)} files", _COPY_AGAIN)
    return [folder / name for name in sorted(names)]


def _open_file(file: Path) -> Any:
    try:
        # The library maps the file and checks that its header covers it to the last byte.
        return safe_open(file, framework="numpy")
    except FileNotFoundError as error:
        raise ModelFolderError(
            file, f"is missing, but {SHARDS_FILE_NAME} names it", _COPY_AGAIN
        ) from error
    except OSError as error:
        raise ModelFolderError(file, f"can't be read ({error})", _COPY_AGAIN) from error
    except SafetensorError as error:
        raise _damaged_weights(file, error) from error


def _error(
    file: Path,
    problem: str,
    advice: str = "The file does not belong to this config.json, or is damaged: "
    "copy or download the model folder again.",
) -> ModelFolderError:
    return ModelFolderError(file, problem, advice)


def _missing_weights(folder: Path) -> ModelFolderError:
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"):
        if (folder / name).exists():
            return ModelFolderError(
                folder / name,
                f"this format is not read, and {WEIGHTS_FILE_NAME} is missing",
                "Convert it with transformers: model.save_pretrained(folder) writes safetensors.",
            )
    return ModelFolderError(
        folder,
        f"there is no {WEIGHTS_FILE_NAME}",
        "A model folder holds config.json, model.safetensors and tokenizer.json.",
    )


def _damaged_weights(file: Path, error: SafetensorError) -> ModelFolderError:
    with file.open("rb") as stream:
        start = stream.read(4)
    # torch.save writes a zip archive of pickles, older versions a bare pickle.
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        return ModelFolderError(
            file,
            "this is a pickle under the name of a safetensors file; a pickle can run any code",
            "Don't open it. Get the safetensors file from a source that you trust.",
        )
    return ModelFolderError(file, f"damaged or cut short ({error})", _COPY_AGAIN)
