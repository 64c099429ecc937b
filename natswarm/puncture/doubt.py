"""Plan for profiles that may be wrong: asking at known endpoints is followed by guesses.

A profile is evidence. A NAT that still has a session from an earlier run seems to let in strangers;
one that draws ports may have kept them while it was looked at; a firewall may have been switched on
since. Then a plan that asks at known endpoints alone asks in vain, and so does the next try, which
goes by the same profiles. So what follows takes them for worse than they say:

    said to let in strangers, an address, or       lets in only endpoints that it has sent to
    to have a TFTP helper
    and if both endpoints seem to be known         first one side, then the other, draws a port
                                                   for each endpoint

The asking goes on meanwhile. Both sides come to the same, since they go by the two profiles alone.

Pure: profiles in, plans out. Source: RFC 4787 for the properties.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from natswarm.errors import PunctureFailed
from natswarm.identity import PeerId
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.puncture.plan import plan_puncture
from natswarm.puncture.strategy import Limits, Plan, Strategy

__all__ = ["plan_in_doubt"]

# Until guesses follow: for the slower side to start, four seconds later at most, and to be heard.
DOUBT_AFTER_S = 6.0
# Of each guess: some 2,800 probes among all ports, which miss 253 mappings once in 60,000.
GUESS_S = 12.0


def plan_in_doubt(
    mine: NatProfile,
    theirs: NatProfile,
    *,
    my_id: PeerId,
    their_id: PeerId,
    limits: Limits,
    round_trip_s: float | None = None,
    order: Sequence[Strategy] = (),
) -> Plan:
    """Plan our side of a puncture as `plan_puncture` does, and for profiles that are wrong.

    Raises:
        PunctureFailed: As `plan_puncture`.
    """

    def plan(mine: NatProfile, theirs: NatProfile) -> Plan:
        return plan_puncture(
            mine,
            theirs,
            my_id=my_id,
            their_id=their_id,
            limits=limits,
            round_trip_s=round_trip_s,
            order=order,
        )

    believed = plan(mine, theirs)
    *before, last = believed.steps
    if last.guesses:
        return believed
    before.append(replace(last, duration_s=min(last.duration_s, DOUBT_AFTER_S)))
    guesses: list[Plan] = []
    is_first = my_id < their_id
    for pair in _doubted_pairs(*(mine, theirs) if is_first else (theirs, mine)):
        with contextlib.suppress(PunctureFailed):  # no way through these, or none that is wanted
            doubted = plan(*pair if is_first else pair[::-1])
            guesses += [
                replace(step, duration_s=min(step.duration_s, GUESS_S))
                for step in doubted.steps
                if step.guesses
            ][:1]
    time_left_s = limits.duration_s - sum(step.duration_s for step in before)
    while guesses and sum(step.duration_s for step in guesses) > time_left_s:
        guesses.pop()
    return Plan.chain(before + guesses) if guesses else believed


def _doubted_pairs(
    first: NatProfile, second: NatProfile
) -> tuple[tuple[NatProfile, NatProfile], ...]:
    """Return what two NATs may be instead, the likelier first.

    Args:
        first: Of the side with the lower PeerId.
        second: Of the other.
    """
    first, second = _closed(first), _closed(second)
    if not (first.is_predictable and second.is_predictable):
        return ((first, second),)
    pairs = ((_drawing(first), second), (first, _drawing(second)))
    # A single observer cannot tell EIM from ADM, so that side is the likelier to be wrong.
    return pairs if first.mapping is None else pairs[::-1]


def _closed(profile: NatProfile) -> NatProfile:
    return replace(profile, filtering=Filtering.APDF, tftp_helper=None)


def _drawing(profile: NatProfile) -> NatProfile:
    allocation = profile.allocation
    if allocation is None or allocation.law is AllocationLaw.PRESERVING:
        allocation = PortAllocation(AllocationLaw.UNIFORM)
    return replace(profile, mapping=Mapping.APDM, allocation=allocation, is_translated=True)
