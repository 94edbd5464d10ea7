"""What cutting a long prompt into pieces saves and costs (`--prefill-chunk`): the most memory that a pass takes beside
weights and KV, and its time.

Random weights, one prompt, the worker's own pass with VL-Cache's statistics, every piece size in turns. On a CPU memory
is the peak of the resident set over what was there before, on a GPU what PyTorch allocated; both without the KV itself.

    python -m benchmarks.prefill_pieces --prompt 16384 --pieces 0 8192 4096 2048 1024 --layers 2 --json -
    python -m benchmarks.prefill_pieces --device cuda --shape llava-1.6-mistral-7b --prompt 32768 --json -
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.prefill_overhead import random_prompt
from benchmarks.random_llama import ModelConfig, build_model, device_facts, twin
from benchmarks.report import table, write_json
from benchmarks.stopwatch import percentiles
from prefill_worker.compression.pipeline import statistics_for
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.engine.engine import PrefillEngine
from shared.model.attention import PREFILL_ATTENTION

KIB, MIB = 2**10, 2**20
# Makes the peak of the resident set begin anew, see proc_pid_clear_refs(5).
RESET_PEAK = "5"


@dataclass(frozen=True, kw_only=True)
class PrefillPiecesConfig(ModelConfig):
    """What to measure."""

    prompt: int = 16384
    """Tokens of the prompt."""
    pieces: tuple[int, ...] = (0, 8192, 4096, 2048, 1024)
    """Tokens of a piece; 0 does not cut."""
    rows: int = 64
    """Tokens after the (pretended) image."""
    rounds: int = 3
    """Measured passes of each."""


class Memory:
    """The most memory that something takes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def begin(self) -> None:
        """Forgets the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        # what was freed and not yet given back would hide a peak
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        self._before = _resident("VmRSS")

    def peak_bytes(self) -> int:
        """Over what was there at the beginning."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _resident("VmHWM") - self._before


def measure(config: PrefillPiecesConfig) -> dict[str, Any]:
    """Per piece size: peak of the activations, bytes, and ms of a pass."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    model = twin(build_model(config, positions=config.prompt), PREFILL_ATTENTION)
    engines = {tokens: PrefillEngine(model, chunk_tokens=tokens) for tokens in config.pieces}
    peaks: dict[int, list[int]] = {tokens: [] for tokens in config.pieces}
    times: dict[int, list[float]] = {tokens: [] for tokens in config.pieces}
    for measured in range(-1, config.rounds):
        for tokens, engine in engines.items():
            peak, seconds = _pass(config, engine)
            # the first round touches the weights
            if measured >= 0:
                peaks[tokens].append(peak)
                times[tokens].append(seconds * 1000)
    return {
        "kv_bytes": config.layout.full_bytes(config.prompt),
        "peak_activation_bytes": {tokens: max(values) for tokens, values in peaks.items()},
        "percentiles_ms": {tokens: percentiles(values) for tokens, values in times.items()},
        **device_facts(config),
    }


def _pass(config: PrefillPiecesConfig, engine: PrefillEngine) -> tuple[int, float]:
    """Peak of the activations, and seconds."""
    prompt, memory = random_prompt(config.prompt, config.rows, config.text.vocabulary), Memory(config.torch_device)
    memory.begin()
    started = time.perf_counter()
    prefilled = engine.prefill(prompt, statistics_for(VLCache(), prompt.shape), threading.Event())
    # waits for a GPU
    prefilled.logits.cpu()
    return memory.peak_bytes() - prefilled.peak_kv_bytes, time.perf_counter() - started


def _resident(name: str) -> int:
    """Bytes of the process's resident set, now (`VmRSS`) or at most (`VmHWM`)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * KIB


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(PrefillPiecesConfig, description=__doc__)
    figures = measure(config)
    rows = [
        [str(tokens or "the prompt"), f"{peak / MIB:,.0f}", f"{figures['percentiles_ms'][tokens]['p50']:,.0f}"]
        for tokens, peak in figures["peak_activation_bytes"].items()
    ]
    sys.stdout.write(table(("tokens of a piece", "peak beside the KV, MiB", "pass p50, ms"), rows) + "\n")
    sys.stdout.write(f"\nKV: {figures['kv_bytes'] / MIB:,.0f} MiB\n")
    write_json(config.json, {"benchmark": "prefill_pieces", "workload": config.workload, **figures})


if __name__ == "__main__":
    main()
