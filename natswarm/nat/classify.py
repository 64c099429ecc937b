"""Find out what our own NAT does by asking peers what they see: no STUN server needed.

Every node has two UDP ports, p and q. We ask from our main port, and from some fresh ports, each of
which talks to one observer only:

    P1:p, P1:q, P2:p see   equal, equal       one endpoint for all           EIM
                           equal, different   one for each address           ADM
                           different          one for each endpoint          APDM
    from a fresh port that has sent to P1:p alone
        P3, unknown to it, gets an answer in  anybody does                   EIF
        P1 gets an answer in from q           the address does               ADF
        neither, several times over           only P1:p does                 APDF
    the external ports of all of them         the law of allocation          `allocation.py`

What is believed: our public address by one vote for each voter's address, winner * 2/3 > runner-up
(libtorrent's `ip_voter`), so one lying peer among three overwrites nothing; endpoint-independence
by the same rule, since APDM cannot make two observers agree by chance. Filtering needs no trust: a
packet got in or did not. An observer that lies about ports can only make our law look wider.

`classify` is the arithmetic; `NatInspection` is the machine that decides which echoes to ask for
and when to ask again. Only IPv4: IPv6 hosts are not translated, and host candidates cover them.
Source: RFC 5780 for the tests, RFC 4787 for the words. Knows no sockets, keys or datagram formats.
"""

from __future__ import annotations

import enum
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from natswarm.address import AddressKind, Endpoint
from natswarm.identity import PeerId
from natswarm.nat.allocation import PortSample, fit_allocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.measurement import Observer
from natswarm.nat.profile import LOCAL_ENDPOINTS_MAX, PUBLIC_IPS_MAX, NatProfile
from natswarm.wire import TRANSACTION_BYTES

__all__ = [
    "FRESH_PORT_COUNT",
    "AnswerFrom",
    "EchoToSend",
    "FilterTrial",
    "NatInspection",
    "Observation",
    "classify",
]

FRESH_PORT_COUNT = 16
"""Fresh ports that show the law of allocation with 95 % and more (see `allocation.py`)."""

# Observers asked from the main port. Three outvote one liar; more only cost datagrams.
OBSERVERS_MAX = 8

# Requests leave one after another, so that the ports of a counting NAT stay in order, and so that a
# NAT that limits new mappings to 100 a second (RFC 4787 names none; home routers do) keeps up.
SPACING_S = 0.015

# When an echo is asked for again, and when it is given up. A reply takes 50 to 300 ms on mobile
# networks; three tries at 10 % loss each way fail once in 140.
RETRY_AFTER_S = (0.5, 0.8, 1.2)

# Silence proves a filter only when loss is unlikely: four tries at 10 % loss each way are all lost
# once in 770. Fewer than three leave the question open.
FILTER_TRIAL_COUNT = 4
FILTER_TRIAL_COUNT_MIN = 3
# Asking a third peer takes two messages over connections before its datagram leaves.
FILTER_TRIAL_TIMEOUT_S = 1.5

_T = TypeVar("_T")


class AnswerFrom(enum.Enum):
    """From where an echo reply is to come."""

    MAIN = "main"
    """The port that was asked."""
    ALTERNATE = "alternate"
    """The observer's second port, which the asking port never sent to."""
    THIRD_PEER = "third-peer"
    """A neighbour of the observer's at an address that the asking port never sent to."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One echo that came back from where it was asked for.

    Attributes:
        port_index: 0 for the main port, 1.. for fresh ones.
        local_port: Its UDP port.
        observer: Who saw us.
        destination: Where we sent to; its address has the vote.
        observed: What they saw.
        sent_at: When the request left, seconds.
    """

    port_index: int
    local_port: int
    observer: PeerId
    destination: Endpoint
    observed: Endpoint
    sent_at: float


@dataclass(frozen=True, slots=True)
class FilterTrial:
    """One try to get in through a mapping from an endpoint it was not opened for.

    Attributes:
        answer_from: ALTERNATE: the address was contacted, the port was not. THIRD_PEER: neither.
        was_answered: Whether it got in.
    """

    answer_from: AnswerFrom
    was_answered: bool


