"""`natswarm demo`, as the README's first command runs it: in real time, some 40 seconds."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from llmload.demo import DEFAULT_PROMPT, DEVICES, demo, run_demo
from llmload.demo_report import DemoReport


async def test_everything_in_the_demo_works():
    report = DemoReport(seed=1, prompt=DEFAULT_PROMPT)
    await run_demo(report)
    assert report.is_ok, report.to_json()
    found = report.to_json()
    assert [device["carrier"] for device in found["devices"]] == list(DEVICES.values())
    assert {device["name"]: device["mapping"] for device in found["devices"]} == {
        "campus": "EIM", "lena": "EIM", "vera": "EIM", "home": "EIM", "kim": "APDM", "otto": "APDM"
    }  # fmt: skip
    assert len({stage["device"] for stage in found["stages"]}) == 3
    assert {puncture["plan"] for puncture in found["punctures"]} == {
        "direct", "simultaneous-open", "one-sided-birthday", "two-sided-birthday"
    }  # fmt: skip
    assert found["learning"]["loss_after"] < found["learning"]["loss_before"]


@pytest.mark.parametrize(
    ("prompt", "says"), [("word " * 300, "context"), ("\udcff", "not valid UTF-8")]
)
async def test_a_prompt_that_cannot_be_asked_is_refused_before_anything_else(prompt, says):
    report = DemoReport(seed=1, prompt=prompt)
    await run_demo(report)
    assert not report.is_ok
    assert not report.devices
    assert says in report.status


@pytest.mark.parametrize("seed", ["-1", str(2**32), "x"])
def test_a_seed_out_of_range_is_a_usage_error(seed):
    command = typer.Typer()
    command.command()(demo)
    assert CliRunner().invoke(command, ["--seed", seed]).exit_code == 2
