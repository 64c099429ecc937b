"""qh3's QUIC connection, and all that this project does to its private parts.

pyproject.toml pins the series (2.1) because of this file. What was found about qh3 by reading and
by measuring stands beside what is done about it. It reads no clock on the way of a packet: every
`now` is an argument, so it runs on Trio's virtual clocks; keys and connection ids are from the
operating system's entropy.
"""

from __future__ import annotations

import logging
from typing import Any

from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnection, QuicConnectionError
from qh3.quic.events import ConnectionTerminated
from qh3.tls import SignatureAlgorithm

from natswarm.identity import Identity

__all__ = ["ENGINE_REFUSALS", "PEER_ADDRESS", "QuicEngine"]

# How qh3 says that a connection has ended, or that it failed inside.
ENGINE_REFUSALS = (QuicConnectionError, RuntimeError, ValueError)

# What QUIC takes for the peer's address: documentation space (RFC 5737), constant by design.
PEER_ADDRESS = ("192.0.2.1", 1)

# It logs every close by a peer as a warning, which Python prints where logging is not set up; to us
# it is an event like others.
logging.getLogger("quic").addHandler(logging.NullHandler())


class QuicEngine(QuicConnection):
    """A QUIC connection without input, output or clock, for both roles.

    Args:
        configuration: Made by `client` or `server`.
        attempt: For a server, the connection id of the client's first Initial packet.
    """

    def __init__(self, configuration: QuicConfiguration, attempt: bytes | None = None) -> None:
        super().__init__(configuration=configuration, original_destination_connection_id=attempt)

    @classmethod
    def client(cls, configuration: QuicConfiguration, attempt: bytes | None = None) -> QuicEngine:
        """Make a client that takes any Ed25519 certificate: its user looks at the key.

        Args:
            configuration: Ours from now on.
            attempt: The connection id of its first Initial packet, 8 random bytes; None draws them.
        """
        configuration.is_client = True
        configuration.verify_mode = 0  # ssl.CERT_NONE: no authority vouches for anybody here
        configuration.signature_algorithms = [SignatureAlgorithm.ED25519]
        engine = cls(configuration)
        if attempt is not None:
            engine._original_destination_connection_id = attempt
        return engine

    @classmethod
    def server(
        cls, configuration: QuicConfiguration, identity: Identity, attempt: bytes
    ) -> QuicEngine:
        """Make a server that proves `identity`, for one attempt of a client."""
        configuration.is_client = False
        configuration.load_cert_chain(identity.certificate_pem, identity.private_key_pem)
        return cls(configuration, attempt)

    def _create_core(self, remote_addr: Any, initial_dcid: bytes, now: float) -> None:
        # A server may send three times what it received until QUIC has validated the path
        # (RFC 9000 section 8.1). Probes have done that here, and qh3 fails ("packet builder
        # capacity exhausted") when lost packets bring it to that limit. It takes a path for
        # validated if there was a Retry; nothing else looks while the core is made.
        if not self._is_client:
            self._retry_source_connection_id = b""
        try:
            super()._create_core(remote_addr, initial_dcid, now)
        finally:
            self._retry_source_connection_id = None

    def feed(self, datagrams: list[bytes], now: float) -> None:
        """Take datagrams in, as `receive_many_datagrams` does.

        Raises:
            Exception: Whatever comes to hand on malformed TLS messages: AssertionError, IndexError,
                struct.error. The rest of the datagrams is lost then.
        """
        if self._handshake_complete and self._core is not None:
            # Without a call a datagram for a log that nobody asked for.
            self._core.receive_many_datagrams(datagrams, PEER_ADDRESS, now)
            self._drain_core()
        else:
            self.receive_many_datagrams(datagrams, PEER_ADDRESS, now)

    def drain(self, now: float, count: int) -> list[bytes]:
        """Return the next `count` datagrams to send, fewer where there are no more.

        Raises:
            RuntimeError: The engine failed inside.
            ValueError: The same.
        """
        # qh3's own `datagrams_to_send` parses each packet it has just made, for a log that nobody
        # asked for: a quarter of the time. And it has no bound.
        if self._core is None:
            return []
        poll = self._core.poll_transmit
        datagrams: list[bytes] = []
        while len(datagrams) < count and (transmit := poll(now)) is not None:
            datagrams.append(transmit[0])
        return datagrams

    @property
    def closing(self) -> ConnectionTerminated | None:
        """Why the connection is ending; qh3's event for a close by the peer comes seconds later."""
        return self._close_event

    @property
    def is_closed_by_peer(self) -> bool:
        """Whether it is the peer that closed."""
        return self._core is not None and self._core.state == "draining"

    @property
    def is_encrypted(self) -> bool:
        """Whether the TLS handshake is done."""
        return self._handshake_complete

    @property
    def has_authentic_packet(self) -> bool:
        """Whether anything that came in was a QUIC packet and not garbage."""
        return self._core is not None and self._core.received_authenticated_packet

    @property
    def peer_key_info(self) -> bytes | None:
        """SubjectPublicKeyInfo of the key that the server's certificate holds."""
        certificate = self.get_peercert()
        return None if certificate is None else certificate.public_key()

    def channel_binding(self) -> bytes:
        """Return a secret that both ends of the finished handshake, and nobody else, can derive."""
        # RFC 8446 section 7.5 derives it from the transcript up to the server's Finished; qh3 keeps
        # one transcript, which includes the client's by now, on both sides.
        assert self.tls is not None
        assert self.tls.key_schedule is not None
        return self.tls.key_schedule.derive_secret(b"exp master")

    def try_update_keys(self) -> bool:
        """Change to new keys, which the peer then follows; False if it is too early."""
        if not self._handshake_confirmed:
            return False
        try:
            self.request_key_update()
        except ENGINE_REFUSALS:  # the last change is not acknowledged yet
            return False
        return True

    def expire_probe_timer(self, now: float, until: float) -> None:
        """Have the next `drain` send a probe packet, whatever congestion control says.

        The PTO timer of RFC 9002 section 6.2 doubles with every expiry; its answer, by whatever
        path it comes, tells which packets were lost, and ends that.

        Args:
            now: Seconds.
            until: A timer that is set for later is left alone: it may be that of idleness, or has
                doubled often enough.

        Raises:
            RuntimeError: The connection has ended.
        """
        self.send_ping(0)
        timer = self.get_timer()
        # With something in flight the timer is loss detection's.
        if timer is not None and timer < until and self.bytes_in_flight:
            self.handle_timer(max(timer, now))

    @property
    def is_unsure(self) -> bool:
        """Whether a probe packet was sent and nothing acknowledged since."""
        return self._core is not None and self._core.pto_count > 0

    @property
    def is_drained(self) -> bool:
        """Whether the peer has acknowledged all we sent."""
        return self.queued_bytes == 0 and self.bytes_in_flight == 0

    @property
    def rtt_s(self) -> float | None:
        """Smoothed round trip; None before the first was measured."""
        return None if self._core is None else self._core.smoothed_rtt

    @property
    def latest_rtt_s(self) -> float | None:
        """The last round trip; None before the first was measured."""
        return None if self._core is None else self._core.latest_rtt

    @property
    def bytes_in_flight(self) -> int:
        """What was sent and is neither acknowledged nor given up."""
        return 0 if self._core is None else self._core.bytes_in_flight

    @property
    def queued_bytes(self) -> int:
        """What waits for its first transmission."""
        return self.get_send_buffer_size()

    @property
    def congestion_window_bytes(self) -> int:
        """How much may be in flight."""
        return 0 if self._core is None else self._core.congestion_window

    @property
    def lost_packet_count(self) -> int:
        """Packets sent and then declared lost."""
        return 0 if self._core is None else self._core.loss_total
