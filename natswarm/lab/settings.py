"""What a lab is to be: from what the user typed to a plan that can be built.

A device is written `NAME=PRESET`, `NAME=CARRIER,HOME` from the internet inwards, or `NAME=@OTHER`
for one beside another behind the same NATs. The text is what travels to the process that keeps the
lab, and is read there again: one form, one reader. Pure.
"""

from __future__ import annotations

import dataclasses
import enum
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from natswarm.errors import ConfigurationError
from natswarm.lab.knobs import with_knobs
from natswarm.lab.nat import KernelNat, kernel_nat
from natswarm.lab.units import parse_bytes, parse_duration, parse_rate, parse_share
from natswarm.sim.link import LinkConditions
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.presets import PRESETS, Preset, Site
from natswarm.sim.presets6 import PRESETS6
from natswarm.sim.topology import DEFAULT_CORE_DELAY_S, DEFAULT_CORE_HOPS

__all__ = [
    "CORE",
    "DevicePlan",
    "LabPlan",
    "LabSettings",
    "NatChoice",
    "NatPlan",
    "check_name",
    "make_plan",
]

ALIASES = {"home": "linux-home"}
CORE = "core"
"""Where captures of the middle are taken; no device has this name."""

# A device takes two namespaces, each some 30 ms to make and to remove.
DEVICES_MAX = 32
# As file names, interface names and words of other commands.
_NAME = re.compile(r"[a-z][a-z0-9-]{0,19}", re.ASCII)
# What a queue of a rate holds unless it is said: bufferbloat is asked for, not given.
QUEUE_S = 0.1
QUEUE_BYTES_MIN = 16_000


class NatChoice(enum.Enum):
    """Who carries out the NATs next to the devices."""

    AUTO = "auto"
    """The kernel what it can, the emulator everything else."""
    EMULATED = "emulated"
    KERNEL = "kernel"


class LabSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A lab as the user typed it.

    Attributes:
        name: Of the lab.
        devices: `NAME=PRESET[,PRESET...]` or `NAME=@OTHER` each.
        knobs: `NAME.KNOB=VALUE` or `NAME.PRESET.KNOB=VALUE` each.
        nat: Who carries out the NATs: a value of `NatChoice`.
        delay: One-way delay of the core.
        jitter: On top, uniform from 0 to this.
        loss: Share of packets the core loses.
        rate: What each address may send into the core; empty for any.
        queue: What may wait for that rate; empty for 100 ms of it.
        hops: Routers in the core.
        seed: Of all that is drawn.
    """

    name: str
    devices: tuple[str, ...]
    knobs: tuple[str, ...] = ()
    nat: str = NatChoice.AUTO.value
    delay: str = f"{DEFAULT_CORE_DELAY_S * 1000:g}ms"
    jitter: str = "0"
    loss: str = "0"
    rate: str = ""
    queue: str = ""
    hops: int = DEFAULT_CORE_HOPS
    seed: int = 1


@dataclass(frozen=True, slots=True)
class NatPlan:
    """One NAT of a device.

    Attributes:
        preset: The preset's name.
        behaviour: What it does, with the knobs turned.
        kernel: What the kernel does in its place; None where it is emulated.
    """

    preset: str
    behaviour: NatBehaviour
    kernel: KernelNat | None

    @property
    def kind(self) -> Preset:
        """The preset with the knobs turned."""
        return dataclasses.replace(PRESETS[self.preset], behaviour=self.behaviour)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device.

    Attributes:
        name: Of the device.
        nats: What it is behind, from the internet inwards; none for a public one.
        beside: The device whose NATs these are; empty where they are its own.
    """

    name: str
    nats: tuple[NatPlan, ...] = ()
    beside: str = ""

    @property
    def kernel(self) -> KernelNat | None:
        """The kernel's NAT next to the device, if it has one."""
        return self.nats[-1].kernel if self.nats else None


@dataclass(frozen=True, slots=True)
class LabPlan:
    """A lab that can be built.

    Attributes:
        name: Of the lab.
        devices: In the order given.
        delay_s: Of the core, one way.
        core: What the core does besides: jitter, loss, rate.
        hops: Routers in the core.
        seed: Of all that is drawn.
    """

    name: str
    devices: tuple[DevicePlan, ...]
    delay_s: float
    core: LinkConditions
    hops: int
    seed: int


