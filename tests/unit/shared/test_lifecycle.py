"""Epochs differ between boots; the first stop signal is heard, the second one kills."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from shared.rpc.lifecycle import new_epoch, stop_signal
from tests.unit.shared.scripted import run

WAITER = """
import asyncio, time
from shared.rpc.lifecycle import stop_signal
async def main():
    task = asyncio.create_task(stop_signal())
    await asyncio.sleep(0)
    print("ready", flush=True)
    await task
    print("stopped", flush=True)
    time.sleep(60)
asyncio.run(main())
"""


def test_epochs_are_unique() -> None:
    assert len({new_epoch() for _ in range(1000)}) == 1000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_returns_and_restores_the_handlers(number: signal.Signals) -> None:
    async def main() -> None:
        before = signal.getsignal(number)
        task = asyncio.create_task(stop_signal())
        await asyncio.sleep(0)
        os.kill(os.getpid(), number)
        await task
        assert signal.getsignal(number) in (before, signal.SIG_DFL, signal.default_int_handler)

    run(main)


def test_the_second_signal_kills() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopped\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
