"""What the tests of an inspection are written in: scripts that ask, wait and go on.

A test asks much at once, and what it asks next depends on the answers. Written as a state machine
that is hard to read, so each thread of a test is a generator here, a *script*: it yields a
`Question` and is resumed with the `Answer`, or with None for silence after several tries; or it
yields the time it wants to sleep until. `AskingTest` runs any number of scripts on one heap of due
times, paces what they send, and is the `Measurement` that its driver sees.

    def _look(self) -> Script[None]:
        answer = yield self.echo(self.ports[0], observer)
        if answer is None:
            return
        yield answer.received_at + 30.0
        ...

Silence speaks for the NAT only where the way there and back is known to work: `control` is a
question that takes the same way, with the same token, to a mapping that lets it in.

Knows no sockets, keys, clocks or datagram formats.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple, TypeVar

from natswarm.address import Endpoint
from natswarm.identity import PeerId
from natswarm.nat.classify import Observation
from natswarm.nat.findings import Findings
from natswarm.nat.measurement import Observer, Reply, Request, SendEcho
from natswarm.wire import NO_TOKEN, TRANSACTION_BYTES

__all__ = ["RETRY_AFTER_S", "SPACING_S", "Answer", "AskingTest", "Question", "Script", "Unsent"]

# As in the quick part: a NAT that limits new mappings to 50 a second keeps up.
SPACING_S = 0.015

# When a question is asked again, and when silence is an answer. Round trips of mobile networks take
# 50 to 300 ms. At 1 % loss each way all four tries are lost once in 6 million times, at 10 % once
# in 770.
RETRY_AFTER_S = (0.5, 0.6, 0.8, 1.2)

_T = TypeVar("_T")


class Answer(NamedTuple):
    """What came back.

    Attributes:
        reply: The first reply to any of the tries.
        sent_at: When that try was sent, seconds.
        received_at: When it came.
        last_sent_at: When the last try was sent, that is when the mapping was last used.
        try_count: How many tries were sent.
    """

    reply: Reply
    sent_at: float
    received_at: float
    last_sent_at: float
    try_count: int

    @property
    def observed(self) -> Endpoint:
        """What the observer saw."""
        return self.reply.observed


class Unsent(Exception):
    """Raised in a script: the question could not be sent, so its silence proves nothing."""


@dataclass(slots=True, eq=False)
class Question:
    """Something to ask, several times until it is answered.

    Attributes:
        build: Makes the request from a new transaction, once for each try.
        is_expected: Whether a reply with that transaction is the answer.
        retry_after_s: The waits between tries, and after the last.
    """

    build: Callable[[bytes], Request]
    is_expected: Callable[[Reply], bool]
    retry_after_s: tuple[float, ...] = RETRY_AFTER_S
    _sent_at: dict[bytes, float] = field(default_factory=dict)  # transaction -> when
    _try_count: int = 0
    _unsent_count: int = 0
    _task: _Task | None = None  # None: over

    @property
    def sent_times(self) -> list[float]:
        """When each try so far was sent, seconds."""
        return list(self._sent_at.values())


Script = Generator[Question | float, Answer | None, _T]


class _Task:
    __slots__ = ("script",)

    def __init__(self, script: Script[None]) -> None:
        self.script: Script[None] | None = script


class AskingTest:
    """A test made of scripts: all of a `TestRun` but what follows from the answers.

    Args:
        findings: What is known; the test adds to it.
        ports: Indices of its fresh ports.
        rng: Draws transactions, and whatever the test draws.
        now: Seconds.

    Attributes:
        packet_count: Packets asked to be sent so far.
        was_hindered: Whether something could not be sent, which ended the test.
    """

    def __init__(self, findings: Findings, ports: range, rng: random.Random, now: float) -> None:
        self.findings = findings
        self.ports = ports
        self.rng = rng
        self.now = now
        self.spacing_s = SPACING_S
        self.packet_count = 0
        self.was_hindered = False
        self._next_slot = now
        self._outbox: list[Request] = []
        self._asked: dict[bytes, Question] = {}
        # What is due: a script to go on, a question to ask once more, or one whose turn to be sent
        # has come (True).
        self._due: list[tuple[float, int, _Task | Question, bool]] = []
        self._sequence = 0
        self._live_count = 0
        # A token is good for one address of ours, and pools give us several.
        self._tokens: dict[tuple[PeerId, str], bytes] = {}

    # A Measurement ------------------------------------------------------------------------------

    def requests_to_send(self, now: float) -> list[Request]:
        """Return what is due, in the order to send it."""
        self.now = now
        while self._due and self._due[0][0] <= now:
            _, _, what, has_slot = heappop(self._due)
            if isinstance(what, _Task):
                self._resume(what, None)
            elif what._task is not None:
                self._try(what, has_slot=has_slot)
        requests, self._outbox = self._outbox, []
        self.packet_count += len(requests)
        return requests

    def receive_reply(self, reply: Reply, now: float) -> None:
        """Take a reply; one that is not expected is ignored."""
        self.now = now
        question = self._asked.get(reply.transaction)
        if question is None or not question.is_expected(reply):
            return
        if reply.token != NO_TOKEN:
            self._tokens[reply.sender, reply.observed.ip] = reply.token
            self.findings.tokens[reply.sender] = reply.token
        times = question._sent_at
        answer = Answer(reply, times[reply.transaction], now, max(times.values()), len(times))
        self._resume(self._forget(question), answer)

    def withdraw(self, transaction: bytes) -> None:
        """Forget a request that could not be sent: its silence proves nothing."""
        question = self._asked.pop(transaction, None)
        if question is not None:
            del question._sent_at[transaction]
            # Tried again when it would have been, as often as a question is tried at all.
            question._unsent_count += 1
            question._try_count -= question._unsent_count <= len(question.retry_after_s)

    def next_timer(self) -> float | None:
        """Return when to call `requests_to_send` next; None when finished."""
        if self._outbox:
            return self.now
        while self._due and self._is_over(self._due[0][2]):
            heappop(self._due)
        if self._live_count == 0 or not self._due:
            return None
        return self._due[0][0]

    @property
    def unfinished(self) -> str:
        """Why something is not known that no script has said anything about."""
        return "datagrams could not be sent" if self.was_hindered else "the test was not finished"

    # For scripts ----------------------------------------------------------------------------------

    def start(self, script: Script[None]) -> None:
        """Run a script beside the others, from now on."""
        self._live_count += 1
        self._push(self.now, _Task(script), has_slot=False)

    def stop(self) -> None:
        """End all scripts: what is known is enough."""
        self._live_count = 0
        self._due.clear()
        self._asked.clear()

    def send(self, request: Request) -> None:
        """Send something that nobody answers."""
        self._outbox.append(request)

    def echo(
        self,
        port_index: int,
        observer: Observer,
        *,
        to_alternate: bool = False,
        retry_after_s: tuple[float, ...] = RETRY_AFTER_S,
    ) -> Question:
        """Return the question what `observer` sees of a port.

        Args:
            port_index: The port to ask from.
            observer: Whom to ask.
            to_alternate: Ask its second port, which must be known.
            retry_after_s: The waits for an answer.
        """
        destination = observer.endpoint
        if to_alternate:
            assert observer.alternate is not None
            destination = observer.alternate
        return Question(
            lambda transaction: SendEcho(port_index, destination, observer.peer_id, transaction),
            lambda reply: (
                reply.port_index == port_index
                and reply.sender == observer.peer_id
                and reply.source == destination
            ),
            retry_after_s,
        )

    def delivery(
        self,
        port_index: int,
        endpoint: Endpoint,
        observer: Observer,
        *,
        from_alternate: bool = False,
        retry_after_s: tuple[float, ...] = RETRY_AFTER_S,
    ) -> Question:
        """Return the question whether something from `observer` gets in at an endpoint of ours.

        The main port asks, so the mapping of `endpoint` is not used on the way out.

        Args:
            port_index: The port that should receive.
            endpoint: Its external endpoint.
            observer: Who sends.
            from_alternate: From its second port.
            retry_after_s: The waits for an arrival.
        """

        def build(transaction: bytes) -> Request:
            return SendEcho(
                0,
                observer.endpoint,
                observer.peer_id,
                transaction,
                from_alternate=from_alternate,
                deliver_to=endpoint,
                token=self.token(observer, endpoint.ip),
            )

        def is_expected(reply: Reply) -> bool:
            came_from_main = reply.source == observer.endpoint
            return (
                reply.port_index == port_index
                and reply.sender == observer.peer_id
                and reply.source.ip == observer.endpoint.ip
                and came_from_main is not from_alternate
            )

        return Question(build, is_expected, retry_after_s)

    def control(self, observer: Observer, *, from_alternate: bool = False) -> Script[bool]:
        """Return whether the observer delivers to our main port, which has just sent to it.

        Afterwards a delivery that does not arrive was refused by the NAT, or lost.
        """
        opened = yield self.echo(0, observer, to_alternate=from_alternate)
        if opened is None:
            return False
        # The token must be from the port that delivers or the other, which are one observer.
        asked = self.delivery(0, opened.observed, observer, from_alternate=from_alternate)
        return (yield asked) is not None

    def token(self, observer: Observer, ip: str) -> bytes:
        """Return the newest token for deliveries of `observer` to our address `ip`."""
        newest = self.findings.tokens.get(observer.peer_id, NO_TOKEN)
        return self._tokens.get((observer.peer_id, ip), newest)

    def observation(self, answer: Answer, destination: Endpoint) -> Observation:
        """Return the answer to an `echo` as others use it."""
        reply = answer.reply
        return Observation(
            port_index=reply.port_index,
            local_port=reply.local_port,
            observer=reply.sender,
            destination=destination,
            observed=reply.observed,
            sent_at=answer.sent_at,
        )

    # The scheduler --------------------------------------------------------------------------------

    def _push(self, due: float, what: _Task | Question, *, has_slot: bool) -> None:
        self._sequence += 1
        heappush(self._due, (due, self._sequence, what, has_slot))

    def _is_over(self, what: _Task | Question) -> bool:
        return (what.script if isinstance(what, _Task) else what._task) is None

    def _try(self, question: Question, *, has_slot: bool) -> None:
        task = question._task
        assert task is not None
        waits = question.retry_after_s
        if question._try_count == len(waits):
            self._forget(question)
            if question._unsent_count > len(waits):
                self._resume(task, None, error=Unsent())
            else:
                self._resume(task, None)
            return
        if not has_slot:
            slot = max(self.now, self._next_slot)
            self._next_slot = slot + self.spacing_s
            if slot > self.now:
                self._push(slot, question, has_slot=True)
                return
        transaction = self.rng.randbytes(TRANSACTION_BYTES)
        question._sent_at[transaction] = self.now
        self._asked[transaction] = question
        self._push(self.now + waits[question._try_count], question, has_slot=False)
        question._try_count += 1
        self._outbox.append(question.build(transaction))

    def _forget(self, question: Question) -> _Task:
        for transaction in question._sent_at:
            self._asked.pop(transaction, None)
        task, question._task = question._task, None
        assert task is not None
        return task

    def _resume(self, task: _Task, answer: Answer | None, error: Unsent | None = None) -> None:
        script = task.script
        if script is None:
            return
        try:
            wanted = script.send(answer) if error is None else script.throw(error)
        except StopIteration:
            task.script = None
            self._live_count = max(self._live_count - 1, 0)
            return
        except Unsent:
            self.was_hindered = True
            self.stop()
            return
        if isinstance(wanted, Question):
            wanted._task = task
            self._push(self.now, wanted, has_slot=False)
        else:
            self._push(max(wanted, self.now), task, has_slot=False)
