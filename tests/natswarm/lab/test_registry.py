"""Which labs run: files that outlive nobody."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from natswarm.lab.capability import check_capable
from natswarm.lab.client import ask
from natswarm.lab.errors import LabError
from natswarm.lab.namespace import started_at
from natswarm.lab.registry import DeviceState, LabState, Registry
from natswarm.lab.settings import LabSettings


def lab(name: str, *, started: int | None = None, prefix: str = "nswlab-1-1-0") -> LabState:
    device = DeviceState(
        name="a",
        namespace=f"{prefix}-a",
        router="",
        interface="wan",
        ip="100.64.0.2",
        presets=("kpn-nl",),
        external_ips=("198.51.100.1",),
    )
    pid = os.getpid()
    return LabState(
        name=name,
        settings=LabSettings(name=name, devices=("a=kpn-nl",)),
        pid=pid,
        started_at=started_at(pid) if started is None else started,
        watchdog_pid=pid,
        prefix=prefix,
        devices=(device,),
    )


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "labs")


def test_a_lab_is_found_again(registry: Registry):
    registry.add(lab("one"))
    assert registry.find("one") == registry.find(None) == lab("one")
    assert registry.find("one").device("a").ip == "100.64.0.2"


def test_files_are_for_root_alone(registry: Registry, tmp_path: Path):
    registry.add(lab("one"))
    [path] = (tmp_path / "labs").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_name_is_taken_once(registry: Registry, tmp_path: Path):
    registry.add(lab("one"))
    for refused in (lambda: registry.add(lab("one")), lambda: registry.check_free("one")):
        with pytest.raises(LabError, match="'one' runs already; take another --name"):
            refused()
    assert len(list((tmp_path / "labs").iterdir())) == 1


def test_a_free_name_is_found(registry: Registry):
    assert registry.free_name() == "lab"
    for name in ("lab", "lab-2"):
        registry.add(lab(name))
    assert registry.free_name() == "lab-3"


def test_whose_process_is_gone_is_no_lab(registry: Registry, tmp_path: Path):
    # Our own pid, but a process that started at another time.
    registry.add(lab("dead", started=1))
    assert registry.labs() == []
    registry.add(lab("dead"))
    registry.add(lab("dying", started=1))
    registry.remove_stale()
    assert [path.name for path in (tmp_path / "labs").iterdir()] == ["dead.json"]


def test_a_file_that_is_no_lab_is_no_lab(registry: Registry, tmp_path: Path):
    registry.add(lab("one"))
    (tmp_path / "labs" / "two.json").write_text('{"name": "two"')
    assert [each.name for each in registry.labs()] == ["one"]


def test_only_its_own_file_is_removed(registry: Registry):
    registry.add(lab("one", prefix="nswlab-1-1-0"))
    registry.remove("one", "nswlab-2-2-0")
    assert registry.find("one")
    registry.remove("one", "nswlab-1-1-0")
    registry.remove("one", "nswlab-1-1-0")
    assert registry.labs() == []


def test_what_is_not_there_is_said(registry: Registry):
    with pytest.raises(LabError, match="no lab runs; make one"):
        registry.find(None)
    with pytest.raises(LabError, match="no lab 'x' runs; running: none"):
        registry.find("x")
    registry.add(lab("one"))
    registry.add(lab("two"))
    with pytest.raises(LabError, match="several labs run: one, two; say which: --name one"):
        registry.find(None)
    with pytest.raises(LabError, match="no device 'b'; it has a"):
        registry.find("one").device("b")
    with pytest.raises(LabError, match="does not answer"):
        ask(registry.find("one"), "status")


def test_the_state_is_plain_text(registry: Registry, tmp_path: Path):
    registry.add(lab("one"))
    text = (tmp_path / "labs" / "one.json").read_bytes()
    assert msgspec.json.decode(text)["settings"]["devices"] == ["a=kpn-nl"]


@pytest.mark.parametrize(
    ("attribute", "value", "error"),
    [
        ("os.geteuid", lambda: 1000, "takes root: run it with sudo"),
        ("sys.platform", "darwin", "needs Linux's network namespaces"),
        ("shutil.which", lambda name: None, "apt-get install iproute2 nftables"),
    ],
)
def test_where_no_lab_can_be_it_is_said_why(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, error: str
):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(f"natswarm.lab.capability.{attribute}", value)
    with pytest.raises(LabError, match=error):
        check_capable()
