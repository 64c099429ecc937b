"""A small model guesses: the answer stays that of plain decoding, and trips are saved."""

from __future__ import annotations

import pytest
from fake_mesh import compute_here

from llmload.config import GPT2Config
from llmload.engine.generate import generate_tokens
from llmload.engine.sampler import SamplingParameters
from llmload.engine.session import StageEngine
from llmload.errors import ModelFolderError, StageFailed
from llmload.model_folder import load_model, save_config
from llmload.swarm.client import SwarmClient
from llmload.swarm.draft import Drafter, DraftModel, open_draft
from llmload.swarm.speculate import GuessCount
from llmload.tokenizer import byte_tokenizer
from llmload.weights import save_weights

PROMPT = [5, 17, 3, 250, 17]
GREEDY = SamplingParameters(temperature=0)
SAMPLED = SamplingParameters(temperature=0.9, top_k=50, top_p=0.95, seed=11)


@pytest.fixture(scope="session")
def other_engine(trained_looking_weights):
    """A smaller model with the same tokens, and another opinion; its context is short."""
    config = GPT2Config(vocab_size=300, n_ctx=40, n_embd=16, n_layer=1, n_head=2)
    return StageEngine(config, trained_looking_weights(config, 3))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("is_good", [True, False], ids=["good", "bad"])
async def test_the_answer_is_that_of_plain_decoding(
    autojump_clock, pipeline, engines, other_engine, config, model, sampling, is_good, monkeypatch
):
    monkeypatch.setattr(GuessCount, "best", lambda self: 4 if self._trip_s else 0)
    whole = engines[config.blocks]
    expected = list(generate_tokens([whole], PROMPT, sampling=sampling, max_new_tokens=60))
    swarm = pipeline(3)
    draft = DraftModel(whole if is_good else other_engine, compute_here)
    client = SwarmClient(swarm.mesh.node("drafter"), model, draft=draft)
    async with client.generate(PROMPT, sampling=sampling, max_new_tokens=60) as answer:
        assert [token.token_id async for token in answer] == expected
        statistics = answer.statistics()
    assert statistics.trip_count == 60 - statistics.accepted_count
    if is_good:
        # Two trips show how long one takes, then each brings five tokens.
        assert statistics.trip_count == 2 + 12
        assert statistics.guess_count == statistics.accepted_count == 46
    else:
        assert statistics.guess_count > 3 * statistics.accepted_count
    await swarm.check_nothing_is_left()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_wrong_guesses_are_forgotten(autojump_clock, engines, config, sampling):
    whole = engines[config.blocks]
    expected = list(generate_tokens([whole], PROMPT, sampling=sampling, max_new_tokens=20))
    drafter = Drafter(DraftModel(whole, compute_here), sampling)
    await drafter.read(PROMPT)
    assert await drafter.guess(PROMPT, 6) == expected[:6]
    # The sequence went on otherwise, and then as it was guessed.
    await drafter.guess([*PROMPT, 9, 9], 3)
    assert await drafter.guess([*PROMPT, *expected[:8]], 5) == expected[8:13]
    assert await drafter.guess(PROMPT, 0) == []


async def test_guesses_end_with_the_context_of_the_draft(autojump_clock, other_engine):
    drafter = Drafter(DraftModel(other_engine, compute_here), GREEDY)
    assert len(await drafter.guess([7] * 38, 9)) == 3
    assert len(await drafter.guess([7] * 40, 9)) == 1
    assert await drafter.guess([7] * 41, 9) == []


async def test_draft_that_fails_guesses_nothing(autojump_clock, other_engine, monkeypatch):
    def fail(*_):
        raise StageFailed("no room")

    drafter = Drafter(DraftModel(other_engine, compute_here), GREEDY)
    expected = await drafter.guess(PROMPT, 3)
    with monkeypatch.context() as patch:
        patch.setattr(StageEngine, "run", fail)
        assert await drafter.guess([*PROMPT, 1], 3) == []
    assert await drafter.guess(PROMPT, 3) == expected


def test_draft_must_have_the_same_tokens(model_folder, tmp_path, config, weights):
    model = load_model(model_folder)
    assert open_draft(model_folder, model).engine.blocks == config.blocks
    other = tmp_path / "other"
    save_config(other, config)
    save_weights(other, weights)
    (other / "tokenizer.json").write_text(byte_tokenizer().to_json())
    with pytest.raises(ModelFolderError, match="other tokens than model"):
        open_draft(other, model)
