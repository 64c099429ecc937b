"""What a demo found: filled in while it runs, shown live, printed as JSON at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["DemoDevice", "DemoLearning", "DemoPuncture", "DemoReport"]


@dataclass(slots=True)
class DemoDevice:
    """One device, and its NAT as the node on it classified it."""

    name: str
    carrier: str
    mapping: str | None = None
    filtering: str | None = None
    allocation: str | None = None
    connected_to: list[str] = field(default_factory=list)


@dataclass(slots=True)
class DemoPuncture:
    """One pair of devices.

    Attributes:
        a: The device that asked.
        b: The other one.
        plan: The strategy.
        probes: Sent by both sides together, of all tries.
        seconds: That the asking side probed until it had the path.
        ok: None while under way.
        reason: Why not.
    """

    a: str
    b: str
    plan: str = ""
    probes: int = 0
    seconds: float = 0.0
    ok: bool | None = None
    reason: str = ""


@dataclass(slots=True)
class DemoLearning:
    """How the learning went.

    Attributes:
        learners: Their devices.
        losses: Of each learner on the text of the other, averaged; nats a token, before and after.
        updates: Shards of updates that one made part of its model from the other.
        weights_equal: Whether both hold the same bits in the end.
    """

    learners: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    updates: int = 0
    weights_equal: bool | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the loss fell and all learners hold the same bits."""
        return (
            self.weights_equal is True
            and len(self.losses) >= 2
            and self.losses[-1] < self.losses[0]
        )


@dataclass(slots=True)
class DemoReport:
    """Everything."""

    seed: int
    prompt: str
    asker: str = ""
    devices: list[DemoDevice] = field(default_factory=list)
    punctures: list[DemoPuncture] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    answer: str = ""
    answer_is_complete: bool = False
    tokens_per_second: float = 0.0
    learning: DemoLearning = field(default_factory=DemoLearning)
    status: str = ""
    seconds: float = 0.0

    @property
    def is_ok(self) -> bool:
        """Whether every puncture, the answer and the learning worked."""
        return (
            bool(self.punctures)
            and all(puncture.ok for puncture in self.punctures)
            and self.answer_is_complete
            and self.learning.is_ok
        )

    @property
    def stages_text(self) -> str:
        """The route, for people."""
        route = (f"blocks {stage['blocks']} on {stage['device']}" for stage in self.stages)
        return ", ".join(route)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "seed": self.seed,
            "devices": [
                {
                    "name": device.name,
                    "carrier": device.carrier,
                    "mapping": device.mapping,
                    "filtering": device.filtering,
                    "allocation": device.allocation,
                }
                for device in self.devices
            ],
            "punctures": [
                {
                    "a": puncture.a,
                    "b": puncture.b,
                    "plan": puncture.plan,
                    "probes": puncture.probes,
                    "seconds": round(puncture.seconds, 4),
                    "ok": puncture.ok is True,
                }
                for puncture in self.punctures
            ],
            "prompt": self.prompt,
            "answer": self.answer,
            "stages": self.stages,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "learning": {
                "loss_before": self.learning.losses[0] if self.learning.losses else None,
                "loss_after": self.learning.losses[-1] if self.learning.losses else None,
                "updates": self.learning.updates,
                "weights_equal": self.learning.weights_equal is True,
            },
            "seconds": round(self.seconds, 3),
            "ok": self.is_ok,
        }
