"""Does our NAT have a TFTP helper, so that one request makes an APDF filter an ADF one?

TFTP servers answer from a port of their own choice (RFC 1350 section 4), so some NATs that see a
read request to port 69 let in one answer from any port of that address. We send such a request to
an observer's address, where nobody need listen, and have the observer answer from its second port,
which the filter refuses without a helper.

Where the port of the mapping towards port 69 is known (EIM; ADM, since the address is the same; a
kept port) this takes six tries on fresh ports. Else the observer has to guess: `birthday` weighs
the requests of M ports against the guesses, and it is tried only if `PACKETS_MAX` packets find a
helper with `POWER_MIN` at 10 % loss each way. For a block of 256 ports that is about 140 packets,
for all 64,512 ports it would be 2,700 and more, which a yes or no is not worth.

A control port sends no request and must not be reached; where it is, the filter lets in the address
anyway (EIF, ADF) and there is nothing a helper could add.

Source: RFC 1350; Linux `nf_conntrack_tftp`; kupson/udp-hole-punching.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import NamedTuple

from natswarm.address import Endpoint
from natswarm.nat.allocation import SAFE_RANGE, PortAllocation, predict_ports
from natswarm.nat.asking import RETRY_AFTER_S, Answer, AskingTest, Question, Script
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Pooling
from natswarm.nat.findings import Findings
from natswarm.nat.measurement import Observer, Reply, SendEcho, SendTftp
from natswarm.wire import TFTP_PORT

__all__ = ["Birthday", "TftpHelperTest", "birthday"]

# Two requests, then one delivery: at 10 % loss each way a try fails once in five times, and six
# fail once in 15,000. A try takes a port of its own, since a refused packet may poison it.
TRIES = 6
REQUESTS_PER_PORT = 2
TRY_WAIT_S = (1.2,)

PACKETS_MAX = 1500
POWER_MIN = 0.99
POWER_WANTED = 0.999
# 10 % loss each way: of a request and its repetition, and of a delivery there and back.
WORKS = 0.99 * 0.81

# Guesses an observer delivers in a second; it answers 200 at most, and others ask it, too.
GUESSES_PER_S = 100.0

# Echoes among the requests of a birthday show that new mappings still come from the fitted ports,
# and that the NAT makes them at that pace. At 10 % loss each way five of eight come back in 97 %.
WITNESSES = 8
WITNESSES_MIN = 5
OPENED_PORTS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192)
# A counter moves from the first witness to the last by our own mappings and those of others.
COUNTER_SPAN_MAX = 400


class Birthday(NamedTuple):
    """How to find a port that is not known.

    Attributes:
        opened_count: Ports that send a request.
        guess_count: Ports that the observer sends to.
        power: The chance to find a helper, at 10 % loss each way.
    """

    opened_count: int
    guess_count: int
    power: float

    @property
    def packets(self) -> int:
        """What it costs."""
        return self.opened_count * REQUESTS_PER_PORT + self.guess_count


def birthday(port_count: int, opened_max: int) -> Birthday:
    """Return the cheapest birthday with the wanted power, or the most powerful affordable one.

    Args:
        port_count: Ports that mappings are drawn from.
        opened_max: Mappings that may be opened.
    """
    affordable = []
    for opened in OPENED_PORTS:
        if opened > opened_max:
            break
        # Each guess is one of the ports that were not guessed before; taking all guesses for
        # independent is a little too pessimistic.
        missed = math.log1p(-min(WORKS * opened / port_count, 0.999))
        for power in (POWER_WANTED, POWER_MIN):
            guesses = min(math.ceil(math.log(1 - power) / missed), port_count)
            # Once all ports are guessed, only loss can hide a helper.
            reached = max(1 - math.exp(guesses * missed), 0.0)
            affordable.append(Birthday(opened, guesses, reached))
    enough = [each for each in affordable if each.power >= POWER_MIN - 1e-9]
    good = [
        each for each in enough if each.power >= POWER_WANTED - 1e-9 and each.packets <= PACKETS_MAX
    ]
    return min(good or enough or affordable, key=lambda each: each.packets)


class TftpHelperTest(AskingTest):
    """The test `NatTest.TFTP_HELPER`; arguments as of every `AskingTest`."""

    duration_s = 25.0

    @staticmethod
    def port_count(findings: Findings) -> int:
        """Return how many fresh ports it wants."""
        if _reason(findings) is not None:
            return 0
        plan = _plan(findings)
        return TRIES + 1 if plan is None else plan.opened_count + WITNESSES

    @staticmethod
    def packets(findings: Findings) -> int:
        """Return how many packets it sends at most."""
        if _reason(findings) is not None:
            return 0
        plan = _plan(findings)
        controls = 4 * len(RETRY_AFTER_S)
        if plan is None:
            return controls + len(RETRY_AFTER_S) + TRIES * (4 + REQUESTS_PER_PORT + 1)
        guesses = max(plan.guess_count, COUNTER_SPAN_MAX if _counts(findings) else 0)
        return controls + WITNESSES + plan.opened_count * REQUESTS_PER_PORT + guesses

    def __init__(self, findings: Findings, ports: range, rng: random.Random, now: float) -> None:
        super().__init__(findings, ports, rng, now)
        self._found: bool | None = None
        self._reason = _reason(findings)
        if self._reason is None:
            observer = next(each for each in findings.observers if each.alternate is not None)
            plan = _plan(findings)
            self.start(self._look(observer) if plan is None else self._look_around(observer, plan))

    def conclude(self) -> None:
        """Write what was found into the findings."""
        findings = self.findings
        findings.profile = replace(findings.profile, tftp_helper=self._found)
        findings.unknown.pop("tftp_helper", None)
        if self._found is None:
            findings.unknown["tftp_helper"] = self._reason or self.unfinished

    # Where the port is known ----------------------------------------------------------------------

    def _look(self, observer: Observer) -> Script[None]:
        control, *others = self.ports
        if not (yield from self.control(observer, from_alternate=True)):
            self._reason = "the observer does not deliver from its second port"
            return
        opened = yield self.echo(control, observer)
        if opened is None or not self._holds(opened):
            self._reason = "the observer does not answer fresh ports, or the NAT does not keep them"
            return
        if (yield self.delivery(control, opened.observed, observer, from_alternate=True)):
            self._reason = "the filter lets in every port of an address anyway"
            return
        for port in others:
            opened = yield self.echo(port, observer)
            if opened is None or not self._holds(opened):
                self._reason = "the mappings did not last for the test"
                return
            yield from self._request(port, observer)
            asked = self.delivery(
                port, opened.observed, observer, from_alternate=True, retry_after_s=TRY_WAIT_S
            )
            if (yield asked) is not None:
                self._found = True
                return
        if self.findings.profile.mapping is Mapping.APDM:
            # The mapping towards port 69 is another one, at the same port only if the NAT shares
            # ports, and only if it grants one more.
            other = yield self.echo(control, observer, to_alternate=True)
            if other is None or other.observed.port != other.reply.local_port:
                self._reason = "the port towards port 69 is not known"
                return
        self._found = False

    def _holds(self, answer: Answer) -> bool:
        """Whether the observer's port 69 sees the same endpoint."""
        return (
            self.findings.profile.mapping is not Mapping.APDM
            or answer.observed.port == answer.reply.local_port
        )

    def _request(self, port: int, observer: Observer) -> Script[None]:
        for _ in range(REQUESTS_PER_PORT):
            # No observer listens there; a helper acts on the request on its way.
            self.send(SendTftp(port, Endpoint(observer.endpoint.ip, TFTP_PORT)))
            yield self.now + self.spacing_s

    # Where it is not ------------------------------------------------------------------------------

    def _look_around(self, observer: Observer, plan: Birthday) -> Script[None]:
        if not (yield from self.control(observer, from_alternate=True)):
            self._reason = "the observer does not deliver from its second port"
            return
        openers = list(self.ports[: plan.opened_count])
        witnesses = list(self.ports[plan.opened_count :])
        seen: list[Answer] = []
        every = math.ceil(len(openers) / (len(witnesses) - 1))
        for index, port in enumerate(openers):
            if index % every == 0:
                self.start(self._witness(witnesses.pop(0), observer, seen))
            yield self.now + self.spacing_s
            yield from self._request(port, observer)
        while witnesses:
            self.start(self._witness(witnesses.pop(0), observer, seen))
            yield self.now + self.spacing_s
        yield self.now + TRY_WAIT_S[0]
        guesses = self._guesses(plan, seen)
        if guesses is None:
            return
        self.spacing_s = 1 / GUESSES_PER_S
        ip = seen[0].observed.ip
        for guess in guesses:
            self.start(self._guess(observer, Endpoint(ip, guess), openers))
        yield self.now + len(guesses) * self.spacing_s + 2 * TRY_WAIT_S[0]
        self._found = False

    def _witness(self, port: int, observer: Observer, seen: list[Answer]) -> Script[None]:
        answer = yield self.echo(port, observer, retry_after_s=TRY_WAIT_S)
        if answer is not None:
            seen.append(answer)

    def _guesses(self, plan: Birthday, seen: list[Answer]) -> list[int] | None:
        """Return the ports to try, or None, and `_reason`, if the witnesses speak against it."""
        allocation = self.findings.profile.allocation
        assert allocation is not None
        if len(seen) < WITNESSES_MIN:
            self._reason = "the NAT grants new mappings too slowly"
            return None
        if len({each.observed.ip for each in seen}) > 1:
            self._reason = "our mappings have several addresses"
            return None
        if allocation.law is AllocationLaw.SEQUENTIAL:
            return self._counted(allocation, seen)
        ports = [each.observed.port for each in seen]
        if not all(any(low <= port <= high for low, high in allocation.ranges) for port in ports):
            self._reason = "new mappings do not come from the ports seen before"
            return None
        return [
            port
            for port, _ in zip(
                predict_ports(allocation, rng=self.rng), range(plan.guess_count), strict=False
            )
        ]

    def _counted(self, allocation: PortAllocation, seen: list[Answer]) -> list[int] | None:
        """Return all ports between the first witness and the last."""
        in_order = sorted(seen, key=lambda each: each.sent_at)
        first, last = in_order[0].observed.port, in_order[-1].observed.port
        sign = 1 if (allocation.step or 1) > 0 else -1
        span = sign * (last - first) % SAFE_RANGE.port_count
        if not len(seen) < span <= COUNTER_SPAN_MAX:
            self._reason = "the counter moved too far to try all ports on its way"
            return None
        return [
            SAFE_RANGE.low + (first + sign * index - SAFE_RANGE.low) % SAFE_RANGE.port_count
            for index in range(1, span)
        ]

    def _guess(self, observer: Observer, endpoint: Endpoint, openers: list[int]) -> Script[None]:
        def is_expected(reply: Reply) -> bool:
            return (
                reply.port_index in openers
                and reply.sender == observer.peer_id
                and reply.source.ip == observer.endpoint.ip
                and reply.source.port != observer.endpoint.port
            )

        asked = Question(
            lambda transaction: SendEcho(
                0,
                observer.endpoint,
                observer.peer_id,
                transaction,
                from_alternate=True,
                deliver_to=endpoint,
                token=self.token(observer, endpoint.ip),
            ),
            is_expected,
            TRY_WAIT_S,
        )
        if (yield asked) is not None:
            self._found = True
            self.stop()


