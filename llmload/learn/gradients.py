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

from collections.abc import Callable, Mapping, Sequence
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
from llmload.graph.training import (
    build_forward_graph,
    build_gradient_graph,
    gradient_name,
    rows_of_parameter,
)
from llmload.learn.space import Vector

__all__ = ["LossGraphs"]

# A trainer uses one or two shapes (training, validation).
OPEN_SHAPE_COUNT_MAX = 4

Arrays = Mapping[str, NDArray[Any]]


class LossGraphs:
    """A model as losses over its parameters, open for batches of any shape; or a stage of it.

    `run` is the whole model. Where others hold some of the blocks, `embed`, `forward` and `losses`
    are its parts, and `backward` and `embed_backward` lead back.

    Args:
        config: The shape of the model.
        parameters: By name, those of the blocks and of the ends that are used, as `graph.quantize`
            stores them at this precision, with those of the adapter; read in place at each run.
        blocks: Contiguous range of blocks that are computed here; None for all.
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
        blocks: range | None = None,
        adapter: AdapterSettings | None = None,
        precision: Precision = "float32",
        recompute: int | None,
        thread_count: int,
    ) -> None:
        self._config = config
        self._adapter = adapter
        self._precision = precision
        self._parameters = parameters
        blocks = config.blocks if blocks is None else blocks
        size = recompute or len(blocks)
        # The last piece, which may carry the output layer, is never the shorter one.
        first = blocks.start + len(blocks) % size
        starts = [*range(blocks.start, first, size), *range(first, blocks.stop, size)]
        stops = [*starts[1:], blocks.stop]
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
        losses, passed = self.losses(
            self.embed(tokens), targets, upstream=upstream, gradients=gradients
        )
        if gradients is not None and self._adapter is None:
            assert passed is not None, "given with gradients"
            gradients["wpe.weight"][...] = 0
            if not self._config.tie_word_embeddings:  # else the output layer has filled it
                gradients["wte.weight"][...] = 0
            self.embed_backward(tokens, passed, gradients)
        return losses

    def embed(self, tokens: NDArray[Any]) -> Vector:
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

    def embed_backward(
        self, tokens: NDArray[Any], upstream: Vector, gradients: Mapping[str, Vector]
    ) -> None:
        """Add to the gradients of the embeddings.

        Args:
            tokens: Integers (batch, time).
            upstream: float32 (batch, time, n_embd), the gradient of `embed`.
            gradients: Those of wte and wpe.
        """
        gradients["wpe.weight"][: tokens.shape[1]] += upstream.sum(axis=0)
        rows = gradients["wte.weight"]
        flat = upstream.reshape(-1, upstream.shape[-1])
        for token, row in zip(tokens.reshape(-1).tolist(), flat, strict=True):
            rows[token] += row

    def forward(self, hidden: Vector, *, keep: bool = True) -> list[Vector]:
        """Take hidden states through the blocks, which are not the last.

        Args:
            hidden: float32 (batch, time, n_embd).
            keep: Hold what `backward` needs.

        Returns:
            Of the same shape: `hidden`, what came out of each piece, and so last the result; the
            result alone if nothing is to be held.
        """
        graphs = self._graphs(_Shape(*hidden.shape[:2]))
        return self._forward(graphs, self._pieces, hidden, keep=keep)

    def backward(
        self,
        kept: list[Vector],
        upstream: Vector,
        gradients: Mapping[str, Vector],
        after_piece: Callable[[range], None] = lambda _blocks: None,
    ) -> Vector:
        """Compute gradients of blocks that are not the last.

        Args:
            kept: What `forward` returned, without the result; used up.
            upstream: The gradient of the result, of its shape.
            gradients: An array for each parameter that is trained, overwritten.
            after_piece: Told which blocks have theirs, before others are begun; so all pieces may
                be given the same arrays.

        Returns:
            The gradient of what `forward` was given, of its shape.
        """
        graphs = self._graphs(_Shape(*upstream.shape[:2]))
        return self._backward(graphs, self._pieces, kept, upstream, gradients, after_piece)

    def losses(
        self,
        hidden: Vector,
        targets: NDArray[Any],
        *,
        upstream: Vector | None = None,
        gradients: Mapping[str, Vector] | None = None,
        after_piece: Callable[[range], None] = lambda _blocks: None,
    ) -> tuple[Vector, Vector | None]:
        """Take hidden states through the blocks, which are the last, to the losses.

        Args:
            hidden: float32 (batch, time, n_embd).
            targets: As for `run`.
            upstream: The same.
            gradients: The same; those of embeddings that are no output layer stay as they are.
            after_piece: As for `backward`.

        Returns:
            As `run`; and the gradient of `hidden`, of its shape, if gradients were asked for.
        """
        graphs = self._graphs(_Shape(*targets.shape))
        *inner, last = self._pieces
        losses = np.empty(targets.shape, dtype=np.float32)
        kept = self._forward(graphs, inner, hidden, keep=gradients is not None)
        inputs: dict[str, NDArray[Any]] = {
            "hidden": kept.pop(),
            "targets": np.ascontiguousarray(targets, dtype=np.int64),
        }
        if gradients is None:
            self._run(graphs, last, inputs, {"losses": losses}, None)
            return losses, None

        assert upstream is not None, "gradients of nothing"
        inputs[gradient_name("losses")] = upstream
        passed = np.empty_like(inputs["hidden"])
        outputs = {"losses": losses, gradient_name("hidden"): passed}
        self._run(graphs, last, inputs, outputs, gradients)
        after_piece(last)
        return losses, self._backward(graphs, inner, kept, passed, gradients, after_piece)

    def _forward(
        self,
        graphs: dict[_Kind, _OpenGraph],
        pieces: Sequence[range],
        hidden: Vector,
        *,
        keep: bool,
    ) -> list[Vector]:
        """Return the input of each piece, if they are to be kept, and the result of the last."""
        kept = [hidden]
        for piece in pieces:
            kept.append(np.empty_like(kept[-1]))
            self._run(graphs, piece, {"hidden": kept[-2]}, {"hidden_out": kept[-1]}, None)
            if not keep:
                del kept[0]
        return kept

    def _backward(
        self,
        graphs: dict[_Kind, _OpenGraph],
        pieces: Sequence[range],
        kept: list[Vector],
        passed: Vector,
        gradients: Mapping[str, Vector],
        after_piece: Callable[[range], None],
    ) -> Vector:
        """Return the gradient of the first of `kept`, the inputs of the pieces, and use them up."""
        for piece in reversed(pieces):
            inputs = {"hidden": kept.pop(), gradient_name("hidden_out"): passed}
            passed = np.empty_like(passed)
            self._run(graphs, piece, inputs, {gradient_name("hidden"): passed}, gradients)
            after_piece(piece)
        return passed

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
            names = [
                value.name
                for value in model.graph.input
                if rows_of_parameter(value.name)[0] in self._parameters
            ]
            content = model.SerializeToString()
            graphs[kind] = _OpenGraph(content, names, piece.start, self._thread_count)
        graph = graphs[kind]
        bound, results = dict(inputs), dict(outputs)
        for name in graph.parameter_names:
            moved, rows = rows_of_parameter(_moved(name, piece.start - graph.start))
            bound[name] = self._parameters[moved][rows]
            if gradients is not None and moved in gradients:
                results[gradient_name(name)] = gradients[moved][rows]
        graph.run(bound, results)


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
