"""What it gains that KV leaves while its prefill goes on: the same prompt with early shipping and without, interleaved.

Two processes: the prefill worker's own pass, cascade, selection and sender over random weights, and a decode worker's
gRPC server, receiver and KV pool. `held` keeps all KV to the end of the pass, `cascade` drops it on the way
(`--cascade`), `early` sends what is certain besides (`--early-shipping`); all of them install the same parcel.

    python -m benchmarks.early_shipping --json -
    python -m benchmarks.early_shipping --layers 32 --prompt 1000 --policies vl_cache --sharpness 6 --mbit 100 --json -

With `--mbit` a slow link stands before the decode worker: a proxy in its process with a token bucket for what the
prefill worker sends. Random weights attend to all tokens alike, so that `vl_cache` is certain of more than real
prompts allow; `--sharpness` multiplies all queries until a layer looks at less, and `density` is the share of
attention entries that then count, 1 - sparsity, mean over layers.

`left early` is the share of the KV that is handed to the sender before the last layer, and `early, of its pass` the CPU
time of choosing and copying it over that of the rest of the pass; `pass CPU` is what the model thread takes in all.
`hand-over` is the time from the first token to the commit, `in all` that from the begin of the pass. A second table
says what of a parcel is certain while prompts of the bundled model pass.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import tyro

from benchmarks.early_shipping.certain import certain_shares
from benchmarks.early_shipping.prefill_side import MAX_NEW_TOKENS, VARIANTS, Delivery, PrefillSide
from benchmarks.random_llama import ModelConfig, device_facts
from benchmarks.report import table, write_json
from benchmarks.transfer.processes import Peer
from prefill_worker.compression.registry import build_policy
from shared.request.params import Budget

CERTAIN_HEADER = ("policy", "certain after half of the layers", "before the last layer")
HEADER = (
    "policy",
    "Mbit/s",
    "variant",
    "left early",
    "waves",
    "pass CPU ms",
    "early, of its pass",
    "pass ms",
    "hand-over ms",
    "in all ms",
)


@dataclass(frozen=True, kw_only=True)
class EarlyShippingConfig(ModelConfig):
    """What to measure."""

    policies: list[str] = field(default_factory=lambda: ["vl_cache", "snap_kv"])
    """Policies that can cascade, with their defaults."""
    prompt: int = 1000
    """Tokens of the prompt."""
    rows: int = 64
    """Tokens after the (pretended) image."""
    retention: float = 0.1
    """Share of the KV that is kept."""
    sharpness: float = 1.0
    """Factor of all queries."""
    mbit: list[int] = field(default_factory=lambda: [0, 1000, 100])
    """Speeds of the link, Mbit/s; 0 is loopback as it is."""
    prompts: int = 20
    """Prompts of the bundled model whose certain share is computed; 0 leaves that out."""
    rounds: int = 7
    """Measured deliveries of each kind."""
    warmup: int = 1
    """Rounds before that."""

    def __post_init__(self) -> None:
        if not 1 <= self.rows < self.prompt:
            raise ValueError(f"rows must lie between 1 and the prompt's {self.prompt} tokens, not {self.rows}")
        if not 0 < self.retention < 1:
            raise ValueError(f"retention must lie in (0, 1), not {self.retention}")
        if not all(mbit >= 0 for mbit in self.mbit):
            raise ValueError("a link has a speed of at least 0 Mbit/s")


Key = tuple[str, int, str]
"""Policy, speed, variant."""


async def deliveries(config: EarlyShippingConfig, side: PrefillSide) -> dict[Key, list[Delivery]]:
    """In each round one of every policy, speed and variant, so that a noisy machine disturbs all alike."""
    policies, budget = {name: build_policy(name, {}) for name in config.policies}, Budget(retention=config.retention)
    peer = await Peer.start("benchmarks.early_shipping.decode_side", core=None)
    found: dict[Key, list[Delivery]] = {}
    try:
        addresses = await peer.ask(
            layout=dataclasses.asdict(config.layout),
            vocabulary=config.text.vocabulary,
            nbytes=max(side.reserved_bytes(policy, budget) for policy in policies.values()),
            mbit=config.mbit,
        )
        kinds = list(itertools.product(policies, zip(config.mbit, addresses, strict=True), VARIANTS))
        for number, (name, (mbit, address), variant) in itertools.product(range(config.warmup + config.rounds), kinds):
            request_id = f"{number} {name} {mbit} {variant}"
            token = await peer.ask(request_id=request_id, max_new_tokens=MAX_NEW_TOKENS)
            delivery = await side.deliver(
                variant, policies[name], budget, request_id=request_id, token=token, address=address
            )
            await peer.ask(release=token)
            if number >= config.warmup:
                found.setdefault((name, mbit, variant), []).append(delivery)
    finally:
        await peer.stop()
    return found


def measure(config: EarlyShippingConfig) -> dict[str, Any]:
    """Medians in ms per policy, speed and variant."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)

    async def main() -> tuple[float, dict[Key, list[Delivery]]]:
        side = PrefillSide(config, prompt=config.prompt, rows=config.rows, sharpness=config.sharpness)
        try:
            return side.density(), await deliveries(config, side)
        finally:
            await side.close()

    budget = Budget(retention=config.retention)
    bundled = []
    if config.prompts:
        bundled = certain_shares(config.policies, budget, prompts=config.prompts, threads=config.threads)
    density, found = asyncio.run(main())
    return {
        "bundled": bundled,
        "density": density,
        "deliveries": [_figures(key, made) for key, made in found.items()],
        **device_facts(config),
    }


