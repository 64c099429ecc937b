"""What a checkpoint of a learner holds, and how to go on from it.

Alone, a run that was resumed makes the same bits as one that was not interrupted. With partners it
goes on from the same model; what was known of them (versions, how far they agree, what their texts
are worth) begins anew, as do the means of AdamW that steps on marked answers keep.

This file does not know files (`checkpoint.py`).
"""

from __future__ import annotations

import numpy as np

from llmload.errors import LearningFailed
from llmload.learn.checkpoint import Checkpoint
from llmload.learn.outer import OuterLoop
from llmload.learn.shards import Vector
from llmload.learn.trainer import Trainer

__all__ = ["resume", "take_checkpoint"]


def take_checkpoint(
    trainer: Trainer, outer: OuterLoop, rng: np.random.Generator, step: int, learned_hash: str
) -> Checkpoint:
    """Return the state between two steps; its vectors are not copies.

    Args:
        trainer: Parameters and optimiser.
        outer: The state of the exchange.
        rng: What draws the batches.
        step: Steps made.
        learned_hash: By which those are known who learn the same; `resume` refuses another.
    """
    facts = {
        "learned": learned_hash,
        "powers": list(trainer.optimizer.powers),
        "outer": outer.facts(),
        "rng": rng.bit_generator.state,
    }
    return Checkpoint(step, _vectors(trainer, outer), facts)


def resume(
    checkpoint: Checkpoint,
    trainer: Trainer,
    outer: OuterLoop,
    rng: np.random.Generator,
    learned_hash: str,
) -> int:
    """Go on from a checkpoint; returns the steps made.

    Raises:
        LearningFailed: It is of another model or adapter.
    """
    if checkpoint.facts.get("learned") != learned_hash:
        raise LearningFailed(
            "the checkpoints there are of another model or adapter, or of an earlier version. "
            "Learn in another folder (--out), or remove them"
        )
    for name, target in _vectors(trainer, outer).items():
        target[:] = checkpoint.vectors[name]
    beta1_power, beta2_power = checkpoint.facts["powers"]
    trainer.optimizer.powers = (beta1_power, beta2_power)
    outer.go_on_from(checkpoint.facts["outer"])
    rng.bit_generator.state = checkpoint.facts["rng"]
    return checkpoint.step


def _vectors(trainer: Trainer, outer: OuterLoop) -> dict[str, Vector]:
    return {
        "parameters": trainer.parameters,
        **{f"optimizer.{name}": vector for name, vector in trainer.optimizer.vectors().items()},
        **{f"outer.{name}": vector for name, vector in outer.vectors().items()},
    }
