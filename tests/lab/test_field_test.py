"""A whole field test: one laptop, two SIMs behind two emulated carriers, a pulled cable, a crash.

helper 1, helper 2 (natswarm up)
        └────── emulated internet ──────┐
  carrier A (emulated)           carrier B (emulated)
        │ TUN usb0                      │ TUN usb1
        └────────── one namespace ──────┘
             natswarm field-test run
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from natswarm.field_test.journal import read_journal
from natswarm.field_test.records import Alarm, AttemptRecord, Begin, End, Result, Resume
from natswarm.lab.emulation import LabInternet, TunPort, add_host
from natswarm.lab.errors import LabError
from natswarm.lab.namespace import Namespace, new_prefix, remove_all
from natswarm.lab.process import LabProcess
from natswarm.lab.settings import LabSettings, make_plan
from natswarm.lab.tun import open_tun
from natswarm.net.nursery import open_private_nursery
from natswarm.net.virtual import run_world
from tools.lab.pair import NATSWARM

pytestmark = pytest.mark.lab

PLAN = """
repeats = 2
pause_s = 0.1

[measure]
ping_count = 10
ping_interval_s = 0.05
bulk_s = 0.3
bulk_bytes = 300_000
"""

# These bound a hang on a busy machine, not a performance.
START_TIMEOUT_S = 60
TEST_TIMEOUT_S = 240


@dataclass
class Bed:
    """The laptop and its helpers.

    Attributes:
        laptop: A namespace with the interfaces `usb0` and `usb1`.
        ips: Their addresses.
        invites: Of the helpers.
        ports: The devices, as the emulator sees them.
    """

    laptop: Namespace
    ips: dict[str, str]
    invites: list[str] = field(default_factory=list)
    ports: dict[str, TunPort] = field(default_factory=dict)

    async def wait_sent(self, name: str, count: int) -> None:
        """Wait until so many packets more have left by an interface."""
        counters = self.ports[name].counters
        enough = counters.sent_count + count
        with trio.fail_after(START_TIMEOUT_S):
            while counters.sent_count < enough:  # noqa: ASYNC110 - the counter has no event
                await trio.sleep(0.02)

    def plug(self, name: str) -> None:
        """Bring an interface up, with a default route of its own."""
        metric = 100 + int(name[-1])
        self.laptop.ip(
            f"link set dev {name} up",
            f"address replace {self.ips[name]}/32 dev {name}",
            f"route replace default dev {name} metric {metric}",
        )

    def pull(self, name: str) -> None:
        """Take the interface down, with its address, as a pulled cable does."""
        self.laptop.ip(f"link set dev {name} down", f"address flush dev {name}")

    def start(self, *options: str) -> LabProcess:
        helpers = [option for invite in self.invites for option in ("--join", invite)]
        labels = ["--left-carrier", "NL Vodafone", "--right-carrier", "NL KPN"]
        sides = ["--left", "usb0", "--right", "usb1", *labels]
        return self.spawn("run", *sides, *helpers, *options)

    def spawn(self, *words: str) -> LabProcess:
        return self.laptop.spawn([*NATSWARM, "field-test", *words])


async def in_thread(call: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(call)


@contextlib.asynccontextmanager
async def open_bed(left: str, right: str, state: Path) -> AsyncIterator[Bed]:
    devices = (f"usb0={left}", f"usb1={right}", "first=public", "second=public")
    plan = make_plan(LabSettings(name="field", devices=devices, nat="emulated", delay="20ms"))
    internet = LabInternet(plan)
    prefix = new_prefix()
    with contextlib.ExitStack() as stack:
        stack.callback(remove_all, prefix)
        laptop = Namespace(prefix, "laptop")
        stack.callback(laptop.remove)
        bed = Bed(laptop, {})
        helpers = {}
        for device in plan.devices:
            host, _ = add_host(internet, device)
            is_sim = device.name.startswith("usb")
            namespace, interface = (laptop, device.name) if is_sim else (None, "wan")
            if namespace is None:
                namespace = helpers[device.name] = Namespace(prefix, device.name)
                stack.callback(namespace.remove)
            descriptor = open_tun(namespace, interface)
            stack.callback(os.close, descriptor)
            bed.ports[device.name] = TunPort(descriptor, host)
            bed.ips[device.name] = host.ip
            if is_sim:
                bed.plug(device.name)
            else:
                namespace.ip(f"address add {host.ip}/32 dev wan", "route add default dev wan")
        async with run_world(internet.world), open_private_nursery() as nursery:
            for port in bed.ports.values():
                nursery.start_soon(port.run)
            nodes = []
            for name, namespace in helpers.items():
                options = ["--json", "--name", name, "--bind", bed.ips[name]]
                options += ["--state", str(state / name)]
                nodes.append(namespace.spawn([*NATSWARM, "up", *options]))
            for node in nodes:
                line = await in_thread(
                    partial(node.wait_line, lambda line: '"up"' in line, timeout_s=START_TIMEOUT_S)
                )
                bed.invites.append(json.loads(line)["invite"])
            yield bed


async def test_a_field_test_survives_a_pulled_cable_and_a_crash(tmp_path: Path):
    plan, out, page = tmp_path / "plan.toml", tmp_path / "results", tmp_path / "report"
    plan.write_text(PLAN)
    async with open_bed("vodafone-nl", "kpn-nl", tmp_path) as bed:
        options = ["--out", str(out), "--json"]
        first = bed.start("--plan", str(plan), *options)

        async def wait_record(**wanted: Any) -> dict[str, Any]:
            def matches(line: str) -> bool:
                return wanted.items() <= json.loads(line).items()

            line = await in_thread(partial(first.wait_line, matches, timeout_s=TEST_TIMEOUT_S))
            return json.loads(line)

        await wait_record(kind="start", key="0/auto/right-to-left/1")
        await bed.wait_sent("usb1", 10)
        bed.pull("usb1")
        alarm = await wait_record(kind="alarm", what="down")
        assert alarm["side"] == "right"
        await wait_record(kind="attempt", result="void")
        # While it waits for the cable the laptop loses power, in the middle of a line.
        first.kill()
        with (out / "journal.jsonl").open("a") as journal:
            journal.write('{"kind":"start","at":"20')
        with pytest.raises(LabError, match=r"usb1 .*connect it first"):
            await in_thread(partial(bed.start(*options, "--resume").wait, timeout_s=60))
        bed.plug("usb1")
        second = bed.start(*options, "--resume")
        await in_thread(partial(second.wait, timeout_s=TEST_TIMEOUT_S))
        # Once more: nothing is left to do, and nothing is done twice.
        await in_thread(partial(bed.start(*options, "--resume").wait, timeout_s=60))
        report = bed.spawn("report", str(out), "--out", str(page))
        await in_thread(partial(report.wait, timeout_s=60))

    contents = read_journal(out / "journal.jsonl")
    assert isinstance(contents.records[0], Begin)
    assert len(contents.broken_lines) == 1
    resumes = [each for each in contents.records if isinstance(each, Resume)]
    assert [each.done_count for each in resumes] == [1, 4]
    counted = [each for each in contents.attempts if each.result is not Result.VOID]
    assert [each.key for each in counted] == [
        "0/auto/left-to-right/1",
        "0/auto/right-to-left/1",
        "0/auto/left-to-right/2",
        "0/auto/right-to-left/2",
    ]
    for attempt in counted:
        check_attempt(attempt)
    [void] = [each for each in contents.attempts if each.result is Result.VOID]
    assert void.key == "0/auto/right-to-left/1"
    assert "usb1" in void.reason
    assert sum(isinstance(each, End) for each in contents.records) == 1
    down = [each for each in contents.records if isinstance(each, Alarm) and each.what == "down"]
    assert down

    text = (page / "index.html").read_text()
    assert "NL Vodafone" in text
    assert "usb1" in text
    assert "torn" not in text, "the torn line was closed by the resumed test"
    assert "no records, and left out" in text
    assert (page / "attempts.csv").read_text().count("\n") == 6
    assert (page / "matrix.png").read_bytes().startswith(b"\x89PNG")


def check_attempt(attempt: AttemptRecord) -> None:
    assert attempt.result is Result.OK, attempt
    assert attempt.hole_s
    assert attempt.quality is not None
    assert not attempt.quality.trouble, attempt.quality
    assert min(attempt.quality.rtts_ms) >= 40  # twice the core's delay
    assert attempt.quality.out_bytes_per_s
    for side in (attempt.left, attempt.right):
        assert side is not None
        assert side.nat is not None
        # No address is written down, only its network.
        assert all(ip.endswith("/16") for ip in side.nat.public_ips)
        # The interface carried what the system took: nothing was swallowed.
        assert side.interface_sent_count is not None
        assert side.interface_sent_count >= 0.9 * side.handed_count
    assert attempt.left.nat.mapping == "EIM"
    assert attempt.right.nat.mapping == "APDM"


LONG_PLAN = """
repeats = 1
directions = ["left-to-right"]

