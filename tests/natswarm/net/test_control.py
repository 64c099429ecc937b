"""The door of a running node: who may knock, what comes back, what a killed node leaves."""

from __future__ import annotations

import json
import os
import socket
import stat

import pytest
import trio

from natswarm.errors import ConfigurationError, PeerNotFound, RequestRefused
from natswarm.net.control import (
    PATH_BYTES_MAX,
    REQUEST_BYTES_MAX,
    SOCKET_NAME,
    ask_running_node,
    open_control,
)

pytestmark = pytest.mark.skipif(
    not hasattr(socket, "AF_UNIX"), reason="this system has no sockets in the file system"
)


async def echo(question):
    await trio.lowlevel.checkpoint()
    return question


async def test_a_question_is_answered_to_its_user_alone(tmp_path):
    folder = tmp_path / "not there yet"
    async with open_control(folder, echo):
        assert await ask_running_node(folder, {"do": "x"}) == {"do": "x"}
        assert stat.S_IMODE((folder / SOCKET_NAME).stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not (folder / SOCKET_NAME).exists()
    with pytest.raises(ConfigurationError, match="no node runs"):
        await ask_running_node(folder, {})


async def test_what_fails_is_said_and_the_node_goes_on(tmp_path, caplog):
    async def answer(question):
        await trio.lowlevel.checkpoint()
        if question["do"] == "bug":
            raise KeyError("oh")
        raise PeerNotFound("nobody knows them")

    async with open_control(tmp_path, answer):
        with pytest.raises(RequestRefused, match="nobody knows them"):
            await ask_running_node(tmp_path, {"do": "find"})
        with pytest.raises(RequestRefused, match="failed inside the node: KeyError"):
            await ask_running_node(tmp_path, {"do": "bug"})
        with pytest.raises(RequestRefused, match="nobody knows them"):
            await ask_running_node(tmp_path, {"do": "find"})
    assert [each.getMessage() for each in caplog.records] == ["the answer to bug failed"]


@pytest.mark.parametrize(
    "line",
    [b"\n", b"[]\n", b"\xff\n", b"[" * 10_000 + b"\n", b"x" * (REQUEST_BYTES_MAX + 1)],
    ids=len,
)
async def test_garbage_is_refused(tmp_path, line):
    async with open_control(tmp_path, echo):
        async with await trio.open_unix_socket(tmp_path / SOCKET_NAME) as stream:
            await stream.send_all(line)
            reply = b"".join([chunk async for chunk in stream])
        assert json.loads(reply)["error"].startswith("not a question: ")


async def test_a_question_is_given_up_with_its_asker(tmp_path):
    begun, given_up = trio.Event(), trio.Event()

    async def answer(_question):
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            given_up.set()

    async with open_control(tmp_path, answer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_running_node, tmp_path, {"do": "find"})
            await begun.wait()
            nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await given_up.wait()


async def test_one_node_a_folder_and_a_killed_one_is_no_hindrance(tmp_path):
    async with open_control(tmp_path, echo):
        with pytest.raises(ConfigurationError, match="a node runs already"):
            async with open_control(tmp_path, echo):
                pass
        assert await ask_running_node(tmp_path, {"do": "x"}) == {"do": "x"}
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(os.fspath(tmp_path / SOCKET_NAME))
    async with open_control(tmp_path, echo):
        assert await ask_running_node(tmp_path, {"do": "x"}) == {"do": "x"}


async def test_a_path_that_the_system_does_not_allow_is_said(tmp_path):
    folder = tmp_path / ("x" * PATH_BYTES_MAX)
    with pytest.raises(ConfigurationError, match="nearer to the root"):
        async with open_control(folder, echo):
            pass
    with pytest.raises(ConfigurationError, match="nearer to the root"):
        await ask_running_node(folder, {})
