"""What `tools/bench/flood.py` lets fall on a node by the million, here by the thousand."""

from __future__ import annotations

from tools.bench.flood import FULL, run_floods, targets_of


def test_a_flood_changes_nothing_but_counters():
    counts = {kind: count // 400 for kind, count in FULL.items()}
    targets = targets_of(run_floods(3, counts, newcomer_count=1))
    assert {name: verdict for name, verdict in targets.items() if not verdict["ok"]} == {}
