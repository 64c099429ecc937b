"""The paths of one connection, and the one constant place that QUIC sees instead of them.

    Connection.send ──▶ active path ──▶ port ──▶ endpoint
    PortPump ──▶ any path of the set ──▶ Connection.receive_datagrams

The driver of a `PathKeeper`: gives the machine what arrives, sends what it says, and attaches the
connection to the pump of each path, so that QUIC datagrams are taken from the paths of the set and
from nowhere else. Ports that only this connection uses are closed with their last path.

Knows neither punctures nor streams. When to open another path is `renewer.py`'s affair.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from natswarm.address import Endpoint
from natswarm.identity import ProbeKeys
from natswarm.net.path_keeper import (
    KeeperStatistics,
    Lifetimes,
    Path,
    PathKeeper,
    PathSwitched,
)
from natswarm.net.pump import PortPump
from natswarm.net.quic import Connection
from natswarm.net.tracing import ConnectionLog

__all__ = ["PathSet", "PathStatistics"]

Receiver = Callable[[list[bytes]], None]


@dataclass(frozen=True, slots=True)
class PathStatistics:
    """A path in numbers; what is counted is QUIC's."""

    local: Endpoint
    remote: Endpoint
    is_active: bool
    is_spare: bool
    """Whether either side only keeps it ready."""
    is_dead: bool
    rtt_s: float | None
    """Of probes; None before the first answer."""
    age_s: float
    silent_s: float
    """Since the last authentic datagram; infinite where none came."""
    sent_datagram_count: int
    sent_bytes: int
    received_datagram_count: int
    received_bytes: int


