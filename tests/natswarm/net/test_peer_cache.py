from __future__ import annotations

import contextlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.discovery.cache import PEERS_MAX, CachedPeer, Sightings
from natswarm.errors import ConfigurationError
from natswarm.identity import PeerId
from natswarm.net.peer_cache import PeerCache


def cached(number: int) -> CachedPeer:
    sightings = tuple(
        Sightings(f"net{index}", Endpoint("203.0.113.7", 4000 + index), 1.5, 0.5, 9.0 - index, 1.0)
        for index in range(3)
    )
    return CachedPeer(PeerId(number.to_bytes(32, "big")), b"sealed", True, sightings)


def peers(cache: PeerCache) -> dict[PeerId, CachedPeer]:
    return {peer.peer_id: peer for peer in trio.run(cache.load)}


def save(cache: PeerCache, *numbers: int, forgotten: tuple[PeerId, ...] = ()) -> None:
    trio.run(cache.save, [cached(number) for number in numbers], forgotten)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "peers.sqlite3"


def test_what_was_saved_is_there_the_next_time(path):
    assert peers(PeerCache(path)) == {}
    save(PeerCache(path), 1, 2, 3)
    save(PeerCache(path), 2, forgotten=(cached(1).peer_id,))
    assert peers(PeerCache(path)) == {cached(n).peer_id: cached(n) for n in (2, 3)}
    assert path.stat().st_mode & 0o077 == 0
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "damage",
    ["text", "zeros in the middle", "a database of somebody else", "a later version", "cut"],
)
def test_a_damaged_file_is_set_aside(path, caplog, damage):
    save(PeerCache(path), *range(200))
    whole = path.read_bytes()
    match damage:
        case "text":
            path.write_text("not a database" * 1000)
        case "zeros in the middle":
            path.write_bytes(whole[:4096] + bytes(20_000) + whole[24_096:])
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case _:
            path.unlink()
            with contextlib.closing(sqlite3.connect(path)) as other:
                other.execute("CREATE TABLE peers (something)")
                if damage == "a later version":
                    other.execute(f"PRAGMA application_id = {0x6E737702}")
    damaged = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert peers(PeerCache(path)) == {}
    [record] = caplog.records
    assert "was damaged" in record.getMessage()
    assert f"{path}.damaged" in record.getMessage()
    if damage != "a database of somebody else":
        assert path.with_name(path.name + ".damaged").read_bytes()[4096:] == damaged[4096:]
    save(PeerCache(path), 1)
    assert list(peers(PeerCache(path))) == [cached(1).peer_id]


def test_damage_shows_while_saving_too(path, caplog):
    path.parent.mkdir()
    path.write_bytes(os.urandom(9000))
    save(PeerCache(path), 1)
    assert "was damaged" in caplog.text
    assert list(peers(PeerCache(path))) == [cached(1).peer_id]


def test_what_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file" / "peers.sqlite3", tmp_path):
        with pytest.raises(ConfigurationError, match=r"cannot use the peer cache .*--state"):
            save(PeerCache(bad), 1)


def test_rows_that_make_no_sense_are_left_out(path):
    save(PeerCache(path), 1)
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("INSERT INTO peers VALUES (x'00', NULL, 1)")
        other.execute("INSERT INTO peers VALUES (5, 'text', 'no')")
        other.execute(
            "INSERT INTO sightings VALUES (?, 'x', 'example.org:1', 1, 1, 1, 1)",
            (cached(1).peer_id.key,),
        )
        other.execute(
            "INSERT INTO sightings VALUES (?, 'y', '1.2.3.4:1', 'many', 1, 1, 1)",
            (cached(1).peer_id.key,),
        )
        other.commit()
    assert peers(PeerCache(path)) == {cached(1).peer_id: cached(1)}


def test_more_than_the_bound_is_not_read(path):
    save(PeerCache(path), *range(PEERS_MAX + 10))
    assert len(peers(PeerCache(path))) == PEERS_MAX


def test_two_processes_do_not_lose_what_the_other_saves(path):
    async def both() -> None:
        one, other = PeerCache(path), PeerCache(path)
        async with trio.open_nursery() as nursery:
            for number in range(20):
                cache = (one, other)[number % 2]
                nursery.start_soon(cache.save, [cached(number)], ())

    trio.run(both)
    assert len(peers(PeerCache(path))) == 20


WRITER = """
import sys, trio
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.natswarm.net.test_peer_cache import PeerCache, cached

async def main():
    cache = PeerCache(Path({path!r}))
    for number in range({start}, {start} + 150):  # three runs stay within PEERS_MAX
        await cache.save([cached(number), cached(0)], ())
        print(number, flush=True)
    await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_in_the_middle_it_has_all_that_was_saved(path):
    start = 1
    for run, count in enumerate((1, 7, 20)):
        code = WRITER.format(root=str(Path(__file__).parents[3]), path=str(path), start=start)
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        ) as process:
            for _ in range(count):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)  # whatever it is doing
            rest = process.stdout.read().split()
        last = int(rest[-1]) if rest else start + count - 1
        found = peers(PeerCache(path))
        missing = [n for n in range(1, last + 1) if found.get(cached(n).peer_id) != cached(n)]
        assert missing == [], f"run {run}: {missing} of {last}"
        start = last + 1
    assert not path.with_name(path.name + ".damaged").exists()
