"""Plan a puncture: two NAT profiles in, what this side does out.

Both sides plan for themselves, from the same two profiles, and their plans must fit together: who
opens, who probes, towards what. So the choice of a strategy looks only at what both know alike,
and treats the two sides by the order of their PeerIds where the profiles do not tell them apart:

    strategy               when                                 what happens
    ipv6                   both have global IPv6 addresses      both send there: no NAT, at most
                                                                firewalls that both open
    same-network           both are seen at one address         both send to private addresses
    gateway-mapping        a gateway forwards a port to a side  the other dials it
    direct                 one side lets in anybody, or lets    the other dials; an ADF side first
                           in an address it has sent to, at     sends one datagram to the dialler's
                           an endpoint that is known            address
    simultaneous-open      both endpoints are known             both send to the other's endpoint
    tftp-helper            one side's NAT runs a TFTP helper    a request makes it let in the peer's
                                                                address: direct, or one-sided
    one-sided-birthday     one endpoint is known, the other     the unpredictable side opens M
                           side draws ports; or nobody's is,    mappings, the other probes the ports
                           but one filters by address alone     they may have got
    sequential-prediction  both count                           runs or scans that cross
    two-sided-birthday     both draw ports, both drop strangers both send from drawn ports to
                                                                guessed ones until two guesses meet

The first three go first where they may apply, and are over in a second or two; what the NATs need
follows in the same puncture. Of several ways that the NATs allow, the one with the least expected
time goes first, and the next follows if it fails (`Plan.fallback`). `plan_alternatives` shows all
with their prices.

Host candidates are tried by the way in every plan. Bursts go to the peer's public addresses alone,
which the caller has from a third party that sees the peer there (`introduction.profile_as_seen`): a
peer cannot aim us at somebody else.

Sizes come from `odds.py` at 99.9 %: success is the rule, and what fails may be planned again with
fresh mappings. What cannot succeed within the limits is refused with the reason.

Pure: no clock, no randomness, no sockets. Source: docs/puncturing.md; Ford, Srisuresh &
Kegel 2005 (simultaneous open), Klinec & Matyas 2014 (sequential NATs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from natswarm.address import AddressKind, Endpoint
from natswarm.errors import PunctureFailed
from natswarm.identity import PeerId
from natswarm.nat.behaviour import AllocationLaw, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.puncture.birthday import (
    ANSWER_ROUND_TRIPS,
    CONFIDENCE,
    plan_opener,
    plan_prober,
)
from natswarm.puncture.bounds import (
    allocation_of,
    opener_ttl,
    port_count_of,
    public_ips_of,
    somewhere_at,
)
from natswarm.puncture.scan import plan_sequential
from natswarm.puncture.strategy import CHECK_RETRY_S, Burst, Limits, Openers, Plan, Strategy
from natswarm.puncture.two_sided import plan_two_sided
from natswarm.wire import TFTP_PORT

__all__ = [
    "Alternative",
    "Burst",
    "Limits",
    "Openers",
    "Plan",
    "Strategy",
    "plan_alternatives",
    "plan_direct",
    "plan_puncture",
]

# Between two phones of one continent, where nobody has measured it. The pace rests on it.
ROUND_TRIP_ASSUMED_S = 0.2
# A check is retried when its answer is overdue.
RETRY_ROUND_TRIPS = 1.5
# Ways whose expected times differ by less than this may as well go in another order. The profiles
# are estimates; what was learned of the networks may say more.
SIMILAR_FACTOR = 3.0

# A plan that only checks a few endpoints costs nearly nothing, so it is patient; less so where
# another follows, for a gateway that does not forward what it promised.
CHECK_DURATION_S = 10.0
GATEWAY_S = 4.0
# How long host candidates are tried before anything else is sent. In one house they answer within
# milliseconds, and it is worth waiting for the other phone to wake up; IPv6 takes a round trip.
SAME_NETWORK_S = 2.0
IPV6_S = 1.0
# How long the checks of a simultaneous open keep to the opener's hop limit: the usual skew of two
# introduced sides, so that both NATs have their mappings when the first datagram arrives. Where
# nobody knows whether an early datagram does harm, a way through the internet is enough.
LOW_TTL_S = 1.5
LOW_TTL_UNKNOWN_ROUND_TRIPS = 0.5
# More host candidates than a laptop with a VPN has are noise.
CANDIDATES_MAX = 8
# What the strategies are compared by: both sides must come to one choice, so neither the own limits
# nor the round trip measured on one side have a say.
NOMINAL = Limits()


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to puncture, with its price for our side.

    Attributes:
        strategy: Which.
        plan: What we would do; None where it is refused.
        refusal: Why it is refused; else empty.
    """

    strategy: Strategy
    plan: Plan | None
    refusal: str = ""

    def __str__(self) -> str:
        """As on a screen: `two-sided-birthday: 1,815 probes, 2.1 s, 99.9 %`."""
        if self.plan is None:
            return f"{self.strategy.value}: {self.refusal}"
        return (
            f"{self.strategy.value}: {self.plan.expected_probe_count:,.0f} probes, "
            f"{self.plan.expected_s:.1f} s, {self.plan.success_probability:.1%}"
        )


