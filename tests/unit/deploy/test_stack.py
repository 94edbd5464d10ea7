"""The launcher with a real router and fake workers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import vlcache

from deploy.local.__main__ import main
from deploy.local.demo import DemoConfig, load_samples, run_demo
from deploy.local.forks import ROOT
from deploy.local.serve import example
from deploy.local.stack import PAGE_PORT, Modules, Stack, StackConfig, run_stack

FAKE = "tests.unit.deploy.fake_worker"
FAKES = Modules(prefill=FAKE, decode=FAKE, combined=FAKE, imported=())
INTERRUPTED = 77


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Two questions; the fakes answer ABC to everything."""
    (tmp_path / "a.png").write_bytes(b"png")
    entries = [
        {"images": ["a.png"], "question": "what?", "answer": "ABC", "task": "read"},
        {"images": [], "question": "and?", "answer": "no", "task": "count"},
    ]
    (tmp_path / "samples.json").write_text(json.dumps(entries))
    return tmp_path


def demo(config: DemoConfig) -> int:
    job = functools.partial(run_demo, config=config, samples=load_samples(config.samples))
    return asyncio.run(run_stack(config, job, interrupted=INTERRUPTED, modules=FAKES))


def test_the_demo_asks_everything_and_ends_with_its_figures(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(DemoConfig(samples=samples, json="-")) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "answer   ABC" in out
    assert "expected ABC  [right]" in out
    assert "expected no  [WRONG]" in out
    assert "prompt   50 tokens (40 visual + 10 text)" in out
    assert "1000 B full, 100 B kept (10.0 % by vl_cache), 120 B sent via memory" in out
    assert lines[-2].startswith("1 of 2 right | KV 2.0 KiB full, 200 B kept, 240 B sent, 8.3 times less | mean TTFT ")
    document = json.loads(lines[-1])
    assert document["summary"]["right"] == 1
    assert [question["right"] for question in document["questions"]] == [True, False]
    assert document["questions"][0]["ttft_s"] > 0
    assert err == ""


def test_figures_can_go_to_a_file(samples: Path, tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    assert demo(DemoConfig(samples=samples, json=str(target))) == 0
    assert json.loads(target.read_text())["summary"]["answered"] == 2


def test_a_failed_request_fails_the_demo_but_not_its_other_questions(
    samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (samples / "a.png").unlink()
    assert demo(DemoConfig(samples=samples)) == 1
    out = capsys.readouterr().out
    assert "failed" in out
    assert "answer   ABC" in out
    assert "0 of 2 right" in out


def test_several_workers_of_a_role_share_the_work() -> None:
    async def job(stack: Stack) -> int:
        names = {service.name for service in stack.services}
        assert names == {"router", "prefill-0", "prefill-1", "decode-0", "decode-1"}
        async with vlcache.AsyncClient(stack.address) as client:
            await client.generate("one")
            placements = {(await client.generate("two")).placement.prefill_worker for _ in range(3)}
        assert placements == {"prefill-0", "prefill-1"}
        return 5

    config = StackConfig(prefill_workers=2, decode_workers=2)
    assert asyncio.run(run_stack(config, job, interrupted=INTERRUPTED, modules=FAKES)) == 5


def test_a_combined_worker_is_one_process_with_two_addresses() -> None:
    async def job(stack: Stack) -> int:
        router, *workers = stack.services
        assert [(worker.name, worker.role) for worker in workers] == [
            ("combined-0-prefill", "prefill"),
            ("combined-0-decode", "decode"),
        ]
        assert len({router.address, *(worker.address for worker in workers)}) == 3
        assert stack.child("combined-0").pid > 0
        async with vlcache.AsyncClient(stack.address) as client:
            placement = (await client.generate("one")).placement
        assert (placement.prefill_worker, placement.decode_worker) == ("combined-0-prefill", "combined-0-decode")
        return 5

    config = StackConfig(prefill_workers=0, decode_workers=0, combined_workers=1)
    assert asyncio.run(run_stack(config, job, interrupted=INTERRUPTED, modules=FAKES)) == 5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("prefill crashes", "prefill-0 ended with exit code 3"),
        ("decode is mute", "decode-0 did not listen within 3 s"),
        ("decode dies later", "decode-0 | out of memory"),
        ("prefill stops badly", "prefill-0 ended with exit code 3"),
    ],
)
def test_a_child_that_fails_is_named_with_its_log(
    fault: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_WORKER", fault)

    async def job(_: Stack) -> int:
        if fault.endswith("later"):
            await asyncio.Event().wait()
        return 0

    config = StackConfig(start_timeout_s=3 if "mute" in fault else 60)
    assert asyncio.run(run_stack(config, job, interrupted=INTERRUPTED, modules=FAKES)) == 1
    assert said in capsys.readouterr().err


@contextlib.contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Leaves no process behind, whatever the test does."""
    with process:
        try:
            yield process
        finally:
            process.kill()


SERVE = f"""
import asyncio, functools, sys
from deploy.local.serve import ServeConfig, run_serve
from deploy.local.stack import Modules, run_stack
modules = {FAKES!r}
config = ServeConfig(port=0, http_port=0, ui=True)
job = functools.partial(run_serve, config=config)
sys.exit(asyncio.run(run_stack(config, job, interrupted=0, modules=modules)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_everything_is_and_drains_on_a_signal(number: signal.Signals) -> None:
    command = [sys.executable, "-W", "error", "-c", SERVE]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with killed(started) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while not (lines and lines[-1].startswith("ctrl-C")):
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]
        address = lines[0].split()[3].rstrip(",")
        assert [line.split()[:2] for line in lines[1:4]] == [
            ["router", "router"],
            ["prefill", "prefill-0"],
            ["decode", "decode-0"],
        ]
        with vlcache.Client(address) as client:
            assert client.generate("hello").text == "ABC"
        (base_url,) = (line.split()[-1] for line in lines if line.startswith("OpenAI's chat API"))
        (page_url,) = (line.split()[-1] for line in lines if line.startswith("its page is at"))
        with httpx.Client(trust_env=False) as client:
            assert "<title>vlcache</title>" in client.get(page_url).text
            assert [model["id"] for model in client.get(f"{base_url}/models").json()["data"]] == ["toy"]
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")


def test_a_page_has_a_port_without_being_given_one() -> None:
    assert StackConfig(ui=True).router_http_port == PAGE_PORT
    assert StackConfig(ui=True, http_port=0).router_http_port == 0
    assert StackConfig().router_http_port is None


def test_the_example_names_a_bundled_image_and_the_address() -> None:
    words = example("127.0.0.1:50051")
    assert "scene_1.png --address 127.0.0.1:50051" in words
    assert " ask " in words


@pytest.mark.parametrize(
    "flags",
    [
        ["demo", "--samples", "nowhere"],
        ["demo", "--decode-workers", "0"],
        ["demo", "--combined-workers", "-1"],
        ["serve", "--start-timeout-s", "0"],
        ["serve", "--registry", "static://127.0.0.1:1"],
        ["dance"],
    ],
)
def test_bad_options_are_a_sentence(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code != 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"question": "x"}]', "nonsense"])
def test_unreadable_samples_are_a_value_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(content)
    if content == "{}":
        assert load_samples(tmp_path) == []
        return
    with pytest.raises(ValueError, match="holds no samples"):
        load_samples(tmp_path)
