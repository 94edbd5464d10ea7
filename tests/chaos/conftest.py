"""One stack of real processes for this folder, mended and searched for remains after every test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vlcache.cli import main as vlcache_command

from deploy.local.forks import Forks
from tests.chaos.crowd import Answer, Question, ask, greedy_and_seeded
from tests.integration.conftest import stack_config
from tests.integration.running_stack import RunningStack

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
STREAMS = 6
PATIENCE_S = 30.0
HELD = ("reserved", "filling", "active", "retained")

IMPATIENT = ("--poll-interval-s", "0.2", "--poll-timeout-s", "2", "--token-timeout-s", "2", "--slow-start-s", "0")
STAGES = ("--prefill-timeout-s", "15", "--transfer-timeout-s", "5", "--control-timeout-s", "3")
LEASE_S = "4"
RESIDENT = "vlcache_kv_resident_bytes{"


@pytest.fixture(scope="package")
def running(forks: Forks) -> Iterator[RunningStack]:
    config = stack_config(
        "auto",
        prefill_workers=2,
        decode_workers=2,
        drain_s=60.0,
        router_flags=(*IMPATIENT, *STAGES),
        prefill_flags=("--parcel-lease-s", LEASE_S, "--preprocess-processes", "1"),
    )
    with RunningStack(config, forks) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture
def stack(running: RunningStack, capsys: pytest.CaptureFixture[str]) -> Iterator[RunningStack]:
    """Two workers of each role. Whatever died is started again; then nothing may be left of the test."""
    sessions = {running.child(name).pid for name in ("router", *WORKERS)}
    yield running
    dead = [name for name in ("router", *WORKERS) if name in running.killed or not is_alive(running.child(name).pid)]
    running.restart(*dead)
    alive = {running.child(name).pid for name in ("router", *WORKERS)}
    running.wait_idle(PATIENCE_S)
    wait_until(lambda: shown_idle(running, capsys), "vlcache status shows bytes that nobody holds")
    wait_until(lambda: not processes_of(sessions - alive), "children of dead processes live on")
    assert measured_idle(running)
    check_files(running)


@pytest.fixture(scope="package")
def questions() -> list[Question]:
    return greedy_and_seeded(STREAMS)


@pytest.fixture(scope="package")
def undisturbed(running: RunningStack, questions: list[Question]) -> list[Answer]:
    """What the questions are answered while nothing happens."""
    return asyncio.run(ask(running.address, questions))


def wait_until(met: Callable[[], bool], otherwise: str = "in vain", timeout_s: float = PATIENCE_S) -> None:
    give_up = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < give_up, otherwise
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    return bool(processes_of({pid}))


def processes_of(sessions: set[int]) -> list[int]:
    """Living processes of these sessions: each child of a stack leads one, and its own children stay in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(int(process.name))
    return found


def shown_idle(stack: RunningStack, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether `vlcache status --json` shows four ready workers that hold nothing."""
    capsys.readouterr()
    assert vlcache_command(["status", "--json", "--address", stack.address]) == 0
    workers = json.loads(capsys.readouterr().out)["workers"]
    ready = {worker["name"] for worker in workers if worker["state"] == "ready"}
    return ready == set(WORKERS) and not any(worker["kv"][state] for worker in workers for state in HELD)


def measured_idle(stack: RunningStack) -> bool:
    """Whether the metrics of every worker say the same."""
    gauges = [line for name in WORKERS for line in stack.metrics_of(name).splitlines() if line.startswith(RESIDENT)]
    assert all(any(f'worker="{name}"' in gauge for gauge in gauges) for name in WORKERS)
    return not any(float(gauge.rpartition(" ")[2]) for gauge in gauges)


def check_files(stack: RunningStack) -> None:
    """Beside the logs there are the sockets of living prefill workers and nothing else."""
    files = {path for path in stack.log_dir.rglob("*") if not path.is_dir() and path.suffix != ".log"}
    sockets = {path for path in files if stat.S_ISSOCK(os.lstat(path).st_mode)}
    assert files == sockets
    assert {path.name.rpartition("-")[0] for path in sockets} == {"prefill-0", "prefill-1"}
    assert len(sockets) == 2, f"dead workers have left sockets: {sorted(sockets)}"