def _counts(findings: Findings) -> bool:
    allocation = findings.profile.allocation
    return allocation is not None and allocation.law is AllocationLaw.SEQUENTIAL


def _plan(findings: Findings) -> Birthday | None:
    """Return how to find the port towards port 69; None where it is known."""
    profile = findings.profile
    allocation = profile.allocation
    if profile.mapping is not Mapping.APDM:
        return None
    if allocation is None:
        return Birthday(0, PACKETS_MAX + 1, 0.0)
    if allocation.law is AllocationLaw.PRESERVING:
        return None
    if allocation.law is AllocationLaw.SEQUENTIAL:
        return Birthday(16, 0, POWER_WANTED)  # guesses by what the witnesses say
    # A block that is not shared must have room for the requests.
    opened_max = (allocation.block_size or 4 * OPENED_PORTS[-1]) // 4
    if profile.max_mappings is not None:
        opened_max = min(opened_max, profile.max_mappings // 2)
    return birthday(allocation.port_count, max(opened_max, OPENED_PORTS[0]))


def _reason(findings: Findings) -> str | None:
    """Return why it cannot be tested; None where it can."""
    profile = findings.profile
    if not any(each.alternate is not None for each in findings.observers):
        return "no observer with a second port"
    if profile.is_translated is not True:
        return "there is no NAT that is known of"
    if profile.filtering in (Filtering.EIF, Filtering.ADF):
        return "not applicable: the filter lets in every port of an address anyway"
    if profile.filtering is None:
        return "it is not known what the filter refuses"
    plan = _plan(findings)
    if plan is not None and profile.pooling is Pooling.ARBITRARY:
        return "each mapping has another address and port, and guessing both takes too many packets"
    if plan is not None and (plan.power < POWER_MIN - 1e-9 or plan.packets > PACKETS_MAX):
        return (
            f"each remote sees another port, and finding it would take {plan.packets} packets or "
            f"more ({PACKETS_MAX} at most)"
        )
    return None
