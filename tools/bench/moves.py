"""How long nothing arrives after a move, where both NATs draw ports; and with two interfaces.

    python -m tools.bench.moves [--seed N] [--quick] [--json]

Two nodes on the virtual internet, and two observers that both know. A stream of 10 kB/s goes from
one to the other. Every 30 s the sender is carried from one carrier to another, and what it had
before is gone. Every third time the receiver's NAT forgets all its mappings a second later, in the
middle of the puncture; every fourth time the receiver is carried elsewhere in the same moment. 2 %
of what the sender sends and receives is lost. The pause is the longest time between two arrivals,
from one move to the next.

Then the sender has Wi-Fi and, in the second run of each pair, a SIM beside it: by turns Wi-Fi is
cut without a word and back 15 s later, or left for another. Time is virtual; keys are drawn by the
system, so that runs of one seed differ a little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import trio
from trio.testing import MockClock

from natswarm import PRESETS, Node, Peer, PeerLost, run_world
from natswarm.sim.link import LinkConditions
from natswarm.sim.ports import Sequential
from natswarm.sim.router import NatRouter
from tools.bench.roaming_transfer import Scene, set_access

PROTOCOL = "bench/paced"
CHUNK_BYTES, CHUNK_INTERVAL_S = 500, 0.05
STAY_S = 30.0
REBOOT_AFTER_S = 1.0
REBOOT_EACH, BOTH_EACH = 3, 4
STAYS, STAYS_QUICK = 12, 4

_CARRIER = PRESETS["orange-bg"]
assert _CARRIER.behaviour is not None
# A counter that 35 others move on each second.
COUNTER = replace(
    _CARRIER, behaviour=replace(_CARRIER.behaviour, allocation=Sequential(cross_traffic_per_s=35.0))
)
KINDS = {**PRESETS, "counter": COUNTER}
# Between which two the sender goes to and fro, and the receiver.
ROWS = (
    (("kpn-nl", "kpn-nl"), ("kpn-nl", "kpn-nl")),
    (("kpn-nl", "juniper-pba"), ("kpn-nl", "kpn-nl")),
    (("orange-bg", "kpn-nl"), ("kpn-nl", "kpn-nl")),
    (("counter", "counter"), ("counter", "counter")),
    (("counter", "kpn-nl"), ("linux-home", "counter")),
)
QUICK_ROWS = (ROWS[0], ROWS[3])

# The sender's SIM beside linux-home, and the receiver.
SECOND_ROWS = (("kpn-nl", "linux-home"), ("kpn-nl", "kpn-nl"), ("telia-no", "lebara-nl"))
CUT = LinkConditions(loss=1.0)
CUT_S = 15.0

# Of all pauses, where only a puncture in vain makes one long; and of those with two interfaces.
TARGETS = {"median_s": 10.0, "worst_s": 20.0, "reconnects": 0.0, "second_worst_s": 2.5}


@dataclass(slots=True)
class Outcome:
    """What became of one pair; pauses in seconds."""

    sender: tuple[str, str]
    receiver: tuple[str, str]
    moved: list[float] = field(default_factory=list)
    """After a move of the sender."""
    rebooted: list[float] = field(default_factory=list)
    """After one with a reboot of the receiver's NAT."""
    both: list[float] = field(default_factory=list)
    """After a move of both."""
    reconnects: int = 0

    @property
    def all(self) -> list[float]:
        """All pauses."""
        return [*self.moved, *self.rebooted, *self.both]


async def measure(
    sender: tuple[str, str], receiver: tuple[str, str], stays: int, seed: int
) -> Outcome:
    """Carry them to and fro, in virtual time."""
    outcome, arrivals = Outcome(sender, receiver), [0.0]
    async with trio.open_nursery() as nursery:
        scene = Scene(seed, nursery)
        async with run_world(scene.internet.world):
            for name in ("observer0", "observer1"):
                await scene.add(name, "public")
            one = await scene.add("sender", KINDS[sender[0]])
            other = await scene.add("receiver", KINDS[receiver[0]])
            peer = await one.connect(other.peer_id)
            set_access(scene.hosts["sender"])
            _receive(other, arrivals)
            nursery.start_soon(_send, peer)
            await trio.sleep(STAY_S)
            senders = _places(scene, "sender", sender[1])
            receivers = _places(scene, "receiver", receiver[1])
            for stay in range(1, stays + 1):
                moved_at = trio.current_time()
                scene.hosts["sender"].move(next(senders))
                set_access(scene.hosts["sender"])
                pauses = outcome.moved
                if stay % BOTH_EACH == 0:
                    scene.hosts["receiver"].move(next(receivers))
                    pauses = outcome.both
                await trio.sleep(REBOOT_AFTER_S)
                if stay % REBOOT_EACH == 0 and pauses is outcome.moved:
                    nat = scene.hosts["receiver"].nat
                    assert nat is not None, "the receiver is behind a NAT"
                    nat.reboot()
                    pauses = outcome.rebooted
                await trio.sleep(STAY_S - REBOOT_AFTER_S)
                pauses.append(round(_longest_pause(arrivals, moved_at), 3))
            nursery.cancel_scope.cancel()
    lost = [each for each in scene.events if isinstance(each, PeerLost) and each.peer is peer]
    outcome.reconnects = len(lost)
    return outcome


@dataclass(slots=True)
class SecondOutcome:
    """What became of a sender with Wi-Fi; pauses in seconds."""

    sim: str
    receiver: str
    cut: list[float] = field(default_factory=list)
    """After Wi-Fi fell silent."""
    left: list[float] = field(default_factory=list)
    """After it was left for another one."""
    reconnects: int = 0


