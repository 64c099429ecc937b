"""The HTTP side of `llmload serve`: OpenAI's API, a page to chat, and what the swarm looks like.

    GET  /                       the page
    GET  /swarm                  route, peers and load, as JSON
    GET  /v1/models[/NAME]
    POST /v1/completions
    POST /v1/chat/completions

An answer lives exactly as long as its request: a client that goes away ends it. So many are
computed at once, so many more wait, and the next one is told to come back later.

This file does not know where answers come from: `source.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llmload.errors import LlmloadError, PromptTooLong
from llmload.serve.gate import Gate, wait_gone
from llmload.serve.problem import Problem, as_problem
from llmload.serve.replies import Reply, model_card, usage
from llmload.serve.requests import Ask, parse_chat, parse_completion
from llmload.serve.source import Answer, Source
from llmload.swarm.beside import beside
from llmload.swarm.client import prompt_token_ids
from natswarm import NatswarmError

__all__ = ["make_app"]

RETRY_AFTER_S = 1
PAGE = Path(__file__).with_name("page.html")
# The page loads nothing, talks to nobody else, and nobody frames it.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def make_app(
    source: Source, *, answers_max: int, waiting_max: int, hosts: Collection[str] = ()
) -> Starlette:
    """Return the ASGI application; it runs on Trio.

    Args:
        source: Where answers come from.
        answers_max: Answers at once.
        waiting_max: Requests that may wait for their turn.
        hosts: Names by which it may be reached, besides localhost and addresses.
    """
    desk = _Desk(source, answers_max, waiting_max)
    return Starlette(
        routes=[
            Route("/", desk.page),
            Route("/swarm", desk.swarm),
            Route("/v1/models", desk.models),
            Route("/v1/models/{name:path}", desk.one_model),
            Route("/v1/completions", partial(desk.answer, parse_completion), methods=["POST"]),
            Route("/v1/chat/completions", partial(desk.answer, parse_chat), methods=["POST"]),
        ],
        middleware=[Middleware(Gate, hosts=hosts)],
        exception_handlers={
            Problem: _on_problem,
            HTTPException: _on_http_exception,
            Exception: _on_bug,
        },
    )


class _Desk:
    """What the routes share."""

    def __init__(self, source: Source, answers_max: int, waiting_max: int) -> None:
        self.source = source
        self.name = source.model.folder.name
        # Of the latest answer: under way, or how quick it was. One that is done holds memory.
        self.latest: Answer | None = None
        self.tokens_per_s = 0.0
        self._places = trio.CapacityLimiter(answers_max)
        self._waiting_max = waiting_max
        self._created_s = int(time.time())

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a turn to be answered.

        Raises:
            Problem: Too many wait.
        """
        statistics = self._places.statistics()
        if statistics.tasks_waiting >= self._waiting_max and not self._places.available_tokens:
            raise Problem(
                503,
                f"{statistics.tasks_waiting} requests wait already: try again later",
                code="overloaded",
            )
        # On behalf of this request: one task may have several places in tests and libraries.
        borrower = object()
        await self._places.acquire_on_behalf_of(borrower)
        try:
            yield
        finally:
            self._places.release_on_behalf_of(borrower)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_bytes(), headers=PAGE_HEADERS)

    async def swarm(self, request: Request) -> Response:
        statistics = self._places.statistics()
        if self.latest is not None:
            self.tokens_per_s = self.latest.statistics().tokens_per_s
        return JSONResponse(
            {
                "model": self.name,
                "n_ctx": self.source.model.config.n_ctx,
                "answering": statistics.borrowed_tokens,
                "waiting": statistics.tasks_waiting,
                "tokens_per_s": self.tokens_per_s,
                **self.source.view(),
            },
            headers={"cache-control": "no-store"},
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(self.name, self._created_s)]})

    async def one_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(model_card(self.name, self._created_s))

    async def answer(self, parse: Callable[[bytes], Ask], request: Request) -> _Answering:
        ask = parse(await request.body())
        self._check_name(ask.model)
        try:
            # A body may hold a million characters to tokenize.
            prompt_ids = await trio.to_thread.run_sync(
                prompt_token_ids, self.source.model, ask.prompt
            )
        except (PromptTooLong, ValueError) as error:
            param = "messages" if ask.is_chat else "prompt"
            code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
            raise Problem(400, str(error), param=param, code=code) from error
        return _Answering(self, ask, prompt_ids)

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise Problem(
                404,
                f"the model {name!r} is not served here, {self.name!r} is",
                param="model",
                code="model_not_found",
            )


