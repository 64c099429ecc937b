"""`natswarm lab`: programs that know nothing of it run behind carriers, and nothing remains."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP
from scapy.utils import rdpcap

from natswarm.lab.client import ask, start_lab, stop_lab
from natswarm.lab.errors import LabError
from natswarm.lab.namespace import namespace_names
from natswarm.lab.registry import LabState, Registry
from natswarm.lab.settings import LabSettings

pytestmark = pytest.mark.lab

OpenLab = Callable[..., LabState]

# As the installed command, but from this very environment, whatever PATH says.
NATSWARM = [sys.executable, "-c", "from natswarm.cli import main; main()"]
TIMEOUT_S = 60.0
# The interpreter alone, without this project: a program like any other.
PYTHON = [sys.executable, "-I", "-S", "-c"]

UDP_SERVER = """
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 7))
print("ready", flush=True)
while True:
    data, source = udp.recvfrom(65535)
    udp.sendto(data[::-1] + f" {source[0]}".encode(), source)
"""
UDP_CLIENT = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.settimeout(1)
udp.connect((sys.argv[1], 7))
for _ in range(10):
    udp.send(b"x" * int(sys.argv[2]))
    try:
        data = udp.recv(65535)
    except TimeoutError:
        continue
    print(len(data.split()[0]), data.split()[1].decode())
    break
"""
TCP_CLIENT = """
import hashlib, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=20) as answer:
    print(hashlib.sha256(answer.read()).hexdigest())
"""
DNS_SERVER = """
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 53))
print("ready", flush=True)
while True:
    query, source = udp.recvfrom(512)
    end = query.index(0, 12) + 5
    answer = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4" + bytes([192, 0, 2, 53])
    udp.sendto(query[:2] + b"\\x84\\0\\0\\1\\0\\1\\0\\0\\0\\0" + query[12:end] + answer, source)
"""
PING = """
import os, socket, struct, sys
icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
icmp.settimeout(1)
for sequence in range(10):
    body = struct.pack("!BBHHH", 8, 0, 0, 4711, sequence) + b"are you there?"
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    icmp.sendto(body, (sys.argv[1], 0))
    try:
        answer, (source, _) = icmp.recvfrom(1000)
    except TimeoutError:
        continue
    print(answer[20], struct.unpack("!H", answer[24:26])[0], answer[28:].decode(), source)
    break
"""

_serials = itertools.count()


def new_name() -> str:
    return f"cli-{os.getpid()}-{next(_serials)}"


