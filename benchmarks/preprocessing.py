"""How late an event loop is while photographs are decoded, resized and tokenised: in its threads, and in processes.

Every round preprocesses the same requests in both ways, one after the other; a task that sleeps 5 ms at a time notes by
how much it overslept. Threads are what serves without a pool: `PromptBuilder.build` in an executor.

    python -m benchmarks.preprocessing --megapixels 12 --json -
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm
from vlcache.v1 import inference_pb2 as public

from benchmarks.report import table, write_json
from models.shapes_vlm.paths import CHECKPOINT
from prefill_worker.config import PrefillConfig
from prefill_worker.preprocess.handle import PreprocessProcess
from prefill_worker.preprocess.pool import PreprocessPool
from prefill_worker.prompt import PromptBuilder, prompt_limits
from shared.model.loading import load_spec
from shared.model.processor import load_processor
from shared.rpc.options import MIB
from shared.telemetry.metrics import PrefillMetrics

TICK_S = 0.005
Build = Callable[[], Awaitable[object]]


@dataclass(frozen=True, kw_only=True)
class PreprocessingConfig:
    """What to measure."""

    megapixels: float = 12.0
    """Size of the photograph in each request, JPEG."""
    requests: int = 16
    """Requests of a round, in each way."""
    concurrency: int = 4
    """Requests under way at a time."""
    workers: int = 2
    """Threads, and processes."""
    rounds: int = 5
    """Rounds."""
    model: str = str(CHECKPOINT)
    """Checkpoint directory."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        for name in ("megapixels", "requests", "concurrency", "workers", "rounds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


def photograph(megapixels: float) -> bytes:
    """A JPEG of soft noise, 4 to 3."""
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    coarse = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, width * 3 // 4)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


async def measure(config: PreprocessingConfig) -> dict[str, Any]:
    """By way: oversleeping in ms, requests per second; and the memory of a process."""
    path = Path(config.model)
    spec, settings = load_spec(path, torch.float32), PrefillConfig(model=config.model)
    image = public.Part(image=public.Image(data=photograph(config.megapixels)))
    messages = [public.Message(role="user", parts=[image, public.Part(text="What is this?")])]
    builder = PromptBuilder(load_processor(path), spec, max_images=1)
    launched: list[PreprocessProcess] = []

    def launch() -> PreprocessProcess:
        memory_bytes = settings.preprocess_memory_mib * MIB
        launched.append(PreprocessProcess.launch(path, prompt_limits(spec, max_images=1), memory_bytes=memory_bytes))
        return launched[-1]

    pool = PreprocessPool(
        launch,
        spec,
        PrefillMetrics(worker="bench", model="bench"),
        processes=config.workers,
        timeout_s=settings.preprocess_timeout_s,
        max_waiting=config.concurrency,
        max_waiting_bytes=settings.preprocess_queue_mib * MIB,
    )
    here = partial(builder.build, messages, max_new_tokens=1)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(config.workers) as threads:
        ways: dict[str, Build] = {
            "threads": lambda: loop.run_in_executor(threads, here),
            "processes": lambda: pool.build(messages, max_new_tokens=1),
        }
        figures = await _rounds(ways, config)
    memory = [_peak_mib(process.pid) for process in launched]
    await pool.close()
    return {"ways": figures, "process_peak_mib": max(memory)}


async def _rounds(ways: dict[str, Build], config: PreprocessingConfig) -> dict[str, dict[str, float]]:
    late: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for build in ways.values():
        await asyncio.gather(*(build() for _ in range(config.workers)))
    for _ in tqdm(range(config.rounds), unit="round", file=sys.stderr):
        for name, build in ways.items():
            started = time.perf_counter()
            async with _noting(late[name]):
                await _load(build, config)
            rates[name].append(config.requests / (time.perf_counter() - started))
    return {name: {**_lateness(late[name]), "requests_per_s": fmean(rates[name])} for name in ways}


async def _load(build: Build, config: PreprocessingConfig) -> None:
    places = asyncio.Semaphore(config.concurrency)

    async def one() -> None:
        async with places:
            await build()

    await asyncio.gather(*(one() for _ in range(config.requests)))


@contextlib.asynccontextmanager
async def _noting(late_s: list[float]) -> Any:
    async def tick() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(TICK_S)
            late_s.append(time.perf_counter() - started - TICK_S)

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()


def _lateness(late_s: list[float]) -> dict[str, float]:
    late = 1000 * np.array(late_s)
    p50, p99 = np.percentile(late, (50, 99)).tolist()
    return {"late_p50_ms": p50, "late_p99_ms": p99, "late_max_ms": float(late.max())}


def _peak_mib(pid: int) -> float:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(PreprocessingConfig, description=__doc__)
    found = asyncio.run(measure(config))
    names = ("late_p50_ms", "late_p99_ms", "late_max_ms", "requests_per_s")
    rows = [[way, *(f"{figures[name]:.2f}" for name in names)] for way, figures in found["ways"].items()]
    sys.stdout.write(table(["way", *names], rows) + "\n")
    sys.stdout.write(f"a process has had {found['process_peak_mib']:.0f} MiB at most\n")
    workload = {name: getattr(config, name) for name in ("megapixels", "requests", "concurrency", "workers", "rounds")}
    write_json(config.json, {"benchmark": "preprocessing", "workload": workload, **found})


if __name__ == "__main__":
    main()
