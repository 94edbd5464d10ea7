"""Who imports whom: the written contracts, and what is really loaded in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, python_files

HEAVY = ("torch", "transformers", "numpy", "PIL", "tokenizers", "safetensors", "opentelemetry.exporter")
TORCH_MODULES = ("shared.model", "shared.kernels")
# `python -m vlcache.cli`: importing it runs the command.
COMMAND = "vlcache.cli.__main__"
# The only part of the client that needs Pillow, loaded by one command when it runs.
DRAWING = "vlcache.explain."
# Loaded where `--otlp-endpoint` is given.
TRACING = "shared.telemetry.otlp"
PROBE = """
import importlib, json, sys
found = {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    found[name] = [heavy for heavy in json.loads(sys.argv[2]) if heavy in sys.modules]
print(json.dumps(found))
"""


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def loaded_by(*modules: str) -> dict[str, list[str]]:
    """The heavy packages that are loaded after each module was imported, one after the other in a new process."""
    command = [sys.executable, "-c", PROBE, json.dumps(modules), json.dumps(HEAVY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_import_contracts_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("entry", ["vlcache", "vlcache.cli", "router.router", "router.__main__"])
def test_client_and_router_load_nothing_heavy(entry: str) -> None:
    assert loaded_by(entry) == {entry: []}


def test_no_torch_free_module_loads_anything_heavy() -> None:
    """The linter knows only the modules that the contract names; this finds every other one, and packages' imports."""
    modules = [module_name(file) for file in python_files("shared", "router", "client/src")]
    modules = [name.removeprefix("client.src.") for name in modules if not name.startswith(TORCH_MODULES)]
    modules.remove(COMMAND)
    modules.remove(TRACING)
    modules = [name for name in modules if not name.startswith(DRAWING)]
    assert {"shared.kv.transport.frames", "shared.request.params", "router.router"} <= set(modules)
    found = loaded_by(*modules)
    assert set(found) == set(modules)
    assert {name: heavy for name, heavy in found.items() if heavy} == {}


def test_workers_that_trace_nothing_load_no_tracing() -> None:
    (loaded,) = loaded_by("deploy.combined.__main__").values()
    assert "torch" in loaded
    assert "opentelemetry.exporter" not in loaded


def test_the_probe_would_notice() -> None:
    assert "torch" in loaded_by("shared.model.sampler")["shared.model.sampler"]
