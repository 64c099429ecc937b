"""Every gradient rule against central differences, in float64 and on the runtime itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from llmload.graph.autodiff import (
    AutodiffError,
    MissingGradientRule,
    UnknownShape,
    add_gradients,
)
from llmload.graph.backward import Backward
from llmload.graph.build import GraphBuilder
from llmload.graph.gradient_rules import GEMM_COLUMN_COUNT, GRADIENT_RULES, RECOMPUTED

RELATIVE_ERROR = 1e-4
# Central differences in float64 are best near the cube root of the machine epsilon, 6e-6.
STEP = 1e-5

DOUBLE = TensorProto.DOUBLE
INT64 = TensorProto.INT64


class DoubleBuilder(GraphBuilder):
    """A builder of hand-made graphs whose inputs, like their constants, are float64."""

    def __init__(self):
        super().__init__("test", {}, parameters_as="input")

    def doubles(self, *shape, name):
        return self.input(name, shape, DOUBLE)

    def number(self, value):
        return self.constant(np.array(value, dtype=np.float64))


def session_of(builder):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(builder.model().SerializeToString(), options)


def random_value(shape, rng, positive):
    value = rng.standard_normal(shape)
    # numpy turns arrays of no dimensions into scalars, which the runtime does not take.
    return np.asarray(np.abs(value) + 0.5 if positive else value)


def check(emit, *shapes, positive=False, seed=1):
    """Compare all gradients of sum(upstream * emit(inputs)) with central differences.

    `emit(builder, *names)` returns one output name or several.
    """
    rng = np.random.default_rng(seed)
    feeds = {f"x{i}": random_value(shape, rng, positive) for i, shape in enumerate(shapes)}

    def build(upstream):
        """Build the graph; with `upstream` (output index -> values) also its backward pass."""
        builder = DoubleBuilder()
        names = [builder.doubles(*shape, name=f"x{i}") for i, shape in enumerate(shapes)]
        emitted = emit(builder, *names)
        outputs = (emitted,) if isinstance(emitted, str) else tuple(emitted)
        if upstream is not None:
            gradients = add_gradients(
                builder,
                {
                    output: builder.doubles(*value.shape, name=f"upstream{i}")
                    for i, (output, value) in enumerate(zip(outputs, upstream, strict=True))
                },
                names,
            )
            for i, name in enumerate(names):
                builder.output(gradients[name], f"x{i}.grad", shapes[i], DOUBLE)
        else:
            shapes_of = Backward(builder).shape
            for i, output in enumerate(outputs):
                builder.output(output, f"y{i}", shapes_of(output), DOUBLE)
        return builder

    forward = session_of(build(None))
    upstream = [np.asarray(rng.standard_normal(y.shape)) for y in forward.run(None, feeds)]

    def scalar(values):
        return sum((u * y).sum() for u, y in zip(upstream, forward.run(None, values), strict=True))

    backward = session_of(build(upstream))
    analytic = backward.run(None, feeds | {f"upstream{i}": u for i, u in enumerate(upstream)})
    for (name, value), gradient in zip(feeds.items(), analytic, strict=True):
        numeric = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[index] = STEP
            above, below = np.asarray(value + step), np.asarray(value - step)
            difference = scalar(feeds | {name: above}) - scalar(feeds | {name: below})
            numeric[index] = difference / (2 * STEP)
        assert gradient.shape == value.shape
        assert np.linalg.norm(numeric) > 0, "the case would pass with a rule that returns zeros"
        error = np.linalg.norm(gradient - numeric) / np.linalg.norm(numeric)
        assert error < RELATIVE_ERROR, f"{name}: {error:.1e}\n{gradient}\n{numeric}"


def op(name, **attributes):
    return lambda builder, *inputs: builder.node(name, inputs, **attributes)


def index(builder, *values, shape=None):
    return builder.constant(np.array(values, dtype=np.int64).reshape(shape or (len(values),)))


BROADCASTS = [
    ((2, 3), (2, 3)),
    ((2, 3), (3,)),
    ((3,), (2, 3)),
    ((2, 3), ()),
    ((2, 1, 3), (4, 1)),
    ((1, 3), (2, 1)),
    ((1,), (1,)),
    ((2, 1, 4), (3, 2, 1, 1)),
]


@pytest.mark.parametrize("shapes", BROADCASTS)
@pytest.mark.parametrize("name", ["Add", "Sub", "Mul", "Div", "Pow"])
def test_arithmetic_with_broadcasting(name, shapes):
    check(op(name), *shapes, positive=name in ("Div", "Pow"))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0])
def test_power_with_constant_exponent(exponent):
    positive = exponent == 0.5
    check(lambda b, x: b.node("Pow", [x, b.number(exponent)]), (2, 3), positive=positive)


@pytest.mark.parametrize("name", ["Identity", "Neg", "Exp", "Tanh"])
def test_unary(name):
    check(op(name), (2, 3))


def test_gelu():
    check(op("Gelu", approximate="tanh"), (2, 3))


@pytest.mark.parametrize("name", ["Log", "Sqrt"])
def test_unary_of_positive_numbers(name):
    check(op(name), (2, 3), positive=True)


def test_sum_of_several():
    check(op("Sum"), (2, 3), (3,), (2, 1))


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2, 3)), ((3,), (2, 1)), ((2, 3), (1,)), ((), (2, 3)), ((4, 2, 3), (2, 3))]
)
def test_where(shapes):
    condition = np.array([[True, False, True], [False, False, True]])
    check(lambda b, x, y: b.node("Where", [b.constant(condition), x, y]), *shapes)


def test_cast_there_and_back():
    # float32 inside: the differences must be taken where its rounding does not matter.
    def emit(builder, x):
        low = builder.node("Cast", [x], to=TensorProto.FLOAT)
        return builder.node("Mul", [builder.node("Cast", [low], to=DOUBLE), x])

    builder = DoubleBuilder()
    x = builder.doubles(3, name="x")
    seed = builder.doubles(3, name="seed")
    y = emit(builder, x)
    builder.output(add_gradients(builder, {y: seed}, [x])[x], "x.grad", (3,), DOUBLE)
    value = np.array([0.5, -1.0, 2.0])
    (gradient,) = session_of(builder).run(None, {"x": value, "seed": np.ones(3)})
    assert gradient == pytest.approx(2 * value)
    assert gradient.dtype == np.float64


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (3, 4)),
        ((2, 5, 3), (3, 4)),
        ((2, 2, 2, 3), (3, 2)),
        ((2, 2, 3), (2, 3, 4)),
        ((2, 1, 2, 3), (3, 3, 2)),
        ((2, 3), (4, 3, 2)),
        ((1, 2, 3), (4, 3, 2)),
        ((2, 3, 2), (2, GEMM_COLUMN_COUNT + 1)),
    ],
)
def test_matmul(shapes):
    check(op("MatMul"), *shapes)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [None, (4,), (2, 1), (2, 4), ()])
def test_gemm(trans_a, trans_b, bias):
    shapes = [(3, 2) if trans_a else (2, 3), (4, 3) if trans_b else (3, 4)]
    emit = op("Gemm", transA=trans_a, transB=trans_b, alpha=0.5, beta=3.0)
    check(emit, *shapes, *([] if bias is None else [bias]))


def test_reshape_squeeze_unsqueeze_flatten():
    check(lambda b, x: b.node("Reshape", [x, b.ints(0, -1)]), (2, 3, 2))
    check(lambda b, x: b.node("Squeeze", [x, b.ints(1)]), (2, 1, 3))
    check(lambda b, x: b.node("Unsqueeze", [x, b.ints(0, 2)]), (2, 3))
    check(op("Flatten", axis=2), (2, 3, 2))


@pytest.mark.parametrize("perm", [None, [0, 2, 1], [2, 0, 1], [1, 2, 0]])
def test_transpose(perm):
    check(op("Transpose", **({} if perm is None else {"perm": perm})), (2, 3, 4))


def test_expand():
    check(lambda b, x: b.node("Expand", [x, b.ints(4, 2, 3)]), (2, 1))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(axis):
    shapes = {0: [(1, 2, 3), (2, 2, 3)], 1: [(2, 1, 3), (2, 2, 3)], -1: [(2, 2, 1), (2, 2, 3)]}
    check(op("Concat", axis=axis), *shapes[axis], *shapes[axis])
    check(op("Concat", axis=axis), shapes[axis][0])


def test_split():
    check(lambda b, x: b.nodes_outputs("Split", [x], 3, axis=-1, num_outputs=3), (2, 6))
    check(lambda b, x: b.nodes_outputs("Split", [x, b.ints(1, 2)], 2, axis=0), (3, 2))
    # Part 1 has no use, so its gradient is zero.
    check(lambda b, x: b.nodes_outputs("Split", [x], 3, axis=1, num_outputs=3)[::2], (2, 6))


@pytest.mark.parametrize(
    ("starts", "ends", "axes"),
    [
        ([1], [3], [0]),
        ([1, 0], [2**62, -1], None),
        ([-2], [2**62], [1]),
        ([-9], [2], [-1]),
        ([0], [2], [-2]),
    ],
)
def test_slice(starts, ends, axes):
    def emit(builder, x):
        inputs = [x, builder.ints(*starts), builder.ints(*ends)]
        return builder.node("Slice", inputs if axes is None else [*inputs, builder.ints(*axes)])

    check(emit, (3, 4))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_gather_with_repeated_and_negative_indices(axis, shape):
    values = [1, 0, 1, -1, 1, 0][: int(np.prod(shape))]
    check(
        lambda b, x: b.node("Gather", [x, index(b, *values, shape=shape)], axis=axis),
        (2, 3, 2),
    )


def test_gather_elements_with_repeated_indices():
    check(
        lambda b, x: b.node("GatherElements", [x, index(b, 2, 2, 0, -1, shape=(2, 2))], axis=1),
        (2, 3),
    )


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [None, [0], [-1], [0, 2], [-1, 0]])
@pytest.mark.parametrize("name", ["ReduceMean", "ReduceSum"])
def test_reductions(name, axes, keepdims):
    def emit(builder, x):
        inputs = [x] if axes is None else [x, builder.ints(*axes)]
        return builder.node(name, inputs, keepdims=keepdims)

    check(emit, (2, 3, 4))


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_softmax(name, axis):
    check(op(name, axis=axis), (2, 3, 4))


def test_softmax_behind_a_causal_mask():
    mask = np.where(np.tril(np.ones((4, 4))), 0.0, -np.inf)

    def emit(builder, x):
        return builder.node("Softmax", [builder.node("Add", [x, builder.constant(mask)])])

    check(emit, (2, 4, 4))


@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization(axis):
    shape = (2, 3, 5)
    check(op("LayerNormalization", axis=axis, epsilon=1e-3), shape, shape[axis:], shape[axis:])
    check(op("LayerNormalization", axis=axis, epsilon=1e-3), shape, shape[axis:])


def test_layer_norm_from_its_parts():
    def emit(builder, x):
        last = builder.ints(-1)
        mean = builder.node("ReduceMean", [x, last])
        centred = builder.node("Sub", [x, mean])
        square = builder.node("Pow", [centred, builder.number(2.0)])
        variance = builder.node("ReduceMean", [square, last])
        deviation = builder.node("Sqrt", [builder.node("Add", [variance, builder.number(1e-3)])])
        return builder.node("Div", [centred, deviation])

    check(emit, (2, 5))


def test_every_rule_has_a_case():
    # A rule without a test above must not slip in: the cases name their operator in quotes.
    text = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in GRADIENT_RULES if f'"{name}"' not in text] == []


# --- The walk ----------------------------------------------------------------------------------


def test_fan_out_is_summed():
    def emit(builder, x):
        square = builder.node("Mul", [x, x])  # two uses in one node
        return builder.node("Add", [builder.node("Mul", [square, x]), builder.node("Tanh", [x])])

    check(emit, (2, 3))


CHEAP = {
    "Gelu": (op("Gelu", approximate="tanh"), [(2, 4)]),
    "LayerNormalization": (op("LayerNormalization", epsilon=1e-3), [(2, 4), (4,), (4,)]),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_is_cheap_is_computed_again_in_place_of_being_kept(name):
    emit, shapes = CHEAP[name]

    def twice_used(builder, weight, *inputs):
        y = emit(builder, *inputs)
        return builder.node("MatMul", [builder.node("Mul", [y, y]), weight])

    check(twice_used, (4, 3), *shapes)
    builder = DoubleBuilder()
    names = [builder.doubles(*shape, name=f"x{i}") for i, shape in enumerate([(4, 3), *shapes])]
    twice_used(builder, *names)
    (result,) = (node.output[0] for node in builder.nodes if node.op_type == name)
    forward_count = len(builder.nodes)
    last = builder.nodes[-1].output[0]
    add_gradients(builder, {last: builder.doubles(2, 3, name="upstream")}, names)
    assert all(result not in node.input for node in builder.nodes[forward_count:])


def test_only_what_is_asked_for_is_computed():
    builder = DoubleBuilder()
    x = builder.doubles(2, 3, name="x")
    weight = builder.doubles(3, 4, name="weight")
    y = builder.node("MatMul", [x, weight])
    seed = builder.doubles(2, 4, name="seed")
    before = len(builder.nodes)
    add_gradients(builder, {y: seed}, [x])
    assert [node.op_type for node in builder.nodes[before:]] == ["Transpose", "MatMul"]


def test_a_free_batch_dimension_can_be_differentiated():
    builder = DoubleBuilder()
    x = builder.input("x", ("batch", 3), DOUBLE)
    weight = builder.doubles(3, 4, name="weight")
    bias = builder.doubles(4, name="bias")
    y = builder.node("Add", [builder.node("MatMul", [x, weight]), bias])
    y = builder.node("Softmax", [builder.node("Reshape", [y, builder.ints(0, 2, 2)])])
    seed = builder.input("seed", ("batch", 2, 2), DOUBLE)
    gradients = add_gradients(builder, {y: seed}, [x, weight, bias])
    for name, shape in {x: ("batch", 3), weight: (3, 4), bias: (4,)}.items():
        builder.output(gradients[name], f"{name}.grad", shape, DOUBLE)
    session = session_of(builder)
    rng = np.random.default_rng(3)
    values = {"weight": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)}
    x_value, seed_value = rng.standard_normal((5, 3)), rng.standard_normal((5, 2, 2))
    whole = session.run(None, {"x": x_value, "seed": seed_value} | values)
    parts = [
        session.run(None, {"x": x_value[rows], "seed": seed_value[rows]} | values)
        for rows in (slice(0, 2), slice(2, 5))
    ]
    assert whole[0] == pytest.approx(np.concatenate([part[0] for part in parts]))
    assert whole[1] == pytest.approx(parts[0][1] + parts[1][1])
    assert whole[2] == pytest.approx(parts[0][2] + parts[1][2])


def test_gradients_of_inner_tensors():
    builder = DoubleBuilder()
    x = builder.doubles(3, name="x")
    inner = builder.node("Exp", [x])
    y = builder.node("Mul", [inner, inner])
    seed = builder.doubles(3, name="seed")
    gradients = add_gradients(builder, {y: seed}, [x, inner, y])
    assert gradients[y] == seed
    for number, name in enumerate([x, inner]):
        builder.output(gradients[name], f"gradient{number}", (3,), DOUBLE)
    value = np.array([0.1, -0.2, 0.3])
    by_x, by_inner = session_of(builder).run(None, {"x": value, "seed": np.ones(3)})
    assert by_inner == pytest.approx(2 * np.exp(value))
    assert by_x == pytest.approx(2 * np.exp(2 * value))


def test_missing_rule_names_operator_and_node():
    builder = DoubleBuilder()
    x = builder.doubles(3, name="x")
    y = builder.node("Floor", [builder.node("Exp", [x])])
    seed = builder.doubles(3, name="seed")
    with pytest.raises(MissingGradientRule, match=r"operator Floor \(node 'Floor_0'"):
        add_gradients(builder, {y: seed}, [x])


def test_an_operator_without_rule_may_stand_beside_the_path():
    def emit(builder, x):
        gate = builder.node("Floor", [builder.number([1.5, 2.5, 3.5])])
        return builder.node("Mul", [x, gate])

    check(emit, (2, 3))


@pytest.mark.parametrize(
    ("emit", "problem"),
    [
        (lambda b, x: b.node("MatMul", [x, b.number([1.0, 2.0, 3.0])]), "a vector as operand"),
        (lambda b, x: b.node("Gelu", [x]), "the error function"),
        (
            lambda b, x: b.node("Slice", [x, b.ints(0), b.ints(2), b.ints(0), b.ints(2)]),
            "steps other than 1",
        ),
    ],
)
def test_a_form_without_rule_says_which(emit, problem):
    builder = DoubleBuilder()
    x = builder.doubles(3, 3, name="x")
    y = emit(builder, x)
    seed = builder.input("seed", None, DOUBLE)
    with pytest.raises(MissingGradientRule, match=problem):
        add_gradients(builder, {y: seed}, [x])


def test_unknown_sizes_are_refused():
    builder = DoubleBuilder()
    x = builder.input("x", ("rows", 3), DOUBLE)
    y = builder.node("ReduceMean", [x])
    seed = builder.doubles(1, 1, name="seed")
    with pytest.raises(UnknownShape, match="'x'"):
        add_gradients(builder, {y: seed}, [x])


def test_what_the_output_does_not_depend_on_is_refused():
    builder = DoubleBuilder()
    x = builder.doubles(3, name="x")
    lonely = builder.doubles(3, name="lonely")
    y = builder.node("Exp", [x])
    seed = builder.doubles(3, name="seed")
    with pytest.raises(AutodiffError, match=f"{y} does not depend on lonely"):
        add_gradients(builder, {y: seed}, [x, lonely])


def test_integers_have_no_gradient():
    builder = DoubleBuilder()
    x = builder.input("x", (3,), INT64)
    y = builder.node("Neg", [x])
    with pytest.raises(AutodiffError, match="not of floating point"):
        add_gradients(builder, {y: y}, [x])
