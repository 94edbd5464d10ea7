"""How many sequences fit in a given KV memory, and what the memory saved is worth in tokens per second.

Sequences are admitted one after another as the decode worker admits them: reserve the bound that a request has before
its prefill, install, give back what the exact bytes leave over; the first refusal says how many fit. Then the engine
steps the full pool from the sequences' first token to their last, both retentions in turns, so that a noisy machine
disturbs both alike. In the end sequences come and go at random, and the holes between them are counted.

    python -m benchmarks.capacity --kv-memory-mib 1040 --prompt 2000 --json -
    python -m benchmarks.capacity --device cuda --shape llava-1.5-7b --kv-memory-mib 32768 --json -
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import tyro
from tqdm import tqdm

from benchmarks.random_kv import build_engine, build_pool, random_body
from benchmarks.random_llama import ModelConfig, build_model, device_facts, weight_bytes
from benchmarks.report import table, write_json
from benchmarks.stopwatch import WARM_UPS, Step, interleaved_ms, percentiles
from benchmarks.tenants import Occupancy, Tenants
from decode_worker.engine import DecodeEngine
from shared.model.packing import pack_linears
from shared.request.params import Budget
from shared.rpc.options import MIB

FULL, KEPT = 1.0, 0.1
RETENTIONS = (FULL, KEPT)
# New tokens whose room may come with a reservation; one that outgrows it waits for more (`--promised-tokens`).
PROMISES = (32, 8, 1)
# Lengths of prompts that come and go differ by this share in both directions.
SPREAD = 0.5


@dataclass(frozen=True, kw_only=True)
class CapacityConfig(ModelConfig):
    """What to measure."""

    kv_memory_mib: int = 1040
    """Memory for KV of each retention, MiB."""
    prompt: int = 2000
    """Prompt tokens of each sequence."""
    new_tokens: int = 64
    """Tokens that each sequence generates; a sequence holds room for all of them."""
    churn: int = 300
    """Times that a random sequence ends and others of random lengths take its place."""

    def __post_init__(self) -> None:
        if self.new_tokens < WARM_UPS + 3:
            raise ValueError(f"new_tokens must be at least {WARM_UPS + 3}, not {self.new_tokens}")

    @property
    def growth(self) -> int:
        """Tokens whose KV a sequence needs room for; that of its last one is never needed."""
        return self.new_tokens - 1


def measure(config: CapacityConfig) -> dict[str, Any]:
    """All figures; those of one retention end in `_1.0` or `_0.1`."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    held = {retention: _tenants(config, retention) for retention in RETENTIONS}
    for tenants in held.values():
        tenants.fill(config.prompt, config.growth)
    fresh = {retention: tenants.occupancy() for retention, tenants in held.items()}
    model = build_model(config, positions=config.prompt + config.new_tokens)
    weights = weight_bytes(model)
    pack_linears(model)
    times_ms = _times_ms(config, {name: _step(model, tenants) for name, tenants in held.items()})
    churned = {retention: _churned(config, tenants) for retention, tenants in held.items()}
    counts = {retention: occupancy.sequences for retention, occupancy in fresh.items()}
    return {
        **_labelled("", fresh),
        **_labelled("_after_churn", churned),
        "sequences_ratio": counts[KEPT] / counts[FULL],
        "bytes_per_sequence_ratio": _bytes_each(fresh[FULL]) / _bytes_each(fresh[KEPT]),
        "sequences_ratio_by_promise": {str(promise): _ratio_at(held, config, promise) for promise in PROMISES},
        **throughput(counts, times_ms, weights, config.layout.full_bytes(config.prompt)),
        **device_facts(config),
    }


def throughput(
    counts: Mapping[float, int], times_ms: Mapping[float, Sequence[float]], weights: int, kv: int
) -> dict[str, Any]:
    """Tokens per second at each retention, their ratio, and what it would be if a step only read memory.

    Args:
        counts: Sequences at each retention.
        times_ms: Steps at each retention.
        weights: Bytes that every step reads.
        kv: Bytes of one sequence's full KV.
    """
    spread = {retention: percentiles(times) for retention, times in times_ms.items()}
    speed = {retention: counts[retention] / spread[retention]["p50"] * 1000 for retention in RETENTIONS}
    floor = {retention: counts[retention] / (weights + counts[retention] * retention * kv) for retention in RETENTIONS}
    ratio, roofline = speed[KEPT] / speed[FULL], floor[KEPT] / floor[FULL]
    return {
        **{f"step_ms_{retention}": found["p50"] for retention, found in spread.items()},
        **{f"tokens_per_s_{retention}": found for retention, found in speed.items()},
        "percentiles_ms": {str(retention): found for retention, found in spread.items()},
        "weight_bytes": weights,
        "full_kv_bytes_per_sequence": kv,
        "throughput_ratio": ratio,
        "roofline_throughput_ratio": roofline,
        "throughput_ratio_over_roofline": ratio / roofline,
    }


