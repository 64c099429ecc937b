"""docs/inspect.md says what is so: labels, keys, options, and captures as they are printed."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command

from natswarm.cli import app
from natswarm.cli.inspect_view import LABELS
from tools.inspect_captures import CAPTURES, PAGE, capture, written_captures

TEXT = PAGE.read_text()


HEADINGS = ("Interfaces", "Gateway", "Path", "NAT", "Observers", "Advice", "Warnings")


def outline(text: str) -> list[str]:
    """Return the sections and properties, which neither figures nor widths change."""
    cells = [re.split("  +", line.strip())[0] for line in text.splitlines()]
    return [cell for cell in cells if cell in (*HEADINGS, *LABELS.values())]


@pytest.mark.parametrize("name", CAPTURES)
def test_captures_are_what_is_printed(name: str):
    written = outline(written_captures(TEXT)[name])
    assert len(written) > 12
    assert written == outline(capture(name)), "make them anew: python -m tools.inspect_captures"


def test_every_label_is_explained():
    explained = {line.split("|")[1].strip() for line in TEXT.splitlines() if line.startswith("| ")}
    assert set(LABELS.values()) <= explained


def test_every_field_of_the_schema_is_named():
    for name in LABELS:
        assert f"`{name}`" in TEXT


def test_every_option_is_explained():
    command = get_command(app).commands["inspect"]
    options = {name for each in command.params for name in each.opts if name.startswith("--")}
    unexplained = {each for each in options if each not in TEXT}
    assert unexplained <= {"--state", "--bind", "--help"}
