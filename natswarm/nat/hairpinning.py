"""Does our NAT turn round what we send to its own address?

Two ports x and y of ours ask an observer for their external endpoints X and Y. Then

    x sends to X     a packet opens the filter for its own answer: with EIM nothing is refused
    y sends to X,    several times in turn: whatever the filter, after one round both have sent to
    x sends to Y     the other's endpoint

and what comes in was turned round (RFC 4787 section 6, REQ-9). The first way is tried before the
second because its packets are refused by no filter: a NAT that is poisoned by refused packets would
hide that it hairpins. Some boxes drop a packet whose source is its destination, so the second way
decides on "no".

It takes endpoints that hold towards the NAT's own address: those of an EIM NAT, kept ports, or a
filter that lets in anybody. Otherwise the mapping that x uses towards Y is another one than X, its
port is not known, and finding it takes a birthday puncture of our own NAT: hundreds of packets for
a block, tens of thousands for all ports. That stays unknown.

Source: RFC 4787 section 6; RFC 5780 section 4.5.
"""

from __future__ import annotations

import random
from dataclasses import replace

from natswarm.address import Endpoint
from natswarm.nat.asking import Answer, AskingTest, Question, Script
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.findings import Findings
from natswarm.nat.measurement import Observer, Reply, SendSelf

__all__ = ["HairpinningTest"]

# At 10 % loss each way a round trip inside is lost once in 5 times, and six rounds of two packets,
# of which two open filters, all are once in ten million.
SELF_WAITS_S = (0.3, 0.3, 0.5)
ROUNDS = 6
ROUND_WAIT_S = (0.25,)


class HairpinningTest(AskingTest):
    """The test `NatTest.HAIRPINNING`; arguments as of every `AskingTest`."""

    PORT_COUNT = 2
    duration_s = 6.0

    @staticmethod
    def packets(findings: Findings) -> int:
        """Return how many packets it sends at most."""
        return 0 if _reason(findings) else 4 * 4 + 2 * len(SELF_WAITS_S) + 2 * ROUNDS

    def __init__(self, findings: Findings, ports: range, rng: random.Random, now: float) -> None:
        super().__init__(findings, ports, rng, now)
        self._found: bool | None = None
        self._reason = _reason(findings)
        if self._reason is None:
            self.start(self._look())

    def conclude(self) -> None:
        """Write what was found into the findings."""
        findings = self.findings
        findings.profile = replace(findings.profile, hairpinning=self._found)
        findings.unknown.pop("hairpinning", None)
        if self._found is None:
            findings.unknown["hairpinning"] = self._reason or self.unfinished

    def _look(self) -> Script[None]:
        x, y = self.ports[:2]
        observer = self.findings.observers[0]
        at_x = yield self.echo(x, observer)
        at_y = yield self.echo(y, observer)
        if at_x is None or at_y is None:
            self._reason = "the observer does not answer fresh ports"
            return
        if not (self._holds(at_x) and self._holds(at_y)):
            self._reason = "the NAT kept the port of the main port only"
            return
        for port, answer in ((x, at_x), (y, at_y)):
            if (yield _self_question(port, answer.observed, port, SELF_WAITS_S)) is not None:
                self._found = True
                return
        for _ in range(ROUNDS):
            for sender, answer, receiver in ((y, at_x, x), (x, at_y, y)):
                asked = _self_question(sender, answer.observed, receiver, ROUND_WAIT_S)
                if (yield asked) is not None:
                    self._found = True
                    return
        yield from self._look_again(observer, at_x, at_y)

    def _look_again(self, observer: Observer, at_x: Answer, at_y: Answer) -> Script[None]:
        """Believe "no" only if nothing else kept the packets from leaving as they should."""
        for before in (at_x, at_y):
            after = yield self.echo(before.reply.port_index, observer)
            if after is None or after.observed != before.observed:
                self._reason = "the mappings did not last for the test"
                return
        profile = self.findings.profile
        if profile.mapping is None and profile.filtering is not Filtering.EIF:
            self._reason = "one observer cannot tell if our endpoints hold for others (EIM or ADM)"
            return
        if profile.mapping is not Mapping.EIM:
            # Each remote takes a mapping of its own, and the NAT may have refused it, or may not
            # share a port among mappings.
            others = [each for each in self.findings.observers if each is not observer]
            again = (yield self.echo(at_x.reply.port_index, others[0])) if others else None
            if again is None:
                self._reason = "the NAT grants no new mappings, so none towards its own address"
                return
            if again.observed != at_x.observed and profile.filtering is not Filtering.EIF:
                self._reason = (
                    "another remote sees another port, so the NAT's own address does, too"
                )
                return
        self._found = False

    def _holds(self, answer: Answer) -> bool:
        """Whether the endpoint an observer saw is the one towards the NAT's own address, too."""
        profile = self.findings.profile
        return (
            profile.mapping in (Mapping.EIM, None)
            or profile.filtering is Filtering.EIF
            or answer.observed.port == answer.reply.local_port
        )


def _self_question(
    sender: int, destination: Endpoint, receiver: int, waits_s: tuple[float, ...]
) -> Question:
    # Who signed it is not looked at: the transaction went to nobody but our NAT. Neither is the
    # source: boxes that leave the internal one are against REQ-9, but they do turn round.
    def is_expected(reply: Reply) -> bool:
        return reply.port_index == receiver

    return Question(
        lambda transaction: SendSelf(sender, destination, transaction), is_expected, waits_s
    )


def _reason(findings: Findings) -> str | None:
    """Return why it cannot be tested; None where it can."""
    profile = findings.profile
    if not findings.observers:
        return "nobody can tell us our external endpoint"
    if profile.is_translated is not True:
        return (
            "there is no NAT"
            if profile.is_translated is False
            else "it is not known if we have a NAT"
        )
    law = None if profile.allocation is None else profile.allocation.law
    if (
        profile.mapping in (Mapping.EIM, None)
        or profile.filtering is Filtering.EIF
        or law is AllocationLaw.PRESERVING
    ):
        return None
    return (
        f"with {profile.mapping.value} mapping nobody knows which port we have towards the NAT's "
        "own address, and guessing takes hundreds of packets or more"
    )
