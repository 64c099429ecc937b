"""OpenAI's own client is told what it expects: answers, streams, counts and errors."""

from __future__ import annotations

import http.client
import json
import urllib.request
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from types import SimpleNamespace

import openai
import pytest
import trio

from llmload.engine.generate import generate_tokens
from llmload.engine.sampler import SamplingParameters
from llmload.errors import StageFailed
from llmload.serve.gate import BODY_BYTES_MAX
from llmload.serve.requests import chat_prompt
from llmload.serve.server import listen
from llmload.stop import StopFilter

SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
CHAT = [
    {"role": "system", "content": "Short."},
    {"role": "user", "content": [{"type": "text", "text": "the mesh"}]},
]
CHAT_PROMPT = "Short.\n\nUser: the mesh\nAssistant:"


@pytest.fixture
def expected(model, engine):
    """A function that gives what the model says on one device."""

    def text(prompt, count, stop=(), **sampling):
        ids = model.tokenizer.encode(prompt)
        parameters = SamplingParameters(**sampling)
        tokens = list(generate_tokens([engine], ids, sampling=parameters, max_new_tokens=count))
        stops = StopFilter(stop)
        return stops.push(model.tokenizer.decode(tokens)) + stops.finish()

    return text


# --- Answers -----------------------------------------------------------------------------------


async def test_models_are_listed(serving, local_source):
    async with serving(local_source) as server:
        listed = await server.ask(lambda client: list(client.models.list()))
        assert [model.id for model in listed] == ["model"]
        assert (await server.ask(lambda client: client.models.retrieve("model"))).id == "model"
        with pytest.raises(openai.NotFoundError) as failure:
            await server.ask(lambda client: client.models.retrieve("gpt-5"))
    assert failure.value.code == "model_not_found"


@pytest.mark.parametrize("prompt", ["text", "list", "ids"])
async def test_completion_is_what_the_model_says(serving, local_source, expected, model, prompt):
    ids = model.tokenizer.encode("the mesh")
    prompts = {"text": "the mesh", "list": ["the mesh"], "ids": ids}
    ask = partial(model_call, "completions", prompt=prompts[prompt], max_tokens=12, **SAMPLED)
    async with serving(local_source) as server:
        answer = await server.ask(ask)
    choice = answer.choices[0]
    assert choice.text == expected("the mesh", 12, **SAMPLED)
    assert (answer.object, choice.finish_reason) == ("text_completion", "length")
    assert answer.usage.prompt_tokens == len(ids)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (12, 12 + len(ids))


async def test_stream_is_the_same_in_pieces(serving, local_source, expected):
    def read(client):
        with model_call(
            "completions",
            client,
            prompt="the mesh",
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            **SAMPLED,
        ) as stream:
            return list(stream)

    async with serving(local_source) as server:
        *pieces, end, counts = await server.ask(read)
    assert len(pieces) > 3
    assert "".join(piece.choices[0].text for piece in pieces) == expected("the mesh", 12, **SAMPLED)
    assert {piece.choices[0].finish_reason for piece in pieces} == {None}
    assert end.choices[0].finish_reason == "length"
    assert (counts.choices, counts.usage.completion_tokens) == ([], 12)


async def test_chat_is_a_play_that_ends_before_the_user_speaks(serving, local_source, expected):
    said = expected(CHAT_PROMPT, 30, **SAMPLED)
    stop = said.lstrip()[3:5]

    def ask(client):
        whole = model_call("chat", client, messages=CHAT, max_completion_tokens=30, **SAMPLED)
        with model_call("chat", client, messages=CHAT, stop=stop, stream=True, **SAMPLED) as pieces:
            return whole, list(pieces)

    async with serving(local_source) as server:
        whole, (begin, *pieces, end) = await server.ask(ask)
    message = whole.choices[0].message
    assert (message.role, message.content) == ("assistant", said.lstrip())
    assert (begin.choices[0].delta.role, begin.choices[0].delta.content) == ("assistant", "")
    text = "".join(piece.choices[0].delta.content for piece in pieces)
    assert text == said.lstrip().partition(stop)[0]
    assert end.choices[0].finish_reason == "stop"


def test_roles_of_a_chat():
    messages = [("developer", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "So?")]
    assert chat_prompt(messages) == (
        "Be kind.\n\nUser: Hi\nAssistant: Hello\nUser: So?\nAssistant:"
    )


async def test_many_at_once_get_their_own_answers(serving, local_source, expected):
    answers = {}

    async def ask(prompt):
        call = partial(model_call, "completions", prompt=prompt, max_tokens=10, temperature=0)
        answers[prompt] = (await server.ask(call)).choices[0].text

    prompts = [f"the peers {index}" for index in range(8)]
    async with serving(local_source, answers_max=3) as server, trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(ask, prompt)
    assert answers == {prompt: expected(prompt, 10, temperature=0) for prompt in prompts}


