"""The losses of GPT-2 and their gradients as ONNX graphs, for the whole model or one stage of it.

Parameters are inputs of these graphs, because training changes them between two runs. Batch and
time are fixed: a trainer uses one shape for hours, and knows the sizes that the backward pass needs
(to undo a broadcast) when the graph is built.

The rows of the output layer are inputs by pieces of the vocabulary (`head.py`), so each is a view
of the matrix. All other parameters are one input each.

The loss of each token comes out by itself, and the gradient of each goes in: so one graph serves
the mean over a batch, a share of a larger batch, and any loss over the likelihood of a sequence.

Embeddings are looked up outside. A batch touches few of their rows, so the gradient as a whole
matrix, which is what a graph could give, would be the largest tensor of all, mostly zeros, and
added to that of the output layer at the very end of the backward pass.

A stage takes part in training with two graphs. Its forward graph turns hidden states into hidden
states or, in the last stage, the losses. Its gradient graph does the same once more and goes on to
the gradients: of its parameters, and of its input, which is what the stage before needs. Computing
twice is cheaper than to keep or send all inner activations. All stages but the last are the same
graph if they have as many blocks, but for the names of the parameters.

Source: the loss of Radford et al. 2019, cross-entropy of the next token.

This file does not know how a graph is differentiated, optimisers, or ONNX Runtime.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from onnx import ModelProto, TensorProto

from llmload.adapter import AdapterSettings, adapter_shapes, lora_names
from llmload.config import GPT2Config
from llmload.graph.autodiff import add_gradients
from llmload.graph.build import GraphBuilder, Linear, block, final_norm, linear
from llmload.graph.head import LossHead, vocabulary_pieces
from llmload.graph.quantize import (
    BLOCK_SIZE,
    Precision,
    bits_of,
    quantized_name,
    scales_name,
    stored_types,
)

__all__ = [
    "build_forward_graph",
    "build_gradient_graph",
    "gradient_name",
    "rows_of_parameter",
]


def gradient_name(tensor: str) -> str:
    """Return the name under which a graph takes or gives the gradient of one of its tensors."""
    return f"{tensor}.grad"


def rows_of_parameter(name: str) -> tuple[str, slice]:
    """Return which parameter an input of a graph is, or is rows of, and which rows."""
    parameter, bracket, bounds = name.partition("[")
    if not bracket:
        return parameter, slice(None)
    start, _, stop = bounds.removesuffix("]").partition(":")
    return parameter, slice(int(start), int(stop))


def _rows_name(parameter: str, rows: range) -> str:
    return f"{parameter}[{rows.start}:{rows.stop}]"


def build_forward_graph(
    config: GPT2Config,
    *,
    batch: int,
    time: int,
    blocks: range | None = None,
    adapter: AdapterSettings | None = None,
    precision: Precision = "float32",
) -> ModelProto:
    """Build the graph that computes the losses, or the hidden states after an earlier stage.

    Inputs:
        hidden: float32 (batch, time, n_embd): the embedded tokens, or what the stage before gave.
        targets: int64 (batch, time), the token after each; in the last stage.
        The parameters of the blocks and, in the last stage, of the output layer, as
            `graph.quantize` stores them at this precision; and those of the adapter. As named by
            `rows_of_parameter`.
    Outputs:
        losses: float32 (batch, time), cross-entropy of each target in nats; in the last stage; or
        hidden_out: float32 (batch, time, n_embd), in earlier ones.

    Args:
        config: The shape of the model.
        batch: Sequences.
        time: Tokens of each, 1..n_ctx.
        blocks: Contiguous range of blocks; None for the whole model, which is first stage and last.
        adapter: The adapter beside its layers; None for none.
        precision: Of the matrices. Below float32 they can only be computed with, not trained.

    Raises:
        ValueError: `blocks` is no contiguous part of the model, a size is out of range, or
            quantised matrices would be trained.
    """
    stage = _Stage(config, batch, time, blocks, adapter, precision)
    stage.builder.output(stage.result, stage.result_name, stage.result_shape)
    return stage.builder.model()


def build_gradient_graph(
    config: GPT2Config,
    *,
    batch: int,
    time: int,
    blocks: range | None = None,
    adapter: AdapterSettings | None = None,
    precision: Precision = "float32",
) -> ModelProto:
    """Build the graph that computes the gradients of a stage, and the losses if it is the last.

    Inputs: those of `build_forward_graph`, and
        hidden_out.grad: float32 (batch, time, n_embd), in all stages but the last: what the next
            stage gave as hidden.grad; or
        losses.grad: float32 (batch, time), in the last stage: what each counts in the whole.
    Outputs:
        losses: float32 (batch, time), in the last stage.
        hidden.grad: float32 (batch, time, n_embd).
        {parameter}.grad: of its shape, for every parameter that is an input; with an adapter, for
            its parameters only.

    Args, raises: as `build_forward_graph`.
    """
    stage = _Stage(config, batch, time, blocks, adapter, precision)
    builder = stage.builder
    upstream = builder.input(gradient_name(stage.result_name), stage.result_shape)
    shapes = {**stage.trained_shapes, "hidden": stage.hidden_shape}
    gradients = {}
    if stage.head is not None:
        builder.output(stage.result, stage.result_name, stage.result_shape)
        matrices = [name for name in stage.head_names if name in shapes]
        upstream, found = stage.head.gradients(upstream, of_matrix=bool(matrices))
        gradients = dict(zip(matrices, found, strict=True))
    others = [name for name in shapes if name not in gradients]
    gradients |= add_gradients(builder, {stage.blocks_result: upstream}, others)
    for name, shape in shapes.items():
        builder.output(gradients[name], gradient_name(name), shape)
    _put_results_last(builder)
    return builder.model()


def _put_results_last(builder: GraphBuilder) -> None:
    """Move nodes whose results nobody else needs to the end, those of the last layers very last.

    ONNX Runtime computes results one by one, the last node first, each with what it needs of the
    rest. In the order in which they are emitted, the gradient of the input would be first; that is
    the whole backward pass, of which everything would be held until the gradients of parameters
    were computed. So each of them is computed as soon as it can be, and lets go of its operands.
    """
    used = {name for node in builder.nodes for name in node.input}
    results = [node for node in builder.nodes if used.isdisjoint(node.output)]
    others = [node for node in builder.nodes if not used.isdisjoint(node.output)]
    builder.nodes = [*others, *reversed(results)]


class _Stage:
    """The forward pass of a stage inside of a builder, open for more nodes."""

    def __init__(
        self,
        config: GPT2Config,
        batch: int,
        time: int,
        blocks: range | None,
        adapter: AdapterSettings | None,
        precision: Precision,
    ) -> None:
        if adapter is None and precision != "float32":
            raise ValueError(f"without an adapter there is nothing to train at {precision}")
        if batch < 1 or not 1 <= time <= config.n_ctx:
            raise ValueError(f"batch {batch} < 1, or time {time} not in 1..{config.n_ctx}")
        blocks = config.blocks if blocks is None else blocks
        stored = stored_types(config, blocks, precision)
        shapes = {name: shape for name, (shape, _) in stored.items()}
        adapted = {} if adapter is None else adapter_shapes(config, adapter, blocks)
        is_last = blocks.stop == config.n_layer
        self.hidden_shape = (batch, time, config.n_embd)
        # The output layer by pieces; quantised it is one input, cut when it becomes float32.
        self.head_names: list[str] = []
        if is_last and precision == "float32":
            for tokens in vocabulary_pieces(config.vocab_size):
                name = _rows_name(config.lm_head_name, tokens)
                self.head_names.append(name)
                shapes[name] = (len(tokens), config.n_embd)
        self.builder = GraphBuilder(
            f"gpt2-training-{blocks.start}-{blocks.stop}",
            shapes | adapted,
            parameter_types={
                name: TensorProto.UINT8 for name, (_, dtype) in stored.items() if dtype is np.uint8
            },
            parameters_as="input",
        )
        builder = self.builder

        quantized = None if precision == "float32" else _Quantized(config, precision, batch, time)
        frozen = linear if quantized is None else quantized.linear
        layer = frozen if adapter is None else partial(_adapted, adapter, frozen)
        x = builder.input("hidden", self.hidden_shape)
        for index in blocks:
            x = block(builder, config, index, x, time, layer)  # (batch, time, n_embd)

        self.head: LossHead | None = None
        self.result, self.result_name = x, "hidden_out"
        self.result_shape: tuple[int, ...] = self.hidden_shape
        if is_last:
            targets = builder.input("targets", (batch, time), TensorProto.INT64)
            x = final_norm(builder, config, x)
            if quantized is None:
                matrices = [builder.parameter(name) for name in self.head_names]
            else:
                matrices = quantized.head(builder)
            pieces = list(zip(vocabulary_pieces(config.vocab_size), matrices, strict=True))
            self.head = LossHead(builder, x, targets, self.hidden_shape, pieces)
            self.result, self.result_name = self.head.losses, "losses"
            self.result_shape = (batch, time)
        self.blocks_result = x  # in the last stage what its head is given
        # Not the embeddings, which are not used here.
        self.trained_shapes = adapted or {name: shapes[name] for name in builder.parameter_names}


def _adapted(
    adapter: AdapterSettings, base: Linear, builder: GraphBuilder, name: str, x: str
) -> str:
    """Emit a linear layer with its adapter beside it: base + scale (x A^T) B^T."""
    y = base(builder, name, x)
    if not name.endswith(adapter.layers):
        return y
    for factor in lora_names(name):
        transposed = builder.node("Transpose", [builder.parameter(factor)], perm=[1, 0])
        x = builder.node("MatMul", [x, transposed])  # (..., rank), then (..., out)
    scale = builder.constant(np.array(adapter.scale, dtype=np.float32))
    return builder.node("Add", [y, builder.node("Mul", [x, scale])])


class _Quantized:
    """Emits layers whose matrices are stored in few bits, and are float32 only while in use.

    MatMulNBits, with which stages compute, has no counterpart for the transposed matrix that the
    backward pass needs.
    """

    def __init__(self, config: GPT2Config, precision: Precision, batch: int, time: int) -> None:
        bits = bits_of(precision)
        assert bits is not None, "float32 is not quantised"
        self._config, self._bits, self._batch, self._time = config, bits, batch, time

    def linear(self, builder: GraphBuilder, name: str, x: str) -> str:
        """Emit x @ weight + bias: (batch, time, in) -> (batch, time, out)."""
        width = self._config.n_embd
        in_count = 4 * width if name.endswith("mlp.c_proj") else width
        out_count = {"c_attn": 3, "c_fc": 4, "c_proj": 1}[name.rpartition(".")[2]] * width
        weight = self._matrix(builder, f"{name}.weight", out_count, in_count)
        rows = builder.node("Reshape", [x, builder.ints(-1, in_count)])  # (batch * time, in)
        y = builder.node("Gemm", [rows, weight, builder.parameter(f"{name}.bias")], transB=1)
        return builder.node("Reshape", [y, builder.ints(self._batch, self._time, out_count)])

    def head(self, builder: GraphBuilder) -> list[str]:
        """Emit the output layer: float32 (tokens, n_embd) for each of `vocabulary_pieces`."""
        config = self._config
        return [
            self._matrix(builder, config.lm_head_name, config.vocab_size, config.n_embd, tokens)
            for tokens in vocabulary_pieces(config.vocab_size)
        ]

    def _matrix(
        self,
        builder: GraphBuilder,
        name: str,
        out_count: int,
        in_count: int,
        rows: range | None = None,
    ) -> str:
        """Emit some rows of a matrix, or all: float32 (rows, in)."""
        rows = range(out_count) if rows is None else rows
        values = builder.parameter(quantized_name(name))  # (out, blocks, bytes of a block)
        matrix = builder.node(
            "GatherBlockQuantized",
            [
                builder.node("Reshape", [values, builder.ints(out_count, -1)]),
                builder.constant(np.array(rows)),
                builder.parameter(scales_name(name)),
            ],
            domain="com.microsoft",
            bits=self._bits,
            block_size=BLOCK_SIZE,
            gather_axis=0,
            quantize_axis=1,
        )  # (rows, blocks * BLOCK_SIZE)
        padded_count = -(-in_count // BLOCK_SIZE) * BLOCK_SIZE
        builder.declare(matrix, (len(rows), padded_count))
        if padded_count == in_count:
            return matrix
        bounds = (builder.ints(0), builder.ints(in_count), builder.ints(1))
        return builder.node("Slice", [matrix, *bounds])
