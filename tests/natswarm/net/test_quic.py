"""Handshakes over bad links and with the wrong people, lost peers, hostile peers, hostile bytes."""

from __future__ import annotations

import itertools
import random
from contextlib import asynccontextmanager

import pytest
import trio

from natswarm.errors import ConnectionLost, HandshakeFailed
from natswarm.net import lane as lane_module
from natswarm.net import quic
from natswarm.net.frames import FRAME, QUIC_STREAM_ID, FrameKind
from natswarm.net.lane import initial_connection_id_untrusted
from natswarm.net.lane_set import RIVALS_MAX
from natswarm.net.multiplexer import MAX_OPEN_STREAMS
from natswarm.net.proof import PROOF_BYTES
from natswarm.net.quic import Connection
from natswarm.net.stream import INITIAL_CREDIT_BYTES


async def run_until_failed(connection, failures):
    """Run a connection that must not come about; note when and how it failed."""
    with pytest.raises(HandshakeFailed) as caught:
        await connection.run()
    failures[connection] = (trio.current_time(), str(caught.value))


async def fail_both(lab, client, server, link):
    """Return when, and with what words, the client's and the server's handshake failed."""
    failures = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        async with trio.open_nursery() as both:
            both.start_soon(run_until_failed, client, failures)
            both.start_soon(run_until_failed, server, failures)
        nursery.cancel_scope.cancel()
    return failures[client], failures[server]


@asynccontextmanager
async def hostile_client(lab, instead_of_proof):
    """Yield a client that says something else than its proof, and the server it says it to."""
    link = lab.Link(seed=0)
    client = Connection(lab.CLIENT, lab.SERVER.peer_id, is_client=True, send=lab.nowhere)
    client._first._check_server_and_prove = on_stream_0(instead_of_proof)
    server = Connection(lab.SERVER, lab.CLIENT.peer_id, is_client=False, send=lab.nowhere)
    client.send = link.sender(server.receive_datagrams)
    server.send = link.sender(client.receive_datagrams)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        yield client, server, nursery
        nursery.cancel_scope.cancel()


# --- the handshake ---


async def test_both_sides_start_when_both_are_proved(lab, autojump_clock):
    link = lab.Link(seed=0, weather=lab.Weather(delay_s=0.15))
    client, server = lab.make_pair(link, rtt_s=0.3)
    assert "connecting" in repr(client)
    started = {}

    async def start(nursery, connection):
        await nursery.start(connection.run)
        started[connection] = trio.current_time()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        async with trio.open_nursery() as starting:
            starting.start_soon(start, nursery, client)
            starting.start_soon(start, nursery, server)
        # TLS takes one round trip, the proof rides on its end, the yes needs half a trip more.
        assert started[server] == pytest.approx(0.45, abs=0.01)
        assert started[client] == pytest.approx(0.60, abs=0.01)
        assert client.peer_id == lab.SERVER.peer_id
        assert "connected" in repr(server)
        assert client.close_reason is None
        await trio.sleep(1)
        assert client.statistics().rtt_s == pytest.approx(0.3, rel=0.1)
        nursery.cancel_scope.cancel()


async def test_a_connection_runs_once(lab, autojump_clock):
    async with lab.connected_pair() as (client, _, _):
        with pytest.raises(RuntimeError, match="once"):
            await client.run()


