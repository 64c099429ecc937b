"""Calls between two ends of a real connection: what each end sees, however a call goes wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import trio.testing

from natswarm.errors import (
    CallFailed,
    CallTimedOut,
    ConnectFailed,
    ConnectionLost,
    DecodeError,
    PeerUnreachable,
    ProtocolUnknown,
    RequestRefused,
)
from natswarm.message import Message
from natswarm.net.call import CallBegin, CallHandler, Method, answering
from natswarm.net.caller import Caller
from natswarm.net.message_stream import MessageStream


class Ask(Message, frozen=True):
    number: int = 0


class Answer(Message, frozen=True):
    number: int = 0


class Other(Message, frozen=True):
    pass


ASK = Method("test/ask/1", (Ask,), (Answer,), payload_bytes_max=100_000)


class End:
    """One end of a connection: what `Peer` is to a node."""

    def __init__(self, connection: Any, handlers: dict[str, CallHandler[Any, Any]]) -> None:
        self.connection = connection
        self.peer_id = connection.peer_id
        self.open_stream = connection.open_stream
        self.is_reachable = True
        self.calls = Caller(self)
        self.handlers = handlers

    @property
    def is_lost(self) -> bool:
        return self.connection.close_reason is not None

    def call(self, *arguments: Any, timeout_s: float = 10.0, patience_s: float = 0.0) -> Any:
        return self.calls.call(*arguments, timeout_s=timeout_s, patience_s=patience_s)

    def start(self, *arguments: Any, timeout_s: float = math.inf, patience_s: float = 0.0) -> Any:
        return self.calls.start(*arguments, timeout_s=timeout_s, patience_s=patience_s)

    async def accept(self, nursery: trio.Nursery) -> None:
        try:
            while True:
                stream = await self.connection.accept_stream()
                handler = self.handlers.get(stream.protocol)
                if handler is None:
                    stream.refuse()
                else:
                    nursery.start_soon(handler.handle, stream, self)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def check_quiet(self, other: End) -> None:
        """Assert that nothing of any call is left, at either end."""
        await trio.sleep(1)
        for end in (self, other):
            statistics = end.connection.statistics()
            if not end.is_lost:  # else its streams went with it
                assert statistics.stream_count == 0, statistics
                assert statistics.buffered_bytes == 0
            assert end.calls.call_count == 0
            assert [handler.call_count for handler in end.handlers.values()] == [0] * len(
                end.handlers
            )


@asynccontextmanager
async def ends(lab: Any, serve: Callable[..., Any] | None, **limits: int) -> AsyncIterator[Any]:
    """Yield the end that calls and the one that answers with `serve`."""
    handlers = {} if serve is None else {ASK.name: CallHandler(ASK, serve, **limits)}
    async with lab.connected_pair() as (client, server, _), trio.open_nursery() as nursery:
        caller, answerer = End(client, {}), End(server, handlers)
        nursery.start_soon(caller.accept, nursery)
        nursery.start_soon(answerer.accept, nursery)
        yield caller, answerer
        nursery.cancel_scope.cancel()


@answering
async def double(request: Ask, _peer: End) -> Answer:
    return Answer(2 * request.number)


async def echo(call: Any) -> None:
    async for request, payload in call:
        await call.send(Answer(request.number), payload)


async def test_an_answer_comes_back(lab, autojump_clock):
    async with ends(lab, double) as (caller, answerer):
        assert await caller.call(ASK, Ask(21)) == Answer(42)
        await caller.check_quiet(answerer)


async def test_a_small_question_is_one_datagram(lab, autojump_clock):
    async with ends(lab, double) as (caller, answerer):
        await caller.check_quiet(answerer)
        before = caller.connection.statistics().sent_datagram_count
        async with caller.start(ASK, Ask(1), b"x" * 500) as call:
            await trio.testing.wait_all_tasks_blocked()
            assert caller.connection.statistics().sent_datagram_count == before + 1
            await call.receive()


async def test_messages_flow_both_ways_until_both_have_ended(lab, autojump_clock):
    async with ends(lab, echo) as (caller, answerer):
        async with caller.start(ASK, Ask(0), b"first") as call:
            assert await call.receive() == (Answer(0), b"first")
            for number in range(1, 50):
                await call.send(Ask(number), bytes(50_000))
                assert await call.receive() == (Answer(number), bytes(50_000))
            await call.end()
            with pytest.raises(trio.EndOfChannel):
                await call.receive()
            assert [each async for each in call] == []
        await caller.check_quiet(answerer)


async def test_three_thousand_calls_at_once(lab, autojump_clock):
    at_once = 0
    peak = 0

    @answering
    async def slow(request: Ask, _peer: End) -> Answer:
        nonlocal at_once, peak
        at_once += 1
        peak = max(peak, at_once)
        await trio.sleep(1)
        at_once -= 1
        return Answer(request.number)

    answers = []
    async with ends(lab, slow, calls_per_peer_max=4000) as (caller, answerer):

        async def ask(number: int) -> None:
            answers.append((await caller.call(ASK, Ask(number), timeout_s=60)).number)

        async with trio.open_nursery() as nursery:
            for number in range(3000):
                nursery.start_soon(ask, number)
        assert sorted(answers) == list(range(3000))
        assert peak == 2048
        await caller.check_quiet(answerer)


# Going wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConnectFailed("nobody \x1b[31mthere"), "", "nobody [31mthere"),
        (RequestRefused("too heavy", "overweight"), "overweight", "too heavy"),
        (ExceptionGroup("", [RequestRefused("in a group", "inner")]), "inner", "in a group"),
        (trio.EndOfChannel(), "", "EndOfChannel"),
        (ZeroDivisionError("a secret"), "internal", "failed inside"),
    ],
    ids=["natswarm", "code", "group", "trio", "bug"],
)
async def test_what_answering_raises_comes_back_with_its_code(
    lab, autojump_clock, caplog, error, code, text
):
    caplog.set_level(logging.ERROR, "natswarm")

    @answering
    async def fail(_request: Ask, _peer: End) -> Answer:
        raise error

    async with ends(lab, fail) as (caller, answerer):
        with pytest.raises(RequestRefused, match=text.replace("[", r"\[")) as caught:
            await caller.call(ASK, Ask())
        assert caught.value.code == code
        assert "secret" not in str(caught.value)
        await caller.check_quiet(answerer)
    assert ("a secret" in caplog.text) is (code == "internal")
    caplog.clear()


async def test_a_refusal_reaches_a_caller_that_is_sending(lab, autojump_clock):
    async def refuse(call: Any) -> None:
        await call.send(Answer(1))
        await call.receive()
        raise RequestRefused("enough", "full")

    async with ends(lab, refuse) as (caller, answerer):

        async def insist() -> None:
            async with caller.start(ASK, Ask()) as call:
                while True:
                    await call.send(Ask(), bytes(100_000))

        with pytest.raises(RequestRefused, match="enough"):
            await insist()
        await caller.check_quiet(answerer)


async def test_a_refusal_is_not_lost_between_a_sender_and_a_receiver(lab, autojump_clock):
    async def refuse(call: Any) -> None:
        for number in range(3):
            await call.send(Answer(number))
        raise RequestRefused("enough", "full")

    async with ends(lab, refuse) as (caller, answerer):
        async with caller.start(ASK, Ask()) as call:
            assert (await call.receive())[0] == Answer(0)
            await trio.sleep(1)
            for _ in range(2):
                with pytest.raises(RequestRefused, match="enough"):
                    await call.send(Ask())
                with pytest.raises(RequestRefused, match="enough"):
                    await call.receive()
        await caller.check_quiet(answerer)


async def test_whoever_does_not_speak_the_version_says_so(lab, autojump_clock):
    async with ends(lab, double) as (caller, answerer):
        newer = Method("test/ask/2", (Ask,), (Answer,), payload_bytes_max=100_000)
        with pytest.raises(ProtocolUnknown, match="does not speak test/ask/2"):
            await caller.call(newer, Ask())
        with pytest.raises(ProtocolUnknown):
            async with caller.start(newer, Ask(), bytes(100_000)) as call:
                await call.send(Ask(), bytes(100_000))
        await caller.check_quiet(answerer)


async def test_the_deadline_ends_both_sides(lab, autojump_clock):
    cancelled_at = []

    async def stall(call: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled_at.append((trio.current_time(), call.deadline))

    async with ends(lab, stall) as (caller, answerer):
        started_at = trio.current_time()
        with pytest.raises(CallTimedOut, match="longer than 3 s for test/ask/1"):
            await caller.call(ASK, Ask(), timeout_s=3)
        assert trio.current_time() - started_at == pytest.approx(3)
        with trio.move_on_after(2) as outer:  # the caller's own deadline travels, too
            await caller.call(ASK, Ask(), timeout_s=30)
        assert outer.cancelled_caught
        await caller.check_quiet(answerer)
        for (at, deadline), due in zip(cancelled_at, (3, 5), strict=True):
            assert at == pytest.approx(started_at + due, abs=0.05)
            assert deadline == pytest.approx(started_at + due, abs=0.05)


async def test_leaving_a_call_cancels_what_answers(lab, autojump_clock):
    is_cancelled = trio.Event()

    async def flood(call: Any) -> None:
        try:
            while True:
                await call.send(Answer(), bytes(100_000))
        except trio.Cancelled:
            is_cancelled.set()
            raise

    async with ends(lab, flood) as (caller, answerer):
        async with caller.start(ASK, Ask()) as call:
            await call.receive()
        with trio.fail_after(1):
            await is_cancelled.wait()
        await caller.check_quiet(answerer)


async def test_an_unreachable_peer_fails_calls_at_once_or_when_patience_ends(lab, autojump_clock):
    async def stall(_call: Any) -> None:
        await trio.sleep_forever()

    failed_after: dict[float, float] = {}
    async with ends(lab, stall) as (caller, answerer):

        async def ask(patience_s: float, timeout_s: float, error: type[Exception]) -> None:
            with pytest.raises(error):
                await caller.call(ASK, Ask(), timeout_s=timeout_s, patience_s=patience_s)
            failed_after[patience_s] = round(trio.current_time() - started_at, 1)

        started_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 0, 60, PeerUnreachable)
            nursery.start_soon(ask, 2, 60, PeerUnreachable)
            nursery.start_soon(ask, 5, 60, CallTimedOut)  # a path comes back before
            nursery.start_soon(ask, 9, 2.5, CallTimedOut)
            await trio.sleep(1)
            caller.is_reachable = False
            caller.calls.note_unreachable()
            await trio.sleep(4)
            await ask(0, 60, PeerUnreachable)
            assert failed_after == {0: 5, 2: 3, 9: 2.5}
            caller.is_reachable = True
            caller.calls.note_reachable()
        assert failed_after[5] == 60
        await caller.check_quiet(answerer)


async def test_a_lost_connection_ends_both_sides(lab, autojump_clock):
    is_cancelled = trio.Event()

    async def stall(_call: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            is_cancelled.set()

    async with ends(lab, stall) as (caller, answerer):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def ask() -> None:
                with pytest.raises(ConnectionLost):
                    await caller.call(ASK, Ask())

            await trio.sleep(1)
            await answerer.connection.aclose()
            with trio.fail_after(1):
                await is_cancelled.wait()
        with pytest.raises(ConnectionLost):
            await caller.call(ASK, Ask())
        with pytest.raises(ConnectionLost):
            await answerer.call(ASK, Ask())
        await caller.check_quiet(answerer)


# Bounds -------------------------------------------------------------------------------------------


async def test_a_peer_with_too_many_calls_is_told_that_it_is_busy(lab, autojump_clock):
    async def stall(_call: Any) -> None:
        await trio.sleep_forever()

    async with ends(lab, stall, calls_per_peer_max=2) as (caller, answerer):
        async with caller.start(ASK, Ask()):
            async with caller.start(ASK, Ask()):
                await trio.sleep(1)
                with pytest.raises(RequestRefused) as caught:
                    await caller.call(ASK, Ask())
                assert caught.value.code == "busy"
            await trio.sleep(1)
            with pytest.raises(CallTimedOut):  # there is room again
                await caller.call(ASK, Ask(), timeout_s=1)
        await caller.check_quiet(answerer)


async def test_what_is_too_large_is_not_sent(lab, autojump_clock):
    async with ends(lab, echo) as (caller, answerer):
        with pytest.raises(ValueError, match="over the bounds"):
            async with caller.start(ASK, Ask(), bytes(100_001)):
                pass
        await caller.check_quiet(answerer)


@pytest.mark.parametrize("lie", ["garbage", "too large", "no call", "other type", "silence"])
async def test_strangers_that_break_the_rules(lab, autojump_clock, lie):
    async with ends(lab, double) as (caller, answerer):
        stream = await caller.connection.open_stream(ASK.name)
        messages = MessageStream(stream)
        match lie:
            case "garbage":
                await stream.send_all(bytes(range(256)))
            case "too large":
                await stream.send_all(b"\0\0\0\x10\x7f\0\0\0")
            case "no call":
                await messages.send(Ask())
            case "other type":
                await messages.send(Other(), preceded_by=CallBegin())
            case "silence":
                await trio.sleep(16)
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
                await trio.aclose_forcefully(stream)
                await caller.check_quiet(answerer)
                return
        with pytest.raises((RequestRefused, DecodeError)):
            await messages.receive(Answer)
        await stream.aclose()
        await caller.check_quiet(answerer)


async def test_an_answer_of_the_wrong_kind(lab, autojump_clock):
    async def lie(call: Any) -> None:
        await call.send(Other())

    async def say_nothing(_call: Any) -> None:
        pass

    async with ends(lab, lie) as (caller, answerer):
        with pytest.raises(DecodeError):
            await caller.call(ASK, Ask())
        await caller.check_quiet(answerer)
    async with ends(lab, say_nothing) as (caller, answerer):
        with pytest.raises(CallFailed, match="without an answer"):
            await caller.call(ASK, Ask())
        await caller.check_quiet(answerer)


# Cancelling ---------------------------------------------------------------------------------------


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope before the `step`-th time that a task runs."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self.task: trio.lowlevel.Task | None = None
        self._steps_left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self._steps_left -= 1
            if self._steps_left == 0:
                self.scope.cancel()


async def one_question(caller: End) -> None:
    await caller.call(ASK, Ask(1))


async def conversation(caller: End) -> None:
    async with caller.start(ASK, Ask(1), bytes(100_000)) as call:
        await call.receive()
        await call.send(Ask(2), bytes(40_000))
        await call.end()
        async for _ in call:
            pass


async def sender_and_receiver(caller: End) -> None:
    async with caller.start(ASK, Ask(1)) as call, trio.open_nursery() as nursery:

        async def send() -> None:
            for number in range(3):
                await call.send(Ask(number), bytes(90_000))
            await call.end()

        nursery.start_soon(send)
        async for _ in call:
            pass


@pytest.mark.parametrize("scenario", [one_question, conversation, sender_and_receiver])
async def test_cancelled_at_any_checkpoint_a_call_leaves_nothing(lab, autojump_clock, scenario):
    async with ends(lab, echo) as (caller, answerer):
        for step in range(1, 200):
            instrument = CancelAtStep(step)

            async def run(instrument: CancelAtStep = instrument) -> None:
                instrument.task = trio.lowlevel.current_task()
                with instrument.scope:
                    await scenario(caller)

            trio.lowlevel.add_instrument(instrument)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
            trio.lowlevel.remove_instrument(instrument)
            await caller.check_quiet(answerer)
            if not instrument.scope.cancelled_caught:
                break
        assert 5 < step < 199
        # And the connection is as good as new.
        assert await caller.call(ASK, Ask(7)) == Answer(7)


async def test_cancelled_at_any_checkpoint_answering_leaves_nothing(lab, autojump_clock):
    step = 0
    is_reached = True

    async def serve(call: Any) -> None:
        nonlocal is_reached
        instrument = CancelAtStep(step)
        instrument.task = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(instrument)
        try:
            with instrument.scope:
                await echo(call)
        finally:
            trio.lowlevel.remove_instrument(instrument)
        is_reached = instrument.scope.cancelled_caught

    async with ends(lab, serve) as (caller, answerer):
        while is_reached and step < 200:
            step += 1
            with suppress(CallFailed, trio.EndOfChannel):
                await conversation(caller)
            await caller.check_quiet(answerer)
        assert 5 < step < 199
