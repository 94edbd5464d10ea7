"""Real preprocessing processes: the worker's own prompts, within bounds, and gone with the worker."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from prefill_worker.preprocess.handle import ROOT, PreprocessProcess
from prefill_worker.preprocess.pool import PreprocessPool
from prefill_worker.prompt import PromptBuilder, prompt_limits
from shared.errors import ContextTooLongError, InvalidRequestError
from shared.model.loading import load_spec
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import CONTEXT
from tests.unit.prefill_worker.pieces import until
from tests.unit.prefill_worker.prompts import QUESTION, encoded, message, picture, user

MIB = 1 << 20
GIB = 1 << 30
# a second and hundreds of MiB to decode
LARGE = encoded(Image.merge("RGBA", [Image.linear_gradient("L").resize((6300, 6300))] * 4))


class Running:
    """A pool of real processes, and which of them run."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        spec = load_spec(checkpoint, torch.float32)
        self.pids: list[int] = []
        memory_bytes = options.pop("memory_bytes", GIB)
        limits = prompt_limits(spec, max_images=3)

        def launch() -> PreprocessProcess:
            process = PreprocessProcess.launch(checkpoint, limits, memory_bytes=memory_bytes)
            self.pids.append(process.pid)
            return process

        self.metrics = PrefillMetrics(worker="p", model="m")
        values = {"processes": 1, "timeout_s": 60.0, "max_waiting": 8, "max_waiting_bytes": GIB, **options}
        self.pool = PreprocessPool(launch, spec, self.metrics, **values)
        self.pool.wait_ready()
        self.build = partial(self.pool.build, max_new_tokens=1)


def run(checkpoint: Path, body: Callable[[Running], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        running = Running(checkpoint, **options)
        try:
            await asyncio.wait_for(body(running), 100)
        finally:
            await running.pool.close()
        assert not any(lives(pid) for pid in running.pids)

    asyncio.run(main())


def memory_map(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_prompts_and_refusals_are_those_of_the_worker_itself(checkpoint: Path, builder: PromptBuilder) -> None:
    async def body(running: Running) -> None:
        for messages in (
            [user("Hi, there.")],
            [user(encoded(picture(1, (40, 30)), "JPEG"), QUESTION)],
            [message("system", "Be brief."), user(encoded(picture(1)), "one", encoded(picture(2), "WEBP"), "two?")],
        ):
            there = await running.build(messages)
            here = builder.build(messages, max_new_tokens=1)
            assert there.inputs.keys() == here.inputs.keys()
            assert all(torch.equal(there.inputs[name], here.inputs[name]) for name in here.inputs)
            assert torch.equal(there.shape.visual, here.shape.visual)
            for field in ("special", "punctuation", "seed"):
                assert getattr(there.shape, field) == getattr(here.shape, field)
            assert (there.pixels, there.grids, there.next_position) == (here.pixels, here.grids, here.next_position)
        with pytest.raises(InvalidRequestError, match="image 1 is no readable") as caught:
            await running.build([user(b"GIF89a", "?")])
        assert caught.value.reason == "BAD_IMAGE"
        with pytest.raises(ContextTooLongError, match=f"context is {CONTEXT}"):
            await running.pool.build([user("Hi")], max_new_tokens=CONTEXT)
        (pid,) = running.pids
        assert "torch" not in memory_map(pid), "three quarters of its memory"

    run(checkpoint, body)


def test_a_slow_image_is_ended_and_others_go_on(checkpoint: Path) -> None:
    async def body(running: Running) -> None:
        await asyncio.gather(*(running.build([user("Hi")]) for _ in range(8)))
        slow = asyncio.create_task(running.build([user(LARGE, LARGE, "?")]))
        await asyncio.sleep(0)
        await asyncio.gather(*(running.build([user(encoded(picture(1)), "?")]) for _ in range(4)))
        with pytest.raises(InvalidRequestError) as caught:
            await slow
        assert caught.value.reason == "PREPROCESS_TIMEOUT"
        assert len(running.pids) >= 2

    run(checkpoint, body, processes=2, timeout_s=1.0)


def test_a_process_that_is_killed_fails_its_request_and_is_replaced(checkpoint: Path) -> None:
    async def body(running: Running) -> None:
        await running.build([user("Hi")])
        slow = asyncio.create_task(running.build([user(LARGE, LARGE, "?")]))
        behind = asyncio.create_task(running.build([user("Hi")]))
        await until(lambda: len(running.pool._waiting) == 1)
        (pid,) = running.pids
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InvalidRequestError) as caught:
            await slow
        assert caught.value.reason == "PREPROCESS_CRASH"
        assert (await behind).shape.num_visual == 0
        assert len(running.pids) == 2

    run(checkpoint, body)


def test_memory_is_bounded_and_its_lack_ends_the_request_alone(checkpoint: Path) -> None:
    async def body(running: Running) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            await running.build([user(LARGE, "?")])
        assert caught.value.reason == "PREPROCESS_MEMORY"
        await running.build([user(encoded(picture(1)), "?")])
        assert len(running.pids) == 1

    run(checkpoint, body, memory_bytes=220 * MIB)


def test_nothing_is_left_when_the_worker_is_killed(checkpoint: Path) -> None:
    script = (
        "import asyncio, sys, time\n"
        "from pathlib import Path\n"
        "from tests.unit.prefill_worker.preprocess.test_processes import Running\n"
        "async def main():\n"
        "    print(*Running(Path(sys.argv[1]), processes=2).pids, flush=True)\n"
        "    time.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, str(checkpoint)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        assert len(pids) == 2
        assert all(lives(pid) for pid in pids)
        worker.kill()
    give_up = time.monotonic() + 10
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < give_up, "they outlive their worker"
        time.sleep(0.01)


def test_a_cancelled_end_lasts_until_the_process_is_gone() -> None:
    class Dying:
        gone = threading.Event()
        kill = staticmethod(lambda: None)

        def wait(self) -> int:
            assert self.gone.wait(10)
            return -9

    async def main() -> None:
        dying, (peer, other) = Dying(), socket.socketpair()
        task = asyncio.create_task(PreprocessProcess(dying, peer).end())  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with other:
            assert not (await asyncio.wait([task], timeout=0.05))[0]
            dying.gone.set()
            await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())
