"""Compare the gradients of llmload's own autodiff with those of torch autograd.

The tests compare with finite differences, which need no other library but can only be as exact as
differences are. This check is a second, independent opinion, to be run when a gradient rule, the
graph of the model or ONNX Runtime changes:

    python tools/check_gradients_torch.py --seed 1

It needs `torch` (CPU build; 2.13 was used), which is no dependency of the project: install both
into an environment of their own. torch computes in float64 as the truth, and in float32 to show how
large an error of rounding is normal. The exit status is 1 if any parameter of any model is off by
more than 1e-4, or the losses differ.

Source: the model is GPT-2 in torch's own functions, written from llmload/reference.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmload.config import GPT2Config
from llmload.learn.trainer import Trainer
from llmload.weights import random_weights

try:
    import torch
    from torch.nn import functional
except ImportError:
    sys.exit("torch is missing: `pip install torch` in an environment of its own, then run again.")

__all__ = ["main"]

RELATIVE_ERROR_MAX = 1e-4

# name, shape, batch, time
CASES = [
    ("tiny", GPT2Config(vocab_size=61, n_ctx=16, n_embd=24, n_layer=2, n_head=3), 3, 13),
    (
        "tiny, untied",
        GPT2Config(
            vocab_size=61, n_ctx=16, n_embd=24, n_layer=2, n_head=3, tie_word_embeddings=False
        ),
        3,
        16,
    ),
    ("mid", GPT2Config(vocab_size=4096, n_ctx=256, n_embd=256, n_layer=6, n_head=8), 4, 128),
]


def torch_loss(config: GPT2Config, weights: dict[str, Any], tokens: Any, targets: Any) -> Any:
    """Return the mean cross-entropy of GPT-2 in torch, in the type of the weights."""
    b, t = tokens.shape
    c, h, d = config.n_embd, config.n_head, config.head_size

    def norm(name: str, x: Any) -> Any:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, (c,), weight, bias, eps=config.layer_norm_epsilon)

    def linear(name: str, x: Any) -> Any:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][tokens] + weights["wpe.weight"][:t]  # (b, t, c)
    future = torch.ones(t, t, dtype=torch.bool).triu(1)  # (t, t)
    for index in config.blocks:
        name = f"h.{index}"
        qkv = linear(f"{name}.attn.c_attn", norm(f"{name}.ln_1", x))  # (b, t, 3c)
        q, k, v = (part.view(b, t, h, d).transpose(1, 2) for part in qkv.split(c, dim=-1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d)  # (b, h, t, t)
        y = scores.masked_fill(future, -math.inf).softmax(-1) @ v  # (b, h, t, d)
        x = x + linear(f"{name}.attn.c_proj", y.transpose(1, 2).reshape(b, t, c))  # (b, t, c)
        y = functional.gelu(linear(f"{name}.mlp.c_fc", norm(f"{name}.ln_2", x)), approximate="tanh")
        x = x + linear(f"{name}.mlp.c_proj", y)  # (b, t, c)
    logits = norm("ln_f", x) @ weights[config.lm_head_name].T  # (b, t, v)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_gradients(
    config: GPT2Config,
    weights: dict[str, NDArray[np.float32]],
    tokens: NDArray[np.int64],
    targets: NDArray[np.int64],
    dtype: Any,
) -> tuple[float, dict[str, NDArray[np.float64]]]:
    """Return loss and gradients by torch autograd, computed in `dtype`."""
    tensors = {
        name: torch.tensor(values, dtype=dtype, requires_grad=True)
        for name, values in weights.items()
    }
    loss = torch_loss(config, tensors, torch.tensor(tokens), torch.tensor(targets))
    loss.backward()
    return loss.item(), {name: tensor.grad.double().numpy() for name, tensor in tensors.items()}


def relative_error(values: NDArray[Any], truth: NDArray[np.float64]) -> float:
    """Return the largest difference of any element, relative to the largest true element."""
    return float(np.abs(values - truth).max() / np.abs(truth).max())


def check(name: str, config: GPT2Config, batch: int, time: int, seed: int) -> bool:
    """Print the error of every parameter of one model; return whether all are within the bound."""
    rng = np.random.default_rng(seed)
    # Noise on top of a fresh model: zeros as biases and ones as norms would hide mistakes.
    weights = {
        parameter: values + np.float32(0.05) * rng.standard_normal(values.shape, dtype=np.float32)
        for parameter, values in random_weights(config, seed).items()
    }
    tokens, targets = rng.integers(config.vocab_size, size=(2, batch, time))

    trainer = Trainer(config, weights)
    loss, flat = trainer.gradients((tokens, targets))
    gradients = trainer.space.views(flat)
    true_loss, truth = torch_gradients(config, weights, tokens, targets, torch.float64)
    torch_32_loss, torch_32 = torch_gradients(config, weights, tokens, targets, torch.float32)

    print(f"\n{name}: {config.n_layer} layers of {config.n_embd}, vocabulary {config.vocab_size}")
    print(f"batch {batch} x {time}, seed {seed}; largest error relative to torch float64\n")
    print(f"{'parameter':28} {'llmload':>9} {'torch float32':>14}")
    print(
        f"{'loss':28} {abs(loss / true_loss - 1):9.1e} {abs(torch_32_loss / true_loss - 1):14.1e}"
    )
    errors = {}
    for parameter in sorted(truth):
        errors[parameter] = relative_error(gradients[parameter], truth[parameter])
        usual = relative_error(torch_32[parameter], truth[parameter])
        print(f"{parameter:28} {errors[parameter]:9.1e} {usual:14.1e}")
    worst = max(errors, key=lambda parameter: errors[parameter])
    print(f"worst: {worst} {errors[worst]:.1e} (bound {RELATIVE_ERROR_MAX:.0e})")
    is_loss_equal = abs(loss - true_loss) < 1e-5 * true_loss
    # Written so that NaN fails.
    return is_loss_equal and all(error <= RELATIVE_ERROR_MAX for error in errors.values())


def main(argv: list[str] | None = None) -> int:
    """Run all cases; return the exit status."""
    parser = argparse.ArgumentParser(description="Compare gradients with torch autograd.")
    parser.add_argument("--seed", type=int, default=1, help="of weights and tokens")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = [check(*case, seed=arguments.seed) for case in CASES]
    print("\nall gradients agree" if all(results) else "\nGRADIENTS DIFFER")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
