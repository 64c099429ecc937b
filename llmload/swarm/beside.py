"""Run tasks beside a block of code, without a trace in the errors that the block raises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

__all__ = ["beside", "open_quiet_nursery"]


@asynccontextmanager
async def open_quiet_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery whose tasks are cancelled at the body's end.

    What the body raises comes out as it is; out of a bare nursery it would come in a group. The
    tasks themselves should not raise: that cancels the body, and comes in a group.
    """
    body_error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as error:
            body_error = error
        nursery.cancel_scope.cancel()
    if body_error is not None:
        raise body_error


@asynccontextmanager
async def beside(task: Callable[..., Awaitable[None]], *arguments: Any) -> AsyncIterator[None]:
    """Run `task(*arguments)` while the body runs; see `open_quiet_nursery`."""
    async with open_quiet_nursery() as nursery:
        nursery.start_soon(task, *arguments)
        yield
