"""One network namespace: make it, run commands and open sockets in it, remove it without a trace.

Names carry the pid of the run that made them and when that process started (a pid alone may be
somebody else's by now), so that labs run side by side and what a killed run left behind is known
to be nobody's.

Source: ip-netns(8), setns(2), proc(5). Knows nothing of NAT.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from natswarm.lab.errors import LabError
from natswarm.lab.process import LabProcess

__all__ = [
    "NAME_PREFIX",
    "Namespace",
    "entered",
    "namespace_names",
    "new_prefix",
    "remove_all",
    "remove_stale",
    "started_at",
]

NAME_PREFIX = "nswlab"
NAMESPACES = Path("/run/netns")  # where ip-netns(8) keeps them
CLONE_NEWNET = 0x4000_0000
# `ip` and `nft` take milliseconds; a machine that swaps takes seconds.
COMMAND_TIMEOUT_S = 30.0

_serials = itertools.count()


def command(argv: Sequence[str], *, input_text: str = "") -> str:
    """Run a configuration command in our own namespace and return its output.

    Raises:
        LabError: It is not installed, failed, or took too long.
    """
    try:
        done = subprocess.run(
            argv, input=input_text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"`{' '.join(argv)}`: {error}") from error
    if done.returncode:
        raise LabError(
            f"`{' '.join(argv)}` exited with status {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout


class Namespace:
    """A network namespace, with loopback up and nothing else.

    Args:
        prefix: From `new_prefix`, the same for all namespaces of one lab.
        name: What it is in the lab, such as `core`.
    """

    def __init__(self, prefix: str, name: str) -> None:
        self.name = name
        self.full_name = f"{prefix}-{name}"
        self._processes: list[LabProcess] = []
        command(["ip", "netns", "add", self.full_name])
        try:
            self.ip("link set dev lo up")
        except BaseException:
            self.remove()
            raise

    def __repr__(self) -> str:
        return f"Namespace({self.full_name})"

    def ip(self, *lines: str) -> None:
        """Carry out lines of `ip -batch` in it, stopping at the first that fails.

        Raises:
            LabError: One failed.
        """
        command(["ip", "-n", self.full_name, "-batch", "-"], input_text="\n".join(lines) + "\n")

    def nft(self, ruleset: str) -> None:
        """Load an nftables ruleset in it, all or nothing.

        Raises:
            LabError: nft refused it.
        """
        command(["ip", "netns", "exec", self.full_name, "nft", "-f", "-"], input_text=ruleset)

    def sysctl(self, key: str, value: int) -> None:
        """Set a kernel parameter of it, such as `net.ipv4.ip_forward`.

        Raises:
            LabError: This kernel has no such parameter, or keeps it for itself.
        """
        # Not sysctl(8), which need not be installed: /proc/sys/net shows the reader's namespace.
        path = Path("/proc/sys", *key.split("."))
        with self.entered():
            try:
                path.write_text(str(value))
            except OSError as error:
                raise LabError(f"cannot set {key} in {self.name}: {error}") from error

    def spawn(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> LabProcess:
        """Start a command in it; `remove` kills what still runs.

        Args:
            argv: The command.
            env: Its whole environment; None inherits ours.
        """
        enter = ["ip", "netns", "exec", self.full_name]
        process = LabProcess(argv, enter=enter, env=env)
        self._processes.append(process)
        return process

    def run(
        self, argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None
    ) -> str:
        """Run a command in it to its end and return its standard output.

        Raises:
            LabError: It failed; or `timeout_s` have passed, then it was killed.
        """
        with self.spawn(argv, env=env) as process:
            return process.wait(timeout_s=timeout_s)

    def read_sysctl(self, key: str) -> str:
        """Return a kernel parameter of it.

        Raises:
            LabError: This kernel has no such parameter.
        """
        with self.entered():
            try:
                return Path("/proc/sys", *key.split(".")).read_text().strip()
            except OSError as error:
                raise LabError(f"cannot read {key} in {self.name}: {error}") from error

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Have this thread in the namespace during the body; see `entered`."""
        return entered(self.full_name)

    def remove(self) -> None:
        """Kill what runs in it and remove it with its links; idempotent.

        Raises:
            LabError: It could not be removed.
        """
        for process in self._processes:
            process.kill()
        self._processes.clear()
        _remove(self.full_name)


@contextlib.contextmanager
def entered(full_name: str) -> Iterator[None]:
    """Have this thread in a namespace during the body: sockets made in it stay there.

    A socket belongs to the namespace it was made in for life, so one process can hold sockets of
    many. The body must not yield to other tasks of the thread.

    Raises:
        LabError: There is no such namespace.
    """
    with contextlib.ExitStack() as stack:
        # Threads may have different namespaces: ours, not that of the main thread.
        home = stack.enter_context(
            Path(f"/proc/self/task/{threading.get_native_id()}/ns/net").open("rb")
        )
        try:
            there = stack.enter_context((NAMESPACES / full_name).open("rb"))
        except OSError as error:
            raise LabError(f"the namespace {full_name} is gone: {error.strerror}") from error
        _set_namespace(there.fileno())
        try:
            yield
        finally:
            _set_namespace(home.fileno())


def new_prefix() -> str:
    """Return a prefix for the namespaces of one lab of this process."""
    pid = os.getpid()
    return f"{NAME_PREFIX}-{pid}-{started_at(pid)}-{next(_serials)}"


def namespace_names(prefix: str = NAME_PREFIX) -> list[str]:
    """Return the full names of all namespaces with `prefix`, sorted."""
    if not NAMESPACES.is_dir():
        return []
    return sorted(path.name for path in NAMESPACES.iterdir() if path.name.startswith(f"{prefix}-"))


def remove_all(prefix: str) -> None:
    """Remove all namespaces with `prefix`, and kill what runs in them.

    Raises:
        LabError: One could not be removed.
    """
    for full_name in namespace_names(prefix):
        _remove(full_name)


def remove_stale() -> None:
    """Remove what runs left behind that are dead by now.

    Raises:
        LabError: One could not be removed.
    """
    for full_name in namespace_names():
        if not _maker_lives(full_name):
            _remove(full_name)


def _maker_lives(full_name: str) -> bool:
    try:
        _, pid, started, *_ = full_name.split("-")
        return started_at(int(pid)) == int(started)
    except (ValueError, OSError):
        return False


def started_at(pid: int) -> int:
    """Return when a process started, in clock ticks since boot: with its pid, one of a kind.

    Raises:
        OSError: There is no such process, or it is dead and nobody has waited for it.
    """
    # proc(5): fields 3 and 22; the second field is a name in brackets that may contain anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] == "Z":
        raise ProcessLookupError(f"process {pid} is dead")
    return int(fields[22 - 3])


def _remove(full_name: str) -> None:
    if not (NAMESPACES / full_name).exists():
        return
    try:
        # Whoever is in a namespace that we made was started there by us, or by what we started.
        for pid in command(["ip", "netns", "pids", full_name]).split():
            _kill(int(pid))
        command(["ip", "netns", "delete", full_name])
    except LabError:
        # Another lab that starts right now may have removed the same stale namespace.
        if (NAMESPACES / full_name).exists():
            raise


def _kill(pid: int) -> None:
    """Kill a process and wait for its end, whosever child it is."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], COMMAND_TIMEOUT_S)
        finally:
            os.close(descriptor)


def _set_namespace(descriptor: int) -> None:
    # os.setns appeared in Python 3.12.
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise LabError(f"setns: {os.strerror(number)}")
