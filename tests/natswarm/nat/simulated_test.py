"""One test of a NAT on the bare virtual internet: observers that answer, and a host that asks.

Observers do what `net/echo.py` does: tokens are real, answering is rate limited, a request to
deliver elsewhere without a valid token is dropped. Only signatures are left out: they would cost
most of the time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

from natswarm.address import ENDPOINT_BYTES, Endpoint
from natswarm.identity import PeerId
from natswarm.nat.address_token import AddressTokens
from natswarm.nat.asking import AskingTest, Script
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.classify import classify
from natswarm.nat.findings import Findings
from natswarm.nat.measurement import (
    AskThirdPeer,
    Observer,
    Reply,
    Request,
    SendEcho,
    SendSelf,
    SendTftp,
)
from natswarm.nat.profile import NatProfile
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.presets import PRESETS, Preset
from natswarm.sim.rate import RateLimit, TokenBuckets
from natswarm.sim.topology import Host, Internet, SimPort
from natswarm.sim.world import World
from natswarm.wire import NO_TOKEN

ECHO = struct.Struct(f">BB8s32s{ENDPOINT_BYTES}s20s")
REQUEST, REPLY = 4, 5
NO_ENDPOINT = bytes(ENDPOINT_BYTES)
TFTP_READ = b"\x00\x01natswarm\x00octet\x00"
ANSWERS_PER_S = 200


def peer_id(name: str) -> PeerId:
    return PeerId(name.encode().ljust(32, b"."))


class SimulatedObserver:
    """A public host with ports p and q that says what it sees, and delivers where a token lets."""

    def __init__(self, internet: Internet, name: str) -> None:
        self.host = internet.add_host(name)
        self.main, self.alternate = self.host.open_port(4000), self.host.open_port(4001)
        self.observer = Observer(
            peer_id(name), self.main.endpoint, self.alternate.endpoint, is_neighbour=True
        )
        self.answered_count = 0
        self._world = internet.world
        self._tokens = AddressTokens(name.encode().ljust(32, b"."))
        self._budget = TokenBuckets(None, RateLimit(ANSWERS_PER_S, ANSWERS_PER_S))
        self.main.on_datagram = lambda data, source: self._answer(data, source, False)
        self.alternate.on_datagram = lambda data, source: self._answer(data, source, True)

    def _answer(self, data: bytes, source: Endpoint, at_alternate: bool) -> None:
        now = self._world.now
        kind, flags, transaction, asker, to, token = ECHO.unpack(data)
        assert kind == REQUEST
        if not self._budget.allow("", now):
            return
        self._budget.take("", now)
        asker_id = PeerId(asker)
        target = source
        if to != NO_ENDPOINT:
            target = Endpoint.decode_untrusted(to)
            if not self._tokens.is_valid(token, asker_id, target.ip, now):
                return
        given = NO_TOKEN
        if target.ip == source.ip:
            given = self._tokens.issue(asker_id, source.ip, now)
        self.answered_count += 1
        port = self.alternate if at_alternate or flags else self.main
        reply = ECHO.pack(
            REPLY, 0, transaction, self.observer.peer_id.key, source.to_bytes(), given
        )
        port.send(reply, target)


class Laboratory:
    """A host behind a NAT, observers, and findings that tests add to one after another."""

    def __init__(
        self,
        kind: str | Preset | NatBehaviour,
        seed: int,
        *,
        loss: float = 0.0,
        observer_count: int = 3,
        delay_s: float = 0.02,
    ) -> None:
        self.internet = Internet(World(seed))
        self.world = self.internet.world
        self.observers = [SimulatedObserver(self.internet, f"P{i}") for i in range(observer_count)]
        self.third = self.internet.add_host("third").open_port()
        self.host: Host = self.internet.add_host("phone", kind)
        # Behind the NAT as well as before it, so that hairpinned datagrams are lost, too.
        nat = self.host.nat
        inner = self.host.uplink
        for link in (inner.upload, inner.download):
            link.conditions = replace(link.conditions, loss=loss)
        if nat is not None and not isinstance(kind, str):
            for link in (nat.uplink.upload, nat.uplink.download):
                link.conditions = replace(link.conditions, delay_s=delay_s)
        self.me = peer_id("phone")
        self.ports: list[SimPort] = []
        behaviour = nat.preset.behaviour if nat is not None else None
        self.findings = Findings(
            tuple(each.observer for each in self.observers),
            NatProfile(
                mapping=behaviour.mapping if behaviour else Mapping.EIM,
                filtering=behaviour.filtering if behaviour else Filtering.EIF,
                is_translated=nat is not None,
                public_ips=(nat.external_ip if nat else self.host.ip,),
            ),
        )
        self.rng = self.world.stream("inspection")
        self.sent: list[tuple[float, Request]] = []
        self._bind(1)

    def _bind(self, count: int) -> range:
        first = len(self.ports)
        for index in range(first, first + count):
            port = self.host.open_port()
            port.on_datagram = self._receiver(index)
            self.ports.append(port)
        return range(first, first + count)

    def run(
        self,
        make: Callable[..., AskingTest],
        port_count: int,
        deadline_s: float = 600.0,
    ) -> AskingTest:
        self.test = test = make(self.findings, self._bind(port_count), self.rng, self.world.now)
        self._act()
        finished = self.world.run(
            until=lambda: test.next_timer() is None, deadline=self.world.now + deadline_s
        )
        assert finished, "the test does not end"
        test.conclude()  # type: ignore[attr-defined]
        return test

    def survey(self, port_count: int = 16) -> None:
        """Find out the law of ports from fresh ports, as the quick part does."""
        self.run(_Survey, port_count)
        fitted = classify(self.findings.observations).allocation
        self.findings.profile = replace(self.findings.profile, allocation=fitted)

    def _act(self) -> None:
        test, now = self.test, self.world.now
        for request in test.requests_to_send(now):
            self.sent.append((now, request))
            self._send(request)
        timer = test.next_timer()
        if timer is not None:
            self.world.at(max(timer, now), self._act_if_due, test)

    def _act_if_due(self, test: AskingTest) -> None:
        timer = test.next_timer()
        if test is self.test and timer is not None and timer <= self.world.now:
            self._act()

    def _receiver(self, index: int) -> Callable[[bytes, Endpoint], None]:
        def receive(data: bytes, source: Endpoint) -> None:
            kind, _, transaction, sender, observed, token = ECHO.unpack(data)
            assert kind == REPLY
            self.test.receive_reply(
                Reply(
                    port_index=index,
                    local_port=self.ports[index].endpoint.port,
                    transaction=transaction,
                    sender=PeerId(sender),
                    source=source,
                    observed=Endpoint.decode_untrusted(observed),
                    token=token,
                ),
                self.world.now,
            )
            self._act()

        return receive

    def _send(self, request: Request) -> None:
        match request:
            case SendEcho():
                to = request.deliver_to
                data = ECHO.pack(
                    REQUEST,
                    int(request.from_alternate),
                    request.transaction,
                    self.me.key,
                    NO_ENDPOINT if to is None else to.to_bytes(),
                    request.token,
                )
                self.ports[request.port_index].send(data, request.destination)
            case SendSelf():
                data = ECHO.pack(
                    REPLY,
                    0,
                    request.transaction,
                    self.me.key,
                    request.destination.to_bytes(),
                    NO_TOKEN,
                )
                self.ports[request.port_index].send(data, request.destination)
            case SendTftp():
                self.ports[request.port_index].send(TFTP_READ, request.destination)
            case AskThirdPeer():
                data = ECHO.pack(
                    REPLY,
                    0,
                    request.transaction,
                    peer_id("third").key,
                    request.observed.to_bytes(),
                    NO_TOKEN,
                )
                self.third.send(data, request.observed)


class _Survey(AskingTest):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        for index, port in enumerate(self.ports):
            self.start(self._look(port, self.findings.observers[index % 2]))

    def _look(self, port: int, observer: Observer) -> Script[None]:
        answer = yield self.echo(port, observer)
        if answer is not None:
            self.findings.observations.append(self.observation(answer, observer.endpoint))

    def conclude(self) -> None:
        pass


def presets_with_a_nat() -> Sequence[str]:
    return [name for name, preset in PRESETS.items() if preset.behaviour is not None]
