"""What the client and the stages of a pipeline say to each other.

    client                 first stage                  last stage
      | -- OpenSession ------> |                            |         stream `llmload/session/2`
      |                        | -- OpenSession ----------> |         stream `llmload/session/2`
      | <--------------------- | ---------- TokensOf ------ |         stream `llmload/tokens/2`
      |                        | <------- SessionOpened --- |
      | <--- SessionOpened --- |                            |
      | -- Step, token ids --> |                            |
      |                        | -- Step, hidden states --> |
      | <--------------------- | ----------- Tokens ------- |
      :                        :                            :         until the client closes
      | <--- SessionFailed --- | <----- SessionFailed ----- |         or something goes wrong

A session is a chain of streams, one a hop, and one stream back from the last stage to the client:
S stages cost S + 1 one-way trips a step. The chain carries steps downwards and failures upwards.
Whoever closes its end ends the session, hop by hop, and every stage frees its cache.

Every step is answered, so several may be under way at once. A step may begin before the end of what
the stages hold: they forget the rest first. So a guess of the client that was wrong is taken back
by the next step, without a message of its own.

Before a session, a client asks a stage how it is, by the call `llmload/stage/2`.

Everything here comes from strangers. Sizes, counts and ranges are part of the schema, so a message
that breaks them is a `DecodeError` before anybody looks at it; what depends on the model (ids,
shapes, finite values) is checked by the `unpack_..._untrusted` functions.

This file does not know streams, nor what a stage does with a step.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Literal, TypeAlias

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from llmload.config import GPT2Config
from llmload.swarm.codec import Codec, decode_hidden_untrusted
from llmload.swarm.receipt import RECEIPT_BYTES
from natswarm import DecodeError, Message, Method

__all__ = [
    "BUDGET_S_MAX",
    "DESCRIBE",
    "LINKS_MAX",
    "SESSION_PROTOCOL",
    "STAGES_MAX",
    "TOKENS_PROTOCOL",
    "DescribeStage",
    "Hop",
    "Link",
    "OpenSession",
    "SessionFailed",
    "SessionOpened",
    "StageDescription",
    "Step",
    "Tokens",
    "TokensOf",
    "WireSampling",
    "checksum",
    "pack_token_ids",
    "printable_reason",
    "unpack_hidden_untrusted",
    "unpack_token_ids_untrusted",
]

# --- Specification: changing one of these changes the protocol ---------------------------------

SESSION_PROTOCOL = "llmload/session/2"
TOKENS_PROTOCOL = "llmload/tokens/2"

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
# Tokens drawn by one step: guesses and one more.
DRAW_COUNT_MAX = 64
LINKS_MAX = 64

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
StageSeconds: TypeAlias = Annotated[tuple[Seconds, ...], Meta(max_length=STAGES_MAX)]
Receipt: TypeAlias = Annotated[bytes, Meta(min_length=RECEIPT_BYTES, max_length=RECEIPT_BYTES)]
Receipts: TypeAlias = Annotated[tuple[Receipt, ...], Meta(max_length=STAGES_MAX)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]


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
        codec: The least exact form in which hidden states may travel.
        receipt_seed: Which values of a step are noted; see `receipt.py`.
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
    codec: Codec = "float32"
    receipt_seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class SessionOpened(Message, frozen=True):
    """From here to the last stage, and from there to the client, everything is open."""


class SessionFailed(Message, frozen=True):
    """The session is over, or does not come about; goes up the chain to the client.

    Attributes:
        hop: The stage at fault, as far as the sender can tell: itself, or the next one.
        reason: What happened, for the user.
        is_input: What that stage was given was wrong, so it may well be the one before.
    """

    hop: Hop
    reason: Annotated[str, Meta(max_length=REASON_CHARACTERS_MAX)]
    is_input: bool = False


class Step(Message, frozen=True):
    """Advance the sequence; the payload holds the rows, as `codec` says.

    Attributes:
        step: 0, 1, 2, ...; one that was there before is dropped.
        position: Where in the sequence the first row stands; what the stages hold from there on is
            forgotten first.
        row_count: How many positions come with it.
        draw_count: After how many of the last rows a token is to be drawn; 0 for a part of a
            prompt that is not its last.
        codec: What a row is: one token id (first stage), or n_embd hidden states (later stages).
        checksum: CRC-32 of the payload. The connection is authenticated; this finds what goes wrong
            before and after it.
        stage_s: Seconds that each stage passed so far has held this step, waiting included.
        receipts: What each stage but the last one passed has given; see `receipt.py`.
    """

    step: StepIndex
    position: Position
    row_count: Count
    draw_count: Annotated[int, Meta(ge=0, le=DRAW_COUNT_MAX)]
    codec: Literal["int32"] | Codec
    checksum: Annotated[int, Meta(ge=0, lt=2**32)]
    stage_s: StageSeconds = ()
    receipts: Receipts = ()


class TokensOf(Message, frozen=True):
    """This stream carries the tokens of a session: the first message on a token stream."""

    session: SessionId


class Tokens(Message, frozen=True):
    """What a step has led to.

    Attributes:
        step: The step.
        token_ids: The token after each of the rows asked for, in order.
        stage_s: Seconds that each stage of the route has held the step.
        receipts: What each stage of the route has given.
    """

    step: StepIndex
    token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=DRAW_COUNT_MAX)]
    stage_s: StageSeconds
    receipts: Receipts


class DescribeStage(Message, frozen=True):
    """How are you? Answered by a `StageDescription`."""


class Link(Message, frozen=True):
    """A connection of a stage.

    Attributes:
        peer: Key of the PeerId at its other end.
        rtt_s: Its round trip.
    """

    peer: PeerKey
    rtt_s: Seconds


class StageDescription(Message, frozen=True):
    """What a stage says of itself; a claim, which the client corrects by what it measures.

    Attributes:
        first: First block served.
        last: Last block served, inclusive.
        block_s: Seconds that one position takes in one block, measured.
        waiting_s: Seconds until a step that comes now has its turn.
        session_room: Sessions that would still be taken.
        position_room: Positions that the memory for keys and values still holds in all its blocks.
        links: Whom it is connected to.
    """

    first: BlockIndex
    last: BlockIndex
    block_s: Seconds
    waiting_s: Seconds
    session_room: Annotated[int, Meta(ge=0, le=POSITION_MAX)]
    position_room: Annotated[int, Meta(ge=0, le=2**53)]
    links: Annotated[tuple[Link, ...], Meta(max_length=LINKS_MAX)]


DESCRIBE = Method("llmload/stage/2", (DescribeStage,), (StageDescription,))


def printable_reason(text: str) -> str:
    """Return a text that may be shown on a terminal and fits into `SessionFailed`.

    Peers write reasons; a control character among them could repaint the screen of our user.
    """
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown[:REASON_CHARACTERS_MAX]


def checksum(payload: bytes | memoryview) -> int:
    """Return the CRC-32 that a step carries of its payload."""
    return zlib.crc32(payload)


def pack_token_ids(token_ids: NDArray[np.integer]) -> bytes:
    """Return the payload of a step for the first stage: integers (time,) as int32."""
    return token_ids.astype("<i4").tobytes()


def unpack_token_ids_untrusted(step: Step, payload: bytes, config: GPT2Config) -> NDArray[np.int64]:
    """Return the token ids of a step: int64 (1, row_count).

    Raises:
        DecodeError: Damaged, another codec or size, or an id that the model does not have.
    """
    _check_whole(step, payload)
    if step.codec != "int32":
        raise DecodeError(f"a step carries {step.codec}, this stage takes int32")
    if len(payload) != 4 * step.row_count:
        raise DecodeError(
            f"a step of {step.row_count} rows has {4 * step.row_count} bytes, not {len(payload)}"
        )
    token_ids = np.frombuffer(payload, dtype="<i4")  # (row_count,)
    if token_ids.min() < 0 or token_ids.max() >= config.vocab_size:
        raise DecodeError(f"a step has token ids outside of 0..{config.vocab_size - 1}")
    return token_ids.astype(np.int64)[np.newaxis]  # (1, row_count)


def unpack_hidden_untrusted(step: Step, payload: bytes, config: GPT2Config) -> NDArray[np.float32]:
    """Return the hidden states of a step: float32 (1, row_count, n_embd).

    Raises:
        DecodeError: Damaged, another codec or size, or a value that is not finite.
    """
    _check_whole(step, payload)
    if step.codec == "int32":
        raise DecodeError("a step carries int32, this stage takes hidden states")
    hidden = decode_hidden_untrusted(payload, step.codec, step.row_count, config.n_embd)
    return hidden[np.newaxis]  # (1, row_count, n_embd)


def _check_whole(step: Step, payload: bytes) -> None:
    if checksum(payload) != step.checksum:
        raise DecodeError("the rows of a step do not have its checksum: they were damaged")
