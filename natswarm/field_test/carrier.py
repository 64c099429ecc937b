"""What to call the carrier behind an interface: the user's word, the modem's, or the network's.

ModemManager knows the operator of a modem that it drives, and which interface is the modem's. A
tethered phone hides its operator, so there the name of the network connection (NetworkManager) is
the best guess, and the interface's own name the last. The label says who said so.

Source: mmcli(1) and nmcli(1), asked as programs: neither is needed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from natswarm.message import printable_untrusted

__all__ = ["CarrierLabel", "find_carrier"]

PROGRAM_TIMEOUT_S = 5.0
LABEL_CHARACTERS_MAX = 40

Runner = Callable[[Sequence[str]], str | None]


class CarrierLabel(NamedTuple):
    """A carrier, and who said so."""

    text: str
    source: str


def find_carrier(interface: str, given: str = "", *, run: Runner | None = None) -> CarrierLabel:
    """Return the carrier's label; blocks for the time of a few small programs.

    Args:
        interface: The interface; empty where none was asked for.
        given: What the user calls it; empty: find out.
        run: Runs a program and returns what it printed; None where it cannot.
    """
    run = run or _run
    if given.strip():
        return CarrierLabel(_label(given), "user")
    if interface:
        if operator := _operator(interface, run):
            return CarrierLabel(_label(operator), "modem")
        name = run(["nmcli", "-g", "GENERAL.CONNECTION", "device", "show", interface])
        if name is not None and name.strip():
            return CarrierLabel(_label(name), "network")
    return CarrierLabel(interface or "unknown", "interface")


def _operator(interface: str, run: Runner) -> str:
    """Return the operator of the modem whose interface this is; empty without one."""
    listed = _json(run(["mmcli", "-L", "-J"]))
    for path in listed.get("modem-list", ()):
        modem = _json(run(["mmcli", "-m", str(path), "-J"])).get("modem", {})
        ports = modem.get("generic", {}).get("ports", ())
        if any(str(port).split()[:1] == [interface] for port in ports):
            network = modem.get("3gpp", {})
            words = (network.get("operator-name", ""), network.get("operator-code", ""))
            return " ".join(word for word in words if word and word != "--")
    return ""


def _label(text: str) -> str:
    return printable_untrusted(" ".join(text.split()))[:LABEL_CHARACTERS_MAX]


def _json(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {}


def _run(argv: Sequence[str]) -> str | None:
    if shutil.which(argv[0]) is None:
        return None
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
