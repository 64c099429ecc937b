"""Single tests of a NAT on the bare virtual internet, without the inspection around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from natswarm.nat.asking import AskingTest, Script
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.classify import classify
from natswarm.nat.findings import Findings
from natswarm.nat.measurement import Observer, Reply, Request
from natswarm.nat.profile import NatProfile
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.presets import Preset
from natswarm.sim.topology import Host, Internet
from natswarm.sim.world import World
from tools.bench.simulated_inspection import EchoPorts, SimulatedObserver


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
        self.host: Host = self.internet.add_host("phone", kind)
        # Behind the NAT as well as before it, so that hairpinned datagrams are lost, too.
        nat = self.host.nat
        inner = self.host.uplink
        for link in (inner.upload, inner.download):
            link.conditions = replace(link.conditions, loss=loss)
        if nat is not None and not isinstance(kind, str):
            for link in (nat.uplink.upload, nat.uplink.download):
                link.conditions = replace(link.conditions, delay_s=delay_s)
        self._asker = EchoPorts(self.host, self._receive)
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
        first = len(self._asker.ports)
        for _ in range(count):
            self._asker.add(self.host.open_port())
        return range(first, first + count)

    def run(
        self,
        make: Callable[..., Any],
        port_count: int,
        deadline_s: float = 600.0,
    ) -> AskingTest:
        self.test = test = make(self.findings, self._bind(port_count), self.rng, self.world.now)
        self._act()
        finished = self.world.run(
            until=lambda: test.next_timer() is None, deadline=self.world.now + deadline_s
        )
        assert finished, "the test does not end"
        test.conclude()
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
            self._asker.send(request)
        timer = test.next_timer()
        if timer is not None:
            self.world.at(max(timer, now), self._act_if_due, test)

    def _act_if_due(self, test: AskingTest) -> None:
        timer = test.next_timer()
        if test is self.test and timer is not None and timer <= self.world.now:
            self._act()

    def _receive(self, reply: Reply) -> None:
        self.test.receive_reply(reply, self.world.now)
        self._act()


class _Survey(AskingTest):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for index, port in enumerate(self.ports):
            self.start(self._look(port, self.findings.observers[index % 2]))

    def _look(self, port: int, observer: Observer) -> Script[None]:
        answer = yield self.echo(port, observer)
        if answer is not None:
            self.findings.observations.append(self.observation(answer, observer.endpoint))

    def conclude(self) -> None:
        pass
