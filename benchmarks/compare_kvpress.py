"""What kvpress (NVIDIA, Apache-2.0) keeps of the same prompt of the same model as our policies: the other half.

Runs in an environment of its own with kvpress installed, as a script, and imports nothing of this project:

    python benchmarks/compare_kvpress.py --kept build/kvpress/kept.json --json FILE

What a press kept is read from the cache that it leaves: compression changes no key of a prefill, so every row that is
left equals one row of the same pass without a press, bit by bit. A press's code is only called.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kvpress  # type: ignore[import-not-found]  # lives in an environment of its own
import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

Kept = list[list[list[int]]]
"""Positions per layer and KV head."""


def press_for(policy: str, parameters: Mapping[str, Any], retention: float) -> Any:
    """The press of a policy, with the same parameters."""
    forgotten = 1 - retention
    if policy == "streaming_llm":
        return kvpress.StreamingLLMPress(forgotten, n_sink=parameters["sinks"])
    if policy == "expected_attention":
        return kvpress.ExpectedAttentionPress(
            forgotten, n_sink=parameters["sinks"], n_future_positions=parameters["future"]
        )
    window = {"window_size": parameters["window"], "kernel_size": parameters["kernel"]}
    if policy == "pyramid_kv":
        return kvpress.PyramidKVPress(forgotten, **window, beta=parameters["beta"])
    return kvpress.SnapKVPress(forgotten, **window)


@torch.inference_mode()
def keys_left(model: PreTrainedModel, input_ids: torch.Tensor, press: Any | None) -> list[torch.Tensor]:
    """Keys in the cache after a prefill, per layer [num_kv_heads, kept, head_dim]."""
    cache = DynamicCache()
    with press(model) if press else contextlib.nullcontext():
        model.model(input_ids[None], past_key_values=cache)
    return [layer.keys[0] for layer in cache.layers]


def kept_by(model: PreTrainedModel, input_ids: torch.Tensor, press: Any) -> Kept:
    """Positions that the press left."""
    whole, left = keys_left(model, input_ids, None), keys_left(model, input_ids, press)
    return [
        [_places(rows, among) for rows, among in zip(part, layer, strict=True)]
        for part, layer in zip(left, whole, strict=True)
    ]


def compared(ours: Kept, ranked: Kept, theirs: Kept) -> list[dict[str, Any]]:
    """Per layer: kept tokens of a KV head, and means of Jaccard indices over KV heads.

    `jaccard` compares what both keep, `jaccard_at_theirs` the best of ours, as many as they keep, with what they keep.
    """
    rows = []
    for own_layer, order, their_layer in zip(ours, ranked, theirs, strict=True):
        count = len(their_layer[0])
        rows.append(
            {
                "ours": len(own_layer[0]),
                "theirs": count,
                "jaccard": _mean_jaccard(own_layer, their_layer),
                "jaccard_at_theirs": _mean_jaccard([head[:count] for head in order], their_layer),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, required=True, help="what benchmarks.kept_sets wrote")
    parser.add_argument("--json", type=Path, required=True, help="where the comparison is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    stored = json.loads(arguments.kept.read_text())
    model = LlamaForCausalLM.from_pretrained(stored["checkpoint"], dtype=torch.float32).eval()
    input_ids = torch.tensor(stored["input_ids"])
    layers: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for policy, shares in stored["kept"].items():
        layers[policy] = {}
        for share, ours in shares.items():
            press = press_for(policy, stored["workload"]["policies"][policy], float(share))
            layers[policy][share] = compared(ours, stored["ranked"][policy], kept_by(model, input_ids, press))
    figures = {
        "benchmark": "kvpress",
        "workload": stored["workload"],
        "layers": layers,
        "environment": stored["environment"],
        "kvpress_versions": {name: importlib.metadata.version(name) for name in ("kvpress", "torch", "transformers")},
    }
    arguments.json.write_text(json.dumps(figures) + "\n")
    sys.stdout.write(_table(layers) + "\n")


def _places(rows: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Where each of `rows` [kept, head_dim] lies in `among` [num_tokens, head_dim]; each in exactly one place."""
    equal = (rows[:, None] == among).all(dim=2)
    assert bool((equal.sum(dim=1) == 1).all()), "a key that is left is not a key of the prompt, or of two tokens"
    return sorted(equal.int().argmax(dim=1).tolist())


def _table(layers: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> str:
    header = "| policy | retention | layer | ours | kvpress | jaccard | jaccard at kvpress's count |"
    lines = [header, "|---|---|---|---|---|---|---|"]
    for policy, shares in layers.items():
        for share, rows in shares.items():
            for layer, row in enumerate(rows):
                agreement = f"{row['jaccard']:.4f} | {row['jaccard_at_theirs']:.4f}"
                lines.append(f"| {policy} | {share} | {layer} | {row['ours']} | {row['theirs']} | {agreement} |")
    return "\n".join(lines)


def _mean_jaccard(ours: list[list[int]], theirs: list[list[int]]) -> float:
    heads = [(set(own), set(their)) for own, their in zip(ours, theirs, strict=True)]
    return sum(len(own & their) / len(own | their) for own, their in heads) / len(heads)


if __name__ == "__main__":
    main()
