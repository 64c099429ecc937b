"""Calls between nodes: the page that describes them, and a peer that is cut off."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio

from natswarm import CallTimedOut, Message, Method, PeerUnreachable, ProtocolUnknown, RequestRefused

PAGE = Path(__file__).parents[2] / "docs" / "calls.md"


class Ask(Message, frozen=True):
    pass


ASK = Method("test/ask/1", (Ask,), (Ask,))


async def test_the_example_of_the_page(open_swarm, autojump_clock, capsys):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    example: dict[str, object] = {}
    exec(code[1].replace("from __future__", "#"), example)
    async with open_swarm() as swarm:
        one, other = await swarm.add_observers()
        example["serve"](other)
        peer = swarm.peer("obs0", "obs1")
        await example["ask"](peer)
        with pytest.raises(RequestRefused, match="nothing to write large") as caught:
            await peer.call(example["UPPER"], example["Prompt"](""))
        assert caught.value.code == "empty"
        with pytest.raises(ProtocolUnknown):
            await peer.call(ASK, Ask())
        assert one.peers() == [peer]
    assert capsys.readouterr().out.splitlines()[1:] == [
        "Word(text='HELLO')",
        "one b'raw bytes, if you like'",
        "two b'raw bytes, if you like'",
    ]


async def test_a_peer_that_is_cut_off_fails_calls_within_seconds(open_swarm, autojump_clock):
    async def stall(_request, _peer):
        await trio.sleep_forever()

    async with open_swarm() as swarm:
        await swarm.add_observers()
        await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "kpn-nl")
        b.answer(ASK, stall)
        peer = await swarm.nodes["a"].connect(b.peer_id)
        mend = swarm.cut("b")
        started_at = trio.current_time()
        with pytest.raises(PeerUnreachable):
            await peer.call(ASK, Ask(), timeout_s=60)
        assert trio.current_time() - started_at < 3.5
        with pytest.raises(PeerUnreachable):
            await peer.call(ASK, Ask(), timeout_s=60)
        assert trio.current_time() - started_at < 3.5
        # A patient call is carried out once the path is back.
        mend()
        with pytest.raises(CallTimedOut):
            await peer.call(ASK, Ask(), timeout_s=30, patience_s=30)
