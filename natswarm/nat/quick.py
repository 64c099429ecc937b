"""The quick part of an inspection: mapping, filtering, and where ports come from.

We ask from our main port, and from fresh ports, each of which talks to one observer only:

    P1:p, P1:q, P2:p see   equal, equal       one endpoint for all           EIM
                           equal, different   one for each address           ADM
                           different          one for each endpoint          APDM
    from a fresh port that has sent to P1:p alone
        P3, unknown to it, gets answers in    anybody does                   EIF
        P1 gets an answer in from q           the address does               ADF
        neither, several times over           only P1:p does                 APDF
    the external ports of all of them         the law of allocation          `fit.py`

A NAT that keeps ports and has several addresses, one drawn for each mapping, shows equal endpoints
by chance: once in two to eight times. So where the main port got one port everywhere and fresh ones
got several addresses, some fresh ports that are done with ask other endpoints as well.

This machine decides which echoes to ask for and when to ask again; `classify.py` says what follows.
It sends at most 60 packets and takes less than 3 s where somebody answers.

Source: RFC 5780 for the tests, RFC 4787 for the words. Knows no sockets, keys or datagram formats.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Mapping
from natswarm.nat.classify import FilterTrial, Observation
from natswarm.nat.findings import Findings
from natswarm.nat.measurement import AskThirdPeer, Observer, Reply, Request, SendEcho
from natswarm.wire import TRANSACTION_BYTES

__all__ = ["BehaviourTest"]

# All that is sent, retries and the requests to neighbours counted.
PACKETS_MAX = 60

# Left for asking again: at 10 % loss each way 40 echoes take 9 more.
RETRIES = 12

# Requests leave one after another, so that the ports of a counting NAT stay in order, and so that a
# NAT that limits new mappings to 100 a second (RFC 4787 names none; home routers do) keeps up.
SPACING_S = 0.015

# When an echo is asked for again, and when it is given up. A reply takes 50 to 300 ms on mobile
# networks; three tries at 10 % loss each way fail once in 140.
RETRY_AFTER_S = (0.5, 0.7, 1.0)

# Silence proves a filter only when loss is unlikely: four tries at 10 % loss each way are all lost
# once in 770.
FILTER_TRIAL_COUNT = 4
# Half of them ask another address, half another port of the same: with mappings of their own for
# each, four ports get the same of two addresses by chance once in 16 times, after the main port.
POOLED_PORTS = 8

# How long an answer to a trial may take: so many of the longest round trips seen, and something for
# busy machines. A third peer is asked by two messages over connections before its datagram leaves.
TRIAL_ROUND_TRIPS = {False: 3.0, True: 5.0}
TRIAL_SLACK_S = 0.3
TRIAL_TIMEOUT_MAX_S = 1.5


@dataclass(slots=True)
class _Exchange:
    """One echo, asked for up to len(RETRY_AFTER_S) times."""

    port_index: int
    observer: Observer
    destination: Endpoint
    due_at: float | None  # when to send next or give up; None: over
    try_count: int = 0


@dataclass(slots=True)
class _Trial:
    """One try to get in through the mapping of an exchange; made once, silence is an answer."""

    exchange: _Exchange
    by_stranger: bool
    observed: Endpoint
    due_at: float | None  # when to send or to take silence for an answer; None: over
    was_sent: bool = False


class BehaviourTest:
    """The test `NatTest.BEHAVIOUR`.

    Args:
        findings: Whom to ask, and where what is seen goes.
        ports: `port_count` fresh ones.
        rng: Draws transactions.
        now: Seconds.
    """

    duration_s = 3.0

    @staticmethod
    def port_count(findings: Findings) -> int:
        """Return how many fresh ports it wants: what is left of the packets, 36 for two observers.

        Each shows one more port of the law, and 24 to 36 show it with 99 % (`fit.py`).
        """
        if not findings.observers:
            return 0
        return PACKETS_MAX - 2 * FILTER_TRIAL_COUNT - RETRIES - len(_main_asks(findings.observers))

    @staticmethod
    def packets(findings: Findings) -> int:
        """Return how many packets it sends at most."""
        return PACKETS_MAX if findings.observers else 0

    def __init__(self, findings: Findings, ports: range, rng: random.Random, now: float) -> None:
        self._findings = findings
        self._rng = rng
        self._packets_left = PACKETS_MAX
        self._exchanges = _first_exchanges(findings.observers, ports, now)
        self._trials: list[_Trial] = []
        # Two kinds of trials take turns over the fresh ports, as these become ready.
        self._trials_left = {
            False: FILTER_TRIAL_COUNT,
            True: FILTER_TRIAL_COUNT if any(e.is_neighbour for e in findings.observers) else 0,
        }
        self._pending: dict[bytes, tuple[_Exchange | _Trial, float]] = {}  # and when it was sent
        self._looked_closer = False
        self._round_trip_s = 0.0  # the longest

    def requests_to_send(self, now: float) -> list[Request]:
        """Return what is due, in the order to send it."""
        requests: list[Request] = []
        # Trials first: their silence takes longest.
        for trial in self._trials:
            if trial.due_at is not None and trial.due_at <= now:
                trial.due_at = None
                if trial.was_sent:
                    self._note(trial, was_answered=False)
                elif self._packets_left > 0:
                    trial.was_sent = True
                    trial.due_at = now + self._patience_s(trial)
                    requests.append(self._ask_trial(trial, now))
        for exchange in self._exchanges:
            if exchange.due_at is not None and exchange.due_at <= now:
                exchange.due_at = None
                if exchange.try_count < len(RETRY_AFTER_S) and self._packets_left > 0:
                    exchange.due_at = now + RETRY_AFTER_S[exchange.try_count]
                    exchange.try_count += 1
                    requests.append(self._ask_echo(exchange, now))
        self._look_closer(now)
        return requests

    def receive_reply(self, reply: Reply, now: float) -> None:
        """Take a reply; one that is not expected is ignored."""
        asked, sent_at = self._pending.get(reply.transaction, (None, 0.0))
        if isinstance(asked, _Exchange) and _answers(asked, reply):
            self._forget(asked)
            asked.due_at = None
            self._round_trip_s = max(self._round_trip_s, now - sent_at)
            self._findings.observations.append(
                Observation(
                    port_index=reply.port_index,
                    local_port=reply.local_port,
                    observer=asked.observer.peer_id,
                    destination=asked.destination,
                    observed=reply.observed,
                    sent_at=sent_at,
                )
            )
            if reply.port_index > 0 and not self._looked_closer:
                self._start_trial(asked, reply.observed, now)
            self._look_closer(now)
        elif isinstance(asked, _Trial) and _got_in(asked, reply):
            self._forget(asked)
            asked.due_at = None
            self._note(asked, was_answered=True)

    def withdraw(self, transaction: bytes) -> None:
        """Forget a request that could not be sent: its silence proves nothing."""
        asked, _ = self._pending.pop(transaction, (None, 0.0))
        if isinstance(asked, _Trial):
            asked.due_at = None

    def next_timer(self) -> float | None:
        """Return when to call `requests_to_send` next; None when finished."""
        due: list[_Exchange | _Trial] = [*self._exchanges, *self._trials]
        return min((each.due_at for each in due if each.due_at is not None), default=None)

    def conclude(self) -> None:
        """Say of each field of the quick part that is not known why not."""
        findings = self._findings
        findings.unknown.update(_reasons(findings))

    def _patience_s(self, trial: _Trial) -> float:
        patience_s = TRIAL_ROUND_TRIPS[trial.by_stranger] * self._round_trip_s + TRIAL_SLACK_S
        return min(patience_s, TRIAL_TIMEOUT_MAX_S)

    def _ask_echo(self, exchange: _Exchange, now: float) -> SendEcho:
        return SendEcho(
            port_index=exchange.port_index,
            destination=exchange.destination,
            observer=exchange.observer.peer_id,
            transaction=self._new_transaction(exchange, now),
        )

    def _ask_trial(self, trial: _Trial, now: float) -> Request:
        exchange = trial.exchange
        transaction = self._new_transaction(trial, now)
        if trial.by_stranger:
            return AskThirdPeer(exchange.observer.peer_id, transaction, trial.observed)
        return SendEcho(
            port_index=exchange.port_index,
            destination=exchange.destination,
            observer=exchange.observer.peer_id,
            transaction=transaction,
            from_alternate=True,
        )

    def _new_transaction(self, asked: _Exchange | _Trial, now: float) -> bytes:
        self._packets_left -= 1
        transaction = self._rng.randbytes(TRANSACTION_BYTES)
        self._pending[transaction] = (asked, now)
        return transaction

    def _forget(self, asked: _Exchange | _Trial) -> None:
        """Take no second reply, to whichever try."""
        self._pending = {
            transaction: entry
            for transaction, entry in self._pending.items()
            if entry[0] is not asked
        }

    def _start_trial(self, echo: _Exchange, observed: Endpoint, now: float) -> None:
        """Use a fresh port whose mapping is known to exist for one filter trial."""
        left = self._trials_left
        by_stranger = echo.observer.is_neighbour and left[True] >= left[False]
        if left[by_stranger] == 0:
            return
        left[by_stranger] -= 1
        self._trials.append(_Trial(echo, by_stranger, observed, now))

    def _look_closer(self, now: float) -> None:
        """Once all is asked: where addresses are drawn, see if equal ones were chance."""
        if self._looked_closer or any(each.due_at is not None for each in self._exchanges):
            return
        self._looked_closer = True
        seen = self._findings.observations
        main_ports = {each.observed.port for each in seen if each.port_index == 0}
        if len(main_ports) != 1 or len({each.observed.ip for each in seen}) == 1:
            return
        in_trial = {trial.exchange.port_index for trial in self._trials}
        first_asked = {each.port_index: each.destination for each in seen if each.port_index > 0}
        ready = [port for port in first_asked if port not in in_trial]
        for index, port in enumerate(ready[:POOLED_PORTS]):
            asked = first_asked[port]
            others = [
                each
                for each in _main_asks(self._findings.observers)
                # Every second one asks the other port of the same address.
                if each[1] != asked and (each[1].ip == asked.ip) is (index % 2 == 1)
            ]
            if others:
                due_at = now + index * SPACING_S
                self._exchanges.append(_Exchange(port, *self._rng.choice(others), due_at))

    def _note(self, trial: _Trial, *, was_answered: bool) -> None:
        # An answer that comes after its time is noted as well, beside the silence.
        self._findings.filter_trials.append(FilterTrial(trial.by_stranger, was_answered))


def _main_asks(observers: tuple[Observer, ...]) -> list[tuple[Observer, Endpoint]]:
    """Return whom to ask from the main port, and where: every first port before any second."""
    asks = [(observer, observer.endpoint) for observer in observers]
    return asks + [
        (observer, observer.alternate) for observer in observers if observer.alternate is not None
    ]


def _first_exchanges(observers: tuple[Observer, ...], ports: range, now: float) -> list[_Exchange]:
    asks = [(0, observer, destination) for observer, destination in _main_asks(observers)]
    if observers:
        for index, port in enumerate(ports):
            observer = observers[index % len(observers)]
            asks.append((port, observer, observer.endpoint))
    return [
        _Exchange(port_index, observer, destination, now + index * SPACING_S)
        for index, (port_index, observer, destination) in enumerate(asks)
    ]


def _answers(asked: _Exchange, reply: Reply) -> bool:
    return (
        reply.port_index == asked.port_index
        and reply.sender == asked.observer.peer_id
        and reply.source == asked.destination
    )


def _got_in(asked: _Trial, reply: Reply) -> bool:
    exchange, source = asked.exchange, reply.source
    if reply.port_index != exchange.port_index:
        return False
    if asked.by_stranger:
        return source.ip != exchange.destination.ip
    return (
        reply.sender == exchange.observer.peer_id
        and source.ip == exchange.destination.ip
        and source.port != exchange.destination.port
    )


def _reasons(findings: Findings) -> dict[str, str]:
    """Return the quick part's fields that are not known -> why not."""
    profile = findings.profile
    if not findings.observers and not findings.observations:
        why = "there is no peer to ask: connect to one, by an invite for example"
    elif not findings.observations:
        why = "none of the peers we asked has answered"
    elif profile.is_translated is None:
        why = "the peers that answered contradict each other, or none of them is on the internet"
    else:
        why = "too few of the peers we asked have answered"
    reasons: dict[str, str] = {}
    if profile.is_translated is not False:
        for name in ("mapping", "allocation", "pooling", "main_endpoint", "public_ips"):
            if not getattr(profile, name):
                reasons[name] = why
        if profile.mapping is None and profile.is_translated:
            reasons["mapping"] = "it takes observers at two addresses to tell EIM from ADM"
        if profile.main_endpoint is None and profile.mapping not in (None, Mapping.EIM):
            reasons["main_endpoint"] = "every peer sees the main port at another endpoint"
    if profile.filtering is None:
        is_seen = profile.is_translated is not None
        reasons["filtering"] = "too few tries to tell a filter from loss" if is_seen else why
    return reasons