def plan_direct(endpoints: Sequence[Endpoint], *, limits: Limits | None = None) -> Plan:
    """Return a plan that probes known endpoints, such as those of an invite or of a HELLO."""
    return _checks_only(
        tuple(endpoints),
        limits or Limits(),
        Strategy.DIRECT,
        "the peer's endpoint is known",
        ROUND_TRIP_ASSUMED_S,
        retry_s=CHECK_RETRY_S,
    )


def plan_puncture(
    mine: NatProfile,
    theirs: NatProfile,
    *,
    my_id: PeerId,
    their_id: PeerId,
    limits: Limits | None = None,
    round_trip_s: float | None = None,
    order: Sequence[Strategy] = (),
) -> Plan:
    """Plan our side of a puncture; the peer plans the other side from the same profiles.

    Args:
        mine: What our NAT does.
        theirs: What the peer's does, its addresses vouched for by whoever sees the peer.
        my_id: Who we are; the order of the two ids settles ties.
        their_id: Who the peer is.
        limits: Our own bounds. Two sides with different limits still fit together.
        round_trip_s: To the peer and back, as far as the introduction showed it; None: not known.
        order: Which to try first of those that take about as long; both sides must say the same.

    Raises:
        PunctureFailed: These NATs cannot be expected to open within the limits; says why, and what
            to try.
    """
    plans: list[Plan] = []
    refusal: PunctureFailed | None = None
    duration_s = 0.0
    limits = limits or Limits()
    planner = _Planner(mine, theirs, limits, round_trip_s, is_first=my_id < their_id)
    for choice in planner.choices(order):
        if not _is_wanted(choice.strategy, limits):
            continue
        try:
            plan = planner.plan(choice)
        except PunctureFailed as error:
            refusal = refusal or error
            continue
        if plans and duration_s + plan.duration_s > limits.duration_s:
            continue
        duration_s += plan.duration_s
        plans.append(plan)
    if not plans and refusal is None:
        raise _unwanted(limits)
    if refusal is not None and not any(_goes_through_nats(plan) for plan in plans):
        # What the host candidates may bring is no reason to wait in silence.
        if not plans and planner.candidates and _may_share_network(mine, theirs):
            plans.append(planner.candidates_only())
        if not plans:
            raise refusal
    return Plan.chain(plans)


def plan_alternatives(
    mine: NatProfile,
    theirs: NatProfile,
    *,
    my_id: PeerId,
    their_id: PeerId,
    limits: Limits | None = None,
    round_trip_s: float | None = None,
) -> tuple[Alternative, ...]:
    """Return all ways that these two profiles allow, in the order they are tried; see above."""
    planner = _Planner(mine, theirs, limits or Limits(), round_trip_s, is_first=my_id < their_id)
    found = []
    for choice in planner.choices():
        try:
            found.append(Alternative(choice.strategy, planner.plan(choice)))
        except PunctureFailed as error:
            found.append(Alternative(choice.strategy, None, str(error)))
    return tuple(found)


def _goes_through_nats(plan: Plan) -> bool:
    return plan.strategy not in (Strategy.IPV6, Strategy.SAME_NETWORK)


def _is_wanted(strategy: Strategy, limits: Limits) -> bool:
    return not limits.strategies or strategy in limits.strategies


def _unwanted(limits: Limits) -> PunctureFailed:
    wanted = " or ".join(strategy.value for strategy in limits.strategies)
    return PunctureFailed(f"{wanted} is not what these NATs call for, and nothing else is allowed")


