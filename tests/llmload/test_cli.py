"""The `llmload` command: text on stdout, remarks on stderr, errors as one line, exit statuses."""

from __future__ import annotations

import io
import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest
import trio
from rich.console import Console

from llmload import cli, cli_mesh, cli_up
from llmload.engine.generate import generate_tokens
from llmload.engine.sampler import SamplingParameters
from llmload.engine.session import StageEngine
from llmload.errors import StageFailed
from llmload.model_folder import load_model
from llmload.swarm.route import NoRoute
from natswarm import (
    ConnectFailed,
    Identity,
    Internet,
    Invite,
    NodeConfig,
    VirtualNetwork,
    World,
    run_world,
)
from natswarm.net.control import ask_running_node

TIMEOUT_S = 30


@pytest.fixture
def llmload(monkeypatch, capsys, model_folder):
    """A function that runs the command; returns exit status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(command: str, *arguments: str, model: bool = True):
        options = ["--model", str(model_folder)] if model else []
        monkeypatch.setattr(sys, "argv", ["llmload", command, *options, *arguments])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def expected_text(model_folder, prompt: str, count: int, **sampling) -> str:
    model = load_model(model_folder)
    engine = StageEngine(model.config, model.weights)
    ids = model.tokenizer.encode(prompt)
    parameters = SamplingParameters(**sampling)
    tokens = list(generate_tokens([engine], ids, sampling=parameters, max_new_tokens=count))
    return model.tokenizer.decode(tokens)


# --- info --------------------------------------------------------------------------------------


def test_info_tells_the_hash_and_the_blocks(llmload, model_folder):
    model = load_model(model_folder)
    status, out, err = llmload("info")
    assert (status, err) == (0, "")
    assert model.content_hash in out
    assert re.search(r"^blocks +0-2$", out, re.MULTILINE)
    status, out, _ = llmload("info", "--json")
    facts = json.loads(out)
    assert facts["hash"] == model.content_hash
    assert facts["parameters"] == sum(values.size for values in model.weights.values())


def test_bundled_model_is_the_default(llmload):
    status, out, _ = llmload("info", "--json", model=False)
    assert status == 0
    assert json.loads(out)["n_layer"] == 6


# --- generate ----------------------------------------------------------------------------------


def test_text_goes_to_stdout_and_the_speed_to_stderr(llmload, model_folder):
    options = ("-n", "12", "--temperature", "0.9", "--top-k", "50", "--seed", "7")
    status, out, err = llmload("generate", "the mesh", *options)
    sampling = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}
    assert out == expected_text(model_folder, "the mesh", 12, **sampling) + "\n"
    assert status == 0
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s on this device\n", err)


def test_answer_as_json_can_be_repeated(llmload, model_folder):
    status, out, err = llmload("generate", "the mesh", "-n", "8", "--json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert answer["prompt"] == "the mesh"
    sampling = {name: answer[name] for name in ("temperature", "top_k", "top_p", "seed")}
    assert answer["text"] == expected_text(model_folder, "the mesh", 8, **sampling)
    _, again, _ = llmload(
        "generate", "the mesh", "-n", "8", "--json", "--seed", str(sampling["seed"])
    )
    assert json.loads(again)["text"] == answer["text"]


def test_text_ends_before_the_first_stop_string(llmload, model_folder):
    options = ("-n", "12", "--temperature", "0", "--stop", "never there", "--stop")
    whole = expected_text(model_folder, "the mesh", 12, temperature=0)
    # In the middle of the text, and over the borders of tokens.
    status, out, _ = llmload("generate", "the mesh", *options, whole[3:6])
    assert (status, out) == (0, whole[: whole.index(whole[3:6])] + "\n")
    _, out, _ = llmload("generate", "the mesh", *options, "not there either")
    assert out == whole + "\n"


def test_progress_may_hold_what_looks_like_markup(capsys):
    screen = cli.AnswerScreen(Console(force_terminal=True, stderr=True), quiet=False)
    with screen:
        screen.tell("tokens from [/bold] kim")
    assert "[/bold] kim" in capsys.readouterr().err


def test_prompt_comes_from_stdin(llmload, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the peers"))
    _, out, _ = llmload("generate", "-", "-n", "2", "--json")
    assert json.loads(out)["prompt"] == "the peers"


def test_terminal_gets_no_control_characters(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    screen = cli.AnswerScreen(cli.remarks, quiet=False)
    with screen:
        screen.add("a\x1b[2Jb\n\tc\r")
    assert screen.text == "a\x1b[2Jb\n\tc\r"
    assert capsys.readouterr().out == "a\ufffd[2Jb\n\tc\ufffd\n"


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "x", "--top-p", "0"),
        ("generate", "x", "--temperature", "-1"),
        ("generate", "x", "-n", "0"),
        ("generate", "x", "--stop", ""),
        ("generate", "x", "--seed", str(2**64)),
        ("generate", "x", "--local", "--join", "natswarm:x"),
        ("up", "--memory", "much"),
        ("up", "--memory", "0.001MB"),
        ("up", "--blocks", "2-1"),
        ("up", "--blocks", "0-3"),
        ("up", "--blocks", "0-1", "--port", "65536"),
        ("serve", "--host", "localhost"),
        ("serve", "--draft", "x"),
        ("generate", "x", "--draft", "x"),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2_and_no_traceback(llmload, arguments):
    status, out, err = llmload(*arguments)
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    assert "Usage" in err


def test_block_that_is_not_there_is_said_so(llmload):
    _, _, err = llmload("up", "--blocks", "0-3")
    assert "this model has blocks 0-2" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--join", "hello"), "an invite starts with 'natswarm:'"),
        (("generate", "x", "--join", "natswarm:x"), "the invite is damaged"),
        (("generate", "the mesh " * 100), "Shorten the prompt"),
        (
            ("info", "--model", "/nonexistent"),
            "/nonexistent: is neither a folder nor the name of a model",
        ),
    ],
)
def test_failure_is_one_line_and_status_1(llmload, arguments, message):
    status, out, err = llmload(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1


def test_failure_on_the_way_is_one_line(llmload, monkeypatch):
    async def fail(*_):
        raise StageFailed("the stage [bold]is[/] gone")

    monkeypatch.setattr(cli, "_generate_here", fail)
    assert llmload("generate", "x") == (1, "", "Error: the stage [bold]is[/] gone\n")


def test_help_names_every_command(llmload):
    status, out, _ = llmload("--help", model=False)
    assert status == 0
    for command in ("info", "generate", "up", "serve"):
        assert command in out
        assert llmload(command, "--help", model=False)[0] == 0


# --- up, and generate over the mesh ------------------------------------------------------------


async def test_peers_serve_what_generate_asks_for(
    nursery, model_folder, monkeypatch, capsys, tmp_path
):
    model = load_model(model_folder)
    said_in, said = trio.open_memory_channel(20)
    for module in (cli_mesh, cli_up):
        monkeypatch.setattr(module, "print_json", said_in.send_nowait)
    internet = Internet(World(seed=3))
    asker = VirtualNetwork(internet.add_host("asker", "linux-home"))
    monkeypatch.setattr(cli_mesh, "NodeConfig", partial(NodeConfig, network=asker, seed=9))

    hosts = {}

    def serve(name: str, blocks: range, invites: list[Invite]) -> None:
        hosts[name] = internet.add_host(name, "public")
        config = NodeConfig(
            identity=Identity(name.encode().ljust(32, b".")),
            network=VirtualNetwork(hosts[name]),
            name=name,
            seed=1,
            on_event=partial(cli_mesh.show_event, True),
        )

        def open_block(block: int) -> StageEngine:
            return StageEngine(model.config, model.weights, range(block, block + 1))

        nursery.start_soon(
            *(cli_up._serve, tmp_path / name, config, model.config, model.content_hash, open_block),
            *([blocks], cli_up.DEFAULT_LIMITS, invites, True),
        )

    async def heard(event: str) -> dict:
        while True:
            if (one := await said.receive())["event"] == event:
                return one

    with trio.fail_after(TIMEOUT_S):
        async with run_world(internet.world):
            serve("first", range(1), [])
            serving = await heard("serving")
            assert serving["service"].endswith("/0-0")
            invite = Invite.parse(serving["invite"])

            prompt_ids = model.tokenizer.encode("the mesh")
            generate = partial(
                cli._generate_on_peers,
                model,
                prompt_ids,
                SamplingParameters(temperature=0),
                10,
            )
            with pytest.raises(NoRoute, match="serves block 1-2"):
                await generate(cli.AnswerScreen(cli.remarks, quiet=False), [invite], "0.0.0.0")

            serve("second", range(1, 3), [invite])
            assert (await heard("serving"))["service"].endswith("/1-2")
            screen = cli.AnswerScreen(cli.remarks, quiet=False)
            facts = await generate(screen, [invite], "0.0.0.0")
            assert screen.text == expected_text(model_folder, "the mesh", 10, temperature=0)
            out, err = capsys.readouterr()
            assert out == screen.text + "\n"
            assert "tokens/s" in err
            # Where the stages are, as far as this node knows; it has connected to the first.
            assert [stage["blocks"] for stage in facts["route"]] == ["0", "1-2"]
            first = facts["route"][0]
            assert first["nat"].startswith("no NAT")
            network = ipaddress.ip_network(first["network"])
            assert ipaddress.ip_address(hosts["first"].ip) in network
            assert f"{first['peer_id'][:8]} first, {first['network']} no NAT (blocks 0) -> " in err

            whole, stop = screen.text, screen.text[2:5]
            screen = cli.AnswerScreen(cli.remarks, quiet=True)
            await generate(screen, [invite], "0.0.0.0", stop=[stop])
            assert screen.text == whole[: whole.index(stop)]
            nursery.cancel_scope.cancel()


async def test_lost_mesh_is_joined_again(nursery, monkeypatch):
    monkeypatch.setattr(cli_mesh, "REJOIN_INTERVAL_S", 0)
    tried_often = trio.Event()
    tries = []

    class LonelyNode:
        def peers(self):
            return []

        async def rejoin(self):
            tries.append("remembered")

        async def connect(self, invite):
            await trio.lowlevel.checkpoint()
            tries.append(invite)
            if len(tries) == 6:
                tried_often.set()
            raise ConnectFailed("nobody is there")

    nursery.start_soon(cli_mesh.stay_joined, LonelyNode(), ["one", "two"])
    with trio.fail_after(TIMEOUT_S):
        await tried_often.wait()
    assert tries[:6] == ["remembered", "one", "two"] * 2
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_serving_in_order(model_folder, tmp_path, interrupt):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-c", "from llmload.cli import main; main()"),
            *("up", "--blocks", "0-1", "--bind", "127.0.0.1", "--model", str(model_folder)),
            *("--state", str(tmp_path / "state"), "--no-lan", "--no-gateway", "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        serving = json.loads(process.stdout.readline())
        assert serving["event"] == "serving"
        status = trio.run(ask_running_node, tmp_path / "state", {"do": "status"})
        assert status["peer_id"] == serving["peer_id"]
        process.send_signal(interrupt)
        _, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, err) == (130, "")
    finally:
        process.kill()
        process.wait()
