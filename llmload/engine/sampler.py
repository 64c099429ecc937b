"""Choose the next token from logits, so that every peer would choose the same.

A step may be computed twice: a stage died, a replica repeats the step, a client replays its
session, a guess of speculative decoding is verified. With a random generator that carries state the
second time gives another token. So the randomness of a step is a function of the seed and the
position alone: a counter-based generator, Philox, whose counter is the position.

The choice depends on the logits only through their order and their softmax in float64, hence
rounding differences between devices (1e-6) change a token only if the random number falls that
close to the border between two tokens.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox); Holtzman et al.
2020, "The curious case of neural text degeneration" (top-p).

This file does not know models, caches or text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SamplingParameters", "probabilities", "sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How to choose a token.

    Attributes:
        temperature: 0 takes the most likely token always (greedy); 1 samples what the model says;
            less is safer, more is wilder.
        top_k: Only the k most likely tokens have a chance, and those as likely as the k-th;
            None for all.
        top_p: Only the most likely tokens that together reach this probability have a chance;
            1 for all.
        seed: Equal seeds give equal answers to equal prompts; 0..2**64 - 1.

    Raises:
        ValueError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, or None for all, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0..2**64 - 1, got {self.seed}")


def sample(logits: NDArray[Any], parameters: SamplingParameters, position: int) -> int:
    """Return the token for one position.

    Args:
        logits: Floating (vocab_size,), of the position before.
        parameters: How to choose.
        position: Where in its sequence the token will stand, 0 or more; with the seed it decides
            the random number.

    Returns:
        A token id, 0..vocab_size - 1. Ties of the greedy choice go to the lowest id.

    Raises:
        ValueError: The logits are not one finite vector, or the position is negative.
    """
    if position < 0:
        raise ValueError(f"position must be 0 or more, got {position}")
    if parameters.temperature == 0:
        _check_logits(logits)
        return int(logits.argmax())
    cumulative = probabilities(logits, parameters).cumsum()  # (vocab_size,)
    # The counter is 256 bits wide. With the position in its upper words, sequences of neighbouring
    # positions never meet, however many numbers a later version draws for one.
    bits = np.random.Philox(key=parameters.seed, counter=position << 64).random_raw()
    # Raw bits, because numpy keeps those equal in all versions, but not what it makes of them. The
    # upper 53 are a float in [0, 1). Times the last entry: rounding leaves that next to 1, and no
    # draw may fall behind it.
    draw = (bits >> 11) / 2**53 * cumulative[-1]
    # The first token whose cumulative share exceeds the draw; so tokens without a chance, whose
    # share adds nothing, are never hit.
    return int(np.searchsorted(cumulative, draw, side="right"))


def probabilities(logits: NDArray[Any], parameters: SamplingParameters) -> NDArray[np.float64]:
    """Return the chance of every token under temperature, top_k and top_p: float64 (vocab_size,).

    The temperature comes first, then top_k, then top_p of what is left, as in `transformers`.

    Raises:
        ValueError: The logits are not one finite vector, or the temperature is 0 (no chance at
            all: `sample` takes the maximum).
    """
    _check_logits(logits)
    if parameters.temperature == 0:
        raise ValueError("with temperature 0 there are no probabilities")
    scores = logits.astype(np.float64) - logits.max()  # (vocab_size,), all <= 0
    # A tiny temperature sends all but the best to -inf, which is what it should.
    with np.errstate(over="ignore"):
        scores = scores / parameters.temperature
    if parameters.top_k is not None and parameters.top_k < scores.size:
        kth = np.partition(scores, -parameters.top_k)[-parameters.top_k]
        scores = np.where(scores >= kth, scores, -np.inf)
    shares = np.exp(scores)
    shares /= shares.sum()
    if parameters.top_p < 1:
        # Stable: equal shares stay in the order of their ids, on every machine.
        order = np.argsort(-shares, kind="stable")  # most likely first
        before = shares[order].cumsum() - shares[order]  # what more likely tokens have together
        shares[order[before >= parameters.top_p]] = 0
        shares /= shares.sum()
    result: NDArray[np.float64] = shares
    return result


def _check_logits(logits: NDArray[Any]) -> None:
    if logits.ndim != 1 or logits.size == 0 or not np.isfinite(logits).all():
        raise ValueError(f"logits must be a finite vector, got {logits.dtype} {logits.shape}")