# --- Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("completions", {"prompt": "x", "n": 2}, "n"),
        ("completions", {"prompt": "x", "logprobs": 3}, "logprobs"),
        ("completions", {"prompt": "x", "presence_penalty": 0.5}, "presence_penalty"),
        ("completions", {"prompt": ["x", "y"]}, "prompt"),
        ("completions", {"prompt": [10**6]}, "prompt"),
        ("completions", {"prompt": "x", "temperature": 2.5}, "temperature"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "x", "stop": list("abcde")}, "stop"),
        ("completions", {"prompt": "x", "stop": ""}, "stop"),
        (
            "completions",
            {"prompt": "x", "stream_options": {"include_usage": True}},
            "stream_options",
        ),
        ("completions", {"prompt": "the mesh " * 100}, "prompt"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ("chat", {"messages": CHAT, "tools": [{"type": "function"}]}, "tools"),
        ("chat", {"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"messages": [{"role": "user", "content": "the mesh " * 100}]}, "messages"),
    ],
    ids=str,
)
async def test_what_is_not_supported_is_refused_by_name(serving, local_source, kind, fields, param):
    async with serving(local_source) as server:
        with pytest.raises(openai.BadRequestError) as failure:
            await server.ask(partial(model_call, kind, **fields))
    assert failure.value.param == param
    too_long = "the mesh " * 100 in str(fields)
    assert failure.value.code == ("context_length_exceeded" if too_long else failure.value.code)


async def test_other_models_and_paths_are_not_found(serving, local_source):
    async with serving(local_source) as server:
        with pytest.raises(openai.NotFoundError, match="'model' is"):
            await server.ask(lambda client: client.completions.create(model="x", prompt="x"))
        with pytest.raises(openai.NotFoundError, match="embeddings"):
            await server.ask(lambda client: client.embeddings.create(model="model", input="x"))


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"{", 400),
        ({}, b"[]", 400),
        ({}, b'{"prompt": ' + b"[" * 100_000, 400),
        ({}, b'{"model": "model", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}", 400),
        ({"Host": "attacker.example"}, b"{}", 403),
        ({"Host": ""}, b"{}", 403),
        ({"Origin": "http://attacker.example"}, b"{}", 403),
        ({"Origin": "null"}, b"{}", 403),
        ({}, b" " * (BODY_BYTES_MAX + 1), 413),
        ({}, [b" " * 100_000] * 30, 413),  # in chunks, of no declared length
    ],
    ids=lambda value: str(value)[:40],
)
async def test_strange_requests_are_refused(serving, local_source, headers, body, status):
    def ask():
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
        with closing(connection):
            # It may be refused before all of it was sent.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            return response.status, json.load(response)["error"]["type"]

    async with serving(local_source) as server:
        assert await trio.to_thread.run_sync(ask) == (status, "invalid_request_error")
        # Nobody else noticed.
        assert await server.ask(lambda client: client.models.retrieve("model"))


def test_port_in_use_is_said_so():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port}: another program uses this port"):
            listen("127.0.0.1", port)


# --- What happens on the way -------------------------------------------------------------------


class StuckSource:
    """Gives one token, and then nothing until it is told to fail, or cancelled."""

    def __init__(self, model, *, tokens=1) -> None:
        self.model = model
        self.tokens = tokens
        self.began = trio.Event()
        self.ended = trio.Event()
        self.fail = trio.Event()

    def view(self):
        return {"route": [], "peers": [], "news": ""}

    @asynccontextmanager
    async def generate(self, prompt_ids, **options):
        async def answer():
            for _ in range(self.tokens):
                yield SimpleNamespace(text="word")
            await self.fail.wait()
            raise StageFailed("the stage is gone")

        class Answer:
            def __init__(self) -> None:
                self.tokens = answer()

            def __aiter__(self):
                return self.tokens

            def statistics(self):
                return SimpleNamespace(prompt_count=1, token_count=1, tokens_per_s=0.0)

        self.began.set()
        try:
            yield Answer()
        finally:
            self.ended.set()


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_goes_away_ends_its_answer(serving, model, stream):
    source = StuckSource(model)
    body = json.dumps({"model": "model", "prompt": "x", "stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    async with serving(source) as server:
        host, port = server.url.removeprefix("http://").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as client:
            await client.send_all(head.encode() + body)
            await source.began.wait()
            assert not source.ended.is_set()
        await source.ended.wait()


async def test_who_would_wait_too_long_is_told_to_come_back(serving, model):
    source = StuckSource(model)
    ask = partial(model_call, "completions", prompt="x")

    async def ask_for_nothing():
        with pytest.raises(openai.InternalServerError, match="the stage is gone"):
            await server.ask(ask)

    async with (
        serving(source, answers_max=1, waiting_max=1) as server,
        trio.open_nursery() as asking,
    ):
        asking.start_soon(ask_for_nothing)
        await source.began.wait()
        asking.start_soon(ask_for_nothing)
        while (await load(server))["waiting"] == 0:
            pass
        with pytest.raises(openai.InternalServerError) as failure:
            await server.ask(ask)
        assert (failure.value.status_code, failure.value.code) == (503, "overloaded")
        assert failure.value.response.headers["retry-after"] == "1"
        source.fail.set()


@pytest.mark.parametrize("tokens", [0, 1])
async def test_failure_is_an_error_before_and_in_the_stream(serving, model, tokens):
    source = StuckSource(model, tokens=tokens)
    source.fail.set()

    def read(client):
        with model_call("completions", client, prompt="x", stream=True) as stream:
            return list(stream)

    async with serving(source) as server:
        with pytest.raises(openai.APIError, match="the stage is gone") as failure:
            await server.ask(read)
    assert failure.value.code == "model_unavailable"
    assert isinstance(failure.value, openai.InternalServerError) == (tokens == 0)


def model_call(kind, client, **fields):
    """Ask; fields that the client does not know travel as well."""
    calls = {"completions": client.completions, "chat": client.chat.completions}
    return calls[kind].create(model="model", **fields)


async def load(server):
    def get():
        with urllib.request.urlopen(f"{server.url}/swarm", timeout=20) as response:
            return json.load(response)

    return await trio.to_thread.run_sync(get)
