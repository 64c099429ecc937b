"""How likely a model finds sequences, and the gradient of any loss over that, as ONNX graphs.

    log_probability[i] = sum over t of counted[i, t] * log p(targets[i, t] | token_ids[i, :t + 1])

What is not counted is a prompt, or filled up to the fixed time: attention is causal, so what comes
later changes nothing. For a loss L of the log-probabilities that somebody else computes, the
gradient graph takes dL/d(log_probability) and gives the gradients of the parameters.

This file does not know which loss, or ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto

from llmload.config import GPT2Config, parameter_shapes
from llmload.graph.autodiff import add_gradients
from llmload.graph.build import GraphBuilder, block, embed, final_norm, lm_head
from llmload.graph.training import gradient_name

__all__ = ["build_log_probability_graph"]


def build_log_probability_graph(
    config: GPT2Config, *, batch: int, time: int, with_gradients: bool
) -> ModelProto:
    """Build the graph for sequences of one shape.

    Inputs:
        token_ids: int64 (batch, time).
        targets: int64 (batch, time), the token after each of `token_ids`.
        counted: float32 (batch, time), 1 where the target counts and 0 where not.
        The parameters, float32, under their names.
        log_probability.grad: float32 (batch,); with gradients.
    Outputs:
        log_probability: float32 (batch,), nats; without gradients.
        {parameter}.grad: for every parameter, of its shape; with gradients.

    Raises:
        ValueError: A size is out of range.
    """
    if batch < 1 or not 1 <= time <= config.n_ctx:
        raise ValueError(f"batch {batch} < 1, or time {time} not in 1..{config.n_ctx}")
    shapes = parameter_shapes(config, config.blocks)
    builder = GraphBuilder("gpt2-log-probability", shapes, parameters_as="input")
    token_ids = builder.input("token_ids", (batch, time), TensorProto.INT64)
    targets = builder.input("targets", (batch, time), TensorProto.INT64)
    counted = builder.input("counted", (batch, time))

    positions = builder.constant(np.arange(time, dtype=np.int64))  # (time,)
    x = embed(builder, token_ids, positions)  # (batch, time, n_embd)
    for index in config.blocks:
        x = block(builder, config, index, x, time)  # (batch, time, n_embd)
    logits = lm_head(builder, config, final_norm(builder, config, x))  # (batch, time, vocab_size)
    logits = builder.node("Reshape", [logits, builder.ints(-1, config.vocab_size)])
    labels = builder.node("Reshape", [targets, builder.ints(-1)])  # (batch * time,)
    losses = builder.node("SoftmaxCrossEntropyLoss", [logits, labels], reduction="none")
    losses = builder.node("Reshape", [losses, builder.ints(batch, time)])  # (batch, time)
    losses = builder.node("Mul", [losses, counted])
    total = builder.node("ReduceSum", [losses, builder.ints(1)], keepdims=0)  # (batch,)
    result = builder.node("Neg", [total])
    if not with_gradients:
        builder.output(result, "log_probability", (batch,))
        return builder.model()
    upstream = builder.input(gradient_name("log_probability"), (batch,))
    gradients = add_gradients(builder, {result: upstream}, list(shapes))
    for name, shape in shapes.items():
        builder.output(gradients[name], gradient_name(name), shape)
    return builder.model()