[limits]
probe_count = 250000
mapping_count = 250000
duration_s = 600.0
"""

# Drops what the kernel has taken, before the driver counts it; no system call fails.
SWALLOW = """
table netdev swallow {
    chain out { type filter hook egress device "usb1" priority 0; policy drop; }
}
"""


async def test_a_kernel_that_silently_stops_sending_is_told_at_once(tmp_path: Path):
    plan, out = tmp_path / "plan.toml", tmp_path / "results"
    plan.write_text(LONG_PLAN)
    async with open_bed("orange-bg", "orange-bg", tmp_path) as bed:
        test = bed.start("--plan", str(plan), "--out", str(out), "--json")
        await in_thread(
            partial(test.wait_line, lambda line: '"start"' in line, timeout_s=START_TIMEOUT_S)
        )
        await bed.wait_sent("usb1", 3000)
        bed.laptop.nft(SWALLOW)
        stopped_at = trio.current_time()
        line = await in_thread(
            partial(test.wait_line, lambda line: '"alarm"' in line, timeout_s=START_TIMEOUT_S)
        )
        print(f"told after {trio.current_time() - stopped_at:.2f} s: {line}")
        assert trio.current_time() - stopped_at < 5
        test.kill()
    [alarm, *_] = [
        each for each in read_journal(out / "journal.jsonl").records if isinstance(each, Alarm)
    ]
    assert (alarm.side, alarm.what) == ("right", "swallowed")
    assert "the system stopped sending on usb1 after " in alarm.text


async def test_two_devices_run_one_test(tmp_path: Path):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("repeats = 2", "repeats = 1"))
    async with open_bed("linux-home", "kpn-nl", tmp_path) as bed:
        helpers = [option for invite in bed.invites for option in ("--join", invite)]
        host = bed.spawn(
            *("host", "--interface", "usb0", "--carrier", "NL Home", "--plan", str(plan)),
            *("--out", str(tmp_path / "host"), "--state", str(tmp_path / "a"), "--json", *helpers),
        )
        line = await in_thread(
            partial(host.wait_line, lambda line: '"link"' in line, timeout_s=START_TIMEOUT_S)
        )
        joined = bed.spawn(
            *("join", json.loads(line)["link"], "--interface", "usb1", "--carrier", "NL KPN"),
            *("--out", str(tmp_path / "join"), "--state", str(tmp_path / "b"), "--json"),
        )
        for process in (host, joined):
            await in_thread(partial(process.wait, timeout_s=TEST_TIMEOUT_S))
    for folder in ("host", "join"):
        # Results are made to be shared: no key is among them.
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["journal.jsonl"]
        contents = read_journal(tmp_path / folder / "journal.jsonl")
        assert [each.key for each in contents.attempts] == [
            "0/auto/left-to-right/1",
            "0/auto/right-to-left/1",
        ]
        for attempt in contents.attempts:
            check_attempt(attempt)
