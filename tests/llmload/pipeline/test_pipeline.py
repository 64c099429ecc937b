"""A pipeline on a mesh: it trains as one device would, and stages may die at any moment."""

from __future__ import annotations

import random
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import trio
from msgspec import structs
from trio.testing import MockClock

from llmload.config import GPT2Config
from llmload.errors import LearningFailed
from llmload.learn.optimizer import AdamWSettings
from llmload.learn.pipeline import stage as stage_module
from llmload.learn.pipeline.leader import PipelineSettings, PipelineTrainer
from llmload.learn.pipeline.part import ModelPart
from llmload.learn.pipeline.protocol import (
    PIPELINE,
    STAGE,
    AskStage,
    Assign,
    Keep,
    OpenPipeline,
    Release,
    WireOptimizer,
)
from llmload.learn.pipeline.stage import TrainingStage
from llmload.learn.trainer import Trainer
from llmload.swarm.protocol import Hop, SessionFailed
from llmload.swarm.route import HopFailed, NoRoute
from llmload.weights import load_weights
from natswarm import RequestRefused

sys.path.append(str(Path(__file__).parents[1]))
from fake_mesh import FakeMesh, compute_here

CONFIG = GPT2Config(vocab_size=40, n_ctx=16, n_embd=16, n_layer=4, n_head=2)
MODEL = "0123456789abcdef" * 4
# See test_part.py for epsilon.
SETTINGS = AdamWSettings(learning_rate=1e-2, gradient_norm_max=0.5, epsilon=1e-3)
MICRO_BATCHES = 4
STEPS = 6


def batches_at(step):
    windows = np.random.default_rng(step).integers(CONFIG.vocab_size, size=(MICRO_BATCHES, 2, 9))
    return [(rows[:, :-1], rows[:, 1:]) for rows in windows]


def rate_at(step):
    return 1e-2 / (1 + step)


def validation_at(step):
    """After every other step more than are on the way at once, one of them smaller."""
    if step % 2:
        return []
    windows = np.random.default_rng(1000).integers(CONFIG.vocab_size, size=(11, 9))
    return [(rows[:, :-1], rows[:, 1:]) for rows in np.split(windows, range(2, 11, 2))]


class Training:
    """A mesh with devices that offer to train, and one that leads."""

    def __init__(self, nursery, folder, weights):
        self.mesh = FakeMesh(nursery)
        self.folder = folder
        self.weights = weights
        self.told = []
        self.reports = []
        self.stages = {}

    def open_part(self, blocks, optimizer):
        return ModelPart(CONFIG, blocks, self.weights.__getitem__, optimizer=optimizer)

    async def add_stage(self, name, room=2, compute=compute_here):
        node = self.mesh.node(name)
        stage = TrainingStage(
            node,
            CONFIG,
            MODEL,
            open_part=self.open_part,
            folder=self.folder / name,
            room=room,
            compute=compute,
            tell=self.told.append,
        )
        stage.start()
        await node.announce([stage.service])
        self.stages[node.peer_id] = stage
        return node

    def leader(self, name="leader", validation_at=validation_at, **settings):
        usual = {"stage_count": 2, "keep_every": 2, "codec": "float32", "replica_s": 0}
        return PipelineTrainer(
            self.mesh.node(name),
            CONFIG,
            MODEL,
            open_part=self.open_part,
            folder=self.folder / "out",
            batches_at=batches_at,
            validation_at=validation_at,
            optimizer=SETTINGS,
            rate_at=rate_at,
            settings=PipelineSettings(**usual | settings),
            compute=compute_here,
            tell=self.told.append,
            after_step=self.reports.append,
        )

    def validation_losses(self):
        """By step; one that was made again has the same bits."""
        losses = {}
        for report in self.reports:
            assert losses.setdefault(report.step, report.validation_loss) == report.validation_loss
        return losses

    def final_weights(self, trainer):
        assert trainer.step == trainer.kept_step
        folder = self.folder / "model"
        trainer.snapshots.export(trainer.step, folder)
        return load_weights(folder, config=CONFIG)


