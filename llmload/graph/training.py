"""The loss of GPT-2 and its gradients as ONNX graphs, for the whole model or one stage of it.

Parameters are inputs of these graphs, because training changes them between two runs. Batch and
time are fixed: a trainer uses one shape for hours, and knows the sizes that the backward pass needs
(to average, to undo a broadcast) when the graph is built.

A stage takes part in training with two graphs. Its forward graph turns tokens, or the hidden states
of the stage before, into hidden states or, in the last stage, the loss. Its gradient graph does the
same once more and goes on to the gradients: of its parameters, and of its input, which is what the
stage before needs. Computing twice is cheaper than to keep or send all inner activations.

Source: the loss of Radford et al. 2019: mean cross-entropy of the next token.

This file does not know how a graph is differentiated, optimisers, or ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto

from llmload.config import GPT2Config, parameter_shapes
from llmload.graph.autodiff import add_gradients
from llmload.graph.build import GraphBuilder, block, causal_mask, embed, final_norm, lm_head

__all__ = ["build_forward_graph", "build_gradient_graph", "gradient_name"]


def gradient_name(tensor: str) -> str:
    """Return the name under which a graph takes or gives the gradient of one of its tensors."""
    return f"{tensor}.grad"


def build_forward_graph(
    config: GPT2Config, *, batch: int, time: int, blocks: range | None = None
) -> ModelProto:
    """Build the graph that computes the loss, or the hidden states after an earlier stage.

    Inputs:
        token_ids: int64 (batch, time), in the first stage; or
        hidden: float32 (batch, time, n_embd), in later ones.
        targets: int64 (batch, time), the token after each of `token_ids`; in the last stage.
        The parameters of the stage, float32, under their names.
    Outputs:
        loss: float32 (), mean cross-entropy in nats; in the last stage; or
        hidden_out: float32 (batch, time, n_embd), in earlier ones.

    Args:
        config: The shape of the model.
        batch: Sequences.
        time: Tokens of each, 1..n_ctx.
        blocks: Contiguous range of blocks; None for the whole model, which is first stage and last.

    Raises:
        ValueError: `blocks` is no contiguous part of the model, or a size is out of range.
    """
    stage = _Stage(config, batch, time, blocks)
    stage.builder.output(stage.result, stage.result_name, stage.result_shape)
    return stage.builder.model()


def build_gradient_graph(
    config: GPT2Config, *, batch: int, time: int, blocks: range | None = None
) -> ModelProto:
    """Build the graph that computes the gradients of a stage, and the loss if it is the last.

    Inputs: those of `build_forward_graph`, and
        hidden_out.grad: float32 (batch, time, n_embd), in all stages but the last: what the next
            stage gave as hidden.grad.
    Outputs:
        loss: float32 (), in the last stage.
        hidden.grad: float32 (batch, time, n_embd), in all stages but the first.
        {parameter}.grad: for every parameter of the stage, of its shape. With tied embeddings the
            gradient of `wte.weight` is the sum over both its uses; where they lie in two stages,
            each gives its part, and the two have to be added up.

    Args, raises: as `build_forward_graph`.
    """
    stage = _Stage(config, batch, time, blocks)
    builder = stage.builder
    if stage.is_last:
        builder.output(stage.result, stage.result_name, stage.result_shape)
        upstream = builder.constant(np.array(1, dtype=np.float32))
    else:
        upstream = builder.input(gradient_name(stage.result_name), stage.result_shape)
    shapes = dict(stage.parameter_shapes)
    if not stage.is_first:
        shapes[stage.source] = stage.hidden_shape
    gradients = add_gradients(builder, {stage.result: upstream}, list(shapes))
    for name, shape in shapes.items():
        builder.output(gradients[name], gradient_name(name), shape)
    return builder.model()


class _Stage:
    """The forward pass of a stage inside of a builder, open for more nodes."""

    def __init__(self, config: GPT2Config, batch: int, time: int, blocks: range | None) -> None:
        if batch < 1 or not 1 <= time <= config.n_ctx:
            raise ValueError(f"batch {batch} < 1, or time {time} not in 1..{config.n_ctx}")
        blocks = config.blocks if blocks is None else blocks
        self.parameter_shapes = parameter_shapes(config, blocks)
        self.is_first, self.is_last = blocks.start == 0, blocks.stop == config.n_layer
        self.hidden_shape = (batch, time, config.n_embd)
        name = f"gpt2-training-{blocks.start}-{blocks.stop}"
        self.builder = GraphBuilder(name, self.parameter_shapes, parameters_as="input")
        builder = self.builder

        positions = builder.constant(np.arange(time, dtype=np.int64))  # (time,)
        mask = causal_mask(builder, positions, positions)  # (time, time)
        if self.is_first:
            self.source = builder.input("token_ids", (batch, time), TensorProto.INT64)
            x = embed(builder, self.source, positions)  # (batch, time, n_embd)
        else:
            self.source = x = builder.input("hidden", self.hidden_shape)
        for index in blocks:
            x = block(builder, config, index, x, mask)  # (batch, time, n_embd)

        self.result, self.result_name = x, "hidden_out"
        self.result_shape: tuple[int, ...] = self.hidden_shape
        if self.is_last:
            targets = builder.input("targets", (batch, time), TensorProto.INT64)
            logits = lm_head(builder, config, final_norm(builder, config, x))
            logits = builder.node("Reshape", [logits, builder.ints(-1, config.vocab_size)])
            labels = builder.node("Reshape", [targets, builder.ints(-1)])  # (batch * time,)
            # Mean over all tokens; the logits are (batch * time, vocab_size).
            self.result = builder.node("SoftmaxCrossEntropyLoss", [logits, labels])
            self.result_name, self.result_shape = "loss", ()
