"""What the client and the stages of a pipeline say to each other.

    client                 first stage                  last stage
      | -- OpenSession ------> |                            |         stream `llmload/session/1`
      |                        | -- OpenSession ----------> |         stream `llmload/session/1`
      | <--------------------- | ---------- TokensOf ------ |         stream `llmload/tokens/1`
      |                        | <------- SessionOpened --- |
      | <--- SessionOpened --- |                            |
      | -- Step, token ids --> |                            |
      |                        | -- Step, hidden states --> |
      | <--------------------- | ------------ Token ------- |
      :                        :                            :         until the client closes
      | <--- SessionFailed --- | <----- SessionFailed ----- |         or something goes wrong

A session is a chain of streams, one a hop, and one stream back from the last stage to the client:
S stages cost S + 1 one-way trips a token. The chain carries steps downwards and failures upwards.
Whoever closes its end ends the session, hop by hop, and every stage frees its cache.

Everything here comes from strangers. Sizes, counts and ranges are part of the schema, so a message
that breaks them is a `DecodeError` before anybody looks at it; what depends on the model (ids,
shapes, finite values) is checked by the `unpack_..._untrusted` functions.

This file does not know streams, nor what a stage does with a step.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from llmload.config import GPT2Config
from natswarm import DecodeError, Message

__all__ = [
    "BUDGET_S_MAX",
    "SESSION_PROTOCOL",
    "STAGES_MAX",
    "TOKENS_PROTOCOL",
    "Hop",
    "OpenSession",
    "SessionFailed",
    "SessionOpened",
    "Step",
    "Token",
    "TokensOf",
    "WireSampling",
    "pack_hidden",
    "pack_token_ids",
    "printable_reason",
    "unpack_hidden_untrusted",
    "unpack_token_ids_untrusted",
]

# --- Specification: changing one of these changes the protocol ---------------------------------

SESSION_PROTOCOL = "llmload/session/1"
TOKENS_PROTOCOL = "llmload/tokens/1"

SESSION_ID_BYTES = 16
PEER_ID_BYTES = 32
MODEL_HASH_CHARACTERS = 64

# --- Implementation: bounds on what a stranger may ask for -------------------------------------

# More hops than blocks make no sense, and nobody would wait for so many.
STAGES_MAX = 64
# A chain over fresh punctures opens in seconds; nobody may keep us waiting for longer than this.
BUDGET_S_MAX = 120.0
# Far above the context of any GPT-2 (1,024); products with n_embd stay within 64 bits.
POSITION_MAX = 2**24
REASON_CHARACTERS_MAX = 500

SessionId: TypeAlias = Annotated[
    bytes, Meta(min_length=SESSION_ID_BYTES, max_length=SESSION_ID_BYTES)
]
PeerKey: TypeAlias = Annotated[bytes, Meta(min_length=PEER_ID_BYTES, max_length=PEER_ID_BYTES)]
BlockIndex: TypeAlias = Annotated[int, Meta(ge=0, le=POSITION_MAX)]
Position: TypeAlias = Annotated[int, Meta(ge=0, le=POSITION_MAX)]
StepIndex: TypeAlias = Annotated[int, Meta(ge=0, le=POSITION_MAX)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=POSITION_MAX)]
# The schema's comparison is false for NaN, so NaN and infinity are refused as well.
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e6)]


class Hop(Message, frozen=True):
    """One stage of a route.

    Attributes:
        peer: Key of the PeerId that serves it.
        first: Its first block.
        last: Its last block, inclusive as users write it.
    """

    peer: PeerKey
    first: BlockIndex
    last: BlockIndex


class WireSampling(Message, frozen=True):
    """`SamplingParameters` on the wire; their own constructor checks the ranges."""

    temperature: float
    top_k: int | None
    top_p: float
    seed: int


class OpenSession(Message, frozen=True):
    """Serve a sequence: the first message on a session stream.

    Attributes:
        session: Drawn by the client; names the session towards it.
        model_hash: `Model.content_hash`: stages of different models would compute nonsense.
        route: The stages from the receiver on, which is the first.
        client: Key of the PeerId that wants the tokens.
        position_count: Positions the client wants room for, prompt and answer together.
        sampling: How the last stage chooses.
        budget_s: How long the receiver may take to answer.
    """

    session: SessionId
    model_hash: Annotated[
        str, Meta(min_length=MODEL_HASH_CHARACTERS, max_length=MODEL_HASH_CHARACTERS)
    ]
    route: Annotated[tuple[Hop, ...], Meta(min_length=1, max_length=STAGES_MAX)]
    client: PeerKey
    position_count: Count
    sampling: WireSampling
    budget_s: Annotated[float, Meta(gt=0, le=BUDGET_S_MAX)]


class SessionOpened(Message, frozen=True):
    """From here to the last stage, and from there to the client, everything is open."""


class SessionFailed(Message, frozen=True):
    """The session is over because something went wrong; goes up the chain to the client.

    Attributes:
        hop: The stage at fault, as far as the sender can tell: itself, or the next one.
        reason: What happened, for the user.
    """

    hop: Hop
    reason: Annotated[str, Meta(max_length=REASON_CHARACTERS_MAX)]


class Step(Message, frozen=True):
    """Advance the sequence; the payload holds the rows, as `codec` says.

    Attributes:
        step: 0, 1, 2, ...; one that was there before is dropped.
        position: Where in the sequence the first row stands.
        row_count: How many positions come with it.
        codec: What a row is: one token id (first stage), or n_embd float32 (later stages). Hidden
            states travel exactly, so that a split model gives the tokens of the whole one.
        stage_s: Seconds that each stage passed so far has held this step, waiting included.
    """

    step: StepIndex
    position: Position
    row_count: Count
    codec: Literal["int32", "float32"]
    stage_s: Annotated[tuple[Seconds, ...], Meta(max_length=STAGES_MAX)] = ()


class TokensOf(Message, frozen=True):
    """This stream carries the tokens of a session: the first message on a token stream."""

    session: SessionId


class Token(Message, frozen=True):
    """The token that a step has led to.

    Attributes:
        step: The step.
        position: Where in the sequence the token stands: after the last row of the step.
        token_id: Which.
        stage_s: Seconds that each stage of the route has held the step.
    """

    step: StepIndex
    position: Position
    token_id: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    stage_s: Annotated[tuple[Seconds, ...], Meta(max_length=STAGES_MAX)]


def printable_reason(text: str) -> str:
    """Return a text that may be shown on a terminal and fits into `SessionFailed`.

    Peers write reasons; a control character among them could repaint the screen of our user.
    """
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown[:REASON_CHARACTERS_MAX]


def pack_token_ids(token_ids: NDArray[np.integer]) -> bytes:
    """Return the payload of a step for the first stage: integers (time,) as int32."""
    return token_ids.astype("<i4").tobytes()


def unpack_token_ids_untrusted(step: Step, payload: bytes, config: GPT2Config) -> NDArray[np.int64]:
    """Return the token ids of a step: int64 (1, row_count).

    Raises:
        DecodeError: Another codec or size, or an id that the model does not have.
    """
    token_ids = _rows(step, payload, "int32", row_shape=())  # (row_count,)
    if token_ids.min() < 0 or token_ids.max() >= config.vocab_size:
        raise DecodeError(f"a step has token ids outside of 0..{config.vocab_size - 1}")
    return token_ids.astype(np.int64)[np.newaxis]  # (1, row_count)


def pack_hidden(hidden: NDArray[np.float32]) -> memoryview:
    """Return the payload of a step for a later stage: float32 (1, time, n_embd)."""
    # On little-endian machines this is the array itself, not a copy.
    return np.ascontiguousarray(hidden, dtype="<f4").data.cast("B")


def unpack_hidden_untrusted(step: Step, payload: bytes, config: GPT2Config) -> NDArray[np.float32]:
    """Return the hidden states of a step: float32 (1, row_count, n_embd).

    Raises:
        DecodeError: Another codec or size, or a value that is not finite.
    """
    hidden = _rows(step, payload, "float32", row_shape=(config.n_embd,))  # (row_count, n_embd)
    # One NaN would spread over the whole sequence, and its cache would have to go.
    if not np.isfinite(hidden).all():
        raise DecodeError("a step has hidden states that are NaN or infinite")
    return hidden.astype(np.float32, copy=False)[np.newaxis]  # (1, row_count, n_embd)


def _rows(step: Step, payload: bytes, codec: str, row_shape: tuple[int, ...]) -> NDArray[np.number]:
    if step.codec != codec:
        raise DecodeError(f"a step carries {step.codec}, this stage takes {codec}")
    dtype = np.dtype(codec).newbyteorder("<")
    row_bytes = dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
    if len(payload) != step.row_count * row_bytes:
        raise DecodeError(
            f"a step of {step.row_count} rows has {step.row_count * row_bytes} bytes, "
            f"not {len(payload)}"
        )
    return np.frombuffer(payload, dtype=dtype).reshape(step.row_count, *row_shape)
