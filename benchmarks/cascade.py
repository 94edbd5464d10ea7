"""How much KV a prefill holds at once when its layers lose tokens on the way, and what that takes.

Random weights, one prompt whose last `rows` tokens follow a (pretended) image. In each round one pass holds everything
to the end and one per retention cascades, interleaved; each with its selection, which must be the same one.

    python -m benchmarks.cascade --layers 32 --hidden 512 --kv-heads 2 --json -
"""

from __future__ import annotations

import statistics
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import tyro

from benchmarks.prefill_overhead import random_prompt
from benchmarks.random_llama import ModelConfig, build_model, device_facts, twin
from benchmarks.report import table, write_json
from benchmarks.stopwatch import interleaved_ms, percentiles
from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.pipeline import Selection, select_tokens, statistics_for
from prefill_worker.compression.registry import build_policy
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from shared.model.attention import PREFILL_ATTENTION
from shared.request.params import Budget

HEADER = ("retention", "peak KV, of full", "retention + 1/L", "p50 ms", "over holding all", "cascade, of its pass")


@dataclass(frozen=True, kw_only=True)
class CascadeConfig(ModelConfig):
    """What to measure."""

    policy: str = "vl_cache"
    """A policy that can cascade, with its defaults."""
    prompt: int = 1000
    """Tokens of the prompt."""
    rows: int = 64
    """Tokens after the (pretended) image."""
    retentions: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2])
    """Shares of the KV that are kept."""
    rounds: int = 5
    """Measured passes of each kind."""

    def __post_init__(self) -> None:
        if not 1 <= self.rows < self.prompt:
            raise ValueError(f"rows must lie between 1 and the prompt's {self.prompt} tokens, not {self.rows}")
        if not all(0 < retention < 1 for retention in self.retentions):
            raise ValueError("retentions must lie in (0, 1)")


class Passes:
    """The prefill worker's own pass and selection.

    Attributes:
        peaks: Most KV of a pass in bytes, by variant.
        shares: Time of the cascade over that of the rest of its pass, one figure per pass, by variant.
        chosen: What the last pass selected, by variant.
    """

    def __init__(self, config: CascadeConfig) -> None:
        self._policy, self._num_layers = build_policy(config.policy, {}), config.layout.num_layers
        self._engine = PrefillEngine(twin(build_model(config, positions=config.prompt), PREFILL_ATTENTION))
        self._prompt = random_prompt(config.prompt, config.rows, config.text.vocabulary)
        self.peaks: dict[str, int] = {}
        self.shares: dict[str, list[float]] = {}
        self.chosen: dict[str, list[Selection]] = {}

    def hold(self, retentions: list[float]) -> None:
        """Holds everything to the end, and selects for each retention."""
        prefilled = self._prefill(None)
        self.peaks["full"] = prefilled.peak_kv_bytes
        for retention in retentions:
            self.chosen[f"full {retention:g}"] = self._select(prefilled, retention)

    def cascade(self, retention: float) -> None:
        """Begins the selection in the pass."""
        prompt, name = self._prompt.shape, f"{retention:g}"
        prefilled = self._prefill(Cascade(self._policy, prompt, Budget(retention=retention), self._num_layers))
        self.chosen[name] = self._select(prefilled, retention)
        self.peaks[name] = prefilled.peak_kv_bytes
        spent = prefilled.seconds["cascade"]
        self.shares.setdefault(name, []).append(spent / (sum(prefilled.seconds.values()) - spent))

    def _prefill(self, cascade: Cascade | None) -> Prefilled:
        needed = statistics_for(self._policy, self._prompt.shape)
        return self._engine.prefill(self._prompt, needed, threading.Event(), cascade=cascade)

    def _select(self, prefilled: Prefilled, retention: float) -> list[Selection]:
        return select_tokens(self._policy, prefilled.observed(self._prompt.shape), Budget(retention=retention))


def measure(config: CascadeConfig) -> dict[str, Any]:
    """Per retention the peak and what it takes; ratios of medians of whole passes.

    Raises:
        RuntimeError: A cascade selected something else.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    passes = Passes(config)
    passes.hold(config.retentions)
    steps = {"full": partial(passes.hold, config.retentions[:1])}
    steps |= {f"{retention:g}": partial(passes.cascade, retention) for retention in config.retentions}
    times = interleaved_ms(steps, rounds=config.rounds, device=config.torch_device)
    median = {name: statistics.median(values) for name, values in times.items()}
    cascades = {name: _figures(passes, name, median) for name in steps if name != "full"}
    return {
        "cascades": {name: {**found, **percentiles(times[name])} for name, found in cascades.items()},
        "full_ms": percentiles(times["full"]),
        "full_bytes": passes.peaks["full"],
        **device_facts(config),
    }


def _figures(passes: Passes, name: str, median_ms: dict[str, float]) -> dict[str, float]:
    for one, other in zip(passes.chosen[name], passes.chosen[f"full {name}"], strict=True):
        assert one.chosen is not None
        assert other.chosen is not None
        if not torch.equal(one.chosen, other.chosen) or one.attention_mass != other.attention_mass:
            raise RuntimeError(f"at retention {name} the cascade selected something else")
    return {
        "peak_ratio": passes.peaks[name] / passes.peaks["full"],
        "expected_ratio": float(name) + 1 / len(passes.chosen[name]),
        "time_ratio": median_ms[name] / median_ms["full"],
        "stage_share": statistics.median(passes.shares[name]),
    }


def _report(figures: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{found['peak_ratio']:.3f}",
            f"{found['expected_ratio']:.3f}",
            f"{found['p50']:.0f}",
            f"{100 * (found['time_ratio'] - 1):+.1f} %",
            f"{100 * found['stage_share']:.1f} %",
        ]
        for name, found in figures["cascades"].items()
    ]
    return table(HEADER, [["1, held to the end", "1.000", "", f"{figures['full_ms']['p50']:.0f}", "", ""], *rows])


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(CascadeConfig, description=__doc__)
    figures = measure(config)
    sys.stdout.write(_report(figures) + "\n")
    write_json(config.json, {"benchmark": "cascade", "workload": config.workload, **figures})


if __name__ == "__main__":
    main()
