"""The machine, by script and over a network that loses, doubles, delays and forges."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from simulated_puncture import ATTEMPT, keys_of

from natswarm.address import Endpoint
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw
from natswarm.puncture.plan import Burst, Limits, Openers, Plan, Strategy, plan_direct
from natswarm.puncture.puncturer import (
    REFLEXIVE_CHECKS_MAX,
    SEQUENCES_MAX,
    PathFound,
    ProbeToSend,
    PunctureEvent,
    PunctureExhausted,
    Puncturer,
)
from natswarm.wire import Probe, ProbeKind, decode_probe_untrusted, encode_probe

A, B = Endpoint("198.51.100.1", 4000), Endpoint("203.0.113.1", 5000)
ELSEWHERE = Endpoint("203.0.113.66", 6666)
BLOCK = PortAllocation(AllocationLaw.BLOCK, low=2048, high=2303, block_size=256, blocks=(2048,))


def machine(side: int = 0, plan: Plan | None = None, *, now: float = 0.0) -> Puncturer:
    """Side 0 controls; its peer is side 1."""
    plan = plan or plan_direct([B if side == 0 else A])
    return Puncturer(plan, keys_of(side), ATTEMPT, side == 0, now)


def plan_with(
    *,
    checks: tuple[Endpoint, ...] = (),
    openers: Openers | None = None,
    burst: Burst | None = None,
    probes_per_s: float = 1000.0,
    probe_count_max: int = 30_000,
    duration_s: float = 10.0,
) -> Plan:
    return Plan(
        strategy=Strategy.ONE_SIDED_BIRTHDAY,
        checks=checks,
        openers=openers,
        burst=burst,
        probes_per_s=probes_per_s,
        probe_count_max=probe_count_max,
        duration_s=duration_s,
        expected_probe_count=1.0,
        p99_probe_count=1,
        success_probability=0.999,
        expected_s=0.3,
        reason="a test",
    )


def said(probes: list[ProbeToSend], side: int) -> list[Probe]:
    """Decode what `side` sent."""
    return [decode_probe_untrusted(probe.data, keys_of(side).send) for probe in probes]


def run_alone(puncturer: Puncturer, until: float) -> Iterator[tuple[float, ProbeToSend]]:
    """Drive a machine that hears nothing; yield what it sends."""
    now = 0.0
    while now <= until:
        for probe in puncturer.probes_to_send(now):
            yield now, probe
        timer = puncturer.next_timer()
        if timer is None:
            return
        assert timer > now, "a machine that wants to be woken at once, again and again"
        now = timer


def from_a(kind: ProbeKind, sequence: int) -> bytes:
    return encode_probe(Probe(kind, ATTEMPT, sequence), keys_of(0).send)


def from_b(kind: ProbeKind, sequence: int, observed: Endpoint | None = None) -> bytes:
    return encode_probe(Probe(kind, ATTEMPT, sequence, observed), keys_of(1).send)


# The handshake, step by step ----------------------------------------------------------------------


def test_the_handshake_of_the_docstring() -> None:
    a, b = machine(0), machine(1)
    (probe_a,) = a.probes_to_send(0.0)
    assert (probe_a.port_index, probe_a.destination, probe_a.ttl) == (0, B, None)
    (probe_b,) = b.probes_to_send(0.0)  # and lost
    b.receive_datagram(0, probe_a.data, A, 0.05)
    (ack,) = b.probes_to_send(0.05)
    assert said([ack], 1) == [Probe(ProbeKind.ACK, ATTEMPT, 0, A)]
    (probe_b2,) = b.probes_to_send(0.1)
    a.receive_datagram(0, ack.data, B, 0.10)
    a.receive_datagram(0, probe_b2.data, B, 0.10)
    nominate_and_ack = a.probes_to_send(0.10)
    kinds = {p.kind for p in said(nominate_and_ack, 0)}
    assert kinds == {ProbeKind.NOMINATE, ProbeKind.ACK}
    assert a.next_event() is None
    for probe in nominate_and_ack:
        b.receive_datagram(0, probe.data, A, 0.15)
    assert b.next_event() == PathFound(0, A, 2, pytest.approx(0.15))
    (nominated,) = b.probes_to_send(0.15)
    a.receive_datagram(0, nominated.data, B, 0.20)
    assert a.next_event() == PathFound(0, B, 1, pytest.approx(0.20), observed=A)
    for side in (a, b):
        assert side.next_event() is None, "the event comes once"
        assert side.next_timer() is None
        assert side.probes_to_send(60.0) == []
    everything = [probe_a, probe_b, ack, probe_b2, nominated, *nominate_and_ack]
    assert {len(probe.data) for probe in everything} == {49}


def test_after_the_end_the_peer_is_still_answered() -> None:
    a, b = machine(0), machine(1)
    b.receive_datagram(0, from_a(ProbeKind.NOMINATE, 9), A, 1)
    assert isinstance(b.next_event(), PathFound)
    b.probes_to_send(1.0)
    # Our NOMINATED was lost; it asks again, for as long as the driver lingers.
    b.receive_datagram(0, from_a(ProbeKind.NOMINATE, 9), A, 2)
    (again,) = b.probes_to_send(2.0)
    assert said([again], 1)[0].kind is ProbeKind.NOMINATED
    assert b.next_event() is None
    # A second path is not ours any more.
    other = from_a(ProbeKind.NOMINATE, 10)
    b.receive_datagram(0, other, ELSEWHERE, 3.0)
    assert b.probes_to_send(3.0) == []
    assert b.statistics().stray_count == 1
    assert a.statistics().sent_count == 0


def test_an_ack_from_elsewhere_does_not_make_a_path_but_a_candidate() -> None:
    a = machine(0)
    a.probes_to_send(0.0)
    a.receive_datagram(0, from_b(ProbeKind.ACK, 0, A), ELSEWHERE, 0.1)
    probes = a.probes_to_send(0.1)
    assert all(p.kind is ProbeKind.PROBE for p in said(probes, 0))
    assert ELSEWHERE in {probe.destination for probe in probes}
    index = next(
        p.sequence
        for p, s in zip(said(probes, 0), probes, strict=True)
        if s.destination == ELSEWHERE
    )
    a.receive_datagram(0, from_b(ProbeKind.ACK, index, A), ELSEWHERE, 0.2)
    (nominate,) = a.probes_to_send(0.2)
    assert nominate.destination == ELSEWHERE


def test_a_probe_from_an_unexpected_source_becomes_a_path_on_the_port_it_came_in_by() -> None:
    plan = plan_with(openers=Openers(destinations=(B,), port_count=3, probes_per_s=1000.0))
    a = machine(0, plan)
    a.probes_to_send(0.0)
    a.receive_datagram(2, from_b(ProbeKind.PROBE, 70), ELSEWHERE, 0.1)
    probes = a.probes_to_send(0.1)
    answers = [p for p in probes if p.destination == ELSEWHERE]
    assert [p.port_index for p in answers] == [2, 2]
    assert [p.kind for p in said(answers, 0)] == [ProbeKind.ACK, ProbeKind.PROBE]
    a.receive_datagram(2, from_b(ProbeKind.ACK, said(answers, 0)[1].sequence, A), ELSEWHERE, 0.2)
    (nominate,) = a.probes_to_send(0.2)
    assert (nominate.port_index, nominate.destination) == (2, ELSEWHERE)


def test_nominate_is_repeated_and_then_given_up() -> None:
    a = machine(0)
    a.probes_to_send(0.0)
    a.receive_datagram(0, from_b(ProbeKind.ACK, 0, A), B, 0.1)
    times = []
    now = 0.1
    while (timer := a.next_timer()) is not None:
        now = max(now, timer)
        times += [now for p in said(a.probes_to_send(now), 0) if p.kind is ProbeKind.NOMINATE]
    assert len(times) == pytest.approx(50, abs=1)
    event = a.next_event()
    assert isinstance(event, PunctureExhausted)
    assert event.reason == f"a path over {B} was found, then the peer fell silent"
    assert event.elapsed_s == pytest.approx(5.1)


def test_only_the_controlling_side_nominates_and_only_its_own_nomination_is_confirmed() -> None:
    a = machine(0)
    a.probes_to_send(0.0)
    a.receive_datagram(0, from_b(ProbeKind.NOMINATE, 5), B, 0.1)  # B may not
    a.receive_datagram(0, from_b(ProbeKind.NOMINATED, 0), B, 0.1)  # nothing was nominated
    assert a.statistics().stray_count == 2
    a.receive_datagram(0, from_b(ProbeKind.ACK, 0, A), B, 0.1)
    (nominate,) = a.probes_to_send(0.1)
    sequence = said([nominate], 0)[0].sequence
    a.receive_datagram(1, from_b(ProbeKind.NOMINATED, sequence), B, 0.2)
    a.receive_datagram(0, from_b(ProbeKind.NOMINATED, sequence), ELSEWHERE, 0.2)
    a.receive_datagram(0, from_b(ProbeKind.NOMINATED, sequence + 1), B, 0.2)
    assert a.next_event() is None
    a.receive_datagram(0, from_b(ProbeKind.NOMINATED, sequence), B, 0.2)
    assert isinstance(a.next_event(), PathFound)


# Liars --------------------------------------------------------------------------------------------


def test_nothing_that_is_not_authentic_gets_an_answer() -> None:
    a = machine(0)
    (own,) = a.probes_to_send(0.0)
    rng = random.Random(3)
    good = from_b(ProbeKind.PROBE, 7)
    flipped = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    forged = [
        *(rng.randbytes(rng.randrange(120)) for _ in range(200)),
        *flipped,
        good[:-1],
        own.data,  # our own probe thrown back at us: keys have a direction
        encode_probe(Probe(ProbeKind.PROBE, ATTEMPT, 1), b"k" * 32),
    ]
    for data in forged:
        a.receive_datagram(0, data, ELSEWHERE, 0.05)
    assert a.probes_to_send(0.05) == []
    assert a.statistics().forged_count == len(forged)
    assert a.statistics().received_count == 0
    stale = encode_probe(Probe(ProbeKind.NOMINATE, b"attempt0", 1), keys_of(1).send)
    a.receive_datagram(0, stale, B, 0.06)
    assert a.probes_to_send(0.06) == []
    assert a.statistics().stale_count == 1


def test_a_recorded_probe_played_back_from_elsewhere_aims_us_at_nobody() -> None:
    a = machine(0)
    a.probes_to_send(0.0)
    recorded = from_b(ProbeKind.PROBE, 7)
    a.receive_datagram(0, recorded, B, 0.01)
    a.probes_to_send(0.01)
    for port in range(1000, 1100):
        a.receive_datagram(0, recorded, Endpoint("192.0.2.1", port), 0.02)
    assert a.probes_to_send(0.02) == []
    assert a.statistics().replayed_count == 100
    # The network's own duplicate is answered again: the first answer may be lost.
    a.receive_datagram(0, recorded, B, 0.03)
    assert [p.kind for p in said(a.probes_to_send(0.03), 0)] == [ProbeKind.ACK]


def test_what_a_flooding_peer_can_make_us_send_is_bounded() -> None:
    a = machine(0)
    a.probes_to_send(0.0)
    sent = 0
    for sequence in range(2 * SEQUENCES_MAX):
        source = Endpoint("203.0.113.9", 1024 + sequence)
        a.receive_datagram(0, from_b(ProbeKind.PROBE, sequence), source, 0.001)
        sent += len(a.probes_to_send(0.001))
    assert sent <= SEQUENCES_MAX + REFLEXIVE_CHECKS_MAX + 1
    assert a.statistics().replayed_count == SEQUENCES_MAX


# Pace, openers, bursts ----------------------------------------------------------------------------


def burst(**changes: object) -> Burst:
    settings: dict[str, object] = {
        "ips": (B.ip,),
        "allocation": BLOCK,
        "port_indices": (0,),
        "probe_count": 600,
        "probes_per_s": 500.0,
        "start_s": 0.5,
    }
    return Burst(**(settings | changes))  # type: ignore[arg-type]


def test_a_burst_keeps_its_pace_and_tries_every_port_before_any_twice() -> None:
    sent = list(run_alone(machine(0, plan_with(burst=burst())), 5.0))
    assert len(sent) == 600
    times = [time for time, _ in sent]
    assert times[0] == pytest.approx(0.5)
    assert times[-1] == pytest.approx(0.5 + 599 / 500, abs=0.01)
    assert len({round(time, 6) for time in times}) < 300, "several in a tick"
    for start, stop in ((0, 256), (256, 512)):
        ports = [probe.destination.port for _, probe in sent[start:stop]]
        assert sorted(ports) == list(range(2048, 2304))
        assert ports != sorted(ports)


def test_after_a_stall_the_backlog_is_dropped() -> None:
    a = machine(0, plan_with(burst=burst(start_s=0.0)))
    a.probes_to_send(0.0)
    assert len(a.probes_to_send(0.8)) <= 500 * 0.05 + 1
    assert a.next_timer() == pytest.approx(0.805, abs=0.004)


def test_two_sockets_share_a_burst_and_no_pair_repeats() -> None:
    plan = plan_with(burst=burst(port_indices=(1, 2), probe_count=512))
    a = machine(0, plan)
    assert a.extra_port_count == 2
    pairs = [(probe.port_index, probe.destination) for _, probe in run_alone(a, 5.0)]
    assert len(set(pairs)) == len(pairs) == 512
    assert {index for index, _ in pairs} == {1, 2}


def test_rounds_wait_for_their_interval() -> None:
    plan = plan_with(
        burst=burst(probe_count=100, round_count=3, round_interval_s=2.0), duration_s=20.0
    )
    times = [time for time, _ in run_alone(machine(0, plan), 19.0)]
    assert len(times) == 300
    starts = [times[0]] + [after for before, after in pairwise(times) if after - before > 0.5]
    assert starts == pytest.approx([0.5, 2.5, 4.5])


def test_a_scan_follows_a_counter_round_the_circle() -> None:
    counter = PortAllocation(AllocationLaw.SEQUENTIAL, step=1, last_port=65_533)
    plan = plan_with(
        burst=burst(allocation=counter, scan_stride=2, scan_lead=2, copies=2, probe_count=10)
    )
    ports = [probe.destination.port for _, probe in run_alone(machine(0, plan), 5.0)]
    assert ports == [port for port in (65_533, 65_535, 1025, 1027, 1029) for _ in range(2)]


def test_several_addresses_are_tried_with_each_port() -> None:
    plan = plan_with(burst=burst(ips=("203.0.113.1", "203.0.113.2"), probe_count=20))
    targets = [probe.destination for _, probe in run_alone(machine(0, plan), 5.0)]
    for first, second in zip(targets[::2], targets[1::2], strict=True):
        assert (first.ip, second.ip) == ("203.0.113.1", "203.0.113.2")
        assert first.port == second.port


def test_openers_are_paced_refreshed_and_low() -> None:
    openers = Openers(destinations=(B,), port_count=100, probes_per_s=200.0, refresh_s=4.0, ttl=4)
    a = machine(0, plan_with(openers=openers, duration_s=9.0))
    assert a.extra_port_count == 100
    sent = list(run_alone(a, 9.0))
    assert {(probe.destination, probe.ttl) for _, probe in sent} == {(B, 4)}
    by_port: dict[int, list[float]] = {}
    for time, probe in sent:
        by_port.setdefault(probe.port_index, []).append(time)
    assert list(by_port) == list(range(1, 101))
    assert by_port[1] == pytest.approx([0.0, 4.0, 8.0], abs=0.01)
    assert by_port[100][0] == pytest.approx(99 / 200, abs=0.01)


def test_checks_start_low_where_the_plan_says_so() -> None:
    plan = Plan(
        strategy=Strategy.SIMULTANEOUS_OPEN,
        checks=(B,),
        checks_ttl=4,
        checks_ttl_s=1.5,
        probes_per_s=100.0,
        probe_count_max=100,
        duration_s=5.0,
        expected_probe_count=1.0,
        p99_probe_count=3,
        success_probability=0.999,
        expected_s=0.3,
        reason="a test",
    )
    sent = [(round(time, 3), probe.ttl) for time, probe in run_alone(machine(0, plan), 5.0)]
    assert sent == [
        (0.0, 4), (0.1, 4), (0.3, 4), (0.7, 4), (1.5, None), (2.5, None), (3.5, None), (4.5, None)
    ]  # fmt: skip


def test_the_budget_ends_sending_but_not_listening() -> None:
    a = machine(0, plan_with(checks=(B,), burst=burst(start_s=0.0), probe_count_max=50))
    assert len(list(run_alone(a, 9.9))) == 50
    assert a.next_timer() == 10.0
    a.receive_datagram(0, from_b(ProbeKind.PROBE, 1), ELSEWHERE, 9.9)
    assert [p.kind for p in said(a.probes_to_send(9.9), 0)] == [ProbeKind.ACK]


def test_a_match_pauses_the_burst_and_silence_resumes_it() -> None:
    plan = plan_with(burst=burst(start_s=0.0))
    a = machine(0, plan)
    (first, *_) = a.probes_to_send(0.0)
    a.receive_datagram(0, from_b(ProbeKind.PROBE, 3), first.destination, 0.001)
    kinds = [p.kind for p in said(a.probes_to_send(0.002), 0)]
    assert kinds == [ProbeKind.ACK], "our probe there may be under way"
    (check,) = a.probes_to_send(plan.retry_s)
    assert check.destination == first.destination
    assert all(p.destination == first.destination for p in a.probes_to_send(0.6))
    assert len(a.probes_to_send(0.71)) > 10, "the burst goes on"


# What a plan may hold besides ---------------------------------------------------------------------


def test_a_burst_hurries_when_most_would_have_been_found() -> None:
    hurried = burst(probe_count=600, probes_per_s=100.0, hurry_count=100, hurry_per_s=500.0)
    times = [time for time, _ in run_alone(machine(0, plan_with(burst=hurried)), 9.0)]
    assert len(times) == 600
    assert times[100] - times[0] == pytest.approx(1.0, abs=0.02)
    assert times[-1] - times[100] == pytest.approx(1.0, abs=0.02)
    assert hurried.duration_s == pytest.approx(2.0)


def test_what_is_kept_is_the_same_each_round() -> None:
    kept = burst(probe_count=40, is_kept=True, round_count=3, round_interval_s=2.0)
    sent = [(probe.port_index, probe.destination) for _, probe in
            run_alone(machine(0, plan_with(burst=kept)), 9.0)]  # fmt: skip
    assert len(sent) == 120
    assert sent[:40] == sent[40:80] == sent[80:]
    assert len(set(sent)) == 40


def test_runs_go_from_port_after_port_to_one_port_of_the_peer() -> None:
    counter = PortAllocation(AllocationLaw.SEQUENTIAL, step=2, last_port=65_531)
    runs = burst(allocation=counter, port_indices=(1, 2, 3), runs=((2, 1), (3, 2)), probe_count=5)
    sent = run_alone(machine(0, plan_with(burst=runs)), 5.0)
    assert [(probe.port_index, probe.destination.port) for _, probe in sent] == [
        (1, 65_533), (2, 65_533), (1, 1025), (2, 1025), (3, 1025)
    ]  # fmt: skip


def test_near_a_counter_all_places_come_before_any_other() -> None:
    counter = PortAllocation(AllocationLaw.SEQUENTIAL, step=1, last_port=5000)
    near = burst(allocation=counter, run_length=4, near_count=10, probe_count=64)
    ports = [
        probe.destination.port - 5000
        for _, probe in run_alone(machine(0, plan_with(burst=near)), 5.0)
    ]
    assert ports[:10] == [4, 8, 3, 7, 2, 6, 10, 1, 5, 9]
    assert len(set(ports)) == 64
    assert min(ports[10:]) == 11


def test_tftp_requests_go_from_every_port_and_from_the_main_port() -> None:
    request = b"\x00\x01natswarm\x00octet\x00"
    server = Endpoint(B.ip, 69)
    openers = Openers(destinations=(server,), port_count=3, probes_per_s=1000.0, is_tftp=True)
    sent = [probe for _, probe in run_alone(machine(0, plan_with(openers=openers)), 1.0)]
    assert [(probe.port_index, probe.destination, probe.data) for probe in sent] == [
        (index, server, request) for index in (1, 2, 3)
    ]
    plan = replace(plan_with(), tftp_targets=(server,), duration_s=3.5)
    times = [time for time, probe in run_alone(machine(0, plan), 9.0) if probe.data == request]
    assert times == pytest.approx([0.0, 1.0, 2.0, 3.0])


def test_a_plan_that_finds_nothing_is_followed_by_the_next_in_the_same_puncture() -> None:
    plan = replace(
        plan_with(checks=(B,), duration_s=1.0),
        fallback=plan_with(burst=burst(probe_count=100, start_s=0.0), duration_s=4.0),
    )
    assert plan.total_duration_s == 5.0
    a = machine(0, plan)
    sent = list(run_alone(a, 9.0))
    assert all(probe.destination == B for time, probe in sent if time < 1.0)
    assert sum(probe.destination != B for _, probe in sent) == 100
    late = [time for time, probe in sent if probe.destination == B and time > 1.0]
    assert late, "host candidates are tried on"
    event = a.next_event()
    assert isinstance(event, PunctureExhausted)
    assert event.elapsed_s == pytest.approx(5.0)


def test_a_path_of_the_first_plan_spares_the_second() -> None:
    plan = replace(
        plan_with(checks=(B,), duration_s=1.0),
        fallback=plan_with(burst=burst(probe_count=100, start_s=0.0), duration_s=4.0),
    )
    a = machine(0, plan)
    a.probes_to_send(0.0)
    assert not a.is_answered
    a.receive_datagram(0, from_b(ProbeKind.ACK, 0, A), B, 0.9)
    assert a.is_answered
    (nominate,) = a.probes_to_send(0.9)
    a.receive_datagram(0, from_b(ProbeKind.NOMINATED, said([nominate], 0)[0].sequence), B, 1.8)
    assert isinstance(a.next_event(), PathFound)
    assert a.probes_to_send(3.0) == []


def test_nobody_else_can_tell_the_order_of_ports_and_attempts_differ_in_it() -> None:
    def order(attempt: bytes, side: int) -> list[int]:
        plan = plan_with(burst=burst())
        alone = Puncturer(plan, keys_of(side), attempt, side == 0, 0.0)
        return [probe.destination.port for _, probe in run_alone(alone, 5.0)]

    assert order(b"attempt1", 0) == order(b"attempt1", 0)
    assert order(b"attempt1", 0) != order(b"attempt2", 0) != order(b"attempt1", 1)


# Ends ---------------------------------------------------------------------------------------------


def exhausted(puncturer: Puncturer) -> PunctureExhausted:
    while (timer := puncturer.next_timer()) is not None:
        puncturer.probes_to_send(timer)
    event = puncturer.next_event()
    assert isinstance(event, PunctureExhausted)
    return event


def test_silence_is_reported_with_what_was_done() -> None:
    event = exhausted(machine(0))
    assert event.probe_count == 13
    assert event.elapsed_s == pytest.approx(10.0)
    assert event.reason.startswith("13 probes in 10.0 s, nothing from the peer: ")


def test_a_one_way_path_is_reported_as_such() -> None:
    a = machine(0)
    a.probes_to_send(0.0)
    a.receive_datagram(0, from_b(ProbeKind.PROBE, 1), B, 0.5)
    assert "our answers do not come back the same way" in exhausted(a).reason


def test_a_peer_that_does_not_choose_is_reported_as_such() -> None:
    b = machine(1)
    b.probes_to_send(0.0)
    ack = encode_probe(Probe(ProbeKind.ACK, ATTEMPT, 0, B), keys_of(0).send)
    b.receive_datagram(0, ack, A, 9.9)
    event = exhausted(b)
    assert "whose choice it is, chose none" in event.reason
    assert event.elapsed_s == pytest.approx(9.9 + 2.5), "the choice gets its time"


def test_a_peer_that_probes_for_ever_does_not_keep_us_for_ever() -> None:
    a = machine(0)
    a.probes_to_send(0.0)
    now, sequence = 0.0, 0
    while (timer := a.next_timer()) is not None:
        now, sequence = max(now + 0.3, timer), sequence + 1
        a.receive_datagram(0, from_b(ProbeKind.PROBE, sequence), B, now)
        a.probes_to_send(now)
        assert now < 15.0
    assert isinstance(a.next_event(), PunctureExhausted)


def test_after_failure_nominations_come_too_late() -> None:
    b = machine(1)
    exhausted(b)
    late = from_a(ProbeKind.NOMINATE, 5)
    b.receive_datagram(0, late, A, 20.0)
    assert b.probes_to_send(20.0) == []
    assert b.next_event() is None


# Two machines over a bad network ------------------------------------------------------------------


class BadNetwork:
    """Two hosts without NATs; datagrams get lost, doubled, delayed past each other."""

    def __init__(
        self, seed: int, *, loss: float = 0.1, doubled: float = 0.2, jitter_s: float = 0.2
    ) -> None:
        self.rng = random.Random(seed)
        self.loss, self.doubled, self.jitter_s = loss, doubled, jitter_s
        self.now = 0.0
        self.sides: list[Puncturer | None] = [None, None]
        self.events: list[PunctureEvent | None] = [None, None]
        self._heap: list[tuple[float, int, int, int, bytes, Endpoint]] = []
        self._count = 0

    def endpoint(self, side: int, port_index: int) -> Endpoint:
        return Endpoint((A.ip, B.ip)[side], 4000 + port_index)

    def run(self, plans: tuple[Plan, Plan], *, skew_s: float, late: int) -> None:
        starts = [0.0, 0.0]
        starts[late] = skew_s
        while self.now < 30.0 and not all(self.events):
            for side in (0, 1):
                if self.sides[side] is None and self.now >= starts[side]:
                    self.sides[side] = machine(side, plans[side], now=self.now)
                self._act(side)
            times = [self._heap[0][0]] if self._heap else []
            for side, puncturer in enumerate(self.sides):
                if puncturer is None:
                    times.append(starts[side])
                elif (timer := puncturer.next_timer()) is not None:
                    times.append(timer)
            self.now = max(self.now, min(times))
            while self._heap and self._heap[0][0] <= self.now:
                _, _, side, port_index, data, source = heapq.heappop(self._heap)
                puncturer = self.sides[side]
                if puncturer is not None:
                    puncturer.receive_datagram(port_index, data, source, self.now)
                    self._act(side)

    def _act(self, side: int) -> None:
        puncturer = self.sides[side]
        if puncturer is None:
            return
        for probe in puncturer.probes_to_send(self.now):
            self._carry(side, probe)
        event = puncturer.next_event()
        if event is not None:
            assert self.events[side] is None
            self.events[side] = event

    def _carry(self, side: int, probe: ProbeToSend) -> None:
        port_index = probe.destination.port - 4000
        if probe.destination.ip != self.endpoint(1 - side, 0).ip or not 0 <= port_index <= 8:
            return
        for _ in range(1 + (self.rng.random() < self.doubled)):
            if self.rng.random() < self.loss:
                continue
            arrival = self.now + 0.02 + self.jitter_s * self.rng.random()
            self._count += 1
            source = self.endpoint(side, probe.port_index)
            entry = (arrival, self._count, 1 - side, port_index, probe.data, source)
            heapq.heappush(self._heap, entry)


DIRECT_PLANS = (
    plan_direct([Endpoint(B.ip, 4000)]),
    plan_direct([Endpoint(A.ip, 4000)]),
)
BIRTHDAY_PLANS = (
    plan_with(
        openers=Openers(destinations=(Endpoint(B.ip, 4000),), port_count=8, probes_per_s=1000.0)
    ),
    plan_with(
        burst=burst(
            ips=(A.ip,),
            allocation=PortAllocation(AllocationLaw.UNIFORM, low=3900, high=4100),
            start_s=0.0,
            probe_count=3000,
        )
    ),
)


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("skew_s", [0.0, 2.0])
@pytest.mark.parametrize("plans", [DIRECT_PLANS, BIRTHDAY_PLANS], ids=["direct", "birthday"])
def test_both_ends_find_one_path_over_a_bad_network(
    plans: tuple[Plan, Plan], skew_s: float, late: int, loss: float
) -> None:
    for seed in range(25):
        network = BadNetwork(seed, loss=loss)
        network.run(plans, skew_s=skew_s, late=late)
        for side in (0, 1):
            event = network.events[side]
            assert isinstance(event, PathFound), f"seed {seed}: {event}"
            other = network.events[1 - side]
            assert isinstance(other, PathFound)
            assert event.endpoint == network.endpoint(1 - side, other.port_index), f"seed {seed}"


def test_a_run_is_a_function_of_its_seed() -> None:
    def trace() -> list[tuple[float, bytes, Endpoint]]:
        sent = run_alone(machine(0, plan_with(checks=(A,), burst=burst())), 5.0)
        return [(time, probe.data, probe.destination) for time, probe in sent]

    assert trace() == trace()


def test_limits_have_room_for_the_ports_of_a_process() -> None:
    assert Limits().socket_count < 1024
