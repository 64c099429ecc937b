"""Who exchanges with whom, and how fast that spreads what one of them knows.

Groups need no messages to agree on: whoever knows the members and the number of the round sorts the
members by a hash of both, and neighbours in that order are a group. A peer that is not there is
missed by its group for a round, and by nobody else.

How fast a scheme mixes is the share of the variance between peers that one round leaves, in
expectation, when each averages what it has. For the schemes here it is known exactly, and the tests
compare the schedules with it.

Source: NoLoCo (arXiv 2506.10911) for seeded pairs, Moshpit SGD (2103.03239) for groups.

This file does not know what is exchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from natswarm import PeerId

__all__ = [
    "group_of",
    "groups",
    "reducer",
    "variance_left_by_groups",
]


def groups(
    members: Sequence[PeerId], *, round_number: int, size: int = 2
) -> list[tuple[PeerId, ...]]:
    """Cut members into random groups, the same at everybody who knows the same members.

    Args:
        members: Everybody, in any order.
        round_number: Draws anew; any integer from 0.
        size: Members of a group; who is left over forms a smaller one, maybe of one.

    Raises:
        ValueError: `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"groups of {size}")
    salt = round_number.to_bytes(8, "big")

    def rank(member: PeerId) -> bytes:
        return hashlib.blake2b(member.key, digest_size=16, salt=salt).digest()

    order = sorted(members, key=rank)
    return [tuple(order[start : start + size]) for start in range(0, len(order), size)]


def group_of(
    me: PeerId, members: Sequence[PeerId], *, round_number: int, size: int
) -> tuple[PeerId, ...]:
    """Return the group of `me`, one of `members`; see `groups`."""
    found = groups(members, round_number=round_number, size=size)
    return next(group for group in found if me in group)


def reducer(members: Sequence[PeerId], *, part: int, round_number: int) -> PeerId:
    """Return who of a group averages a part in a round (rendezvous hashing).

    Whoever knows of one member too few or too many differs on that member's parts alone.
    """
    salt = round_number.to_bytes(8, "big") + part.to_bytes(8, "big")

    def rank(member: PeerId) -> bytes:
        return hashlib.blake2b(member.key, digest_size=16, salt=salt).digest()

    return min(members, key=rank)


def variance_left_by_groups(n: int, size: int) -> float:
    """Return the share of variance left among n after averaging in random groups of `size`."""
    return (n / size - 1) / (n - 1)