def classify(
    observations: Sequence[Observation],
    *,
    local_endpoints: Sequence[Endpoint] = (),
    filter_trials: Iterable[FilterTrial] = (),
) -> NatProfile:
    """Turn echoes and filter tests into a profile.

    Args:
        observations: In any order. Those that do not cross a NAT to the internet (a neighbour in
            the same house sees our private address) and those over IPv6 are left out.
        local_endpoints: Host candidates: the main port at each of our own addresses.
        filter_trials: What was tried; silence counts only several times over.

    Returns:
        A profile whose unknowns are None. Without a single usable echo it rests on the interfaces
        alone: a global IPv4 address of our own means no NAT, anything else means not known.
    """
    local = tuple(local_endpoints)[:LOCAL_ENDPOINTS_MAX]
    usable = [
        each
        for each in observations
        if ":" not in each.observed.ip and each.observed.kind is AddressKind.GLOBAL
    ]
    if not usable:
        return _from_interfaces(local)
    public_ips = _public_ips(usable)
    believed = [each for each in usable if each.observed.ip in public_ips]
    if not believed:
        return NatProfile.unknown(local)
    echo_count = len(believed)
    observer_count = len({each.destination.ip for each in believed})
    main = [each for each in believed if each.port_index == 0]
    own = next((each.observed for each in main if each.observed in local), None)
    filtering = _filtering(list(filter_trials), is_translated=own is None)
    if own is not None:
        return NatProfile(
            mapping=Mapping.EIM,
            filtering=filtering,
            public_ips=public_ips,
            main_endpoint=own,
            local_endpoints=local,
            is_translated=False,
            echo_count=echo_count,
            observer_count=observer_count,
        )
    mapping, common_endpoint = _mapping(main)
    allocation = fit_allocation(
        [
            PortSample(each.local_port, each.destination, each.observed.port, each.sent_at)
            for each in believed
        ]
    )
    main_endpoint = common_endpoint
    if main_endpoint is None and main:
        newest = max(main, key=lambda each: each.sent_at)
        keeps_port = allocation is not None and allocation.law is AllocationLaw.PRESERVING
        if filtering is Filtering.EIF or (keeps_port and newest.observed.port == newest.local_port):
            main_endpoint = newest.observed
    return NatProfile(
        mapping=mapping,
        filtering=filtering,
        allocation=allocation,
        public_ips=public_ips,
        main_endpoint=main_endpoint,
        local_endpoints=local,
        is_translated=True,
        echo_count=echo_count,
        observer_count=observer_count,
    )


def _from_interfaces(local: tuple[Endpoint, ...]) -> NatProfile:
    own = next((e for e in local if e.kind is AddressKind.GLOBAL and ":" not in e.ip), None)
    if own is None:
        return NatProfile.unknown(local)
    return NatProfile(
        mapping=Mapping.EIM,
        public_ips=(own.ip,),
        main_endpoint=own,
        local_endpoints=local,
        is_translated=False,
    )


def _winner(votes: Iterable[_T]) -> tuple[_T | None, int]:
    """Return the value that wins by libtorrent's rule, if any, and its number of votes."""
    ranking = Counter(votes).most_common(2)
    if not ranking:
        return None, 0
    value, count = ranking[0]
    runner_up = ranking[1][1] if len(ranking) > 1 else 0
    return (value, count) if count * 2 / 3 > runner_up else (None, count)


def _public_ips(usable: Sequence[Observation]) -> tuple[str, ...]:
    """Return our addresses: the winner, and others that two or more voters saw.

    Others exist behind NATs with arbitrary pooling (RFC 4787 section 4.1).
    """
    # The main port speaks for a voter; the port_index sorts it first.
    votes: dict[str, str] = {}
    voters: dict[str, dict[str, None]] = {}
    for each in sorted(usable, key=lambda each: (each.port_index, each.sent_at)):
        votes.setdefault(each.destination.ip, each.observed.ip)
        voters.setdefault(each.observed.ip, {})[each.destination.ip] = None
    winner, _ = _winner(votes.values())
    if winner is None:
        return ()
    others = [ip for ip, seen_by in voters.items() if ip != winner and len(seen_by) >= 2]
    return (winner, *others)[:PUBLIC_IPS_MAX]


def _mapping(main: Sequence[Observation]) -> tuple[Mapping | None, Endpoint | None]:
    """Return the mapping behaviour, and the main port's endpoint where all observers agree."""
    # voter address -> (its port -> what that port saw)
    seen: dict[str, dict[int, Endpoint]] = {}
    for each in sorted(main, key=lambda each: each.sent_at):
        seen.setdefault(each.destination.ip, {})[each.destination.port] = each.observed
    same_count = sum(len(set(by.values())) == 1 for by in seen.values() if len(by) > 1)
    different_count = sum(len(set(by.values())) > 1 for by in seen.values())
    # A voter whose two ports saw different endpoints has voted against any common one.
    common, vote_count = _winner(
        next(iter(by.values())) if len(set(by.values())) == 1 else None for by in seen.values()
    )
    if len(seen) == 1:
        if different_count:
            return Mapping.APDM, None
        return None, common  # EIM or ADM: it takes a second address to tell
    if common is not None and vote_count > 1:
        return Mapping.EIM, common
    if not seen:
        return None, None
    # With no observer that has two ports at one address it is APDM or ADM. APDM is the assumption:
    # it is what carriers that are not EIM do (Richter et al., IMC 2016).
    return (Mapping.ADM if same_count > different_count else Mapping.APDM), None


