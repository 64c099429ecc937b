"""What stops sending is noticed within two seconds, once, and with where it stopped."""

from __future__ import annotations

from natswarm.field_test.stall import Notice, Sample, StallWatch, Trouble

STEP_S = 0.25


def notices(samples: list[Sample]) -> list[tuple[float, Notice]]:
    watch = StallWatch("usb0")
    return [(sample.at, notice) for sample in samples for notice in watch.observe(sample)]


def sending(
    seconds: float,
    *,
    per_s: int = 1000,
    wire_until: float = 1e9,
    taken_until: float = 1e9,
    waiting_from: float | None = None,
    down: tuple[float, float] = (1e9, 1e9),
    wire_bytes: int = 77,
) -> list[Sample]:
    samples = []
    for step in range(int(seconds / STEP_S)):
        at = step * STEP_S
        handed = int(min(at, taken_until) * per_s)
        samples.append(
            Sample(
                at=at,
                handed_count=handed,
                refused_count=int(max(0.0, at - taken_until) * per_s),
                refusal="No buffer space available" if at > taken_until else "",
                interface_bytes=int(min(at, wire_until) * per_s) * wire_bytes,
                outage="the interface usb0 is gone" if down[0] <= at < down[1] else "",
                waiting_since=waiting_from
                if waiting_from is not None and at >= waiting_from
                else None,
            )
        )
    return samples


def test_all_is_well():
    assert notices(sending(60)) == []
    # Others use the interface, too; a slow modem lags behind; at rest nothing moves.
    assert notices(sending(60, wire_bytes=500)) == []
    assert notices(sending(60, wire_bytes=20)) == []
    assert notices(sending(60, per_s=5, wire_until=3)) == []
    assert notices([Sample(at, 1000) for at in range(100)]) == [], "no counters are known"


def test_the_system_swallows_at_29_000_of_250_000():
    [(at, notice), *more] = notices(sending(250, wire_until=29.0))
    assert not more
    assert notice.trouble is Trouble.SWALLOWED
    assert 29.0 < at <= 31.0
    assert "29," in notice.text
    assert "stands still" in notice.text


def test_the_system_refuses():
    [(at, notice), *more] = notices(sending(60, taken_until=10.0))
    assert not more
    assert notice.trouble is Trouble.REFUSED
    assert at <= 11.0
    assert "No buffer space available" in notice.text
    assert "10,000" in notice.text


def test_a_silent_carrier():
    [(at, notice), *more] = notices(sending(30, waiting_from=10.0))
    assert not more
    assert notice.trouble is Trouble.UNANSWERED
    assert at == 12.0
    # An answer that comes in time is none.
    assert notices([Sample(10 + n, n, waiting_since=9 + n) for n in range(20)]) == []


def test_a_pulled_cable_is_told_and_its_return():
    found = notices(sending(30, wire_until=10.0, down=(10.0, 20.0)))
    told = [(at, each.trouble, each.is_over) for at, each in found]
    assert told[0] == (10.0, Trouble.DOWN, False)
    assert (20.0, Trouble.DOWN, True) in told
    # What follows from it is not told besides, until it is back and still swallows.
    assert [each for each in told if 10.0 < each[0] < 20.0] == []


def test_what_goes_on_is_told():
    samples = sending(20, wire_until=5.0)
    late = [
        Sample(20 + n * STEP_S, 20_000 + n * 250, 0, "", 400_000 + n * 250 * 77) for n in range(20)
    ]
    *_, (_, last) = notices([*samples, *late])
    assert last.trouble is Trouble.SWALLOWED
    assert last.is_over
    assert "goes on" in last.text
