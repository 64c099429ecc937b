"""The emulated NAT is a verified fake: what the kernel can do, both do alike.

Two labs with the same devices: their home routers are the kernel's in one, emulated in the other.
One script (`natswarm/lab/probe.py`) looks at each from both sides; the tests compare what it finds,
first with each other, then with what it should be.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest

from natswarm.lab.client import observers
from natswarm.lab.probe import Place, Probe
from natswarm.lab.registry import LabState
from natswarm.nat.behaviour import Filtering, Mapping

pytestmark = pytest.mark.lab

T = TypeVar("T")
OpenLab = Callable[..., LabState]

BLOCK = range(40_960, 41_984)
DEVICES = (
    "home=home",
    "sibling=@home",
    "random=linux-random",
    "block=linux-random",
    "poisoned=home",
    "helped=home",
    "short=home",
)
KNOBS = (
    f"block.allocation=uniform:low={BLOCK[0]},high={BLOCK[-1]}",
    "poisoned.poison=takes-port",
    "helped.tftp_helper=yes",
    "short.unreplied_lifetime_s=2",
    "short.replied_lifetime_s=5",
)
# Of 200 draws from 1,024 ports, no two agree once in 10^9 runs.
REMOTE_COUNT = 200


@dataclass(frozen=True)
class Twins:
    """The two labs."""

    kernel: LabState
    emulated: LabState
    stack: contextlib.ExitStack

    def probes(self, device: str) -> list[Probe]:
        """Return a probe of a device in each."""
        return [self._probe(state, device) for state in (self.kernel, self.emulated)]

    def both(self, device: str, look: Callable[[Probe], T]) -> T:
        """Return what is seen in both, which must be the same."""
        kernel, emulated = map(look, self.probes(device))
        assert kernel == emulated, "the emulator does otherwise than the kernel"
        return kernel

    def external_ip(self, probe: Probe) -> str:
        for state in (self.kernel, self.emulated):
            for device in state.devices:
                if device.namespace == probe.device.namespace:
                    return device.external_ips[0]
        raise AssertionError("a probe of another lab")

    def place(self, probe: Probe, name: str) -> Place:
        """Return another device of the probe's lab."""
        state = self.kernel if self.kernel.prefix in probe.device.namespace else self.emulated
        device = state.device(name)
        return Place(device.namespace, device.ip)

    def _probe(self, state: LabState, name: str) -> Probe:
        device = state.device(name)
        first, second = (Place(each.namespace, each.ip) for each in observers(state))
        return self.stack.enter_context(Probe(Place(device.namespace, device.ip), first, second))


@pytest.fixture(scope="module")
def labs(open_lab: OpenLab) -> tuple[LabState, LabState]:
    kernel, emulated = (
        open_lab(*DEVICES, knobs=KNOBS, nat=nat, delay="1ms") for nat in ("kernel", "emulated")
    )
    assert all(device.router for device in kernel.devices)
    assert not any(device.router for device in emulated.devices)
    return kernel, emulated


@pytest.fixture
def twins(labs: tuple[LabState, LabState]) -> Iterator[Twins]:
    with contextlib.ExitStack() as stack:
        yield Twins(*labs, stack)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("home", Mapping.EIM), ("random", Mapping.APDM), ("block", Mapping.APDM)],
)
def test_mapping(twins: Twins, device: str, expected: Mapping):
    assert twins.both(device, Probe.mapping) is expected


@pytest.mark.parametrize("device", ["home", "random", "block", "poisoned", "helped"])
def test_filtering(twins: Twins, device: str):
    assert twins.both(device, Probe.filtering) is Filtering.APDF


def test_preservation(twins: Twins):
    def is_preserved(probe: Probe) -> bool:
        own, seen = probe.external_endpoints(8)
        return {port for _, port in seen} == {own}

    assert twins.both("home", is_preserved)


def test_random_ports_are_drawn_from_all(twins: Twins):
    def look(probe: Probe) -> tuple[bool, bool, bool]:
        own, seen = probe.external_endpoints(REMOTE_COUNT)
        ports = {port for _, port in seen}
        # Each bound fails once in 10^8 runs.
        return own in ports, len(ports) > REMOTE_COUNT - 10, 1024 <= min(ports) < 10_000

    assert twins.both("random", look) == (False, True, True)


