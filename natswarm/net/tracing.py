"""What is written down of connections on request: a qlog for each, and their keys for Wireshark.

    FOLDER/1767226212-6vqkx2d3-client.sqlog   when, how much, by which path; round trip and window
    KEYFILE                                   TLS secrets, as browsers write them (SSLKEYLOGFILE)

A qlog is a JSON text sequence (RFC 7464) of version 0.3, which qvis reads. The engine is not asked
for its own: it would parse each packet once more, and knows nothing of paths. Whoever has the keys
reads all that the connections carry, so both kinds of file are for their owner's eyes. Writing them
holds up the loop, which who looks for a fault can bear.

Source: draft-ietf-quic-qlog-main-schema-02 and -quic-events-04; the NSS key log format.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import trio

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.identity import PeerId
from natswarm.net.quic import Connection

__all__ = ["ConnectionLog", "Tracer", "Tracing"]

RECORD_SEPARATOR = "\x1e"
METRICS_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class Tracing:
    """What to write down.

    Attributes:
        qlog_folder: Where each connection gets a file; None: no qlogs.
        key_file: Where secrets are added; None: nowhere.
    """

    qlog_folder: Path | None = None
    key_file: Path | None = None


class Tracer:
    """Opens the files of one node.

    Args:
        tracing: What to write down.

    Attributes:
        key_log: Where connections write their secrets; None: nowhere.

    Raises:
        ConfigurationError: It can't be written there.
    """

    def __init__(self, tracing: Tracing) -> None:
        self._folder = tracing.qlog_folder
        self.key_log: TextIO | None = None
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            if tracing.key_file is not None:
                self.key_log = _open_private(tracing.key_file)
        except OSError as error:
            raise ConfigurationError(f"can't trace connections: {error}") from error

    def log_of(self, connection: Connection, *, is_client: bool) -> ConnectionLog | None:
        """Begin the qlog of a connection; None where none was asked for."""
        if self._folder is None:
            return None
        role = "client" if is_client else "server"
        name = f"{time.time_ns() // 1000}-{connection.peer_id.short}-{role}.sqlog"
        return ConnectionLog(_open_private(self._folder / name), connection, role)

    def close(self) -> None:
        """Close what is open; idempotent."""
        if self.key_log is not None:
            self.key_log.close()


class ConnectionLog:
    """The qlog of one connection.

    Args:
        file: Where it is written; closed with the connection.
        connection: Whose figures are added ten times a second, while anything is sent.
        role: "client" or "server".
    """

    def __init__(self, file: TextIO, connection: Connection, role: str) -> None:
        self._file = file
        self._connection = connection
        self._started_at = trio.current_time()
        self._measured_at = self._started_at
        self._write_record(_header(connection.peer_id, role))

    def note_sent(self, datagrams: Sequence[bytes], way: str) -> None:
        """Datagrams of QUIC went out by a path."""
        self._note_datagrams("transport:datagrams_sent", datagrams, way)
        if trio.current_time() >= self._measured_at + METRICS_INTERVAL_S:
            self._note_metrics()

    def note_received(self, datagrams: Sequence[bytes], way: str) -> None:
        """Datagrams came in by a path, looked like QUIC, and were not looked at yet."""
        self._note_datagrams("transport:datagrams_received", datagrams, way)

    def note_switch(self, old: Endpoint | None, new: Endpoint | None, reason: str) -> None:
        """The connection goes by another path; qlog has no event for it."""
        self._note(
            "natswarm:path_switched",
            {
                "old": None if old is None else str(old),
                "new": None if new is None else str(new),
                "reason": reason,
            },
        )

    def close(self) -> None:
        """Write why the connection ended; idempotent."""
        if self._file.closed:
            return
        self._note_metrics()
        reason = self._connection.close_reason or "going on"
        self._note("connectivity:connection_closed", {"reason": reason})
        self._file.close()

    def _note_datagrams(self, name: str, datagrams: Sequence[bytes], way: str) -> None:
        raw = [{"length": len(data)} for data in datagrams]
        self._note(name, {"count": len(raw), "raw": raw, "path": way})

    def _note_metrics(self) -> None:
        self._measured_at = trio.current_time()
        statistics = self._connection.statistics()
        figures: dict[str, float] = {
            "congestion_window": statistics.congestion_window_bytes,
            "lost_packets": statistics.lost_packet_count,
            "streams": statistics.stream_count,
            "unread_bytes": statistics.buffered_bytes,
        }
        if statistics.rtt_s is not None:
            figures["smoothed_rtt"] = 1000 * statistics.rtt_s
        self._note("recovery:metrics_updated", figures)

    def _note(self, name: str, data: dict[str, Any]) -> None:
        if not self._file.closed:
            milliseconds = 1000 * (trio.current_time() - self._started_at)
            self._write_record({"time": round(milliseconds, 3), "name": name, "data": data})

    def _write_record(self, record: dict[str, Any]) -> None:
        self._file.write(f"{RECORD_SEPARATOR}{json.dumps(record)}\n")


def _header(peer_id: PeerId, role: str) -> dict[str, Any]:
    return {
        "qlog_version": "0.3",
        "qlog_format": "JSON-SEQ",
        "title": f"natswarm connection with {peer_id}",
        "trace": {
            "vantage_point": {"name": "natswarm", "type": role},
            "common_fields": {
                "protocol_type": ["QUIC", "natswarm"],
                "time_format": "relative",
                "reference_time": 1000 * time.time(),
            },
        },
    }


def _open_private(path: Path) -> TextIO:
    """Open a file for adding to it, which nobody else can read if it is new."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8")
