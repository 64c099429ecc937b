"""The path outward: what a trace says about our NATs, and the machine that takes it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.nat.path import Hop, PathAnswer, PathReport, PathTrace

PEER = Endpoint("203.0.113.9", 4000)
HOME, CARRIER, A, B, C = "192.168.1.1", "100.64.0.1", "198.51.100.1", "198.51.100.2", "198.51.100.3"
OURS = "192.168.1.2"


def report(local_ip: str | None, *ips: str | None, destination: Endpoint = PEER) -> PathReport:
    hops = tuple(Hop(ttl, ip) for ttl, ip in enumerate(ips, 1))
    reached = bool(ips) and ips[-1] == destination.ip
    return PathReport(destination, local_ip, hops, reached)


@pytest.mark.parametrize(
    ("local_ip", "ips", "inside", "opener_ttl", "nat_count"),
    [
        # No NAT: the first router does.
        (A, [B, C, PEER.ip], 0, 1, 0),
        (A, [None, B, C], 0, 2, 0),
        # A home, a carrier, a home behind a carrier of either kind.
        (OURS, [HOME, A, B, PEER.ip], 1, 2, 1),
        ("100.64.0.2", ["100.127.255.254", CARRIER, A, B], 2, 3, 1),
        ("10.8.0.2", ["10.0.0.1", A, B], 1, 2, 1),
        (OURS, [HOME, "100.127.255.254", CARRIER, A, B], 3, 4, 2),
        (OURS, [HOME, "10.0.0.1", A, B], 2, 3, 2),
        ("172.16.3.4", ["172.16.0.1", "10.0.0.1", A, B], 2, 3, 2),
        # A third, inside a home, cannot be told from a router.
        ("192.168.2.2", ["192.168.2.1", HOME, CARRIER, A, B], 3, 4, 2),
        # Silent hops: before the last private one they do not matter, behind it they do.
        (OURS, [None, CARRIER, A, B], 2, 3, 2),
        (OURS, [HOME, None, None, A, B], 1, 4, 1),
        (OURS, [None, None, A, PEER.ip], 0, 3, 1),
        # A carrier's router with a global address before its NAT, and routers of the internet
        # with private ones behind it.
        ("100.64.0.2", [A, CARRIER, B, C], 2, 3, 1),
        (OURS, [HOME, A, B, "10.0.0.1", C], 1, 2, 1),
        (OURS, [HOME, A, None, B, "10.0.0.1", C], 1, 2, 1),
        # One that says the same address twice, as Linux does for what is behind its NAT.
        (OURS, [HOME, CARRIER, CARRIER, A, A, PEER.ip], 3, 4, 2),
        (OURS, [HOME, CARRIER, None, CARRIER, A, B], 4, 5, 2),
        # A circle further out than needed.
        (OURS, [HOME, A, B, A, B], 1, 2, 1),
        # Unknown or useless addresses count for nothing.
        (None, [HOME, A, B], 1, 2, 1),
        ("169.254.3.3", [HOME, A, B], 1, 2, 1),
        (OURS, [HOME, "169.254.0.1", A, B], 1, 3, 1),
    ],
)
def test_where_our_nats_end(
    local_ip: str | None, ips: list[str | None], inside: int, opener_ttl: int, nat_count: int
):
    found = report(local_ip, *ips)
    assert (found.inside_hop_count, found.opener_ttl, found.first_global_ttl) == (
        inside,
        opener_ttl,
        opener_ttl,
    )
    assert found.nat_count_at_least == nat_count
    assert found.reason == ""


@pytest.mark.parametrize(
    ("local_ip", "ips", "nat_count", "reason"),
    [
        (OURS, [], 0, "no router on the way says"),
        (OURS, [None, None, None, PEER.ip], 1, "no router on the way before the destination"),
        (OURS, [HOME], 0, "behind 192.168.1.1, hop 1, nobody answers"),
        (OURS, [HOME, None, CARRIER], 1, "behind 100.64.0.1, hop 3, nobody answers"),
        (OURS, [PEER.ip], 1, "before any router with a global address"),
        (A, [PEER.ip], 0, "before any router with a global address"),
        (OURS, [HOME, PEER.ip], 1, "before any router with a global address"),
        (OURS, [HOME, CARRIER, HOME, CARRIER], 1, "turns in a circle at 192.168.1.1, hop 3"),
        # The destination's own NAT says so: no router of ours, and not the destination.
        (OURS, [PEER.ip, None], 1, "no router on the way says"),
        (OURS, [HOME, PEER.ip, None], 1, "behind 192.168.1.1, hop 1"),
    ],
)
def test_what_cannot_be_known_says_why(
    local_ip: str, ips: list[str | None], nat_count: int, reason: str
):
    found = report(local_ip, *ips)
    assert found.opener_ttl is None
    assert found.nat_count_at_least == nat_count
    assert reason in found.reason


def test_a_destination_inside_our_own_network_has_no_nat_before_it():
    neighbour = Endpoint("192.168.1.7", 4000)
    found = report(OURS, neighbour.ip, destination=neighbour)
    assert (found.nat_count_at_least, found.opener_ttl) == (0, None)
    assert "further away" in found.reason


def test_a_single_hop_that_is_the_nat_of_the_destination_is_no_router_of_ours():
    found = PathReport(PEER, OURS, (Hop(1, PEER.ip),), reached=False)
    assert found.opener_ttl is None
    assert "no router on the way says" in found.reason


def test_nothing_traced_says_why():
    found = PathReport(None, None, (), reached=False, trouble="no peer")
    assert (found.opener_ttl, found.nat_count_at_least, found.reason) == (None, 0, "no peer")


IPS = st.sampled_from([None, HOME, "10.0.0.1", CARRIER, A, B, C, PEER.ip, "169.254.0.1"])


@given(local_ip=IPS, ips=st.lists(IPS, max_size=8))
def test_a_limit_lies_at_a_global_router_behind_all_of_ours_or_there_is_a_reason(
    local_ip: str | None, ips: list[str | None]
):
    found = report(local_ip, *ips)
    assert 0 <= found.nat_count_at_least <= 2
    ttl = found.opener_ttl
    assert (ttl is None) == bool(found.reason)
    if ttl is not None:
        assert ttl > found.inside_hop_count
        assert ips[ttl - 1] in (A, B, C)
        assert PEER.ip not in ips[:ttl]  # it dies before whoever is at the other end


class TestTrace:
    def make(self, ttl_max: int = 4) -> PathTrace:
        trace = PathTrace(PEER, OURS, ttl_max)
        assert trace.ttls_to_send(10.0) == list(range(1, ttl_max + 1))
        return trace

    def test_asks_again_where_nobody_answered(self):
        trace = self.make()
        trace.hear(PathAnswer(1, HOME, is_end=False), 10.1)
        trace.hear(PathAnswer(3, A, is_end=False), 10.2)
        assert trace.ttls_to_send(11.0) == [2, 4]
        trace.hear(PathAnswer(2, CARRIER, is_end=False), 11.1)
        assert not trace.is_complete
        trace.hear(PathAnswer(4, B, is_end=False), 11.1)
        assert trace.is_complete
        assert trace.ttls_to_send(12.0) == []
        assert trace.report().hops == (
            Hop(1, HOME, pytest.approx(0.1)),
            Hop(2, CARRIER, None),  # for which of the two probes?
            Hop(3, A, pytest.approx(0.2)),
            Hop(4, B, None),
        )

    def test_ends_at_the_destination(self):
        trace = self.make(6)
        for ttl in (6, 4, 5):
            trace.hear(PathAnswer(ttl, PEER.ip, is_end=True), 10.1)
        assert trace.ttls_to_send(11.0) == [1, 2, 3]
        trace.hear(PathAnswer(3, PEER.ip, is_end=True), 11.1)  # its first answer was lost
        trace.hear(PathAnswer(1, HOME, is_end=False), 11.1)
        trace.hear(PathAnswer(2, A, is_end=False), 11.1)
        assert trace.is_complete
        found = trace.report()
        assert [hop.ip for hop in found.hops] == [HOME, A, PEER.ip]
        assert found.reached
        assert (found.destination, found.local_ip) == (PEER, OURS)

    def test_ends_at_a_router_that_has_no_way(self):
        trace = self.make()
        trace.hear(PathAnswer(1, HOME, is_end=False), 10.1)
        for ttl in (2, 3, 4):
            trace.hear(PathAnswer(ttl, A, is_end=True), 10.1)
        assert trace.is_complete
        found = trace.report()
        assert [hop.ip for hop in found.hops] == [HOME, A]
        assert not found.reached
        assert found.opener_ttl == 2

    def test_leaves_silence_at_the_end_out_and_keeps_it_in_the_middle(self):
        trace = self.make(8)
        trace.hear(PathAnswer(1, HOME, is_end=False), 10.1)
        trace.hear(PathAnswer(4, A, is_end=False), 10.1)
        assert [hop.ip for hop in trace.report().hops] == [HOME, None, None, A]
        assert self.make().report().hops == ()

    def test_only_the_first_answer_to_what_was_sent_counts(self):
        trace = self.make()
        trace.hear(PathAnswer(1, HOME, is_end=False), 10.1)
        trace.hear(PathAnswer(1, A, is_end=True), 10.2)
        trace.hear(PathAnswer(99, A, is_end=True), 10.2)
        assert [hop.ip for hop in trace.report().hops] == [HOME]
        assert trace.ttls_to_send(11.0) == [2, 3, 4]
