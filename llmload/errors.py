"""Errors that users of `llmload` can meet, and what each of them means.

    LlmloadError
     +-- ModelFolderError    a model folder is damaged, incomplete or of another architecture
     +-- PromptTooLong       the prompt leaves no room in the context of the model
     +-- StageFailed         a stage of the pipeline could not compute what it was asked for
     |    +-- CacheFull      its memory for keys and values is taken by other sequences
     +-- NoRoute             some blocks of the model are served by nobody (swarm/route.py)
     +-- LearningFailed      a training step or an exchange of updates could not be completed
     +-- StoreFailed         the records of this device can't be read or written

Every message says what is wrong and what to do about it, because it ends up in front of a person.
Mistakes of the calling code (a negative count, a wrong shape) are `ValueError`, not in this tree.

This file does not know who raises: it imports nothing of the package.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CacheFull",
    "LearningFailed",
    "LlmloadError",
    "ModelFolderError",
    "PromptTooLong",
    "StageFailed",
    "StoreFailed",
]


class LlmloadError(Exception):
    """Base of everything that `llmload` raises on purpose."""


class ModelFolderError(LlmloadError):
    """A model folder can't be used.

    Attributes:
        file: The file at fault; the folder itself where a whole file is missing.
        problem: What is wrong with it, without a full stop.
        advice: What the user can do, as a sentence.
    """

    def __init__(self, file: Path, problem: str, advice: str) -> None:
        super().__init__(f"{file}: {problem}. {advice}")
        self.file = file
        self.problem = problem
        self.advice = advice


class PromptTooLong(LlmloadError):
    """The prompt fills the context, so that not even one token could be generated.

    Attributes:
        prompt_count: Tokens in the prompt.
        n_ctx: Tokens that the context of the model holds, prompt and answer together.
    """

    def __init__(self, *, prompt_count: int, n_ctx: int) -> None:
        super().__init__(
            f"the prompt has {prompt_count} tokens and the context of this model holds {n_ctx}, "
            f"of which the answer needs at least one. Shorten the prompt by "
            f"{prompt_count - n_ctx + 1} tokens or more, or use a model with a larger n_ctx."
        )
        self.prompt_count = prompt_count
        self.n_ctx = n_ctx


class StageFailed(LlmloadError):
    """A stage of the pipeline could not compute its part: runtime failure, or a peer that is gone.

    The step may be repeated on another replica of the same blocks: stages hold no state that the
    client could not send again.
    """


class CacheFull(StageFailed):
    """The sequences in use leave no room for this step; try again when one of them is done."""


class LearningFailed(LlmloadError):
    """A training step or an exchange of updates failed; the parameters are as they were before."""


class StoreFailed(LlmloadError):
    """The records of this device can't be read or written now; they are as they were before."""
