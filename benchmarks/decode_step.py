"""How close a decode step comes to its floor: weights and kept KV, read once.

Random weights in a Llama shape, one ragged batch. In each round every variant takes one step, interleaved, so that a
noisy machine disturbs all alike; the figures are ratios of medians of one run. On a GPU, where the variants would not
fit beside each other, they run one after another.

    python -m benchmarks.decode_step --dtype bfloat16 --kv-heads 8 --batch 16 --prompt 2000 --json -
    python -m benchmarks.decode_step --device cuda --shape llava-1.6-mistral-7b --batch 64 --prompt 2000 --json -
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
import tyro
from transformers import DynamicCache, PreTrainedModel, StaticCache

from benchmarks.random_kv import build_engine, build_pool, even, install, pool_bytes, ragged, random_body
from benchmarks.random_llama import (
    ModelConfig,
    baseline_attention,
    build_model,
    device_facts,
    twin,
    weight_bytes,
)
from benchmarks.report import table, write_json
from benchmarks.stopwatch import WARM_UPS, Step, apart_ms, interleaved_ms, percentiles
from shared.model.packing import pack_linears
from shared.request.params import Budget

RETENTION = 0.1


@dataclass(frozen=True, kw_only=True)
class DecodeStepConfig(ModelConfig):
    """What to measure."""

    batch: int = 16
    """Sequences in the step."""
    prompt: int = 2000
    """Prompt tokens of each sequence."""
    rounds: int = 12
    """Measured steps of each variant."""

    @property
    def growth(self) -> int:
        """Tokens that each sequence gets."""
        return self.rounds + WARM_UPS


class Variants:
    """The competing steps over the same weights and the same number of sequences."""

    def __init__(self, config: DecodeStepConfig) -> None:
        self._config = config
        self._layout = config.layout
        self._ours = build_model(config, positions=config.prompt + config.growth)
        self.weight_bytes = weight_bytes(self._ours)
        self.full_kv_bytes = config.batch * self._layout.full_bytes(config.prompt)
        self._dynamic = twin(self._ours, baseline_attention(config))
        # a static cache has room behind its last token, which only a mask hides; flash attention takes none
        self._static = twin(self._ours, "sdpa")
        pack_linears(self._ours)

    def builders(self) -> dict[str, Callable[[], Step]]:
        """By name, what makes a variant ready; each call of the result is one step."""
        config, layers = self._config, self._layout.num_layers
        mean = Budget(retention=RETENTION).share_of(config.prompt) * config.prompt
        kept = ragged(self._layout, config.prompt, mean, Random(0))
        return {
            "ours_full": partial(self._engine_step, even(self._layout, [config.prompt] * layers)),
            "ours_kept": partial(self._engine_step, kept),
            "no_kv": partial(self._engine_step, even(self._layout, [1] * layers)),
            "hf_dynamic": lambda: self._hf_step(self._dynamic, DynamicCache()),
            "hf_static": lambda: self._hf_step(
                self._static,
                StaticCache(config=self._static.config, max_cache_len=config.prompt + config.growth),
            ),
        }

    def _engine_step(self, num_kept: tuple[int, ...]) -> Step:
        config, growth = self._config, self._config.growth
        pool = build_pool(
            config,
            pool_bytes(config, num_kept, growth, config.batch),
            max_num_seqs=config.batch,
            max_tokens=config.prompt + growth,
        )
        body = random_body(config, -(-sum(num_kept) // (self._layout.num_layers * self._layout.num_kv_heads)))
        engine = build_engine(self._ours, pool, max_num_seqs=config.batch)
        batch = [
            install(
                pool,
                pool.allocate(pool.sequence_bytes(num_kept, growth)),
                num_kept,
                body,
                position=config.prompt,
                growth=growth,
            )
            for _ in range(config.batch)
        ]
        return lambda: engine.step(batch)

    def _hf_step(self, model: PreTrainedModel, cache: Any) -> Step:
        config, device = self._config, self._config.torch_device
        shape = (config.batch, self._layout.num_kv_heads, config.prompt, self._layout.head_dim)
        for layer in range(self._layout.num_layers):
            key, value = (torch.randn(shape, dtype=config.torch_dtype, device=device) for _ in range(2))
            cache.update(key, value, layer)
        tokens = torch.ones(config.batch, 1, dtype=torch.long, device=device)
        taken = 0

        @torch.inference_mode()
        def step() -> object:
            nonlocal taken
            positions = torch.full((config.batch, 1), config.prompt + taken, device=device)
            taken += 1
            output = model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
            return output.logits[:, -1].argmax(dim=-1).tolist()

        return step


def measure(config: DecodeStepConfig) -> dict[str, Any]:
    """Medians in ms and their ratios."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    variants = Variants(config)
    figures = evaluate(_times_ms(config, variants.builders()), variants.weight_bytes, variants.full_kv_bytes)
    return {**figures, **device_facts(config), "hf_attention": baseline_attention(config)}


def _times_ms(config: DecodeStepConfig, builders: Mapping[str, Callable[[], Step]]) -> dict[str, list[float]]:
    if config.on_gpu:
        return apart_ms(builders, rounds=config.rounds, device=config.torch_device)
    steps = {name: build() for name, build in builders.items()}
    return interleaved_ms(steps, rounds=config.rounds, device=config.torch_device)


def evaluate(times_ms: Mapping[str, list[float]], weights: int, kv: int) -> dict[str, Any]:
    """The figures.

    Args:
        times_ms: Per variant, its steps.
        weights: Bytes that every step reads.
        kv: Bytes of the full KV of the batch.
    """
    spread = {name: percentiles(values) for name, values in times_ms.items()}
    median = {name: found["p50"] for name, found in spread.items()}
    ratio, roofline = median["ours_full"] / median["ours_kept"], (weights + kv) / (weights + RETENTION * kv)
    return {
        **{f"{name}_ms": value for name, value in median.items()},
        "percentiles_ms": spread,
        "weight_bytes": weights,
        "full_kv_bytes": kv,
        "ratio": ratio,
        "roofline_ratio": roofline,
        "ratio_over_roofline": ratio / roofline,
        "hf_ratio": median["hf_dynamic"] / median["ours_kept"],
        "kept_over_no_kv": median["ours_kept"] / median["no_kv"],
        "floor_gb_per_s": (weights + kv) / median["ours_full"] / 1e6,
    }


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(DecodeStepConfig, description=__doc__)
    figures = measure(config)
    rows = [[name, f"{p['p50']:.1f}", f"{p['p95']:.1f}"] for name, p in figures["percentiles_ms"].items()]
    sys.stdout.write(table(["step", "p50 ms", "p95 ms"], rows) + "\n")
    sys.stdout.write(
        f"\nfull / kept {figures['ratio']:.2f}, roofline {figures['roofline_ratio']:.2f} "
        f"({100 * figures['ratio_over_roofline']:.0f} %); DynamicCache / kept {figures['hf_ratio']:.2f}; "
        f"kept / no KV {figures['kept_over_no_kv']:.2f}\n"
    )
    write_json(config.json, {"benchmark": "decode_step", "workload": config.workload, **figures})


if __name__ == "__main__":
    main()
