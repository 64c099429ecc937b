"""The losses of tokens and their gradients, in ONNX Runtime, over parameters that stay in place.

The runtime is bound to the arrays of parameters and gradients: nothing is copied. The graphs know
the blocks and the output layer; the embeddings in front of them are looked up here, and their
gradients added up here, row by row and in a fixed order.

What bounds the memory of a large batch are activations that the backward pass needs. With
`recompute` the model is cut into pieces of so many blocks; the forward pass keeps no more than the
hidden states between them, and each piece is computed once more when its gradients are due. All
pieces but the last are one graph, bound to other parameters each time.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".

This file does not know optimisers, nor how the graphs are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from llmload.adapter import AdapterSettings
from llmload.config import GPT2Config
from llmload.graph.quantize import (
    BLOCK_SIZE,
    EMBEDDING_BITS,
    Precision,
    rows_name,
    scales_name,
)
from llmload.graph.training import build_forward_graph, build_gradient_graph, gradient_name
from llmload.learn.shards import Vector

__all__ = ["LossGraphs"]

# A trainer uses one or two shapes (training, validation).
OPEN_SHAPE_COUNT_MAX = 4

Arrays = Mapping[str, NDArray[Any]]


class LossGraphs:
    """A model as losses over its parameters, open for batches of any shape.

    Args:
        config: The shape of the model.
        parameters: All of them by name, as `graph.quantize` stores them at this precision, with
            those of the adapter; read in place at each run.
        adapter: What is trained beside a model that stays as it is; None to train the model.
        precision: Of the matrices of such a model.
        recompute: Blocks whose activations are held at once; None for all.
        thread_count: Threads of the runtime.
    """

    def __init__(
        self,
        config: GPT2Config,
        parameters: Arrays,
        *,
        adapter: AdapterSettings | None,
        precision: Precision,
        recompute: int | None,
        thread_count: int,
    ) -> None:
        self._config = config
        self._adapter = adapter
        self._precision = precision
        self._parameters = parameters
        size = recompute or config.n_layer
        # The last piece, which carries the output layer, is never the shorter one.
        first = config.n_layer % size
        starts = [*([0] if first else []), *range(first, config.n_layer, size)]
        stops = [*starts[1:], config.n_layer]
        self._pieces = [range(*bounds) for bounds in zip(starts, stops, strict=True)]
        self._thread_count = thread_count
        self._open: dict[_Shape, dict[_Kind, _OpenGraph]] = {}

    def run(
        self,
        tokens: NDArray[Any],
        targets: NDArray[Any],
        *,
        upstream: Vector | None = None,
        gradients: Mapping[str, Vector] | None = None,
    ) -> Vector:
        """Return the losses, and compute gradients if arrays for them are given.

        Args:
            tokens: Integers (batch, time).
            targets: Integers (batch, time), the token that follows each of `tokens`.
            upstream: float32 (batch, time), what each loss counts in the whole; for gradients.
            gradients: An array for each parameter that is trained, overwritten.

        Returns:
            Cross-entropy of each target in nats, float32 (batch, time).
        """
        graphs = self._graphs(_Shape(*tokens.shape))
        *inner, last = self._pieces
        losses = np.empty(tokens.shape, dtype=np.float32)
        hidden = [self._embed(tokens)]  # the input of each piece
        for piece in inner:
            hidden.append(np.empty_like(hidden[0]))
            self._run(graphs, piece, {"hidden": hidden[-2]}, {"hidden_out": hidden[-1]}, None)
            if gradients is None:
                del hidden[0]
        inputs: dict[str, NDArray[Any]] = {
            "hidden": hidden.pop(),
            "targets": np.ascontiguousarray(targets, dtype=np.int64),
        }
        if gradients is None:
            self._run(graphs, last, inputs, {"losses": losses}, None)
            return losses

        assert upstream is not None, "gradients of nothing"
        inputs[gradient_name("losses")] = upstream
        passed = np.empty_like(inputs["hidden"])
        outputs = {"losses": losses, gradient_name("hidden"): passed}
        self._run(graphs, last, inputs, outputs, gradients)
        for piece in reversed(inner):
            inputs = {"hidden": hidden.pop(), gradient_name("hidden_out"): passed}
            passed = np.empty_like(passed)
            self._run(graphs, piece, inputs, {gradient_name("hidden"): passed}, gradients)
        if self._adapter is None:
            self._embed_backward(tokens, passed, gradients)
        return losses

    def _embed(self, tokens: NDArray[Any]) -> Vector:
        """Return what the first block sees, float32 (batch, time, n_embd)."""
        rows = rows_name("wte.weight")
        hidden: Vector
        if rows in self._parameters:
            values = self._parameters[rows][tokens]  # uint8 (batch, time, n_embd)
            scales = self._parameters[scales_name(rows)][tokens].repeat(BLOCK_SIZE, axis=-1)
            hidden = values.astype(np.float32) - np.float32(2 ** (EMBEDDING_BITS - 1))
            hidden *= scales[..., : hidden.shape[-1]]
        else:
            hidden = self._parameters["wte.weight"][tokens]
        hidden += self._parameters["wpe.weight"][: tokens.shape[1]]
        return hidden

    def _embed_backward(
        self, tokens: NDArray[Any], upstream: Vector, gradients: Mapping[str, Vector]
    ) -> None:
        places = gradients["wpe.weight"]
        time = tokens.shape[1]
        places[:time] = upstream.sum(axis=0)
        places[time:] = 0
        rows = gradients["wte.weight"]
        if not self._config.tie_word_embeddings:  # else the output layer has filled it
            rows[...] = 0
        flat = upstream.reshape(-1, upstream.shape[-1])
        for token, row in zip(tokens.reshape(-1).tolist(), flat, strict=True):
            rows[token] += row

    def _graphs(self, shape: _Shape) -> dict[_Kind, _OpenGraph]:
        # The order of a dict is that of insertion: the first is the one unused for the longest.
        graphs = self._open.pop(shape, {})
        self._open[shape] = graphs
        if len(self._open) > OPEN_SHAPE_COUNT_MAX:
            del self._open[next(iter(self._open))]
        return graphs

    def _run(
        self,
        graphs: dict[_Kind, _OpenGraph],
        piece: range,
        inputs: Arrays,
        outputs: Arrays,
        gradients: Mapping[str, Vector] | None,
    ) -> None:
        """Run one piece of the model, with the gradients of its parameters if asked for."""
        is_last = piece.stop == self._config.n_layer
        kind = _Kind(len(piece), is_last, gradients is not None)
        if kind not in graphs:
            batch, time, _ = inputs["hidden"].shape
            build = build_forward_graph if gradients is None else build_gradient_graph
            model = build(
                self._config,
                batch=batch,
                time=time,
                blocks=piece,
                adapter=self._adapter,
                precision=self._precision,
            )
            names = [value.name for value in model.graph.input if value.name in self._parameters]
            content = model.SerializeToString()
            graphs[kind] = _OpenGraph(content, names, piece.start, self._thread_count)
        graph = graphs[kind]
        named = {name: _moved(name, piece.start - graph.start) for name in graph.parameter_names}
        bound = {name: self._parameters[moved] for name, moved in named.items()}
        results = dict(outputs)
        if gradients is not None:
            results |= {
                gradient_name(name): gradients[moved]
                for name, moved in named.items()
                if moved in gradients
            }
        graph.run({**inputs, **bound}, results)


class _Shape(NamedTuple):
    """The shape of a batch."""

    batch: int
    time: int


class _Kind(NamedTuple):
    """What tells the graphs for one shape of batch apart."""

    block_count: int
    is_last: bool
    is_gradient: bool


def _moved(name: str, by: int) -> str:
    """Return the name of a parameter of a block for the block `by` places further."""
    if not name.startswith("h."):
        return name
    _, index, rest = name.split(".", 2)
    return f"h.{int(index) + by}.{rest}"


class _OpenGraph:
    """A graph in ONNX Runtime.

    Attributes:
        parameter_names: Which parameters it takes, as named in the graph.
        start: The first block that it was made for.
    """

    def __init__(
        self, model: bytes, parameter_names: Sequence[str], start: int, thread_count: int
    ) -> None:
        self.parameter_names, self.start = parameter_names, start
        options = ort.SessionOptions()
        options.intra_op_num_threads = thread_count
        options.inter_op_num_threads = 1
        # The plan reserves one block for all activations at once, a third more than they need when
        # they come and go; the time of a step is the same (6 layers of 256: 498 against 322 MB).
        options.enable_mem_pattern = False
        # Threads that wait sleep. By default they spin, which on cores shared with others made a
        # step with two threads take twice as long.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Arrays, outputs: Arrays) -> None:
        """Compute all outputs into the arrays given for them."""
        binding = self._session.io_binding()
        # They keep the arrays alive.
        values = [
            *self._bind(binding.bind_ortvalue_input, inputs),
            *self._bind(binding.bind_ortvalue_output, outputs),
        ]
        self._session.run_with_iobinding(binding)
        del values

    def _bind(self, bind: Any, arrays: Arrays) -> list[Any]:
        """Bind names to arrays without a copy."""
        values = []
        for name, array in arrays.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            bind(name, value)
            values.append(value)
        return values


@cache
def _share_memory() -> None:
    """Let all training graphs of this process take activations from one pool.

    A trainer runs one graph at a time, so the largest of them is what the pool has to hold. It
    grows by what is asked for; by default it would double, up to twice of what is needed.
    """
    info = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    settings = {
        "max_mem": 0,  # no bound
        "arena_extend_strategy": 1,  # as requested
        "initial_chunk_size_bytes": -1,
        "max_dead_bytes_per_chunk": -1,
    }
    ort.create_and_register_allocator(info, ort.OrtArenaCfg(settings))