def test_block_ports_are_overloaded(twins: Twins):
    """One external port serves several remotes: otherwise no two of so many draws would agree."""

    def look(probe: Probe) -> tuple[bool, bool]:
        _, seen = probe.external_endpoints(REMOTE_COUNT)
        ports = {port for _, port in seen}
        return ports <= set(BLOCK), len(ports) < REMOTE_COUNT

    assert twins.both("block", look) == (True, True)


def test_a_port_that_collides_moves_and_which_port_is_used_then(twins: Twins):
    """Two devices want one external port towards one remote."""

    def look(probe: Probe) -> list[str]:
        first = probe.open(probe.device)
        port = first.getsockname()[1]
        second = probe.open(twins.place(probe, "sibling"), port)
        one, other, third = (probe.open(probe.first) for _ in range(3))
        seen = [probe.reach(first, one)[1]]
        seen += [probe.reach(second, remote)[1] for remote in (one, other, one, third)]
        # The numbers are drawn: compared is which are the same.
        return ["own" if each == port else f"as in {seen.index(each)}" for each in seen]

    assert twins.both("home", look) == ["own", "as in 1", "as in 1", "as in 1", "as in 1"]


def test_a_port_that_collides_later_moves(twins: Twins):
    """The second device has the port already, towards a remote that the first does not use."""

    def look(probe: Probe) -> list[bool]:
        first = probe.open(probe.device)
        port = first.getsockname()[1]
        second = probe.open(twins.place(probe, "sibling"), port)
        one, other = (probe.open(probe.first) for _ in range(2))
        steps = [(first, one), (second, other), (second, one), (second, other), (first, one)]
        return [probe.reach(udp, remote)[1] == port for udp, remote in steps]

    assert twins.both("home", look) == [True, True, False, True, True]


@pytest.mark.parametrize(("device", "is_kept"), [("home", True), ("poisoned", False)])
def test_poison_of_an_early_datagram(twins: Twins, device: str, is_kept: bool):
    def look(probe: Probe) -> bool:
        udp, remote = probe.open(probe.device), probe.open(probe.first)
        port = udp.getsockname()[1]
        remote.sendto(b"too early", (twins.external_ip(probe), port))
        probe.settle()
        return probe.reach(udp, remote)[1] == port

    assert twins.both(device, look) is is_kept


@pytest.mark.parametrize(("device", "answers"), [("home", [0, 0]), ("helped", [1, 0])])
def test_the_tftp_helper_lets_one_answer_in(twins: Twins, device: str, answers: list[int]):
    def look(probe: Probe) -> list[int]:
        udp, server = probe.open(probe.device), probe.open(probe.first, 69)
        udp.sendto(b"\x00\x01file\x00octet\x00", server.getsockname())
        probe.wait_readable(server)
        [(_, mapped)] = probe.drain(server)
        strangers = [probe.open(probe.first) for _ in range(2)]
        return [int(probe.lets_in(each, mapped, udp, server)) for each in strangers]

    assert twins.both(device, look) == answers


def test_no_hairpinning(twins: Twins):
    def look(probe: Probe) -> tuple[bool, bool]:
        udp, friend = probe.open(probe.device), probe.open(probe.first)
        mapped = probe.reach(udp, friend)
        own, sibling = probe.open(probe.device), probe.open(twins.place(probe, "sibling"))
        return (
            probe.lets_in(own, mapped, udp, friend),
            probe.lets_in(sibling, mapped, udp, friend),
        )

    assert twins.both("home", look) == (False, False)


def test_a_sibling_is_reached_directly(twins: Twins):
    def look(probe: Probe) -> bool:
        udp, other = probe.open(probe.device), probe.open(twins.place(probe, "sibling"))
        return probe.reach(other, udp) == other.getsockname()

    assert twins.both("home", look)


def test_a_datagram_that_dies_at_the_router_makes_no_mapping_and_one_behind_it_does(twins: Twins):
    def look(probe: Probe) -> list[tuple[bool, bool]]:
        result = []
        for ttl in (1, 2):
            udp, remote = probe.open(probe.device), probe.open(probe.first)
            port = udp.getsockname()[1]
            router = probe.expires_at(udp, ttl, remote.getsockname())
            assert router is not None
            probe.settle()
            remote.sendto(b"is there a mapping?", (twins.external_ip(probe), port))
            probe.settle()
            is_inside = router == probe.device.ip.rpartition(".")[0] + ".1"
            result.append((is_inside, len(probe.drain(udp)) == 1))
        return result

    assert twins.both("home", look) == [(True, False), (False, True)]


