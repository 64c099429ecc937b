"""The store of records: nothing that was added is lost, whatever happens; private stays private."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmload.data.record import FeedbackRecord, TextRecord, sign_record
from llmload.data.store import Added, RecordStore
from llmload.errors import StoreFailed
from natswarm import Identity

ME, OTHER = Identity(bytes(range(32))), Identity(bytes(32))
TEXT = "It is not the strongest of the peers that survives, but the one that punctures best. " * 3
# Together 50.
CRASHES = {"kill": 40, "full": 10}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "records.sqlite"


@pytest.fixture
def store(path):
    return RecordStore(path)


def text(words, licence="CC0-1.0", identity=ME):
    return sign_record(identity, TextRecord(words, licence))


def different(count, identity=ME):
    """Texts that have hardly anything in common."""
    return [
        text(" ".join(f"{number}{word}" for word in range(40)), identity=identity)
        for number in range(count)
    ]


def ids(records):
    return [each.signed.record_id for each in records]


def test_what_was_added_is_there_in_order(store):
    records = different(3)
    assert store.add(records) == [Added.TAKEN] * 3
    found = store.records()
    assert [each.signed for each in found] == records
    assert [(each.giver, each.is_shared) for each in found] == [(None, False)] * 3
    assert store.records(after=found[0].number) == found[1:]
    assert store.find(records[2].record_id[:4]) == found[2:]


def test_only_its_user_may_read_it(store, path):
    store.add([text("a")])
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("other", "result"),
    [
        (text(TEXT), Added.REPEATED),
        (text(TEXT, identity=OTHER), Added.REPEATED),
        (text("  " + TEXT.upper(), "MIT"), Added.REPEATED),
        (text(TEXT + " So it is said."), Added.NEAR),
        (text(TEXT[: len(TEXT) // 3]), Added.NEAR),
        (text("Something else entirely was written here."), Added.TAKEN),
        (sign_record(ME, FeedbackRecord("", TEXT, 1)), Added.TAKEN),
    ],
)
def test_what_is_there_is_not_added_again_nor_after_it_was_forgotten(store, other, result):
    store.add([text(TEXT)])
    assert store.add([other]) == [result]
    store.forget([text(TEXT).record_id])
    assert text(TEXT).record_id not in ids(store.records())
    assert store.add([text(TEXT), other]) == [
        Added.REPEATED,
        Added.REPEATED if result is Added.TAKEN else result,
    ]


def test_marks_on_one_answer_are_kept_for_each_author(store):
    marks = [
        sign_record(identity, FeedbackRecord("ask", TEXT, mark))
        for identity, mark in ((ME, 1), (OTHER, 1), (ME, -1), (ME, 1))
    ]
    assert store.add(marks) == [Added.TAKEN, Added.TAKEN, Added.TAKEN, Added.REPEATED]


def test_nothing_of_a_forgotten_text_is_left_on_the_disk(store, path):
    secret = text("The secret is 4711. " + TEXT, licence="")
    store.add([secret])
    store.forget([secret.record_id])
    for file in path.parent.iterdir():
        assert b"secret is 4711" not in file.read_bytes(), file
    assert store.told_ids() == []


def test_only_what_is_marked_is_shared_and_needs_a_licence(store):
    public, private, bare = text("one one one"), text("two two two"), text("three three", "")
    with pytest.raises(ValueError, match="licence"):
        store.add([bare], is_shared=True)
    store.add([public], is_shared=True)
    store.add([private, bare])
    assert store.shared_ids() == [public.record_id]
    with pytest.raises(ValueError, match="licence"):
        store.share({private.record_id: private, bare.record_id: bare})
    assert store.shared_ids() == [public.record_id]
    licensed = text("three three", "MIT")
    store.share({private.record_id: private, bare.record_id: licensed})
    assert set(store.shared_ids()) == {public.record_id, private.record_id, licensed.record_id}
    store.forget([public.record_id])
    assert public.record_id not in store.shared_ids()


def test_nobody_can_find_out_by_guessing_whether_a_private_text_is_here(store):
    """A guess is refused as what it is; to the peer it looks like any that was taken."""
    private, *shared = different(3)
    store.add([private])
    store.add(shared[:1], is_shared=True)
    guess, other = text(private.record.text, identity=OTHER), shared[1]
    assert store.add([guess, other], giver=OTHER.peer_id, is_shared=True) == [
        Added.REPEATED,
        Added.TAKEN,
    ]
    assert set(store.told_ids()) == {guess.record_id, other.record_id, shared[0].record_id}
    # What was shared once is told even when it is gone, or others would give it again.
    store.forget([shared[0].record_id])
    assert shared[0].record_id in store.told_ids()
    assert shared[0].record_id not in store.shared_ids()


def test_others_fill_only_their_room(path):
    records = different(3, OTHER)
    store = RecordStore(path, received_bytes_max=2 * len(records[0].sealed))
    results = store.add(records, giver=OTHER.peer_id, is_shared=True)
    assert results == [Added.TAKEN, Added.TAKEN, Added.FULL]
    assert store.received_bytes(OTHER.peer_id) == sum(len(each.sealed) for each in records[:2])
    assert store.received_bytes(ME.peer_id) == 0
    assert store.add([text("Ours always has room.")]) == [Added.TAKEN]


def test_a_file_of_something_else_is_not_touched(store, path):
    path.parent.mkdir()
    path.write_text("no database at all")
    with pytest.raises(StoreFailed, match="damaged"):
        store.records()
    assert path.read_text() == "no database at all"
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(StoreFailed, match="no store of records"):
        store.records()


def test_a_damaged_record_is_an_error_not_a_text(store, path):
    store.add([text(TEXT)])
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE records SET sealed = substr(sealed, 1, 120)")
    connection.close()
    with pytest.raises(StoreFailed, match="record 1 is damaged"):
        store.records()


def test_two_may_open_a_new_store_at_once(path):
    with ThreadPoolExecutor(8) as pool:
        added = pool.map(
            lambda number: RecordStore(path).add([text(f"{number}{number} is one of eight")]),
            range(8),
        )
        assert {result for results in added for result in results} == {Added.TAKEN}
    assert len(RecordStore(path).records()) == 8


# What a crash is: a child adds records one by one, and is killed some random time after one that
# the parent draws, or meets the end of its disk at a byte that it draws. What it has told of must
# be there.
CRASHER = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
from llmload.data.record import TextRecord, sign_record
from llmload.data.store import RecordStore
from llmload.errors import StoreFailed
from natswarm import Identity

folder, mode, crashes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rng, me = random.Random(int(sys.argv[4])), Identity(bytes(32))

def add(store, tell):
    while True:
        signed = sign_record(me, TextRecord(" ".join(str(rng.random()) for _ in range(60))))
        store.add([signed])
        os.write(tell, signed.record_id)

for crash in range(crashes):
    store = RecordStore(folder / f"{crash // 5}.sqlite")  # five crashes each
    count, delay_s, size = rng.randrange(4), rng.uniform(0, 0.02), rng.randrange(90_000)
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        if mode == "full":
            size += 60_000 * (1 + crash % 5)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            add(store, tell)
        except StoreFailed:
            pass
        os._exit(0)
    os.close(tell)
    told = b""
    while chunk := os.read(hear, 65536):
        told += chunk
        if mode == "kill" and len(told) >= 32 * count:
            time.sleep(delay_s)  # the child works on: killed at a moment drawn at random
            os.kill(child, signal.SIGKILL)
    os.close(hear)
    os.waitpid(child, 0)
    [rng.random() for _ in range(1000)]  # what the child drew, and more
    known = {each.signed.record_id for each in store.records()}
    ids = [told[i : i + 32] for i in range(0, len(told) - 31, 32)]
    print(json.dumps([len(ids), sum(record_id not in known for record_id in ids)]))
"""


@pytest.mark.parametrize("mode", CRASHES)
def test_no_crash_loses_a_record(tmp_path, mode):
    result = subprocess.run(
        [sys.executable, "-c", CRASHER, str(tmp_path), mode, str(CRASHES[mode]), "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(told) == CRASHES[mode]
    assert sum(count for count, _ in told) > CRASHES[mode]
    assert [lost for _, lost in told] == [0] * CRASHES[mode]
