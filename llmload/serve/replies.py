"""The shapes in which OpenAI's clients expect an answer: whole, and in pieces.

Pure: text and counts in, dictionaries out. Source: OpenAI's API reference, completions and chat
completions.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

__all__ = ["FinishReason", "Reply", "model_card", "usage"]

FinishReason = Literal["stop", "length"]


def usage(prompt_count: int, token_count: int) -> dict[str, int]:
    """Return the counts of tokens."""
    return {
        "prompt_tokens": prompt_count,
        "completion_tokens": token_count,
        "total_tokens": prompt_count + token_count,
    }


def model_card(name: str, created_s: int) -> dict[str, Any]:
    """Return how a model is listed."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "llmload"}


class Reply:
    """The shapes of one answer.

    Args:
        model: Its name.
        is_chat: Whether it is an answer of the chat API.
        created_s: When, seconds since 1970.
    """

    def __init__(self, model: str, *, is_chat: bool, created_s: int) -> None:
        self._is_chat = is_chat
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": created_s,
            "model": model,
        }

    def whole(self, text: str, reason: FinishReason, counts: dict[str, int]) -> dict[str, Any]:
        """Return the answer as one body."""
        content: dict[str, Any]
        if self._is_chat:
            kind = "chat.completion"
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            kind, content = "text_completion", {"text": text}
        return {
            **self._head,
            "object": kind,
            "choices": [_choice(content, reason)],
            "usage": counts,
        }

    def begin(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        if not self._is_chat:
            return []
        return [self._chunk([_choice({"delta": {"role": "assistant", "content": ""}}, None)])]

    def piece(self, text: str) -> dict[str, Any]:
        """Return a piece of the text, as part of a stream."""
        content = {"delta": {"content": text}} if self._is_chat else {"text": text}
        return self._chunk([_choice(content, None)])

    def end(self, reason: FinishReason) -> dict[str, Any]:
        """Return what ends the text of a stream."""
        content: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        return self._chunk([_choice(content, reason)])

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """Return what ends a stream whose reader wants to know the counts."""
        return {**self._chunk([]), "usage": counts}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}


def _choice(content: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}
