"""What the README and the examples show must run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from vlcache import DEFAULT_ADDRESS
from vlcache.v1 import inference_pb2 as pb

from tests.unit.client.service import fail, whole_answer

CLIENT = Path(__file__).parents[3] / "client"
PROGRAMS = re.findall(r"```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.DOTALL)
# pictures are of real answers: tests/integration/test_command_line.py
README_PROGRAMS = [program for program in PROGRAMS if ".explain(" not in program]


@pytest.fixture
def run_python(service, tmp_path):
    """Runs Python in a directory with `photo.jpg`; returns stdout."""
    (tmp_path / "photo.jpg").write_bytes(b"jpg bytes")
    service.models = [[pb.Model(name="shapes-vlm")]]

    def run(*arguments):
        command = [sys.executable, "-W", "error", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout

    return run


SAYS = ["a red dot", "KV 2.0 MiB full", "stop", "missing.jpg", "a red dot", "a red dot", "a red dot", "shapes-vlm"]


@pytest.mark.parametrize(("program", "says"), list(zip(README_PROGRAMS, SAYS, strict=True)))
def test_readme(service, run_python, program, says):
    service.attempts = [whole_answer() for _ in range(program.count(".generate(") or 1)]
    connect = f'"{service.address}"'
    program = program.replace(f'"{DEFAULT_ADDRESS}"', connect).replace("Client(timeout", f"Client({connect}, timeout")
    program = program.replace('"photo.jpg"))', f'"photo.jpg", address={connect}))')
    assert says in run_python("-c", program)


def test_compare_retentions(service, run_python):
    service.attempts = [whole_answer() for _ in range(5)]
    out = run_python(CLIENT / "examples/compare_retentions.py", "photo.jpg", "Which?", service.address)
    assert out.splitlines()[3] == "  10%      262,144 bytes kept  a red dot"
    assert [request.compression.retention for request in service.requests] == [1.0, 0.5, 0.2, 0.1, 0.05]


def test_ask_many(service, run_python):
    failed = [fail(grpc.StatusCode.NOT_FOUND, "no model")]
    service.attempts = [whole_answer(), failed, whole_answer()]
    images = ["photo.jpg"] * 3
    out = run_python(CLIENT / "examples/ask_many.py", "Which?", *images, "--address", service.address)
    answers = sorted(line.partition(" [")[0] for line in out.splitlines())
    assert answers == ["photo.jpg: a red dot", "photo.jpg: a red dot", "photo.jpg: no model"]
