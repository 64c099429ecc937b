"""The command line: help, results, and one line for whatever is wrong."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from rich.console import Console

from natswarm import (
    ConfigurationError,
    Endpoint,
    Identity,
    Invite,
    InviteError,
    NodeConfig,
    NodeRecord,
    PeerNotFound,
    RequestRefused,
    VirtualNetwork,
)
from natswarm import cli as command_line
from natswarm.cli.options import with_node
from natswarm.cli.show import event_as_text, show_qr
from natswarm.cli.status_view import status_view
from natswarm.device import DhtOptions, device_config
from natswarm.device.answers import Answers
from natswarm.nat.profile import NatProfile
from natswarm.net.notes import Notes
from natswarm.puncture.strategy import Strategy
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

# `natswarm.cli.app` is the module's name and, inside the package, that of the app in it.
app_module = importlib.import_module("natswarm.cli.app")
ASKING = ["status", "peers", "invite", "join", "find"]
COMMANDS = ["id", "up", "inspect", "connect", "recipes", "swarm", *ASKING]
MAIN = [sys.executable, "-c", "from natswarm.cli import main; main()"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`status, out, err = run("id", ...)`; {state} stands for a folder of the test's own."""

    def run(*arguments: str) -> tuple[int, str, str]:
        arguments = tuple(each.format(state=tmp_path / "state") for each in arguments)
        monkeypatch.setattr(sys, "argv", ["natswarm", *arguments])
        with pytest.raises(SystemExit) as caught:
            command_line.run_command(app_module.app)
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=str)
def test_help(run, command):
    status, out, err = run(*command, "--help")
    assert (status, err) == (0, "")
    assert "Usage:" in out
    assert all(word in out for word in (command or COMMANDS))


def test_the_identity_stays(run):
    status, first, _ = run("id", "--state", "{state}")
    assert status == 0
    assert run("id", "--state", "{state}") == (0, first, "")


def test_recipes(run, tmp_path):
    assert "Nothing was learned yet" in run("recipes", "show", "--state", "{state}")[1]
    notes = Notes(tmp_path / "state")
    notes.recipes.note("here x there", [Strategy.TFTP_HELPER], None)
    trio.run(notes.save)
    status, out, err = run("recipes", "show", "--state", "{state}")
    assert (status, err) == (0, "")
    assert "tftp-helper" in out
    exported = json.loads(run("recipes", "export", "--state", "{state}")[1])
    assert exported["pairs"]["here x there"]["tftp-helper"] == {"opened": 0.0, "failed": 1.0}
    assert run("recipes", "clear", "--state", "{state}")[0] == 0
    assert json.loads(run("recipes", "export", "--state", "{state}")[1]) == {"pairs": {}}


def invite_to(swarm: SwarmKey, **more) -> Invite:
    key = b"" if swarm.is_open else swarm.secret
    record = NodeRecord(Identity(b"m" * 32).peer_id, time.time(), "hub", NatProfile())
    return Invite.of(record, Identity(b"m" * 32), swarm_key=key, **more)


def test_a_private_swarm_is_made_and_joined(run, tmp_path):
    assert run("swarm", "show", "--state", "{state}") == (0, "the open swarm\n", "")
    status, out, err = run("swarm", "new", "--state", "{state}")
    swarm = SwarmKey.load(tmp_path / "state" / "swarm")
    assert (status, err) == (0, "")
    assert str(swarm) in out
    assert swarm.secret.hex() not in out
    assert run("swarm", "show", "--state", "{state}")[1] == f"{swarm}\n"
    assert "is in the private swarm" in run("swarm", "new", "--state", "{state}")[2]
    config = device_config(tmp_path / "state")
    assert config.swarm == swarm
    # A new folder takes the swarm of its first invite, and keeps it.
    for invites in ([invite_to(swarm)], [], [invite_to(swarm)]):
        assert device_config(tmp_path / "guest", invites=invites).swarm == swarm
    with pytest.raises(InviteError, match=r"and this node is in the private swarm"):
        device_config(tmp_path / "guest", invites=[invite_to(OPEN_SWARM)])


