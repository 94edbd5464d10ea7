"""At retention 0.1 a decode worker computes what the whole model computes over its full cache, evicted rows masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForImageTextToText
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from decode_worker.engine import EagerEngine
from shared.model.loading import load_decode_model, load_spec
from tests.families.decoding import Computed, DoubleSlabs, compute, short_text
from tests.families.loaded import Loaded, noise
from tests.unit.decode_worker.pools import CPU
from tests.unit.decode_worker.sequences import advance
from tests.unit.decode_worker.sighted import Tokens, some_seen

STEPS = 20


def masked_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any = None, *, scaling: float, evicted: Any = None, **_: Any
) -> Any:
    """Attention over the full cache under the family's own mask; `evicted` tokens by layer and KV head are unseen."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    logits = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif query.shape[2] > 1:
        logits = logits.masked_fill(torch.ones(logits.shape[2:]).triu(1).bool(), -torch.inf)
    for kv_head, tokens in enumerate(evicted[module.layer_idx] if evicted else ()):
        logits[:, kv_head * group : (kv_head + 1) * group, :, tokens] = -torch.inf
    return (logits.softmax(dim=-1) @ value).transpose(1, 2), None


AttentionInterface.register("family_oracle", masked_attention)
AttentionMaskInterface.register("family_oracle", sdpa_mask)


class Noted:
    """A model whose logits are seen before the engine rounds them."""

    device = CPU

    def __init__(self, model: Any) -> None:
        self._model = model
        self.logits = torch.empty(0)

    def __call__(self, **inputs: Any) -> Any:
        output = self._model(**inputs)
        self.logits = output.logits[:, -1]
        return output


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def tenth(length: int, kept: Tokens, seed: int) -> Tokens:
    """About a tenth of a prompt, of what may be kept: other tokens and counts in every layer and head."""
    generator = torch.Generator().manual_seed(seed)
    least = max(1, length // 10)
    chosen = []
    for tokens in kept:
        count = min(len(tokens), least + int(torch.randint(0, 3, (), generator=generator)))
        places = torch.randperm(len(tokens), generator=generator)[:count].sort().values
        chosen.append([tokens[place] for place in places])
    return chosen


@torch.inference_mode()
def masked_step(oracle: Any, computed: Computed, kept: Tokens, token: int, position: int) -> torch.Tensor:
    heads = len(kept) // len(computed.cache.layers)
    evicted = [sorted(set(range(computed.num_tokens)) - set(tokens)) for tokens in kept]
    output = oracle(
        input_ids=torch.tensor([[token]]),
        position_ids=torch.tensor([[position]]),
        past_key_values=computed.cache,
        use_cache=True,
        evicted=[evicted[first : first + heads] for first in range(0, len(evicted), heads)],
    )
    return output.logits[0, -1]


@pytest.fixture(scope="module")
def oracle(loaded: Loaded) -> Any:
    """The whole model in double precision."""
    return AutoModelForImageTextToText.from_pretrained(
        loaded.folder,
        dtype=torch.float64,
        local_files_only=True,
        attn_implementation={"text_config": "family_oracle"},
    ).eval()


def test_logits_are_those_of_a_full_cache_whose_evicted_rows_are_masked(loaded: Loaded, oracle: Any) -> None:
    layout = load_spec(loaded.folder, torch.float32).layout
    asked = [
        loaded.chat([noise(56, 84, seed=2)]),
        short_text(loaded, 5),
        loaded.chat([noise(112, 56, seed=1), noise(28, 28)]),
        loaded.chat(),
    ]
    computed = [compute(oracle, in_double(inputs)) for inputs in asked]
    kept = [
        tenth(each.num_tokens, some_seen(layout, each.num_tokens, 0, every=True), seed)
        for seed, each in enumerate(computed)
    ]
    memory = DoubleSlabs(layout)
    batch = [memory.sequence(each, keep, STEPS) for each, keep in zip(computed, kept, strict=True)]
    model = Noted(load_decode_model(loaded.folder, dtype=torch.float64, device=CPU))
    engine = EagerEngine(model, memory)
    for _ in range(STEPS):
        fed = [(each.last_token, each.next_position) for each in batch]
        advance(batch, engine.step(batch))
        for row, (each, keep, (token, position)) in enumerate(zip(computed, kept, fed, strict=True)):
            expected = masked_step(oracle, each, keep, token, position)
            assert expected.dtype == model.logits.dtype == torch.float64
            torch.testing.assert_close(model.logits[row], expected, rtol=0, atol=1e-9)
