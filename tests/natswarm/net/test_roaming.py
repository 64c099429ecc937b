"""What a node takes for a move: new addresses, sleep, a NAT that was started anew."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing

from natswarm.address import Endpoint
from natswarm.net.nursery import open_private_nursery
from natswarm.net.roaming import ASKED_IN_DOUBT, LOOK_AGAIN_S, POLL_BUSY_S, POLL_S, Roamer

ANSWER_S, LOOK_S = 0.5, 1.0


class Paths:
    """Those of one neighbour, which answers after half a second, or never."""

    def __init__(self, ip, is_silent):
        self.asked, self.busy_at, self.sightings = [], -math.inf, []
        self.stranded_since = None
        self._remote, self._is_silent = Endpoint(ip, 4000), is_silent

    def recheck(self, *, has_moved, has_slept=False):
        self.asked.append("slept" if has_slept else "moved" if has_moved else "asked")
        self.sightings = []

    async def wait_certain(self, since):
        if self._is_silent:
            await trio.sleep_forever()
        await trio.sleep_until(since + ANSWER_S)
        self.sightings = [(self._remote, Endpoint("198.51.100.9", 1))]


class FakePeer:
    def __init__(self, ip, *, is_silent=False):
        self.paths = Paths(ip, is_silent)

    @property
    def is_reachable(self):
        return self.paths.stranded_since is None


class FakeHome:
    """A node, its network and its clock of sleep."""

    def __init__(self):
        self.addresses, self.slept_s = ["192.168.1.2"], 0.0
        self.all_peers = [FakePeer("203.0.113.1")]
        self.peer = self.all_peers[0]
        self.checked, self.log, self.is_elsewhere = [], [], False

    def local_addresses(self):
        return list(self.addresses)

    def peers(self):
        return self.all_peers

    def forget_profile(self):
        self.log.append("forgotten")

    def is_seen_elsewhere(self):
        return self.is_elsewhere

    def glimpse(self):
        self.log.append("glimpsed")

    async def look_again(self):
        await trio.sleep(LOOK_S)
        self.log.append("looked")


@pytest.fixture
async def home():
    home = FakeHome()
    home.roamer = Roamer(home, home, check=home.checked.append, slept_s=lambda: home.slept_s)
    async with open_private_nursery() as nursery:
        nursery.start_soon(home.roamer.run)
        await trio.sleep(1)
        yield home


async def test_new_addresses_ask_every_path_and_then_look(home, autojump_clock):
    home.addresses = ["10.0.0.7"]
    await trio.sleep(POLL_S - 1 + 0.1)
    assert home.peer.paths.asked == ["moved"]
    assert home.checked == [home.peer]
    assert home.log == ["forgotten"]
    with trio.fail_after(ANSWER_S):
        await home.roamer.wait_settled()
    assert home.log == ["forgotten", "glimpsed"]
    await trio.sleep(60)
    assert home.log == ["forgotten", "glimpsed", "looked"]


async def test_a_glimpse_takes_two_that_answer_and_no_more(home, autojump_clock):
    home.all_peers += [FakePeer("203.0.113.2", is_silent=True), FakePeer("203.0.113.3")]
    home.addresses = ["10.0.0.7"]
    home.roamer.note_doubt()
    await trio.testing.wait_all_tasks_blocked()
    with trio.fail_after(ANSWER_S + 0.1):
        await home.roamer.wait_settled()
    assert home.log == ["forgotten", "glimpsed"]


async def test_who_moves_on_is_looked_for_there(home, autojump_clock):
    for index in range(5):
        home.addresses = [f"10.0.0.{index}"]
        home.roamer.note_doubt()
        await trio.sleep(ANSWER_S + LOOK_S / 2)
    await trio.sleep(10)
    assert home.log == ["forgotten", "glimpsed"] * 5 + ["looked"]


async def test_a_peer_that_is_silent_has_it_look_at_once(home, autojump_clock):
    home.addresses = ["10.0.0.7"]
    home.roamer.note_doubt()
    await trio.testing.wait_all_tasks_blocked()
    assert home.peer.paths.asked == ["moved"]


async def test_a_peer_that_is_silent_has_some_others_asked(home, autojump_clock):
    home.all_peers += [FakePeer(f"203.0.113.{index}") for index in range(2, 30)]
    home.roamer.note_doubt()
    await trio.testing.wait_all_tasks_blocked()
    asked = [peer.paths.asked for peer in home.all_peers]
    assert asked == [["asked"]] * ASKED_IN_DOUBT + [[]] * (29 - ASKED_IN_DOUBT)
    assert home.log == []


async def test_while_a_peer_is_out_of_reach_others_are_asked_ever_less_often(home, autojump_clock):
    lost = FakePeer("203.0.113.2")
    home.all_peers.append(lost)
    lost.paths.stranded_since = trio.current_time()
    await trio.sleep(POLL_S + 100)
    assert lost.paths.asked == [], "there is nobody to ask there"
    assert 20 <= len(home.peer.paths.asked) <= 30
    lost.paths.stranded_since = None
    home.peer.paths.asked.clear()
    await trio.sleep(100)
    assert home.peer.paths.asked == []


async def test_who_has_lost_a_peer_notices_a_move_soon(home, autojump_clock):
    home.peer.paths.stranded_since = trio.current_time()
    await trio.sleep(POLL_S)
    home.addresses = ["10.0.0.7"]
    await trio.sleep(POLL_BUSY_S + 0.01)
    assert home.peer.paths.asked[-1] == "moved"


async def test_busy_connections_are_looked_after_more_often(home, autojump_clock):
    home.peer.paths.busy_at = math.inf
    await trio.sleep(POLL_S)
    home.addresses = ["10.0.0.7"]
    await trio.sleep(POLL_BUSY_S + 0.01)
    assert home.peer.paths.asked == ["moved"]


async def test_the_order_of_addresses_means_nothing(home, autojump_clock):
    home.addresses = ["192.168.1.2", "10.0.0.7"]
    await trio.sleep(10)
    home.log.clear()
    home.addresses.reverse()
    await trio.sleep(10)
    assert home.log == []


async def test_waking_asks_every_path_and_keeps_the_profile(home, autojump_clock):
    home.slept_s = 0.5
    await trio.sleep(POLL_S)
    assert home.peer.paths.asked == []
    home.slept_s = 300
    await trio.sleep(POLL_S)
    assert home.peer.paths.asked == ["slept"]
    assert home.log == []


async def test_being_seen_elsewhere_has_it_look_but_not_all_the_time(home, autojump_clock):
    for _ in range(100):
        home.roamer.note_rebound()
        await trio.sleep(1)
    assert home.peer.paths.asked == ["asked"] * len(home.log)
    assert home.log == ["looked"] * len(home.log)
    assert 2 <= len(home.log) <= 100 / LOOK_AGAIN_S + 1


async def test_a_new_public_address_is_a_move(home, autojump_clock):
    """Of two carriers both give out the same private address."""
    home.is_elsewhere = True
    home.roamer.note_rebound()
    await trio.testing.wait_all_tasks_blocked()
    assert home.peer.paths.asked == ["moved"]
    assert home.log == ["forgotten"]
