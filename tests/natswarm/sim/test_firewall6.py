"""The IPv6 firewall: each filter, lifetime and cap; random traffic against a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Filtering
from natswarm.sim.firewall6 import Firewall, FirewallBehaviour
from natswarm.sim.packet import Packet

A, B = Endpoint("3fff::1:2", 5000), Endpoint("3fff::1:3", 5000)
R1X, R1Y = Endpoint("3fff::9:1", 1000), Endpoint("3fff::9:1", 1001)
R2X = Endpoint("3fff::8:1", 1000)


def out(firewall: Firewall, internal: Endpoint, remote: Endpoint, now: float) -> bool:
    passed = firewall.outbound(Packet(internal, remote, b""), now)
    firewall.check()
    return passed


def into(firewall: Firewall, remote: Endpoint, internal: Endpoint, now: float) -> bool:
    passed = firewall.inbound(Packet(remote, internal, b""), now)
    firewall.check()
    return passed


@pytest.mark.parametrize("filtering", Filtering)
def test_strangers_stay_out_until_the_filter_lets_them_in(filtering: Filtering):
    firewall = Firewall(FirewallBehaviour(filtering=filtering))
    assert not into(firewall, R1X, A, 0.0)
    assert out(firewall, A, R1X, 0.0)
    assert into(firewall, R1X, A, 1.0)
    assert into(firewall, R1Y, A, 1.0) == (filtering is not Filtering.APDF)
    assert into(firewall, R2X, A, 1.0) == (filtering is Filtering.EIF)
    assert not into(firewall, R1X, B, 1.0)
    assert not into(firewall, R1X, Endpoint(A.ip, 5001), 1.0)


def test_states_die_of_idleness_sooner_without_a_reply():
    firewall = Firewall(FirewallBehaviour())
    for remote in (R1X, R1Y):
        assert out(firewall, A, remote, 0.0)
    assert into(firewall, R1Y, A, 0.0)
    assert not into(firewall, R1X, A, 30.0)
    assert into(firewall, R1Y, A, 119.0)
    assert firewall.state_count(120.0) == 1
    assert not into(firewall, R1Y, A, 239.0)
    assert firewall.state_count(239.0) == 0


@pytest.mark.parametrize("refreshed_by_inbound", [False, True])
def test_inbound_refreshes_when_told(refreshed_by_inbound: bool):
    firewall = Firewall(
        FirewallBehaviour(
            unreplied_lifetime_s=60.0,
            replied_lifetime_s=60.0,
            refreshed_by_inbound=refreshed_by_inbound,
        )
    )
    assert out(firewall, A, R1X, 0.0)
    assert into(firewall, R1X, A, 50.0)
    assert into(firewall, R1X, A, 100.0) == refreshed_by_inbound


def test_a_host_has_no_more_states_than_its_cap():
    firewall = Firewall(FirewallBehaviour(max_states=2))
    remotes = [Endpoint(R1X.ip, port) for port in range(1, 5)]
    assert [out(firewall, A, remote, 0.0) for remote in remotes] == [True, True, False, False]
    assert out(firewall, B, R1X, 0.0)
    assert firewall.counters.dropped_cap == 2
    assert out(firewall, A, remotes[2], 30.0)


@pytest.mark.parametrize(
    "values",
    [
        {"unreplied_lifetime_s": 0.0},
        {"unreplied_lifetime_s": 60.0, "replied_lifetime_s": 30.0},
        {"max_states": 0},
    ],
)
def test_impossible_behaviour_is_refused(values: dict[str, float]):
    with pytest.raises(ValueError, match=r"lifetimes|one state"):
        FirewallBehaviour(**values)  # type: ignore[arg-type]


STEPS = st.tuples(
    st.booleans(),
    st.sampled_from([A, B]),
    st.sampled_from([R1X, R1Y, R2X]),
    st.sampled_from([0.0, 1.0, 19.0, 21.0, 41.0]),
)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(Filtering),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.lists(STEPS, max_size=40),
)
def test_what_comes_in_was_sent_to(
    filtering: Filtering,
    refreshed_by_inbound: bool,
    max_states: int | None,
    steps: list[tuple[bool, Endpoint, Endpoint, float]],
):
    """The model keeps whom each host sent to, and until when that counts."""
    firewall = Firewall(
        FirewallBehaviour(
            filtering=filtering,
            unreplied_lifetime_s=20.0,
            replied_lifetime_s=40.0,
            refreshed_by_inbound=refreshed_by_inbound,
            max_states=max_states,
        )
    )

    def part(remote: Endpoint) -> object:
        parts = {Filtering.EIF: None, Filtering.ADF: remote.ip, Filtering.APDF: remote}
        return parts[filtering]

    states: dict[tuple[Endpoint, object], tuple[float, bool]] = {}
    now = 0.0
    for is_out, internal, remote, wait_s in steps:
        now += wait_s
        states = {key: state for key, state in states.items() if state[0] > now}
        key = (internal, part(remote))
        if is_out:
            mine = [other for other in states if other[0].ip == internal.ip]
            fits = key in states or max_states is None or len(mine) < max_states
            assert out(firewall, internal, remote, now) == fits
            if fits:
                is_replied = key in states and states[key][1]
                states[key] = (now + (40.0 if is_replied else 20.0), is_replied)
        else:
            assert into(firewall, remote, internal, now) == (key in states)
            if key in states:
                states[key] = (now + 40.0 if refreshed_by_inbound else states[key][0], True)
    assert firewall.state_count(now) == len(states)
