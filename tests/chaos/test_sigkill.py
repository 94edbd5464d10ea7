"""SIGKILL of one process at a time: nobody hangs, nothing stays in shared memory, the survivors hold nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import vlcache

from tests.integration.conftest import stack_config
from tests.integration.running_stack import RunningStack

LONG = vlcache.Sampling(max_new_tokens=3000, ignore_eos=True)


@pytest.fixture
def stack() -> Iterator[RunningStack]:
    with RunningStack(stack_config("auto", prefill_workers=2)) as running:
        yield running


def kill(stack: RunningStack, name: str) -> None:
    os.kill(stack.child(name).pid, signal.SIGKILL)


def ask_in_background(stack: RunningStack, started: threading.Event, outcome: list[object]) -> threading.Thread:
    def ask() -> None:
        client = vlcache.Client(
            stack.address, timeout=vlcache.Timeout(total_s=60), retry=vlcache.RetryPolicy(max_attempts=1)
        )
        with client, client.stream("Go on", sampling=LONG) as stream:
            try:
                for event in stream:
                    if isinstance(event, vlcache.Transferred):
                        started.set()
                outcome.append(stream.result())
            except vlcache.VlcacheError as error:
                outcome.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_dead_prefill_worker_leaves_no_trace_and_the_other_serves(stack: RunningStack) -> None:
    shared_memory = set(os.listdir("/dev/shm"))
    with stack.client() as client:
        assert client.generate("Hello", sampling=vlcache.Sampling(max_new_tokens=3)).transfer is not None
        kill(stack, "prefill-0")
        for _ in range(4):
            answer = client.generate("Hello", sampling=vlcache.Sampling(max_new_tokens=3, ignore_eos=True))
            assert answer.transfer is not None
            assert answer.placement.prefill_worker == "prefill-1"
    assert set(os.listdir("/dev/shm")) <= shared_memory


@pytest.mark.slow
def test_a_dead_decode_worker_ends_its_streams_at_once(stack: RunningStack) -> None:
    started, outcome = threading.Event(), []
    thread = ask_in_background(stack, started, outcome)
    assert started.wait(60)
    kill(stack, "decode-0")
    thread.join(timeout=30)
    assert not thread.is_alive(), "the client hangs"
    assert isinstance(outcome[0], vlcache.Unavailable)
    impatient = vlcache.Client(stack.address, retry=vlcache.RetryPolicy(max_attempts=1))
    with impatient as client, pytest.raises(vlcache.Unavailable):
        client.generate("Hello")


@pytest.mark.slow
def test_a_dead_router_leaves_idle_workers(stack: RunningStack) -> None:
    started, outcome = threading.Event(), []
    thread = ask_in_background(stack, started, outcome)
    assert started.wait(60)
    kill(stack, "router")
    thread.join(timeout=30)
    assert not thread.is_alive(), "the client hangs"
    assert isinstance(outcome[0], vlcache.VlcacheError)
    # nobody is left to release the retained parcel: its lease of 30 s ends it
    stack.wait_idle(timeout_s=45.0)


@pytest.mark.slow
def test_the_whole_stack_killed_leaves_no_shared_memory(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    with RunningStack(stack_config("auto")) as running:
        with running.client() as client:
            client.generate("Hello", sampling=vlcache.Sampling(max_new_tokens=3))
        for name in ("router", "prefill-0", "decode-0"):
            kill(running, name)
        time.sleep(0.2)
    assert set(os.listdir("/dev/shm")) <= before