async def test_handshakes_over_a_bad_link(lab, autojump_clock):
    """300 ms and 10 % loss each way, jitter that swaps, duplicates: most take one round trip."""
    weather = lab.Weather(delay_s=0.15, jitter_s=0.05, loss=0.1, duplication=0.05)
    times = []
    for seed in range(60):
        start = trio.current_time()
        async with lab.connected_pair(seed=seed, weather=weather, rtt_s=0.3):
            times.append(trio.current_time() - start)
    times.sort()
    assert times[len(times) // 2] < 1.0
    assert times[-1] < 10.0


async def test_fresh_attempts_outlast_an_outage(lab, autojump_clock):
    """QUIC alone would send again 8, then 16 s after an outage began; a new attempt starts over."""
    link = lab.Link(seed=0)
    link.is_cut = True
    client, server = lab.make_pair(link, handshake_timeout_s=20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        nursery.start_soon(server.run)

        async def repair():
            await trio.sleep(8.5)
            link.is_cut = False

        nursery.start_soon(repair)
        await nursery.start(client.run)
        assert trio.current_time() < 8.5 + lane_module.MIN_ATTEMPT_S
        nursery.cancel_scope.cancel()


async def test_replaced_attempt_does_not_come_back(lab, autojump_clock):
    """The first attempt's datagrams arrive after the second's: the server stays with the second."""
    link = lab.Link(seed=0)
    client, server = lab.make_pair(link)
    held = []
    client.send = held.extend
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        nursery.start_soon(server.run)
        starting = trio.Event()

        async def start():
            await nursery.start(client.run)
            starting.set()

        nursery.start_soon(start)
        await trio.sleep(lane_module.MIN_ATTEMPT_S / 2)
        first_attempt = list(held)
        await trio.sleep(lane_module.MIN_ATTEMPT_S)  # the second has begun
        second_attempt = held[len(first_attempt) :]
        second_attempt = [
            data
            for data in second_attempt
            if initial_connection_id_untrusted(data)
            not in {initial_connection_id_untrusted(old) for old in first_attempt}
        ]
        assert second_attempt
        server.receive_datagrams(first_attempt)
        server.receive_datagrams(second_attempt)
        engine = server._first.engine
        server.receive_datagrams(first_attempt)
        assert server._first.engine is engine
        client.send = link.sender(server.receive_datagrams)
        with trio.fail_after(5):
            await starting.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("rtt_s", [0.05, 0.3])
async def test_forged_attempts_from_the_peers_own_endpoint_keep_nobody_out(
    lab, autojump_clock, rtt_s
):
    """Forty a second, each as good as a client's until it would have to answer."""
    link = lab.Link(seed=0, weather=lab.Weather(delay_s=rtt_s / 2))
    client, server = lab.make_pair(link)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)

        async def forge():
            while True:
                forger = Connection(
                    lab.STRANGER, lab.SERVER.peer_id, is_client=True, send=server.receive_datagrams
                )
                forger._first.start(trio.current_time())
                forger._flush()
                await trio.sleep(1 / 40)

        nursery.start_soon(forge)
        await trio.sleep(0.5)
        async with trio.open_nursery() as starting:
            starting.start_soon(nursery.start, server.run)
            starting.start_soon(nursery.start, client.run)
        assert trio.current_time() < 0.5 + 3 * rtt_s + 0.2
        assert server._lanes.rivals == []
        stream, other = await lab.open_pair(client, server)
        await stream.send_all(b"hello")
        assert await other.receive_some() == b"hello"
        nursery.cancel_scope.cancel()


async def test_attempts_are_bounded(lab, autojump_clock):
    _, server = lab.make_pair(lab.Link(seed=0))
    for _ in range(200):
        forger = Connection(
            lab.STRANGER, lab.SERVER.peer_id, is_client=True, send=server.receive_datagrams
        )
        forger._first.start(trio.current_time())
        forger._flush()
    assert len(server._lanes.rivals) == RIVALS_MAX
    assert len(server._lanes._by_connection_id) == 2 * (RIVALS_MAX + 1)


@pytest.mark.parametrize("is_client", [True, False])
async def test_silence_fails_after_the_time_out(lab, autojump_clock, is_client):
    failures = {}
    connection = Connection(
        lab.CLIENT, lab.SERVER.peer_id, is_client=is_client, send=lab.nowhere, handshake_timeout_s=7
    )
    await run_until_failed(connection, failures)
    at, text = failures[connection]
    assert at == pytest.approx(7, abs=0.01)
    assert "within 7 s" in text
    assert str(lab.SERVER.peer_id) in text
    assert connection.close_reason in text
    with pytest.raises(ConnectionLost):
        await connection.open_stream("test")


async def test_port_that_closes_under_a_handshake(lab, autojump_clock):
    def closed(datagrams):
        raise trio.ClosedResourceError

    connection = Connection(lab.CLIENT, lab.SERVER.peer_id, is_client=True, send=closed)
    with pytest.raises(HandshakeFailed, match="port under it was closed"):
        await connection.run()


async def test_closing_during_the_handshake(lab, autojump_clock):
    connection = Connection(lab.CLIENT, lab.SERVER.peer_id, is_client=True, send=lab.nowhere)
    failures = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_until_failed, connection, failures)
        await trio.sleep(1)
        await connection.aclose()
    at, text = failures[connection]
    assert at < 1.1
    assert "this side closed it" in text


# --- who is there ---


