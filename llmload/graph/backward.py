"""What a gradient rule writes with: a graph builder that knows the tensors of the forward pass.

A rule such as "the gradient of x + y goes to x and to y, summed over the axes along which each was
broadcast" needs the shapes of x and y, constants of the same element type, and now and then the
value of a constant (an axis, the bounds of a slice). ONNX nodes carry none of that; shape inference
does. `Backward` runs it once and then appends nodes to the same `GraphBuilder` as the forward pass.

Dimensions may be sizes or names. A name equals itself, so graphs with a free batch dimension can be
differentiated; where a rule has to know a size, it raises `UnknownShape`.

Source: ONNX shape inference, https://onnx.ai/onnx/api/shape_inference.html.

This file does not know any operator's derivative, nor in which order nodes are visited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
    shape_inference,
)

from llmload.graph.build import IR_VERSION, OPSET, GraphBuilder

__all__ = ["AutodiffError", "Backward", "Dimension", "MissingGradientRule", "UnknownShape"]

# None: shape inference could not tell, not even a name.
Dimension = int | str | None

FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


class AutodiffError(ValueError):
    """The graph can't be differentiated: a mistake of the code that built it."""


class MissingGradientRule(AutodiffError):
    """A node on the path of a gradient has an operator, or a form of it, without a rule."""

    def __init__(self, node: NodeProto, problem: str = "") -> None:
        form = f" with {problem}" if problem else ""
        super().__init__(
            f"no gradient rule for operator {node.op_type}{form} (node {node.name!r}, "
            f"output {node.output[0]!r}); add one to llmload.graph.gradient_rules"
        )
        self.node = node


class UnknownShape(AutodiffError):
    """A rule needs a size or a constant that the graph only has when it runs."""


