"""What the services read from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlavaConfig

from shared.kv.layout import KVLayout
from shared.model.loading import load_spec
from shared.model.spec import VLMSpec
from tests.unit.shared.tiny_llava import (
    EOS,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    OTHER_EOS,
    QUERY_HEADS,
    copied,
    edit_json,
)


def read(config: Any, dtype: torch.dtype = torch.float32) -> VLMSpec:
    return VLMSpec.from_config(config, eos_token_ids=frozenset(), dtype=dtype)


def test_the_facts_of_a_checkpoint(tiny_checkpoint: Path) -> None:
    spec = load_spec(tiny_checkpoint, torch.float16)
    assert spec == VLMSpec(
        model_type="llava",
        image_token_id=3,
        num_query_heads=QUERY_HEADS,
        vocabulary=AutoConfig.from_pretrained(tiny_checkpoint).text_config.vocab_size,
        context_tokens=256,
        eos_token_ids=frozenset({EOS, OTHER_EOS}),
        layout=KVLayout(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float16"),
    )


def test_an_explicit_head_width_wins_over_the_quotient(tiny_checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    config.text_config.head_dim = 16
    assert read(config).layout.head_dim == 16
    config.text_config.head_dim = None
    assert read(config).layout.head_dim == HEAD_DIM


def test_without_generation_settings_the_models_own_end_counts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bare = copied(tiny_checkpoint, tmp_path)
    (bare / "generation_config.json").unlink()
    assert load_spec(bare, torch.float32).eos_token_ids == {EOS}
    edit_json(bare / "config.json", lambda fields: fields["text_config"].update(eos_token_id=None))
    assert load_spec(bare, torch.float32).eos_token_ids == frozenset()


@pytest.mark.parametrize(("configured", "expected"), [(OTHER_EOS, {OTHER_EOS}), ([4, 5], {4, 5}), (None, {EOS})])
def test_generation_settings_decide_where_text_ends(
    tiny_checkpoint: Path, tmp_path: Path, configured: object, expected: set[int]
) -> None:
    changed = copied(tiny_checkpoint, tmp_path)
    edit_json(changed / "generation_config.json", lambda fields: fields.update(eos_token_id=configured))
    assert load_spec(changed, torch.float32).eos_token_ids == expected


def test_a_precision_that_kv_cannot_have_is_an_error() -> None:
    with pytest.raises(KeyError):
        read(LlavaConfig(), torch.float64)