async def test_client_that_wants_somebody_else(lab, autojump_clock):
    link = lab.Link(seed=0)
    client, server = lab.make_pair(link, client_expects=lab.STRANGER)
    (client_at, client_text), (server_at, server_text) = await fail_both(lab, client, server, link)
    assert max(client_at, server_at) < 0.2
    assert "someone else" in client_text
    assert "the peer closed it: not the peer that was asked for" in server_text


async def test_server_that_wants_somebody_else(lab, autojump_clock):
    link = lab.Link(seed=0)
    client, server = lab.make_pair(link, server_expects=lab.STRANGER)
    (client_at, client_text), (server_at, server_text) = await fail_both(lab, client, server, link)
    assert max(client_at, server_at) < 0.2
    assert str(lab.CLIENT.peer_id) in server_text
    assert "the peer closed it: not the peer that was asked for" in client_text


async def test_man_in_the_middle_with_a_certificate_of_his_own(lab, autojump_clock):
    client, server = lab.make_pair(lab.Link(seed=0))
    failures = {}
    async with trio.open_nursery() as nursery:
        # Towards the client he plays the server, towards the server the client.
        for victim, is_client in ((client, False), (server, True)):
            link = lab.Link(seed=1)
            expected = lab.CLIENT if victim is client else lab.SERVER
            mallory = Connection(
                lab.STRANGER,
                expected.peer_id,
                is_client=is_client,
                send=link.sender(victim.receive_datagrams),
            )
            victim.send = link.sender(mallory.receive_datagrams)
            nursery.start_soon(link.run)
            nursery.start_soon(run_until_failed, mallory, failures)
        async with trio.open_nursery() as victims:
            victims.start_soon(run_until_failed, client, failures)
            victims.start_soon(run_until_failed, server, failures)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert "someone else" in failures[client][1]
    assert f"it proved to be {lab.STRANGER.peer_id}" in failures[server][1]
    assert all(at < 0.2 for at, _ in failures.values())


async def test_proof_for_one_server_is_void_at_another(lab, autojump_clock, monkeypatch):
    """A client connects to a stranger, who shows its proof to the server it is not for."""
    stolen = []

    authenticate = lane_module.Lane._authenticate

    def steal(lane, engine, data):
        if lane._settings.identity is not lab.STRANGER:
            return authenticate(lane, engine, data)
        stolen.append(data)
        return b""

    link = lab.Link(seed=0)
    client, _ = lab.make_pair(link, client_expects=lab.STRANGER)
    thief = Connection(
        lab.STRANGER,
        lab.CLIENT.peer_id,
        is_client=False,
        send=link.sender(client.receive_datagrams),
    )
    monkeypatch.setattr(lane_module.Lane, "_authenticate", steal)
    client.send = link.sender(thief.receive_datagrams)
    await fail_both(lab, client, thief, link)
    assert len(stolen[0]) == PROOF_BYTES
    assert stolen[0].startswith(lab.CLIENT.peer_id.key)

    failures = {}
    async with hostile_client(lab, stolen[0]) as (impostor, server, nursery):
        nursery.start_soon(run_until_failed, impostor, failures)
        await run_until_failed(server, failures)
    assert "its proof is not its own" in failures[server][1]


async def test_no_stream_before_the_proof(lab, autojump_clock):
    failures = {}
    async with hostile_client(lab, OPEN_1 + frame(2, 1, 4, b"data")) as (client, server, nursery):
        nursery.start_soon(run_until_failed, client, failures)
        nursery.start_soon(run_until_failed, server, failures)
        with pytest.raises(ConnectionLost):
            await server.accept_stream()
    assert "no proof" in failures[server][1]


def frame(kind, stream_id, value=0, payload=b"", position=0):
    return FRAME.pack(kind, stream_id, position, value) + payload


OPEN_1 = frame(1, 1, 1, b"x")


def on_stream_0(data, **end):
    return lambda engine: engine.send_stream_data(QUIC_STREAM_ID, data, **end)


