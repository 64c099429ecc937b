"""Two peers learning together: equal bits on both sides, or an error that says why not."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import trio

from llmload.config import GPT2Config
from llmload.errors import LearningFailed
from llmload.learn import exchange
from llmload.learn.exchange import (
    LEARN_PROTOCOL,
    AcceptLearning,
    LearningPartner,
    LearningResult,
    ProposeLearning,
    learn_with,
)
from llmload.learn.gossip import mean_in_order
from llmload.learn.shards import Codec, ShardHeader
from llmload.learn.trainer import AdamWSettings, Trainer, batches
from natswarm import MessageStream

sys.path.append(str(Path(__file__).parent))
from fake_mesh import FakeMesh

CONFIG = GPT2Config(vocab_size=40, n_ctx=16, n_embd=16, n_layer=1, n_head=2)
# Nothing here takes a second: who waits longer hangs.
IMPATIENT_S = 10.0


def make_trainer(trained_looking_weights, seed: int = 1, **settings) -> Trainer:
    weights = trained_looking_weights(CONFIG, seed)
    return Trainer(CONFIG, weights, optimizer=AdamWSettings(**settings))


def text(seed: int):
    rng = np.random.default_rng(seed)
    return batches(rng.integers(CONFIG.vocab_size, size=200), batch=2, time=8, rng=rng)


class Pair:
    """An initiator and a partner, each with its trainer and its text."""

    def __init__(self, nursery, trainers, *, codec=Codec.INT8X256, **partner_options) -> None:
        self.mesh = FakeMesh(nursery)
        self.ours, self.theirs = trainers
        self.node, self.other = self.mesh.node("initiator"), self.mesh.node("partner")
        self.codec = codec
        options = {"round_timeout_s": IMPATIENT_S} | partner_options
        self.partner = LearningPartner(self.other, self.theirs, text(2), codec=codec, **options)
        self.partner.start()

    async def learn(self, rounds: int = 3, *, batches=None, **options) -> LearningResult:
        peer = await self.node.connect(self.other.peer_id)
        options = {"codec": self.codec, "round_timeout_s": IMPATIENT_S} | options
        return await learn_with(self.node, peer, self.ours, batches or text(1), rounds, **options)

    async def partner_outcome(self):
        await self.mesh.wait_quiet()
        return self.partner.outcomes[-1]


@pytest.fixture
def pair(nursery, trained_looking_weights):
    def make(*, ours=None, theirs=None, **options) -> Pair:
        trainers = [
            make_trainer(trained_looking_weights, **(each or {})) for each in (ours, theirs)
        ]
        return Pair(nursery, trainers, **options)

    return make


# --- When all goes well ------------------------------------------------------------------------


async def test_both_end_with_the_bits_of_averaging_in_one_process(pair, trained_looking_weights):
    learning = pair(codec=Codec.FP32)
    result = await learning.learn(rounds=3)
    other = await learning.partner_outcome()

    alone = make_trainer(trained_looking_weights)
    texts = {learning.node.peer_id: text(1), learning.other.peer_id: text(2)}
    for _ in range(3):
        gradients = [alone.gradients(*next(texts[peer]))[1] for peer in sorted(texts)]
        alone.apply(mean_in_order(gradients))

    assert learning.ours.parameters.tobytes() == alone.parameters.tobytes()
    assert learning.theirs.parameters.tobytes() == alone.parameters.tobytes()
    assert result.weights_equal
    assert result.weights_hash == other.weights_hash
    assert result.peer_id == learning.other.peer_id
    assert other.peer_id == learning.node.peer_id


@pytest.mark.parametrize("codec", list(Codec))
async def test_bits_are_equal_whatever_the_codec(pair, codec):
    learning = pair(codec=codec)
    before = learning.ours.parameters.copy()
    result = await learning.learn(rounds=2)
    other = await learning.partner_outcome()
    assert learning.ours.parameters.tobytes() == learning.theirs.parameters.tobytes()
    assert not np.array_equal(learning.ours.parameters, before)
    for mine, yours in zip(result.rounds, other.rounds, strict=True):
        assert (mine.loss, mine.peer_loss) == (yours.peer_loss, yours.loss)
        assert (mine.sent_bytes, mine.received_bytes) == (yours.received_bytes, yours.sent_bytes)
        assert mine.sent_bytes == codec.payload_bytes(learning.ours.space.size)
        assert mine.averaged_shard_count == mine.shard_count == 1
    assert result.sent_bytes == 2 * result.rounds[0].sent_bytes
    assert result.received_bytes == other.sent_bytes


async def test_many_shards_go_both_ways(pair, monkeypatch):
    monkeypatch.setattr(
        exchange, "ShardLayout", lambda space: exchange_layout(space, shard_value_count=100)
    )
    learning = pair()
    result = await learning.learn(rounds=1)
    (report,) = result.rounds
    assert report.averaged_shard_count == report.shard_count > 40
    assert isinstance(await learning.partner_outcome(), LearningResult)


exchange_layout = exchange.ShardLayout


async def test_both_get_better_at_both_texts(pair):
    learning = pair(ours={"learning_rate": 1e-2}, theirs={"learning_rate": 1e-2})
    ours, theirs = next(text(1)), next(text(2))
    reports = []
    result = await learning.learn(
        rounds=12, batches=itertools.repeat(ours), on_round=reports.append
    )
    assert tuple(reports) == result.rounds
    assert [report.index for report in reports] == list(range(12))
    assert result.loss_before == reports[0].loss
    assert result.loss_after < 0.8 * result.loss_before
    assert learning.ours.loss(*theirs) == learning.theirs.loss(*theirs)


async def test_partner_learns_again_and_again(pair):
    learning = pair()
    for _ in range(2):
        await learning.learn(rounds=1)
    await learning.mesh.wait_quiet()
    assert [type(outcome) for outcome in learning.partner.outcomes] == [LearningResult] * 2


# --- When the other side says no ---------------------------------------------------------------


async def test_other_weights_are_refused(pair):
    learning = pair(theirs={"seed": 2})
    with pytest.raises(LearningFailed, match="does not learn with us: its weights are not ours"):
        await learning.learn()
    await learning.mesh.wait_quiet()
    assert not learning.partner.outcomes


async def test_other_model_is_refused(nursery, trained_looking_weights):
    other = GPT2Config(vocab_size=40, n_ctx=16, n_embd=16, n_layer=2, n_head=2)
    trainers = (
        make_trainer(trained_looking_weights),
        Trainer(other, trained_looking_weights(other, 1)),
    )
    with pytest.raises(LearningFailed, match="its model has another shape"):
        await Pair(nursery, trainers).learn()


async def test_too_many_rounds_are_refused(pair):
    with pytest.raises(LearningFailed, match="at most 2 rounds at a time"):
        await pair(round_count_max=2).learn(rounds=3)


async def test_who_learns_with_somebody_is_busy(pair):
    learning = pair()
    stranger = learning.mesh.node("stranger")
    peer = await stranger.connect(learning.other.peer_id)
    async with MessageStream(await peer.open_stream(LEARN_PROTOCOL)) as held:
        layout = exchange.ShardLayout(learning.ours.space)
        weights = await exchange._weights_hash(learning.ours)
        await held.call(ProposeLearning(layout.hash, weights, 1), AcceptLearning)
        with pytest.raises(LearningFailed, match="learning with somebody else"):
            await learning.learn()
    assert isinstance(await learning.partner_outcome(), LearningFailed)
    await learning.learn(rounds=1)


async def test_peer_that_does_not_learn_is_a_clear_error(pair):
    learning = pair()
    del learning.other.handlers[LEARN_PROTOCOL]
    with pytest.raises(LearningFailed, match="did not answer whether it learns"):
        await learning.learn()


async def test_no_rounds_are_a_mistake(pair):
    with pytest.raises(ValueError, match="rounds must be positive"):
        await pair().learn(rounds=0)


# --- When something goes wrong on the way ------------------------------------------------------


async def test_other_settings_are_found_out_after_a_round(pair):
    learning = pair(theirs={"learning_rate": 1e-4})
    with pytest.raises(LearningFailed, match=r"round 0: the weights of .* are not ours"):
        await learning.learn()
    assert "weights" in str(await learning.partner_outcome())


async def test_text_that_ends_is_told_to_the_peer(pair):
    learning = pair()
    with pytest.raises(LearningFailed, match="our own text ended before round 2"):
        await learning.learn(batches=itertools.islice(text(1), 2))
    outcome = await learning.partner_outcome()
    assert "stopped learning: our own text ended" in str(outcome)
    assert learning.ours.parameters.tobytes() == learning.theirs.parameters.tobytes()


async def test_gradient_that_is_not_finite_stays_at_home(pair, monkeypatch):
    learning = pair()
    before = learning.theirs.parameters.copy()

    def explode(tokens, targets):
        return 1.0, np.full(learning.ours.space.size, np.nan, dtype=np.float32)

    monkeypatch.setattr(learning.ours, "gradients", explode)
    with pytest.raises(LearningFailed, match="our own gradient can't be sent"):
        await learning.learn()
    assert "can't be sent" in str(await learning.partner_outcome())
    assert np.array_equal(learning.theirs.parameters, before)


@pytest.mark.parametrize("cut_bytes", [0, 5])
async def test_stream_cut_anywhere_is_an_error_or_came_too_late(pair, cut_bytes):
    failed_count = 0
    for send in itertools.count():
        learning = pair()
        learning.mesh.cut_at_send, learning.mesh.cut_bytes = send, cut_bytes
        outcomes = []
        try:
            outcomes.append(await learning.learn(rounds=2))
        except LearningFailed as failure:
            outcomes.append(failure)
        await learning.mesh.wait_quiet()
        assert learning.partner._learning_with is None
        outcomes += learning.partner.outcomes
        if learning.mesh.send_count <= send:
            break  # they were done before
        if any(isinstance(outcome, LearningFailed) for outcome in outcomes):
            failed_count += 1
        else:  # cut after both had said that they are done
            assert len(outcomes) == 2
            assert np.array_equal(learning.ours.parameters, learning.theirs.parameters)
    # The greeting takes 2 sends; shards, receipts and RoundDone take at least 4 a side and round.
    assert failed_count >= 2 + 2 * 2 * 4 - 1


def make_liar(learning: Pair, lie) -> None:
    """Let the partner accept, do what `lie` does, and then only listen."""

    async def handle(stream, peer):
        async with MessageStream(stream) as messages:
            await messages.receive(ProposeLearning)
            await messages.send(AcceptLearning())
            await lie(messages)
            async for _ in stream:
                pass

    learning.other.serve(LEARN_PROTOCOL, handle)


async def do_nothing(messages: MessageStream) -> None:
    await trio.lowlevel.checkpoint()


async def test_silent_peer_ends_the_round_at_its_deadline(pair):
    learning = pair()
    before = learning.ours.parameters.copy()
    make_liar(learning, do_nothing)
    with pytest.raises(
        LearningFailed, match=r"round 0: 1 of 1 shards of .* did not come in 0\.1 s"
    ):
        await learning.learn(round_timeout_s=0.1)
    assert np.array_equal(learning.ours.parameters, before)
    await learning.mesh.wait_quiet()


async def test_damaged_shards_are_not_averaged(pair):
    learning = pair()
    before = learning.ours.parameters.copy()

    async def send_garbage(messages):
        header, payload = await messages.receive(ShardHeader)
        not_a_number = np.float16(np.nan).tobytes()
        await messages.send(header, not_a_number + payload[2:])

    make_liar(learning, send_garbage)
    with pytest.raises(LearningFailed, match=r"1 of 1 shards .*1 were damaged.*was not made"):
        await learning.learn(round_timeout_s=0.2)
    assert np.array_equal(learning.ours.parameters, before)


async def test_peer_that_sends_nonsense_is_a_clear_error(pair):
    learning = pair()

    async def send_nonsense(messages):
        await messages.send(AcceptLearning())

    make_liar(learning, send_nonsense)
    with pytest.raises(LearningFailed, match=r"lost .* while learning: a message is not what"):
        await learning.learn()


async def test_cancelled_initiator_leaves_a_partner_that_is_free_again(pair):
    learning = pair()
    with trio.CancelScope() as scope:
        await learning.learn(rounds=100, on_round=lambda report: scope.cancel())
    assert scope.cancelled_caught
    assert isinstance(await learning.partner_outcome(), LearningFailed)
    assert learning.partner._learning_with is None


async def test_peer_that_vanishes_is_a_clear_error(pair):
    learning = pair()

    def vanish(report):
        learning.mesh.kill(learning.other)

    with pytest.raises(LearningFailed, match=r"lost .* while learning"):
        await learning.learn(rounds=100, on_round=vanish)
    assert isinstance(await learning.partner_outcome(), LearningFailed)