def test_routers_on_the_way_out(twins: Twins):
    def look(probe: Probe) -> list[str | None]:
        remote = probe.open(probe.first).getsockname()
        return [probe.expires_at(probe.open(probe.device), ttl, remote) for ttl in (2, 3, 9)]

    assert len(set(twins.both("home", look))) == 3


def test_a_datagram_that_dies_at_the_router_on_its_way_in(twins: Twins):
    """The router says so from its outer address, if it would have let it in."""

    def look(probe: Probe) -> tuple[bool, bool]:
        udp, remote = probe.open(probe.device), probe.open(probe.first)
        mapped = probe.reach(udp, remote)
        hops = probe.hops()
        is_router = probe.expires_at(remote, hops, mapped) == mapped[0]
        return is_router, not probe.drain(udp)

    assert twins.both("home", look) == (True, True)


def test_a_closed_port_refuses(twins: Twins):
    """The ICMP error of a remote comes back in through the mapping."""

    def look(probe: Probe) -> bool:
        udp, remote = probe.open(probe.device), probe.open(probe.first)
        where = remote.getsockname()
        remote.close()
        udp.connect(where)
        udp.send(b"anybody there?")
        probe.wait_readable(udp)
        try:
            udp.recv(100)
        except ConnectionRefusedError:
            return True
        return False

    assert twins.both("home", look)


# When each session is used after its start, seconds, and whether from inside. Unreplied they live
# 2 s, replied 5 s, and that only from an age of 2 s on.
LIFETIME_STEPS = (
    (0.2, "young", False),
    (0.2, "replied", False),
    (0.2, "replied, late", False),
    (1.2, "unreplied", False),
    (1.4, "inbound", False),
    (1.4, "replied", True),
    (1.4, "replied, late", True),
    (2.5, "replied", True),
    (2.5, "replied, late", True),
    (2.8, "unreplied, late", False),
    (2.9, "inbound", False),
    (3.4, "young", False),
    (6.2, "replied", False),
    (8.4, "replied, late", False),
)
# Each step has that much time before it means something else; a busy machine may need more tries.
LATENESS_MAX_S = 0.4
LIFETIME_TRIES = 4


class Sessions:
    """Sessions of one device, each used at times of its own."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._ends: dict[str, tuple[socket.socket, socket.socket, tuple[str, int]]] = {}
        self.seen: dict[str, bool] = {}
        for name in {name: None for _, name, _ in LIFETIME_STEPS}:
            udp, remote = probe.open(probe.device), probe.open(probe.first)
            self._ends[name] = (udp, remote, probe.reach(udp, remote))

    def use(self, name: str, *, outbound: bool) -> None:
        """Send a datagram out, or note whether one of the remote comes in."""
        udp, remote, mapped = self._ends[name]
        if outbound:
            assert self._probe.reach(udp, remote) == mapped
        else:
            self.seen[name] = self._probe.comes_in(remote, mapped, udp)


def try_lifetimes(twins: Twins) -> list[dict[str, bool]] | None:
    """Return what is seen of the sessions in both labs; None when the machine was too slow."""
    started = time.monotonic()
    both = [Sessions(probe) for probe in twins.probes("short")]
    quiet = twins.probes("home")[0]
    nothing = quiet.open(quiet.device)
    for at, name, outbound in LIFETIME_STEPS:
        assert quiet.is_silent(nothing, max(0.0, started + at - time.monotonic()))
        for sessions in both:
            sessions.use(name, outbound=outbound)
        if time.monotonic() - started > at + LATENESS_MAX_S:
            return None
    return [sessions.seen for sessions in both]


def test_lifetimes(twins: Twins):
    seen = next(filter(None, (try_lifetimes(twins) for _ in range(LIFETIME_TRIES))), None)
    assert seen is not None, "this machine is too busy to tell seconds apart"
    kernel, emulated = seen
    assert kernel == {
        "unreplied": True,
        "unreplied, late": False,
        "inbound": True,
        "replied": True,
        "replied, late": False,
        "young": False,
    }
    assert emulated == kernel