@pytest.mark.parametrize(
    ("hostile_action", "complaint"),
    [
        (on_stream_0(OPEN_1 + 2 * frame(2, 1, 65_536, bytes(65_536))), "overran its credit"),
        (on_stream_0(OPEN_1 + frame(2, 1, 65_537)), "65537 bytes of data"),
        (on_stream_0(OPEN_1 + frame(2, 1, 0)), "0 bytes of data"),
        (on_stream_0(OPEN_1 + frame(4, 1) + frame(2, 1, 1, b"x")), "went on after its end"),
        (on_stream_0(OPEN_1 + frame(4, 1) + frame(5, 1)), "ended twice"),
        (on_stream_0(OPEN_1 + OPEN_1), "stream 1 is not next"),
        (on_stream_0(frame(1, 2, 1, b"x")), "stream 2 is not next"),
        (on_stream_0(frame(1, 3, 1, b"x")), "stream 3 is not next"),
        (on_stream_0(frame(1, 1, 0)), "a name of 0 bytes"),
        (on_stream_0(frame(1, 1, 65)), "a name of 65 bytes"),
        (on_stream_0(frame(1, 1, 2, b"\xff\n")), "named by"),
        (on_stream_0(frame(9, 1)), "unknown kind of frame 9"),
        (on_stream_0(frame(3, 2, 5)), "stream 2 was never opened"),
        (on_stream_0(frame(2, 0, 5)), "stream 0 was never opened"),
        (
            on_stream_0(
                b"".join(frame(1, 2 * index + 1, 1, b"x") for index in range(MAX_OPEN_STREAMS + 1))
            ),
            "too many streams",
        ),
        (on_stream_0(frame(7, 1) * 9), "too many lanes"),
        (on_stream_0(frame(8, 0, 4)), "the QUIC client opens lanes"),
        (on_stream_0(OPEN_1 + frame(4, 1, position=70_000)), "ended at 70000"),
        (on_stream_0(OPEN_1 + frame(2, 1, 1, b"x", position=2**63)), "overran its credit"),
        (
            on_stream_0(OPEN_1 + frame(2, 1, 1, b"x") + frame(2, 1, 1, b"x")),
            "began anew at 0",
        ),
        (
            on_stream_0(OPEN_1 + 2 * frame(2, 1, 40_000, bytes(40_000), position=1)),
            "overran its credit",
        ),
        (on_stream_0(b"", end_stream=True), "one QUIC stream"),
        (lambda engine: engine.send_stream_data(4, b"x"), "one QUIC stream"),
        (lambda engine: engine.send_stream_data(2, b"x"), "one QUIC stream"),
        (lambda engine: engine.reset_stream(0, 0), "one QUIC stream"),
        (lambda engine: engine.stop_stream(0, 0), "one QUIC stream"),
    ],
)
async def test_peer_that_breaks_the_rules_loses_the_connection(
    lab, autojump_clock, hostile_action, complaint
):
    async with lab.connected_pair() as (client, server, _):
        hostile_action(client._first.engine)
        client._wake_up()
        await server.wait_closed()
        assert complaint in server.close_reason
        assert server.statistics().buffered_bytes <= INITIAL_CREDIT_BYTES
        assert server.statistics().stream_count <= MAX_OPEN_STREAMS
        await client.wait_closed()


# --- messages beside bulk ---


@pytest.mark.parametrize("has_messages", [True, False])
async def test_little_bulk_waits_in_quic_while_there_are_messages(
    lab, autojump_clock, monkeypatch, has_messages
):
    # Smaller than it is: a window that leaves room for more opens in a fraction of a second.
    monkeypatch.setattr(lane_module, "MAX_HELD_BUFFER_BYTES", 128 * 1024)
    queued = []
    drain = lane_module.Lane.drain

    def watched_drain(lane, *args, **kwargs):
        queued.append(lane.engine.queued_bytes if lane.engine else 0)
        return drain(lane, *args, **kwargs)

    async def send_bulk(stream):
        while True:
            await stream.send_all(bytes(1_000_000))

    async with lab.connected_pair(seed=3, weather=lab.Weather(delay_s=0.02)) as (client, server, _):
        bulk, bulk_end = await lab.open_pair(client, server)
        talk, _ = await lab.open_pair(client, server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lab.receive_all, bulk_end)
            nursery.start_soon(send_bulk, bulk)
            await trio.sleep(0.4)  # the window opens
            if has_messages:
                await talk.send_all(bytes(1000))
            await trio.sleep(0.1)
            monkeypatch.setattr(lane_module.Lane, "drain", watched_drain)
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
    # Frames have headers.
    is_bounded = max(queued) <= 1.01 * lane_module.MAX_HELD_BUFFER_BYTES
    assert is_bounded == has_messages, max(queued)


# --- lanes ---


