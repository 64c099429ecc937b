"""The table of a NAT, by scripts of packets: each mapping, filter, law, lifetime and limit."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering, Mapping, Poison, Pooling
from natswarm.sim.load import BackgroundLoad
from natswarm.sim.nat import Nat, NatBehaviour
from natswarm.sim.packet import Packet
from natswarm.sim.ports import (
    Allocation,
    Blocks,
    Preserving,
    ScaledBeta,
    Sequential,
    Uniform,
)
from natswarm.sim.rate import RateLimit

EXTERNAL_IP = "198.51.100.1"
A = Endpoint("10.0.0.1", 5000)
A2 = Endpoint("10.0.0.1", 5001)
B = Endpoint("10.0.0.2", 5000)  # another subscriber with A's port
R1X, R1Y = Endpoint("203.0.113.1", 1000), Endpoint("203.0.113.1", 1001)
R2X, R2Y = Endpoint("203.0.113.2", 1000), Endpoint("203.0.113.2", 1001)

LOAD = BackgroundLoad(subscriber_count=20, flows_per_s=10.0, hold_s=30.0)
LAWS: dict[str, Allocation] = {
    "preserving": Preserving(),
    "uniform": Uniform(),
    "sequential": Sequential(cross_traffic_per_s=3.0),
    "block": Blocks(size=256, max_blocks=2),
    "block-in-order": Blocks(size=128, max_blocks=8, is_sequential=True, keeps_newest=True),
    "beta": ScaledBeta(4630.72, 13_937.38, 2.242, 5.008),
}


class Script:
    """A NAT, a clock, and the two things one can do to it."""

    def __init__(self, behaviour: NatBehaviour, seed: int = 1) -> None:
        self.nat = Nat(behaviour, EXTERNAL_IP, random.Random(seed))
        self.now = 0.0

    def out(self, internal: Endpoint, remote: Endpoint, data: bytes = b"out") -> int | None:
        """Send out; return the external port."""
        packet = self.nat.outbound(Packet(internal, remote, data), self.now)
        self.nat.check()
        if packet is None:
            return None
        assert (packet.source.ip, packet.destination, packet.data) == (EXTERNAL_IP, remote, data)
        return packet.source.port

    def into(self, remote: Endpoint, port: int | None) -> Endpoint | None:
        """Send in; return who gets it."""
        assert port is not None
        packet = self.nat.inbound(Packet(remote, Endpoint(EXTERNAL_IP, port), b"in"), self.now)
        self.nat.check()
        if packet is None:
            return None
        assert (packet.source, packet.data) == (remote, b"in")
        return packet.destination


def script(mapping: Mapping, filtering: Filtering, **more: object) -> Script:
    return Script(NatBehaviour(mapping=mapping, filtering=filtering, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("overloading", [False, True], ids=["exclusive", "overloading"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("filtering", Filtering)
@pytest.mark.parametrize("mapping", Mapping)
def test_every_kind_maps_and_filters_as_its_name_says(
    mapping: Mapping, filtering: Filtering, law: str, overloading: bool
):
    nat = script(mapping, filtering, allocation=LAWS[law], overloading=overloading)
    same_remote = nat.out(A, R1X)
    assert nat.out(A, R1X) == same_remote
    other_port, other_address = nat.out(A, R1Y), nat.out(A, R2X)
    # A NAT that overloads may keep one port for several mappings: then nothing is seen of them.
    shares = overloading and law == "preserving" and filtering is not Filtering.EIF
    shares_within_address = shares and filtering is Filtering.APDF
    assert (other_port == same_remote) == (mapping is not Mapping.APDM or shares_within_address)
    assert (other_address == same_remote) == (mapping is Mapping.EIM or shares)

    port = nat.out(A2, R1X)  # a fresh endpoint: only this one remote
    assert nat.into(R1X, port) == A2
    assert (nat.into(R1Y, port) == A2) == (filtering is not Filtering.APDF)
    assert (nat.into(R2Y, port) == A2) == (filtering is Filtering.EIF)


@pytest.mark.parametrize("law", LAWS)
def test_exclusive_ports_are_exclusive(law: str):
    nat = script(Mapping.APDM, Filtering.APDF, allocation=LAWS[law], overloading=False)
    ports = [nat.out(A, Endpoint("203.0.113.9", port)) for port in range(1, 201)]
    assert len(set(ports)) == 200


def test_overloading_serves_many_remotes_with_few_ports():
    """Linux gave 111 distinct ports to 120 destinations in a block of 512."""
    behaviour = NatBehaviour(
        mapping=Mapping.APDM, filtering=Filtering.APDF, allocation=Uniform(2048, 2559)
    )
    counts = []
    for seed in range(200):
        nat = Script(behaviour, seed)
        ports = [
            nat.nat.outbound(Packet(A, Endpoint("203.0.113.9", p), b""), 0.0) for p in range(1, 121)
        ]
        counts.append(len({packet.source.port for packet in ports if packet is not None}))
    # Expected: 512 * (1 - (511/512)**120) = 107.1, standard deviation 3.3 for one run.
    assert abs(sum(counts) / 200 - 107.1) < 4 * 3.3 / 200**0.5


def test_overloading_never_gives_one_port_to_two_for_one_remote():
    nat = script(Mapping.APDM, Filtering.APDF, allocation=Uniform(2000, 2003))
    ports = [nat.out(Endpoint("10.0.0.1", port), R1X) for port in range(1, 6)]
    assert sorted(port for port in ports if port is not None) == [2000, 2001, 2002, 2003]
    assert ports[4] is None
    assert nat.nat.counters.dropped_no_port == 1
    assert nat.out(A, R1Y) is not None


def test_preserving_falls_back_when_another_subscriber_has_the_port():
    nat = script(Mapping.EIM, Filtering.APDF, overloading=False)
    assert nat.out(A, R1X) == 5000
    moved = nat.out(B, R2X)
    assert moved not in (None, 5000)
    assert nat.out(B, R1X) == moved
    assert nat.into(R2X, moved) == B
    assert nat.into(R1X, 5000) == A


def test_linux_shares_a_port_until_two_want_one_remote():
    nat = script(Mapping.EIM, Filtering.APDF)
    assert nat.out(A, R1X) == 5000
    assert nat.out(B, R2X) == 5000
    moved = nat.out(B, R1X)
    assert moved not in (None, 5000)
    assert nat.nat.counters.moved_count == 1
    assert nat.out(B, R2X) == 5000  # the session it has stays
    assert nat.out(B, R1Y) == moved  # new ones follow
    assert nat.into(R1X, 5000) == A
    assert nat.into(R2X, 5000) == B
    assert nat.into(R1X, moved) == B


@pytest.mark.parametrize("refreshed_by_inbound", [False, True])
@pytest.mark.parametrize(
    ("mapping", "filtering"), [(Mapping.APDM, Filtering.EIF), (Mapping.APDM, Filtering.ADF)]
)
def test_replies_leave_by_the_port_the_packet_came_in_by(
    mapping: Mapping, filtering: Filtering, refreshed_by_inbound: bool
):
    nat = script(
        mapping, filtering, allocation=Uniform(), refreshed_by_inbound=refreshed_by_inbound
    )
    port = nat.out(A, R1X)
    stranger = R1Y if filtering is Filtering.ADF else R2X
    assert nat.into(stranger, port) == A
    assert nat.out(A, stranger) == port
    another = Endpoint(stranger.ip, 2222)
    assert nat.out(A, another) != port


def test_two_that_speak_already_keep_their_port():
    nat = script(Mapping.APDM, Filtering.EIF, allocation=Uniform())
    first, second = nat.out(A, R1X), nat.out(A, R2X)
    assert first != second
    assert nat.into(R2X, first) == A
    assert nat.out(A, R2X) == second


def test_sessions_die_of_idleness_sooner_without_a_reply():
    nat = script(Mapping.APDM, Filtering.APDF, allocation=Uniform())
    unreplied, replied = nat.out(A, R1X), nat.out(A, R2X)
    assert nat.into(R2X, replied) == A
    nat.now = 29.9
    assert nat.nat.external_endpoint(A, R1X, nat.now) == Endpoint(EXTERNAL_IP, unreplied or 0)
    nat.now = 30.0
    assert nat.nat.external_endpoint(A, R1X, nat.now) is None
    assert nat.into(R1X, unreplied) is None
    assert nat.nat.counters.dropped_unmapped == 1
    nat.now = 119.9
    assert nat.into(R2X, replied) == A
    nat.now = 119.9 + 120
    assert nat.into(R2X, replied) is None
    assert nat.out(A, R2X) != replied
    assert nat.nat.mapping_count(nat.now) == 1


def test_a_reply_counts_from_an_age_on():
    nat = script(Mapping.APDM, Filtering.APDF, replied_age_s=2.0)
    young, old = nat.out(A, R1X), nat.out(A, R2X)
    for nat.now in (0.5, 1.9):
        assert nat.into(R1X, young) == nat.into(R2X, old) == A
    nat.now = 2.0
    assert nat.into(R2X, old) == A
    nat.now = 31.9
    assert nat.into(R1X, young) is None
    nat.now = 121.9
    assert nat.into(R2X, old) == A


@pytest.mark.parametrize("refreshed_by_inbound", [False, True])
def test_outbound_refreshes_always_and_inbound_when_told(refreshed_by_inbound: bool):
    nat = script(
        Mapping.EIM,
        Filtering.EIF,
        unreplied_lifetime_s=60.0,
        replied_lifetime_s=60.0,
        refreshed_by_inbound=refreshed_by_inbound,
    )
    port = nat.out(A, R1X)
    nat.now = 50.0
    assert nat.out(A, R1X) == port
    for nat.now in (100.0, 150.0, 200.0):
        lives = refreshed_by_inbound or nat.now < 110
        assert (nat.into(R1X, port) == A) == lives
        assert (nat.into(R2X, port) == A) == lives  # nor does a stranger keep it alive


def test_a_stranger_does_not_open_the_filter_for_its_address_for_longer():
    nat = script(
        Mapping.EIM,
        Filtering.ADF,
        unreplied_lifetime_s=60.0,
        replied_lifetime_s=60.0,
        refreshed_by_inbound=False,
    )
    port = nat.out(A, R1X)
    nat.now = 30.0
    assert nat.out(A, R2X) == port
    assert nat.into(R1Y, port) == A
    nat.now = 61.0
    assert nat.into(R2Y, port) == A
    assert nat.into(R1Y, port) is None
    assert nat.nat.counters.dropped_filtered == 1


def test_traffic_does_not_extend_an_absolute_lifetime():
    nat = script(
        Mapping.EIM, Filtering.APDF, allocation=Uniform(), absolute_lifetime_s=(48.0, 75.0)
    )
    first = nat.out(A, R1X)
    ports = []
    for second in range(0, 200, 5):
        nat.now = float(second)
        ports.append(nat.out(A, R1X))
        assert nat.into(R1X, ports[-1]) == A
    assert ports[9] == first  # 45 s
    assert ports[15] != first  # 75 s
    runs = [len(list(group)) for _, group in itertools.groupby(ports)]
    assert all(10 <= length <= 15 for length in runs[:-1])


def test_subscribers_own_blocks_and_exhaust_only_their_own():
    law = Blocks(1024, 65_535, size=64, max_blocks=2)
    nat = script(Mapping.APDM, Filtering.APDF, allocation=law, overloading=False)
    mine = [nat.out(A, Endpoint("203.0.113.9", port)) for port in range(1, 130)]
    assert mine[128] is None
    assert nat.nat.counters.dropped_no_port == 1
    mine_blocks = {port // 64 for port in mine if port is not None}
    assert len(mine_blocks) == 2
    theirs = nat.out(B, R1X)
    assert theirs is not None
    assert theirs // 64 not in mine_blocks
    nat.now = 30.0  # all over: the next block is another
    assert nat.out(A, R1X) is not None
    assert nat.nat.mapping_count(nat.now) == 1


def test_a_block_that_overloads_does_not_run_out():
    law = Blocks(1024, 65_535, size=64, max_blocks=1)
    nat = script(Mapping.APDM, Filtering.APDF, allocation=law)
    ports = {nat.out(A, Endpoint("203.0.113.9", port)) for port in range(1, 400)}
    assert None not in ports
    assert len({port // 64 for port in ports if port is not None}) == 1


def test_a_subscriber_has_no_more_mappings_than_its_cap():
    nat = script(Mapping.APDM, Filtering.APDF, allocation=Uniform(), max_mappings=64)
    ports = [nat.out(A, Endpoint("203.0.113.9", port)) for port in range(1, 66)]
    assert ports[63] is not None
    assert ports[64] is None
    assert nat.nat.counters.dropped_cap == 1
    assert nat.out(B, R1X) is not None
    nat.now = 30.0
    assert nat.out(A, R1X) is not None


REQUEST = b"\x00\x01natswarm\x00octet\x00"


def test_the_tftp_helper_lets_one_answer_in_from_any_port_of_the_server():
    server = Endpoint(R1X.ip, 69)
    nat = script(Mapping.APDM, Filtering.APDF, allocation=Uniform(), tftp_helper=True)
    port = nat.out(A, server, REQUEST)
    assert nat.into(R2X, port) is None
    assert nat.into(R1Y, port) == A
    assert nat.out(A, R1Y) == port
    assert nat.into(R1Y, port) == A
    assert nat.into(R1X, port) is None  # used up
    assert nat.out(A, server, REQUEST) == port
    assert nat.into(R1X, port) == A


@pytest.mark.parametrize(
    ("remote_port", "data", "has_helper"),
    [(69, b"\x00\x05no request", True), (70, REQUEST, True), (69, REQUEST, False)],
)
def test_the_tftp_helper_hears_only_requests(remote_port: int, data: bytes, has_helper: bool):
    nat = script(Mapping.APDM, Filtering.APDF, allocation=Uniform(), tftp_helper=has_helper)
    port = nat.out(A, Endpoint(R1X.ip, remote_port), data)
    assert nat.into(R1X, port) is None


def test_an_expectation_ends_with_its_request():
    nat = script(Mapping.EIM, Filtering.APDF, tftp_helper=True)
    port = nat.out(A, Endpoint(R1X.ip, 69), REQUEST)
    nat.now = 20.0
    assert nat.out(A, R2X) == port  # keeps the mapping, not the request
    nat.now = 31.0
    assert nat.into(R1X, port) is None


def test_an_early_stranger_moves_our_mapping_on_a_box_that_accepts_it():
    """A Linux router that accepts INPUT: the port is the router's own towards that remote."""
    behaviour = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF)
    for poison in (Poison.NONE, Poison.TAKES_PORT):
        accepts = poison is Poison.TAKES_PORT
        nat = Script(replace(behaviour, poison=poison))
        assert nat.out(A, R1X) == 5000
        assert nat.into(R2X, 5000) is None
        moved = nat.out(A, R2X)
        assert (moved != 5000) == accepts
        assert nat.out(A, R2Y) == moved  # and it stays moved
        assert nat.out(A, R1X) == 5000
        nat.now = 29.0
        assert nat.into(R1Y, 5000) is None
        nat.now = 500.0
        assert nat.nat.mapping_count(nat.now) == 0
        assert nat.out(A, R2X) == 5000


