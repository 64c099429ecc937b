"""Run a task beside a block of code, without a trace in the errors that the block raises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

__all__ = ["beside"]


@asynccontextmanager
async def beside(task: Callable[..., Awaitable[None]], *arguments: Any) -> AsyncIterator[None]:
    """Run `task(*arguments)` while the body runs, and cancel it at the body's end.

    What the body raises comes out as it is; out of a bare nursery it would come in a group. The
    task itself should not raise: that cancels the body, and comes in a group.
    """
    body_error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task, *arguments)
        try:
            yield
        except BaseException as error:
            body_error = error
        nursery.cancel_scope.cancel()
    if body_error is not None:
        raise body_error
