"""How well a swarm finds itself: simulated nodes behind NATs on the bare event heap.

    python -m tools.bench.routing [--seed N] [--quick] [--json] [--only growth]
                                  [--sizes 100,1000] [--nodes N]

Three experiments. *Growth*: swarms of several sizes join through one first contact each; then
peers are asked for by id and records by key, first in peace, then while nodes come and go with a
median session of an hour. *Disaster*: a third of all nodes vanish at once; the swarm is cut into
halves for ten minutes. *Attack*: a tenth and a quarter of all nodes are sybils, with and without
the defences; ids are ground to surround a record.

What is modelled stands at the top of `simulated_swarm.py`. Rates have 95 % Wilson intervals, and a
target is met by the estimate. A whole run takes an hour of one core, of which the 10,000 nodes
take most, though they are watched for shorter spans; a quick one under 40 s.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from natswarm.identity import PeerId
from natswarm.routing.protocol import Fetched
from natswarm.routing.record import RecordKind, decode_published_untrusted, own_key
from tools.bench.simulated_swarm import NatClass, SimulatedNode, SimulatedSwarm, Watched
from tools.bench.sybils import SybilNode, add_sybils, ground_identity

PAGE_BYTES = 4096
ECLIPSE_SYBILS = 16
RECORDS_MAX = 200

AT_LEAST = {
    "find_right": 0.999,
    "lookup_right": 0.999,
    "churn_find_right": 0.99,
    "churn_lookup_right": 0.99,
}
AT_MOST = {"hops_to_log2_n": 0.6, "links_max": 30.0, "idle_bytes_per_node_hour": 300_000.0}


@dataclass(frozen=True, slots=True)
class Size:
    """How much work a run is."""

    sizes: tuple[int, ...]
    queries: int
    churn_s: float
    disaster_nodes: int
    attack_nodes: int
    eclipsed_keys: int


@dataclass(frozen=True, slots=True)
class Spans:
    """How long a swarm that grows is watched, in seconds of its world.

    Attributes:
        join_s: Between two newcomers.
        rest_s: After the last.
        idle_s: While nobody asks.
        query_s: Between two questions.
        churn_s: While nodes come and go.
    """

    join_s: float
    rest_s: float
    idle_s: float
    query_s: float
    churn_s: float


FULL = Size((100, 1000, 10_000), 2000, 1800.0, 500, 400, 8)
QUICK = Size((50,), 300, 300.0, 40, 40, 2)


def wilson(good: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a rate."""
    if not count:
        return 0.0, 1.0
    z, rate = 1.96, good / count
    centre = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


@dataclass(slots=True)
class Trials:
    """Lookups of one kind.

    Attributes:
        good_count: That were right.
        watched: All of them.
    """

    good_count: int = 0
    watched: list[Watched] = field(default_factory=list)

    def figures(self, name: str) -> dict[str, Any]:
        """Return rate, interval and how many."""
        count = len(self.watched)
        low, high = wilson(self.good_count, count)
        return {
            f"{name}_right": round(self.good_count / max(count, 1), 5),
            f"{name}_interval": [round(low, 5), round(high, 5)],
            f"{name}_count": count,
        }


