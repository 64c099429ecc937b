"""Inspect our own NAT: the chosen tests one after another, each with fresh ports of its own.

The tests know how to ask and what follows; this is the order they come in. When the asking of one
is over, the ports it saw are fitted anew with all that were seen before, it is told to conclude,
and the next one is made from the findings so far. Its fresh ports are new ones, since most tests
need ports that nothing was sent from yet, and those of the test before may be closed.

Whatever keeps a test from going on ends that test alone (`give_up`): what it had found by then
stays, what it had not is unknown, with the reason.

Knows no sockets, keys or datagram formats: `net/echo.py` drives it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from natswarm.address import Endpoint
from natswarm.nat.classify import Observation, classify
from natswarm.nat.findings import Findings, NatTest, TestRun
from natswarm.nat.hairpinning import HairpinningTest
from natswarm.nat.lifetime import LifetimeTest
from natswarm.nat.measurement import Observer, Reply, Request
from natswarm.nat.poison import PoisonTest
from natswarm.nat.quick import BehaviourTest
from natswarm.nat.quota import QuotaTest
from natswarm.nat.tftp_helper import TftpHelperTest
from natswarm.wire import NO_TOKEN

__all__ = ["QUICK", "TESTS", "NatInspection", "TestOffer"]

# Observers that are asked. Three outvote one liar; more only cost datagrams.
OBSERVERS_MAX = 8

QUICK = frozenset({NatTest.BEHAVIOUR})
"""What a node asks for when it joins: the tests that take seconds and some dozens of packets."""


@dataclass(frozen=True, slots=True)
class TestOffer:
    """What one test takes, for those who choose tests, and how it is made.

    Attributes:
        make: (findings, fresh ports, randomness, now) -> the test under way.
        port_count: Fresh ports it wants.
        packets: Packets it sends at most.
        duration_s: Seconds it takes at most, at usual round trips.
    """

    make: Callable[[Findings, range, random.Random, float], TestRun]
    port_count: Callable[[Findings], int]
    packets: Callable[[Findings], int]
    duration_s: float


TESTS: dict[NatTest, TestOffer] = {
    NatTest.BEHAVIOUR: TestOffer(
        BehaviourTest,
        BehaviourTest.port_count,
        BehaviourTest.packets,
        BehaviourTest.duration_s,
    ),
    NatTest.HAIRPINNING: TestOffer(
        HairpinningTest,
        lambda _: HairpinningTest.PORT_COUNT,
        HairpinningTest.packets,
        HairpinningTest.duration_s,
    ),
    NatTest.POISON: TestOffer(
        PoisonTest, lambda _: PoisonTest.PORT_COUNT, PoisonTest.packets, PoisonTest.duration_s
    ),
    NatTest.TFTP_HELPER: TestOffer(
        TftpHelperTest,
        TftpHelperTest.port_count,
        TftpHelperTest.packets,
        TftpHelperTest.duration_s,
    ),
    NatTest.QUOTA: TestOffer(
        QuotaTest, QuotaTest.port_count, QuotaTest.packets, QuotaTest.duration_s
    ),
    NatTest.LIFETIMES: TestOffer(
        LifetimeTest, LifetimeTest.port_count, LifetimeTest.packets, LifetimeTest.duration_s
    ),
}


class NatInspection:
    """The machine that inspects our NAT; a `Measurement`.

    Call `requests_to_send` at the start, after every input, and when `next_timer` is due; before
    sending what it returned, have `port_count` ports bound.

    Args:
        observers: Who can be asked; the first `OBSERVERS_MAX` are, neighbours first. More addresses
            are better than more ports: one address cannot tell EIM from ADM.
        tests: What to find out. `NatTest.BEHAVIOUR` is always among it: all others rest on it.
        local_endpoints: Host candidates: the main port at each of our own addresses.
        witnessed: What others have told already.
        rng: Draws transactions; `random.SystemRandom` where strangers may guess.
        now: Seconds on the clock of all later calls.

    Attributes:
        findings: What was found so far.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        *,
        tests: Iterable[NatTest] = QUICK,
        local_endpoints: Sequence[Endpoint] = (),
        witnessed: Sequence[Observation] = (),
        rng: random.Random,
        now: float,
    ) -> None:
        # Neighbours first: they alone can ask a third peer.
        ranked = sorted(observers, key=lambda each: not each.is_neighbour)
        self.findings = Findings(
            observers=tuple(ranked[:OBSERVERS_MAX]),
            profile=classify(witnessed, local_endpoints=local_endpoints),
            observations=list(witnessed),
            packet_counts={NatTest.BEHAVIOUR: len(witnessed)},
        )
        wanted = {NatTest.BEHAVIOUR, *tests}
        self._tests_left = [test for test in NatTest if test in wanted]
        self._rng = rng
        self._ports = range(1, 1)
        self._now = now
        self._fitted_count = 0
        self._test = self._tests_left.pop(0)
        self._run: TestRun | None = self._start(self._test)

    @property
    def test(self) -> NatTest | None:
        """The test under way; None when all are over."""
        return None if self._run is None else self._test

    @property
    def port_count(self) -> int:
        """How many ports have to be bound by now, the main port counted; only grows."""
        return self._ports.stop

    @property
    def fresh_ports(self) -> range:
        """The fresh ports of the test under way: older ones may be closed."""
        return self._ports

    def requests_to_send(self, now: float) -> list[Request]:
        """Return what is due, in the order to send it."""
        self._now = now
        while self._run is not None and self._run.next_timer() is None:
            self._conclude()
        if self._run is None:
            return []
        requests = self._run.requests_to_send(now)
        counts = self.findings.packet_counts
        counts[self._test] = counts.get(self._test, 0) + len(requests)
        return requests

    def receive_reply(self, reply: Reply, now: float) -> None:
        """Take an echo reply whose signature was checked; unexpected ones are ignored."""
        self._now = now
        if self._run is None:
            return
        if reply.token != NO_TOKEN and any(
            observer.peer_id == reply.sender and observer.endpoint.ip == reply.source.ip
            for observer in self.findings.observers
        ):
            self.findings.tokens[reply.sender] = reply.token
        self._run.receive_reply(reply, now)

    def withdraw(self, transaction: bytes) -> None:
        """Forget a request that could not be sent: its silence proves nothing."""
        if self._run is not None:
            self._run.withdraw(transaction)

    def give_up(self, reason: str) -> None:
        """End the test under way: what it has not found by now is unknown, for `reason`."""
        if self._run is not None:
            self._conclude(reason)

    def next_timer(self) -> float | None:
        """Return when to call `requests_to_send` next; None when finished."""
        if self._run is None:
            return None
        timer = self._run.next_timer()
        return self._now if timer is None else timer

    def _start(self, test: NatTest) -> TestRun:
        offer = TESTS[test]
        start = self._ports.stop
        self._ports = range(start, start + offer.port_count(self.findings))
        return offer.make(self.findings, self._ports, self._rng, self._now)

    def _conclude(self, reason: str | None = None) -> None:
        assert self._run is not None
        findings = self.findings
        if len(findings.observations) > self._fitted_count:
            self._fitted_count = len(findings.observations)
            findings.refit()
        known_before = dict(findings.unknown)
        self._run.conclude()
        if reason is not None:
            for name in findings.unknown:
                if name not in known_before:
                    findings.unknown[name] = reason
        self._run = None
        if self._tests_left:
            self._test = self._tests_left.pop(0)
            self._run = self._start(self._test)
