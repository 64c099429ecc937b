r"""The door of a running node for its user's other commands: a Unix socket in its state folder.

    natswarm status ── {"do": "status"}\n ──▶ STATE/control.sock ──▶ the node
                    ◀── {"ok": {...}}\n or {"error": "why"}\n

One line of JSON there, one back, one question a connection. The socket has mode 0600 from its first
moment on, so it is the file system that says who may ask; nothing of it is reachable by a network.
A question is given up when whoever asked it goes away. The socket is at the same time what keeps
two nodes out of one state folder: the second one finds a living door.

Knows no node: what is answered is the caller's. POSIX; elsewhere nodes run without a door.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from natswarm.errors import ConfigurationError, NatswarmError, RequestRefused
from natswarm.net.nursery import open_private_nursery

__all__ = ["ControlAnswer", "ask_running_node", "open_control"]

logger = logging.getLogger("natswarm.control")

SOCKET_NAME = "control.sock"

# sockaddr_un of macOS; Linux has 108 (unix(7)). Both count the zero at the end.
PATH_BYTES_MAX = 103

# An invite has 400 characters; a status of 256 peers 100 kB.
REQUEST_BYTES_MAX = 16 * 1024
REPLY_BYTES_MAX = 4 * 1024**2
# Who connects asks at once.
REQUEST_TIMEOUT_S = 5.0
CLIENTS_MAX = 16

ControlAnswer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@asynccontextmanager
async def open_control(folder: Path, answer: ControlAnswer) -> AsyncIterator[None]:
    """Answer questions of other commands while the body runs.

    Args:
        folder: The state folder; made if it is not there.
        answer: Takes a question, returns the answer; a NatswarmError becomes the reply's reason.

    Raises:
        ConfigurationError: Another node runs with this folder, or the socket cannot be made.
    """
    if not hasattr(socket, "AF_UNIX"):
        yield
        return
    path = _checked(folder / SOCKET_NAME)
    listener = trio.SocketListener(_listen(path))
    try:
        async with open_private_nursery() as nursery:
            nursery.start_soon(_serve, listener, answer)
            yield
            nursery.cancel_scope.cancel()
    finally:
        # First the name: whoever starts next must not find a door that nobody opens.
        path.unlink(missing_ok=True)
        listener.socket.close()


async def ask_running_node(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Ask the node that runs with a state folder; return its answer.

    Raises:
        ConfigurationError: None runs.
        RequestRefused: It could not do it; says why.
    """
    path = _checked(folder / SOCKET_NAME)
    try:
        stream = await trio.open_unix_socket(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a system without such sockets
        raise ConfigurationError(
            f"no node runs with the state folder {folder}: start one with `natswarm up`, or name "
            "its folder with --state"
        ) from error
    async with stream:
        try:
            await stream.send_all(json.dumps(question).encode() + b"\n")
            reply = json.loads(await _receive_line(stream, REPLY_BYTES_MAX))
        except (trio.BrokenResourceError, ValueError) as error:
            raise ConfigurationError("the node ended before it answered") from error
    if "error" in reply:
        raise RequestRefused(str(reply["error"]))
    answer: dict[str, Any] = reply["ok"]
    return answer


# The socket ---------------------------------------------------------------------------------------


def _checked(path: Path) -> Path:
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ConfigurationError(
            f"the system allows {PATH_BYTES_MAX} bytes for the path of a socket, and {path} is "
            "longer: choose a state folder nearer to the root with --state"
        )
    return path


def _listen(path: Path) -> trio.socket.SocketType:
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_stale(path)
        _bind_private(door, path)
        door.listen(CLIENTS_MAX)
        door.setblocking(False)
    except OSError as error:
        door.close()
        if error.errno == errno.EADDRINUSE:
            raise _is_running(path) from error
        raise ConfigurationError(f"cannot make {path}: {error.strerror}") from error
    except ConfigurationError:
        door.close()
        raise
    return trio.socket.from_stdlib_socket(door)


def _bind_private(door: socket.socket, path: Path) -> None:
    """Bind; with the mask of files, since a chmod would come a moment too late."""
    before = os.umask(0o177)
    try:
        door.bind(os.fspath(path))
    finally:
        os.umask(before)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a node that was killed.

    Raises:
        ConfigurationError: Its node lives.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
        knock.setblocking(False)
        try:
            knock.connect(os.fspath(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:  # it lives, and many are asking
            pass
    raise _is_running(path)


def _is_running(path: Path) -> ConfigurationError:
    return ConfigurationError(
        f"a node runs already with the state folder {path.parent}: ask it with `natswarm status`, "
        "`join` or `find`, or give this one a folder of its own with --state"
    )


# Questions ----------------------------------------------------------------------------------------


async def _serve(listener: trio.SocketListener, answer: ControlAnswer) -> None:
    limiter = trio.CapacityLimiter(CLIENTS_MAX)

    async def handle(stream: trio.SocketStream) -> None:
        async with limiter, stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await _handle(stream, answer)

    await trio.serve_listeners(handle, [listener])


async def _handle(stream: trio.SocketStream, answer: ControlAnswer) -> None:
    reply: dict[str, Any] = {"error": f"no question came within {REQUEST_TIMEOUT_S:.0f} s"}
    with trio.move_on_after(REQUEST_TIMEOUT_S) as scope:
        try:
            question = json.loads(await _receive_line(stream, REQUEST_BYTES_MAX))
            if not isinstance(question, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            reply = {"error": f"not a question: {error}"}
        else:
            scope.deadline = float("inf")
            reply = await _answer_until_gone(stream, answer, question)
    await stream.send_all(json.dumps(reply).encode() + b"\n")


async def _answer_until_gone(
    stream: trio.SocketStream, answer: ControlAnswer, question: dict[str, Any]
) -> dict[str, Any]:
    reply: dict[str, Any] = {"error": "nobody waits for the answer any more"}
    async with open_private_nursery() as nursery:

        async def watch() -> None:
            await stream.receive_some(1)  # nothing more is said, so this is the end
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            reply = {"ok": await answer(question)}
        except (NatswarmError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            reply = {"error": str(error)}
        except Exception as error:
            # The node must not end by a question.
            logger.exception("the answer to %s failed", question.get("do"))
            reply = {"error": f"that failed inside the node: {error!r}"}
        nursery.cancel_scope.cancel()
    return reply


async def _receive_line(stream: trio.SocketStream, bytes_max: int) -> bytes:
    """Return what comes before the first line feed.

    Raises:
        ValueError: It ended before, or was longer.
    """
    line = bytearray()
    while (end := line.find(b"\n")) < 0:
        chunk = await stream.receive_some()
        if not chunk:
            raise ValueError("it ended early")
        line += chunk
        if len(line) > bytes_max:
            raise ValueError(f"it has more than {bytes_max} bytes")
    return bytes(line[:end])