@pytest.fixture
def training(nursery, tmp_path, trained_looking_weights):
    return Training(nursery, tmp_path, trained_looking_weights(CONFIG, 3))


def digest(weights):
    return {name: values.tobytes() for name, values in weights.items()}


async def test_it_trains_as_one_device_would(autojump_clock, training):
    for name in ("a", "b"):
        await training.add_stage(name)
    leader = training.leader()
    await leader.run(STEPS)
    whole = Trainer(CONFIG, training.weights, optimizer=SETTINGS)
    for step, report in enumerate(training.reports):
        loss = whole.step(batches_at(step), learning_rate=rate_at(step))
        assert report.step == step + 1
        assert report.loss == pytest.approx(loss, rel=1e-5)
        if not (validation := validation_at(step + 1)):
            assert report.validation_loss is None
            continue
        losses = [whole.loss(*batch) for batch in validation]
        sizes = [tokens.size for tokens, _ in validation]
        expected = np.average(losses, weights=sizes)
        assert report.validation_loss == pytest.approx(expected, rel=1e-5)
    assert [report.step for report in training.reports] == list(range(1, STEPS + 1))
    got = training.final_weights(leader)
    for name, values in whole.weights().items():
        moved = np.linalg.norm(values - training.weights[name])
        assert np.linalg.norm(got[name] - values) <= 1e-4 * moved, name
    await training.mesh.wait_quiet()
    assert training.mesh.contained == []
    assert training.told.count("free") == 2


class Undisturbed(NamedTuple):
    """A training that nothing went wrong with."""

    weights: dict[str, bytes]
    duration_s: float
    validation_losses: dict[int, float | None]


@pytest.fixture(scope="module")
def train_undisturbed(tmp_path_factory, trained_looking_weights):
    def run(**options):
        async def train():
            async with trio.open_nursery() as nursery:
                weights = trained_looking_weights(CONFIG, 3)
                training = Training(nursery, tmp_path_factory.mktemp("undisturbed"), weights)
                for name in ("a", "b"):
                    await training.add_stage(name)
                leader = training.leader(**options)
                await leader.run(STEPS)
                return Undisturbed(
                    digest(training.final_weights(leader)),
                    trio.current_time(),
                    training.validation_losses(),
                )

        return trio.run(train, clock=MockClock(autojump_threshold=0))

    return run


@pytest.fixture(scope="module")
def undisturbed(train_undisturbed):
    return train_undisturbed()


def test_validating_changes_nothing(train_undisturbed, undisturbed):
    without = train_undisturbed(validation_at=lambda _step: [])
    assert set(without.validation_losses.values()) == {None}
    assert without.weights == undisturbed.weights


@pytest.mark.parametrize("seed", range(8))
async def test_stages_die_at_any_moment_and_the_weights_are_the_same(
    autojump_clock, undisturbed, training, seed
):
    duration_s = undisturbed.duration_s
    for name in ("a", "b", "c", "d"):
        await training.add_stage(name)
    leader = training.leader()
    rng = random.Random(seed)

    async def kill():
        for _ in range(2):
            await trio.sleep(rng.uniform(0, 0.6 * duration_s))
            if leader.route:
                victim = rng.choice(leader.route).peer_id
                if victim in training.mesh.nodes:
                    training.mesh.kill(training.mesh.nodes[victim])

    async with trio.open_nursery() as killing:
        killing.start_soon(kill)
        await leader.run(STEPS)
    assert digest(training.final_weights(leader)) == undisturbed.weights
    assert training.validation_losses() == undisturbed.validation_losses
    assert leader.failover_count > 0
    assert leader.redone_count <= 2 * leader.failover_count + 1  # those since the step kept


