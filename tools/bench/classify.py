"""How well an inspection finds out what a NAT does: random NATs, two observers, 1 % loss.

    python -m tools.bench.classify [--seed N] [--count N] [--quick] [--lifetimes]
        [--errors] [--json]

Random NATs (`random_nats.py` says how they are drawn), each inspected by the machines themselves on
the bare event heap, as in life: two observers with two ports each, a third peer that a neighbour
asks. First the quick part, then the tests of some minutes; `--quick` leaves those out and takes
fewer NATs; `--lifetimes` measures lifetimes as well.

Every share comes with its 95 % interval (Wilson). A figure that is reported as unknown is counted
apart: it is no error, but it is no success, either.

What goes wrong, and why it must:

* sizes of blocks in the quick part: n ports in a block of B leave (B + 1) / (n + 1) unseen at each
  end on average, 27 of 1,000 for n = 36, so blocks of 1000 and 1008, or 4032 and 4096, look alike
  in a few per cent; some 300 ports of the quota test tell them apart;
* the size of a block that is counted inside: unknown until the counter comes to its end;
* a Beta law over 9,000 ports has nine tenths of them within half of that, as two blocks of 2048 or
  4096 have; one over more is told from an even one by hundreds of ports only (`nat/shape.py`), as
  the test of the quota draws them;
* a rate of new mappings near the 200 a second that are tried, or with a burst of most of the 300:
  none is met, or what is granted before the bucket is empty leaves too few to count.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from natswarm.nat.behaviour import Pooling
from natswarm.nat.findings import Findings, NatTest
from natswarm.nat.inspection import QUICK, TESTS
from natswarm.nat.quota import MAPPINGS_MAX
from natswarm.nat.quota import SIGN as QUOTA_SIGN
from natswarm.nat.rush import ECHOES_PER_S
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.ports import Blocks, ScaledBeta, Sequential, Uniform
from natswarm.sim.topology import Host, Internet, SimPort
from natswarm.sim.world import World
from tools.bench.random_nats import draw_preset, expected_law, expected_mapping
from tools.bench.simulated_inspection import SimulatedInspection, SimulatedObserver

LIFETIMES = ("idle_unreplied_s", "idle_lifetime_s")
LIFETIME_TRIED_S = 300.0

TARGETS = {
    "mapping": 0.995,
    "filtering": 0.995,
    "law": 0.97,
    "block": 0.97,
    **dict.fromkeys(LIFETIMES, 0.97),
}
QUICK_PACKETS_MAX = 60
CALIBRATION = (0.88, 0.92)

FULL_COUNT, QUICK_COUNT = 1000, 400
EARLIER_MAPPINGS_MAX = 20


@dataclass(slots=True)
class Case:
    """One NAT: what it is, what was found.

    Attributes:
        seed: Replays it.
        truth: Names of properties -> what it does.
        found: The same names -> what the inspection said; None for unknown.
        intervals: Kinds of estimates -> whether the truth lay within; several of a kind.
        packets: Test -> packets it sent.
        quick_s: How long the quick part took.
        text: The NAT, for whoever looks into an error.
    """

    seed: str
    truth: dict[str, str] = field(default_factory=dict)
    found: dict[str, str | None] = field(default_factory=dict)
    intervals: list[tuple[str, bool]] = field(default_factory=list)
    packets: dict[str, int] = field(default_factory=dict)
    quick_s: float = 0.0
    text: str = ""


def inspect_one(arguments: tuple[str, bool, bool]) -> Case:
    """Draw a NAT and inspect it."""
    seed, is_quick, wants_lifetimes = arguments
    world = World(0)
    world.rng = random.Random(seed)
    world.seed = int.from_bytes(world.rng.randbytes(6), "big")
    preset = draw_preset(world.rng)
    behaviour = preset.behaviour
    assert behaviour is not None
    internet = Internet(world)
    observers = [SimulatedObserver(internet, f"P{index}") for index in range(2)]
    host = internet.add_host("phone", preset)
    _make_earlier_mappings(internet, host)
    case = Case(seed, text=str(behaviour))
    main = host.open_port()
    tests = set(QUICK)
    if not is_quick:
        tests = {test for test in TESTS if wants_lifetimes or test is not NatTest.LIFETIMES}
    started_at = world.now
    inspection = SimulatedInspection(host, main, observers, tests=tests)
    machine = inspection.machine
    world.run(until=lambda: machine.test is not NatTest.BEHAVIOUR, deadline=1e6)
    case.quick_s = world.now - started_at
    _note_quick(case, behaviour, machine.findings, main, "quick ")
    inspection.run()
    _note_quick(case, behaviour, machine.findings, main, "")
    if not is_quick:
        _note_figures(case, behaviour, machine.findings)
    case.packets = {test.value: count for test, count in machine.findings.packet_counts.items()}
    return case


def _make_earlier_mappings(internet: Internet, host: Host) -> None:
    """Leave the NAT as a host that was on for a while leaves it."""
    world = internet.world
    server = internet.add_host("server").open_port()
    ports: list[SimPort] = []
    for _ in range(world.rng.randint(0, EARLIER_MAPPINGS_MAX)):
        port = host.open_port()
        port.send(b"earlier", server.endpoint)
        ports.append(port)
        world.run_for(world.rng.uniform(0, 2))
    world.run_for(1.0)
    for port in ports:
        port.close()


# What is right -----------------------------------------------------------------------------------


def _note_quick(
    case: Case, behaviour: NatBehaviour, findings: Findings, main: SimPort, prefix: str
) -> None:
    profile = findings.profile
    truth: dict[str, object] = {
        "mapping": expected_mapping(behaviour).value,
        "filtering": behaviour.filtering.value,
        "law": expected_law(behaviour).value,
        "pooling": behaviour.pooling.value,
    }
    allocation = profile.allocation
    found: dict[str, object] = {
        "mapping": None if profile.mapping is None else profile.mapping.value,
        "filtering": None if profile.filtering is None else profile.filtering.value,
        "law": None if allocation is None else allocation.law.value,
        "pooling": None if profile.pooling is None else profile.pooling.value,
    }
    law = behaviour.allocation
    if isinstance(law, Blocks):
        name = "block, counted" if law.is_sequential else "block"
        truth[name] = "exact"
        found[name] = _block_verdict(law, findings)
    if isinstance(law, ScaledBeta):
        truth["shape"] = "uneven"
        found["shape"] = "even" if allocation is None or allocation.shape is None else "uneven"
    elif isinstance(law, Uniform):
        truth["shape"] = "even"
        found["shape"] = "even" if allocation is None or allocation.shape is None else "uneven"
    if isinstance(law, Sequential):
        truth["step"] = law.step
        found["step"] = None if allocation is None else allocation.step
    _note_intervals(case, behaviour, findings, prefix)
    case.truth |= {prefix + name: str(value) for name, value in truth.items()}
    case.found |= {
        prefix + name: None if value is None else str(value) for name, value in found.items()
    }


def _block_verdict(law: Blocks, findings: Findings) -> str | None:
    allocation = findings.profile.allocation
    if allocation is None or allocation.block_size is None:
        return None
    if allocation.block_size != law.size:
        return "size"
    bases = set(law.bases())
    return "exact" if all(base in bases for base in allocation.blocks) else "base"


def _note_intervals(case: Case, behaviour: NatBehaviour, findings: Findings, prefix: str) -> None:
    law = behaviour.allocation
    truths: dict[str, float] = {}
    if isinstance(law, Uniform):
        truths = {"allocation.low": law.low, "allocation.high": law.high}
    elif isinstance(law, Sequential):
        truths = {"allocation.others_per_s": law.cross_traffic_per_s}
    for name, true in truths.items():
        if (interval := findings.intervals.get(name)) is not None:
            case.intervals.append((prefix + name, interval.low <= true <= interval.high))


def _note_figures(case: Case, behaviour: NatBehaviour, findings: Findings) -> None:
    """Note what the slower tests found."""
    profile = findings.profile
    for name, true in (
        ("hairpinning", behaviour.hairpinning),
        ("poison", behaviour.poison.value),
        ("tftp_helper", behaviour.tftp_helper),
        ("inbound_refreshes", behaviour.refreshed_by_inbound),
    ):
        value = getattr(profile, name)
        case.truth[name] = str(true)
        case.found[name] = None if value is None else str(getattr(value, "value", value))
    figures: dict[str, tuple[float, float]] = {
        "idle_unreplied_s": (behaviour.unreplied_lifetime_s, 0.1),
        "idle_lifetime_s": (behaviour.replied_lifetime_s, 0.1),
    }
    for name, (figure, tolerance) in figures.items():
        value = getattr(profile, name)
        case.truth[name] = "near"
        case.found[name] = None
        if value is not None:
            # Infinity: longer than was tried.
            tried = LIFETIME_TRIED_S if name in LIFETIMES else math.inf
            is_near = abs(min(value, tried) - min(figure, tried)) <= tolerance * figure
            case.found[name] = "near" if is_near else "far"
        if (interval := findings.intervals.get(name)) is not None:
            case.intervals.append((name, interval.low <= figure <= interval.high))
    if NatTest.QUOTA in findings.packet_counts:
        _note_rate(case, behaviour, findings)
        _note_quota(case, behaviour, findings)


def _note_rate(case: Case, behaviour: NatBehaviour, findings: Findings) -> None:
    limit = behaviour.subscriber_rate
    if limit is None:
        return
    name = "mapping_rate_per_s"
    rate = findings.profile.mapping_rate_per_s
    # How many the bucket refuses while so many ask as a quota or the test allows: where those are
    # no more than a few losses, "none was met" is right as well as the rate, and without any it is
    # all there is to say.
    has_quota = findings.profile.max_mappings is not None or "max_mappings" in findings.unknown
    asked = findings.profile.mappings_seen if has_quota else MAPPINGS_MAX
    refused = asked - (limit.burst + limit.per_s * asked / ECHOES_PER_S)
    is_near = rate is not None and abs(rate - limit.per_s) <= 0.2 * limit.per_s
    truth = "near" if refused > 0 else "not met"
    found = (
        None if rate is None else "near" if is_near else "not met" if rate == math.inf else "far"
    )
    if found == "not met" and refused <= QUOTA_SIGN:
        truth = "not met"
    elif found == "near":
        truth = "near"
    case.truth[name], case.found[name] = truth, found
    if (interval := findings.intervals.get(name)) is not None:
        case.intervals.append((name, interval.low <= limit.per_s <= interval.high))


def _note_quota(case: Case, behaviour: NatBehaviour, findings: Findings) -> None:
    quota = _quota(behaviour)
    if quota is None:
        return
    name = "max_mappings"
    profile = findings.profile
    truth = "near" if quota <= profile.mappings_seen else "not met"
    found: str | None = None if name in findings.unknown else "not met"
    if profile.max_mappings is not None:
        # Of the host's earlier mappings nobody can say which still live.
        short = quota - profile.max_mappings
        is_near = -0.1 * quota <= short <= 0.1 * quota + EARLIER_MAPPINGS_MAX
        truth, found = "near", "near" if is_near else "far"
    case.truth[name], case.found[name] = truth, found


def _quota(behaviour: NatBehaviour) -> float | None:
    """Return how many mappings the host may have: its blocks may be full before its quota is."""
    law = behaviour.allocation
    limits = [] if behaviour.max_mappings is None else [behaviour.max_mappings]
    if isinstance(law, Blocks) and behaviour.exclusive_ports:
        is_drawn = behaviour.pooling is Pooling.ARBITRARY
        limits.append(law.size * law.max_blocks * (behaviour.address_count if is_drawn else 1))
    return min(limits, default=None)


# The report --------------------------------------------------------------------------------------


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    middle = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    scale = 1 + z * z / trials
    return (middle - spread) / scale, (middle + spread) / scale


@dataclass(frozen=True, slots=True)
class Score:
    """One property over all cases."""

    name: str
    right: int
    unknown: int
    total: int
    confusion: dict[str, dict[str, int]]

    @property
    def share(self) -> float:
        """How many were right, of all."""
        return self.right / self.total if self.total else 0.0


def scores(cases: Iterable[Case]) -> dict[str, Score]:
    """Count for each property what was taken for what."""
    table: dict[str, Counter[tuple[str, str]]] = {}
    for case in cases:
        for name, true in case.truth.items():
            found = case.found[name]
            table.setdefault(name, Counter())[true, "unknown" if found is None else found] += 1
    result = {}
    for name, counts in table.items():
        confusion: dict[str, dict[str, int]] = {}
        for (true, found), count in sorted(counts.items()):
            confusion.setdefault(true, {})[found] = count
        right = sum(count for (true, found), count in counts.items() if true == found)
        unknown = sum(count for (_, found), count in counts.items() if found == "unknown")
        result[name] = Score(name, right, unknown, counts.total(), confusion)
    return result


def calibration(cases: Iterable[Case]) -> dict[str, tuple[int, int]]:
    """Return for each kind of interval, and all together, (how many held the truth, of how many).

    The intervals of the quick part do not count where the same kind comes again later.
    """
    held: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for case in cases:
        for name, is_held in case.intervals:
            held[name] += is_held
            total[name] += 1
            if not name.startswith("quick "):
                held["all"] += is_held
                total["all"] += 1
    return {name: (held[name], total[name]) for name in sorted(total)}


def _text(share: float, successes: int, trials: int) -> str:
    low, high = wilson(successes, trials)
    return f"{share:7.2%}  ({low:.2%}..{high:.2%}) of {trials}"


def print_report(cases: list[Case]) -> None:
    """Print everything for people."""
    table = scores(cases)
    for name in ("quick mapping", "quick filtering", "quick law"):
        score = table[name]
        columns = sorted({found for row in score.confusion.values() for found in row})
        print(f"\n{name}: true in rows, found in columns")
        print(" " * 14 + "".join(f"{column:>12}" for column in columns))
        for true, row in score.confusion.items():
            print(f"{true:>14}" + "".join(f"{row.get(column, 0):>12}" for column in columns))
    print("\nright, of all (unknown is not right)")
    for name, score in table.items():
        print(f"{name:24} {_text(score.share, score.right, score.total)}, {score.unknown} unknown")
    print("\nintervals called 90 % sure that held the truth")
    for name, (held, total) in calibration(cases).items():
        print(f"{name:32} {_text(held / total, held, total)}")
    print("\npackets: median, most")
    for test in NatTest:
        counts = sorted(case.packets.get(test.value, 0) for case in cases)
        if counts[-1]:
            print(f"{test.value:24} {counts[len(counts) // 2]:6} {counts[-1]:6}")
    seconds = sorted(case.quick_s for case in cases)
    print(f"{'quick part, seconds':24} {seconds[len(seconds) // 2]:6.2f} {seconds[-1]:6.2f}")
    print("\ntargets")
    for name, verdict in verdicts(cases).items():
        word = "met   " if verdict["ok"] else "MISSED"
        print(f"{word} {name}, {verdict['target']}: {verdict['is']}")


def verdicts(cases: list[Case]) -> dict[str, dict[str, Any]]:
    """Return each target: its value, the bound, whether it holds, and the value in words."""
    table = scores(cases)
    result: dict[str, dict[str, Any]] = {}

    def judge(name: str, value: float, target: str, is_met: bool, words: str) -> None:
        result[name] = {"value": value, "target": target, "ok": is_met, "is": words}

    was_quick = all(case.packets.keys() == {NatTest.BEHAVIOUR.value} for case in cases)
    for name, target in TARGETS.items():
        score = table.get(name)
        # Exact sizes are what the test of the quota is for, too; see above.
        if score is None or (name == "block" and was_quick):
            continue
        # A lifetime may be unknown, for a reason that is given; of those given 10 % is the bound.
        total = score.total - (score.unknown if name in LIFETIMES else 0)
        if total:
            share = score.right / total
            text = _text(share, score.right, total)
            judge(f"{name} right", share, f">= {target:.1%}", share >= target, text)
    most = max(case.packets.get(NatTest.BEHAVIOUR.value, 0) for case in cases)
    is_met = most <= QUICK_PACKETS_MAX
    judge("packets of the quick part", most, f"<= {QUICK_PACKETS_MAX}", is_met, str(most))
    held, total = calibration(cases).get("all", (0, 0))
    if total:
        share = held / total
        is_met = CALIBRATION[0] <= share <= CALIBRATION[1]
        judge("90 % intervals right", share, "88..92 %", is_met, _text(share, held, total))
    return result


def run(seed: int, count: int, *, is_quick: bool, wants_lifetimes: bool) -> list[Case]:
    """Inspect `count` NATs with all cores."""
    jobs = [(f"{seed}/{index}", is_quick, wants_lifetimes) for index in range(count)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        return list(pool.imap(inspect_one, jobs, chunksize=5))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int)
    parser.add_argument("--quick", action="store_true", help="the quick part only, fewer NATs")
    parser.add_argument("--lifetimes", action="store_true", help="measure lifetimes, too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--errors",
        action="store_true",
        help="list every NAT that was got wrong: its seed, what it is, what was found",
    )
    options = parser.parse_args()
    count = options.count or (QUICK_COUNT if options.quick else FULL_COUNT)
    cases = run(options.seed, count, is_quick=options.quick, wants_lifetimes=options.lifetimes)
    if options.json:
        report = {
            "seed": options.seed,
            "count": count,
            "scores": {name: asdict(score) for name, score in scores(cases).items()},
            "calibration": calibration(cases),
            "targets": verdicts(cases),
        }
        print(json.dumps(report, indent=2))
        return
    if options.errors:
        for case in cases:
            wrong = [
                f"{name}: {true}, found {case.found[name]}"
                for name, true in case.truth.items()
                if case.found[name] not in (true, None)
            ]
            wrong += [
                f"{name}: interval misses the truth" for name, held in case.intervals if not held
            ]
            if wrong:
                print(case.seed, *wrong, case.text, sep="\n    ")
    print(f"{count} random NATs, seed {options.seed}")
    print_report(cases)


if __name__ == "__main__":
    main()
