"""Barter: how much text a peer gets from us, by how much it gave; and what we choose of its offers.

Tit for tat with a present: a peer gets `gift_bytes` before it has given anything, or newcomers
could never begin; then twice what it gave and we kept, times how useful its texts proved. The
present grows again with time, so that two who owe each other nothing do not stop for ever. New
identities are free, so all peers together get no more than `sent_bytes_per_s` over time.

Source: Cohen 2003, "Incentives Build Robustness in BitTorrent" (optimistic unchoking).

Pure: time is an argument. This file does not know records, stores or calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from natswarm import PeerId

__all__ = ["BarterLimits", "Ledger", "choose"]

PEERS_MAX = 1024
# Who sent so many records that were none gets nothing and is not asked.
LIES_MAX = 3


@dataclass(frozen=True, kw_only=True)
class BarterLimits:
    """What we give, and take, at most; bytes as they travel.

    Attributes:
        gift_bytes: For a peer that has given nothing.
        gift_bytes_per_s: How fast what was given is forgotten.
        ratio: Given for each byte that the peer gave.
        sent_bytes_per_s: To all peers together, over time.
        sent_bytes_burst: Of that, at once.
        taken_bytes_max: From one peer in one call.
    """

    gift_bytes: int = 256 * 1024
    gift_bytes_per_s: float = 32.0
    ratio: float = 2.0
    sent_bytes_per_s: float = 16 * 1024
    sent_bytes_burst: int = 1024 * 1024
    taken_bytes_max: int = 128 * 1024


@dataclass(slots=True)
class _Account:
    """What a peer got and has not paid for with time, as of `at`; and how often it lied."""

    given_bytes: float = 0.0
    at: float = 0.0
    lies: int = 0


class Ledger:
    """What all peers got.

    Args:
        limits: How generous we are.
        now: Seconds, of any clock that does not go back.
    """

    def __init__(self, limits: BarterLimits, now: float) -> None:
        self._limits = limits
        self._accounts: dict[PeerId, _Account] = {}
        self._left_bytes = float(limits.sent_bytes_burst)
        self._left_at = now

    def allowance(self, peer: PeerId, received_bytes: int, worth: float, now: float) -> int:
        """Return how many bytes a peer may get now.

        Args:
            peer: Who asks.
            received_bytes: What it gave and we kept, so far.
            worth: How useful that was, 0..1.
            now: Seconds.
        """
        account = self._account(peer, now)
        if account.lies >= LIES_MAX:
            return 0
        limits = self._limits
        credit = limits.gift_bytes + limits.ratio * worth * received_bytes
        self._refill(now)
        return max(0, int(min(credit - account.given_bytes, self._left_bytes)))

    def note_given(self, peer: PeerId, byte_count: int, now: float) -> None:
        """Write down what a peer got."""
        self._account(peer, now).given_bytes += byte_count
        self._refill(now)
        self._left_bytes -= byte_count

    def note_lie(self, peer: PeerId, now: float) -> None:
        """Write down that a peer sent something else than it had offered."""
        self._account(peer, now).lies += 1

    def is_liar(self, peer: PeerId) -> bool:
        """Return whether a peer has lied too often."""
        account = self._accounts.get(peer)
        return account is not None and account.lies >= LIES_MAX

    def _account(self, peer: PeerId, now: float) -> _Account:
        if peer not in self._accounts and len(self._accounts) >= PEERS_MAX:
            least = min(self._accounts, key=lambda each: self._debt(self._accounts[each]))
            del self._accounts[least]
        account = self._accounts.setdefault(peer, _Account(at=now))
        forgotten = self._limits.gift_bytes_per_s * max(0.0, now - account.at)
        account.given_bytes = max(0.0, account.given_bytes - forgotten)
        account.at = now
        return account

    @staticmethod
    def _debt(account: _Account) -> tuple[int, float]:
        return account.lies, account.given_bytes

    def _refill(self, now: float) -> None:
        more = self._limits.sent_bytes_per_s * max(0.0, now - self._left_at)
        self._left_bytes = min(float(self._limits.sent_bytes_burst), self._left_bytes + more)
        self._left_at = now


def choose(novelty: Sequence[float], byte_counts: Sequence[int], bytes_max: int) -> list[int]:
    """Return the indices of the offers to take, the newest to us first, as many as fit.

    Args:
        novelty: Our loss on a sample of each, nats a byte: what we predict well, we know.
        byte_counts: What each costs.
        bytes_max: What all of them may cost.
    """
    chosen, left = [], bytes_max
    for index in sorted(range(len(novelty)), key=lambda each: -novelty[each]):
        if byte_counts[index] <= left:
            chosen.append(index)
            left -= byte_counts[index]
    return chosen