def make_plan(settings: LabSettings) -> LabPlan:
    """Read settings.

    Raises:
        ConfigurationError: One is not known or not possible, or two contradict each other; says
            which, and what there is.
    """
    check_name("lab", settings.name)
    knobs = [_parse_knob(text) for text in settings.knobs]
    used: set[int] = set()
    devices: list[DevicePlan] = []
    for text in settings.devices:
        name, chain = _split_device(text)
        if chain.startswith("@"):
            devices.append(_beside(name, chain[1:], devices, knobs))
        else:
            nats = _parse_chain(name, chain, knobs, used, settings)
            devices.append(DevicePlan(name, nats))
    names = [device.name for device in devices]
    if not devices:
        raise ConfigurationError("a lab needs a device: NAME=PRESET, such as a=kpn-nl")
    if len(devices) > DEVICES_MAX:
        raise ConfigurationError(f"{len(devices)} devices; a lab has at most {DEVICES_MAX}")
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"two devices are called {name!r}; names are for one each")
    for index, (device, _, _, text) in enumerate(knobs):
        if index not in used:
            raise ConfigurationError(
                f"--set {text}: there is no device {device!r}; there are {', '.join(names)}"
            )
    if not 1 <= settings.hops <= 30:
        raise ConfigurationError(f"the core has 1 to 30 routers, not {settings.hops}")
    return LabPlan(
        settings.name,
        tuple(devices),
        parse_duration(settings.delay),
        _core_conditions(settings),
        settings.hops,
        settings.seed,
    )


