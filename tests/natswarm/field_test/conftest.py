"""Field tests between two sides on the virtual internet, under Trio's autojumping clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from natswarm.field_test.carrier import CarrierLabel
from natswarm.field_test.link import LinkCounters
from natswarm.field_test.local import LocalBench
from natswarm.field_test.plan import FieldTestPlan
from natswarm.field_test.records import Record
from natswarm.field_test.schedule import FieldTest
from natswarm.field_test.side import SideConfig
from natswarm.identity import Identity
from natswarm.net.virtual import VirtualNetwork

# A moment in 2026; the virtual clock counts from there.
EPOCH_S = 1_790_000_000.0


@dataclass
class FakeLink:
    """An interface without counters, or with one that stands still."""

    is_unplugged: bool = False
    is_stuck: bool = False

    def outage(self) -> str:
        return "the interface usb0 is gone" if self.is_unplugged else ""

    def counters(self) -> LinkCounters | None:
        return LinkCounters(7, 7000, 7) if self.is_stuck else None


@dataclass
class Bed:
    """Two hosts with two helpers; a field test between them."""

    swarm: Any
    records: list[Record] = field(default_factory=list)
    sides: list[SideConfig] = field(default_factory=list)

    def clock(self) -> float:
        return EPOCH_S + trio.current_time()

    async def add_sides(self, left: Any, right: Any, *, with_helpers: bool = True) -> None:
        helpers = await self.swarm.add_observers() if with_helpers else []
        invites = tuple([await helper.invite() for helper in helpers])
        for name, kind in (("left", left), ("right", right)):
            host = self.swarm.internet.add_host(name, kind)
            self.swarm.hosts[name] = host
            config = SideConfig(
                name=name,
                carrier=CarrierLabel(f"XX {name}", "user"),
                make_network=lambda host=host: VirtualNetwork(host),
                helpers=invites,
                interface=f"usb-{name}",
                link=FakeLink(),
            )
            self.sides.append(config)

    def field_test(self, plan: FieldTestPlan, **options: Any) -> FieldTest:
        serials = iter(range(1000))

        def make_identity() -> Identity:
            return Identity(f"{self.swarm.seed}/{next(serials)}".encode().ljust(32, b".")[:32])

        bench = LocalBench(
            plan,
            *self.sides,
            self.records.append,
            clock=self.clock,
            make_identity=make_identity,
        )
        return FieldTest(
            plan,
            options.pop("earlier", ()),
            bench,
            self.records.append,
            begun_at_s=EPOCH_S,
            clock=self.clock,
            **options,
        )

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Look every tenth of a virtual second whether something is so."""
        with trio.fail_after(600):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await trio.sleep(0.1)

    def of(self, kind: type) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]


@pytest.fixture
def make_bed() -> Callable[[Any], Bed]:
    return Bed