def _tenants(config: CapacityConfig, retention: float) -> Tenants:
    capacity, layout, budget = config.kv_memory_mib * MIB, config.layout, Budget(retention=retention)
    least = layout.full_bytes(int(budget.share_of(config.prompt) * config.prompt) + config.growth)
    pool = build_pool(
        config, capacity, max_num_seqs=capacity // least + 1, max_tokens=2 * config.prompt + config.new_tokens
    )
    return Tenants(pool, budget, body=random_body(config, 2 * config.prompt), chance=Random(0))


def _step(model: Any, tenants: Tenants) -> Step:
    batch = tenants.sequences()
    engine: DecodeEngine = build_engine(model, tenants.pool, max_num_seqs=len(batch))

    def step() -> None:
        for sequence, drawn in zip(batch, engine.step(batch), strict=True):
            sequence.accept(drawn)

    return step


def _times_ms(config: CapacityConfig, steps: Mapping[float, Step]) -> dict[float, list[float]]:
    """From the first token of the sequences to their last, so that the mean KV is that of a running service."""
    named = {str(retention): step for retention, step in steps.items()}
    times = interleaved_ms(named, rounds=config.growth - WARM_UPS, device=config.torch_device)
    return {float(name): found for name, found in times.items()}


def _churned(config: CapacityConfig, tenants: Tenants) -> Occupancy:
    """The typical state of a pool that has been in use for a while: the median of the second half of its time."""
    seen = []
    for _ in tqdm(range(config.churn), unit="turn", file=sys.stderr, desc="churn"):
        tenants.end_one()
        tenants.fill(config.prompt, config.growth, spread=SPREAD)
        seen.append(tenants.occupancy())
    tenants.check_integrity()
    late = seen[len(seen) // 2 :]
    return Occupancy(
        sequences=statistics.median_low(state.sequences for state in late),
        used_share=statistics.median(state.used_share for state in late),
        used_over_needed=statistics.median(state.used_over_needed for state in late),
        fragmentation=statistics.median(state.fragmentation for state in late),
    )


def _ratio_at(held: Mapping[float, Tenants], config: CapacityConfig, promise: int) -> float:
    """`sequences_ratio` of a worker that gives a reservation room for fewer new tokens."""
    counts = {}
    for retention, tenants in held.items():
        tenants.end_all()
        tenants.fill(config.prompt, min(promise, config.growth))
        counts[retention] = len(tenants.sequences())
    return counts[KEPT] / counts[FULL]


def _bytes_each(occupancy: Occupancy) -> float:
    """Share of the pool that one sequence takes: unlike counts, it is not rounded down."""
    return occupancy.used_share / occupancy.sequences


def _labelled(suffix: str, occupancies: Mapping[float, Occupancy]) -> dict[str, float]:
    return {
        f"{name}{suffix}_{retention}": value
        for retention, occupancy in occupancies.items()
        for name, value in occupancy._asdict().items()
    }


def tables(figures: Mapping[str, Any]) -> str:
    """For people."""
    state = ["pool", "retention", "sequences", "used", "used / needed", "largest free piece / free"]
    rows = [
        [
            "filled once" if not suffix else "after churn",
            str(retention),
            str(figures[f"sequences{suffix}_{retention}"]),
            f"{100 * figures[f'used_share{suffix}_{retention}']:.1f} %",
            f"{figures[f'used_over_needed{suffix}_{retention}']:.3f}",
            f"{100 * (1 - figures[f'fragmentation{suffix}_{retention}']):.0f} %",
        ]
        for suffix in ("", "_after_churn")
        for retention in RETENTIONS
    ]
    steps = [
        [
            str(retention),
            *(f"{figures['percentiles_ms'][str(retention)][cut]:.1f}" for cut in ("p50", "p95")),
            f"{figures[f'tokens_per_s_{retention}']:.1f}",
        ]
        for retention in RETENTIONS
    ]
    return f"{table(state, rows)}\n\n{table(['retention', 'step p50 ms', 'step p95 ms', 'tokens/s'], steps)}"


def main() -> None:
    """Measures, prints tables, writes JSON."""
    config = tyro.cli(CapacityConfig, description=__doc__)
    figures = measure(config)
    promises = ", ".join(f"{ratio:.2f} for {n}" for n, ratio in figures["sequences_ratio_by_promise"].items())
    sys.stdout.write(
        f"{tables(figures)}\n\nsequences: {figures['sequences_ratio']:.2f} times as many, each with room for all its "
        f"{config.new_tokens} tokens (bytes of one: {figures['bytes_per_sequence_ratio']:.2f} times fewer); where room "
        f"for only some is promised: {promises}\n"
        f"throughput at equal KV memory: {figures['throughput_ratio']:.2f} times; if a step only read memory "
        f"{figures['roofline_throughput_ratio']:.2f} ({100 * figures['throughput_ratio_over_roofline']:.0f} %)\n"
    )
    write_json(config.json, {"benchmark": "capacity", "workload": config.workload, **figures})


if __name__ == "__main__":
    main()
