"""The whole system on the kernel's NAT: real processes puncture, connect and write a text.

How often that succeeds is measured by `python -m tools.lab.repeat`; here each pair runs once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from llmload import SamplingParameters, StageEngine, bundled_model_path, generate_tokens, load_model
from natswarm.lab.nat import KernelNat, NatKind
from tools.lab.pair import PROMPT, TOKEN_COUNT, PairReport, run_pair
from tools.lab.repeat import PAIRS

pytestmark = pytest.mark.lab

PRESERVING = KernelNat(NatKind.PRESERVING)
POISONABLE = KernelNat(NatKind.PRESERVING, is_poisonable=True)
LOST = 0.99
# A pair and the loss of its core.
RUNS = (
    *((a, b, 0.0) for a, b in PAIRS[1:]),
    (PRESERVING, PRESERVING, LOST),
    (POISONABLE, POISONABLE, 0.0),
)
# Each waits half of its time; more at once than cores would only be slower.
AT_ONCE = 5

ReportOf = Callable[..., PairReport]


@pytest.fixture(scope="module")
def report_of(capable_machine: None) -> Iterator[ReportOf]:
    """Run all pairs, several at once, each in a lab of its own; return the report of one."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        reports = {run: pool.submit(run_pair, *run[:2], seed=1, loss=run[2]) for run in RUNS}
        yield lambda a, b, loss=0.0: reports[a, b, loss].result()


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
def test_devices_behind_nats_write_a_text_together(report_of: ReportOf, a: KernelNat, b: KernelNat):
    report = report_of(a, b)
    print(report)
    assert report.is_ok, report
    assert report.strategy
    assert report.probes_a
    assert report.probes_b
    assert report.answer == answer_of_the_whole_model()
    assert not report.complaints


def test_a_pair_that_cannot_work_says_why(report_of: ReportOf):
    report = report_of(PRESERVING, PRESERVING, LOST)
    assert not report.is_ok
    assert "observer" in report.reason


def test_devices_behind_poisonable_routers_connect(report_of: ReportOf):
    report = report_of(POISONABLE, POISONABLE)
    assert report.is_ok, report
