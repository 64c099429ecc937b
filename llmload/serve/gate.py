"""What a request must be before anything looks at it: from this device's programs, and small.

A page of any web site that is open in a browser on this device can send requests to 127.0.0.1. Two
headers that scripts can't set tell: `Origin` names the page's site, and `Host` the name by which we
were reached. With a name of its own that leads to 127.0.0.1 (DNS rebinding) a foreign page would be
of our origin; but the name is then in `Host`, so only names that nobody else can give away pass:
localhost, addresses, and those that the user allows.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

import trio
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmload.serve.problem import Problem
from llmload.swarm.beside import beside

__all__ = ["BODY_BYTES_MAX", "Gate", "wait_gone"]

# Far more than any context holds; llama.cpp's and vLLM's servers take tens of megabytes.
BODY_BYTES_MAX = 1_000_000
# On this device a body is there at once; on a phone's network of its own soon.
BODY_S = 20.0


async def wait_gone(receive: Receive) -> None:
    """Wait until the client has closed the connection, or was answered."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Gate:
    """Passes on requests with their whole body, and refuses others.

    Args:
        app: Gets what passes.
        hosts: Names by which we may be reached, besides localhost and addresses.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(Headers(scope=scope))
            with trio.fail_after(BODY_S):
                body = await _read_body(receive)
        except trio.TooSlowError:
            problem = Problem(408, f"the body did not come in {BODY_S:g} s")
        except Problem as refusal:
            problem = refusal
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
            return
        # What still comes is thrown away: the server waits for somebody to take it.
        async with beside(wait_gone, receive):
            response = JSONResponse(problem.body, problem.status, {"connection": "close"})
            await response(scope, receive, send)

    def _check_headers(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise Problem(
                403,
                f"this server is not known as {host!r}: use its address, or start it with "
                "--allow-host NAME",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            raise Problem(
                403, f"pages of {origin} may not use this server", code="origin_not_allowed"
            )
        if int(headers.get("content-length", "0")) > BODY_BYTES_MAX:
            raise _too_large()

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True


async def _read_body(receive: Receive) -> bytes | None:
    """Return the whole body; None if the client is gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > BODY_BYTES_MAX:
            raise _too_large()
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, and then what comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message


def _too_large() -> Problem:
    return Problem(413, f"a request has at most {BODY_BYTES_MAX} bytes", code="request_too_large")