@pytest.mark.parametrize("micro_batch", [0, 3, 5])
@pytest.mark.parametrize("position", [0, 1])
async def test_a_stage_that_dies_in_the_middle_of_a_validation_is_replaced(
    autojump_clock, undisturbed, training, position, micro_batch
):
    validated = 0

    async def compute_or_die(name, work, *arguments):
        nonlocal validated
        peer_id = leader.route[position].peer_id if leader.route else None
        is_victim = peer_id in training.mesh.nodes and training.mesh.nodes[peer_id].name == name
        if is_victim and work.__name__ == "infer" and len(training.reports) == 3:
            assert training.stages[peer_id]._run.worker._held == {}  # what was learned from is back
            validated += 1
            if validated == micro_batch + 1:
                training.mesh.kill(training.mesh.nodes[peer_id])
                await trio.sleep_forever()
        return await compute_here(work, *arguments)

    for name in ("a", "b", "c"):
        await training.add_stage(name, compute=partial(compute_or_die, name))
    leader = training.leader()
    await leader.run(STEPS)
    assert leader.failover_count == 1
    assert [report.step for report in training.reports] == [1, 2, 3, 3, 4, 5, 6]
    assert digest(training.final_weights(leader)) == undisturbed.weights
    assert training.validation_losses() == undisturbed.validation_losses


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ("backward", "does not go on"),
        ("apply", "does not make the step"),
        ("infer", "does not go on"),
    ],
)
async def test_a_stage_that_falls_silent_is_found_and_replaced(
    autojump_clock, undisturbed, training, at, reason
):
    """It keeps its connections, answers, and takes what it is sent: only the clock tells."""

    async def hang_in_the_fourth_step(work, *arguments):
        if len(training.reports) == 3 and work.__name__ == at:
            await trio.sleep_forever()
        return await compute_here(work, *arguments)

    await training.add_stage("b")
    silent = await training.add_stage("a", compute=hang_in_the_fourth_step)
    leader = training.leader()
    async with trio.open_nursery() as nursery:

        async def come_later():
            await trio.sleep(1)
            await training.add_stage("c")

        nursery.start_soon(come_later)
        await leader.run(STEPS)
    assert leader.failover_count == 1
    (failure,) = [words for words in training.told if "going on" in words]
    assert failure.startswith(f"{silent.peer_id.short} (blocks")
    assert reason in failure
    assert digest(training.final_weights(leader)) == undisturbed.weights


@pytest.mark.parametrize("at", ["forward", "infer"])
async def test_a_stage_that_sends_nonsense_is_replaced(autojump_clock, undisturbed, training, at):
    async def lie(work, *arguments):
        result = await compute_here(work, *arguments)
        if work.__name__ == at:
            result[-1][0, 0] = np.nan
        return result

    await training.add_stage("a")
    await training.add_stage("b", compute=lie)
    await training.add_stage("c")
    leader = training.leader()
    await leader.run(STEPS)
    assert 0 < leader.failover_count <= 2
    assert digest(training.final_weights(leader)) == undisturbed.weights


async def test_who_is_left_takes_over_what_it_has_room_for(autojump_clock, training):
    await training.add_stage("a", room=3)
    await training.add_stage("b")
    leader = training.leader()

    def kill_b(report):
        if report.step == 3 and len(leader.route) == 2:
            victims = [offer.peer_id for offer in leader.route]
            victim = next(one for one in victims if training.mesh.nodes[one].name == "b")
            training.mesh.kill(training.mesh.nodes[victim])

    leader._after_step = kill_b
    await leader.run(STEPS)
    (offer,) = leader.route
    assert (offer.first, offer.last) == (0, 2)
    assert leader.step == leader.kept_step == STEPS


