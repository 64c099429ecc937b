"""Write the inference graph of a stage: some blocks of GPT-2, with a cache, at any precision.

One graph does prefill, chunked prefill and decode, for many sequences at once. The work of a step
is a list of rows, one row a new position, whatever sequences they belong to: the matrices, which
are nearly all of the work, see rows and nothing else. Only attention needs to know which rows are
one sequence. There the rows are laid out as (batch, time), filled up to the longest sequence, and
afterwards taken back to rows.

Attention exists in four forms; which one is the fastest depends on processor and runtime, and is
measured (`engine.tuning`):

    grouped     GroupQueryAttention of ONNX Runtime: keys and values are appended in place to a
                buffer that the caller owns, so a step copies none, and sequences in one step may
                stand at different positions and have different numbers of new rows
    multi_head  MultiHeadAttention of ONNX Runtime
    standard    Attention of ONNX, opset 23
    plain       MatMul and Softmax, for runtimes without any of these

All but `grouped` take the earlier keys and values as inputs and return them with the new ones
appended; all sequences of one step then have as many earlier positions and as many new ones.

Source: the model is that of `llmload.reference`; operators of the domain com.microsoft as in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md at version 1.32.

This file does not know the values of the weights, a session, or where stages run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from onnx import ModelProto, TensorProto

from llmload.config import GPT2Config
from llmload.graph.build import (
    OPSET,
    GraphBuilder,
    attend,
    causal_mask,
    embed,
    final_norm,
    gelu_new,
    layer_norm,
)
from llmload.graph.quantize import (
    BLOCK_SIZE,
    EMBEDDING_BITS,
    Precision,
    bits_of,
    quantized_name,
    rows_name,
    scales_name,
    stored_types,
)

__all__ = [
    "ATTENTION_FORMS",
    "AttentionForm",
    "KeyValue",
    "build_stage_graph",
    "default_attention",
    "past_names",
    "present_names",
]

AttentionForm = Literal["grouped", "multi_head", "standard", "plain"]
ATTENTION_FORMS: tuple[AttentionForm, ...] = ("grouped", "multi_head", "standard", "plain")

_MICROSOFT = "com.microsoft"
# The first opset with Attention. Other graphs stay at the older one, see `build.OPSET`.
_ATTENTION_OPSET = 23
# MatMulNBits may quantise activations to 8 bits: integer products, two to five times as fast.
_INTEGER_PRODUCTS = 4

_ELEMENT_TYPES: dict[type[np.generic], int] = {
    np.float32: TensorProto.FLOAT,
    np.uint8: TensorProto.UINT8,
}
# What GroupQueryAttention asks of the channels of a head; those of every published GPT-2 have 64.
_GROUPED_HEAD_MULTIPLE = 8


class KeyValue(NamedTuple):
    """Names of the keys and values of one block: float32 (batch, n_head, length, head_size)."""

    key: str
    value: str


def default_attention(config: GPT2Config) -> AttentionForm:
    """Return the form that is taken where nothing was measured."""
    return "plain" if config.head_size % _GROUPED_HEAD_MULTIPLE else "grouped"


def past_names(index: int) -> KeyValue:
    """Return the names of the inputs with which a stage gets the cache of block `index`."""
    return KeyValue(f"past.{index}.key", f"past.{index}.value")


def present_names(index: int) -> KeyValue:
    """Return the names of the outputs in which a stage gives the extended cache of a block."""
    return KeyValue(f"present.{index}.key", f"present.{index}.value")


def build_stage_graph(
    config: GPT2Config,
    blocks: range,
    *,
    precision: Precision = "float32",
    attention: AttentionForm | None = None,
) -> ModelProto:
    """Build the inference graph of a stage.

    Inputs; `rows` is the number of new positions of all sequences together:
        token_ids: int64 (rows,), in the first stage; or
        hidden: float32 (rows, n_embd), in later ones.
        positions: int64 (rows,), in the first stage: where each row stands in its sequence.
        padded_rows: int64 (batch, time): which row stands where; any row where there is none.
        row_places: int64 (rows,): where each row stands in (batch * time).
        last_positions: int32 (batch,), grouped: position of the last new row of each sequence.
        total_count: int32 (), grouped: largest number of positions of a sequence, new ones too.
        new_counts: int32 (batch,), grouped: new rows of each sequence, 0 where it only waits.
        past.{i}.key, past.{i}.value: float32 (batch, n_head, length, head_size), for each block i.
            grouped: length is the capacity, and the present ones must be the same memory.
        logit_rows: int64 (count,), in the last stage: the rows for which logits are wanted. A large
            part of all work is in the head, so a prefill must not compute them all.
    Outputs:
        hidden_out: float32 (rows, n_embd), in all stages but the last; or
        logits: float32 (count, vocab_size), in the last.
        present.{i}.key, present.{i}.value: as the past ones, new positions included.

    Args:
        config: The shape of the model.
        blocks: Contiguous range of block indexes; the first one of the model brings the embeddings
            along, the last one the final norm and the output layer.
        precision: Of the matrices.
        attention: See above; None for `default_attention`.

    Returns:
        A model whose weights, `quantize.stored_types`, are external initializers: see
        `GraphBuilder`. That no position is beyond n_ctx is the caller's duty.

    Raises:
        ValueError: `blocks` is not a contiguous part of the model.
    """
    attention = attention or default_attention(config)
    types = stored_types(config, blocks, precision)
    builder = GraphBuilder(
        f"gpt2-blocks-{blocks.start}-{blocks.stop}-{precision}-{attention}",
        {name: shape for name, (shape, _) in types.items()},
        parameter_types={name: _ELEMENT_TYPES[kind] for name, (_, kind) in types.items()},
    )
    stage = _Stage(builder, config, bits_of(precision), attention)
    if blocks.start == 0:
        token_ids = builder.input("token_ids", ("rows",), TensorProto.INT64)
        x = stage.embed(token_ids, builder.input("positions", ("rows",), TensorProto.INT64))
    else:
        x = builder.input("hidden", ("rows", config.n_embd))
    attend_to_past = stage.attention(blocks)
    for index in blocks:
        x = stage.block(index, x, attend_to_past)  # (rows, n_embd)
    if blocks.stop == config.n_layer:
        wanted = builder.input("logit_rows", ("count",), TensorProto.INT64)
        x = builder.node("Gather", [x, wanted])  # (count, n_embd)
        x = stage.head(final_norm(builder, config, x))  # (count, vocab_size)
        builder.output(x, "logits", ("count", config.vocab_size))
    else:
        builder.output(x, "hidden_out", ("rows", config.n_embd))
    return builder.model(opset=_ATTENTION_OPSET if attention == "standard" else OPSET)


# Takes the index of a block and its qkv (batch, time, 3 * n_embd); returns (batch, time, n_embd).
_Attend = Callable[[int, str], str]


class _Stage:
    """The emitters of one stage graph, at one precision and with one form of attention."""

    def __init__(
        self, builder: GraphBuilder, config: GPT2Config, bits: int | None, form: AttentionForm
    ) -> None:
        self._builder = builder
        self._config = config
        self._bits = bits
        self._form = form

    def embed(self, token_ids: str, positions: str) -> str:
        """Emit token embedding + position embedding: (rows,) -> (rows, n_embd)."""
        builder = self._builder
        if self._bits is None:
            return embed(builder, token_ids, positions)
        rows = rows_name("wte.weight")
        tokens = builder.node(
            "GatherBlockQuantized",
            [builder.parameter(rows), token_ids, builder.parameter(scales_name(rows))],
            domain=_MICROSOFT,
            bits=EMBEDDING_BITS,
            block_size=BLOCK_SIZE,
            gather_axis=0,
            quantize_axis=1,
        )
        places = builder.node("Gather", [builder.parameter("wpe.weight"), positions])
        return builder.node("Add", [tokens, places])

    def block(self, index: int, x: str, attend_to_past: _Attend) -> str:
        """Emit block `index`: (rows, n_embd) to the same."""
        builder, config, name = self._builder, self._config, f"h.{index}"
        y = layer_norm(builder, config, f"{name}.ln_1", x)
        qkv = self._linear(f"{name}.attn.c_attn", y)  # (rows, 3 * n_embd)
        qkv = builder.node("Gather", [qkv, "padded_rows"])  # (batch, time, 3 * n_embd)
        y = attend_to_past(index, qkv)  # (batch, time, n_embd)
        y = builder.node("Reshape", [y, builder.ints(-1, config.n_embd)])  # (batch * time, n_embd)
        y = builder.node("Gather", [y, "row_places"])  # (rows, n_embd)
        x = builder.node("Add", [x, self._linear(f"{name}.attn.c_proj", y)])
        y = self._linear(f"{name}.mlp.c_fc", layer_norm(builder, config, f"{name}.ln_2", x))
        y = gelu_new(builder, y)  # (rows, 4 * n_embd)
        return builder.node("Add", [x, self._linear(f"{name}.mlp.c_proj", y)])

    def head(self, x: str) -> str:
        """Emit the logits: (count, n_embd) -> (count, vocab_size)."""
        name = self._config.lm_head_name
        if self._bits is None:
            # (vocab_size, n_embd) as it is stored: no transposed copy.
            return self._builder.node("Gemm", [x, self._builder.parameter(name)], transB=1)
        return self._quantized(name, x, self._config.n_embd, self._config.vocab_size)

    def _linear(self, name: str, x: str) -> str:
        """Emit x @ weight + bias: (rows, in) -> (rows, out)."""
        bias = self._builder.parameter(f"{name}.bias")
        if self._bits is None:
            return self._builder.node("Gemm", [x, self._builder.parameter(f"{name}.weight"), bias])
        n_embd = self._config.n_embd
        in_count = 4 * n_embd if name.endswith("mlp.c_proj") else n_embd
        out_count = {"c_attn": 3, "c_fc": 4, "c_proj": 1}[name.rpartition(".")[2]] * n_embd
        return self._quantized(f"{name}.weight", x, in_count, out_count, bias)

    def _quantized(
        self, name: str, x: str, in_count: int, out_count: int, bias: str | None = None
    ) -> str:
        builder = self._builder
        inputs = [x, builder.parameter(quantized_name(name)), builder.parameter(scales_name(name))]
        return builder.node(
            "MatMulNBits",
            inputs if bias is None else [*inputs, "", "", bias],  # no zero points, no groups
            domain=_MICROSOFT,
            K=in_count,
            N=out_count,
            bits=self._bits,
            block_size=BLOCK_SIZE,
            accuracy_level=_INTEGER_PRODUCTS,
        )

    def attention(self, blocks: range) -> _Attend:
        """Declare the inputs that all blocks share, and return the emitter of attention."""
        builder, config = self._builder, self._config
        builder.input("padded_rows", ("batch", "time"), TensorProto.INT64)
        builder.input("row_places", ("rows",), TensorProto.INT64)
        cache_shape = ("batch", config.n_head, "past", config.head_size)
        pasts = {
            i: KeyValue(*(builder.input(n, cache_shape) for n in past_names(i))) for i in blocks
        }
        if self._form == "grouped":
            builder.input("last_positions", ("batch",), TensorProto.INT32)
            builder.input("total_count", (), TensorProto.INT32)
            builder.input("new_counts", ("batch",), TensorProto.INT32)
        mask = self._mask(pasts[blocks.start]) if self._form == "plain" else ""

        def emit(index: int, qkv: str) -> str:
            if self._form == "grouped":
                y, *present = self._grouped(qkv, pasts[index])
            else:
                sizes = builder.ints(*[config.n_embd] * 3)
                parts = builder.nodes_outputs("Split", [qkv, sizes], 3, axis=-1)  # (b, t, n_embd)
                if self._form == "plain":
                    y, *present = self._plain(parts, pasts[index], mask)
                else:
                    y, *present = self._fused(parts, pasts[index])
            shape = ("batch", config.n_head, "present", config.head_size)
            for tensor, name in zip(present, present_names(index), strict=True):
                builder.output(tensor, name, shape)
            return y

        return emit

    def _grouped(self, qkv: str, past: KeyValue) -> tuple[str, ...]:
        # Left out: separate key and value (they are in the query), rotary tables, positions, bias,
        # sinks, scales and norms of caches and heads. `new_counts` is the 17th input.
        inputs = [qkv, "", "", *past, "last_positions", "total_count", *[""] * 9, "new_counts"]
        heads = self._config.n_head
        return self._builder.nodes_outputs(
            "GroupQueryAttention", inputs, 3, domain=_MICROSOFT, num_heads=heads, kv_num_heads=heads
        )

    def _fused(self, parts: tuple[str, ...], past: KeyValue) -> tuple[str, ...]:
        heads = self._config.n_head
        if self._form == "multi_head":
            return self._builder.nodes_outputs(
                "MultiHeadAttention",
                [*parts, "", "", "", *past],  # no bias, no padding mask, no attention bias
                3,
                domain=_MICROSOFT,
                num_heads=heads,
                unidirectional=1,
            )
        return self._builder.nodes_outputs(
            "Attention",
            [*parts, "", *past],  # no mask but the causal one
            3,
            q_num_heads=heads,
            kv_num_heads=heads,
            is_causal=1,
        )

    def _plain(self, parts: tuple[str, ...], past: KeyValue, mask: str) -> tuple[str, ...]:
        builder, config = self._builder, self._config
        # 0 means: keep this dimension. So batch and time stay dynamic without any Shape node.
        split_heads = builder.ints(0, 0, config.n_head, config.head_size)
        query, key, value = (
            builder.node(
                "Transpose", [builder.node("Reshape", [p, split_heads])], perm=[0, 2, 1, 3]
            )
            for p in parts
        )  # (batch, n_head, time, head_size)
        key = builder.node("Concat", [past.key, key], axis=2)  # (b, n_head, total, head_size)
        value = builder.node("Concat", [past.value, value], axis=2)
        y = attend(builder, config, query, key, value, mask)  # (b, n_head, time, head_size)
        y = builder.node("Transpose", [y], perm=[0, 2, 1, 3])  # (b, time, n_head, head_size)
        merge_heads = builder.ints(0, 0, config.n_embd)
        return builder.node("Reshape", [y, merge_heads]), key, value

    def _mask(self, past: KeyValue) -> str:
        """Emit the causal mask (time, total) behind a cache: its length is the first position."""
        builder = self._builder
        past_count = builder.node("Shape", [past.key], start=2, end=3)  # (1,)
        time_count = builder.node("Shape", ["padded_rows"], start=1, end=2)  # (1,)
        total_count = builder.node("Add", [past_count, time_count])  # (1,)
        # Slices of one constant instead of Range, which would want scalars.
        every = builder.constant(np.arange(self._config.n_ctx, dtype=np.int64))
        queries = builder.node("Slice", [every, past_count, total_count])  # (time,)
        keys = builder.node("Slice", [every, builder.ints(0), total_count])  # (total,)
        return causal_mask(builder, queries, keys)
