"""Which labs run: one small file each, which only root can read.

A file is nobody's when the process it names is gone (a pid alone may be somebody else's by now), so
that what a killed lab left is never taken for a lab. Written whole or not at all. The folder
itself stays, empty.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from natswarm.lab.errors import LabError
from natswarm.lab.namespace import started_at
from natswarm.lab.settings import LabSettings

__all__ = ["RUNTIME_FOLDER", "DeviceState", "LabState", "Registry"]

RUNTIME_FOLDER = Path("/run/natswarm-lab")
DEFAULT_NAME = "lab"


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a running lab.

    Attributes:
        name: What the user called it.
        namespace: The full name of its namespace.
        router: That of the kernel's NAT before it; empty without one.
        interface: Its interface.
        ip: Its own address.
        presets: Its NATs from the internet inwards.
        external_ips: What the internet sees of it; its own address without NATs.
    """

    name: str
    namespace: str
    router: str
    interface: str
    ip: str
    presets: tuple[str, ...]
    external_ips: tuple[str, ...]


class LabState(msgspec.Struct, frozen=True, kw_only=True):
    """A running lab.

    Attributes:
        name: Of the lab.
        settings: What the user asked for.
        pid: Of the process that keeps it.
        started_at: When that started, in clock ticks since boot.
        watchdog_pid: Of the process that removes it if that dies.
        prefix: Of its namespaces.
        devices: In the order given.
    """

    name: str
    settings: LabSettings
    pid: int
    started_at: int
    watchdog_pid: int
    prefix: str
    devices: tuple[DeviceState, ...] = ()

    @property
    def is_alive(self) -> bool:
        """Whether the process that keeps it is there."""
        try:
            return started_at(self.pid) == self.started_at
        except (OSError, ValueError):
            return False

    def device(self, name: str) -> DeviceState:
        """Return a device.

        Raises:
            LabError: There is none of that name; says which there are.
        """
        for device in self.devices:
            if device.name == name:
                return device
        names = ", ".join(device.name for device in self.devices)
        raise LabError(f"lab {self.name} has no device {name!r}; it has {names}")


class Registry:
    """The files.

    Args:
        folder: Where they are; made when the first lab is written.
    """

    def __init__(self, folder: Path = RUNTIME_FOLDER) -> None:
        self._folder = folder

    def socket_path(self, name: str) -> Path:
        """Return where the process that keeps a lab listens."""
        return self._folder / f"{name}.socket"

    def labs(self) -> list[LabState]:
        """Return the labs that run, by name."""
        return [state for state in map(self._read, self._files()) if state and state.is_alive]

    def find(self, name: str | None) -> LabState:
        """Return the lab of a name; without one, the only lab.

        Raises:
            LabError: There is none, or there are several to choose from.
        """
        labs = self.labs()
        if name is None:
            if len(labs) == 1:
                return labs[0]
            if not labs:
                raise LabError("no lab runs; make one: natswarm lab up a=kpn-nl s=public")
            names = ", ".join(lab.name for lab in labs)
            raise LabError(f"several labs run: {names}; say which: --name {labs[0].name}")
        for lab in labs:
            if lab.name == name:
                return lab
        names = ", ".join(lab.name for lab in labs) or "none"
        raise LabError(f"no lab {name!r} runs; running: {names}")

    def free_name(self) -> str:
        """Return a name that no lab has: `lab`, `lab-2`, ..."""
        taken = {lab.name for lab in self.labs()}
        number = 1
        while (name := DEFAULT_NAME if number == 1 else f"{DEFAULT_NAME}-{number}") in taken:
            number += 1
        return name

    def check_free(self, name: str) -> None:
        """Refuse the name of a lab that runs.

        Raises:
            LabError: It does.
        """
        if any(lab.name == name for lab in self.labs()):
            raise _taken(name)

    def add(self, state: LabState) -> None:
        """Write a lab down.

        Raises:
            LabError: One of its name runs already, or the folder cannot be written.
        """
        try:
            self.remove_stale()
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            path = self._path(state.name)
            partial = path.with_suffix(f".{state.pid}")
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(state))
            try:
                # Unlike a rename, a link does not take another's place.
                path.hardlink_to(partial)
            finally:
                partial.unlink()
        except FileExistsError:
            raise _taken(state.name) from None
        except OSError as error:
            raise LabError(f"cannot write {self._folder}: {error}") from error

    def remove(self, name: str, prefix: str) -> None:
        """Forget a lab, unless the name is another's by now; idempotent."""
        state = self._read(self._path(name))
        if state is not None and state.prefix == prefix:
            self._forget(name)

    def remove_stale(self) -> None:
        """Forget the labs whose process is gone."""
        for path in self._files():
            state = self._read(path)
            if state is None or not state.is_alive:
                self._forget(path.stem)

    def _forget(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self.socket_path(name).unlink(missing_ok=True)
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.json"))

    @staticmethod
    def _read(path: Path) -> LabState | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=LabState)
        except (OSError, msgspec.DecodeError):
            return None


def _taken(name: str) -> LabError:
    return LabError(
        f"a lab {name!r} runs already; take another --name, or end it: "
        f"natswarm lab down --name {name}"
    )
