"""Whether this machine can run the laboratory, and if not, why: asked before tests are skipped."""

from __future__ import annotations

import functools
import os
import shutil
import sys

from natswarm.lab.errors import LabError
from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.topology import Lab

__all__ = ["missing_capability"]

PROGRAMS = {"ip": "iproute2", "nft": "nftables"}  # and the Debian packages that hold them


@functools.cache
def missing_capability() -> str | None:
    """Return why no lab can run here, with what to do; None if one can.

    Builds a small lab to find out: what a container forbids shows only when it is tried.
    """
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid():
        return "network namespaces need root: run as root (sudo)"
    missing = [package for name, package in PROGRAMS.items() if shutil.which(name) is None]
    if missing:
        return f"not installed: apt-get install {' '.join(missing)}"
    try:
        with Lab(loss=0.5) as lab:
            for kind in NatKind:
                lab.add_client(kind.value, KernelNat(kind))
    except LabError as error:
        return f"this system does not let us make namespaces with NAT: {error}"
    return None
