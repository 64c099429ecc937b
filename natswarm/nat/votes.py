"""Elect what many observers say they see: one vote for each address, and one for each prefix.

Whoever runs many nodes in one network has many addresses, but one prefix (IPv4 /24, IPv6 /48), so
voters of one prefix first agree among themselves and then have one vote together. Both elections go
by libtorrent's rule (`ip_voter`): what is elected needs more than 1.5 times the votes against it.
So one liar among three overwrites nothing, nor does a prefix full of liars among three prefixes.
Where all voters are in one prefix (a lab, a company), the inner election is the whole one: then
a majority of addresses decides, as it would without prefixes.

Knows only texts of addresses; what is voted on is the caller's.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TypeVar

__all__ = ["elect", "elected_among", "prefix_of"]

_T = TypeVar("_T", bound=Hashable)


def prefix_of(ip: str) -> str:
    """Return the network that an address shares its vote with: IPv4 /24, IPv6 /48."""
    length = 48 if ":" in ip else 24
    return str(ipaddress.ip_network((ip, length), strict=False))


def elect(votes: Mapping[str, _T]) -> _T | None:
    """Return what the voters elect; None where nothing has enough votes.

    Args:
        votes: A voter's address -> the one thing it votes for.
    """
    by_prefix: dict[str, list[_T]] = {}
    for ip, value in votes.items():
        by_prefix.setdefault(prefix_of(ip), []).append(value)
    winners = [_winner(Counter(values)) for values in by_prefix.values()]
    return _winner(Counter(winner for winner in winners if winner is not None))


def elected_among(approvals: Mapping[str, list[_T]]) -> list[_T]:
    """Return all that is elected where each voter may approve of several things, the usual first.

    A thing has the votes of all voters that approve of it for it, and those of all others against
    it. So several may be elected, each by voters enough.

    Args:
        approvals: A voter's address -> all it votes for.
    """
    counts = Counter(value for values in approvals.values() for value in dict.fromkeys(values))
    elected = [
        value
        for value, _ in counts.most_common()
        if elect({ip: value in values for ip, values in approvals.items()})
    ]
    # Votes for it, then how often the voters named it.
    named = Counter(value for values in approvals.values() for value in values)
    return sorted(elected, key=lambda value: (-counts[value], -named[value]))


def _winner(counts: Counter[_T]) -> _T | None:
    ranking = counts.most_common(2)
    if not ranking:
        return None
    value, count = ranking[0]
    runner_up = ranking[1][1] if len(ranking) > 1 else 0
    return value if count * 2 / 3 > runner_up else None