def _figures(key: Key, made: list[Delivery]) -> dict[str, Any]:
    policy, mbit, variant = key
    return {
        "policy": policy,
        "mbit": mbit,
        "variant": variant,
        "kv_bytes": made[0].kv_bytes,
        "early_share": made[0].early_bytes / made[0].kv_bytes,
        "waves": made[0].waves,
        "pass_cpu_ms": statistics.median(each.pass_cpu_ms for each in made),
        "rows_cpu_share": statistics.median(each.rows_cpu_ms / (each.pass_cpu_ms - each.rows_cpu_ms) for each in made),
        "pass_ms": statistics.median(each.pass_ms for each in made),
        "hand_over_ms": statistics.median(each.hand_over_ms for each in made),
        "total_ms": statistics.median(each.pass_ms + each.hand_over_ms for each in made),
    }


def _report(figures: dict[str, Any]) -> str:
    rows = [
        [
            found["policy"],
            str(found["mbit"] or "loopback"),
            found["variant"],
            f"{100 * found['early_share']:.0f} %" if found["waves"] else "",
            str(found["waves"] or ""),
            f"{found['pass_cpu_ms']:.0f}",
            f"{100 * found['rows_cpu_share']:.1f} %" if found["waves"] else "",
            f"{found['pass_ms']:.0f}",
            f"{found['hand_over_ms']:.0f}",
            f"{found['total_ms']:.0f}",
        ]
        for found in figures["deliveries"]
    ]
    bundled = [
        [found["policy"], f"{100 * found['half_way']:.0f} %", f"{100 * found['before_last']:.0f} %"]
        for found in figures["bundled"]
    ]
    kv_mb = figures["deliveries"][0]["kv_bytes"] / 1e6
    sent = f"density {figures['density']:.3f}, parcels of {kv_mb:.1f} MB\n\n{table(HEADER, rows)}"
    if not bundled:
        return sent
    density, layers = figures["bundled"][0]["density"], figures["bundled"][0]["layers"]
    return f"{sent}\n\nbundled model, density {density:.3f}, {layers} layers\n\n{table(CERTAIN_HEADER, bundled)}"


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(EarlyShippingConfig, description=__doc__)
    figures = measure(config)
    sys.stdout.write(_report(figures) + "\n")
    write_json(config.json, {"benchmark": "early_shipping", "workload": config.workload, **figures})


if __name__ == "__main__":
    main()
