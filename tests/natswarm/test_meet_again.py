"""Two that met before meet again by the clock, on the virtual internet, with nobody else alive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio

from natswarm import PRESETS, PeerNotFound, PunctureFailed, PunctureStarted
from natswarm.discovery.cache import CachedPeer
from natswarm.discovery.rendezvous import EPOCH_S, SLOT_S
from natswarm.identity import PeerId
from natswarm.sim.presets import Preset

NOON_S = 1_000_000 * EPOCH_S + 500.0


class Memory:
    """A store without a disk."""

    def __init__(self) -> None:
        self.peers: dict[PeerId, CachedPeer] = {}

    async def load(self) -> list[CachedPeer]:
        await trio.lowlevel.checkpoint()
        return list(self.peers.values())

    async def save(self, changed: Sequence[CachedPeer], forgotten: Sequence[PeerId]) -> None:
        await trio.lowlevel.checkpoint()
        self.peers |= {peer.peer_id: peer for peer in changed}


async def meet_and_part(
    swarm, kinds: tuple[str | Preset, str | Preset], skews_s: tuple[float, float]
) -> None:
    """Connect a and b, then stop everybody; after an hour a and b are there again, alone."""
    options = [
        {"cache": Memory(), "utc": lambda skew_s=skew_s: NOON_S + trio.current_time() + skew_s}
        for skew_s in skews_s
    ]
    for name in ("obs0", "obs1"):
        await swarm.add(name, utc=lambda: NOON_S + trio.current_time())
    await swarm.nodes["obs0"].connect(await swarm.nodes["obs1"].invite())
    for name, kind, option in zip("ab", kinds, options, strict=True):
        await swarm.add_inspected(name, kind, **option)
    await swarm.nodes["a"].connect(swarm.identity("b").peer_id)
    await trio.sleep(10)
    for name in ("a", "b", "obs0", "obs1"):
        await swarm.stop(name)
    await trio.sleep(3600)
    for name, kind, option in zip("ab", kinds, options, strict=True):
        await swarm.add(name, kind, **option)


async def meet_again(swarm, *, later_s: float = 0.0) -> float:
    """Return how long it took since both asked for it."""
    a, b = swarm.nodes["a"], swarm.nodes["b"]
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.meet_again, b.peer_id)
        await trio.sleep(later_s)
        nursery.start_soon(b.meet_again, a.peer_id)
    await swarm.check_talk("a", "b")
    return trio.current_time() - begun - later_s


def kept(name: str) -> Preset:
    """A carrier whose subscriber has other traffic all the time, so that the block stays."""
    preset = PRESETS[name]
    allocation = replace(preset.behaviour.allocation, keeps_newest=True)
    return replace(preset, behaviour=replace(preset.behaviour, allocation=allocation))


PAIRS = {
    "home x block": ("linux-home", "kpn-nl"),
    "block x block": (kept("kpn-nl"), kept("kpn-nl")),
    "home x home": ("linux-home", "linux-home"),
    "public x block": ("public", "kpn-nl"),
    "home x uniform": ("linux-home", "o2-uk-4g"),
}


@pytest.mark.parametrize("skew_s", [0.0, 120.0], ids=["right", "2-minutes"])
@pytest.mark.parametrize("pair", PAIRS)
async def test_nobody_in_between(open_swarm, autojump_clock, pair, skew_s):
    async with open_swarm(seed=list(PAIRS).index(pair)) as swarm:
        await meet_and_part(swarm, PAIRS[pair], (0.0, skew_s))
        took_s = await meet_again(swarm, later_s=5)
        assert took_s < 2 * SLOT_S


@pytest.mark.parametrize("skew_s", [-47.0, 35.0, 61.0])
@pytest.mark.parametrize("pair", ["home x block", "block x block"])
async def test_clocks_that_are_wrong_by_some_seconds(open_swarm, autojump_clock, pair, skew_s):
    async with open_swarm(seed=5) as swarm:
        await meet_and_part(swarm, PAIRS[pair], (skew_s, 0.0))
        assert await meet_again(swarm) < 5 * SLOT_S


async def test_a_peer_that_does_not_come_ends_in_words(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await meet_and_part(swarm, ("linux-home", "kpn-nl"), (0.0, 0.0))
        a, b = swarm.nodes["a"], swarm.nodes["b"]
        begun = trio.current_time()
        with pytest.raises(PunctureFailed, match="came to none of 2 appointments in 300 s"):
            await a.meet_again(b.peer_id, patience_s=300)
        assert trio.current_time() - begun <= 301
        started = [
            event
            for event in swarm.events["a"]
            if isinstance(event, PunctureStarted) and event.peer_id == b.peer_id
        ]
        assert len(started) == 2
        assert swarm.port_count("a") == 2
        with pytest.raises(PeerNotFound, match="knows nothing of"):
            await a.meet_again(swarm.identity("stranger").peer_id)


async def test_what_cannot_open_is_said_before_waiting(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await meet_and_part(swarm, ("linux-home", "o2-uk-4g"), (0.0, 0.0))
        # The home's NAT is another one now, which draws ports as the carrier's does.
        a, b = swarm.nodes["a"], swarm.nodes["b"]
        a.adopt_profile(
            replace(await b._remembered_profile(b.peer_id), public_ips=("203.0.113.1",))
        )
        begun = trio.current_time()
        with pytest.raises(PunctureFailed, match="probes expected"):
            await a.meet_again(b.peer_id)
        assert trio.current_time() == begun
