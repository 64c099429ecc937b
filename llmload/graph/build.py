"""Write GPT-2 as an ONNX graph, for any contiguous range of its blocks.

Exporters trace a framework's code and leave a graph that nobody wrote: hundreds of shape nodes, and
a prefill graph apart from a decode graph. Here every node is emitted on purpose, so one graph
serves prefill and decode, any batch, any split into stages, and the trainer can differentiate it:
the operators are few, and each that lies on the path of a gradient has a simple rule.

There are two layers. `GraphBuilder` collects nodes and knows nothing of GPT-2. The emitters
(`embed`, `block`, `final_norm`, `lm_head` and what they consist of) take a builder and names of
tensors, append nodes, and return the names of the results. Graphs are functions over them: a loss
with its parameters as inputs in `training`, a stage with a cache in `stage`.

Operators on the path of a gradient: Add, Concat, Gather, Gelu, LayerNormalization, MatMul, Mul,
Reshape, Slice, Softmax, Split, Transpose.
Operators that only see positions: LessOrEqual, Reshape, Where.

Source: the model is that of `llmload.reference`, which explains it; operators as in
https://onnx.ai/onnx/operators/ at opset 20.

This file does not know the values of the weights, ONNX Runtime, or where stages run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from llmload.config import GPT2Config

__all__ = [
    "IR_VERSION",
    "OPSET",
    "GraphBuilder",
    "Linear",
    "attend",
    "attention",
    "block",
    "causal_mask",
    "embed",
    "embed_weights",
    "final_norm",
    "gelu_new",
    "layer_norm",
    "linear",
    "lm_head",
    "mlp",
]

# The oldest opset with Gelu: one kernel, of which training keeps the input alone.
OPSET = 20
# The oldest file format that carries it, for the same reason.
IR_VERSION = 8

# Of `attention`: with 256 positions two spans make a step of training 3 % shorter.
QUERY_SPAN = 128

ParametersAs = Literal["external", "input"]
Dimension = int | str | None


class GraphBuilder:
    """Collects the nodes of one graph, in the order in which they are computed.

    Every tensor is known by its name, a string; names of inner tensors are the builder's business.

    Args:
        name: Name of the graph.
        parameter_shapes: Shape of each parameter that may be used, as of `config.parameter_shapes`.
        parameter_types: Element type of those that are not float32, as of `onnx.TensorProto`.
        parameters_as: What `parameter` declares. "external": initializers without content, which
            the runtime is given as arrays when it opens the graph; so the graph is some KB for any
            model, protobuf's bound of 2 GB does not matter, and no weight is copied on its way.
            "input": inputs of the graph, for training.
    """

    def __init__(
        self,
        name: str,
        parameter_shapes: Mapping[str, tuple[int, ...]],
        *,
        parameter_types: Mapping[str, int] | None = None,
        parameters_as: ParametersAs = "external",
    ) -> None:
        self.name = name
        self.parameters_as = parameters_as
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.initializers: list[TensorProto] = []
        self.declared: list[ValueInfoProto] = []  # inner tensors
        self.parameter_names: list[str] = []  # those in use, in order of their first use
        self._parameter_shapes = parameter_shapes
        self._parameter_types = parameter_types or {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._name_counts: dict[str, int] = {}
        self._output_names: dict[str, str] = {}  # inner name -> name of the output

    def input(
        self, name: str, shape: Sequence[Dimension], element_type: int = TensorProto.FLOAT
    ) -> str:
        """Declare an input of the graph; a dimension is a size, or a name where it may vary."""
        self.inputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def output(
        self,
        tensor: str,
        name: str,
        shape: Sequence[Dimension],
        element_type: int = TensorProto.FLOAT,
    ) -> str:
        """Declare `tensor` as the output of the graph called `name`."""
        # Emitters name inner tensors before anybody knows that the result is an output, so `model`
        # renames it. An Identity node would do for what can't be renamed, but copies the tensor:
        # for keys and values that would be the whole cache, once a token.
        if tensor in self._output_names or not any(tensor in node.output for node in self.nodes):
            tensor = self.node("Identity", [tensor])
        self._output_names[tensor] = name
        self.outputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node with one output and return the name of its result."""
        (output,) = self.nodes_outputs(op, inputs, 1, **attributes)
        return output

    def nodes_outputs(
        self,
        op: str,
        inputs: Sequence[str],
        output_count: int,
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Append a node with several outputs (Split) and return the names of its results.

        An attribute `domain` names whose operator it is, where it is none of ONNX itself.
        """
        name = self._fresh_name(op)
        outputs = (
            (name,) if output_count == 1 else tuple(f"{name}.{i}" for i in range(output_count))
        )
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs

    def declare(self, tensor: str, shape: Sequence[Dimension]) -> None:
        """Say that an inner tensor is float32 of some shape.

        Only needed for what a contributed operator gives, which shape inference does not know.
        """
        self.declared.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape))

    def constant(self, value: NDArray[Any]) -> str:
        """Return the name of a constant tensor; equal constants are stored once."""
        # numpy's own rule would turn a 0-d array into a numpy scalar; `asarray` keeps the shape.
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._fresh_name("constant")
            self.initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """Return the name of a constant int64 vector: a shape, an axis, a bound of Slice."""
        return self.constant(np.array(values, dtype=np.int64))

    def parameter(self, name: str) -> str:
        """Use a parameter of the model, under its own name.

        Raises:
            KeyError: The model (or this stage of it) has no such parameter.
        """
        shape = self._parameter_shapes[name]
        element_type = self._parameter_types.get(name, TensorProto.FLOAT)
        if name not in self.parameter_names:
            self.parameter_names.append(name)
            if self.parameters_as == "input":
                self.input(name, shape, element_type)
            else:
                self.initializers.append(_external_initializer(name, shape, element_type))
        return name

    def model(self, *, opset: int = OPSET) -> ModelProto:
        """Return the graph as an ONNX model.

        Args:
            opset: Version of the standard operators; nodes of other domains bring theirs along.

        Raises:
            onnx.checker.ValidationError: The nodes do not form a valid graph.
        """
        nodes = []
        for node in self.nodes:
            renamed = NodeProto()
            renamed.CopyFrom(node)
            renamed.input[:] = [self._output_names.get(name, name) for name in node.input]
            renamed.output[:] = [self._output_names.get(name, name) for name in node.output]
            nodes.append(renamed)
        # Autodiff drops nodes that nobody needs; the runtime warns of constants left behind.
        used = {name for node in nodes for name in node.input}
        initializers = [tensor for tensor in self.initializers if tensor.name in used]
        graph = helper.make_graph(nodes, self.name, self.inputs, self.outputs, initializers)
        # Contributed operators have one version each, 1.
        domains = {"": opset} | {node.domain: 1 for node in nodes if node.domain}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(*version) for version in domains.items()],
            ir_version=IR_VERSION,
            producer_name="llmload",
        )
        # The checker looks for the files of external initializers, which do not exist.
        if self.parameters_as == "input":
            checker.check_model(model)
        return model

    def _fresh_name(self, stem: str) -> str:
        count = self._name_counts.get(stem, 0)
        self._name_counts[stem] = count + 1
        return f"{stem}_{count}"


def _external_initializer(name: str, shape: tuple[int, ...], element_type: int) -> TensorProto:
    tensor = TensorProto(
        name=name,
        data_type=element_type,
        dims=shape,
        data_location=TensorProto.EXTERNAL,
    )
    # ONNX demands a file; nobody opens it, because the runtime is given the array by name.
    tensor.external_data.add(key="location", value="given-to-the-session")
    return tensor


def embed_weights(model: ModelProto, weights: Mapping[str, NDArray[np.float32]]) -> ModelProto:
    """Return a copy of `model` that carries its weights, to be saved or quantised as one piece.

    Raises:
        KeyError: `weights` lacks a parameter of the graph.
        ValueError: The weights exceed the 2 GB that one ONNX file can hold.
    """
    initializers = [
        numpy_helper.from_array(weights[tensor.name], tensor.name)
        if tensor.data_location == TensorProto.EXTERNAL
        else tensor
        for tensor in model.graph.initializer
    ]
    total_bytes = sum(len(tensor.raw_data) for tensor in initializers)
    if total_bytes >= 2**31 - 2**20:
        raise ValueError(f"{total_bytes} bytes of weights do not fit into one ONNX file (2 GB)")
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(initializers)
    return copy


# --- Emitters: one function a layer, each in the order of the forward pass ---------------------


def embed(builder: GraphBuilder, token_ids: str, positions: str) -> str:
    """Emit token embedding + position embedding.

    Args:
        builder: Receives the nodes.
        token_ids: int64 (batch, time).
        positions: int64 (time,), absolute positions of the tokens.

    Returns:
        Hidden states, float32 (batch, time, n_embd).
    """
    tokens = builder.node("Gather", [builder.parameter("wte.weight"), token_ids])  # (b, t, n_embd)
    places = builder.node("Gather", [builder.parameter("wpe.weight"), positions])  # (t, n_embd)
    return builder.node("Add", [tokens, places])  # (b, t, n_embd)


def causal_mask(builder: GraphBuilder, query_positions: str, key_positions: str) -> str:
    """Emit the mask that lets nobody look into the future.

    Args:
        builder: Receives the nodes.
        query_positions: int64 (time,), absolute positions of the new tokens.
        key_positions: int64 (total,), absolute positions of everything in the cache plus those.

    Returns:
        float32 (time, total), 0 where the query may look at the key and -inf where not. Minus
        infinity is safe: each query sees at least itself, so no row of the softmax is empty.
    """
    queries = builder.node("Reshape", [query_positions, builder.ints(-1, 1)])  # (time, 1)
    visible = builder.node("LessOrEqual", [key_positions, queries])  # (time, total)
    zero = builder.constant(np.array(0, dtype=np.float32))
    minus_infinity = builder.constant(np.array(-np.inf, dtype=np.float32))
    return builder.node("Where", [visible, zero, minus_infinity])  # (time, total)


def layer_norm(builder: GraphBuilder, config: GPT2Config, name: str, x: str) -> str:
    """Emit the layer norm `name` (such as "h.0.ln_1") over the last axis; the shape stays."""
    return builder.node(
        "LayerNormalization",
        [x, builder.parameter(f"{name}.weight"), builder.parameter(f"{name}.bias")],
        axis=-1,
        epsilon=config.layer_norm_epsilon,
    )


def linear(builder: GraphBuilder, name: str, x: str) -> str:
    """Emit x @ weight + bias for the linear layer `name`: (..., in) -> (..., out)."""
    product = builder.node("MatMul", [x, builder.parameter(f"{name}.weight")])
    return builder.node("Add", [product, builder.parameter(f"{name}.bias")])


def attend(
    builder: GraphBuilder, config: GPT2Config, query: str, key: str, value: str, mask: str
) -> str:
    """Emit softmax(query @ key^T / sqrt(head_size) + mask) @ value.

    This is the one function to replace by a fused operator: everything around it only knows heads.

    Args:
        builder: Receives the nodes.
        config: The shape of the model.
        query: float32 (batch, n_head, time, head_size).
        key: float32 (batch, n_head, total, head_size).
        value: As `key`.
        mask: float32 (time, total), of `causal_mask`.

    Returns:
        float32 (batch, n_head, time, head_size).
    """
    scale = builder.constant(np.array(1 / math.sqrt(config.head_size), dtype=np.float32))
    # Scaling the query is head_size / total times the work of scaling the scores.
    query = builder.node("Mul", [query, scale])  # (b, n_head, time, head_size)
    key = builder.node("Transpose", [key], perm=[0, 1, 3, 2])  # (b, n_head, head_size, total)
    scores = builder.node("MatMul", [query, key])  # (b, n_head, time, total)
    scores = builder.node("Add", [scores, mask])  # (b, n_head, time, total)
    shares = builder.node("Softmax", [scores], axis=-1)  # (b, n_head, time, total), rows sum to 1
    return builder.node("MatMul", [shares, value])  # (b, n_head, time, head_size)


# Emits a linear layer by its name: (..., in) -> (..., out).
Linear: TypeAlias = Callable[[GraphBuilder, str, str], str]


def attention(
    builder: GraphBuilder,
    config: GPT2Config,
    name: str,
    x: str,
    time: int,
    linear: Linear = linear,
) -> str:
    """Emit the attention layer `name` (such as "h.0.attn"), heads and both projections included.

    Queries are taken in spans, and each span sees the keys up to its end: of what a mask would
    hide, a part is not computed in the first place. Shorter spans save no more time than the
    additional nodes take.

    Args:
        builder: Receives the nodes.
        config: The shape of the model.
        name: Prefix of the parameters.
        x: float32 (batch, time, n_embd), after the layer norm.
        time: Positions, counted from the first of the sequence.
        linear: What emits linear layers.

    Returns:
        float32 (batch, time, n_embd).
    """
    # 0 means: keep this dimension. So batch stays dynamic without any Shape node.
    split_heads = builder.ints(0, 0, config.n_head, config.head_size)
    merge_heads = builder.ints(0, 0, config.n_embd)

    qkv = linear(builder, f"{name}.c_attn", x)  # (b, t, 3 * n_embd)
    heads = []
    sizes = builder.ints(*[config.n_embd] * 3)
    for part in builder.nodes_outputs("Split", [qkv, sizes], 3, axis=-1):  # 3 of (b, t, n_embd)
        part = builder.node("Reshape", [part, split_heads])  # (b, t, n_head, head_size)
        heads.append(builder.node("Transpose", [part], perm=[0, 2, 1, 3]))  # (b, n_head, t, hs)
    query, key, value = heads
    spans = [range(at, min(at + QUERY_SPAN, time)) for at in range(0, time, QUERY_SPAN)]
    if len(spans) == 1:
        y = _attend_span(builder, config, spans[0], query, key, value)  # (b, n_head, t, hs)
    else:
        sizes = builder.ints(*map(len, spans))
        queries = builder.nodes_outputs("Split", [query, sizes], len(spans), axis=2)
        parts = []
        for span, span_query in zip(spans, queries, strict=True):
            seen = [_first(builder, tensor, span.stop, time) for tensor in (key, value)]
            parts.append(_attend_span(builder, config, span, span_query, *seen))
        y = builder.node("Concat", parts, axis=2)  # (b, n_head, t, hs)
    y = builder.node("Transpose", [y], perm=[0, 2, 1, 3])  # (b, t, n_head, head_size)
    y = builder.node("Reshape", [y, merge_heads])  # (b, t, n_embd)
    return linear(builder, f"{name}.c_proj", y)


def _first(builder: GraphBuilder, tensor: str, count: int, time: int) -> str:
    """Emit the first `count` positions of keys or values: (b, n_head, time, hs) -> (.., count, hs).

    All of them are the tensor itself: a slice would be a copy.
    """
    if count == time:
        return tensor
    return builder.node("Slice", [tensor, builder.ints(0), builder.ints(count), builder.ints(2)])


def _attend_span(
    builder: GraphBuilder, config: GPT2Config, span: range, query: str, key: str, value: str
) -> str:
    """Emit `attend` for the queries at some positions and all keys up to the last of them."""
    queries = builder.constant(np.array(span))  # (span,)
    keys = builder.constant(np.arange(span.stop))  # (total,)
    return attend(builder, config, query, key, value, causal_mask(builder, queries, keys))


def mlp(builder: GraphBuilder, name: str, x: str, linear: Linear = linear) -> str:
    """Emit the feed-forward layer `name` (such as "h.0.mlp"): (batch, time, n_embd) to the same."""
    x = linear(builder, f"{name}.c_fc", x)  # (b, t, 4 * n_embd)
    x = gelu_new(builder, x)  # (b, t, 4 * n_embd)
    return linear(builder, f"{name}.c_proj", x)  # (b, t, n_embd)


def gelu_new(builder: GraphBuilder, x: str) -> str:
    """Emit 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); the shape stays."""
    return builder.node("Gelu", [x], approximate="tanh")


def block(
    builder: GraphBuilder,
    config: GPT2Config,
    index: int,
    x: str,
    time: int,
    linear: Linear = linear,
) -> str:
    """Emit block `index`: attention and feed-forward, each on a normed copy of the residual stream.

    Args, returns: as `attention`, with the residual stream float32 (batch, time, n_embd) as `x`.
    """
    name = f"h.{index}"
    normed = layer_norm(builder, config, f"{name}.ln_1", x)
    y = attention(builder, config, f"{name}.attn", normed, time, linear)
    x = builder.node("Add", [x, y])  # (b, t, n_embd)
    y = mlp(builder, f"{name}.mlp", layer_norm(builder, config, f"{name}.ln_2", x), linear)
    return builder.node("Add", [x, y])  # (b, t, n_embd)


def final_norm(builder: GraphBuilder, config: GPT2Config, x: str) -> str:
    """Emit the layer norm after the last block; (batch, time, n_embd) to the same."""
    return layer_norm(builder, config, "ln_f", x)


def lm_head(builder: GraphBuilder, config: GPT2Config, x: str) -> str:
    """Emit the logits of the next token: (batch, time, n_embd) -> (batch, time, vocab_size).

    With tied embeddings this is the second use of `wte.weight`; gradients of both uses add up.
    """
    weight = builder.parameter(config.lm_head_name)  # (vocab_size, n_embd)
    weight = builder.node("Transpose", [weight], perm=[1, 0])  # (n_embd, vocab_size)
    return builder.node("MatMul", [x, weight])
