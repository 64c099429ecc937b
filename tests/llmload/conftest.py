"""One small model for all tests of this package, made anew from a printed seed.

Fresh GPT-2 weights are so small that logits hardly depend on the input, and any two
implementations agree to 1e-4 whatever they compute. The weights of these tests are as large as
those of a trained model, biases and norms included.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmload.config import GPT2Config
from llmload.model_folder import save_config
from llmload.weights import random_weights, save_weights

MODEL_SEED = 20


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests leave nothing in the cache folder of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def config():
    return GPT2Config(
        vocab_size=300, n_ctx=96, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )


@pytest.fixture(scope="session")
def weights(config):
    return make_trained_looking_weights(config, MODEL_SEED)


@pytest.fixture(scope="session")
def trained_looking_weights():
    """The function that makes such weights for any configuration and seed."""
    return make_trained_looking_weights


def make_trained_looking_weights(config, seed):
    print(f"model seed {seed}")
    rng = np.random.default_rng(seed)
    weights = {}
    for name, values in random_weights(config, seed).items():
        noise = rng.standard_normal(values.shape, dtype=np.float32)
        if values.ndim == 2:
            # Linear layers that keep the variance; embeddings larger than in a fresh model.
            weights[name] = noise / np.float32(np.sqrt(config.n_embd))
        else:
            weights[name] = values + np.float32(0.1) * noise
    return weights


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE trained on a few words: 257 single tokens and some merges."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["the mesh of the peers, the peers of the mesh"] * 4, trainer)
    return library


@pytest.fixture
def model_folder(tmp_path, config, weights, bpe) -> Path:
    """A complete model folder that a test may damage."""
    folder = tmp_path / "model"
    save_config(folder, config)
    save_weights(folder, weights)
    bpe.save(str(folder / "tokenizer.json"))
    return folder
