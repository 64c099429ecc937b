"""What must hold in the table of an emulated NAT between any two packets.

The only place that looks into a `Nat` besides itself: the invariants stand apart from the code that
keeps them, and are written down from the behaviour, not from the code. Slow; for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from natswarm.address import Endpoint
from natswarm.nat.behaviour import Poison, Pooling
from natswarm.sim.nat_behaviour import TFTP_PORT
from natswarm.sim.pool import PORT_COUNT
from natswarm.sim.ports import Blocks

if TYPE_CHECKING:
    from natswarm.sim.nat import Nat

__all__ = ["check_nat"]


def check_nat(nat: Nat) -> None:
    """Assert that the table of `nat` agrees with itself and with its behaviour.

    Raises:
        AssertionError: It does not; says what is wrong.
    """
    _check_sessions(nat)
    _check_mappings(nat)
    _check_ports(nat)
    if nat._rates is not None:
        nat._rates.check()
    cap = nat.behaviour.max_mappings
    assert cap is None or all(count <= cap for count in nat._subscribers.values()), (
        "a subscriber has more mappings than its cap"
    )


def _check_sessions(nat: Nat) -> None:
    """Sessions, claims to ports and the filter agree."""
    claims: dict[object, int] = {}
    permitted: dict[tuple[int, object], int] = {}
    mappings = {}
    for session in nat._outgoing.values():
        mapping, remote = session.mapping, session.remote
        assert session.sequence, "a burned session is still there"
        assert nat._incoming[mapping.slot, remote.ip, remote.port] is session
        assert session.expires <= min(mapping.expires, mapping.dies_at), "outlives its mapping"
        claim = nat._claim(mapping.slot, remote)
        assert nat._claims[claim] is mapping, "a port without a claim to it"
        claims[claim] = claims.get(claim, 0) + 1
        assert mapping.claims[claim] > 0
        if session.is_open:
            key = (id(mapping), nat._filter_key(remote))
            permitted[key] = permitted.get(key, 0) + 1
        mappings[id(mapping)] = mapping
    due_count = sum(session.sequence == sequence for _, sequence, session in nat._due)
    assert len(nat._incoming) == len(nat._outgoing) == due_count
    assert claims.keys() == nat._claims.keys()
    assert sum(claims.values()) == sum(sum(m.claims.values()) for m in mappings.values())
    assert permitted == {
        (id(mapping), key): count
        for mapping in mappings.values()
        for key, count in mapping.permitted.items()
    }, "the filter forgot somebody, or remembers too long"
    for (slot, ip), session in nat._expectations.items():
        assert nat._incoming[slot, ip, TFTP_PORT] is session, "an answer to no request"


def _check_mappings(nat: Nat) -> None:
    """Every mapping has a session, is counted, and is found where poison looks for it."""
    mappings = {id(session.mapping): session.mapping for session in nat._outgoing.values()}
    users: dict[int, int] = {}
    for mapping in mappings.values():
        if mapping.key is not None:
            users[mapping.slot] = users.get(mapping.slot, 0) + 1
        else:
            assert nat.behaviour.poison is Poison.TAKES_PORT, "a mapping of the box itself"
    assert users == nat._slot_users, "the count of mappings of each port is wrong"
    assert sum(users.values()) == sum(nat._subscribers.values())
    if nat.behaviour.exclusive_ports:
        assert all(count == 1 for count in users.values()), "an exclusive port is shared"
    for mapping_key, mapping in nat._mappings.items():
        assert mapping.key == mapping_key
        assert mappings[id(mapping)] is mapping, "a mapping without a session"
    if nat._finds_mappings:
        found = [mapping for listed in nat._mappings_of.values() for mapping in listed]
        assert {id(mapping) for mapping in found} == mappings.keys()
        assert len(found) == len(mappings) == len(nat._sessions_of)
        known = sum(len(sessions) for sessions in nat._sessions_of.values())
        assert known == len(nat._outgoing), "poison would miss a session"


def _check_ports(nat: Nat) -> None:
    """External endpoints are those the behaviour allows."""
    behaviour, law = nat.behaviour, nat.behaviour.allocation
    addresses: dict[str, set[str]] = {}
    blocks: dict[tuple[str, int], str] = {}
    first = law.bases()[0] if isinstance(law, Blocks) else 0
    for session in nat._outgoing.values():
        mapping = session.mapping
        index, port = divmod(mapping.slot, PORT_COUNT)
        assert mapping.external == Endpoint(nat.external_ips[index], port)
        if mapping.key is None:
            continue
        assert law.low <= port <= law.high, "a port out of range"
        if behaviour.preserves_parity:
            assert (port - mapping.internal.port) % 2 == 0, "parity is not preserved"
        subscriber = mapping.internal.ip
        addresses.setdefault(subscriber, set()).add(mapping.external.ip)
        if isinstance(law, Blocks):
            block = (mapping.external.ip, (port - first) // law.size)
            owner = blocks.setdefault(block, subscriber)
            assert owner == subscriber, "two subscribers in one block"
    if behaviour.pooling is Pooling.PAIRED:
        assert all(len(ips) == 1 for ips in addresses.values()), "a pair has two addresses"
    if isinstance(law, Blocks):
        owned: dict[tuple[str, str], int] = {}
        for (ip, _), subscriber in blocks.items():
            owned[ip, subscriber] = owned.get((ip, subscriber), 0) + 1
        assert all(count <= law.max_blocks for count in owned.values()), "too many blocks"
