"""States of a training on disk, a file for each unit and step, and how files get to other devices.

    folder/block-3/checkpoint-200.safetensors     parameters and AdamW's means of one block
    folder/ends/checkpoint-200.safetensors        the same of embeddings, final norm, output layer

A stage keeps what it is told to and gives it to the leader; the leader keeps all of it and gives it
to whoever is to hold a block next. A file that is there already is not sent, if it has the digest
that is asked for; digests are checked when a file is read.

This file does not know which states together are one step of the whole model.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmload.config import GPT2Config
from llmload.errors import LearningFailed
from llmload.learn.checkpoint import (
    Checkpoint,
    checkpoint_file,
    read_checkpoint,
    save_checkpoint,
    stored_digest,
)
from llmload.learn.pipeline.link import Traffic
from llmload.learn.pipeline.part import (
    ENDS,
    STATE_VECTORS,
    ModelPart,
    Unit,
    parameter_count,
    unit_shapes,
    units_of,
)
from llmload.learn.pipeline.protocol import (
    PIECE_BYTES_MAX,
    STATE,
    FetchState,
    StatePiece,
)
from llmload.learn.shards import ParameterSpace
from llmload.swarm.stage_session import Compute
from llmload.weights import Weights, save_weights_in_parts
from natswarm import Call, DecodeError, Peer, RequestRefused

__all__ = ["Snapshots"]

# Beside the vectors: the header of the file.
HEADER_BYTES_MAX = 64 * 1024
# A block of GPT-2 XL, 369 MB, over a slow uplink.
FETCH_TIMEOUT_S = 3600.0


class Snapshots:
    """The states of one training in a folder.

    Args:
        folder: Made when something is kept.
        config: The shape of the model.
        compute: Where to read and write.
        traffic: What goes to and comes from others is added to this.
    """

    def __init__(
        self, folder: Path, config: GPT2Config, compute: Compute, traffic: Traffic | None = None
    ) -> None:
        self.folder = folder
        self._config = config
        self._compute = compute
        self._traffic = traffic or Traffic()

    async def keep(self, part: ModelPart) -> None:
        """Write the state of a part at its step.

        Raises:
            OSError: It can't be written.
        """
        for unit in part.units:
            await self._compute(save_checkpoint, self._folder(unit), part.checkpoint(unit))

    def file(self, unit: Unit, step: int) -> Path:
        """Return where the state of a unit is kept, if it is."""
        return checkpoint_file(self._folder(unit), step)

    def digest(self, unit: Unit, step: int) -> str | None:
        """Return the SHA-256 that the state of a unit says it has; None if it is not kept."""
        return stored_digest(self.file(unit, step))

    async def load(self, units: Iterable[Unit], step: int) -> dict[Unit, Checkpoint]:
        """Return the states of some units.

        Raises:
            LearningFailed: One is missing or damaged.
        """
        return {unit: await self._compute(self._read, unit, step) for unit in units}

    def _read(self, unit: Unit, step: int) -> Checkpoint:
        file = self.file(unit, step)
        try:
            state = read_checkpoint(file, step)
        except OSError:
            state = None
        if state is None:
            raise LearningFailed(
                f"{file} is missing or damaged, and training can't go on without. Begin anew "
                "in another folder (--out), with the latest model as --model"
            )
        return state

    def export(self, step: int, folder: Path) -> None:
        """Write the weights of a step as a model folder's, with one unit in memory at a time.

        Blocking.

        Raises:
            LearningFailed: A state is missing or damaged.
            OSError: They can't be written.
        """
        units = units_of(self._config, self._config.blocks)
        save_weights_in_parts(folder, (self._weights(unit, step) for unit in units), f"step{step}")

    def _weights(self, unit: Unit, step: int) -> Weights:
        space = ParameterSpace.of(unit_shapes(self._config, unit))
        return space.views(self._read(unit, step).vectors["parameters"])

    def forget_others(self, step: int) -> None:
        """Remove what is of another step."""
        for file in self.folder.glob("*/checkpoint-*.safetensors"):
            if file.name != checkpoint_file(file.parent, step).name:
                file.unlink(missing_ok=True)

    async def serve(self, call: Call[StatePiece, FetchState], request: FetchState) -> None:
        """Send a file.

        Raises:
            RequestRefused: It is not kept.
        """
        try:
            file = self.file(request.block, request.step).open("rb")
        except OSError as error:
            raise RequestRefused(
                f"has no state of block {request.block} at step {request.step}", "missing"
            ) from error
        with file:
            while piece := await self._compute(file.read, PIECE_BYTES_MAX):
                await call.send(StatePiece(), piece)
                self._traffic.sent_bytes += len(piece)

    async def fetch(
        self, peer: Peer, run: bytes, block: int, step: int, digest: str | None = None
    ) -> None:
        """Get the state of a block, unless it is there.

        Args:
            peer: Who has it.
            run: Which training.
            block: Of the block.
            step: Steps made.
            digest: The state wanted; None for whatever the peer has.

        Raises:
            NatswarmError: The peer was lost, refused, or sent something else.
            OSError: It can't be written.
        """
        target = self.file(block, step)
        if digest is not None and self.digest(block, step) == digest:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            await self._receive(peer, FetchState(run, block, step), temporary)
            if digest is not None and stored_digest(temporary) != digest:
                raise DecodeError("another state came than the one asked for, or a damaged one")
            await self._compute(self._check_untrusted, temporary, block, step)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    async def _receive(self, peer: Peer, request: FetchState, file: Path) -> None:
        value_count = len(STATE_VECTORS) * parameter_count(self._config, request.block)
        bytes_max = 4 * value_count + HEADER_BYTES_MAX
        byte_count = 0
        with file.open("wb") as stream:
            async with peer.start_call(STATE, request, timeout_s=FETCH_TIMEOUT_S) as call:
                async for _, payload in call:
                    byte_count += len(payload)
                    self._traffic.received_bytes += len(payload)
                    if byte_count > bytes_max:
                        raise DecodeError(f"a state of a block has no more than {bytes_max} bytes")
                    await self._compute(stream.write, payload)

    def _check_untrusted(self, file: Path, unit: Unit, step: int) -> None:
        """Check that a file from elsewhere is the state of a unit, damaged in no way.

        Raises:
            DecodeError: It is not.
        """
        try:
            state = read_checkpoint(file, step)
        except (ValueError, KeyError) as error:  # facts that are no JSON
            raise DecodeError(f"no state of a block came: {error}") from error
        if state is None or not _is_state(state, parameter_count(self._config, unit)):
            raise DecodeError("what came is not the state of this block, or is damaged")

    def _folder(self, unit: Unit) -> Path:
        return self.folder / ("ends" if unit == ENDS else f"block-{unit}")


def _is_state(state: Checkpoint, size: int) -> bool:
    shapes: Mapping[str, tuple[str, tuple[int, ...]]] = {
        name: (vector.dtype.str, vector.shape) for name, vector in state.vectors.items()
    }
    powers = state.facts.get("powers") if isinstance(state.facts, dict) else None
    return (
        shapes == dict.fromkeys(STATE_VECTORS, ("<f4", (size,)))
        and all(math.isfinite(float(vector.sum())) for vector in state.vectors.values())
        and isinstance(powers, list)
        and len(powers) == 2
        and all(type(power) is float and 0 <= power <= 1 for power in powers)
    )