@dataclass(frozen=True, slots=True)
class _Choice:
    """A strategy, and which side has the part of it that only one can have."""

    strategy: Strategy
    first_opens: bool = True


class _Planner:
    """What one side of a puncture plans with."""

    def __init__(
        self,
        mine: NatProfile,
        theirs: NatProfile,
        limits: Limits,
        round_trip_s: float | None,
        *,
        is_first: bool,
    ) -> None:
        self.mine = mine
        self.theirs = theirs
        self.limits = limits
        self.round_trip_s = ROUND_TRIP_ASSUMED_S if round_trip_s is None else round_trip_s
        self.is_first = is_first
        self.candidates = _candidates(mine, theirs)

    def choices(self, order: Sequence[Strategy] = ()) -> list[_Choice]:
        """Return the ways to try: by expected time, of those with similar ones by `order`."""
        mine, theirs = self.mine, self.theirs
        found = []
        if self.candidates:
            if _has_global_ipv6(mine) and _has_global_ipv6(theirs):
                found.append(_Choice(Strategy.IPV6))
            elif _is_seen_at_one_address(mine, theirs):
                found.append(_Choice(Strategy.SAME_NETWORK))
        if mine.forwarded_endpoints or theirs.forwarded_endpoints:
            found.append(_Choice(Strategy.GATEWAY_MAPPING))
        first, second = (mine, theirs) if self.is_first else (theirs, mine)
        known = _known_choice(first, second)
        if known is not None:
            return [*found, known]
        timed = sorted(
            ((self._nominal_s(choice), choice) for choice in _drawn_choices(first, second)),
            key=lambda each: each[0],
        )
        similar = [choice for time_s, choice in timed if time_s <= SIMILAR_FACTOR * timed[0][0]]
        rank = {strategy: index for index, strategy in enumerate(order)}
        rest = [choice for _, choice in timed[len(similar) :]]
        similar.sort(key=lambda choice: rank.get(choice.strategy, len(rank)))
        return found + similar + rest

    def _nominal_s(self, choice: _Choice) -> float:
        """Return what both sides take for the expected time of a choice."""
        sides = [self.mine, self.theirs] if self.is_first else [self.theirs, self.mine]
        # The number of addresses is what the two views of a side may differ in.
        sides = [replace(side, public_ips=("192.0.2.1",)) for side in sides]
        nominal = _Planner(sides[0], sides[1], NOMINAL, None, is_first=True)
        try:
            return nominal.plan(choice).expected_s
        except PunctureFailed:
            return float("inf")

    def plan(self, choice: _Choice) -> Plan:
        """Return our half of a choice.

        Raises:
            PunctureFailed: The limits are too narrow, or the peer's address is not known.
        """
        mine, theirs, limits = self.mine, self.theirs, self.limits
        opens = choice.first_opens is self.is_first
        match choice.strategy:
            case Strategy.IPV6 | Strategy.SAME_NETWORK:
                plan = self._plan_near(choice.strategy)
            case Strategy.GATEWAY_MAPPING:
                plan = self._plan_forwarded()
            case Strategy.DIRECT | Strategy.SIMULTANEOUS_OPEN:
                plan = self._plan_known(choice.strategy)
            case Strategy.TFTP_HELPER if mine.is_predictable or theirs.is_predictable:
                plan = self._plan_tftp_known(opens=opens)
            case Strategy.TFTP_HELPER | Strategy.ONE_SIDED_BIRTHDAY:
                half = plan_opener if opens else plan_prober
                plan = half(mine, theirs, limits, self.round_trip_s, choice.strategy)
            case Strategy.SEQUENTIAL_PREDICTION:
                plan = plan_sequential(
                    mine, theirs, limits, self.round_trip_s, is_first=self.is_first
                )
            case Strategy.TWO_SIDED_BIRTHDAY:
                plan = plan_two_sided(mine, theirs, limits, self.round_trip_s)
        return replace(
            plan,
            checks=tuple(dict.fromkeys((*self.candidates, *plan.checks))),
            retry_s=self._retry_s,
        )

    def candidates_only(self) -> Plan:
        """Return a plan for two that may be in one network, where NATs leave no way."""
        return self._checks(
            self.candidates, Strategy.DIRECT, "both may be in one network behind the NAT"
        )

    @property
    def _retry_s(self) -> float:
        return max(CHECK_RETRY_S, RETRY_ROUND_TRIPS * self.round_trip_s)

    def _plan_near(self, strategy: Strategy) -> Plan:
        if strategy is Strategy.IPV6:
            plan = self._checks((), strategy, "both have IPv6, which nobody translates")
            return replace(plan, duration_s=min(IPV6_S, plan.duration_s))
        plan = self._checks((), strategy, "both are behind one NAT, and may be in one network")
        if self.mine.hairpinning and self.theirs.main_endpoint is not None:
            plan = replace(
                plan,
                checks=(self.theirs.main_endpoint,),
                reason=f"{plan.reason}; it turns round what we send to its own address",
            )
        return replace(plan, duration_s=min(SAME_NETWORK_S, plan.duration_s))

    def _plan_forwarded(self) -> Plan:
        dialled = self.theirs.forwarded_endpoints
        reason = "the peer's gateway forwards a port to it" if dialled else "our gateway forwards"
        plan = self._checks(dialled, Strategy.GATEWAY_MAPPING, reason)
        return replace(plan, duration_s=min(GATEWAY_S, plan.duration_s))

    def _plan_known(self, strategy: Strategy) -> Plan:
        mine, theirs = self.mine, self.theirs
        checks: tuple[Endpoint, ...] = ()
        # A NAT that lets in strangers but draws a port for each destination must not speak first:
        # the peer expects our answers from where it dials, not from the port that our own packet
        # would get.
        waits = mine.accepts_strangers and not mine.is_predictable and not theirs.accepts_strangers
        if theirs.main_endpoint is not None and not waits:
            checks += (theirs.main_endpoint,)
        if theirs.accepts_strangers:
            reason = "the peer lets in strangers, so we dial"
        elif mine.accepts_strangers:
            reason = "we let in strangers, so the peer dials"
        elif strategy is Strategy.SIMULTANEOUS_OPEN:
            reason = "both endpoints are known: both send to the other's"
        elif mine.is_predictable and mine.accepts_address:
            reason = (
                "one datagram to the peer's address opens our filter for it, then the peer dials"
            )
            checks += somewhere_at(theirs)
        else:
            reason = "the peer opens its filter for our address, then we dial"
        plan = self._checks(checks, strategy, reason)
        ttl = opener_ttl(mine, theirs, self.limits)
        if strategy is not Strategy.SIMULTANEOUS_OPEN or ttl is None:
            return plan
        unknown_s = LOW_TTL_UNKNOWN_ROUND_TRIPS * self.round_trip_s
        is_asked_for = theirs.poison is not None or self.limits.opener_ttl is not None
        return replace(plan, checks_ttl=ttl, checks_ttl_s=LOW_TTL_S if is_asked_for else unknown_s)

    def _plan_tftp_known(self, *, opens: bool) -> Plan:
        """One endpoint is known, and a TFTP request opens it for the other's address."""
        if opens:
            requests = tuple(Endpoint(ip, TFTP_PORT) for ip in public_ips_of(self.theirs))
            plan = self._checks(
                (), Strategy.TFTP_HELPER, "a TFTP request opens our NAT, then the peer dials"
            )
            return replace(plan, tftp_targets=requests)
        main = self.theirs.main_endpoint
        return self._checks(
            () if main is None else (main,),
            Strategy.TFTP_HELPER,
            "the peer's TFTP request opens its NAT, then we dial",
        )

    def _checks(self, checks: tuple[Endpoint, ...], strategy: Strategy, reason: str) -> Plan:
        return _checks_only(
            checks, self.limits, strategy, reason, self.round_trip_s, retry_s=self._retry_s
        )


