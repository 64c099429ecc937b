"""Weights in 8 or 4 bits, block by block, and what a stage stores at each precision.

Some weights of one row share a scale, so a large weight spoils its neighbours and not a whole
channel. Activations are quantised by the runtime, in blocks of the same size, so a
position is not rounded by the largest value of those computed with it, as with one scale for the
whole tensor (`quantize_dynamic`). Even so a difference in the last digit can round an activation
the other way: a sequence that is replayed in one piece gives logits that differ by 1 % or so from
those of one that came token by token, where float32 differs by 1e-6.

Matrices are quantised, norms, biases and positions stay float32. The embeddings of tokens have 8
bits at either precision: one row a token is read of them, so fewer bits would not be faster, but
the system maps whole neighbourhoods of a row, and float32 embeddings are the largest part of what a
small stage maps.

Source: the layout is that of the operator MatMulNBits of ONNX Runtime; scales as in llama.cpp's
q4_0 and q8_0.

This file does not know graphs or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmload.config import GPT2Config, parameter_shapes

__all__ = [
    "BLOCK_SIZE",
    "EMBEDDING_BITS",
    "PRECISIONS",
    "Precision",
    "bits_of",
    "dequantize",
    "quantize",
    "quantized_name",
    "rows_name",
    "scales_name",
    "stored_tensors",
    "stored_types",
]

Precision = Literal["float32", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "int4")

# Weights that share a scale. With 128 instead of 32 GPT-2 124M decodes a quarter faster (scales are
# float32, and with 32 a fifth of what is read); the shipped model loses 0.018 nats a token to
# float32 in int4 instead of 0.013, and in int8 nothing either way. A search for the scale of the
# least squared error gained less than 0.001.
BLOCK_SIZE = 128

EMBEDDING_BITS = 8

_LINEAR_SUFFIXES = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def bits_of(precision: Precision) -> int | None:
    """Return how many bits a weight of a matrix takes where it is quantised, else None."""
    return {"float32": None, "int8": 8, "int4": 4}[precision]


def quantized_name(name: str) -> str:
    """Return the name under which the quantised values of a parameter are stored."""
    return f"{name}.quantized"


def rows_name(name: str) -> str:
    """Return the name under which quantised embeddings are stored, a row a token."""
    return f"{name}.rows"


def scales_name(name: str) -> str:
    """Return the name under which the scales of a quantised parameter are stored."""
    return f"{name}.scales"


def quantize(matrix: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Return the values and scales of a matrix float32 (out, in).

    Returns:
        uint8 (out, blocks, BLOCK_SIZE * bits / 8), two values of 4 bits a byte with the first in
        the low half; and float32 scales (out, blocks). A value v stands for
        (v - 2**(bits - 1)) * scale; `in` is filled up with zeros to whole blocks.
    """
    out_count, in_count = matrix.shape
    padding = -in_count % BLOCK_SIZE
    rows = np.pad(matrix, ((0, 0), (0, padding))).reshape(out_count, -1, BLOCK_SIZE)
    middle = 2 ** (bits - 1)
    # The range is -8..7: the value of the largest magnitude gets the end that is farther out,
    # whatever its sign, so the scale may be negative.
    at = np.abs(rows).argmax(axis=-1)[..., None]
    scales = np.take_along_axis(rows, at, axis=-1)[..., 0] / np.float32(-middle)  # (out, blocks)
    divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
    values = np.rint(rows / divisor) + middle
    values = values.clip(0, 2 * middle - 1).astype(np.uint8)  # (out, blocks, BLOCK_SIZE)
    if bits == 4:
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    return values, scales


def dequantize(
    values: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, in_count: int
) -> NDArray[np.float32]:
    """Return the matrix float32 (out, in_count) for which `values` and `scales` stand."""
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:2], -1)
    matrix = (values.astype(np.float32) - np.float32(2 ** (bits - 1))) * scales[..., None]
    return matrix.reshape(len(values), -1)[:, :in_count]


def stored_types(
    config: GPT2Config, blocks: range, precision: Precision
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Return shape and type of everything that a stage stores, in the order of `stored_tensors`.

    Raises:
        ValueError: `blocks` is not a contiguous part of the model.
    """
    types: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {}
    bits = bits_of(precision)
    for name, shape in parameter_shapes(config, blocks).items():
        is_head = name == config.lm_head_name and blocks.stop == config.n_layer
        is_embedding = name == "wte.weight" and blocks.start == 0
        is_quantized = bits is not None and (is_head or name.endswith(_LINEAR_SUFFIXES))
        # Tied embeddings are both, in a stage that is the whole model.
        if bits is not None and is_embedding:
            rows = rows_name(name)
            types[rows] = (shape, np.uint8)
            types[scales_name(rows)] = ((shape[0], -(-shape[1] // BLOCK_SIZE)), np.float32)
        elif not is_quantized:
            types[name] = (shape, np.float32)
        if bits is not None and is_quantized:
            # Linear layers are stored (in, out), the output layer as embeddings, (out, in).
            in_count, out_count = shape[::-1] if is_head else shape
            block_count = -(-in_count // BLOCK_SIZE)
            blob_bytes = BLOCK_SIZE * bits // 8
            types[quantized_name(name)] = ((out_count, block_count, blob_bytes), np.uint8)
            types[scales_name(name)] = ((out_count, block_count), np.float32)
    return types


def stored_tensors(
    config: GPT2Config,
    blocks: range,
    precision: Precision,
    read: Callable[[str], NDArray[np.float32]],
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield what a stage stores, one tensor after the other, so that few are in memory at once.

    Args:
        config: The shape of the model.
        blocks: The blocks of the stage.
        precision: Of the matrices.
        read: Returns a parameter by its name, float32.
    """
    bits = bits_of(precision)
    types = stored_types(config, blocks, precision)
    for name in parameter_shapes(config, blocks):
        if name in types:
            yield name, read(name)
        if rows_name(name) in types:
            matrix = read(name)
            values, scales = quantize(matrix, EMBEDDING_BITS)
            yield rows_name(name), values.reshape(len(matrix), -1)[:, : matrix.shape[1]]
            yield scales_name(rows_name(name)), scales
        if bits is not None and quantized_name(name) in types:
            matrix = read(name)
            values, scales = quantize(matrix if name == config.lm_head_name else matrix.T, bits)
            yield quantized_name(name), values
            yield scales_name(name), scales