def test_a_folder_of_the_open_swarm_stays_there(run, tmp_path):
    run("id", "--state", "{state}")
    assert "which knows its PeerId" in run("swarm", "new", "--state", "{state}")[2]
    private = invite_to(SwarmKey.generate())
    for command in (["up", "--join"], ["inspect", "--join"], ["connect"]):
        status, _, err = run(*command, str(private), "--state", "{state}")
        assert (status, err.count("\n")) == (1, 1)
        assert "and this node is in the open swarm" in err
    assert device_config(tmp_path / "state", invites=[invite_to(OPEN_SWARM)]).swarm.is_open


def test_an_old_invite_binds_no_new_folder(tmp_path):
    old = replace(invite_to(SwarmKey.generate()), expires_at_s=0.0)
    with pytest.raises(InviteError, match="expired"):
        device_config(tmp_path / "state", invites=[old])
    assert device_config(tmp_path / "state").swarm.is_open


def test_the_dht_starts_from_what_the_user_has(tmp_path):
    with pytest.raises(ConfigurationError, match="no mainline node is known from last time"):
        device_config(tmp_path, dht=DhtOptions(is_wanted=True))
    assert device_config(tmp_path).mainline is None
    notes = Notes(tmp_path)
    known = (Endpoint("203.0.113.5", 6881), Endpoint("2001:db8::5", 6881))
    notes.mainline.note(known)
    trio.run(notes.save)
    config = device_config(tmp_path, dht=DhtOptions(is_wanted=True), publishes=True)
    assert (config.mainline.nodes, config.mainline.publishes) == (known, True)
    config = device_config(tmp_path, dht=DhtOptions(nodes=["198.51.100.7:1"]))
    assert config.mainline.nodes == (Endpoint("198.51.100.7", 1), *known)
    assert not config.mainline.publishes


def test_the_qr_code_fits_or_says_so(monkeypatch, capsys):
    invite = Invite.of(
        NodeRecord(Identity(b"m" * 32).peer_id, 0.0, "hub", NatProfile()), Identity(b"m" * 32)
    )
    monkeypatch.setenv("COLUMNS", "80")
    show_qr(invite)
    code = capsys.readouterr().out.splitlines()
    widths = {len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in code}
    assert len(widths) == 1
    assert max(widths) <= 80
    monkeypatch.setenv("COLUMNS", "20")
    show_qr(invite)
    assert "columns, this terminal has 20" in capsys.readouterr().out


