"""The files of the repository, as git knows them."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVICES = ("client/src", "shared", "router", "prefill_worker", "decode_worker", "deploy")
APPLICATION = ("shared", "router", "prefill_worker", "decode_worker", "deploy", "models", "benchmarks")


@functools.cache
def python_files(*folders: str) -> tuple[Path, ...]:
    """Tracked and new Python files below the folders, generated stubs left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    files = {ROOT / name for name in listed if name.endswith(".py") and "_pb2" not in name}
    return tuple(sorted(file for file in files if file.exists()))


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))
