"""What the documents say to type is typed: commands and programs as they are written, against one real service.

Addresses are the only thing that is changed in them, beside the placeholders of `stand_ins`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vlcache

from deploy.local.forks import Forks
from deploy.local.stack import StackConfig
from tests.documents.covered import HERE, rule_of
from tests.documents.pages import PAGES, ROOT, Block, Command, all_commands, blocks
from tests.documents.programs import complaint
from tests.documents.stand_ins import SCENE, filled_in, lay_out
from tests.integration.running_stack import RunningStack

# Programs of the client's README are run by tests/unit/client/test_examples.py.
SNIPPETS = [
    block for page in PAGES if page != "client/README.md" for block in blocks(page) if block.language == "python"
]
# What a program takes for granted, by how it begins.
PRELUDES = {
    "client.generate(": "from vlcache import Client, Compression\nclient = Client({address!r})",
    "Compression(retention": "from vlcache import Compression, Wire",
    "from openai": f"import base64\npng_in_base64 = base64.b64encode(open({str(SCENE)!r}, 'rb').read()).decode()",
    "processor =": "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
    f"folder = {str(ROOT / 'models/shapes_vlm/checkpoint')!r}",
}
HTTP = "http://127.0.0.1:8000/v1"
# `make` waits for its command after ctrl-C, and then ends as if it had not caught it.
MAKE_INTERRUPTED = -signal.SIGINT
WITHOUT_ADDRESS = ("certs", "token", "completion")


def is_typed_here(command: Command) -> bool:
    rule = rule_of(command)
    return rule is not None and rule.by == HERE and not rule.why


def is_make_serve(command: Command) -> bool:
    return command.text.startswith("make serve")


TYPED = {filled_in(command.text): command for command in all_commands() if is_typed_here(command)}
SERVE = [text for text in TYPED if text.startswith("vlcache serve")]
ASK = [text for text in TYPED if text not in SERVE and (TYPED[text].whole or not complaint(TYPED[text].words))]


@pytest.fixture(scope="module")
def stack(forks: Forks) -> Iterator[RunningStack]:
    with RunningStack(StackConfig(http_port=0), forks) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lay_out(tmp_path)
    return tmp_path


def run(arguments: list[str], folder: Path, stdin: str = "") -> str:
    done = subprocess.run(arguments, cwd=folder, input=stdin, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("text", ASK)
def test_commands_run_as_written(stack: RunningStack, folder: Path, text: str) -> None:
    program, *words = TYPED[text].words
    if program == "curl":
        if shutil.which("curl") is None:
            pytest.skip("there is no curl")
        served = json.loads(run(["curl", "-sSf", *(word.replace(HTTP, stack.base_url) for word in words)], folder))
        assert served["data"][0]["id"] == "shapes-vlm"
        return
    where = [] if words[0] in WITHOUT_ADDRESS else ["--address", stack.address]
    command = [sys.executable, "-W", "error", "-m", "vlcache.cli", *words, *where]
    assert run(command, folder, stdin="What does the yellow plate say?\n").strip()
    for written in re.findall(r"-o (\S+)", text):
        assert (folder / written).stat().st_size > 0
    stack.wait_idle()


def as_parameter(block: Block) -> pytest.param:
    """Those that load a model themselves take longer than all others together."""
    marks = [pytest.mark.heavy] if "from_pretrained" in block.text else []
    return pytest.param(block, id=block.name, marks=marks)


@pytest.mark.parametrize("block", [as_parameter(block) for block in SNIPPETS])
def test_programs_run_as_written(stack: RunningStack, folder: Path, block: Block) -> None:
    starts = [start for start in PRELUDES if block.text.startswith(start)]
    prelude = PRELUDES[starts[0]].format(address=stack.address) + "\n" if starts else ""
    program = block.text.replace(vlcache.DEFAULT_ADDRESS, stack.address).replace(HTTP, stack.base_url)
    # libraries of others warn as they like
    said = run([sys.executable, "-c", prelude + program], folder)
    assert said.strip() or "print(" not in program
    stack.wait_idle()


def test_every_prelude_has_a_program() -> None:
    assert [start for start in PRELUDES if not any(block.text.startswith(start) for block in SNIPPETS)] == []


def test_the_page_for_beginners_shows_what_they_will_see(stack: RunningStack, folder: Path) -> None:
    page = (ROOT / "docs/quickstart.md").read_text()
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    first = next(
        command for command in TYPED.values() if command.page == "docs/quickstart.md" and " ask " in command.text
    )
    command = [sys.executable, "-m", "vlcache.cli", *first.words[1:], "--address", stack.address]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == shown.splitlines()[0] + "\n"
    # all but the times, which are the machine's
    told = " ".join(shown.splitlines()[1:]).partition(" | TTFT ")[0]
    assert done.stderr.startswith(told)


def answers_and_drains(process: subprocess.Popen[str], address: str, *, code: int, **options: Any) -> None:
    with vlcache.Client(address, **options) as client:
        assert client.generate("What does the yellow plate say?", images=[SCENE]).text == "It says AY4AFF."
    # as ctrl-C does: to make, where there is one, and to what it has started
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == code


@pytest.mark.heavy
@pytest.mark.parametrize("text", SERVE)
def test_services_start_as_written(text: str) -> None:
    free = ["--port", "0", *(["--http-port", "0"] if "--ui" in text else [])]
    command = [sys.executable, "-m", "vlcache.cli", *text.split()[1:], *free, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            answers_and_drains(process, json.loads(process.stdout.readline())["address"], code=0)
        finally:
            process.kill()


@pytest.mark.heavy
@pytest.mark.parametrize("text", sorted({command.text for command in all_commands() if is_make_serve(command)}))
def test_make_serves_as_written(text: str) -> None:
    has_http = "HTTP_PORT" in text or "UI=1" in text
    words = [*shlex.split(text), "PORT=0", *(["HTTP_PORT=0"] if has_http else []), "--old-file", "setup"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            said = "".join(iter(process.stdout.readline, "ctrl-C drains and stops\n"))
            (address,) = re.findall(r"vlcache listens at (\S+),", said)
            assert ("OpenAI's chat API is at" in said) == has_http
            secure = re.search(r"VLCACHE_TOKEN=(\S+) .* --ca-file (\S+)", said)
            assert (secure is not None) == ("SECURE=1" in text)
            options = {"token": secure[1], "tls": vlcache.Tls(ca=secure[2])} if secure else {}
            answers_and_drains(process, address, code=MAKE_INTERRUPTED, **options)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
