"""The output layer and its loss in one: logits of a piece of the vocabulary at a time.

Logits are the largest tensor of a step: 206 MB for 1,024 tokens of GPT-2 124M, and a loss over all
of them at once holds them several times, with log-probabilities and gradients. Here each piece of
the vocabulary gives its logits, its largest, and the sum of its exponentials, which overwrite the
logits; the sums of all pieces make the loss. On the way back the exponentials become the gradient
of the logits in their place, and that becomes the gradient of the matrix and of the hidden states.
So logits are held once for gradients, one piece of them for losses alone; and a piece is small
enough to stay in the caches from one operation to the next, which makes the whole a tenth faster.

The matrix comes in pieces, too, as tensors of their own: views of it, where it is an array.

Source: the sums as in Milakov and Gimelshein 2018, "Online normalizer calculation for softmax";
forward and backward pass in one as in Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary
Language Models".

This file does not know where the hidden states come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmload.graph.build import GraphBuilder

__all__ = ["LossHead", "vocabulary_pieces"]

# Rows of the output layer. Half and twice as many take about the same time.
PIECE_SIZE = 2048


def vocabulary_pieces(vocab_size: int) -> list[range]:
    """Cut a vocabulary into ranges of up to `PIECE_SIZE` tokens."""
    starts = range(0, vocab_size, PIECE_SIZE)
    return [range(start, min(start + PIECE_SIZE, vocab_size)) for start in starts]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One piece of the vocabulary, as names of tensors.

    Attributes:
        matrix: float32 (tokens, n_embd), rows of the output layer.
        shift: float32 (rows, 1), the largest logit.
        exponentials: float32 (rows, tokens), of the logits less the shift.
        total: float32 (rows, 1), the sum of them.
        index: int64 (rows, 1), where the target is in this piece; some place if it is not.
        is_here: bool (rows, 1), whether it is.
        target: float32 (rows, 1), the logit of the target; 0 if it is not here.
    """

    matrix: str
    shift: str
    exponentials: str
    total: str
    index: str
    is_here: str
    target: str


class LossHead:
    """Emits cross-entropy from hidden states, then its gradients.

    Args:
        builder: Receives the nodes.
        hidden: float32 (batch, time, n_embd), after the last norm.
        targets: int64 (batch, time).
        shape: Batch, time and n_embd.
        matrices: For each of `vocabulary_pieces` its rows, float32 (tokens, n_embd).

    Attributes:
        losses: float32 (batch, time), in nats.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        hidden: str,
        targets: str,
        shape: tuple[int, int, int],
        matrices: Sequence[tuple[range, str]],
    ) -> None:
        self._builder, self._shape = builder, shape
        self._zero = builder.constant(np.array(0, dtype=np.float32))
        batch, time, width = shape
        self._rows = builder.node("Reshape", [hidden, builder.ints(-1, width)])  # (rows, n_embd)
        self._targets = builder.node("Reshape", [targets, builder.ints(-1, 1)])  # (rows, 1)
        self._pieces = [self._piece(tokens, matrix) for tokens, matrix in matrices]

        shift = self._all("Max", [piece.shift for piece in self._pieces])
        totals = [
            builder.node("Mul", [piece.total, self._exp_of_difference(piece.shift, shift)])
            for piece in self._pieces
        ]
        log_total = builder.node("Log", [self._all("Sum", totals)])
        self._log_sum = builder.node("Add", [log_total, shift])  # (rows, 1)
        target = self._all("Sum", [piece.target for piece in self._pieces])
        losses = builder.node("Sub", [self._log_sum, target])  # (rows, 1)
        self.losses = builder.node("Reshape", [losses, builder.ints(batch, time)])

    def gradients(self, upstream: str, *, of_matrix: bool) -> tuple[str, list[str]]:
        """Emit the gradients, once.

        Args:
            upstream: float32 (batch, time), that of `losses`.
            of_matrix: Whether those of the matrix are wanted, too.

        Returns:
            That of `hidden`, of its shape; and of each of `matrices`.
        """
        builder = self._builder
        upstream = builder.node("Reshape", [upstream, builder.ints(-1, 1)])  # (rows, 1)
        negative = builder.node("Neg", [upstream])
        hidden: list[str] = []  # the sum so far: (rows, n_embd)
        matrices = []
        for piece in self._pieces:
            # Upstream times the softmax, and less upstream at the target.
            scale = self._exp_of_difference(piece.shift, self._log_sum)  # (rows, 1)
            scale = builder.node("Mul", [scale, upstream])
            logits = builder.node("Mul", [piece.exponentials, scale])  # (rows, tokens)
            at_target = builder.node("Where", [piece.is_here, negative, self._zero])
            logits = builder.node(
                "ScatterElements", [logits, piece.index, at_target], axis=1, reduction="add"
            )
            hidden = [builder.node("Gemm", [logits, piece.matrix, *hidden])]
            if of_matrix:
                matrices.append(builder.node("Gemm", [logits, self._rows], transA=1))
        return builder.node("Reshape", [*hidden, builder.ints(*self._shape)]), matrices

    def _piece(self, tokens: range, matrix: str) -> _Piece:
        builder = self._builder
        logits = builder.node("Gemm", [self._rows, matrix], transB=1)  # (rows, tokens)
        place = builder.node("Sub", [self._targets, builder.ints(tokens.start)])  # (rows, 1)
        last = builder.constant(np.array(len(tokens) - 1))
        index = builder.node("Clip", [place, builder.constant(np.array(0)), last])
        is_here = builder.node("Equal", [place, index])
        at_index = builder.node("GatherElements", [logits, index], axis=1)  # (rows, 1)
        # No logit is larger than the largest: this only has the runtime read the logit before the
        # difference overwrites it. Otherwise it would keep the logits besides.
        largest = builder.node("ReduceMax", [logits, builder.ints(1)], keepdims=1)
        shift = builder.node("Max", [largest, at_index])
        exponentials = builder.node("Exp", [builder.node("Sub", [logits, shift])])
        return _Piece(
            matrix=matrix,
            shift=shift,
            exponentials=exponentials,
            total=builder.node("ReduceSum", [exponentials, builder.ints(1)], keepdims=1),
            index=index,
            is_here=is_here,
            target=builder.node("Where", [is_here, at_index, self._zero]),
        )

    def _exp_of_difference(self, x: str, y: str) -> str:
        return self._builder.node("Exp", [self._builder.node("Sub", [x, y])])

    def _all(self, op: str, tensors: Sequence[str]) -> str:
        return tensors[0] if len(tensors) == 1 else self._builder.node(op, tensors)
