"""The derivative of each ONNX operator: one table, operator -> rule.

A rule gets a node of the forward pass and the gradient of its output, appends nodes that compute
the gradients of its inputs, and returns their names (None where an input has none, such as an
index). "Gradient of t" always means dL/dt for one scalar L: it has the shape of t. A rule may emit
more than is asked for; what nobody uses is pruned afterwards.

A second table, `RECOMPUTED`, is of operators whose results are cheap: what needs them on the way
back computes them again from what has to be kept anyway.

Every rule is checked against finite differences in tests/llmload/test_autodiff.py.

Source: operators as in https://onnx.ai/onnx/operators/ at opset 20; a table of local rules as in
tinygrad and autograd. Layer norm's derivative is that of Ba et al. 2016, in llm.c's form.

This file does not know the graph around a node, nor GPT-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from onnx import NodeProto, TensorProto, helper

from llmload.graph.backward import Backward, Dimension, MissingGradientRule

__all__ = ["GRADIENT_RULES", "RECOMPUTED", "GradientRule", "Recompute"]

Gradients = Sequence[str | None]
# Takes gradients of the node's outputs (None: the loss does not depend on it), gives those of its
# inputs. At least one of those taken is not None.
GradientRule = Callable[[Backward, NodeProto, Gradients], Gradients]
# The same for the many operators of which only the first output has a gradient.
SimpleRule = Callable[[Backward, NodeProto, str], Gradients]

GRADIENT_RULES: dict[str, GradientRule] = {}

# Takes a gradient that is there when the node's first output is needed again; gives that output.
Recompute = Callable[[Backward, NodeProto, str], str]


def _rule(*ops: str) -> Callable[[SimpleRule], SimpleRule]:
    """Enter a rule that knows the gradient of the first output into the table."""

    def enter(simple_rule: SimpleRule) -> SimpleRule:
        def rule(b: Backward, node: NodeProto, gradients: Gradients) -> Gradients:
            first, *others = gradients
            if first is None or any(other is not None for other in others):
                raise MissingGradientRule(node, "a gradient through a further output")
            return simple_rule(b, node, first)

        for op in ops:
            GRADIENT_RULES[op] = rule
        return simple_rule

    return enter


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


# --- Arithmetic, element by element; inputs may be broadcast -----------------------------------


def _sum_to_inputs(b: Backward, node: NodeProto, *gradients: str) -> Gradients:
    source = b.shape(node.output[0])
    pairs = zip(gradients, node.input, strict=True)
    return [b.sum_to(gradient, source, target) for gradient, target in pairs]


@_rule("Identity")
def _identity(b: Backward, node: NodeProto, g: str) -> Gradients:
    return [g]


@_rule("Add", "Sum")
def _add(b: Backward, node: NodeProto, g: str) -> Gradients:
    return _sum_to_inputs(b, node, *[g for _ in node.input])


@_rule("Sub")
def _sub(b: Backward, node: NodeProto, g: str) -> Gradients:
    return _sum_to_inputs(b, node, g, b.node("Neg", g))


@_rule("Mul")
def _mul(b: Backward, node: NodeProto, g: str) -> Gradients:
    x, y = node.input
    return _sum_to_inputs(b, node, b.node("Mul", g, y), b.node("Mul", g, x))


@_rule("Div")
def _div(b: Backward, node: NodeProto, g: str) -> Gradients:
    # d(x/y)/dy = -(x/y)/y, and x/y is at hand.
    _, y = node.input
    dx = b.node("Div", g, y)
    return _sum_to_inputs(b, node, dx, b.node("Neg", b.node("Mul", dx, node.output[0])))


@_rule("Pow")
def _pow(b: Backward, node: NodeProto, g: str) -> Gradients:
    x, exponent = node.input
    if b.element_type(exponent) != b.element_type(x):
        raise MissingGradientRule(node, "base and exponent of different types")
    one = b.scalar(1.0, like=x)
    slope = b.node("Mul", exponent, b.node("Pow", x, b.node("Sub", exponent, one)))
    growth = b.node("Mul", node.output[0], b.node("Log", x))
    return _sum_to_inputs(b, node, b.node("Mul", g, slope), b.node("Mul", g, growth))


@_rule("Neg")
def _neg(b: Backward, node: NodeProto, g: str) -> Gradients:
    return [b.node("Neg", g)]


@_rule("Exp")
def _exp(b: Backward, node: NodeProto, g: str) -> Gradients:
    return [b.node("Mul", g, node.output[0])]


@_rule("Log")
def _log(b: Backward, node: NodeProto, g: str) -> Gradients:
    return [b.node("Div", g, node.input[0])]


@_rule("Sqrt")
def _sqrt(b: Backward, node: NodeProto, g: str) -> Gradients:
    half = b.node("Mul", g, b.scalar(0.5, like=node.input[0]))
    return [b.node("Div", half, node.output[0])]


@_rule("Tanh")
def _tanh(b: Backward, node: NodeProto, g: str) -> Gradients:
    # g (1 - y^2) as g - g y y: one constant and one broadcast less.
    y = node.output[0]
    return [b.node("Sub", g, b.node("Mul", b.node("Mul", g, y), y))]


# So many columns of a product the runtime computes at a time, and each time it transposes the left
# matrix anew where it should: for more of them a transposed copy is up to a tenth faster.
GEMM_COLUMN_COUNT = 128

# Of GELU in its form of tanh: y = x s with s = sigmoid(u) and u = x (linear + cubic x^2).
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR


@_rule("Gelu")
def _gelu(b: Backward, node: NodeProto, g: str) -> Gradients:
    """Rule: dy/dx = s + x s (1 - s) du/dx = s + (y - y s) (linear + 3 cubic x^2)."""
    square, s, y = _gelu_again(b, node, g)
    slope = b.node("Mul", square, b.scalar(3.0, like=node.input[0]))
    slope = b.node("Add", slope, b.scalar(GELU_LINEAR, like=node.input[0]))  # du/dx
    rest = b.node("Mul", b.node("Sub", y, b.node("Mul", y, s)), slope)
    return [b.node("Mul", b.node("Add", rest, s), g)]


def _gelu_again(b: Backward, node: NodeProto, gradient: str) -> tuple[str, ...]:
    """Emit cubic x^2, s and y from x."""
    if _attribute(node, "approximate", b"none") != b"tanh":
        raise MissingGradientRule(node, "the error function")
    x = node.input[0]

    def emit() -> tuple[str, ...]:
        cubic = b.late_scalar(GELU_CUBIC, x, gradient)
        square = b.node("Mul", b.node("Mul", x, cubic), x)
        u = b.node("Mul", b.node("Add", square, b.scalar(GELU_LINEAR, like=x)), x)
        s = b.node("Sigmoid", u)
        return square, s, b.node("Mul", x, s)

    return b.once(node.output[0], emit)


@_rule("Where")
def _where(b: Backward, node: NodeProto, g: str) -> Gradients:
    condition, x, y = node.input
    zero = b.scalar(0.0, like=x)
    source = b.shape(node.output[0])
    return [
        None,
        b.sum_to(b.node("Where", condition, g, zero), source, x),
        b.sum_to(b.node("Where", condition, zero, g), source, y),
    ]


@_rule("Cast")
def _cast(b: Backward, node: NodeProto, g: str) -> Gradients:
    return [b.node("Cast", g, to=b.element_type(node.input[0]))]


# --- Matrix products ---------------------------------------------------------------------------


@_rule("MatMul")
def _matmul(b: Backward, node: NodeProto, g: str) -> Gradients:
    """Y = A B: dA = G B^T and dB = A^T G, summed over the axes that were broadcast."""
    x, y = node.input
    x_shape, y_shape, shape = b.shape(x), b.shape(y), b.shape(node.output[0])
    if len(x_shape) < 2 or len(y_shape) < 2:
        raise MissingGradientRule(node, "a vector as operand")
    dx = b.node("MatMul", g, _transpose_last(b, y, y_shape))
    dx = b.sum_to(dx, (*shape[:-2], *x_shape[-2:]), x)
    if len(y_shape) == 2:
        # One product over all rows of the batch, instead of one per batch entry and their sum.
        in_count, out_count = b.element_count(x, [-1]), b.element_count(y, [-1])
        g_rows = b.node("Reshape", g, b.ints(-1, out_count))  # (rows, out)
        if out_count <= GEMM_COLUMN_COUNT:
            rows = b.node("Reshape", x, b.ints(-1, in_count))  # (rows, in)
            return [dx, b.node("Gemm", rows, g_rows, transA=1)]
        rank = len(x_shape)
        columns = b.node("Transpose", x, perm=[rank - 1, *range(rank - 1)])
        columns = b.node("Reshape", columns, b.ints(in_count, -1))  # (in, rows)
        return [dx, b.node("MatMul", columns, g_rows)]
    dy = b.node("MatMul", _transpose_last(b, x, x_shape), g)
    return [dx, b.sum_to(dy, (*shape[:-2], *y_shape[-2:]), y)]


def _transpose_last(b: Backward, name: str, shape: Sequence[Dimension]) -> str:
    rank = len(shape)
    return b.node("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])


@_rule("Gemm")
def _gemm(b: Backward, node: NodeProto, g: str) -> Gradients:
    """Y = alpha A' B' + beta C, where A' and B' may be transposed."""
    x, y = node.input[:2]
    trans_x, trans_y = _attribute(node, "transA", 0), _attribute(node, "transB", 0)
    alpha = _attribute(node, "alpha", 1.0)
    if trans_x:
        dx = b.node("Gemm", y, g, transA=trans_y, transB=1, alpha=alpha)
    else:
        dx = b.node("Gemm", g, y, transB=1 - trans_y, alpha=alpha)
    if trans_y:
        dy = b.node("Gemm", g, x, transA=1, transB=trans_x, alpha=alpha)
    else:
        dy = b.node("Gemm", x, g, transA=1 - trans_x, alpha=alpha)
    if len(node.input) == 2:
        return [dx, dy]
    beta = b.scalar(_attribute(node, "beta", 1.0), like=x)
    dz = b.sum_to(b.node("Mul", g, beta), b.shape(node.output[0]), node.input[2])
    return [dx, dy, dz]


# --- Moving elements around --------------------------------------------------------------------


@_rule("Reshape", "Squeeze", "Unsqueeze", "Flatten")
def _reshape(b: Backward, node: NodeProto, g: str) -> Gradients:
    x, *others = node.input
    return [b.node("Reshape", g, b.shape_tensor(x)), *[None for _ in others]]


@_rule("Transpose")
def _transpose(b: Backward, node: NodeProto, g: str) -> Gradients:
    rank = len(b.shape(node.input[0]))
    perm = _attribute(node, "perm", list(reversed(range(rank))))
    return [b.node("Transpose", g, perm=[perm.index(axis) for axis in range(rank)])]


@_rule("Expand")
def _expand(b: Backward, node: NodeProto, g: str) -> Gradients:
    return [b.sum_to(g, b.shape(node.output[0]), node.input[0]), None]


@_rule("Concat")
def _concat(b: Backward, node: NodeProto, g: str) -> Gradients:
    axis = b.axis(node.output[0], _attribute(node, "axis", 0))
    sizes = [b.shape_tensor(x, axis, axis + 1) for x in node.input]
    return b.split(g, b.node("Concat", *sizes, axis=0), count=len(sizes), axis=axis)


def _split(b: Backward, node: NodeProto, gradients: Gradients) -> Gradients:
    pairs = zip(node.output, gradients, strict=True)
    parts = [b.zeros_like(part) if g is None else g for part, g in pairs]
    gradient = b.node("Concat", *parts, axis=_attribute(node, "axis", 0))
    return [gradient, *[None for _ in node.input[1:]]]


GRADIENT_RULES["Split"] = _split


@_rule("Slice")
def _slice(b: Backward, node: NodeProto, g: str) -> Gradients:
    """Pad with zeros what the slice has cut off."""
    x, starts, _, *axes_and_steps = node.input
    rank = len(b.shape(x))
    if len(axes_and_steps) == 2 and any(b.value(axes_and_steps[1]) != 1):
        raise MissingGradientRule(node, "steps other than 1")
    axes = range(rank)
    if axes_and_steps and axes_and_steps[0]:
        axes = b.value(axes_and_steps[0]).tolist()
    before, after = [0] * rank, [0] * rank
    for axis, start in zip(axes, b.value(starts).tolist(), strict=False):
        size = b.element_count(x, [axis])
        kept = b.element_count(node.output[0], [axis])
        # As ONNX counts: negative from the end, clamped to what there is.
        before[axis] = min(max(start + size if start < 0 else start, 0), size)
        after[axis] = size - kept - before[axis]
    return [b.node("Pad", g, b.ints(*before, *after)), *[None for _ in node.input[1:]]]


@_rule("Gather")
def _gather(b: Backward, node: NodeProto, g: str) -> Gradients:
    """Add each row of the gradient to the row it was taken from.

    Not ScatterND, although it is four times as fast: ONNX Runtime runs its additions in parallel
    without a lock, so repeated indices lose some (onnxruntime issues 18048 and 23396; 20 wrong
    results in 20 runs with two threads). ScatterElements adds one after the other, in the same
    order every time. A product with one-hot rows costs 15 times as much.
    """
    x, indices = node.input
    axis = b.axis(x, _attribute(node, "axis", 0))
    # The axes of `indices` stand in place of `axis`: make them one, of `count` rows.
    before, after = b.shape_tensor(x, 0, axis), b.shape_tensor(x, axis + 1)
    rows_shape = b.node("Concat", before, b.ints(-1), after, axis=0)
    rows = b.node("Reshape", g, rows_shape)  # (*before, count, *after)
    rank = len(b.shape(x))
    index_shape = [-1 if position == axis else 1 for position in range(rank)]
    index = b.node("Reshape", indices, b.ints(*index_shape))
    index = b.node("Expand", index, b.node("Shape", rows))  # (*before, count, *after)
    return [_scatter_add(b, b.zeros_like(x), index, rows, axis), None]


@_rule("GatherElements")
def _gather_elements(b: Backward, node: NodeProto, g: str) -> Gradients:
    x, indices = node.input
    return [_scatter_add(b, b.zeros_like(x), indices, g, _attribute(node, "axis", 0)), None]


def _scatter_add(b: Backward, base: str, indices: str, updates: str, axis: int) -> str:
    return b.node("ScatterElements", base, indices, updates, axis=axis, reduction="add")


# --- Reductions and normalisations -------------------------------------------------------------


@_rule("ReduceSum")
def _reduce_sum(b: Backward, node: NodeProto, g: str) -> Gradients:
    return [_expand_reduced(b, node, g), *[None for _ in node.input[1:]]]


@_rule("ReduceMean")
def _reduce_mean(b: Backward, node: NodeProto, g: str) -> Gradients:
    x = node.input[0]
    share = b.scalar(1 / b.element_count(x, _reduced_axes(b, node)), like=x)
    return [_expand_reduced(b, node, b.node("Mul", g, share)), *[None for _ in node.input[1:]]]


def _reduced_axes(b: Backward, node: NodeProto) -> list[int]:
    """Return the axes of a reduction: a constant input, or all if there is none."""
    x = node.input[0]
    axes = b.value(node.input[1]).tolist() if len(node.input) > 1 and node.input[1] else []
    if not axes:
        return [] if _attribute(node, "noop_with_empty_axes", 0) else list(range(len(b.shape(x))))
    return sorted(b.axis(x, axis) for axis in axes)


def _expand_reduced(b: Backward, node: NodeProto, g: str) -> str:
    if not _attribute(node, "keepdims", 1):
        g = b.node("Unsqueeze", g, b.ints(*_reduced_axes(b, node)))
    return b.node("Expand", g, b.shape_tensor(node.input[0]))


@_rule("Softmax")
def _softmax(b: Backward, node: NodeProto, g: str) -> Gradients:
    """Rule: dx = y (g - sum(g y)), summed along the axis of the softmax."""
    y = node.output[0]
    axis = b.ints(_attribute(node, "axis", -1))
    total = b.node("ReduceSum", b.node("Mul", g, y), axis, keepdims=1)
    return [b.node("Mul", y, b.node("Sub", g, total))]


@_rule("LogSoftmax")
def _log_softmax(b: Backward, node: NodeProto, g: str) -> Gradients:
    """Rule: dx = g - exp(y) sum(g), summed along the axis of the softmax."""
    total = b.node("ReduceSum", g, b.ints(_attribute(node, "axis", -1)), keepdims=1)
    return [b.node("Sub", g, b.node("Mul", b.node("Exp", node.output[0]), total))]


@_rule("LayerNormalization")
def _layer_normalization(b: Backward, node: NodeProto, g: str) -> Gradients:
    """With n = (x - mean) r and r = 1 / deviation: dx = r (gn - mean(gn) - n mean(gn n))."""
    x, weight, *bias = node.input
    shape = b.shape(x)
    axes = list(range(b.axis(x, _attribute(node, "axis", -1)), len(shape)))
    share = b.scalar(1 / b.element_count(x, axes), like=x)

    def average(gradient: str) -> str:
        return b.node("Mul", b.node("ReduceSum", gradient, b.ints(*axes), keepdims=1), share)

    normed, reciprocal = _normed_again(b, node, g)
    gn = b.node("Mul", g, weight)  # gradient of n
    centred = b.node("Sub", gn, average(gn))
    along_n = b.node("Mul", normed, average(b.node("Mul", gn, normed)))
    dx = b.node("Mul", b.node("Sub", centred, along_n), reciprocal)
    d_weight = b.sum_to(b.node("Mul", g, normed), shape, weight)
    return [dx, d_weight, *[b.sum_to(g, shape, name) for name in bias]]


def _normed_again(b: Backward, node: NodeProto, gradient: str) -> tuple[str, ...]:
    """Emit n, of the shape of x, and r, from x and the two small outputs of the operator."""
    x = node.input[0]
    mean = b.optional_output(node, 1)
    reciprocal = b.optional_output(node, 2)

    def emit() -> tuple[str, ...]:
        # The runtime computes both in float32, whatever x is, as the definition says (stash_type).
        kept = [mean, reciprocal]
        if b.element_type(x) != TensorProto.FLOAT:
            kept = [b.node("Cast", tensor, to=b.element_type(x)) for tensor in kept]
        centre = b.node("Add", kept[0], b.late_scalar(0.0, x, gradient))
        return b.node("Mul", b.node("Sub", x, centre), kept[1]), kept[1]

    return b.once(node.output[0], emit)


# --- What is computed again --------------------------------------------------------------------


def _recompute_gelu(b: Backward, node: NodeProto, gradient: str) -> str:
    _, _, y = _gelu_again(b, node, gradient)
    return y


def _recompute_layer_normalization(b: Backward, node: NodeProto, gradient: str) -> str:
    normed, _ = _normed_again(b, node, gradient)
    _, weight, *bias = node.input
    y = b.node("Mul", normed, weight)
    return b.node("Add", y, *bias) if bias else y


RECOMPUTED: dict[str, Recompute] = {
    "Gelu": _recompute_gelu,
    "LayerNormalization": _recompute_layer_normalization,
}
