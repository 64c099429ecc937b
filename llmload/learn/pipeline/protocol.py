"""What stages of a training pipeline and the device that leads it say to each other.

    leader              stage 0             stage 1              leader
      | -- Assign ------> |                   |                    |     call `train-stage/2`
      | -- Assign --------------------------> |                    |
      | -- OpenPipeline-> | -- OpenPipeline-> | -- OpenPipeline -> |     call `train-pipeline/2`
      | <------- Opened - | <------- Opened - | <-------- Opened - |
      | -- Forward -----> | -- Forward -----> | -- Forward ------> |     hidden states
      | <----- Backward - | <----- Backward - | <------ Backward - |     their gradients
      :                   :                   :                    :     1F1B, all micro-batches
      | -- Apply -------> | -- Apply -------> | -- Apply --------> |     the next Forward may follow
      | -- Forward -----> | -- Forward -----> | -- Forward ------> |     or, to validate, goes alone
      | -- Keep --------> |                   |                    |     call `train-stage/2`
      | -- FetchState --> |                   |                    |     call `train-state/1`

The leader holds the first thing and the last: the embeddings, and the last blocks with the loss. So
the way is a ring of calls, and texts, targets and losses stay on the leader.

The length of the whole gradient is summed up on the way back: with its last Backward of a step each
stage adds its own. What comes after the last Apply in a call cannot overtake it, so a step costs no
question and answer beyond the micro-batches.

Everything here comes from strangers: sizes and ranges are part of the schema.
This file does not know who calls, or when.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from llmload.config import GPT2Config
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.shards import Vector
from llmload.swarm.codec import Codec, decode_hidden_untrusted, encode_hidden
from llmload.swarm.protocol import STAGES_MAX, Hop, SessionFailed
from natswarm import DecodeError, Message, Method

__all__ = [
    "PIPELINE",
    "ROWS_BYTES_MAX",
    "STAGE",
    "STATE",
    "Apply",
    "AskStage",
    "Assign",
    "Backward",
    "Done",
    "FetchState",
    "Forward",
    "Keep",
    "OpenPipeline",
    "Opened",
    "Release",
    "StageState",
    "StatePiece",
    "WireOptimizer",
    "pack_rows",
    "training_service",
    "unpack_backward_untrusted",
    "unpack_forward_untrusted",
]

# 64 bits tell all models apart that ever meet by accident; `Assign` has the whole hash.
MODEL_PREFIX_CHARACTERS = 16
# Hidden states of one micro-batch as float32; also natswarm's own bound of a payload.
ROWS_BYTES_MAX = 16 * 2**20
PIECE_BYTES_MAX = 2**20
MICRO_BATCHES_MAX = 4096
# Float16 has its full precision from 2^-14 on: gradients are lifted to its upper end.
LIFTED_EXPONENT = 15
EXPONENT_MAX = 160

RunId: TypeAlias = Annotated[bytes, Meta(min_length=16, max_length=16)]
Index: TypeAlias = Annotated[int, Meta(ge=0, lt=2**24)]
StepNumber: TypeAlias = Annotated[int, Meta(ge=0, lt=2**53)]
Count: TypeAlias = Annotated[int, Meta(ge=1, lt=2**24)]
Digest: TypeAlias = Annotated[str, Meta(min_length=64, max_length=64)]
# The schema's comparison is false for NaN, so NaN and infinity are refused as well.
Positive: TypeAlias = Annotated[float, Meta(gt=0, le=1e300)]
NotNegative: TypeAlias = Annotated[float, Meta(ge=0, le=1e300)]


class WireOptimizer(Message, frozen=True):
    """`AdamWSettings` on the wire; their own constructor checks the ranges."""

    learning_rate: Positive
    beta1: NotNegative
    beta2: NotNegative
    epsilon: Positive
    weight_decay: NotNegative
    gradient_norm_max: Positive

    @classmethod
    def of(cls, settings: AdamWSettings) -> WireOptimizer:
        """Return settings as they travel."""
        return cls(
            settings.learning_rate,
            settings.beta1,
            settings.beta2,
            settings.epsilon,
            settings.weight_decay,
            settings.gradient_norm_max,
        )

    @property
    def settings(self) -> AdamWSettings:
        """The settings.

        Raises:
            ValueError: One is out of range.
        """
        return AdamWSettings(
            learning_rate=self.learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=self.epsilon,
            weight_decay=self.weight_decay,
            gradient_norm_max=self.gradient_norm_max,
        )


# --- Control: the leader and one stage ---------------------------------------------------------


class AskStage(Message, frozen=True):
    """How are you? Answered by a `StageState`."""


class StageState(Message, frozen=True):
    """What a stage says of itself.

    Attributes:
        room: Blocks that it can hold in training.
        is_free: Whether the one who asks may have it.
        step: Steps that it has made in the training that has it.
        forward: Micro-batches of the next one that it has computed forward.
        backward: The same back.
        validated: Micro-batches of the validation before it that it has computed.
    """

    room: Index
    is_free: bool
    step: StepNumber
    forward: Index
    backward: Index
    validated: Index


class Assign(Message, frozen=True):
    """Hold these blocks, as they were at a step.

    Attributes:
        run: Drawn by the leader; names the training towards its stages, who know each other by it.
        model_hash: `Model.content_hash` of the model that training began with.
        first: First block.
        last: Last block, inclusive.
        step: Steps made; at 0 the blocks are those of the model.
        digests: Later, of the state of each block: on its own disk, or fetched from the leader.
        optimizer: Hyperparameters.
    """

    run: RunId
    model_hash: Digest
    first: Index
    last: Index
    step: StepNumber
    digests: Annotated[tuple[Digest, ...], Meta(max_length=2**16)]
    optimizer: WireOptimizer


class Keep(Message, frozen=True):
    """Write the state at a step to your disk, so that it can be fetched and gone back to."""

    run: RunId
    step: StepNumber


class Release(Message, frozen=True):
    """The training is over: forget it."""

    run: RunId


class Done(Message, frozen=True):
    """It is done."""


STAGE = Method("llmload/train-stage/2", (AskStage, Assign, Keep, Release), (StageState, Done))


class FetchState(Message, frozen=True):
    """Send the file with the state of a block; the answer ends with the file."""

    run: RunId
    block: Index
    step: StepNumber


class StatePiece(Message, frozen=True):
    """The next bytes of it, as the payload."""


STATE = Method(
    "llmload/train-state/1", (FetchState,), (StatePiece,), payload_bytes_max=PIECE_BYTES_MAX
)


# --- The pipeline: stage to stage --------------------------------------------------------------


class OpenPipeline(Message, frozen=True):
    """Compute with those behind you until one of us closes the call: its first message.

    Attributes:
        run: Of `Assign`.
        attempt: Counted by the leader; a later one takes the place of an earlier one.
        route: The stages from the receiver on; the last one is the leader.
        stage: Which of them the receiver is, 0 is the first.
        micro_batch_count: In one step.
        codec: How hidden states and gradients travel.
        budget_s: How long the receiver may take to answer.
    """

    run: RunId
    attempt: Index
    route: Annotated[tuple[Hop, ...], Meta(min_length=1, max_length=STAGES_MAX)]
    stage: Annotated[int, Meta(ge=0, le=STAGES_MAX)]
    micro_batch_count: Annotated[int, Meta(ge=1, le=MICRO_BATCHES_MAX)]
    codec: Codec
    budget_s: Annotated[float, Meta(gt=0, le=3600)]


class Opened(Message, frozen=True):
    """From here on to the leader everything is open."""


class Forward(Message, frozen=True):
    """Take a micro-batch forward; the payload holds the hidden states.

    Attributes:
        step: Steps made before this one.
        micro_batch: Which of the step, or of the validation before it.
        batch: Sequences.
        time: Tokens of each.
        codec: Of the payload.
        is_validation: It is not learned from, so nothing is held for it and nothing comes back.
    """

    step: StepNumber
    micro_batch: Index
    batch: Count
    time: Count
    codec: Codec
    is_validation: bool


class Backward(Message, frozen=True):
    """Take it back; the payload holds the gradient of what was sent forward.

    Attributes:
        step: As in `Forward`.
        micro_batch: The same.
        codec: Of the payload.
        exponent: The payload was multiplied by 2 to this power.
        squared_norm: With the last micro-batch, the squared length of the gradient from the sender
            on, but for the leader's; before it 0. NaN or infinity where the gradient holds such.
    """

    step: StepNumber
    micro_batch: Index
    codec: Codec
    exponent: Annotated[int, Meta(ge=-EXPONENT_MAX, le=EXPONENT_MAX)]
    squared_norm: float


class Apply(Message, frozen=True):
    """Do the step of the optimiser.

    Attributes:
        step: Steps made before this one.
        norm: The length of the gradient of the whole model.
        learning_rate: For this step.
    """

    step: StepNumber
    norm: NotNegative
    learning_rate: Positive


PIPELINE = Method(
    "llmload/train-pipeline/2",
    (OpenPipeline, Forward, Apply),
    (Opened, Backward, SessionFailed),
    payload_bytes_max=ROWS_BYTES_MAX,
)


def training_service(model_hash: str) -> str:
    """Return the name under which devices offer to train blocks of a model."""
    return f"llmload/train/{model_hash[:MODEL_PREFIX_CHARACTERS]}"


def pack_rows(
    rows: NDArray[np.float32], codec: Codec, *, lift: bool = False
) -> tuple[Codec, int, bytes | memoryview]:
    """Return hidden states or gradients, float32 (batch, time, n_embd), as they travel.

    Args:
        rows: Finite numbers.
        codec: The form wanted.
        lift: Multiply by a power of two, if the form is not exact: gradients are tiny.

    Returns:
        The form taken, the exponent of the power of two, and the payload.
    """
    exponent = 0
    largest = float(np.abs(rows).max())
    if lift and codec != "float32" and largest > 0:
        exponent = LIFTED_EXPONENT - int(np.frexp(largest)[1])
        if abs(exponent) > EXPONENT_MAX:
            exponent, codec = 0, "float32"
    lifted = np.ldexp(rows, exponent) if exponent else rows
    taken, payload = encode_hidden(lifted.reshape(-1, rows.shape[-1]), codec)
    return taken, exponent, payload


def unpack_forward_untrusted(
    message: Message,
    payload: bytes,
    config: GPT2Config,
    *,
    step: int,
    micro_batch: int,
    is_validation: bool = False,
) -> Vector:
    """Return hidden states that came, float32 (batch, time, n_embd).

    Raises:
        DecodeError: It is no Forward of this micro-batch, of another size, or not finite.
    """
    if not isinstance(message, Forward) or (
        (message.step, message.micro_batch, message.is_validation)
        != (step, micro_batch, is_validation)
    ):
        raise DecodeError(f"{_name(message)} came in place of Forward {micro_batch} of {step}")
    if message.time > config.n_ctx:
        raise DecodeError(f"{message.time} tokens are more than the model's {config.n_ctx}")
    shape = (message.batch, message.time, config.n_embd)
    return _unpack_rows_untrusted(payload, message.codec, shape)


def unpack_backward_untrusted(
    message: Message, payload: bytes, shape: Sequence[int], *, step: int, micro_batch: int
) -> tuple[Backward, Vector]:
    """Return what came, and the gradient of hidden states, float32 of their shape.

    Raises:
        DecodeError: It is no Backward of this micro-batch, of another size, or not finite.
    """
    if not isinstance(message, Backward) or (message.step, message.micro_batch) != (
        step,
        micro_batch,
    ):
        raise DecodeError(f"{_name(message)} came in place of Backward {micro_batch} of {step}")
    rows = _unpack_rows_untrusted(payload, message.codec, shape)
    with np.errstate(over="ignore"):
        rows = np.ldexp(rows, -message.exponent) if message.exponent else rows
    if not np.isfinite(rows).all():
        raise DecodeError("a gradient is too large for its exponent")
    return message, rows


def _unpack_rows_untrusted(payload: bytes, codec: Codec, shape: Sequence[int]) -> Vector:
    batch, time, n_embd = shape
    return decode_hidden_untrusted(payload, codec, batch * time, n_embd).reshape(shape)


def _name(message: Message) -> str:
    numbers = f" {message.micro_batch}" if isinstance(message, Forward | Backward) else ""
    return type(message).__name__ + numbers
