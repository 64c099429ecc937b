"""Run one stage of a model, a contiguous range of blocks, in ONNX Runtime.

`StageEngine.run` is synchronous and busy for milliseconds to seconds: Trio code calls it as
`await trio.to_thread.run_sync(engine.run, x, cache)`. The runtime lets go of the GIL while it
computes. One engine may serve several threads at once as long as each has its own cache.

This file does not know sampling, other stages, or where the numbers come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from llmload.config import GPT2Config, parameter_shapes
from llmload.engine.kv_cache import KVCache
from llmload.errors import StageFailed
from llmload.graph.build import build_stage_graph, past_names, present_names
from llmload.weights import Weights

__all__ = ["StageEngine"]

# Errors come back as exceptions, with the same text; on stderr they would only tear up the screen.
_LOG_FATAL_ONLY = 4


class StageEngine:
    """An open ONNX Runtime session for the blocks of one stage.

    The session keeps its own copy of the weights, in the layout that the processor wants; the
    caller may let go of `weights` afterwards.

    Args:
        config: The shape of the model.
        weights: At least the parameters of `blocks`, as `load_weights` returns them.
        blocks: Contiguous range of block indexes; None for the whole model.
        intra_op_threads: Threads that work on one operator. With several stages or processes on a
            small device 1 is the fastest; measure before choosing more.

    Raises:
        ValueError: `blocks` is not a part of the model, or `weights` do not fit it.
        StageFailed: The runtime does not take the model.
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: Weights,
        blocks: range | None = None,
        *,
        intra_op_threads: int = 1,
    ) -> None:
        self.config = config
        self.blocks = config.blocks if blocks is None else blocks
        if intra_op_threads < 1:
            # 0 would mean "all cores" to the runtime, which is never right beside other peers.
            raise ValueError(f"intra_op_threads must be positive, got {intra_op_threads}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_FATAL_ONLY
        # Waiting threads sleep. Spinning ones take the processor from the other stages of this
        # process: 54 ms a token instead of 17 with 4 stages of GPT-2 124M, 2 threads each.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        names, values = _fitting(config, self.blocks, weights)
        options.add_external_initializers(names, values)
        try:
            self._session = onnxruntime.InferenceSession(
                build_stage_graph(config, self.blocks).SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
            )
        # The runtime's exceptions have no base class of their own.
        except Exception as error:
            raise StageFailed(
                f"ONNX Runtime does not open blocks {self.blocks}: {error}"
            ) from error
        self._past_names = [name for index in self.blocks for name in past_names(index)]
        self._output_names = ["hidden_out" if not self.is_last else "logits"]
        self._output_names += [name for index in self.blocks for name in present_names(index)]

    @property
    def is_first(self) -> bool:
        """Whether this stage takes token ids, not hidden states."""
        return self.blocks.start == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage returns logits, not hidden states."""
        return self.blocks.stop == self.config.n_layer

    def new_cache(self, *, batch: int = 1) -> KVCache:
        """Return the empty cache of a new sequence, or of `batch` sequences in lockstep."""
        return KVCache(self.config, self.blocks, batch=batch)

    def run(self, x: NDArray[Any], cache: KVCache, *, logits_count: int = 1) -> NDArray[np.float32]:
        """Advance a sequence by the positions in `x`: a whole prompt, a part of it, or one token.

        Args:
            x: Token ids, integers (batch, time), for the first stage; the hidden states that the
                stage before has returned, float32 (batch, time, n_embd), for later ones.
            cache: The memory of this sequence in this stage. It holds the new positions as well
                afterwards, or is unchanged if the call raises.
            logits_count: For how many of the last positions the last stage returns logits.

        Returns:
            float32 (batch, min(logits_count, time), vocab_size) from the last stage,
            float32 (batch, time, n_embd) from others.

        Raises:
            ValueError: `x` or `cache` do not fit this stage, or the context has no room.
            StageFailed: The runtime could not compute, for want of memory for instance.
        """
        feeds = {"token_ids" if self.is_first else "hidden": self._checked_input(x, cache)}
        feeds.update(zip(self._past_names, cache.arrays, strict=True))
        if self.is_last:
            if logits_count < 1:
                raise ValueError(f"logits_count must be positive, got {logits_count}")
            feeds["logits_count"] = np.array([logits_count], dtype=np.int64)
        try:
            result, *present = self._session.run(self._output_names, feeds)
        except Exception as error:
            raise StageFailed(f"blocks {self.blocks} failed in ONNX Runtime: {error}") from error
        cache.replace(present)
        output: NDArray[np.float32] = result
        return output

    def _checked_input(self, x: NDArray[Any], cache: KVCache) -> NDArray[Any]:
        config = self.config
        if cache.blocks != self.blocks or cache.config != config:
            raise ValueError(f"the cache is one of {cache.blocks}, this stage has {self.blocks}")
        expected = (cache.batch, "time") if self.is_first else (cache.batch, "time", config.n_embd)
        if x.ndim != len(expected) or x.shape[0] != cache.batch or x.shape[2:] != expected[2:]:
            raise ValueError(f"the input has the shape {x.shape}, this stage takes {expected}")
        if not 1 <= x.shape[1] <= cache.room:
            raise ValueError(
                f"{x.shape[1]} new positions, but there must be at least one, and after "
                f"{cache.position} of {config.n_ctx} at most {cache.room}"
            )
        if not self.is_first:
            return np.ascontiguousarray(x, dtype=np.float32)
        if not np.issubdtype(x.dtype, np.integer):
            raise ValueError(f"token ids are integers, not {x.dtype}")
        # ONNX's Gather takes -1 for the last row, so a bad id would pass without a word.
        if x.min() < 0 or x.max() >= config.vocab_size:
            raise ValueError(f"token ids must be in 0..{config.vocab_size - 1}")
        return np.ascontiguousarray(x, dtype=np.int64)


def _fitting(
    config: GPT2Config, blocks: range, weights: Weights
) -> tuple[list[str], list[onnxruntime.OrtValue]]:
    """Return names and values of what `blocks` need, checked: the runtime itself would crash."""
    names, values = [], []
    for name, shape in parameter_shapes(config, blocks).items():
        array = weights.get(name)
        if array is None or array.shape != shape or array.dtype != np.float32:
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(f"parameter {name} must be float32 {shape}, it is {found}")
        names.append(name)
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
    return names, values
