"""What does a packet that our NAT refuses do to the mapping it came to?

Two fresh ports x1 and x2 open a mapping towards an observer, and a control port c does the same.
The main port has somebody that x has not sent to, the *poisoner*, send to x's external endpoint:
another observer, which every filter but EIF refuses, or the second port of the same one, which APDF
refuses. Then, from what hurts the mapping least to what hurts it most:

    the observer still gets in at x            no: the session died        BURNS_MAPPING
    a newcomer that x sends to sees X          no: X takes no new remote   RETIRES_MAPPING
    the poisoner that x sends to sees X        no: X is taken towards it   TAKES_PORT
    all of it                                                              NONE

The newcomer comes before the poisoner, since a mapping that moves for the one stays moved for the
other. What is said needs both ports to agree, and the control port, which nobody poisoned, to stay
where it was; and the poisoner to deliver to our main port, which has sent to it.

With ADM a newcomer at the same address stands for new remotes, and the second port of the observer
takes the poisoner's part. Where a mapping serves one remote only (APDM, ports not kept) there is
no next remote to see it by: BURNS_MAPPING still shows, the rest is unknown. With EIF nothing is
refused. A retired mapping whose NAT keeps ports comes back at the same port: that changes nothing
for anybody, and is NONE here. Costs about 60 packets and 6 s, and poisons its own ports only.

Source: measured on Linux (`natswarm/lab`, `is_poisonable`) and field reports; see `Poison`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from natswarm.nat.asking import Answer, AskingTest, Script
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Poison
from natswarm.nat.findings import Findings
from natswarm.nat.measurement import Observer

__all__ = ["PoisonTest"]

# Of five tries at 10 % loss each way none arrives once in 4,000. They are sent all: nothing says
# which one arrived.
POISON_WAITS_S = (0.2, 0.2, 0.2, 0.2, 1.0)

# How many ports must agree.
POISONED_PORTS = 2


@dataclass(frozen=True, slots=True)
class _Remote:
    """A port of an observer."""

    observer: Observer
    is_alternate: bool = False


@dataclass(slots=True)
class _Trial:
    """One way to poison, and what was seen afterwards at the poisoned ports and the control."""

    poisoner: _Remote
    newcomer: _Remote | None
    returns_to_poisoner: bool
    verdicts: list[Poison | None] = field(default_factory=list)
    control: Poison | None = None

    @property
    def result(self) -> Poison | None:
        """What both poisoned ports say, where the control port is as it was."""
        is_sound = self.control is Poison.NONE and len(self.verdicts) == POISONED_PORTS
        return self.verdicts[0] if is_sound and len(set(self.verdicts)) == 1 else None


class PoisonTest(AskingTest):
    """The test `NatTest.POISON`; arguments as of every `AskingTest`."""

    PORT_COUNT = 2 * (POISONED_PORTS + 1)
    duration_s = 8.0

    @staticmethod
    def packets(findings: Findings) -> int:
        """Return how many packets it sends at most."""
        trials, _ = _trials(findings)
        return len(trials) * (8 + POISONED_PORTS * len(POISON_WAITS_S) + 4 * 4 * 3)

    def __init__(self, findings: Findings, ports: range, rng: random.Random, now: float) -> None:
        super().__init__(findings, ports, rng, now)
        self._trials, self._reason = _trials(findings)
        self._got_in = False
        ports_left = iter(ports)
        for trial in self._trials:
            # Poisoned while the control is opened, so that all grow old together.
            for is_control in (*[False] * POISONED_PORTS, True):
                self.start(self._look(trial, next(ports_left), is_control=is_control))

    def conclude(self) -> None:
        """Write what was found into the findings."""
        findings = self.findings
        poison = self._verdict()
        findings.profile = replace(findings.profile, poison=poison)
        findings.unknown.pop("poison", None)
        if poison is None:
            findings.unknown["poison"] = self._reason or self.unfinished
        elif poison is not Poison.NONE and findings.profile.hairpinning is False:
            # Our own packets were refused before the filter was open, and may have hidden it.
            findings.profile = replace(findings.profile, hairpinning=None)
            findings.unknown["hairpinning"] = "the test poisoned its own ports"

    def _verdict(self) -> Poison | None:
        """Return what all trials say together; None, and `_reason`, where that is not enough."""
        if self._got_in:
            self._reason = "the filter let in what it should have refused"
            return None
        profile, results = self.findings.profile, [trial.result for trial in self._trials]
        for worst in (Poison.BURNS_MAPPING, Poison.RETIRES_MAPPING):
            if worst in results:
                return worst
        if not results or None in results:
            if self._reason is None and not self.was_hindered:
                self._reason = "the poisoned ports disagree, or the control port moved"
            return None
        if Poison.TAKES_PORT in results:
            if any(trial.newcomer is not None for trial in self._trials):
                return Poison.TAKES_PORT
            self._reason = "the mapping moved; it takes a third address to tell for which remotes"
            return None
        if any(trial.returns_to_poisoner for trial in self._trials):
            return Poison.NONE
        # A filter that does not look at ports takes none towards one remote, and an APDM mapping
        # has no next remote to be retired for.
        has_next = any(trial.newcomer is not None for trial in self._trials)
        if profile.filtering is Filtering.ADF and (has_next or profile.mapping is Mapping.APDM):
            return Poison.NONE
        self._reason = (
            "the mapping was not burned; more does not show where remotes see other ports"
        )
        return None

    def _look(self, trial: _Trial, port: int, *, is_control: bool) -> Script[None]:
        verdict = yield from self._verdict_of(trial, port, is_control=is_control)
        if is_control:
            trial.control = verdict
        else:
            trial.verdicts.append(verdict)

    def _verdict_of(self, trial: _Trial, port: int, *, is_control: bool) -> Script[Poison | None]:
        poisoner = trial.poisoner
        friend = self.findings.observers[0]
        opened = yield self.echo(port, friend)
        if opened is None:
            self._reason = "the observer does not answer fresh ports"
            return None
        can_poison = yield from self.control(
            poisoner.observer, from_alternate=poisoner.is_alternate
        )
        can_deliver = yield from self.control(friend)
        if not can_poison or not can_deliver:
            self._reason = "the observers do not deliver to our main port"
            return None
        if is_control:
            yield self.now + sum(POISON_WAITS_S)
        else:
            asked = self.delivery(
                port,
                opened.observed,
                poisoner.observer,
                from_alternate=poisoner.is_alternate,
                retry_after_s=POISON_WAITS_S,
            )
            if (yield asked) is not None:
                self._got_in = True
                return None
        return (yield from self._damage(trial, port, friend, opened))

    def _damage(
        self, trial: _Trial, port: int, friend: Observer, opened: Answer
    ) -> Script[Poison | None]:
        if (yield self.delivery(port, opened.observed, friend)) is None:
            return Poison.BURNS_MAPPING
        for remote, damage in (
            (trial.newcomer, Poison.RETIRES_MAPPING),
            (trial.poisoner if trial.returns_to_poisoner else None, Poison.TAKES_PORT),
        ):
            if remote is None:
                continue
            seen = yield self.echo(port, remote.observer, to_alternate=remote.is_alternate)
            if seen is None:
                self._reason = "not all ports of the observers answer"
                return None
            if seen.observed != opened.observed:
                return damage
        return Poison.NONE


def _trials(findings: Findings) -> tuple[list[_Trial], str | None]:
    """Return the ways to poison, or why there are none."""
    profile, observers = findings.profile, findings.observers
    if not observers:
        return [], "nobody can send us what the NAT would refuse"
    if profile.is_translated is not True:
        return [], "there is no NAT that is known of"
    if profile.filtering is Filtering.EIF:
        return [], "the filter refuses nothing"
    friend = observers[0]
    own_alternate = None if friend.alternate is None else _Remote(friend, is_alternate=True)
    others = [each for each in observers[1:] if each.endpoint.ip != friend.endpoint.ip]
    stranger = _Remote(others[0]) if others else None
    law = None if profile.allocation is None else profile.allocation.law
    if profile.mapping is Mapping.EIM or law is AllocationLaw.PRESERVING:
        newcomer = own_alternate
        if len(others) > 1:
            newcomer = _Remote(others[1])
        elif newcomer is None and others and others[0].alternate is not None:
            newcomer = _Remote(others[0], is_alternate=True)
        if stranger is not None:
            return [_Trial(stranger, newcomer, returns_to_poisoner=True)], None
    elif profile.mapping is Mapping.ADM and stranger is not None:
        trials = [_Trial(stranger, own_alternate, returns_to_poisoner=False)]
        if profile.filtering is not Filtering.ADF and own_alternate is not None:
            trials.append(_Trial(own_alternate, None, returns_to_poisoner=True))
        return trials, None
    elif stranger is not None:
        return [_Trial(stranger, None, returns_to_poisoner=False)], None
    if profile.filtering is Filtering.ADF or own_alternate is None:
        return [], "it takes a second observer, whom the filter refuses"
    is_fixed = profile.mapping is not Mapping.APDM or law is AllocationLaw.PRESERVING
    return [_Trial(own_alternate, None, returns_to_poisoner=is_fixed)], None
