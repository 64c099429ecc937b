"""The scheduler of scripts: retries, silence, and what cannot be sent."""

from __future__ import annotations

import random

import pytest
from laboratory import Laboratory

from natswarm.nat.asking import RETRY_AFTER_S, Answer, AskingTest, Script
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.findings import Findings
from natswarm.nat.hairpinning import HairpinningTest
from natswarm.nat.lifetime import LifetimeTest
from natswarm.nat.measurement import SendEcho
from natswarm.nat.poison import PoisonTest
from natswarm.nat.quota import QuotaTest
from natswarm.nat.tftp_helper import TftpHelperTest
from natswarm.sim.nat_behaviour import NatBehaviour


class OneQuestion(AskingTest):
    def __init__(self, findings: Findings, ports: range, rng: random.Random, now: float) -> None:
        super().__init__(findings, ports, rng, now)
        self.answers: list[Answer | None] = []
        self.start(self._look())

    def _look(self) -> Script[None]:
        self.answers.append((yield self.echo(0, self.findings.observers[0])))


def one_question() -> tuple[OneQuestion, Findings]:
    behaviour = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF)
    findings = Laboratory(behaviour, 1).findings
    return OneQuestion(findings, range(1, 3), random.Random(1), 0.0), findings


def test_silence_is_an_answer_after_all_tries() -> None:
    test, _ = one_question()
    now, sent = 0.0, 0
    while (timer := test.next_timer()) is not None:
        now = timer
        sent += len(test.requests_to_send(now))
    assert sent == len(RETRY_AFTER_S)
    assert now == pytest.approx(sum(RETRY_AFTER_S))
    assert test.answers == [None]


def test_what_could_not_be_sent_once_is_sent_again() -> None:
    test, _ = one_question()
    sent = 0
    is_first = True
    while (timer := test.next_timer()) is not None:
        for request in test.requests_to_send(timer):
            assert isinstance(request, SendEcho)
            if is_first:
                test.withdraw(request.transaction)
            sent += not is_first
            is_first = False
    assert sent == len(RETRY_AFTER_S)
    assert test.answers == [None]
    assert not test.was_hindered


@pytest.mark.parametrize(
    "make", [HairpinningTest, PoisonTest, TftpHelperTest, QuotaTest, LifetimeTest]
)
def test_what_can_never_be_sent_ends_the_test_with_a_reason(make: type[AskingTest]) -> None:
    behaviour = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF)
    findings = Laboratory(behaviour, 1).findings
    count = make.port_count(findings) if hasattr(make, "port_count") else make.PORT_COUNT
    test = make(findings, range(1, 1 + count), random.Random(1), 0.0)
    now = 0.0
    while (timer := test.next_timer()) is not None:
        now = max(timer, now)
        assert now < 60, "it does not end"
        for request in test.requests_to_send(now):
            test.withdraw(request.transaction)
    test.conclude()
    assert "could not be sent" in " ".join(findings.unknown.values())
