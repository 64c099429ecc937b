"""The architecture as rules: who imports whom, what a package may not touch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = ("nat", "puncture", "discovery", "routing", "sim")
# What a synchronous core must not know: it gets the time and randomness as arguments.
IMPURE = {"socket", "select", "time", "threading", "asyncio", "trio", "logging", "secrets", "os"}


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_layers_point_one_way():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "path",
    modules(*(f"natswarm/{name}" for name in PURE)),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_cores_know_no_clock_socket_or_log(path: Path):
    found = {name.split(".")[0] for name in imported_names(path)} & IMPURE
    assert not found, f"{path.name} imports {found}"


def test_natswarm_imports_no_model_code():
    foreign = {"llmload", "numpy", "onnx", "onnxruntime", "safetensors", "tokenizers"}
    for path in modules("natswarm"):
        found = {name.split(".")[0] for name in imported_names(path)} & foreign
        assert not found, f"{path} imports {found}"


def test_llmload_uses_only_the_public_face_of_natswarm():
    for path in modules("llmload"):
        inner = {name for name in imported_names(path) if name.startswith("natswarm.")}
        assert not inner, f"{path} reaches into {inner}"


def test_scapy_stays_where_it_may_be():
    allowed = {ROOT / "natswarm" / "net" / "path.py"}
    for path in modules("natswarm", "llmload"):
        if path not in allowed:
            assert not any(name.split(".")[0] == "scapy" for name in imported_names(path)), path


@pytest.mark.parametrize("package", ["natswarm", "llmload"])
def test_public_names_are_there(package: str):
    module = __import__(package)
    for name in module.__all__:
        assert hasattr(module, name), name


def test_no_name_of_a_server_in_the_code():
    """No DNS, no bootstrap host: nothing in the packages resolves a name or holds one."""
    for path in modules("natswarm", "llmload"):
        text = path.read_text()
        for call in ("getaddrinfo", "gethostbyname", "create_connection"):
            assert call not in text, f"{path} calls {call}"
