"""Without root, namespaces or nftables the laboratory's tests are skipped, saying why.

Where `NATSWARM_LAB=require` is set, as in continuous integration, they fail instead: a machine that
is there to run them must not pass by leaving them out.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from natswarm.lab.capability import missing_capability
from natswarm.lab.client import start_lab, stop_lab
from natswarm.lab.registry import LabState
from natswarm.lab.settings import LabSettings
from natswarm.lab.topology import Host, Lab

OpenSocket = Callable[[Host], socket.socket]
OpenLab = Callable[..., LabState]

_serials = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the lab's tests one after another: real time is part of what they look at."""
    for item in items:
        if item.get_closest_marker("lab") is not None:
            item.add_marker(pytest.mark.xdist_group("lab"))


@pytest.fixture(autouse=True)
def _capable_machine(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("lab") is not None:
        require_capable_machine()


def require_capable_machine() -> None:
    if (reason := missing_capability()) is None:
        return
    if os.environ.get("NATSWARM_LAB") == "require":
        pytest.fail(f"NATSWARM_LAB=require, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def lab(_capable_machine: None) -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def capable_machine() -> None:
    """What fixtures of a wider scope than one test ask for."""
    require_capable_machine()


@pytest.fixture(scope="module")
def shared_lab(capable_machine: None) -> Iterator[Lab]:
    """One lab for the tests of a module that do not disturb each other."""
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def open_lab(capable_machine: None) -> Iterator[OpenLab]:
    """Make labs as `natswarm lab up` does; they are gone after the module."""
    with contextlib.ExitStack() as stack:

        def open_one(*devices: str, **settings: object) -> LabState:
            # Other runs on this machine have labs, too.
            name = f"test-{os.getpid()}-{next(_serials)}"
            state = start_lab(LabSettings(name=name, devices=devices, **settings))
            stack.callback(stop_lab, state)
            return state

        yield open_one


@pytest.fixture
def open_socket() -> Iterator[OpenSocket]:
    """Open UDP sockets on hosts of a lab; they are closed after the test."""
    with contextlib.ExitStack() as stack:

        def open_one(host: Host) -> socket.socket:
            with host.namespace.entered():
                udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                udp.bind((host.ip, 0))
            udp.settimeout(5)
            return udp

        yield open_one