def _filtering(trials: Sequence[FilterTrial], *, is_translated: bool) -> Filtering | None:
    answered = {trial.answer_from for trial in trials if trial.was_answered}
    if AnswerFrom.THIRD_PEER in answered:
        return Filtering.EIF
    if AnswerFrom.ALTERNATE in answered:
        # Or EIF, where no third peer could be asked: ADF is the part that was seen. Without a NAT
        # it is no news at all, and a host is open until a test has shown a firewall.
        was_tried = any(trial.answer_from is AnswerFrom.THIRD_PEER for trial in trials)
        return Filtering.ADF if is_translated or was_tried else None
    tried_count = sum(trial.answer_from is AnswerFrom.ALTERNATE for trial in trials)
    return Filtering.APDF if tried_count >= FILTER_TRIAL_COUNT_MIN else None


@dataclass(frozen=True, slots=True)
class EchoToSend:
    """An echo to ask for.

    Attributes:
        port_index: The port to send from; 0 is the main port.
        destination: Where to send an echo request. Not for THIRD_PEER.
        transaction: 8 random bytes, new for each request.
        answer_from: From where the reply is to come. For THIRD_PEER send nothing from the port:
            ask `observer` over the connection to have a neighbour send a reply to `observed`.
        observer: Who is asked.
        observed: Our own external endpoint that the third peer is to send to; else None.
    """

    port_index: int
    destination: Endpoint
    transaction: bytes
    answer_from: AnswerFrom
    observer: PeerId
    observed: Endpoint | None = None


@dataclass(slots=True)
class _Exchange:
    """One echo: asked for up to len(RETRY_AFTER_S) times, or once where silence is an answer."""

    port_index: int
    observer: Observer
    destination: Endpoint
    answer_from: AnswerFrom
    due_at: float | None  # when to send next or give up; None: over
    observed: Endpoint | None = None
    try_count: int = 0
    was_answered: bool = False


