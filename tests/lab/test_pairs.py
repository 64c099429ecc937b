"""The whole system on the kernel's NAT: real processes puncture, connect and write a text.

How often that succeeds is measured by `python -m tools.lab.repeat`; here each pair runs once.
"""

from __future__ import annotations

import functools
from itertools import islice

import pytest

from llmload import SamplingParameters, StageEngine, bundled_model_path, generate_tokens, load_model
from natswarm.lab.nat import KernelNat, NatKind
from tools.lab.pair import PROMPT, TOKEN_COUNT, run_pair
from tools.lab.repeat import PAIRS

pytestmark = pytest.mark.lab


@functools.cache
def answer_of_the_whole_model() -> str:
    model = load_model(bundled_model_path())
    tokens = generate_tokens(
        [StageEngine(model.config, model.weights)],
        model.tokenizer.encode(PROMPT),
        sampling=SamplingParameters(temperature=0),
    )
    return model.tokenizer.decode(list(islice(tokens, TOKEN_COUNT)))


@pytest.mark.parametrize(("a", "b"), PAIRS[1:], ids=lambda nat: nat.kind.value)
def test_devices_behind_nats_write_a_text_together(a: KernelNat, b: KernelNat):
    report = run_pair(a, b, seed=1)
    print(report)
    assert report.is_ok, report
    assert report.strategy
    assert report.probes_a
    assert report.probes_b
    assert report.answer == answer_of_the_whole_model()
    assert not report.complaints


def test_a_pair_that_cannot_work_says_why():
    nat = KernelNat(NatKind.PRESERVING)
    report = run_pair(nat, nat, seed=1, loss=0.99)
    assert not report.is_ok
    assert "observer" in report.reason


def test_devices_behind_poisonable_routers_connect():
    nat = KernelNat(NatKind.PRESERVING, is_poisonable=True)
    report = run_pair(nat, nat, seed=1)
    assert report.is_ok, report