class Quest:
    """Asks for peers and records, and keeps the score."""

    def __init__(self, swarm: SimulatedSwarm, published_count: int) -> None:
        self.swarm = swarm
        self.finds = Trials()
        self.lookups = Trials()
        self._records: list[tuple[PeerId, bytes, int]] = []
        honest = self.honest()
        for index in range(published_count):
            self.publish(swarm.rng.choice(honest), f"topic {index}")
        swarm.world.run_for(30)

    def honest(self) -> list[SimulatedNode]:
        """Return the nodes that count."""
        return [node for node in self.swarm.alive() if not isinstance(node, SybilNode)]

    def publish(self, node: SimulatedNode, topic: str) -> None:
        """Publish two versions; only the later one is right."""
        for value in (b"old", b"new"):
            node.overlay.publish(RecordKind.OWN, topic, value, self.swarm.now)
            node.drain()
            self.swarm.world.run_for(0.05)
        self._records.append((node.peer_id, own_key(node.peer_id, topic), int(self.swarm.now)))

    def ask(self, *, one: SimulatedNode | None = None, other: SimulatedNode | None = None) -> None:
        """Ask for a peer and for a record; the score is kept when the answers are there."""
        swarm = self.swarm
        honest = self.honest()
        one = one or swarm.rng.choice(honest)
        other = other or swarm.rng.choice(honest)
        if one is not other:
            self._watch(self.finds, one, one.overlay.ask(other.peer_id, b"hello", swarm.now), other)
        # Its publisher must be there, or it may rightly have expired.
        records = [each for each in self._records if each[0] in swarm.nodes]
        if records:
            _, key, _ = swarm.rng.choice(records)
            self._watch(self.lookups, one, one.overlay.fetch(key, swarm.now), one)

    def _watch(
        self, trials: Trials, node: SimulatedNode, name: bytes, other: SimulatedNode
    ) -> None:
        watched = Watched(0)

        def judge(answers: Any) -> None:
            if not node.is_alive or not other.is_alive:
                return  # who left meanwhile is neither right nor wrong
            trials.watched.append(watched)
            if trials is self.finds:
                trials.good_count += bool(answers)
                return
            values = {
                decode_published_untrusted(sealed).value: sealed
                for given in answers
                if isinstance(given.answer, Fetched)
                for sealed in given.answer.records
            }
            trials.good_count += b"new" in values

        self.swarm.when_ended(name, judge)
        watched = self.swarm.watch(node, name)

    def run(self, count: int, *, every_s: float = 0.1) -> None:
        """Ask `count` times, then wait for the last answers."""
        for _ in range(count):
            self.ask()
            self.swarm.world.run_for(every_s)
        self.swarm.world.run_for(30)


def spans_of(count: int, churn_s: float) -> Spans:
    """Return how long a swarm of a size is watched; an hour of a large one costs hours of ours."""
    if count > 1000:
        return Spans(0.1, 120.0, 200.0, 0.02, min(churn_s, 300.0))
    return Spans(0.3, 300.0, 600.0, 0.1, churn_s)


def grown(seed: int, count: int, **options: Any) -> SimulatedSwarm:
    """Return a swarm that has joined and come to rest."""
    spans = spans_of(count, 0.0)
    swarm = SimulatedSwarm(seed, **options)
    swarm.add()
    swarm.grow(count - 1, every_s=spans.join_s)
    swarm.world.run_for(spans.rest_s)
    return swarm


def growth(seed: int, count: int, size: Size) -> dict[str, Any]:
    """Join, be idle, ask in peace, ask under churn."""
    gc.collect()
    resident_before = resident_bytes()
    started = time.process_time()
    spans = spans_of(count, size.churn_s)
    swarm = grown(seed, count)
    nodes = swarm.alive()
    joined_bytes = sum(node.sent_bytes for node in nodes)
    gc.collect()
    memory = (resident_bytes() - resident_before) / count
    links = [len(node.overlay.table) for node in nodes]
    bytes_before, count_before = sent(nodes)
    swarm.world.run_for(spans.idle_s)
    bytes_after, count_after = sent(nodes)
    idle_hours = count * spans.idle_s / 3600
    carried_before = [node.overlay.router.statistics.carried_count for node in nodes]
    quest = Quest(swarm, min(count, RECORDS_MAX))
    quest.run(size.queries, every_s=spans.query_s)
    carried = [
        node.overlay.router.statistics.carried_count - before
        for node, before in zip(nodes, carried_before, strict=True)
    ]
    hops = [watched.hops for watched in quest.finds.watched if watched.answers]
    figures = {
        "nodes": count,
        "links_mean": round(statistics.mean(links), 1),
        "links_max": max(links),
        "join_bytes_per_node": round(joined_bytes / count),
        "idle_bytes_per_node_hour": round((bytes_after - bytes_before) / idle_hours),
        "idle_messages_per_node_hour": round((count_after - count_before) / idle_hours),
        "memory_bytes_per_node": round(memory),
        "hops_mean": round(statistics.mean(hops), 2),
        "hops_max": max(hops),
        "hops_to_log2_n": round(statistics.mean(hops) / math.log2(count), 3),
        "find_messages_mean": round(messages(quest.finds), 1),
        "lookup_messages_mean": round(messages(quest.lookups), 1),
        "find_s_median": round(median_s(quest.finds), 3),
        "lookup_s_median": round(median_s(quest.lookups), 3),
        "load_max_to_mean": round(max(carried) / max(statistics.mean(carried), 1e-9), 1),
        **quest.finds.figures("find"),
        **quest.lookups.figures("lookup"),
    }
    churned = Quest(swarm, min(count, RECORDS_MAX))
    bytes_before, _ = sent_ever(swarm)
    pause_s = spans.churn_s / size.queries
    next_at = swarm.world.now
    for now in swarm.churn(spans.churn_s, median_session_s=3600.0):
        while next_at <= now:
            churned.ask()
            next_at += pause_s
    bytes_after, _ = sent_ever(swarm)
    swarm.world.run_for(30)
    hours = spans.churn_s / 3600
    return {
        **figures,
        **churned.finds.figures("churn_find"),
        **churned.lookups.figures("churn_lookup"),
        "churn_bytes_per_node_hour": round((bytes_after - bytes_before) / count / hours),
        "cpu_s": round(time.process_time() - started),
    }


