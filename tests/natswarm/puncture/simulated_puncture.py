"""Two hosts on the virtual internet that inspect their NATs, plan, and puncture.

Everything between the pure cores and the emulated internet that a node would do, without Trio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from natswarm.address import Endpoint
from natswarm.identity import Identity, ProbeKeys
from natswarm.nat.profile import NatProfile
from natswarm.puncture.doubt import plan_in_doubt
from natswarm.puncture.plan import Limits, Plan, plan_puncture
from natswarm.puncture.puncturer import PathFound, PunctureEvent, Puncturer, PunctureStatistics
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.presets import Preset
from natswarm.sim.topology import Host, Internet, SimPort
from natswarm.sim.world import World
from tools.bench.simulated_inspection import SimulatedInspection, SimulatedObserver

ATTEMPT = b"attempt1"


@lru_cache(maxsize=1)
def two_identities() -> tuple[Identity, Identity]:
    """Two identities, the lower PeerId first."""
    first, second = sorted(
        (Identity(bytes([seed]) * 32) for seed in (1, 2)), key=lambda each: each.peer_id
    )
    return first, second


def keys_of(side: int) -> ProbeKeys:
    identities = two_identities()
    return identities[side].probe_keys(identities[1 - side].peer_id)


class Side:
    """One host's half of the puncture."""

    def __init__(self, host: Host, main: SimPort, plan: Plan, index: int) -> None:
        self.world = host.internet.world
        self.plan = plan
        self.ports = [main]
        self.event: PunctureEvent | None = None
        self.machine = Puncturer(
            plan,
            keys_of(index),
            # Orders of ports come from keys and attempt; the keys are always the same here.
            self.world.seed.to_bytes(8, "big"),
            index == 0,
            self.world.now,
        )
        self.ports += [host.open_port() for _ in range(self.machine.extra_port_count)]
        for port_index, port in enumerate(self.ports):
            port.on_datagram = self._receiver(port_index)
        self._timer = float("inf")
        self._act()

    @property
    def path(self) -> tuple[Endpoint, Endpoint] | None:
        """Our own endpoint and the peer's, once found."""
        if not isinstance(self.event, PathFound):
            return None
        return self.ports[self.event.port_index].endpoint, self.event.endpoint

    @property
    def statistics(self) -> PunctureStatistics:
        return self.machine.statistics()

    def _receiver(self, port_index: int) -> Callable[[bytes, Endpoint], None]:
        def receive(data: bytes, source: Endpoint) -> None:
            self.machine.receive_datagram(port_index, data, source, self.world.now)
            self._act()

        return receive

    def _act(self) -> None:
        for probe in self.machine.probes_to_send(self.world.now):
            port = self.ports[probe.port_index]
            if probe.ttl is None:
                port.send(probe.data, probe.destination)
            else:
                port.send(probe.data, probe.destination, probe.ttl)
        event = self.machine.next_event()
        if event is not None:
            assert self.event is None, "a machine has one last event"
            self.event = event
        timer = self.machine.next_timer()
        if timer is not None and timer != self._timer:
            self._timer = timer
            self.world.at(max(timer, self.world.now), self._act_if_due, timer)

    def _act_if_due(self, timer: float) -> None:
        if timer == self._timer:
            self._timer = float("inf")
            self._act()


@dataclass(frozen=True)
class Outcome:
    """What one puncture came to."""

    seed: int
    profiles: tuple[NatProfile, NatProfile]
    plans: tuple[Plan, Plan]
    is_found: bool
    probe_counts: tuple[int, int]
    elapsed_s: float
    sides: tuple[Side, Side]


Kind = str | Preset | NatBehaviour
Lie = Callable[[NatProfile], NatProfile]