class Backward:
    """Appends nodes of the backward pass to the builder that holds the forward pass.

    All names that the methods take are of forward tensors, except where they say "gradient".

    Args:
        builder: Holds the complete forward pass; receives the nodes.

    Raises:
        onnx.shape_inference.InferenceError: The forward pass contradicts itself.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        self._builder = builder
        self._initializers = {tensor.name: tensor for tensor in builder.initializers}
        self._element_types: dict[str, int] = {}
        self._shapes: dict[str, tuple[Dimension, ...]] = {}
        for value in _infer_values(builder):
            tensor_type = value.type.tensor_type
            self._element_types[value.name] = tensor_type.elem_type
            if tensor_type.HasField("shape"):
                self._shapes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                    for dim in tensor_type.shape.dim
                )
        for tensor in builder.initializers:
            self._element_types[tensor.name] = tensor.data_type
            self._shapes[tensor.name] = tuple(tensor.dims)
        self._again: dict[str, str] = {}
        self._emitted: dict[str, tuple[str, ...]] = {}

    # --- What is known of forward tensors ---

    def element_type(self, name: str) -> int:
        """Return the element type, as of `onnx.TensorProto`."""
        if name not in self._element_types:
            raise UnknownShape(f"shape inference found no type for tensor {name!r}")
        return self._element_types[name]

    def is_float(self, name: str) -> bool:
        """Return whether the tensor can have a gradient at all."""
        return self.element_type(name) in FLOAT_TYPES

    def shape(self, name: str) -> tuple[Dimension, ...]:
        """Return the dimensions of a tensor.

        Raises:
            UnknownShape: Not even the rank is known.
        """
        if name not in self._shapes:
            raise UnknownShape(f"shape inference found no shape for tensor {name!r}")
        return self._shapes[name]

    def element_count(self, name: str, axes: Sequence[int] | None = None) -> int:
        """Return the product of the sizes of `axes`, or of all axes.

        Raises:
            UnknownShape: One of them is not a number.
        """
        shape = self.shape(name)
        sizes = [shape[axis] for axis in (range(len(shape)) if axes is None else axes)]
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) < len(sizes):
            raise UnknownShape(f"tensor {name!r} has shape {shape}, but sizes are needed")
        return math.prod(numbers)

    def axis(self, name: str, axis: int) -> int:
        """Return `axis` counted from the front."""
        return axis % len(self.shape(name))

    def value(self, name: str) -> NDArray[Any]:
        """Return the value of a constant of the graph.

        Raises:
            UnknownShape: It is computed, or given to the graph when it runs.
        """
        if name not in self._initializers:
            raise UnknownShape(f"tensor {name!r} would have to be a constant to be differentiated")
        return numpy_helper.to_array(self._initializers[name])

    # --- What a rule emits ---

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node and return the name of its one result."""
        inputs = tuple(self._again.get(name, name) for name in inputs)
        return self._builder.node(op, inputs, **attributes)

    def replace(self, name: str, again: str) -> None:
        """Have nodes that are appended from now on use `again`, of equal value, for a tensor.

        So the tensor itself need not be kept for them.
        """
        self._again[name] = again

    def once(self, tensor: str, emit: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """Return what `emit` gave the first time for this tensor: several rules may need it."""
        if tensor not in self._emitted:
            self._emitted[tensor] = emit()
        return self._emitted[tensor]

    def late_scalar(self, value: float, like: str, gradient: str) -> str:
        """Emit what `scalar` does, computed from a gradient.

        What is computed with it in turn is not computed, and held, before the gradient is there;
        nor is it taken for the same that the forward pass has computed. Where the gradient holds
        NaN or infinity it is NaN.
        """
        first = self.node("Gather", self.node("Reshape", gradient, self.ints(-1)), self.ints(0))
        nothing = self.node("Mul", first, self.scalar(0.0, like))
        return self.node("Add", nothing, self.scalar(value, like))  # (1,)

    def split(self, gradient: str, sizes: str, *, count: int, axis: int) -> tuple[str, ...]:
        """Cut a gradient into `count` parts whose sizes along `axis` are the vector `sizes`."""
        if count == 1:
            return (gradient,)
        return self._builder.nodes_outputs("Split", [gradient, sizes], count, axis=axis)

    def optional_output(self, node: NodeProto, index: int) -> str:
        """Return output `index` of a forward node, switched on if the graph had no use for it."""
        while len(node.output) <= index:
            node.output.append("")
        if not node.output[index]:
            node.output[index] = f"{node.output[0]}.output{index}"
        return str(node.output[index])

    def ints(self, *values: int) -> str:
        """Return the name of a constant int64 vector."""
        return self._builder.ints(*values)

    def scalar(self, value: float, like: str) -> str:
        """Return the name of a constant of the element type of `like` and of no dimensions."""
        dtype = helper.tensor_dtype_to_np_dtype(self.element_type(like))
        return self._builder.constant(np.array(value, dtype=dtype))

    def shape_tensor(self, name: str, start: int = 0, end: int | None = None) -> str:
        """Return the name of an int64 vector: dimensions `start` up to `end` of a tensor."""
        dimensions = self.shape(name)[start:end]
        sizes = [size for size in dimensions if isinstance(size, int)]
        if len(sizes) == len(dimensions):
            return self.ints(*sizes)
        return self.node("Shape", name, start=start, **({} if end is None else {"end": end}))

    def zeros_like(self, name: str) -> str:
        """Emit a tensor of zeros of the shape and the element type of `name`."""
        zero = helper.make_tensor("zero", self.element_type(name), [1], [0.0])
        return self.node("ConstantOfShape", self.shape_tensor(name), value=zero)

    def sum_to(self, gradient: str, source: Sequence[Dimension], target: str) -> str:
        """Undo a broadcast: sum a gradient of shape `source` to the shape of the tensor `target`.

        Raises:
            UnknownShape: It can't be told along which axes `target` was broadcast.
        """
        shape = self.shape(target)
        extra_count = len(source) - len(shape)
        leading = list(range(extra_count))
        stretched = []
        for axis, (source_size, size) in enumerate(zip(source[extra_count:], shape, strict=True)):
            if size == 1 and source_size != 1:
                stretched.append(extra_count + axis)
            elif size is None or size != source_size:
                raise UnknownShape(
                    f"can't tell how {target!r} of shape {shape} was broadcast to {tuple(source)}"
                )
        if stretched:
            gradient = self.node("ReduceSum", gradient, self.ints(*stretched), keepdims=1)
        if leading:
            gradient = self.node("ReduceSum", gradient, self.ints(*leading), keepdims=0)
        return gradient


def _infer_values(builder: GraphBuilder) -> list[ValueInfoProto]:
    """Return name, type and shape of every input and every computed tensor of the builder."""
    graph = helper.make_graph(
        builder.nodes,
        builder.name,
        builder.inputs,
        [],
        initializer=builder.initializers,
        value_info=builder.declared,
    )
    domains = {"": OPSET} | {node.domain: 1 for node in builder.nodes if node.domain}
    model: ModelProto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*version) for version in domains.items()],
        ir_version=IR_VERSION,
    )
    # data_prop: the target shape of a Reshape may be computed from shapes.
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    return [*inferred.input, *inferred.value_info]
