"""Whatever happens in a lab, nothing of it remains: no namespace, no link, no process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from natswarm.lab.errors import LabError
from natswarm.lab.namespace import NAME_PREFIX, namespace_names, remove_stale
from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.topology import Lab

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]

# Builds a lab with a running command in it, says so, and waits to be killed.
LAB_THAT_WAITS = """
import time
from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.topology import Lab

with Lab() as lab:
    client = lab.add_client("client", KernelNat(NatKind.RANDOM))
    # Before it says so, it may be on its way into the namespace still.
    process = client.namespace.spawn(["sh", "-c", "echo there; exec sleep 600"])
    process.wait_line(str.isalpha, timeout_s=30)
    print(lab.prefix, process.pid, flush=True)
    time.sleep(600)  # until the test kills it
"""

WAITS_FOR_INTERRUPT = """
import signal

try:
    print("ready", flush=True)
    signal.pause()
except BaseException as error:
    print(repr(error))
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # dead, and not waited for yet


def build(lab: Lab) -> int:
    """Fill a lab; return the pid of what runs in it."""
    lab.add_public("public")
    client = lab.add_client("client", KernelNat(NatKind.BLOCK))
    pid = client.namespace.spawn(["sleep", "600"]).pid
    assert is_running(pid)
    assert len(namespace_names(lab.prefix)) == 4
    return pid


def test_nothing_remains():
    with Lab() as lab:
        pid = build(lab)
    assert not namespace_names(lab.prefix)
    assert not is_running(pid)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_remains_when_the_body_fails(error: type[BaseException]):
    lab = Lab()
    with pytest.raises(error), lab:  # noqa: PT012 - the body is what must not matter
        pid = build(lab)
        raise error
    assert not namespace_names(lab.prefix)
    assert not is_running(pid)


def test_nothing_remains_when_building_fails():
    with Lab() as lab:
        lab.add_public("twice")
        with pytest.raises(LabError, match="File exists"):
            lab.add_public("twice")
    assert not namespace_names(lab.prefix)


def test_the_next_lab_removes_what_a_killed_one_left():
    killed = subprocess.Popen(
        [sys.executable, "-c", LAB_THAT_WAITS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with killed:
        assert killed.stdout is not None
        prefix, inner_pid = killed.stdout.readline().split()
        remove_stale()
        assert len(namespace_names(prefix)) == 3, "a living lab was removed"
        killed.kill()

    with Lab():  # or another lab that started on this machine in between
        assert not namespace_names(prefix)
        assert not is_running(int(inner_pid))


def test_a_pid_given_to_another_process_does_not_protect():
    # Our own pid, but a process that started at another time.
    prefix = f"{NAME_PREFIX}-{os.getpid()}-1-0"
    subprocess.run(["ip", "netns", "add", f"{prefix}-core"], check=True)
    remove_stale()
    assert not namespace_names(prefix)


def test_labs_run_side_by_side():
    with Lab() as first, Lab() as second:
        for lab in (first, second):
            build(lab)
        assert first.prefix != second.prefix
    assert not namespace_names(first.prefix) + namespace_names(second.prefix)


def test_no_way_out(lab: Lab):
    client = lab.add_client("client", KernelNat(NatKind.PRESERVING)).namespace
    links = client.run(["ip", "-brief", "link"], timeout_s=10)
    assert {line.split("@")[0].split()[0] for line in links.splitlines()} == {"lo", "lan"}
    assert lab.core.run(["ip", "route", "show", "default"], timeout_s=10) == ""


def test_entering_is_left_again(lab: Lab):
    home = Path("/proc/thread-self/ns/net").readlink()
    with lab.core.entered():
        assert Path("/proc/thread-self/ns/net").readlink() != home
    assert Path("/proc/thread-self/ns/net").readlink() == home


def test_a_command_gives_its_output(lab: Lab):
    assert lab.core.run(["sh", "-c", "echo one; echo two"], timeout_s=10) == "one\ntwo"


def test_a_command_that_fails_says_why(lab: Lab):
    with pytest.raises(LabError, match="status 3:\nbad luck"):
        lab.core.run(["sh", "-c", "echo bad luck >&2; exit 3"], timeout_s=10)


def test_a_command_past_its_deadline_is_killed_with_its_children(lab: Lab):
    with lab.core.spawn(["sh", "-c", "sleep 600 & echo $!; wait"]) as process:
        child = int(process.wait_line(str.isdigit, timeout_s=10))
        with pytest.raises(LabError, match=r"killed after 0\.1 s"):
            process.wait(timeout_s=0.1)
        assert not is_running(process.pid)
        assert not is_running(child)


def test_a_command_in_a_session_of_its_own_is_killed_with_the_lab():
    with Lab() as lab:
        process = lab.core.spawn(["sh", "-c", "setsid sleep 600 & echo $!; wait"])
        child = int(process.wait_line(str.isdigit, timeout_s=10))
    assert not is_running(child)


def test_waiting_for_a_line(lab: Lab):
    with lab.core.spawn(["sh", "-c", "echo ready; sleep 600"]) as process:
        assert process.wait_line(lambda line: line == "ready", timeout_s=10) == "ready"
        with pytest.raises(LabError, match="did not print"):
            process.wait_line(lambda line: line == "never", timeout_s=0.1)
    with (
        lab.core.spawn(["sh", "-c", "echo that was all >&2"]) as process,
        pytest.raises(LabError, match=r"ended before(.|\n)*that was all"),
    ):
        process.wait_line(lambda line: line == "ready", timeout_s=10)


def test_a_command_can_be_interrupted(lab: Lab):
    with lab.core.spawn([sys.executable, "-c", WAITS_FOR_INTERRUPT]) as process:
        process.wait_line(lambda line: line == "ready", timeout_s=10)
        process.interrupt()
        assert process.wait(timeout_s=10) == "ready\nKeyboardInterrupt()"
