"""The quick part by script: what it asks, when it asks again, which replies it takes."""

from __future__ import annotations

import random

import pytest

from natswarm.address import Endpoint
from natswarm.identity import PeerId
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.findings import NatTest
from natswarm.nat.inspection import NatInspection
from natswarm.nat.measurement import AskThirdPeer, Observer, Reply, Request, SendEcho
from natswarm.nat.profile import NatProfile
from natswarm.nat.quick import FILTER_TRIAL_COUNT, PACKETS_MAX, BehaviourTest
from tools.bench.simulated_inspection import peer_id

LOCAL = Endpoint("192.168.1.7", 40_000)
P1_P, P1_Q = Endpoint("198.51.100.1", 4000), Endpoint("198.51.100.1", 4001)
P2_P, P2_Q = Endpoint("198.51.100.2", 4000), Endpoint("198.51.100.2", 4001)
STRANGER = Endpoint("203.0.113.200", 4000)
WAN = "203.0.113.5"

OBSERVERS = (
    Observer(peer_id("P2"), P2_P, is_neighbour=False),
    Observer(peer_id("P1"), P1_P, P1_Q, is_neighbour=True),
)


def inspection(observers: tuple[Observer, ...] = OBSERVERS) -> NatInspection:
    return NatInspection(observers, local_endpoints=[LOCAL], rng=random.Random(1), now=100.0)


def echo(request: Request) -> SendEcho:
    assert isinstance(request, SendEcho)
    return request


def reply_to(
    request: SendEcho,
    port: int = 1,
    *,
    port_index: int | None = None,
    source: Endpoint | None = None,
    sender: PeerId | None = None,
    transaction: bytes | None = None,
) -> Reply:
    index = request.port_index if port_index is None else port_index
    return Reply(
        port_index=index,
        local_port=LOCAL.port + index,
        transaction=transaction or request.transaction,
        sender=sender or request.observer,
        source=source or request.destination,
        observed=Endpoint(WAN, port),
    )


def run_silent(machine: NatInspection) -> list[tuple[float, Request]]:
    sent = []
    while (timer := machine.next_timer()) is not None:
        sent += [(timer, each) for each in machine.requests_to_send(timer)]
    return sent


def test_without_observers_it_is_over_at_once_and_says_why() -> None:
    machine = inspection(())
    assert machine.requests_to_send(100.0) == []
    assert machine.next_timer() is None
    assert machine.findings.profile == NatProfile.unknown([LOCAL])
    assert set(machine.findings.unknown) == {
        "mapping",
        "filtering",
        "allocation",
        "pooling",
        "main_endpoint",
        "public_ips",
    }
    assert "no peer to ask" in machine.findings.unknown["mapping"]


def test_requests_leave_spaced_and_come_again_until_given_up() -> None:
    machine = inspection()
    sent = [(time, echo(each)) for time, each in run_silent(machine)]
    assert machine.findings.profile == NatProfile.unknown([LOCAL])
    assert "none of the peers" in machine.findings.unknown["filtering"]
    # Neighbours first: they alone can ask a third peer.
    first = [(each.port_index, each.destination) for _, each in sent[:5]]
    assert first == [(0, P1_P), (0, P2_P), (0, P1_Q), (1, P1_P), (2, P2_P)]
    assert len(sent) == PACKETS_MAX == machine.findings.packet_counts[NatTest.BEHAVIOUR]
    assert len({each.transaction for _, each in sent}) == len(sent)
    times = [time for time, each in sent if each.destination == P1_Q]
    assert times[:2] == pytest.approx([100.03, 100.53])
    assert max(time for time, _ in sent) < 103.0


def test_replies_from_elsewhere_unasked_or_forged_change_nothing() -> None:
    machine = inspection()
    (request,) = (echo(each) for each in machine.requests_to_send(100.0))
    for bad in (
        reply_to(request, transaction=b"whatever"),
        reply_to(request, port_index=1),
        reply_to(request, source=P1_Q),
        reply_to(request, source=P2_P),
        reply_to(request, sender=peer_id("P2")),
    ):
        machine.receive_reply(bad, 100.1)
    assert machine.findings.observations == []
    machine.receive_reply(reply_to(request), 100.1)
    machine.receive_reply(reply_to(request), 100.1)  # a duplicate
    machine.receive_reply(reply_to(request, 2), 100.1)  # a changed mind
    assert [each.observed.port for each in machine.findings.observations] == [1]


