"""The emitters of ONNX graphs compute what the NumPy reference computes, layer by layer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from llmload import reference
from llmload.config import parameter_shapes
from llmload.graph import build
from llmload.graph.build import GraphBuilder, embed_weights

TOLERANCE = 2e-5  # float32 against float32; measured 3e-6, with logits up to 4


def evaluate(builder, tensor, weights, feeds):
    """Run what a builder holds and return one tensor."""
    builder.output(tensor, "result", [None] * 3)
    model = embed_weights(builder.model(), weights)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["result"], feeds)[0]


@pytest.mark.parametrize("span", [build.QUERY_SPAN, 3])
def test_every_emitter_equals_its_layer(config, weights, monkeypatch, span):
    """The same names on both sides, so that a failing layer is found at once."""
    monkeypatch.setattr(build, "QUERY_SPAN", span)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 7, config.n_embd), dtype=np.float32)

    layers = {
        "layer_norm": (
            lambda b: build.layer_norm(b, config, "h.1.ln_1", "x"),
            reference.layer_norm(config, weights, "h.1.ln_1", x),
        ),
        "linear": (
            lambda b: build.linear(b, "h.1.mlp.c_fc", "x"),
            reference.linear(weights, "h.1.mlp.c_fc", x),
        ),
        "mlp": (
            lambda b: build.mlp(b, "h.1.mlp", "x"),
            reference.mlp(weights, "h.1.mlp", x),
        ),
        "attention": (
            lambda b: build.attention(b, config, "h.1.attn", "x", 7),
            reference.attention(config, weights, "h.1.attn", x)[0],
        ),
        "block": (
            lambda b: build.block(b, config, 2, "x", 7),
            reference.block(config, weights, 2, x)[0],
        ),
        "head": (
            lambda b: build.lm_head(b, config, build.final_norm(b, config, "x")),
            reference.next_token_logits(config, weights, x),
        ),
    }
    for name, (emit, expected) in layers.items():
        builder = GraphBuilder(name, parameter_shapes(config, config.blocks))
        builder.input("x", ("batch", "time", config.n_embd))
        actual = evaluate(builder, emit(builder), weights, {"x": x})
        assert actual.shape == expected.shape, name
        assert abs(actual - expected).max() < TOLERANCE, name


def training_graph(config, blocks):
    """The form that the trainer uses: static time, no cache, parameters fed."""
    builder = GraphBuilder("training", parameter_shapes(config, blocks), parameters_as="input")
    positions = builder.constant(np.arange(8))
    x = build.embed(builder, builder.input("token_ids", (2, 8), TensorProto.INT64), positions)
    for index in blocks:
        x = build.block(builder, config, index, x, 8)
    x = build.lm_head(builder, config, build.final_norm(builder, config, x))
    builder.output(x, "logits", (2, 8, config.vocab_size))
    return builder


def test_parameters_as_inputs_give_the_same(config, weights):
    builder = training_graph(config, config.blocks)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, (2, 8))
    model = builder.model()
    assert sorted(builder.parameter_names) == sorted(weights)
    assert [value.name for value in model.graph.input] == ["token_ids", *builder.parameter_names]

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(["logits"], {"token_ids": tokens, **weights})
    expected, _ = reference.forward(config, weights, tokens)
    assert abs(logits - expected).max() < TOLERANCE


def test_graph_has_only_the_operators_that_it_says(config, monkeypatch):
    """Autodiff needs a rule for each; a new one must be added knowingly."""
    monkeypatch.setattr(build, "QUERY_SPAN", 4)
    model = training_graph(config, config.blocks).model()
    documented = set()
    for line in build.__doc__.split("Operators ")[1:]:
        names = line.partition(":")[2].partition(".\n")[0]
        documented |= {name.strip() for name in names.split(",")}
    counts = Counter(node.op_type for node in model.graph.node)
    assert set(counts) == documented
    assert {node.domain for node in model.graph.node} == {""}


def test_parameters_are_carried_by_the_graph_or_not(config, weights):
    builder = GraphBuilder("block", parameter_shapes(config, range(1, 3)))
    builder.input("x", ("batch", "time", config.n_embd))
    builder.output(build.mlp(builder, "h.1.mlp", "x"), "y", ("batch", "time", config.n_embd))
    model = builder.model()
    assert model.ByteSize() < 10_000
    whole = embed_weights(model, weights)
    onnx.checker.check_model(whole, full_check=True)
    assert model.ByteSize() < 10_000  # the original is as it was
    carried = {t.name: onnx.numpy_helper.to_array(t) for t in whole.graph.initializer}
    for name in builder.parameter_names:
        np.testing.assert_array_equal(carried[name], weights[name])


def test_builder_shares_constants_and_names_outputs():
    builder = GraphBuilder("g", {})
    x = builder.input("x", (2,))
    two = builder.constant(np.float32([2, 2]))
    assert builder.constant(np.float32([2, 2])) == two
    assert builder.constant(np.float64([2, 2])) != two
    y = builder.node("Mul", [x, two])
    z = builder.node("Mul", [y, two])
    for name, tensor in {"y": y, "again": y, "z": z, "through": x}.items():
        builder.output(tensor, name, (2,))
    model = builder.model()
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    results = session.run(["y", "again", "z", "through"], {"x": np.float32([1, 3])})
    assert [list(result) for result in results] == [[2, 6], [2, 6], [4, 12], [1, 3]]
    with pytest.raises(KeyError):
        builder.parameter("wte.weight")
