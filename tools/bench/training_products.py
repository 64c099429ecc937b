"""The matrix products of a training step and nothing else, in ONNX Runtime: a bound of its time.

Of each shape one product is computed as often as a step does, forward and back, over the same
operands, which therefore lie in the caches more often than those of a step.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from llmload import GPT2Config
from llmload.graph.build import IR_VERSION, OPSET, QUERY_SPAN

__all__ = ["Products"]


class _Product(NamedTuple):
    """One product: batches of (rows, inner) times (inner, columns), operands stored as given."""

    batch: tuple[int, ...]
    rows: int
    inner: int
    columns: int
    is_left_transposed: bool = False
    is_right_transposed: bool = False


def products_of(config: GPT2Config, batch: int, time: int) -> Counter[_Product]:
    """Return how often a step computes each product."""
    rows, width, counts = batch * time, config.n_embd, Counter[_Product]()
    layers = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    linear = [(inner, columns, config.n_layer) for inner, columns in layers]
    for inner, columns, count in linear:
        counts[_Product((), rows, inner, columns)] += count
        counts[_Product((), rows, columns, inner, is_right_transposed=True)] += count
        counts[_Product((), inner, rows, columns, is_left_transposed=True)] += count
    vocabulary = config.vocab_size
    counts[_Product((), rows, width, vocabulary, is_right_transposed=True)] += 1
    counts[_Product((), rows, vocabulary, width)] += 1
    counts[_Product((), vocabulary, rows, width, is_left_transposed=True)] += 1
    heads, size = (batch, config.n_head), config.head_size
    for start in range(0, time, QUERY_SPAN):
        stop = min(start + QUERY_SPAN, time)
        count, span = 2 * config.n_layer, stop - start
        counts[_Product(heads, span, size, stop)] += count  # scores, and the gradient of shares
        counts[_Product(heads, span, stop, size)] += count  # values, and the gradient of queries
        counts[_Product(heads, stop, span, size)] += count  # the gradients of values and keys
    return counts


class Products:
    """A side of the benchmark that computes the products of a step."""

    def __init__(self, shape: SimpleNamespace, batch: int, time: int, threads: int) -> None:
        self._runs = [
            (_open(product, threads), count)
            for product, count in products_of(GPT2Config(**vars(shape)), batch, time).items()
        ]

    def gradients(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        """Compute all products; there is no loss."""
        for (session, binding, _), count in self._runs:
            for _ in range(count):
                session.run_with_iobinding(binding)
        return 0.0

    def apply(self) -> None:
        """Do nothing: a step has no further products."""

    def gradient(self) -> dict[str, NDArray[np.float32]]:
        """Return nothing."""
        return {}


def _open(product: _Product, threads: int) -> tuple[Any, Any, list[Any]]:
    """Return a session for one product, bound to arrays, and what keeps these alive."""
    left, right = (product.rows, product.inner), (product.inner, product.columns)
    shapes = {
        "a": (*product.batch, *(left[::-1] if product.is_left_transposed else left)),
        "b": (*product.batch, *(right[::-1] if product.is_right_transposed else right)),
        "c": (*product.batch, product.rows, product.columns),
    }
    if product.batch:
        node = helper.make_node("MatMul", ["a", "b"], ["c"])
    else:
        trans_a, trans_b = int(product.is_left_transposed), int(product.is_right_transposed)
        node = helper.make_node("Gemm", ["a", "b"], ["c"], transA=trans_a, transB=trans_b)
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    graph = helper.make_graph([node], "product", [values["a"], values["b"]], [values["c"]])
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads of the other sessions would spin beside those that work.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng, binding, kept = np.random.default_rng(0), session.io_binding(), []
    for name, shape in shapes.items():
        value = ort.OrtValue.ortvalue_from_numpy(rng.standard_normal(shape, dtype=np.float32))
        bind = binding.bind_ortvalue_output if name == "c" else binding.bind_ortvalue_input
        bind(name, value)
        kept.append(value)
    return session, binding, kept