def test_inspect_alone(run):
    options = ["--state", "{state}", "--bind", "127.0.0.1", "--skip", "gateway", "--skip", "lease"]
    status, out, err = run("inspect", *options, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["observers"] == []
    assert report["nat"]["mapping"]["evidence"] == "unknown"
    status, out, err = run("inspect", *options)
    assert (status, err) == (0, "")
    assert "not known" in out
    assert "Nobody was asked" in out


def test_a_peer_that_cannot_be_asked_is_a_warning(run):
    nowhere = NodeRecord(Identity(b"m" * 32).peer_id, 0.0, "hub", NatProfile())
    invite = str(Invite.of(nowhere, Identity(b"m" * 32)))
    options = ["--state", "{state}", "--only", "behaviour", "--quick", "--json"]
    status, out, err = run("inspect", "--join", invite, *options)
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert [each for each in report["warnings"] if each.startswith("hub could not be asked: ")]
    assert report["tests"]["behaviour"]["state"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["connect", "abc"], "is not a PeerId"),
        (["connect", "a" * 52, "--no-gateway"], "none of our 0 neighbours"),
        (["connect", "natswarm:abc"], "the invite is damaged"),
        (["connect", "natswarm:abc\x1b[31m\nand more"], "the invite is damaged"),
        (["up", "--join", "http://example"], "an invite starts with"),
        (["inspect", "--join", "natswarm:abc"], "the invite is damaged"),
        (["inspect", "--interface", "nosuch0"], "this machine has no interface 'nosuch0'; it has"),
        (["inspect", "--only", "weather"], "there is no test 'weather'; there are gateway, lease"),
        (["inspect", "--skip", "weather"], "there is no test 'weather'"),
        (["inspect", "--quick", "--lifetimes"], "choose one"),
        (["inspect", "--quick", "--only", "lifetimes"], "choose one"),
        (["inspect", "--only", "path", "--skip", "path"], "every test is left out"),
        (["inspect", "--watch", "--export", "x"], "choose one"),
        (["inspect", "--show", "/nonexistent/file"], "cannot read /nonexistent/file"),
        (["inspect", "--only", "path", "--export", "/nonexistent/file"], "cannot write"),
        (["up", "--name", "x" * 65], "at most 64"),
        (["up", "--name", "bell\a"], "printable"),
        (["up", "--expires", "7w"], "'7w' is not a duration; write 90s, 30m, 12h or 7d"),
        (["up", "--expires", "0d"], "is not a duration"),
        (["up", "--links", "3"], "links_max is 0 or 16 to 128, not 3"),
        (["connect", "a" * 52, "--by-clock", "--no-gateway"], "the peer cache knows nothing of a"),
        (["status"], "no node runs with the state folder"),
        (["invite", "--expires", "1"], "is not a duration"),
        (["join", "natswarm:abc"], "the invite is damaged"),
        (["find", "abc"], "is not a PeerId"),
        (["inspect", "--bind", "localhost"], "names are not looked up"),
        (["inspect", "--bind", "203.0.113.77"], "no interface of this machine"),
    ],
)  # fmt: skip
def test_what_fails_is_one_line_and_status_1(run, arguments, text):
    status, _, err = run(*arguments, "--state", "{state}")
    assert status == 1
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    assert any(each in err for each in text.split("|"))


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["connect"], ["up", "--port", "65536"], ["up", "--port", "x"], ["id", "--nope"]],
    ids=str,
)
def test_a_wrong_call_is_status_2(run, arguments):
    status, _, err = run(*arguments)
    assert status == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("content", ["", "garbage", "natswarm-identity-1 00", "\xff\xfe", None])
