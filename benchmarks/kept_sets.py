"""What our policies keep of a random prompt of a random text model: one half of the comparison with kvpress.

The pass, the statistics and the selection are the prefill worker's own. `compare_kvpress.py` is the other half: it runs
in an environment of its own, where kvpress has the transformers that it needs, and reads what this leaves in FOLDER.

    python -m benchmarks.kept_sets --folder build/kvpress
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.report import environment
from prefill_worker.compression.pipeline import select_tokens, statistics_for
from prefill_worker.compression.policies.expected_attention import ExpectedAttention
from prefill_worker.compression.policies.pyramid_kv import PyramidKV
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policies.streaming_llm import StreamingLLM
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.statistics import ObservedLayer
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.prompt import Prompt
from shared.model.attention import PREFILL_ATTENTION
from shared.request.params import Budget

# A window above a layer's least share, and kvpress gives all layers the same: 2,000 tokens at 10 % allow 10.
PYRAMID_WINDOW = 8
POLICIES: tuple[Policy, ...] = (SnapKV(), PyramidKV(window=PYRAMID_WINDOW), ExpectedAttention(), StreamingLLM())
Positions = list[list[list[int]]]
"""Per layer and KV head."""
LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 4, 2, 32, 512


@dataclass(frozen=True, kw_only=True)
class KeptSetsConfig:
    """What is kept of which prompt."""

    folder: Path
    """Where model, prompt and kept sets are written."""
    prompt: int = 2000
    """Tokens of the prompt, drawn at random."""
    retentions: tuple[float, ...] = (0.1, 0.3, 0.5)
    """Kept shares."""
    seed: int = 0
    """Of weights and prompt."""


def save_model(config: KeptSetsConfig, folder: Path) -> None:
    """Weights of about unit gain in fp32; attention is the sharper the deeper the layer."""
    torch.manual_seed(config.seed)
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=QUERY_HEADS * HEAD_DIM,
        intermediate_size=2 * QUERY_HEADS * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2 * config.prompt,
    )
    model = LlamaForCausalLM(llama)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            layer = re.search(r"layers\.(\d)\.self_attn\.[qk]_proj", name)
            gain = 1.0 + int(layer[1]) / 2 if layer else 1.0
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else gain * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)


def random_prompt(config: KeptSetsConfig) -> Prompt:
    """Text alone."""
    generator = torch.Generator().manual_seed(config.seed)
    return Prompt(
        inputs={"input_ids": torch.randint(VOCABULARY, (1, config.prompt), generator=generator)},
        position_ids=torch.arange(config.prompt)[None],
        next_position=config.prompt,
        shape=PromptShape(visual=torch.zeros(config.prompt, dtype=torch.bool)),
        pixels=(),
    )


def observed_layers(model: PreTrainedModel, prompt: Prompt, policy: Policy) -> list[ObservedLayer]:
    """One pass."""
    prefilled = PrefillEngine(model).prefill(prompt, statistics_for(policy, prompt.shape), threading.Event())
    return prefilled.observed(prompt.shape)


def kept_positions(policy: Policy, layers: list[ObservedLayer], retention: float) -> Positions:
    """What stays, ascending."""
    kept = []
    for selection in select_tokens(policy, layers, Budget(retention=retention)):
        assert selection.chosen is not None
        kept.append([head.nonzero().flatten().tolist() for head in selection.chosen])
    return kept


def ranked_positions(policy: Policy, layers: list[ObservedLayer]) -> Positions:
    """All tokens, the best first: what these policies would keep at any budget."""
    return [policy.score(layer).sort(dim=1, descending=True, stable=True).indices.tolist() for layer in layers]


def main(config: KeptSetsConfig) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    checkpoint = config.folder / "model"
    save_model(config, checkpoint)
    model = LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation=PREFILL_ATTENTION).eval()
    prompt = random_prompt(config)
    layers = {policy: observed_layers(model, prompt, policy) for policy in POLICIES}
    kept = {
        policy.name: {str(share): kept_positions(policy, seen, share) for share in config.retentions}
        for policy, seen in layers.items()
    }
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "workload": {
            "layers": LAYERS,
            "query_heads": QUERY_HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "dtype": "float32",
            "prompt": config.prompt,
            "seed": config.seed,
            "policies": {policy.name: dataclasses.asdict(policy) for policy in POLICIES},  # type: ignore[call-overload]
        },
        "input_ids": prompt.inputs["input_ids"][0].tolist(),
        "kept": kept,
        "ranked": {policy.name: ranked_positions(policy, seen) for policy, seen in layers.items()},
        "environment": environment(),
    }
    (config.folder / "kept.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(tyro.cli(KeptSetsConfig))