def check_name(what: str, name: str) -> None:
    """Refuse names that could not be told from something else.

    Raises:
        ConfigurationError: It is one.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot be the name of a {what}: take up to 20 small letters, digits and "
            "hyphens, a letter first"
        )


def _core_conditions(settings: LabSettings) -> LinkConditions:
    rate = parse_rate(settings.rate) if settings.rate else None
    if rate is None and settings.queue:
        raise ConfigurationError("--queue is what waits for a rate: give --rate, too")
    queue_bytes = None
    if rate is not None:
        queue_bytes = max(QUEUE_BYTES_MIN, int(rate * QUEUE_S))
        if settings.queue:
            queue_bytes = parse_bytes(settings.queue)
    try:
        return LinkConditions(
            jitter_s=parse_duration(settings.jitter),
            loss=parse_share(settings.loss),
            rate_bytes_per_s=rate,
            queue_bytes=queue_bytes,
        )
    except ValueError as error:
        raise ConfigurationError(f"the core cannot be so: {error}") from error


_Knob = tuple[str, str, tuple[str, str], str]  # device, NAT or "", (knob, value), as typed


def _parse_knob(text: str) -> _Knob:
    path, equals, value = text.partition("=")
    parts = path.split(".")
    if not equals or len(parts) not in (2, 3) or not all(parts):
        raise ConfigurationError(
            f"--set {text}: write NAME.KNOB=VALUE, such as a.hairpinning=yes, or "
            "NAME.PRESET.KNOB=VALUE for a device with several NATs"
        )
    nat = parts[1] if len(parts) == 3 else ""
    return parts[0], ALIASES.get(nat, nat), (parts[-1], value), text


def _split_device(text: str) -> tuple[str, str]:
    name, equals, chain = text.partition("=")
    if not equals or not chain:
        raise ConfigurationError(
            f"{text!r} is no device: write NAME=PRESET, such as a=kpn-nl, or NAME=CARRIER,HOME"
        )
    check_name("device", name)
    if name == CORE:
        raise ConfigurationError(f"{CORE!r} is the middle of the lab; call the device otherwise")
    return name, chain


def _beside(
    name: str, other: str, devices: Sequence[DevicePlan], knobs: Sequence[_Knob]
) -> DevicePlan:
    """Return a device that stands beside another, behind the same NATs."""
    for device in devices:
        if device.name == other:
            break
    else:
        raise ConfigurationError(f"{name}=@{other}: no device {other!r} is named before {name!r}")
    if not device.nats:
        raise ConfigurationError(f"{name}=@{other}: {other} is behind no NAT; write {name}=public")
    for owner, _, _, text in knobs:
        if owner == name:
            raise ConfigurationError(
                f"--set {text}: the NATs of {name} are those of {other}; set {other}'s knobs"
            )
    return DevicePlan(name, device.nats, device.beside or other)


def _parse_chain(
    name: str, chain: str, knobs: Sequence[_Knob], used: set[int], settings: LabSettings
) -> tuple[NatPlan, ...]:
    """Return the NATs of a device; note in `used` which knobs were theirs."""
    presets = [ALIASES.get(word, word) for word in chain.split(",")]
    for preset in presets:
        _check_preset(preset, presets)
    if presets == ["public"]:
        presets = []
    turned = _knobs_by_nat(name, presets, knobs, used)
    nats = []
    for index, (preset, own) in enumerate(zip(presets, turned, strict=True)):
        kind = PRESETS[preset]
        assert kind.behaviour is not None, "a preset without a NAT stands alone"
        try:
            behaviour = with_knobs(kind.behaviour, own)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}, {preset}: {error}") from error
        kernel = None
        if index == len(presets) - 1:
            rng = random.Random(f"{settings.seed}/kernel/{name}")
            kernel = _kernel(name, preset, behaviour, NatChoice(settings.nat), rng)
        nats.append(NatPlan(preset, behaviour, kernel))
    return tuple(nats)


def _check_preset(preset: str, chain: Sequence[str]) -> None:
    if preset in PRESETS6:
        raise ConfigurationError(
            f"{preset} has IPv6, which a lab does not carry; take one without, such as "
            f"{preset.removesuffix('-dual') if preset.endswith('-dual') else 'lyca-nl'}"
        )
    if preset not in PRESETS:
        names = ", ".join([*PRESETS, *ALIASES])
        raise ConfigurationError(f"no preset {preset!r}; there are {names}")
    if PRESETS[preset].behaviour is None and len(chain) > 1:
        raise ConfigurationError(
            f"{','.join(chain)}: {preset} is a host without a NAT, so nothing stands before or "
            "behind it; leave it out of the chain"
        )


def _knobs_by_nat(
    name: str, presets: Sequence[str], knobs: Sequence[_Knob], used: set[int]
) -> list[list[tuple[str, str]]]:
    """Return the knobs of each NAT of a device; note in `used` which those were."""
    result: list[list[tuple[str, str]]] = [[] for _ in presets]
    for index, (device, nat, setting, text) in enumerate(knobs):
        if device != name:
            continue
        used.add(index)
        if not presets:
            raise ConfigurationError(f"--set {text}: {name} has no NAT to set knobs of")
        places = [
            place for place, preset in enumerate(presets) if nat in ("", preset, str(place + 1))
        ]
        if not places:
            raise ConfigurationError(
                f"--set {text}: {name} is not behind {nat}, but behind {', '.join(presets)}"
            )
        if len(places) > 1:
            options = " or ".join(
                f"{name}.{preset if presets.count(preset) == 1 else place}.{setting[0]}"
                for place, preset in enumerate(presets, start=1)
            )
            raise ConfigurationError(f"--set {text}: which NAT of {name}? Write {options}")
        result[places[0]].append(setting)
    return result


def _kernel(
    name: str, preset: str, behaviour: NatBehaviour, choice: NatChoice, rng: random.Random
) -> KernelNat | None:
    """Return what the kernel does in place of the NAT next to a device; None to emulate it."""
    if choice is NatChoice.EMULATED:
        return None
    try:
        if PRESETS[preset].site is not Site.HOME:
            raise ValueError("it stands in a carrier's network, behind a link that is emulated")
        return kernel_nat(behaviour, rng)
    except ValueError as error:
        if choice is NatChoice.AUTO:
            return None
        raise ConfigurationError(
            f"{name}: {preset} cannot be the kernel's: {error}; use --nat auto"
        ) from error
