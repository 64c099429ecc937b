"""Run one stage of a model, a contiguous range of blocks, in ONNX Runtime.

`StageEngine.run` advances one sequence, `StageEngine.run_batch` many at once, each by as many
positions as it likes: reading the weights is most of what a decoded token costs, and a batch reads
them once. Both are synchronous and busy for milliseconds to seconds: Trio code calls them as
`await trio.to_thread.run_sync(engine.run, x, cache)`. The runtime lets go of the GIL while it
computes. One engine may serve several threads at once as long as their caches lie in different
arenas.

This file does not know sampling, other stages, or where the numbers come from.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from llmload.config import GPT2Config, parameter_shapes
from llmload.engine.kv_cache import KVArena, KVCache
from llmload.errors import StageFailed
from llmload.graph.quantize import Precision, stored_tensors
from llmload.graph.stage import (
    AttentionForm,
    build_stage_graph,
    default_attention,
    past_names,
    present_names,
)
from llmload.weights import Weights

__all__ = ["BatchStep", "StageEngine", "session_options"]

# Errors come back as exceptions, with the same text; on stderr they would only tear up the screen.
_LOG_FATAL_ONLY = 4


class BatchStep(NamedTuple):
    """What one sequence adds to a step of many.

    Attributes:
        x: int (time,) token ids for the first stage; float32 (time, n_embd) for later ones.
        cache: The memory of this sequence in this stage, of one sequence (`batch` 1).
        logits_count: For how many of the last positions the last stage returns logits.
    """

    x: NDArray[Any]
    cache: KVCache
    logits_count: int = 1


def session_options(intra_op_threads: int) -> onnxruntime.SessionOptions:
    """Return how every session of this package runs on `intra_op_threads` threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_FATAL_ONLY
    # Waiting threads sleep. Spinning ones take the processor from the other stages of this
    # process: 54 ms a token instead of 17 with 4 stages of GPT-2 124M, 2 threads each.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class StageEngine:
    """An open ONNX Runtime session for the blocks of one stage.

    Made from arrays, the session keeps its own copy of the weights, in the layout that the
    processor wants; the caller may let go of `weights` afterwards. `prepared.open_stage` makes one
    from a model folder, with weights mapped from a file: it starts faster and takes less memory.

    Args:
        config: The shape of the model.
        weights: At least the parameters of `blocks`, as `load_weights` returns them.
        blocks: Contiguous range of block indexes; None for the whole model.
        intra_op_threads: Threads that work on one operator. With several stages or processes on a
            small device 1 is the fastest; measure before choosing more (`tuning`).
        precision: Of the matrices; what is below float32 is quantised here.
        attention: One of the forms of `graph.stage`, which compute the same; None for its default.

    Raises:
        ValueError: `blocks` is not a part of the model, or `weights` do not fit it.
        StageFailed: The runtime does not take the model.
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: Weights,
        blocks: range | None = None,
        *,
        intra_op_threads: int = 1,
        precision: Precision = "float32",
        attention: AttentionForm | None = None,
    ) -> None:
        blocks = config.blocks if blocks is None else blocks
        attention = attention or default_attention(config)
        _check_threads(intra_op_threads)
        _check_weights(config, blocks, weights)
        options = session_options(intra_op_threads)
        names, values = [], []
        for name, array in stored_tensors(config, blocks, precision, weights.__getitem__):
            names.append(name)
            values.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        options.add_external_initializers(names, values)
        graph = build_stage_graph(config, blocks, precision=precision, attention=attention)
        self._open(config, blocks, precision, attention, graph.SerializeToString(), options)

    @classmethod
    def from_file(
        cls,
        config: GPT2Config,
        file: Path,
        blocks: range,
        *,
        intra_op_threads: int = 1,
        precision: Precision,
        attention: AttentionForm,
    ) -> StageEngine:
        """Open a graph of `build_stage_graph` whose weights lie in a file beside it, mapped.

        The caller answers for the file being what the arguments say; see `prepared`.

        Raises:
            StageFailed: The runtime does not take the file.
        """
        _check_threads(intra_op_threads)
        engine = cls.__new__(cls)
        options = session_options(intra_op_threads)
        engine._open(config, blocks, precision, attention, str(file), options)
        return engine

    def _open(
        self,
        config: GPT2Config,
        blocks: range,
        precision: Precision,
        attention: AttentionForm,
        model: bytes | str,
        options: onnxruntime.SessionOptions,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.precision = precision
        self.attention = attention
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        # The runtime's exceptions have no base class of their own.
        except Exception as error:
            raise StageFailed(f"ONNX Runtime does not open blocks {blocks}: {error}") from error
        self._past_names = [name for index in blocks for name in past_names(index)]
        self._present_names = [name for index in blocks for name in present_names(index)]
        # Caches of one arena that lie side by side share a binding; making one takes longer than
        # a small stage computes.
        self._bindings: WeakKeyDictionary[KVArena, dict[range, Any]] = WeakKeyDictionary()
        self._bindings_lock = threading.Lock()

    @property
    def is_first(self) -> bool:
        """Whether this stage takes token ids, not hidden states."""
        return self.blocks.start == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage returns logits, not hidden states."""
        return self.blocks.stop == self.config.n_layer

    def new_cache(self, *, batch: int = 1) -> KVCache:
        """Return the empty cache of a new sequence, or of `batch` sequences in lockstep."""
        return KVCache(self.config, self.blocks, batch=batch)

    def new_arena(self, slot_count: int) -> KVArena:
        """Return room for sequences that `run_batch` is to advance together."""
        return KVArena(self.config, self.blocks, slot_count)

    def run(self, x: NDArray[Any], cache: KVCache, *, logits_count: int = 1) -> NDArray[np.float32]:
        """Advance a sequence by the positions in `x`: a whole prompt, a part of it, or one token.

        Args:
            x: Token ids, integers (batch, time), for the first stage; the hidden states that the
                stage before has returned, float32 (batch, time, n_embd), for later ones.
            cache: The memory of this sequence in this stage. It holds the new positions as well
                afterwards, or is unchanged if the call raises.
            logits_count: For how many of the last positions the last stage returns logits.

        Returns:
            float32 (batch, min(logits_count, time), vocab_size) from the last stage,
            float32 (batch, time, n_embd) from others.

        Raises:
            ValueError: `x` or `cache` do not fit this stage, or the context has no room.
            StageFailed: The runtime could not compute, for want of memory for instance.
        """
        if x.ndim != (2 if self.is_first else 3) or x.shape[0] != cache.batch:
            raise ValueError(
                f"the input has the shape {x.shape}, this stage takes "
                f"{(cache.batch, 'time') if self.is_first else (cache.batch, 'time', 'n_embd')}"
            )
        slots = range(cache.first_slot, cache.first_slot + cache.batch)
        work = _Work(cache.arena, slots, dict.fromkeys(slots, cache.position))
        for slot, rows in zip(slots, x, strict=True):
            work.add(slot, self._checked_rows(rows, cache), self._checked_count(logits_count))
        output = self._compute(work)
        cache.advance(x.shape[1])
        return output.reshape(cache.batch, -1, output.shape[-1])

    def run_batch(self, steps: Sequence[BatchStep]) -> list[NDArray[np.float32]]:
        """Advance many sequences at once, wherever they stand and whatever each one adds.

        Sequences whose caches lie in one arena (`new_arena`) are computed as one; with another form
        of attention than `grouped`, or in arenas of their own, one after the other.

        Returns:
            For each step float32 (min(logits_count, time), vocab_size) from the last stage,
            float32 (time, n_embd) from others.

        Raises:
            ValueError: A step does not fit this stage, or two are of one cache. Nothing was
                computed.
            StageFailed: The runtime could not compute. The caches stand where they stood.
        """
        groups: dict[tuple[KVArena, int], list[tuple[int, BatchStep, NDArray[Any]]]] = {}
        for index, step in enumerate(steps):
            if step.cache.batch != 1:
                raise ValueError("a step of a batch is of one sequence")
            self._checked_count(step.logits_count)
            rows = self._checked_rows(step.x, step.cache)
            alone = 0 if self.attention == "grouped" else index
            groups.setdefault((step.cache.arena, alone), []).append((index, step, rows))
        if len({id(step.cache) for step in steps}) < len(steps):
            raise ValueError("two steps of one batch are of the same cache")
        results: dict[int, NDArray[np.float32]] = {}
        for (arena, _), members in groups.items():
            positions = {step.cache.first_slot: step.cache.position for _, step, _ in members}
            work = _Work(arena, range(min(positions), max(positions) + 1), positions)
            for _, step, rows in members:
                work.add(step.cache.first_slot, rows, step.logits_count)
            output = self._compute(work)
            counts = [
                min(step.logits_count, len(rows)) if self.is_last else len(rows)
                for _, step, rows in members
            ]
            parts = np.split(output, np.cumsum(counts)[:-1])
            results.update((index, part) for (index, *_), part in zip(members, parts, strict=True))
        for step in steps:
            step.cache.advance(len(step.x))
        return [results[index] for index in range(len(steps))]

    def _compute(self, work: _Work) -> NDArray[np.float32]:
        """Run one step; the caches are written to, but do not know it yet."""
        feeds = work.feeds(self.is_first, self.is_last)
        try:
            if self.attention == "grouped":
                return self._compute_in_place(work, feeds)
            return self._compute_copying(work, feeds)
        except Exception as error:
            raise StageFailed(f"blocks {self.blocks} failed in ONNX Runtime: {error}") from error

    def _compute_in_place(self, work: _Work, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        binding = self._binding(work.arena, work.slots)
        for name, array in (feeds | work.sequence_feeds()).items():
            binding.bind_cpu_input(name, array)
        width = self.config.vocab_size if self.is_last else self.config.n_embd
        row_count = len(feeds["logit_rows"]) if self.is_last else work.row_count
        output = np.empty((row_count, width), dtype=np.float32)
        binding.bind_output(
            "logits" if self.is_last else "hidden_out",
            "cpu",
            0,
            np.float32,
            output.shape,
            output.ctypes.data,
        )
        self._session.run_with_iobinding(binding)
        return output

    def _binding(self, arena: KVArena, slots: range) -> Any:
        """Return the binding for `slots` of `arena`: past and present are the same memory."""
        with self._bindings_lock:
            known = self._bindings.setdefault(arena, {})
            if slots not in known:
                binding = known[slots] = self._session.io_binding()
                part = slice(slots.start, slots.stop)
                for past, present, array in zip(
                    self._past_names, self._present_names, arena.arrays, strict=True
                ):
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(array[part])
                    binding.bind_ortvalue_input(past, value)
                    binding.bind_ortvalue_output(present, value)
            return known[slots]

    def _compute_copying(self, work: _Work, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        part = slice(work.slots.start, work.slots.stop)
        position = work.positions[work.slots.start]
        pasts = [np.ascontiguousarray(array[part, :, :position]) for array in work.arena.arrays]
        names = ["logits" if self.is_last else "hidden_out", *self._present_names]
        output: NDArray[np.float32]
        output, *presents = self._session.run(
            names, {**feeds, **dict(zip(self._past_names, pasts, strict=True))}
        )
        for array, present in zip(work.arena.arrays, presents, strict=True):
            array[part, :, position : present.shape[2]] = present[:, :, position:]
        return output

    def _checked_count(self, logits_count: int) -> int:
        if self.is_last and logits_count < 1:
            raise ValueError(f"logits_count must be positive, got {logits_count}")
        return logits_count

    def _checked_rows(self, x: NDArray[Any], cache: KVCache) -> NDArray[Any]:
        config = self.config
        if cache.blocks != self.blocks or cache.config != config:
            raise ValueError(f"the cache is one of {cache.blocks}, this stage has {self.blocks}")
        expected = ("time",) if self.is_first else ("time", config.n_embd)
        if x.ndim != len(expected) or x.shape[1:] != expected[1:]:
            raise ValueError(f"a sequence has the shape {x.shape}, this stage takes {expected}")
        if not 1 <= x.shape[0] <= cache.room:
            raise ValueError(
                f"{x.shape[0]} new positions, but there must be at least one, and after "
                f"{cache.position} of {config.n_ctx} at most {cache.room}"
            )
        if not self.is_first:
            return np.asarray(x, dtype=np.float32)
        if not np.issubdtype(x.dtype, np.integer):
            raise ValueError(f"token ids are integers, not {x.dtype}")
        # ONNX's Gather takes -1 for the last row, so a bad id would pass without a word.
        if x.min() < 0 or x.max() >= config.vocab_size:
            raise ValueError(f"token ids must be in 0..{config.vocab_size - 1}")
        return np.asarray(x, dtype=np.int64)


class _Work:
    """The rows of one step, and where they lie in the slots of an arena."""

    def __init__(self, arena: KVArena, slots: range, positions: Mapping[int, int]) -> None:
        self.arena = arena
        self.slots = slots
        self.positions = positions  # slot -> position of its first new row
        self._added: list[tuple[int, NDArray[Any], int]] = []  # slot, rows, logits_count

    def add(self, slot: int, rows: NDArray[Any], logits_count: int) -> None:
        """Add the new rows of the sequence in `slot`; each sequence once."""
        self._added.append((slot, rows, logits_count))

    @property
    def row_count(self) -> int:
        """New rows of all sequences."""
        return sum(len(rows) for _, rows, _ in self._added)

    def feeds(self, is_first: bool, is_last: bool) -> dict[str, NDArray[Any]]:
        """Return the inputs of `build_stage_graph` that all forms of attention have."""
        time = max(len(rows) for _, rows, _ in self._added)
        padded_rows = np.zeros((len(self.slots), time), dtype=np.int64)
        positions, places, logit_rows = [], [], []
        first_row = 0
        for slot, rows, logits_count in self._added:
            numbers = np.arange(len(rows))
            place = slot - self.slots.start
            padded_rows[place, : len(rows)] = numbers + first_row
            places.append(numbers + place * time)
            positions.append(numbers + self.positions[slot])
            logit_rows.append(numbers[-logits_count:] + first_row)
            first_row += len(rows)
        feeds = {"padded_rows": padded_rows, "row_places": np.concatenate(places)}
        feeds["token_ids" if is_first else "hidden"] = np.concatenate(
            [rows for _, rows, _ in self._added]
        )
        if is_first:
            feeds["positions"] = np.concatenate(positions)
        if is_last:
            feeds["logit_rows"] = np.concatenate(logit_rows)
        return feeds

    def sequence_feeds(self) -> dict[str, NDArray[Any]]:
        """Return what only grouped attention asks for: where each sequence stands."""
        # A slot without new rows still needs a position, and a count of 0 keeps it untouched.
        last_positions = np.zeros(len(self.slots), dtype=np.int32)
        new_counts = np.zeros(len(self.slots), dtype=np.int32)
        for slot, rows, _ in self._added:
            last_positions[slot - self.slots.start] = self.positions[slot] + len(rows) - 1
            new_counts[slot - self.slots.start] = len(rows)
        total_count = max(int(last_positions.max()) + 1, int(new_counts.max()))
        return {
            "last_positions": last_positions,
            "new_counts": new_counts,
            "total_count": np.array(total_count, dtype=np.int32),
        }


def _check_threads(intra_op_threads: int) -> None:
    if intra_op_threads < 1:
        # 0 would mean "all cores" to the runtime, which is never right beside other peers.
        raise ValueError(f"intra_op_threads must be positive, got {intra_op_threads}")


def _check_weights(config: GPT2Config, blocks: range, weights: Weights) -> None:
    """Refuse what does not fit: the runtime itself would crash."""
    for name, shape in parameter_shapes(config, blocks).items():
        array = weights.get(name)
        if array is None or array.shape != shape or array.dtype != np.float32:
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(f"parameter {name} must be float32 {shape}, it is {found}")