def _known_choice(first: NatProfile, second: NatProfile) -> _Choice | None:
    """Return the way for which no port has to be guessed; None: there is none.

    Looks at no address: each side knows its own from its observers, but the peer's from whoever
    introduced them, and the two views must lead to one choice.
    """
    sides = (first, second)
    if any(side.accepts_strangers for side in sides):
        return _Choice(Strategy.DIRECT)
    if all(side.is_predictable for side in sides):
        return _Choice(Strategy.SIMULTANEOUS_OPEN)
    if any(side.is_predictable and side.accepts_address for side in sides):
        return _Choice(Strategy.DIRECT)
    for side in sides:
        if side.is_predictable and side.tftp_helper:
            return _Choice(Strategy.TFTP_HELPER, first_opens=side is first)
    return None


def _drawn_choices(first: NatProfile, second: NatProfile) -> list[_Choice]:
    """Return the ways in which ports are guessed."""
    sides = (first, second)
    if any(side.is_predictable for side in sides):
        return [_Choice(Strategy.ONE_SIDED_BIRTHDAY, first_opens=second.is_predictable)]
    found = []
    # A side that filters by address alone lets in a probe from whatever port the other NAT draws,
    # so only one port has to be guessed. (Its answer leaves by the port the probe came in by: NATs
    # keep sessions, as Linux does. One that does not stays closed.)
    if (opener := _fewer(first, second, [side.accepts_address for side in sides])) is not None:
        found.append(_Choice(Strategy.ONE_SIDED_BIRTHDAY, first_opens=opener == 0))
    # A TFTP helper makes a NAT filter so on request.
    elif (opener := _fewer(first, second, [bool(side.tftp_helper) for side in sides])) is not None:
        found.append(_Choice(Strategy.TFTP_HELPER, first_opens=opener == 0))
    counts = all(allocation_of(side).law is AllocationLaw.SEQUENTIAL for side in sides)
    if counts and all(side.mapping is not Mapping.ADM for side in sides):
        found.append(_Choice(Strategy.SEQUENTIAL_PREDICTION))
    return [*found, _Choice(Strategy.TWO_SIDED_BIRTHDAY)]


