"""Random NATs for benchmarks: every knob of the emulator, drawn wide.

What is drawn (independently, unless said):

    mapping, filtering   each of three with the same probability
    law                  35 % blocks, 20 % each a counter and an even range, 15 % kept ports,
                         10 % a Beta law
      blocks             80 % powers of two 64..4096, three in four aligned; else sizes of RFC
                         7422 or round ones, from port 1024 up; 1, 2, 4 or 8 blocks; 30 % counted
                         inside; the newest one kept, or not
      counter            step +1 (55 %), -1, +2, -2; over all ports or (30 %) a range; no cross
                         traffic (30 %) or 1..1,000 a second, log-uniform
      range, Beta law    8,192 to 64,512 ports wide, log-uniform, anywhere; parameters 1.5..6
    overloading          half
    lifetimes            unreplied 20..200 s log-uniform, replied 1..4 times that; absolute 15 %,
                         from 45..120 s to up to 1.5 times that; refreshed by inbound packets: half
    parity               preserved: 15 %, where the law can (not with even steps, which change it
                         once a round)
    addresses            one (80 %), or 2..4 with either pooling
    quota, rate          25 %: 64..2,000 mappings; 15 %: 20..200 a second, 20..200 at once
    hairpinning, TFTP    30 %, 20 %
    poison               each kind that goes with the filter: 40 % together
    load                 15 %, not with a counter: 5..50 subscribers with 1..50 flows a second, but
                         not so many that they own half of all blocks

And the host has made up to 20 mappings before. The access link is a carrier's: 15..60 ms one way
and up to 20 ms of jitter, 1 % loss each way.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Poison, Pooling
from natswarm.sim.link import LinkConditions
from natswarm.sim.load import BackgroundLoad
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.ports import Allocation, Blocks, Preserving, ScaledBeta, Sequential, Uniform
from natswarm.sim.presets import Preset, Site
from natswarm.sim.rate import RateLimit

__all__ = ["draw_behaviour", "draw_preset", "expected_law", "expected_mapping"]

POWERS = (64, 128, 256, 512, 1024, 2048, 4096)
OTHER_SIZES = (100, 126, 200, 250, 252, 500, 504, 1000, 1008, 2000, 2016, 4000, 4032)
LOSS = 0.01


def expected_mapping(behaviour: NatBehaviour) -> Mapping:
    """Return the mapping behaviour that can be seen.

    A NAT that keeps ports and overloads them shows one endpoint to everybody, whatever its table
    looks like inside: Linux is one. But a filter by address cannot tell two mappings of one port
    towards one address apart, so one of them moves; and with arbitrary pooling addresses differ.
    """
    keeps_ports = isinstance(behaviour.allocation, Preserving) and not behaviour.exclusive_ports
    is_told_apart = behaviour.filtering is Filtering.APDF or behaviour.mapping is Mapping.ADM
    if keeps_ports and is_told_apart and behaviour.pooling is Pooling.PAIRED:
        return Mapping.EIM
    return behaviour.mapping


def expected_law(behaviour: NatBehaviour) -> AllocationLaw:
    """Return the law that can be seen: in its block a counter counts."""
    law = behaviour.allocation
    if isinstance(law, Blocks) and law.is_sequential:
        return AllocationLaw.SEQUENTIAL
    return law.law


def draw_preset(rng: random.Random) -> Preset:
    """Return a carrier with a random NAT."""
    access = LinkConditions(
        delay_s=rng.uniform(0.015, 0.060), jitter_s=rng.uniform(0, 0.020), loss=LOSS
    )
    return Preset(draw_behaviour(rng), Site.CARRIER, access, 2, "drawn")


def draw_behaviour(rng: random.Random) -> NatBehaviour:
    """Return a random NAT; see above."""
    filtering = rng.choice(list(Filtering))
    law = _draw_law(rng)
    unreplied_s = _log_uniform(rng, 20, 200)
    absolute_s = None
    if rng.random() < 0.15:
        low = rng.uniform(45, 120)
        absolute_s = (low, low * rng.uniform(1, 1.5))
    behaviour = NatBehaviour(
        mapping=rng.choice(list(Mapping)),
        filtering=filtering,
        allocation=law,
        overloading=rng.random() < 0.5,
        unreplied_lifetime_s=unreplied_s,
        replied_lifetime_s=unreplied_s * rng.uniform(1, 4),
        refreshed_by_inbound=rng.random() < 0.5,
        absolute_lifetime_s=absolute_s,
        max_mappings=round(_log_uniform(rng, 64, 2000)) if rng.random() < 0.25 else None,
        subscriber_rate=RateLimit(_log_uniform(rng, 20, 200), round(_log_uniform(rng, 20, 200)))
        if rng.random() < 0.15
        else None,
        hairpinning=rng.random() < 0.3,
        tftp_helper=rng.random() < 0.2,
    )
    if rng.random() < 0.2:
        behaviour = replace(
            behaviour, address_count=rng.randint(2, 4), pooling=rng.choice(list(Pooling))
        )
    is_even = isinstance(law, Sequential) and law.step % 2 == 0
    if rng.random() < 0.15 and not is_even:
        behaviour = _if_possible(behaviour, preserves_parity=True)
    if rng.random() < 0.4:
        behaviour = _if_possible(behaviour, poison=rng.choice(list(Poison)))
    if rng.random() < 0.15:
        load = BackgroundLoad(rng.randint(5, 50), _log_uniform(rng, 1, 50), rng.uniform(10, 60))
        has_room = not isinstance(law, Blocks) or len(law.bases()) > 2 * load.subscriber_count
        if not isinstance(law, Sequential) and has_room:
            behaviour = _if_possible(behaviour, load=load)
    return behaviour


def _if_possible(behaviour: NatBehaviour, **changes: object) -> NatBehaviour:
    try:
        return replace(behaviour, **changes)  # type: ignore[arg-type]
    except ValueError:
        return behaviour


def _draw_law(rng: random.Random) -> Allocation:
    kind = rng.random()
    if kind < 0.35:
        return _draw_blocks(rng)
    if kind < 0.55:
        low, high = _draw_range(rng) if rng.random() < 0.3 else (1024, 65_535)
        step = rng.choices((1, -1, 2, -2), (55, 15, 15, 15))[0]
        others = 0.0 if rng.random() < 0.3 else _log_uniform(rng, 1, 1000)
        return Sequential(low, high, step, others)
    if kind < 0.75:
        return Uniform(*_draw_range(rng))
    if kind < 0.90:
        return Preserving()
    low, high = _draw_range(rng)
    return ScaledBeta(low, high - low, rng.uniform(1.5, 6), rng.uniform(1.5, 6))


def _draw_blocks(rng: random.Random) -> Blocks:
    is_power = rng.random() < 0.8
    return Blocks(
        size=rng.choice(POWERS if is_power else OTHER_SIZES),
        max_blocks=rng.choice((1, 2, 4, 8)),
        is_aligned=is_power and rng.random() < 0.75,
        is_sequential=rng.random() < 0.3,
        keeps_newest=rng.random() < 0.5,
    )


def _draw_range(rng: random.Random) -> tuple[int, int]:
    width = round(_log_uniform(rng, 8192, 64_512))
    low = rng.randint(1024, 65_536 - width)
    return low, low + width - 1


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))