class _Answering(Response):
    """The response to one request for an answer: generates while it sends."""

    def __init__(self, desk: _Desk, ask: Ask, prompt_ids: list[int]) -> None:
        super().__init__()
        self._desk = desk
        self._ask = ask
        self._prompt_ids = prompt_ids
        self._reply = Reply(desk.name, is_chat=ask.is_chat, created_s=int(time.time()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; ends early when the client is gone."""

        async def cancel_when_gone() -> None:
            await wait_gone(receive)
            cancel_scope.cancel()

        with trio.CancelScope() as cancel_scope:
            async with beside(cancel_when_gone):
                if self._ask.is_streamed:
                    await self._stream(send)
                else:
                    response = JSONResponse(await self._whole())
                    await response(scope, receive, send)

    @asynccontextmanager
    async def _generate(self) -> AsyncIterator[Answer]:
        ask = self._ask
        async with (
            self._desk.place(),
            self._desk.source.generate(
                self._prompt_ids,
                sampling=ask.sampling,
                max_new_tokens=ask.max_new_tokens,
                stop=ask.stop,
            ) as answer,
        ):
            self._desk.latest = answer
            try:
                yield answer
            finally:
                if self._desk.latest is answer:
                    self._desk.latest = None
                    self._desk.tokens_per_s = answer.statistics().tokens_per_s

    async def _whole(self) -> dict[str, Any]:
        try:
            async with self._generate() as answer, aclosing(self._texts(answer)) as texts:
                text = "".join([piece async for piece in texts])
        except (LlmloadError, NatswarmError) as error:
            raise as_problem(error) from error
        return self._reply.whole(text, answer.finish_reason or "length", _usage(answer))

    async def _stream(self, send: Send) -> None:
        """Send the pieces as they come, as events of the server.

        The response begins with the first piece, so that until then a failure has its own status.
        """
        is_begun = False

        async def emit(event: dict[str, Any] | str, *, more: bool = True) -> None:
            data = event if isinstance(event, str) else msgspec.json.encode(event).decode()
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async def begin() -> None:
            nonlocal is_begun
            if not is_begun:
                is_begun = True
                headers = [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-store"),
                ]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                for event in self._reply.begin():
                    await emit(event)

        try:
            async with self._generate() as answer, aclosing(self._texts(answer)) as texts:
                async for piece in texts:
                    await begin()
                    await emit(self._reply.piece(piece))
            await begin()
            await emit(self._reply.end(answer.finish_reason or "length"))
            if self._ask.wants_usage:
                await emit(self._reply.counts(_usage(answer)))
        except (LlmloadError, NatswarmError) as error:
            if not is_begun:
                raise as_problem(error) from error
            await emit(as_problem(error).body)
        await emit("[DONE]", more=False)

    async def _texts(self, answer: Answer) -> AsyncGenerator[str, None]:
        """Yield the pieces of the text; in a chat without the space after `Assistant:`."""
        is_begun = not self._ask.is_chat
        async for token in answer:
            if piece := token.text if is_begun else token.text.lstrip():
                is_begun = True
                yield piece
        rest = answer.finish()
        if piece := rest if is_begun else rest.lstrip():
            yield piece


def _usage(answer: Answer) -> dict[str, int]:
    statistics = answer.statistics()
    return usage(statistics.prompt_count, statistics.token_count)


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem), "registered for this one"
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.status == 503 else None
    return JSONResponse(error.body, error.status, headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for this one"
    text = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(Problem(error.status_code, text).body, error.status_code, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again, and the server logs its traceback.
    return JSONResponse(Problem(500, "internal error; the server's log says more").body, 500)
