"""Whether a lab does what its presets promise: expected and seen, device by device.

What a chain of NATs promises follows from its members: the strictest mapping and filtering of them
rule, the ports are the outermost one's, every router counts one hop. Knows no terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from natswarm.lab.client import observers
from natswarm.lab.errors import LabError
from natswarm.lab.nat import NatKind
from natswarm.lab.probe import Address, Place, Probe
from natswarm.lab.registry import DeviceState, LabState
from natswarm.lab.settings import DevicePlan, LabPlan, NatPlan, make_plan
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.sim.ports import Blocks, Preserving
from natswarm.sim.presets import PRESETS, Site

__all__ = ["Check", "verify_lab"]

# Ports looked at; a block or a range is missed by all of them together only if it is another one.
PORT_COUNT = 12

# What an answer takes besides the core: two access links and their jitter, and two busy processes.
ACCESS_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        device: Whose.
        what: What.
        expected: What the presets promise.
        seen: What was found.
        is_ok: Whether it fits.
    """

    device: str
    what: str
    expected: str
    seen: str
    is_ok: bool


def verify_lab(state: LabState) -> Iterator[Check]:
    """Look at each device of a lab from both sides of its NATs; some tens of milliseconds each.

    Raises:
        LabError: The lab does not answer.
    """
    plan = make_plan(state.settings)
    first, second = (Place(each.namespace, each.ip) for each in observers(state))
    wait_s = ACCESS_WAIT_S + 2 * plan.delay_s + 2 * plan.core.jitter_s
    for device in plan.devices:
        where = state.device(device.name)
        with Probe(Place(where.namespace, where.ip), first, second, wait_s=wait_s) as probe:
            try:
                yield from _checks(plan, device, where, probe)
            except LabError as error:
                yield Check(device.name, "reachability", "datagrams arrive", str(error), False)


def expected_hops(plan: LabPlan, device: DevicePlan) -> int:
    """Return how many routers stand between a device and the observers."""
    hops = plan.hops + len(device.nats)
    for index, nat in enumerate(device.nats):
        # Behind another NAT, the line of a home is that of the network above.
        if index == 0 or PRESETS[nat.preset].site is Site.CARRIER:
            hops += PRESETS[nat.preset].access_hops
    return hops


def _checks(plan: LabPlan, device: DevicePlan, where: DeviceState, probe: Probe) -> Iterator[Check]:
    own_port, seen = probe.external_endpoints(PORT_COUNT)
    yield Check(device.name, "reachability", "datagrams arrive", "datagrams arrive", True)
    yield _address_check(device, where, own_port, seen)
    if device.nats:
        mapping, filtering = _classes(device)
        mapping_seen, filtering_seen = probe.mapping(), probe.filtering()
        name = device.name
        yield Check(name, "mapping", mapping.value, mapping_seen.value, mapping_seen is mapping)
        yield Check(
            name, "filtering", filtering.value, filtering_seen.value, filtering_seen is filtering
        )
        yield _port_check(device, own_port, [port for _, port in seen])
    hops, hops_seen = expected_hops(plan, device), probe.hops()
    yield Check(device.name, "hops", str(hops), str(hops_seen), hops_seen == hops)


def _classes(device: DevicePlan) -> tuple[Mapping, Filtering]:
    mappings, filterings = list(Mapping), list(Filtering)  # both from the mildest up
    return (
        mappings[max(mappings.index(nat.behaviour.mapping) for nat in device.nats)],
        filterings[max(filterings.index(nat.behaviour.filtering) for nat in device.nats)],
    )


def _address_check(
    device: DevicePlan, where: DeviceState, own_port: int, seen: list[Address]
) -> Check:
    ips = sorted({ip for ip, _ in seen})
    is_ok = set(ips) <= set(where.external_ips)
    return Check(device.name, "address", " or ".join(where.external_ips), " and ".join(ips), is_ok)


def _port_check(device: DevicePlan, own_port: int, ports: list[int]) -> Check:
    outermost = next(
        (nat for nat in device.nats if not isinstance(nat.behaviour.allocation, Preserving)), None
    )
    if outermost is None:
        seen = "the same" if set(ports) == {own_port} else f"{own_port} became {ports}"
        return Check(device.name, "ports", "the same", seen, seen == "the same")
    expected, bound = _range(outermost)
    seen = f"{min(ports)}..{max(ports)}"
    is_ok = min(ports) in bound and max(ports) in bound
    law = outermost.behaviour.allocation
    if is_ok and isinstance(law, Blocks):
        first = bound[0] if law.is_aligned is False else 0
        blocks = {(port - first) // law.size for port in ports}
        seen += f" in {len(blocks)} block{'s' if len(blocks) > 1 else ''}"
        is_ok = len(blocks) <= law.max_blocks
    return Check(device.name, "ports", expected, seen, is_ok)


def _range(nat: NatPlan) -> tuple[str, range]:
    if nat.kernel is not None and nat.kernel.kind is NatKind.BLOCK:
        block = nat.kernel.block
        return f"{block[0]}..{block[-1]}", block
    law = nat.behaviour.allocation
    text = f"{law.low}..{law.high}"
    if isinstance(law, Blocks):
        text += f", at most {law.max_blocks} blocks of {law.size}"
    return text, range(law.low, law.high + 1)