class NatInspection:
    """The machine that inspects our NAT: which echoes to ask for, when to ask again, what follows.

    Call `requests_to_send` at the start, after every input, and when `next_timer` is due.

    Args:
        observers: Who can be asked; the first `OBSERVERS_MAX` are. More addresses are better than
            more ports: one address cannot tell EIM from ADM.
        local_ports: UDP ports to send from: the main port, then fresh ones that have not sent yet.
        local_endpoints: Host candidates: the main port at each of our own addresses.
        rng: Draws transactions; `random.SystemRandom` where strangers may guess.
        now: Seconds on the clock of all later calls.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        *,
        local_ports: Sequence[int],
        local_endpoints: Sequence[Endpoint] = (),
        rng: random.Random,
        now: float,
    ) -> None:
        self._observers = tuple(observers)[:OBSERVERS_MAX]
        self._local_ports = tuple(local_ports)
        self._local_endpoints = tuple(local_endpoints)
        self._rng = rng
        self._observations: list[Observation] = []
        self._pending: dict[bytes, tuple[_Exchange, float]] = {}  # transaction -> sent at
        self._exchanges = self._first_exchanges(now)
        # Two kinds of trials take turns over the fresh ports, as these become ready.
        self._trials_left = {
            AnswerFrom.ALTERNATE: FILTER_TRIAL_COUNT,
            AnswerFrom.THIRD_PEER: FILTER_TRIAL_COUNT
            if any(observer.is_neighbour for observer in self._observers)
            else 0,
        }
        self.ignored_count = 0

    def receive_reply(
        self,
        port_index: int,
        transaction: bytes,
        observed: Endpoint,
        source: Endpoint,
        now: float,
        *,
        sender: PeerId | None = None,
    ) -> None:
        """Take an echo reply whose signature was checked; others than ours are counted and ignored.

        Args:
            port_index: The port it came in on.
            transaction: From the reply.
            observed: From the reply.
            source: Where it came from.
            now: Seconds.
            sender: Who signed it; None where the caller has checked that itself.
        """
        exchange, sent_at = self._pending.get(transaction, (None, 0.0))
        if (
            exchange is None
            or port_index != exchange.port_index
            or exchange.was_answered
            or not self._is_expected(exchange, source, sender)
        ):
            self.ignored_count += 1
            return
        exchange.was_answered = True
        exchange.due_at = None
        if exchange.answer_from is not AnswerFrom.MAIN:
            return
        self._observations.append(
            Observation(
                port_index=port_index,
                local_port=self._local_ports[port_index],
                observer=exchange.observer.peer_id,
                destination=exchange.destination,
                observed=observed,
                sent_at=sent_at,
            )
        )
        if port_index > 0:
            self._start_trial(exchange, observed, now)

    def withdraw(self, transaction: bytes) -> None:
        """Forget an echo that could not be asked for: its silence proves nothing."""
        exchange, _ = self._pending.pop(transaction, (None, 0.0))
        self._exchanges = [each for each in self._exchanges if each is not exchange]

    def handle_timer(self, now: float) -> None:
        """Take note of the time; what is due then comes out of `requests_to_send`."""
        for exchange in self._exchanges:
            tries = len(RETRY_AFTER_S) if exchange.answer_from is AnswerFrom.MAIN else 1
            if (
                exchange.due_at is not None
                and exchange.due_at <= now
                and exchange.try_count == tries
            ):
                exchange.due_at = None

    def requests_to_send(self, now: float) -> list[EchoToSend]:
        """Return what is due, in the order to send it."""
        self.handle_timer(now)
        requests = []
        for exchange in self._exchanges:
            if exchange.due_at is None or exchange.due_at > now:
                continue
            wait_s = FILTER_TRIAL_TIMEOUT_S
            if exchange.answer_from is AnswerFrom.MAIN:
                wait_s = RETRY_AFTER_S[exchange.try_count]
            exchange.try_count += 1
            exchange.due_at = now + wait_s
            transaction = self._rng.randbytes(TRANSACTION_BYTES)
            self._pending[transaction] = (exchange, now)
            requests.append(
                EchoToSend(
                    port_index=exchange.port_index,
                    destination=exchange.destination,
                    transaction=transaction,
                    answer_from=exchange.answer_from,
                    observer=exchange.observer.peer_id,
                    observed=exchange.observed,
                )
            )
        return requests

    def next_timer(self) -> float | None:
        """Return when to call `requests_to_send` next; None when finished."""
        return min(
            (each.due_at for each in self._exchanges if each.due_at is not None), default=None
        )

    def result(self) -> NatProfile | None:
        """Return the profile once nothing is under way any more; None before."""
        if self.next_timer() is not None:
            return None
        return classify(
            self._observations,
            local_endpoints=self._local_endpoints,
            filter_trials=[
                FilterTrial(each.answer_from, each.was_answered)
                for each in self._exchanges
                if each.answer_from is not AnswerFrom.MAIN
            ],
        )

    @property
    def observations(self) -> tuple[Observation, ...]:
        """The echoes so far, in the order they came: the histogram of a field test."""
        return tuple(self._observations)

    def _first_exchanges(self, now: float) -> list[_Exchange]:
        asks = [(0, observer, observer.endpoint) for observer in self._observers]
        asks += [
            (0, observer, observer.alternate)
            for observer in self._observers
            if observer.alternate is not None
        ]
        if self._observers:
            for port_index in range(1, len(self._local_ports)):
                # Neighbours first: they alone can ask a third peer, and trials reuse these ports.
                ranked = sorted(self._observers, key=lambda each: not each.is_neighbour)
                observer = ranked[(port_index - 1) % len(ranked)]
                asks.append((port_index, observer, observer.endpoint))
        return [
            _Exchange(port_index, observer, destination, AnswerFrom.MAIN, now + index * SPACING_S)
            for index, (port_index, observer, destination) in enumerate(asks)
        ]

    def _start_trial(self, echo: _Exchange, observed: Endpoint, now: float) -> None:
        """Use a fresh port whose mapping is known to exist for one filter trial."""
        left = self._trials_left
        kind = AnswerFrom.ALTERNATE
        if echo.observer.is_neighbour and left[AnswerFrom.THIRD_PEER] >= left[kind]:
            kind = AnswerFrom.THIRD_PEER
        if left[kind] == 0:
            return
        left[kind] -= 1
        self._exchanges.append(
            replace(
                echo,
                answer_from=kind,
                due_at=now,
                observed=observed if kind is AnswerFrom.THIRD_PEER else None,
                try_count=0,
                was_answered=False,
            )
        )

    def _is_expected(self, exchange: _Exchange, source: Endpoint, sender: PeerId | None) -> bool:
        asked = exchange.destination
        by_observer = sender is None or sender == exchange.observer.peer_id
        match exchange.answer_from:
            case AnswerFrom.MAIN:
                return by_observer and source == asked
            case AnswerFrom.ALTERNATE:
                return by_observer and source.ip == asked.ip and source.port != asked.port
            case AnswerFrom.THIRD_PEER:
                return source.ip != asked.ip
