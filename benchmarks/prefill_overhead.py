"""What compression adds to a prefill: statistics, selection and writing the parcel, beside the pass itself.

Random weights, one prompt whose last `rows` tokens follow a (pretended) image. In each round every variant runs once,
interleaved, so that a noisy machine disturbs all alike. On a CPU the differences of whole passes drown in noise all the
same: judge by the stages' shares there, CPU time of the stage over CPU time of the rest of the same pass. On a GPU,
where stages only launch, there are none: judge by the passes.

    python -m benchmarks.prefill_overhead --kv-heads 2 --prompt 2000 --rows 64 --json -
    python -m benchmarks.prefill_overhead --device cuda --shape llava-1.6-mistral-7b --prompt 8192 --json -
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import tyro

from benchmarks.random_llama import ModelConfig, build_model, device_facts, twin
from benchmarks.report import table, write_json
from benchmarks.stopwatch import interleaved_ms, percentiles
from prefill_worker.compression import attention
from prefill_worker.compression.pipeline import Selection, select_tokens, statistics_for
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.parcel.writer import kept_counts, write_body
from prefill_worker.prompt import Prompt
from shared.kernels.dispatch import Kernels, kernels_for
from shared.kernels.reference.statistics import PostVisionStatistics
from shared.model.attention import PREFILL_ATTENTION
from shared.request.params import Budget

STAGES = ("statistics", "selection", "parcel")
VARIANTS = ("plain", *STAGES)
HEADER = ("prefill up to", "p50 ms", "p95 ms", "over plain", "this stage, CPU ms", "over the rest of its pass")


@dataclass(frozen=True, kw_only=True)
class PrefillOverheadConfig(ModelConfig):
    """What to measure."""

    prompt: int = 2000
    """Tokens of the prompt."""
    rows: int = 64
    """Tokens after the (pretended) image: the rows that are observed."""
    retention: float = 0.1
    """Share of the KV that is kept."""
    rounds: int = 30
    """Measured passes of each variant."""

    def __post_init__(self) -> None:
        if not 1 <= self.rows < self.prompt:
            raise ValueError(f"rows must lie between 1 and the prompt's {self.prompt} tokens, not {self.rows}")


class StatisticsProbe:
    """Stands before the kernel and adds up the CPU time that it takes."""

    def __init__(self, device: torch.device) -> None:
        kernels = kernels_for(device)
        self._kernel = kernels.post_vision_statistics
        self._probed = dataclasses.replace(kernels, post_vision_statistics=self._observe)
        self.seconds = 0.0

    def kernels_for(self, device: torch.device) -> Kernels:
        """Takes the place of the door to the kernels."""
        return self._probed

    def _observe(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        first_row: int,
        scaling: float,
        threshold: float,
        visual: torch.Tensor | None = None,
    ) -> PostVisionStatistics:
        started = time.process_time()
        found = self._kernel(query, key, first_row, scaling, threshold, visual)
        self.seconds += time.process_time() - started
        return found


class Passes:
    """The prefill worker's own steps over one model and one prompt, as far as a variant goes.

    Attributes:
        stages_ms: CPU time of each stage, one figure per pass that had it.
        shares: The same over the rest of the pass, which is what a prefill without compression takes.
    """

    def __init__(self, config: PrefillOverheadConfig) -> None:
        # no cap of its own: `rows` says how many are observed
        self._policy, self._layout = VLCache(max_rows=0), config.layout
        self._budget = Budget(retention=config.retention)
        self._engine = PrefillEngine(twin(build_model(config, positions=config.prompt), PREFILL_ATTENTION))
        self._probe = StatisticsProbe(self._engine.device)
        self._prompt = random_prompt(config.prompt, config.rows, config.text.vocabulary)
        bound = self._budget.kept_tokens_bound(config.rows, config.prompt - config.rows)
        self._body = memoryview(bytearray(self._layout.full_bytes(bound)))
        self.stages_ms: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.shares: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def run(self, variant: str) -> None:
        """One pass with the stages up to `variant`."""
        seconds: dict[str, float] = {}
        started, self._probe.seconds = time.process_time(), 0.0
        prefilled = self._prefill(self._policy if variant != "plain" else None)
        if variant in STAGES:
            seconds["statistics"] = self._probe.seconds
        if variant in STAGES[1:]:
            with _timed(seconds, "selection"):
                selections = self._select(prefilled)
        if variant in STAGES[2:]:
            with _timed(seconds, "parcel"):
                self._write(prefilled, selections)
        rest = time.process_time() - started - sum(seconds.values())
        for stage, duration in seconds.items():
            self.stages_ms[stage].append(duration * 1000)
            self.shares[stage].append(duration / rest)

    def _prefill(self, policy: Policy | None) -> Prefilled:
        statistics = statistics_for(policy, self._prompt.shape) if policy else ()
        with mock.patch.object(attention, "kernels_for", self._probe.kernels_for):
            return self._engine.prefill(self._prompt, statistics, threading.Event())

    def _select(self, prefilled: Prefilled) -> list[Selection]:
        return select_tokens(self._policy, prefilled.observed(self._prompt.shape), self._budget)

    def _write(self, prefilled: Prefilled, selections: list[Selection]) -> None:
        num_kept = kept_counts(prefilled, selections)
        write_body(prefilled, selections, num_kept, self._layout, self._body[: self._layout.body_bytes(num_kept)])()


def measure(config: PrefillOverheadConfig) -> dict[str, Any]:
    """Medians in ms; overheads are ratios of whole passes to the plain one, minus one."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    passes = Passes(config)
    steps = {variant: partial(passes.run, variant) for variant in VARIANTS}
    times = interleaved_ms(steps, rounds=config.rounds, device=config.torch_device)
    median = {variant: statistics.median(values) for variant, values in times.items()}
    return {
        **{f"{variant}_ms": value for variant, value in median.items()},
        **{f"{stage}_overhead": median[stage] / median["plain"] - 1 for stage in STAGES},
        "percentiles_ms": {variant: percentiles(values) for variant, values in times.items()},
        **({} if config.on_gpu else _within_passes(passes)),
        "rows": config.rows,
        "prompt": config.prompt,
        "dtype": config.dtype,
        **device_facts(config),
    }