async def measure_second(sim: str, receiver: str, stays: int, seed: int) -> SecondOutcome:
    """Cut Wi-Fi and leave it, by turns; without a SIM where `sim` is empty."""
    outcome, arrivals = SecondOutcome(sim, receiver), [0.0]
    async with trio.open_nursery() as nursery:
        scene = Scene(seed, nursery)
        async with run_world(scene.internet.world):
            for name in ("observer0", "observer1"):
                await scene.add(name, "public")
            one = await scene.add("sender", "linux-home", sim)
            other = await scene.add("receiver", receiver)
            peer = await one.connect(other.peer_id)
            set_access(scene.hosts["sender"])
            _receive(other, arrivals)
            nursery.start_soon(_send, peer)
            places = _places(scene, "sender", "sky-uk-dsl")
            for stay in range(stays):
                await trio.sleep(STAY_S)
                host, changed_at = scene.hosts["sender"], trio.current_time()
                if stay % 2:
                    host.move(next(places))
                else:
                    host.uplink.upload.conditions = host.uplink.download.conditions = CUT
                    await trio.sleep(CUT_S)
                set_access(host)
                await trio.sleep(STAY_S)
                pauses = outcome.left if stay % 2 else outcome.cut
                pauses.append(round(_longest_pause(arrivals, changed_at), 3))
            nursery.cancel_scope.cancel()
    lost = [each for each in scene.events if isinstance(each, PeerLost) and each.peer is peer]
    outcome.reconnects = len(lost)
    return outcome


def _places(scene: Scene, name: str, other: str) -> Iterator[NatRouter]:
    """Return where a host goes, for ever to and fro."""
    nat = scene.hosts[name].nat
    assert nat is not None, "only hosts behind NATs move here"
    return itertools.cycle([scene.internet.add_nat(f"{name}'s other", KINDS[other]), nat])


def _receive(node: Node, arrivals: list[float]) -> None:
    async def receive(stream: trio.abc.ReceiveStream, _peer: Peer) -> None:
        async for _ in stream:
            arrivals.append(trio.current_time())

    node.serve(PROTOCOL, receive)


async def _send(peer: Peer) -> None:
    stream = await peer.open_stream(PROTOCOL)
    while True:
        await stream.send_all(bytes(CHUNK_BYTES))
        await trio.sleep(CHUNK_INTERVAL_S)


def _longest_pause(arrivals: list[float], since: float) -> float:
    """Return the longest pause since a time; one that goes on ends now."""
    before = max(at for at in arrivals if at <= since)
    times = [before, *(at for at in arrivals if at > since), trio.current_time()]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the world")
    parser.add_argument("--quick", action="store_true", help="two pairs, four moves each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows, stays = (QUICK_ROWS, STAYS_QUICK) if arguments.quick else (ROWS, STAYS)
    outcomes = []
    for sender, receiver in rows:
        clock = MockClock(autojump_threshold=0)
        outcomes.append(trio.run(measure, sender, receiver, stays, arguments.seed, clock=clock))
        if not arguments.json:
            _show(outcomes[-1])
    seconds = []
    for sim, home in SECOND_ROWS[:1] if arguments.quick else SECOND_ROWS:
        for each in ("", sim):
            clock = MockClock(autojump_threshold=0)
            run = trio.run(measure_second, each, home, stays, arguments.seed, clock=clock)
            seconds.append(run)
            if not arguments.json:
                _show_second(run)
    pauses = [pause for outcome in outcomes for pause in outcome.all]
    values = {
        "median_s": round(statistics.median(pauses), 2),
        "worst_s": round(max(pauses), 2),
        "reconnects": sum(each.reconnects for each in outcomes)
        + sum(each.reconnects for each in seconds),
        "second_worst_s": max(pause for run in seconds if run.sim for pause in run.cut + run.left),
    }
    targets = {
        name: {"value": values[name], "target": target, "ok": values[name] <= target}
        for name, target in TARGETS.items()
    }
    if arguments.json:
        head = {"benchmark": "moves", "seed": arguments.seed, "quick": arguments.quick}
        runs = [asdict(each) for each in outcomes]
        second = [asdict(each) for each in seconds]
        print(json.dumps({**head, "runs": runs, "second": second, "targets": targets}))
        return
    for name, result in targets.items():
        print(f"{name:18} {result['value']!s:>12}   {'met' if result['ok'] else 'MISSED'}")


def _show(outcome: Outcome) -> None:
    print(f"{' and '.join(outcome.sender)} to {' and '.join(outcome.receiver)}")
    for name, pauses in (
        ("moved", outcome.moved),
        ("rebooted", outcome.rebooted),
        ("both", outcome.both),
    ):
        if pauses:
            median, worst = statistics.median(pauses), max(pauses)
            print(f"    {name:10} median {median:.1f} s, worst of {len(pauses)} {worst:.1f} s")


def _show_second(outcome: SecondOutcome) -> None:
    beside = f"with {outcome.sim} beside it" if outcome.sim else "alone"
    print(f"Wi-Fi {beside} to {outcome.receiver}")
    for name, pauses in (("cut", outcome.cut), ("left", outcome.left)):
        median, worst = statistics.median(pauses), max(pauses)
        print(f"    {name:10} median {median:.1f} s, worst of {len(pauses)} {worst:.1f} s")


if __name__ == "__main__":
    main()
