"""Reverse-mode differentiation: append the backward pass to a graph as more ordinary nodes.

onnxruntime-training ended with 1.19, and its gradient graphs need operators of their own. Here
forward and backward pass become ONE graph of standard operators, which any ONNX runtime runs,
optimises and plans memory for as a whole.

The method is the textbook's. Walk the nodes in reverse topological order; when a node is reached,
all uses of its outputs have been visited, so the gradients of its outputs are complete: sum them
(fan-out) and let the operator's rule pass them on to its inputs. What a rule needs of the forward
pass is kept until then; or computed again, where that is cheap (`RECOMPUTED`).

Source: Griewank and Walther, "Evaluating Derivatives", chapter 3; micrograd and tinygrad for the
shape of the code.

This file does not know any operator (`gradient_rules` does), nor GPT-2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto

from llmload.graph.backward import AutodiffError, Backward, MissingGradientRule, UnknownShape
from llmload.graph.build import GraphBuilder
from llmload.graph.gradient_rules import GRADIENT_RULES, RECOMPUTED

__all__ = ["AutodiffError", "MissingGradientRule", "UnknownShape", "add_gradients"]


def add_gradients(
    builder: GraphBuilder, upstream: Mapping[str, str], with_respect_to: Sequence[str]
) -> dict[str, str]:
    """Append nodes that compute gradients, and return the name of each gradient.

    With a scalar `loss`, `upstream` is `{loss: <a constant 1>}`. With any other tensors it holds
    dL/d(tensor) for a loss L that somebody else computes, for example the next stage of a pipeline:
    then it names inputs of this graph.

    Args:
        builder: Holds the complete forward pass; receives the nodes.
        upstream: Tensor of the forward pass -> tensor with its gradient, of the same shape.
        with_respect_to: Tensors of the forward pass: inputs, initializers or inner ones.

    Returns:
        Name of the gradient of each tensor in `with_respect_to`; the gradient has its shape.

    Raises:
        MissingGradientRule: An operator between the two has no rule.
        UnknownShape: A rule needs a size that is not known before the graph runs.
        AutodiffError: A tensor is not of floating point, or nothing in `upstream` depends on it.
    """
    forward = list(builder.nodes)
    backward = Backward(builder)
    for name in (*upstream, *with_respect_to):
        if not backward.is_float(name):
            raise AutodiffError(f"tensor {name!r} is not of floating point, it has no gradient")
    influenced = _influenced(forward, backward, with_respect_to)

    # One entry for each use of a tensor that was visited so far.
    contributions = {name: [gradient] for name, gradient in upstream.items()}
    totals: dict[str, str] = {}

    def total(name: str) -> str | None:
        """Return the gradient of a tensor all of whose uses were visited; None without uses."""
        if name not in totals and name in contributions:
            parts = contributions[name]
            totals[name] = parts[0] if len(parts) == 1 else backward.node("Sum", *parts)
        return totals.get(name)

    cheap = {
        node.output[0]: node
        for node in forward
        if node.op_type in RECOMPUTED and node.output[0] in influenced
    }

    for node in reversed(forward):
        if not any(name in influenced for name in node.output):
            continue
        # "" is an optional output that is switched off.
        gradients = [total(name) if name else None for name in node.output]
        if all(gradient is None for gradient in gradients):
            continue
        if node.domain or node.op_type not in GRADIENT_RULES:
            raise MissingGradientRule(node)
        at_hand = next(gradient for gradient in gradients if gradient is not None)
        for name in dict.fromkeys(node.input):
            if name not in cheap:
                continue
            source = cheap.pop(name)
            backward.replace(name, RECOMPUTED[source.op_type](backward, source, at_hand))
        # A copy: a rule may switch on optional outputs of the node.
        inputs = list(node.input)
        input_gradients = GRADIENT_RULES[node.op_type](backward, node, gradients)
        for name, gradient in zip(inputs, input_gradients, strict=True):
            if gradient is not None and name in influenced:
                contributions.setdefault(name, []).append(gradient)

    results = {name: total(name) for name in with_respect_to}
    found = {name: gradient for name, gradient in results.items() if gradient is not None}
    if lost := [name for name in with_respect_to if name not in found]:
        raise AutodiffError(f"{', '.join(upstream)} does not depend on {', '.join(lost)}")
    appended = builder.nodes[len(forward) :]
    builder.nodes[len(forward) :] = _needed(appended, list(found.values()))
    return found


def _influenced(
    nodes: Sequence[NodeProto], backward: Backward, sources: Sequence[str]
) -> frozenset[str]:
    """Return the tensors through which a gradient can flow back to `sources`.

    Whatever is not of floating point ends the flow: indices, masks, shapes.
    """
    influenced = set(sources)
    for node in nodes:
        if any(name in influenced for name in node.input):
            influenced.update(name for name in node.output if name and backward.is_float(name))
    return frozenset(influenced)


def _needed(nodes: Sequence[NodeProto], results: Sequence[str]) -> list[NodeProto]:
    """Return the nodes that contribute to `results`, in order.

    Rules emit gradients of all inputs, also of constants; the runtime would compute them.
    """
    wanted = set(results)
    needed: list[NodeProto] = []
    for node in reversed(nodes):
        if any(name in wanted for name in node.output):
            needed.append(node)
            wanted.update(node.input)
    needed.reverse()
    return needed
