"""Serve an ASGI application on a TCP port, on Trio, until cancelled.

The socket is opened here and handed to hypercorn, so that a port in use is an error with a reason,
and port 0 can be told.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

__all__ = ["listen", "serve_app"]

BACKLOG = 100


def listen(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket.

    Args:
        host: IPv4 or IPv6 address of this device.
        port: 0 lets the system choose.

    Raises:
        OSError: The port is in use, or the address is not ours.
        ValueError: `host` is no address.
    """
    version = ipaddress.ip_address(host).version
    listener = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reasons = {
            errno.EADDRINUSE: "another program uses this port; choose one with --port",
            errno.EADDRNOTAVAIL: "this device has no such address",
            errno.EACCES: "ports below 1024 are for the system's administrator",
        }
        reason = reasons.get(error.errno or 0, error.strerror)
        raise OSError(f"can't listen at {host} port {port}: {reason}") from error
    return listener


async def serve_app(
    app: Any,
    listener: socket.socket,
    *,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; requests under way are cancelled, too.

    Args:
        app: ASGI.
        listener: Of `listen`; closed at the end.
        task_status: Told the URLs once requests are taken.
    """
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.loglevel = "WARNING"
    config.include_server_header = False
    await serve(cast("Any", app), config, mode="asgi", task_status=task_status)