def test_a_damaged_identity_is_said(run, tmp_path, content):
    path = tmp_path / "state" / "identity"
    path.parent.mkdir()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode("latin-1"))
        path.chmod(0o600)
    status, out, err = run("id", "--state", "{state}")
    assert (status, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


def test_a_plugin_that_cannot_be_loaded_is_left_out(run, monkeypatch, capsys):
    def load():
        raise ImportError("no module named [onnx]")

    broken = types.SimpleNamespace(name="demo", load=load)
    monkeypatch.setattr(command_line, "entry_points", lambda group: [broken])
    monkeypatch.setattr(sys, "argv", ["natswarm", "--help"])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    out, err = capsys.readouterr()
    assert not caught.value.code
    assert "inspect" in out
    assert err == "natswarm demo is not there: no module named [onnx]\n"


def test_a_plugin_is_loaded_by_those_alone_who_want_it(run, monkeypatch, capsys):
    def load():
        raise AssertionError("it takes a second")

    monkeypatch.setattr(
        command_line, "entry_points", lambda group: [types.SimpleNamespace(name="demo", load=load)]
    )
    monkeypatch.setattr(sys, "argv", ["natswarm", "recipes", "--help"])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert not caught.value.code
    monkeypatch.setattr(sys, "argv", ["natswarm", "demo"])
    with pytest.raises(AssertionError, match="it takes a second"):
        command_line.main()


def test_a_profile_is_handed_over(run, tmp_path):
    options = ["--state", "{state}", "--bind", "127.0.0.1", "--only", "behaviour"]
    path = tmp_path / "my.profile"
    status, _, err = run("inspect", *options, "--export", str(path))
    assert (status, err) == (0, "")
    _, peer_id, _ = run("id", "--state", "{state}")
    status, out, err = run("inspect", "--show", str(path))
    assert (status, err) == (0, "")
    assert peer_id.strip() in out
    status, out, err = run("inspect", "--show", str(path), "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["peer_id"] == peer_id.strip()
    text = path.read_text()
    for bad in (text[:-10], text.replace("A", "B"), "", "natswarm:abc", "\xff"):
        path.write_text(bad, "latin-1")
        status, out, err = run("inspect", "--show", str(path))
        assert (status, out) == (1, "")
        assert err.startswith(f"Error: {path} holds no signed profile: ")
        assert err.count("\n") == 1


def test_costs_are_listed_without_doing_anything(run, tmp_path):
    status, out, err = run("inspect", "--costs", "--state", "{state}")
    assert (status, err) == (0, "")
    assert not (tmp_path / "state").exists()
    listed = {line.split()[0] for line in out.splitlines()}
    assert {"gateway", "lease", "path", "behaviour"} <= listed
    _, out, _ = run("inspect", "--costs", "--json")
    assert {each["test"] for each in json.loads(out)["tests"]} <= listed


WATCH = ["inspect", "--bind", "127.0.0.1", "--only", "behaviour"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_watch_prints_a_report_a_line_and_ends_when_told(tmp_path, stop):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*MAIN, *WATCH, "--watch", "--every", "1", "--json", "--state", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(stop)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (128 + stop, "")
    assert first["version"] == second["version"] == 1
    assert first["at"] < second["at"]
    assert second["changed"] == []


@pytest.mark.skipif(os.name != "posix", reason="terminals")
def test_progress_is_for_terminals(tmp_path):
    """What runs is shown on a terminal; the report alone goes to standard output."""
    import pty

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"}
    command = [*MAIN, *WATCH[:3], "--only", "path", "--only", "behaviour", "--state", str(tmp_path)]
    ours, theirs = pty.openpty()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=60
    )
    os.close(theirs)
    shown = os.read(ours, 65_536).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "path" in shown
    assert "behaviour" in shown
    assert b"Interfaces" in done.stdout
    assert b"\x1b" not in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminate"]
)
def test_up_prints_its_invite_and_ends_when_told(tmp_path, stop, status):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*MAIN, "up", "--json", "--bind", "127.0.0.1", "--state", str(tmp_path / "state")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(stop)
        _, err = process.communicate(timeout=20)
    assert [line["event"] for line in lines] == ["profile", "up"]
    assert str(Invite.parse(lines[1]["invite"]).record.peer_id) == lines[1]["peer_id"]
    assert (process.returncode, err) == (status, "")


@pytest.mark.skipif(os.name != "posix", reason="terminals")
def test_other_commands_ask_the_running_node(run, tmp_path):
    """On a terminal, where the peers stay in view."""
    import pty

    folder = tmp_path / "state"
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm",
        "COLUMNS": "200",
    }  # fmt: skip
    options = ["--bind", "127.0.0.1", "--no-lan", "--name", "hub"]
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:  # to the end, or the node would wait for its terminal
        with contextlib.suppress(OSError):
            while True:
                shown.extend(os.read(ours, 65_536))

    reader = threading.Thread(target=read)
    with subprocess.Popen(
        [*MAIN, "up", *options, "--state", str(folder)], stdout=theirs, env=environment
    ) as process:
        os.close(theirs)
        reader.start()
        while b"nobody is connected" not in shown:
            assert process.poll() is None
            time.sleep(0.05)
        assert stat.S_IMODE((folder / "control.sock").stat().st_mode) == 0o600
        status, out, err = run("status", "--state", "{state}", "--json")
        found = json.loads(out)
        assert (status, err, found["name"], found["peers"]) == (0, "", "hub", [])
        assert found["routing"] == {"links": 0, "buckets": {}, "swarm_size": 1.0}
        assert "nobody is connected" in run("status", "--state", "{state}")[1]
        assert "Nobody is connected" in run("peers", "--state", "{state}")[1]
        out = run("invite", "--state", "{state}", "--expires", "1h", "--one-time")[1]
        assert Invite.parse(out).ticket
        status, _, err = run("join", out.strip(), "--state", "{state}")
        assert (status, err[:27]) == (1, "Error: that is this node it")
        status, _, err = run("find", "a" * 52, "--state", "{state}")
        assert (status, err[:32]) == (1, "Error: none of our 0 neighbours ")
        for second in (("up", *options), ("inspect", "--bind", "127.0.0.1")):
            status, _, err = run(*second, "--state", "{state}")
            assert status == 1
            assert "a node runs already with the state folder" in err
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
    reader.join()
    os.close(ours)
    assert process.returncode == 130
    assert not (folder / "control.sock").exists()


