"""What a program asks for: OpenAI's request bodies, checked, as one thing to generate.

Parameters that would change the answer and are not supported are refused by name; a client that is
told nothing would take our answer for what it asked for. What changes nothing (`user`, `metadata`)
is ignored. Source: OpenAI's API reference, completions and chat completions.

GPT-2 knows no chat. Messages become a play, which it goes on with:

    <text of a system or developer message>

    User: <text>
    Assistant: <text>
    Assistant:

and the answer ends where the next `User:` would begin.

Pure: bytes in, an `Ask` out.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from llmload.engine.sampler import SamplingParameters
from llmload.serve.problem import Problem

__all__ = ["Ask", "chat_prompt", "parse_chat", "parse_completion"]

STOPS_MAX = 4  # OpenAI's bound
STOP_CHARACTERS_MAX = 1000
# OpenAI's default for completions; chat goes on to the end of the context.
COMPLETION_TOKENS = 16

CHAT_STOP = "\nUser:"

# What is not supported, and the values with which it says nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "audio": (None,),
    "response_format": (None, {"type": "text"}),
}

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Settings(msgspec.Struct, kw_only=True):
    """What both kinds of request have."""

    model: str
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Count | None = None  # not OpenAI's, but of most who offer its API
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Count | None = None


class _Completion(_Settings, kw_only=True):
    prompt: str | list[Any]


class _Part(msgspec.Struct):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _Chat(_Settings, kw_only=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One answer that is asked for.

    Attributes:
        model: Its name, as the client knows it.
        prompt: Text or token ids.
        is_chat: Whether the reply has the shape of a chat.
        sampling: How to choose tokens.
        max_new_tokens: None: to the end of the context.
        stop: Strings before which the answer ends.
        is_streamed: Whether it is sent as it comes.
        wants_usage: Whether a stream ends with the counts of tokens.
    """

    model: str
    prompt: str | Sequence[int]
    is_chat: bool
    sampling: SamplingParameters
    max_new_tokens: int | None
    stop: tuple[str, ...]
    is_streamed: bool
    wants_usage: bool


def parse_completion(body: bytes) -> Ask:
    """Read the body of POST /v1/completions.

    Raises:
        Problem: It is no such request, or asks for what is not supported.
    """
    request = _decode(body, _Completion)
    return _ask(
        request,
        prompt=_prompt(request.prompt),
        is_chat=False,
        max_new_tokens=request.max_tokens or COMPLETION_TOKENS,
    )


def parse_chat(body: bytes) -> Ask:
    """Read the body of POST /v1/chat/completions.

    Raises:
        Problem: It is no such request, or asks for what is not supported.
    """
    request = _decode(body, _Chat)
    return _ask(
        request,
        prompt=chat_prompt([(message.role, message.text) for message in request.messages]),
        is_chat=True,
        max_new_tokens=request.max_completion_tokens or request.max_tokens,
        more_stop=(CHAT_STOP,),
    )


def chat_prompt(messages: Sequence[tuple[str, str]]) -> str:
    """Return (role, text) pairs as the play that the model goes on with."""
    lines = []
    for role, text in messages:
        if role in ("system", "developer"):
            lines.append(f"{text}\n\n")
        else:
            lines.append(f"{role.capitalize()}: {text}\n")
    return "".join(lines) + "Assistant:"


RequestT = TypeVar("RequestT", bound=_Settings)


def _decode(body: bytes, kind: type[RequestT]) -> RequestT:
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    # RecursionError: lists in lists a thousand deep.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"the body is no JSON object: {error}") from None
    for name, harmless in UNSUPPORTED.items():
        if fields.get(name) not in harmless:
            usual = msgspec.json.encode(harmless[-1]).decode()
            raise Problem(
                400,
                f"{name} is not supported here, other than as {usual}: leave it out",
                param=name,
                code="unsupported_parameter",
            )
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        # As in "Expected `int`, got `str` - at `$.max_tokens`".
        where = text.partition("`$.")[2].rstrip("`")
        raise Problem(400, text, param=where or None) from None


def _prompt(prompt: str | list[Any]) -> str | list[int]:
    if len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # a batch of one
    if isinstance(prompt, str) or (prompt and all(type(each) is int for each in prompt)):
        return prompt
    raise Problem(
        400,
        "prompt must be one text or one list of token ids; send several one by one",
        param="prompt",
    )


def _ask(
    request: _Settings,
    *,
    prompt: str | list[int],
    is_chat: bool,
    max_new_tokens: int | None,
    more_stop: tuple[str, ...] = (),
) -> Ask:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > STOPS_MAX or not all(0 < len(each) <= STOP_CHARACTERS_MAX for each in stop):
        raise Problem(
            400,
            f"stop must be at most {STOPS_MAX} texts of 1 to {STOP_CHARACTERS_MAX} characters",
            param="stop",
        )
    options = request.stream_options
    if options is not None and not request.stream:
        raise Problem(400, "stream_options is for streams alone", param="stream_options")
    # OpenAI's default is 1 for both. A seed may be negative; ours has 64 bits.
    seed = secrets.randbits(64) if request.seed is None else request.seed % 2**64
    return Ask(
        model=request.model,
        prompt=prompt,
        is_chat=is_chat,
        sampling=SamplingParameters(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=request.top_k,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=seed,
        ),
        max_new_tokens=max_new_tokens,
        stop=(*stop, *more_stop),
        is_streamed=bool(request.stream),
        wants_usage=options is not None and options.include_usage,
    )