@asynccontextmanager
async def striped_pair(lab, monkeypatch, *, weather, sender_is_client=True):
    """Yield both ends of a stream between connections that were made to have 4 lanes for bulk."""
    async with lab.connected_pair(seed=5, weather=weather) as (client, server, link):
        ends = (client, server) if sender_is_client else (server, client)
        ends[0]._lanes._striping.lane_count = 4
        monkeypatch.setattr(ends[0]._lanes._striping, "observe", lambda *_, **__: None)
        stream, other = await lab.open_pair(*ends)
        yield stream, other, ends, link


@pytest.mark.parametrize("sender_is_client", [True, False])
async def test_lanes_carry_bulk_in_any_order_and_messages_pass_it(
    lab, autojump_clock, monkeypatch, sender_is_client
):
    weather = lab.Weather(delay_s=0.02, jitter_s=0.01, loss=0.02, duplication=0.02)
    data = random.Random(5).randbytes(3_000_000)
    async with striped_pair(
        lab, monkeypatch, weather=weather, sender_is_client=sender_is_client
    ) as (stream, other, ends, _):
        async with trio.open_nursery() as nursery:

            async def send():
                await stream.send_all(data[:100_000])  # the reader gives credit
                await trio.sleep(0.5)
                await stream.send_all(data[100_000:-5])
                await stream.send_all(data[-5:])
                await stream.aclose()

            nursery.start_soon(send)
            assert await lab.receive_all(other) == data
        await other.aclose()
        assert [connection.statistics().lane_count for connection in ends] == [5, 5]
        for lane in ends[0]._lanes.lanes[1:]:
            assert lane.bound.delivered_bytes > 100_000
        await trio.sleep(1)
        assert [connection.statistics().stream_count for connection in ends] == [0, 0]
        assert other._buffered_bytes == 0


async def test_bulk_that_is_given_up_leaves_nothing_behind(lab, autojump_clock, monkeypatch):
    weather = lab.Weather(delay_s=0.05, jitter_s=0.02, loss=0.02)
    async with striped_pair(lab, monkeypatch, weather=weather) as (stream, other, ends, _):
        with trio.move_on_after(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(20_000_000))
                while True:
                    await other.receive_some()
        await stream.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await lab.receive_all(other)
        await other.aclose()
        await trio.sleep(2)
        assert [connection.close_reason for connection in ends] == [None, None]
        assert [connection.statistics().stream_count for connection in ends] == [0, 0]


async def test_nobody_can_open_a_lane_that_was_not_announced(lab, autojump_clock):
    async with lab.connected_pair() as (_, server, _):
        stranger = lane_module.Lane(
            lane_module.LaneSettings(lab.STRANGER, lab.SERVER.peer_id, True, None, 1200, 20.0)
        )
        stranger.start(trio.current_time())
        server.receive_datagrams(stranger.drain(trio.current_time(), 10, is_closing=False))
        assert server.statistics().lane_count == 1
        assert server.close_reason is None


async def test_whoever_takes_an_announced_lane_must_prove_who_it_is(lab, autojump_clock):
    """It is of no use, and the connection goes on without it."""
    async with lab.connected_pair() as (client, server, _):
        attempt = bytes(range(8))
        client._streams.send_note(FrameKind.LANE, int.from_bytes(attempt, "big"))
        await trio.sleep(0.1)
        settings = lane_module.LaneSettings(
            lab.STRANGER, lab.SERVER.peer_id, True, None, 1200, 20.0
        )
        stranger = lane_module.Lane(settings, attempt=attempt)
        answers = []
        server.send = answers.extend
        stranger.start(trio.current_time())
        for _ in range(5):
            server.receive_datagrams(stranger.drain(trio.current_time(), 10, is_closing=False))
            await trio.sleep(0.01)
            stranger.receive(list(answers), trio.current_time())
            list(stranger.received())
        assert not stranger.is_proved
        assert server.statistics().lane_count == 2
        assert not any(lane.is_proved for lane in server._lanes.lanes[1:])
        assert server.close_reason is None


# --- hostile bytes ---


