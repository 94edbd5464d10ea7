"""At retention 0.1 a ragged batch computes what the whole model computes over full caches, evicted rows masked.

Any rows may have been kept here, other ones in every layer and KV head; `test_prefill_to_decode.py` has those of a
policy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from decode_worker.engine import EagerEngine
from shared.model.loading import load_decode_model, load_spec
from tests.families.decoding import Computed, DoubleSlabs, compute, short_text
from tests.families.loaded import Loaded, noise
from tests.families.oracle import NAME
from tests.unit.decode_worker.pools import CPU
from tests.unit.decode_worker.sequences import advance
from tests.unit.decode_worker.sighted import Tokens, some_seen
from tests.unit.decode_worker.test_engine import Recorded

STEPS = 20


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
        attn_implementation={"text_config": NAME},
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
    model = Recorded(load_decode_model(loaded.folder, dtype=torch.float64, device=CPU))
    engine = EagerEngine(model, memory)
    for _ in range(STEPS):
        fed = [(each.last_token, each.next_position) for each in batch]
        advance(batch, engine.step(batch))
        for row, (each, keep, (token, position)) in enumerate(zip(computed, kept, fed, strict=True)):
            expected = masked_step(oracle, each, keep, token, position)
            assert expected.dtype == model.logits.dtype == torch.float64
            torch.testing.assert_close(model.logits[row], expected, rtol=0, atol=1e-9)
