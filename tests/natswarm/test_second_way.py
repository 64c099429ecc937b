"""Two interfaces: a path is kept ready over the second one, and used when the first one dies."""

from __future__ import annotations

import itertools

import pytest
import trio

from natswarm import PathChanged, PeerLost, VirtualNetwork

CHUNK_BYTES, CHUNK_INTERVAL_S = 500, 0.05


async def add_phone(swarm, wifi, sim, peer, **config):
    """Start two observers, a phone `a` with two interfaces, and `b`; return a's connection to b."""
    await swarm.add_observers()
    swarm.hosts["sim"] = swarm.internet.add_host("sim", sim)
    second = VirtualNetwork(swarm.hosts["sim"])
    a = await swarm.add_inspected("a", wifi, second_network=second, **config)
    b = await swarm.add_inspected("b", peer)
    return await a.connect(b.peer_id)


class Talk:
    """A paced stream from one to the other, and when its pieces came."""

    def __init__(self, swarm, of, to):
        self._swarm, self._of, self._to = swarm, of, to
        self.arrivals, self.sent_count, self.received = [], 0, bytearray()

    async def run(self):
        async def receive(stream, _peer):
            async for data in stream:
                self.received += data
                self.arrivals.append(trio.current_time())

        self._swarm.nodes[self._to].serve(f"test/{self._of}", receive)
        peer = self._swarm.peer(self._of, self._to)
        stream = await peer.open_stream(f"test/{self._of}")
        while True:
            await stream.send_all(self.sent_count.to_bytes(4) * (CHUNK_BYTES // 4))
            self.sent_count += 1
            await trio.sleep(CHUNK_INTERVAL_S)

    def longest_gap_s(self, since):
        times = [since, *(at for at in self.arrivals if at > since), trio.current_time()]
        return max(after - before for before, after in itertools.pairwise(times))

    def check(self):
        """Assert that nothing is missing or doubled, but for what is on its way."""
        chunk_count = len(self.received) // CHUNK_BYTES
        assert chunk_count >= self.sent_count - 20
        wanted = b"".join(i.to_bytes(4) * (CHUNK_BYTES // 4) for i in range(chunk_count))
        assert self.received[: len(wanted)] == wanted


def spare_count(swarm, of, to):
    paths = swarm.peer(of, to).paths.statistics()
    return sum(path.is_spare and not path.is_dead for path in paths)


def check_way(swarm, is_second):
    """Assert that both ends go by the second interface, or by the first."""
    ip = swarm.hosts["sim" if is_second else "a"].nat.external_ip
    assert swarm.peer("b", "a").paths.remote.ip == ip
    assert swarm.peer("a", "b").paths.uses_spare is is_second


@pytest.mark.parametrize(
    ("sim", "other"),
    [
        ("kpn-nl", "linux-home"),
        ("kpn-nl", "kpn-nl"),
        ("telia-no", "lebara-nl"),
        ("orange-bg", "public"),
    ],
)
async def test_when_wifi_dies_the_spare_path_is_used_and_then_left_again(
    open_swarm, autojump_clock, sim, other
):
    """Without a word from the system: only silence tells it; 10 s later Wi-Fi is back."""
    async with open_swarm(seed=3) as swarm:
        await add_phone(swarm, "linux-home", sim, other)
        there, back = Talk(swarm, "a", "b"), Talk(swarm, "b", "a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.run)
            nursery.start_soon(back.run)
            await trio.sleep(30)
            assert spare_count(swarm, "a", "b") == spare_count(swarm, "b", "a") == 1
            check_way(swarm, is_second=False)
            mend, cut_at = swarm.cut("a"), trio.current_time()
            await trio.sleep(10)
            check_way(swarm, is_second=True)
            mend()
            await trio.sleep(30)
            gaps = there.longest_gap_s(cut_at), back.longest_gap_s(cut_at)
            print(f"longest gaps {gaps[0]:.2f} and {gaps[1]:.2f} s")
            nursery.cancel_scope.cancel()
        assert max(gaps) < 2.5
        check_way(swarm, is_second=False)
        there.check()
        back.check()
        for name in "ab":
            assert not [e for e in swarm.events[name] if isinstance(e, PeerLost)]


async def test_when_the_system_tells_it_the_spare_path_is_used_at_once(open_swarm, autojump_clock):
    """Wi-Fi is left for another; the way back to it is opened before the SIM is left."""
    async with open_swarm(seed=4) as swarm:
        await add_phone(swarm, "linux-home", "kpn-nl", "kpn-nl")
        there, back = Talk(swarm, "a", "b"), Talk(swarm, "b", "a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.run)
            nursery.start_soon(back.run)
            await trio.sleep(30)
            swarm.hosts["a"].move(swarm.internet.add_nat("cafe", "linux-home"))
            moved_at = trio.current_time()
            await trio.sleep(20)
            gaps = there.longest_gap_s(moved_at), back.longest_gap_s(moved_at)
            print(f"longest gaps {gaps[0]:.2f} and {gaps[1]:.2f} s")
            nursery.cancel_scope.cancel()
        assert max(gaps) < 1.5
        check_way(swarm, is_second=False)
        told = [e for e in swarm.events["a"] if isinstance(e, PathChanged)]
        assert all(event.new is not None for event in told if event.peer is swarm.peer("a", "b"))


async def test_what_is_not_in_use_costs_nothing(open_swarm, autojump_clock):
    async with open_swarm(seed=5) as swarm:
        await add_phone(swarm, "linux-home", "kpn-nl", "kpn-nl")
        await trio.sleep(20)
        assert swarm.port_count("sim") == 3, "one for each connection"
        await trio.sleep(100)
        assert swarm.port_count("sim") == 0


async def test_a_second_interface_may_come_and_go(open_swarm, autojump_clock):
    """Without one nothing happens; an address of its own is no move of the node."""
    async with open_swarm(seed=6) as swarm:
        await add_phone(swarm, "linux-home", "kpn-nl", "linux-home")
        talk = Talk(swarm, "a", "b")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk.run)
            await trio.sleep(20)
            moved_at = trio.current_time()
            swarm.hosts["sim"].move(swarm.internet.add_nat("other", "telia-no"))
            await trio.sleep(60)
            assert spare_count(swarm, "a", "b") == spare_count(swarm, "b", "a") == 1
            assert talk.longest_gap_s(moved_at) < 0.5
            nursery.cancel_scope.cancel()
        check_way(swarm, is_second=False)