def natswarm(*arguments: str, status: int = 0) -> str:
    """Run the command; return what it printed to standard output, or to standard error."""
    done = subprocess.run(
        [*NATSWARM, "lab", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def inside(state: LabState, device: str, *argv: str) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", state.device(device).namespace, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def output(state: LabState, device: str, *argv: str) -> str:
    done, _ = inside(state, device, *argv).communicate(timeout=TIMEOUT_S)
    return done.strip()


def wait_gone(*pids: int) -> None:
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([descriptor], [], [], TIMEOUT_S)[0], f"{pid} still runs"
        finally:
            os.close(descriptor)


def assert_nothing_remains(state: LabState, *pids: int) -> None:
    assert not namespace_names(state.prefix)
    assert state.name not in {lab.name for lab in Registry().labs()}
    folder = Registry().socket_path(state.name).parent
    assert not list(folder.glob(f"{state.name}.*"))
    for pid in (state.pid, state.watchdog_pid, *pids):
        assert not is_running(pid)


@pytest.fixture(scope="module")
def shared(open_lab: OpenLab) -> LabState:
    """One lab for what leaves no trace in it."""
    return open_lab("a=kpn-nl", "b=o2-uk-4g,home", "c=@b", "s=public", delay="5ms", loss="1%")


@pytest.fixture(scope="module")
def servers(shared: LabState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web server, an echo server and a name server on s; returns the digest of the file there."""
    folder = tmp_path_factory.mktemp("served")
    data = random.Random(7).randbytes(200_000)
    (folder / "file").write_bytes(data)
    web = [sys.executable, "-u", "-m", "http.server", "80", "--directory", str(folder)]
    with contextlib.ExitStack() as stack:
        for argv in (web, [*PYTHON, UDP_SERVER], [*PYTHON, DNS_SERVER]):
            server = stack.enter_context(inside(shared, "s", *argv))
            stack.callback(server.kill)
            assert server.stdout is not None
            assert server.stdout.readline()
        yield hashlib.sha256(data).hexdigest()


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("size", [100, 4000])
@pytest.mark.parametrize("device", ["a", "b", "c"])
def test_udp_of_any_program(shared: LabState, device: str, size: int):
    """4,000 bytes take three fragments."""
    where = shared.device("s").ip
    seen_ip = shared.device(device).external_ips[0]
    assert output(shared, device, *PYTHON, UDP_CLIENT, where, str(size)) == f"{size} {seen_ip}"


@pytest.mark.parametrize("device", ["a", "b"])
def test_tcp_of_any_program(shared: LabState, servers: str, device: str):
    url = f"http://{shared.device('s').ip}/file"
    assert output(shared, device, *PYTHON, TCP_CLIENT, url) == servers


@pytest.mark.parametrize("device", ["a", "b", "c"])
def test_ping(shared: LabState, device: str):
    """Echoes keep their identifier, whatever it was on the way."""
    where = shared.device("s").ip
    answer = output(shared, device, *PYTHON, PING, where)
    assert answer == f"0 4711 are you there? {where}"


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["ping", "-c", "3", "-i", "0.2"], "ttl="),
        # The first router is the carrier's, the last the server: 2 + 1 + 8 hops before it.
        (["traceroute", "-n", "-q", "2", "-w", "1", "-z", "20", "-m", "15"], "100.127.255"),
        (["host", "-t", "A", "-W", "2", "-R", "5", "example.test"], "has address 192.0.2.53"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("device", ["a", "b"])
def test_programs_of_debian(shared: LabState, device: str, argv: list[str], expected: str):
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    where = shared.device("s").ip
    printed = output(shared, device, *argv, where)
    assert where in printed
    assert expected in printed


def test_exec_is_the_program_itself(shared: LabState, tmp_path: Path):
    script = 'echo "$GREETING"; pwd; cat; exit 7'
    done = subprocess.run(
        [*NATSWARM, "lab", "exec", "--name", shared.name, "b", "sh", "-c", script],
        input="from outside\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "GREETING": "hello"},
    )
    assert done.stdout == f"hello\n{tmp_path}\nfrom outside\n"
    assert done.returncode == 7


def test_status(shared: LabState, servers: str):
    assert servers
    output(shared, "b", *PYTHON, UDP_CLIENT, shared.device("s").ip, "10")
    [lab] = json.loads(natswarm("status", "--json", "--name", shared.name))["labs"]
    assert lab["core"] == {"hops": 8, "delay_s": 0.005, "loss": 0.01}
    devices = {device["name"]: device for device in lab["devices"]}
    assert [nat["by"] for nat in devices["b"]["nats"]] == ["emulator", "kernel"]
    assert devices["b"]["nats"][0]["mappings"]["udp"] >= 1
    assert devices["b"]["counters"]["sent_count"] >= 1
    printed = natswarm("status", "--name", shared.name)
    assert f"lab {shared.name}: up" in printed
    assert "o2-uk-4g" in printed


def test_verify(shared: LabState):
    result = json.loads(natswarm("verify", "--json", "--name", shared.name))
    assert result["ok"], [check for check in result["checks"] if not check["is_ok"]]
    seen = {(check["device"], check["what"]): check["seen"] for check in result["checks"]}
    assert seen["b", "mapping"] == "APDM"
    assert seen["s", "hops"] == "8"


def test_verify_tells_what_is_not_as_it_should_be(open_lab: OpenLab):
    state = open_lab("h=home", delay="1ms")
    rules = "table ip lab { chain off { type filter hook forward priority 1; oifname wan drop; }; }"
    subprocess.run(
        ["ip", "netns", "exec", state.device("h").router, "nft", "-f", "-"],
        input=rules,
        text=True,
        check=True,
    )
    done = subprocess.run(
        [*NATSWARM, "lab", "verify", "--json", "--name", state.name], capture_output=True, text=True
    )
    assert done.returncode == 1
    [check] = json.loads(done.stdout)["checks"]
    assert check["what"] == "reachability"
    assert "reached" in check["seen"]


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("where", ["a", "b", "core"])
def test_a_capture_holds_whole_packets(shared: LabState, where: str, tmp_path: Path):
    file = tmp_path / "x.pcap"
    options = ["--count", "4", "--seconds", "20", "--out", str(file), "--name", shared.name]
    capture = subprocess.Popen(
        [*NATSWARM, "lab", "capture", where, *options], stderr=subprocess.PIPE, text=True
    )
    device = "a" if where == "core" else where
    with capture:
        while not (file.exists() and file.stat().st_size):
            assert capture.poll() is None
        while capture.poll() is None:
            output(shared, device, *PYTHON, UDP_CLIENT, shared.device("s").ip, "50")
        assert capture.stderr is not None
        assert capture.stderr.read() == f"4 packets in {file}\n"
    assert capture.returncode == 0
    packets = rdpcap(str(file))
    assert len(packets) == 4
    state = shared.device(device)
    ours = state.external_ips[0] if where == "core" else state.ip
    for packet in packets:
        assert ours in (packet[IP].src, packet[IP].dst)
        checksum = packet[IP].chksum
        del packet[IP].chksum
        assert IP(bytes(packet)).chksum == checksum


def test_up_exec_and_down(tmp_path: Path):
    """What a user does, and what is left of it."""
    name = new_name()
    printed = natswarm("up", "a=kpn-nl", "s=public", "--name", name, "--json")
    made: dict[str, Any] = json.loads(printed)
    assert [device["name"] for device in made["devices"]] == ["a", "s"]
    state = Registry().find(name)
    assert "runs already" in natswarm("up", "x=home", "--name", name, status=1)
    sleeping = inside(state, "a", "sh", "-c", "setsid sleep 600 & echo $!; wait")
    assert sleeping.stdout is not None
    pid = int(sleeping.stdout.readline())
    with sleeping:
        assert natswarm("down", "--name", name) == f"lab {name} is gone\n"
    assert_nothing_remains(state, pid)
    assert f"no lab '{name}' runs" in natswarm("down", "--name", name, status=1)


def test_labs_run_side_by_side(open_lab: OpenLab):
    one, other = open_lab("a=home", "s=public", delay="1ms"), open_lab("a=kpn-nl", "s=public")
    assert one.device("s").ip == other.device("s").ip
    server = inside(one, "s", *PYTHON, UDP_SERVER)
    with server:
        assert server.stdout is not None
        assert server.stdout.readline()
        answer = output(one, "a", *PYTHON, UDP_CLIENT, one.device("s").ip, "5")
        assert answer == f"5 {one.device('a').external_ips[0]}"
        assert ask(other, "status")["counters"]["sent_count"] == 0
        server.kill()
    assert "several labs run" in natswarm("verify", status=1)


def test_a_device_that_loses_its_interface_harms_no_other(open_lab: OpenLab):
    state = open_lab("a=home", "b=kpn-nl", "s=public", delay="1ms")
    with inside(state, "s", *PYTHON, UDP_SERVER) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        output(state, "b", "ip", "link", "delete", "wan")
        answer = output(state, "a", *PYTHON, UDP_CLIENT, state.device("s").ip, "5")
        assert answer == f"5 {state.device('a').external_ips[0]}"
        server.kill()
    assert ask(state, "status")["devices"][1]["counters"]["overflow_count"] == 0


def start_and_forget() -> LabState:
    return start_lab(LabSettings(name=new_name(), devices=("a=kpn-nl", "b=home")))


def test_a_killed_lab_is_cleaned_up_by_its_watchdog():
    state = start_and_forget()
    program = inside(state, "b", "sh", "-c", "echo there; exec sleep 600")
    assert program.stdout is not None
    assert program.stdout.readline() == "there\n"
    os.kill(state.pid, signal.SIGKILL)
    wait_gone(state.pid, state.watchdog_pid)
    program.wait(TIMEOUT_S)
    assert_nothing_remains(state, program.pid)
    program.communicate()


def test_what_nobody_could_clean_up_is_cleaned_up_by_the_next_command():
    state = start_and_forget()
    os.kill(state.watchdog_pid, signal.SIGKILL)
    os.kill(state.pid, signal.SIGKILL)
    wait_gone(state.pid, state.watchdog_pid)
    assert f"no lab '{state.name}' runs" in natswarm("down", "--name", state.name, status=1)
    assert_nothing_remains(state)


def test_a_lab_in_the_foreground_ends_with_ctrl_c():
    name = new_name()
    command = [*NATSWARM, "lab", "up", "a=home", "--name", name, "--foreground", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as foreground:
        assert foreground.stdout is not None
        assert json.loads(foreground.stdout.readline())["name"] == name
        state = Registry().find(name)
        assert state.pid == foreground.pid
        foreground.send_signal(signal.SIGINT)
        assert foreground.wait(TIMEOUT_S) == 0
    assert_nothing_remains(state)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["up", "a=nonsense"], "no preset 'nonsense'; there are public"),
        (["up", "a=home", "--loss", "2"], "'2' is more than all of it"),
        (["up", "a=home", "--set", "a.colour=red"], "no knob 'colour'"),
        (["exec", "--name", "nobody", "a", "true"], "no lab 'nobody' runs"),
        (["capture", "--name", "nobody", "core"], "no lab 'nobody' runs"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(arguments: list[str], error: str):
    printed = natswarm(*arguments, status=1)
    assert error in printed.replace("\n", " ")
    assert "Traceback" not in printed


def test_a_program_or_a_device_that_is_not_there(shared: LabState):
    name = ["--name", shared.name]
    assert "no device 'x'; it has a, b, c, s" in natswarm("exec", *name, "x", "true", status=1)
    assert "no program 'nonsense'" in natswarm("exec", *name, "a", "nonsense", status=1)


def test_a_name_that_was_taken_meanwhile(monkeypatch: pytest.MonkeyPatch):
    """The check of `up` itself saw nobody; that of the lab's process does."""
    state = start_and_forget()
    try:
        monkeypatch.setattr(Registry, "check_free", lambda self, name: None)
        with pytest.raises(LabError, match="runs already"):
            start_lab(state.settings)
        assert len(Registry().find(state.name).devices) == 2
    finally:
        stop_lab(state)
