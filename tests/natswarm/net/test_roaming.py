"""What a node takes for a move: new addresses, sleep, a NAT that was started anew."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from natswarm.net.nursery import open_private_nursery
from natswarm.net.roaming import LOOK_AGAIN_S, POLL_S, Roamer


class Paths:
    def __init__(self):
        self.asked = []

    def recheck(self, *, has_moved):
        self.asked.append(has_moved)

    async def wait_certain(self, since):
        await trio.sleep(0.5)


class FakePeer:
    def __init__(self):
        self.paths = Paths()


class FakeHome:
    """A node, its network and its clock of sleep."""

    def __init__(self):
        self.addresses, self.slept_s = ["192.168.1.2"], 0.0
        self.peer, self.checked, self.log = FakePeer(), [], []

    def local_addresses(self):
        return list(self.addresses)

    def peers(self):
        return [self.peer]

    def forget_profile(self):
        self.log.append("forgotten")

    async def look_again(self):
        await trio.sleep(1)
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
    await trio.sleep(POLL_S)
    assert home.peer.paths.asked == [True]
    assert home.checked == [home.peer]
    assert home.log == ["forgotten"]
    with trio.fail_after(2):
        await home.roamer.wait_settled()
    assert home.log == ["forgotten", "looked"]
    await trio.sleep(60)
    assert home.log == ["forgotten", "looked"]


async def test_a_lost_connection_has_it_look_at_once(home, autojump_clock):
    home.addresses = ["10.0.0.7"]
    home.roamer.look()
    await trio.testing.wait_all_tasks_blocked()
    assert home.peer.paths.asked == [True]


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
    assert home.peer.paths.asked == [True]
    assert home.log == []


async def test_being_seen_elsewhere_has_it_look_but_not_all_the_time(home, autojump_clock):
    for _ in range(100):
        home.roamer.note_rebound()
        await trio.sleep(1)
    assert home.peer.paths.asked == [False] * len(home.log)
    assert home.log == ["looked"] * len(home.log)
    assert 2 <= len(home.log) <= 100 / LOOK_AGAIN_S + 1
