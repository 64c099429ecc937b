"""What int8 and int4 weights cost in quality: loss on text that the shipped model never saw.

    python -m tools.bench.precision --data DIR [--model NAME|DIR] [--seed N] [--quick] [--json]

DIR is the folder that `python tools/train_tiny.py data` fills; its held-out documents are read in
windows of the model's context that do not overlap, and every token but the first of a window
counts. Nats a token, and perplexity, their exponential. `--quick` takes a tenth of the windows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# First of what loads ONNX Runtime: it switches its telemetry off.
from llmload import Model, ModelStore, StageEngine, bundled_model_path, load_model
from llmload.graph.quantize import PRECISIONS

QUICK_SHARE = 10
# A user would not notice; llama.cpp's q4_0 loses a few per cent of perplexity on small models.
LOSS_MAX = {"int8": 0.005, "int4": 0.05}


def windows_of(model: Model, data: Path) -> list[NDArray[np.int64]]:
    """Return the held-out text as token ids, in windows of n_ctx and the token behind."""
    windows = []
    for line in (data / "documents.jsonl").read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        if document["split"] != "validation":
            continue
        start = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
        token_ids = np.array(start + model.tokenizer.encode(document["text"]), dtype=np.int64)
        n_ctx = model.config.n_ctx
        cut = [token_ids[at : at + n_ctx + 1] for at in range(0, len(token_ids), n_ctx)]
        windows += [window for window in cut if len(window) > 1]
    return windows


def nats_per_token(engine: StageEngine, windows: list[NDArray[np.int64]]) -> float:
    """Return the mean negative log-likelihood of every token behind the first of its window."""
    total, count = 0.0, 0
    for window in windows:
        x, wanted = window[None, :-1], window[1:]
        logits = engine.run(x, engine.new_cache(), logits_count=len(wanted))[0]
        logits = logits.astype(np.float64)  # (time, vocab_size)
        largest = logits.max(axis=-1)
        norm = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
        total += float((norm - logits[np.arange(len(wanted)), wanted]).sum())
        count += len(wanted)
    return total / count


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with documents.jsonl")
    parser.add_argument("--model", help="a model of this device, or a folder")
    parser.add_argument("--seed", type=int, default=1, help="of the windows that --quick takes")
    parser.add_argument("--quick", action="store_true", help="a tenth of the windows")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    found = arguments.model
    model = load_model(bundled_model_path() if found is None else ModelStore().find(found))
    windows = windows_of(model, arguments.data)
    if arguments.quick:
        windows = random.Random(arguments.seed).sample(windows, -(-len(windows) // QUICK_SHARE))
    nats: dict[str, float] = {
        precision: nats_per_token(
            StageEngine(model.config, model.weights, precision=precision), windows
        )
        for precision in PRECISIONS
    }
    targets: dict[str, Any] = {}
    for precision, limit in LOSS_MAX.items():
        lost = nats[precision] - nats["float32"]
        targets[f"nats_lost_{precision}"] = {
            "value": round(lost, 5),
            "target": limit,
            "ok": lost <= limit,
        }
    if arguments.json:
        tokens = sum(len(window) - 1 for window in windows)
        print(
            json.dumps(
                {
                    "benchmark": "precision",
                    "seed": arguments.seed,
                    "quick": arguments.quick,
                    "model": model.content_hash,
                    "tokens": tokens,
                    "nats_per_token": nats,
                    "perplexity": {name: math.exp(value) for name, value in nats.items()},
                    "targets": targets,
                }
            )
        )
        return
    for name, value in nats.items():
        print(f"{name:9} {value:8.4f} nats a token   perplexity {math.exp(value):8.3f}")
    for name, target in targets.items():
        verdict = "met" if target["ok"] else "MISSED"
        print(f"{name:18} {target['value']:9.5f}   target {target['target']:g}: {verdict}")


if __name__ == "__main__":
    main()
