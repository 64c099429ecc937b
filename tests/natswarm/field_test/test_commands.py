"""What `natswarm field-test` says to those who call it wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from natswarm.cli.app import app
from natswarm.errors import NatswarmError


def error_of(*words: str) -> str:
    result = CliRunner().invoke(app, ["field-test", *words])
    assert isinstance(result.exception, NatswarmError), result.output
    return str(result.exception)


def test_two_interfaces_are_two():
    assert "both sides are usb0" in error_of("run", "--left", "usb0", "--right", "usb0")


def test_an_interface_that_is_not_there():
    assert "no interface 'usb7'" in error_of("run", "--left", "usb7", "--right", "usb8")


def test_two_devices_need_a_helper():
    assert "natswarm up" in error_of("host")


def test_a_link_that_is_none(tmp_path: Path):
    assert "ask for it again" in error_of("join", "natswarm-field-test:abc")
    assert "a link starts with" in error_of("join", "natswarm:abc")


def test_a_report_of_what_is_no_field_test(tmp_path: Path):
    assert "name the folder of a field test" in error_of("report", str(tmp_path))


@pytest.mark.parametrize("command", ["run", "host", "join", "report"])
def test_each_command_explains_itself(command: str):
    result = CliRunner().invoke(app, ["field-test", command, "--help"])
    assert result.exit_code == 0
    assert "out" in result.output
