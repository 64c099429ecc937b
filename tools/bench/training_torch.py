"""GPT-2 in torch's own functions, as a fast hand-written trainer would use them.

Fused attention, fused AdamW, matrices in the layout in which they are stored: the rival of
`tools.bench.training`, without the layers that `transformers` puts around the same calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TorchTrainer"]

CLIP_NORM = 1.0
LEARNING_RATE = 1e-3


class TorchTrainer:
    """A model in training, float32.

    Args:
        shape: The fields of a `GPT2Config`; embeddings are tied.
        weights: All its parameters; used in place.
        thread_count: Threads of torch.
        is_compiled: Whether by torch.compile or eager.
    """

    def __init__(
        self,
        shape: SimpleNamespace,
        weights: Mapping[str, NDArray[np.float32]],
        thread_count: int,
        *,
        is_compiled: bool,
    ) -> None:
        import torch

        self._torch, self._functional, self._shape = torch, torch.nn.functional, shape
        torch.set_num_threads(thread_count)
        self._parameters = {
            name: torch.nn.Parameter(torch.from_numpy(values)) for name, values in weights.items()
        }
        self._loss: Any = torch.compile(self._forward) if is_compiled else self._forward
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
        )

    def gradients(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        """Compute the loss and all gradients, and return the loss."""
        self._optimizer.zero_grad()
        loss = self._loss(self._torch.from_numpy(tokens), self._torch.from_numpy(targets))
        loss.backward()
        return float(loss.item())

    def apply(self) -> None:
        """Do a step of AdamW along the latest gradient."""
        self._torch.nn.utils.clip_grad_norm_(self._parameters.values(), CLIP_NORM)
        self._optimizer.step()

    def gradient(self) -> dict[str, NDArray[np.float32]]:
        """Return the latest gradient by name."""
        return {name: parameter.grad.numpy() for name, parameter in self._parameters.items()}

    def _forward(self, tokens: Any, targets: Any) -> Any:
        shape, functional, weights = self._shape, self._functional, self._parameters
        batch, time = tokens.shape
        width = shape.n_embd

        def linear(name: str, x: Any) -> Any:
            # (rows, in) -> (rows, out)
            return self._torch.addmm(weights[f"{name}.bias"], x, weights[f"{name}.weight"])

        def norm(name: str, x: Any) -> Any:
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            return functional.layer_norm(x, (width,), weight, bias, shape.layer_norm_epsilon)

        def heads(part: Any) -> Any:
            return part.view(batch, time, shape.n_head, -1).transpose(1, 2)

        x = functional.embedding(tokens, weights["wte.weight"]) + weights["wpe.weight"][:time]
        x = x.view(batch * time, width)
        for index in range(shape.n_layer):
            name = f"h.{index}"
            qkv = linear(f"{name}.attn.c_attn", norm(f"{name}.ln_1", x))
            query, key, value = map(heads, qkv.split(width, dim=-1))
            y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + linear(f"{name}.attn.c_proj", y.transpose(1, 2).reshape(batch * time, width))
            y = linear(f"{name}.mlp.c_fc", norm(f"{name}.ln_2", x))
            x = x + linear(f"{name}.mlp.c_proj", functional.gelu(y, approximate="tanh"))
        logits = functional.linear(norm("ln_f", x), weights["wte.weight"])
        return functional.cross_entropy(logits, targets.flatten())
