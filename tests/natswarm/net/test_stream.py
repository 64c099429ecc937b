"""A stream keeps what trio.abc promises, over good links and bad, and its memory stays bounded."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import check_half_closeable_stream, check_two_way_stream, wait_all_tasks_blocked

from natswarm.errors import ConnectionLost
from natswarm.net import frames
from natswarm.net import lane as lane_module
from natswarm.net.multiplexer import MAX_OPEN_STREAMS
from natswarm.net.stream import INITIAL_CREDIT_BYTES

WINDOW = 1024 * 1024


def makers(lab, client, server):
    """Return what trio's stream checks ask for: a maker of pairs, and one of clogged pairs."""

    async def make():
        return await lab.open_pair(client, server)

    async def make_clogged():
        # Nobody has read, so both directions end at the initial credit.
        pair = await lab.open_pair(client, server)
        for stream in pair:
            await stream.send_all(bytes(INITIAL_CREDIT_BYTES))
        return pair

    return make, make_clogged


async def test_keeps_trios_promises_in_memory(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        await check_half_closeable_stream(*makers(lab, client, server))


async def test_keeps_trios_promises_when_the_accepter_leads(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        await check_two_way_stream(*makers(lab, server, client))


async def test_keeps_trios_promises_on_a_bad_link(lab, autojump_clock):
    weather = lab.Weather(delay_s=0.02, jitter_s=0.02, loss=0.05, duplication=0.05)
    async with lab.connected_pair(seed=5, weather=weather) as (client, server, _):
        await check_half_closeable_stream(*makers(lab, client, server))


async def test_keeps_trios_promises_on_loopback(lab):
    async with lab.loopback_pair() as (client, server):
        await check_half_closeable_stream(*makers(lab, client, server))


async def test_names_its_protocol_and_its_peer(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        stream = await client.open_stream("natswarm/echo 1")
        other = await server.accept_stream()
        assert stream.protocol == other.protocol == "natswarm/echo 1"
        assert stream.peer_id == lab.SERVER.peer_id
        assert other.peer_id == lab.CLIENT.peer_id
        assert stream.id == other.id
        assert "natswarm/echo 1" in repr(stream)
        for bad in ("", "x" * 65, "näh", "line\nbreak"):
            with pytest.raises(ValueError, match="1 to 64 printable ASCII"):
                await client.open_stream(bad)


async def test_reader_that_never_reads_gets_no_more_than_the_initial_credit(lab, autojump_clock):
    async with lab.connected_pair(stream_window_bytes=WINDOW) as (client, server, _):
        stream, other = await lab.open_pair(client, server)
        with trio.move_on_after(60) as scope:
            await stream.send_all(bytes(10 * WINDOW))
        assert scope.cancelled_caught
        assert not stream._has_credit
        assert server.statistics().buffered_bytes == INITIAL_CREDIT_BYTES
        await other.aclose()


async def test_small_pieces_that_wait_are_joined(lab, autojump_clock):
    """Else a peer that sends single bytes would take many times as much memory as its credit."""
    async with lab.connected_pair() as (client, server, _):
        stream, other = await lab.open_pair(client, server)
        for index in range(3000):
            await stream.send_all(index.to_bytes(4, "big"))
        await stream.send_eof()
        await trio.sleep(1)
        assert len(other._chunks) == 1
        assert server.statistics().buffered_bytes == 12_000
        received = bytearray()
        while data := await other.receive_some(7):
            assert len(data) <= 7
            received += data
        assert received == b"".join(index.to_bytes(4, "big") for index in range(3000))


async def test_reader_that_stops_stops_the_sender_within_a_window(lab, autojump_clock):
    async with lab.connected_pair(stream_window_bytes=WINDOW) as (client, server, _):
        stream, other = await lab.open_pair(client, server)
        data = random.Random(2).randbytes(4 * WINDOW)
        peak_bytes = 0

        async def send():
            await stream.send_all(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            received = await lab.receive_exactly(other, 100_000)
            for _ in range(8):
                await trio.sleep(30)  # as good as for ever
                buffered = server.statistics().buffered_bytes
                assert 0 < buffered <= WINDOW
                peak_bytes = max(peak_bytes, buffered)
                # What the sender handed to QUIC has all arrived: it holds nothing back either.
                assert client._first.engine.queued_bytes == 0
                received += await lab.receive_exactly(other, 300_000)
            received += await lab.receive_all(other)
        assert received == data
        assert peak_bytes > WINDOW // 2


async def test_sender_on_a_dead_link_queues_no_more_than_its_buffer(lab, autojump_clock):
    async with lab.connected_pair(stream_window_bytes=8 * WINDOW) as (client, server, link):
        stream, other = await lab.open_pair(client, server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.receive_some)  # opens the window
            await trio.sleep(1)
            link.is_cut = True
            with trio.move_on_after(1):
                await stream.send_all(bytes(8 * WINDOW))
            in_flight = client.statistics().congestion_window_bytes
            queued = stream._send_position
            assert queued <= 2 * in_flight + 2 * frames.MAX_PAYLOAD_BYTES
            assert client._first.engine.queued_bytes <= lane_module.MAX_SEND_BUFFER_BYTES
            nursery.cancel_scope.cancel()


async def test_cancelling_a_receiver_loses_nothing(lab, autojump_clock):
    rng = random.Random(3)
    data = rng.randbytes(300_000)
    weather = lab.Weather(delay_s=0.02, jitter_s=0.01, loss=0.02)
    async with lab.connected_pair(seed=3, weather=weather) as (client, server, _):
        stream, other = await lab.open_pair(client, server)
        received = bytearray()

        async def send():
            await stream.send_all(data)
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            is_end = False
            while not is_end:
                with trio.move_on_after(rng.random() * 0.03):
                    while not is_end:
                        chunk = await other.receive_some(rng.randrange(1, 5000))
                        received += chunk
                        is_end = not chunk
        assert received == data


async def test_close_delivers_what_was_sent_before(lab, autojump_clock):
    weather = lab.Weather(delay_s=0.1, jitter_s=0.05, loss=0.1)
    data = random.Random(4).randbytes(200_000)
    async with lab.connected_pair(seed=4, weather=weather) as (client, server, _):
        stream, other = await lab.open_pair(client, server)
        async with trio.open_nursery() as nursery:

            async def send_and_close():
                async with stream:
                    await stream.send_all(data)

            nursery.start_soon(send_and_close)
            assert await lab.receive_all(other) == data


async def test_cut_message_is_not_taken_for_a_whole_one(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        stream, other = await lab.open_pair(client, server)
        with trio.move_on_after(1):
            await stream.send_all(bytes(1_000_000))
        for sending in (stream.send_all(b"the rest"), stream.send_eof()):
            with pytest.raises(trio.BrokenResourceError, match="cancelled in the middle"):
                await sending
        await stream.aclose()
        with pytest.raises(trio.BrokenResourceError, match="gave the stream up"):
            await lab.receive_all(other)

        stream, other = await lab.open_pair(client, server)
        await stream.send_all(b"half a mess")
        await trio.aclose_forcefully(stream)
        with pytest.raises(trio.BrokenResourceError, match="gave the stream up"):
            await lab.receive_all(other)


async def test_stream_given_up_before_it_was_seen_is_not_accepted(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        for _ in range(90):
            await trio.aclose_forcefully(await client.open_stream("never seen"))
        await client.open_stream("seen")
        await trio.sleep(1)
        assert (await server.accept_stream()).protocol == "seen"
        await trio.sleep(1)
        assert client.statistics().stream_count == server.statistics().stream_count == 1
        for _ in range(90):  # and all their places are free
            await client.open_stream("more")


async def test_stream_in_use_breaks_with_its_connection(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, link):
        stream, other = await lab.open_pair(client, server)
        await stream.send_all(b"last words")
        await trio.sleep(1)
        link.is_cut = True
        errors = []

        async def expect_lost(afn, *args):
            with pytest.raises(ConnectionLost) as caught:
                await afn(*args)
            assert isinstance(caught.value, trio.BrokenResourceError)
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_lost, stream.receive_some)
            nursery.start_soon(expect_lost, stream.send_all, bytes(100_000))
            nursery.start_soon(expect_lost, client.accept_stream)
            await wait_all_tasks_blocked()
            await client.wait_closed()
        assert len({id(error) for error in errors}) == 3
        with pytest.raises(ConnectionLost):
            await client.open_stream("test")
        await server.wait_closed()
        # What had arrived is still there.
        assert await other.receive_some() == b"last words"
        with pytest.raises(ConnectionLost):
            await other.receive_some()
        for closing in (stream, other):
            await closing.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await closing.receive_some()


async def test_two_hundred_streams_one_after_the_other(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _), trio.open_nursery() as nursery:

        async def echo_all():
            for _ in range(200):
                async with await server.accept_stream() as stream:
                    await stream.send_all(await lab.receive_all(stream))

        nursery.start_soon(echo_all)
        for number in range(200):
            async with await client.open_stream("echo") as stream:
                await stream.send_all(b"%d" % number)
                await stream.send_eof()
                assert await lab.receive_all(stream) == b"%d" % number
        await trio.sleep(1)
        assert client.statistics().stream_count == server.statistics().stream_count == 0


async def test_more_streams_than_there_are_places_wait_for_one(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _), trio.open_nursery() as nursery:
        opened = []
        echoed = []

        async def ask(number):
            async with await client.open_stream("echo") as stream:
                opened.append(number)
                await stream.send_all(b"%d" % number)
                await stream.send_eof()
                echoed.append(await lab.receive_all(stream))

        for number in range(MAX_OPEN_STREAMS + 50):
            nursery.start_soon(ask, number)
        await trio.sleep(5)
        assert len(opened) == MAX_OPEN_STREAMS

        async def echo(stream):
            async with stream:
                await stream.send_all(await lab.receive_all(stream))

        for _ in range(MAX_OPEN_STREAMS + 50):
            nursery.start_soon(echo, await server.accept_stream())
        await trio.sleep(5)
        assert sorted(echoed) == sorted(b"%d" % number for number in range(MAX_OPEN_STREAMS + 50))


async def test_streams_nobody_accepts_keep_their_places(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        with trio.move_on_after(10):
            for _ in range(MAX_OPEN_STREAMS + 50):
                async with await client.open_stream("fire and forget") as stream:
                    await stream.send_all(bytes(1000))
        statistics = server.statistics()
        assert statistics.stream_count == MAX_OPEN_STREAMS
        assert statistics.buffered_bytes == MAX_OPEN_STREAMS * 1000
        # Accepting one makes room for one.
        stream = await server.accept_stream()
        assert await lab.receive_all(stream) == bytes(1000)
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"answer")
        await stream.aclose()
        with trio.fail_after(1):
            await client.open_stream("one more")


async def test_streams_that_compete_get_about_the_same(lab, autojump_clock):
    weather = lab.Weather(delay_s=0.02, loss=0.01)  # loss, so that they compete for the window
    async with lab.connected_pair(seed=6, weather=weather) as (client, server, _):
        received = [0] * 4

        async def send(stream):
            while True:
                await stream.send_all(bytes(100_000))

        async def receive(index, stream):
            while True:
                chunk = await stream.receive_some()
                received[index] += len(chunk)

        async with trio.open_nursery() as nursery:
            for index in range(4):
                stream, other = await lab.open_pair(client, server)
                nursery.start_soon(send, stream)
                nursery.start_soon(receive, index, other)
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert min(received) > 0.7 * max(received) > 500_000


async def test_small_message_does_not_wait_for_a_whole_window_of_bulk(lab, autojump_clock):
    weather = lab.Weather(delay_s=0.02, loss=0.01)
    async with lab.connected_pair(seed=7, weather=weather) as (client, server, _):
        bulk, bulk_end = await lab.open_pair(client, server)
        small, small_end = await lab.open_pair(client, server)

        async def send_bulk():
            while True:
                await bulk.send_all(bytes(100_000))

        async def receive_bulk():
            while True:
                await bulk_end.receive_some()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_bulk)
            nursery.start_soon(receive_bulk)
            await trio.sleep(5)
            waits = []
            for _ in range(40):
                started = trio.current_time()
                await small.send_all(b"x" * 1000)
                await lab.receive_exactly(small_end, 1000)
                waits.append(trio.current_time() - started)
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        # The path carries about 0.5 MB/s; the window of 4 MiB would be 8 s.
        assert sorted(waits)[20] < 0.4