def _fewer(first: NatProfile, second: NatProfile, able: list[bool]) -> int | None:
    """Return which of those able draws from fewer ports, 0 or 1."""
    counts = [port_count_of(side) for side in (first, second)]
    return min((index for index in (0, 1) if able[index]), key=counts.__getitem__, default=None)


def _checks_only(
    checks: tuple[Endpoint, ...],
    limits: Limits,
    strategy: Strategy,
    reason: str,
    round_trip_s: float,
    *,
    retry_s: float,
) -> Plan:
    return Plan(
        strategy=strategy,
        checks=tuple(dict.fromkeys(checks)),
        retry_s=retry_s,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=min(CHECK_DURATION_S, limits.duration_s),
        expected_probe_count=max(1, len(checks)),
        p99_probe_count=3 * max(1, len(checks)),  # two losses in a row come once in a hundred
        success_probability=CONFIDENCE,
        expected_s=ANSWER_ROUND_TRIPS * round_trip_s,
        reason=reason,
    )


def _candidates(mine: NatProfile, theirs: NatProfile) -> tuple[Endpoint, ...]:
    """Return the peer's host candidates that we can send to at all."""
    my_families = {":" in endpoint.ip for endpoint in mine.local_endpoints}
    own_ips = {endpoint.ip for endpoint in mine.local_endpoints}
    usable = [
        endpoint
        for endpoint in theirs.local_endpoints
        if (":" in endpoint.ip) in my_families
        and endpoint.kind is not AddressKind.UNUSABLE
        # The loopback interface leads to the peer only if both are bound to it.
        and (endpoint.kind is not AddressKind.LOOPBACK or endpoint.ip in own_ips)
        # The same private address in two houses is ourselves, unless it is another port of ours.
        and (endpoint.ip not in own_ips or _may_share_network(mine, theirs))
        and endpoint not in mine.local_endpoints
    ]
    return tuple(usable[:CANDIDATES_MAX])


def _may_share_network(mine: NatProfile, theirs: NatProfile) -> bool:
    """Whether both may be behind one NAT, or reach each other without any."""
    if not mine.public_ips or not theirs.public_ips:
        return True
    if _is_seen_at_one_address(mine, theirs):
        return True
    return _has_global_ipv6(mine) and _has_global_ipv6(theirs)


def _is_seen_at_one_address(mine: NatProfile, theirs: NatProfile) -> bool:
    return any(ip in theirs.public_ips for ip in mine.public_ips)


def _has_global_ipv6(profile: NatProfile) -> bool:
    return any(
        ":" in endpoint.ip and endpoint.kind is AddressKind.GLOBAL
        for endpoint in profile.local_endpoints
    )
