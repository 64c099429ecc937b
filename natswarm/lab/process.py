"""One command that runs inside a namespace: its output line by line, a deadline for every wait.

Each command is the leader of its own process group, so that it ends with its children and no
signal of our terminal reaches it by accident. Knows nothing of namespaces but how to enter one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from natswarm.lab.errors import LabError

__all__ = ["LabProcess"]

# A command that prints more has run away; what comes later is read, so that it does not block, and
# forgotten.
LINES_MAX = 100_000
# Of standard error, in messages: the end of a traceback.
ERROR_TAIL_CHARACTERS = 2000
# Of the command, in messages: enough to tell which, without the invites it was given.
TITLE_CHARACTERS = 120
# Between SIGKILL and the end there is only the kernel.
KILL_WAIT_S = 10.0
# What was written before the end is in the pipe; a process that outlives the command may keep it
# open for ever.
OUTPUT_WAIT_S = 1.0


class LabProcess:
    """A running command.

    Args:
        argv: The command as the user sees it, for messages.
        enter: What goes before it to run it in its namespace.
        env: Its whole environment; None inherits ours.

    Leaving it as a context manager kills it.
    """

    def __init__(
        self, argv: Sequence[str], *, enter: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        self.argv = list(argv)
        self._title = textwrap.shorten(" ".join(argv), TITLE_CHARACTERS, placeholder=" ...")
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._is_output_over = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._error_text = ""
        self._popen = subprocess.Popen(
            [*enter, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            env=env,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {self}", daemon=True)
        self._reader.start()

    def __repr__(self) -> str:
        return f"LabProcess({self._title!r}, pid={self.pid})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Process id, and id of its process group."""
        return self._popen.pid

    @property
    def lines(self) -> list[str]:
        """Standard output so far, without line ends."""
        with self._changed:
            return list(self._lines)

    def wait_line(self, matches: Callable[[str], bool], *, timeout_s: float) -> str:
        """Wait for the first line of standard output, from its very start, that `matches`.

        Raises:
            LabError: The command ended without it, or `timeout_s` have passed.
        """
        deadline = time.monotonic() + timeout_s
        index = 0
        with self._changed:
            while True:
                while index < len(self._lines):
                    if matches(self._lines[index]):
                        return self._lines[index]
                    index += 1
                if self._is_output_over:
                    raise self._failure("ended before it printed what was waited for")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise self._failure(f"did not print what was waited for in {timeout_s:g} s")

    def wait(self, *, timeout_s: float, expected_status: int = 0) -> str:
        """Wait for the end of the command and return its standard output.

        Args:
            timeout_s: How long.
            expected_status: With which it is to end; 130 for most that were interrupted.

        Raises:
            LabError: It ended with another one; or `timeout_s` have passed, then it was killed.
        """
        try:
            status = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise self._failure(f"was killed after {timeout_s:g} s") from None
        self._close()
        if status != expected_status:
            raise self._failure(f"exited with status {status}")
        return "\n".join(self.lines)

    def interrupt(self) -> None:
        """Ask the command to end, as Ctrl-C does."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """End the command and its process group, at once; idempotent."""
        self._signal(signal.SIGKILL)
        self._popen.wait(KILL_WAIT_S)
        self._close()

    def error_text(self) -> str:
        """Return the end of what it has written to standard error."""
        if self._errors.closed:
            return self._error_text
        size = os.fstat(self._errors.fileno()).st_size
        start = max(0, size - 4 * ERROR_TAIL_CHARACTERS)  # UTF-8: at most 4 bytes each
        tail = os.pread(self._errors.fileno(), size - start, start)
        return tail.decode(errors="replace")[-ERROR_TAIL_CHARACTERS:].strip()

    def _signal(self, number: signal.Signals) -> None:
        # Only before it was waited for is the pid surely still ours.
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def _failure(self, what: str) -> LabError:
        details = self.error_text()
        return LabError(f"`{self._title}` {what}" + (f":\n{details}" if details else ""))

    def _close(self) -> None:
        # A child in another process group may hold the output open; the lab ends that one later.
        self._reader.join(OUTPUT_WAIT_S)
        self._error_text = self.error_text()
        self._errors.close()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as output:
            for line in output:
                with self._changed:
                    if len(self._lines) < LINES_MAX:
                        self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._is_output_over = True
            self._changed.notify_all()