def test_a_stranger_retires_a_mapping_for_remotes_to_come():
    nat = script(Mapping.EIM, Filtering.ADF, allocation=Uniform(), poison=Poison.RETIRES_MAPPING)
    port = nat.out(A, R1X)
    assert nat.into(R1Y, port) == A  # let in: no stranger
    assert nat.out(A, R1Y) == port
    assert nat.into(R2X, port) is None
    next_port = nat.out(A, R2X)
    assert next_port not in (None, port)
    assert nat.out(A, R2Y) == next_port
    assert nat.out(A, R1X) == port  # what there was lives on
    assert nat.into(R1X, port) == A
    assert nat.nat.counters.poisoned_count == 1
    nat.now = 500.0
    assert nat.nat.mapping_count(nat.now) == 0


@pytest.mark.parametrize("overloading", [False, True])
def test_a_stranger_burns_a_mapping_with_all_it_had(overloading: bool):
    nat = script(
        Mapping.EIM,
        Filtering.APDF,
        overloading=overloading,
        allocation=Uniform(),
        poison=Poison.BURNS_MAPPING,
    )
    burned, other = nat.out(A, R1X), nat.out(A2, R1X)
    assert nat.out(A, R2X) == burned
    assert nat.into(R1X, burned) == A
    assert nat.into(R1Y, burned) is None
    assert nat.nat.counters.poisoned_count == 1
    assert nat.into(R1X, burned) is None
    assert nat.nat.counters.dropped_unmapped == 1
    assert nat.nat.mapping_count(nat.now) == 1
    assert nat.out(A, R1X) != burned
    assert nat.into(R1X, other) == A2
    nat.now = 500.0
    assert nat.nat.mapping_count(nat.now) == 0


