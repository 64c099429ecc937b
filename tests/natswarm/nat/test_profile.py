"""Profiles: what they promise, and that a stranger's bytes become a profile or a DecodeError."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.nat.allocation import BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, BLOCKS_MAX, PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Poison, Pooling
from natswarm.nat.profile import NatProfile, decode_profile_untrusted

PUBLIC = Endpoint("198.51.100.7", 41300)
BLOCK = PortAllocation(
    AllocationLaw.BLOCK, low=41216, high=41471, block_size=256, blocks=(41216,), sample_count=16
)


FIELDS = ("version", *(field.name for field in dataclasses.fields(NatProfile)))


def form(**changed: object) -> bytes:
    """The wire form of an empty profile with values that a liar may send."""
    values = dict(zip(FIELDS, msgspec.msgpack.decode(NatProfile().encode()), strict=True))
    return msgspec.msgpack.encode(list((values | changed).values()))


def uniform_allocations() -> st.SearchStrategy[PortAllocation]:
    ends = st.lists(st.integers(1, 65_535), min_size=4, max_size=4).map(sorted)
    return ends.map(
        lambda e: PortAllocation(
            AllocationLaw.UNIFORM,
            low=e[0],
            seen_low=e[1],
            seen_high=e[2],
            high=e[3],
            shape=(2.0, 5.0) if e[1] % 2 else None,
            weights=() if e[1] % 2 else (1, 100, 50),
            law_probability=e[1] / 65_535,
        )
    )


@st.composite
def block_allocations(draw: st.DrawFn) -> PortAllocation:
    size = draw(st.integers(BLOCK_SIZE_MIN, BLOCK_SIZE_MAX))
    indices = draw(
        st.lists(st.integers(1, 65_536 // size - 1), min_size=1, max_size=8, unique=True)
    )
    blocks = tuple(index * size for index in indices)
    return PortAllocation(
        AllocationLaw.BLOCK,
        low=min(blocks),
        high=max(blocks) + size - 1,
        block_size=size,
        blocks=blocks,
        is_overloading=draw(st.sampled_from([None, True])),
    )


sequential_allocations = st.builds(
    PortAllocation,
    st.just(AllocationLaw.SEQUENTIAL),
    step=st.integers(-8, 8).filter(bool),
    last_port=st.integers(1024, 65_535),
    others_per_s=st.floats(0, 1000),
    sample_count=st.integers(0, 100),
)

allocations = st.one_of(
    uniform_allocations(),
    block_allocations(),
    sequential_allocations,
    st.just(PortAllocation(AllocationLaw.PRESERVING)),
)

ips = st.sampled_from(["198.51.100.7", "203.0.113.9", "198.18.3.4", "8.8.8.8"])
ports = st.integers(1, 65_535)
profiles = st.builds(
    NatProfile,
    mapping=st.sampled_from([None, *Mapping]),
    filtering=st.sampled_from([None, *Filtering]),
    allocation=st.none() | allocations,
    public_ips=st.lists(ips, max_size=3, unique=True).map(tuple),
    main_endpoint=st.none() | st.builds(Endpoint, ips, ports),
    local_endpoints=st.lists(
        st.builds(Endpoint, st.sampled_from(["10.0.0.7", "100.64.0.2", "2001:db8::7"]), ports),
        max_size=3,
    ).map(tuple),
    is_translated=st.sampled_from([None, True, False]),
    echo_count=st.integers(0, 100),
    observer_count=st.integers(0, 10),
    idle_lifetime_s=st.none() | st.floats(1, 1000),
    absolute_lifetime_s=st.none() | st.floats(1, 1000) | st.just(float("inf")),
)


@given(profiles)
def test_a_profile_survives_the_wire_and_can_be_hashed_and_read(profile: NatProfile) -> None:
    assert decode_profile_untrusted(profile.encode()) == profile
    assert hash(profile) == hash(decode_profile_untrusted(profile.encode()))
    assert str(profile)


@given(profiles, st.data())
def test_damaged_profiles_raise_decode_error_alone(
    profile: NatProfile, data: st.DataObject
) -> None:
    encoded = bytearray(profile.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(encoded) - 1))
        encoded[position] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(encoded)))
    for damaged in (bytes(encoded), bytes(encoded[:cut])):
        try:
            profile = decode_profile_untrusted(damaged)
        except DecodeError:
            continue
        profile.encode()
        str(profile)


def test_the_largest_profile_fits() -> None:
    profile = NatProfile(
        mapping=Mapping.APDM,
        filtering=Filtering.APDF,
        allocation=PortAllocation(
            AllocationLaw.BLOCK,
            low=1024,
            high=65_535,
            block_size=128,
            blocks=tuple(65_408 - 128 * index for index in range(BLOCKS_MAX)),
            sample_count=2**31 - 1,
        ),
        public_ips=tuple(f"198.18.255.25{index}" for index in range(4)),
        main_endpoint=PUBLIC,
        local_endpoints=tuple(
            Endpoint(f"2001:db8:aaaa:bbbb:cccc:dddd:eeee:fff{index}", 65_535) for index in range(8)
        ),
        is_translated=True,
        echo_count=2**31 - 1,
        observer_count=2**31 - 1,
        idle_lifetime_s=65.123456789,
        absolute_lifetime_s=65.123456789,
        pooling=Pooling.ARBITRARY,
        hairpinning=False,
        poison=Poison.RETIRES_MAPPING,
        tftp_helper=True,
        idle_unreplied_s=35.123456789,
        inbound_refreshes=False,
        mappings_seen=2**31 - 1,
        max_mappings=2**31 - 1,
        mapping_rate_per_s=99.123456789,
        mapping_burst=2**31 - 1,
        remotes_seen=2**31 - 1,
        nat_count=3,
        opener_ttl=255,
        inferred=("poison", "tftp_helper", "inbound_refreshes"),
    )
    assert decode_profile_untrusted(profile.encode()) == profile


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("public_ips", ("10.0.0.1",)),
        ("public_ips", ("198.51.100.7",) * 5),
        ("public_ips", ("198.51.100.007",)),
        ("public_ips", ("example.org",)),
        ("public_ips", ("224.0.0.1",)),
        ("main_endpoint", {"ip": "198.51.100.7", "port": 0}),
        ("main_endpoint", {"ip": "198.51.100.7", "port": 65_536}),
        ("main_endpoint", {"ip": "0.0.0.0", "port": 5}),
        ("local_endpoints", [{"ip": "10.0.0.1", "port": 1}] * 9),
        ("local_endpoints", [{"ip": "2001:DB8::1", "port": 1}]),
        ("echo_count", -1),
        ("observer_count", 2**31),
        ("idle_lifetime_s", 0.0),
        ("idle_lifetime_s", float("nan")),
        ("absolute_lifetime_s", -1.0),
        ("mapping", "symmetric"),
        ("mapping_rate_per_s", 0.0),
        ("idle_unreplied_s", float("nan")),
        ("max_mappings", -1),
        ("opener_ttl", 0),
        ("opener_ttl", 256),
        ("inferred", ("colour",)),
        ("inferred", ("mapping",) * 100),
        ("poison", "arsenic"),
        ("version", 1),
        ("version", "2"),
        ("allocation", {"law": "uniform", "low": 9, "high": 8}),
        ("allocation", {"law": "uniform", "low": 0}),
        ("allocation", {"law": "uniform", "seen_low": 5}),
        ("allocation", {"law": "uniform", "seen_low": 1, "seen_high": 9}),
        ("allocation", {"law": "block", "block_size": 15, "blocks": (1500,)}),
        ("allocation", {"law": "block", "block_size": 8193, "blocks": (8193,)}),
        ("allocation", {"law": "block", "block_size": 256, "blocks": ()}),
        ("allocation", {"law": "block", "block_size": 256, "blocks": (512, 767)}),
        ("allocation", {"law": "sequential", "step": 1, "last_port": 7, "blocks": (512,)}),
        ("allocation", {"law": "sequential", "step": 1, "last_port": 7, "block_size": 128}),
        ("allocation", {"law": "uniform", "shape": (0.0, 1.0)}),
        ("allocation", {"law": "uniform", "weights": (1,) * 33}),
        ("allocation", {"law": "uniform", "weights": (0, 1)}),
        ("allocation", {"law": "preserving", "weights": (1, 1)}),
        ("allocation", {"law": "uniform", "weights": (101, 1)}),
        ("allocation", {"law": "uniform", "law_probability": 1.5}),
        ("allocation", {"law": "block", "block_size": 256, "blocks": (512, 512)}),
        ("allocation", {"law": "block", "block_size": 256, "blocks": (65_536,)}),
        ("allocation", {"law": "block", "block_size": 256, "blocks": tuple(range(0, 2304, 256))}),
        ("allocation", {"law": "sequential", "step": 1}),
        ("allocation", {"law": "sequential", "step": 0, "last_port": 7}),
        ("allocation", {"law": "sequential", "step": 70_000, "last_port": 7}),
        ("allocation", {"law": "sequential", "step": 1, "last_port": 7, "others_per_s": -1.0}),
        ("allocation", {"law": "sequential", "step": 1, "last_port": 7, "sample_count": -1}),
    ],
)
def test_values_that_no_node_states_are_refused(field: str, value: object) -> None:
    with pytest.raises(DecodeError):
        decode_profile_untrusted(form(**{field: value}))


def test_oversized_profiles_are_refused_unread() -> None:
    with pytest.raises(DecodeError, match="at most 1024"):
        decode_profile_untrusted(b"\x80" + b"\0" * 1024)


def test_fields_of_later_versions_are_ignored() -> None:
    later = [*msgspec.msgpack.decode(form(version=3)), "colour", "blue"]
    assert decode_profile_untrusted(msgspec.msgpack.encode(later)) == NatProfile.unknown()


def test_the_wire_form_is_pinned() -> None:
    profile = NatProfile(
        mapping=Mapping.EIM, filtering=Filtering.ADF, public_ips=("198.51.100.7",), echo_count=3
    )
    assert profile.encode() == (
        b"\xdc\x00\x1a\x02\xa3EIM\xa3ADF\xc0\x91\xac198.51.100.7\xc0\x90\xc0\x03\x00"
        + 8 * b"\xc0"
        + b"\x00\xc0\xc0\xc0\x00\xc0\xc0\x90"
    )


@pytest.mark.parametrize(
    ("profile", "predictable", "strangers", "text"),
    [
        (NatProfile(), False, False, "not known yet: nobody has told us what they see"),
        (
            NatProfile(mapping=Mapping.EIM, main_endpoint=PUBLIC, is_translated=False),
            True,
            True,
            "no NAT, firewall not known",
        ),
        (
            NatProfile(
                mapping=Mapping.EIM,
                filtering=Filtering.APDF,
                main_endpoint=PUBLIC,
                is_translated=False,
            ),
            True,
            False,
            "no NAT, APDF",
        ),
        (
            NatProfile(
                mapping=Mapping.APDM,
                filtering=Filtering.APDF,
                allocation=BLOCK,
                is_translated=True,
            ),
            False,
            False,
            "APDM/APDF, block 256 at 41216..41471",
        ),
        (
            NatProfile(
                mapping=Mapping.APDM,
                filtering=Filtering.EIF,
                main_endpoint=PUBLIC,
                is_translated=True,
            ),
            False,
            True,
            "APDM/EIF",
        ),
        (
            NatProfile(
                mapping=Mapping.APDM,
                filtering=Filtering.ADF,
                allocation=PortAllocation(AllocationLaw.PRESERVING),
                main_endpoint=PUBLIC,
                is_translated=True,
            ),
            True,
            False,
            "APDM/ADF, preserving",
        ),
        (
            NatProfile(main_endpoint=PUBLIC, is_translated=True),
            True,
            False,
            "EIM or ADM, filtering not known",
        ),
        (
            NatProfile(
                mapping=Mapping.EIM,
                filtering=Filtering.EIF,
                allocation=PortAllocation(AllocationLaw.SEQUENTIAL, step=-2, last_port=2000),
                main_endpoint=PUBLIC,
                is_translated=True,
            ),
            True,
            True,
            "EIM/EIF, sequential -2 from 2000",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_profile_promises(
    profile: NatProfile, predictable: bool, strangers: bool, text: str
) -> None:
    assert profile.is_predictable is predictable
    assert profile.accepts_strangers is strangers
    assert str(profile) == text
