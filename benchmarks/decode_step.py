"""How close a decode step comes to its floor: weights and kept KV, read once.

Random weights in a Llama shape, one ragged batch. In each round every variant takes one step, interleaved, so that a
noisy machine disturbs all alike; the figures are ratios of medians of one run.

    python -m benchmarks.decode_step --dtype bf16 --kv-heads 8 --batch 16 --prompt 2000 --json -
"""

from __future__ import annotations

import copy
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from benchmarks.report import table, write_json
from decode_worker.engine import EagerEngine
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.sequence import Sequence
from shared.kv.layout import ITEM_BYTES, KVLayout
from shared.kv.manifest import Manifest, TransferId
from shared.model.attention import DECODE_ATTENTION
from shared.model.loading import DTYPES
from shared.model.packing import pack_linears
from shared.model.spec import DTYPE_NAMES
from shared.request.params import Sampling

RETENTION = 0.1
# Kept lengths of layers differ by this factor around their mean, as sparsity budgets make them.
SPREAD = (0.5, 1.5)


@dataclass(frozen=True, kw_only=True)
class DecodeStepConfig:
    """What to measure."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and KV."""
    kv_heads: int = 8
    """KV heads, of 8 query heads."""
    batch: int = 16
    """Sequences in the step."""
    prompt: int = 2000
    """Prompt tokens of each sequence."""
    layers: int = 8
    """Layers."""
    hidden: int = 1024
    """Hidden size; heads have 128 dimensions."""
    vocabulary: int = 32000
    """Vocabulary size."""
    rounds: int = 12
    """Measured steps of each variant."""
    threads: int = 1
    """torch threads."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""


class Variants:
    """The competing steps over the same weights and the same number of sequences."""

    def __init__(self, config: DecodeStepConfig) -> None:
        self._config = config
        self._dtype = DTYPES[config.dtype]
        llama = LlamaConfig(
            hidden_size=config.hidden,
            intermediate_size=config.hidden * 11 // 4,
            num_hidden_layers=config.layers,
            num_attention_heads=config.hidden // 128,
            num_key_value_heads=config.kv_heads,
            vocab_size=config.vocabulary,
            max_position_embeddings=config.prompt + 4096,
        )
        self._ours = _build(llama, self._dtype, DECODE_ATTENTION)
        self._theirs = _build(llama, self._dtype, "sdpa")
        self._theirs.load_state_dict(self._ours.state_dict(), assign=True)
        pack_linears(self._ours)
        self._layout = KVLayout(
            num_layers=config.layers,
            num_kv_heads=config.kv_heads,
            head_dim=128,
            dtype=DTYPE_NAMES[self._dtype],
        )
        # the input embedding is looked up, not read
        self.weight_bytes = sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in self._theirs.named_parameters()
            if "embed_tokens" not in name
        )
        self.full_kv_bytes = config.batch * self._layout.full_bytes(config.prompt)

    def steps(self) -> dict[str, Callable[[], object]]:
        """One callable per variant; each call is one step."""
        config = self._config
        return {
            "ours_full": self._engine_step([config.prompt] * config.layers),
            "ours_kept": self._engine_step(_ragged(round(config.prompt * RETENTION), config.layers)),
            "no_kv": self._engine_step([1] * config.layers),
            "hf_dynamic": self._hf_step(DynamicCache()),
            "hf_static": self._hf_step(
                StaticCache(config=self._theirs.config, max_cache_len=config.prompt + 2 * config.rounds + 16)
            ),
        }

    def _engine_step(self, kept_per_layer: list[int]) -> Callable[[], object]:
        config, layout, growth = self._config, self._layout, 2 * self._config.rounds + 16
        num_kept = tuple(kept for kept in kept_per_layer for _ in range(layout.num_kv_heads))
        pool = SlabPool(config.batch * (layout.body_bytes([kept + growth for kept in num_kept]) + 64), layout)
        values = torch.randn(layout.body_bytes(num_kept) // ITEM_BYTES[layout.dtype]).to(self._dtype)
        body = values.view(torch.uint8).numpy().data
        engine = EagerEngine(self._ours, pool)
        batch = [self._sequence(pool, num_kept, body, growth) for _ in range(config.batch)]
        return lambda: engine.step(batch)

    def _sequence(self, pool: SlabPool, num_kept: tuple[int, ...], body: memoryview, growth: int) -> Sequence:
        manifest = Manifest(
            transfer=TransferId(request_id="bench", attempt=0, prefill_epoch="bench"),
            model="bench",
            compatibility="",
            layout=self._layout,
            num_kept=num_kept,
            logical_length=self._config.prompt,
            next_position=self._config.prompt,
            policy="",
            requested_retention=RETENTION,
            realised_retention=RETENTION,
            layer_attention_mass=(),
            body_bytes=len(body),
            digest=b"",
            first_token=1,
            sampling=Sampling(max_new_tokens=growth),
        )
        extent = pool.allocate(pool.sequence_bytes(num_kept, growth))
        return Sequence.from_manifest(manifest, pool.install(extent, num_kept, body, growth), frozenset())

    def _hf_step(self, cache: Any) -> Callable[[], object]:
        config = self._config
        shape = (config.batch, config.kv_heads, config.prompt, 128)
        for layer in range(config.layers):
            cache.update(torch.randn(shape, dtype=self._dtype), torch.randn(shape, dtype=self._dtype), layer)
        tokens = torch.ones(config.batch, 1, dtype=torch.long)
        taken = 0

        @torch.inference_mode()
        def step() -> object:
            nonlocal taken
            positions = torch.full((config.batch, 1), config.prompt + taken)
            taken += 1
            output = self._theirs(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
            return output.logits[:, -1].argmax(dim=-1).tolist()

        return step


def measure(config: DecodeStepConfig) -> dict[str, Any]:
    """Medians in ms and their ratios."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    variants = Variants(config)
    steps = variants.steps()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name in steps:
        steps[name]()
    for _ in tqdm(range(config.rounds), unit="round", file=sys.stderr):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - started) * 1000)
    median = {name: statistics.median(values) for name, values in times.items()}
    weights, kv = variants.weight_bytes, variants.full_kv_bytes
    ratio, roofline = median["ours_full"] / median["ours_kept"], (weights + kv) / (weights + RETENTION * kv)
    return {
        **{f"{name}_ms": value for name, value in median.items()},
        "percentiles_ms": {name: _percentiles(values) for name, values in times.items()},
        "weight_bytes": weights,
        "full_kv_bytes": kv,
        "ratio": ratio,
        "roofline_ratio": roofline,
        "ratio_over_roofline": ratio / roofline,
        "hf_ratio": median["hf_dynamic"] / median["ours_kept"],
        "kept_over_no_kv": median["ours_kept"] / median["no_kv"],
        "floor_gb_per_s": (weights + kv) / median["ours_full"] / 1e6,
    }


def _build(config: LlamaConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    # a copy: models that share a configuration share its attention
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    return LlamaForCausalLM(config).to(dtype).eval()


def _ragged(mean: int, layers: int) -> list[int]:
    """Lengths around `mean` with exactly that mean."""
    chance = random.Random(0)
    lengths = [round(mean * chance.uniform(*SPREAD)) for _ in range(layers)]
    lengths[-1] += mean * layers - sum(lengths)
    return [max(1, length) for length in lengths]


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p5": cuts[0], "p50": cuts[9], "p95": cuts[18]}


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
    workload = {name: value for name, value in dataclasses.asdict(config).items() if name != "json"}
    write_json(config.json, {"benchmark": "decode_step", "workload": workload, **figures})


if __name__ == "__main__":
    main()