def simulate(
    kinds: Sequence[Kind],
    seed: int,
    *,
    loss: float = 0.0,
    skew_s: float = 0.0,
    late: int = 1,
    age_s: float = 0.0,
    limits: Limits | None = None,
    known: Mapping[str, Sequence[object]] | None = None,
    lies: tuple[Lie, Lie] | None = None,
) -> Outcome:
    """Inspect, plan and puncture between two hosts of the given kinds.

    Args:
        loss: Of each direction of each host's link, beside the preset's own.
        skew_s: How much later side `late` starts.
        age_s: Time between inspection and puncture.
        known: Fields of the profiles that this inspection does not measure, each with its value for
            either side.
        lies: What makes the profile of each side wrong; both then plan in doubt.

    Raises:
        PunctureFailed: There is no plan.
    """
    world = World(seed)
    internet = Internet(world)
    hosts = [internet.add_host(f"host{index}", kind) for index, kind in enumerate(kinds)]
    return _puncture(
        internet,
        hosts,
        loss=loss,
        skew_s=skew_s,
        late=late,
        age_s=age_s,
        limits=limits,
        known=known or {},
        lies=lies,
    )


def simulate_behind_one_nat(kind: str, seed: int) -> Outcome:
    """Puncture between two hosts behind the same NAT."""
    internet = Internet(World(seed))
    router = internet.add_nat("router", kind)
    hosts = [internet.add_host(f"host{index}", behind=router) for index in (0, 1)]
    return _puncture(internet, hosts, known={})


def _puncture(
    internet: Internet,
    hosts: list[Host],
    *,
    known: Mapping[str, Sequence[object]],
    loss: float = 0.0,
    skew_s: float = 0.0,
    late: int = 1,
    age_s: float = 0.0,
    limits: Limits | None = None,
    lies: tuple[Lie, Lie] | None = None,
) -> Outcome:
    world = internet.world
    observers = [SimulatedObserver(internet, f"observer{index}") for index in range(3)]
    mains = [host.open_port() for host in hosts]
    profiles = [
        SimulatedInspection(host, main, observers).run()
        for host, main in zip(hosts, mains, strict=True)
    ]
    profiles = [
        # Names of fields, which mypy can't match with their types.
        replace(profile, **{name: values[side] for name, values in known.items()})  # type: ignore[arg-type]
        for side, profile in enumerate(profiles)
    ]
    if lies is not None:
        profiles = [lie(profile) for lie, profile in zip(lies, profiles, strict=True)]
    if loss:
        for host in hosts:
            for link in (host.uplink.upload, host.uplink.download):
                link.conditions = replace(link.conditions, loss=loss)
    world.run_for(age_s)
    ids = [identity.peer_id for identity in two_identities()]
    plans = [
        (plan_puncture if lies is None else plan_in_doubt)(
            profiles[index],
            profiles[1 - index],
            my_id=ids[index],
            their_id=ids[1 - index],
            limits=limits or Limits(),
        )
        for index in (0, 1)
    ]
    started_at = world.now
    sides: dict[int, Side] = {}

    def start(index: int) -> None:
        sides[index] = Side(hosts[index], mains[index], plans[index], index)

    start(1 - late)
    world.after(skew_s, start, late)
    world.run(
        until=lambda: len(sides) == 2 and all(side.event is not None for side in sides.values()),
        deadline=started_at + skew_s + max(plan.total_duration_s for plan in plans) + 10.0,
    )
    pair = (sides[0], sides[1])
    elapsed_s = world.now - started_at - skew_s
    is_found = all(side.path is not None for side in pair)
    if is_found:
        check_same_path(pair)
    return Outcome(
        seed=world.seed,
        profiles=(profiles[0], profiles[1]),
        plans=(plans[0], plans[1]),
        is_found=is_found,
        probe_counts=(pair[0].statistics.sent_count, pair[1].statistics.sent_count),
        elapsed_s=elapsed_s,
        sides=pair,
    )


def check_same_path(pair: tuple[Side, Side]) -> None:
    """Assert that what one side sends along its path comes out at the other's, both ways."""
    for sender, receiver in (pair, pair[::-1]):
        assert sender.path is not None
        assert receiver.path is not None
        assert isinstance(sender.event, PathFound)
        assert isinstance(receiver.event, PathFound)
        arrived: list[Endpoint] = []
        port = receiver.ports[receiver.event.port_index]
        before = port.on_datagram
        port.on_datagram = lambda data, source, arrived=arrived: arrived.append(source)
        for _ in range(20):  # the link may lose some
            sender.ports[sender.event.port_index].send(b"are we on one path?", sender.path[1])
        sender.world.run_for(1.0)
        port.on_datagram = before
        assert receiver.path[1] in arrived, "the two ends are not of one path"


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of a probability (Wilson 1927)."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
