"""The wheels: the client's, alone in an environment that has nothing but its requirements, and the server's."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.architecture.sources import ROOT
from tests.integration.running_stack import RunningStack

PROGRAM = """
import sys, vlcache
answer = vlcache.ask("What does the yellow plate say?", sys.argv[2], address=sys.argv[1])
assert answer.text and answer.compression.kept_bytes
assert "<div" in answer._repr_html_()
print(vlcache.__file__)
"""


def build(folder: Path, project: Path) -> Path:
    """A wheel of the sources."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, text=True, timeout=100)
    (wheel,) = folder.glob("*.whl")
    return wheel


def required(names: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """What is installed here of these and of what they need, without extras."""
    seen: set[str] = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name not in seen:
            seen.add(name)
            found = importlib.metadata.distribution(name)
            wanted = map(Requirement, found.requires or ())
            names += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
            yield found


def requirements_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist:")]


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the client's wheel and its requirements, taken from here so that no network is needed."""
    wheel = build(tmp_path_factory.mktemp("wheel"), ROOT / "client")
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    names = [Requirement(text).name for text in requirements_of(wheel) if "extra ==" not in text]
    for distribution in required(names):
        for file in distribution.files or ():
            source, target = Path(distribution.locate_file(file)), packages / file
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True, timeout=100)
    subprocess.run([*pip, "check"], check=True, timeout=100)
    return python


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without what this process has on its path."""
    command = [str(python), "-I", "-W", "error", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_client_needs_little(clean_python: Path) -> None:
    code = "import importlib.metadata as m; print(*sorted(each.name.lower() for each in m.distributions()))"
    assert set(run(clean_python, "-c", code).stdout.split()) == {
        "googleapis-common-protos",
        "grpcio",
        "protobuf",
        "typing_extensions",
        "vlcache",
    }


def test_the_wheel_alone_asks_a_running_service(clean_python: Path, memory_stack: RunningStack) -> None:
    image = str(ROOT / "models/shapes_vlm/samples/scene_1.png")
    asked = run(clean_python, "-c", PROGRAM, memory_stack.address, image)
    assert asked.returncode == 0, asked.stderr
    package = Path(asked.stdout.strip()).parent
    assert package.is_relative_to(clean_python.parents[1])
    assert (package / "py.typed").is_file()
    command = clean_python.parent / "vlcache"
    options = ("--address", memory_stack.address)
    status = json.loads(run(clean_python, str(command), "status", *options, "--json").stdout)
    assert {worker["state"] for worker in status["workers"]} == {"ready"}
    assert run(clean_python, str(command), "ask", "Hello", "--max-new-tokens", "2", *options).returncode == 0


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (("serve",), "make setup"),
        (("completion", "bash"), "vlcache[cli]"),
        (("status", "--watch"), "vlcache[cli]"),
        (("certs", "new"), "vlcache[certs]"),
        (("explain", "Which?"), "vlcache[explain]"),
    ],
)
def test_what_needs_more_says_what(clean_python: Path, command: tuple[str, ...], hint: str) -> None:
    done = run(clean_python, "-m", "vlcache.cli", *command)
    assert done.returncode in (1, 2)
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def test_the_servers_wheel_has_what_serve_starts(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tmp_path, ROOT)) as archive:
        names = set(archive.namelist())
    assert {"deploy/local/__main__.py", "deploy/combined/__main__.py", "router/__main__.py"} <= names
    assert {"models/shapes_vlm/checkpoint/model.safetensors", "models/shapes_vlm/samples/samples.json"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "vlcache/"))]
