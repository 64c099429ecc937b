"""What goes wrong with a request, in the words and status codes of OpenAI's API.

Its client raises by the status, and shows `message`; it repeats a request after 429 and 5xx.
"""

from __future__ import annotations

from typing import Any

from llmload.errors import CacheFull, LlmloadError
from natswarm import NatswarmError

__all__ = ["Problem", "as_problem"]


class Problem(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: For people: what happened, and what to do.
        param: The parameter at fault.
        code: For programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {
            "error": {
                "message": message,
                "type": "invalid_request_error" if status < 500 else "server_error",
                "param": param,
                "code": code,
            }
        }


def as_problem(error: LlmloadError | NatswarmError) -> Problem:
    """Return what an error of a generation is to the one who asked."""
    code = "overloaded" if isinstance(error, CacheFull) else "model_unavailable"
    return Problem(503, str(error), code=code)  # stages may be there again soon
