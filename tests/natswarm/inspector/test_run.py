"""A whole inspection when something is missing: what fails takes nothing else along."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import trio

from natswarm import (
    ConfigurationError,
    ConnectFailed,
    Evidence,
    LocalTest,
    Mapping,
    NatTest,
    inspect,
)
from natswarm.inspector import FULL, QUICK, QUICK_LIMIT_S, State, changes

UNKNOWN = Evidence.UNKNOWN


async def add_me(swarm, kind="linux-home"):
    return await swarm.add("me", kind)


def outcome_of(report, test):
    return next(each for each in report.outcomes if each.test is test)


def json_is_plain(value) -> bool:
    match value:
        case dict():
            return all(isinstance(k, str) and json_is_plain(v) for k, v in value.items())
        case list():
            return all(map(json_is_plain, value))
        case float():
            return math.isfinite(value)
        case _:
            return value is None or isinstance(value, (str, bool, int))


async def test_alone(open_swarm, autojump_clock, surround):
    """No peer: what can be known alone is there, and how to get a peer."""
    async with open_swarm() as swarm:
        node = await add_me(swarm)
        report = await inspect(node, surroundings=surround(swarm.hosts["me"]))
    assert report.interface.name == "eth0"
    assert [each.is_available for each in report.gateway.result.services] == [False] * 3
    assert report.path.reason == "no peer to trace towards: connect to one first"
    assert report.observers == report.prospects == ()
    assert {each.evidence for each in report.findings} == {UNKNOWN}
    assert "there is no peer to ask" in report.finding("mapping").reason
    [advice] = report.advice
    assert advice.startswith("Nobody was asked what your NAT does. It takes one peer")
    assert "natswarm up" in advice
    assert json_is_plain(report.as_json())


async def test_observers_that_fall_silent(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        node = await add_me(swarm)
        for observer in swarm.observers():
            await node.connect(await observer.invite())
        for name in ("obs0", "obs1"):
            swarm.cut(name)
        report = await inspect(node, tests=QUICK, surroundings=surround(swarm.hosts["me"]))
        for name in ("obs0", "obs1"):
            await swarm.stop(name)
    # Its connections may have ended before they were asked.
    assert report.finding("mapping").reason.startswith(("none of the peers", "there is no peer"))
    assert sum(each.echo_count for each in report.observers) == 0
    # The way is there all the same, up to where the observers were.
    assert report.profile.opener_ttl == 2
    assert report.advice[0].startswith("Nobody")


async def test_time_runs_out(open_swarm, autojump_clock, surround):
    """A limit too short for everything: what came in by then is in the report."""
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await add_me(swarm)
        began_at = trio.current_time()
        report = await inspect(
            node,
            invites=invites,
            tests=QUICK,
            time_limit_s=0.7,
            surroundings=surround(swarm.hosts["me"]),
        )
        assert trio.current_time() - began_at < 0.8
    assert report.path.reason == "not finished within 0.7 s"
    assert outcome_of(report, NatTest.BEHAVIOUR).reason == "not finished within 0.7 s"
    assert report.profile.mapping is not None
    assert report.finding("filtering").reason == "not finished within 0.7 s"
    assert json_is_plain(report.as_json())


async def test_a_peer_that_cannot_be_reached(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        observers = await swarm.add_observers()
        invites = [await each.invite() for each in observers]
        swarm.cut("obs0")
        node = await add_me(swarm)
        options = {"invites": invites, "surroundings": surround(swarm.hosts["me"])}
        report = await inspect(node, tests=QUICK, time_limit_s=QUICK_LIMIT_S, **options)
        assert report.duration_s < 3
    assert any(each.startswith("obs0 could not be asked: no conn") for each in report.warnings)
    # Its neighbour told us of it, so it was asked all the same.
    assert [each.echo_count > 0 for each in report.observers] == [True, False]
    reason = report.finding("mapping").reason
    assert reason == "it takes observers at two addresses to tell EIM from ADM"


async def test_the_interface_vanishes(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await add_me(swarm)
        surroundings = surround(swarm.hosts["me"], "wwan0")
        cut = []

        def vanish(outcome):
            if outcome.test is NatTest.BEHAVIOUR and not cut:
                surroundings.source.names.clear()
                cut.append(swarm.cut("me"))

        report = await inspect(
            node, invites=invites, tests=QUICK, surroundings=surroundings, on_progress=vanish
        )
        cut[0]()
    assert report.interface.name == "wwan0"
    assert report.warnings[0].startswith("the interface wwan0 vanished during the inspection")
    assert report.finding("filtering").evidence is UNKNOWN


async def test_an_interface_that_is_not_there(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        node = await add_me(swarm)
        with pytest.raises(ConfigurationError, match=r"no interface 'wwan9'; it has eth0 \(lan\)"):
            await inspect(node, interface="wwan9", surroundings=surround(swarm.hosts["me"]))


async def test_what_is_left_out(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await add_me(swarm)
        around = surround(swarm.hosts["me"])
        sent_count = swarm.internet.counters.sent_count
        report = await inspect(node, invites=invites, tests=[LocalTest.PATH], surroundings=around)
        # The probes alone: nobody was joined, no router asked.
        assert swarm.internet.counters.sent_count - sent_count <= 48
        assert node.peers() == []
    assert report.profile.opener_ttl == 2
    assert report.gateway.reason == report.finding("mapping").reason == "it was left out"
    assert {each.test: each.state for each in report.outcomes} == {
        each.test: State.DONE if each.test is LocalTest.PATH else State.LEFT_OUT
        for each in report.outcomes
    }


async def test_progress_is_told(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await add_me(swarm)
        told = []
        report = await inspect(
            node,
            invites=invites,
            tests=QUICK,
            surroundings=surround(swarm.hosts["me"]),
            on_progress=told.append,
        )
    for test in QUICK:
        states = [each.state for each in told if each.test is test]
        assert states[0] is State.RUNNING
        assert states[-1] is State.DONE
        assert told[::-1][[each.test for each in told[::-1]].index(test)] == outcome_of(
            report, test
        )
    counts = [each.packet_count for each in told if each.test is NatTest.BEHAVIOUR]
    assert counts == sorted(counts)


async def test_cancelled_it_leaves_no_port_behind(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await add_me(swarm)
        with trio.move_on_after(0.5) as scope:
            await inspect(node, invites=invites, surroundings=surround(swarm.hosts["me"]))
        assert scope.cancelled_caught
        # The node's own two; open_swarm looks after the rest.
        assert swarm.port_count("me") == 2


async def test_a_node_that_is_closed_meanwhile(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await add_me(swarm)
        async with trio.open_nursery() as nursery:

            async def close_soon() -> None:
                await trio.sleep(0.6)
                await node.aclose()

            nursery.start_soon(close_soon)
            with pytest.raises(ConnectFailed, match="closed"):
                await inspect(node, invites=invites, surroundings=surround(swarm.hosts["me"]))


async def test_what_was_known_stays(open_swarm, autojump_clock, surround):
    """Later the gateway alone: the node keeps what it knew."""
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await add_me(swarm)
        around = surround(swarm.hosts["me"])
        await inspect(node, invites=invites, tests=QUICK, surroundings=around)
        known = node.profile
        report = await inspect(node, tests=[LocalTest.GATEWAY], surroundings=around)
        assert node.profile == report.profile
        assert (known.mapping, known.opener_ttl, known.nat_count) == (Mapping.EIM, 2, 1)
        assert replace(report.profile, inferred=()) == known


async def test_what_is_new_since_the_last_time(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await add_me(swarm, "kpn-nl")
        around = surround(swarm.hosts["me"])
        alone = await inspect(node, tests=QUICK, surroundings=around)
        first = await inspect(node, invites=invites, tests=QUICK, surroundings=around)
        second = await inspect(node, tests=QUICK, surroundings=around)
    assert changes(first, first) == changes(first, second) == ()
    assert {"path", "nat.mapping", "nat.allocation", "nat.opener_ttl"} < set(changes(alone, first))
    moved = replace(
        second,
        findings=tuple(
            replace(each, value=("203.0.113.1",)) if each.name == "public_ips" else each
            for each in second.findings
        ),
    )
    assert changes(second, moved) == ("nat.public_ips",)


async def test_the_schema(open_swarm, autojump_clock, surround):
    """Keys that programs rely on: only ever added, or the version goes up."""
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await add_me(swarm, "kpn-nl")
        report = await inspect(
            node, invites=invites, tests=QUICK, surroundings=surround(swarm.hosts["me"])
        )
    plain = report.as_json()
    assert json_is_plain(plain)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["version"] == 1
    assert set(plain) == {
        "version", "peer_id", "at", "duration_s", "interface", "interfaces", "gateway", "path",
        "nat", "observers", "tests", "warnings", "advice", "prospects",
    }  # fmt: skip
    assert set(plain["interfaces"]["found"][0]) == {
        "name", "kind", "evidence", "addresses", "gateway_ipv4", "gateway_ipv6", "default_ipv4",
        "default_ipv6",
    }  # fmt: skip
    assert set(plain["gateway"]) == {"reason", "duration_s", "ip", "external_ip", "services"}
    assert set(plain["gateway"]["services"][0]) == {
        "protocol", "available", "detail", "external_ip", "lease_s", "lease_problem",
    }  # fmt: skip
    assert set(plain["path"]) == {
        "reason", "duration_s", "destination", "reached", "hops", "inside_hops", "opener_ttl",
    }  # fmt: skip
    assert set(plain["path"]["hops"][0]) == {"ttl", "ip", "rtt_s"}
    for finding in plain["nat"].values():
        assert set(finding) == {"value", "evidence", "reason", "intervals", "test"}
    assert set(plain["nat"]["allocation"]["value"]) == {
        "text", "law", "low", "high", "block_size", "blocks", "step", "others_per_s", "last_port",
        "shape", "law_probability", "overloading", "ports", "samples",
    }  # fmt: skip
    assert set(plain["observers"][0]) == {"peer_id", "endpoint", "neighbour", "echoes"}
    assert set(plain["tests"]["path"]) == {"state", "reason", "packets", "duration_s"}
    assert set(plain["prospects"][0]) == {"peer", "strategy", "probes", "reason"}


def test_the_sets_of_tests():
    assert QUICK < FULL
    assert NatTest.LIFETIMES not in FULL
