"""What rounding activations for the wire does to logits and text, with the shipped model.

    python -m tools.bench.codecs [--seed N] [--quick] [--json]

The model is cut into 2, 3 and 6 stages; between two of them hidden states travel in each codec of
`llmload/swarm/codec.py`. Text that the model was not trained on (the documentation of this project)
is predicted token by token; all figures are against the same cut with float32, which is exact.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmload import Model, StageEngine, bundled_model_path, load_model
from llmload.swarm.codec import CODECS, Codec, decode_hidden_untrusted, encode_hidden

STAGE_COUNTS = (2, 3, 6)
# Nats a token that each codec may cost on three stages.
LOSS_MAX = {"float16": 0.0005, "int8": 0.01}


def logits_of(
    engines: list[StageEngine], ids: NDArray[np.int64], codec: Codec
) -> tuple[NDArray[np.float32], int]:
    """Return float32 (time, vocab_size), and the bytes of one row between stages."""
    x: NDArray[np.float32] | NDArray[np.int64] = ids[np.newaxis]
    row_bytes = 0
    for engine in engines:
        if x.ndim == 3:
            used, payload = encode_hidden(x[0], codec)
            row_bytes = memoryview(payload).nbytes // len(ids)
            x = decode_hidden_untrusted(bytes(payload), used, len(ids), x.shape[2])[np.newaxis]
        x = engine.run(x, engine.new_cache(), logits_count=len(ids))
    return x[0], row_bytes


def cross_entropy(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Return the mean nats a token."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    totals = np.log(np.exp(scores).sum(axis=1))
    return float((totals - scores[np.arange(len(targets)), targets]).mean())


def texts(model: Model, seed: int, count: int) -> list[NDArray[np.int64]]:
    """Return windows of the documentation, as token ids with one target behind."""
    files = sorted(Path(__file__).parents[2].glob("docs/*.md"))
    ids = model.tokenizer.encode("\n".join(file.read_text("utf-8") for file in files))
    rng, length = random.Random(seed), min(model.config.n_ctx, 256) + 1
    starts = [rng.randrange(len(ids) - length) for _ in range(count)]
    return [np.array(ids[start : start + length]) for start in starts]


def measure(model: Model, stage_count: int, windows: list[NDArray[np.int64]]) -> dict[str, float]:
    """Return the figures of one cut."""
    cuts = np.linspace(0, model.config.n_layer, stage_count + 1).astype(int)
    engines = [
        StageEngine(model.config, model.weights, range(first, end))
        for first, end in itertools.pairwise(cuts)
    ]
    figures: dict[str, float] = {}
    exact = [logits_of(engines, window[:-1], "float32") for window in windows]
    figures["float32_row_bytes"] = exact[0][1]
    for codec in CODECS[1:]:
        errors, same, losses = [], [], []
        for window, (right, _) in zip(windows, exact, strict=True):
            logits, figures[f"{codec}_row_bytes"] = logits_of(engines, window[:-1], codec)
            errors.append(np.abs(logits - right).mean() / right.std())
            same.append((logits.argmax(axis=1) == right.argmax(axis=1)).mean())
            losses.append(cross_entropy(logits, window[1:]) - cross_entropy(right, window[1:]))
        figures[f"{codec}_logit_error"] = round(float(np.mean(errors)), 6)
        figures[f"{codec}_same_top_token"] = round(float(np.mean(same)), 5)
        figures[f"{codec}_loss_nats"] = round(float(np.mean(losses)), 6)
    return figures


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the passages")
    parser.add_argument("--quick", action="store_true", help="four passages instead of 40")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    model = load_model(bundled_model_path())
    windows = texts(model, arguments.seed, 4 if arguments.quick else 40)
    cuts = {count: measure(model, count, windows) for count in STAGE_COUNTS}
    targets = {
        f"{codec}_loss_nats": {
            "value": cuts[3][f"{codec}_loss_nats"],
            "target": most,
            "ok": cuts[3][f"{codec}_loss_nats"] <= most,
        }
        for codec, most in LOSS_MAX.items()
    }
    if arguments.json:
        stages = {str(count): figures for count, figures in cuts.items()}
        print(json.dumps({"benchmark": "codecs", "stages": stages, "targets": targets}))
        return
    for count, figures in cuts.items():
        print(f"{count} stages")
        for name, value in figures.items():
            print(f"  {name:26} {value:12g}")
    for name, target in targets.items():
        print(f"{name}: target {target['target']:g} {'met' if target['ok'] else 'MISSED'}")


if __name__ == "__main__":
    main()