async def test_garbage_changes_nothing_but_counters(lab, autojump_clock):
    """Random bytes, and real datagrams cut and bent, from the very endpoint of the peer."""
    rng = random.Random(7)
    link = lab.Link(seed=7)
    client, server = lab.make_pair(link)

    def bending(receive):
        deliver = link.sender(receive)

        def send(datagrams):
            for data in datagrams:
                deliver([data])
                bent = bytearray(data)
                bent[rng.randrange(len(bent))] ^= 1 << rng.randrange(8)
                garbage = bytes([0xC0, 0, 0, 0, 1, 8]) + rng.randbytes(1300)
                deliver([bytes(bent), data[: rng.randrange(len(data))], garbage])
                deliver([rng.randbytes(rng.randrange(1500)) for _ in range(3)])

        return send

    client.send = bending(server.receive_datagrams)
    server.send = bending(client.receive_datagrams)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        async with trio.open_nursery() as starting:
            starting.start_soon(nursery.start, server.run)
            starting.start_soon(nursery.start, client.run)
        stream, other = await lab.open_pair(client, server)
        data = rng.randbytes(200_000)
        nursery.start_soon(stream.send_all, data)
        assert await lab.receive_exactly(other, len(data)) == data
        nursery.cancel_scope.cancel()


async def test_server_ignores_initials_that_are_none(lab, autojump_clock):
    server = Connection(lab.SERVER, lab.CLIENT.peer_id, is_client=False, send=lab.nowhere)
    rng = random.Random(8)
    for length in [*range(24), 255]:
        server.receive_datagrams([b"\xc0\0\0\0\x01" + bytes([length]) + rng.randbytes(1300)])
    server.receive_datagrams([b"", b"\xc0", b"\x40" * 50, bytes(1300)])
    assert server._first.engine is None
    assert server.statistics().received_datagram_count == 29


# --- data over bad links ---


@pytest.mark.parametrize("seed", range(4))
async def test_data_survives_loss_swaps_and_duplicates(lab, autojump_clock, seed):
    rng = random.Random(seed)
    weather = lab.Weather(delay_s=0.15, jitter_s=0.05, loss=0.1, duplication=0.1)
    async with lab.connected_pair(seed=seed, weather=weather, rtt_s=0.3) as (client, server, _):
        there, back = rng.randbytes(150_000), rng.randbytes(60_000)
        stream, other = await lab.open_pair(client, server)

        async def send(end, data):
            await end.send_all(data)
            await end.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, stream, there)
            nursery.start_soon(send, other, back)
            assert await lab.receive_all(other) == there
            assert await lab.receive_all(stream) == back
        assert client.statistics().lost_packet_count > 0


async def test_data_over_loopback(lab):
    async with lab.loopback_pair() as (client, server):
        stream, other = await lab.open_pair(client, server)
        data = random.Random(9).randbytes(8_000_000)

        async def send():
            await stream.send_all(data)
            await client.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await lab.receive_exactly(other, len(data)) == data


@pytest.mark.parametrize("seed", range(3))
async def test_keys_change_in_the_middle(lab, autojump_clock, monkeypatch, seed):
    """Both sides change keys all the time, on a link that loses and swaps."""
    monkeypatch.setattr(lane_module, "KEY_DATAGRAMS", 30)
    weather = lab.Weather(delay_s=0.02, jitter_s=0.01, loss=0.02, duplication=0.02)
    async with lab.connected_pair(seed=seed, weather=weather) as (client, server, _):
        stream, other = await lab.open_pair(client, server)
        there, back = random.Random(seed).randbytes(300_000), bytes(300_000)
        phases = set()

        async def send(end, data):
            for start in range(0, len(data), 10_000):
                await end.send_all(data[start : start + 10_000])
                phases.add(client._first.engine._core.send_key_phase)
            await end.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, stream, there)
            nursery.start_soon(send, other, back)
            nursery.start_soon(lab.receive_all, stream)
            assert await lab.receive_all(other) == there
        assert phases == {0, 1}


async def test_moves_to_another_path_in_the_middle(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, first), trio.open_nursery() as nursery:
        stream, other = await lab.open_pair(client, server)
        data = random.Random(10).randbytes(2_000_000)
        nursery.start_soon(stream.send_all, data)
        received = await lab.receive_exactly(other, 300_000)
        second = lab.Link(seed=10, weather=lab.Weather(delay_s=0.05))
        nursery.start_soon(second.run)
        client.send = second.sender(server.receive_datagrams)
        server.send = second.sender(client.receive_datagrams)
        first.is_cut = True
        received += await lab.receive_exactly(other, len(data) - len(received))
        assert received == data
        nursery.cancel_scope.cancel()


async def test_moves_to_a_path_that_carries_less(lab, autojump_clock):
    """IPv6 through tunnels may carry 1,280 B packets, so 1,232 B datagrams, and no more."""
    async with lab.connected_pair() as (client, server, _):
        stream, other = await lab.open_pair(client, server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(300_000))
            await lab.receive_exactly(other, 300_000)
        for connection in (client, server):
            wide = connection.send
            connection.send = lambda datagrams, wide=wide: wide(
                [data for data in datagrams if len(data) <= 1232]
            )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(300_000))
            with trio.fail_after(10):
                await lab.receive_exactly(other, 300_000)
        assert client.statistics().lost_packet_count == 0


