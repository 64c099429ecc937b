"""A child that outlives its parent just long enough to clean up after it.

It waits at the end of a pipe whose other end only the parent holds: however the parent ends, by
SIGKILL too, the pipe ends with it. It hears no signal that can be ignored.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable

__all__ = ["Watchdog"]


class Watchdog:
    """A child that calls `clean_up` when this process is gone, or has closed it.

    Make it before any thread is there: it is a fork. It closes every descriptor but its end.

    Args:
        clean_up: Must not need anything of this process but its memory as it is now.

    Attributes:
        pid: Of the child.
    """

    def __init__(self, clean_up: Callable[[], object]) -> None:
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _watch(read_end, clean_up)
        os.close(read_end)
        self._write_end = write_end

    def close(self) -> None:
        """Have it clean up, and wait until it has."""
        os.close(self._write_end)
        os.waitpid(self.pid, 0)


def _watch(read_end: int, clean_up: Callable[[], object]) -> None:
    """Be the child."""
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        os.closerange(3, read_end)
        os.closerange(read_end + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        while os.read(read_end, 1):
            pass
        clean_up()
        status = 0
    finally:
        # Not `sys.exit`: what the parent registered to happen at its end is the parent's to do.
        os._exit(status)
