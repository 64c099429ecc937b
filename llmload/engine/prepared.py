"""Open a stage from a model folder in a moment: its weights lie on disk ready for the processor.

Opening a model the usual way reads all its weights, quantises them and lays them out anew for the
matrix kernels; that takes seconds and a private copy in memory. Here it is done once. The result is
kept in the `ModelCache`, and from then on mapped: only the blocks of this stage, pages that the
system shares between processes and takes back when memory is short.

ONNX Runtime writes the layout itself ("pre-packed constant initialisers") and, when it opens the
file on another processor, finds that it does not match and lays the weights out again. So a file is
never wrong, at worst slow.

This file does not know how a stage computes, nor which settings are good.
"""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnxruntime
from onnx import TensorProto

from llmload.adapter import Adapter, merged
from llmload.config import GPT2Config
from llmload.engine.session import StageEngine, session_options
from llmload.engine.tuning import EngineSettings, best_settings
from llmload.errors import StageFailed
from llmload.graph.quantize import Precision, stored_tensors
from llmload.graph.stage import build_stage_graph
from llmload.model_cache import ModelCache
from llmload.weights import load_weights, open_weights

__all__ = ["open_stage"]

_GRAPH_FILE_NAME = "stage.onnx"
_DATA_FILE_NAME = "stage.data"
# A multiple of every page size in use, so that each tensor can be mapped by itself.
_ALIGNMENT = 65_536
# Smaller tensors stay in the graph file.
_EXTERNAL_BYTES_MIN = 1024


def open_stage(
    folder: Path,
    blocks: range | None = None,
    *,
    precision: Precision = "float32",
    settings: EngineSettings | None = None,
    threads: int | None = None,
    adapter: Adapter | None = None,
    cache: ModelCache | None = None,
) -> StageEngine:
    """Open some blocks of a model folder, from what was prepared if that is there.

    The first time takes seconds, and room on the disk: about twice the size of the blocks at this
    precision. Later it takes some tens of milliseconds. Where nothing can be written, every time is
    a first time, and the weights are held in memory.

    Args:
        folder: Model folder in Hugging Face layout.
        blocks: Contiguous range of blocks; None for all.
        precision: Of the matrices.
        settings: How to compute; None for what is the fastest here, measured once.
        threads: Threads that work on one operator, whatever `settings` say; None for theirs.
        adapter: Merged into the blocks, which are then held in memory and not prepared.
        cache: Where to keep the result; None for the cache folder of the user.

    Raises:
        ModelFolderError: The folder is damaged, or no model of this architecture.
        ValueError: `blocks` is not a contiguous part of the model.
        StageFailed: The runtime does not take the model.
    """
    config = GPT2Config.from_folder(folder)
    blocks = config.blocks if blocks is None else blocks
    config.check_blocks(blocks)
    cache = ModelCache(folder) if cache is None else cache
    if settings is None:
        settings = best_settings(config, precision, cache)
    name = (
        f"blocks-{blocks.start}-{blocks.stop - 1}-{precision}-{settings.attention}"
        f"-ort{onnxruntime.__version__}-{platform.machine()}"
    )
    prepared = cache.path / name

    def open_prepared() -> StageEngine:
        return StageEngine.from_file(
            config,
            prepared / _GRAPH_FILE_NAME,
            blocks,
            intra_op_threads=threads or settings.threads,
            precision=precision,
            attention=settings.attention,
        )

    def open_in_memory() -> StageEngine:
        weights = load_weights(folder, blocks, config=config)
        return StageEngine(
            config,
            weights if adapter is None else merged(weights, adapter),
            blocks,
            intra_op_threads=threads or settings.threads,
            precision=precision,
            attention=settings.attention,
        )

    if adapter is not None:
        return open_in_memory()
    if prepared.is_dir():
        try:
            return open_prepared()
        except StageFailed:
            # Damaged, by a disk that was full for instance: made anew.
            shutil.rmtree(prepared, ignore_errors=True)
    try:
        new = cache.temporary_folder()
        try:
            _prepare(folder, config, blocks, precision, settings, new)
            # Another process may have been faster; its files are as good.
            with suppress(OSError):
                new.replace(prepared)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError:
        # No room on the disk, or no right to write: slower, but it runs.
        return open_in_memory()
    return open_prepared()


def _prepare(
    folder: Path,
    config: GPT2Config,
    blocks: range,
    precision: Precision,
    settings: EngineSettings,
    target: Path,
) -> None:
    """Write graph and weights of a stage to `target`, with one tensor in memory at a time."""
    graph = build_stage_graph(config, blocks, precision=precision, attention=settings.attention)
    raw_graph, raw_data = target / "raw.onnx", target / "raw.data"
    by_name = {tensor.name: tensor for tensor in graph.graph.initializer}
    with open_weights(folder, config) as reader, raw_data.open("wb") as stream:
        for name, array in stored_tensors(config, blocks, precision, reader.read):
            offset = _aligned(stream)
            # Little-endian, as ONNX wants it.
            stream.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
            _point_to(by_name[name], raw_data.name, offset, stream.tell() - offset)
    raw_graph.write_bytes(graph.SerializeToString())

    options = session_options(settings.threads)
    options.optimized_model_filepath = str(target / _GRAPH_FILE_NAME)
    for key, value in (
        ("save_external_prepacked_constant_initializers", "1"),
        ("optimized_model_external_initializers_file_name", _DATA_FILE_NAME),
        ("optimized_model_external_initializers_min_size_in_bytes", str(_EXTERNAL_BYTES_MIN)),
    ):
        options.add_session_config_entry(f"session.{key}", value)
    try:
        onnxruntime.InferenceSession(str(raw_graph), options, providers=["CPUExecutionProvider"])
    # The runtime's exceptions have no base class of their own.
    except Exception as error:
        raise StageFailed(f"ONNX Runtime does not open blocks {blocks}: {error}") from error
    raw_graph.unlink()
    raw_data.unlink()
    for file in target.iterdir():
        # Without it a crash after the rename may leave empty files under the final name.
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _aligned(stream: BinaryIO) -> int:
    """Move to the next offset at which a tensor may begin, and return it."""
    offset = -(-stream.tell() // _ALIGNMENT) * _ALIGNMENT
    stream.seek(offset)
    return offset


def _point_to(tensor: TensorProto, file_name: str, offset: int, byte_count: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", file_name), ("offset", offset), ("length", byte_count)):
        tensor.external_data.add(key=key, value=str(value))
