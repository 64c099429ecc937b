"""Whatever a crash leaves behind, the latest whole checkpoint is found, and resumed exactly."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
from safetensors import SafetensorError

from llmload.config import GPT2Config
from llmload.errors import LearningFailed
from llmload.learn import checkpoint as checkpoint_module
from llmload.learn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from llmload.learn.outer import OuterLoop, OuterSettings
from llmload.learn.resume import resume, take_checkpoint
from llmload.learn.shards import ShardLayout
from llmload.learn.trainer import Trainer, batches
from llmload.weights import random_weights
from natswarm import PeerId

CONFIG = GPT2Config(vocab_size=40, n_ctx=16, n_embd=16, n_layer=1, n_head=2)
CRASHES = 50


def checkpoint(step):
    rng = np.random.default_rng(step)
    vectors = {name: rng.standard_normal(300).astype(np.float32) for name in ("a", "b")}
    return Checkpoint(step, vectors, {"powers": [0.9**step, 1.0], "rng": {"state": 2**100 + step}})


def assert_same(found, expected):
    assert found.step == expected.step
    assert dict(found.facts) == dict(expected.facts)
    assert {name: values.tobytes() for name, values in found.vectors.items()} == {
        name: values.tobytes() for name, values in expected.vectors.items()
    }


def test_a_folder_without_any_has_none(tmp_path):
    assert load_checkpoint(tmp_path / "missing") is None
    (tmp_path / "checkpoint-x.safetensors").write_bytes(b"?")
    assert load_checkpoint(tmp_path) is None


def test_the_latest_is_found_and_few_are_kept(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, checkpoint(step))
    assert_same(load_checkpoint(tmp_path), checkpoint(10))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "checkpoint-10.safetensors",
        "checkpoint-2.safetensors",
    ]


@pytest.mark.parametrize("seed", range(CRASHES))
def test_no_crash_loses_more_than_what_was_not_written(tmp_path, seed):
    """The next file is cut off, or has a flipped bit, at any byte, under either of its names."""
    rng = random.Random(seed)
    save_checkpoint(tmp_path, checkpoint(1))
    shutil.copy(tmp_path / "checkpoint-1.safetensors", tmp_path / "kept")
    written = save_checkpoint(tmp_path, checkpoint(2))
    content = bytearray(written.read_bytes())
    if rng.random() < 0.5:
        del content[rng.randrange(len(content)) :]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.3:
        written.unlink()
        written = tmp_path / ".checkpoint-2.safetensors.0123abcd"
    written.write_bytes(content)
    assert_same(load_checkpoint(tmp_path), checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(3))
    assert_same(load_checkpoint(tmp_path), checkpoint(3))


def test_a_full_disk_is_an_error_and_leaves_the_last_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))

    def save_file(_vectors, path, *, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, checkpoint(2))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-1.safetensors"]
    assert_same(load_checkpoint(tmp_path), checkpoint(1))


class Run:
    """A learner without partners."""

    def __init__(self, config=CONFIG) -> None:
        self.trainer = Trainer(config, random_weights(config, 1))
        layout = ShardLayout(self.trainer.space, 1000)
        me = PeerId(bytes(32))
        self.outer = OuterLoop(layout, self.trainer.parameters, me, OuterSettings(density=0.1))
        self.rng = np.random.default_rng(7)
        self.text = batches(np.arange(200) % 40, batch=2, time=8, rng=self.rng)
        self.step = 0

    def train(self, count):
        for _ in range(count):
            gradient = self.trainer.gradients(next(self.text))[1]
            self.outer.note_step(gradient, self.trainer.apply(gradient), 1e-3)
            self.step += 1
            if self.step % 3 == 0:
                self.outer.publish([])
            self.outer.merge()


def test_resuming_gives_the_bits_of_not_having_stopped(tmp_path):
    whole = Run()
    whole.train(20)
    first = Run()
    first.train(10)  # between two updates
    made = take_checkpoint(first.trainer, first.outer, first.rng, first.step, "a")
    save_checkpoint(tmp_path, made)
    second = Run()
    second.train(2)
    found = load_checkpoint(tmp_path)
    second.step = resume(found, second.trainer, second.outer, second.rng, "a")
    second.train(10)
    assert second.trainer.parameters.tobytes() == whole.trainer.parameters.tobytes()
    assert second.outer.anchor.tobytes() == whole.outer.anchor.tobytes()
    assert second.outer.version == whole.outer.version


def test_a_checkpoint_of_another_model_is_refused():
    ours, other = Run(), Run()
    found = take_checkpoint(other.trainer, other.outer, other.rng, 0, "b")
    with pytest.raises(LearningFailed, match="another model"):
        resume(found, ours.trainer, ours.outer, ours.rng, "a")