async def test_it_stops_and_goes_on_another_day(autojump_clock, undisturbed, training):
    for name in ("a", "b"):
        await training.add_stage(name)
    leader = training.leader()
    leader._after_step = lambda report: report.step == 3 and leader.stop()
    await leader.run(STEPS)
    assert leader.step == leader.kept_step == 3
    # The devices have started anew as well, and one of them has lost its disk.
    for node in list(training.mesh.nodes.values()):
        training.mesh.kill(node)
    shutil.rmtree(training.folder / "b")
    for name in ("a", "b"):
        await training.add_stage(name)
    leader = training.leader()
    await leader.run(STEPS)
    assert [report.step for report in training.reports] == [4, 5, 6]
    assert digest(training.final_weights(leader)) == undisturbed.weights


@pytest.mark.parametrize("seed", range(4))
async def test_the_leader_may_die_at_any_moment_too(autojump_clock, undisturbed, training, seed):
    for name in ("a", "b"):
        await training.add_stage(name)
    rng = random.Random(seed)
    for _ in range(3):
        with trio.move_on_after(rng.uniform(0, 0.8 * undisturbed.duration_s)):
            await training.leader().run(STEPS)
    leader = training.leader()
    await leader.run(STEPS)
    assert digest(training.final_weights(leader)) == undisturbed.weights
    assert training.validation_losses() == undisturbed.validation_losses


async def test_float16_learns_nearly_the_same(autojump_clock, training):
    for name in ("a", "b"):
        await training.add_stage(name)
    leader = training.leader(codec="float16")
    await leader.run(STEPS)
    whole = Trainer(CONFIG, training.weights, optimizer=SETTINGS)
    for step in range(STEPS):
        whole.step(batches_at(step), learning_rate=rate_at(step))
    got = training.final_weights(leader)
    for name, values in whole.weights().items():
        moved = np.linalg.norm(values - training.weights[name])
        assert np.linalg.norm(got[name] - values) <= 0.02 * moved, name


async def test_wrong_numbers_show_in_the_validation_and_are_not_kept(autojump_clock, training):
    """They are finite; who stops goes back to before them."""

    async def lie(work, *arguments):
        result = await compute_here(work, *arguments)
        if len(training.reports) == 11 and work.__name__ in ("forward", "infer"):
            result[-1] *= -1
        return result

    def one_text(_step):
        return batches_at(0)

    await training.add_stage("a", compute=lie)
    await training.add_stage("b")
    leader = training.leader(validation_at=one_text)
    leader._batches_at = one_text
    leader._rate_at = lambda _step: 1e-2
    await leader.run(12)
    assert leader.is_doubtful
    assert sum("jumped" in words for words in training.told) == 1
    assert (leader.step, leader.kept_step) == (12, 10)
    leader = training.leader(validation_at=one_text)
    await leader.run(12)
    assert [report.step for report in training.reports] == [*range(1, 13), 11, 12]
    assert training.reports[-1].validation_loss < training.reports[9].validation_loss
    assert (leader.is_doubtful, leader.kept_step) == (False, 12)


async def test_it_counts_what_it_sends_and_receives(autojump_clock, training):
    for name in ("a", "b"):
        await training.add_stage(name)
    leader = training.leader()
    await leader.run(STEPS)
    taught = sum(tokens.size for step in range(STEPS) for tokens, _ in batches_at(step))
    checked = sum(tokens.size for step in range(1, STEPS + 1) for tokens, _ in validation_at(step))
    # Of a token hidden states go out and come in; if it is learned from, so do their gradients.
    rows_bytes = 4 * CONFIG.n_embd * (2 * taught + checked)
    assert leader.traffic.sent_bytes == rows_bytes
    states_bytes = sum(leader.snapshots.file(block, STEPS).stat().st_size for block in range(3))
    assert leader.traffic.received_bytes == pytest.approx(rows_bytes + 3 * states_bytes, rel=0.01)


