"""Without root, namespaces or nftables the laboratory's tests are skipped, saying why.

Where `NATSWARM_LAB=require` is set, as in continuous integration, they fail instead: a machine that
is there to run them must not pass by leaving them out.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from natswarm.lab.capability import missing_capability
from natswarm.lab.topology import Host, Lab

OpenSocket = Callable[[Host], socket.socket]


@pytest.fixture(autouse=True)
def _capable_machine(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("lab") is None:
        return
    if (reason := missing_capability()) is None:
        return
    if os.environ.get("NATSWARM_LAB") == "require":
        pytest.fail(f"NATSWARM_LAB=require, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def lab(_capable_machine: None) -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


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
