"""The engines beside which `tools.bench.inference` measures: transformers on torch, and llama.cpp.

Each is used as its own authors would on a processor: no bindings of a slower kind, and the cache
kept by the engine. llama.cpp gets the model as GGUF, quantised by its own quantiser, which leaves
the embeddings of q4_0 in 6 bits.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmload.config import GPT2Config

__all__ = ["RIVALS", "Rival", "missing_packages", "write_gguf_files"]

_LLAMA_TYPES = {"f32": 0, "q8_0": 7, "q4_0": 2}  # LLAMA_FTYPE_ALL_F32 and the like
_PREFILL_ROWS_MAX = 512


class Rival(Protocol):
    """A library that is imported, and not yet opened."""

    def open(self, folder: Path, threads: int) -> Any:
        """Open the model in `folder`; returns an `Engine` of `tools.bench.inference`."""


class Transformers:
    """transformers' GPT2LMHeadModel in torch's eager mode, float32, cache included."""

    def __init__(self) -> None:
        import torch
        import transformers

        self._torch = torch
        self._model_class = transformers.GPT2LMHeadModel

    def open(self, folder: Path, threads: int) -> Transformers:
        """See `Rival`."""
        self._torch.set_num_threads(threads)
        self._model = self._model_class.from_pretrained(folder).eval()
        self._past: Any = None
        return self

    def prefill(self, token_ids: list[int]) -> NDArray[np.float32]:
        """See `Engine`."""
        self._past = None
        return self._advance(token_ids)

    def decode(self, token_id: int) -> NDArray[np.float32]:
        """See `Engine`."""
        return self._advance([token_id])

    def _advance(self, token_ids: list[int]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            result = self._model(
                self._torch.tensor([token_ids]),
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=1,
            )
        self._past = result.past_key_values
        logits: NDArray[np.float32] = result.logits[0, -1].numpy()
        return logits


class Llama:
    """llama.cpp by the low-level calls of llama-cpp-python.

    Args:
        kind: Of the weights.
        has_full_keys: Whether keys and values, too, have 32 bits, as ours do; by default 16.
    """

    def __init__(self, kind: str, *, has_full_keys: bool = False) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._kind = kind
        self._has_full_keys = has_full_keys
        # Kept alive: the library calls it for as long as it lives.
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def open(self, folder: Path, threads: int) -> Llama:
        """See `Rival`."""
        library = self._library
        self._model = library.llama_model_load_from_file(
            str(folder / f"{self._kind}.gguf").encode(), library.llama_model_default_params()
        )
        settings = library.llama_context_default_params()
        settings.n_ctx = GPT2Config.from_folder(folder).n_ctx
        settings.n_batch = settings.n_ubatch = _PREFILL_ROWS_MAX
        settings.n_threads = settings.n_threads_batch = threads
        if self._has_full_keys:
            settings.type_k = settings.type_v = library.GGML_TYPE_F32
        self._context = library.llama_init_from_model(self._model, settings)
        vocabulary = library.llama_model_get_vocab(self._model)
        self._vocab_size = library.llama_vocab_n_tokens(vocabulary)
        self._position = 0
        return self

    def prefill(self, token_ids: list[int]) -> NDArray[np.float32]:
        """See `Engine`."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._position = 0
        return self._advance(token_ids)

    def decode(self, token_id: int) -> NDArray[np.float32]:
        """See `Engine`."""
        return self._advance([token_id])

    def _advance(self, token_ids: list[int]) -> NDArray[np.float32]:
        # Without positions given, the library goes on where the sequence ends, and gives the
        # logits of the last token.
        tokens = (self._library.llama_token * len(token_ids))(*token_ids)
        batch = self._library.llama_batch_get_one(tokens, len(token_ids))
        if self._library.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama.cpp could not decode")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        copy: NDArray[np.float32] = np.ctypeslib.as_array(logits, (self._vocab_size,)).copy()
        return copy


RIVALS: Mapping[str, Callable[[], Rival]] = {
    "transformers": Transformers,
    **{f"llama-{kind}": partial(Llama, kind) for kind in _LLAMA_TYPES},
    "llama-f32-keys32": partial(Llama, "f32", has_full_keys=True),
}


def missing_packages(rival: str) -> list[str]:
    """Return which of the packages that a rival needs are not installed."""
    needed = ("torch", "transformers") if rival == "transformers" else ("llama_cpp", "gguf")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def write_gguf_files(
    folder: Path, config: GPT2Config, weights: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write the model as f32.gguf, q8_0.gguf and q4_0.gguf."""
    import gguf
    import llama_cpp

    writer = gguf.GGUFWriter(folder / "f32.gguf", "gpt2")
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_LLAMA_TYPES["f32"])
    writer.add_tokenizer_model("none")
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    in_block = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    for index in config.blocks:
        names |= {f"h.{index}.{ours}": f"blk.{index}.{theirs}" for ours, theirs in in_block.items()}
    for name, array in weights.items():
        layer, _, kind = name.rpartition(".")
        # Linear layers are (in, out) here and (out, in) there; embeddings are alike.
        is_linear = kind == "weight" and array.ndim == 2 and layer.startswith("h.")
        stored = np.ascontiguousarray(array.T) if is_linear else array
        writer.add_tensor(f"{names[layer]}.{kind}", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    for kind, file_type in _LLAMA_TYPES.items():
        if kind != "f32":
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype = file_type
            source, target = (str(folder / f"{name}.gguf").encode() for name in ("f32", kind))
            if llama_cpp.llama_model_quantize(source, target, settings) != 0:
                raise RuntimeError(f"llama.cpp could not quantise to {kind}")