# --- keeping alive and noticing death ---


async def test_idle_connection_keeps_its_mapping(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        sent_at = {client: [trio.current_time()], server: [trio.current_time()]}

        def noting(connection):
            send = connection.send

            def noted(datagrams):
                sent_at[connection].append(trio.current_time())
                send(datagrams)

            return noted

        for connection in (client, server):
            connection.send = noting(connection)
        await trio.sleep(300)
        for connection, times in sent_at.items():
            gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
            assert max(gaps) <= 10.1  # NATs that forget after 15 s stay awake
            assert len(times) < 150  # and are not pestered
            assert connection.close_reason is None


async def test_dead_peer_is_noticed_in_bounded_time(lab, autojump_clock):
    options = {"keepalive_s": 5.0, "idle_timeout_s": 12.0}
    async with lab.connected_pair(**options) as (client, server, link):
        await trio.sleep(61)
        link.is_cut = True
        cut_at = trio.current_time()
        await client.wait_closed()
        await server.wait_closed()
        assert trio.current_time() - cut_at <= 17.1
        assert client.close_reason == "nothing came from the peer for 12 s"
        with pytest.raises(ConnectionLost, match="nothing came"):
            await client.accept_stream()


async def test_live_connection_outlasts_a_short_outage(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, link):
        stream, other = await lab.open_pair(client, server)
        await stream.send_all(b"before")
        link.is_cut = True
        await trio.sleep(8)
        await stream.send_all(b" after")
        link.is_cut = False
        with trio.fail_after(20):
            assert await lab.receive_exactly(other, 12) == b"before after"


# --- closing ---


async def test_close_waits_until_the_peer_has_everything(lab, autojump_clock):
    weather = lab.Weather(delay_s=0.15, jitter_s=0.02, loss=0.05)
    data = random.Random(11).randbytes(INITIAL_CREDIT_BYTES)
    async with lab.connected_pair(seed=11, weather=weather) as (client, server, _):
        stream, other = await lab.open_pair(client, server)
        await stream.send_all(data)
        await stream.aclose()
        await client.aclose()
        await client.aclose()
        assert client.close_reason == "this side closed it"
        assert await lab.receive_all(other) == data
        for action in (stream.receive_some, client.accept_stream):
            with pytest.raises(trio.ClosedResourceError):
                await action()
        await server.wait_closed()
        assert server.close_reason == "the peer closed it: closed"
        with pytest.raises(ConnectionLost, match="the peer closed it"):
            await server.open_stream("test")


async def test_close_does_not_wait_for_ever(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, link):
        stream, _ = await lab.open_pair(client, server)
        await trio.sleep(1)
        link.is_cut = True
        await stream.send_all(b"into the void")
        start = trio.current_time()
        await client.aclose()
        assert trio.current_time() - start == pytest.approx(quic.DRAIN_S)


async def test_cancelled_close_closes_at_once(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        await trio.aclose_forcefully(client)
        assert client.close_reason is not None
        with trio.fail_after(0.1):
            await server.wait_closed()


async def test_peer_that_missed_the_close_is_told_again(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, link):
        link.is_cut = True
        await trio.aclose_forcefully(client)
        await trio.sleep(0.01)
        link.is_cut = False
        stream = await server.open_stream("anybody there")
        with trio.fail_after(0.2):
            await server.wait_closed()
        with pytest.raises(ConnectionLost):
            await stream.send_all(b"?")


async def test_cancelled_run_tells_the_peer(lab, autojump_clock):
    link = lab.Link(seed=0)
    client, server = lab.make_pair(link)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        async with trio.open_nursery() as client_nursery:
            nursery.start_soon(server.run)
            await client_nursery.start(client.run)
            stream = await client.open_stream("test")
            client_nursery.cancel_scope.cancel()
        with pytest.raises(ConnectionLost, match="this side stopped"):
            await stream.receive_some()
        with trio.fail_after(0.1):
            await server.wait_closed()
        assert server.close_reason == "the peer closed it: going away"
        nursery.cancel_scope.cancel()


async def test_run_ends_quietly_with_the_connection(lab, autojump_clock):
    link = lab.Link(seed=0)
    client, server = lab.make_pair(link)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        async with trio.open_nursery() as connections:
            connections.start_soon(server.run)
            await connections.start(client.run)
            await client.aclose()
        nursery.cancel_scope.cancel()


async def test_port_that_closes_under_a_connection(lab, autojump_clock):
    def closed(datagrams):
        raise trio.ClosedResourceError

    async with lab.connected_pair() as (client, _, _):
        client.send = closed
        stream = await client.open_stream("test")
        with pytest.raises(ConnectionLost, match="port under it was closed"):
            await stream.receive_some()


async def test_peers_words_are_cleaned_and_cut(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        client._close(0, "\x1b[31mred\n" + "x" * 500, "test")
        await server.wait_closed()
        assert server.close_reason.isprintable()
        assert len(server.close_reason) < 150


@pytest.mark.parametrize("outage_s", [2, 10, 300])
async def test_after_an_outage_it_goes_on_at_once(lab, autojump_clock, outage_s):
    """QUIC by itself would wait for a time-out that has doubled and doubled."""
    options = {"keepalive_s": 200.0, "idle_timeout_s": 600.0}
    async with lab.connected_pair(**options) as (client, server, link):
        stream, other = await lab.open_pair(client, server)

        async def write():
            while True:
                await stream.send_all(bytes(20_000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await lab.receive_exactly(other, 100_000)
            link.is_cut = True
            await trio.sleep(outage_s)
            while await _read_what_is_there(other):
                pass
            link.is_cut = False
            for connection in (client, server):
                connection.resume()
            with trio.fail_after(0.5):
                await lab.receive_exactly(other, 1)
            nursery.cancel_scope.cancel()


async def test_an_answer_that_is_lost_after_an_outage_is_asked_for_again(lab, autojump_clock):
    """The peer changes to the new path a moment later than we do: our first question is lost."""
    options = {"keepalive_s": 200.0, "idle_timeout_s": 600.0}
    async with lab.connected_pair(**options) as (client, server, link):
        stream, other = await lab.open_pair(client, server)

        async def write():
            while True:
                await stream.send_all(bytes(20_000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await lab.receive_exactly(other, 100_000)
            link.is_cut = True
            await trio.sleep(20)
            while await _read_what_is_there(other):
                pass
            client.resume()
            await trio.sleep(0.25)
            link.is_cut = False
            with trio.fail_after(0.3):
                await lab.receive_exactly(other, 1)
            nursery.cancel_scope.cancel()


async def test_time_outs_do_not_double_while_there_is_no_path(lab, autojump_clock):
    options = {"keepalive_s": 200.0, "idle_timeout_s": 900.0}
    async with lab.connected_pair(**options) as (client, server, link):
        stream, _ = await lab.open_pair(client, server)
        link.is_cut = True
        await stream.send_all(bytes(10_000))
        await trio.sleep(1)
        client.suspend()
        before = client.statistics().sent_datagram_count
        await trio.sleep(600)
        assert client.statistics().sent_datagram_count <= before + 3, "keepalives at most"
        client.resume()
        await trio.sleep(1)
        assert client.statistics().sent_datagram_count >= before + 3, "it has asked several times"


async def test_a_connection_without_a_path_can_be_closed(lab, autojump_clock):
    async with lab.connected_pair() as (client, _, link):
        link.is_cut = True
        client.suspend()
        with trio.fail_after(20):
            await client.aclose()
            while not client._is_terminated:  # noqa: ASYNC110 - no event says so
                await trio.sleep(0.1)


async def _read_what_is_there(stream):
    with trio.move_on_after(0.001):
        return await stream.receive_some()
    return b""


async def test_an_abandoned_connection_ends_without_a_word(lab, autojump_clock):
    async with lab.connected_pair() as (client, server, _):
        client.abandon("no path to it for 60 s")
        assert client.close_reason == "no path to it for 60 s"
        with pytest.raises(ConnectionLost, match="no path"):
            await client.open_stream("test")
        await trio.sleep(1)
        assert server.close_reason is None


async def test_both_ends_and_nobody_else_know_the_name_of_a_connection(lab, autojump_clock):
    names = []
    for seed in range(2):
        async with lab.connected_pair(seed=seed) as (client, server, _):
            names.append(await client.wait_proved())
            assert names[-1] == await server.wait_proved()
    assert len(set(names)) == 2
    assert {len(name) for name in names} == {8}
