"""The committed stubs are what the generator makes of proto/ (early; the gate is `make proto-check`)."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

PROTO, STUBS = ROOT / "proto", ROOT / "client" / "src"


def generator() -> str:
    """A Python whose grpc_tools has the version that the Makefile pins."""
    (pinned,) = re.findall(r"grpcio-tools==(\S+)", (ROOT / "Makefile").read_text())
    own = ROOT / ".venv-proto" / "bin" / "python"
    if own.exists():
        return str(own)
    try:
        if importlib.metadata.version("grpcio-tools") == pinned:
            return sys.executable
    except importlib.metadata.PackageNotFoundError:
        pass
    pytest.skip(f"grpcio-tools {pinned} is not installed: run `make proto-check`")


def stubs(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*_pb2*.py*"))}


def test_the_committed_stubs_are_those_of_the_contract(tmp_path: Path) -> None:
    protos = [str(file.relative_to(PROTO)) for file in sorted((PROTO / "vlcache").rglob("*.proto"))]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [generator(), "-m", "grpc_tools.protoc", f"-I{PROTO}", *outputs, *protos]
    subprocess.run(command, cwd=PROTO, check=True)
    made, committed = stubs(tmp_path), {name: raw for name, raw in stubs(STUBS).items() if "__pycache__" not in name}
    assert len(made) == 3 * len(protos)
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []
