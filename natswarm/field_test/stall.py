"""Notice within two seconds that something silently stopped sending.

The known failure: an application that reported 29,000 of 250,000 packets and nothing after, and
nobody could say where they stopped. A datagram passes four places, and each has its own witness:

    the socket        counts what the system did not take                    REFUSED
    the interface     its own counter of sent bytes does not move            SWALLOWED
    the carrier       a helper that is asked again and again falls silent    UNANSWERED
    the cable         the interface is down, gone, or lost its address       DOWN

Pure arithmetic on samples, some a second: knows no sockets and no files.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass

__all__ = ["Notice", "Sample", "StallWatch", "Trouble"]

WINDOW_S = 1.0
# Fewer prove nothing: at rest a node sends one keepalive in 20 s.
HANDED_MIN = 20
REFUSED_MIN = 5
# A datagram of ours has 49 bytes at least, and 28 of IP and UDP. A slow modem's queue fills before
# its counter stands still, so that less than a tenth getting out is no mere slowness.
WIRE_BYTES_MIN = 77
SWALLOWED_BELOW = 0.1
# The question is retransmitted three times by then where a round trip takes 0.3 s.
UNANSWERED_S = 2.0


class Trouble(enum.Enum):
    """Where datagrams stop."""

    DOWN = "down"
    REFUSED = "refused"
    SWALLOWED = "swallowed"
    UNANSWERED = "unanswered"


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters at one moment.

    Attributes:
        at: Seconds.
        handed_count: Datagrams that the system took so far.
        refused_count: Datagrams that it did not take so far.
        refusal: What it said last.
        interface_bytes: What the interface has sent so far; None: not known.
        outage: What is wrong with the interface; empty: nothing.
        waiting_since: Since when a helper owes an answer; None: it does not.
    """

    at: float
    handed_count: int
    refused_count: int = 0
    refusal: str = ""
    interface_bytes: int | None = None
    outage: str = ""
    waiting_since: float | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """A trouble began, or is over.

    Attributes:
        trouble: Which.
        is_over: Whether it is.
        text: For the user.
    """

    trouble: Trouble
    is_over: bool
    text: str


class StallWatch:
    """Watches one side.

    Args:
        name: How to call its interface.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._samples: deque[Sample] = deque()
        self._going_on: dict[Trouble, float] = {}

    @property
    def troubles(self) -> tuple[Trouble, ...]:
        """What goes on, oldest first."""
        return tuple(self._going_on)

    def observe(self, sample: Sample) -> list[Notice]:
        """Take a sample; return what it shows for the first time, and what is over."""
        self._samples.append(sample)
        while len(self._samples) > 2 and self._samples[1].at <= sample.at - WINDOW_S:
            self._samples.popleft()
        found = self._look(sample)
        notices = []
        for trouble in Trouble:
            text = found.get(trouble)
            if text is not None and trouble not in self._going_on:
                self._going_on[trouble] = sample.at
                notices.append(Notice(trouble, is_over=False, text=text))
            elif text is None and not sample.outage and self._is_over(trouble, sample):
                seconds = sample.at - self._going_on.pop(trouble)
                notices.append(
                    Notice(
                        trouble,
                        is_over=True,
                        text=f"{self._name} goes on: {trouble.value} for {seconds:.1f} s",
                    )
                )
        return notices

    def _look(self, now: Sample) -> dict[Trouble, str]:
        """Return what is wrong now."""
        if now.outage:
            # Whatever else is seen follows from it.
            return {Trouble.DOWN: f"{now.outage}: is the cable in, has the modem a network?"}
        before = self._samples[0]
        handed = now.handed_count - before.handed_count
        refused = now.refused_count - before.refused_count
        found = {}
        if refused >= max(REFUSED_MIN, handed):
            found[Trouble.REFUSED] = (
                f"the system takes no more datagrams for {self._name}: {refused} refused after "
                f"{now.handed_count:,} were taken ({now.refusal or 'without a word'})"
            )
        if self._is_swallowed(before, now, handed):
            found[Trouble.SWALLOWED] = (
                f"the system stopped sending on {self._name} after {before.handed_count:,} "
                f"datagrams: it took {handed} more in {now.at - before.at:.1f} s, but the "
                "interface's own counter stands still"
            )
        since = now.waiting_since
        if since is not None and now.at - since >= UNANSWERED_S:
            found[Trouble.UNANSWERED] = (
                f"nothing comes back by {self._name} for {now.at - since:.1f} s, after "
                f"{now.handed_count:,} datagrams: the carrier, the modem or the helper fell silent"
            )
        return found

    @staticmethod
    def _is_swallowed(before: Sample, now: Sample, handed: int) -> bool:
        if before.interface_bytes is None or now.interface_bytes is None:
            return False
        if handed < HANDED_MIN or now.at - before.at < WINDOW_S:
            return False
        sent = now.interface_bytes - before.interface_bytes
        return sent < SWALLOWED_BELOW * handed * WIRE_BYTES_MIN

    def _is_over(self, trouble: Trouble, now: Sample) -> bool:
        """Whether what went on has ended; that nothing is sent any more is no end of a stall."""
        if trouble not in self._going_on:
            return False
        if trouble in (Trouble.REFUSED, Trouble.SWALLOWED):
            return now.handed_count - self._samples[0].handed_count >= HANDED_MIN
        return True
