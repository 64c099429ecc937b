"""GPT-2 on ONNX Runtime, run and trained over the peers of a mesh.

    model = load_model(bundled_model_path())
    engine = StageEngine(model.config, model.weights)
    text = model.tokenizer.stream()
    for token in generate_tokens([engine], model.tokenizer.encode("def ")):
        print(text.push(token), end="")

The modules, from the inside out: `config`, `weights`, `tokenizer`, `model_folder` (a model on disk,
in Hugging Face layout), `model_store` (the models of this device), `reference` (the model in NumPy:
what is right), `graph` (the model as ONNX), `engine` (ONNX graphs running on this device), `swarm`
(stages on peers and the client that asks them), `serve` (an HTTP API for existing programs),
`learn` (training here, and together with whoever trains the same model), `data` (text and feedback
that peers give each other to learn from).
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# From 1.32 on ONNX Runtime reports to its maker unless told not to before it is loaded.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from llmload.adapter import Adapter, AdapterSettings, fresh_adapter, load_adapter, save_adapter
from llmload.config import GPT2Config
from llmload.engine.generate import generate_tokens
from llmload.engine.kv_cache import CachePool, KVArena, KVCache
from llmload.engine.prepared import open_stage
from llmload.engine.sampler import SamplingParameters
from llmload.engine.session import BatchStep, StageEngine
from llmload.engine.tuning import EngineSettings
from llmload.errors import (
    CacheFull,
    LearningFailed,
    LlmloadError,
    ModelFolderError,
    PromptTooLong,
    StageFailed,
    StoreFailed,
)
from llmload.model_folder import Model, load_model
from llmload.model_store import ModelStore
from llmload.tokenizer import TextStream, Tokenizer
from llmload.weights import bundled_model_path

if TYPE_CHECKING:
    from llmload.learn.exchange import Learner, PartnerReport
    from llmload.learn.optimizer import AdamWSettings
    from llmload.learn.outer import OuterSettings
    from llmload.learn.schedule import LearningRateSchedule
    from llmload.learn.trainer import Trainer
    from llmload.swarm.blocks import BlockStack
    from llmload.swarm.client import Generation, SwarmClient, SwarmTimeouts
    from llmload.swarm.draft import DraftModel, open_draft
    from llmload.swarm.route import NoRoute, StageOffer
    from llmload.swarm.stage import StageLimits, StageServer

__all__ = [
    "AdamWSettings",
    "Adapter",
    "AdapterSettings",
    "BatchStep",
    "BlockStack",
    "CacheFull",
    "CachePool",
    "DraftModel",
    "EngineSettings",
    "GPT2Config",
    "Generation",
    "KVArena",
    "KVCache",
    "Learner",
    "LearningFailed",
    "LearningRateSchedule",
    "LlmloadError",
    "Model",
    "ModelFolderError",
    "ModelStore",
    "NoRoute",
    "OuterSettings",
    "PartnerReport",
    "PromptTooLong",
    "SamplingParameters",
    "StageEngine",
    "StageFailed",
    "StageLimits",
    "StageOffer",
    "StageServer",
    "StoreFailed",
    "SwarmClient",
    "SwarmTimeouts",
    "TextStream",
    "Tokenizer",
    "Trainer",
    "bundled_model_path",
    "fresh_adapter",
    "generate_tokens",
    "load_adapter",
    "load_model",
    "open_draft",
    "open_stage",
    "save_adapter",
]

# What works with peers, or trains, comes with its first use: whoever computes on one device alone
# needs neither natswarm's time nor its 27 MB.
_LATER = {
    "AdamWSettings": "llmload.learn.optimizer",
    "BlockStack": "llmload.swarm.blocks",
    "DraftModel": "llmload.swarm.draft",
    "Generation": "llmload.swarm.client",
    "Learner": "llmload.learn.exchange",
    "LearningRateSchedule": "llmload.learn.schedule",
    "NoRoute": "llmload.swarm.route",
    "OuterSettings": "llmload.learn.outer",
    "PartnerReport": "llmload.learn.exchange",
    "StageLimits": "llmload.swarm.stage",
    "StageOffer": "llmload.swarm.route",
    "StageServer": "llmload.swarm.stage",
    "SwarmClient": "llmload.swarm.client",
    "SwarmTimeouts": "llmload.swarm.client",
    "Trainer": "llmload.learn.trainer",
    "open_draft": "llmload.swarm.draft",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
