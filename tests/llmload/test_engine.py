"""Engines, caches and generation: splits do not show, mistakes are named, memory is bounded."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from llmload import reference
from llmload.config import GPT2Config
from llmload.engine.generate import generate_tokens
from llmload.engine.kv_cache import CachePool, KVCache, cache_bytes
from llmload.engine.sampler import SamplingParameters, sample
from llmload.engine.session import BatchStep, StageEngine
from llmload.errors import CacheFull, PromptTooLong, StageFailed

PROMPT = [5, 17, 3, 250, 17]


@pytest.fixture(scope="module")
def without_eos(config):
    """Random weights may well choose the end of the document; these tests count tokens."""
    return dataclasses.replace(config, eos_token_id=None)


@pytest.fixture(scope="module")
def whole(without_eos, weights):
    return StageEngine(without_eos, weights)


@pytest.fixture(scope="module")
def thirds(without_eos, weights):
    return [StageEngine(without_eos, weights, range(i, i + 1)) for i in range(3)]


@pytest.fixture(scope="module")
def halves(without_eos, weights):
    return [StageEngine(without_eos, weights, blocks) for blocks in (range(1), range(1, 3))]


def test_greedy_answer_does_not_depend_on_the_split(config, weights, whole, halves, thirds):
    expected = reference.generate_greedily(config, weights, PROMPT, 64)
    assert len(set(expected)) > 3  # a loop of one token would prove little
    for stages in ([whole], halves, thirds):
        assert list(generate_tokens(stages, PROMPT, max_new_tokens=64)) == expected


def test_sampled_answer_does_not_depend_on_the_split(whole, halves, thirds):
    sampling = SamplingParameters(temperature=0.9, top_k=50, top_p=0.95, seed=11)
    answers = [
        list(generate_tokens(stages, PROMPT, sampling=sampling, max_new_tokens=40))
        for stages in ([whole], halves, thirds, [whole])
    ]
    assert answers == [answers[0]] * 4
    other = SamplingParameters(temperature=0.9, top_k=50, top_p=0.95, seed=12)
    assert answers[0] != list(generate_tokens([whole], PROMPT, sampling=other, max_new_tokens=40))


def test_a_draw_belongs_to_the_position_of_its_token(config, weights, whole):
    """Anybody who knows seed, tokens and positions can repeat a step: here the reference does."""
    sampling = SamplingParameters(temperature=1.0, seed=9)
    tokens = PROMPT + list(generate_tokens([whole], PROMPT, sampling=sampling, max_new_tokens=20))
    logits, _ = reference.forward(config, weights, np.array([tokens]))
    for position in range(len(PROMPT), len(tokens)):
        assert sample(logits[0, position - 1], sampling, position) == tokens[position]


def test_generation_ends_at_the_context_or_at_eos(config, weights, whole):
    answer = list(generate_tokens([whole], PROMPT))
    assert len(PROMPT) + len(answer) == config.n_ctx
    assert list(generate_tokens([whole], PROMPT, max_new_tokens=0)) == []
    # Declare the fifth token of the answer to be the end of the document.
    ending = dataclasses.replace(config, eos_token_id=answer[4])
    cut = answer[: answer.index(answer[4])]
    assert list(generate_tokens([StageEngine(ending, weights)], PROMPT)) == cut


def test_prompt_must_leave_room(whole):
    assert len(list(generate_tokens([whole], [1] * 95))) == 1
    with pytest.raises(PromptTooLong, match=r"96 tokens .* holds 96.* by 1 tokens or more"):
        generate_tokens([whole], [1] * 96)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate_tokens([whole], [])


def test_stages_must_be_one_model(config, weights, halves, thirds):
    other = StageEngine(config, weights, range(1, 3))  # its configuration has an eos token
    for stages in ([], halves[:1], halves[1:], halves[::-1], [*halves, thirds[2]]):
        with pytest.raises(ValueError, match="stages"):
            generate_tokens(stages, PROMPT)
    with pytest.raises(ValueError, match="different models"):
        generate_tokens([halves[0], other], PROMPT)


def test_logits_of_as_many_positions_as_wanted(whole):
    tokens = np.array([PROMPT])
    everything = whole.run(tokens, whole.new_cache(), logits_count=99)
    assert everything.shape == (1, 5, 300)
    for count in (1, 3, 5):
        some = whole.run(tokens, whole.new_cache(), logits_count=count)
        np.testing.assert_allclose(some, everything[:, -count:], rtol=0, atol=1e-5)


def test_truncated_cache_forgets(whole):
    """A guess is taken back: the result is as if the wrong tokens had never been there."""
    cache = whole.new_cache()
    whole.run(np.array([PROMPT]), cache)
    before = [array.copy() for array in cache.arrays]
    expected = whole.run(np.array([[8]]), cache)
    cache.truncate(len(PROMPT))
    whole.run(np.array([[9, 9, 9]]), cache)
    cache.truncate(len(PROMPT))
    assert cache.position == len(PROMPT)
    for array, old in zip(cache.arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)
    np.testing.assert_array_equal(whole.run(np.array([[8]]), cache), expected)
    for position in (-1, len(PROMPT) + 2):
        with pytest.raises(ValueError, match="not in"):
            cache.truncate(position)


def test_engine_names_what_does_not_fit(config, weights, whole, thirds):
    hidden = np.zeros((1, 2, config.n_embd), dtype=np.float32)
    mistakes = [
        (whole, np.array([[1, 300]]), r"0\.\.299"),
        (whole, np.array([[-1]]), r"0\.\.299"),  # ONNX alone would take it for the last row
        (whole, np.array([[1.0]]), "integers"),
        (whole, np.array([1]), "shape"),
        (whole, np.zeros((1, 0), dtype=np.int64), "at least one"),
        (whole, np.zeros((1, 97), dtype=np.int64), "at most 96"),
        (whole, np.zeros((2, 1), dtype=np.int64), "shape"),
        (whole, hidden, "shape"),
        (thirds[1], np.array([[1]]), "shape"),
        (thirds[1], hidden[:, :, 1:], "shape"),
    ]
    for engine, x, complaint in mistakes:
        cache = engine.new_cache()
        with pytest.raises(ValueError, match=complaint):
            engine.run(x, cache)
        assert cache.position == 0
    with pytest.raises(ValueError, match="the cache is one of"):
        thirds[1].run(hidden, thirds[2].new_cache())
    with pytest.raises(ValueError, match="logits_count"):
        whole.run(np.array([[1]]), whole.new_cache(), logits_count=0)
    with pytest.raises(ValueError, match=r"ln_f\.bias must be float32 \(32,\), it is missing"):
        StageEngine(config, {n: w for n, w in weights.items() if n != "ln_f.bias"})
    with pytest.raises(ValueError, match="it is float64"):
        StageEngine(config, reference.as_type(weights, np.float64))
    with pytest.raises(ValueError, match="intra_op_threads"):
        StageEngine(config, weights, intra_op_threads=0)


def test_failure_of_the_runtime_is_a_stage_failure(whole, monkeypatch):
    def fail(binding):
        raise MemoryError("no room")

    cache = whole.new_cache()
    session = whole._session
    broken = SimpleNamespace(io_binding=session.io_binding, run_with_iobinding=fail)
    monkeypatch.setattr(whole, "_session", broken)
    with pytest.raises(StageFailed, match=r"range\(0, 3\) failed .* no room"):
        whole.run(np.array([[1]]), cache)
    assert cache.position == 0


def test_one_engine_serves_several_threads(whole):
    expected = list(generate_tokens([whole], PROMPT, max_new_tokens=20))
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(
            lambda _: list(generate_tokens([whole], PROMPT, max_new_tokens=20)), range(8)
        )
        assert list(answers) == [expected] * 8


# --- Memory ------------------------------------------------------------------------------------


def test_cache_size_is_what_it_says(config, whole):
    cache = whole.new_cache(batch=2)
    whole.run(np.ones((2, 7), dtype=np.int64), cache)
    assert cache.byte_size == sum(array.nbytes for array in cache.arrays)
    assert cache.byte_size == cache_bytes(config, config.blocks, 2, 7)
    assert (cache.position, cache.room) == (7, 89)
    cache.truncate(2)
    assert cache.byte_size == cache_bytes(config, config.blocks, 2, 7)  # it still has the memory


def test_slots_of_an_arena_are_taken_and_come_back(config, whole):
    arena = whole.new_arena(3)
    caches = [arena.new_cache() for _ in range(3)]
    with pytest.raises(CacheFull, match="all 3 slots"):
        arena.new_cache()
    whole.run_batch([BatchStep(np.array(PROMPT), cache) for cache in caches])
    del caches[1]
    assert arena.free_count == 1
    again = arena.new_cache()
    assert (again.first_slot, again.position) == (1, 0)
    with pytest.raises(ValueError, match="room for 96"):
        again.advance(97)
    # The neighbours did not notice; the new sequence is as if it were the first of its slot.
    first, fresh = whole.run_batch(
        [BatchStep(np.array([8]), caches[0]), BatchStep(np.array([*PROMPT, 8]), again)]
    )
    np.testing.assert_allclose(first, fresh, rtol=0, atol=1e-5)


def test_a_batch_is_refused_as_a_whole(whole, thirds):
    arena = whole.new_arena(2)
    good, other = arena.new_cache(), arena.new_cache()
    one = np.array([1])
    for steps, complaint in (
        ([BatchStep(one, good), BatchStep(np.array([300]), other)], r"0\.\.299"),
        ([BatchStep(one, good), BatchStep(one, good)], "same cache"),
        ([BatchStep(one, good), BatchStep(one, whole.new_cache(batch=2))], "one sequence"),
        ([BatchStep(one, good), BatchStep(one, other, 0)], "logits_count"),
        ([BatchStep(one, thirds[1].new_cache())], "the cache is one of"),
    ):
        with pytest.raises(ValueError, match=complaint):
            whole.run_batch(steps)
        assert good.position == other.position == 0
    assert whole.run_batch([]) == []


ROW_BYTES = cache_bytes(
    GPT2Config(vocab_size=2, n_ctx=9, n_embd=2, n_layer=1, n_head=1), range(1), 1, 1
)


class PoolMachine(RuleBasedStateMachine):
    """Any order of opening, stepping and closing keeps the pool within its bound."""

    keys = Bundle("keys")

    def __init__(self):
        super().__init__()
        self.config = GPT2Config(vocab_size=2, n_ctx=9, n_embd=2, n_layer=1, n_head=1)
        self.pool = CachePool(max_bytes=20 * ROW_BYTES)
        self.borrowed = {}  # key -> (context manager, cache, growth)

    def fake_step(self, cache, growth):
        cache.advance(growth)

    @rule(target=keys, key=st.integers(0, 9))
    def open(self, key):
        if key not in self.pool:
            self.pool.open(key, KVCache(self.config, range(1)))
        return key

    @rule(key=keys, growth=st.integers(0, 9))
    def borrow(self, key, growth):
        if key in self.borrowed:
            with pytest.raises(ValueError, match="in use"), self.pool.borrow(key, growth):
                pass
            return
        lending = self.pool.borrow(key, growth)
        known = key in self.pool
        try:
            cache = lending.__enter__()
        except KeyError:
            assert not known
            return
        except CacheFull:
            assert key in self.pool
            return
        self.borrowed[key] = (lending, cache, min(growth, cache.room))

    @rule(key=keys)
    def give_back(self, key):
        if key in self.borrowed:
            lending, cache, growth = self.borrowed.pop(key)
            self.fake_step(cache, growth)
            lending.__exit__(None, None, None)

    @rule(key=keys)
    def close(self, key):
        self.pool.close(key)
        assert (key in self.pool) == (key in self.borrowed)

    @invariant()
    def within_its_bound(self):
        assert self.pool.byte_size <= self.pool.max_bytes
        assert all(key in self.pool for key in self.borrowed)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30)


def test_pool_evicts_what_was_idle_longest(config):
    row = cache_bytes(config, range(1), 1, 1)
    pool = CachePool(max_bytes=10 * row)

    def step(key, growth):
        with pool.borrow(key, growth) as cache:
            cache.advance(growth)

    for key in "abc":
        pool.open(key, KVCache(config, range(1)))
        step(key, 3)
    step("a", 1)  # 4 + 3 + 3 rows: full, and b is idle for longest
    step("c", 1)
    assert [key in pool for key in "abc"] == [True, False, True]
    assert (pool.evicted_count, pool.byte_size, len(pool)) == (1, 8 * row, 2)
    with pytest.raises(KeyError), pool.borrow("b", 1):
        pass
    with pytest.raises(CacheFull, match="do not fit"), pool.borrow("a", 7):
        pass
    assert len(pool) == 2  # what can't work anyway evicts nobody
    with pool.borrow("a", 2), pytest.raises(CacheFull), pool.borrow("c", 1):
        pass
    with pytest.raises(ValueError, match="already"):
        pool.open("a", KVCache(config, range(1)))
