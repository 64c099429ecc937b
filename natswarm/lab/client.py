"""What the commands ask of a lab: start it, ask it, enter it, end it.

The process that keeps a lab is another one (`supervisor.py`); here it is found by its file in the
registry, asked over its socket, ended by a signal.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import msgspec

from natswarm.lab.errors import LabError
from natswarm.lab.namespace import remove_all, remove_stale
from natswarm.lab.registry import DeviceState, LabState, Registry
from natswarm.lab.settings import LabSettings, make_plan

__all__ = [
    "ask",
    "exec_in",
    "observers",
    "open_core_capture",
    "start_lab",
    "stop_lab",
]

# Python starts in a second, a device is made in 50 ms; these bound a hang on a machine that swaps.
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 10.0


def start_lab(settings: LabSettings) -> LabState:
    """Start the process that keeps a lab, and wait until the lab is there.

    Raises:
        ConfigurationError: The settings cannot be.
        LabError: The system does not let us, or a lab of the name runs already.
    """
    make_plan(settings)
    Registry().check_free(settings.name)
    with tempfile.TemporaryFile() as errors:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "natswarm.lab.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            cwd="/",
        )
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        with keeper.stdin, keeper.stdout:
            try:
                with contextlib.suppress(BrokenPipeError):
                    keeper.stdin.write(msgspec.json.encode(settings))
                    keeper.stdin.close()
                readable, _, _ = select.select([keeper.stdout], [], [], START_TIMEOUT_S)
                said = keeper.stdout.readline() if readable else b""
            except BaseException:
                _end_group(keeper)
                raise
        keeper.wait(STOP_TIMEOUT_S)
        answer = json.loads(said) if said else {}
        if "ready" in answer:
            return msgspec.convert(answer["ready"], LabState)
        _end_group(keeper)
        if "error" in answer:
            raise LabError(answer["error"])
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip()
        raise LabError(f"the lab did not come up; its process said: {text[-2000:] or 'nothing'}")


def stop_lab(state: LabState) -> None:
    """End a lab, whatever runs in it, and wait until nothing of it is left.

    Raises:
        LabError: Something could not be removed.
    """
    descriptors = _open_processes([state.pid, state.watchdog_pid] if state.is_alive else [])
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                if descriptors:
                    signal.pidfd_send_signal(descriptors[0], number)
            # Killed, it leaves the rest to its watchdog.
            if all(select.select([each], [], [], STOP_TIMEOUT_S)[0] for each in descriptors):
                break
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    Registry().remove(state.name, state.prefix)
    remove_all(state.prefix)
    remove_stale()


def ask(state: LabState, request: str) -> dict[str, Any]:
    """Ask a lab; see `supervisor.py` for the requests.

    Raises:
        LabError: It does not answer.
    """
    with _connect(state) as connection:
        connection.sendall(request.encode())
        with connection.makefile("rb") as lines:
            try:
                answer = json.loads(lines.readline())
            except (OSError, ValueError) as error:
                raise LabError(f"lab {state.name} does not answer: {error}") from error
    if "error" in answer:
        raise LabError(answer["error"])
    return dict(answer)


def observers(state: LabState) -> list[DeviceState]:
    """Return two public devices that watch what others look like; made where there are none.

    Raises:
        LabError: It does not answer.
    """
    return msgspec.convert(ask(state, "observers")["observers"], list[DeviceState])


@contextlib.contextmanager
def open_core_capture(state: LabState) -> Iterator[socket.socket]:
    """Have what the core carries come out of a socket, as pcap.

    Raises:
        LabError: It does not answer.
    """
    with _connect(state) as connection:
        connection.sendall(b"capture")
        connection.settimeout(None)
        yield connection


def exec_in(device: DeviceState, argv: Sequence[str]) -> NoReturn:
    """Become a program inside a device's namespace: same terminal, environment, folder and pid.

    Raises:
        LabError: There is no such program.
    """
    if shutil.which(argv[0]) is None:
        raise LabError(f"no program {argv[0]!r} is installed here, so none is in the lab")
    # It enters the namespace and becomes the program; nothing of it stays.
    os.execvp("ip", ["ip", "netns", "exec", device.namespace, *argv])


def _end_group(keeper: subprocess.Popen[bytes]) -> None:
    """End a lab that is not there yet, by the process group of whoever started to make it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(keeper.pid, signal.SIGTERM)
    keeper.wait(STOP_TIMEOUT_S)


def _connect(state: LabState) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(ANSWER_TIMEOUT_S)
    try:
        connection.connect(str(Registry().socket_path(state.name)))
    except OSError as error:
        connection.close()
        raise LabError(f"lab {state.name} does not answer: {error}") from error
    return connection


def _open_processes(pids: Sequence[int]) -> list[int]:
    """Return a descriptor for each process that is there."""
    descriptors = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptors.append(os.pidfd_open(pid))
    return descriptors