def _within_passes(passes: Passes) -> dict[str, Any]:
    shares = {stage: percentiles(values) for stage, values in passes.shares.items()}
    return {
        "stages_cpu_ms": {stage: percentiles(values) for stage, values in passes.stages_ms.items()},
        "stage_shares": shares,
        "statistics_and_selection_share": shares["statistics"]["p50"] + shares["selection"]["p50"],
    }


def random_prompt(tokens: int, rows: int, vocabulary: int) -> Prompt:
    """Random tokens; the policy is told that an image ends `rows` tokens before the end."""
    positions = torch.arange(tokens)
    return Prompt(
        inputs={"input_ids": torch.randint(vocabulary, (1, tokens))},
        position_ids=positions[None],
        next_position=tokens,
        shape=PromptShape(visual=positions < tokens - rows),
        pixels=(),
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.process_time()
    yield
    seconds[stage] = time.process_time() - started


def _report(figures: dict[str, Any]) -> str:
    rows = []
    for variant, total in figures["percentiles_ms"].items():
        row = [variant, f"{total['p50']:.1f}", f"{total['p95']:.1f}"]
        row.append(f"{100 * figures[f'{variant}_overhead']:+.1f} %" if variant in STAGES else "")
        if variant in figures.get("stages_cpu_ms", {}):
            row += [f"{figures['stages_cpu_ms'][variant]['p50']:.2f}"]
            row += [f"{100 * figures['stage_shares'][variant]['p50']:.2f} %"]
        rows.append([*row, *[""] * (len(HEADER) - len(row))])
    return table(HEADER, rows)


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(PrefillOverheadConfig, description=__doc__)
    figures = measure(config)
    sys.stdout.write(_report(figures) + "\n")
    if "statistics_and_selection_share" in figures:
        share = 100 * figures["statistics_and_selection_share"]
        sys.stdout.write(f"\nstatistics and selection: {share:.2f} % of a pass without them\n")
    write_json(config.json, {"benchmark": "prefill_overhead", "workload": config.workload, **figures})


if __name__ == "__main__":
    main()
