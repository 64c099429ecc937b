"""Whether this machine can run a lab, and if not, why."""

from __future__ import annotations

import functools
import os
import shutil
import sys

from natswarm.lab.errors import LabError
from natswarm.lab.nat import KernelNat, NatKind
from natswarm.lab.topology import Lab
from natswarm.lab.tun import open_tun

__all__ = ["check_capable", "missing_capability"]

PROGRAMS = {"ip": "iproute2", "nft": "nftables"}  # and the Debian packages that hold them


def check_capable() -> None:
    """Refuse to go on where no lab can be.

    Raises:
        LabError: Says what is missing, and what to do.
    """
    if sys.platform != "linux":
        raise LabError(
            "a lab needs Linux's network namespaces; elsewhere `natswarm demo` shows the same "
            "carriers inside one process"
        )
    if os.geteuid():
        raise LabError(
            "a lab makes network namespaces, which takes root: run it with sudo. Without root, "
            "`natswarm demo` shows the same carriers inside one process"
        )
    missing = [package for name, package in PROGRAMS.items() if shutil.which(name) is None]
    if missing:
        raise LabError(f"a lab needs more programs: apt-get install {' '.join(missing)}")


@functools.cache
def missing_capability() -> str | None:
    """Return why no lab can run here, with what to do; None if one can.

    Builds a small lab to find out: what a container forbids shows only when it is tried.
    """
    try:
        check_capable()
    except LabError as error:
        return str(error)
    try:
        with Lab(loss=0.5) as lab:
            for kind in NatKind:
                lab.add_client(kind.value, KernelNat(kind, has_tftp_helper=True))
            os.close(open_tun(lab.core, "tun"))
    except LabError as error:
        return f"this system does not let us make namespaces with NAT: {error}"
    return None
