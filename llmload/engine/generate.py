"""Generate tokens on this device alone, with one stage or several in this process.

The single-device path, and what a swarm has to be equal to: the same prompt, parameters and model
give the same tokens however many stages and devices the blocks are spread over.

This file does not know networks, text or tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmload.engine.sampler import SamplingParameters, sample
from llmload.engine.session import StageEngine
from llmload.errors import PromptTooLong

__all__ = ["PART_ROWS", "generate_tokens"]

# Of a prompt, computed at once: more is not faster, and with 512 at once GPT-2 124M keeps 40 MB
# more (`tools.bench.inference`).
PART_ROWS = 128

_GREEDY = SamplingParameters(temperature=0)


def generate_tokens(
    stages: Sequence[StageEngine],
    prompt: Sequence[int],
    *,
    sampling: SamplingParameters = _GREEDY,
    max_new_tokens: int | None = None,
) -> Iterator[int]:
    """Return an iterator over the tokens that follow a prompt.

    It ends after `max_new_tokens`, at the end of the context, or when the model ends the document;
    its `eos_token_id` is not given out. Each `next` computes one token, and blocks meanwhile; a
    caller that has enough just stops.

    Args:
        stages: The whole model, in order: each stage starts where the one before has ended.
        prompt: Token ids; at least one (`config.bos_token_id` to start from nothing).
        sampling: How to choose; greedy if nothing is said.
        max_new_tokens: Bound on the answer; None for as much as the context holds.

    Raises:
        PromptTooLong: The prompt leaves no room for a token. Raised here, not by the first `next`.
        ValueError: The stages are not one model, or the prompt is empty.
        StageFailed: While iterating: the runtime could not compute.
    """
    if not stages:
        raise ValueError("there are no stages")
    config = stages[0].config
    if [stage.config for stage in stages] != [config] * len(stages):
        raise ValueError("the stages are of different models")
    if [index for stage in stages for index in stage.blocks] != list(config.blocks):
        raise ValueError(
            f"the stages {[stage.blocks for stage in stages]} are not the blocks "
            f"0..{config.n_layer - 1} in order"
        )
    if not prompt:
        raise ValueError("the prompt is empty; start from config.bos_token_id")
    if len(prompt) >= config.n_ctx:
        raise PromptTooLong(prompt_count=len(prompt), n_ctx=config.n_ctx)
    room = config.n_ctx - len(prompt)
    count = room if max_new_tokens is None else min(room, max_new_tokens)
    return _generate(stages, prompt, sampling, count)


def _generate(
    stages: Sequence[StageEngine],
    prompt: Sequence[int],
    sampling: SamplingParameters,
    token_count: int,
) -> Iterator[int]:
    caches = [stage.new_cache() for stage in stages]
    new_ids = list(prompt)
    for position in range(len(prompt), len(prompt) + token_count):
        x: NDArray[Any]
        for start in range(0, len(new_ids), PART_ROWS):
            x = np.array([new_ids[start : start + PART_ROWS]], dtype=np.int64)  # (1, time)
            for stage, cache in zip(stages, caches, strict=True):
                x = stage.run(x, cache)  # (1, time, n_embd); from the last stage (1, 1, vocab_size)
        token = sample(x[0, -1], sampling, position)
        if token == stages[0].config.eos_token_id:
            return
        yield token
        new_ids = [token]
