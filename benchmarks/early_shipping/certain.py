"""How much of a parcel is certain while prompts of the bundled model pass: what early shipping has to send."""

from __future__ import annotations

import statistics
from typing import Any

import vlcache

from benchmarks.local_pipeline import LocalPipeline, local_job
from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import draw_samples
from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.registry import build_policy
from prefill_worker.compression.statistics import ObservedLayer
from shared.request.params import Budget


def certain_shares(policies: list[str], budget: Budget, *, prompts: int, threads: int) -> list[dict[str, Any]]:
    """Per policy, means over prompts: of the parcel what is certain after half of the layers and before the last one.

    `density` is that of `vl_cache`, whatever the policy.
    """
    pipeline = LocalPipeline(str(CHECKPOINT), dtype="float32", threads=threads, kv_memory_mib=1, max_num_seqs=1)
    passed = [_layers(pipeline, policies, budget, sample) for sample in draw_samples(seed=0, count=prompts)]
    density = statistics.fmean(1 - VLCache().sparsity(layer) for layers in passed for layer in layers)
    rows = []
    for name in policies:
        shares = [_shares(build_policy(name, {}), layers, budget) for layers in passed]
        rows.append(
            {
                "policy": name,
                "layers": len(passed[0]),
                "density": density,
                "half_way": statistics.fmean(share[len(share) // 2 - 1] for share in shares),
                "before_last": statistics.fmean(share[-2] for share in shares),
            }
        )
    return rows


def _layers(pipeline: LocalPipeline, policies: list[str], budget: Budget, sample: Any) -> list[ObservedLayer]:
    message = vlcache.Message(role="user", parts=[*map(vlcache.Image, sample.images), sample.question])
    prompt = pipeline.build([message.to_proto()], max_new_tokens=2)
    chosen = [VLCache(), *(build_policy(name, {}) for name in policies)]
    jobs = [local_job(policy, budget, max_new_tokens=2) for policy in chosen]
    return pipeline.prefill(prompt, jobs).observed(prompt.shape)


def _shares(policy: Policy, layers: list[ObservedLayer], budget: Budget) -> list[float]:
    """After each layer."""
    cascade, certain = Cascade(policy, layers[0].prompt, budget, len(layers)), list[int]()
    for layer in layers:
        cascade.add(layer)
        certain.append(sum(cascade.certain()))
    selections = select_tokens(policy, layers, budget)
    kept = [sum(selection.num_kept(*layer.key.shape[:2])) for selection, layer in zip(selections, layers, strict=True)]
    return [tokens * len(layers[0].key) / sum(kept) for tokens in certain]
