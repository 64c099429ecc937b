"""Recipes: which strategy opened which pair of networks, and so which one to try first.

The planner knows the odds of each strategy from what NATs are said to do. Networks do things that
no profile says: one drops TFTP, one throttles bursts. So outcomes are counted for each pair of
networks, and where several ways look similarly good the next puncture begins with the one that has
worked.

    cost = expected seconds / chance,   chance drawn from Beta(3 + opened, 1 + failed)

Trying ways in turn until one opens takes least time in the order of cost. The chance is drawn, not
averaged (Thompson sampling): what has seldom been tried gets a turn now and then, what always fails
hardly one. Counts fade by half in 100 outcomes of their pair, as carriers rebuild their networks.
Nothing is ever left out: the order changes, the ways stay.

A network is the prefix of its public address (/16, or /32 of IPv6) with the class of its NAT; a
pair is the same from both sides.

Bounds: 256 pairs, the longest unused forgotten first. Pure: randomness is an argument. Source:
Thompson 1933; frp's scores (+2 for what opened, -1 for what was used) for the idea.
"""

from __future__ import annotations

import ipaddress
import random
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from natswarm.errors import DecodeError
from natswarm.nat.profile import NatProfile
from natswarm.puncture.strategy import Strategy

__all__ = ["Recipes", "Score", "pair_label"]

PAIRS_MAX = 256
LABEL_CHARACTERS_MAX = 200
# What the planner offers works mostly: as if each way had opened three of four. A strong belief
# would take dozens of failures to shake; none would make the first failure decide.
PRIOR_OPENED, PRIOR_FAILED = 3.0, 1.0
FADE = 0.5 ** (1 / 100)


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a strategy did on a pair of networks.

    Attributes:
        opened: Punctures that it opened, fading.
        failed: Punctures that it was tried in and did not open, fading.
    """

    opened: float = 0.0
    failed: float = 0.0


class _Form(msgspec.Struct, forbid_unknown_fields=True):
    """What is stored: of each pair of networks, of each strategy, the score."""

    pairs: dict[str, dict[Strategy, Score]]


class Recipes:
    """What one node has learned.

    Attributes:
        is_changed: Whether something is new since this was last set to False.
    """

    def __init__(self) -> None:
        self._pairs: OrderedDict[str, dict[Strategy, Score]] = OrderedDict()  # the latest last
        self.is_changed = False

    def scores(self) -> dict[str, dict[Strategy, Score]]:
        """Return what is known, the latest pair last."""
        return {label: dict(scores) for label, scores in self._pairs.items()}

    def note(self, pair: str, tried: Sequence[Strategy], opened_by: Strategy | None) -> None:
        """Note one puncture.

        Args:
            pair: `pair_label`.
            tried: What was tried, in order; what comes after `opened_by` was not.
            opened_by: Which one found the path; None: none did.
        """
        known = self._pairs.pop(pair, {})
        scores = {
            strategy: Score(score.opened * FADE, score.failed * FADE)
            for strategy, score in known.items()
        }
        for strategy in dict.fromkeys(tried):
            before = scores.get(strategy, Score())
            if strategy is opened_by:
                scores[strategy] = Score(before.opened + 1, before.failed)
                break
            scores[strategy] = Score(before.opened, before.failed + 1)
        self._pairs[pair] = scores
        if len(self._pairs) > PAIRS_MAX:
            self._pairs.popitem(last=False)
        self.is_changed = True

    def order(
        self, pair: str, expected_s: Sequence[tuple[Strategy, float]], rng: random.Random
    ) -> tuple[Strategy, ...]:
        """Return the strategies, the one to try first at the front.

        Args:
            pair: `pair_label`.
            expected_s: Each with the seconds that it takes on average, as the planner reckons.
            rng: Draws the chances.
        """
        known = self._pairs.get(pair)
        # Where nothing is known there is nothing to explore: the planner's order stands.
        if known is None:
            return tuple(strategy for strategy, _ in expected_s)
        cost = {}
        for strategy, seconds in expected_s:
            score = known.get(strategy, Score())
            chance = rng.betavariate(PRIOR_OPENED + score.opened, PRIOR_FAILED + score.failed)
            cost[strategy] = seconds / max(chance, 1e-6)
        return tuple(sorted(cost, key=cost.__getitem__))

    def clear(self) -> None:
        """Forget everything."""
        self._pairs.clear()
        self.is_changed = True

    def encode(self) -> bytes:
        """Return the stored form, JSON."""
        return msgspec.json.encode(_Form(self.scores()))

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Recipes:
        """Read the stored form.

        Raises:
            DecodeError: Damaged, or of another version.
        """
        try:
            form = msgspec.json.decode(data, type=_Form)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(f"not recipes: {error}") from error
        recipes = cls()
        for label, scores in list(form.pairs.items())[-PAIRS_MAX:]:
            numbers = [n for score in scores.values() for n in (score.opened, score.failed)]
            if len(label) > LABEL_CHARACTERS_MAX or not all(0 <= n < 1e6 for n in numbers):
                raise DecodeError("not recipes: a score or a name is out of bounds")
            recipes._pairs[label] = scores
        return recipes


def pair_label(mine: NatProfile, theirs: NatProfile) -> str:
    """Return a name for a pair of networks, the same from both sides."""
    return " x ".join(sorted((_network_label(mine), _network_label(theirs))))


def _network_label(profile: NatProfile) -> str:
    where = "unknown"
    if profile.public_ips:
        address = ipaddress.ip_address(profile.public_ips[0])
        size = 16 if address.version == 4 else 32
        where = str(ipaddress.ip_network((address, size), strict=False))
    if profile.is_translated is False:
        return f"{where} no NAT"
    mapping = "APDM" if profile.mapping is None else profile.mapping.value
    filtering = "APDF" if profile.filtering is None else profile.filtering.value
    law = "unknown" if profile.allocation is None else profile.allocation.law.value
    return f"{where} {mapping}/{filtering} {law}"