def test_a_late_answer_to_an_earlier_try_counts() -> None:
    machine = inspection()
    (first,) = (echo(each) for each in machine.requests_to_send(100.0))
    machine.requests_to_send(100.6)
    machine.receive_reply(reply_to(first), 100.7)
    (observation,) = machine.findings.observations
    assert observation.sent_at == 100.0


def test_filter_trials_use_fresh_ports_that_only_talked_to_one_endpoint() -> None:
    machine = inspection()
    requests = [echo(each) for each in machine.requests_to_send(100.1)]
    (fresh,) = (each for each in requests if each.port_index == 1)
    machine.receive_reply(reply_to(fresh, 7), 100.1)
    # A neighbour can find a third peer; that says most, so it comes first.
    trial, *_ = machine.requests_to_send(100.1)
    assert isinstance(trial, AskThirdPeer)
    assert trial.observer == peer_id("P1")
    assert trial.observed == Endpoint(WAN, 7)
    (second,) = (each for each in requests if each.port_index == 2)
    machine.receive_reply(reply_to(second, 8), 100.1)
    trial_2, *_ = (echo(each) for each in machine.requests_to_send(100.1))
    assert trial_2.from_alternate, "P2 is no neighbour"
    assert trial_2.destination == P2_P
    # The main port's echoes start none: it has sent to both ports of P1.
    for request in requests:
        if request.port_index == 0:
            machine.receive_reply(reply_to(request), 100.1)
    assert machine.requests_to_send(100.1) == []
    # From P2's other port, but not the port that was asked; and from a stranger.
    machine.receive_reply(reply_to(trial_2, 8), 100.2)
    machine.receive_reply(reply_to(trial_2, 8, source=STRANGER), 100.2)
    assert machine.findings.filter_trials == []
    machine.receive_reply(reply_to(trial_2, 8, source=P2_Q), 100.2)
    assert [each.was_answered for each in machine.findings.filter_trials] == [True]


@pytest.mark.parametrize(
    ("lets_in_address", "lets_in_strangers", "filtering"),
    [
        (False, False, Filtering.APDF),
        (True, False, Filtering.ADF),
        (True, True, Filtering.EIF),
    ],
)
def test_trials_are_bounded_and_decide(
    lets_in_address: bool, lets_in_strangers: bool, filtering: Filtering
) -> None:
    machine = inspection()
    kinds = []
    while (timer := machine.next_timer()) is not None:
        for request in machine.requests_to_send(timer):
            if isinstance(request, AskThirdPeer):
                kinds.append("stranger")
                if lets_in_strangers:
                    (asked,) = (
                        each.port_index
                        for each in machine.findings.observations
                        if each.observed == request.observed and each.port_index > 0
                    )
                    reply = Reply(
                        asked, 1, request.transaction, peer_id("x"), STRANGER, request.observed
                    )
                    machine.receive_reply(reply, timer)
                continue
            request = echo(request)
            if not request.from_alternate:
                port = 5000 + request.port_index
                machine.receive_reply(reply_to(request, port), timer)
                continue
            kinds.append("alternate")
            if lets_in_address:
                q = Endpoint(request.destination.ip, 4001)
                machine.receive_reply(reply_to(request, source=q), timer)
    assert kinds.count("stranger") == kinds.count("alternate") == FILTER_TRIAL_COUNT
    assert machine.findings.profile.filtering is filtering
    assert machine.findings.profile.mapping is Mapping.EIM


def test_what_could_not_be_asked_proves_nothing() -> None:
    machine = inspection()
    while (timer := machine.next_timer()) is not None:
        for request in machine.requests_to_send(timer):
            if isinstance(request, AskThirdPeer) or echo(request).from_alternate:
                machine.withdraw(request.transaction)
            else:
                machine.receive_reply(reply_to(echo(request), 5000), timer)
    assert machine.findings.profile.filtering is None
    assert "too few tries" in machine.findings.unknown["filtering"]
    assert machine.findings.profile.mapping is Mapping.EIM


def test_giving_up_keeps_what_was_found_and_says_why_the_rest_is_unknown() -> None:
    machine = inspection()
    requests = [echo(each) for each in machine.requests_to_send(100.1)]
    for request in requests[:3]:
        machine.receive_reply(reply_to(request, 9), 100.2)
    machine.give_up("the interface is gone")
    profile = machine.findings.profile
    assert profile.mapping is Mapping.EIM
    assert profile.main_endpoint == Endpoint(WAN, 9)
    assert machine.findings.unknown["filtering"] == "the interface is gone"
    assert "mapping" not in machine.findings.unknown
    assert machine.next_timer() is None
    assert machine.port_count == 1 + BehaviourTest.port_count(machine.findings)
