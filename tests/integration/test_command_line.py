"""The command `vlcache` and what the client's README and examples show, as processes against a real service."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import vlcache
from PIL import Image

from tests.architecture.sources import ROOT
from tests.integration.running_stack import RunningStack

SAMPLES = ROOT / "models/shapes_vlm/samples"
EXAMPLES = ROOT / "client/examples"
QUESTION = "What does the yellow plate say?"
README = (ROOT / "client/README.md").read_text()
# Beside these: `serve`, which is tested below, and `status --watch`, which needs a terminal (test_watch.py).
COMMANDS = [
    line
    for line in re.findall(r"^vlcache .*$", README, re.MULTILINE)
    if not re.search(r"^vlcache serve$|--watch", line)
]
PICTURE = next(each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if ".explain(" in each)
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs Python beside `photo.jpg` and `schema.json`; returns stdout. Warnings are errors, and so are exit codes."""
    with Image.open(SAMPLES / "scene_1.png") as scene:
        scene.convert("RGB").save(tmp_path / "photo.jpg")
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"code": {"type": "string"}}}')

    def run(*arguments: object, stdin: str = "") -> str:
        command = [sys.executable, "-W", "error", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, input=stdin, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_readme_has_every_command() -> None:
    assert {line.split()[1] for line in COMMANDS} >= {"ask", "bench", "certs", "chat", "explain", "status", "token"}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_readme_run_as_written(memory_stack: RunningStack, run: Run, tmp_path: Path, line: str) -> None:
    name, *words = shlex.split(line)[1:]
    where = [] if name in ("certs", "token") else ["--address", memory_stack.address]
    out = run("-m", "vlcache.cli", name, *words, *where, stdin="What is in the picture?\n")
    assert out.strip()
    for file in re.findall(r"\w+\.(?:png|json)", line):
        assert (tmp_path / file).stat().st_size > 0


def test_the_picture_of_the_readme(memory_stack: RunningStack, run: Run, tmp_path: Path) -> None:
    run("-c", PICTURE.replace(vlcache.DEFAULT_ADDRESS, memory_stack.address))
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.width == 1200


def test_a_chat_remembers(memory_stack: RunningStack, run: Run) -> None:
    lines = [f"/image {SAMPLES / 'scene_1.png'}", QUESTION, "/retention 1", QUESTION, "/quit"]
    out = run("-m", "vlcache.cli", "chat", "--json", "--address", memory_stack.address, stdin="\n".join(lines) + "\n")
    first, second = map(json.loads, out.splitlines())
    assert second["usage"]["visual_tokens"] == first["usage"]["visual_tokens"] == 576
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + first["usage"]["generated_tokens"]
    assert first["compression"]["realised_retention"] < 0.2
    assert second["compression"]["realised_retention"] == 1
    memory_stack.wait_idle()


def test_a_load_is_measured(memory_stack: RunningStack, run: Run) -> None:
    load = "--num-prompts 4 --request-rate 20 --random-output-len 5 --ignore-eos --warmup 0 --images-per-prompt 2"
    out = run("-m", "vlcache.cli", "bench", *load.split(), "--json", "--address", memory_stack.address)
    result = json.loads(out)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (4, 0, 20)
    assert result["total_input_tokens"] > 4 * 2 * 576
    assert 0 < result["mean_ttft_ms"] < result["mean_e2el_ms"]
    assert 0.05 < result["kv_retention"] < 0.2
    memory_stack.wait_idle()


def test_examples_run(memory_stack: RunningStack, run: Run, tmp_path: Path) -> None:
    address = memory_stack.address
    out = run(EXAMPLES / "ask_many.py", QUESTION, "photo.jpg", "photo.jpg", "gone.jpg", "--address", address)
    first, second, third = out.splitlines()
    assert first == second
    assert "No such file" in third
    out = run(EXAMPLES / "compare_retentions.py", "photo.jpg", QUESTION, address)
    assert [line.split()[0] for line in out.splitlines()] == ["100%", "50%", "20%", "10%", "5%"]
    shutil.copytree(SAMPLES, tmp_path / "samples")
    few = ("--samples", 2, "--retentions", 1, 0.1, "--out", "out.svg")
    out = run(EXAMPLES / "retention_tradeoff.py", "samples", "--address", address, *few)
    assert re.search(r"^ +100% .* 100\.0% ", out, re.MULTILINE)
    svg = (tmp_path / "out.svg").read_text()
    assert svg.count("<rect") == 1 + 3 * 2
    memory_stack.wait_idle()


def test_every_example_is_run() -> None:
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert [file.name for file in EXAMPLES.glob("*.py") if f'{file.name}"' not in tests] == []


@pytest.mark.heavy
def test_serve_starts_a_service_and_ctrl_c_ends_it() -> None:
    command = [sys.executable, "-m", "vlcache.cli", "serve", str(ROOT / "models/shapes_vlm/checkpoint")]
    flags = ["--port", "0", "--json", "--prefill-workers", "0", "--decode-workers", "0", "--combined-workers", "1"]
    with subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = json.loads(process.stdout.readline())
            assert {service["role"] for service in said["services"]} == {"router", "prefill", "decode"}
            with vlcache.Client(said["address"]) as client:
                assert client.models()[0].name == "checkpoint"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


def test_serve_takes_every_flag_of_the_launcher() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlcache.cli", "serve", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--kv-memory-mib" in done.stdout
