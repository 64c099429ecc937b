"""What an inspection means for meeting peers: in words, and with each kind of peer.

The prospects come from the planner itself, with our profile on one side and a typical one on the
other, so that they say what natswarm would do and not what a book says. Pure.
"""

from __future__ import annotations

from natswarm.address import Endpoint
from natswarm.errors import PunctureFailed
from natswarm.identity import PeerId
from natswarm.inspector.report import Prospect
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Poison
from natswarm.nat.profile import NatProfile
from natswarm.puncture.plan import plan_puncture

__all__ = ["advise", "prospects"]

# Stands for any peer's address: RFC 5737.
_PEER_IP = "192.0.2.1"
_LOWEST, _HIGHEST = PeerId(bytes(32)), PeerId(b"\xff" * 32)

_HOME_ROUTER = NatProfile(
    mapping=Mapping.EIM,
    filtering=Filtering.APDF,
    allocation=PortAllocation(AllocationLaw.PRESERVING),
    public_ips=(_PEER_IP,),
    main_endpoint=Endpoint(_PEER_IP, 40_000),
    is_translated=True,
)
_BLOCK_CGN = NatProfile(
    mapping=Mapping.APDM,
    filtering=Filtering.APDF,
    allocation=PortAllocation(
        AllocationLaw.BLOCK, low=1024, high=65_535, block_size=256, blocks=(40_960,)
    ),
    public_ips=(_PEER_IP,),
    is_translated=True,
)
_RANDOM_CGN = NatProfile(
    mapping=Mapping.APDM,
    filtering=Filtering.APDF,
    allocation=PortAllocation(AllocationLaw.UNIFORM),
    public_ips=(_PEER_IP,),
    is_translated=True,
)
PEERS = {
    "behind a home router (EIM/APDF)": _HOME_ROUTER,
    "behind a carrier's NAT with blocks of 256 ports (APDM/APDF)": _BLOCK_CGN,
    "behind a carrier's NAT that draws any port (APDM/APDF)": _RANDOM_CGN,
}


def prospects(profile: NatProfile) -> tuple[Prospect, ...]:
    """Return how a puncture with each typical kind of peer would go; empty if nothing is known."""
    if profile.is_translated is None:
        return ()
    return tuple(_prospect(profile, peer, theirs) for peer, theirs in PEERS.items())


def _prospect(mine: NatProfile, peer: str, theirs: NatProfile) -> Prospect:
    try:
        plan = plan_puncture(mine, theirs, my_id=_LOWEST, their_id=_HIGHEST)
    except PunctureFailed as error:
        return Prospect(peer, "", None, str(error))
    return Prospect(peer, plan.strategy.value, plan.expected_probe_count, plan.reason)


def advise(profile: NatProfile, *, was_asked: bool) -> tuple[str, ...]:
    """Return what the profile means for whoever wants to meet peers.

    Args:
        profile: What is known.
        was_asked: Whether there was any peer to ask.
    """
    if profile.is_translated is None:
        return (_how_to_get_a_peer(was_asked=was_asked),)
    advice = [_reachability(profile)]
    if profile.poison not in (None, Poison.NONE) and profile.opener_ttl is not None:
        advice.append(
            f"An early probe spoils your ports ({profile.poison.value}): peers' openers should die "
            f"on the way; yours leave your own NATs with a hop limit of {profile.opener_ttl}."
        )
    if profile.tftp_helper and profile.filtering is Filtering.APDF:
        advice.append(
            "Your NAT runs a TFTP helper: one request to a peer's port 69 opens your port to all "
            "ports of that peer, which saves nearly all probes of a birthday puncture."
        )
    lifetime_s = profile.idle_lifetime_s or profile.idle_unreplied_s
    if lifetime_s is not None and lifetime_s != float("inf"):
        advice.append(f"Keep a mapping alive with a datagram every {0.7 * lifetime_s:.0f} s.")
    if profile.absolute_lifetime_s not in (None, float("inf")):
        advice.append(
            f"Mappings die after {profile.absolute_lifetime_s:.0f} s whatever is sent: open the "
            f"next path within {0.7 * (profile.absolute_lifetime_s or 0):.0f} s."
        )
    if not profile.echo_count:
        advice.append(_how_to_get_a_peer(was_asked=was_asked))
    return tuple(advice)


def _how_to_get_a_peer(*, was_asked: bool) -> str:
    why = "Nobody who was asked could tell" if was_asked else "Nobody was asked"
    return (
        f"{why} what your NAT does. It takes one peer on the internet, better two at different "
        "addresses: run `natswarm up` on a device that strangers can reach (a public address, or a "
        "carrier that lets strangers in) and pass its invite here with --join."
    )


def _reachability(profile: NatProfile) -> str:
    where = "" if profile.main_endpoint is None else f" at {profile.main_endpoint}"
    if profile.accepts_strangers:
        no_nat = "" if profile.is_translated else "There is no NAT. "
        return (
            f"{no_nat}Anybody can dial you{where}: give your invite away (`natswarm up`); you can "
            "introduce others to each other."
        )
    if profile.is_predictable:
        if profile.accepts_address:
            return (
                f"Your port is the same for every peer{where}, and one datagram to a peer's "
                "address lets in all of its ports: any peer that a neighbour introduces gets in "
                "with a few probes, whatever its NAT does."
            )
        return (
            f"Your port is the same for every peer{where}: two like you meet with a few probes; a "
            "peer whose ports are drawn at random takes a birthday puncture, in which it opens "
            "many ports and you search for one."
        )
    ports = 64_512 if profile.allocation is None else profile.allocation.port_count
    if profile.accepts_address:
        return (
            f"Every peer sees another port of yours, one of {ports}; but one datagram to a peer's "
            "address lets in all of its ports, so a peer with a known port gets in with a few "
            "probes, and only one port ever has to be guessed."
        )
    return (
        f"Every peer sees another port of yours, one of {ports}, and only whom you sent to gets "
        "in: peers with a known port meet you by a one-sided birthday puncture, peers like you by "
        "a two-sided one."
    )