async def test_what_is_said_of_a_running_node(open_swarm, autojump_clock, capsys):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("[bold]a", "linux-home")
        answers = Answers(a)
        found = json.loads(json.dumps(await answers.answer({"do": "status"})))
        assert len(found["peers"]) == 2
        assert found["nat"]["mapping"] == "EIM"
        joined = found["peers"][0]
        assert (joined["reachable"], joined["nat"]) == (True, "no NAT, firewall not known")
        assert joined["rtt_ms"] > 0
        assert joined["sent_bytes"] > 0
        made = await answers.answer({"do": "invite", "lifetime_s": 60.0, "one_time": False})
        assert Invite.parse(made["invite"]).record.peer_id == a.peer_id
        other = await swarm.nodes["obs0"].invite()
        again = await answers.answer({"do": "join", "invite": str(other)})
        assert again["peer_id"] == joined["peer_id"]
        assert (await answers.answer({"do": "find", "peer": again["peer_id"]})) == again
        for question in ({}, {"do": "fly"}, {"do": "find", "peer": 7}):
            with pytest.raises(RequestRefused, match="does not know"):
                await answers.answer(question)
        screen = Console(width=120)
        screen.print(status_view(found, peers_max=1))
        assert "[bold]a" in (shown := capsys.readouterr().out)
        assert "... and 1 more" in shown
        assert "obs0" in shown


def config_on(swarm, name: str, kind: str, *, as_json: bool) -> NodeConfig:
    swarm.hosts[name] = swarm.internet.add_host(name, kind)
    return NodeConfig(
        identity=swarm.identity(name),
        network=VirtualNetwork(swarm.hosts[name]),
        name="[bold]not markup[/]",
        on_event=app_module._event_printer(as_json),
        seed=1,
    )


@pytest.mark.parametrize("as_json", [True, False])
async def test_what_a_command_prints_of_a_puncture(
    open_swarm, autojump_clock, capsys, caplog, tmp_path, as_json
):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        await swarm.add_inspected("b", "kpn-nl")
        invites = [await node.invite() for node in swarm.observers()]

        async def body(node):
            await app_module._meet(node, invites)
            peer = await node.connect(swarm.nodes["b"].peer_id)
            await peer.aclose()
            await trio.sleep(1)
            with pytest.raises(PeerNotFound):
                await node.connect(swarm.identity("nobody").peer_id)

        capsys.readouterr()
        config = config_on(swarm, "phone", "linux-home", as_json=as_json)
        await with_node(tmp_path / "state", config, body)
        out, err = capsys.readouterr()
        assert err == ""
        assert [record for record in caplog.records if record.name.startswith("natswarm")] == []
        if as_json:
            events = [json.loads(line) for line in out.splitlines()]
            kinds = [event["event"] for event in events]
            assert kinds.count("puncture") == kinds.count("punctured") == 3
            assert kinds.count("connected") == kinds.count("lost") == 3
            assert all(event["ok"] for event in events if event["event"] == "punctured")
            assert events[kinds.index("profile")]["mapping"] == "EIM"
        else:
            for word in ("NAT", "puncture", "open", "connected", "lost", "one-sided-birthday"):
                assert word in out
        # Names of strangers are not markup.
        peer = swarm.peer("obs0", "b")
        peer.record = swarm.nodes["b"].record()
        for event in swarm.events["b"]:
            assert event_as_text(event)