def disaster(seed: int, size: Size) -> dict[str, Any]:
    """A third vanishes at once; a cut in two for ten minutes."""
    figures: dict[str, Any] = {"nodes": size.disaster_nodes}
    swarm = grown(seed, size.disaster_nodes)
    quest = Quest(swarm, size.disaster_nodes)
    victims = swarm.rng.sample(swarm.alive(), size.disaster_nodes // 3)
    for node in victims:
        swarm.remove(node)
    windows = list(recovery(quest, lambda: (None, None), windows=12, each_s=10.0))
    figures["third_gone_find_by_10_s"] = [find for find, _ in windows]
    figures["third_gone_lookup_by_10_s"] = [lookup for _, lookup in windows]
    figures["third_gone_recovered_s"] = recovered(windows, 10.0)

    swarm = grown(seed + 1, size.disaster_nodes)
    swarm.split(2)
    swarm.world.run_for(600)
    sides = {node.peer_id: node.side for node in swarm.alive()}
    cut = Quest(swarm, 0)
    swarm.split(1)

    def across() -> tuple[SimulatedNode, SimulatedNode]:
        halves: tuple[list[SimulatedNode], list[SimulatedNode]] = ([], [])
        for node in swarm.alive():
            halves[sides[node.peer_id]].append(node)
        return swarm.rng.choice(halves[0]), swarm.rng.choice(halves[1])

    windows = list(recovery(cut, across, windows=30, each_s=60.0))
    figures["partition_find_by_60_s"] = [find for find, _ in windows]
    figures["partition_recovered_s"] = recovered([(find, 1.0) for find, _ in windows], 60.0)
    return figures


def recovery(
    quest: Quest,
    pair: Callable[[], tuple[SimulatedNode | None, SimulatedNode | None]],
    *,
    windows: int,
    each_s: float,
) -> Iterator[tuple[float, float]]:
    """Yield the rates of finds and lookups of each span of time."""
    for _ in range(windows):
        quest.finds, quest.lookups = Trials(), Trials()
        finds, lookups = quest.finds, quest.lookups
        for _ in range(50):
            one, other = pair()
            quest.ask(one=one, other=other)
            quest.swarm.world.run_for(each_s / 50)
        yield (
            finds.good_count / max(len(finds.watched), 1),
            lookups.good_count / max(len(lookups.watched), 1),
        )


def recovered(windows: list[tuple[float, float]], each_s: float) -> float | None:
    """Return when both rates were 99 % or better, and stayed so; None if never."""
    good_from = None
    for index, rates in enumerate(windows):
        if min(rates) < 0.99:
            good_from = None
        elif good_from is None:
            good_from = index * each_s
    return good_from


def attack(seed: int, size: Size) -> dict[str, Any]:
    """Sybils with random ids, and with ids ground to surround a key."""
    figures: dict[str, Any] = {"nodes": size.attack_nodes}
    for share in (0.1, 0.25):
        for name, options in (
            ("defended", {}),
            ("undefended", {"alpha": 1, "has_prefixes": False}),
        ):
            swarm = grown(seed, round(size.attack_nodes * (1 - share)), **options)
            add_sybils(swarm, round(size.attack_nodes * share))
            swarm.world.run_for(300)
            quest = Quest(swarm, size.attack_nodes // 2)
            quest.run(size.queries // 2)
            label = f"sybil_{share:.0%}_{name}".replace("%", "pc")
            figures.update(quest.finds.figures(f"{label}_find"))
            figures.update(quest.lookups.figures(f"{label}_lookup"))
    for name, options in (("defended", {}), ("undefended", {"alpha": 1, "has_prefixes": False})):
        figures.update(eclipse(seed, size, name, options))
    return figures


def eclipse(seed: int, size: Size, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Surround keys with ground ids before their records are published."""
    swarm = grown(seed, size.attack_nodes, **options)
    bits = math.ceil(math.log2(size.attack_nodes)) + 3
    quest = Quest(swarm, 0)
    publishers = swarm.rng.sample(quest.honest(), size.eclipsed_keys)
    contacts = [node for node in swarm.alive() if node.nat is NatClass.OPEN]
    for index, node in enumerate(publishers):
        key = own_key(node.peer_id, f"eclipsed {index}")
        for _ in range(ECLIPSE_SYBILS):
            identity = ground_identity(key, bits, swarm.rng)
            swarm.add(swarm.rng.choice(contacts), identity=identity, node_type=SybilNode)
            swarm.world.run_for(0.2)
    swarm.world.run_for(300)
    for index, node in enumerate(publishers):
        quest.publish(node, f"eclipsed {index}")
    swarm.world.run_for(30)
    quest.run(size.queries // 2)
    return quest.lookups.figures(f"eclipse_{name}_lookup")


def sent(nodes: list[SimulatedNode]) -> tuple[int, int]:
    """Return (bytes, messages) that nodes have sent."""
    return sum(node.sent_bytes for node in nodes), sum(node.sent_count for node in nodes)


def sent_ever(swarm: SimulatedSwarm) -> tuple[int, int]:
    """Return (bytes, kinds) that anybody has sent, also who is gone."""
    return sum(swarm.by_kind.values()), len(swarm.by_kind)


def messages(trials: Trials) -> float:
    """Return the mean number of messages of a lookup."""
    return statistics.mean(watched.message_count for watched in trials.watched)


def median_s(trials: Trials) -> float:
    """Return how long a lookup takes."""
    return statistics.median(
        watched.ended_at - watched.started_at
        for watched in trials.watched
        if watched.ended_at is not None
    )


def resident_bytes() -> int:
    """Return the memory that this process has; 0 where there is no /proc."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * PAGE_BYTES if path.exists() else 0


def verdicts(experiment: str, figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return which targets a swarm meets."""
    return {
        f"{experiment}.{name}": {
            "value": figures[name],
            "target": target,
            "ok": figures[name] >= target if name in AT_LEAST else figures[name] <= target,
        }
        for name, target in {**AT_LEAST, **AT_MOST}.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How well a swarm finds itself.")
    parser.add_argument("--seed", type=int, default=1, help="of every world (default 1)")
    parser.add_argument("--quick", action="store_true", help="small swarms: under 40 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--sizes", help="of the swarms that grow, such as 100,1000")
    parser.add_argument(
        "--only", choices=("growth", "disaster", "attack"), help="one experiment (default all)"
    )
    parser.add_argument("--nodes", type=int, help="of the swarms that are struck and attacked")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    if arguments.sizes:
        size = replace(size, sizes=tuple(int(each) for each in arguments.sizes.split(",")))
    if arguments.nodes:
        size = replace(size, disaster_nodes=arguments.nodes, attack_nodes=arguments.nodes)
    report: dict[str, Any] = {}
    targets: dict[str, dict[str, Any]] = {}
    if arguments.only in (None, "growth"):
        for count in size.sizes:
            figures = growth(arguments.seed, count, size)
            report[f"growth_{count}"] = figures
            targets |= verdicts(f"growth_{count}", figures)
    if arguments.only in (None, "disaster"):
        report["disaster"] = disaster(arguments.seed, size)
    if arguments.only in (None, "attack"):
        report["attack"] = attack(arguments.seed, size)
    if arguments.json:
        setting = {"seed": arguments.seed, "python": platform.python_version()}
        print(json.dumps({"benchmark": "routing", **setting, **report, "targets": targets}))
        return
    for experiment, figures in report.items():
        print(experiment)
        for name, value in figures.items():
            verdict = ""
            if (target := targets.get(f"{experiment}.{name}")) is not None:
                verdict = f"target {target['target']:,}: "
                verdict += "met" if target["ok"] else "MISSED"
            print(f"    {name:<36} {value!s:>14}  {verdict}")


if __name__ == "__main__":
    main()