class PathSet:
    """All paths of one connection.

    Args:
        connection: Whose.
        keys: MAC keys between us and the peer.
        main: The pump of the node's main port, which others use as well.
        log: Where to write down what happens; None: nowhere.

    Attributes:
        on_switch: Told when the connection moves, or has nowhere to be.
        on_doubt: Told when the active path does not answer in time.
        on_rebound: Told when the peer sees a port of ours elsewhere than before.
    """

    def __init__(
        self,
        connection: Connection,
        keys: ProbeKeys,
        *,
        main: PortPump,
        log: ConnectionLog | None = None,
    ) -> None:
        self.connection = connection
        self.on_switch: Callable[[PathSwitched], None] = lambda _switch: None
        self.on_doubt: Callable[[], None] = lambda: None
        self.on_rebound: Callable[[], None] = lambda: None
        self._main = main
        self._pumps: dict[int, PortPump] = {0: main}
        self._port_count = 1  # so far: an index is never used again
        self._attached: dict[tuple[int, Endpoint], tuple[PortPump, Receiver]] = {}
        self._log = log
        self._keeper = PathKeeper(keys, bytes(8))
        self._is_named = False
        self._is_closed = False
        self._wakeup = trio.Event()
        self._changed = trio.Event()
        self._heard = trio.Event()
        connection.send = self._send_quic

    # What others ask ------------------------------------------------------------------------------

    @property
    def remote(self) -> Endpoint:
        """Where the peer is: its end of the active path."""
        assert self._keeper.active is not None, "a set begins with a path"
        return self._keeper.active.endpoint

    @property
    def seen_at(self) -> Endpoint:
        """Where the peer was heard from last: for a moment ahead of `remote` when it has moved."""
        paths = self._keeper.paths
        return max(paths, key=lambda path: path.heard_at).endpoint if paths else self.remote

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that answered, oldest first, the dead ones that may come back included."""
        return tuple(self._keeper.paths)

    def statistics(self) -> list[PathStatistics]:
        """Return the figures of each path, as `paths` has them."""
        now = trio.current_time()
        return [
            PathStatistics(
                local=self._pumps[path.port_index].port.local_endpoint,
                remote=path.endpoint,
                is_active=path is self._keeper.active,
                is_spare=path.is_kept_ready,
                is_dead=path.is_dead,
                rtt_s=path.rtt_s,
                age_s=now - path.found_at,
                silent_s=now - path.heard_at,
                sent_datagram_count=path.sent_datagram_count,
                sent_bytes=path.sent_bytes,
                received_datagram_count=path.received_datagram_count,
                received_bytes=path.received_bytes,
            )
            for path in self._keeper.paths
            if path.port_index in self._pumps
        ]

    def probe_statistics(self) -> KeeperStatistics:
        """Return the counters of the probes that keep the paths."""
        return self._keeper.statistics

    @property
    def name(self) -> bytes | None:
        """The 8 bytes that probes of this connection carry; None before both ends are proved."""
        return self._keeper.name if self._is_named else None

    @property
    def is_alive(self) -> bool:
        """Whether a path leads to the peer, as far as we know."""
        return self._keeper.stranded_since is None and not self._is_closed

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended."""
        return self._is_closed

    @property
    def stranded_since(self) -> float | None:
        """Since when none does; None while one does."""
        return self._keeper.stranded_since

    @property
    def lifetimes(self) -> Lifetimes:
        """What our NAT is taken to do, corrected by what was seen."""
        return self._keeper.lifetimes

    @lifetimes.setter
    def lifetimes(self, lifetimes: Lifetimes) -> None:
        self._keeper.lifetimes = lifetimes
        self._tell_change()
        self._wake()

    @property
    def busy_at(self) -> float:
        """When QUIC last sent anything; minus infinity: never."""
        active = self._keeper.active
        return -math.inf if active is None else active.traffic_at

    @property
    def sightings(self) -> list[tuple[Endpoint, Endpoint]]:
        """Where the peer sees our main port, since we last moved: (its own endpoint, ours)."""
        return [
            (path.endpoint, path.observed)
            for path in self._keeper.paths
            if path.port_index == 0 and path.observed is not None and not path.is_dead
        ]

    @property
    def has_spare(self) -> bool:
        """Whether we keep a path ready over another interface, and it is alive."""
        return any(path.is_spare and not path.is_dead for path in self._keeper.paths)

    @property
    def uses_spare(self) -> bool:
        """Whether QUIC goes by that, since no other answers."""
        active = self._keeper.active
        return active is not None and active.is_spare

    def where_seen(self, ip: str) -> Endpoint | None:
        """Return where the peer is at an address of its own; None: no living path leads there."""
        for path in self._keeper.paths:
            if path.endpoint.ip == ip and path.is_proven and not path.is_dead:
                return path.endpoint
        return None

    @property
    def is_certain(self) -> bool:
        """Whether the peer has answered since we last moved."""
        active = self._keeper.active
        return active is not None and not active.is_in_question_by_move

    async def wait_certain(self, since: float) -> None:
        """Wait until the active path has answered after that time, or is dead."""
        while not self._is_closed:
            active = self._keeper.active
            if active is None or active.is_dead:
                return
            # The peer may have asked us meanwhile, which tells nothing of where we are.
            if active.heard_at > since and active.doubted_since is None:
                return
            await self._heard.wait()

    @property
    def renewal_at(self) -> float:
        """When the next path should be opened, before this one ends by its age."""
        return self._keeper.renewal_at

    async def wait_changed(self) -> None:
        """Wait until the connection moved, was stranded or closed, or the lifetimes changed."""
        await self._changed.wait()

    # Paths ----------------------------------------------------------------------------------------

    def add(
        self, pump: PortPump, remote: Endpoint, *, opened_at: float, is_spare: bool = False
    ) -> None:
        """Take a path that a puncture has proved, and move to it, unless it is a spare one.

        Its port, if own, is ours from now on.
        """
        if (index := self._take(pump)) is not None:
            now = trio.current_time()
            self._keeper.add(index, remote, now, opened_at=opened_at, is_spare=is_spare)
            self._after_change()

    def check_spare(self, pump: PortPump, endpoints: Sequence[Endpoint]) -> None:
        """Ask endpoints from a port of another interface; which answers is kept ready."""
        if (index := self._take(pump)) is not None:
            self._keeper.check(index, tuple(endpoints), trio.current_time(), is_spare=True)
            self._wake()

    def drop_spares(self) -> None:
        """Keep no path ready over another interface any more."""
        self._keeper.drop_spares()
        self._after_change()

    def _take(self, pump: PortPump) -> int | None:
        """Own a port; return its index, None where the connection has ended."""
        if self._is_closed:
            if pump is not self._main:
                pump.port.close()
            return None
        if (index := self._index_of(pump)) is None:
            index = self._port_count
            self._port_count += 1
            self._pumps[index] = pump
        return index

    def check(self, endpoints: Sequence[Endpoint]) -> None:
        """Ask endpoints where the peer may be, from the main port."""
        self._keeper.check(0, tuple(endpoints), trio.current_time())
        self._wake()

    def recheck(self, *, has_moved: bool, has_slept: bool = False) -> None:
        """Ask every path at once: we have moved or slept, or something is strange."""
        self._keeper.recheck(trio.current_time(), has_moved=has_moved, has_slept=has_slept)
        self._wake()

    def hurry(self) -> None:
        """Ask every path at once, and not for long: the peer says that none leads to us."""
        self._keeper.hurry(trio.current_time())
        self._wake()

    def receive_untrusted(self, data: bytes, source: Endpoint, pump: PortPump) -> None:
        """Take a probe of our name."""
        index = self._index_of(pump)
        if self._is_closed or index is None:
            return
        rebound_count = self._keeper.statistics.rebound_count
        self._keeper.receive_datagram(index, data, source, trio.current_time())
        if self._keeper.statistics.rebound_count != rebound_count:
            self.on_rebound()
        self._heard.set()
        self._heard = trio.Event()
        self._send_due()
        self._after_change()

    async def run(self, name: bytes) -> None:
        """Keep the paths, by the connection's name, until cancelled."""
        self._keeper.name = name
        self._is_named = True
        while True:
            self._send_due()
            self._after_change()
            self._wakeup = trio.Event()
            with trio.move_on_at(self._keeper.next_timer()):
                await self._wakeup.wait()

    def close(self) -> None:
        """Leave every path and close the ports that were only for this connection; idempotent."""
        self._is_closed = True
        for way in list(self._attached):
            self._detach(way)
        for pump in self._pumps.values():
            if pump is not self._main:
                pump.port.close()
        if self._log is not None:
            self._log.close()
        self._tell_change()

    # The machine ----------------------------------------------------------------------------------

    def _send_quic(self, datagrams: Sequence[bytes]) -> None:
        active = self._keeper.active
        if active is None or self._is_closed:
            return
        self._pumps[active.port_index].port.send_run(datagrams, active.endpoint)
        active.sent_datagram_count += len(datagrams)
        active.sent_bytes += sum(map(len, datagrams))
        if self._log is not None:
            self._log.note_sent(datagrams, str(active.endpoint))
        if self._keeper.note_traffic(trio.current_time()):
            self._wake()

    def _receive_quic(self, way: tuple[int, Endpoint], datagrams: list[bytes]) -> None:
        for path in self._keeper.paths:
            if path.way == way:
                path.received_datagram_count += len(datagrams)
                path.received_bytes += sum(map(len, datagrams))
        if self._log is not None:
            self._log.note_received(datagrams, str(way[1]))
        self.connection.receive_datagrams(datagrams)

    def _send_due(self) -> None:
        if not self._is_named or self._is_closed:
            return
        doubted_count = self._keeper.statistics.doubted_count
        probes = self._keeper.probes_to_send(trio.current_time())
        if self._keeper.statistics.doubted_count != doubted_count:
            self.on_doubt()
        for probe in probes:
            if (pump := self._pumps.get(probe.port_index)) is not None:
                with contextlib.suppress(trio.ClosedResourceError):
                    pump.port.send(probe.data, probe.destination)

    def _after_change(self) -> None:
        """Attach and detach, tell of a switch, and have `run` look at the clock."""
        wanted = {path.way: path for path in self._keeper.paths}
        for way in list(self._attached):
            if way not in wanted:
                self._detach(way)
        for way in wanted:
            if way not in self._attached:
                pump = self._pumps[way[0]]
                # Whoever was there before is not any more: the peer has answered from there.
                pump.detach(way[1])
                receiver = partial(self._receive_quic, way)
                pump.attach(way[1], receiver)
                self._attached[way] = pump, receiver
        self._close_unused()
        while (switch := self._keeper.next_event()) is not None:
            self._tell_change()
            if self._is_named:
                if self._log is not None:
                    self._log.note_switch(switch.old, switch.new, switch.reason)
                if switch.new is None:
                    self.connection.suspend()
                else:
                    self.connection.resume()
                self.on_switch(switch)
        self._wake()

    def _close_unused(self) -> None:
        used = self._keeper.port_indices
        for index, pump in list(self._pumps.items()):
            if pump is not self._main and index not in used:
                pump.port.close()
                del self._pumps[index]
                self._keeper.forget_port(index)

    def _index_of(self, pump: PortPump) -> int | None:
        for index, each in self._pumps.items():
            if each is pump:
                return index
        return None

    def _detach(self, way: tuple[int, Endpoint]) -> None:
        # Another connection may have taken the endpoint over: only our own receiver goes.
        pump, receiver = self._attached.pop(way)
        pump.detach(way[1], receiver)

    def _tell_change(self) -> None:
        for event in (self._changed, self._heard):
            event.set()
        self._changed, self._heard = trio.Event(), trio.Event()

    def _wake(self) -> None:
        self._wakeup.set()
