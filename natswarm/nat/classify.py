"""Turn what peers saw of us into a profile: no STUN server needed. The arithmetic, not the asking.

What is believed goes by the votes of `votes.py`, one for each voter's address and prefix. Our
public addresses: every address that enough voters saw us at, so that one lying peer among three
overwrites nothing and a NAT with several addresses shows them all. The mapping: endpoint-
independent where enough voters agree on one endpoint, at least two addresses among them (two
prefixes are not asked for: what tells EIM from ADM is a second address, and who could forge one in
the same prefix could forge all of a quorum of one). Filtering needs no trust: a packet got in or
did not. Ports: an observer that is outvoted on our address is not heard on ports, nor is one whose
ports hide a law that the others elect; what else it says can only make our law look wider.

Only IPv4: IPv6 hosts are not translated, and host candidates cover them.
Source: RFC 5780 for the tests, RFC 4787 for the words, libtorrent's `ip_voter` for the quorum.
`quick.py` asks. Knows no sockets, keys or datagram formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from natswarm.address import AddressKind, Endpoint
from natswarm.identity import PeerId
from natswarm.nat.allocation import PortSample
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Pooling
from natswarm.nat.fit import allocation_intervals, fit_allocation
from natswarm.nat.interval import Interval
from natswarm.nat.profile import LOCAL_ENDPOINTS_MAX, PUBLIC_IPS_MAX, NatProfile
from natswarm.nat.votes import elect, elected_among

__all__ = ["FilterTrial", "Observation", "classify", "port_intervals"]

# Fewer tries than this leave a filter open: at 10 % loss each way three are all lost once in 145.
FILTER_TRIAL_COUNT_MIN = 3

# So many mappings at one address are no chance where there are two and each mapping draws its own:
# both came up with all but 1 in 128.
POOLING_MAPPINGS_MIN = 8


@dataclass(frozen=True, slots=True)
class Observation:
    """One echo that came back from where it was asked for.

    Attributes:
        port_index: 0 for the main port, 1.. for fresh ones.
        local_port: Its UDP port.
        observer: Who saw us; None: a mainline node, which signs nothing.
        destination: Where we sent to; its address has the vote.
        observed: What they saw.
        sent_at: When the request left, seconds.
        is_contiguous: Whether every mapping that we had made since the observation before was
            observed, too, as far as is known: else ports in between may be our own.
    """

    port_index: int
    local_port: int
    observer: PeerId | None
    destination: Endpoint
    observed: Endpoint
    sent_at: float
    is_contiguous: bool = True


@dataclass(frozen=True, slots=True)
class FilterTrial:
    """One try to get in through a mapping from an endpoint it was not opened for.

    Attributes:
        by_stranger: True: from an address that the port never sent to. False: from another port
            of the one address that it sent to.
        was_answered: Whether it got in.
    """

    by_stranger: bool
    was_answered: bool


def classify(
    observations: Sequence[Observation],
    *,
    local_endpoints: Sequence[Endpoint] = (),
    filter_trials: Iterable[FilterTrial] = (),
) -> NatProfile:
    """Turn echoes and filter tests into a profile.

    Args:
        observations: In any order. Those that do not cross a NAT to the internet (a neighbour in
            the same house sees our private address) and those over IPv6 are left out.
        local_endpoints: Host candidates: the main port at each of our own addresses.
        filter_trials: What was tried; silence counts only several times over.

    Returns:
        A profile whose unknowns are None. Without a single usable echo it rests on the interfaces
        alone: a global IPv4 address of our own means no NAT, anything else means not known.
    """
    local = tuple(local_endpoints)[:LOCAL_ENDPOINTS_MAX]
    usable = _usable(observations)
    if not usable:
        return _from_interfaces(local)
    ips = _public_ips(usable)
    believed = [each for each in usable if each.observed.ip in ips]
    if not believed:
        return NatProfile.unknown(local)
    main = [each for each in usable if each.port_index == 0]
    own = next((e.observed for e in main if e.observed in local and e.observed.ip in ips), None)
    filtering, is_filter_inferred = _filtering(list(filter_trials), is_translated=own is None)
    observer_count = len({each.destination.ip for each in believed})
    if own is not None:
        return NatProfile(
            mapping=Mapping.EIM,
            filtering=filtering,
            public_ips=tuple(ips[:PUBLIC_IPS_MAX]),
            main_endpoint=own,
            local_endpoints=local,
            is_translated=False,
            echo_count=len(believed),
            observer_count=observer_count,
            inferred=("mapping", *(["filtering"] if is_filter_inferred else [])),
        )
    mapping, common_endpoint, is_mapping_inferred = _mapping(main)
    if len(ips) > 1 and mapping in (Mapping.EIM, Mapping.ADM):
        drawn = _mapping_of_drawn(believed)
        if drawn is Mapping.APDM or (drawn is Mapping.ADM and mapping is Mapping.EIM):
            mapping, common_endpoint, is_mapping_inferred = drawn, None, False
    allocation = fit_allocation(_samples(_heard(believed)))
    main_endpoint = common_endpoint
    is_main_inferred = False
    if main_endpoint is None and main:
        newest = max(main, key=lambda each: each.sent_at)
        keeps_port = allocation is not None and allocation.law is AllocationLaw.PRESERVING
        if newest.observed.ip in ips and (
            filtering is Filtering.EIF or (keeps_port and newest.observed.port == newest.local_port)
        ):
            main_endpoint = newest.observed
            is_main_inferred = True
    inferred = {
        "mapping": is_mapping_inferred,
        "filtering": is_filter_inferred,
        "main_endpoint": is_main_inferred,
    }
    return NatProfile(
        mapping=mapping,
        filtering=filtering,
        allocation=allocation,
        public_ips=tuple(ips[:PUBLIC_IPS_MAX]),
        main_endpoint=main_endpoint,
        local_endpoints=local,
        is_translated=True,
        echo_count=len(believed),
        observer_count=observer_count,
        pooling=_pooling(believed, len(ips)),
        inferred=tuple(name for name, is_so in inferred.items() if is_so),
    )


def port_intervals(observations: Sequence[Observation], profile: NatProfile) -> dict[str, Interval]:
    """Return where the estimated figures of `profile.allocation` lie: name -> interval.

    Args:
        observations: Those the profile was made from.
        profile: What `classify` made of them.
    """
    if profile.allocation is None:
        return {}
    usable = _usable(observations)
    ips = _public_ips(usable)
    believed = [each for each in usable if each.observed.ip in ips]
    return allocation_intervals(_samples(_heard(believed)), profile.allocation)


def _usable(observations: Sequence[Observation]) -> list[Observation]:
    return [
        each
        for each in observations
        if ":" not in each.observed.ip
        and each.observed.kind is AddressKind.GLOBAL
        and 1 <= each.observed.port <= 65_535
    ]


def _heard(believed: Sequence[Observation]) -> Sequence[Observation]:
    """Leave out voters whose ports hide a law that the others elect.

    Ports at random among those of a block or a counter look like a range, or like many blocks. So
    each voter's ports are fitted alone, and the laws are voted on; it takes three voters.
    """
    by_voter: dict[str, list[Observation]] = {}
    for each in believed:
        by_voter.setdefault(each.destination.ip, []).append(each)
    whole = fit_allocation(_samples(believed))
    if len(by_voter) < 3 or whole is None or whole.law is AllocationLaw.PRESERVING:
        return believed
    laws = {
        ip: fitted.law
        for ip, seen in by_voter.items()
        if (fitted := fit_allocation(_samples(seen))) is not None
    }
    elected = elect(laws)
    if elected in (None, whole.law, AllocationLaw.UNIFORM):
        return believed
    return [each for each in believed if laws[each.destination.ip] is elected]


def _samples(believed: Sequence[Observation]) -> list[PortSample]:
    return [
        PortSample(
            each.local_port,
            each.destination,
            each.observed.port,
            each.sent_at,
            each.observed.ip,
            each.is_contiguous,
        )
        for each in believed
    ]


def _from_interfaces(local: tuple[Endpoint, ...]) -> NatProfile:
    own = next((e for e in local if e.kind is AddressKind.GLOBAL and ":" not in e.ip), None)
    if own is None:
        return NatProfile.unknown(local)
    return NatProfile(
        mapping=Mapping.EIM,
        public_ips=(own.ip,),
        main_endpoint=own,
        local_endpoints=local,
        is_translated=False,
        inferred=("mapping", "public_ips", "main_endpoint", "is_translated"),
    )


def _public_ips(usable: Sequence[Observation]) -> list[str]:
    """Return our addresses: several behind NATs with arbitrary pooling (RFC 4787 section 4.1)."""
    seen_by: dict[str, list[str]] = {}
    # The main port first, whose address is the usual one.
    for each in sorted(usable, key=lambda each: (each.port_index, each.sent_at)):
        seen_by.setdefault(each.destination.ip, []).append(each.observed.ip)
    return elected_among(seen_by)


def _pooling(believed: Sequence[Observation], ip_count: int) -> Pooling | None:
    if ip_count > 1:
        return Pooling.ARBITRARY
    mappings = {(each.local_port, each.observed) for each in believed}
    return Pooling.PAIRED if len(mappings) >= POOLING_MAPPINGS_MIN else None


def _mapping(main: Sequence[Observation]) -> tuple[Mapping | None, Endpoint | None, bool]:
    """Return the mapping, the main port's endpoint where there is one, and whether it is a guess.

    The guess is the mapping; the endpoint is what the voters elect.
    """
    # voter's address -> (its port -> what that port saw)
    seen: dict[str, dict[int, Endpoint]] = {}
    for each in sorted(main, key=lambda each: each.sent_at):
        seen.setdefault(each.destination.ip, {})[each.destination.port] = each.observed
    same_count = sum(len(set(by.values())) == 1 for by in seen.values() if len(by) > 1)
    different_count = sum(len(set(by.values())) > 1 for by in seen.values())
    # A voter whose two ports saw different endpoints votes against any common one.
    votes = {ip: tuple(sorted(set(by.values()))) for ip, by in seen.items()}
    elected = elect(votes)
    common = elected[0] if elected is not None and len(elected) == 1 else None
    if len(seen) < 2:
        if different_count:
            return Mapping.APDM, None, False
        return None, common, False  # EIM or ADM: it takes a second address to tell
    agreeing = sum(vote == elected for vote in votes.values())
    # Of eight voters, each with a port of its own from a block of 256, two agree by chance one time
    # in ten: they are elected, but no majority.
    if common is not None and agreeing > 1 and 2 * agreeing > len(votes):
        return Mapping.EIM, common, False
    # With no observer that has two ports at one address it is APDM or ADM. APDM is the assumption:
    # it is what carriers that are not EIM do (Richter et al., IMC 2016).
    if same_count > different_count:
        return Mapping.ADM, None, False
    return Mapping.APDM, None, different_count == 0


def _mapping_of_drawn(believed: Sequence[Observation]) -> Mapping | None:
    """Return the mapping that any port shows with two endpoints; None where all keep theirs.

    Where each mapping draws one of several addresses and keeps its port, one port alone may see
    equal endpoints by chance.
    """
    by_port: dict[int, list[Observation]] = {}
    for each in believed:
        by_port.setdefault(each.port_index, []).append(each)
    differing = [
        (one, other)
        for seen in by_port.values()
        for one, other in combinations(seen, 2)
        if one.observed != other.observed
    ]
    if any(
        one.destination.ip == other.destination.ip and one.destination != other.destination
        for one, other in differing
    ):
        return Mapping.APDM
    return Mapping.ADM if differing else None


def _filtering(
    trials: Sequence[FilterTrial], *, is_translated: bool
) -> tuple[Filtering | None, bool]:
    """Return the filter, and whether it is inferred."""
    by_stranger = [trial.was_answered for trial in trials if trial.by_stranger]
    stranger_count = len(by_stranger)
    # Of a NAT half of them, since one alone may be no stranger to it: a port of an earlier run,
    # drawn again within minutes, has its session still, and lets in whom that run talked to. At
    # 10 % loss three of four are lost once in 270. (A late answer counts as silence, too.)
    if sum(by_stranger) >= (stranger_count / 2 if is_translated else 1) > 0:
        return Filtering.EIF, False
    if any(trial.was_answered for trial in trials if not trial.by_stranger):
        # Or EIF, where no third peer could be asked: ADF is the part that was seen. Without a NAT
        # it is no news at all, and a host is open until a test has shown a firewall.
        was_tried = stranger_count >= FILTER_TRIAL_COUNT_MIN
        return (Filtering.ADF, not was_tried) if is_translated or was_tried else (None, False)
    if len(trials) - stranger_count >= FILTER_TRIAL_COUNT_MIN:
        return Filtering.APDF, False
    return None, False
