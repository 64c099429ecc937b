"""Benchmarks: each prints its figures, or one JSON object with `--json`."""