async def test_without_devices_it_says_what_to_start(autojump_clock, training):
    with pytest.raises(NoRoute, match="up --train"):
        await training.leader().run(STEPS)
    await training.add_stage("a", room=1)
    await training.add_stage("b", room=1)
    with pytest.raises(NoRoute, match="room for 2 of 3 blocks"):
        await training.leader().run(STEPS)


async def test_a_damaged_state_is_no_place_to_go_on_from(autojump_clock, training):
    for name in ("a", "b"):
        await training.add_stage(name)
    leader = training.leader()
    await leader.run(2)
    file = leader.snapshots.file(0, 2)
    file.write_bytes(file.read_bytes()[:-1])
    for name in ("a", "b"):
        shutil.rmtree(training.folder / name)
    with pytest.raises(HopFailed, match="damaged"):
        await training.leader().run(STEPS)
    (training.folder / "out" / "pipeline.json").write_text("{}")
    with pytest.raises(LearningFailed, match="is damaged"):
        await training.leader().run(STEPS)


# --- What a stage takes from strangers -----------------------------------------------------------

RUN = bytes(16)
OPTIMIZER = WireOptimizer.of(SETTINGS)


async def refused(peer, request):
    with pytest.raises(RequestRefused) as caught:
        await peer.call(STAGE, request)
    return caught.value


async def test_a_stage_serves_one_training_and_no_more_than_it_has_room_for(
    autojump_clock, training
):
    stage = await training.add_stage("a")
    ours = await training.mesh.node("ours").connect(stage.peer_id)
    theirs = await training.mesh.node("theirs").connect(stage.peer_id)
    good = Assign(RUN, MODEL, 0, 1, 0, (), OPTIMIZER)
    for change, code in (
        ({"model_hash": "f" * 64}, "model"),
        ({"last": 2}, "room"),
        ({"first": 3, "last": 3}, "blocks"),
        ({"first": 1, "last": 0}, "blocks"),
        ({"digests": ("f" * 64,)}, "digests"),
        ({"optimizer": structs.replace(OPTIMIZER, beta1=2.0)}, "failed"),
        ({"step": 1, "digests": ("f" * 64,) * 2}, "call-failed"),  # nobody has that state
    ):
        assert (await refused(ours, structs.replace(good, **change))).code == code
    assert (await ours.call(STAGE, AskStage())).is_free
    await ours.call(STAGE, good)
    assert not (await theirs.call(STAGE, AskStage())).is_free
    assert (await refused(theirs, good)).code == "busy"
    assert (await refused(theirs, Release(RUN))).code == "unknown"
    assert (await refused(ours, Keep(RUN, 1))).code == "step"
    await trio.sleep(stage_module.IDLE_S + 1)
    await theirs.call(STAGE, structs.replace(good, run=bytes(15) + b"2"))
    assert (await refused(ours, Keep(RUN, 0))).code == "unknown"


async def test_a_pipeline_has_to_end_where_it_began(autojump_clock, training):
    stage = await training.add_stage("a", room=3)
    me, other = training.mesh.node("me"), training.mesh.node("other")
    peer = await me.connect(stage.peer_id)
    await peer.call(STAGE, Assign(RUN, MODEL, 0, 2, 0, (), OPTIMIZER))
    own, elsewhere = Hop(stage.peer_id.key, 0, 2), Hop(other.peer_id.key, 3, 3)
    for route, reason in (
        ((own, elsewhere), "has to end where it began"),
        ((own,), "has to end where it began"),
        ((Hop(stage.peer_id.key, 0, 1), Hop(me.peer_id.key, 3, 3)), "other blocks"),
        ((own, Hop(me.peer_id.key, 3, 3)), "can't be reached"),  # we answer no pipeline
    ):
        request = OpenPipeline(RUN, 0, route, 0, 1, "float32", 10.0)
        async with peer.start_call(PIPELINE, request) as call:
            answer, _ = await call.receive()
        assert isinstance(answer, SessionFailed)
        assert reason in answer.reason
