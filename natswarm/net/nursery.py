"""A nursery that is the implementation's own affair.

Trio wraps whatever leaves a nursery in exception groups. That is right where the caller opened the
nursery, and a leak where we did: who awaits `open_node` expects its errors as they were raised.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

__all__ = ["open_private_nursery"]


@asynccontextmanager
async def open_private_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that is cancelled when the body ends, and does not show in its errors.

    Several errors at once still come as a group: none of them may get lost.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        raise error from error.__cause__