@pytest.mark.parametrize("law", LAWS)
def test_parity_is_preserved_whatever_the_law(law: str):
    """RFC 4787 section 4.2.2."""
    nat = script(Mapping.APDM, Filtering.APDF, allocation=LAWS[law], preserves_parity=True)
    other_parity = script(Mapping.APDM, Filtering.APDF, allocation=LAWS[law])
    mixed = set()
    for index in range(60):
        internal, remote = Endpoint(A.ip, 5000 + index // 2), Endpoint(R1X.ip, 1000 + index)
        port, unlike = nat.out(internal, remote), other_parity.out(internal, remote)
        assert port is not None
        assert unlike is not None
        assert port % 2 == index // 2 % 2
        mixed.add((unlike - index // 2) % 2)
    assert mixed == ({0} if law == "preserving" else {0, 1})


def test_a_parity_without_ports_left_gets_none():
    nat = script(
        Mapping.EIM,
        Filtering.EIF,
        allocation=Uniform(2000, 2003),
        preserves_parity=True,
        overloading=False,
    )
    ports = [nat.out(Endpoint(A.ip, 5000 + 2 * index), R1X) for index in range(3)]
    assert sorted(port for port in ports if port is not None) == [2000, 2002]
    assert nat.nat.counters.dropped_no_port == 1
    assert nat.out(A2, R1X) in (2001, 2003)


def test_packets_to_nobody_are_counted_by_reason():
    nat = script(Mapping.EIM, Filtering.APDF)
    assert nat.out(A, R1X) == 5000
    assert nat.into(R1Y, 5000) is None
    assert nat.into(R1X, 5001) is None
    assert nat.into(R1X, 5000) == A
    counters = nat.nat.counters
    assert (counters.dropped_filtered, counters.dropped_unmapped) == (1, 1)
    assert (counters.outbound_count, counters.inbound_count, counters.mapping_count) == (1, 1, 1)
    assert nat.nat.ports_in_use(nat.now) == [5000]


def test_a_packet_for_another_address_is_a_mistake_of_the_caller():
    nat = script(Mapping.EIM, Filtering.EIF)
    with pytest.raises(ValueError, match="came to the NAT"):
        nat.nat.inbound(Packet(R1X, R2X, b""), 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unreplied_lifetime_s": 0.0}, "must be positive"),
        ({"unreplied_lifetime_s": 60.0, "replied_lifetime_s": 30.0}, "must not shorten"),
        ({"absolute_lifetime_s": (75.0, 48.0)}, "bounds of a lifetime"),
        ({"max_mappings": 0}, "at least one mapping"),
        ({"poison": Poison.TAKES_PORT, "overloading": False}, "overloads ports"),
        ({"poison": Poison.TAKES_PORT, "filtering": Filtering.ADF}, "overloads ports"),
        ({"poison": Poison.BURNS_MAPPING, "filtering": Filtering.EIF}, "no strangers"),
        ({"poison": Poison.RETIRES_MAPPING, "mapping": Mapping.APDM}, "one remote"),
        ({"address_count": 0}, "1 to 1024 addresses"),
        ({"pooling": Pooling.ARBITRARY}, "takes several addresses"),
        ({"preserves_parity": True, "allocation": Sequential(step=2)}, "never changes parity"),
        ({"preserves_parity": True, "allocation": Blocks(size=1)}, "one port"),
        ({"preserves_parity": True, "allocation": Uniform(5, 5)}, "one port"),
        (
            {"load": LOAD, "allocation": Sequential(cross_traffic_per_s=1.0)},
            "counted twice",
        ),
        ({"load": LOAD, "nat_rate": RateLimit(10.0, 100)}, "whole rate"),
    ],
)
def test_impossible_behaviour_is_refused(values: dict[str, object], message: str):
    usual: dict[str, object] = {"mapping": Mapping.EIM, "filtering": Filtering.APDF}
    with pytest.raises(ValueError, match=message):
        NatBehaviour(**(usual | values))  # type: ignore[arg-type]


def test_a_nat_has_as_many_addresses_as_its_behaviour():
    behaviour = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.EIF, address_count=2)
    for ips in (EXTERNAL_IP, [EXTERNAL_IP, EXTERNAL_IP], [EXTERNAL_IP, R1X.ip, R2X.ip]):
        with pytest.raises(ValueError, match="2 addresses"):
            Nat(behaviour, ips, random.Random(1))
