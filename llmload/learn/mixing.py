"""Who exchanges with whom, and how fast that spreads what one of them knows.

Pairs need no messages to agree on: whoever knows the members and the number of the round sorts the
members by a hash of both, and neighbours in that order are partners. A peer that is not there
leaves its partner alone for a round and nobody else.

How fast a scheme mixes is the share of the variance between peers that one round leaves, in
expectation, when each averages what it has. For the schemes here it is known exactly, and the tests
compare the schedules with it.

Source: NoLoCo (arXiv 2506.10911) for seeded pairs; Epidemic Learning (arXiv 2310.01972) for pushes.

This file does not know what is exchanged.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from natswarm import PeerId

__all__ = [
    "groups",
    "partner",
    "push_targets",
    "variance_left_by_groups",
    "variance_left_by_pushes",
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


def partner(me: PeerId, members: Sequence[PeerId], *, round_number: int) -> PeerId | None:
    """Return with whom `me`, one of `members`, is paired; None for nobody this time."""
    mine = next(group for group in groups(members, round_number=round_number) if me in group)
    return next((member for member in mine if member != me), None)


def push_targets(
    me: PeerId, members: Sequence[PeerId], *, count: int, rng: random.Random
) -> list[PeerId]:
    """Draw up to `count` of the other members to send to, each as likely as the others."""
    others = [member for member in members if member != me]
    return rng.sample(others, min(count, len(others)))


def variance_left_by_groups(n: int, size: int) -> float:
    """Return the share of variance left among n after averaging in random groups of `size`."""
    return (n / size - 1) / (n - 1)


def variance_left_by_pushes(n: int, count: int) -> float:
    """Return the share left when each pushes to `count` others and averages what came and its own.

    The variance is that among all n, around the mean before the round.
    """
    return (1 - (1 - count / (n - 1)) ** n) / count - 1 / (n - 1)
